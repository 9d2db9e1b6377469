"""``python -m benchmarks.one NAME OUT SETTINGS``: runs one case and writes its result as JSON to OUT.

Each case has its own process, so that neither its memory nor its thread settings affect the next. SETTINGS is JSON:
``{"short": bool, "ceilings": {...}}``. Exit code ``SKIPPED``: the case cannot run here, stdout says why.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from benchmarks.cases import SKIPPED, measure
from benchmarks.machine import load, machine
from benchmarks.measure import Skipped


def main(name: str, out: str, settings: str) -> int:
    given = json.loads(settings)
    where, began_s = machine(), time.perf_counter()
    try:
        found = measure(name, given["short"], given["ceilings"])
    except Skipped as reason:
        print(reason)
        return SKIPPED
    head = {
        "case": name,
        "machine": where,
        "short": given["short"],
        "seconds": round(time.perf_counter() - began_s, 1),
        "cpu_s": round(_cpu_s(), 1),
        "load_after": load(),
        "ceilings": given["ceilings"],
    }
    Path(out).write_text(json.dumps(head | found, indent=2) + "\n")
    return 0


def _cpu_s() -> float:
    """CPU time of all threads and of child processes that have ended: unlike ``seconds``, it still shows on a busy
    machine what the case costs."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
