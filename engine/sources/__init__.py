"""Sources of frames: ``kinds.py`` tells the kind of a name, and the module of that kind opens it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from flowreel.engine.config import SelectConfig
from flowreel.engine.data import SourceId
from flowreel.engine.errors import FlowreelError, SourceNotFoundError, UnsupportedSourceError, UsageError
from flowreel.engine.files import PathLike
from flowreel.engine.forked import limit_threads_of_fork
from flowreel.engine.protocols import RandomAccess, Source
from flowreel.engine.sources.kinds import Kind, kind_of, require_no_address


def open_source(name: PathLike, select: SelectConfig | None = None, device: str = "cpu") -> Source:
    """Open a video file, a folder or glob of images, ``synthetic:NAME`` or ``-`` (stdin); the name decides which.

    Args:
        name: what to open. A glob (``"frames/*.png"``) is expanded here.
        select: which of its frames; None: all of them.
        device: where the frames are wanted, cpu or cuda:N; a decoder that cannot put them there gives them on the CPU.

    Raises:
        SourceNotFoundError: there is no such file, folder or image.
        UnsupportedSourceError: no picture in it can be decoded.
        TooFewFramesError: the selection leaves fewer than two frames.
        UsageError: the selection makes no sense for this source, or the name is not understood.
        DeviceError, MissingDependencyError: NVDEC was asked for by name and cannot decode it.
    """
    text, kind = _looked_up(name)
    limit_threads_of_fork()  # some sources compute, too
    source: Source = getattr(_module(kind), kind.function)(text, select or SelectConfig(), device)
    return source


def open_random_access(name: PathLike, select: SelectConfig | None = None) -> RandomAccess:
    """``open_source`` for random access. Raises UsageError for a source that can be read only once, and for NVDEC."""
    if comes_once(name):
        raise UsageError("stdin passes by only once, so its flow cannot be had in any order: use stream or run")
    if select is not None and select.decoder == "nvdec":
        raise UsageError("NVDEC decodes in order only, so flow by index cannot use it: use decoder auto, stream or run")
    source = open_source(name, select)
    assert isinstance(source, RandomAccess)
    return source


def comes_once(name: PathLike) -> bool:
    """Whether the source can be opened and read only once, as stdin."""
    return _looked_up(name)[1].once


def source_identity(name: PathLike) -> SourceId:
    """Which input a name means, found quickly, without opening it as a source.

    Equals ``info.source`` of the opened source, except that the duration is missing.

    Raises:
        SourceNotFoundError, UnsupportedSourceError, UsageError: as ``open_source``, as far as this look shows it.
    """
    text, kind = _looked_up(name)
    try:
        identity: SourceId = _module(kind).identify(text)
    except FlowreelError:
        raise  # says what is wrong already
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"there is no file {text}") from error
    except OSError as error:
        raise UnsupportedSourceError(f"{text} cannot be read: {error.strerror or error}") from error
    return identity


def source_stem(name: PathLike) -> str:
    """What outputs are named after: the file without its suffix, the folder of the images, the scene, or ``stdin``."""
    text, kind = _looked_up(name)
    return kind.stem(text)


def lasting_name(name: PathLike) -> str:
    """A name for the same source that is valid in any working folder. Raises UsageError for an empty name."""
    text, kind = _looked_up(name)
    if not text:
        raise UsageError("the source's name is empty")
    return kind.absolute(text) if kind.is_path else text


def image_folders(name: PathLike) -> list[str] | None:
    """The folders that hold the images of an image source; None for a source of another kind."""
    text, kind = _looked_up(name)
    return kind.folders(text)


def _looked_up(name: PathLike) -> tuple[str, Kind]:
    """The name as text, and its kind. Raises UsageError for the address of something on a network."""
    text = os.fspath(name)
    require_no_address(text)
    return text, kind_of(text)


def _module(kind: Kind) -> Any:
    return import_module(f"flowreel.engine.sources.{kind.module}")
