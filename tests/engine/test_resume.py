"""Resumed runs end with the same bytes as uninterrupted ones; stores of native resolution give the same flow."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import flowreel
from flowreel.engine import api, inference
from flowreel.engine import outputs as writing
from flowreel.engine.claims import Claim
from flowreel.engine.cli import call
from flowreel.engine.cli.table import print_summary
from flowreel.engine.config import RunConfig, SelectConfig, SinkConfig
from flowreel.engine.errors import (
    OutputBusyError,
    OutputExistsError,
    ResumeMismatchError,
    StageError,
    TruncatedSourceError,
    UsageError,
)
from flowreel.engine.models import build_model
from flowreel.engine.models.saving import save_weights
from flowreel.engine.outputs import Progress, commit, unname
from flowreel.engine.resume import take_up
from flowreel.engine.sources.images import ImageSource
from flowreel.sinks import open_sink, open_store
from flowreel.sinks.kitti import read_kitti
from flowreel.sinks.store_files import StoreFiles
from flowreel.sinks.store_target import LocalTarget
from tests.fakes.fresh import Fresh

H, W = 64, 96
SHARD_BYTES = 4 * 8 * H * W  # four flows


@pytest.fixture(scope="module")
def tiny(tiny_flownetc: str) -> str:
    return tiny_flownetc


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def pictures(folder: str, first: int, last: int) -> None:
    Path(folder).mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (H, W + 80, 3), np.uint8)
    for number in range(first, last):
        Image.fromarray(texture[:, 2 * number : 2 * number + W]).save(f"{folder}/{number:03}.png")


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class Cut(Exception):
    pass


def cut_run(source: str, outputs: list[str], flows: int, **options: Any) -> None:
    """A run that dies once the outputs have taken ``flows`` flows."""

    def stop(progress: Progress) -> None:
        if progress.flows_done >= flows:
            raise Cut

    with pytest.raises(Cut):
        flowreel.run(source, outputs, progress=stop, **options)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("step", [1, 2])
def test_resumed_is_the_same_to_the_byte(tiny: str, step: int, direction: str) -> None:
    pictures("frames", 0, 38)
    options: dict[str, Any] = {
        "weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 3, "step": step, "direction": direction, "start": 1,
    }  # fmt: skip
    flowreel.run("frames", "whole.zarr", **options)
    cut_run("frames", ["X.zarr"], 9, **options)
    assert 4 <= open_store("X.zarr").available < len(open_store("whole.zarr"))
    report = flowreel.run("frames", ["X.zarr", "X.mp4", "flo/%03d.flo"], resume=True, **options)
    assert contents("X.zarr") == contents("whole.zarr")
    assert (len(open_store("X.zarr")) - report.pairs) % 4 == 0  # whole shards were kept
    assert any("continued after" in note for note in report.notes)
    assert Path("X.mp4").exists()
    assert len(list(Path("flo").iterdir())) == len(open_store("X.zarr"))
    before = contents("X.zarr")
    Path("X.mp4").unlink()
    flo = contents("flo")
    again = flowreel.run("frames", ["X.zarr", "X.mp4", "flo/%03d.flo"], resume=True, **options)
    assert again.pairs == 0
    assert Path("X.mp4").exists()
    assert contents("flo") == flo
    assert contents("X.zarr") == before


def test_a_store_by_a_longer_name_is_not_taken_for_another_output(tiny: str) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 20)
    flowreel.run("frames", "whole.zarr", **options)
    cut_run("frames", ["./X.zarr"], 9, **options)
    report = flowreel.run("frames", "./X.zarr/", resume=True, **options)
    assert [output.path for output in report.outputs] == ["X.zarr"]
    assert contents("X.zarr") == contents("whole.zarr")


@pytest.mark.parametrize("options", [{"max_error": 0, "codec": "zstd"}, {"resolution": "native"}], ids=str)
def test_a_second_store_is_the_same_to_the_byte(tiny: str, options: dict[str, Any]) -> None:
    """As both are of an uninterrupted run: a copy of the flow at full resolution would be another store."""
    shard_bytes = SHARD_BYTES // 16 if "resolution" in options else SHARD_BYTES
    options = {**options, "weights": tiny, "shard_bytes": shard_bytes}
    pictures("frames", 0, 12)
    flowreel.run("frames", "whole.zarr", **options)
    cut_run("frames", ["X.zarr", "Y.zarr"], 5, **options)
    report = flowreel.run("frames", ["X.zarr", "Y.zarr"], resume=True, **options)
    assert contents("X.zarr") == contents("Y.zarr") == contents("whole.zarr")
    assert report.outputs[1].bytes_written == sum(map(len, contents("Y.zarr").values()))
    assert sorted(os.listdir()) == ["X.zarr", "Y.zarr", "frames", "whole.zarr"]


def test_a_short_download_that_was_cut_goes_on_when_all_of_it_is_there(tiny: str, clip: Callable[..., Path]) -> None:
    """A source is recognised by the first MiB of its file, and less than that was there at first."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    noise = np.random.default_rng(0).integers(0, 255, (30, H, W, 3), np.uint8)
    whole = clip("take.mkv", size=(W, H), pictures=[av.VideoFrame.from_ndarray(picture, "rgb24") for picture in noise])
    assert whole.stat().st_size < 1 << 20
    flowreel.run(whole, "whole.zarr", **options)
    Path("take.mkv").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(TruncatedSourceError):
        flowreel.run("take.mkv", "X.zarr", **options)
    there = open_store("X.zarr").available
    assert 4 <= there < 28
    Path("take.mkv").write_bytes(whole.read_bytes())
    assert flowreel.run("take.mkv", "X.zarr", resume=True, **options).pairs == 29 - there // 4 * 4
    assert contents("X.zarr") == contents("whole.zarr")


def noise(clip: Callable[..., Path], codec: str, pix_fmt: str) -> tuple[bytes, list[int]]:
    """A video of 20 frames, and where in it each one's data have their middle."""
    levels = np.random.default_rng(0).integers(0, 255, (20, H, W, 3), np.uint8)
    pictures = [av.VideoFrame.from_ndarray(picture, "rgb24") for picture in levels]
    path = clip("noise.avi", codec=codec, pix_fmt=pix_fmt, size=(W, H), pictures=pictures)
    with av.open(str(path)) as container:
        return path.read_bytes(), [(p.pos or 0) + p.size // 2 for p in container.demux(video=0) if p.size]


@pytest.mark.parametrize("killed", [False, True])
def test_a_damaged_frame_is_not_forgotten_by_the_runs_that_resume(
    tiny: str, clip: Callable[..., Path], killed: bool
) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    whole, places = noise(clip, "mjpeg", "yuvj420p")
    Path("noise.avi").write_bytes(whole[: places[9]] + b"\xff" * 12 + whole[places[9] + 12 :])
    if killed:
        cut_run("noise.avi", ["X.zarr"], 16, **options)
    for again in (killed, True, True):
        with pytest.raises(TruncatedSourceError, match=r"1 frame is damaged, .*: 9"):
            flowreel.run("noise.avi", "X.zarr", resume=again, **options)
    report = flowreel.run("noise.avi", "X.zarr", resume=True, tolerate_truncation=True, **options)
    assert report.pairs == 3
    (loss,) = open_store("X.zarr").attrs["source_losses"]
    assert "frame 9" in loss
    assert f"taken as the whole although {loss}" in report.notes


def without_frames(whole: bytes, places: list[int], first: int, last: int) -> bytes:
    """That video, in which nothing of frames first to last can be decoded."""
    gap = (places[last + 1] - places[last]) // 2 - 16
    begin, end = places[first] - gap, places[last] + gap
    return whole[:begin] + bytes(end - begin) + whole[end:]


@pytest.mark.parametrize("tolerate", [False, True])
def test_a_store_accepted_with_missing_frames_is_complete(tiny: str, clip: Callable[..., Path], tolerate: bool) -> None:
    """It has fewer flows than the source promises, but the source has not grown."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    Path("noise.avi").write_bytes(without_frames(*noise(clip, "mjpeg", "yuvj420p"), 9, 10))
    assert flowreel.run("noise.avi", "X.zarr", tolerate_truncation=True, **options).pairs == 17
    before = contents("X.zarr")
    assert flowreel.run("noise.avi", "X.zarr", resume=True, tolerate_truncation=tolerate, **options).pairs == 0
    assert contents("X.zarr") == before
    assert sorted(os.listdir()) == ["X.zarr", "noise.avi"]


def test_where_damage_leaves_no_flow_to_add_what_is_there_is_all(tiny: str, clip: Callable[..., Path]) -> None:
    """Of the frames after the last whole shard only its own second one decodes."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    whole, places = noise(clip, "mjpeg", "yuvj420p")
    Path("noise.avi").write_bytes(without_frames(whole, places, 9, 18)[: places[18]])
    for again in (False, True):
        with pytest.raises(TruncatedSourceError, match=r"1 of \d+ frames could not be decoded.* beside X.zarr; pass"):
            flowreel.run("noise.avi", ["X.zarr", "X.mp4"] if again else "X.zarr", resume=again, **options)
    report = flowreel.run("noise.avi", ["X.zarr", "X.mp4"], resume=True, tolerate_truncation=True, **options)
    assert (report.pairs, report.flows) == (0, 8)
    assert "continued after 8 flows of an earlier run" in report.notes
    assert sorted(os.listdir()) == ["X.mp4", "X.zarr", "noise.avi"]
    assert len(open_store("X.zarr")) == 8
    assert any("could not be decoded" in loss for loss in open_store("X.zarr").attrs["source_losses"])


def test_a_first_frame_that_is_missing_is_missed_again_when_the_source_has_grown(
    tiny: str, clip: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    whole, places = noise(clip, "mjpeg", "yuvj420p")
    damaged = without_frames(whole, places, 0, 0)
    Path("noise.avi").write_bytes(damaged[: places[4]])
    flowreel.run("noise.avi", "X.zarr", tolerate_truncation=True, **options)
    assert open_store("X.zarr").frame[0] > 0
    Path("noise.avi").write_bytes(damaged)
    with pytest.raises(TruncatedSourceError, match="could not be decoded"):
        flowreel.run("noise.avi", "X.zarr", resume=True, **options)
    flowreel.run("noise.avi", "X.zarr", resume=True, tolerate_truncation=True, **options)
    (loss,) = open_store("X.zarr").attrs["source_losses"]
    assert "frame 0," in loss


def test_a_run_that_was_to_replace_a_store_goes_on_though_no_flow_of_it_can_be_kept(
    tiny: str, clip: Callable[..., Path]
) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    whole, places = noise(clip, "mjpeg", "yuvj420p")
    Path("noise.avi").write_bytes(whole[: places[2]] + b"\xff" * 12 + whole[places[2] + 12 :])
    flowreel.run("noise.avi", ["X.zarr", "X.mp4"], tolerate_truncation=True, **options)
    with pytest.raises(TruncatedSourceError):
        flowreel.run("noise.avi", ["X.zarr", "X.mp4"], overwrite=True, **options)
    with pytest.raises(TruncatedSourceError, match=r"1 frame is damaged, .*: 2"):
        flowreel.run("noise.avi", ["X.zarr", "X.mp4"], resume=True, **options)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("mjpeg", "yuvj420p"), ("huffyuv", "yuv422p")],  # the second one's decoder marks nothing
)
@pytest.mark.parametrize(("cut", "pairs"), [(8, 15), (19, 3)])  # 19: the last frame, so that no frames are added
def test_a_frame_that_was_cut_is_computed_again_when_all_of_it_is_there(
    tiny: str, clip: Callable[..., Path], codec: str, pix_fmt: str, cut: int, pairs: int
) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES, "batch": 4}
    whole, places = noise(clip, codec, pix_fmt)
    Path("noise.avi").write_bytes(whole[: places[cut]])
    assert flowreel.run("noise.avi", "X.zarr", tolerate_truncation=True, **options).pairs == cut
    Path("noise.avi").write_bytes(whole)
    assert flowreel.run("noise.avi", "X.zarr", resume=True, **options).pairs == pairs
    flowreel.run("noise.avi", "whole.zarr", **options)
    assert contents("X.zarr") == contents("whole.zarr")


def test_a_frame_that_was_cut_is_computed_again_where_one_shard_holds_all(tiny: str, clip: Callable[..., Path]) -> None:
    """It is accepted again, so that its loss leaves that shard as it is; but then no flow is left to add."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": 19 * 8 * H * W, "batch": 1, "tolerate_truncation": True}
    whole, places = noise(clip, "mjpeg", "yuvj420p")
    Path("noise.avi").write_bytes(whole[: places[19]])
    assert flowreel.run("noise.avi", "X.zarr", **options).pairs == 19
    Path("noise.avi").write_bytes(whole)
    assert flowreel.run("noise.avi", "X.zarr", resume=True, **options).pairs == 19
    flowreel.run("noise.avi", "whole.zarr", **options)
    assert contents("X.zarr") == contents("whole.zarr")


def test_frames_that_came_later_are_appended(tiny: str) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 8)
    flowreel.run("frames", "X.zarr", resume=True, **options)  # nothing is there: it starts
    assert len(open_store("X.zarr")) == 7
    pictures("frames", 8, 15)
    assert flowreel.run("frames", "X.zarr", resume=True, **options).pairs == 10  # the ragged shard of three is redone
    flowreel.run("frames", "whole.zarr", **options)
    assert contents("X.zarr") == contents("whole.zarr")


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_with_a_complete_store_no_other_output_is_an_older_one(
    tiny: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that grew, killed when its store was complete: --resume used to keep the former, shorter video."""
    outputs = ["X.zarr", "X.mp4", "flo/%03d.flo", "Y.zarr"]
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    named = LocalTarget.finish

    def killed(target: LocalTarget) -> None:
        named(target)
        if target.name == "X.zarr":
            raise KeyboardInterrupt

    pictures("frames", 0, 6)
    flowreel.run("frames", outputs, **options)
    former = Path("X.mp4").read_bytes()
    pictures("frames", 6, 10)
    monkeypatch.setattr(LocalTarget, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        flowreel.run("frames", outputs, **options, **{how: True})
    assert len(open_store("X.zarr")) == 9
    assert how == "overwrite" or not Path("X.mp4").exists()
    monkeypatch.setattr(LocalTarget, "finish", named)
    flowreel.run("frames", outputs, resume=True, **options)
    assert Path("X.mp4").read_bytes() != former
    assert len(list(Path("flo").iterdir())) == len(open_store("Y.zarr")) == 9
    assert sorted(os.listdir()) == ["X.mp4", "X.zarr", "Y.zarr", "flo", "frames"]


def everything() -> dict[str, bytes | None]:
    return {str(path): None if path.is_dir() else path.read_bytes() for path in Path().rglob("*")}


@pytest.mark.parametrize(
    ("output", "lock"),
    [("Y.zarr", "Y.zarr.partial"), ("X.mp4", "X.mp4.partial"), ("flo/%d.flo", "flo/.%d.flo.partial")],
)
def test_what_another_run_writes_or_is_not_ours_keeps_its_name(output: str, lock: str) -> None:
    sink = open_sink(output, SinkConfig())
    for folder in ("Y.zarr", "flo/1.flo", "flo/1.flo.partial", "X.mp4"):
        Path(folder).mkdir(parents=True)
        Path(folder, "mine").touch()
    before = everything()
    unname(sink)
    assert everything() == before
    for folder in ("flo/1.flo", "X.mp4"):
        shutil.rmtree(folder)
        Path(folder).write_bytes(b"of an earlier run")
    Path("Y.zarr/zarr.json").touch()
    claim = Claim(Path(lock), "", Path.mkdir if output == "Y.zarr" else Path.touch)
    Path("Y.zarr.partial" if output == "Y.zarr" else "flo", "of another run").touch()
    before = everything()
    with pytest.raises(OutputBusyError):
        unname(sink)
    assert everything() == before
    claim.release()


@pytest.mark.parametrize("order", [1, -1])
def test_a_run_stopped_between_naming_its_outputs_is_resumed(
    tiny: str, order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if all its flow fits into one shard, so that there is nothing to continue but the complete store."""
    outputs = ["X.zarr", "X.mp4", "Y.zarr", "flo/%03d.flo"][::order]

    def stopped(sink: Any, complete: bool) -> None:
        commit(sink, complete=complete)
        raise KeyboardInterrupt

    pictures("frames", 0, 4)
    monkeypatch.setattr(writing, "commit", stopped)
    with pytest.raises(KeyboardInterrupt):
        flowreel.run("frames", outputs, weights=tiny, shard_bytes=SHARD_BYTES)
    flowreel.run("frames", outputs, weights=tiny, shard_bytes=SHARD_BYTES, resume=True)
    assert sorted(os.listdir()) == ["X.mp4", "X.zarr", "Y.zarr", "flo", "frames"]


@pytest.mark.parametrize("output", ["flo/%03d.flo", "flo/flow_x_%d.png"])
def test_files_that_a_killed_run_was_naming_are_made_again(tiny: str, output: str) -> None:
    pictures("frames", 0, 6)
    flowreel.run("frames", ["X.zarr", output], weights=tiny, max_error=0)
    sound = contents("flo")
    for unnamed in (1, 3, len(sound) - 1):
        for name in sorted(sound, reverse=True)[:unnamed]:
            Path("flo", name).rename(Path("flo", name + ".partial"))
        Path("flo", name + ".partial").write_bytes(b"cut off")
        flowreel.run("frames", ["X.zarr", output], weights=tiny, max_error=0, resume=True)
        assert contents("flo") == sound


@pytest.mark.parametrize("output", ["X.mp4", "flo/%03d.flo", "Y.zarr"])
def test_what_appeared_while_a_store_was_unfinished_is_not_replaced(tiny: str, output: str) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 9)
    flowreel.run("frames", output, **options)
    cut_run("frames", ["X.zarr"], 5, **options)
    before = everything()
    with pytest.raises(OutputExistsError, match=r"is already there, though X\.zarr is unfinished: remove it"):
        flowreel.run("frames", ["X.zarr", output], resume=True, **options)
    assert everything() == before
    flowreel.run("frames", "X.zarr", resume=True, **options)
    report = flowreel.run("frames", ["X.zarr", output], resume=True, **options)
    kept = f"{output} exists already and is kept, though its settings may differ: to remake it, remove it first"
    assert kept in report.notes


def test_of_other_files_none_is_taken_for_those_of_a_killed_run(tiny: str) -> None:
    """Here some exist under both names: the unfinished ones are of a later run than the others."""
    pictures("frames", 0, 6)
    flowreel.run("frames", ["X.zarr", "flo/%03d.flo"], weights=tiny)
    Path("flo/004.flo").unlink()
    for number in (3, 4):
        Path(f"flo/{number:03}.flo.partial").touch()
    before = contents("flo")
    with pytest.raises(OutputExistsError, match="what is there is not the 5 flows"):
        flowreel.run("frames", ["X.zarr", "flo/%03d.flo"], weights=tiny, resume=True)
    assert contents("flo") == before


@pytest.mark.parametrize("stopped", [True, False])
def test_a_store_keeps_the_shards_it_was_begun_with(tiny: str, stopped: bool) -> None:
    """Even if shards would by default have another length, namely whole batches."""
    options: dict[str, Any] = {"weights": tiny, "batch": 2}
    pictures("frames", 0, 20)
    flowreel.run("frames", "whole.zarr", shard_bytes=5 * 8 * H * W, **options)
    if stopped:
        cut_run("frames", ["X.zarr"], 12, shard_bytes=5 * 8 * H * W, **options)
    else:
        for number in range(12, 20):
            Path(f"frames/{number:03d}.png").unlink()
        flowreel.run("frames", "X.zarr", shard_bytes=5 * 8 * H * W, **options)
        pictures("frames", 12, 20)
    flowreel.run("frames", "X.zarr", resume=True, **options)
    assert open_store("X.zarr").shard_length == 5
    assert contents("X.zarr") == contents("whole.zarr")


def test_the_batch_that_was_chosen_before_is_taken_again(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the automatic choice depends on free memory, and may differ when the run is resumed."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 20)
    monkeypatch.setattr(inference, "auto_batch", lambda *_: 3)
    flowreel.run("frames", "whole.zarr", **options)
    cut_run("frames", ["X.zarr"], 9, **options)
    monkeypatch.setattr(inference, "auto_batch", lambda *_: 2)
    assert flowreel.run("frames", "X.zarr", resume=True, **options).batch == 3
    assert contents("X.zarr") == contents("whole.zarr")


def test_another_recording_of_that_name_is_refused(tiny: str) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 20)
    cut_run("frames", ["X.zarr"], 9, **options)
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save("frames/000.png")
    with pytest.raises(ResumeMismatchError, match="another file"):
        flowreel.run("frames", "X.zarr", resume=True, **options)
    pictures("frames", 0, 20)
    with pytest.raises(ResumeMismatchError, match="batch was"):
        flowreel.run("frames", "X.zarr", resume=True, batch=2, **options)
    Path("frames/002.png").unlink()  # everything after it moves forward by one
    Path("frames/zzz.png").write_bytes(Path("frames/019.png").read_bytes())
    Path("frames/zzzz.png").write_bytes(Path("frames/019.png").read_bytes())
    flowreel.run("frames", "X.zarr", resume=True, **options)  # not told apart: images carry no times


def test_a_wrong_landing_is_noticed(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 20)
    cut_run("frames", ["X.zarr"], 9, **options)
    real = ImageSource.__iter__
    monkeypatch.setattr(
        ImageSource,
        "__iter__",
        lambda self: (replace(frame, timestamp_s=frame.timestamp_s + 1) for frame in real(self)),
    )
    with pytest.raises(StageError) as caught:
        flowreel.run("frames", "X.zarr", resume=True, **options)
    assert isinstance(caught.value.__cause__, ResumeMismatchError)
    assert open_store("X.zarr").available >= 4


@pytest.mark.parametrize("stop", [3, 5, 8, "0.12s"])
def test_a_stop_before_the_end_of_an_unfinished_store(tiny: str, stop: int | str) -> None:
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": SHARD_BYTES}
    pictures("frames", 0, 20)
    cut_run("frames", ["X.zarr"], 9, **options)
    before = contents("X.zarr.partial")
    with pytest.raises(ResumeMismatchError, match=r"continues at frame \d+, and|stop was None, is"):
        flowreel.run("frames", "X.zarr", resume=True, stop=stop, **options)
    assert contents("X.zarr.partial") == before


def test_a_stop_long_before_the_end_is_not_sought_one_shard_at_a_time(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look is at all shards: it took hours to be told that a store of thousands was begun with another stop."""
    options: dict[str, Any] = {"weights": tiny, "shard_bytes": 1, "batch": 1}
    pictures("frames", 0, 40)
    cut_run("frames", ["X.zarr"], 36, **options)
    looked: list[int] = []
    whole = StoreFiles.whole
    monkeypatch.setattr(StoreFiles, "whole", lambda self, shard: looked.append(shard) or whole(self, shard))
    with pytest.raises(ResumeMismatchError, match="stop was None, is 3"):
        flowreel.run("frames", "X.zarr", resume=True, stop=3, **options)
    assert len(looked) < 4 * 40


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "FlowNet2CS"}, "model was FlowNet2C, is FlowNet2CS"),
        ({"max_error": 0}, "max error was 0.015625, is 0"),
        ({"codec": "pcodec"}, "codec was blosc, is pcodec"),
        ({"stop": 5}, "stop was None, is 5"),
        ({"start": 1}, "start was 0, is 1"),
        ({"step": 2}, "step was 1, is 2"),
        ({"fit": "crop"}, "flow was 96x64|fit was pad, is crop"),
        ({"direction": "backward"}, "direction was forward, is backward"),
        ({"resolution": "native"}, "resolution was full, is native"),
        ({"batch": 2}, "batch was 8, is 2"),
        ({"precision": "bf16"}, "precision was fp32, is bf16"),
        ({"weights": "other"}, "weights was tiny.safetensors, is other.safetensors"),
    ],
    ids=str,
)
def test_a_complete_store_of_something_else_is_refused(
    tiny: str, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal comes before a network is loaded, and no other output is made from the store."""
    pictures("frames", 0, 8)
    flowreel.run("frames", "X.zarr", weights=tiny)
    if "weights" in options:
        torch.manual_seed(1)
        state = build_model("FlowNet2C", width=0.05).state_dict()
        save_weights("other.safetensors", state, licence="none", made_by={}, width=0.05)
        options = {"weights": "other.safetensors"}
    before = contents(".")
    monkeypatch.setattr(api, "load_network", None)
    with pytest.raises(ResumeMismatchError, match=words):
        flowreel.run("frames", ["X.zarr", "new.mp4", "new/%03d.flo"], resume=True, **{"weights": tiny} | options)
    assert contents(".") == before


def test_a_complete_store_of_another_source_is_refused(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures("frames", 0, 8)
    flowreel.run("frames", "X.zarr", weights=tiny)
    monkeypatch.setattr(api, "load_network", None)
    pictures("others", 0, 6)
    with pytest.raises(
        ResumeMismatchError, match=r"X.zarr is complete, but .* source was frames, is others.*--overwrite"
    ):
        flowreel.run("others", ["X.zarr", "new.mp4"], resume=True, weights=tiny)
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save("frames/000.png")
    with pytest.raises(ResumeMismatchError, match="frames is another file than it was"):
        flowreel.run("frames", ["X.zarr", "new.mp4"], resume=True, weights=tiny)
    pictures("frames", 0, 8)
    Path("frames/007.png").unlink()
    with pytest.raises(ResumeMismatchError, match=r"frames had .* bytes, has"):
        flowreel.run("frames", ["X.zarr", "new.mp4"], resume=True, weights=tiny)
    assert not Path("new.mp4").exists()


def test_a_complete_store_is_told_of_without_its_network(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are not given count as they were; weights are compared by content, not by name."""
    pictures("frames", 0, 8)
    flowreel.run("frames", "X.zarr", weights=tiny, batch=3, precision="bf16")
    monkeypatch.setattr(api, "load_network", None)
    Path("copy.safetensors").write_bytes(Path(tiny).read_bytes())
    report = flowreel.run("frames", "X.zarr", weights="copy.safetensors", model="flownet2c", resume=True)
    assert (report.pairs, report.flows, report.batch) == (0, 7, 3)
    assert report.notes == ("X.zarr is complete already, with 7 flows",)


def test_a_complete_store_is_told_of_whatever_decodes(tiny: str, clip: Callable[..., Path]) -> None:
    source = clip("complete.mp4", count=3)
    flowreel.run(source, "X.zarr", weights=tiny)
    store = open_sink("X.zarr", SinkConfig(resume=True))
    resumed = take_up(source, RunConfig(SelectConfig(decoder="nvdec")), [store], "cuda:0")
    assert resumed is not None
    assert resumed.frames is None


def test_ratios_after_a_resume_are_of_what_each_output_holds(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures("frames", 0, 20)
    cut_run("frames", ["X.zarr"], 9, weights=tiny, shard_bytes=SHARD_BYTES)
    report = flowreel.run("frames", ["X.zarr", "f/%03d.flo"], weights=tiny, shard_bytes=SHARD_BYTES, resume=True)
    store, files = report.outputs
    flo_bytes = 12 + 8 * H * W
    assert report.flows == 19
    assert (store.flo_bytes, files.flo_bytes) == (report.pairs * flo_bytes, 19 * flo_bytes)
    assert files.bytes_written == files.flo_bytes
    print_summary(report)
    said = capsys.readouterr().err.splitlines()
    assert "f/%03d.flo  934.1 kB" in said
    assert any(line.startswith("X.zarr") and " more, " in line for line in said)


def test_resume_wants_a_store(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    pictures("frames", 0, 3)
    assert call(["run", "frames", "-o", "x.mp4", "--weights", tiny, "--resume"]) == 2
    assert "flow store" in capsys.readouterr().err
    assert call(["run", "frames", "-o", "x.zarr", "--weights", tiny, "--resume", "--overwrite"]) == 2


def test_killed_again_and_again(tiny: str, fresh: Fresh) -> None:
    """Killed before a file is renamed into place, a run loses nothing, and the last one ends with the same bytes."""
    pictures("frames", 0, 40)
    code = (
        "import itertools, os, signal, sys, torch; torch.set_num_threads(1); import flowreel\n"
        "real, calls, last = os.replace, itertools.count(1), int(sys.argv[1])\n"
        "def replace(*paths, **options):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if next(calls) == last else real(*paths, **options)\n"
        "os.replace = replace\n"
        f"flowreel.run('frames', 'X.zarr', weights={tiny!r}, shard_bytes={SHARD_BYTES}, resume=True)"
    )
    flowreel.run("frames", "whole.zarr", weights=tiny, shard_bytes=SHARD_BYTES)
    there = 0
    for last in (3, 23, 18):  # about nine renames of metadata, then seven for each shard
        assert fresh.code(code, str(last)) == (-signal.SIGKILL, "")
        before, there = there, open_store("X.zarr").available if Path("X.zarr.partial/zarr.json").exists() else 0
        assert there >= before
    assert 0 < there < 39
    flowreel.run("frames", "X.zarr", weights=tiny, shard_bytes=SHARD_BYTES, resume=True)
    assert contents("X.zarr") == contents("whole.zarr")
    assert sorted(name for name in os.listdir() if name.startswith("X")) == ["X.zarr"]


# Stores of native resolution, which hold the network's own prediction.


@pytest.mark.parametrize("fit", ["pad", "crop", "resize"])
@pytest.mark.parametrize(("max_error", "bound"), [(0, 1e-4), (1 / 64, 1 / 64 + 1e-4)])
def test_native_stores_give_back_the_full_flow(tiny: str, fit: str, max_error: float, bound: float) -> None:
    source = "synthetic:objects?size=150x100&frames=6"
    options: dict[str, Any] = {"weights": tiny, "fit": fit}
    report = flowreel.run(source, ["n.zarr", "n.mp4"], resolution="native", max_error=max_error, **options)
    store = open_store("n.zarr")
    assert store.shape[1:] == (2, report.height, report.width)
    for batch in flowreel.stream(source, **options):
        for flow, number in zip(batch.flow.numpy(), range(batch.index, 99), strict=False):
            np.testing.assert_allclose(store[number], flow, atol=bound, rtol=0)
    assert store.attrs["native"]["factor"] == 4
    assert list(store.check()) == []
    flowreel.run(source, "f.zarr", max_error=max_error, **options)
    native, full = (Path(name, "flow/c/0/0/0/0").stat().st_size - 16 * 512 for name in ("n.zarr", "f.zarr"))
    assert full > 4 * native


def test_an_output_made_from_a_native_store_may_err_more_than_the_store(tiny: str) -> None:
    source, bound = "synthetic:objects?size=96x64&frames=4", 1 / 64
    flowreel.run(source, "exact.zarr", max_error=0, weights=tiny)
    for outputs in ("n.zarr", ["n.zarr", "again/%d.kitti.png"]):
        options: dict[str, Any] = {"resolution": "native", "max_error": bound, "weights": tiny, "resume": True}
        report = flowreel.run(source, outputs, **options)
    exact, native = open_store("exact.zarr")[:], open_store("n.zarr")[:]
    again = np.stack([read_kitti(f"again/{number}.kitti.png")[0].transpose(2, 0, 1) for number in range(3)])
    assert abs(native - exact).max() <= bound < abs(again - exact).max()
    said = "again/%d.kitti.png was made from the store, whose flow is within 0.015625 px of what was computed"
    assert report.notes[-1] == said


def test_xarray_sees_where_native_vectors_lie(tiny: str) -> None:
    import xarray as xr

    flowreel.run("synthetic:objects?size=150x100&frames=3", "n.zarr", resolution="native", weights=tiny)
    with xr.open_zarr("n.zarr") as seen:
        assert seen["flow"].shape == (2, 2, 32, 48)  # a quarter of 128x192, to which 100x150 is padded
        np.testing.assert_allclose(seen["y"][:2], [1.5 - 14, 5.5 - 14])
        np.testing.assert_allclose(seen["x"][:2], [1.5 - 21, 5.5 - 21])
    place = Path("n.zarr/y/c/0")
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    (problem,) = map(str, open_store("n.zarr").check())
    assert problem == "chunk 0 of y: checksum is wrong"


def test_native_has_its_limits(tmp_path: Path) -> None:
    path = tmp_path / "whole.safetensors"
    model = build_model("FlowNet2", width=0.02)
    save_weights(path, model.state_dict(), licence="none", made_by={}, width=0.02)
    source = "synthetic:objects?size=64x64&frames=3"
    with pytest.raises(UsageError, match="full resolution"):
        flowreel.run(source, "x.zarr", resolution="native", weights=str(path))
    flowreel.run(source, "x.zarr", resolution="native", weights=str(path), model="FlowNet2CSS")
    with pytest.raises(UsageError, match="no output is one"):
        flowreel.run(source, "x.mp4", resolution="native", weights=str(path), model="FlowNet2CSS")


def test_pictures_drawn_anew_by_the_same_names_are_another_source(tiny: str) -> None:
    """Uncompressed pictures, so that the file sizes stay the same, and only two of nine change."""
    rng = np.random.default_rng(0)

    def draw(first: int, last: int) -> None:
        Path("frames").mkdir(exist_ok=True)
        for number in range(first, last):
            Image.fromarray(rng.integers(0, 255, (H, W, 3), np.uint8)).save(f"frames/{number:03}.ppm")

    options = {"weights": tiny, "batch": 2, "shard_bytes": SHARD_BYTES}
    draw(0, 9)
    flowreel.run("frames", "x.zarr", **options)
    draw(5, 7)
    with pytest.raises(ResumeMismatchError, match="frames holds something else than it did"):
        flowreel.run("frames", "x.zarr", resume=True, **options)
    (report,) = flowreel.run_many(["frames"], "x.zarr", **options).sources
    assert report.status == "failed"
    assert "holds something else" in str(report.error)
