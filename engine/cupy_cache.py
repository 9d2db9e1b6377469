"""A cache folder for CuPy where the home folder is not writable, as in a container with ``--user``."""

from __future__ import annotations

import os
from importlib.util import find_spec


def settle() -> None:
    """Moves CuPy's cache if it cannot be in the home folder: to ``$XDG_CACHE_HOME``, else to a folder for this process.

    CuPy creates its cache folder when it is imported and raises if it cannot; zarr imports CuPy wherever it is
    installed, and then fails too, even without a GPU. So this runs before anything in flowreel can import either. A
    ``CUPY_CACHE_DIR`` that is set already is left alone.
    """
    if "CUPY_CACHE_DIR" in os.environ or find_spec("cupy") is None:
        return
    if _can_be_kept_in(os.path.expanduser("~/.cupy/kernel_cache")):  # CuPy's own choice
        return
    elsewhere = os.path.join(os.environ.get("XDG_CACHE_HOME", ""), "cupy")
    if not _can_be_kept_in(elsewhere):
        import atexit  # imported here as they are rarely needed, while this runs at every import of flowreel
        import shutil
        import tempfile

        try:
            elsewhere = tempfile.mkdtemp(prefix="flowreel-cupy-")
        except OSError:  # nothing is writable: CuPy will say so
            return
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    os.environ["CUPY_CACHE_DIR"] = elsewhere


def _can_be_kept_in(folder: str) -> bool:
    """Whether the folder is writable, or could be created. Creates nothing: an import should leave no folders."""
    if not os.path.isabs(folder):  # no home, or no cache folder
        return False
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
