"""Training: the same seed gives the same weights, resumed or not, with any number of workers; and the loss falls."""

from __future__ import annotations

import csv
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowreel.engine import device
from flowreel.engine.errors import (
    CheckpointError,
    DeviceError,
    DivergedError,
    FlowreelError,
    OutputBusyError,
    OutputWriteError,
    UsageError,
    WeightsNotFoundError,
)
from flowreel.engine.models import MODELS, build_model
from flowreel.engine.models.saving import save_weights
from flowreel.engine.models.weight_files import appearing
from flowreel.engine.models.weights import load_model, read_weights
from flowreel.engine.training import batches, start
from flowreel.engine.training import train as training
from flowreel.engine.training.batches import augment
from flowreel.engine.training.config import TrainConfig, learning_rate, share_done
from flowreel.engine.training.processes import made_in_order
from flowreel.engine.training.train import Progress, train
from tests.fakes.one_device import NOWHERE, OneDevice
from tests.fakes.work import but_three

TINY = TrainConfig(width=0.05, steps=4, batch=2, height=64, width_px=64, warm_up=1, precision="fp32")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(read_weights(folder / "weights.safetensors").state)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


def test_stopped_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    train(TINY, tmp_path / "whole", workers=0, report_every=2)

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stopped

    with pytest.raises(Stopped) as stopped:
        train(TINY, tmp_path / "parts", workers=0, report_every=2, report=stop)
    assert not (tmp_path / "parts" / "weights.safetensors").exists()
    train(TINY, tmp_path / "parts", workers=0, report_every=2, resume=True)
    del stopped  # until here its traceback kept the failed run's objects alive, and yet the folder was free
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    logs = []
    for name in ("whole", "parts"):
        with (tmp_path / name / "log.csv").open(newline="") as file:
            logs.append([(row["step"], row["loss"]) for row in csv.DictReader(file)])
    assert [step for step, _ in logs[0]] == ["2", "4"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("published", [False, True])
def test_the_log_has_no_gap_and_no_repeat_after_a_kill_beside_the_checkpoint(
    published: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    @contextmanager
    def killing(path: Path) -> Iterator[Path]:
        last = path.exists()
        if last and not published:
            raise Killed
        with appearing(path) as temporary:
            yield temporary
        if last:
            raise Killed

    config, log = replace(TINY, steps=2), tmp_path / "log.csv"
    log.write_bytes(training.HEADING + b"\r\n1,")  # of a run that was killed before its first checkpoint
    with monkeypatch.context() as killed:
        killed.setattr(training, "appearing", killing)
        with pytest.raises(Killed):
            train(config, tmp_path, workers=0, report_every=1)
    with log.open("ab") as file:
        file.write(b"1")  # of another row: a full disk, or a power cut
    train(config, tmp_path, workers=0, report_every=1, resume=True)
    with log.open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_worker_process_changes_nothing(tmp_path: Path) -> None:
    config = replace(TINY, steps=2, reuse=1)
    for workers in (0, 1):
        train(config, tmp_path / str(workers), workers=workers)
        assert not multiprocessing.active_children()
    assert_same(weights_of(tmp_path / "0"), weights_of(tmp_path / "1"))


def test_scenes_made_in_between_leave_the_training_its_threads() -> None:
    torch.set_num_threads(2)
    try:
        next(batches.batches(TINY, 0, workers=0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)  # as for all other tests


def test_workers_leave_ctrl_c_to_the_process_that_trains_and_end_with_their_results() -> None:
    """A terminal sends it to the workers too; each that was interrupted while it started would print a traceback."""
    with closing(made_in_order(abs, 100, workers=2)) as seen:
        next(seen)
        workers = [worker.pid or 0 for worker in multiprocessing.active_children()]
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        for _ in range(20):  # more than were made in advance
            next(seen)
        os.kill(workers[0], signal.SIGTERM)
        with pytest.raises(FlowreelError, match=r"ended early \(exit code -15"):
            list(seen)
    assert not multiprocessing.active_children()
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL  # torch's handler would raise errors anywhere


def test_what_workers_make_comes_in_order_and_their_errors_in_turn() -> None:
    made = made_in_order(but_three, 9, workers=2)
    assert [next(made) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three") as caught:
        next(made)
    assert 'in but_three\n    raise ValueError("three")' in str(caught.value.__cause__)  # for --debug
    assert not multiprocessing.active_children()


def _threads(number: int) -> Tensor:
    return torch.tensor(threading.active_count())


def test_a_worker_hands_over_tensors_without_another_thread() -> None:
    """One that still did so while Python exits could abort the process."""
    assert [int(threads) for threads in made_in_order(_threads, 3, workers=1)] == [1, 1, 1]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_worker_that_ends_between_two_results_is_told(lost: int) -> None:
    """By the process that asks it for more, or by the one that waits for what it had been asked for."""
    made = made_in_order(abs, 100, workers=2)
    assert [next(made), next(made)] == [0, 1]
    workers = sorted(multiprocessing.active_children(), key=lambda worker: worker.name)
    workers[lost].kill()
    workers[lost].join()
    with pytest.raises(FlowreelError, match=r"ended early \(exit code -9"):
        list(made)
    assert not multiprocessing.active_children()


def test_ctrl_c_waits_until_a_worker_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where another thread, one of OpenMP's, takes the signal for the process."""
    begin, begun, raised, over = SpawnProcess.start, [], threading.Semaphore(0), threading.Event()

    def handle(*_: object) -> None:
        raised.release()
        raise KeyboardInterrupt

    def start(process: SpawnProcess) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not raised.acquire(timeout=0.01):
            pass  # where this is the main thread, it takes the signal here
        begin(process)
        begun.append(process)

    monkeypatch.setattr(SpawnProcess, "start", start)
    other = threading.Thread(target=over.wait)
    before = signal.signal(signal.SIGINT, handle)
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            next(made_in_order(abs, 1, workers=1))
    finally:
        signal.signal(signal.SIGINT, before)
        over.set()
        other.join()
    assert len(begun) == 1
    assert not multiprocessing.active_children()


def test_minutes_end_a_workers_endless_scenes(tmp_path: Path) -> None:
    """One step is always made, however short the time; no worker process is left, even if the run fails at its end."""
    reports: list[Progress] = []
    config = replace(TINY, minutes=1e-9)
    train(config, tmp_path / "made", workers=0, report=reports.append)
    assert [progress.step for progress in reports] == [1]
    assert read_weights(tmp_path / "made" / "weights.safetensors").made_by["steps"] == 1

    def fail(progress: Progress) -> None:
        raise ValueError("no room on the screen")

    with pytest.raises(ValueError, match="no room"):
        train(config, tmp_path / "failed", workers=1, report=fail)
    assert not multiprocessing.active_children()


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(replace(TINY, steps=1, seed=seed), tmp_path / str(seed), workers=0)
    a, b = (weights_of(tmp_path / str(seed))["conv1.0.weight"] for seed in (0, 1))
    assert not torch.equal(a, b)


def test_the_result_is_a_plain_network_that_says_how_it_was_made(tmp_path: Path) -> None:
    path = train(replace(TINY, steps=1), tmp_path, workers=0)
    held = read_weights(path)
    assert (held.model, held.batch_norm, held.width) == ("FlowNet2C", False, TINY.width)
    assert held.made_by["steps"] == 1
    assert "procedural" in str(held.made_by["trained_on"])
    frames = torch.rand(2, 1, 3, 64, 64) * 255
    assert torch.isfinite(load_model(None, path)(*frames)).all()


@pytest.mark.parametrize("model", ["FlowNet2S", "FlowNet2SD", "FlowNet2CS"])
def test_other_networks_train_too(model: str, tmp_path: Path) -> None:
    assert read_weights(train(replace(TINY, steps=1, model=model), tmp_path, workers=0)).model == model


@pytest.mark.parametrize(("model", "visible_alone"), [*((model, True) for model in MODELS), ("FlowNet2C", False)])
def test_a_step_keeps_to_the_device_of_the_network(
    model: str, visible_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that training works on a GPU: a fake device refuses to mix its tensors with the CPU's."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device does not support it
    net = start.network(replace(TINY, model=model)).to(NOWHERE)
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    batch = frames, frames, torch.zeros(2, 2, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    with OneDevice():
        seen = batches.augment(batches.on(NOWHERE, batch), 64, 64, torch.Generator())
        loss = training.gradients(replace(TINY, model=model), net, seen, visible_alone=visible_alone)
    assert loss.device.type == "meta"
    assert all(weight.grad is not None and weight.grad.is_meta for weight in net.parameters())


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch is older than 2.9")
@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("callers", ["ieee", "tf32"])
@pytest.mark.parametrize("place", ["cpu", "meta"])  # meta: as on a GPU
def test_fp32_precision_of_the_caller_s_neither_decides_nor_fails(
    place: str, callers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss_of, convolutions = [], training._loss, torch.backends.cudnn.conv

    def looking(*given: Any) -> Tensor:
        seen.append(convolutions.fp32_precision)
        return loss_of(*given)

    monkeypatch.setattr(training, "_loss", looking)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    frames = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    batch = frames, frames, torch.zeros(2, 2, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    where, before = torch.device(place), convolutions.fp32_precision
    try:
        convolutions.fp32_precision = callers
        training.gradients(TINY, start.network(TINY).to(where), batches.on(where, batch), visible_alone=True)
        assert seen == [callers if place == "cpu" else "ieee"]
        assert convolutions.fp32_precision == callers
    finally:
        convolutions.fp32_precision = before


def test_what_was_begun_on_a_gpu_goes_on_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint records the device of each tensor, which may be missing when it is resumed."""

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stopped

    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
        with pytest.raises(Stopped):
            train(TINY, tmp_path, workers=0, report_every=2, report=stop)
    with pytest.raises(RuntimeError, match="CUDA device"):
        torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    train(TINY, tmp_path, workers=0, report_every=2, resume=True)
    assert (tmp_path / "weights.safetensors").exists()


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_made(tmp_path: Path) -> None:
    for name, error in (("cuda:99", DeviceError), ("tpu", UsageError)):
        with pytest.raises(error, match=name):
            train(TINY, tmp_path / "out", workers=0, device=name)
    assert not (tmp_path / "out").exists()


def test_several_gpus_are_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "resolve_devices", lambda name: (torch.device("cuda:0"), torch.device("cuda:1")))
    with pytest.raises(UsageError, match="only one device can be used here, got 'cuda:0,1'"):
        train(TINY, tmp_path / "out", workers=0, device="cuda:0,1")
    assert not (tmp_path / "out").exists()


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one fixed batch the loss must fall, which it does only if data, loss and optimiser fit together."""
    reports: list[Progress] = []
    config = replace(TINY, steps=40, reuse=40, learning_rate=2e-3)
    monkeypatch.setattr(batches, "augment", lambda batch, h, w, g: tuple(part[..., :h, :w] for part in batch))
    train(config, tmp_path, workers=0, report_every=10, report=reports.append)
    assert reports[-1].loss < 0.7 * reports[0].loss


def test_a_diverging_run_ends_and_keeps_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DivergedError, match=r"loss nan, held-out error nan px; .*smaller --learning-rate"):
        train(replace(TINY, learning_rate=1e30), tmp_path / "at once", workers=0)
    assert not list((tmp_path / "at once").iterdir())

    def spoil(progress: Progress) -> None:
        monkeypatch.setattr(training, "_held_out", lambda *_: (math.nan, 1.0))  # the last step alone was wrong

    with pytest.raises(DivergedError):
        train(TINY, tmp_path / "later", workers=0, report_every=2, report=spoil)
    assert torch.load(tmp_path / "later" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert len((tmp_path / "later" / "log.csv").read_text().splitlines()) == 2
    assert not (tmp_path / "later" / "weights.safetensors").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    def fill(progress: Progress) -> None:
        (tmp_path / "log.csv").unlink()
        (tmp_path / "log.csv").symlink_to("/dev/full")

    with pytest.raises(OutputWriteError, match=r"cannot write .*log\.csv: No space left"):
        train(replace(TINY, steps=2), tmp_path, workers=0, report_every=1, report=fill)


def test_a_full_disk_is_told_for_a_checkpoint_too(
    tmp_path: Path, files_up_to: Callable[[int], AbstractContextManager[None]]
) -> None:
    with files_up_to(500_000), pytest.raises(OutputWriteError, match=r"cannot write .*checkpoint\.pt: File too large"):
        train(replace(TINY, steps=1), tmp_path, workers=0)
    assert os.listdir(tmp_path) == ["log.csv"]


def test_a_folder_is_not_overwritten_nor_mixed_up(tmp_path: Path) -> None:
    train(replace(TINY, steps=1), tmp_path, workers=0)
    with pytest.raises(CheckpointError, match="--resume"):
        train(replace(TINY, steps=1), tmp_path, workers=0)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train(replace(TINY, steps=1, learning_rate=1.0), tmp_path, workers=0, resume=True)
    (tmp_path / "checkpoint.pt").unlink()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"weights\.safetensors exists already"):
            train(replace(TINY, steps=1, seed=1), tmp_path, workers=0, resume=resume)
    assert (tmp_path / "log.csv").exists()
    for content in (b"not one", b""):
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="cannot be read"):
            train(replace(TINY, steps=1), tmp_path, workers=0, resume=True)
    torch.save({"model": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a training run"):
        train(replace(TINY, steps=1), tmp_path, workers=0, resume=True)


@pytest.mark.parametrize("theirs", ["step,accuracy\n1,0.5\n", "step\n1\n", "\nstep,accuracy\n"])
def test_another_program_s_log_is_not_deleted(theirs: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text(theirs)
    with pytest.raises(CheckpointError, match=r"log\.csv is not of a training run: choose another folder"):
        train(replace(TINY, steps=1), tmp_path, workers=0)
    assert log.read_text() == theirs


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def second(progress: Progress) -> None:
        for resume in (False, True):
            with pytest.raises(OutputBusyError, match="is being written by another run"):
                train(replace(TINY, steps=1), tmp_path, workers=0, resume=resume)

    train(replace(TINY, steps=1), tmp_path, workers=0, report=second)
    train(replace(TINY, steps=1), tmp_path, workers=0, resume=True)  # the first has let it go


def test_no_folder_is_left_by_initial_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFoundError):
        train(replace(TINY, init="nowhere"), tmp_path / "runs" / "out", workers=0)
    assert not (tmp_path / "runs").exists()


def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputWriteError):
        train(replace(TINY, init="nowhere"), tmp_path / "file", workers=0)


def test_augmentation_moves_the_flow_with_the_picture() -> None:
    """Pixels hold their own coordinates, so that a flow vector that does not lead to its match would show."""
    size = 80
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    u, v = 3, -2
    first = torch.stack((x, y, x + y)).to(torch.uint8).expand(1, 3, size, size).clone()
    second = torch.stack((x - u, y - v, x - u + y - v)).remainder(256).to(torch.uint8).expand(1, 3, size, size).clone()
    flow = torch.tensor([float(u), float(v)]).view(1, 2, 1, 1).expand(1, 2, size, size)
    visible = torch.ones(1, size, size, dtype=torch.bool)
    seen = set()
    for seed in range(24):
        a, b, moved, mask = augment((first, second, flow, visible), 64, 64, torch.Generator().manual_seed(seed))
        assert a.shape == (1, 3, 64, 64)
        assert mask.shape == (1, 64, 64)
        du, dv = (int(part) for part in moved[0, :, 0, 0])
        seen.add((du, dv))
        inner = a[:, :, 8:56, 8:56]
        assert torch.equal(inner, b[:, :, 8 + dv : 56 + dv, 8 + du : 56 + du])
        kept = [slice(max(-move, 0), 64 - max(move, 0)) for move in (dv, du)]  # the crop cuts off other matches
        assert mask[0, kept[0], kept[1]].all()
        assert mask.sum() == (64 - 2) * (64 - 3)
    assert seen == {(3, -2), (-3, -2), (3, 2), (-3, 2)}


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(steps=100, warm_up=10)
    rates = [learning_rate(config, step, share_done(config, step - 1, math.nan)) for step in range(1, 101)]
    assert rates[5] == max(rates) == pytest.approx(config.learning_rate, rel=0.01)  # a twentieth is less than 10 steps
    assert rates[2] == pytest.approx(config.learning_rate * 2 / 5, rel=0.01)
    assert 0 < rates[-1] < 0.001 * config.learning_rate
    assert learning_rate(replace(config, steps=10_000), 5, 4 / 10_000) == pytest.approx(config.learning_rate / 2)


def test_minutes_in_place_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule follows the clock, also after an interruption. Each step takes 10 s of a fake clock."""
    now = [0.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    def step(*args: object, **kwargs: object) -> Tensor:
        now[0] += 10
        return gradients(*args, **kwargs)  # type: ignore[arg-type]

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stopped

    gradients = training.gradients
    monkeypatch.setattr(training, "gradients", step)
    monkeypatch.setattr(training, "time", Clock)
    config = replace(TINY, minutes=1.0, steps=1)
    reports: list[Progress] = []
    with pytest.raises(Stopped):
        train(config, tmp_path, workers=0, report_every=2, report=stop)
    now[0] += 1000  # time between the two runs
    train(config, tmp_path, workers=0, report_every=2, resume=True, report=reports.append)
    (tmp_path / "log.csv").unlink()  # which nobody needs for going on
    train(config, tmp_path, workers=0, report_every=2, resume=True, report=reports.append)  # nothing is left to do
    assert [(progress.step, progress.seconds) for progress in reports] == [(4, 40), (6, 60)]
    assert reports[0].learning_rate == pytest.approx(config.learning_rate * 0.5)  # the step began at 30 s
    assert read_weights(tmp_path / "weights.safetensors").made_by["minutes"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 100},
        {"steps": 0},
        {"minutes": 0},
        {"minutes": float("nan")},
        {"precision": "fp16"},
        {"model": "x"},
        {"last_only": True},
        {"model": "FlowNet2CS", "last_only": True},
    ],
)
def test_impossible_settings(wrong: dict[str, object]) -> None:
    *_, name = wrong
    with pytest.raises(UsageError, match={"height": "256x100", "last_only": "last-only"}.get(name, name)):
        TrainConfig(**wrong)  # type: ignore[arg-type]


def test_a_run_goes_on_from_other_weights_and_says_so(tmp_path: Path) -> None:
    first = train(replace(TINY, steps=1), tmp_path / "first", workers=0)
    config = replace(TINY, steps=1, learning_rate=0.0, init=str(first), batch_norm=False)
    as_it_was = first.read_bytes()
    second = train(config, tmp_path / "second", workers=0, report=lambda _: first.unlink())
    first.write_bytes(as_it_was)
    assert_same(dict(read_weights(first).state), dict(read_weights(second).state))
    lineage = read_weights(second).made_by["init"]
    first.write_bytes(train(replace(TINY, steps=1, seed=1), tmp_path / "other", workers=0).read_bytes())
    train(config, tmp_path / "second", workers=0, resume=True)
    assert read_weights(second).made_by["init"] == lineage
    first.write_bytes(as_it_was)
    assert isinstance(lineage, dict)
    assert lineage["sha256"] == read_weights(first).sha256
    assert lineage["made_by"]["steps"] == 1
    with pytest.raises(UsageError, match="BatchNorm"):
        train(replace(config, batch_norm=True), tmp_path / "third", workers=0)


def test_weights_keep_the_licence_of_those_they_began_with(tmp_path: Path) -> None:
    state = build_model("FlowNet2C", width=TINY.width).state_dict()
    save_weights(tmp_path / "theirs.safetensors", state, licence="research only", made_by={}, width=TINY.width)
    config = replace(TINY, steps=1, init=str(tmp_path / "theirs.safetensors"), batch_norm=False)
    for resume in (False, True):
        assert read_weights(train(config, tmp_path / "ours", workers=0, resume=resume)).licence == "research only"


@pytest.mark.parametrize("last_only", [False, True])
def test_a_run_is_resumed_without_the_weights_it_began_with(last_only: bool, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stopped

    narrow = replace(TINY, steps=1, width=0.0625)
    first = train(narrow, tmp_path / "first", workers=0)
    grown = {"model": "FlowNet2CS", "width": 0.125, "last_only": True} if last_only else {}
    config = replace(narrow, steps=2, init=str(first), batch_norm=False, **grown)
    train(config, tmp_path / "whole", workers=0)
    with pytest.raises(Stopped):
        train(config, tmp_path / "parts", workers=0, report_every=1, report=stop)
    first.unlink()
    with pytest.raises(CheckpointError, match=r"init '.*first.weights\.safetensors' instead of 'other'; pass those"):
        train(replace(config, init="other"), tmp_path / "parts", workers=0, resume=True)
    train(config, tmp_path / "parts", workers=0, resume=True)
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"))
    whole, parts = (read_weights(tmp_path / name / "weights.safetensors").made_by for name in ("whole", "parts"))
    assert whole["init"] == parts["init"]
