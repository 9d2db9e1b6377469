"""Every benchmark case runs on the smallest complete input: its rows are there, have different names, and add up.

Measured times are not judged, because no test may depend on the speed of the machine.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import (
    accuracy,
    ceilings,
    classical,
    clips,
    data,
    decode,
    encode,
    end_to_end,
    kernels,
    memory,
    model,
    networks,
    old_way,
    scaling,
    startup,
)
from benchmarks.compare import compare
from benchmarks.measure import Effort, cell_value
from benchmarks.processes import Spent
from benchmarks.tables import as_markdown
from flowreel.engine.compiled import onednn
from flowreel.engine.models import build_model
from flowreel.sinks import write_flo

HEIGHT, WIDTH, FRAMES = 64, 96, 8
CEILINGS = {
    "cpu": {"matrix product fp32": 100.0, "3x3 convolution bf16": 200.0, "memory copy": 10.0},
    "disk": {"write and fsync": 1.0},
}
Row = dict[str, Any]


@pytest.fixture
def checked(tmp_path: Path, write: Any) -> Callable[[str, dict[str, Any]], list[Row]]:
    """Gives the rows of a case, after checking that they can be written to a file, shown as a table and compared."""

    def rows_of(case: str, result: dict[str, Any]) -> list[Row]:
        again: list[Row] = json.loads(json.dumps(result))["rows"]
        assert len(as_markdown(again).splitlines()) == 2 + len(again)
        path = write(tmp_path / "checked", case, again)
        itself = compare(str(path), str(path))
        assert {change.verdict for change in itself.changes} <= {"same", ""}
        figures = sum(cell_value(cell) is not None for row in again for cell in row.values())
        assert len(itself.changes) >= figures, "two rows have the same names"
        return again

    return rows_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with one video, one flow and one pair of images."""
    place = tmp_path / "data"
    for name in ("videos", "flo", "pairs/one"):
        (place / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (40, 40, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    pictures = [np.ascontiguousarray(texture[i : i + HEIGHT, 2 * i : 2 * i + WIDTH]) for i in range(FRAMES)]
    with av.open(str(place / "videos" / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    flow = np.broadcast_to(np.float32([-2, -1]), (HEIGHT, WIDTH, 2)).copy()
    write_flo(place / "flo" / "field.flo", flow)
    write_flo(place / "pairs" / "one" / "flow.flo", flow)
    for number in (1, 2):
        Image.fromarray(pictures[number]).save(place / "pairs" / "one" / f"img{number}.png")
    monkeypatch.setattr(data, "FOLDER", place)
    return place


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is timed only once."""
    once = Effort(least=1, most=1, cap_s=0.0, warm_up=0)
    monkeypatch.setattr(Effort, "of", classmethod(lambda *_, **__: once))


def in_this_process(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    """In place of a separate process: calls the function directly."""
    return lambda _, settings: (measure(dict(settings)), Spent(1.0, 10**8, 1.0, ""))


def test_ceilings(monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(ceilings, "GEMM", 32)
    monkeypatch.setattr(ceilings, "CONV", (1, 8, 6, 8))
    monkeypatch.setattr(ceilings, "COPY_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "_FILE_BYTES", 1 << 12)
    monkeypatch.setattr(ceilings, "cpu_precisions", lambda: ("fp32", "bf16"))
    result = ceilings.run(short=True)
    limits = {row["limit"] for row in checked("ceilings", result)}
    assert {"matrix product fp32", "3x3 convolution bf16", "memory copy", "write and fsync"} <= limits
    found: Any = result["ceilings"]
    assert found["cpu"]["memory copy"] > 0
    assert found["disk"].keys() == {"write and fsync", "write and fsync, 4 files at once"}
    assert min(found["disk"].values()) > 0


def test_without_instructions_for_bf16_nothing_is_timed_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda dtype: dtype == torch.float32)
    assert {one["precision"] for one in model._full("cpu")} == {"fp32"}
    assert {precision for _, _, precision, _ in end_to_end._settings("cpu", short=False)} == {"fp32"}
    monkeypatch.setattr(onednn, "available", lambda dtype: True)
    assert {one["precision"] for one in model._full("cpu")} == {"fp32", "bf16"}


def test_share_of_the_limit_is_that_of_the_nearer_limit() -> None:
    # 100 GFLOP/s and 10 GB/s: 1 GFLOP takes 10 ms, 0.5 GB takes 50 ms.
    share = ceilings.share_of_limit
    assert share(0.1, 1e9, 0.5e9, CEILINGS, "cpu", "fp32") == pytest.approx(0.5)
    assert share(0.1, 9e9, 0.5e9, CEILINGS, "cpu", "fp32") == pytest.approx(0.9)
    assert share(0.1, 9e9, 0.5e9, CEILINGS, "cuda", "fp32") is None
    assert share(0.1, 9e9, 0.5e9, CEILINGS, "cpu", "fp16") is None
    assert share(0.1, 0, 0.5e9, CEILINGS, "cpu", "8 bits") == pytest.approx(0.5)


def test_kernels(monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(kernels, "PIXELS", (12, 16))
    monkeypatch.setattr(kernels, "FEATURES", (1, 8, 6, 8))
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 0)
    rows = checked("kernels", kernels.run(short=True, ceilings=CEILINGS))
    ops = {(row["op"], row["precision"]) for row in rows}
    for op, precision in ops:
        same = [row for row in rows if (row["op"], row["precision"]) == (op, precision)]
        assert same[0]["by"] == "flowreel"
        assert len(same) >= 2, f"{op}: nothing to compare with"
        assert all((row["its time / ours"] is None) == (row["by"] == "flowreel") for row in same)
    listed = {"correlation", "correlation + LeakyReLU into a slice", "correlation, backward", "warp", "channel_norm"}
    listed |= {"quantise", "flow_to_color"}
    assert {op for op, _ in ops} == listed  # the ones below are listed only on a GPU
    others = [kernels._yuv_to_rgb("cpu"), kernels._bias_leaky_relu("cpu", "bf16")]
    inputs = (kernels._normalise_frames, kernels._refining_input, kernels._fusing_input, kernels._enlarge_flow)
    for kernel in (*others, *(make("cpu", "fp16") for make in inputs)):
        for way in kernel.ways.values():
            way()
    assert all(row["of the limit"] > 0 for row in rows if row["precision"] == "fp32")


def test_inputs_outgrow_the_caches_and_come_in_turn() -> None:
    made = kernels._many(lambda: (torch.rand(1 << 20),))
    assert len({tensors[0].data_ptr() for tensors in made}) == len(made) > 60
    seen: list[int] = []
    call = kernels._without_gradients(seen.append, [(1,), (2,), (3,)])
    for _ in range(4):
        call()
    assert seen == [1, 2, 3, 1]


def test_one_kernels_inputs_are_freed_before_the_next_ones_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PIXELS", (12, 16))
    monkeypatch.setattr(kernels, "FEATURES", (1, 8, 6, 8))
    monkeypatch.setattr(kernels, "BEYOND_CACHES", 0)
    every = iter(kernels.kernels("cpu"))
    first = weakref.ref(next(every))
    assert next(every).name == "correlation"
    assert first() is None


def test_model(monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    small = networks.random_weights
    monkeypatch.setattr(networks, "random_weights", lambda model, folder: small(model, folder, width=1 / 8))
    monkeypatch.setattr(model, "SIZES", {"64x64": (64, 64), "1024x448": (64, 128)})
    monkeypatch.setattr(model, "in_module", in_this_process(model._measure))
    several = [model._settings("FlowNet2S", "fp32"), model._settings("FlowNet2C", "fp32", batch=2, size="64x64")]
    monkeypatch.setattr(model, "_short", lambda: iter([*several, model._settings("FlowNet2C", "bf16")]))
    rows = checked("model", model.run(short=True, ceilings=CEILINGS))
    assert [row["model"] for row in rows] == ["FlowNet2S", "FlowNet2C", "FlowNet2C"]
    for row in rows:
        assert row["pairs/s"]["median"] * row["ms/pair"]["median"] == pytest.approx(1000)
        assert row["of the limit"] > 0
        assert row["peak MB"] == 100


def test_every_network_and_precision_is_measured_once() -> None:
    every = list(map(tuple, (one.items() for one in model._full("cpu"))))
    assert len(set(every)) == len(every)
    assert {dict(one)["model"] for one in every} == set(model.FULL)
    assert {dict(one)["size"] for one in every} == set(model.SIZES)


def test_work_of_a_network_is_that_of_its_layers() -> None:
    """The number of operations equals a count from the shapes of each layer."""
    counted = 0

    def add(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal counted
        # A convolution sums over input channels at each output; a transposed one adds to output channels at each input.
        places = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output
        other = layer.out_channels if places is inputs[0] else layer.in_channels
        counted += 2 * places.numel() * other * layer.kernel_size[0] * layer.kernel_size[1]

    net = build_model("FlowNet2C", width=1 / 8).eval()
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(add)
    frame = torch.zeros(1, 3, 64, 128)
    with torch.no_grad():
        net(frame, frame)
    features = 256 // 8
    correlation = 2 * 21 * 21 * features * (64 // 8) * (128 // 8)
    assert networks.flops("FlowNet2C", 64, 128, 1 / 8) == counted + correlation


def test_decode(folder: Path, checked: Any) -> None:
    rows = checked("decode", decode.run(short=True))
    assert {row["by"] for row in rows} >= {decode.OURS, "PyAV, 1 thread, no RGB", "OpenCV VideoCapture"}
    assert {(row["frames"], row["size"]) for row in rows} == {(FRAMES, f"{WIDTH}x{HEIGHT}")}


def test_encode(folder: Path, monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(encode, "FIELD", "field.flo")
    rows = checked("encode", encode.run(short=True, ceilings=CEILINGS))
    by_name = {row["what"]: row for row in rows}
    assert set(encode.OUTPUTS) < set(by_name)
    flo = by_name[".flo"]
    assert flo["kB a flow"] == pytest.approx((12 + 8 * HEIGHT * WIDTH) / 1e3)
    assert flo[".flo / this"] == pytest.approx(1, rel=1e-3)
    assert by_name["store, blosc"][".flo / this"] > 2  # one vector throughout
    assert "codec pcodec, 1 thread" in by_name


def test_classical(folder: Path, monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(classical, "CLIPS", ("clip.mp4", "clip.mp4"))
    monkeypatch.setattr(classical, "FRAMES", 3)
    rows = checked("classical", classical.run(short=True))
    assert [row["method"] for row in rows][-1] == classical.OURS
    assert {"OpenCV DIS medium", "OpenCV Farneback"} < {row["method"] for row in rows}


def test_accuracy(folder: Path, monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(accuracy, "JUDGED", ("one",))
    monkeypatch.setattr(accuracy, "ALSO", ())
    one, mean = checked("accuracy", accuracy.run())
    assert one["no motion"] == pytest.approx(5**0.5)
    assert {key: mean[key] for key in one if key != "pair"} == {key: one[key] for key in one if key != "pair"}


@pytest.mark.usefixtures("data_dir")
@pytest.mark.parametrize("name", [*accuracy.JUDGED, *accuracy.ALSO])
def test_the_truth_that_accuracy_is_judged_by(name: str) -> None:
    pair = data.true_pair(name)
    assert pair.first.shape == pair.second.shape == (*pair.flow.shape[:2], 3)
    assert pair.valid.any()


def test_clips(folder: Path, checked: Any) -> None:
    (row,) = checked("clips", clips.run())
    assert (row["flows"], row["size"]) == (FRAMES - 1, f"{WIDTH}x{HEIGHT}")
    assert row[".flo MB"] == pytest.approx((FRAMES - 1) * (12 + 8 * HEIGHT * WIDTH) / 1e6)
    assert row[".flo / store"] == pytest.approx(row[".flo MB"] / row["store MB"])


def test_old_way(folder: Path, monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(old_way, "CLIP", "clip.mp4")
    rows = checked("old_way", old_way.run(short=True))
    sizes = {(row["way"], row["step"]): row["MB on disk"] for row in rows}
    assert sizes["old", "frames to .flo"] == pytest.approx((FRAMES - 1) * (12 + 8 * HEIGHT * WIDTH) / 1e6)
    steps = [size for (way, step), size in sizes.items() if way == "old" and step != "all of it"]
    assert sizes["old", "all of it"] == pytest.approx(sum(steps))
    assert sizes["old / flowreel", ""] == pytest.approx(sum(steps) / sizes["flowreel", "all of it"])


def test_memory(folder: Path, monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    monkeypatch.setattr(memory, "CLIP", "clip.mp4")

    def run(line: Sequence[str]) -> Spent:
        stop = next(int(word.removeprefix("--stop=")) for word in line if word.startswith("--stop="))
        return Spent(1.0, 10**8 + 10**5 * stop, 1.0, "")

    monkeypatch.setattr(memory, "measured", run)
    short, long = checked("memory", memory.run())
    assert (short["frames"], long["frames"]) == memory.LENGTHS
    assert short["peak MB (median)"] == pytest.approx(112)
    assert long["ratio"] == pytest.approx(218.9 / 112)


def test_startup(monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    every = startup._commands(Path("x"))
    assert {"import flowreel", "flowreel --help"} < set(every)
    monkeypatch.setattr(startup, "_commands", lambda _: {"python -c pass": every["python -c pass"]})
    (row,) = checked("startup", startup.run(short=True))
    assert row["seconds"]["n"] == 3


def test_scaling(monkeypatch: pytest.MonkeyPatch, checked: Any) -> None:
    axes = [scaling.Point("length", n, 64, 64, n) for n in (3, 5)]
    several = [*axes, scaling.Point("outputs", 2, 64, 64, 4, outputs=scaling.OUTPUTS[:2])]
    monkeypatch.setattr(scaling, "points", lambda _: iter(several))
    monkeypatch.setattr(scaling, "in_module", in_this_process(scaling._measure))
    rows = checked("scaling", scaling.run(short=True))
    assert [(row["grows"], row["x"], row["outputs"]) for row in rows] == [
        ("length", "3", 1),
        ("length", "5", 1),
        ("outputs", "2", 2),
    ]
    assert all(0 < row["the model is at work"] <= 1 for row in rows)


@pytest.mark.parametrize("short", [False, True])
def test_scaling_goes_as_far_as_it_says(short: bool) -> None:
    every = list(scaling.points(short))
    names = SimpleNamespace(**{axis: [p for p in every if p.grows == axis] for axis in {p.grows for p in every}})
    assert [p.x for p in names.length] == ([10, 100] if short else [10, 100, 1000, 10_000])
    assert (names.resolution[0].width, names.resolution[0].height) == (256, 256)
    assert (names.resolution[-1].width, names.resolution[-1].height) == ((1920, 1080) if short else (3840, 2160))
    assert len(names.batch) > 2
    assert names.outputs[0].outputs == ("x.zarr",)
    assert len(names.outputs[-1].outputs) >= 5
