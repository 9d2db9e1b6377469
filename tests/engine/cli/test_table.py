"""What a user is shown: times, sizes, and the lines about many sources."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from flowreel.engine.cli.table import Live, beside_flo, clock, print_many, print_summary, size
from flowreel.engine.errors import UnsupportedSourceError
from flowreel.engine.manifest import SourceReport
from flowreel.engine.many import ManyProgress, ManyReport
from flowreel.engine.outputs import OutputReport, Progress
from flowreel.engine.run_report import RunReport

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0.0 s"), (59.94, "59.9 s"), (59.96, "1:00"), (185.6, "3:06"), (3723, "1:02:03")]
)
def test_clock(seconds: float, said: str) -> None:
    assert clock(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (999_960, "1.0 MB"),
        (15.7e6, "15.7 MB"),
        (14.6e9, "14.6 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_size(count: float, said: str) -> None:
    assert size(count) == said


def many_progress(number: int, seconds: float | None = None, failed: int = 0) -> ManyProgress:
    run = None if seconds is None else Progress((), flow_count=10, flows_done=4, seconds=seconds)
    return ManyProgress(f"take:on:[{number}]\a.mp4", number, 3, failed, run)


def test_each_source_is_named_once_and_then_how_far_it_is(capsys: Capture) -> None:
    with Live(quiet=False) as live:
        for number, seconds in ((1, None), (1, 0.0), (1, 31.0), (1, 32.0), (3, None), (3, 1.0), (3, 11.0)):
            live.show_many(many_progress(number, seconds, failed=number // 3))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        r"source 1 of 3: take:on:[1]\x07.mp4",
        "4 of 10 flows, 0.13 flows/s, 46.5 s to go",
        r"source 3 of 3, 1 failed: take:on:[3]\x07.mp4",
        "4 of 10 flows, 0.36 flows/s, 16.5 s to go",
    ]


def test_of_a_source_of_unknown_length_nothing_is_to_go(capsys: Capture) -> None:
    with Live(quiet=False) as live:
        live.show(Progress((), flow_count=None, flows_done=4, seconds=10.0))
    assert capsys.readouterr().err == "4 flows, 0.40 flows/s\n"


@pytest.mark.parametrize(
    ("flo_bytes", "written", "said"),
    [
        (0, 5, ""),
        (5, 0, ""),
        (100, 98, ""),
        (42, 10, ", 4.2x smaller than .flo"),
        (10, 42, ", 4.2x larger than .flo"),
    ],
)
def test_size_beside_flo(flo_bytes: int, written: int, said: str) -> None:
    assert beside_flo(flo_bytes, written) == said


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


def test_the_summary_of_a_resumed_run(capsys: Capture) -> None:
    """Only the store was resumed: the video was made of all flows."""
    run = replace(run_report("it was \adark"), pairs=2, flows=3, width=9, height=5, weights="\a.pth")
    store = OutputReport("\a.zarr", 1500, ("2 \avectors are unknown",), flo_bytes=6300)
    print_summary(replace(run, kernels={"warp": "cuda"}, outputs=(store, OutputReport("b.mp4", 10, flo_bytes=9450))))
    assert capsys.readouterr().err.splitlines() == [
        "2 flows of 9x5 in 0.0 s (0.00 flows/s; startup 0.0 s)",
        r" (\x07.pth), , batch 0, on ; decoded by ; kernels: cuda",
        r"\x07.zarr  1.5 kB more, 4.2x smaller than .flo",
        r"  2 \x07vectors are unknown",
        "b.mp4  10 bytes, 945.0x smaller than .flo",
        r"note: it was \x07dark",
    ]
    print_summary(replace(run, kernels={}))
    assert "kernels: none\n" in capsys.readouterr().err


def test_the_summary_of_many_sources(capsys: Capture) -> None:
    run = run_report("it was \adark")
    error = UnsupportedSourceError("no video")
    error.add_note("c.zarr is kept")
    sources = (
        SourceReport("a[1]:on:.mp4", "done", ("out/a.zarr",), 7, 65.0, run=run),
        SourceReport("b\a.mp4", "skipped", ("out/b.zarr",), 9),
        SourceReport("c.mp4", "failed", ("out/c.zarr",), None, 0.5, error=error),
    )
    print_many(ManyReport(sources, "out/\alist.json", 66.0))
    said = capsys.readouterr().err
    rows = [re.split(r"\s{2,}", line.strip()) for line in said.splitlines()]
    assert ["a[1]:on:.mp4", "done", "7", "1:05", "1.5 kB"] in rows
    assert [r"b\x07.mp4", "skipped: there already", "9"] in rows
    assert ["c.mp4", "failed", "0.5 s"] in rows
    for words in (
        "c.mp4: no video; c.zarr is kept\n",
        "a[1]:on:.mp4: 2 vectors are unknown",
        r"a[1]:on:.mp4: it was \x07dark",
        "kernels: cuda (correlation), torch (channel_norm, warp)",
        "1 done, 1 skipped, 1 failed in 1:06; see out/\\x07list.json",
    ):
        assert words in said
    alike = SourceReport("d.mp4", "done", ("out/d.zarr",), 7, 1.0, run=replace(run, notes=()))
    print_many(ManyReport((*sources, alike), "out/list.json", 66.0))
    (how,) = (line for line in capsys.readouterr().err.splitlines() if "decoded by" in line)
    assert how.startswith(" (), ")
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
