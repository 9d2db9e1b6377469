"""Runs cases of bad input in a process that may die of them. Started by ``conftest.py``; not a test module.

For each case, one line of JSON comes in and one goes out. A case has limits of time and memory; if it takes longer, the
process ends and writes every thread's stack to the file ``stacks``. Output is captured at descriptors 1 and 2, so it
includes what C libraries print.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import json
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import av  # noqa: F401  (heavy modules are loaded once, before memory is measured)
import numpy as np
import PIL.Image
import torch
import zarr  # noqa: F401

from flowreel import sinks
from flowreel.engine import api, color, export, many  # noqa: F401
from flowreel.engine.cli import call, silence_pillow
from flowreel.engine.errors import FlowreelError
from flowreel.engine.models import checkpoints, download
from flowreel.engine.models.weights import instantiate, read_weights
from flowreel.engine.protocols import Source
from flowreel.engine.sources import open_source
from flowreel.sinks.two_stream import read_two_stream

Answer = dict[str, Any]

JOIN_S = 10.0  # how long to wait for threads that a case leaves behind: they may still finish an item
LASTING = ("asyncio", "zarr")  # name prefixes of zarr-python's own threads, which never end
GARBAGE_BYTES = 200 << 20
MOST_FRAMES = 200  # read of a source; no case is meant to have more


def digest(arrays: Iterable[Any]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(repr((array.shape, str(array.dtype))).encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def flow_facts(flow: Any) -> Answer:
    return {"shape": list(flow.shape), "digest": digest([flow])}


def weights_facts(path: str) -> Answer:
    held = read_weights(path)
    instantiate(held)
    return {"model": held.model, "digest": digest(tensor.numpy() for _, tensor in sorted(held.state.items()))}


def store_facts(path: str) -> Answer:
    """What a store holds: for a finished one, a digest of all flows and numbers, read after ``check``."""
    store = sinks.open_store(path)
    problems = [str(problem) for problem in store.check()]
    facts: Answer = {"problems": problems[:5], "complete": store.complete, "flows": len(store)}
    if not store.complete:
        return facts
    numbers = [getattr(store, name) for name in ("timestamps_s", "timestamps_to_s", "frame", "frame_to")]
    return facts | {"digest": digest([*numbers, *store])}


def source_facts(source: Source) -> Answer:
    given, shapes, pixels = 0, set(), hashlib.sha256()
    with closing(source):  # type: ignore[type-var]
        for frame in source:
            given += 1
            shapes.add(tuple(frame.rgb.shape[1:]))
            pixels.update(np.ascontiguousarray(frame.rgb.numpy()).tobytes())
            if given >= MOST_FRAMES:
                break
        info = source.info
        return {
            "frames": given,
            "promised": info.frame_count,
            "losses": source.losses,
            "sizes_agree": shapes == {(info.height, info.width)},
            "size": [info.width, info.height],
            "pixels": pixels.hexdigest(),
        }


READERS: dict[str, Callable[[str], Answer]] = {
    "flo": lambda path: flow_facts(sinks.read_flo(path)),
    "kitti": lambda path: flow_facts(sinks.read_kitti(path)[0]),
    "npz": lambda path: flow_facts(sinks.read_flow_npz(path)),
    "two-stream": lambda path: flow_facts(read_two_stream(path)),
    "weights": weights_facts,
    "store": store_facts,
    "source": lambda path: source_facts(open_source(path)),
}


def perform(case: Answer) -> Answer:
    if "call" in case:
        return {"code": call(case["call"])}
    try:
        return {"value": READERS[case["read"]](case["path"])}
    except FlowreelError as error:
        return {"error": type(error).__name__, "message": str(error)}


class Watched:
    """Watches what happens in the process during a case: output, threads, time, memory."""

    def __init__(self, scratch: Path, room_bytes: int) -> None:
        self._scratch = scratch
        self._stacks = open(scratch / "stacks", "w")  # noqa: SIM115 (for the whole life of the process)
        self._files = [os.open(scratch / name, os.O_RDWR | os.O_CREAT) for name in ("out", "err")]
        for number, file in enumerate(self._files, 1):
            os.dup2(file, number)
        self._size = status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (self._size + room_bytes, self._size + room_bytes))

    def run(self, case: Answer) -> Answer:
        os.chdir(case["folder"])
        given = os.open(case["stdin"] or os.devnull, os.O_RDONLY | os.O_NONBLOCK)
        os.dup2(given, 0)
        os.close(given)
        for number in (1, 2):
            os.ftruncate(number, 0)
            os.lseek(number, 0, os.SEEK_SET)
        before = self._memory()
        faulthandler.dump_traceback_later(case["limit_s"], exit=True, file=self._stacks)
        began_s = time.perf_counter()
        try:
            answer = perform(case)
        except BaseException:
            answer = {"crash": traceback.format_exc()}
        finally:
            answer["seconds"] = time.perf_counter() - began_s
            answer["threads"] = self._threads_left()
            faulthandler.cancel_dump_traceback_later()
        answer["grown_bytes"] = status("VmHWM") - before
        answer["kept_bytes"] = self._kept()
        sys.stdout.flush()
        sys.stderr.flush()
        answer["out"], answer["err"] = (
            (self._scratch / name).read_bytes().decode("latin-1") for name in ("out", "err")
        )
        os.chdir(self._scratch)
        return answer

    def _memory(self) -> int:
        """Bytes in use now; also restarts the kernel's count of the peak."""
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")

    def _kept(self) -> int:
        """Bytes of address space beyond those at the start, after garbage collection if they are many."""
        if status("VmSize") - self._size > GARBAGE_BYTES:
            gc.collect()
        return status("VmSize") - self._size

    def _threads_left(self) -> list[str]:
        others = (thread for thread in threading.enumerate() if thread is not threading.main_thread())
        ours = [thread for thread in others if not thread.name.startswith(LASTING)]
        end_s = time.perf_counter() + JOIN_S
        for thread in ours:
            thread.join(max(end_s - time.perf_counter(), 0))
        return [thread.name for thread in ours if thread.is_alive()]


def status(name: str) -> int:
    """One of the kernel's memory counters of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def shut_off() -> None:
    """Keeps cases from using the network and from waiting between tries."""
    nowhere = (checkpoints.Source("a dead link", "https://127.0.0.1:9/x"),)
    checkpoints.CHECKPOINTS = tuple(replace(known, sources=nowhere) for known in checkpoints.CHECKPOINTS)
    download.MANNERS = replace(download.MANNERS, sleep=lambda seconds: None)


def main(commands: int, answers: int, scratch: str, room_bytes: str) -> None:
    torch.set_num_threads(1)
    PIL.Image.init()
    silence_pillow()  # as the command line does, so that all other output is ours
    shut_off()
    os.fsync = os.fstat  # type: ignore[assignment]  # as for all tests, see tests/conftest.py
    gc.freeze()  # a collection, which many cases end with, goes through what they left and not through torch
    watched = Watched(Path(scratch), int(room_bytes))
    with os.fdopen(commands) as cases, os.fdopen(answers, "w") as results:
        for line in cases:
            print(json.dumps(watched.run(json.loads(line))), file=results, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
