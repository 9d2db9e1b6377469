"""``python -m benchmarks.gpu.one MODULE FUNCTION FILE SETTINGS``: runs one part, and writes its findings to FILE.

Exit code 0: it finished. ``SKIPPED``: something it needs is missing, and the last line of stderr says what. ``LOST``:
the GPU has become unusable for this process, and another process should continue.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path

from benchmarks.cases import SKIPPED
from benchmarks.gpu.findings import DeviceLostError, Findings, Settings, lacking

LOST = 4
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def main(module: str, function: str, path: str, settings: str) -> int:
    findings = Findings(Path(path))
    warnings.showwarning = lambda message, category, *_: findings.note(f"{category.__name__}: {message}")
    try:
        getattr(import_module(module), function)(findings, Settings(**json.loads(settings)))
    except DeviceLostError:
        return LOST
    except Exception as error:
        if (reason := lacking(error)) is None:
            raise
        print(reason, file=sys.stderr)
        return SKIPPED
    return 0


if __name__ == "__main__":
    if sys.platform == "linux":  # killing the command must not leave a part behind that keeps the GPU busy
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    sys.exit(main(*sys.argv[1:]))
