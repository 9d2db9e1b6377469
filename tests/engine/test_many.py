"""Many sources in one run: one network, finished ones skipped, failures collected, a manifest that is always true."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from flowreel.engine import api, many
from flowreel.engine import manifest as manifests
from flowreel.engine.config import ModelConfig
from flowreel.engine.data import Frame
from flowreel.engine.errors import (
    DeviceError,
    OutputBusyError,
    OutputExistsError,
    OutputWriteError,
    ResumeMismatchError,
    SomeSourcesFailedError,
    UnknownOutputError,
    UnsupportedSourceError,
    UsageError,
    WeightsNotFoundError,
)
from flowreel.engine.inference import Network
from flowreel.engine.manifest import Ledger, SourceReport
from flowreel.engine.many import ManyProgress, ManyReport, run_many
from flowreel.engine.protocols import Source
from flowreel.engine.publish import atomic_file
from flowreel.engine.sources import open_source
from flowreel.sinks import open_store


@pytest.fixture(scope="module")
def tiny(tiniest_weights: str) -> str:
    return tiniest_weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[ModelConfig]:
    """One entry for each time a network is loaded."""
    loaded: list[ModelConfig] = []
    real = many.load_network

    def load(config: ModelConfig) -> Network:
        loaded.append(config)
        return real(config)

    monkeypatch.setattr(many, "load_network", load)
    return loaded


def clip(name: str, frames: int = 3, size: tuple[int, int] = (64, 48)) -> str:
    """A small video of noise."""
    rng = np.random.default_rng(frames)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with av.open(name, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _ in range(frames):
            picture = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return name


def manifest(path: str = "out/flowreel-manifest.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def statuses(report: ManyReport) -> list[str]:
    return [source.status for source in report.sources]


def stamps(*names: str) -> list[int]:
    return [Path(name).stat().st_mtime_ns for name in names]


STORE, VIDEO, FLO = "out/{stem}.zarr", "out/{stem}.mkv", "out/{stem}/%04d.flo"


def test_every_source_gets_what_a_run_of_its_own_would_give(tiny: str, loads: list[ModelConfig]) -> None:
    sources = [clip("a.mp4"), clip("in/b.mp4", 4, (80, 64)), "synthetic:objects?size=64x64&frames=2"]
    report = run_many(sources, STORE, weights=tiny, max_error=0)
    assert statuses(report) == ["done"] * 3
    assert [source.flows for source in report.sources] == [2, 3, 1]
    assert len(loads) == 1
    report.raise_if_failed()
    for source, stem in zip(sources, ("a", "b", "objects"), strict=True):
        api.run(source, "alone.zarr", weights=tiny, max_error=0, overwrite=True)
        np.testing.assert_array_equal(open_store(f"out/{stem}.zarr")[:], open_store("alone.zarr")[:])


def test_one_failure_does_not_stop_the_others(tiny: str) -> None:
    sources = [clip("a.mp4"), "missing.mp4", clip("one.mp4", 1), clip("b.mp4")]
    report = run_many(sources, [STORE, VIDEO], weights=tiny)
    assert statuses(report) == ["done", "failed", "failed", "done"]
    with pytest.raises(SomeSourcesFailedError) as caught:
        report.raise_if_failed()
    for words in ("2 of 4 sources failed", "missing.mp4", "out/flowreel-manifest.json"):
        assert words in str(caught.value)
    written = manifest()
    assert (written["ended"], written["not_reached"]) == (True, [])
    a, missing, one, _ = written["sources"]
    assert (a["source"], a["status"], a["outputs"], a["flows"]) == ("a.mp4", "done", ["out/a.zarr", "out/a.mkv"], 2)
    assert a["error"] is None
    assert a["seconds"] > 0
    assert missing["error"]["type"] == "SourceNotFoundError"
    assert "missing.mp4" in missing["error"]["message"]
    assert one["error"]["type"] == "TooFewFramesError"
    json.dumps(report.as_json())
    assert report.as_json()["sources"][0]["run"]["pairs"] == 2  # type: ignore[index]


def test_the_same_again_does_only_what_is_left(tiny: str, loads: list[ModelConfig]) -> None:
    sources = [clip("a.mp4"), "b.mp4", clip("c.mp4")]
    run_many(sources, [STORE, VIDEO], weights=tiny)
    before = stamps("out/a.zarr", "out/a.mkv", "out/c.zarr", "out/c.mkv")
    clip("b.mp4")
    report = run_many(sources, [STORE, VIDEO], weights=tiny)
    assert statuses(report) == ["skipped", "done", "skipped"]
    assert [source.flows for source in report.sources] == [2, 2, 2]
    loads.clear()
    report = run_many(sources, [STORE, VIDEO], weights=tiny)
    assert [(source.status, source.flows) for source in report.sources] == [("skipped", 2)] * 3
    assert not loads
    with pytest.raises(WeightsNotFoundError):
        run_many(sources, [STORE, VIDEO], weights="nowhere.pth")
    with pytest.raises(UsageError):
        run_many(sources, [STORE, VIDEO], weights=tiny, model="FlowNet9")
    assert stamps("out/a.zarr", "out/a.mkv", "out/c.zarr", "out/c.mkv") == before


def test_many_sources_do_not_each_take_the_longer_the_more_they_are(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names every source: with thousands, writing it took longer than computing short clips."""
    written: list[Path] = []
    publish = manifests.publish_bytes
    monkeypatch.setattr(
        manifests, "publish_bytes", lambda path, *pieces: written.append(path) or publish(path, *pieces)
    )
    encoded: list[SourceReport] = []
    as_json = SourceReport.as_json
    monkeypatch.setattr(SourceReport, "as_json", lambda report: encoded.append(report) or as_json(report))
    sources = [clip(f"{name}.mp4") for name in "abcd"]
    run_many(sources, VIDEO, weights=tiny)
    assert len(encoded) == 2 * len(sources)
    assert len(written) == 2 * len(sources) + 1  # as each begins and ends, and at the end
    written.clear()
    assert statuses(run_many(sources, VIDEO, weights=tiny)) == ["skipped"] * 4
    assert len(written) == 1
    assert [entry["status"] for entry in manifest()["sources"]] == ["skipped"] * 4


def test_only_the_outputs_that_are_missing_are_made(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    run_many(sources, [STORE, VIDEO], weights=tiny)
    before = stamps("out/a.zarr")
    Path("out/a.mkv").unlink()
    assert statuses(run_many(sources, [STORE, VIDEO], weights=tiny)) == ["done", "skipped"]
    assert Path("out/a.mkv").exists()
    assert stamps("out/a.zarr") == before


def test_outputs_by_a_longer_name_are_known_to_be_done(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    outputs = [f"./{template}" for template in (STORE, VIDEO, FLO)]
    run_many(sources, outputs, weights=tiny)
    Path("link").symlink_to("out")
    for folder in ("./out", "link"):
        again = [template.replace("out", folder, 1) for template in (STORE, VIDEO, FLO)]
        assert statuses(run_many(sources, again, weights=tiny)) == ["skipped"] * 2


def test_the_same_again_from_another_folder(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or after everything moved together."""
    clip("all/in/a.mp4")
    clip("all/in/b.mp4", 4)
    scene = "synthetic:objects?size=64x64&frames=2"
    monkeypatch.chdir("all")
    with pytest.raises(KeyboardInterrupt):
        run_many(["in/a.mp4", scene, "in/b.mp4"], [VIDEO, FLO], weights=tiny, progress=interrupt_at(3))
    assert manifest()["folder"] == ".."
    monkeypatch.chdir("..")
    Path("all").rename("moved")
    Path("moved/out/b").mkdir(exist_ok=True)
    Path("moved/out/b/0000.flo").touch()  # as if that run had been killed while it named its files
    outputs = [f"moved/{template}" for template in (VIDEO, FLO)]
    report = run_many(["moved/in/a.mp4", scene, "moved/in/b.mp4"], outputs, weights=tiny)
    assert [(source.status, source.flows) for source in report.sources] == [("skipped", 2), ("skipped", 1), ("done", 3)]
    here = [str(Path(output).absolute()) for output in outputs]
    assert statuses(run_many([str(Path("moved/in/b.mp4").absolute())], here, weights=tiny)) == ["skipped"]
    assert [entry["source"] for entry in manifest("moved/out/flowreel-manifest.json")["earlier"]] == [
        "moved/in/a.mp4",
        scene,
    ]
    monkeypatch.chdir("moved/in")
    outputs = [f"../{template}" for template in (VIDEO, FLO)]
    assert statuses(run_many(["a.mp4", scene, "b.mp4"], outputs, weights=tiny)) == ["skipped"] * 3


def test_stdin_is_known_in_another_folder(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = b"FRAME\n" + bytes(64 * 64 * 3 // 2)
    Path("clip.y4m").write_bytes(b"YUV4MPEG2 W64 H64 F25:1\n" + 3 * frame)
    with open("clip.y4m") as video:
        monkeypatch.setattr(sys, "stdin", video)
        run_many("-", VIDEO, weights=tiny)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    (source,) = run_many("-", f"../{VIDEO}", weights=tiny).sources
    assert (source.status, source.flows) == ("skipped", 2)
    assert manifest("../out/flowreel-manifest.json")["earlier"] == []


@pytest.mark.parametrize("template", [STORE, VIDEO, FLO])
def test_another_source_of_the_same_name_is_not_taken_for_done(
    template: str, tiny: str, loads: list[ModelConfig]
) -> None:
    """Nor is its output replaced, and the first source is still known to be done when it is asked for again."""
    run_many([clip("A/x.mp4", 3), clip("A/y.mp4", 3)], template, weights=tiny)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file() and path.suffix != ".json"}
    loads.clear()
    clip("B/y.mp4", 3)
    for _ in range(2):
        report = run_many([clip("B/x.mp4", 4), "B/y.mp4"], template, weights=tiny)
        assert statuses(report) == ["failed", "skipped"]  # y.mp4 has the same name and content in both folders
        assert isinstance(report.failed[0].error, ResumeMismatchError)
        assert "x.mp4 is another file than it was" in str(report.failed[0].error)
    assert statuses(run_many(["A/x.mp4", "A/y.mp4"], template, weights=tiny)) == ["skipped"] * 2
    assert not loads
    assert {path: path.read_bytes() for path in before} == before
    assert statuses(run_many(["B/x.mp4"], template, weights=tiny, overwrite=True)) == ["done"]
    assert statuses(run_many(["A/x.mp4", "A/y.mp4"], template, weights=tiny)) == ["failed", "skipped"]


@pytest.mark.parametrize("template", [STORE, VIDEO, FLO])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stop": 3}, "stop was 4, is 3"),
        ({"direction": "backward"}, "direction was forward, is backward"),
        ({"model": "FlowNet2C"}, "model was FlowNet2S, is FlowNet2C"),
        ({"batch": 2}, "batch was 8, is 2"),
    ],
    ids=str,
)
def test_what_was_made_otherwise_is_not_taken_for_done(
    template: str, options: dict[str, Any], words: str, tiny: str
) -> None:
    sources = [clip("a.mp4", 5), clip("b.mp4", 6)]
    given: dict[str, Any] = {"weights": tiny, "stop": 4}
    run_many(sources, template, **given)
    report = run_many(sources, template, **given | options)
    assert statuses(report) == ["failed", "failed"]
    assert all(words in str(source.error) for source in report.sources)
    assert "out/a" in str(report.failed[0].error)
    for same in ({}, {"batch": 8, "precision": "fp32", "model": "FlowNet2S"}):  # the defaults, given explicitly
        assert statuses(run_many(sources, template, **given | same)) == ["skipped", "skipped"]


def test_options_that_do_not_concern_an_output_are_no_difference(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    two_stream = "out/{stem}/flow_x_%05d.png"
    run_many(sources, [STORE, VIDEO, FLO, two_stream], weights=tiny)
    others: dict[str, Any] = {"max_error": 0, "codec": "zstd", "resolution": "native", "bound": 9.0}
    assert statuses(run_many(sources, VIDEO, weights=tiny, **others)) == ["skipped"] * 2
    assert statuses(run_many(sources, two_stream, weights=tiny, bound=9.0)) == ["failed"] * 2
    assert statuses(run_many(sources, STORE, weights=tiny, stream=0)) == ["failed"] * 2
    assert statuses(run_many(sources, FLO, weights=tiny, max_flow=3.0)) == ["skipped"] * 2
    assert statuses(run_many(sources, STORE, weights=tiny, max_flow=3.0)) == ["skipped"] * 2
    assert statuses(run_many(sources, VIDEO, weights=tiny, max_flow=3.0)) == ["failed"] * 2
    assert statuses(run_many(sources, STORE, weights=tiny, max_error=0)) == ["failed"] * 2


def test_a_missing_output_is_not_made_otherwise_than_those_beside_it(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    run_many(sources, [STORE, VIDEO], weights=tiny)
    Path("out/b.mkv").unlink()
    report = run_many(sources, [STORE, VIDEO], weights=tiny, direction="backward")
    assert statuses(report) == ["failed", "failed"]
    assert not Path("out/b.mkv").exists()


def test_a_video_that_nobody_knows_of_is_neither_done_nor_replaced(tiny: str) -> None:
    Path("out").mkdir()
    Path("out/a.mkv").write_text("mine")
    for _ in range(2):
        report = run_many([clip("a.mp4")], VIDEO, weights=tiny)
        assert isinstance(report.sources[0].error, OutputExistsError)
    assert Path("out/a.mkv").read_text() == "mine"


def test_a_recording_that_grew(tiny: str) -> None:
    """A folder gets more images: with ``resume`` the store is continued, and the outputs beside it are made again."""

    def pictures(count: int) -> None:
        Path("take").mkdir(exist_ok=True)
        for number in range(count):
            Image.fromarray(np.full((64, 64, 3), number, np.uint8)).save(f"take/{number}.png")

    pictures(4)
    outputs = [STORE, "out/{stem}/%03d.flo"]
    run_many(["take"], outputs, weights=tiny)
    pictures(7)
    report = run_many(["take"], outputs, weights=tiny)
    assert statuses(report) == ["failed"]
    assert "--resume" in str(report.failed[0].error)
    report = run_many(["take"], outputs, weights=tiny, resume=True)
    assert [(source.status, source.flows) for source in report.sources] == [("done", 6)]
    assert len(open_store("out/take.zarr")) == len(list(Path("out/take").iterdir())) == 6
    for again in (True, False):
        assert statuses(run_many(["take"], outputs, weights=tiny, resume=again)) == ["skipped"]
    Path("out/take/003.flo").unlink()
    shutil.rmtree("out/take")
    assert statuses(run_many(["take"], outputs, weights=tiny, resume=True)) == ["done"]  # from the store
    assert len(list(Path("out/take").iterdir())) == 6
    Path("out/flowreel-manifest.json").unlink()
    shutil.rmtree("out/take")
    assert statuses(run_many(["take"], outputs, weights=tiny, resume=True)) == ["done"]
    assert statuses(run_many(["take"], outputs, weights=tiny)) == ["skipped"]


def test_overwrite_makes_all_anew(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    run_many(sources, STORE, weights=tiny)
    clip("a.mp4", 5)
    assert statuses(run_many(sources, STORE, weights=tiny, overwrite=True)) == ["done", "done"]
    assert len(open_store("out/a.zarr")) == 4


def test_single_files_count_as_done_when_the_manifest_says_so(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4", 4)]
    run_many(sources, FLO, weights=tiny)
    assert Path("out/b/0002.flo").exists()
    for _ in range(2):  # the second time the manifest is that of a run that skipped them
        assert statuses(run_many(sources, FLO, weights=tiny)) == ["skipped", "skipped"]
    Path("out/b/0001.flo").unlink()
    report = run_many(sources, FLO, weights=tiny)
    assert statuses(report) == ["skipped", "failed"]
    assert isinstance(report.failed[0].error, OutputExistsError)
    Path("out/flowreel-manifest.json").unlink()
    assert statuses(run_many(sources, FLO, weights=tiny)) == ["failed", "failed"]


def test_what_earlier_runs_did_is_not_forgotten(tiny: str) -> None:
    """A run of other sources, or one that is interrupted, keeps the entries of sources that it does not touch."""
    Path("b.mp4").symlink_to(clip("a.mp4"))  # still a source of its own
    run_many(["a.mp4", "b.mp4"], FLO, weights=tiny)
    run_many([clip("c.mp4"), clip("d.mp4")], FLO, weights=tiny)
    with pytest.raises(KeyboardInterrupt):
        run_many([clip("e.mp4"), "a.mp4"], FLO, weights=tiny, progress=interrupt_at(1))
    entries = manifest()["sources"] + manifest()["earlier"]
    assert {entry["source"]: entry["status"] for entry in entries} == {
        **dict.fromkeys(["a.mp4", "b.mp4", "c.mp4", "d.mp4"], "done"),
        "e.mp4": "interrupted",
    }
    assert statuses(run_many(["a.mp4", "b.mp4", "c.mp4"], FLO, weights=tiny)) == ["skipped"] * 3
    assert {entry["source"] for entry in manifest()["earlier"]} == {"d.mp4", "e.mp4"}


def test_what_another_run_wrote_meanwhile_is_not_forgotten() -> None:
    path = Path("out/list.json")
    with closing(Ledger(path, [])) as late:  # which begins first, and writes last
        with closing(Ledger(path, [])) as other:
            other.note(SourceReport("a.mp4", "done", ()))
        late.note(SourceReport("b.mp4", "done", ()))
    assert [entry["source"] for entry in manifest("out/list.json")["earlier"]] == ["a.mp4"]


def interrupt_at(number: int) -> Any:
    def hook(progress: ManyProgress) -> None:
        if progress.number == number and progress.run is not None:
            raise KeyboardInterrupt

    return hook


def test_ctrl_c_stops_all_and_the_manifest_says_where(tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4"), clip("c.mp4")]
    with pytest.raises(KeyboardInterrupt):
        run_many(sources, STORE, weights=tiny, progress=interrupt_at(2))
    written = manifest()
    assert [entry["status"] for entry in written["sources"]] == ["done", "interrupted"]
    assert (written["ended"], written["not_reached"]) == (False, ["c.mp4"])
    assert not Path("out/b.zarr").exists()
    assert statuses(run_many(sources, STORE, weights=tiny)) == ["skipped", "done", "done"]


def test_the_manifest_is_true_while_a_source_is_at_work(tiny: str) -> None:
    """A process that is killed at that moment leaves it like this."""
    seen: list[dict[str, Any]] = []

    def look(progress: ManyProgress) -> None:
        if progress.number == 2 and progress.run is not None:
            seen.append(manifest())

    run_many([clip("a.mp4"), clip("b.mp4"), clip("c.mp4")], STORE, weights=tiny, progress=look)
    first = seen[0]
    assert [(entry["source"], entry["status"]) for entry in first["sources"]] == [
        ("a.mp4", "done"),
        ("b.mp4", "interrupted"),
    ]
    assert (first["ended"], first["not_reached"]) == (False, ["c.mp4"])
    assert not list(Path("out").glob("*.partial"))


@pytest.mark.parametrize("template", [STORE, VIDEO, FLO])
def test_what_a_killed_run_left_is_made_anew(template: str, tiny: str) -> None:
    sources = [clip("a.mp4"), clip("b.mp4", 4)]
    killed = Path(template.replace("{stem}", "b").replace("%04d", "0000"))
    left: dict[str, bytes] = {}

    def remember(progress: ManyProgress) -> None:
        if progress.number == 2 and progress.run is not None and not left:
            left["manifest"] = Path("out/flowreel-manifest.json").read_bytes()

    run_many(sources, template, weights=tiny, progress=remember)
    Path("out/flowreel-manifest.json").write_bytes(left["manifest"])  # as it was at that moment
    if template == FLO:
        Path("out/b/0002.flo").unlink()
    else:
        killed.rename(f"{killed}.partial")
    assert statuses(run_many(sources, template, weights=tiny)) == ["skipped", "done"]
    assert killed.exists()
    assert not Path(f"{killed}.partial").exists()


def as_if_killed() -> None:
    """Makes the manifest of one finished source that of a run which was killed in it."""
    left = manifest() | {"made": {}}
    left["sources"][0]["status"] = "interrupted"
    Path("out/flowreel-manifest.json").write_text(json.dumps(left))


def test_resume_continues_what_a_killed_run_left(tiny: str) -> None:
    run_many([clip("a.mp4", 5)], STORE, weights=tiny, shard_bytes=1)  # each flow has a shard
    as_if_killed()
    Path("out/a.zarr").rename("out/a.zarr.partial")
    Path("out/a.zarr.partial/flow/c/3/0/0/0").unlink()
    (source,) = run_many(["a.mp4"], STORE, weights=tiny, shard_bytes=1, resume=True).sources
    assert (source.status, source.run and source.run.pairs, len(open_store("out/a.zarr"))) == ("done", 1, 4)


@pytest.mark.parametrize("outputs", [[FLO], [STORE, FLO]])
def test_what_a_killed_run_left_is_still_its_own_after_a_failure(outputs: list[str], tiny: str) -> None:
    run_many([clip("a.mp4", 4)], outputs, weights=tiny)
    as_if_killed()
    Path("out/a/0002.flo").unlink()
    Path("a.mp4").rename("elsewhere.mp4")
    assert statuses(run_many(["a.mp4"], outputs, weights=tiny)) == ["failed"]
    Path("elsewhere.mp4").rename("a.mp4")
    assert statuses(run_many(["a.mp4"], FLO, weights=tiny)) == ["done"]
    assert len(os.listdir("out/a")) == 3


def test_files_of_somebody_else_are_never_replaced(tiny: str) -> None:
    """Nor by a second run, when the manifest records that this source failed."""
    sources = [clip("a.mp4"), clip("b.mp4")]
    Path("out/b").mkdir(parents=True)
    Path("out/b/0000.flo").write_text("mine")
    for _ in range(2):
        report = run_many(sources, FLO, weights=tiny)
        assert report.sources[1].status == "failed"
        assert Path("out/b/0000.flo").read_text() == "mine"


def test_files_beside_those_that_an_interrupted_run_began_are_not_its_own(tiny: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_many([clip("a.mp4")], VIDEO, weights=tiny, progress=interrupt_at(1))
    Path("out/a.mp4").write_text("mine")
    assert statuses(run_many(["a.mp4"], [VIDEO, "out/{stem}.mp4"], weights=tiny)) == ["failed"]
    assert Path("out/a.mp4").read_text() == "mine"


def test_a_cut_source_stays_unfinished(tiny: str) -> None:
    data = Path(clip("cut.mkv", 9)).read_bytes()
    Path("cut.mkv").write_bytes(data[: len(data) * 4 // 5])
    sources = [clip("a.mp4"), "cut.mkv"]
    for _ in range(2):  # the second run is not hindered by what the first one left
        report = run_many(sources, STORE, weights=tiny)
        assert report.sources[1].status == "failed"
        assert type(report.sources[1].error).__name__ == "TruncatedSourceError"
        assert not open_store("out/cut.zarr").complete
    assert statuses(run_many(sources, STORE, weights=tiny, tolerate_truncation=True)) == ["skipped", "done"]


@pytest.mark.parametrize(
    ("sources", "outputs", "error", "words"),
    [
        ([], STORE, UsageError, "at least one source"),
        (["a.mp4", "b.mp4"], "x.zarr", UsageError, "{stem}"),
        (["a.mp4", "b.mp4"], [STORE, "x.mp4"], UsageError, "x.mp4"),
        (["a.mp4", "net.pth.tar"], "x.zarr", UsageError, "weights are given by --weights; --resume takes no file"),
        (["a.mp4", "b.mp4"], [], UsageError, "at least one output"),
        (["a.mp4", "b.mp4"], "{stem}.gif", UnknownOutputError, ".zarr"),
        (["a.mp4", "take%d.mp4"], "{stem}_%d.flo", UnknownOutputError, "take%d_%d.flo"),
        (["in/a.mkv", "b.mp4", "a.mp4"], STORE, UsageError, "in/a.mkv and a.mp4"),
        (["a.mp4", "a.mp4"], STORE, UsageError, "a.mp4 and a.mp4"),
        (
            ["a.mp4", "b.mp4", "in/../a.x.mp4"],
            "{stem}.x.mp4",
            UsageError,
            "a.x.mp4, an output of a.mp4, is a source, too",
        ),
        (
            ["a.mp4", "ab.mp4"],
            ["{stem}b.zarr", "{stem}.zarr"],
            UsageError,
            "ab.zarr, an output of ab.mp4, is one of a.mp4",
        ),
        (
            ["a.mp4", "ax"],
            "{stem}x/%d.png",
            UsageError,
            "ax/%d.png lies among the images that are being read",
        ),
        (["-", "stdin.mp4"], STORE, UsageError, "- and stdin.mp4"),
        (["1.png", "2.png"], "flow/%06d.flo", UsageError, "1.png and 2.png are two images, not two sources: to take"),
        (["1.png", "2.png"], STORE, UsageError, "name their folder, or put the glob in quotes"),
    ],
)
def test_usage_is_checked_before_anything_runs(
    sources: list[str],
    outputs: str | list[str],
    error: type[Exception],
    words: str,
    tiny: str,
    loads: list[ModelConfig],
) -> None:
    clip("a.mp4")
    clip("b.mp4")
    Path("ax").mkdir()
    for path in ("1.png", "2.png", "ax/1.png", "ax/2.png"):
        Path(path).touch()
    before = sorted(Path().rglob("*"))
    with pytest.raises(error) as caught:
        run_many(sources, outputs, weights=tiny)
    assert words in str(caught.value)
    assert sorted(Path().rglob("*")) == before
    assert not loads


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weights": "nowhere.pth"}, WeightsNotFoundError),
        ({"device": "cuda:99"}, DeviceError),
        ({"step": 0}, UsageError),
        ({"colour": 1}, UsageError),
    ],
)
def test_what_is_wrong_with_all_sources_is_raised_at_once(
    options: dict[str, Any], error: type[Exception], tiny: str
) -> None:
    sources = [clip("a.mp4"), clip("b.mp4")]
    with pytest.raises(error):
        run_many(sources, STORE, **({"weights": tiny} | options))
    assert not Path("out").exists()


def test_one_source_needs_no_stem(tiny: str) -> None:
    assert statuses(run_many([clip("a.mp4")], "x.zarr", weights=tiny, manifest="new/list.json")) == ["done"]
    assert manifest("new/list.json")["sources"][0]["outputs"] == ["x.zarr"]


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (None, "flowreel-manifest.json"),
        (["deep/out/{stem}.zarr", "other/{stem}.mp4"], "deep/out/flowreel-manifest.json"),
        ("deep/{stem}/flow/%06d.flo", "deep/flowreel-manifest.json"),
        ("{stem}/x.zarr", "flowreel-manifest.json"),
    ],
)
def test_where_the_manifest_is(outputs: str | list[str] | None, expected: str, tiny: str) -> None:
    report = run_many(["missing.mp4", "neither.mp4"], outputs, weights=tiny)
    assert report.manifest == expected
    assert len(manifest(expected)["sources"]) == 2


def test_sources_and_outputs_may_come_one_by_one(tiny: str) -> None:
    sources, outputs = iter([clip("a.mp4"), clip("b.mp4")]), iter(["{stem}.zarr", "{stem}.flow.mp4"])
    assert statuses(run_many(sources, outputs, weights=tiny)) == ["done", "done"]
    assert all(
        Path(name).exists() for name in ("a.zarr", "b.zarr", "a.flow.mp4", "b.flow.mp4", "flowreel-manifest.json")
    )


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"sources": []}', "not JSON", '{"sources": ' + "[" * 100_000])
def test_a_file_that_is_no_manifest_is_left_alone(content: str, tiny: str) -> None:
    Path("notes.json").write_text(content)
    with pytest.raises(OutputExistsError, match=r"notes\.json"):
        run_many([clip("a.mp4")], STORE, weights=tiny, manifest="notes.json")
    assert Path("notes.json").read_text() == content


@pytest.mark.parametrize("made", [[], {"a.mkv": 7}, {"a.mkv": {"flows": 2}}, {"a.mkv": {"source": "x"}}])
def test_what_a_manifest_does_not_rightly_tell_is_not_known(made: Any, tiny: str) -> None:
    run_many([clip("a.mp4")], VIDEO, weights=tiny)
    Path("out/flowreel-manifest.json").write_text(json.dumps(manifest() | {"made": made}))
    report = run_many(["a.mp4"], VIDEO, weights=tiny)
    assert isinstance(report.sources[0].error, OutputExistsError)


def test_a_manifest_that_cannot_be_written_is_an_error(tiny: str) -> None:
    Path("file").touch()
    with pytest.raises(OutputWriteError, match="file/list"):
        run_many(["missing.mp4"], STORE, weights=tiny, manifest="file/list.json")


def test_a_manifest_that_is_just_being_written_by_something_else(tmp_path: Path) -> None:
    """Such as by a run whose --stats go to the same file."""
    path = tmp_path / "stats.json"
    with closing(Ledger(path, [])) as ledger, atomic_file(path), pytest.raises(OutputBusyError, match="being written"):
        ledger.write()


def test_one_run_at_a_time_keeps_a_manifest(tiny: str) -> None:
    """Even a run of other sources is refused; what the first one records is found by the next."""
    lock = Path("out/.flowreel-manifest.json.partial")
    Path("out").mkdir()
    lock.touch()  # left by a run that was killed

    def meanwhile(progress: ManyProgress) -> None:
        if progress.run is None:
            return
        before = manifest()
        with pytest.raises(OutputBusyError, match=r"out/flowreel-manifest\.json is being written.*--manifest"):
            run_many([clip("b.mp4")], VIDEO, weights=tiny)
        assert manifest() == before
        assert not Path("out/b.mkv").exists()
        run_many([clip("c.mp4")], VIDEO, weights=tiny, manifest="other.json")

    run_many([clip("a.mp4")], VIDEO, weights=tiny, progress=meanwhile)
    assert not lock.exists()
    assert statuses(run_many(["a.mp4", "b.mp4"], VIDEO, weights=tiny)) == ["skipped", "done"]
    assert sorted(os.listdir("out")) == ["a.mkv", "b.mkv", "c.mkv", "flowreel-manifest.json"]


def test_a_fault_of_our_own_is_written_down_and_gets_out(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Source:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(api, "open_source", broken)
    with pytest.raises(ZeroDivisionError):
        run_many([clip("a.mp4"), clip("b.mp4")], STORE, weights=tiny)
    written = manifest()
    assert [entry["status"] for entry in written["sources"]] == ["failed"]
    assert written["sources"][0]["error"] == {"type": "ZeroDivisionError", "message": "a bug"}


def test_failed_sources_keep_no_memory(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the report would keep alive its traceback, and all local variables in it."""
    opened: list[weakref.ref[Any]] = []

    class Failing:
        def __init__(self, source: Source) -> None:
            self._source = source

        def __getattr__(self, name: str) -> Any:
            return getattr(self._source, name)

        def __iter__(self) -> Iterator[Frame]:
            picture = next(iter(self._source))
            yield picture
            raise UnsupportedSourceError("and here it ends")

    def open_failing(name: str, select: Any, device: str) -> Failing:
        source = Failing(open_source(name, select, device))
        opened.append(weakref.ref(source))
        return source

    monkeypatch.setattr(api, "open_source", open_failing)
    report = run_many([clip("a.mp4"), clip("b.mp4")], STORE, weights=tiny)
    gc.collect()
    assert statuses(report) == ["failed", "failed"]
    assert "and here it ends" in str(report.sources[0].error)
    assert manifest()["sources"][0]["error"]["type"] == "UnsupportedSourceError"
    assert [reference() for reference in opened] == [None, None]


def test_one_source_needs_no_list(tiny: str) -> None:
    assert statuses(run_many(clip("a.mp4"), "a.zarr", weights=tiny)) == ["done"]
    assert statuses(run_many(Path("a.mp4"), "a.zarr", weights=tiny)) == ["skipped"]
