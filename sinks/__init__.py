"""Output formats: one file each, its reader beside its writer, found by name through the registry.

Everything here loads on first use; importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowreel.sinks.registry import known_outputs, open_sink, options_read, without_effect

if TYPE_CHECKING:
    from flowreel.sinks.color_png import ColorPictures, write_png
    from flowreel.sinks.computed_store import ComputedStore
    from flowreel.sinks.flo import read_flo, write_flo
    from flowreel.sinks.flow_cache import FlowCache, open_cache
    from flowreel.sinks.kitti import read_kitti, write_kitti
    from flowreel.sinks.npz import read_flow_npz, write_flow_npz
    from flowreel.sinks.reading import flow_file_kind, frame_rate_of, is_store, open_flows
    from flowreel.sinks.store_metadata import differing_settings
    from flowreel.sinks.store_reader import FlowStore, open_store
    from flowreel.sinks.store_repair import ShardRewriter
    from flowreel.sinks.store_select import select
    from flowreel.sinks.store_xarray import data_array
    from flowreel.sinks.two_stream import read_two_stream
    from flowreel.sinks.video_writer import VideoWriter, why_no_nvenc

__all__ = [
    "ColorPictures",
    "ComputedStore",
    "FlowCache",
    "FlowStore",
    "ShardRewriter",
    "VideoWriter",
    "data_array",
    "differing_settings",
    "flow_file_kind",
    "frame_rate_of",
    "is_store",
    "known_outputs",
    "open_cache",
    "open_flows",
    "open_sink",
    "open_store",
    "options_read",
    "read_flo",
    "read_flow_npz",
    "read_kitti",
    "read_two_stream",
    "select",
    "why_no_nvenc",
    "without_effect",
    "write_flo",
    "write_flow_npz",
    "write_kitti",
    "write_png",
]

_HOME = {
    "ColorPictures": "color_png",
    "ComputedStore": "computed_store",
    "FlowCache": "flow_cache",
    "FlowStore": "store_reader",
    "ShardRewriter": "store_repair",
    "VideoWriter": "video_writer",
    "data_array": "store_xarray",
    "differing_settings": "store_metadata",
    "flow_file_kind": "reading",
    "frame_rate_of": "reading",
    "is_store": "reading",
    "open_cache": "flow_cache",
    "open_flows": "reading",
    "open_store": "store_reader",
    "read_flo": "flo",
    "read_flow_npz": "npz",
    "read_kitti": "kitti",
    "read_two_stream": "two_stream",
    "select": "store_select",
    "why_no_nvenc": "video_writer",
    "write_flo": "flo",
    "write_flow_npz": "npz",
    "write_kitti": "kitti",
    "write_png": "color_png",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
