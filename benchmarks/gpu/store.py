"""Whether a store holds the flow that the network gives for a video file."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

import flowreel
from benchmarks.gpu.findings import Findings, Settings
from benchmarks.gpu.made_clips import written_clip
from benchmarks.gpu.nvdec import frames_of
from flowreel.engine.config import ModelConfig, SinkConfig
from flowreel.engine.inference import load_network
from flowreel.engine.pinned import pin
from flowreel.sinks import shard_processes
from flowreel.sinks.shard_maker import Request
from flowreel.sinks.shard_processes import MOST_PROCESSES, _Process

if TYPE_CHECKING:
    from flowreel.engine.data import Bytes

ROUNDING = 2e-4  # of the largest component, in float32, between two programs of one network


def check(findings: Findings, settings: Settings) -> None:
    """Compares flows read back from a store with the network's own for the same frames."""
    for precision in ("fp32",) if settings.dry else ("fp32", "fp16"):
        findings.attempt(f"a store in {precision}", partial(_compare_store, findings, settings, precision))
    findings.attempt("shards made by processes", partial(_compare_processes, findings, settings))


def _compare_processes(findings: Findings, settings: Settings) -> None:
    """A store whose shards are made by worker processes, as in a long run, is byte-identical to one made by threads.

    Each shard has two batches, and there are so many shards that each buffer is reused several times.
    """
    width, height, batch, shards = (64, 60, 2, 2) if settings.dry else (640, 360, 8, 3 * (MOST_PROCESSES + 1))
    clip = written_clip(settings.folder, width, height, 2 * batch * shards + 4)
    options: dict[str, Any] = {"device": settings.device, "batch": batch, "shard_bytes": 16 * width * height * batch}
    options |= {"precision": "fp32", "model": "FlowNet2C"} if settings.dry else {"precision": "fp16"}
    stores = [Path(settings.folder) / f"{by}.zarr" for by in ("threads", "processes")]
    made_there: list[int] = []  # numbers of the shards made by processes

    def noted(process: _Process, request: Request, *rest: Any) -> Any:
        made_there.append(request.number)
        return make(process, request, *rest)

    def patient(process: _Process) -> bool:
        while not said_something(process):
            time.sleep(0.01)
        return True

    pinned: list[bool] = []  # for each shared buffer: one that could not be pinned is slow, and nothing else shows it

    def looked_at(memory: Bytes, device: torch.device) -> Callable[[], None]:
        undo = pin(memory, device)
        pinned.append(torch.from_numpy(memory).is_pinned())
        return undo

    make, said_something = _Process.make, _Process._has_said_something
    with (
        mock.patch("flowreel.engine.device.pin", looked_at),
        mock.patch.object(_Process, "make", noted),
        mock.patch.object(_Process, "_has_said_something", patient),  # else threads make shards full before that
    ):
        for path, worth in zip(stores, (False, True), strict=True):
            with mock.patch.object(shard_processes, "are_worth_it", lambda *_, worth=worth: worth):
                flowreel.run(clip, path, overwrite=True, **options)
    files = [
        {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for path in stores
    ]
    same = files[0] == files[1]
    by_processes = settings.dry or bool(made_there)  # on a CPU no processes are used
    said = "a store is the same to the byte by threads and by processes"
    findings.check(said, same and by_processes, files=len(files[0]), shards_made_there=len(made_there))
    landed = settings.dry or (bool(pinned) and all(pinned))
    findings.check("steps land where processes see them, pinned", landed, pieces=len(pinned), pinned=sum(pinned))


def _compare_store(findings: Findings, settings: Settings, precision: str) -> None:
    """The first batches of two shards: in float32 the largest error; in fp16 the mean, which leaves half of max_error
    to fp16."""
    width, height, batch = (64, 60, 2) if settings.dry else (640, 360, 8)
    clip = written_clip(settings.folder, width, height, 2 * (batch + 1) + 1)
    options: dict[str, Any] = {"device": settings.device, "precision": precision, "batch": batch}
    shard_bytes = 8 * width * height * batch  # two whole shards of one batch, and a short one
    path = Path(settings.folder) / f"{precision}.zarr"
    flowreel.run(clip, path, overwrite=True, shard_bytes=shard_bytes, **options)
    kept = flowreel.open_store(path)
    frames = torch.stack([frame.rgb.cpu() for frame in frames_of(clip, "auto", settings)])
    inference = load_network(ModelConfig(**options)).fitted(height, width)
    findings.check(f"{precision}: every flow is there", len(kept) == len(frames) - 1, flows=len(kept))
    for first in (0, batch):
        pairs = slice(first, first + batch), slice(first + 1, first + batch + 1)
        wanted = inference.fit.undo(inference.flow(*(frames[some] for some in pairs))).cpu()
        apart = (torch.from_numpy(kept[first : first + batch]) - wanted).abs()
        most, mean, longest = float(apart.max()), float(apart.mean()), float(wanted.abs().max())
        step = SinkConfig().max_error
        good = most <= step + ROUNDING * longest if precision == "fp32" else mean <= step
        findings.check(
            f"{precision}: flows {first} to {first + batch - 1} are the network's",
            good,
            most_px=most,
            mean_px=mean,
            longest_px=longest,
            max_error=step,
        )
