"""``python -m benchmarks.one NAME OUT SETTINGS``: one case in a process of its own, its result as JSON into OUT.

A process of its own, so that neither the memory nor the thread settings of one case reach the next. SETTINGS is JSON:
``{"short": bool, "ceilings": {...}}``. Exit code ``SKIPPED``: the case says on stdout why it cannot run here.
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
    """Of all threads and ended children: on a busy machine it tells what the case takes, and ``seconds`` does not."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
