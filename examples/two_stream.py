"""Trains a two-stream classifier on optical flow that is computed while it trains.

    python examples/two_stream.py

First it renders short clips. The background is warm or cool, and it slides left, slides right, comes closer or turns.
A clip's class is its background together with its motion, so neither the picture nor the motion alone is enough:

    frame ─────────────────> spatial stream ──┐
      │                                       ├─> sum of scores ─> one of eight classes
      └─ FlowClips: 6 flows ─> temporal stream ┘

The first epoch computes the flow and stores it in a cache, from which later epochs read it. At the end the script
prints how many of the held-out clips are recognised by both streams together, and by each alone.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import av
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.utils.data import DataLoader

import flowreel

GROUNDS = ("warm", "cool")
MOTIONS = ("slides left", "slides right", "comes closer", "turns")
CLASSES = [f"{ground}, {motion}" for ground in GROUNDS for motion in MOTIONS]
HEIGHT, WIDTH, LENGTH = 96, 128, 6  # pixels; flows in a clip, so seven frames
BOUND = 6.0  # pixels of motion that become 1


# -- The clips -----------------------------------------------------------------------------------------------------


def ground(kind: str, generator: torch.Generator) -> Tensor:
    """(1, 3, 256, 256) in 0..255: patches of random colours, mostly red or mostly blue."""
    patches = torch.rand(1, 3, 32, 32, generator=generator)
    patches = functional.interpolate(patches, size=(256, 256), mode="bilinear", align_corners=False)
    strong = torch.tensor([230.0, 120.0, 60.0] if kind == "warm" else [60.0, 120.0, 230.0])
    return patches * strong[:, None, None]


def moved(picture: Tensor, motion: str, speed: float, frame: int) -> Tensor:
    """(3, HEIGHT, WIDTH) uint8: the middle of the picture, after ``frame`` steps of about ``speed`` pixels each."""
    slide = {"slides left": speed, "slides right": -speed}.get(motion, 0.0) * frame
    zoom = (1 - speed / 60) ** frame if motion == "comes closer" else 1.0
    angle = speed / 40 * frame if motion == "turns" else 0.0
    y, x = torch.meshgrid(torch.arange(HEIGHT) - HEIGHT / 2, torch.arange(WIDTH) - WIDTH / 2, indexing="ij")
    seen_x = zoom * (x * math.cos(angle) - y * math.sin(angle)) + slide
    seen_y = zoom * (x * math.sin(angle) + y * math.cos(angle))
    grid = torch.stack((seen_x, seen_y), -1)[None] / 128  # from -1 to 1 across the picture
    seen = functional.grid_sample(picture, grid, padding_mode="reflection", align_corners=False)
    return seen[0].round().clamp(0, 255).to(torch.uint8)


def render(folder: Path, name: str, clips_a_class: int, seed: int) -> tuple[list[Path], list[int]]:
    """Renders videos of each class. Returns their paths, and the number of the class of each."""
    generator = torch.Generator()
    folder.mkdir(parents=True, exist_ok=True)
    paths, labels = [], []
    for label, (kind, motion) in enumerate((kind, motion) for kind in GROUNDS for motion in MOTIONS):
        for number in range(clips_a_class):
            # A seed for each clip: it stays the same, and its cached flow valid, if the number of clips changes.
            generator.manual_seed(1_000_000 * seed + 1000 * label + number)
            picture = ground(kind, generator)
            speed = 2 + 2 * float(torch.rand((), generator=generator))
            paths.append(folder / f"{name}-{label}-{number}.mp4")
            labels.append(label)
            with av.open(str(paths[-1]), "w") as container:
                stream = container.add_stream("libx264", rate=25, options={"crf": "16"})
                stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
                for frame in range(LENGTH + 1):
                    pixels = moved(picture, motion, speed, frame).permute(1, 2, 0).contiguous().numpy()
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode())
    return paths, labels


# -- The network ---------------------------------------------------------------------------------------------------


def stream(channels: int) -> nn.Sequential:
    """(N, channels, h, w) to scores (N, classes)."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(3),  # 3 x 3 regions: a turn moves the left side the other way than the right
        nn.Flatten(),
        nn.Linear(9 * 32, len(CLASSES)),
    )


class TwoStream(nn.Module):
    """Scores of a frame and of the flow that starts there."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal = stream(3), stream(2 * LENGTH)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The scores (N, classes) of each stream."""
        return self.spatial(batch["rgb"].float() / 127.5 - 1), self.temporal(batch["flow"])


def accuracies(net: TwoStream, loader: DataLoader) -> tuple[float, float, float]:
    """The share of clips recognised by both streams together, by the picture alone, and by the motion alone."""
    right, count = torch.zeros(3), 0
    with torch.no_grad():
        for batch in loader:
            picture, motion = net(batch)
            for place, scores in enumerate((picture + motion, picture, motion)):
                right[place] += (scores.argmax(1) == batch["label"]).sum()
            count += len(batch["label"])
    both, picture_alone, motion_alone = (right / count).tolist()
    return both, picture_alone, motion_alone


# -- Training ------------------------------------------------------------------------------------------------------


def cached(folder: Path) -> int:
    """The number of flows in the caches."""
    return sum(flowreel.open_store(cache).stored for cache in folder.iterdir()) if folder.is_dir() else 0


def main(arguments: list[str] | None = None) -> tuple[float, float, float]:
    """Trains, prints the progress, and returns the ``accuracies`` on the held-out clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("two_stream"), help="for the clips and their flow")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--clips", type=int, default=8, help="training clips per class; half as many are held out")
    parser.add_argument("--workers", type=int, default=0, help="processes that load clips; 0: this one")
    chosen = parser.parse_args(arguments)

    torch.manual_seed(0)
    flows = chosen.folder / "flow"
    # No mirroring: it would turn a clip that slides left into one that slides right.
    options = {"length": LENGTH, "bound": BOUND, "rgb": True, "cache": flows, "model": "FlowNet2C", "open_at_once": 100}
    videos, labels = render(chosen.folder / "videos", "train", chosen.clips, seed=1)
    train = flowreel.FlowClips(videos, labels=labels, random=True, crop=(80, 112), seed=0, **options)
    videos, labels = render(chosen.folder / "videos", "held-out", max(1, chosen.clips // 2), seed=2)
    held_out = flowreel.FlowClips(videos, labels=labels, crop=(80, 112), **options)
    print(f"{train}\n{held_out}")

    workers = {"multiprocessing_context": "spawn", "persistent_workers": True} if chosen.workers else {}
    loader = DataLoader(train, batch_size=16, shuffle=True, num_workers=chosen.workers, **workers)
    net = TwoStream()
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(chosen.epochs):
        train.set_epoch(epoch)
        before, started_s, losses = cached(flows), time.perf_counter(), []
        for batch in loader:
            picture, motion = net(batch)
            loss = functional.cross_entropy(picture + motion, batch["label"])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        seconds, computed = time.perf_counter() - started_s, cached(flows) - before
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, {seconds:.2f} s, {computed} flows computed")

    both, picture_alone, motion_alone = accuracies(net, DataLoader(held_out, batch_size=16))
    print(
        f"held out: {both:.0%} recognised; by the picture alone {picture_alone:.0%}, by motion alone {motion_alone:.0%}"
    )
    return both, picture_alone, motion_alone


if __name__ == "__main__":
    main()
