"""Decoded video surfaces to planar RGB: matrix, range, chroma upsampling and the networks' padding in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowreel.kernels import launch as launching
from flowreel.kernels.launch import Argument, Prepared, Size, blocks_for, launch, sizes, view
from flowreel.kernels.operation import operation

if TYPE_CHECKING:
    from collections.abc import Callable

# Matrix -> weights of red and blue in luma. Sources: ITU-R BT.601-7, BT.709-6, BT.2020-2 (non-constant luminance),
# SMPTE 240M, 47 CFR 73.682 (fcc); the names are those of FFmpeg's scale filter.
LUMA_WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.30, 0.11),
}


class Coefficients(NamedTuple):
    """Coefficients that turn values as stored in memory into RGB from 0 to 255.

    y = luma_scale (Y - black), cb = Cb - grey, cr = Cr - grey;
    red = y + red_cr cr, green = y + green_cb cb + green_cr cr, blue = y + blue_cb cb.
    """

    black: float
    luma_scale: float
    grey: float
    red_cr: float
    green_cb: float
    green_cr: float
    blue_cb: float


def coefficients(matrix: str, full_range: bool, bits: int, stored_bits: int) -> Coefficients:
    """For values of ``bits`` bits in the high bits of ``stored_bits`` (8 or 16)."""
    red, blue = LUMA_WEIGHTS[matrix]
    green = 1 - red - blue
    shift = 1 << (stored_bits - bits)  # one step of the value, as stored
    unit = shift << (bits - 8)  # one step of an 8-bit value, as stored
    top = shift * ((1 << bits) - 1)
    luma_span, chroma_span = (top, top) if full_range else (219 * unit, 224 * unit)
    cr, cb = 255 * 2 * (1 - red) / chroma_span, 255 * 2 * (1 - blue) / chroma_span
    return Coefficients(
        black=0 if full_range else 16 * unit,
        luma_scale=255 / luma_span,
        grey=128 * unit,
        red_cr=cr,
        green_cb=-cb * blue / green,
        green_cr=-cr * red / green,
        blue_cb=cb,
    )


# --- the definition: any device ---------------------------------------------------------------------------------------


def yuv_to_rgb_definition(out: Tensor, luma: Tensor, chroma: Tensor, matrix: str, full_range: bool, bits: int) -> None:
    """What ``yuv_to_rgb`` means. Writes all of ``out``."""
    height, width = luma.shape
    c = coefficients(matrix, full_range, bits, 8 * luma.element_size())
    y = (luma.float() - c.black) * c.luma_scale
    cb, cr = _enlarged(chroma.float() - c.grey, height, width).unbind(2)
    rgb = torch.stack((y + c.red_cr * cr, y + c.green_cb * cb + c.green_cr * cr, y + c.blue_cb * cb))
    rgb = rgb.round().clamp(0, 255).to(torch.uint8)
    rows, columns = (_repeated(*sides, luma.device) for sides in zip((height, width), out.shape[1:], strict=True))
    out.copy_(rgb[:, rows[:, None], columns])


def _enlarged(chroma: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 2) -> (height, width, 2): bilinear, half-pixel centres, edges repeated.

    The whole plane is stretched over the picture. With even sides each sample lies in the middle of its 2x2 pixels;
    with an odd side the factor is a little below two, as in FFmpeg's scaler.
    """
    rows, columns = _between(chroma.shape[0], height, chroma.device), _between(chroma.shape[1], width, chroma.device)
    above, below, part = rows
    part = part[:, None, None]
    chroma = chroma[above] * (1 - part) + chroma[below] * part
    before, after, part = columns
    part = part[:, None]
    return chroma[:, before] * (1 - part) + chroma[:, after] * part


def _between(samples: int, pixels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel along one axis: the sample before it, the one after it, and the weight of the latter."""
    place = ((torch.arange(pixels, dtype=torch.float32, device=device) + 0.5) * (samples / pixels) - 0.5).clamp(
        0, samples - 1
    )
    before = place.floor()
    return before.long(), (before.long() + 1).clamp(max=samples - 1), place - before


def _repeated(inner: int, outer: int, device: torch.device) -> Tensor:
    """For each place along a padded axis, its source: the border repeats the edge, split as ``Fit`` splits it."""
    return (torch.arange(outer, device=device) - (outer - inner) // 2).clamp(0, inner - 1)


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _yuv_to_rgb_cuda(out: Tensor, luma: Tensor, chroma: Tensor, matrix: str, full_range: bool, bits: int) -> None:
    launch(*_launched(out, luma, chroma, matrix, full_range, bits))


def _launched(
    out: Tensor, luma: Tensor, chroma: Tensor, matrix: str, full_range: bool, bits: int
) -> tuple[str, str, Size, tuple[Argument, ...]]:
    stored_bits = 8 * luma.element_size()
    picture, samples = luma.shape, chroma.shape[:2]
    scales = (np.float32(count / side) for count, side in zip(samples, picture, strict=True))
    weights = map(np.float32, coefficients(matrix, full_range, bits, stored_bits))
    views = (*view(luma[None, None]), *view(chroma.permute(2, 0, 1)[None]), *view(out[None]))
    arguments = (*views, *sizes(*picture, *samples, *out.shape[1:]), *scales, *weights)
    return "yuv_to_rgb", f"yuv_to_rgb_{stored_bits}", blocks_for(out[0].numel()), arguments


# --- registration -----------------------------------------------------------------------------------------------------

_convert: Callable[[Tensor, Tensor, Tensor, str, bool, int], None] = operation(
    "yuv_to_rgb(Tensor(a!) out, Tensor luma, Tensor chroma, str matrix, bool full_range, int bits) -> ()",
    yuv_to_rgb_definition,
    on_cuda=_yuv_to_rgb_cuda,
)

# --- the public function ----------------------------------------------------------------------------------------------


def yuv_to_rgb(
    luma: Tensor,
    chroma: Tensor,
    *,
    matrix: str = "bt709",
    full_range: bool = False,
    bits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One decoded picture to full-range RGB.

    Args:
        luma: (H, W) uint8, or uint16 with the value in the high bits as in P010. Any strides, so any row pitch.
        chroma: (h, w, 2) of luma's dtype, Cb then Cr, any strides: h is H (4:4:4, 4:2:2) or ceil(H / 2) (4:2:0), w is
            W or ceil(W / 2). The second plane of NV12 has this form; so have separate planes ``(2, h, w)``, permuted.
        matrix: bt601, bt709, bt2020, smpte240m or fcc.
        full_range: values cover 0..255 (at 8 bits) instead of 16..235 (chroma: 16..240).
        bits: bits of a value; None: 8 for uint8, 10 for uint16.
        out: (3, H', W') uint8 to write into, any strides, H' >= H and W' >= W; None: a new one (3, H, W). A larger one
            is padded by repeating the edge, half of the padding (rounded down) above and to the left, as in
            ``engine/restore.py``.

    Returns:
        ``out``: red, green, blue planes, rounded to whole levels.

    Chroma is upsampled bilinearly, as if sited in the middle of its pixels, whatever chroma location the stream states.
    The CPU path (``engine/sources/picture.py``, FFmpeg's scaler) does so too; its pictures agree within one level, from
    8 pixels a side on. The CUDA kernel: within one level of the definition, and only where rounding decides.

    Raises:
        TypeError: a dtype is none of these.
        ValueError: shapes or devices do not fit together, the matrix is unknown, or the number of bits is impossible.
    """
    if luma.dtype not in (torch.uint8, torch.uint16) or chroma.dtype != luma.dtype:
        raise TypeError(f"luma and chroma are both uint8 or both uint16, got {luma.dtype} and {chroma.dtype}")
    if luma.ndim != 2 or luma.numel() == 0:
        raise ValueError(f"luma is (H, W) and holds something, got {tuple(luma.shape)}")
    height, width = luma.shape
    if chroma.ndim != 3 or not (
        chroma.shape[0] in (height, -(-height // 2))
        and chroma.shape[1] in (width, -(-width // 2))
        and chroma.shape[2] == 2
    ):
        raise ValueError(
            f"chroma for luma {tuple(luma.shape)} is (h, w, 2), as large or half as large, got {tuple(chroma.shape)}"
        )
    if matrix not in LUMA_WEIGHTS:
        raise ValueError(f"matrix is one of {', '.join(LUMA_WEIGHTS)}, got {matrix!r}")
    stored_bits = 8 * luma.element_size()
    bits = min(10, stored_bits) if bits is None else bits
    if not 8 <= bits <= stored_bits:
        raise ValueError(f"values in {luma.dtype} have 8 to {stored_bits} bits, got {bits}")
    if out is None:
        out = torch.empty((3, height, width), dtype=torch.uint8, device=luma.device)
    elif out.dtype != torch.uint8:
        raise TypeError(f"out is uint8, got {out.dtype}")
    elif out.ndim != 3 or out.shape[0] != 3 or out.shape[1] < height or out.shape[2] < width:
        raise ValueError(f"out for luma {tuple(luma.shape)} is (3, H, W), at least as large, got {tuple(out.shape)}")
    if not luma.device == chroma.device == out.device:
        raise ValueError(f"all on one device, got {luma.device}, {chroma.device} and {out.device}")
    _convert(out, luma, chroma, matrix, full_range, bits)
    return out


class SurfacesToRgb:
    """``yuv_to_rgb`` for a decoder's surfaces: each is one tensor, its planes below one another.

    All have the same memory layout, and there are hundreds a second. So the checks of ``yuv_to_rgb``, and what it
    derives from strides and colours, are done for the first surface only.
    """

    def __init__(
        self, planes: Callable[[Tensor], tuple[Tensor, Tensor]], *, matrix: str, full_range: bool, bits: int
    ) -> None:
        """Args: planes: gives a surface's luma and chroma as views of it. The others: as in ``yuv_to_rgb``."""
        self._planes = planes
        self._colours = matrix, full_range, bits
        self._laid: object = None  # memory layout of the prepared launch's surface and picture
        self._prepared: Prepared | None = None
        self._chroma_bytes = 0  # offset of chroma from the beginning of a surface

    def __call__(self, surface: Tensor, out: Tensor) -> None:
        """Writes all of ``out``, (3, H', W') uint8. Raises what ``yuv_to_rgb`` raises."""
        laid = surface.dtype, surface.device, surface.shape, surface.stride(), out.device, out.shape, out.stride()
        if self._prepared is not None and laid == self._laid and out.dtype == torch.uint8:
            begins = launching.pointer_of(surface)
            self._prepared(begins, begins + self._chroma_bytes, launching.pointer_of(out))
            return
        luma, chroma = self._planes(surface)
        matrix, full_range, bits = self._colours
        yuv_to_rgb(luma, chroma, matrix=matrix, full_range=full_range, bits=bits, out=out)
        if launching.kernels_on(surface.device) == "cuda" and luma.data_ptr() == surface.data_ptr():
            self._laid, self._chroma_bytes = laid, chroma.data_ptr() - surface.data_ptr()
            self._prepared = Prepared(*_launched(out, luma, chroma, matrix, full_range, bits))
