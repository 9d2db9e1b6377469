"""Operations on torch tensors, one file each. The tensor's device decides which version runs.

``correlation``, ``warp`` and ``channel_norm`` are FlowNet2's three custom layers, registered with torch as
``torch.ops.flowreel.*``. So are ``yuv_to_rgb``, which converts decoded surfaces to RGB, ``flow_to_color``, which paints
flow, ``quantise``, which converts it to integers, and ``bitshuffle``, which reorders the bits of those. Operations that
only compiled networks use (their inputs, bias and activation, flow upsampling) are imported from their own modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# Not lazy: a function that shares its module's name would be replaced by the module if the module were imported first.
from flowreel.kernels.bitshuffle import bitshuffle
from flowreel.kernels.channel_norm import channel_norm
from flowreel.kernels.correlation import correlation
from flowreel.kernels.quantise import quantise
from flowreel.kernels.warp import warp
from flowreel.kernels.yuv_to_rgb import yuv_to_rgb

if TYPE_CHECKING:
    from flowreel.kernels.flow_color import flow_to_color

__all__ = ["bitshuffle", "channel_norm", "correlation", "flow_to_color", "quantise", "warp", "yuv_to_rgb"]


def __getattr__(name: str) -> object:
    if name == "flow_to_color":
        from flowreel.kernels.flow_color import flow_to_color

        return flow_to_color
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
