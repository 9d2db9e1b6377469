"""``.flo`` files: written and read without changing a bit, never half-written, and clear errors for damaged ones."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import FlowFileError, OutputWriteError, SourceNotFoundError
from flowreel.sinks import flo
from flowreel.sinks.flo import FloSink, read_flo, write_flo

INFO = FlowInfo(height=3, width=5, frame_rate=None, frame_count=None, source=SourceId("test"))


def some_flow(height: int = 3, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(height, width, 2)).astype(np.float32)


def batch_of(flows: list[np.ndarray], index: int = 0) -> FlowBatch:
    frames = np.arange(index, index + len(flows))
    stacked = torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2)
    return FlowBatch(stacked, index, frames, frames + 1, frames / 25, (frames + 1) / 25)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


Limit = Callable[[int], AbstractContextManager[None]]  # the fixture files_up_to


def test_bytes_on_disk_are_the_format(tmp_path: Path) -> None:
    write_flo(tmp_path / "x.flo", np.array([[[1, 2], [3, 4], [5, 6]]], dtype=np.float64))
    expected = struct.pack("<f2i6f", 202021.25, 3, 1, 1, 2, 3, 4, 5, 6)
    assert (tmp_path / "x.flo").read_bytes() == expected
    assert names(tmp_path) == ["x.flo"]


def test_every_bit_survives(tmp_path: Path) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, size=(40, 30, 2), dtype=np.uint32)
    bits[0, 0] = (0x7FC01234, 0x80000000)  # NaN with a payload, minus zero
    write_flo(tmp_path / "x.flo", bits.view(np.float32))
    back = read_flo(tmp_path / "x.flo")
    assert back.dtype == np.float32
    assert np.array_equal(back.view(np.uint32), bits)


def test_a_folder_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputWriteError, match="it is a folder"):
        write_flo(".", some_flow())


@pytest.mark.parametrize("mapped_from", [0, 1 << 40])
def test_reading_gives_a_writable_array_and_leaves_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped_from: int
) -> None:
    monkeypatch.setattr(flo, "MAPPED_FROM_BYTES", mapped_from)
    flow = some_flow()
    write_flo(tmp_path / "x.flo", flow)
    back = read_flo(str(tmp_path / "x.flo"))
    assert type(back) is np.ndarray
    assert np.array_equal(back, flow)
    before = (tmp_path / "x.flo").read_bytes()
    back[:] = 7
    assert torch.from_numpy(back).sum() == 7 * 30
    assert (tmp_path / "x.flo").read_bytes() == before


def test_a_published_file(data_dir: Path) -> None:
    path = data_dir / "flo" / "flownet2_caffe_result_960x540.flo"
    flow = read_flo(path)
    assert flow.shape == (540, 960, 2)
    assert flow[0, 0].tolist() == pytest.approx([82.72547, 30.58087], abs=1e-5)
    assert flow.tobytes() == path.read_bytes()[12:]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_any_float_and_any_strides_are_written(tmp_path: Path, dtype: str) -> None:
    flow = np.asfortranarray(some_flow().astype(dtype))[:, ::-1]
    write_flo(tmp_path / "new" / "folder" / "x.flo", flow)
    assert np.array_equal(read_flo(tmp_path / "new" / "folder" / "x.flo"), flow.astype(np.float32))


def test_what_float32_cannot_hold_stays_unknown(tmp_path: Path) -> None:
    write_flo(tmp_path / "x.flo", np.array([[[1e300, -1e300]]]))
    assert np.isinf(read_flo(tmp_path / "x.flo")).all()


@pytest.mark.parametrize("shape", [(2, 4, 5), (4, 2), (0, 5, 2), (100_000, 1, 2)])
def test_wrong_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="flow is"):
        write_flo(tmp_path / "x.flo", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="float dtype"):
        write_flo(tmp_path / "x.flo", np.zeros((1, 1, 2), dtype=int))
    assert names(tmp_path) == []


GOOD = struct.pack("<f2i4f", 202021.25, 2, 1, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "found 0 bytes"),
        (GOOD[:11], "found 11 bytes"),
        (b"PNG!" + GOOD[4:], r"tag b'PIEH', found b'PNG!'$"),
        (b"HEIP" + GOOD[4:], "big-endian"),
        (b"PIEH" + struct.pack("<ii", 0, 4), "found 0x4"),
        (b"PIEH" + struct.pack("<ii", 4, -1), "found 4x-1"),
        (b"PIEH" + struct.pack("<ii", 100_000, 1) + bytes(800_000), "found 100000x1"),
        (b"PIEH" + struct.pack("<ii", 99_999, 99_999), "expected 79998400020 bytes .* found 12: it is cut short"),
        (GOOD[:-1], "expected 28 bytes for 2x1 pixels, found 27: it is cut short"),
        (GOOD + b"!", "expected 28 bytes for 2x1 pixels, found 29: it is followed"),
    ],
)
def test_damaged_files_say_what_is_wrong(tmp_path: Path, contents: bytes, message: str) -> None:
    path = tmp_path / "bad.flo"
    path.write_bytes(contents)
    with pytest.raises(FlowFileError, match=message) as caught:
        read_flo(path)
    assert str(path) in str(caught.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"none\.flo"):
        read_flo(tmp_path / "none.flo")
    with pytest.raises(FileNotFoundError):
        read_flo(tmp_path / "none.flo")
    with pytest.raises(FlowFileError, match="found a folder"):
        read_flo(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, files_up_to: Limit) -> None:
    small = np.ones((1, 1, 2), np.float32)
    write_flo(tmp_path / "x.flo", small)
    with files_up_to(100), pytest.raises(OutputWriteError, match=r"x\.flo"):
        write_flo(tmp_path / "x.flo", some_flow(50, 50))
    assert np.array_equal(read_flo(tmp_path / "x.flo"), small)
    assert names(tmp_path) == ["x.flo"]


def test_sink_numbers_its_files_from_zero(tmp_path: Path) -> None:
    flows = [some_flow(seed=seed) for seed in range(5)]
    sink = FloSink(str(tmp_path / "out" / "%06d.flo"), SinkConfig())
    sink.open(INFO)
    sink.write(batch_of(flows[:3]))
    sink._pool.drain()
    unfinished = [".%06d.flo.partial", *(f"00000{number}.flo.partial" for number in range(3))]
    assert names(tmp_path / "out") == unfinished
    sink.write(batch_of(flows[3:], index=3))
    sink.commit()
    assert names(tmp_path / "out") == [f"00000{number}.flo" for number in range(5)]
    for number, flow in enumerate(flows):
        assert np.array_equal(read_flo(tmp_path / "out" / f"00000{number}.flo"), flow)
    assert sink.bytes_written == 5 * (12 + 8 * 15) == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert sink.notes == []
    assert sink.path == str(tmp_path / "out" / "%06d.flo")


def test_a_tensor_is_written_as_an_array_is(tmp_path: Path) -> None:
    flow = torch.randn(2, 4, 5)  # the layout that models return
    write_flo(tmp_path / "x.flo", flow.permute(1, 2, 0))
    assert np.array_equal(read_flo(tmp_path / "x.flo"), flow.permute(1, 2, 0).numpy())
    for odd in (flow.bfloat16(), flow.half(), flow.double(), flow.clone().requires_grad_()):
        write_flo(tmp_path / "x.flo", odd.permute(1, 2, 0))
        assert np.array_equal(read_flo(tmp_path / "x.flo"), odd.detach().float().permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="float dtype, got int64"):
        write_flo(tmp_path / "y.flo", torch.zeros(4, 5, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"flow is \(H, W, 2\)"):
        write_flo(tmp_path / "y.flo", flow)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_masked_is_unknown(tmp_path: Path, dtype: type[np.floating[Any]]) -> None:
    flow = np.ma.masked_greater(np.arange(12, dtype=dtype).reshape(2, 3, 2), 7)
    write_flo(tmp_path / "x.flo", flow)
    written = read_flo(tmp_path / "x.flo")
    np.testing.assert_array_equal(written[~flow.mask], flow.data[~flow.mask])
    assert (written[flow.mask] == 1e10).all()


def test_the_sink_marks_what_is_not_finite_and_leaves_all_else(tmp_path: Path) -> None:
    flow = some_flow(seed=3)
    flow[0, 0, 0] = 2e9  # already marked as unknown, so it stays as it is
    flow[1, 1, 0], flow[2, 2, 1] = np.nan, -np.inf
    before = flow.copy()
    sink = FloSink(str(tmp_path / "%d.flo"), SinkConfig())
    sink.open(INFO)
    sink.write(batch_of([flow]))
    sink.commit()
    expected = before.copy()
    expected[1, 1] = expected[2, 2] = 1e10
    assert np.array_equal(read_flo(tmp_path / "0.flo"), expected)
    assert np.array_equal(flow, before, equal_nan=True)
