"""Shards made by worker processes: everything that can go wrong with them, and that no process stays behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from flowreel.engine.config import SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.engine.errors import FlowreelError, OutputWriteError, SentError, frame_of
from flowreel.sinks import open_store, shard_processes, shared_memory
from flowreel.sinks.codecs import FlowCodec, flow_codec
from flowreel.sinks.shard_maker import Request
from flowreel.sinks.shard_processes import MOST_PROCESSES, ShardsInProcesses
from flowreel.sinks.shared_memory import SharedMemory, SharedView
from flowreel.sinks.zarr_store import ZarrSink
from tests.fakes.fresh import Fresh

H, W, SHARD = 12, 20, 4
INFO = FlowInfo(H, W, frame_rate=None, frame_count=None, source=SourceId("test"), device="cuda:0", batch=2)
CONFIG = SinkConfig(shard_bytes=SHARD * 8 * H * W)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has memory without a name")


worth_it = shard_processes.are_worth_it


@pytest.fixture(autouse=True)
def _however_little_there_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_: True)


def batches(count: int, size: int = 2, first: int = 0) -> Iterator[FlowBatch]:
    flow = 5 * torch.randn(count, 2, H, W, generator=torch.Generator().manual_seed(count))
    for index in range(first, count, size):
        frames = np.arange(index, min(index + size, count))
        yield FlowBatch(flow[index : index + size], index, frames, frames + 1, frames / 50, frames / 50 + 0.02)


def opened(path: Path, config: SinkConfig = CONFIG, *, up: bool = True) -> tuple[ZarrSink, ShardsInProcesses]:
    """An open sink. ``up``: waits until its processes run; shards that are full before are made without them."""
    sink = ZarrSink(str(path), config)
    sink.open(INFO)
    assert isinstance(sink._shards, ShardsInProcesses)
    while up and not all(process.is_ready() for process in sink._shards._all):
        signal.sigtimedwait([], 0.01)
    return sink, sink._shards


def stored(path: Path, count: int) -> None:
    """Checks that the store is complete and every flow within the error bound."""
    store = open_store(path)
    assert store.complete
    wanted = torch.cat([batch.flow for batch in batches(count)]).numpy()
    assert np.abs(store[:] - wanted).max() <= CONFIG.max_error
    assert store.timestamps_s.tolist() == (np.arange(count) / 50).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, SHARD, 5, 11])
def test_batches_of_any_size(tmp_path: Path, size: int) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    for batch in batches(11, size):
        sink.write(batch)  # the sink itself turns the flow into integer steps
    sink.commit()
    stored(tmp_path / "x.zarr", 11)
    assert {process._process.returncode for process in shards._all} == {0}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(shards._memory.descriptor)


class Pinning:
    """In place of a GPU's driver: records what is pinned, and how many pieces were."""

    def __init__(self) -> None:
        self.pieces = 0
        self.pinned: dict[int, int] = {}  # bytes by address

    def __call__(self, memory: np.ndarray) -> Callable[[], None]:
        self.pieces += 1
        self.pinned[memory.ctypes.data] = memory.nbytes
        memory[:] = 77  # pinning happens before anything is stored there, so this overwrites nothing
        return lambda: self.pinned.__delitem__(memory.ctypes.data)

    def covers(self, place: torch.Tensor) -> bool:
        begin = place.data_ptr()
        return any(start <= begin and begin + place.nbytes <= start + size for start, size in self.pinned.items())


@pytest.mark.parametrize("size", [1, 2, SHARD])
def test_steps_that_land_where_the_processes_see_them_are_not_copied(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    pin = Pinning()
    monkeypatch.setattr(np, "copyto", None)
    for prepared in sink.prepare(batches(9 * SHARD + 1, size)):
        place = sink.landing(prepared, pin)
        assert place is not None
        assert pin.covers(place)
        sink.take(replace(prepared, steps=place.copy_(prepared.steps)))
    assert 1 <= pin.pieces <= len(shards._all) + 1  # each piece of memory is pinned once, however often it is used
    sink.commit()
    assert not pin.pinned
    stored(tmp_path / "x.zarr", 9 * SHARD + 1)


def test_what_does_not_lie_in_one_shard_is_copied_into_two(tmp_path: Path) -> None:
    sink, _ = opened(tmp_path / "x.zarr")
    pin = Pinning()
    nowhere = 0
    for prepared in sink.prepare(batches(11, 3)):
        place = sink.landing(prepared, pin)
        nowhere += place is None
        sink.take(prepared if place is None else replace(prepared, steps=place.copy_(prepared.steps)))
    sink.commit()
    assert nowhere == 2  # flows 3 to 5, and 6 to 8
    stored(tmp_path / "x.zarr", 11)


def test_what_was_pinned_is_given_up_whatever_happens(tmp_path: Path) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    pin = Pinning()
    for process in shards._all:
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
    for prepared in sink.prepare(batches(SHARD)):
        place = sink.landing(prepared, pin)
        assert place is not None
        sink.take(replace(prepared, steps=place.copy_(prepared.steps)))
    with pytest.raises(OutputWriteError, match="ended early"):
        sink.commit()
    assert pin.pinned
    sink.abort()
    assert not pin.pinned


def test_where_threads_make_the_shards_steps_land_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_processes, "are_worth_it", lambda *_: False)
    sink = ZarrSink(str(tmp_path / "x.zarr"), CONFIG)
    sink.open(INFO)
    pin = Pinning()
    for prepared in sink.prepare(batches(5)):
        assert sink.landing(prepared, pin) is None
        sink.take(prepared)
    sink.commit()
    assert pin.pieces == 0


def test_going_on_with_what_an_earlier_run_left(tmp_path: Path) -> None:
    sink, _ = opened(tmp_path / "x.zarr")
    for batch in batches(10):
        sink.write(batch)
    assert "holds 8 flows" in str(sink.abort())
    sink = ZarrSink(str(tmp_path / "x.zarr"), replace(CONFIG, resume=True))
    point = sink.resume_point()
    assert point is not None
    assert point.flows == SHARD  # the total is not known, so the last shard is made again
    sink.open(INFO)
    for batch in batches(11, first=point.flows):
        sink.write(batch)
    sink.commit()
    assert len(open_store(tmp_path / "x.zarr")) == 11


def test_no_more_memory_than_what_is_under_way(tmp_path: Path) -> None:
    """A long run reuses its shared memory, also when the sink makes the steps itself."""
    sink, shards = opened(tmp_path / "x.zarr")
    for batch in batches(2 * (MOST_PROCESSES + 2) * SHARD):
        sink.write(batch)
    sink.commit()
    most = len(shards._all) + 1  # shards: one in each process, and the one being filled
    assert shards._memory._taken <= most * 4096
    assert shards._spare == []  # nothing is kept at the end


def test_a_process_that_is_killed_is_an_error_that_names_its_shard(tmp_path: Path) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    for process in shards._all:
        assert process.is_ready()
        os.kill(process._process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process._process.pid, os.WEXITED | os.WNOWAIT)
    for batch in batches(SHARD):
        sink.write(batch)
    with pytest.raises(OutputWriteError, match=r"x\.zarr: .*made shard 0 ended early \(exit code -9\)") as caught:
        sink.commit()
    assert frame_of(caught.value, None) == 0
    sink.abort()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("executable", ["/bin/false", "/bin/cat"])
def test_a_process_that_does_not_start_is_done_without(
    tmp_path: Path, executable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that ends at once, and one that never answers as a worker would."""
    monkeypatch.setattr(sys, "executable", executable)
    sink, _ = opened(tmp_path / "x.zarr", up=False)
    for batch in batches(11):
        sink.write(batch)
    sink.commit()
    stored(tmp_path / "x.zarr", 11)


def test_what_is_full_before_they_are_up_is_made_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_processes, "_CODE", "import signal; signal.pause()")
    monkeypatch.setattr(shard_processes, "GRACE_S", 0.01)
    sink, shards = opened(tmp_path / "x.zarr", up=False)
    for batch in batches(11):
        sink.write(batch)
    sink.commit()
    stored(tmp_path / "x.zarr", 11)
    assert {process._process.returncode for process in shards._all} == {-signal.SIGKILL}


def test_one_that_never_comes_up_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never becomes ready is tried for one shard only: after that, ready ones are preferred."""
    monkeypatch.setattr(shard_processes, "how_many", lambda *_: 3)
    made_here: list[int] = []

    def noted(request: Request, *rest: Any) -> Any:
        made_here.append(request.number)
        return make(request, *rest)

    make = shard_processes.make
    monkeypatch.setattr(shard_processes, "make", noted)
    sink, shards = opened(tmp_path / "x.zarr")
    assert len(shards._all) == 3
    monkeypatch.setattr(shards._all[-1], "_ready", False)  # the process that is used first
    for batch in batches(6 * SHARD + 1):
        sink.write(batch)
        assert sink._files is not None
        sink._files.flush()  # so that one process is needed at a time
    sink.commit()
    stored(tmp_path / "x.zarr", 6 * SHARD + 1)
    assert made_here == [0]
    assert [process._process.returncode for process in shards._all] == [0, 0, 0]


def test_modules_of_the_working_folder_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "pickle", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    sink, shards = opened(Path("x.zarr"))
    assert all(process.is_ready() for process in shards._all)
    for batch in batches(11):
        sink.write(batch)
    sink.commit()
    stored(Path("x.zarr"), 11)


def test_a_process_that_was_forked_meanwhile_does_not_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked process inherits the sockets; the workers must still end before it does."""
    monkeypatch.setattr(shard_processes, "GRACE_S", 1e9)
    sink, shards = opened(tmp_path / "x.zarr")
    forked = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
    forked.start()
    try:
        for batch in batches(11):
            sink.write(batch)
        sink.commit()
        assert {process._process.returncode for process in shards._all} == {0}
        assert forked.is_alive()
    finally:
        forked.kill()
        forked.join()


def test_an_error_of_the_system_there_is_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error reported by a process is raised at once, without waiting for that process to die."""
    monkeypatch.setattr(shard_processes, "GRACE_S", 1e9)
    sink, shards = opened(tmp_path / "x.zarr")
    buffer = shards._memory.take(1 << 20)
    shards._spare.append(buffer._replace(place=1))  # no memory mapping can begin there
    with pytest.raises(OutputWriteError, match=r"cannot write .*x\.zarr: Invalid argument") as caught:
        _write_all(sink, SHARD)
    assert frame_of(caught.value, None) == 0
    sink.abort()


def test_memory_that_is_not_to_be_had_is_an_error_that_names_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(nbytes: int) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    sink, shards = opened(tmp_path / "x.zarr", up=False)
    monkeypatch.setattr(shards._memory, "take", refused)
    with pytest.raises(OutputWriteError, match=r"cannot write .*x\.zarr: Cannot allocate memory"):
        _write_all(sink, SHARD)
    sink.abort()


def test_a_disk_that_is_full_is_told_as_by_this_process(tmp_path: Path) -> None:
    sink, _ = opened(tmp_path / "x.zarr")
    folder = tmp_path / "x.zarr.partial" / "flow" / "c" / "1"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_bytes(b"")  # a file where the second shard's folder should be
    with pytest.raises(OutputWriteError, match=r"cannot write .*x\.zarr: Not a directory") as caught:
        _write_all(sink, 3 * SHARD)
    assert (caught.value.errno or errno.ENOTDIR, frame_of(caught.value, None)) == (errno.ENOTDIR, SHARD)
    assert "holds 4 flows" in str(sink.abort())  # the first shard only: none behind the failed one is published
    assert len(list((tmp_path / "x.zarr.partial" / "flow" / "c").glob("*/0/0/0"))) == 1


def _write_all(sink: ZarrSink, count: int) -> None:
    for batch in batches(count):
        sink.write(batch)
    sink.commit()


def test_none_stays_behind_when_nothing_comes(tmp_path: Path) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    for process in shards._all:  # each holds the store's claim too, in case this process is killed first
        held = {file.name: os.path.realpath(file) for file in Path(f"/proc/{process._process.pid}/fd").iterdir()}
        assert str(tmp_path / "x.zarr.partial") in held.values()
        assert held["1"] == os.devnull  # whoever reads the command's output does not wait for them
    sink.abort()
    assert {process._process.returncode for process in shards._all} == {0}
    assert os.listdir(tmp_path) == []


def test_a_run_that_is_killed_takes_them_along_and_its_claim_as_well(tmp_path: Path, fresh: Fresh) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.sinks.test_shard_processes import *\n"
        "shard_processes.are_worth_it = lambda *_: True; sink, shards = opened(Path(sys.argv[1]) / 'x.zarr')\n"
        "for batch in batches(10): sink.write(batch)\n"
        "sink._files.flush()\n"
        "print(*(process._process.pid for process in shards._all), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended, said = fresh("-c", [code, str(tmp_path)], Path(__file__).parents[2])
    assert ended == -signal.SIGKILL, said
    for pid in map(int, said.split()):
        for _ in range(600):
            if not _runs(pid):
                break
            signal.sigtimedwait([], 0.1)
        assert not _runs(pid)
    sink = ZarrSink(str(tmp_path / "x.zarr"), replace(CONFIG, resume=True))
    point = sink.resume_point()  # the claim is free again
    assert point is not None
    assert point.flows == SHARD


def test_a_run_that_is_killed_halfway_through_a_request_is_no_error_there(tmp_path: Path, fresh: Fresh) -> None:
    code = (
        "import os, pickle, socket; from flowreel.sinks.shard_maker import serve\n"
        "ours, theirs = socket.socketpair()\n"
        "ours.sendall(pickle.dumps(bytes(1000))[:500]); ours.shutdown(socket.SHUT_WR)\n"
        "serve(theirs.detach(), os.memfd_create('steps'))\n"
    )
    assert fresh("-c", [code], tmp_path) == (0, "")


def _runs(pid: int) -> bool:
    """Whether any of its threads does: one that is still ending holds its files open, claim included."""
    try:
        ended = "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
        return not ended or len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_stops_a_whole_group_does_not_reach_them(number: int, tmp_path: Path) -> None:
    sink, shards = opened(tmp_path / "x.zarr")
    for process in shards._all:
        assert os.getpgid(process._process.pid) != os.getpgid(0)
    for batch in batches(SHARD):
        sink.write(batch)
    assert sink._files is not None
    sink._files.flush()  # one of them has made a shard
    for process in shards._all:
        os.kill(process._process.pid, number)
    for batch in batches(3 * SHARD, first=SHARD):
        sink.write(batch)
    sink.commit()
    assert len(open_store(tmp_path / "x.zarr")) == 3 * SHARD


def test_threads_do_it_where_no_process_may_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def refused(*arguments: Any, **options: Any) -> Any:
        if started:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(popen(*arguments, **options))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", refused)
    monkeypatch.setattr(shard_processes, "how_many", lambda *_: 2)
    sink = ZarrSink(str(tmp_path / "x.zarr"), CONFIG)
    sink.open(INFO)
    assert not isinstance(sink._shards, ShardsInProcesses)
    assert started[0].returncode == 0  # the one that was to be had is gone again
    for batch in batches(11):
        sink.write(batch)
    sink.commit()
    stored(tmp_path / "x.zarr", 11)


@pytest.mark.parametrize(("flows", "there", "processes"), [(16, 0, False), (17, 0, True), (20, 4, False)])
def test_threads_make_a_few_shards(
    tmp_path: Path, flows: int, there: int, processes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes are not worth starting for few shards, nor for the few that are left in a resumed run."""
    monkeypatch.setattr(shard_processes, "FEW_SHARDS", 4)
    monkeypatch.setattr(shard_processes, "FEW_WORKERS", 0)
    monkeypatch.setattr(shard_processes, "LEAST_FLOWS", 0)
    monkeypatch.setattr(shard_processes, "are_worth_it", worth_it)
    path, info = tmp_path / "x.zarr", replace(INFO, frame_count=flows + 1)
    if there:
        sink = ZarrSink(str(path), CONFIG)
        sink.open(info)
        for batch in batches(there):
            sink.write(batch)
        sink.abort()
    sink = ZarrSink(str(path), replace(CONFIG, resume=True))
    sink.resume_point()
    sink.open(info)
    assert isinstance(sink._shards, ShardsInProcesses) == processes
    sink.abort()


def test_where_they_are_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    def codec(**changes: Any) -> FlowCodec:
        return flow_codec(1080, 1920, replace(SinkConfig(), **changes))

    assert shard_processes.are_possible(codec(), 8)
    assert not shard_processes.are_possible(codec(), 17)  # 141 MB of shared memory for each process is too much
    assert not shard_processes.are_possible(codec(codec="pcodec"), 8)
    assert not shard_processes.are_possible(codec(max_error=0.0), 4)
    for name, value in (("platform", "win32"), ("executable", ""), ("executable", None)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value)
            assert not shard_processes.are_possible(codec(), 8)
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # the executable is a packaged program, not Python
    assert not shard_processes.are_possible(codec(), 8)
    assert [worth_it(1000, 32, workers) for workers in (1, 7, 8)] == [False, False, True]
    assert [worth_it(shards, 32, 16) for shards in (0, 128, 129)] == [False, False, True]
    assert [worth_it(1000, length, 16) for length in (8, 16)] == [False, True]
    assert [shard_processes.how_many(workers) for workers in (1, 2, 4, 15, 100)] == [1, 1, 2, 7, MOST_PROCESSES]


def test_they_import_no_torch() -> None:
    code = "import sys, flowreel.sinks.shard_maker; assert not {'torch', 'zarr', 'av'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_does_not_go_through_a_pickle_is_told_in_words() -> None:
    class OwnError(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__(f"{one} of {other}")

    told = SentError.of(OwnError(1, 2)).error
    assert (type(told), str(told)) == (FlowreelError, "OwnError: 1 of 2")
    kept = pickle.loads(pickle.dumps(SentError.of(OSError(errno.EIO, "no more")))).error
    assert (type(kept), kept.errno) == (OSError, errno.EIO)


@pytest.mark.parametrize("reserved", [0, 100, 5000, 1_000_000])
def test_what_is_reserved_is_taken_first_and_more_may_be(reserved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "AT_ONCE", 4096)
    memory = SharedMemory()
    memory.reserve(reserved)
    buffers = [memory.take(4000) for _ in range(10)]
    for number, buffer in enumerate(buffers):
        buffer.bytes[:] = number
    memory._ahead.drain()
    status = os.fstat(memory.descriptor)
    assert status.st_size == max(reserved, 10 * 4096)
    assert 512 * status.st_blocks == max(-(-reserved // 4096), 10) * 4096  # all of it is really allocated
    view = SharedView(memory.descriptor)
    assert [int(view.at(buffer.place, 4000)[-1]) for buffer in buffers] == list(range(10))
    memory.close()


def test_nothing_more_is_asked_for_once_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "AT_ONCE", 4096)
    asked, over, began, closed = [], [], Event(), Event()

    def slow(descriptor: int, place: int, nbytes: int) -> None:
        asked.append(place)
        began.set()
        while not memory._closed:
            closed.wait(0.001)
        over.append(closed.wait(0.01))  # False: ``close`` waits until this call is over

    monkeypatch.setattr(os, "posix_fallocate", slow)
    memory = SharedMemory()
    memory.reserve(1 << 20)
    assert began.wait(60)
    memory.close()
    closed.set()
    assert asked == [0]
    assert over == [False]
    assert memory.descriptor == -1


def test_buffers_are_seen_where_they_were_taken() -> None:
    memory = SharedMemory()
    view = SharedView(memory.descriptor)
    buffers = [memory.take(size) for size in (1, 5000, 4096, 0, 7)]
    for number, (place, own) in enumerate(buffers):
        own[:] = number
        for nbytes in (min(own.size, 100), own.size):  # a view may ask for more of a buffer than before
            assert view.at(place, nbytes).tolist() == [number] * nbytes
    assert not view.at(buffers[0].place, 1).flags.writeable
    buffers[1].bytes[:] = 9
    assert (view.at(buffers[1].place, 5000) == 9).all()  # the memory is shared, not copied
    memory.close()
    memory.close()
    assert (buffers[1].bytes == 9).all()  # a buffer in use stays valid
