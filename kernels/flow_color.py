"""The Middlebury colour wheel: direction of motion becomes hue, length becomes saturation.

Source: Baker, Scharstein, Lewis, Roth, Black, Szeliski, "A Database and Evaluation Methodology for Optical Flow",
International Journal of Computer Vision 92 (2011), and the program ``color_flow`` published with it. Its results are
met within one grey level.

The formula is written once, in ``_paint``, with functions that have the same names in NumPy and torch. NumPy arrays are
painted in blocks of rows that stay in the processor's cache, without starting threads; tensors in one go on their
device, on a GPU by a CUDA kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.data import is_known
from flowreel.kernels.launch import SUFFIXES, blocks_for_picture, launch, sizes, view
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    import numpy.typing as npt

    UInt8Array = npt.NDArray[np.uint8]
    FloatArray = npt.NDArray[np.floating[Any]]
    Float32Array = npt.NDArray[np.float32]

BEYOND_SHADE = 0.75  # brightness of a vector longer than the scale, relative to its full colour

# Columns between neighbouring corner colours: more where the eye tells hues apart more finely.
_CORNERS = (
    (15, (255, 0, 0)),  # red to
    (6, (255, 255, 0)),  # yellow to
    (4, (0, 255, 0)),  # green to
    (11, (0, 255, 255)),  # cyan to
    (13, (0, 0, 255)),  # blue to
    (6, (255, 0, 255)),  # magenta to red
)
_BLOCK_VECTORS = 1 << 15  # vectors painted at once on a CPU: the dozen planes in use then fit a 2 MB cache
_SMALLEST_SCALE = 1e-30  # pixels; keeps the division sane for a scale that float32 would round to zero


def color_wheel() -> UInt8Array:
    """The 55 colours around the wheel, (55, 3) uint8 RGB, from red through yellow, green, cyan, blue and magenta."""
    columns = []
    for number, (length, corner) in enumerate(_CORNERS):
        following = _CORNERS[(number + 1) % len(_CORNERS)][1]
        for step in range(length):
            moved = 255 * step // length
            columns.append([a + moved * ((b > a) - (b < a)) for a, b in zip(corner, following, strict=True)])
    return np.array(columns, dtype=np.uint8)


@overload
def flow_to_color(flow: FloatArray, max_flow: float | None = None) -> UInt8Array: ...
@overload
def flow_to_color(flow: Tensor, max_flow: float | None = None) -> Tensor: ...
def flow_to_color(flow: FloatArray | Tensor, max_flow: float | None = None) -> UInt8Array | Tensor:
    """Paint flow with the Middlebury colours.

    Args:
        flow: a NumPy array (H, W, 2), or a tensor (2, H, W) or (N, 2, H, W) on any device; pixels, x (right) then
            y (down). It is not changed. Masked entries of a masked array are unknown.
        max_flow: length in pixels that gets the full colour; longer vectors get it at 3/4 of its brightness.
            None: each picture's own longest known vector, as is usual for single pictures. A video needs one number
            for all its pictures.

    Returns:
        RGB, uint8: (H, W, 3) for an array, (3, H, W) or (N, 3, H, W) on the same device for a tensor. No motion is
        white. A vector with a component that is NaN, infinite or beyond 1e9 is unknown: black, and never the longest.
        On a GPU: within one level of what a CPU gives.

    Raises:
        ValueError: the shape is none of these, or ``max_flow`` is not a positive number.
    """
    if max_flow is not None:
        if isinstance(max_flow, str) or not 0 < max_flow < math.inf:
            raise ValueError(f"max_flow must be a positive number of pixels or None, got {max_flow!r}")
        max_flow = max(float(max_flow), _SMALLEST_SCALE)
    if isinstance(flow, Tensor):
        return _color_tensor(flow, max_flow)
    return _color_array(_unmasked(flow), max_flow)


def percentile_magnitude(
    flows: Iterable[FloatArray | Tensor], percentile: float = 95.0, samples_per_flow: int = 1 << 16
) -> float:
    """A colour scale for a whole clip: the length that ``percentile`` % of the known vectors stay below.

    Args:
        flows: each a NumPy array (H, W, 2) or a tensor (2, H, W) or (N, 2, H, W); pixels. What is unknown, masked
            entries too, is left out.
        percentile: 0 to 100. A little under 100, so that a few outliers do not make all other vectors pale.
        samples_per_flow: a picture with more vectors is sampled on a regular grid of hardly more points than this.

    Returns:
        Pixels, always positive and so valid for ``flow_to_color``: where the percentile is zero (little moves) the
        longest sampled vector, and 1.0 where nothing moves or nothing is known.
    """
    sampled = [_sample_magnitudes(picture, samples_per_flow) for flow in flows for picture in _pictures(flow)]
    magnitudes = np.concatenate(sampled) if sampled else np.empty(0, np.float32)
    if magnitudes.size == 0:
        return 1.0
    scale = float(np.percentile(magnitudes, percentile)) or float(magnitudes.max())
    return scale if scale > 0 else 1.0


def _paint(xp: Any, cast: Callable[[Any, Any], Any], u: Any, v: Any, scale: Any, wheel: Any) -> tuple[Any, Any, Any]:
    """The formula of the colour wheel, on planes of one shape; ``xp`` is numpy or torch.

    u, v: float32 pixels; scale: pixels; wheel: (6, 56), see ``_wheel_tables``. Returns uint8 planes R, G, B.
    """
    u, v, known = _known(xp, u, v)
    radius = _magnitude(xp, u, v) / scale
    # Half a turn is added to the angle so that it starts at 0 for motion to the right; a full turn is 54 columns.
    turn = xp.clip((xp.arctan2(-v, -u) * (1 / math.pi) + 1) * 27, 0, 55)
    column = xp.floor(turn)
    part = turn - column
    index = cast(column, xp.int64)
    # The shorter a vector, the more white is mixed in. Vectors beyond the scale are darkened, unknown ones black.
    saturation = xp.clip(radius, None, 1)
    shade = cast(known, xp.float32) - (1 - BEYOND_SHADE) * cast(radius > 1, xp.float32)
    red, green, blue = (
        cast((255 - saturation * (wheel[channel][index] + part * wheel[channel + 3][index])) * shade, xp.uint8)
        for channel in range(3)
    )
    return red, green, blue


def _known(xp: Any, u: Any, v: Any) -> tuple[Any, Any, Any]:
    """Both components with unknown vectors set to zero, and where they are known."""
    known = is_known(u) & is_known(v)
    return xp.where(known, u, 0), xp.where(known, v, 0), known


def _magnitude(xp: Any, u: Any, v: Any) -> Any:
    """Vector length. Known components are small enough to square in float32, which is much faster than ``hypot``."""
    return xp.sqrt(u * u + v * v)


@lru_cache(maxsize=1)
def _wheel_tables() -> Float32Array:
    """(6, 56) float32, C order: how far R, G, B lie below 255 in each column, then its change to the next column.

    Behind the last column comes the first again: a full turn, exactly the last column, may be rounded to a little more.
    """
    missing = 255 - color_wheel().astype(np.float32).T  # (3, 55)
    missing = np.concatenate([missing, missing[:, :2]], axis=1)  # (3, 57)
    return np.ascontiguousarray(np.concatenate([missing[:, :-1], np.diff(missing, axis=1)]))


@lru_cache(maxsize=16)
def _wheel_tensor(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # the cached tensor serves callers inside and outside inference mode
        return torch.from_numpy(_wheel_tables()).to(device)


def _color_tensor(flow: Tensor, max_flow: float | None) -> Tensor:
    if flow.ndim not in (3, 4) or flow.shape[-3] != 2 or 0 in flow.shape[-2:]:
        raise ValueError(f"a tensor of flow is (2, H, W) or (N, 2, H, W), got {tuple(flow.shape)}")
    vectors = flow.detach() if flow.is_floating_point() else flow.float()
    pictures = _flow_to_color(vectors[None] if flow.ndim == 3 else vectors, max_flow)
    return pictures[0] if flow.ndim == 3 else pictures


def flow_to_color_definition(flow: Tensor, max_flow: float | None) -> Tensor:
    """(N, 2, H, W) pixels -> (N, 3, H, W) uint8: what ``flow_to_color`` means, for tensors."""
    u, v = flow.float().unbind(-3)  # each (N, H, W)
    scale: float | Tensor
    if max_flow is None:
        longest = _magnitude(torch, *_known(torch, u, v)[:2]).amax(dim=(-2, -1), keepdim=True)
        scale = torch.where(longest > 0, longest, 1.0)  # decided on the device: the CPU does not wait
    else:
        scale = max_flow
    return torch.stack(_paint(torch, Tensor.to, u, v, scale, _wheel_tensor(flow.device)), dim=-3)


def _flow_to_color_cuda(flow: Tensor, max_flow: float | None) -> Tensor:
    count, _, height, width = flow.shape
    out = _shape_of_pictures(flow, max_flow)
    if count == 0:
        return out
    scales = torch.full((count,), max_flow or 0.0, dtype=torch.float32, device=flow.device)
    blocks, suffix = blocks_for_picture(height, width), SUFFIXES[flow.dtype]
    size, grid = sizes(height, width, blocks), (blocks * count,)
    if max_flow is None:
        launch("flow_color", f"flow_longest_{suffix}", grid, (*view(flow), scales, *size))
    arguments = (*view(flow), *view(out), _wheel_tensor(flow.device), scales, *size, np.float32(BEYOND_SHADE))
    launch("flow_color", f"flow_color_{suffix}", grid, arguments)
    return out


def _shape_of_pictures(flow: Tensor, max_flow: float | None) -> Tensor:
    return torch.empty((flow.shape[0], 3, *flow.shape[2:]), dtype=torch.uint8, device=flow.device)


_flow_to_color: Callable[[Tensor, float | None], Tensor] = operation(
    "flow_to_color(Tensor flow, float? max_flow) -> Tensor",
    flow_to_color_definition,
    on_cuda=_flow_to_color_cuda,
    shape=_shape_of_pictures,
)


def _color_array(flow: FloatArray, max_flow: float | None) -> UInt8Array:
    if flow.ndim != 3 or flow.shape[2] != 2 or 0 in flow.shape:
        raise ValueError(f"an array of flow is (H, W, 2), got {flow.shape}")
    colors = np.empty((*flow.shape[:2], 3), dtype=np.uint8)
    # Unknown vectors may overflow when converted to float32, and a tiny scale gives huge ratios: both are handled.
    with np.errstate(all="ignore"):
        if max_flow is None:
            longest = max(float(_magnitude(np, *_known(np, u, v)[:2]).max()) for _, u, v in _row_blocks(flow))
            max_flow = longest or 1.0
        for rows, u, v in _row_blocks(flow):
            painted = _paint(np, np.ndarray.astype, u, v, max_flow, _wheel_tables())
            for channel, plane in enumerate(painted):
                colors[rows, :, channel] = plane
    return colors


def _unmasked(flow: FloatArray) -> FloatArray:
    """Masked entries as NaN, that is unknown."""
    if isinstance(flow, np.ma.MaskedArray):
        filled: FloatArray = np.ma.filled(flow.astype(np.result_type(flow, np.float32)), np.nan)
        return filled
    return np.asarray(flow)


def _row_blocks(flow: FloatArray) -> Iterator[tuple[slice, Float32Array, Float32Array]]:
    """Blocks of rows: the slice of rows, and both components as contiguous float32 planes."""
    height, width = flow.shape[:2]
    step = max(1, _BLOCK_VECTORS // width)
    for top in range(0, height, step):
        rows = slice(top, top + step)
        block = flow[rows]
        yield rows, np.ascontiguousarray(block[..., 0], np.float32), np.ascontiguousarray(block[..., 1], np.float32)


def _pictures(flow: FloatArray | Tensor) -> Iterator[tuple[Any, Any]]:
    """The two planes of each picture in ``flow``, (H, W) each."""
    if not isinstance(flow, Tensor):
        array = _unmasked(flow)
        yield array[..., 0], array[..., 1]
        return
    for picture in flow.detach().unsqueeze(0) if flow.ndim == 3 else flow.detach():
        yield picture[0], picture[1]


def _sample_magnitudes(planes: tuple[Any, Any], samples: int) -> Float32Array:
    """Lengths of the known vectors on a regular grid of hardly more than ``samples`` points; 1-D float32."""
    height, width = planes[0].shape
    stride = max(1, math.ceil(math.sqrt(height * width / samples)))
    u, v = (plane[::stride, ::stride] for plane in planes)
    if isinstance(u, Tensor):
        u, v = u.float().cpu().numpy(), v.float().cpu().numpy()
    with np.errstate(all="ignore"):
        u, v, known = _known(np, u.astype(np.float32), v.astype(np.float32))
        lengths: Float32Array = _magnitude(np, u, v)[known]
    return lengths
