"""Views of a clip: resized, cropped, mirrored. Flow and pictures alike; flow vectors are scaled with the frame."""

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
    """One view of the frames of a clip. All fields in pixels."""

    size: tuple[int, int]  # height and width that the whole frame is resized to
    top: int  # of the crop in the resized frame
    left: int
    height: int  # of the crop
    width: int
    mirrored: bool = False  # left to right, after cropping

    def flow(self, flow: Tensor) -> Tensor:
        """(L, 2, H, W), in pixels of the source, to (L, 2, height, width), in pixels of the view.

        Each component is scaled like its axis; mirroring negates x.
        """
        scale = [new / old for new, old in zip(reversed(self.size), reversed(flow.shape[-2:]), strict=True)]
        seen = self._cut(self._resized(flow))
        if self.mirrored:
            scale[0] = -scale[0]
            seen = seen.flip(-1)
        return seen * torch.tensor(scale, dtype=flow.dtype, device=flow.device)[:, None, None]

    def rgb(self, rgb: Tensor) -> Tensor:
        """(3, H, W) uint8 to (3, height, width) uint8."""
        seen = self._cut(self._resized(rgb[None].float()))[0].round().to(torch.uint8)
        return seen.flip(-1) if self.mirrored else seen

    def _resized(self, frames: Tensor) -> Tensor:
        if tuple(frames.shape[-2:]) == self.size:
            return frames
        return functional.interpolate(frames, self.size, mode="bilinear", align_corners=False, antialias=True)

    def _cut(self, frames: Tensor) -> Tensor:
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class ViewRule:
    """How to make views of frames of any size."""

    size: Size | None = None  # frames are resized to this; a number: the shorter side, aspect kept; None: not resized
    crop: Size | None = None  # size cropped from the resized frame; a number: a square; None: no crop
    mirror: bool = False  # mirror random views with probability 1/2

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
        """The size that such frames are resized to, and the size of the crop. Raises UsageError: the crop is larger."""
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
        """The view with the crop in the centre."""
        whole, cut = self.sizes(height, width)
        return ClipView(whole, (whole[0] - cut[0]) // 2, (whole[1] - cut[1]) // 2, *cut)

    def random(self, height: int, width: int, generator: torch.Generator | None) -> ClipView:
        """A view cropped anywhere, and perhaps mirrored. generator: None: torch's own."""
        whole, cut = self.sizes(height, width)
        top, left = (random_below(most - size + 1, generator) for most, size in zip(whole, cut, strict=True))
        return ClipView(whole, top, left, *cut, mirrored=self.mirror and random_below(2, generator) == 1)


def random_below(count: int, generator: torch.Generator | None) -> int:
    """A random number from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator, device="cpu"))
