"""Is a stored flow still what was written? One store is read whole, and what is wrong is gathered for people.

A damaged shard holds a hundred flows with the same trouble: neighbours with the same trouble are told as one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from flowreel.engine.errors import StoreError
from flowreel.engine.files import PathLike
from flowreel.sinks import open_store

if TYPE_CHECKING:
    from flowreel.sinks.store_check import StoreProblem

Progress = Callable[[int, int], None]  # flows read so far, flows there are


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the neighbouring flows that share it."""

    what: str
    first_flow: int | None = None  # None: it concerns the store as a whole
    last_flow: int | None = None  # inclusive
    first_frame: int | None = None  # number of the first flow's first frame in the source; None: cannot be told
    last_frame: int | None = None  # the same of the last flow

    def __str__(self) -> str:
        if self.first_flow is None:
            return self.what
        one = self.first_flow == self.last_flow
        flows = f"flow {self.first_flow}" if one else f"flows {self.first_flow} to {self.last_flow}"
        if self.first_frame is None or self.last_frame is None:
            return f"{flows}: {self.what}"
        frames = f"frame {self.first_frame}" if one else f"frames {self.first_frame} to {self.last_frame}"
        return f"{flows} ({frames}): {self.what}"


@dataclass(frozen=True)
class Verification:
    """What reading a store whole has shown."""

    path: str  # as given
    folder: str | None  # what was read: X.zarr.partial when there is no X.zarr; None when it could not be opened
    complete: bool
    flows: int  # flows there should be; 0 when it could not be opened
    available: int  # flows there are, from the first one on
    width: int  # pixels
    height: int  # pixels
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        return {"sound": self.sound} | asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}


def verify(path: PathLike, progress: Progress | None = None) -> Verification:
    """Reads every chunk of a flow store, finished or not, and says what is wrong with it.

    A store that is not there or cannot be opened is a finding, too, so that the others of a list are still read.
    """
    name = os.fspath(path)
    try:
        store = open_store(path)
    except StoreError as error:
        return Verification(name, None, False, 0, 0, 0, 0, (Finding(str(error)),))
    available = store.stored
    report = (lambda flows: progress(flows, available)) if progress else None
    findings = tuple(merged(store.check(report)))
    _, _, height, width = store.shape
    return Verification(name, store.path, store.complete, len(store), available, width, height, findings)


def merged(problems: Iterable[StoreProblem]) -> Iterator[Finding]:
    """Neighbouring flows with the same trouble as one finding."""
    run: Finding | None = None
    for problem in problems:
        if run and problem.flow is not None and run.what == problem.what and run.last_flow == problem.flow - 1:
            run = replace(run, last_flow=problem.flow, last_frame=problem.frame)
            continue
        if run:
            yield run
        run = Finding(problem.what, problem.flow, problem.flow, problem.frame, problem.frame)
    if run:
        yield run
