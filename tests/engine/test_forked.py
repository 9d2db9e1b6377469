"""A fork of a process that has computed flow: the child lacks torch's threads, and must not wait for them."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import multiprocessing, sys, torch, flowreel
torch.set_num_threads(4)
flow = flowreel.open(sys.argv[1], model="FlowNet2C", batch=2)
before = flow[4]

def child(wanted):
    assert torch.get_num_threads() == 4 or sys.exit(3)
    found = flow[4]
    sys.exit(0 if torch.allclose(found, wanted, atol=1e-3) and torch.get_num_threads() == 1 else 1)

process = multiprocessing.get_context("fork").Process(target=child, args=(before,))
process.start()
process.join(60)
if process.exitcode is None:  # it hangs
    process.kill()
sys.exit(4 if process.exitcode is None else process.exitcode)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_flow_is_computed_in_a_forked_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "synthetic:objects?size=192x128&frames=9"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
