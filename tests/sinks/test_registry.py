"""The end of a name selects its output format, and nothing heavy is imported before a format is used."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import flowreel.sinks
from flowreel.engine.config import RunConfig, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import UnknownOutputError
from flowreel.sinks import known_outputs, open_sink, without_effect
from flowreel.sinks.registry import OUTPUTS, Output, find_output


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("X.zarr", "ZarrSink"),
        ("a.b/clip.flow.zarr", "ZarrSink"),
        ("X.zarr/", "ZarrSink"),
        ("X.ZARR", "ZarrSink"),
        ("X.mp4", "ColorVideoSink"),
        ("X.mkv", "ColorVideoSink"),
        ("out/%06d.flo", "FloSink"),
        ("out/%06d.png", "ColorPngSink"),
        ("out/%06d.PNG", "ColorPngSink"),
        ("out/%06d.kitti.png", "KittiSink"),
        ("out/%06d.Kitti.PNG", "KittiSink"),
        ("out/flow_x_%06d.kitti.png", "KittiSink"),
        ("out/%06d.npz", "NpzSink"),
        ("out/flow_x_%05d.jpg", "TwoStreamSink"),
        ("out/flow_x_%05d.png", "TwoStreamSink"),
        ("flow_x_%05d.png", "TwoStreamSink"),
        ("flow_x_/%05d.png", "ColorPngSink"),
        ("out/my_flow_x_%05d.png", "ColorPngSink"),
    ],
)
def test_the_end_of_the_name_decides(name: str, factory: str) -> None:
    assert find_output(name).factory == factory


@pytest.mark.parametrize("name", ["X.avi", "X", "zarr", "out/%06d.kitti", "out/%06d.jpeg", "X.zarr.partial", ""])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownOutputError) as caught:
        open_sink(name, SinkConfig())
    for form, _ in known_outputs():
        assert form in str(caught.value)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_second_half_of_a_pair_is_no_output_of_its_own(suffix: str) -> None:
    with pytest.raises(UnknownOutputError, match=r"flow_y_\.\.\. comes beside them"):
        open_sink(f"out/flow_y_%05d.{suffix}", SinkConfig())


def test_open_sink_writes_nothing(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "X.zarr", SinkConfig())
    assert (sink.path, sink.bytes_written, sink.notes) == (str(tmp_path / "X.zarr"), 0, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.form)
def test_every_line_of_the_table_leads_to_its_module(output: Output) -> None:
    assert find_spec(output.module) is not None
    assert find_output(output.form) is output  # no earlier line matches its names


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (["X.zarr"], {"codec": "zstd", "max_error": 0.0}, []),
        (["X.mp4", "a/%06d.flo"], {"codec": "zstd"}, ["codec has no effect here: it is for X.zarr"]),
        (["a/%06d.flo"], {"overwrite": True, "shard_bytes": 1}, []),  # read by every output; no command-line option
        (["a/%06d.png"], {"max_flow": 3.0}, []),
        (["X.zarr", "X.mkv"], {"max_flow": 3.0, "codec": "zstd"}, []),  # each option is read by one of the two
        (["X.zarr"], {"max_flow": 3.0}, ["max-flow has no effect here: it is for X.mp4, X.mkv, DIR/%06d.png"]),
        (["a/flow_x_%05d.jpg"], {"bound": 9.0}, []),
        (["a/%06d.png"], {"encoder": "cpu"}, ["encoder has no effect here: it is for X.mp4, X.mkv"]),
    ],
)
def test_options_that_no_output_reads_are_told(names: list[str], options: dict[str, object], told: list[str]) -> None:
    assert without_effect(names, RunConfig.of(**options).sink) == told


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: output.form)
def test_the_table_names_the_options_that_a_format_reads(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()

    class Watched(SinkConfig):
        def __getattribute__(self, name: str) -> object:
            seen.add(name)
            return super().__getattribute__(name)

    config = Watched()
    seen.clear()  # its constructor reads its own fields
    sink = open_sink(tmp_path / output.form, config)
    sink.open(FlowInfo(16, 32, frame_rate=Fraction(25), frame_count=2, source=SourceId("test")))
    flow, number, time_s = torch.zeros(1, 2, 16, 32), np.zeros(1, np.int64), np.zeros(1)
    sink.write(FlowBatch(flow, 0, number, number + 1, time_s, time_s + 0.04))
    sink.commit()
    assert seen & {option for line in OUTPUTS for option in line.reads} == set(output.reads)


def test_importing_the_package_loads_no_format() -> None:
    heavy = "{'numpy', 'zarr', 'numcodecs', 'av', 'torch', 'flowreel.sinks.zarr_store'}"
    code = f"import sys, flowreel.sinks; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_names_handed_on() -> None:
    for name in flowreel.sinks._HOME:
        assert callable(getattr(flowreel.sinks, name))
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = flowreel.sinks.nothing_such
