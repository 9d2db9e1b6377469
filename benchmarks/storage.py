"""What stored flow costs: size, error and speed for each bound and codec, and how often a store's bytes are written.

Fields: the published FlowNet2 result and Sintel's ground truth, by which the codecs are judged, and flow of real clips
with the baseline weights: the flow itself, and the network's own quarter-resolution prediction ("native"), whose size
is compared with ``.flo`` files of the full-resolution flow. Speeds are per core: float32 bytes of the encoded arrays
per CPU second of the one thread that works.

**Write amplification** is ``wchar`` of ``/proc/self/io``, the bytes this process passed to write calls while a whole
store was made, divided by the bytes of the finished store. It detects repeated writes (a shard for each flow that is
added, metadata for each shard) on any file system. ``write_bytes`` beside it, the bytes that went to the disk, counts
whole pages of each file and is 0 where the folder is in memory.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

import flowreel
from benchmarks.data import found
from flowreel.engine.config import Codec, SinkConfig
from flowreel.engine.data import FlowBatch, FlowInfo, SourceId
from flowreel.sinks import open_sink, open_store, read_flo
from flowreel.sinks.codecs import FlowCodec, flow_codec
from flowreel.sinks.flo import flo_bytes

Flow = npt.NDArray[np.float32]  # (2, H, W) pixels

FIXED = {
    "FlowNet2 (Caffe) 960x540": ("flownet2_caffe_result_960x540.flo",),
    "Sintel truth 1024x436": ("sintel_alley_1_0002_gt_1024x436.flo", "sintel_alley_1_0003_gt_1024x436.flo"),
}
CLIPS = ("bbb_1080p60.mp4", "person_asl_walk_640x480.mkv", "sintel_cave_1024x436.mp4")
CLIP_FLOWS = 24
BOUNDS = {"1/128": 1 / 128, "1/64": 1 / 64, "1/32": 1 / 32, "1/16": 1 / 16, "lossless": 0.0}  # px
SHOWN = "1/64"  # the default bound; the table shows its speed, "measurements" has the others'
NATIVE_CODECS: tuple[Codec, ...] = ("blosc", "pcodec2d")
LEAST_TIMINGS = 9  # for each median


def run() -> dict[str, object]:
    """One row per field and codec: compression ratio to ``.flo`` at each bound, and the largest error as a fraction of
    its bound; speed, error in pixels and write amplification at 1/64 px. All figures are in "measurements".
    """
    measurements: list[dict[str, Any]] = []
    stores: list[dict[str, Any]] = []
    for name, files in FIXED.items():
        flows = [np.ascontiguousarray(read_flo(found("flo", file)).transpose(2, 0, 1)) for file in files]
        measurements += measure_all(name, flows)
    for clip in CLIPS:
        batch, native = flow_of(clip)
        flows = list(batch.flow.numpy())
        measurements += measure_all(clip, flows)
        measurements += measure_all(f"{clip}, native", native, NATIVE_CODECS, flows[0].shape[1:])
        stores += [whole_store(clip, [batch], codec) for codec in get_args(Codec)]
    return {
        "clip_flows": CLIP_FLOWS,
        "rows": rows(measurements, stores),
        "measurements": measurements,
        "stores": stores,
    }


def flow_of(clip: str) -> tuple[FlowBatch, list[Flow]]:
    """The flow of a clip's first frames, and the quarter-resolution predictions that it is upsampled from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.zarr"
        flowreel.run(found("videos", clip), path, stop=CLIP_FLOWS + 1, resolution="native", max_error=0)
        store = open_store(path)
        times = store.frame, store.frame_to, store.timestamps_s, store.timestamps_to_s
        batch = FlowBatch(torch.from_numpy(store[:]), 0, *(values.copy() for values in times))
        native = [np.empty(store.layout.stored_shape, np.float32) for _ in store.frame]
        for number, field in enumerate(native):
            store.files.stored_flow(number, field)
    return batch, native


def rows(measurements: Sequence[dict[str, Any]], stores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: one row per field and codec."""
    table = []
    for shown in (one for one in measurements if one["bound"] == SHOWN):
        same = [one for one in measurements if (one["field"], one["codec"]) == (shown["field"], shown["codec"])]
        store = [one for one in stores if (one["field"], one["codec"]) == (shown["field"], shown["codec"])]
        table.append(
            {
                "flow": shown["field"],
                "codec": shown["codec"],
                **{f".flo / {one['bound']}": one["ratio"] for one in same},
                f"encode GB/s at {SHOWN}": shown["encode GB/s"],
                "decode GB/s": shown["decode GB/s"],
                f"mean error px at {SHOWN}": f"{shown['mean error px']:.4f}",
                f"max error px at {SHOWN}": f"{shown['max error px']:.6f}",
                "largest error / bound": max(error_of_bound(one) for one in same),
                "write amplification": f"{store[0]['wchar / store']:.4f}" if store and store[0]["wchar"] else None,
            }
        )
    return table


def error_of_bound(measured: dict[str, Any]) -> float:
    """The largest error as a fraction of the bound; for lossless, 0 without any error and else infinity."""
    error, bound = measured["max error px"], BOUNDS[measured["bound"]]
    if bound:
        return float(error / bound)
    return 0.0 if error == 0 else math.inf


def measure_all(
    field: str, flows: Sequence[Flow], kinds: Sequence[Codec] = get_args(Codec), whole: tuple[int, ...] | None = None
) -> list[dict[str, Any]]:
    """Every bound and codec on the flows of one field or clip. whole: height and width at full resolution, if the flows
    are native."""
    height, width = flows[0].shape[1:]
    whole = whole or (height, width)
    measured = []
    for bound, max_error in BOUNDS.items():
        for kind in kinds:
            codec = flow_codec(height, width, SinkConfig(max_error=max_error, codec=kind), max(whole))
            cost = measure(codec, flows, flo_bytes(*whole))
            measured.append({"field": field, "codec": kind, "bound": bound, **cost})
    return measured


def measure(codec: FlowCodec, flows: Sequence[Flow], bytes_as_flo: int) -> dict[str, float]:
    """Encodes and decodes each flow, several times if there are few; one untimed call of each warms up before.

    Errors are those of single components, speeds medians.
    """
    out: Flow = np.empty((2, codec.height, codec.width), np.float32)
    gigabytes = out.nbytes / 1e9
    codec.decode(codec.encode(flows[0]).chunk, out)
    stored_bytes, means, most = 0, [], 0.0
    encode_s: list[float] = []
    decode_s: list[float] = []
    for again in range(-(-LEAST_TIMINGS // len(flows))):
        for flow in flows:
            began_s = time.thread_time()
            chunk = codec.encode(flow).chunk
            encoded_s = time.thread_time()
            codec.decode(chunk, out)
            decode_s.append(time.thread_time() - encoded_s)
            encode_s.append(encoded_s - began_s)
            if not again:
                error = np.abs(out - flow)
                stored_bytes += len(chunk)
                means.append(float(np.nanmean(error)))
                most = max(most, float(np.nanmax(error)))
    return {
        "ratio": len(flows) * bytes_as_flo / stored_bytes,
        "mean error px": sum(means) / len(means),
        "max error px": most,
        "encode GB/s": gigabytes / median(encode_s),
        "decode GB/s": gigabytes / median(decode_s),
    }


def whole_store(name: str, batches: Sequence[FlowBatch], codec: Codec) -> dict[str, Any]:
    """Writes the batches to a store. Returns its size, and the bytes the operating system counted meanwhile."""
    height, width = batches[0].flow.shape[2:]
    count = sum(len(batch) for batch in batches)
    with tempfile.TemporaryDirectory() as folder:
        sink = open_sink(Path(folder) / "x.zarr", SinkConfig(codec=codec))
        before = io_counters()
        sink.open(FlowInfo(height, width, None, count + 1, SourceId(name)))
        for batch in batches:
            sink.write(batch)
        sink.commit()
        after = io_counters()
        store_bytes = sum(file.stat().st_size for file in Path(folder, "x.zarr").rglob("*") if file.is_file())
    spent = {what: after[what] - before[what] for what in ("wchar", "write_bytes", "rchar") if what in before}
    return {
        "field": name,
        "codec": codec,
        "flows": count,
        "store bytes": store_bytes,
        "bytes the sink counted": sink.bytes_written,
        **{what: spent.get(what) for what in ("wchar", "write_bytes", "rchar")},
        "wchar / store": spent["wchar"] / store_bytes if spent else None,
    }


def io_counters() -> dict[str, int]:
    """This process's I/O counters since its start, of all threads; empty on systems without them."""
    path = Path("/proc/self/io")
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}
