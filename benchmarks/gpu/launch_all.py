"""``python -m benchmarks.gpu.launch_all DEVICE``: each kernel and its gradients once in each dtype and layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from flowreel.kernels import bitshuffle, channel_norm, correlation, flow_to_color, quantise, warp, yuv_to_rgb
from flowreel.kernels.bias_leaky_relu import bias_leaky_relu, bias_leaky_relu_
from flowreel.kernels.convolution import convolution, pack
from flowreel.kernels.enlarge_flow import enlarge_flow
from flowreel.kernels.flow_head import Borders, flow_head, pack_flow_head, take_off_borders_
from flowreel.kernels.fusing_input import fusing_input
from flowreel.kernels.normalise_frames import normalise_frames
from flowreel.kernels.refining_input import refining_input

HEIGHT, WIDTH = 21, 37
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def weights(device: str) -> Iterator[tuple[torch.Tensor, int, bool]]:
    """Weights of each kind that our convolution supports, with stride, and whether it is a deconvolution."""
    for inputs, outputs, kernel, stride in (
        *((inputs, 64, 7, 2) for inputs in (3, 6, 12)),
        *((inputs, 64, 3, 1) for inputs in (6, 11)),
    ):
        yield torch.randn(outputs, inputs, kernel, kernel, device=device) / inputs, stride, False
    yield torch.randn(40, 16, 4, 4, device=device) / 40, 2, True


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
                _heads(made(40), made(104))
                correlation(made(24), made(24), scale=1 / 19, negative_slope=0.1, out=made(480)[:, 32:473])
                correlation(made(136), made(136), 4, 1, 4, 1, 1, negative_slope=0.1, out=made(96)[:, 8:89])
        network_inputs(device, dtype)
        for max_flow in (None, 20.0):
            flow_to_color(flow.to(dtype), max_flow)
        for steps in (torch.int16, torch.int32):
            bitshuffle(quantise(flow.to(dtype), 1 / 64, dtype=steps).steps, 64)
    for weight, stride, transposed in weights(device):
        x = torch.randn(2, -(-weight.shape[0 if transposed else 1] // 8) * 8, HEIGHT, WIDTH, device=device)
        bias = torch.randn(weight.shape[1 if transposed else 0], device=device)
        for dtype in TYPES[1:]:
            given = weight.to(dtype), pack(weight.to(dtype), stride, transposed), bias, 0.1, stride, transposed
            map_of = x.to(dtype).contiguous(memory_format=torch.channels_last)
            also = convolution(map_of, *given)
            convolution(map_of, *given, also=also)
    for dtype in (torch.uint8, torch.uint16):
        luma, chroma = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((21, 37), (11, 19, 2)))
        yuv_to_rgb(luma, chroma, out=torch.empty(3, 64, 64, dtype=torch.uint8, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def _heads(*maps: torch.Tensor) -> None:
    """Flow heads for each number of warps that share the channels, alone and merged with the layer before."""
    for x in (*maps, torch.cat((*maps, *maps), 1)):
        bias = torch.zeros(2, device=x.device)
        for kernel in (3, 5):
            weight = torch.randn(2, x.shape[1], kernel, kernel, device=x.device)
            flow = flow_head(x, pack_flow_head(weight, x.dtype), bias)
        shapes = (4, 5, 2, x.shape[1]), (4, 2), (4, 2, x.shape[1]), (4, 2)
        take_off_borders_(flow, x, Borders(*(torch.randn(shape, device=x.device) for shape in shapes)))


def network_inputs(device: str, dtype: torch.dtype) -> None:
    """Kernels that write pixel by pixel, and upsampled flow into two places of a concatenation."""
    height, width = HEIGHT // 4 * 4, WIDTH // 4 * 4
    frames = torch.randn(2, 6, height, width, device=device)
    flow = torch.randn(2, 2, height // 4, width // 4, device=device)

    def room(channels: int, batch: int = 2) -> torch.Tensor:
        made = torch.zeros(batch, channels, height, width, dtype=dtype, device=device)
        return made.to(memory_format=torch.channels_last)

    normalise_frames(frames[:, :3], frames[:, 3:], planes=torch.empty_like(frames), pair=room(8), both=room(8, batch=4))
    refining_input(frames, flow, 20.0, room(16))
    fusing_input(frames, flow, 0.05, flow, 20.0, room(16))
    half = torch.randn(2, 2, height // 2, width // 2, device=device)
    for start in (1, 4):
        weight, bias = torch.randn(2, 2, 4, 4, device=device), torch.randn(2, device=device)
        enlarge_flow(half, weight, bias, room(8)[:, start : start + 2])


if __name__ == "__main__":
    main(*sys.argv[1:])
