"""OpenCV's DIS and Farneback beside the shipped weights, on the same frames in one run: pairs a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.accuracy import FRESH, farneback
from benchmarks.data import found
from benchmarks.measure import Action, Effort, Sample, alternated, ratio
from flowreel.engine.config import ModelConfig, SelectConfig
from flowreel.engine.inference import load_network
from flowreel.engine.sources import open_source

CLIPS = ("person_asl_walk_640x480.mkv", "sintel_cave_1024x436.mp4")
FRAMES = 5
MODELS = ("FlowNet2C", "FlowNet2CSS")
OURS = f"flowreel {MODELS[-1]}, baseline weights"
PRESETS = {
    "ultrafast": cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST,
    "fast": cv2.DISOPTICAL_FLOW_PRESET_FAST,
    "medium": cv2.DISOPTICAL_FLOW_PRESET_MEDIUM,
}


def run(short: bool = False) -> dict[str, object]:
    """The decoded frames are in memory; every method gets RGB as decoded, and converts it as it needs.

    Speed alone says little: the accuracy case has the methods' errors.
    """
    effort = Effort(least=2, most=4, cap_s=6.0) if short else Effort(least=5, most=20, cap_s=25.0)
    rows: list[dict[str, Any]] = []
    for clip in CLIPS[1:] if short else CLIPS:
        frames = [frame.rgb for frame in open_source(found("videos", clip), SelectConfig(stop=FRAMES))]
        pairs = list(itertools.pairwise(frames))
        timings = alternated(_methods(frames, pairs), effort)
        for method, seconds in timings.items():
            rows.append(
                {
                    "clip": clip,
                    "method": method,
                    "pairs/s": Sample.of(seconds).rate(len(pairs)).cell(),
                    "its time / ours": None if method == OURS else ratio(seconds, timings[OURS]),
                }
            )
    return {"opencv_threads": cv2.getNumThreads(), "torch_threads": torch.get_num_threads(), "rows": rows}


def _methods(frames: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Action]:
    pictures = [np.ascontiguousarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    methods = {f"OpenCV DIS {name}": _in_opencv(pictures, _dis(preset)) for name, preset in PRESETS.items()}
    methods["OpenCV Farneback"] = _in_opencv(pictures, farneback)
    return methods | {f"flowreel {model}, baseline weights": _network(model, pairs) for model in MODELS}


def _in_opencv(pictures: Sequence[Any], flow: Callable[[Any, Any], Any]) -> Action:
    def action() -> None:
        greys = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in pictures]  # each frame once, as in a video
        for first, second in itertools.pairwise(greys):
            flow(first, second)

    return action


def _dis(preset: int) -> Callable[[Any, Any], Any]:
    dis = cv2.DISOpticalFlow.create(preset)
    return lambda first, second: dis.calc(first, second, FRESH)


def _network(model: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Action:
    inference = load_network(ModelConfig(model=model, device="cpu")).fitted(*pairs[0][0].shape[1:])
    batches = [pairs[at : at + inference.batch] for at in range(0, len(pairs), inference.batch)]

    def action() -> None:
        for batch in batches:
            inference.fit.undo(inference.flow(*(torch.stack(side) for side in zip(*batch, strict=True))))

    return action
