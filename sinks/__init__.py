"""Output formats: one file each, its reader beside its writer, found by name through the registry.

Everything here loads on first use; importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowreel.sinks.registry import known_outputs as known_outputs
from flowreel.sinks.registry import open_sink as open_sink
from flowreel.sinks.registry import options_read as options_read
from flowreel.sinks.registry import without_effect as without_effect

if TYPE_CHECKING:
    from flowreel.sinks.color_png import ColorPictures as ColorPictures
    from flowreel.sinks.color_png import write_png as write_png
    from flowreel.sinks.computed_store import ComputedStore as ComputedStore
    from flowreel.sinks.flo import read_flo as read_flo
    from flowreel.sinks.flo import write_flo as write_flo
    from flowreel.sinks.flow_cache import FlowCache as FlowCache
    from flowreel.sinks.flow_cache import open_cache as open_cache
    from flowreel.sinks.kitti import read_kitti as read_kitti
    from flowreel.sinks.npz import read_flow_npz as read_flow_npz
    from flowreel.sinks.reading import flow_file_kind as flow_file_kind
    from flowreel.sinks.reading import frame_rate_of as frame_rate_of
    from flowreel.sinks.reading import is_store as is_store
    from flowreel.sinks.reading import open_flows as open_flows
    from flowreel.sinks.store_metadata import differing_settings as differing_settings
    from flowreel.sinks.store_reader import FlowStore as FlowStore
    from flowreel.sinks.store_reader import open_store as open_store
    from flowreel.sinks.store_repair import ShardRewriter as ShardRewriter
    from flowreel.sinks.store_select import select as select
    from flowreel.sinks.store_xarray import data_array as data_array
    from flowreel.sinks.video_writer import VideoWriter as VideoWriter
    from flowreel.sinks.video_writer import why_no_nvenc as why_no_nvenc

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
    "select": "store_select",
    "why_no_nvenc": "video_writer",
    "write_flo": "flo",
    "write_png": "color_png",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
