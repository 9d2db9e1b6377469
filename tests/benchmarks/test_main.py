"""``python -m benchmarks`` and ``flowreel bench``: cases run in separate processes and write result files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import __main__ as command
from benchmarks import accuracy, data
from benchmarks import one as process
from benchmarks.cases import CASES, SKIPPED, describe
from benchmarks.results import filed_as, newest
from flowreel.engine.cli import bench, call, patience
from flowreel.sinks import write_flo


@pytest.mark.parametrize("name", ["__main__.py", "gpu/surroundings.py"])
def test_torch_waits_as_on_the_command_line(name: str) -> None:
    source = (Path(command.__file__).parent / name).read_text()  # cannot import ``patience``: flowreel may be missing
    assert all(f'"{variable}": "{value}"' in source for variable, value in patience().items())


def test_every_case_says_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(CASES)
    assert all(len(describe(case)) > 20 for case in CASES)


def test_a_case_is_run_and_filed_with_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*accuracy.JUDGED, *accuracy.ALSO):
        pair = tmp_path / "data" / "pairs" / name
        pair.mkdir(parents=True)
        write_flo(pair / "flow.flo", np.ones((64, 64, 2), np.float32))
        for number in (1, 2):
            Image.new("RGB", (64, 64)).save(pair / f"img{number}.png")
    monkeypatch.setenv("FLOWREEL_DATA", str(tmp_path / "data"))
    assert command.main(["accuracy", "--out", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").iterdir()  # no result of ceilings, which this case does not need
    result = json.loads(path.read_text())
    assert result["case"] == "accuracy"
    assert not result["short"]
    assert {"cpu", "cores", "versions", "commit", "date", "load", "torch_threads"} <= set(result["machine"])
    assert result["machine"]["versions"]["torch"]
    assert path.name == f"{result['machine']['date']}-{filed_as(result)}.json"
    assert newest(filed_as(result), tmp_path / "new") == result
    assert "| pair |" in capsys.readouterr().out


def test_a_case_without_what_it_needs_is_skipped_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(case: str) -> str:
        settings = json.dumps({"short": False, "ceilings": {}})
        assert process.main(case, str(tmp_path / "out.json"), settings) == SKIPPED
        return capsys.readouterr().out

    monkeypatch.setattr(data, "FOLDER", tmp_path / "none")
    assert one("clips") == "videos is not in the data folder: set FLOWREEL_DATA\n"
    monkeypatch.delitem(sys.modules, "benchmarks.classical", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "cv2 is not installed: pip install 'flowreel[test]'" in one("classical")
    assert not list(tmp_path.iterdir())


def test_ceilings_come_first_and_reach_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = fake_runs(monkeypatch, {})
    assert command.main(["decode", "kernels", "model", "--out", str(tmp_path)]) == 0
    assert [name for name, _ in ran] == ["ceilings", "decode", "kernels", "model"]
    assert all(settings["ceilings"] == {"cpu": {"memory copy": 1.0}} for _, settings in ran[1:])
    assert sorted(path.stem.split("-")[-1] for path in tmp_path.iterdir()) == ["decode", "kernels", "model"]


def test_a_case_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = fake_runs(monkeypatch, {"decode": 1, "startup": SKIPPED})
    assert command.main(["decode", "startup", "memory", "clips", "--short", "--out", str(tmp_path)]) == 1
    assert [name for name, _ in ran] == ["decode", "startup", "memory"]
    said = capsys.readouterr().out
    assert "decode: failed" in said
    assert "startup: skipped" in said
    assert "clips: has no short form" in said


def fake_runs(monkeypatch: pytest.MonkeyPatch, codes: dict[str, int]) -> list[tuple[str, dict[str, Any]]]:
    """Records which cases would be measured instead of measuring, and ends them with the given codes."""
    ran = []

    def run(line: list[str], **_: object) -> SimpleNamespace:
        name, out, settings = line[-3:]
        ran.append((name, json.loads(settings)))
        machine = {"date": "2031-05-06", "gpu": None}
        result = {"case": name, "machine": machine, "seconds": 1, "rows": [{"x": 1.0}]}
        Path(out).write_text(json.dumps(result | {"ceilings": {"cpu": {"memory copy": 1.0}}}))
        return SimpleNamespace(returncode=codes.get(name, 0), stdout="it could not be")

    monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    return ran


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["modle"], ["compare", "one"], ["--fast"]):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2
    assert "no case is called modle" in capsys.readouterr().err


def test_pages_and_plots_are_made_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- table: nothing -->\n")
    drawn: list[bool] = []
    monkeypatch.setattr(command, "PAGES", (page,))
    monkeypatch.setattr(command, "draw", lambda: drawn.append(True))
    monkeypatch.setattr(command, "filled", lambda text, where: f"{where.name}: {text}")
    assert command.main(["readme"]) == 0
    assert page.read_text() == "README.md: <!-- table: nothing -->\n"
    assert drawn


def test_flowreel_bench_is_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the command adds the benchmarks' folder to it
    assert call(["bench", "list"]) == 0
    assert capsys.readouterr().out.startswith(CASES[0])
    assert call(["bench", "compare", "1999-01-01", "1999-01-02"]) == 2
    with pytest.raises(SystemExit) as ended:
        call(["bench", "--help"])
    assert ended.value.code == 0
    assert "usage: flowreel bench" in capsys.readouterr().out


def test_flowreel_bench_wants_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    assert call(["bench", "list"]) == 2
    assert "not part of the installed package" in capsys.readouterr().err
