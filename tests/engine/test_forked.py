"""A fork of a process that has computed flow: the child lacks torch's threads, and must not wait for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.fresh import Fresh

PROGRAM = """
import multiprocessing, sys, torch, flowreel
torch.set_num_threads(4)
options = {"model": "FlowNet2C", "batch": 2}
flow = flowreel.open(sys.argv[1], **options)
before, unread = flow[4], flowreel.stream(sys.argv[1], **options)
ways = {
    "inherited": lambda: flow[4],
    "a stream inherited": lambda: torch.cat([batch.flow for batch in unread])[4],
    "opened anew": lambda: flowreel.open(sys.argv[1], **options)[4],
    "streamed": lambda: torch.cat([batch.flow for batch in flowreel.stream(sys.argv[1], **options)])[4],
}

def child(way):
    assert torch.get_num_threads() == 4
    found = ways[way]()
    assert torch.allclose(found, before, atol=1e-3)
    assert torch.get_num_threads() == 1

for way in ways:
    process = multiprocessing.get_context("fork").Process(target=child, args=(way,))
    process.start()
    process.join(60)
    if process.exitcode is None:  # it hangs
        process.kill()
    assert process.exitcode == 0, way
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_flow_is_computed_in_a_forked_process(fresh: Fresh) -> None:
    code, said = fresh.code(PROGRAM, "synthetic:objects?size=192x128&frames=9")
    assert code == 0, said


CONVERTED = """
import os, signal, av
from flowreel.engine.sources.picture import Converter, Turn
convert = Converter("x", (96, 64), Turn())
convert(av.VideoFrame(96, 64, "yuv420p"), 0)
child = os.fork()
if not child:
    signal.alarm(10)  # it hangs
    del convert  # as garbage collection does, whenever it comes
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_a_forked_process_can_free_what_its_parent_converted_frames_with(fresh: Fresh) -> None:
    code, said = fresh.code(CONVERTED)
    assert code == 0, said


INHERITED = """
import os, signal, sys, flowreel
options = {"model": "FlowNet2C", "batch": 1}
begun = {
    "stream": flowreel.stream(sys.argv[1], **options),
    "lazy flow": iter(flowreel.open(sys.argv[1], **options)),
}
for flows in begun.values():
    next(flows)
child = os.fork()
if not child:
    signal.alarm(30)  # it hangs
    for flows in begun.values():
        try:
            next(flows)
        except flowreel.errors.UsageError as error:
            assert "forked" in str(error)
        else:
            raise SystemExit("it read on")
    begun.pop("stream")
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
assert [len(list(flows)) for flows in begun.values()] == [38, 38]
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork here")
def test_flow_that_is_being_read_stays_with_the_process_that_reads_it(clip: Callable[..., Path], fresh: Fresh) -> None:
    source = clip("forked.mkv", codec="ffv1", count=40)  # decoded by several threads, for which closing would wait
    code, said = fresh.code(INHERITED, str(source))
    assert code == 0, said
