"""The kinds of source, and what a name alone tells about each. One kind = one file here + one line in ``KINDS``.

Nothing heavy is imported, so that a wrong name is reported at once.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flowreel.engine.errors import UsageError
from flowreel.engine.files import as_glob, folder_name, matches

STDIN = "-"
RECIPE = "ffmpeg -i CLIP -f yuv4mpegpipe - | flowreel run -"  # for messages: how to read what is no file
SYNTHETIC = "synthetic:"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt")


def _absolute(name: str) -> str:
    return os.fspath(Path(name).absolute())  # keeps "link/..", which is not the folder that holds the link


@dataclass(frozen=True)
class Kind:
    """A kind of source. The defaults are for names that are paths of single files.

    module: of this package. Its ``identify(name) -> SourceId`` tells what ``info.source`` of the opened source does,
        except for the duration, without opening it. It may raise OSError and FlowreelError.
    function: of that module, ``(name, select, device) -> Source``.
    """

    module: str
    function: str
    takes: Callable[[str], bool] = lambda _: True  # whether a name is of this kind; earlier kinds are asked first
    stem: Callable[[str], str] = lambda name: Path(name).stem  # from a name: what outputs are named after
    absolute: Callable[[str], str] = _absolute  # from a path: one for the same source, valid in any working folder
    folders: Callable[[str], list[str] | None] = lambda _: None  # folders whose images are, or may be, its frames
    once: bool = False  # whether it can be opened and read only once
    is_path: bool = True  # whether a name is that of a file or folder, or a glob, and so depends on the working folder


# -- stdin and procedural scenes, which are not files ----------------------------------------------------------------


def is_synthetic(name: str) -> bool:
    """Whether the name is that of a rendered scene, not of a file."""
    return name.startswith(SYNTHETIC)


def require_no_address(name: str) -> None:
    """Raises UsageError for the address of something on a network, unless a file has that name."""
    if "://" in name and not is_synthetic(name) and not os.path.exists(name):
        raise UsageError(f"{name} is an address, and only files are read: download it, or pipe it in: {RECIPE}")


def as_weights(name: str) -> str:
    """What to say of weights given as a source, as flownet2-pytorch's ``--resume FILE`` does; empty for others."""
    is_weights = name.removesuffix(".tar").endswith(WEIGHTS_SUFFIXES)  # a plain .tar may as well hold frames
    return "weights are given by --weights; --resume takes no file" if is_weights else ""


def _stem_of_scene(name: str) -> str:
    return name.removeprefix(SYNTHETIC).split("?")[0]


# -- images, by folder, by glob or a single one --------------------------------------------------------------------


def _is_images(name: str) -> bool:
    if os.path.exists(name):  # before the glob: a file may be named clip[1].mp4
        return os.path.isdir(name) or Path(name).suffix.lower() in IMAGE_SUFFIXES
    return as_glob(name) is not None


def _stem_of_images(name: str) -> str:
    folder = Path(name)
    if not folder.is_dir():
        folder = min(map(Path, matches(name)), default=folder).parent
    return folder_name(folder)


def _absolute_images(name: str) -> str:
    pattern = None if os.path.lexists(name) else as_glob(name)
    if pattern is None or os.path.isabs(name):
        return _absolute(name)
    return os.path.join(glob.escape(os.getcwd()), pattern)


def _folders_of_images(name: str) -> list[str]:
    if os.path.isdir(name):
        return [name]
    return sorted({os.path.dirname(path) or "." for path in matches(name)})


# -- the registry: the first kind that takes a name wins ------------------------------------------------------------

KINDS = (
    Kind("y4m", "open_stdin", lambda name: name == STDIN, lambda _: "stdin", once=True, is_path=False),
    Kind("synthetic", "open_synthetic", is_synthetic, _stem_of_scene, is_path=False),
    Kind("images", "open_images", _is_images, _stem_of_images, _absolute_images, _folders_of_images),
    Kind("video", "open_video"),  # any other name; its module reports a missing file
)


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.takes(name))
