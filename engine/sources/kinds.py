"""The kinds of source there are, and what a name alone tells of each. One kind = one file here + one line in ``KINDS``.

Nothing heavy is loaded: what is wrong with a name is told at once.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowreel.engine.files import as_glob

STDIN = "-"
SYNTHETIC = "synthetic:"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})


def _any(_: str) -> bool:
    return True


def _as_it_is(name: str) -> str:
    return name


def _absolute(name: str) -> str:
    return os.fspath(Path(name).absolute())  # "link/.." stays: it is not the folder that holds the link


def _stem_of_file(name: str) -> str:
    return Path(name).stem


def _no_folders(_: str) -> None:
    return None


@dataclass(frozen=True)
class Kind:
    """A kind of source. Where nothing else is said, its names are paths of single files.

    module: of this package; it has ``identify(name) -> SourceId`` too, which tells what the header of the source does,
        less its duration, without opening it. OSError and FlowreelError come out of it.
    function: of that module, ``(name, select, device) -> Source``.
    """

    module: str
    function: str
    takes: Callable[[str], bool] = _any  # whether a name is of this kind, unless one before it says so
    stem: Callable[[str], str] = _stem_of_file  # of a name: what outputs are called after
    lasting_name: Callable[[str], str] = _absolute  # means the same from any working folder
    folders: Callable[[str], list[str] | None] = _no_folders  # of which every image is a frame, or may be
    once: bool = False  # whether it passes by only once: it can be opened, but not again


# -- stdin and procedural scenes, which are no files -----------------------------------------------------------------


def _is_stdin(name: str) -> bool:
    return name == STDIN


def _stem_of_stdin(_: str) -> str:
    return "stdin"


def is_synthetic(name: str) -> bool:
    """Whether the name is of a scene that is rendered, and of no file."""
    return name.startswith(SYNTHETIC)


def _stem_of_scene(name: str) -> str:
    return name.removeprefix(SYNTHETIC).split("?")[0]


# -- images, by folder, by glob or a single one --------------------------------------------------------------------


def _is_images(name: str) -> bool:
    if os.path.exists(name):  # before the glob: a file may well be called clip[1].mp4
        return os.path.isdir(name) or Path(name).suffix.lower() in IMAGE_SUFFIXES
    return as_glob(name) is not None


def _stem_of_images(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        folder = min(map(Path, glob.glob(as_glob(name) or name, recursive=True)), default=folder).parent
    return Path(os.path.abspath(folder)).name or "flow"  # the root folder has no name


def _lasting_images(name: str) -> str:
    pattern = None if os.path.lexists(name) else as_glob(name)
    if pattern is None or os.path.isabs(name):
        return _absolute(name)
    return os.path.join(glob.escape(os.getcwd()), pattern)


def _folders_of_images(name: str) -> list[str]:
    if os.path.isdir(name):
        return [name]
    found = [name] if os.path.exists(name) else glob.glob(as_glob(name) or name, recursive=True)
    return sorted({os.path.dirname(path) or "." for path in found})


# -- the registry: the first that takes a name has it --------------------------------------------------------------

KINDS = (
    Kind("y4m", "open_stdin", _is_stdin, _stem_of_stdin, _as_it_is, once=True),
    Kind("synthetic", "open_synthetic", is_synthetic, _stem_of_scene, _as_it_is),
    Kind("images", "open_images", _is_images, _stem_of_images, _lasting_images, _folders_of_images),
    Kind("video", "open_video"),  # what is left; says so itself when it is not there
)


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.takes(name))
