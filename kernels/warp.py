"""Backward warping: sample the image where each pixel's flow points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowreel.kernels.launch import SUFFIXES, blocks_for, launch, sizes, view
from flowreel.kernels.operation import operation, refuse_gradient, set_gradient, widened

if TYPE_CHECKING:
    from collections.abc import Callable

# --- the definition: any device ---------------------------------------------------------------------------------------


def warp_definition(image: Tensor, flow: Tensor) -> Tensor:
    """What ``warp`` means: four neighbours, each clamped to the image, weighted by distance."""
    wide = widened(image)
    out = torch.zeros_like(wide, memory_format=torch.contiguous_format)
    for corner, wx, wy in _corners(flow.to(wide.dtype)):
        out += _fetch(wide, corner) * (wx * wy)
    return out.to(image.dtype)


def warp_image_gradient_definition(grad: Tensor, flow: Tensor) -> Tensor:
    """Gradient for the image, from the gradient (B, C, H, W) of the output."""
    grad, flow = _where_known(grad, flow)
    wide = widened(grad)
    total = torch.zeros_like(wide, memory_format=torch.contiguous_format).flatten(2)
    for corner, wx, wy in _corners(flow.to(wide.dtype)):
        share = (wide * (wx * wy)).flatten(2)
        total.scatter_add_(2, corner.flatten(2).expand_as(share), share)
    return total.view(grad.shape).to(grad.dtype)


def warp_flow_gradient_definition(grad: Tensor, image: Tensor, flow: Tensor) -> Tensor:
    """Gradient for the flow: the slope of the image between the four neighbours."""
    grad, flow = _where_known(grad, flow)
    wide = widened(image)
    gradient = torch.zeros_like(flow, dtype=wide.dtype, memory_format=torch.contiguous_format)
    for number, (corner, wx, wy) in enumerate(_corners(flow.to(wide.dtype))):
        match = (_fetch(wide, corner) * grad).sum(1, keepdim=True)
        gradient[:, :1] += match * (wy if number % 2 else -wy)
        gradient[:, 1:] += match * (wx if number // 2 else -wx)
    return gradient.to(flow.dtype)


def _where_known(grad: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient and flow set to zero where the flow is NaN, that is unknown: such pixels give no gradient."""
    unknown = flow.isnan().any(1, keepdim=True)
    return grad.masked_fill(unknown, 0), flow.masked_fill(unknown, 0)


def _corners(flow: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each corner's index in the flattened image and its weights in x and y, all (B, 1, H, W).

    Order: top left, top right, bottom left, bottom right. The pixel's own coordinate is an integer, so it is added to
    the integer part of the flow only: at x = 4000 the sum of both as float32 would be off by 1e-4. Displacements beyond
    one image size all read the border, so clamping there loses nothing.
    """
    height, width = flow.shape[2:]
    x = torch.arange(width, device=flow.device)
    y = torch.arange(height, device=flow.device)[:, None]
    u, v = flow[:, :1].clamp(-width - 1, width + 1), flow[:, 1:].clamp(-height - 1, height + 1)
    left, top = u.floor(), v.floor()
    column, row = (x + left.nan_to_num().long()), (y + top.nan_to_num().long())  # NaN remains in the weights
    columns = ((column.clamp(0, width - 1), 1 - (u - left)), ((column + 1).clamp(0, width - 1), u - left))
    rows = ((row.clamp(0, height - 1), 1 - (v - top)), ((row + 1).clamp(0, height - 1), v - top))
    return [(r * width + c, wx, wy) for r, wy in rows for c, wx in columns]


def _fetch(image: Tensor, place: Tensor) -> Tensor:
    """(B, C, H, W) and (B, 1, H, W) -> (B, C, H, W)."""
    pixels = image.flatten(2)
    return pixels.gather(2, place.flatten(2).expand_as(pixels)).view(image.shape)


# --- the fast CPU version: torch's grid_sample, in strips -------------------------------------------------------------

_EXACT_BEYOND = 1024  # pixels; grid_sample's coordinates in float32 are off by 9e-5 px at 1024, 6e-4 px at 4096
_STRIP_ROWS = 64  # output rows at a time, so that the coordinates and the double precision result stay in the cache
_BILINEAR, _BORDER = 0, 1  # torch's numbers for the interpolation and the padding


def _warp_cpu(image: Tensor, flow: Tensor) -> Tensor:
    height, width = image.shape[2:]
    source = image.to(_sampling_dtype(image))
    out = torch.empty_like(image, memory_format=torch.contiguous_format)
    for top in range(0, height, _STRIP_ROWS):
        strip = slice(top, top + _STRIP_ROWS)
        grid = _grid(flow[:, :, strip], top, height, width, source.dtype)
        out[:, :, strip] = torch.grid_sampler_2d(source, grid, _BILINEAR, _BORDER, align_corners=True)
    if not flow.sum().isfinite():  # at NaN grid_sample reads the image's edge: write NaN instead
        out.masked_fill_(flow.isnan().any(1, keepdim=True), float("nan"))
    return out


def _warp_image_gradient_cpu(grad: Tensor, flow: Tensor) -> Tensor:
    grad, flow = _without_nan(grad, flow)
    wide = grad.to(_sampling_dtype(grad))
    height, width = grad.shape[2:]
    grid = _grid(flow, 0, height, width, wide.dtype)
    return _grid_sample_backward(wide, torch.empty_like(wide), grid, (True, False))[0].to(grad.dtype)


def _warp_flow_gradient_cpu(grad: Tensor, image: Tensor, flow: Tensor) -> Tensor:
    grad, flow = _without_nan(grad, flow)
    wide = image.to(_sampling_dtype(image))
    height, width = image.shape[2:]
    grid = _grid(flow, 0, height, width, wide.dtype)
    slope = _grid_sample_backward(grad.to(wide.dtype), wide, grid, (False, True))[1]
    scale = slope.new_tensor((2 / max(width - 1, 1), 2 / max(height - 1, 1)))
    return slope.mul_(scale).permute(0, 3, 1, 2).to(flow.dtype, memory_format=torch.contiguous_format)


def _without_nan(grad: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Without NaN, where the backward pass of grid_sample would read and write outside the image."""
    return (grad, flow) if flow.sum().isfinite() else _where_known(grad, flow)


def _grid_sample_backward(
    grad: Tensor, image: Tensor, grid: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Gradients for the image and for the grid; only the grid's depends on the image's values."""
    found: tuple[Tensor, Tensor] = torch.ops.aten.grid_sampler_2d_backward(
        grad, image, grid, _BILINEAR, _BORDER, True, wanted
    )
    return found


def _sampling_dtype(image: Tensor) -> torch.dtype:
    exact = image.dtype == torch.float64 or max(image.shape[2:]) > _EXACT_BEYOND
    return torch.float64 if exact else torch.float32


def _grid(flow: Tensor, top: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Flow (B, 2, rows, W) from row ``top`` on -> (B, rows, W, 2), where -1 and 1 are the outer pixels' centres."""
    kx, ky = 2 / max(width - 1, 1), 2 / max(height - 1, 1)
    rows = flow.shape[2]
    x = torch.arange(width, dtype=torch.float64, device=flow.device).mul_(kx).sub_(1).to(dtype)
    y = torch.arange(top, top + rows, dtype=torch.float64, device=flow.device).mul_(ky).sub_(1).to(dtype)[:, None]
    grid = flow.new_empty((flow.shape[0], rows, width, 2), dtype=dtype)
    for axis, (places, k, size) in enumerate(((x, kx, width), (y, ky, height))):
        if size > 1:
            torch.add(places, flow[:, axis].to(dtype), alpha=k, out=grid[..., axis])
        else:
            grid[..., axis] = 0  # whatever the flow: grid_sample multiplies by size - 1, and infinity would become NaN
    return grid


# --- the CUDA version -------------------------------------------------------------------------------------------------


def _warp_cuda(image: Tensor, flow: Tensor) -> Tensor:
    out = image.new_empty(image.shape)
    _launch_each_pixel("warp", image.dtype, image, flow.float(), out)
    return out


def _warp_image_gradient_cuda(grad: Tensor, flow: Tensor) -> Tensor:
    total = torch.zeros(grad.shape, dtype=torch.float32, device=grad.device)  # atomic additions, in any order
    _launch_each_pixel("warp_image_gradient", grad.dtype, grad, flow.float(), total)
    return total.to(grad.dtype)


def _warp_flow_gradient_cuda(grad: Tensor, image: Tensor, flow: Tensor) -> Tensor:
    gradient = torch.empty(flow.shape, dtype=torch.float32, device=flow.device)
    _launch_each_pixel("warp_flow_gradient", image.dtype, grad.to(image.dtype), image, flow.float(), gradient)
    return gradient.to(flow.dtype)


def _launch_each_pixel(entry: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    batch, channels, height, width = tensors[0].shape
    arguments = [argument for tensor in tensors for argument in view(tensor)]
    arguments += sizes(batch, channels, height, width)
    launch("warp", f"{entry}_{SUFFIXES[dtype]}", blocks_for(batch * height * width), arguments)


# --- registration -----------------------------------------------------------------------------------------------------

_warp: Callable[[Tensor, Tensor], Tensor] = operation(
    "warp(Tensor image, Tensor flow) -> Tensor",
    warp_definition,
    on_cpu=_warp_cpu,
    on_cuda=_warp_cuda,
    shape=lambda image, flow: image.new_empty(image.shape),
)
_image_gradient: Callable[[Tensor, Tensor], Tensor] = operation(
    "warp_image_gradient(Tensor grad, Tensor flow) -> Tensor",
    warp_image_gradient_definition,
    on_cpu=_warp_image_gradient_cpu,
    on_cuda=_warp_image_gradient_cuda,
    shape=lambda grad, flow: grad.new_empty(grad.shape),
)
_flow_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = operation(
    "warp_flow_gradient(Tensor grad, Tensor image, Tensor flow) -> Tensor",
    warp_flow_gradient_definition,
    on_cpu=_warp_flow_gradient_cpu,
    on_cuda=_warp_flow_gradient_cuda,
    shape=lambda grad, image, flow: flow.new_empty(flow.shape),
)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    image, flow = ctx.saved_tensors
    return (  # the image is usually the network's input, which needs no gradient
        _image_gradient(grad, flow) if ctx.needs_input_grad[0] else None,
        _flow_gradient(grad, image, flow) if ctx.needs_input_grad[1] else None,
    )


set_gradient("warp", _backward, _remember)
refuse_gradient("warp_image_gradient")
refuse_gradient("warp_flow_gradient")

# --- the public function ----------------------------------------------------------------------------------------------


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """The image as seen from where the flow starts: out[y, x] = image[y + v, x + u], bilinear.

    Args:
        image: (B, C, H, W) float32, float64, bfloat16 or float16, any unit and strides, none of the sizes zero.
        flow: (B, 2, H, W) floating point, pixels: u (right), then v (down). Keep it float32 beside a half-precision
            image: half precision rounds it by up to a pixel.

    Returns:
        (B, C, H, W) in the image's unit and dtype, contiguous. Places outside the image take the nearest border pixel,
        for infinite flow too. Where u or v is NaN, every channel is NaN and no gradient comes from there.

    Differentiable (once) in both. Exactly at the border the slope is one-sided, and the versions may choose different
    sides. Sums are formed in float32 (float64 for float64), and coordinates are exact to 1e-4 px at any image size;
    against the definition: 1e-4 times the difference of neighbouring pixels.

    Raises:
        TypeError: an input is not a floating point tensor.
        ValueError: shapes or devices do not fit together, or a size is zero.

    Source: Ilg et al., FlowNet 2.0: Evolution of Optical Flow Estimation with Deep Networks, CVPR 2017, section 4;
    border pixels are repeated as in NVIDIA's Resample2d, not black as in Caffe.
    """
    if not image.is_floating_point() or not flow.is_floating_point():
        raise TypeError(f"warp takes floating point tensors, got {image.dtype} and {flow.dtype}")
    if image.ndim != 4 or image.numel() == 0:
        raise ValueError(f"warp takes an image (B, C, H, W) that holds something, got {tuple(image.shape)}")
    if flow.shape != (image.shape[0], 2, *image.shape[2:]):
        raise ValueError(f"flow for an image {tuple(image.shape)} is (B, 2, H, W), got {tuple(flow.shape)}")
    if image.device != flow.device:
        raise ValueError(f"warp takes image and flow on one device, got {image.device} and {flow.device}")
    return _warp(image, flow)
