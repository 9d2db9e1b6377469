from __future__ import annotations

import numpy as np
import torch

from flowreel.engine.scenes.outlines import BarOutline, GratingOutline, radial_outline


def test_outlines_are_distances() -> None:
    x, y = torch.meshgrid(torch.arange(-20.0, 21), torch.arange(-20.0, 21), indexing="xy")
    ring = radial_outline(np.full(256, 15.0), hole=0.4).distance(x, y)
    radius = torch.hypot(x, y)
    assert (ring - torch.minimum(15 - radius, radius - 6)).abs().max() < 1e-4
    bar = BarOutline(12, 3).distance(x, y)
    assert torch.equal(bar > 0, (x.abs() < 12) & (y.abs() < 3))
    grating = GratingOutline(12, 1, 6).distance(x, y)
    assert torch.equal(grating > 0, (y % 6 == 3) & (radius < 12))
    zigzag = radial_outline(np.tile([8.0, 12.0], 8))  # between two of its 16 angles, the radius is between theirs
    between = torch.tensor(np.pi / 16)
    assert abs(float(zigzag.distance(9 * between.cos(), 9 * between.sin())) - 1) < 1e-4
    angles = -np.pi + 2 * np.pi * np.arange(512) / 512  # a square's straight side, seen from its middle
    side = radial_outline(10 / np.maximum(np.abs(np.cos(angles)), np.abs(np.sin(angles)))).distance(x, y)
    middle = y.abs() < 4
    near = middle & (x > 6) & (x < 14)
    assert (side[near] - (10 - x[near])).abs().max() < 0.1
