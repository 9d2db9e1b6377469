"""Convolutions with fewer multiplications: Winograd's minimal filtering along the rows of an image.

Four neighbouring outputs of a filter with three taps need six products instead of twelve, once inputs and weights are
transformed suitably: ``y = spread @ ((weigh @ w) * (collect @ x))``. Here ``*`` is itself a convolution, over the
channels and along the columns, which oneDNN computes for all products at once, each as a group. So a 3x3 layer takes
half the arithmetic, and the transforms before and after are small matrix products on data in the caches.

It is applied along one axis only. Along both it would take a quarter of the arithmetic, but four times the memory for
the weights instead of twice, and with a larger error. A layer's rounding error is twice that of the plain form;
FlowNet2's as a whole stays the same. In bfloat16 it is not worthwhile, and the transformed values would be rounded once
more.

Toom (1963), Cook (1966) and Winograd (1980) found it; Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks" (CVPR 2016), brought it to networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowreel.engine.compiled.buffers import Layouts, apart
from flowreel.engine.compiled.onednn import PackedConvolution
from flowreel.engine.models.layers import SLOPE

TILE = 4  # outputs at once, of each kind: six products for three taps. More is less exact, fewer save less
POINTS = (0.0, 1.0, -1.0, 0.5, -0.5)  # where the polynomials are evaluated; powers of two are exact
BLOCK = 16  # a group's channels are padded to a multiple of what a vector register holds
NARROWEST = 64  # channels in and out; with fewer, the transforms take longer than they save
WIDEST = 512 * 512  # inputs times outputs; above it reading the weights, here twice as large, is the bottleneck


@dataclass(frozen=True)
class Filtering:
    """``y = spread @ ((weigh @ w) * (collect @ x))``: a tile of outputs from the inputs around it."""

    spread: np.ndarray  # (outputs, products)
    weigh: np.ndarray  # (products, taps)
    collect: np.ndarray  # (products, inputs)
    constant: np.ndarray  # (products,): what to add to the products so that every output grows by one
    before: int  # inputs of a tile to the left of its own
    step: int  # inputs from one tile to the next


def filtering(kernel: int, stride: int) -> Filtering | None:
    """The filtering of a layer's rows: for 3x3 layers and for 5x5 layers of stride 2; None for others."""
    if (kernel, stride) == (3, 1):
        spread, weigh, collect = minimal(TILE, 3)
        return Filtering(spread, weigh, collect, _where_one(len(collect)), 1, TILE)
    if (kernel, stride) == (5, 2):
        return _halving()
    return None


def minimal(outputs: int, taps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(spread, weigh, collect) of ``y[i] = sum_k w[k] x[i + k]``, with the fewest products possible.

    The transpose of the Toom-Cook multiplication of polynomials, evaluated at ``POINTS`` and at infinity.
    """
    products = outputs + taps - 1
    points = POINTS[: products - 1]
    spread, weigh, collect = np.zeros((outputs, products)), np.zeros((products, taps)), np.zeros((products, products))
    for number, point in enumerate(points):
        others = np.poly([p for p in points if p != point])  # highest power first
        collect[number, :-1] = others[::-1]
        weigh[number] = point ** np.arange(taps) / np.polyval(others, point)
        spread[:, number] = point ** np.arange(outputs)
    collect[-1] = np.poly(points)[::-1]
    weigh[-1, -1] = spread[-1, -1] = 1
    return spread, weigh, collect


def _where_one(products: int) -> np.ndarray:
    """Selects the product at the point 1, which contributes equally to all outputs."""
    constant = np.zeros(products)
    constant[POINTS.index(1.0)] = 1
    return constant


def _halving() -> Filtering:
    """Five taps at stride 2: three taps on the even inputs and two on the odd ones."""
    (spread3, weigh3, collect3), (spread2, weigh2, collect2) = minimal(TILE, 3), minimal(TILE, 2)
    even, odd = len(collect3), len(collect2)
    weigh, collect = np.zeros((even + odd, 5)), np.zeros((even + odd, 2 * TILE + 3))
    weigh[:even, 0::2], weigh[even:, 1::2] = weigh3, weigh2
    collect[:even, 0::2], collect[even:, 1::2] = collect3, collect2
    constant = np.concatenate([_where_one(even), np.zeros(odd)])
    return Filtering(np.hstack([spread3, spread2]), weigh, collect, constant, 2, 2 * TILE)


class Winograd:
    """A layer by minimal filtering of its rows; called like ``PackedConvolution``, equal to it up to rounding."""

    def __init__(self, by: Filtering, weight: Tensor, bias: Tensor | None, stride: int, *, leaky: bool) -> None:
        """``weight``, ``bias``: as in torch's layer, float32. ``stride``: that of the layer."""
        self._by, self._leaky = by, leaky
        self._spread, self._collect = (torch.from_numpy(matrix).float()[None] for matrix in (by.spread, by.collect))
        self._outputs, self._inputs, height, _ = weight.shape
        products = len(by.collect)
        self._held_outputs, self._held_inputs = (-(-n // BLOCK) * BLOCK for n in (self._outputs, self._inputs))
        weighed = apart((products, self._held_outputs, self._held_inputs, height, 1), weight.dtype)
        weighed[:, : self._outputs, : self._inputs, :, 0] = torch.einsum(
            "pt,oiyt->poiy", torch.from_numpy(by.weigh), weight.double()
        )
        constant = weight.new_zeros(products, self._held_outputs)
        if bias is not None:
            constant[:, : self._outputs] = torch.from_numpy(by.constant).float()[:, None] * bias
        self._multiply = PackedConvolution(weighed.flatten(0, 1), constant.flatten(), (stride, 1), 0, groups=products)
        channels = products * max(self._held_outputs, self._held_inputs * stride)  # `stride` input rows per row
        self.bytes_a_pixel = channels * weight.itemsize // len(by.spread)  # of output: the larger intermediate

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, stride: int, *, transposed: bool, leaky: bool) -> Winograd | None:
        """None where this form would be no faster."""
        channels = weight.shape[:2]
        if transposed or weight.dtype != torch.float32 or min(channels) < NARROWEST or math.prod(channels) > WIDEST:
            return None
        by = filtering(weight.shape[2], stride)
        return None if by is None else cls(by, weight, bias, stride, leaky=leaky)

    def __call__(self, x: Tensor, rows: int, layouts: Layouts) -> Tensor:
        """``x``: (B, C, H, W), channels last; ``rows``: of padding, above and below."""
        width = -(-x.shape[3] * len(self._by.spread) // self._by.step)
        lacking = -x.shape[3] % self._by.step
        tiles = self._tiles(F.pad(x, (0, lacking)) if lacking else x)
        batch, height, count = tiles.shape[:3]
        collected = torch.bmm(self._collect.expand(batch * height * count, -1, -1), tiles.flatten(0, 2))
        collected = collected.view(batch, height, count, -1).permute(0, 3, 1, 2)  # (B, products * C, H, tiles)
        made = self._multiply(collected, rows, layouts).permute(0, 2, 3, 1)  # (B, H', tiles, products * K)
        products = made.reshape(-1, len(self._by.collect), self._held_outputs)
        y = torch.bmm(self._spread.expand(len(products), -1, -1), products)  # (B * H' * tiles, outputs of a tile, K)
        if self._leaky:
            F.leaky_relu_(y, SLOPE)
        y = y.view(batch, made.shape[1], -1, self._held_outputs).permute(0, 3, 1, 2)
        return y[:, : self._outputs, :, :width]

    def _tiles(self, x: Tensor) -> Tensor:
        """(B, H, tiles, inputs of a tile, channels): the inputs of each tile of outputs, zeros beyond the borders."""
        before, step, inputs = self._by.before, self._by.step, self._by.collect.shape[1]
        batch, channels, height, width = x.shape
        count = width // step
        own = x.permute(0, 2, 3, 1).reshape(batch, height, count, step, channels)
        tiles = x.new_empty(batch, height, count, inputs, self._held_inputs)
        tiles[..., self._inputs :] = 0
        left, middle, right = torch.split(tiles[..., : self._inputs], [before, step, inputs - before - step], 3)
        middle.copy_(own)
        left[:, :, 0], left[:, :, 1:] = 0, own[:, :, :-1, step - before :]
        right[:, :, -1], right[:, :, :-1] = 0, own[:, :, 1:, : right.shape[3]]
        return tiles
