"""What became of each of many sources, as a file beside their outputs: the next run with it does what is left.

It is replaced as a whole whenever something is noted, by one run at a time. Of outputs that do not tell themselves how
they were made, it tells that, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowreel.engine.claims import Claim
from flowreel.engine.errors import OutputBusyError, OutputExistsError, OutputWriteError, StageError
from flowreel.engine.outputs import is_finished
from flowreel.engine.protocols import Resumable, Sink
from flowreel.engine.publish import publish_bytes
from flowreel.sinks import open_sink

if TYPE_CHECKING:
    from flowreel.engine.api import RunReport
    from flowreel.engine.config import SinkConfig

MANIFEST = "flowreel-manifest.json"
FORMAT = "flowreel_manifest"  # the key that marks the file as ours; its value is the format's version

Status = Literal["done", "skipped", "failed", "interrupted"]


@dataclass(frozen=True)
class SourceReport:
    """What became of one source."""

    source: str
    status: Status
    outputs: tuple[str, ...]
    flows: int | None = None  # None: unknown, as of outputs that were made by an earlier run
    seconds: float = 0.0  # opening the source included
    began: bool = False  # its outputs were opened, so what lies there unfinished is this run's own
    error: Exception | None = None
    run: RunReport | None = None  # of a source that was done now

    def as_json(self) -> dict[str, object]:
        """The manifest's entry."""
        # A stage's error only says where; its cause is what went wrong.
        cause = self.error.__cause__ if isinstance(self.error, StageError) else self.error
        error = None if self.error is None else {"type": type(cause).__name__, "message": str(self.error)}
        return {
            "source": self.source,
            "status": self.status,
            "outputs": list(self.outputs),
            "flows": self.flows,
            "seconds": round(self.seconds, 3),
            "began": self.began,
            "error": error,
        }


@dataclass(frozen=True)
class Job:
    """A source and its outputs."""

    source: str
    outputs: tuple[str, ...]


class Ledger:
    """The reports so far, and the file that says the same."""

    def __init__(self, path: Path, jobs: list[Job]) -> None:
        self.path = path
        self._jobs = jobs
        self._reports: dict[str, SourceReport] = {}
        self._former, self._made = _former(path)
        self._claim: Claim | None = None  # from the first time it is written

    def close(self) -> None:
        """Lets other runs write the manifest."""
        if self._claim is not None:
            self._claim.withdraw()

    @property
    def reports(self) -> list[SourceReport]:
        return list(self._reports.values())

    @property
    def failed(self) -> int:
        return sum(report.status == "failed" for report in self.reports)

    def has(self, job: Job) -> bool:
        return job.source in self._reports

    def note(self, report: SourceReport) -> None:
        """What is known of a source now, in place of what was known before."""
        self._reports[report.source] = report
        self.write()

    def write(self, ended: bool = False) -> None:
        """Replaces the file in one step. Raises OutputBusyError while another run writes it."""
        self._hold()
        content = {
            FORMAT: 1,
            "ended": ended,
            "sources": [report.as_json() for report in self.reports],
            "not_reached": [job.source for job in self._jobs if not self.has(job)],
            "earlier": [entry for source, entry in self._former.items() if source not in self._reports],
            "made": self._made,
        }
        try:
            publish_bytes(self.path, json.dumps(content, indent=2).encode() + b"\n")
        except OSError as error:
            raise OutputWriteError(f"cannot write the manifest {self.path}: {error.strerror or error}") from error

    def _hold(self) -> None:
        """Keeps others from writing it, from now on; what they have written meanwhile counts."""
        if self._claim is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            claim = Claim.of_file(self.path.with_name(f".{self.path.name}.partial"), f"the manifest {self.path}")
        except OutputBusyError as error:
            raise OutputBusyError(f"{error}, or name another with --manifest") from error
        except OSError as error:
            raise OutputWriteError(f"cannot write the manifest {self.path}: {error.strerror or error}") from error
        claim.made = True  # so that it goes in the end, also where a run that was killed left it
        self._claim = claim
        self._former, self._made = _former(self.path)

    def finished(self, job: Job, config: SinkConfig) -> list[Sink]:
        """The outputs that are there and whole, as far as is known.

        A store tells of itself. Of others the manifest of the run that wrote them must.
        """
        sinks = (open_sink(path, config) for path in job.outputs)
        return [sink for sink in sinks if self._is_finished(sink)]

    def _is_finished(self, sink: Sink) -> bool:
        flows = self._made.get(sink.path, {}).get("flows")
        return (isinstance(sink, Resumable) or isinstance(flows, int)) and is_finished(sink, flows or 0)

    def made(self, path: str) -> Mapping[str, Any]:
        """How a finished output was made."""
        return self._made.get(path, {})

    def remember(self, paths: list[str], made: dict[str, Any]) -> None:
        """Of finished outputs, how they were made. Written with the next note."""
        self._hold()
        self._made |= dict.fromkeys(paths, made)

    def flows_before(self, job: Job) -> int | None:
        """Flows of a source that the former manifest says is done; None where it does not."""
        entry = self._former.get(job.source, {})
        flows = entry.get("flows")
        return flows if entry.get("status") in ("done", "skipped") and isinstance(flows, int) else None

    def left_unfinished(self, job: Job) -> bool:
        """Whether what lies unfinished at the source's outputs was left there by the run of the former manifest."""
        entry = self._former.get(job.source, {})
        ended_early = entry.get("status") in ("interrupted", "failed") and entry.get("began") is True
        return ended_early and set(job.outputs) <= set(entry.get("outputs", ()))


def _former(path: Path) -> tuple[Mapping[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """What an earlier run left: entries by source, and how outputs were made, by path.

    Raises OutputExistsError for a file that is no manifest of ours.
    """
    odd = os.path.exists(path) and not os.path.isfile(path)  # a folder; or a device, which may never end
    try:
        content = None if odd else json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}  # the first run; or no such folder can be, as will be said on writing
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or FORMAT not in content or not isinstance(content.get("sources"), list):
        raise OutputExistsError(f"{path} is there and is no manifest of flowreel's: name another with --manifest")
    earlier, made = content.get("earlier"), content.get("made")  # earlier: of sources that run did not get to
    entries = [
        entry
        for entry in (*(earlier if isinstance(earlier, list) else ()), *content["sources"])
        if isinstance(entry, dict)
    ]
    told = made.items() if isinstance(made, dict) else ()
    how = {name: value for name, value in told if isinstance(value, dict) and isinstance(value.get("source"), dict)}
    return {str(entry.get("source")): entry for entry in entries}, how
