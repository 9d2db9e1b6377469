"""flowreel: video in, dense optical flow out, as a stream.

The names below are loaded on first use, so that ``import flowreel`` stays fast and needs neither torch nor a GPU.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flowreel.engine import errors as errors
from flowreel.engine.cupy_cache import settle

if TYPE_CHECKING:
    __version__: str

    from flowreel.engine.api import run as run
    from flowreel.engine.api import stream as stream
    from flowreel.engine.clips import FlowClips as FlowClips
    from flowreel.engine.color import ColorReport as ColorReport
    from flowreel.engine.color import color as color
    from flowreel.engine.compiled import CompiledModel as CompiledModel
    from flowreel.engine.compiled import compile as compile
    from flowreel.engine.data import FlowBatch as FlowBatch
    from flowreel.engine.export import ExportReport as ExportReport
    from flowreel.engine.export import export as export
    from flowreel.engine.lazy import LazyFlow as LazyFlow
    from flowreel.engine.lazy import open as open
    from flowreel.engine.manifest import SourceReport as SourceReport
    from flowreel.engine.many import ManyProgress as ManyProgress
    from flowreel.engine.many import ManyReport as ManyReport
    from flowreel.engine.many import run_many as run_many
    from flowreel.engine.models.weights import load_model as load_model
    from flowreel.engine.outputs import OutputReport as OutputReport
    from flowreel.engine.outputs import Progress as Progress
    from flowreel.engine.repair import RepairReport as RepairReport
    from flowreel.engine.repair import repair as repair
    from flowreel.engine.run_report import RunReport as RunReport
    from flowreel.engine.stages import StageStatistics as StageStatistics
    from flowreel.engine.verify import Finding as Finding
    from flowreel.engine.verify import Verification as Verification
    from flowreel.engine.verify import verify as verify
    from flowreel.kernels import flow_to_color as flow_to_color
    from flowreel.sinks.flo import read_flo as read_flo
    from flowreel.sinks.flo import write_flo as write_flo
    from flowreel.sinks.store_reader import FlowStore as FlowStore
    from flowreel.sinks.store_reader import open_store as open_store

_HOME = {
    "ColorReport": "flowreel.engine.color",
    "CompiledModel": "flowreel.engine.compiled",
    "ExportReport": "flowreel.engine.export",
    "Finding": "flowreel.engine.verify",
    "FlowBatch": "flowreel.engine.data",
    "FlowClips": "flowreel.engine.clips",
    "FlowStore": "flowreel.sinks.store_reader",
    "LazyFlow": "flowreel.engine.lazy",
    "ManyProgress": "flowreel.engine.many",
    "ManyReport": "flowreel.engine.many",
    "OutputReport": "flowreel.engine.outputs",
    "Progress": "flowreel.engine.outputs",
    "RepairReport": "flowreel.engine.repair",
    "RunReport": "flowreel.engine.run_report",
    "SourceReport": "flowreel.engine.manifest",
    "StageStatistics": "flowreel.engine.stages",
    "Verification": "flowreel.engine.verify",
    "color": "flowreel.engine.color",
    "compile": "flowreel.engine.compiled",
    "export": "flowreel.engine.export",
    "flow_to_color": "flowreel.kernels",
    "load_model": "flowreel.engine.models.weights",
    "open": "flowreel.engine.lazy",
    "open_store": "flowreel.sinks.store_reader",
    "read_flo": "flowreel.sinks.flo",
    "repair": "flowreel.engine.repair",
    "run": "flowreel.engine.api",
    "run_many": "flowreel.engine.many",
    "stream": "flowreel.engine.api",
    "verify": "flowreel.engine.verify",
    "write_flo": "flowreel.sinks.flo",
}

__all__ = [*(name for name in _HOME if name != "open"), "__version__", "errors"]  # ``import *`` keeps Python's open

sys.modules[f"{__name__}.errors"] = errors  # for ``from flowreel.errors import StageError``

settle()


if not TYPE_CHECKING:  # a type checker would conclude that every name exists

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("flowreel")
        if name not in _HOME:
            raise AttributeError(f"module 'flowreel' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*_HOME, *__all__})  # ``open`` too, and none of the names that this file itself uses
