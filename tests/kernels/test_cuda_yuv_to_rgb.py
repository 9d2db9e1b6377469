"""The CUDA conversion to RGB equals the definition: every subsampling, range, depth, pitch and padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowreel.kernels import launch
from flowreel.kernels.yuv_to_rgb import (
    LUMA_WEIGHTS,
    SurfacesToRgb,
    _yuv_to_rgb_cuda,
    yuv_to_rgb_definition,
)

SIZES = ((1, 1), (2, 2), (5, 8), (17, 33), (36, 20))


def surface(
    height: int, width: int, chroma_size: tuple[int, int], bits: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Luma (H, W) and chroma (h, w, 2) of a surface of noise whose rows are longer than the picture."""
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
            assert apart.float().mean() <= 0.01  # a few values are rounded the other way


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


class TestSurfaces:
    """One prepared launch serves all surfaces of a decoder; it must notice when their memory layout changes."""

    HEIGHT, WIDTH = 6, 10

    @pytest.fixture(autouse=True)
    def _by_the_kernel(self, card: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "kernels_on", lambda device: "cuda")  # also on the CPU that acts as a GPU

    def planes(self, surface: Tensor) -> tuple[Tensor, Tensor]:
        return surface[: self.HEIGHT], surface[self.HEIGHT :].unflatten(1, (-1, 2))

    def surfaces(self, device: torch.device, pitch: int, dtype: torch.dtype = torch.uint8) -> list[Tensor]:
        generator = torch.Generator().manual_seed(pitch)
        rows = self.HEIGHT * 3 // 2
        most = 256 if dtype == torch.uint8 else 1 << 16
        noise = torch.randint(0, most, (3, rows, pitch), generator=generator).to(dtype).to(device)
        return [one[:, : self.WIDTH] for one in noise]

    def apart(self, convert: SurfacesToRgb, surface: Tensor, transposed: bool = False) -> float:
        size = (self.WIDTH, self.HEIGHT) if transposed else (self.HEIGHT, self.WIDTH)
        out, wanted = (torch.zeros(3, *size, dtype=torch.uint8, device=surface.device) for _ in range(2))
        convert(surface, out.transpose(1, 2) if transposed else out)
        luma, chroma = self.planes(surface)
        bits = 8 * surface.element_size()
        yuv_to_rgb_definition(wanted.transpose(1, 2) if transposed else wanted, luma, chroma, "bt601", True, bits)
        return float((out.int() - wanted.int()).abs().max())

    def test_each_is_converted(self, card: torch.device) -> None:
        convert = SurfacesToRgb(self.planes, matrix="bt601", full_range=True, bits=8)
        assert all(self.apart(convert, surface) <= 1 for surface in self.surfaces(card, 16))
        assert convert._prepared is not None

    def test_what_lies_otherwise_is_noticed(self, card: torch.device) -> None:
        convert = SurfacesToRgb(self.planes, matrix="bt601", full_range=True, bits=8)
        for pitch in (16, 12, 16):
            assert all(self.apart(convert, surface) <= 1 for surface in self.surfaces(card, pitch))
        for pitch in (16, 12):
            assert self.apart(convert, self.surfaces(card, pitch)[1]) <= 1
            assert self.apart(convert, self.surfaces(card, pitch)[0], transposed=True) <= 1

    def test_planes_that_lie_outside_the_surface_are_asked_for_each_time(self, card: torch.device) -> None:
        convert = SurfacesToRgb(lambda surface: self.planes(surface.flip(0)), matrix="bt601", full_range=True, bits=8)
        for surface in self.surfaces(card, self.WIDTH):
            out, wanted = (torch.zeros(3, self.HEIGHT, self.WIDTH, dtype=torch.uint8, device=card) for _ in range(2))
            convert(surface, out)
            yuv_to_rgb_definition(wanted, *self.planes(surface.flip(0)), "bt601", True, 8)
            assert (out.int() - wanted.int()).abs().max() <= 1

    def test_a_picture_of_another_type_is_refused_later_too(self, card: torch.device) -> None:
        convert = SurfacesToRgb(self.planes, matrix="bt601", full_range=True, bits=8)
        surface = self.surfaces(card, 16)[0]
        assert self.apart(convert, surface) <= 1
        with pytest.raises(TypeError, match="out is uint8"):
            convert(surface, torch.zeros(3, self.HEIGHT, self.WIDTH, device=card))
