"""The demonstration: a moving scene is rendered to a real video file, run through the main job, and compared with its
true flow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowreel.engine import api
from flowreel.engine.config import RunConfig, SelectConfig
from flowreel.engine.errors import OutputExistsError
from flowreel.engine.inference import load_network
from flowreel.engine.outputs import ProgressHook
from flowreel.engine.publish import atomic_path, make_folder, write_errors
from flowreel.engine.run_report import RunReport
from flowreel.engine.sources.synthetic import SyntheticConfig, SyntheticSource
from flowreel.kernels.flow_color import flow_to_color
from flowreel.sinks import VideoWriter, open_store, write_png

SCENE = SyntheticConfig("objects", frames=48)


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration made and measured."""

    run: RunReport
    clip: Path
    clip_bytes: int
    comparison: Path  # a picture
    epe: float  # px, mean end-point error against the truth, all pixels of all flows
    mean_motion: float  # px; also the error of predicting no motion


def demo(
    folder: Path,
    *,
    weights: str = "baseline",
    device: str = "auto",
    overwrite: bool = False,
    progress: ProgressHook | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> DemoReport:
    """Renders ``scene.mp4``, computes ``scene.zarr`` and ``flow.mp4`` from it, and compares with the truth.

    ``comparison.png`` shows the middle frame, its true flow, and the flow that was computed.

    progress: as for ``flowreel.run``. say: called with a line of text as each step begins.

    Raises:
        OutputExistsError: one of these files exists, and ``overwrite`` is not set.
        What ``flowreel.run`` raises.
    """
    clip, comparison = folder / "scene.mp4", folder / "comparison.png"
    outputs = api.output_names([folder / "scene.zarr", folder / "flow.mp4"], clip)
    for path in () if overwrite else (clip, *map(Path, outputs), comparison):
        if os.path.lexists(path):
            raise OutputExistsError(f"{path} is already there: pass --overwrite to replace it, or name another folder")
    config = RunConfig.of(weights=weights, device=device, overwrite=overwrite)
    network = load_network(config.model)  # before anything is there that the next call would have to replace
    with write_errors(folder):
        make_folder(folder)
    with closing(SyntheticSource(SCENE, SelectConfig())) as scene:
        say(f"rendering {scene.info.frame_count} frames into {clip}")
        render(scene, clip)
        say("computing their flow")
        report = api.run_one(clip, outputs, config, lambda: network, progress)
        say("comparing it with the truth")
        store, errors, motions = open_store(outputs[0]), [], []
        for i, flow in enumerate(store):
            truth = scene.flow(i, i + 1)[0].numpy()
            errors.append(np.hypot(*(flow - truth)).mean())
            motions.append(np.hypot(*truth).mean())
        middle = len(store) // 2
        write_png(comparison, beside(scene, middle, store[middle]))
    return DemoReport(
        run=report,
        clip=clip,
        clip_bytes=clip.stat().st_size,
        comparison=comparison,
        epe=float(np.mean(errors)),
        mean_motion=float(np.mean(motions)),
    )


def beside(scene: SyntheticSource, number: int, flow: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """A frame, its true flow and ``flow`` (2, H, W) side by side, both flows on one colour scale: (H, 3 W, 3)."""
    truth = scene.flow(number, number + 1)[0].numpy()
    frame = next(scene.pictures_from(number)).develop().rgb.permute(1, 2, 0).numpy()
    longest = float(np.hypot(*truth).max()) or None
    painted = (flow_to_color(each.transpose(1, 2, 0), longest) for each in (truth, flow))
    return np.concatenate([frame, *painted], axis=1)


def render(scene: SyntheticSource, path: Path) -> None:
    """Encodes a scene's frames as H.264, the way a camera or an editor would hand them over."""
    info = scene.info
    with write_errors(path), atomic_path(path) as temporary:
        writer = VideoWriter(temporary, path.suffix, info.height, info.width, info.frame_rate)
        try:
            for frame in scene:
                writer.encode(frame.rgb.permute(1, 2, 0).contiguous().numpy(), frame.timestamp_s)
            writer.finish()
        except BaseException:
            writer.discard()
            raise
