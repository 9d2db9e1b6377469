"""The real pictures and videos, which are kept outside the repository, in ``$FLOWREEL_DATA``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.measure import Skipped
from flowreel.sinks import read_flo, read_kitti

FOLDER = Path(os.environ.get("FLOWREEL_DATA", Path(__file__).resolve().parents[1] / ".." / "shared" / "data")).resolve()


def found(*parts: str) -> Path:
    """A file or folder of the data. Raises ``Skipped`` when it does not exist."""
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        raise Skipped(f"{'/'.join(parts)} is not in the data folder: set FLOWREEL_DATA")
    return path


@dataclass(frozen=True)
class TruePair:
    """Two pictures and the flow between them."""

    first: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    second: npt.NDArray[np.uint8]
    flow: npt.NDArray[np.float32]  # (H, W, 2) pixels
    valid: npt.NDArray[np.bool_]  # (H, W) where the truth is known


def true_pair(name: str) -> TruePair:
    """Reads one folder of ``pairs``: img1, img2, and flow.flo or KITTI's 16-bit flow.png."""
    folder = found("pairs", name)
    first, second = (_picture(next(folder.glob(f"img{number}.*"))) for number in (1, 2))
    flow = read_kitti(folder / "flow.png")[0] if (folder / "flow.png").exists() else read_flo(folder / "flow.flo")
    valid = np.asarray((np.abs(flow) < 1e9).all(-1), np.bool_)
    return TruePair(first, second, np.where(valid[..., None], flow, 0).astype(np.float32), valid)


def _picture(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))
