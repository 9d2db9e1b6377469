"""flownet2-pytorch's own correlation kernel, compiled from a file that the user has downloaded, and launched as there.

The file includes headers of a torch of 2018. Only its kernels are compiled, which need none of these headers.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Skipped

DISPLACEMENT, STRIDE, SIDE = 20, 2, 21
THREADS = 32
TYPES = {torch.float32: "float", torch.float16: "__half"}


def kernels_of(text: str) -> str:
    """The device code of the source: up to the first host function, without the includes. Raises Skipped for another
    file."""
    host = re.search(r"^int correlation_forward_cuda_kernel\b", text, re.M)
    if host is None or "correlation_forward" not in text[: host.start()]:
        raise Skipped("this is not flownet2-pytorch's correlation_cuda_kernel.cu")
    device_part = re.sub(r"^\s*(#include.*|using at::Half;)$", "", text[: host.start()], flags=re.M)
    return f"#include <cuda_fp16.h>\ntypedef int int32_t;\n{device_part}"


class OriginalCorrelation:
    """The original forward pass with FlowNetC's settings, for maps of one shape and dtype."""

    def __init__(self, path: Path, like: Tensor) -> None:
        import cupy

        from flowreel.kernels.compiling import header_folder  # the same headers as for our kernels

        kind = TYPES[like.dtype]
        names = [f"channels_first<{kind}>", f"correlation_forward<{kind}>"]
        options = ("-std=c++17", f"-I{header_folder()}")
        module = cupy.RawModule(code=kernels_of(path.read_text()), options=options, name_expressions=names)
        self._rearrange, self._correlate = map(module.get_function, names)
        batch, channels, height, width = like.shape
        padded = (batch, height + 2 * DISPLACEMENT, width + 2 * DISPLACEMENT, channels)
        self._maps = [torch.zeros(padded, dtype=like.dtype, device=like.device) for _ in range(2)]
        self._out = like.new_zeros(batch, SIDE * SIDE, height, width)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The cost volume, in memory that the next call overwrites."""
        import numpy as np

        from flowreel.kernels.launch import start

        batch, channels, height, width = a.shape
        numbers = [np.int32(x) for x in (channels, height, width)]
        settings = [np.int32(x) for x in (DISPLACEMENT, 1, DISPLACEMENT, 1, STRIDE)]
        grid, block = (batch, height, width), (THREADS,)
        for given, kept in zip((a, b), self._maps, strict=True):
            passed = (given.data_ptr(), kept.data_ptr(), *numbers, settings[0])
            start(self._rearrange, a.device, grid, block, passed)
        out = [np.int32(SIDE * SIDE), *numbers[1:]]
        first, second = (kept.data_ptr() for kept in self._maps)
        passed = (self._out.data_ptr(), *out, first, *numbers, second, *settings)
        start(self._correlate, a.device, grid, block, passed)
        return self._out
