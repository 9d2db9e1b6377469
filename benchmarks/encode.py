"""Writing flow: every output and store codec on the same fields: wall time, CPU time, bytes, more cores."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.ceilings import Ceilings
from benchmarks.data import found
from benchmarks.measure import Effort, Sample, timed
from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.sinks import open_sink, read_flo
from flowreel.sinks.codecs import flow_codec

FIELD = "flownet2_caffe_result_960x540.flo"  # a published network's flow, which compresses badly
FLOWS = 16  # copies of the field, each shifted a little further
OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"store, {codec}": ("x.zarr", {"codec": codec}) for codec in get_args(Codec)},
    "store, blosc, lossless": ("x.zarr", {"max_error": 0.0}),
    "colour video": ("x.mp4", {}),
    ".flo": ("%06d.flo", {}),
    "colour PNG": ("%06d.png", {}),
    "KITTI PNG": ("%06d.kitti.png", {}),
    "npz": ("%06d.npz", {}),
    "two-stream JPEG": ("flow_x_%05d.jpg", {}),
}
THREADS = (1, 2, 4, 8, 16)  # of the pools that encode, as far as there are cores
Flow = npt.NDArray[np.float32]  # (2, H, W) pixels


def run(short: bool = False, ceilings: Ceilings | None = None) -> dict[str, object]:
    """Rows for whole outputs, opened, written and published; then rows for the codecs alone on one and more threads."""
    flows = some_flows(8 if short else FLOWS)
    repeats = 2 if short else 5
    outputs: dict[str, list[dict[str, float]]] = {}
    for round_number in range(repeats + 1):
        for name, (file, options) in OUTPUTS.items():
            spent = whole_output(file, SinkConfig(**options), flows)
            if round_number:  # the first round warms up
                outputs.setdefault(name, []).append(spent)
    rows = [_row(name, flows, spent, ceilings or {}) for name, spent in outputs.items()]
    rows += codec_rows(flows, Effort.of(short) if short else Effort(cap_s=4.0))
    return {"field": FIELD, "flows": len(flows), "rows": rows}


def some_flows(count: int) -> list[Flow]:
    """Different but similar flows: the same field shifted, as if the camera moved."""
    field = read_flo(found("flo", FIELD)).transpose(2, 0, 1)
    return [np.ascontiguousarray(np.roll(field, (3 * n, 5 * n), (1, 2))) for n in range(count)]


def whole_output(file: str, config: SinkConfig, flows: Sequence[Flow]) -> dict[str, float]:
    """Writes one output, timed from open to commit."""
    _, height, width = flows[0].shape
    batches = [_batch(flow, number) for number, flow in enumerate(flows)]
    with tempfile.TemporaryDirectory() as folder:
        sink = open_sink(Path(folder) / "out" / file, config)
        cpu_s, began_s = time.process_time(), time.perf_counter()
        sink.open(FlowInfo(height, width, Fraction(25), len(flows) + 1, SourceId("fields")))
        for batch in batches:
            sink.write(batch)
        sink.commit()
        spent = {"seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s}
        return spent | {"bytes": float(sink.bytes_written)}


def _batch(flow: Flow, number: int) -> FlowBatch:
    frame = np.array([number], np.int64)
    return FlowBatch(torch.from_numpy(flow)[None], number, frame, frame + 1, frame / 25, (frame + 1) / 25)


def _row(name: str, flows: Sequence[Flow], spent: Sequence[Mapping[str, float]], ceilings: Ceilings) -> dict[str, Any]:
    gigabytes, count = sum(flow.nbytes for flow in flows) / 1e9, len(flows)
    seconds = Sample.of([one["seconds"] for one in spent])
    disk = max(ceilings.get("disk", {}).values(), default=None)
    written = spent[0]["bytes"]
    return {
        "what": name,
        "flows/s": seconds.rate(count).cell(),
        "GB/s of flow": seconds.rate(gigabytes).cell(),
        "GB/s and CPU second": Sample.of([one["cpu_s"] for one in spent]).rate(gigabytes).cell(),
        "kB a flow": written / count / 1e3,
        ".flo / this": 1e9 * gigabytes / written,
        "of the disk's limit": None if disk is None else written / 1e9 / disk / seconds.median,
    }


def codec_rows(flows: Sequence[Flow], effort: Effort) -> list[dict[str, Any]]:
    """Chunks encoded by a pool of threads: how speed grows with cores."""
    gigabytes = sum(flow.nbytes for flow in flows) / 1e9
    _, height, width = flows[0].shape
    rows = []
    for kind in get_args(Codec):
        codec = flow_codec(height, width, SinkConfig(codec=kind))
        for threads in (count for count in THREADS if count <= (os.cpu_count() or 1)):
            with ThreadPoolExecutor(threads) as pool:

                def encode(pool: ThreadPoolExecutor = pool, codec: Any = codec) -> object:
                    return list(pool.map(codec.encode, flows))

                rate = timed(encode, effort).rate(gigabytes).cell()
            rows.append({"what": f"codec {kind}, {threads} thread{'s' * (threads > 1)}", "GB/s of flow": rate})
    return rows
