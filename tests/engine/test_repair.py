"""A damaged store is repaired from its source to exactly the bytes it had, or the repair is refused with a reason."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

import flowreel
from flowreel.engine import api
from flowreel.engine.data import Frame, PairBatch
from flowreel.engine.errors import (
    DamagedStoreError,
    DeviceError,
    OutputBusyError,
    ResumeMismatchError,
    SourceNotFoundError,
    StageError,
    StoreError,
    StoreNotFoundError,
    TruncatedSourceError,
)
from flowreel.engine.export import export
from flowreel.engine.inference import Inference
from flowreel.engine.models import build_model
from flowreel.engine.models.saving import save_weights
from flowreel.engine.outputs import Progress
from flowreel.engine.pairing import batches, pairs
from flowreel.engine.repair import RepairReport, batches_of_shards, repair
from flowreel.sinks import ShardRewriter, open_store
from flowreel.sinks.shard_file import pack_shard
from flowreel.sinks.store_repair import ShardDamage
from tests.fakes.fresh import Fresh

H, W, FRAMES = 64, 96, 15
SHARD = 4  # flows; the last of 14 flows is in a shard of two
SETTINGS: dict[str, Any] = {"shard_bytes": SHARD * 8 * H * W, "batch": 3}
FLOW = "flow/c/{}/0/0/0"
ARRAYS = ("timestamp_s", "timestamp_to_s", "frame", "frame_to")

Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors", "FlowNet2C", 0)


def save_tiny(path: Path, name: str, seed: int) -> str:
    torch.manual_seed(seed)
    save_weights(path, build_model(name, width=0.05).state_dict(), licence="none", made_by={}, width=0.05)
    return str(path)


def pictures(folder: str, frames: int = FRAMES, seed: int = 0) -> None:
    Path(folder).mkdir()
    texture = np.random.default_rng(seed).integers(0, 255, (H, W + 3 * frames, 3), np.uint8)
    for number in range(frames):
        Image.fromarray(texture[:, 3 * number : 3 * number + W]).save(f"{folder}/{number:03}.png")


def contents(folder: str = "X.zarr") -> Contents:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def times_ns(folder: str = "X.zarr") -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, weights: str) -> Iterator[Path]:
    """A folder with pictures and an undamaged store of their flow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        pictures("frames")
        flowreel.run("frames", "X.zarr", weights=weights, **SETTINGS)
        yield Path.cwd()


@pytest.fixture(autouse=True)
def _here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


# Kinds of damage, each to one file of the store.


def flip(name: str, where: float = 0.4, store: str = "X.zarr") -> None:
    path = Path(store, name)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 16
    path.write_bytes(data)


def cut(name: str) -> None:
    path = Path("X.zarr", name)
    path.write_bytes(path.read_bytes()[:-30])


def remove(name: str) -> None:
    Path("X.zarr", name).unlink()


def empty(name: str) -> None:
    Path("X.zarr", name).write_bytes(b"")


def lengthen(name: str) -> None:
    with Path("X.zarr", name).open("ab") as file:
        file.write(b"more")


def mended(sound: Contents, weights: str, source: str = "frames") -> RepairReport:
    """Repairs X.zarr and checks that it is as before the damage, and that only damaged files were written."""
    damaged, before = contents(), times_ns()
    report = repair("X.zarr", source, weights=weights)
    assert not report.before.sound
    assert report.after.sound, report.after.findings
    assert contents() == sound
    after = times_ns()
    assert {name for name in sound if before.get(name) != after[name]} == {
        name for name in sound if damaged.get(name) != sound[name]
    }
    return report


@pytest.mark.parametrize("damage", [flip, cut, remove, empty, lengthen])
@pytest.mark.parametrize("shard", [1, 3])
def test_a_damaged_shard_comes_back_to_the_byte(weights: str, shard: int, damage: Callable[[str], None]) -> None:
    sound = contents()
    damage(FLOW.format(shard))
    report = mended(sound, weights)
    assert [one.shard for one in report.shards] == [shard]
    assert report.flows == (SHARD if shard == 1 else 2)
    assert report.bytes_written == len(sound[FLOW.format(shard)])
    assert "FlowNet2C (tiny.safetensors), fp32, batch 3" in report.how


@pytest.mark.parametrize("damage", [flip, cut, remove, empty])
@pytest.mark.parametrize("name", ["frame", "timestamp_to_s"])
def test_a_damaged_chunk_beside_the_flow_comes_back(weights: str, name: str, damage: Callable[[str], None]) -> None:
    sound = contents()
    damage(f"{name}/c/2")
    assert mended(sound, weights).shards[0].arrays == (name,)


def exchange(one: str, other: str) -> None:
    first, second = Path("X.zarr", one), Path("X.zarr", other)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def swap_shards() -> None:
    exchange(FLOW.format(0), FLOW.format(2))


def swap_chunks() -> None:
    files = open_store("X.zarr").files
    index = files.index(1)
    assert index is not None
    first, second, *rest = [files.chunk(1, int(offset), int(size)) for offset, size in index]
    Path("X.zarr", FLOW.format(1)).write_bytes(
        b"".join(pack_shard([(chunk,) for chunk in (second, first, *rest)], SHARD))
    )


def shard_of_another_store() -> None:
    shutil.copy("other.zarr/" + FLOW.format(3), "X.zarr/" + FLOW.format(3))


def swap_times() -> None:
    exchange("frame/c/0", "frame/c/1")
    exchange("frame_to/c/0", "frame_to/c/1")


def swap_checksums() -> None:
    exchange("flow_crc32c/c/1", "flow_crc32c/c/2")
    flip("time_crc32c/c/0")


def swap_everything() -> None:
    for name in (*ARRAYS, "flow_crc32c", "time_crc32c"):
        exchange(f"{name}/c/0", f"{name}/c/1")
    exchange(FLOW.format(0), FLOW.format(1))


@pytest.mark.parametrize(
    ("damage", "shards"),
    [
        (swap_shards, [0, 2]),
        (swap_chunks, [1]),
        (shard_of_another_store, [3]),
        (swap_times, [0, 1]),
        (swap_checksums, [0, 1, 2]),
        (swap_everything, [0, 1]),
    ],
)
def test_what_is_not_in_its_place_is_put_right(weights: str, damage: Callable[[], None], shards: list[int]) -> None:
    """Valid parts in wrong places. The other store holds the backward flow of the same pictures."""
    sound = contents()
    if damage is shard_of_another_store:
        flowreel.run("frames", "other.zarr", weights=weights, direction="backward", **SETTINGS)
    damage()
    report = mended(sound, weights)
    assert [one.shard for one in report.shards] == shards
    if damage is swap_times:  # the flow and its checksums, which depend on its place, are intact
        assert {(one.flows, one.arrays) for one in report.shards} == {((), (*ARRAYS, "time_crc32c"))}


def test_only_what_cannot_be_read_is_taken_from_the_new_flow(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor computes slightly different flow: undamaged flows of the shard stay as first written, as do
    their times."""
    flip(FLOW.format(1), 0.1)
    store = open_store("X.zarr")
    before = store[5:8]
    flow = Inference.of_fitted
    monkeypatch.setattr(Inference, "of_fitted", lambda self, *frames: flow(self, *frames) * 1.02 + 0.01)
    real, times_s = api.pairs, store.timestamps_s

    def rounded_otherwise(frames: Iterator[Frame]) -> Iterator[Frame]:
        yield from (replace(frame, timestamp_s=frame.timestamp_s + 1e-9) for frame in frames)

    monkeypatch.setattr(api, "pairs", lambda frames, **options: real(rounded_otherwise(frames), **options))
    report = repair("X.zarr", "frames", weights=weights)
    assert report.after.sound
    assert report.shards[0].flows == (4,)
    np.testing.assert_array_equal(store[4:8], open_store("X.zarr")[4:8])  # although it was open before
    np.testing.assert_array_equal(store[5:8], before)
    np.testing.assert_array_equal(open_store("X.zarr").timestamps_s, times_s)
    assert not list(store.check())
    assert any("3 of 3 flows that could be read come out differently" in note for note in report.notes)


CASES: list[dict[str, Any]] = [
    {"direction": "backward", "step": 2, "start": 1},
    {"resolution": "native", "max_error": 0, "codec": "pcodec2d"},
    {"resolution": "native", "direction": "backward", "codec": "pcodec2d", "fit": "resize"},
    {"start": "0.08s", "stop": 14, "codec": "pcodec", "step": 1, "precision": "bf16"},
    {"step": 2, "stop": "0.5s", "max_error": 0.5, "fit": "crop"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.filterwarnings("ignore:.*pcodec")
def test_whatever_the_settings_and_however_much_is_damaged(weights: str, options: dict[str, Any]) -> None:
    size = {"shard_bytes": 3 * 8 * 16 * 24} if "resolution" in options else {"shard_bytes": 3 * 8 * H * W}
    flowreel.run("frames", "Y.zarr", weights=weights, **{**SETTINGS, **size, "batch": 2, **options})
    shutil.rmtree("X.zarr")
    Path("Y.zarr").rename("X.zarr")
    sound = contents()
    last = (len(open_store("X.zarr")) - 1) // 3
    assert last >= 1
    flip(FLOW.format(0))
    flip(FLOW.format(last), 0.9)
    remove("timestamp_s/c/0")
    flip(f"frame/c/{last}")
    if "resolution" in options:
        flip("y/c/0")
        shutil.rmtree("X.zarr/x/c")
    assert mended(sound, weights).arrays == (("y", "x") if "resolution" in options else ())
    for name in ("frame", "frame_to"):  # no frame number is left anywhere
        shutil.rmtree(f"X.zarr/{name}/c")
    flip(FLOW.format(last))
    mended(sound, weights)
    for name in ("flow", *ARRAYS):
        shutil.rmtree(f"X.zarr/{name}/c")
    mended(sound, weights)


def test_frame_numbers_are_counted_from_whichever_are_left() -> None:
    rewriter = ShardRewriter("X.zarr")
    at = partial(rewriter.frame_at, backward=False, start=None, step=1)
    shutil.rmtree("X.zarr/frame/c")
    assert [at(place) for place in (0, 5, 14)] == [0, 5, 14]  # told by frame_to instead
    shutil.rmtree("X.zarr/frame_to/c")
    assert at(5) is None
    assert at(5, start=3, step=2) == 13


def test_a_video_is_entered_where_the_shard_begins(weights: str) -> None:
    with av.open("clip.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(30000, 1001))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = W, H, "yuv420p", 6
        for path in sorted(Path("frames").iterdir()):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(Image.open(path)))))
        container.mux(stream.encode())
    shutil.rmtree("X.zarr")
    flowreel.run("clip.mkv", "X.zarr", weights=weights, **SETTINGS)
    sound = contents()
    for shard in (1, 3):
        remove(FLOW.format(shard))
        for name in ARRAYS:
            remove(f"{name}/c/{shard}")
    mended(sound, weights, "clip.mkv")


def test_a_cut_source_that_was_taken_as_the_whole(weights: str) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (FRAMES, H * W), np.uint8)
    stream = f"YUV4MPEG2 W{W} H{H} F25:1 Cmono\n".encode() + b"".join(b"FRAME\n" + frame.tobytes() for frame in grey)
    Path("cut.y4m").write_bytes(stream[:-100])
    shutil.rmtree("X.zarr")
    flowreel.run("cut.y4m", "X.zarr", weights=weights, tolerate_truncation=True, **SETTINGS)
    assert open_store("X.zarr").attrs["source_losses"]
    sound = contents()
    remove(FLOW.format(1))
    mended(sound, weights, "cut.y4m")


def test_stdin_again(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 255, (FRAMES, H * W), np.uint8)
    stream = f"YUV4MPEG2 W{W} H{H} F25:1 Cmono\n".encode() + b"".join(b"FRAME\n" + frame.tobytes() for frame in grey)
    Path("in.y4m").write_bytes(stream)
    shutil.rmtree("X.zarr")
    with open("in.y4m") as given, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", given)
        flowreel.run("-", "X.zarr", weights=weights, **SETTINGS)
    sound = contents()
    remove(FLOW.format(1))
    cut(FLOW.format(3))
    with open("in.y4m") as given, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", given)
        assert mended(sound, weights, "-").flows == SHARD + 2


def test_a_sound_store_needs_neither_source_nor_weights() -> None:
    before = times_ns()
    report = repair("X.zarr", "nowhere", weights="none")
    assert report.before.sound
    assert report.after.sound
    assert report.shards == ()
    assert times_ns() == before


def test_a_dry_run_only_tells() -> None:
    flip(FLOW.format(1), 0.1)
    remove("frame/c/3")
    damaged = contents()
    report = repair("X.zarr", "nowhere", weights="none", dry_run=True)
    assert list(map(str, report.shards)) == [
        "shard 1, flows 4 to 7: 1 of 4 flows",
        "shard 3, flows 12 to 13: frame",
    ]
    assert not report.after.sound
    assert contents() == damaged


def test_leftovers_go() -> None:
    sound = contents()
    Path("X.zarr", FLOW.format(1) + ".partial").write_bytes(b"half")
    assert repair("X.zarr", "nowhere").after.sound
    assert contents() == sound


def test_the_store_may_have_moved_and_the_weights_another_name(weights: str) -> None:
    sound = contents()
    shutil.copy(weights, "other.safetensors")
    flip(FLOW.format(2))
    mended(sound, "other.safetensors")


def test_a_source_that_has_grown_will_do(weights: str) -> None:
    sound = contents()
    remove(FLOW.format(3))
    for number in range(FRAMES, FRAMES + 4):
        shutil.copy("frames/000.png", f"frames/{number:03}.png")
    mended(sound, weights)


def test_the_batches_are_those_of_the_run() -> None:
    frames = [Frame(torch.zeros(3, 1, 1, dtype=torch.uint8), number, 0.0) for number in range(FRAMES)]

    def shape(made: Iterator[PairBatch]) -> list[tuple[int, list[int]]]:
        return [(batch.index, [pair.first.index for pair in batch.pairs]) for batch in made]

    run = shape(batches(3, SHARD)(pairs(iter(frames))))
    assert [index for index, _ in run] == [0, 3, 4, 7, 8, 11, 12]
    damaged = [ShardDamage(shard, 4 * shard, min(4 * shard + 3, 13), (4 * shard,), ()) for shard in (1, 3)]
    for first in (0, 4):
        again = shape(batches_of_shards(damaged, 3, SHARD, first)(pairs(iter(frames[first:]))))
        assert again == [batch for batch in run if batch[0] // SHARD in (1, 3)]
    alone = shape(batches_of_shards(damaged[:1], 3, SHARD, 0)(pairs(iter(frames))))
    assert alone == [batch for batch in run if batch[0] // SHARD == 1]


# Repairs that are refused.


def refused(error: type[Exception], match: str, source: str = "frames", **options: Any) -> None:
    """Checks that the repair says why it is refused, and changes nothing."""
    before = contents()
    with pytest.raises((error, StageError), match=match) as caught:
        repair("X.zarr", source, **options)
    assert isinstance(caught.value.__cause__ if isinstance(caught.value, StageError) else caught.value, error)
    assert contents() == before


def test_other_weights(weights: str) -> None:
    flip(FLOW.format(1))
    refused(ResumeMismatchError, "weights sha256 was .*, is ", weights=save_tiny(Path("o.safetensors"), "FlowNet2C", 1))
    refused(ResumeMismatchError, "weights sha256 was .*, is ", weights=save_tiny(Path("s.safetensors"), "FlowNet2S", 1))


def test_another_source(weights: str) -> None:
    flip(FLOW.format(1))
    pictures("others")
    refused(ResumeMismatchError, "source was frames, is others", "others", weights=weights)
    refused(SourceNotFoundError, "nowhere", "nowhere/*.png", weights=weights)
    Image.fromarray(np.zeros((H, W, 3), np.uint8)).save("frames/000.png")
    refused(ResumeMismatchError, "another file", weights=weights)


def test_fewer_bytes_or_another_size(weights: str) -> None:
    flip(FLOW.format(1))
    Path("frames/014.png").unlink()
    refused(ResumeMismatchError, "bytes", weights=weights)
    shutil.rmtree("X.zarr")
    name = "synthetic:objects?size=96x64&frames=8"
    flowreel.run(name, "X.zarr", weights=weights, **SETTINGS)
    flip(FLOW.format(1))
    refused(ResumeMismatchError, "source was", "synthetic:objects?size=96x64&frames=9", weights=weights)


def test_other_pictures_by_the_same_names_are_told_by_the_sound_flows(
    weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where not every vector is known."""
    flow = Inference.of_fitted

    def one_unknown(inference: Inference, *frames: Any) -> torch.Tensor:
        computed = flow(inference, *frames).clone()
        computed[..., computed.shape[-2] // 2, computed.shape[-1] // 2] = torch.nan
        return computed

    monkeypatch.setattr(Inference, "of_fitted", one_unknown)
    flip(FLOW.format(1), 0.1)
    shutil.move("frames/000.png", "first.png")
    shutil.rmtree("frames")
    pictures("frames", seed=5)
    shutil.move("first.png", "frames/000.png")
    Path("frames/zzz.png").write_bytes(Path("frames/014.png").read_bytes())  # the folder must not shrink
    refused(ResumeMismatchError, "differs from it by", weights=weights)


def test_another_place_in_the_source(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(FLOW.format(1))
    real = api.pairs
    monkeypatch.setattr(api, "pairs", lambda frames, **options: real(shifted(frames), **options))

    def shifted(frames: Iterator[Any]) -> Iterator[Any]:
        next(frames)
        yield from frames

    refused(ResumeMismatchError, "timestamp_s of flow 4 is 0.16 in the store, but 0.2 in the source", weights=weights)


def test_a_source_that_ends_too_early(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(FLOW.format(1))
    real = api.pairs
    monkeypatch.setattr(api, "pairs", lambda frames, **options: iter(list(real(frames, **options))[:-1]))
    refused(TruncatedSourceError, "gives 3 of the 4 flows", weights=weights)


def test_settings_that_were_changed(weights: str) -> None:
    flip(FLOW.format(1))
    sound = contents()
    path = Path("X.zarr/zarr.json")
    for old, new, error, words in (
        ('"batch": 3', '"batch": -3', DamagedStoreError, "make no sense"),
        ('"batch": 3', '"batches": 3', DamagedStoreError, "does not tell batch"),
        ('"precision": "fp32"', '"precision": "fp16"', DeviceError, "computed in fp16"),
        ('"width": 0.05', '"width": 0.5', ResumeMismatchError, "width was 0.5, is"),
    ):
        assert old in sound["zarr.json"].decode()
        path.write_text(sound["zarr.json"].decode().replace(old, new))
        refused(error, words, weights=weights, device="cpu")


def test_damaged_metadata_and_unfinished_stores(weights: str) -> None:
    for name in ("", "flow/", "frame/"):
        whole = Path(f"X.zarr/{name}zarr.json").read_text()
        Path(f"X.zarr/{name}zarr.json").write_text(whole[:50])
        refused(DamagedStoreError, "not metadata")
        Path(f"X.zarr/{name}zarr.json").write_text(whole)
    shutil.copytree("X.zarr", "X.zarr.partial")
    refused(StoreError, "lies X.zarr.partial")
    shutil.rmtree("X.zarr")
    with pytest.raises(StoreError, match="run --resume"):
        repair("X.zarr", "frames", weights=weights)
    with pytest.raises(StoreNotFoundError):
        repair("Z.zarr", "frames")


def test_nobody_writes_the_store_meanwhile(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a repair could write shards of the old store into a new one, and nothing would show it."""
    sound = contents()
    flip(FLOW.format(1))
    Path("X.zarr.partial").mkdir()  # left by a repair that was killed
    write, tried = ShardRewriter.write, []

    def late(rewriter: ShardRewriter, batch: Any) -> None:
        tried.append(batch.index)
        with pytest.raises(OutputBusyError):
            flowreel.run("frames", "X.zarr", weights=weights, overwrite=True)
        with pytest.raises(OutputBusyError):
            repair("X.zarr", "frames", weights=weights)
        write(rewriter, batch)

    monkeypatch.setattr(ShardRewriter, "write", late)
    mended(sound, weights)
    assert tried
    assert not Path("X.zarr.partial").exists()


def test_a_store_that_was_replaced_while_it_was_read(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(FLOW.format(1))
    damage = ShardRewriter.damage

    def late(rewriter: ShardRewriter, suspected: set[int]) -> Any:
        flowreel.run("frames", "X.zarr", weights=weights, overwrite=True, max_error=0.5, **SETTINGS)
        return damage(rewriter, suspected)

    monkeypatch.setattr(ShardRewriter, "damage", late)
    with pytest.raises(StoreError, match="was replaced while it was being read"):
        repair("X.zarr", "frames", weights=weights)
    assert list(open_store("X.zarr").check()) == []
    assert not Path("X.zarr.partial").exists()


def test_what_was_exported_has_no_source(weights: str) -> None:
    export("X.zarr", "Y.zarr", shard_bytes=SETTINGS["shard_bytes"])
    shutil.rmtree("X.zarr")
    Path("Y.zarr").rename("X.zarr")
    flip(FLOW.format(0))
    refused(DamagedStoreError, "exported from another store", weights=weights)


# Repairs that are stopped on the way.


def test_a_full_disk_leaves_the_damaged_store(weights: str, files_up_to: Any) -> None:
    sound = contents()
    flip(FLOW.format(1))
    with files_up_to(2000):
        refused(flowreel.errors.OutputWriteError, "cannot write", weights=weights)
    mended(sound, weights)


def test_stopped_between_two_shards(weights: str) -> None:
    sound = contents()
    for shard in (0, 2):
        flip(FLOW.format(shard))
    damaged = contents()

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.stages[0].name != "verify" and progress.flows_done == SHARD:
            raise Stop

    with pytest.raises(Stop):
        repair("X.zarr", "frames", weights=weights, progress=stop)
    assert contents() == damaged | {FLOW.format(0): sound[FLOW.format(0)]}
    assert mended(sound, weights).flows == SHARD


def test_killed_at_any_moment(weights: str, fresh: Fresh) -> None:
    """Killed at its n-th rename or sync, it leaves every file either damaged as before or repaired."""
    code = (
        "import sys, os, torch; torch.set_num_threads(1); import flowreel.engine.publish as publish\n"
        "left = int(sys.argv[1])\n"
        "def counted(real):\n"
        "    def call(*arguments):\n"
        "        global left\n"
        "        left -= 1\n"
        "        return real(*arguments) if left else os._exit(9)\n"
        "    return call\n"
        "os.replace, os.fsync = counted(os.replace), counted(os.fsync)\n"
        f"from flowreel.engine.repair import repair; repair('X.zarr', 'frames', weights={weights!r})"
    )
    sound = contents()
    flip(FLOW.format(1))
    remove("frame/c/1")
    cut(FLOW.format(3))
    damaged = contents()
    for moment in (2, 5):  # three calls a file: before the first rename, then before the second
        assert fresh.code(code, str(moment)) == (9, "")
        for name, data in contents().items():
            assert name.endswith(".partial") or data in (damaged.get(name), sound[name]), name
        assert contents().keys() >= damaged.keys()
    assert repair("X.zarr", "frames", weights=weights).after.sound
    assert contents() == sound


def test_progress_is_told_of_reading_and_computing(weights: str) -> None:
    told: list[tuple[str, int, int | None]] = []
    flip(FLOW.format(1))
    remove(FLOW.format(3))
    repair(
        "X.zarr",
        "frames",
        weights=weights,
        progress=lambda seen: told.append((seen.stages[0].name, seen.flows_done, seen.flow_count)),
    )
    assert told[0] == ("verify", 1, 14)
    assert ("decode", 6, 6) in told
    assert told[-1] == ("verify", 14, 14)
