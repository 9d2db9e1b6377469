"""What a run did: its summary, and what ``--stats`` writes as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowreel.engine.data import FlowInfo
from flowreel.engine.device import device_name
from flowreel.engine.errors import counted
from flowreel.engine.inference import Inference
from flowreel.engine.outputs import OutputReport, Report, Tally, output_report
from flowreel.engine.pipeline import Pipeline
from flowreel.engine.protocols import Source
from flowreel.engine.stages import StageStatistics

if TYPE_CHECKING:
    from flowreel.sinks import FlowStore


@dataclass(frozen=True)
class RunReport(Report):
    """What a run did; ``--stats`` writes it as JSON."""

    pairs: int  # flows computed
    flows: int  # flows the outputs hold, including those of an earlier run that was resumed
    seconds: float  # from requesting the first frame to publishing the last output
    startup_s: float  # before that: opening the source, loading the weights
    pairs_per_s: float
    bytes_written: int  # of all outputs
    flo_bytes: int  # bytes that the flows computed would take as .flo files
    width: int  # pixels of the flow
    height: int
    decoder: str
    device: str
    kernels: dict[str, str]  # operation -> what ran it: cuda (our kernel), torch (on any device), or both
    precision: str
    batch: int
    model: str
    weights: str
    outputs: tuple[OutputReport, ...]
    stages: tuple[StageStatistics, ...]
    notes: tuple[str, ...] = ()


def report_of(
    frames: Source,
    inference: Inference,
    header: FlowInfo,
    tallies: list[Tally],
    pipeline: Pipeline,
    times_s: tuple[float, float, float],
) -> RunReport:
    """The report of a run whose outputs are published.

    Args:
        header: what the sinks were opened with.
        times_s: when the run began, when it asked for the first frame, and when it ended.
    """
    began_s, started_s, ended_s = times_s
    flows, seconds = tallies[0].flows, ended_s - started_s
    flo_bytes = flows * header.flo_bytes
    notes = [*frames.notes, *inference.notes]
    if frames.losses:
        notes += [f"taken as the whole although {loss}" for loss in frames.losses]
    return RunReport(
        pairs=flows,
        flows=flows,
        seconds=seconds,
        startup_s=started_s - began_s,
        pairs_per_s=flows / seconds,
        bytes_written=sum(tally.sink.bytes_written for tally in tallies),
        flo_bytes=flo_bytes,
        width=header.width,
        height=header.height,
        decoder=frames.decoder,
        device=device_name(*inference.devices),
        kernels=dict(inference.kernels),
        precision=inference.precision,
        batch=inference.batch,
        model=inference.model,
        weights=inference.weights.name,
        outputs=tuple(output_report(tally.sink, flo_bytes) for tally in tallies),
        stages=pipeline.statistics(),
        notes=tuple(notes),
    )


def report_of_complete(store: FlowStore) -> RunReport:
    """The report of a resumed run whose store was complete already, so that there was nothing to do."""
    made_by = {name: str(store.attrs.get(name)) for name in ("model", "weights", "precision")}
    return RunReport(
        pairs=0,
        flows=len(store),
        seconds=0.0,
        startup_s=0.0,
        pairs_per_s=0.0,
        bytes_written=0,
        flo_bytes=0,
        width=store.shape[3],
        height=store.shape[2],
        decoder="none",
        device="none",
        kernels={},
        batch=int(store.attrs.get("batch") or 0),
        **made_by,
        outputs=(OutputReport(store.path, 0, flo_bytes=0),),
        stages=(),
        notes=(f"{store.path} is complete already, with {counted(len(store), 'flow')}",),
    )
