""".npz files: compatible with NumPy both ways, and read without trusting anything that a header claims."""

from __future__ import annotations

import io
import math
import struct
import tracemalloc
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import FlowFileError, SourceNotFoundError
from flowreel.sinks import npz, open_sink, read_flow_npz


def some_flow(height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 9, (height, width, 2)).astype(np.float32)


def npy(
    descr: str = "<f4", shape: object = (6, 5, 2), order: object = False, data: bytes = bytes(240), more: int = 0
) -> bytes:
    """An .npy file whose header says what the arguments say, true or not."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order!r}, 'shape': {shape!r}, }}{' ' * more}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def write_npz(path: Path, flow: np.ndarray, **beside: float) -> None:
    """The file that the sink writes."""
    path.write_bytes(npz._archive(flow, beside))


def zipped(path: Path, how: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize(
    "frame",
    [npy("<i8", (10**12,), data=bytes(8)), npy("<i8", (1,), data=bytes(8)), npy("|O", (), data=bytes(8)),
     npy("<f8", (), data=struct.pack("<d", math.nan)), npy("<i8", (), data=bytes(8), more=2000), b"\x93NUMPY\x02\x00",
     *(npy("<f8", (), data=struct.pack("<d", number)) for number in (1e300, -1, 1.5))],
    ids=["huge", "an array", "an object", "NaN", "long", "another version", "beyond 64 bits", "negative", "a fraction"],
)  # fmt: skip
def test_what_is_no_frame_number_is_not_read(tmp_path: Path, frame: bytes) -> None:
    """An invalid frame number is ignored, and no memory is allocated for the size that its header claims."""
    time_s = npy("<f8", (), data=struct.pack("<d", 0.5))
    beside = {"frame_to": npy("<i8", (), data=struct.pack("<q", 9)), "timestamp_s": time_s, "timestamp_to_s": time_s}
    path = zipped(tmp_path / "x.npz", flow=npy(), frame=frame, **beside)
    assert npz.read_npz_times(path) is None
    path = zipped(path, flow=npy(), frame=npy("<i8", (), data=struct.pack("<q", 7)), **beside)
    assert npz.read_npz_times(path) == (7, 9, 0.5, 0.5)
    with pytest.raises(FlowFileError, match=r"x\.npz: its times are damaged"):
        npz.read_npz_times(zipped(path, flow=npy(), frame=npy("<i8", (), data=b"\0"), **beside))


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    flow = some_flow()
    flow[0, 0], flow[1, 1] = np.nan, 1.6666668e9
    write_npz(tmp_path / "x.npz", flow, frame=7, frame_to=9, timestamp_s=0.28, timestamp_to_s=0.36)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        assert {name: (stored[name].dtype.str, stored[name].item()) for name in stored if name != "flow"} == {
            "frame": ("<i8", 7),
            "frame_to": ("<i8", 9),
            "timestamp_s": ("<f8", 0.28),
            "timestamp_to_s": ("<f8", 0.36),
        }
        assert stored["flow"].dtype == np.float32
        assert stored["flow"].tobytes() == flow.tobytes()
    assert read_flow_npz(tmp_path / "x.npz").tobytes() == flow.tobytes()
    write_npz(tmp_path / "bare.npz", flow.astype(np.float64)[:, ::-1])
    with np.load(tmp_path / "bare.npz") as stored:
        assert stored.files == ["flow"]
    assert np.array_equal(read_flow_npz(str(tmp_path / "bare.npz")), flow[:, ::-1], equal_nan=True)


def test_the_sink_tells_frames_and_times(tmp_path: Path) -> None:
    flows = torch.from_numpy(np.stack([some_flow(), -some_flow()])).permute(0, 3, 1, 2)
    sink = open_sink(tmp_path / "%06d.npz", SinkConfig())
    sink.open(FlowInfo(6, 5, frame_rate=None, frame_count=None, source=SourceId("test")))
    sink.write(FlowBatch(flows, 0, np.array([4, 6]), np.array([6, 8]), np.array([0.4, np.nan]), np.array([0.6, 0.8])))
    sink.commit()
    assert sink.notes == []
    with np.load(tmp_path / "000001.npz") as stored:
        assert (stored["frame"], stored["frame_to"], stored["timestamp_to_s"]) == (6, 8, 0.8)
        assert np.isnan(stored["timestamp_s"])
        assert np.array_equal(stored["flow"], -some_flow())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_what_others_write(tmp_path: Path, save: Any, dtype: str, order: Any) -> None:
    flow = some_flow()
    expected = flow.astype(dtype).astype(np.float32)
    save(tmp_path / "a.npz", anything=np.array(flow, dtype, order=order), frame=3, mask=np.zeros((6, 5, 2), bool))
    save(tmp_path / "b.npz", np.array(flow.transpose(2, 0, 1), dtype, order=order))
    for name in ("a", "b"):
        back = read_flow_npz(tmp_path / f"{name}.npz")
        assert (back.dtype, back.flags.c_contiguous, back.flags.writeable) == (np.float32, True, True)
        assert np.array_equal(back, expected)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_a_header(tmp_path: Path, version: tuple[int, int]) -> None:
    """In versions 2 and 3 the header's length takes four bytes instead of two."""
    file = io.BytesIO()
    np.lib.format.write_array(file, some_flow(), version)
    assert np.array_equal(read_flow_npz(zipped(tmp_path / "x.npz", flow=file.getvalue())), some_flow())


def test_the_name_flow_goes_before_others_and_hw2_before_2hw(tmp_path: Path) -> None:
    flow = some_flow(2, 7)
    np.savez(tmp_path / "x.npz", other=-flow, flow=flow)
    assert np.array_equal(read_flow_npz(tmp_path / "x.npz"), flow)
    square = some_flow(2, 2)
    np.savez(tmp_path / "y.npz", square)
    assert np.array_equal(read_flow_npz(tmp_path / "y.npz"), square)


def test_what_is_encrypted_is_passed_over(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", other=npy(), mine=npy(data=some_flow().tobytes()))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert np.array_equal(read_flow_npz(path), some_flow())


def test_arrays_that_are_not_flow(tmp_path: Path) -> None:
    flow = some_flow()
    path = tmp_path / "x.npz"
    for arrays, found in (
        ({}, "found 0 among nothing"),
        ({"a": flow, "b": flow}, "found 2 among a.npy, b.npy"),
        ({"flow": flow[..., 0], "other": flow}, "found 0 among flow.npy"),
        ({"a": flow.astype(int)}, "found 0"),
        ({"a": flow.astype(complex)}, "found 0"),
        ({"a": flow[:0]}, "found 0"),
        ({"a": flow[None]}, "found 0"),
        ({"a": np.array([flow, None], dtype=object)}, "found 0"),  # a pickle, which must not be loaded
    ):
        np.savez(path, **arrays)
        with pytest.raises(FlowFileError, match=found) as caught:
            read_flow_npz(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (npy(data=bytes(239)), "says that it holds 5x6 vectors, 240 bytes, but"),
        (npy(data=bytes(241)), "says that it holds 5x6"),
        (npy(shape=(10**6, 10**6, 2)), "found 1000000x1000000"),
        (npy(shape=(2, 99_999, 99_999)), "found 99999x99999"),
        (npy(shape=(11_000, 11_000, 2)), "says that it holds 11000x11000"),
        (npy(shape=(-6, 5, 2)), "found 0"),
        (npy(shape=(6.0, 5, 2)), "found 0"),
        (npy(shape=(True, 120, 2)), "found 0"),
        (npy(shape=[6, 5, 2]), "found 0"),
        (npy(descr="|O"), "found 0"),
        (npy(descr="<f4,<f4"), "found 0"),
        (npy(descr="__import__"), "found 0"),
        (b"\x93NUMPY\x01\x00\x40\x00" + b"(" * 64, "found 0"),
        (b"\x93NUMPY\x01\x00\xe8\x03" + b"-" * 1000, "found 0"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100), "found 0"),
        (b"\x93NUMPY\x01\x00\x0b\x00{[1, 2]: 3}", "found 0"),
        (b"\x93NUMPY\x01\x00\x02\x00[]", "found 0"),
        (npy(more=1000), "found 0"),  # a header beyond 1 kB
        (b"\x93NUM", "found 0"),
        (b"", "found 0"),
        (b"GIF89a" + bytes(500), "found 0"),
    ],
)
@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_lie(tmp_path: Path, how: int, entry: bytes, message: str) -> None:
    path = zipped(tmp_path / "x.npz", how, flow=entry)
    with pytest.raises(FlowFileError, match=message):
        read_flow_npz(path)


def claiming(path: Path, size: int) -> bytearray:
    """A zip of one entry, changed to claim so many bytes uncompressed, in both places where that stands."""
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        at = data.rindex(mark) + place
        data[at : at + 4] = struct.pack("<I", size)
    return data


def test_an_entry_that_holds_less_than_it_claims(tmp_path: Path) -> None:
    """Its checksum is that of what it holds."""
    path = zipped(tmp_path / "x.npz", flow=npy(data=bytes(200)))
    path.write_bytes(claiming(path, len(npy())))
    with pytest.raises(FlowFileError, match="ends 40 bytes early"):
        read_flow_npz(path)


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    size = 11_000 * 11_000 * 8  # 1 GB: still an allowed size, so it is not refused for the size alone
    bombs = [tmp_path / f"{number}.npz" for number in range(5)]
    entry = npy(shape=(11_000, 11_000, 2), data=bytes(1 << 20))
    header = len(entry) - (1 << 20)
    for short, lying, how in ((bombs[0], bombs[1], zipfile.ZIP_DEFLATED), (bombs[2], bombs[3], zipfile.ZIP_STORED)):
        data = claiming(zipped(short, how, flow=entry), size + header)
        lying.write_bytes(data)
        if how == zipfile.ZIP_DEFLATED:  # also lies about the compressed size
            at = data.rindex(b"PK\x01\x02") + 20
            data[at : at + 4] = struct.pack("<I", size // 1000)
            lying.with_name("twice.npz").write_bytes(data)
    zipped(bombs[4], zipfile.ZIP_BZIP2, flow=npy(data=bytes(10 << 20)))
    for bomb in (*bombs, tmp_path / "twice.npz"):
        assert most_memory(bomb, pytest.raises(FlowFileError)) < 4 << 20


def test_a_sound_file_takes_little_more_memory_than_its_flow(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", flow=npy(shape=(1024, 2048, 2), data=bytes(16 << 20)))
    assert most_memory(path, nullcontext()) < 24 << 20


def most_memory(path: Path, refusal: AbstractContextManager[object]) -> int:
    """Peak memory in bytes while a file is read."""
    tracemalloc.start()
    try:
        with refusal:
            read_flow_npz(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_damage_anywhere_is_found_or_harmless(tmp_path: Path) -> None:
    flow = some_flow()
    write_npz(tmp_path / "x.npz", flow)
    data = (tmp_path / "x.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    for place in range(len(data)):
        bad.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            assert np.array_equal(read_flow_npz(bad), flow)  # for example, a changed date
        except FlowFileError as error:
            assert str(bad) in str(error)  # noqa: PT017
    for length in (0, 1, 30, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:length])
        with pytest.raises(FlowFileError):
            read_flow_npz(bad)


def test_equal_flow_makes_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_npz(tmp_path / name, some_flow(), frame=1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert zipfile.ZipFile(io.BytesIO((tmp_path / "a").read_bytes())).infolist()[0].date_time[0] == 1980


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"none\.npz"):
        read_flow_npz(tmp_path / "none.npz")
    with pytest.raises(FlowFileError, match="found a folder"):
        read_flow_npz(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FlowFileError, match=r"expected an \.npz"):
        read_flow_npz(tmp_path / "file")
