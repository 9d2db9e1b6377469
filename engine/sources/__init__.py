"""Where frames come from. One kind of source = one file here + one line in the table below."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import SourceId
from flowreel.engine.errors import FlowreelError, SourceNotFoundError, UnsupportedSourceError, UsageError
from flowreel.engine.files import PathLike, as_glob
from flowreel.engine.protocols import RandomAccess, Source

STDIN = "-"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp"})


def _is_stdin(name: str) -> bool:
    return name == STDIN


def is_synthetic(name: str) -> bool:
    """Whether the name is of a scene that is rendered, and of no file."""
    return name.startswith("synthetic:")


def lasting_name(name: PathLike) -> str:
    """The same source by a name that means it from any working folder. Raises UsageError for an empty one."""
    text = os.fspath(name)
    if not text:
        raise UsageError("the source's name is empty")
    if _is_stdin(text) or is_synthetic(text) or os.path.isabs(text):
        return text
    pattern = None if os.path.lexists(text) else as_glob(text)
    return os.path.abspath(text) if pattern is None else os.path.join(glob.escape(os.getcwd()), pattern)


def _is_images(name: str) -> bool:
    if os.path.exists(name):  # before the glob: a file may well be called clip[1].mp4
        return os.path.isdir(name) or Path(name).suffix.lower() in IMAGE_SUFFIXES
    return as_glob(name) is not None


def image_folders(name: PathLike) -> list[str] | None:
    """The folders whose images a source is, by its name; None for a source of another kind."""
    name = os.fspath(name)
    if _is_stdin(name) or is_synthetic(name) or not _is_images(name):
        return None
    if os.path.isdir(name):
        return [name]
    found = [name] if os.path.exists(name) else glob.glob(as_glob(name) or name, recursive=True)
    return sorted({os.path.dirname(path) or "." for path in found})


def _is_file(_: str) -> bool:
    return True  # what is left; says so itself when it is not there


# (does this kind take the name?, module, function(name, select, device) -> Source); the first that says yes gets it.
_KINDS: tuple[tuple[Callable[[str], bool], str, str], ...] = (
    (_is_stdin, "flowreel.engine.sources.y4m", "open_stdin"),
    (is_synthetic, "flowreel.engine.sources.synthetic", "open_synthetic"),
    (_is_images, "flowreel.engine.sources.images", "open_images"),
    (_is_file, "flowreel.engine.sources.video", "open_video"),
)


def open_source(name: PathLike, select: SelectConfig | None = None, device: str = "cpu") -> Source:
    """Open a video file, a folder or glob of images, ``synthetic:NAME`` or ``-`` (stdin); the name decides which.

    Args:
        name: what to open. A glob (``"frames/*.png"``) is expanded here.
        select: which of its frames; None: all of them.
        device: where they are wanted, cpu or cuda:N; a decoder that cannot put them there gives them on the CPU.

    Raises:
        SourceNotFoundError: nothing goes by that name.
        UnsupportedSourceError: it holds no picture that can be decoded.
        TooFewFramesError: fewer than two frames are left to give.
        UsageError: the selection makes no sense for it.
        DeviceError, MissingDependencyError: NVDEC was asked for by name and cannot decode it.
    """
    text = os.fspath(name)
    select = select or SelectConfig()
    for takes, module, function in _KINDS:
        if takes(text):
            source: Source = getattr(import_module(module), function)(text, select, device)
            return source
    raise AssertionError("the last kind takes every name")


def open_random_access(name: PathLike, select: SelectConfig | None = None) -> RandomAccess:
    """``open_source`` of what can be read in any order. Raises UsageError for stdin, which passes by only once."""
    if os.fspath(name) == STDIN:
        raise UsageError("stdin passes by only once, so its flow cannot be had in any order: use stream or run")
    source = open_source(name, select)
    assert isinstance(source, RandomAccess)
    return source


def source_identity(name: PathLike) -> SourceId:
    """Which input a name means: quickly, without opening it as a source.

    It is what the source's header tells, less its duration.

    Raises:
        SourceNotFoundError, UnsupportedSourceError, UsageError: as of ``open_source``, as far as is seen.
    """
    from flowreel.engine.sources.fingerprint import source_id

    text = os.fspath(name)
    if _is_stdin(text):
        return SourceId("stdin")
    if is_synthetic(text):
        from flowreel.engine.sources.synthetic import SyntheticConfig

        return SourceId(str(SyntheticConfig.parse(text)))
    try:
        if _is_images(text):
            from flowreel.engine.sources.images import find_images

            paths = find_images(text)
            return source_id(paths[0].absolute().parent.name, paths)
        return source_id(Path(text).name, [Path(text)])
    except FlowreelError:
        raise  # it has said what is wrong
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"there is no file {text}") from error
    except OSError as error:
        raise UnsupportedSourceError(f"{text} cannot be read: {error.strerror or error}") from error


def source_stem(name: PathLike) -> str:
    """What outputs are called after: a file without its ending, the images' folder, the scene, ``stdin``."""
    text = os.fspath(name)
    if _is_stdin(text):
        return "stdin"
    if is_synthetic(text):
        return text.removeprefix("synthetic:").split("?")[0]
    if not _is_images(text):
        return Path(text).stem
    folder = Path(text)
    if not folder.is_dir():
        folder = min(map(Path, glob.glob(as_glob(text) or text, recursive=True)), default=folder).parent
    return Path(os.path.abspath(folder)).name or "flow"  # the root folder has no name
