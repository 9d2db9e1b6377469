"""Surfaces to RGB by the CUDA kernel: every subsampling, range, depth, pitch and padding, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowreel.kernels.yuv_to_rgb import LUMA_WEIGHTS, _yuv_to_rgb_cuda, yuv_to_rgb_definition

SIZES = ((1, 1), (2, 2), (5, 8), (17, 33), (36, 20))


def surface(
    height: int, width: int, chroma_size: tuple[int, int], bits: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Luma (H, W) and chroma (h, w, 2) of one surface of noise, whose rows are longer than the picture."""
    generator = torch.Generator().manual_seed(height)
    high, dtype = (256, torch.uint8) if bits == 8 else (1 << 16, torch.uint16)
    pitch = width + 11

    def noise(rows: int) -> Tensor:
        return torch.randint(0, high, (rows, pitch + pitch % 2), generator=generator).to(dtype).to(device)

    chroma = noise(chroma_size[0])[:, : 2 * chroma_size[1]].unflatten(1, (-1, 2))
    return noise(height)[:, :width], chroma


def compare(
    size: tuple[int, int], device: torch.device, matrix: str = "bt709", full: bool = False, bits: int = 8
) -> None:
    height, width = size
    for chroma_size in {(height, width), (height, -(-width // 2)), (-(-height // 2), -(-width // 2))}:
        luma, chroma = surface(height, width, chroma_size, bits, device)
        for padding in ((0, 0), (3, 8)):
            out, wanted = (
                torch.full((3, height + padding[0], width + padding[1]), 9, dtype=torch.uint8, device=device)
                for _ in range(2)
            )
            _yuv_to_rgb_cuda(out, luma, chroma, matrix, full, bits)
            yuv_to_rgb_definition(wanted, luma, chroma, matrix, full, bits)
            apart = (out.int() - wanted.int()).abs()
            assert apart.max() <= 1
            assert apart.float().mean() <= 0.01  # where a rounding just tips over


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_depths(card: torch.device, size: tuple[int, int], bits: int) -> None:
    compare(size, card, bits=bits)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", LUMA_WEIGHTS)
def test_matrices_and_ranges(card: torch.device, matrix: str, full: bool) -> None:
    compare((6, 10), card, matrix, full)


def test_writes_into_its_slice_of_a_batch_and_nowhere_else(card: torch.device) -> None:
    luma, chroma = surface(5, 7, (3, 4), 8, card)
    batch = torch.full((3, 3, 8, 9, 2), 200, dtype=torch.uint8, device=card)
    place = batch[1, :, :6, 1:, 1]
    _yuv_to_rgb_cuda(place, luma, chroma, "bt601", False, 8)
    wanted = torch.full_like(batch, 200)
    yuv_to_rgb_definition(wanted[1, :, :6, 1:, 1], luma, chroma, "bt601", False, 8)
    assert (batch.int() - wanted.int()).abs().max() <= 1
    untouched = torch.ones_like(batch, dtype=torch.bool)
    untouched[1, :, :6, 1:, 1] = False
    assert (batch[untouched] == 200).all()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("inner - 1", "inner"),
        ("before + 1 < samples", "before < samples"),
        ("(pixel + 0.5f)", "pixel"),
        ("(outer - inner) / 2", "(outer - inner + 1) / 2"),
        ("chroma.at(0, c, v.after, h.before)", "chroma.at(0, c, v.before, h.before)"),
        ("rintf(x)", "x"),
    ],
)
def test_a_planted_fault_is_caught(plant: Callable[..., torch.device], right: str, wrong: str) -> None:
    device = plant("yuv_to_rgb.cu", right, wrong)
    with pytest.raises(AssertionError):
        compare((17, 33), device)
