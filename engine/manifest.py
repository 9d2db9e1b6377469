"""The outcome of each of many sources, in a file beside their outputs: the next run that reads it does what is left.

The file is replaced atomically, by one run at a time, at every change that matters to the next run. It also records how
outputs were made that do not record it themselves, which is all but stores. The next run may be started in another
folder: names under ``made`` are relative to the manifest, and the others, which are as given, to ``folder``, which is
relative to the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flowreel.engine.claims import Claim
from flowreel.engine.errors import OutputBusyError, OutputExistsError, StageError
from flowreel.engine.files import json_object
from flowreel.engine.outputs import is_finished
from flowreel.engine.protocols import Resumable, Sink
from flowreel.engine.publish import publish_bytes, write_errors
from flowreel.engine.sources.kinds import kind_of
from flowreel.sinks import open_sink

if TYPE_CHECKING:
    from flowreel.engine.config import SinkConfig
    from flowreel.engine.run_report import RunReport

MANIFEST = "flowreel-manifest.json"
FORMAT = "flowreel_manifest"  # the key that marks the file as ours; its value is the format's version

Status = Literal["done", "skipped", "failed", "interrupted"]


@dataclass(frozen=True)
class SourceReport:
    """The outcome of one source."""

    source: str
    status: Status
    outputs: tuple[str, ...]
    flows: int | None = None  # None: unknown, as for outputs made by an earlier run
    seconds: float = 0.0  # including opening the source
    began: bool = False  # its outputs were opened, so that unfinished ones are this run's own
    error: Exception | None = None
    run: RunReport | None = None  # of a source computed by this run

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
    """The reports so far, and the manifest that records them."""

    def __init__(self, path: Path, jobs: list[Job]) -> None:
        self.path = path
        self._folder = os.path.realpath(path.parent)
        self._jobs = jobs
        self._reports: dict[str, SourceReport] = {}
        self._entries: dict[str, str] = {}  # the same as JSON, made once: each is written again at every change
        self._former, self._made = _former(path)
        self._claim: Claim | None = None  # taken at the first write

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
        """Replaces the source's report and writes the manifest; after a skipped source, only with the next change.

        To the next run the file says the same before. Writing takes as long as there are sources: many runs skip
        thousands.
        """
        self._hold()
        self._reports[report.source] = report
        self._entries[report.source] = json.dumps(report.as_json())
        self._former.pop(_place(report.source), None)
        if report.status != "skipped":
            self.write()

    def write(self, ended: bool = False) -> None:
        """Replaces the file atomically. Raises OutputBusyError while another run writes it; OutputWriteError."""
        self._hold()
        not_reached = (job.source for job in self._jobs if not self.has(job))
        content = (
            f'"{FORMAT}": 1',
            f'"ended": {json.dumps(ended)}',
            f'"folder": {json.dumps(os.path.relpath(os.getcwd(), self._folder))}',
            f'"sources": {_in_lines("[]", self._entries.values())}',
            f'"not_reached": {_in_lines("[]", map(json.dumps, not_reached))}',
            f'"earlier": {_in_lines("[]", map(json.dumps, self._former.values()))}',
            f'"made": {_in_lines("{}", (f"{json.dumps(path)}: {how}" for path, how in self._made.items()))}',
        )
        with write_errors(f"the manifest {self.path}"):
            publish_bytes(self.path, _in_lines("{}", content).encode() + b"\n")

    def _hold(self) -> None:
        """Locks the manifest against other runs from now on, and reads again what they may have written meanwhile."""
        if self._claim is not None:
            return
        named = f"the manifest {self.path}"
        try:
            with write_errors(named):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                claim = Claim.of_file(self.path.with_name(f".{self.path.name}.partial"), named)
        except OutputBusyError as error:
            raise OutputBusyError(f"{error}, or name another with --manifest") from error
        claim.made = True  # so that ``close`` removes the lock file even where a killed run had left it
        self._claim = claim
        self._former, self._made = _former(self.path)

    def finished(self, job: Job, config: SinkConfig) -> list[Sink]:
        """The outputs that are known to be complete.

        A store shows that itself; for others the manifest of the run that wrote them must record it.
        """
        sinks = (open_sink(path, config) for path in job.outputs)
        return [sink for sink in sinks if self._is_finished(sink)]

    def _is_finished(self, sink: Sink) -> bool:
        flows = self.made(sink.path).get("flows")
        return (isinstance(sink, Resumable) or isinstance(flows, int)) and is_finished(sink, flows or 0)

    def made(self, path: str) -> Mapping[str, Any]:
        """How a finished output was made."""
        how: Mapping[str, Any] = json.loads(self._made.get(os.path.relpath(_place(path), self._folder), "{}"))
        return how

    def remember(self, made: Mapping[str, dict[str, Any]]) -> None:
        """Records how finished outputs were made, by path. Written to the file with the next ``note``."""
        self._hold()
        self._made |= {os.path.relpath(_place(path), self._folder): json.dumps(how) for path, how in made.items()}

    def flows_before(self, job: Job) -> int | None:
        """Flows of a source that is done according to the former manifest; None where it is not."""
        flows: int | None = self._former.get(_place(job.source), {}).get("flows")
        return flows

    def left_unfinished(self, job: Job) -> bool:
        """Whether unfinished outputs of this source were left by the run that wrote the former manifest."""
        entry = self._former.get(_place(job.source), {})
        ended_early = entry.get("status") in ("interrupted", "failed") and entry.get("began") is True
        return ended_early and {*map(_place, job.outputs)} <= {*map(_place, entry.get("outputs", ()))}


def _place(name: str) -> str:
    """The same for every name of a source or output, from whichever folder. A link itself is not followed."""
    folder, last = os.path.split(os.path.abspath(name))
    return os.path.join(os.path.realpath(folder), last) if kind_of(name).is_path else name


def _in_lines(brackets: str, entries: Iterable[str]) -> str:
    """A JSON array or object with a line for each entry."""
    return f"{brackets[0]}\n" + ",\n".join(entries) + f"\n{brackets[1]}"


def _former(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What an earlier run recorded: entries by the ``_place`` of their source, and how outputs were made, as JSON by
    their path relative to the manifest.

    The names in the entries are turned into those from the present working folder. Raises OutputExistsError for a file
    that is no manifest of ours.
    """
    odd = os.path.exists(path) and not os.path.isfile(path)  # a folder, or a device, which could be read for ever
    try:
        content = None if odd else json_object(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}  # the first run; where the folder cannot exist, writing will report it
    except OSError:
        content = None
    if content is None or FORMAT not in content or not isinstance(content.get("sources"), list):
        raise OutputExistsError(f"{path} exists and is not a flowreel manifest: name another with --manifest")
    working = os.path.join(os.path.realpath(path.parent), str(content.get("folder", os.getcwd())))

    def here(name: object) -> str:
        text = str(name)
        moves = kind_of(text).is_path and not os.path.isabs(text)
        return os.path.relpath(os.path.join(working, text)) if moves else text

    def listed(names: object) -> list[str]:
        return [here(name) for name in names] if isinstance(names, list) else []

    earlier, made = content.get("earlier"), content.get("made")  # earlier: of sources that run did not reach
    entries = [
        entry | {"source": here(entry.get("source")), "outputs": listed(entry.get("outputs"))}
        for entry in (*(earlier if isinstance(earlier, list) else ()), *content["sources"])
        if isinstance(entry, dict)
    ]
    told = made.items() if isinstance(made, dict) else ()
    how = {
        name: json.dumps(value)
        for name, value in told
        if isinstance(value, dict) and isinstance(value.get("source"), dict)
    }
    return {_place(entry["source"]): entry for entry in entries}, how
