"""Applies the effects of light, lens and sensor to pictures."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from flowreel.engine.device import send
from flowreel.engine.training.drawing import Development


def develop(frames: Tensor, developments: Sequence[Development | None]) -> Tensor:
    """Changes (N, 2, 3, H, W) float32 frames, 0..255, in place, each pair as its ``Development`` says."""
    numbered = [(place, each) for place, each in enumerate(developments) if each is not None]
    _haze(frames, [(place, each) for place, each in numbered if each.haze is not None])
    _blur(frames, [(place, each) for place, each in numbered if each.blur])
    _expose(frames, numbered)
    _grain(frames, [(place, each) for place, each in numbered if each.grain])
    return frames


Numbered = list[tuple[int, Development]]  # (index of the pair, its development) of the pairs that have an effect


def _places(chosen: Numbered, frames: Tensor) -> Tensor | slice:
    """An index that selects those pairs; a slice for all of them, which makes a view instead of a copy."""
    if len(chosen) == len(frames):
        return slice(None)
    return send(torch.tensor([place for place, _ in chosen]), frames.device)


def _values(values: Sequence[object], device: torch.device) -> Tensor:
    return send(torch.from_numpy(np.asarray(values, dtype=np.float32)), device)


def _haze(frames: Tensor, chosen: Numbered) -> None:
    if not chosen:
        return
    device, places = frames.device, _places(chosen, frames)
    coarse = _values([each.haze for _, each in chosen], device)[:, None]
    grey = _values([each.haze_grey for _, each in chosen], device)[:, None, None, None, None]
    haze = functional.interpolate(coarse, frames.shape[-2:], mode="bilinear", align_corners=True)
    frames[places] = frames[places].lerp_(grey, haze[:, None])


def _blur(frames: Tensor, chosen: Numbered) -> None:
    """Filter (side, 1 - 2 side, side) along both axes, borders replicated."""
    if not chosen:
        return
    places = _places(chosen, frames)
    side = _values([each.blur for _, each in chosen], frames.device)[:, None, None, None, None]
    sharp = frames[places]
    for axis in (-2, -1):
        size = sharp.shape[axis]
        before = torch.cat((sharp.narrow(axis, 0, 1), sharp.narrow(axis, 0, size - 1)), axis)
        after = torch.cat((sharp.narrow(axis, 1, size - 1), sharp.narrow(axis, size - 1, 1)), axis)
        sharp = torch.lerp(sharp, before.add_(after).mul_(0.5), 2 * side)
    frames[places] = sharp


def _expose(frames: Tensor, chosen: Numbered) -> None:
    """Contrast, brightness and colour of each frame, then gamma."""
    if not chosen:
        return
    device, places = frames.device, _places(chosen, frames)
    gain, offset = (
        _values([getattr(each, name) for _, each in chosen], device)[..., None, None] for name in ("gain", "offset")
    )
    frames[places] = torch.addcmul(offset, frames[places], gain).clamp_(0, 255)
    curved = [(place, each) for place, each in chosen if (each.gamma != 1).any()]
    if curved:
        places = _places(curved, frames)
        gamma = _values([each.gamma for _, each in curved], device)[..., None, None, None]
        frames[places] = frames[places].mul_(1 / 255).pow_(gamma).mul_(255)


def _grain(frames: Tensor, chosen: Numbered) -> None:
    if not chosen:
        return
    device, size = frames.device, frames[0, 0].numel()
    tile = _noise(device)
    if size >= len(tile):
        tile = tile.repeat(size // len(tile) + 2)
    starts = [int(at * (len(tile) - size)) for _, each in chosen for at in each.grain_at]
    windows = tile.unfold(0, size, 1)[send(torch.tensor(starts), device)]
    amplitude = _values([each.grain for _, each in chosen], device)[:, None, None, None, None]
    frames[_places(chosen, frames)] += windows.view(-1, *frames.shape[1:]) * amplitude


@functools.cache
def _noise(device: torch.device) -> Tensor:
    """Gaussian noise to cut windows from, (2^21,) float32: drawing new noise would cost more than the scene."""
    return torch.randn(1 << 21, generator=torch.Generator().manual_seed(7)).to(device)
