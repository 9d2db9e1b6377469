"""How a clip is looked at: resized, cut, mirrored. Flow and picture alike, the flow's lengths going with its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.config import as_whole
from flowreel.engine.errors import UsageError

Size = int | tuple[int, int]  # pixels: the shorter side, or height and width


@dataclass(frozen=True)
class ClipView:
    """One way to look at the frames of a clip. Pixels throughout."""

    size: tuple[int, int]  # height and width that the whole frame is resized to
    top: int  # of what is cut out of that
    left: int
    height: int
    width: int
    mirrored: bool = False  # left to right, after cutting

    def flow(self, flow: Tensor) -> Tensor:
        """(L, 2, H, W) pixels of the source to (L, 2, height, width) pixels of what is given.

        A vector is as much longer as its axis is; mirrored, what went right goes left.
        """
        scale = [new / old for new, old in zip(reversed(self.size), reversed(flow.shape[-2:]), strict=True)]
        seen = self._cut(self._resized(flow))
        if self.mirrored:
            scale[0] = -scale[0]
            seen = seen.flip(-1)
        return seen * torch.tensor(scale, dtype=flow.dtype, device=flow.device)[:, None, None]

    def rgb(self, rgb: Tensor) -> Tensor:
        """(3, H, W) uint8 to (3, height, width) uint8."""
        seen = self._cut(self._resized(rgb[None].float()))[0].round().clamp(0, 255).to(torch.uint8)
        return (seen.flip(-1) if self.mirrored else seen).contiguous()

    def _resized(self, frames: Tensor) -> Tensor:
        if tuple(frames.shape[-2:]) == self.size:
            return frames
        return functional.interpolate(frames, self.size, mode="bilinear", align_corners=False, antialias=True)

    def _cut(self, frames: Tensor) -> Tensor:
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class ViewRule:
    """How to look at frames of any size."""

    size: Size | None = None  # what frames are resized to; a number: their shorter side, their shape kept; None: as is
    crop: Size | None = None  # what is cut out of that; a number: a square; None: nothing is cut away
    mirror: bool = False  # every second one, at random

    def __post_init__(self) -> None:
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is None:
                continue
            several = isinstance(value, tuple | list)
            sides = [as_whole(side) or 0 for side in (value if several else (value, value))]
            if len(sides) != 2 or min(sides) < 1:
                raise UsageError(f"{name} must be a number of pixels or (height, width), got {value!r}")
            object.__setattr__(self, name, tuple(sides) if several else sides[0])

    def sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """What frames of this size are resized to, and the size that is cut out. Raises UsageError: there is less."""
        whole = height, width
        if isinstance(self.size, int):
            shorter = min(height, width)
            whole = round(height * self.size / shorter), round(width * self.size / shorter)
        elif self.size is not None:
            whole = self.size[0], self.size[1]
        cut = whole
        if self.crop is not None:
            cut = (self.crop, self.crop) if isinstance(self.crop, int) else (self.crop[0], self.crop[1])
        if cut[0] > whole[0] or cut[1] > whole[1]:
            raise UsageError(
                f"{cut[1]}x{cut[0]} cannot be cut out of {whole[1]}x{whole[0]}: resize to more, or cut less"
            )
        return whole, cut

    def middle(self, height: int, width: int) -> ClipView:
        """The middle of a frame."""
        whole, cut = self.sizes(height, width)
        return ClipView(whole, (whole[0] - cut[0]) // 2, (whole[1] - cut[1]) // 2, *cut)

    def random(self, height: int, width: int, generator: torch.Generator | None) -> ClipView:
        """Cut out anywhere, and perhaps mirrored. generator: None takes torch's own."""
        whole, cut = self.sizes(height, width)
        top, left = (random_below(most - size + 1, generator) for most, size in zip(whole, cut, strict=True))
        return ClipView(whole, top, left, *cut, mirrored=self.mirror and random_below(2, generator) == 1)


def random_below(count: int, generator: torch.Generator | None) -> int:
    """A number from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator, device="cpu"))
