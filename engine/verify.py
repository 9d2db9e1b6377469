"""Checks that a store still holds what was written, by reading all of it, and reports what is wrong for people.

A damaged shard may hold a hundred flows with the same problem, so neighbours with the same problem are one finding.
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


@dataclass(frozen=True)
class Finding:
    """One problem, with the neighbouring flows that share it."""

    what: str
    first_flow: int | None = None  # None: it concerns the store as a whole
    last_flow: int | None = None  # inclusive
    first_frame: int | None = None  # number of the first flow's first frame in the source; None: unknown
    last_frame: int | None = None  # the same for the last flow

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
    """The result of reading a whole store."""

    path: str  # as given
    folder: str | None  # what was read: X.zarr.partial if there is no X.zarr; None if it could not be opened
    complete: bool
    flows: int  # flows there should be; 0 if it could not be opened
    available: int  # flows there are: from the first one on without a gap, in a cache anywhere
    width: int  # pixels
    height: int  # pixels
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def as_json(self) -> dict[str, Any]:
        """The result as plain values, for a file."""
        return {"sound": self.sound} | asdict(self)


def verify(path: PathLike, progress: Callable[[int, int], None] | None = None) -> Verification:
    """Reads every chunk of a flow store, finished or not, and reports what is wrong with it.

    Args:
        path: a store, or a cache of ``flowreel.open``.
        progress: called with the number of flows read so far and the number there are.

    Returns:
        The problems found: ``sound`` when there are none. A store that is missing or cannot be opened is a finding as
        well, so that the rest of a list is still read.
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
    """Merges the same problem of neighbouring flows into one finding."""
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
