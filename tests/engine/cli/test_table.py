"""What a user is shown: times, sizes, and the lines about many sources."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from flowreel.engine.cli.table import Live, clock, print_many, print_summary, size
from flowreel.engine.errors import UnsupportedSourceError
from flowreel.engine.manifest import SourceReport
from flowreel.engine.many import ManyProgress, ManyReport
from flowreel.engine.outputs import OutputReport, Progress
from flowreel.engine.run_report import RunReport

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00"), (185.4, "3:05"), (3723, "1:02:03")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (15.7e6, "15.7 MB"), (14.6e9, "14.6 GB")]
)
def test_size(count: float, said: str) -> None:
    assert size(count) == said


def many_progress(number: int, seconds: float | None = None, failed: int = 0) -> ManyProgress:
    run = None if seconds is None else Progress((), flow_count=10, flows_done=4, seconds=seconds)
    return ManyProgress(f"take:on:[{number}].mp4", number, 3, failed, run)


def test_each_source_is_named_once_and_then_how_far_it_is(capsys: Capture) -> None:
    with Live(quiet=False) as live:
        for number, seconds in ((1, None), (1, 0.0), (1, 11.0), (1, 12.0), (3, None), (3, 1.0), (3, 11.0)):
            live.show_many(many_progress(number, seconds, failed=number // 3))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "source 1 of 3: take:on:[1].mp4"
    assert lines[1].startswith("4 of 10 flows")
    assert lines[2] == "source 3 of 3, 1 failed: take:on:[3].mp4"
    assert lines[3].startswith("4 of 10 flows")
    assert len(lines) == 4


def test_the_lines_of_a_log_are_not_broken(capsys: Capture) -> None:
    long = "a folder/" * 20
    with Live(quiet=False) as live:
        live.say(long)
        live.show_many(replace(many_progress(1), source=long))
    assert capsys.readouterr().err == f"{long}\nsource 1 of 3: {long}\n"


def test_quiet_says_nothing_of_sources(capsys: Capture) -> None:
    with Live(quiet=True) as live:
        live.show_many(many_progress(1))
        live.show_many(many_progress(2, 20.0))
    assert capsys.readouterr() == ("", "")


def run_report(*notes: str) -> RunReport:
    return RunReport(
        **dict.fromkeys(("decoder", "device", "precision", "model", "weights"), ""),
        kernels={"correlation": "cuda", "warp": "torch", "channel_norm": "torch"},
        **dict.fromkeys(
            ("pairs", "flows", "seconds", "startup_s", "pairs_per_s", "flo_bytes", "width", "height", "batch"), 0
        ),
        bytes_written=1500,
        outputs=(OutputReport("out/a.zarr", 1500, ("2 vectors are unknown",)),),
        stages=(),
        notes=notes,
    )


def test_a_name_with_terminal_codes_is_shown_escaped(capsys: Capture) -> None:
    print_summary(run_report("\x1b[31m.zarr is complete already, with 2 flows"))
    assert capsys.readouterr().err == "\\x1b[31m.zarr is complete already, with 2 flows\n"


def test_the_summary_of_many_sources(capsys: Capture) -> None:
    run = run_report("it was dark")
    error = UnsupportedSourceError("no video")
    sources = (
        SourceReport("a[1]:on:.mp4", "done", ("out/a.zarr",), 7, 65.0, run=run),
        SourceReport("b.mp4", "skipped", ("out/b.zarr",), 9),
        SourceReport("c.mp4", "failed", ("out/c.zarr",), None, 0.5, error=error),
    )
    print_many(ManyReport(sources, "out/list.json", 66.0))
    said = capsys.readouterr().err
    rows = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    assert ["a[1]:on:.mp4", "done", "7", "1:05", "1.5 kB"] in rows
    assert ["b.mp4", "skipped: there already", "9"] in rows
    assert ["c.mp4", "failed", "0.5 s"] in rows
    for words in (
        "c.mp4: no video",
        "a[1]:on:.mp4: 2 vectors are unknown",
        "a[1]:on:.mp4: it was dark",
        "kernels: cuda (correlation), torch (channel_norm, warp)",
        "1 done, 1 skipped, 1 failed in 1:06; see out/list.json",
    ):
        assert words in said
    alike = SourceReport("d.mp4", "done", ("out/d.zarr",), 7, 1.0, run=replace(run, notes=()))
    print_many(ManyReport((*sources, alike), "out/list.json", 66.0))
    assert capsys.readouterr().err.count("decoded by") == 1
    other = replace(alike, run=replace(run, decoder="PyAV (av1)"))
    print_many(ManyReport((*sources, other), "out/list.json", 66.0))
    said = capsys.readouterr().err
    assert re.findall(r"(\S+): .*decoded by (.*);", said) == [("a[1]:on:.mp4", ""), ("d.mp4", "PyAV (av1)")]


def test_what_is_said_of_several_of_many_sources_is_said_once_and_errors_come_last(capsys: Capture) -> None:
    dark, bright = run_report("it was dark", "it was dark"), replace(run_report("it was bright"), decoder="PyAV (av1)")
    runs = [SourceReport(f"{n}.mp4", "done", (), 7, 1.0, run=(dark, bright)[n % 2]) for n in range(6)]
    failed = SourceReport("bad.mp4", "failed", (), None, 0.5, error=UnsupportedSourceError("no video"))
    print_many(ManyReport((failed, *runs), "out/list.json", 66.0))
    said = capsys.readouterr().err.splitlines()[-7:]
    assert said[0].startswith("note: 2 vectors")
    assert said[1:3] == ["3 sources such as 0.mp4: it was dark", "3 sources such as 1.mp4: it was bright"]
    assert [line.partition(": ")[0] for line in said[3:5]] == ["3 sources such as 0.mp4", "3 sources such as 1.mp4"]
    assert said[5] == "bad.mp4: no video"
