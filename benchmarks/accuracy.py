"""End-point error of the shipped weights on pairs with true flow, beside no motion, Farneback and DIS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import TruePair, true_pair
from flowreel.engine.config import ModelConfig
from flowreel.engine.inference import Network, load_network

FRESH: Any = None  # OpenCV's argument for an initial flow or an output buffer: neither
Flow = npt.NDArray[np.float32]
JUDGED = ("chairs_1", "chairs_3", "exact_translate_bbb_512x384", "exact_rotzoom_bbb_640x448", "sintel_alley_1_0001")
ALSO = ("middlebury_rubberwhale_gray", "kitti2015")


def run() -> dict[str, object]:
    """One row per pair, and the mean over ``JUDGED``, by which the shipped weights are judged. None was trained on."""
    network = load_network(ModelConfig(device="cpu"))
    methods: dict[str, Callable[[TruePair], Flow]] = {
        "no motion": lambda pair: np.zeros_like(pair.flow),
        "Farneback": lambda pair: farneback(*grey(pair)),
        "DIS medium": dis,
        "flowreel baseline": partial(ours, network),
    }
    rows: list[dict[str, Any]] = []
    for name in (*JUDGED, *ALSO):
        pair = true_pair(name)
        rows.append({"pair": name} | {method: epe(compute(pair), pair) for method, compute in methods.items()})
    mean: dict[str, Any] = {"pair": f"mean of the first {len(JUDGED)}"}
    mean |= {key: float(np.mean([row[key] for row in rows[: len(JUDGED)]])) for key in rows[0] if key != "pair"}
    rows.insert(len(JUDGED), mean)
    cut = 1 - mean["flowreel baseline"] / mean["no motion"]
    return {"unit": "px, mean end-point error where the truth is known", "error_cut": round(cut, 4), "rows": rows}


def epe(flow: Flow, pair: TruePair) -> float:
    return float(np.hypot(*(flow - pair.flow)[pair.valid].T).mean())


def ours(network: Network, pair: TruePair) -> Flow:
    model = network.fitted(*pair.flow.shape[:2])
    frames = (torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in (pair.first, pair.second))
    flow = model.fit.undo(model.flow(*frames))
    return np.asarray(flow[0].permute(1, 2, 0).numpy())


def farneback(first: Any, second: Any) -> Any:
    return cv2.calcOpticalFlowFarneback(first, second, FRESH, 0.5, 5, 15, 3, 5, 1.2, 0)


def dis(pair: TruePair) -> Flow:
    return np.asarray(cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey(pair), FRESH))


def grey(pair: TruePair) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    first, second = (np.asarray(cv2.cvtColor(p, cv2.COLOR_RGB2GRAY), np.uint8) for p in (pair.first, pair.second))
    return first, second
