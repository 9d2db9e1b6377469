"""Every error flowreel raises, named after what went wrong.

    FlowreelError                     base of flowreel's own errors; the command line prints each as one line
    ├── UsageError (ValueError)           options that are impossible or contradict each other; exit code 2
    ├── DeviceError (RuntimeError)        the requested device is missing or cannot be used
    ├── MissingDependencyError (ImportError)   an optional package is absent; names the extra to install
    ├── SourceError                       something about the input
    │   ├── SourceNotFoundError (FileNotFoundError)
    │   ├── UnsupportedSourceError (ValueError)    not a video or picture that can be decoded
    │   ├── TooFewFramesError (ValueError)         fewer than two frames: no flow
    │   ├── FrameSizeError (ValueError)            a frame's size differs from the first one's
    │   ├── SourceChangedError (ValueError)        the file was replaced or changed since it was opened
    │   ├── TruncatedSourceError (EOFError)        fewer frames decoded than the container holds
    │   └── SomeSourcesFailedError                 of many sources in one run, some failed
    ├── WeightsError                      something about a weights file
    │   ├── WeightsNotFoundError (FileNotFoundError)
    │   ├── UnreadableWeightsError (ValueError)    truncated, damaged, or not safe to load
    │   ├── WeightsMismatchError (ValueError)      readable, but not for the requested model
    │   └── DownloadError (OSError)                a dead link, a broken connection, content other than the file's
    ├── OutputError                       something about an output
    │   ├── OutputExistsError (FileExistsError)
    │   ├── OutputWriteError (OSError)             full disk, no permission, vanished folder
    │   │   └── OutputBusyError                        another run is writing it
    │   ├── UnknownOutputError (UsageError)        no output format has that name; exit code 2
    │   └── ResumeMismatchError (ValueError)       the existing output has other settings or another source
    ├── StoreError                        something about reading a flow store
    │   ├── StoreNotFoundError (FileNotFoundError)
    │   ├── DamagedStoreError (ValueError)         a checksum or a shard is wrong
    │   └── CacheMismatchError (ValueError)        the cache was filled with other settings, or is not a cache
    ├── FlowFileError (ValueError)        an invalid .flo, KITTI picture, .npz or two-stream picture
    ├── StaleModelError (RuntimeError)    a network's weights changed after it was compiled
    ├── CheckpointError (ValueError)      a training run that cannot be resumed
    ├── DivergedError (ArithmeticError)   training whose loss is no longer a finite number
    └── StageError                        a pipeline stage failed; __cause__ is the original error

    PrecisionWarning (UserWarning)    the chosen precision does not suit the network or the processor; the run goes on

Each also inherits the builtin error that users already catch. Messages say what was expected, what arrived, and what to
try.
"""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn


class FlowreelError(Exception):
    """Base of every error flowreel raises on purpose."""


class UsageError(FlowreelError, ValueError):
    """Options that are impossible or contradict each other."""


class DeviceError(FlowreelError, RuntimeError):
    """The requested device is missing or cannot be used."""


class MissingDependencyError(FlowreelError, ImportError):
    """An optional package is missing or cannot load."""


class SourceError(FlowreelError):
    """Something is wrong with the input."""


class SourceNotFoundError(SourceError, FileNotFoundError):
    """No file, folder or match by that name."""


class UnsupportedSourceError(SourceError, ValueError):
    """The file exists, but holds no picture or video that can be decoded."""


class TooFewFramesError(SourceError, ValueError):
    """Fewer than two frames: there is no pair, so no flow."""


class FrameSizeError(SourceError, ValueError):
    """A frame's size differs from the size of the first one."""


class SourceChangedError(SourceError, ValueError):
    """The file is no longer the one that was opened under that name."""


class TruncatedSourceError(SourceError, EOFError):
    """Fewer frames decoded than the container says it holds."""


class SomeSourcesFailedError(SourceError):
    """A run over many sources finished, but some of them failed; the manifest says which and why."""


class WeightsError(FlowreelError):
    """Something is wrong with a weights file."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """No weights file by that name."""


class UnreadableWeightsError(WeightsError, ValueError):
    """A weights file that is truncated, damaged, or holds more than plain tensors."""


class WeightsMismatchError(WeightsError, ValueError):
    """A readable weights file that does not fit the requested model."""


class DownloadError(WeightsError, OSError):
    """A dead link, a connection that keeps breaking, or content that is not the requested file's."""


class OutputError(FlowreelError):
    """Something is wrong with an output."""


class OutputExistsError(OutputError, FileExistsError):
    """The output exists already and overwriting it was not requested."""


class OutputWriteError(OutputError, OSError):
    """The output could not be written: full disk, no permission, vanished folder."""


class OutputBusyError(OutputWriteError):
    """Another run is writing that output now."""


class UnknownOutputError(OutputError, UsageError):
    """No output format has that name."""


class ResumeMismatchError(OutputError, ValueError):
    """The existing output, finished or not, was made from another source or with another model or encoding."""


class StoreError(FlowreelError):
    """Something is wrong with a flow store that is being read."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """No flow store at that path, complete or not."""


class DamagedStoreError(StoreError, ValueError):
    """A chunk, shard or attribute of a store is missing or fails its checksum."""


class CacheMismatchError(StoreError, ValueError):
    """The cache's path is not a cache, or holds flow of another source, model or encoding."""


class FlowFileError(FlowreelError, ValueError):
    """A flow file (.flo, KITTI PNG, .npz, two-stream pictures) with a wrong tag, size, kind or number of bytes."""


class StaleModelError(FlowreelError, RuntimeError):
    """The weights of a network changed after it was compiled; the compiled form still has the old ones."""


class CheckpointError(FlowreelError, ValueError):
    """A training run's folder that cannot be resumed as asked."""


class DivergedError(FlowreelError, ArithmeticError):
    """A training run whose loss or weights are no longer finite numbers, which none of its later steps would change."""


class StageError(FlowreelError):
    """A pipeline stage failed. ``__cause__`` is the error it raised.

    Attributes:
        stage: the stage's name, e.g. ``"decode"``.
        frame: number of the source frame it was working on; None: unknown.
    """

    def __init__(self, stage: str, frame: int | None, cause: BaseException) -> None:
        where = stage if frame is None else f"{stage}, frame {frame}"
        super().__init__(f"{where}: {said_by(cause)}")
        self.stage = stage
        self.frame = frame
        self.__cause__ = cause

    def __reduce__(self) -> tuple[type[StageError], tuple[str, int | None, BaseException]]:
        assert self.__cause__ is not None
        return StageError, (self.stage, self.frame, self.__cause__)


class SentError(NamedTuple):
    """An error on its way to another process, with its traceback, which it would lose."""

    error: Exception
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> SentError:
        """Of an error that cannot be pickled, its message goes."""
        told = "".join(traceback.format_exception(error))
        try:
            return cls(pickle.loads(pickle.dumps(error)), told)
        except Exception:
            return cls(FlowreelError(f"{type(error).__name__}: {error}"), told)

    def arise(self) -> NoReturn:
        """Raises the error. Its cause has the traceback."""
        raise self.error from FlowreelError(f"in another process:\n{self.traceback}")


def lacks_memory(error: BaseException) -> bool:
    """Whether the host's memory ran out, however the library at work reports that."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "Cannot allocate memory")
    )


def lacks_threads(error: BaseException) -> bool:
    """Whether the system refused Python another thread."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


def said_by(error: BaseException) -> str:
    """An error's message; where the host's memory or threads run out, one that says what to try."""
    if lacks_threads(error):
        return (
            "the system allows no more threads: end what else runs there, or raise the limit (ulimit -u; for a "
            "container its limit of pids)"
        )
    if lacks_memory(error):
        return (
            "this machine has too little free memory: end what else runs there, or take a smaller --batch, --queue-mb "
            f"or --model ({first_line(error)})"
        )
    return str(error) or type(error).__name__


@contextmanager
def concerning(frame: int) -> Iterator[None]:
    """Marks errors raised inside as concerning this frame, even if they reach the stage frames later: ``frame_of``."""
    try:
        yield
    except Exception as error:
        error.concerned_frame = frame  # type: ignore[attr-defined]
        raise


def frame_of(error: BaseException, otherwise: int | None) -> int | None:
    """The frame that ``concerning`` marked on the error, else ``otherwise``."""
    frame: int | None = getattr(error, "concerned_frame", otherwise)
    return frame


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, for use in our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def counted(count: int, noun: str) -> str:
    """``1 flow`` or ``5 flows``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class PrecisionWarning(UserWarning):
    """A network's values come close to the limit of the chosen precision, or this processor computes in it slowly."""
