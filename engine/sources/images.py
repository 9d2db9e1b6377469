"""A folder or glob of images as a source, in natural order: frame2.png comes before frame10.png."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import FlowInfo, Frame, SourceId
from flowreel.engine.errors import (
    FrameSizeError,
    SourceChangedError,
    SourceNotFoundError,
    TooFewFramesError,
    UnsupportedSourceError,
)
from flowreel.engine.files import folder_name, leads_nowhere, matches, natural_order
from flowreel.engine.sources.fingerprint import last_change, source_id
from flowreel.engine.sources.independent import IndependentFrames
from flowreel.engine.sources.kinds import IMAGE_SUFFIXES
from flowreel.engine.sources.timecode import require_no_video_file, select_frames

FLOW_SUFFIXES = frozenset({".flo", ".npz", ".zarr"})
FRAME_RATE = Fraction(25)  # images carry no times; FFmpeg reads image sequences at the same rate

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_images(name: str, select: SelectConfig, device: str = "cpu") -> ImageSource:
    """Open the images of a folder, or those that a glob matches.

    The headers of all files are read at once, so a missing, unreadable or differently sized image is reported before
    the first frame. Raises SourceNotFoundError, UnsupportedSourceError, FrameSizeError, TooFewFramesError, UsageError.
    """
    require_no_video_file(select, f"{name} holds images")
    return ImageSource(find_images(name), select)


def identify(name: str) -> SourceId:
    """See ``Kind``: covers all the images."""
    paths = find_images(name)
    return source_id(_folder(paths), paths)


def find_images(name: str) -> list[Path]:
    """The image files of a folder, or those that a glob matches, in natural order. Hidden files are left out.

    Raises SourceNotFoundError when there is none, or one is a dangling link: leaving it out would skip a frame.
    """
    place = Path(name)
    found = list(place.iterdir() if place.is_dir() else map(Path, matches(name)))
    images = [path for path in found if _is_image(path)]
    if not images:
        kinds = " ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        verb = "holds" if place.is_dir() else "matches"
        raise SourceNotFoundError(f"{name} {verb} no images; looked for {kinds}{_what_else(place, found)}")
    if lost := [path for path in images if leads_nowhere(path)]:
        raise SourceNotFoundError(f"{min(lost, key=natural_order)} is a link to a file that is not there")
    return sorted(images, key=natural_order)


def _what_else(place: Path, found: list[Path]) -> str:
    """A hint at what the user may have meant by a folder or glob without images."""
    if (place / "zarr.json").is_file():
        return "; it is a flow store, which flowreel.open_store reads and flowreel export and color take"
    flow = [path for path in found if path.suffix.lower() in FLOW_SUFFIXES]
    if flow:
        return f"; there is flow, such as {_first(flow)}, which flowreel export and color take, and info one by one"
    shown = [path for path in found if not path.name.startswith(".")]
    if not shown:
        return ""
    there = f"; {_first(shown)} is there, but "
    if place.is_dir():
        return there + "a folder is read as the images of one clip: name each video or folder in it"
    return there + "globs in quotes are for images: without quotes, the shell names each file"


def _folder(paths: list[Path]) -> str:
    """The name of a clip of images: that of their folder."""
    return folder_name(paths[0].parent)


def _first(paths: list[Path]) -> str:
    return min(paths, key=natural_order).name


class ImageSource(IndependentFrames):
    """The frames of one clip, from image files. Opens one file at a time and keeps none open."""

    def __init__(self, paths: list[Path], select: SelectConfig) -> None:
        """``paths`` in the order of the frames; see :func:`open_images`."""
        if len(paths) == 1:
            _refuse_single(paths[0])
        folder = _folder(paths)
        times_s = np.arange(len(paths)) / float(FRAME_RATE)
        wanted = select_frames(select, times_s, folder)
        chosen = [paths[number] for number in wanted]
        self._paths = paths
        self._changes = [last_change(path) for path in paths[: wanted[-1] + 1]]
        notes = [f"images carry no times: {FRAME_RATE} frames per second are assumed", *_gaps(chosen)]
        if (folders := len({path.parent for path in chosen})) > 1:
            notes.append(f"the images of {folders} folders are one clip: flow also goes from each folder to the next")
        (width, height), several = _common_size(chosen)
        if several:
            notes.append(f"{several} of the files hold more than one picture: of each the first is taken")
        info = FlowInfo(
            height=height,
            width=width,
            frame_rate=FRAME_RATE / select.step,
            frame_count=len(wanted),
            source=source_id(folder, paths),
        )
        super().__init__(info, wanted, times_s, "Pillow", notes)

    def frame(self, number: int) -> Frame:
        import torch

        path = self._paths[number]
        try:
            changed = last_change(path) != self._changes[number]
            rgb = read_rgb(path)
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{path} is gone since the images were looked through") from error
        if changed:
            raise SourceChangedError(
                f"{path} is another file than when the images were looked through: open them again"
            )
        first = self._paths[self.wanted[0]]
        _expect_size(path, (rgb.shape[1], rgb.shape[0]), first, (self.info.width, self.info.height))
        return Frame(torch.from_numpy(rgb).permute(2, 0, 1), number, float(self.times_s[number]))


def _common_size(paths: Sequence[Path]) -> tuple[tuple[int, int], int]:
    """(width, height) as shown, checked in the headers of all files, and how many files hold several pictures."""
    size, animated = _looked_at(paths[0])
    several = int(animated)
    for path in paths[1:]:
        shown, animated = _looked_at(path)
        _expect_size(path, shown, paths[0], size)
        several += animated
    return size, several


def _gaps(paths: Sequence[Path]) -> Iterator[str]:
    """Notes for a numbered sequence in which numbers are missing or occur twice."""
    parts = [re.split(r"([0-9]+)(?!.*[0-9])", path.stem) for path in paths]
    if any(len(part) != 3 or (part[0], part[2]) != (parts[0][0], parts[0][2]) for part in parts):
        return  # not a numbered sequence
    numbers = np.array([int(part[1]) for part in parts], object)
    steps = np.diff(numbers)
    if (same := np.flatnonzero(steps == 0)).size:  # e.g. each as .jpg and as .png
        one, other = (paths[same[0] + place].name for place in (0, 1))
        more = f", as do {len(same) - 1} more" if len(same) > 1 else ""
        yield f"{one} and {other} bear one number{more}: both are taken, flow goes from one to the other"
    if min(steps) > 0 and (wide := np.flatnonzero(steps > min(steps))).size:
        before, after = (paths[wide[0] + place].name for place in (0, 1))
        gaps = "a gap" if len(wide) == 1 else f"{len(wide)} gaps, the first"
        yield f"the images' numbers have {gaps} between {before} and {after}: flow goes from one to the other"


def read_rgb(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The picture as shown, (H, W, 3) uint8: alpha dropped, of 16 bits the upper 8, upright by its EXIF orientation."""
    with _opened(path) as image:
        upright = _UPRIGHT.get(_orientation(image))
        try:
            image.load()
        except (OSError, ValueError, SyntaxError) as error:
            raise UnsupportedSourceError(f"{path} cannot be decoded: {error}") from error
        turned = image if upright is None else image.transpose(upright)
        if turned.mode.startswith("I"):  # convert() would clip these to 255 instead of scaling
            grey = np.clip(np.asarray(turned).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if turned.mode == "P":  # via RGBA: Pillow warns when it converts a palette with transparency to RGB
            turned = turned.convert("RGBA")
        try:
            return np.array(turned.convert("RGB"))
        except ValueError as error:
            raise UnsupportedSourceError(f"{path} has pixels of an unknown kind ({turned.mode}): {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    # From a file object, not by name: Pillow would memory-map some files, and then lays out the rows of a rotated TIFF
    # wrongly (seen in 13.0).
    with path.open("rb") as file:
        try:
            image: Image.Image = Image.open(file)
        except UnidentifiedImageError as error:
            looks = "is empty" if path.stat().st_size == 0 else "is not an image that can be read"
            raise UnsupportedSourceError(f"{path} {looks}") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnsupportedSourceError(f"{path} cannot be opened: {error}") from error
        with image:
            if image.mode == "F":
                raise UnsupportedSourceError(f"{path} has floating point pixels; images of 8 or 16 bits are expected")
            yield image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8, that is still to be applied; 1 for an invalid one. Call it before loading pixels."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # getexif() would decode the whole picture
    try:
        orientation = int(image.getexif().get(_ORIENTATION, 1))
        return orientation if orientation in _UPRIGHT else 1
    except (SyntaxError, ValueError, TypeError, KeyError, EOFError, OSError, struct.error):
        return 1  # the picture itself may still be intact


def _looked_at(path: Path) -> tuple[tuple[int, int], bool]:
    """(width, height) as shown, and whether the file holds more than one picture."""
    with _opened(path) as image:
        width, height = image.size
        several = bool(getattr(image, "is_animated", False))
        return ((height, width) if _orientation(image) >= 5 else (width, height)), several


def _refuse_single(path: Path) -> None:
    """Always raises: TooFewFramesError, as one file is no sequence, or UnsupportedSourceError if it is no image."""
    _, several = _looked_at(path)
    if several:
        raise TooFewFramesError(
            f"{path.name} holds several pictures, of which one would be read: make a folder of images of it, or a "
            "video (an animated PNG is one by the ending .apng)"
        )
    raise TooFewFramesError(
        f"{path.name} is one image: flow needs at least two, as a folder or a quoted glob "
        f"('{path.parent}/*{path.suffix}')"
    )


def _expect_size(path: Path, size: tuple[int, int], first: Path, expected: tuple[int, int]) -> None:
    if size != expected:
        raise FrameSizeError(
            f"{path} is {size[0]}x{size[1]}, but {first.name} is {expected[0]}x{expected[1]}: "
            "all images of one source must have the same size"
        )


def _is_image(path: Path) -> bool:
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not path.name.startswith(".")
        and (path.is_file() or leads_nowhere(path))
    )
