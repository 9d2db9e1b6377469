"""flowreel: video in, dense optical flow out, as a stream.

The names below are loaded on first use, so that ``import flowreel`` stays fast and needs neither torch nor a GPU.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowreel.engine import errors as errors
    from flowreel.engine.api import RunReport as RunReport
    from flowreel.engine.api import run as run
    from flowreel.engine.api import stream as stream
    from flowreel.engine.clips import FlowClips as FlowClips
    from flowreel.engine.compiled import CompiledModel as CompiledModel
    from flowreel.engine.compiled import compile as compile
    from flowreel.engine.data import FlowBatch as FlowBatch
    from flowreel.engine.export import export as export
    from flowreel.engine.lazy import LazyFlow as LazyFlow
    from flowreel.engine.lazy import open as open
    from flowreel.engine.many import run_many as run_many
    from flowreel.engine.models.weights import load_model as load_model
    from flowreel.kernels import flow_to_color as flow_to_color
    from flowreel.sinks.flo import read_flo as read_flo
    from flowreel.sinks.flo import write_flo as write_flo
    from flowreel.sinks.store_reader import FlowStore as FlowStore
    from flowreel.sinks.store_reader import open_store as open_store

_HOME = {
    "CompiledModel": "flowreel.engine.compiled",
    "FlowBatch": "flowreel.engine.data",
    "FlowClips": "flowreel.engine.clips",
    "FlowStore": "flowreel.sinks.store_reader",
    "LazyFlow": "flowreel.engine.lazy",
    "RunReport": "flowreel.engine.api",
    "compile": "flowreel.engine.compiled",
    "export": "flowreel.engine.export",
    "flow_to_color": "flowreel.kernels",
    "load_model": "flowreel.engine.models.weights",
    "open": "flowreel.engine.lazy",
    "open_store": "flowreel.sinks.store_reader",
    "read_flo": "flowreel.sinks.flo",
    "run": "flowreel.engine.api",
    "run_many": "flowreel.engine.many",
    "stream": "flowreel.engine.api",
    "write_flo": "flowreel.sinks.flo",
}

__all__ = [*(name for name in _HOME if name != "open"), "__version__", "errors"]  # ``import *`` leaves Python's open


def _let_cupy_load() -> None:
    """A cache elsewhere for CuPy where the home takes none: in the user's cache folder, else one for this process.

    CuPy makes its cache when it loads and fails where it cannot, and zarr, which loads CuPy wherever it is installed,
    fails with it: without a GPU too. So it is settled here, before anything of flowreel's can load either. A cache that
    ``CUPY_CACHE_DIR`` names stays as it is.
    """
    if "CUPY_CACHE_DIR" in os.environ or find_spec("cupy") is None:
        return
    if _can_be_kept_in(os.path.expanduser("~/.cupy/kernel_cache")):  # CuPy's own choice
        return
    elsewhere = os.path.join(os.environ.get("XDG_CACHE_HOME", ""), "cupy")
    if not _can_be_kept_in(elsewhere):
        import atexit
        import shutil
        import tempfile

        try:
            elsewhere = tempfile.mkdtemp(prefix="flowreel-cupy-")
        except OSError:  # nowhere at all: CuPy will say so
            return
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    os.environ["CUPY_CACHE_DIR"] = elsewhere


def _can_be_kept_in(folder: str) -> bool:
    if not os.path.isabs(folder):  # no home, or no cache folder
        return False
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


_let_cupy_load()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flowreel")
    if name == "errors":
        return import_module("flowreel.engine.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'flowreel' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
