"""Where CuPy keeps what it compiles, for users whose home takes nothing, as in a container with ``--user``."""

from __future__ import annotations

import os
from importlib.util import find_spec


def settle() -> None:
    """A cache elsewhere for CuPy where the home takes none: in the user's cache folder, else one for this process.

    CuPy makes its cache when it loads and fails where it cannot, and zarr, which loads CuPy wherever it is installed,
    fails with it: without a GPU too. So this runs before anything of flowreel's can load either. A cache that
    ``CUPY_CACHE_DIR`` names stays as it is.
    """
    if "CUPY_CACHE_DIR" in os.environ or find_spec("cupy") is None:
        return
    if _can_be_kept_in(os.path.expanduser("~/.cupy/kernel_cache")):  # CuPy's own choice
        return
    elsewhere = os.path.join(os.environ.get("XDG_CACHE_HOME", ""), "cupy")
    if not _can_be_kept_in(elsewhere):
        import atexit  # rarely needed, and every import of flowreel comes by here
        import shutil
        import tempfile

        try:
            elsewhere = tempfile.mkdtemp(prefix="flowreel-cupy-")
        except OSError:  # nowhere at all: CuPy will say so
            return
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
    os.environ["CUPY_CACHE_DIR"] = elsewhere


def _can_be_kept_in(folder: str) -> bool:
    """Whether there is, or could be made, such a folder. An import makes none."""
    if not os.path.isabs(folder):  # no home, or no cache folder
        return False
    while not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)
