"""Chunks made from bit-shuffled values can be read by Blosc, and do not depend on the number of threads."""

from __future__ import annotations

import struct

import numcodecs.blosc
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flowreel.kernels import bitshuffle
from flowreel.sinks import blosc, chunk_pieces
from flowreel.sinks.chunk_pieces import Chunk
from flowreel.sinks.compressors import decompress

TYPES = ("<i2", "<i4")


def chunks_of(values: np.ndarray, threads: int = 1) -> list[Chunk]:
    shuffled = bitshuffle(torch.from_numpy(values), blosc.BLOCK_VALUES).numpy()
    return blosc.chunks_of_shuffled(shuffled, values.itemsize, threads)


def made(shape: tuple[int, ...], dtype: str, spread: float, seed: int = 0) -> np.ndarray:
    """Values that are smooth along the last axis; with a large ``spread`` hardly two bytes are equal."""
    steps = np.random.default_rng(seed).normal(0, spread, shape).cumsum(-1)
    return steps.astype(np.int64).astype(dtype)


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(1, 5),
    size=st.tuples(st.integers(1, 40), st.integers(1, 90)),
    block=st.sampled_from([8, 64, 1000, 1 << 19]),
    dtype=st.sampled_from(TYPES),
    spread=st.sampled_from([0.0, 1.0, 1e9]),
    seed=st.integers(0, 1000),
)
def test_blosc_reads_them(count: int, size: tuple[int, int], block: int, dtype: str, spread: float, seed: int) -> None:
    values = made((count, 2, *size), dtype, spread, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blosc, "BLOCK_VALUES", block)
        chunks = chunks_of(values, threads=2)
    for chunk, flow in zip(chunks, values, strict=True):
        whole = b"".join(chunk)
        np.testing.assert_array_equal(decompress(whole, "blosc", flow.dtype, flow.shape), flow)
        sizes = struct.unpack_from("<3i", whole, 4)
        assert sizes == (flow.nbytes, min(block * flow.itemsize, flow.nbytes), len(whole) - 4)


def test_a_frame_as_long_as_its_block_is_not_taken_for_the_block() -> None:
    """A compressed block must not have exactly its raw length: readers would take it for an uncompressed block.

    The noise is made a little more compressible step by step until a block of that length has occurred.
    """
    noise = np.random.default_rng(0).integers(0, 256, 256, np.uint8)
    frames = zstandard.ZstdCompressor(level=blosc.LEVEL)
    as_long = 0
    for same in range(64):
        noise[:same] = 0
        as_long += len(frames.compress(noise.tobytes())) == noise.size
        (chunk,) = blosc.chunks_of_shuffled(noise[None], 2, 1)
        planes = np.unpackbits(noise.reshape(16, -1), axis=1, bitorder="little")  # row n: bit n of all values
        values = np.packbits(planes.T, axis=1, bitorder="little").reshape(-1).view("<i2")
        np.testing.assert_array_equal(decompress(b"".join(chunk), "blosc", values.dtype, values.size), values)
    assert as_long


@pytest.mark.parametrize("dtype", TYPES)
def test_no_larger_than_those_of_numcodecs(dtype: str) -> None:
    """For two blocks, the last one short; the headers are the same too."""
    (values,) = made((1, 2, 300, 1000), dtype, 3.0)
    (chunk,) = chunks_of(values[None])
    encoder = numcodecs.blosc.Blosc(
        "zstd", blosc.LEVEL, numcodecs.blosc.BITSHUFFLE, blosc.BLOCK_VALUES * values.itemsize
    )
    theirs = encoder.encode(values)
    assert sum(map(len, chunk)) - 4 < 1.01 * len(theirs)  # other versions of Zstandard compress a little differently
    ours = b"".join(chunk)
    assert ours[:12] == theirs[:12]  # all of the header except the chunk's length


def test_the_same_of_any_number_of_threads() -> None:
    values = made((8, 2, 120, 500), "<i2", 3.0)
    alone = [b"".join(chunk) for chunk in chunks_of(values)]
    for threads in (2, 3, 5, 16, 100):
        assert [b"".join(chunk) for chunk in chunks_of(values, threads)] == alone
    assert [b"".join(chunk) for flow in values for chunk in chunks_of(flow[None])] == alone


def test_what_cannot_be_compressed_stays_as_it_is() -> None:
    values = np.random.default_rng(0).integers(-(2**15), 2**15, (1, 2, 64, 64)).astype("<i2")
    (chunk,) = chunks_of(values)
    whole = b"".join(chunk)
    assert len(whole) == values.nbytes + 16 + 4 + 4 + 4  # header, the block's place and length, the checksum
    np.testing.assert_array_equal(decompress(whole, "blosc", values.dtype, values.shape[1:]), values[0])


def test_checksums_by_a_package_without_its_c(monkeypatch: pytest.MonkeyPatch) -> None:
    import google_crc32c.python as slow

    (chunk,) = chunks_of(made((1, 2, 40, 50), "<i2", 3.0))
    monkeypatch.setattr(chunk_pieces, "IN_C", False)
    monkeypatch.setattr(chunk_pieces.google_crc32c, "extend", slow.extend)
    assert chunk_pieces.crc32c(*chunk[:-1]) == chunk[-1]
