"""ptlflow's FlowNet2, C and S beside flowreel's, same weights and frames, each in its own environment: time, memory.

ptlflow needs other library versions than this project, so it has its own environment. ``python -m benchmarks.peers``
creates it in ``.peers/ptlflow``; ``FLOWREEL_PTLFLOW`` names the interpreter of one elsewhere. Without either, the case
is skipped. C and S are the same functions in both projects. FlowNet2 differs: where a warp samples outside the frame,
ptlflow uses black and flowreel repeats the border, so the flow differs there. OpenCV's methods are in ``classical``,
plain torch versions of the kernels in ``kernels``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Effort, Sample, Skipped, alternated, cpu_precisions, ratio
from benchmarks.processes import ROOT

PTLFLOW = "ptlflow==0.4.2"
PLACE = ROOT / ".peers" / "ptlflow"
SIZE = (448, 1024)  # rows, columns
MOTION = (3, 5)  # pixels down and right, wrapped: the frames have equal means, which ptlflow computes for each frame
MODELS = ("FlowNet2", "FlowNet2C", "FlowNet2S")
OURS = "flowreel fp32"
WAYS = {  # name of the row: kind of ``peer_worker``, precision
    OURS: ("compiled", "fp32"),
    "flowreel bf16": ("compiled", "bf16"),
    "flowreel's module, not compiled": ("plain", "fp32"),
    PTLFLOW: ("ptlflow", "fp32"),
}


class Peer:
    """A network in another process: see ``benchmarks.peer_worker``."""

    def __init__(self, python: str, settings: dict[str, Any], log: Path) -> None:
        worker = Path(__file__).with_name("peer_worker.py")
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [python, str(worker), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
            )
        self._log = log

    def loaded(self) -> None:
        """Waits until it is ready."""
        self._answer()

    def run(self) -> float:
        """Computes one pair. Returns the seconds it took."""
        return float(self._ask("run"))

    def flow(self, path: Path) -> tuple[Any, float]:
        """The last pair's (2, H, W) flow, and the process's peak memory in bytes."""
        peak = float(self._ask(str(path)))
        return np.load(path), peak

    def end(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()

    def _ask(self, line: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a peer ended: {self._log.read_text(errors='replace')[-2000:]}")
        return answer


@contextmanager
def peer(python: str, settings: dict[str, Any], log: Path) -> Iterator[Peer]:
    """A peer whose process ends with the block."""
    one = Peer(python, settings, log)
    try:
        one.loaded()
        yield one
    finally:
        one.end()


def run(short: bool = False) -> dict[str, object]:
    """All implementations of a model in turn, each in its own process. "apart": mean distance of the flow from ours,
    divided by the mean length of ours."""
    theirs = ptlflow_python()
    effort = Effort(least=2, most=3, cap_s=1.0) if short else Effort(least=7, most=15, cap_s=60.0)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS[1:] if short else MODELS:
            rows += compared(model, theirs, effort, Path(folder))
    return {"size": f"{SIZE[1]}x{SIZE[0]}", "threads": threads(), "rows": rows}


def compared(model: str, theirs: str, effort: Effort, folder: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    from benchmarks.networks import random_weights

    settings = {"model": model, "weights": str(random_weights(model, folder)), "threads": threads()}
    settings["frames"] = str(_frames(folder))
    with ExitStack() as open_peers:
        peers = {}
        ways = {way: how for way, how in WAYS.items() if how[1] in cpu_precisions()}
        for number, (way, (kind, precision)) in enumerate(ways.items()):
            own = settings | {"kind": kind, "precision": precision}
            python = theirs if kind == "ptlflow" else sys.executable
            peers[way] = open_peers.enter_context(peer(python, own, folder / f"{model}-{number}.log"))
        found: dict[str, list[float]] = {way: [] for way in peers}
        actions = {way: lambda way=way: found[way].append(peers[way].run()) for way in peers}
        rounds = len(alternated(actions, effort)[OURS])
        kept = {way: peers[way].flow(folder / "flow.npy") for way in peers}
    rows = []
    for way, seconds in found.items():
        last = seconds[-rounds:]  # those before were warm-up
        flow, peak = kept[way]
        rows.append(
            {
                "model": model,
                "by": way,
                "s/pair": Sample.of(last).cell(),
                "its time / ours": None if way == OURS else ratio(last, found[OURS][-rounds:]),
                "peak MB": peak / 1e6,
                "apart": None if way == OURS else _apart(flow, kept[OURS][0]),
            }
        )
    return rows


def _apart(flow: Any, ours: Any) -> float:
    return float(np.linalg.norm(flow - ours, axis=0).mean() / np.linalg.norm(ours, axis=0).mean())


def _frames(folder: Path) -> Path:
    """A file with a random picture, and the same picture moved by ``MOTION`` with wrap-around."""
    path = folder / "frames.npy"
    if not path.exists():
        import torch

        coarse = torch.rand(1, 3, SIZE[0] // 8, SIZE[1] // 8, generator=torch.Generator().manual_seed(0))
        first = torch.nn.functional.interpolate(coarse, SIZE, mode="bilinear")[0] * 255
        np.save(path, torch.stack((first, first.roll(MOTION, (1, 2)))).numpy())
    return path


def threads() -> int:
    """The number of threads for all peers: as many as torch uses in this process."""
    import torch

    return torch.get_num_threads()


def ptlflow_python() -> str:
    """The interpreter of an environment with the right version of ptlflow. Raises Skipped when there is none."""
    python = os.environ.get("FLOWREEL_PTLFLOW") or str(PLACE / "bin" / "python")
    name, _, version = PTLFLOW.partition("==")
    ask = f"import importlib.metadata as found; print(found.version({name!r}))"
    how = f"`python -m benchmarks.peers` makes an environment with {PTLFLOW}, or FLOWREEL_PTLFLOW names one"
    try:
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
    except OSError:
        raise Skipped(f"no interpreter at {python}: {how}") from None
    if done.stdout.strip() != version:
        raise Skipped(f"{python} has {name} {done.stdout.strip() or 'not at all'}: {how}")
    return python


def install() -> None:
    """Creates the environment, with the same version of torch as this one."""
    from importlib.metadata import version

    venv.create(PLACE, with_pip=True, clear=True)
    pip = [str(PLACE / "bin" / "python"), "-m", "pip", "install"]
    subprocess.run([*pip, f"torch=={version('torch')}", PTLFLOW], check=True)


if __name__ == "__main__":
    install()
