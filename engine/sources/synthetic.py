"""Frames of a procedural scene, a source whose true flow is known.

synthetic:objects
synthetic:objects?size=640x360&frames=48&rate=25&seed=3
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import FlowInfo, Frame, SourceId
from flowreel.engine.errors import UsageError
from flowreel.engine.scenes.named import SCENES, named_scene
from flowreel.engine.sources.independent import IndependentFrames
from flowreel.engine.sources.kinds import SYNTHETIC
from flowreel.engine.sources.timecode import require_no_video_file, select_frames

SMALLEST, LARGEST = 16, 8192  # px: room for something to move; a sensible limit for a frame
MOST_FRAMES = 5_000_000  # beyond, "translate" goes farther than float32 counts pixels, and the times fill the memory


@dataclass(frozen=True)
class SyntheticConfig:
    """What a name ``synthetic:...`` specifies. Defaults: long enough to watch, small enough for a CPU."""

    scene: str
    width: int = 512  # px, a multiple of the networks' 64
    height: int = 384  # px
    frames: int = 32
    rate: Fraction = Fraction(25)  # frames per second
    seed: int = 0

    @classmethod
    def parse(cls, name: str) -> SyntheticConfig:
        """Read ``synthetic:SCENE?key=value&...``. Raises UsageError for an unknown scene, key or value."""
        scene, _, query = name.removeprefix(SYNTHETIC).partition("?")
        if scene not in SCENES:
            raise UsageError(f"no synthetic scene is called {scene!r}; there are {', '.join(sorted(SCENES))}")
        given: dict[str, int | Fraction] = {}
        for part in filter(None, query.split("&")):
            key, _, value = part.partition("=")
            values = _PARAMETERS[key](value) if key in _PARAMETERS else None
            if values is None:
                raise UsageError(
                    f"{part!r} in {name} is not understood; expected size=WIDTHxHEIGHT, frames=N, rate=FPS, seed=N "
                    f"(sides of {SMALLEST} to {LARGEST} px, at most {MOST_FRAMES} frames)"
                )
            given.update(values)
        return cls(scene, **given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """The name that ``parse`` reads, with only what differs from the defaults."""
        other = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        parts = [f"size={self.width}x{self.height}"] if other & {"width", "height"} else []
        parts += [f"{name}={getattr(self, name)}" for name in ("frames", "rate", "seed") if name in other]
        return SYNTHETIC + self.scene + ("?" + "&".join(parts) if parts else "")


def _size(text: str) -> dict[str, int] | None:
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])
    return {"width": width, "height": height} if all(SMALLEST <= side <= LARGEST for side in (width, height)) else None


def _frames(text: str) -> dict[str, int] | None:
    return {"frames": int(text)} if re.fullmatch(r"\d{1,7}", text, re.ASCII) and int(text) <= MOST_FRAMES else None


def _rate(text: str) -> dict[str, Fraction] | None:
    if not re.fullmatch(r"\d{1,6}(\.\d{1,6}|/\d{1,6})?", text, re.ASCII) or re.search(r"/0+$", text):
        return None
    rate = Fraction(text)
    return {"rate": rate} if rate > 0 else None


def _seed(text: str) -> dict[str, int] | None:
    return {"seed": int(text)} if re.fullmatch(r"\d{1,9}", text, re.ASCII) else None


_PARAMETERS = {"size": _size, "frames": _frames, "rate": _rate, "seed": _seed}


def open_synthetic(name: str, select: SelectConfig, device: str = "cpu") -> SyntheticSource:
    """Open ``synthetic:SCENE`` with optional parameters, as the module's docstring shows.

    Raises:
        UsageError: no such scene, or parameters or a selection that make no sense.
        TooFewFramesError: the selection leaves fewer than two frames.
    """
    require_no_video_file(select, f"{name} is a rendered scene")
    return SyntheticSource(SyntheticConfig.parse(name), select)


def identify(name: str) -> SourceId:
    """See ``Kind``: the scene with all its parameters. Raises UsageError for what is not understood."""
    return SourceId(str(SyntheticConfig.parse(name)))


class SyntheticSource(IndependentFrames):
    """Renders each frame on demand; nothing is kept."""

    def __init__(self, config: SyntheticConfig, select: SelectConfig) -> None:
        times_s = np.arange(config.frames) * config.rate.denominator / config.rate.numerator
        wanted = select_frames(select, times_s, str(config))
        info = FlowInfo(
            height=config.height,
            width=config.width,
            frame_rate=config.rate / select.step,
            frame_count=len(wanted),
            source=SourceId(str(config), duration_s=float(config.frames / config.rate)),
        )
        super().__init__(info, wanted, times_s, "synthetic", notes=[])
        self._scene = named_scene(config.scene, config.height, config.width, config.seed)

    def frame(self, number: int) -> Frame:
        with torch.device("cpu"):  # whatever the caller's default device
            return Frame(self._scene.render(number), number, float(self.times_s[number]))

    def flow(self, frame: int, frame_to: int) -> tuple[Tensor, Tensor]:
        """The true flow between two frames, given by their numbers in the source.

        Returns:
            The flow, (2, H, W) float32 pixels, and where its end point is visible in ``frame_to``, (H, W) bool.
        """
        return self._scene.flow(frame, frame_to)
