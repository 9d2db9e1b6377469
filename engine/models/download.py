"""Downloads a published checkpoint: tries several sources in turn, resumes where it broke off, checks before renaming.

The bytes are collected in ``NAME.partial`` beside the destination, which is renamed only when size and sha256 are right
(or, if the sha256 is not known, when the file loads as the network it should hold). A source fails in one of two ways:
after ``Broken`` it is tried again, after ``Gone`` the next source is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urljoin

from flowreel.engine.claims import locked, still_named
from flowreel.engine.errors import (
    DownloadError,
    OutputBusyError,
    OutputExistsError,
    OutputWriteError,
    UsageError,
    WeightsError,
)
from flowreel.engine.models.checkpoints import Checkpoint, Source, file_sha256
from flowreel.engine.models.web import (
    Broken,
    Gone,
    Manners,
    RangeRefused,
    Web,
    is_page,
    read_page,
    span_of,
    version_of,
    words,
)

if TYPE_CHECKING:
    from http.client import HTTPResponse

CHUNK_BYTES = 1 << 18
GAIN_BYTES = 1 << 20  # a connection that brought this much resets the count of failed tries

PUBLISHED_WIDTH = 1.0  # of every published network

MANNERS = Manners()

Show = Callable[[int, int | None], None]  # bytes received, bytes of the whole file (None: not known)
Tell = Callable[[str], None]


def download(
    checkpoint: Checkpoint,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    show: Show = lambda done, whole: None,
    tell: Tell = lambda line: None,
    manners: Manners | None = None,
) -> Path:
    """Downloads a checkpoint and returns its path, with the file checked.

    Args:
        output: a file; or a folder to put it into, which is there or ends in a slash; None: the cache folder, where
            ``--weights NAME`` finds it.
        overwrite: download again even if the file exists, and replace it.
        show: called with (bytes received, bytes of the whole file or None) after every piece.
        tell: called with a line for the user: which source, what failed, what was checked.
        manners: None: ``MANNERS``.

    Raises:
        UsageError: a ``.safetensors`` file name; checkpoints are ``.pth.tar``.
        DownloadError: no source gave the right bytes; says what each of them did, and what to do by hand.
        OutputExistsError: another file is there already.
        OutputWriteError: the file cannot be written. The bytes so far stay in ``.partial``, to be resumed.
    """
    path = checkpoint.path if output is None else Path(output)
    if path.is_dir() or str(output).endswith(("/", os.sep)):
        path = path / checkpoint.file_name
    if path.suffix.lower() == ".safetensors":
        raise UsageError(f"{checkpoint.name} comes as .pth.tar: download it, then 'flowreel weights convert' it")
    if os.path.lexists(path) and not overwrite:
        wrong = _what_is_wrong(checkpoint, path)
        if wrong is None:
            tell(f"{path} is already there and right")
            return path
        raise OutputExistsError(f"{path} exists, but is not {checkpoint.name}: {wrong}; pass --overwrite")
    refusals: list[str] = []
    with _Partial.open(path) as partial:
        for source in checkpoint.sources:
            tell(f"{checkpoint.name} from {source.label}")
            try:
                _Fetch(checkpoint, source, partial, show, tell, manners or MANNERS).run()
            except Gone as gone:
                tell(f"{source.label}: {gone}")
                refusals.append(f"{source.label}: {gone}")
                continue
            partial.publish()
            unknown = f"nobody has written its sha256 down; it loads as {checkpoint.model}"
            tell("size and sha256 are right" if checkpoint.sha256 else unknown)
            return path
    raise DownloadError(_by_hand(checkpoint, refusals))


def _by_hand(checkpoint: Checkpoint, refusals: list[str]) -> str:
    pages = ", or ".join(source.page or source.url for source in checkpoint.sources)
    size = "" if checkpoint.size_bytes is None else f"{checkpoint.size_bytes} bytes, "
    proof = "no sha256 known" if checkpoint.sha256 is None else f"sha256 {checkpoint.sha256}"
    return (
        f"{checkpoint.name} could not be had. Tried {'; '.join(refusals) or 'nothing: no source is known'}. "
        f"By hand: open {pages} in a browser, save the file as {checkpoint.path} ({size}{proof}), "
        f"or anywhere and give its path with --weights"
    )


def _what_is_wrong(checkpoint: Checkpoint, path: Path) -> str | None:
    """None when the file is the checkpoint, as far as can be checked; else what was expected and what was found."""
    if not path.is_file():
        return "it is not a file"
    size_bytes = path.stat().st_size
    if checkpoint.size_bytes not in (None, size_bytes):
        return f"expected {checkpoint.size_bytes} bytes, got {size_bytes}"
    if checkpoint.sha256 is not None:
        found = file_sha256(path)
        return None if found == checkpoint.sha256 else f"expected sha256 {checkpoint.sha256}, got {found}"
    from flowreel.engine.models.weights import instantiate, read_weights

    try:
        held = read_weights(path)
        instantiate(held, held.model)
    except WeightsError as error:
        return f"expected {checkpoint.model}, got what does not load: {error}"
    if (held.model, held.batch_norm, held.width) != (checkpoint.model, False, PUBLISHED_WIDTH):
        return f"expected {checkpoint.model} of width {PUBLISHED_WIDTH:g}, got {held.model} of width {held.width:g}"
    return None


class _Partial:
    """The bytes so far, in ``NAME.partial``, locked for one process at a time.

    ``origin``: where they came from, (source, the server's version of the file: an ETag or date). Bytes of unknown
    origin may be continued only if the sha256 is known, which shows whether the pieces fit together.
    """

    def __init__(self, path: Path, temporary: Path, file: IO[bytes]) -> None:
        self.path = path
        self.temporary = temporary
        self.size = os.fstat(file.fileno()).st_size
        self.origin: tuple[Source, str] | None = None
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[_Partial]:
        temporary = path.with_name(f"{path.name}.partial")
        with _write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("ab")
        with file:
            if not (locked(file.fileno()) and still_named(file.fileno(), temporary)):
                raise OutputBusyError(f"{temporary} is being written by another download; wait for it to end")
            partial = cls(path, temporary, file)
            try:
                yield partial
            finally:
                if partial.size == 0:
                    with suppress(OSError):
                        temporary.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        with _write_errors(self.path):
            self._file.write(piece)
            self._file.flush()
        self.size += len(piece)

    def restart(self) -> None:
        """Discards all bytes."""
        with _write_errors(self.path):
            self._file.truncate(0)
        self.size, self.origin = 0, None

    def publish(self) -> None:
        with _write_errors(self.path):
            os.fsync(self._file.fileno())
            self.temporary.replace(self.path)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputWriteError(f"cannot write {path}: {error.strerror or error}; what has come is kept") from error


class _Fetch:
    """One checkpoint from one source."""

    def __init__(
        self, checkpoint: Checkpoint, source: Source, partial: _Partial, show: Show, tell: Tell, manners: Manners
    ) -> None:
        self.checkpoint = checkpoint
        self.source = source
        self.partial = partial
        self.show = show
        self.tell = tell
        self.manners = manners
        self.web = Web(manners)

    def run(self) -> None:
        """Leaves the complete, checked file in ``partial``. Raises Gone; wrong bytes are then discarded."""
        inherited = self._resumable() > 0
        self._receive_all()
        wrong = _what_is_wrong(self.checkpoint, self.partial.temporary)
        if wrong is not None and inherited:
            self.tell(f"what an earlier download left is unusable ({wrong}); starting over")
            self.partial.restart()
            self._receive_all()
            wrong = _what_is_wrong(self.checkpoint, self.partial.temporary)
        if wrong is not None:
            self.partial.restart()
            raise Gone(f"gave the wrong file, which was removed: {wrong}")

    def _receive_all(self) -> None:
        failed = 0
        while True:
            before = self.partial.size
            try:
                return self._receive()
            except Broken as broken:
                failed = 1 if self.partial.size - before >= GAIN_BYTES else failed + 1
                if failed >= self.manners.tries:
                    raise Gone(f"{broken}, {failed} times in a row") from broken
                pause_s = self.manners.pause_s(failed)
                self.tell(f"{broken}; trying again in {pause_s:g} s")
                self.manners.sleep(pause_s)

    def _receive(self) -> None:
        """Receives the bytes that ``partial`` lacks. Raises Broken if fewer came, Gone if it is another file."""
        offset = self._resumable()
        if offset == self.checkpoint.size_bytes:
            return
        version = "" if self.partial.origin is None else self.partial.origin[1]
        with closing(self._open(offset, version)) as reply:
            start, whole = span_of(reply)
            self._require_possible(whole)
            if start != offset:  # the server ignores ranges, or now has another version of the file
                self.partial.restart()
            if start not in (0, offset):
                raise Broken(f"asked for the bytes from {offset}, got those from {start}")
            self.partial.origin = (self.source, version_of(reply))
            self._copy(reply, whole)
        due = self.checkpoint.size_bytes if whole is None else whole
        if due is not None and self.partial.size < due:
            raise Broken(f"the connection ended after {self.partial.size} of {due} bytes")

    def _copy(self, reply: HTTPResponse, whole: int | None) -> None:
        most = self.checkpoint.most_bytes if whole is None else whole
        self.show(self.partial.size, whole)
        while True:
            try:
                piece = reply.read1(CHUNK_BYTES)
            except (OSError, HTTPException) as error:
                raise Broken(f"the connection broke after {self.partial.size} bytes ({words(error)})") from error
            if not piece:
                return
            if self.partial.size + len(piece) > most:
                self.partial.restart()
                raise Gone(f"expected at most {most} bytes, got more")
            self.partial.write(piece)
            self.show(self.partial.size, whole)

    def _open(self, offset: int, version: str) -> HTTPResponse:
        """A reply whose body is the file. For large files Drive first sends a page, whose form leads to the file."""
        try:
            if not self.source.asks_first:
                reply = self.web.get(self.source.url, offset, version)
            else:
                reply = self.web.get(self.source.url)
                url = reply.geturl()
                if is_page(reply):
                    url = self._confirmed(reply)
                    reply = self.web.get(url, offset, version)
                elif offset:
                    reply.close()
                    reply = self.web.get(url, offset, version)
        except RangeRefused:
            self.partial.restart()
            raise Broken(f"the server has nothing from byte {offset} on") from None
        if is_page(reply):
            raise Gone(f"gave a web page instead of the file: {read_page(reply).says}")
        return reply

    def _confirmed(self, reply: HTTPResponse) -> str:
        url = reply.geturl()
        page = read_page(reply)
        if page.target is None:
            raise Gone(f"gave a web page instead of the file: {page.says}")
        return urljoin(url, page.target)

    def _resumable(self) -> int:
        """The number of bytes to resume from. Discards bytes that cannot be continued from this source."""
        size, known = self.partial.size, self.checkpoint.size_bytes
        same = self.partial.origin is not None and self.partial.origin[0] == self.source and self.partial.origin[1]
        fits = known is None or size <= known
        if size and not (fits and (self.checkpoint.sha256 is not None or same)):
            self.partial.restart()
        return self.partial.size

    def _require_possible(self, whole: int | None) -> None:
        """Refuses a reply of the wrong length: it is another file."""
        known, most = self.checkpoint.size_bytes, self.checkpoint.most_bytes
        if whole is not None and known is not None and whole != known:
            raise Gone(f"offers another file: expected {known} bytes, got {whole}")
        if whole is not None and whole > most:
            raise Gone(f"offers another file: expected about {self.checkpoint.about_bytes} bytes, got {whole}")
