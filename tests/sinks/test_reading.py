"""Opening stored flow by name: every form of a name, the right order, a few flows at a time, and clear errors."""

from __future__ import annotations

import math
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, NativeGrid, SourceId
from flowreel.engine.errors import (
    DamagedStoreError,
    FlowFileError,
    FrameSizeError,
    SourceNotFoundError,
    StoreError,
    StoreNotFoundError,
    UsageError,
)
from flowreel.engine.protocols import FlowReader
from flowreel.sinks import flow_readers, open_sink, reading
from flowreel.sinks.reading import open_flows

HEIGHT, WIDTH = 6, 8


def some_flow(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(height, width, 2)).astype(np.float32)


def write_flo(path: Path, flow: np.ndarray) -> None:
    """Writes a ``.flo`` file without syncing it to the disk."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<f2i", 202021.25, flow.shape[1], flow.shape[0]) + flow.tobytes())


def write_store(path: Path, count: int = 7, **options: object) -> np.ndarray:
    """A store whose flow k goes from frame 2k+10 to 2k+12, half a second apart. Returns (count, 2, H, W)."""
    flows = np.stack([some_flow(seed).transpose(2, 0, 1) for seed in range(count)])
    source = SourceId("dance.mp4", size_bytes=1234, duration_s=5.0)
    sink = open_sink(path, SinkConfig(shard_bytes=3 * flows[0].nbytes, **options))  # type: ignore[arg-type]
    sink.open(FlowInfo(HEIGHT, WIDTH, Fraction(30000, 1001), None, source, {"model": "FlowNet2", "precision": "fp32"}))
    frame, times_s = 2 * np.arange(count) + 10, np.arange(count) / 2
    sink.write(FlowBatch(torch.from_numpy(flows), 0, frame, frame + 2, times_s, times_s + 0.5))
    sink.commit()
    return flows


def read_all(reader: FlowReader) -> tuple[np.ndarray, list[int], list[float]]:
    """All flows (N, 2, H, W), frames and times; checks that each batch continues the one before."""
    batches = list(reader)
    count = 0
    for batch in batches:
        assert batch.index == count
        assert batch.flow.dtype == torch.float32
        count += len(batch)
    assert reader.info.flow_count == count == len(reader.names)
    frames = [int(frame) for batch in batches for frame in batch.frame]
    times_s = [float(time_s) for batch in batches for time_s in batch.timestamp_s]
    return np.concatenate([batch.flow.numpy() for batch in batches]), frames, times_s


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with frame1.flo to frame12.flo (seeds 1 to 12) and other things that are not flow files."""
    for number in range(1, 13):
        write_flo(tmp_path / "flows" / f"frame{number}.flo", some_flow(number))
    for other in ("frame3.flo.png", ".hidden.flo", "notes.txt", "frame9.flo.partial"):
        (tmp_path / "flows" / other).write_bytes(b"not flow")
    (tmp_path / "flows" / "folder.flo").mkdir()
    return tmp_path / "flows"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A store of seven flows and its contents; tests must not change it."""
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    return path, write_store(path, max_error=0)


# -- Files -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_natural_order(folder: Path) -> None:
    reader = open_flows(folder)
    assert isinstance(reader, FlowReader)
    flows, frames, times_s = read_all(reader)
    assert list(reader.names) == [f"frame{number}.flo" for number in range(1, 13)]
    for number, flow in enumerate(flows):
        assert np.array_equal(flow.transpose(1, 2, 0), some_flow(number + 1))
    assert frames == list(range(12))
    assert times_s == [number / 25 for number in range(12)]
    assert (reader.info.height, reader.info.width, reader.info.frame_rate) == (HEIGHT, WIDTH, 25)
    assert reader.info.source == SourceId("flows", 12 * (12 + 8 * HEIGHT * WIDTH))
    assert "25 frames per second" in reader.notes[0]


@pytest.mark.parametrize(
    ("rate", "expected"), [(30, Fraction(30)), (29.97, Fraction(2997, 100)), ("30000/1001", Fraction(30000, 1001))]
)
def test_a_frame_rate_that_is_given_makes_the_times(folder: Path, rate: float | str, expected: Fraction) -> None:
    reader = open_flows(folder, frame_rate=rate)
    assert reader.info.frame_rate == expected
    assert read_all(reader)[2] == pytest.approx([float(number / expected) for number in range(12)])
    assert reader.notes == [f"{folder} also holds a file named .partial, of a run that was not finished"]


@pytest.mark.parametrize("rate", [0, -1, "fast", "1/0", float("nan"), float("inf")])
def test_frame_rates_that_are_none(folder: Path, rate: float | str) -> None:
    with pytest.raises(UsageError, match="frame-rate"):
        open_flows(folder, frame_rate=rate)


def test_globs_lists_and_single_files(folder: Path) -> None:
    assert list(open_flows(str(folder / "frame1*.flo")).names) == [f"frame{n}.flo" for n in (1, 10, 11, 12)]
    assert list(open_flows([folder / "frame10.flo", str(folder / "frame2.flo")]).names) == ["frame2.flo", "frame10.flo"]
    assert np.array_equal(read_all(open_flows([folder / "frame7.flo"]))[0][0].transpose(1, 2, 0), some_flow(7))
    assert list(open_flows([folder]).names) == list(open_flows(folder).names)


def test_a_link_to_nothing_is_not_left_out(folder: Path) -> None:
    (folder / "picture.png").symlink_to("nowhere")  # no flow file, so it is ignored
    (folder / "frame5.flo").unlink()
    (folder / "frame5.flo").symlink_to("nowhere")
    for name in (folder, str(folder / "*.flo")):
        with pytest.raises(SourceNotFoundError, match=r"frame5\.flo is a link to a file that is not there"):
            open_flows(name)


def test_a_glob_in_a_folder_whose_name_looks_like_one(folder: Path) -> None:
    odd = folder.rename(folder.with_name("clip[1]"))
    assert list(open_flows(str(odd / "frame1[12].flo")).names) == ["frame11.flo", "frame12.flo"]


def test_names_with_a_newline_are_read_like_any_other(folder: Path, store: tuple[Path, np.ndarray]) -> None:
    (folder / "frame2.flo").rename(folder / "frame2\nb.flo")
    assert list(open_flows(folder).names)[1] == "frame2\nb.flo"
    assert list(open_flows(folder / "frame2\nb.flo").names) == ["frame2\nb.flo"]
    shutil.copytree(store[0], folder / "a\nb.zarr")
    assert len(open_flows(str(folder / "a\nb.zarr@1:3")).names) == 2


def test_start_and_stop_keep_the_numbers(folder: Path) -> None:
    reader = open_flows(folder, start=2, stop=-8)
    _, frames, times_s = read_all(reader)
    assert list(reader.names) == ["frame3.flo", "frame4.flo"]
    assert (frames, times_s) == ([2, 3], [2 / 25, 3 / 25])
    with pytest.raises(UsageError, match="no flow lies in 12:, there are only 12, numbered 0 to 11"):
        open_flows(folder, start=12)


def test_only_a_few_files_are_read_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    real = reading._reader

    def counting(*arguments: object) -> object:
        read = real(*arguments)  # type: ignore[arg-type]
        return lambda path: (seen.append(path), read(path))[1]

    monkeypatch.setattr(reading, "_reader", counting)
    monkeypatch.setattr(flow_readers, "BATCH_BYTES", 3 * 8 * HEIGHT * WIDTH)
    reader = open_flows(folder)
    assert len(seen) == 1  # for the size
    flows = iter(reader)
    assert [len(next(flows)), len(next(flows))] == [3, 3]
    assert len(seen) == 1 + 3 + 3 + 1


@pytest.mark.parametrize(
    ("pattern", "tolerance"),
    [("%06d.flo", 0), ("%06d.kitti.png", 1 / 128), ("%06d.npz", 0), ("flow_x_%05d.png", 0.02), ("flow_x_%d.jpg", 0.5)],
)
def test_every_kind_of_file_comes_back(tmp_path: Path, pattern: str, tolerance: float) -> None:
    ramp = np.linspace(-3, 3, 16 * 24, dtype=np.float32).reshape(16, 24)
    flow = torch.from_numpy(np.stack([ramp, -ramp]))[None].repeat(11, 1, 1, 1)
    flow += torch.arange(11)[:, None, None, None] / 10
    sink = open_sink(str(tmp_path / "out" / pattern), SinkConfig(bound=5.0))
    sink.open(FlowInfo(16, 24, None, None, SourceId("test")))
    frame, times_s = np.arange(11), np.arange(11) / 25
    sink.write(FlowBatch(flow, 0, frame, frame + 1, times_s, times_s))
    sink.commit()
    back = read_all(open_flows(tmp_path / "out", bound=5.0))[0]
    assert np.abs(back - flow.numpy()).max() <= tolerance
    glob = str(tmp_path / "out" / ("flow_x_*" if "flow_x" in pattern else "*"))
    assert np.array_equal(read_all(open_flows(glob, bound=5.0))[0], back)
    one = sorted((tmp_path / "out").glob(Path(glob).name))[0]
    assert np.array_equal(read_all(open_flows(one, bound=5.0))[0][0], back[0])


def npz_files(folder: Path, times: list[tuple[int, float] | None], gap: int = 4) -> Path:
    """One file for each pair of frames ``gap`` apart, a tenth of a second apart; None: without any of that."""
    for number, pair in enumerate(times):
        frame, time_s = pair or (0, 0.0)
        beside = {"frame": frame, "frame_to": frame + gap, "timestamp_s": time_s, "timestamp_to_s": time_s + 0.1}
        np.savez_compressed(folder / f"{number}.npz", flow=some_flow(), **(beside if pair else {}))  # type: ignore[arg-type]
    return folder


def test_npz_files_keep_their_times(tmp_path: Path) -> None:
    times: list[tuple[int, float] | None] = [(8 + 4 * number, 7.5 + 0.1 * number) for number in range(11)]
    reader = open_flows(npz_files(tmp_path, times), start=1)
    assert (reader.has_times, reader.info.frame_rate, reader.notes) == (True, 10, [])
    batches = list(reader)
    assert np.concatenate([batch.frame for batch in batches]).tolist() == list(range(12, 52, 4))
    assert np.concatenate([batch.frame_to for batch in batches]).tolist() == list(range(16, 56, 4))
    assert np.concatenate([batch.timestamp_s for batch in batches]) == pytest.approx(7.6 + 0.1 * np.arange(10))
    assert np.concatenate([batch.timestamp_to_s for batch in batches]) == pytest.approx(7.7 + 0.1 * np.arange(10))
    assert open_flows(tmp_path, frame_rate=50).info.frame_rate == 50


@pytest.mark.parametrize("second", [None, (8, 7.5), (12, 7.4), (12, math.nan), (8, 7.6)], ids=str)
def test_times_that_do_not_follow_each_other_are_not_read(tmp_path: Path, second: tuple[int, float] | None) -> None:
    reader = open_flows(npz_files(tmp_path, [(8, 7.5), second]))
    assert not reader.has_times
    assert reader.notes == ["the flow files carry no usable times: 25 frames per second are assumed"]
    (batch,) = reader
    assert (batch.frame.tolist(), batch.timestamp_s.tolist()) == ([0, 1], [0, 0.04])


@pytest.mark.parametrize("gap", [0, -4])
def test_times_that_contradict_the_frames_are_not_read(tmp_path: Path, gap: int) -> None:
    assert not open_flows(npz_files(tmp_path, [(8, 7.5), (12, 7.6)], gap)).has_times


def test_kittis_own_names_count_where_there_is_nothing_else(data_dir: Path) -> None:
    reader = open_flows(data_dir / "pairs" / "kitti2015" / "flow.png")
    (batch,) = reader
    assert tuple(batch.flow.shape) == (1, 2, 375, 1242)
    assert 0.8 < batch.flow.isnan().float().mean() < 0.9


def test_a_new_kind_of_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = reading.FlowFile("X.npy", r".*\.npy", "numpy", "load")
    monkeypatch.setattr(reading, "FLOW_FILES", (*reading.FLOW_FILES, line))
    np.save(tmp_path / "a.npy", some_flow())
    assert np.array_equal(read_all(open_flows(tmp_path))[0][0].transpose(1, 2, 0), some_flow())


def test_files_of_different_sizes(folder: Path) -> None:
    write_flo(folder / "frame4.flo", some_flow(0, 3, 5))
    with pytest.raises(FrameSizeError, match=r"frame4\.flo is 5x3, but frame1\.flo is 8x6"):
        list(open_flows(folder))
    batches = list(open_flows(folder, one_size=False))
    assert [tuple(batch.flow.shape) for batch in batches] == [(3, 2, 6, 8), (1, 2, 3, 5), (8, 2, 6, 8)]
    assert [batch.index for batch in batches] == [0, 3, 4]
    assert [list(batch.frame) for batch in batches] == [[0, 1, 2], [3], list(range(4, 12))]


def test_what_is_wrong_with_files_is_said(folder: Path) -> None:
    np.savez(folder / "a.npz", flow=some_flow())
    with pytest.raises(FlowFileError, match=r"one kind.*12 X\.flo, 1 X\.npz|one kind.*1 X\.npz, 12 X\.flo"):
        open_flows(folder)
    with pytest.raises(FlowFileError, match=r"notes\.txt is not a known kind.*X\.flo.*flowreel run"):
        open_flows(folder / "notes.txt")
    with pytest.raises(FlowFileError, match=r"notes\.txt is not a known kind"):
        open_flows([folder / "frame1.flo", folder / "notes.txt"])
    with pytest.raises(SourceNotFoundError, match=r"none\.flo"):
        open_flows([folder / "frame1.flo", folder / "none.flo"])
    with pytest.raises(SourceNotFoundError, match=r"nothing matches .*\*\.tiff"):
        open_flows(str(folder / "*.tiff"))
    with pytest.raises(SourceNotFoundError, match="no flow files"):
        open_flows(folder / "folder.flo")
    with pytest.raises(UsageError, match="folder or store"):
        open_flows([folder, folder / "frame1.flo"])
    with pytest.raises(UsageError, match="at least one"):
        open_flows([])
    (folder / "frame3.flo").write_bytes(b"PIEHxxxx")
    with pytest.raises(FlowFileError, match=r"frame3\.flo"):
        list(open_flows(str(folder / "*.flo")))


# -- Stores ----------------------------------------------------------------------------------------------------------


def test_a_store_keeps_its_frames_times_and_origin(tmp_path: Path) -> None:
    flows = write_store(tmp_path / "dance.flow.zarr", max_error=0)
    reader = open_flows(tmp_path / "dance.flow.zarr", frame_rate=99)
    assert isinstance(reader, FlowReader)
    back, frames, times_s = read_all(reader)
    assert np.array_equal(back, flows)
    assert frames == list(range(10, 24, 2))
    assert times_s == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert list(next(iter(reader)).frame_to[:2]) == [12, 14]
    assert list(reader.names)[:2] == ["000010", "000012"]
    assert (reader.stem, reader.notes) == ("dance", [])
    assert reader.info.frame_rate == Fraction(30000, 1001)
    assert reader.info.source == SourceId("dance.mp4", 1234, 5.0)
    assert reader.info.made_by["model"] == "FlowNet2"
    assert "earlier_max_error" not in reader.info.made_by
    assert "max_error" not in reader.info.made_by


@pytest.mark.parametrize(
    ("max_errors", "total"),
    [
        ([1 / 8, 1 / 2], 1 / 8 + 1 / 2),
        ([1 / 8, 1 / 8, 1 / 8], 1 / 8),  # already whole numbers of steps, so storing again adds no error
        ([1 / 8, 1 / 64, 0, 1 / 8], 1 / 8),
        ([1 / 64, 1 / 8, 1 / 64, 1 / 8], 1 / 64 + 1 / 8),
        ([0, 0], 0),
    ],
)
def test_the_error_of_storing_adds_up_where_there_is_any(max_errors: list[float], total: float, tmp_path: Path) -> None:
    flows = write_store(tmp_path / "0.zarr", max_error=max_errors[0])
    for number, max_error in enumerate(max_errors[1:], 1):
        reader = open_flows(tmp_path / f"{number - 1}.zarr")
        sink = open_sink(tmp_path / f"{number}.zarr", SinkConfig(max_error=max_error))
        sink.open(reader.info)
        for batch in reader:
            sink.write(batch)
        sink.commit()
    last = open_flows(tmp_path / f"{len(max_errors) - 1}.zarr")
    assert last.info.made_by.get("earlier_max_error", 0) == total
    assert np.abs(read_all(last)[0] - flows).max() <= total


def test_flow_that_was_interpolated_is_no_whole_number_of_steps(tmp_path: Path) -> None:
    sink = open_sink(tmp_path / "0.zarr", SinkConfig(resolution="native"))
    grid = NativeGrid(HEIGHT // 2, WIDTH // 2, 2, "bilinear", "pad")
    sink.open(FlowInfo(HEIGHT, WIDTH, None, None, SourceId("dance.mp4"), native=grid))
    flow, coarse = torch.zeros(1, 2, HEIGHT, WIDTH), torch.randn(1, 2, HEIGHT // 2, WIDTH // 2)
    sink.write(FlowBatch(flow, 0, np.array([0]), np.array([1]), np.zeros(1), np.ones(1), coarse))
    sink.commit()
    reader = open_flows(tmp_path / "0.zarr")
    sink = open_sink(tmp_path / "1.zarr", SinkConfig())
    sink.open(reader.info)
    for batch in reader:
        sink.write(batch)
    sink.commit()
    assert open_flows(tmp_path / "1.zarr").info.made_by["earlier_max_error"] == 1 / 64 + 1 / 64


@pytest.mark.parametrize(
    ("part", "start", "stop", "expected"),
    [
        ("@2:5", None, None, [2, 3, 4]),
        ("@5:", None, None, [5, 6]),
        ("@:2", None, None, [0, 1]),
        ("@:", None, None, list(range(7))),
        ("@-3:-1", None, None, [4, 5]),
        ("@4:99", None, None, [4, 5, 6]),
        ("@3", None, None, [3]),
        ("@-1", None, None, [6]),
        ("/@0", None, None, [0]),
        ("", 5, None, [5, 6]),
        ("", -2, -1, [5]),
        ("@2:6", 1, 3, [3, 4]),
    ],
)
def test_slices(
    store: tuple[Path, np.ndarray], part: str, start: int | None, stop: int | None, expected: list[int]
) -> None:
    path, flows = store
    reader = open_flows(f"{path}{part}", start=start, stop=stop)
    back, frames, _ = read_all(reader)
    assert frames == [2 * number + 10 for number in expected]
    assert np.array_equal(back, flows[expected])
    assert list(reader.names) == [f"{frame:06d}" for frame in frames]


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ("@7", UsageError, "there is no flow 7, only 7, numbered 0 to 6"),
        ("@-8", UsageError, "no flow -8"),
        ("@3:3", UsageError, "no flow lies in 3:3"),
        ("@9:", UsageError, "no flow lies in 9:"),
        ("@a", SourceNotFoundError, "a.zarr@a: .*a part is .*a.zarr@10:20"),
        ("@1:2:3", SourceNotFoundError, "a.zarr@1:2:3: .*a part is"),
        ("x", SourceNotFoundError, "a.zarrx"),
    ],
)
def test_slices_that_give_nothing(
    store: tuple[Path, np.ndarray], part: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        open_flows(f"{store[0]}{part}")


def test_what_literally_has_the_name_wins(tmp_path: Path, store: tuple[Path, np.ndarray]) -> None:
    shutil.copytree(store[0], tmp_path / "a.zarr")
    shutil.copytree(store[0], tmp_path / "b@1:2.zarr")
    write_flo(tmp_path / "a.zarr@2:5" / "x.flo", some_flow())
    assert list(open_flows(str(tmp_path / "a.zarr@2:5")).names) == ["x.flo"]
    (tmp_path / "a.zarr@3").write_text("")
    with pytest.raises(FlowFileError, match=r"a\.zarr@3"):
        open_flows(str(tmp_path / "a.zarr@3"))
    assert len(open_flows(tmp_path / "b@1:2.zarr").names) == 7


@pytest.mark.parametrize("name", ["a.zarr", "a.zarr.partial", "a.zarr@1:", "a.zarr.partial@1:"])
def test_an_unfinished_store_gives_what_is_there(tmp_path: Path, store: tuple[Path, np.ndarray], name: str) -> None:
    shutil.copytree(store[0], tmp_path / "a.zarr.partial")
    (tmp_path / "a.zarr.partial/flow/c/2/0/0/0").unlink()  # the two shards before it hold six flows
    reader = open_flows(str(tmp_path / name))
    assert np.array_equal(read_all(reader)[0], store[1][1:6] if "@" in name else store[1][:6])
    assert reader.stem == "a"
    assert "unfinished: 6 of 7 flows" in reader.notes[0]


def test_stores_that_cannot_be_read(tmp_path: Path, store: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(StoreNotFoundError, match=r"none\.zarr"):
        open_flows(tmp_path / "none.zarr")
    with pytest.raises(StoreNotFoundError, match=r"none\.zarr"):
        open_flows(str(tmp_path / "none.zarr@1:2"))
    (tmp_path / "other.zarr").mkdir()
    with pytest.raises(DamagedStoreError):
        open_flows(tmp_path / "other.zarr")
    shutil.copytree(store[0], tmp_path / "a.zarr.partial")
    shutil.rmtree(tmp_path / "a.zarr.partial/flow/c")
    with pytest.raises(StoreError, match="holds no flow yet"):
        open_flows(tmp_path / "a.zarr")


def test_a_store_of_another_name(tmp_path: Path, store: tuple[Path, np.ndarray]) -> None:
    shutil.copytree(store[0], tmp_path / "renamed")
    assert np.array_equal(read_all(open_flows(f"{tmp_path / 'renamed'}@1:3"))[0], store[1][1:3])


# -- What must not be overwritten ------------------------------------------------------------------------------------


def test_readers_know_what_they_read(
    tmp_path: Path, folder: Path, store: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader = open_flows("flows")
    assert reader.reads("flows/%06d.flo")
    assert reader.reads(str(folder / "frame3.flo"))
    assert reader.reads("./flows/../flows/frame3.flo")
    assert not reader.reads("flows/%06d.png")
    assert not reader.reads("elsewhere/%06d.flo")
    assert not reader.reads("flows/frame99.flo")
    shutil.copytree(store[0], "a.zarr.partial")
    assert open_flows("a.zarr").reads("a.zarr")
    assert not open_flows("a.zarr").reads("b.zarr")
    Path("a.zarr.partial").rename("a.zarr")
    assert not open_flows("a.zarr").reads("a.zarr")  # a finished store stays until its replacement is complete
