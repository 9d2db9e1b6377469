"""The part ``training`` of ``python -m benchmarks gpu`` detects a GPU that trains differently from a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import training as part
from benchmarks.gpu.findings import Settings
from flowreel.engine.training import batches
from flowreel.engine.training import train as training
from flowreel.engine.training.packing import Packed
from flowreel.engine.training.painting import Batch, Painter
from flowreel.engine.training.train import Progress
from tests.fakes.gpu_parts import Found

CONFIG = replace(part.DRY, batch_norm=False)
pytestmark = pytest.mark.usefixtures("small_textures")


@pytest.mark.parametrize("model", part.KERNELS)
def test_a_device_that_does_as_a_cpu_passes(model: str, findings: Found, settings: Settings) -> None:
    part._compare(findings, settings, replace(CONFIG, model=model))
    assert list(findings.verdicts.values()) == [True] * 3


@pytest.mark.parametrize(("plane", "factor", "wrong"), [(2, 1.01, "first loss"), (0, 0.5, "gradients")])
def test_a_device_that_computes_otherwise_fails(
    plane: int, factor: float, wrong: str, findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on(device: torch.device, batch: Batch) -> Any:
        return tuple((x * factor).to(x.dtype) if place == plane else x for place, x in enumerate(batch))

    monkeypatch.setattr(batches, "on", on)
    part._compare(findings, settings, CONFIG)
    assert [passed for name, passed in findings.verdicts.items() if wrong in name] == [False]


def test_what_does_not_run_by_our_kernels_on_a_card_fails(
    findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part, "KERNELS", {"FlowNet2C": {"correlation", "correlation_backward", "warp"}})
    part._compare(findings, settings, CONFIG)
    assert not findings.verdicts["FlowNet2C: there and back by our kernels"]


@pytest.mark.parametrize(
    ("told", "finite", "learns"),
    [([4.0, 3.0], True, True), ([4.0, 3.9], True, False), ([4.0, float("nan")], False, False)],
)
def test_a_loss_that_does_not_fall_fails(
    told: list[float],
    finite: bool,
    learns: bool,
    findings: Found,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tiny_flownetc: str,
) -> None:
    def telling(config: Any, out: Path, **options: Any) -> Path:
        for place, loss in enumerate(told):
            options["report"](Progress(20 * place + 20, place + 1.0, loss, 1.0, 1.0, 0.0))
        return Path(tiny_flownetc)

    monkeypatch.setattr(training, "train", telling)
    part._train(findings, replace(settings, dry=False), part.DRY)
    verdicts = findings.verdicts
    assert (verdicts["fp32: every loss is finite"], verdicts["fp32: it learns"]) == (finite, learns)
    assert findings["rows"][0]["steps_s"] == 20


def test_scenes_painted_as_on_a_cpu_pass(findings: Found, settings: Settings) -> None:
    part._paint(findings, settings, CONFIG)
    assert list(findings.verdicts.values()) == [True]


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_scenes_painted_otherwise_fail(
    place: int, findings: Found, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(Painter):
        def paint(self, parts: Sequence[Packed]) -> Batch:
            painted = list(super().paint(parts))
            painted[place] = painted[place].roll(1, -1)
            return painted[0], painted[1], painted[2], painted[3]

    monkeypatch.setattr(batches, "Painter", Wrong)
    part._paint(findings, settings, CONFIG)
    assert list(findings.verdicts.values()) == [False]
