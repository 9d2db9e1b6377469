"""Comparing results: which changes count as worse, which do not, and which results are not comparable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare as comparing
from benchmarks.__main__ import main
from benchmarks.compare import as_text, compare


@pytest.fixture
def verdict(tmp_path: Path, write: Any) -> Any:
    """``verdict(figure, before, after)``: how a change of one figure is judged."""

    def judged(figure: str, before: Any, after: Any, **more: Any) -> str:
        one = write(tmp_path / "a", "x", [{"what": "row", figure: before}], **more)
        other = write(tmp_path / "b", "x", [{"what": "row", figure: after}], **more)
        (change,) = compare(str(one), str(other)).changes
        return change.verdict

    return judged


def test_slower_is_worse_only_beyond_the_spread(verdict: Any, sample: Any) -> None:
    assert verdict("ms", sample(10), sample(11)) == "worse"
    assert verdict("ms", sample(10), sample(9)) == "better"
    assert verdict("ms", sample(10, 0.1), sample(11, 0.1)) == "same"  # the quartiles overlap
    assert verdict("ms", sample(10, 0.001), sample(10.05, 0.001)) == "same"  # only half a percent apart


def test_more_a_second_is_better(verdict: Any, sample: Any) -> None:
    assert verdict("pairs/s", sample(10), sample(11)) == "better"
    assert verdict("of the limit", 0.5, 0.4) == "worse"
    assert verdict("throughput / slowest alone", sample(1.0), sample(0.9)) == "worse"


def test_a_figure_without_a_spread_needs_a_tenth(verdict: Any) -> None:
    assert verdict("peak MB", 100.0, 109.0) == "same"
    assert verdict("peak MB", 100.0, 111.0) == "worse"
    assert verdict("seconds", 0.0, 1.0) == "worse"


def test_what_nobody_can_judge_is_only_shown(verdict: Any) -> None:
    assert verdict("its time / ours", 1.0, 9.0) == ""
    assert verdict("Farneback", 1.0, 9.0) == ""
    assert verdict("Farneback", 1.0, 9.0, unit="px, mean end-point error") == "worse"


def test_numbers_written_out_are_numbers(verdict: Any) -> None:
    assert verdict("mean error px", "0.0078", "0.0178") == "worse"


def test_rows_are_matched_by_names_and_counts(tmp_path: Path, write: Any) -> None:
    rows: list[dict[str, Any]] = [{"op": "warp", "batch": n, "ms": float(n)} for n in (1, 2, 4)]
    before = write(tmp_path / "a", "kernels", rows[:2])
    after = write(tmp_path / "b", "kernels", [rows[2], rows[1] | {"ms": 3.0}])
    found = compare(str(before), str(after))
    assert [(change.row, change.before, change.after) for change in found.changes] == [("warp 2", 2.0, 3.0)]
    assert found.only_before == ("kernels: warp 1",)
    assert found.only_after == ("kernels: warp 4",)


def test_folders_are_compared_case_by_case_the_newest_of_each(tmp_path: Path, write: Any) -> None:
    for date, ms in (("2031-05-06", 1.0), ("2031-05-05", 5.0)):
        write(tmp_path / "a", "kernels", [{"ms": ms}], {"date": date})
    write(tmp_path / "a", "model", [{"ms": 1.0}])
    write(tmp_path / "b", "kernels", [{"ms": 2.0}])
    found = compare(str(tmp_path / "a"), str(tmp_path / "b"))
    assert [(change.case, change.ratio) for change in found.changes] == [("kernels", 2.0)]
    assert found.only_before == ("model",)


def test_of_a_day_the_last_run_of_each_case_counts(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "RESULTS", tmp_path)
    for date, ms in (("2031-05-06", 1.0), ("2031-05-07", 2.0)):
        write(tmp_path, "model", [{"ms": ms}], {"date": date})
        for number, us in (("", 9 * ms), ("-2", ms)):
            path = write(tmp_path, "gpu", [{"us": us}], {"date": date, "gpu": "Abacus"})
            path.rename(tmp_path / f"{date}-gpu{number}.json")
    found = compare("2031-05-06", "2031-05-07")
    assert [(change.case, change.before, change.after) for change in found.changes] == [
        ("gpu", 1.0, 2.0),
        ("model", 1.0, 2.0),
    ]


def test_a_single_result_is_found_in_a_folder_of_many(tmp_path: Path, write: Any) -> None:
    on_gpu = {"gpu": "Abacus"}
    one = write(tmp_path / "a", "kernels", [{"ms": 1.0}], on_gpu)
    write(tmp_path / "b", "kernels", [{"ms": 2.0}], on_gpu)
    write(tmp_path / "b", "model", [{"ms": 2.0}])
    for before in (one, one.parent):
        (change,) = compare(str(before), str(tmp_path / "b")).changes
        assert (change.case, change.ratio) == ("kernels-gpu", 2.0)


def test_other_machines_are_refused_unless_asked_for(
    tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a", "model", [{"ms": 1.0}])
    for number, (name, value) in enumerate({"cpu": "Slide rule", "cores": 64, "torch_threads": 1}.items()):
        after = write(tmp_path / str(number), "model", [{"ms": 1.0}], {name: value})
        assert main(["compare", str(before), str(after)]) == 2
        assert f"{name}: " in capsys.readouterr().err
        assert main(["compare", str(before), str(after), "--anyway"]) == 0
        assert f"not measured alike: {name}" in capsys.readouterr().out
    short = write(tmp_path / "short", "model", [{"ms": 1.0}], short=True)
    assert main(["compare", str(before), str(short)]) == 2
    assert "short run" in capsys.readouterr().err


def test_other_versions_are_compared_and_told(tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", "model", [{"ms": 1.0}])
    after = write(tmp_path / "b", "model", [{"ms": 1.0}], {"versions": {"torch": "3.0"}})
    assert main(["compare", str(before), str(after)]) == 0
    assert "not the same: torch: 2.13.0 and 3.0" in capsys.readouterr().out


def test_a_regression_is_an_exit_code(tmp_path: Path, write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", "model", [{"model": "C", "ms": 1.0}, {"model": "S", "ms": 1.0}])
    after = write(tmp_path / "b", "model", [{"model": "C", "ms": 1.5}, {"model": "S", "ms": 1.0}])
    assert main(["compare", str(before), str(after)]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 figures got worse" in said
    assert said == as_text(compare(str(before), str(after))) + "\n"


def test_nothing_to_compare(tmp_path: Path, write: Any) -> None:
    before = write(tmp_path / "a", "model", [{"ms": 1.0}])
    after = write(tmp_path / "b", "kernels", [{"ms": 1.0}])
    with pytest.raises(ValueError, match="nothing in common"):
        compare(str(before), str(after))
    for absent in (tmp_path / "none", "1999-01-01"):
        with pytest.raises(FileNotFoundError, match="no results at"):
            compare(str(before), str(absent))
    assert main(["compare", str(before), "1999-01-01"]) == 2
