"""The batches of a training run: scenes painted on the host or on the network's device, each used several times."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch

from flowreel.engine.device import send, to_device
from flowreel.engine.models.layers import STRIDE
from flowreel.engine.scenes.scene import ends
from flowreel.engine.training.config import MOST_STEPS, TrainConfig
from flowreel.engine.training.drawing import SceneConfig, draw_pair
from flowreel.engine.training.packing import Packed, pack
from flowreel.engine.training.painting import Batch, Painter
from flowreel.engine.training.pairs import sample_pair
from flowreel.engine.training.processes import made_in_order

SCENES = SceneConfig()  # those of a run, in training and held out


def batches(
    config: TrainConfig, step: int, workers: int, painter: Painter | None = None
) -> Generator[Batch, None, None]:
    """The batches from step ``step`` on, each rendered batch used ``reuse`` times in a row.

    With a ``painter`` they are painted and augmented on its device, else on the host.
    """
    last = config.steps if config.minutes is None else MOST_STEPS
    scenes = _Scenes(config, step // config.reuse, -(-last // config.reuse), painted=painter is None)
    made = made_in_order(scenes, len(scenes), workers) if workers else (scenes(index) for index in range(len(scenes)))
    generator = torch.Generator()
    skip = step % config.reuse
    with closing(made):
        for scene in made:
            batch = scene if painter is None else painter.paint(scene)
            for _ in range(skip, config.reuse):
                if step == last:
                    return
                step += 1
                generator.manual_seed((config.seed << 42) + step)
                yield augment(batch, config.height, config.width_px, generator)
            skip = 0


class _Scenes:
    """The batches ``first`` to ``last`` (exclusive) of a run, somewhat larger than the network's input, for cropping.

    Painted, or as the packed numbers that a ``Painter`` takes. Pickled, it takes along how scenes are drawn.
    """

    def __init__(self, config: TrainConfig, first: int, last: int, *, painted: bool) -> None:
        self.config, self.first, self.last, self.painted, self.scenes = config, first, last, painted, SCENES

    def __len__(self) -> int:
        return self.last - self.first

    def __call__(self, index: int) -> Any:
        config = self.config
        make = render if self.painted else draw
        number = (self.first + index) * config.batch
        size = config.height + STRIDE, config.width_px + STRIDE
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more gain nothing; without workers, the training in this process keeps its threads
        try:
            return make(config.seed, number, config.batch, *size, self.scenes)
        finally:
            torch.set_num_threads(threads)


def render(seed: int, number: int, count: int, height: int, width: int, scenes: SceneConfig | None = None) -> Batch:
    """``count`` scenes of a seed, from ``number`` on, painted and stacked. ``scenes``: how they are drawn."""
    pairs = [sample_pair((seed << 42) + number + i, height, width, scenes or SCENES) for i in range(count)]
    return (
        torch.stack([pair.first for pair in pairs]),
        torch.stack([pair.second for pair in pairs]),
        torch.stack([pair.flow for pair in pairs]),
        torch.stack([pair.visible for pair in pairs]),
    )


def draw(
    seed: int, number: int, count: int, height: int, width: int, scenes: SceneConfig | None = None
) -> list[Packed]:
    """The same scenes as ``render``, but not painted yet."""
    return pack([draw_pair((seed << 42) + number + i, height, width, scenes or SCENES) for i in range(count)])


def augment(batch: Batch, height: int, width: int, generator: torch.Generator) -> Batch:
    """Random crop and channel order, the same for the whole batch, and flips for each sample; the flow follows.

    A pixel whose match the crop cuts off is no longer visible.
    """
    first, second, flow, visible = batch
    top, left = (
        int(torch.randint(most - size + 1, (), generator=generator))
        for most, size in zip(flow.shape[2:], (height, width), strict=True)
    )
    rows, columns = slice(top, top + height), slice(left, left + width)
    channels = send(torch.randperm(3, generator=generator), flow.device)
    first, second = first[:, channels, rows, columns], second[:, channels, rows, columns]
    flow = flow[:, :, rows, columns]
    visible = visible[:, rows, columns] & ends(flow)[2]
    for axis in (-1, -2):  # mirror left-right, then up-down; the flow along that axis changes sign
        mirrored = send(torch.randint(2, (len(flow),), generator=generator).bool(), flow.device)
        picture = mirrored.view(-1, 1, 1, 1)
        first, second = (torch.where(picture, frames.flip(axis), frames) for frames in (first, second))
        turned = flow.flip(axis)
        turned[:, -1 - axis].neg_()  # component 0 is along the last axis
        flow = torch.where(picture, turned, flow)
        visible = torch.where(mirrored.view(-1, 1, 1), visible.flip(axis), visible)
    return first, second, flow, visible


def painter_on(device: torch.device) -> Painter:
    """A painter of a run's scenes."""
    return Painter(device, SCENES.bank)


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch, on ``device``."""
    first, second, flow, visible = (to_device(part, device) for part in batch)
    return first, second, flow, visible
