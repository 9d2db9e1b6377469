"""``python -m benchmarks.gpu.one MODULE FUNCTION FILE SETTINGS``: one part in this process, its findings in FILE.

Exit code 0: it came to its end. ``SKIPPED``: something it needs is not there; the last line of stderr says what.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.cases import SKIPPED
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.measure import Skipped

OURS = ("benchmarks", "flowreel", "tests")


def main(module: str, function: str, path: str, settings: str) -> int:
    try:
        getattr(import_module(module), function)(Findings(Path(path)), Settings(**json.loads(settings)))
    except Skipped as reason:
        print(reason, file=sys.stderr)
        return SKIPPED
    except ImportError as error:
        if (error.name or "").partition(".")[0] in OURS:
            raise
        print(f"{error.name or error} cannot be imported", file=sys.stderr)
        return SKIPPED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
