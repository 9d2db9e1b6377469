"""The settings of a training run, and its learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

from flowreel.engine.errors import UsageError
from flowreel.engine.models import model_name
from flowreel.engine.models.layers import STRIDE

WIDEST = 4  # the same limit as for weights that are read
LARGEST_SIDE = 8192  # pixels
LARGEST_BATCH = 4096
MOST_STEPS = 1 << 28  # of a run limited by minutes: with the largest batch it ends before ``HELD_OUT_SEED``
MOST_SEEDS = 1 << 20  # a sample's 64-bit seed holds the run's seed in the upper bits, its number in the lower

_LONGEST_WARM_UP = 0.05  # share of a run


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Runs with equal values end with the same weights on the same kind of machine."""

    model: str = "FlowNet2C"
    width: float = 0.25  # factor on channel counts; 0.25: 2.7 M parameters for FlowNet2C, 0.125: 0.73 M
    steps: int = 20_000
    minutes: float | None = None  # of training, in place of ``steps``; the result then depends on the machine
    batch: int = 8  # small batches learn most per sample, and samples are the bottleneck
    height: int = 192  # pixels of the network's input; multiple of 64
    width_px: int = 256
    reuse: int = 3  # times each rendered scene is used, each time with new flips and crop: rendering is slow
    learning_rate: float = 8e-4  # the peak, after a warm-up; a cosine leads from there to zero
    warm_up: int = 500  # steps, but at most a twentieth of the run
    weight_decay: float = 1e-4
    clip: float = 1.0  # largest gradient norm
    visible_only: float = 0.33  # initial share of the run in which occluded pixels are left out of the loss
    last_only: bool = False  # of FlowNet2CS and CSS, train only the last network; those before it stay as they are
    matching: float = 0.5  # weight of FlowNetC's matching loss, relative to the flow loss
    seed: int = 0
    init: str | None = None  # weights to start from, instead of random ones
    batch_norm: bool = True  # during training; folded into the convolutions at the end
    precision: str = "bf16"  # of the convolutions; the loss and the weights stay float32

    def __post_init__(self) -> None:
        if self.height % STRIDE or self.width_px % STRIDE or self.height < STRIDE or self.width_px < STRIDE:
            raise UsageError(f"training size must be multiples of {STRIDE}, got {self.width_px}x{self.height}")
        for name in ("steps", "batch", "reuse"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes must be a positive number, got {self.minutes:g}")
        if not 0 < self.width <= WIDEST:
            raise UsageError(f"width must be positive and at most {WIDEST}, got {self.width:g}")
        if not 0 <= self.learning_rate < float("inf"):
            raise UsageError(f"learning-rate must be a number that is not negative, got {self.learning_rate:g}")
        if max(self.height, self.width_px) > LARGEST_SIDE:
            raise UsageError(f"training size must be at most {LARGEST_SIDE} a side, got {self.width_px}x{self.height}")
        if not 0 <= self.seed < MOST_SEEDS:
            raise UsageError(f"seed must lie between 0 and {MOST_SEEDS - 1}, got {self.seed}")
        if self.batch > LARGEST_BATCH:
            raise UsageError(f"batch must be at most {LARGEST_BATCH}, got {self.batch}")
        if self.precision not in ("fp32", "bf16"):
            raise UsageError(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.batch_norm and self.batch * self.height * self.width_px < 2 * STRIDE**2:
            raise UsageError(
                f"one {self.width_px}x{self.height} sample a step is too little for BatchNorm: raise batch"
            )
        object.__setattr__(self, "model", model_name(self.model))  # weights and checkpoints hold that spelling
        if self.last_only and self.model not in ("FlowNet2CS", "FlowNet2CSS"):
            raise UsageError(f"last-only is for FlowNet2CS and FlowNet2CSS, got model {self.model}")
        if self.last_only and self.init is None:
            raise UsageError("last-only keeps the networks before the last as they are: give their weights by init")


def share_done(config: TrainConfig, step: int, seconds: float) -> float:
    """Share of a run that is done, 0..1, after so many steps or, if it is limited by minutes, so many seconds."""
    return min(step / config.steps if config.minutes is None else seconds / (60 * config.minutes), 1.0)


def learning_rate(config: TrainConfig, step: int, done: float) -> float:
    """Linear warm-up times a cosine to zero. ``done``: share of the run that was done before ``step``."""
    risen = min(max(step / max(config.warm_up, 1), done / _LONGEST_WARM_UP), 1.0)
    return config.learning_rate * risen * 0.5 * (1 + cos(pi * done))
