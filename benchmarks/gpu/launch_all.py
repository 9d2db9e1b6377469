"""``python -m benchmarks.gpu.launch_all DEVICE``: each kernel once, in each type and layout, and its gradients."""

from __future__ import annotations

import sys

import torch

from flowreel.kernels import channel_norm, correlation, flow_to_color, quantise, warp, yuv_to_rgb
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu, bias_leaky_relu_
from flowreel.kernels.flow_head import Borders, flow_head, pack_flow_head, take_off_borders_

HEIGHT, WIDTH = 21, 37
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def main(device: str) -> None:
    flow = torch.randn(2, 2, HEIGHT, WIDTH, device=device) * 9
    for dtype in TYPES:
        for layout in (torch.contiguous_format, torch.channels_last):

            def made(channels: int, dtype: torch.dtype = dtype, layout: torch.memory_format = layout) -> torch.Tensor:
                x = torch.randn(2, channels, HEIGHT, WIDTH, device=device)
                return x.to(dtype).contiguous(memory_format=layout).requires_grad_()

            correlation(made(19), made(19)).float().sum().backward()
            correlation(made(19), made(19), 4, 1, 4, 1, 1, negative_slope=0.1).float().sum().backward()
            warp(made(3), flow.clone().requires_grad_()).float().sum().backward()
            channel_norm(made(2)).float().sum().backward()
            with torch.no_grad():
                correlation(made(19), made(19), negative_slope=0.1, out=made(470)[:, 5:446])
                bias, whole = torch.randn(24, device=device), made(48)
                bias_leaky_relu_(made(24), bias, 0.1, whole[:, 8:32])
                bias_leaky_relu(made(24), bias, 0.1, whole[:, 5:22])
                bias_leaky_relu(made(24).float(), bias, 0.1, whole[:, 5:22])
                _heads(made(40), made(104))
                correlation(made(24), made(24), scale=1 / 19, negative_slope=0.1, out=made(480)[:, 32:473])
        for max_flow in (None, 20.0):
            flow_to_color(flow.to(dtype), max_flow)
        for steps in (torch.int16, torch.int32):
            quantise(flow.to(dtype), 1 / 64, dtype=steps)
    for dtype in (torch.uint8, torch.uint16):
        luma, chroma = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((21, 37), (11, 19, 2)))
        yuv_to_rgb(luma, chroma, out=torch.empty(3, 64, 64, dtype=torch.uint8, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def _heads(*maps: torch.Tensor) -> None:
    """Flow heads, of each number of warps that share the channels, alone and with what comes before."""
    for x in (*maps, torch.cat((*maps, *maps), 1)):
        bias = torch.zeros(2, device=x.device)
        for kernel in (3, 5):
            weight = torch.randn(2, x.shape[1], kernel, kernel, device=x.device)
            flow = flow_head(x, pack_flow_head(weight, x.dtype), bias)
        shapes = (4, 5, 2, x.shape[1]), (4, 2), (4, 2, x.shape[1]), (4, 2)
        take_off_borders_(flow, x, Borders(*(torch.randn(shape, device=x.device) for shape in shapes)))


if __name__ == "__main__":
    main(*sys.argv[1:])
