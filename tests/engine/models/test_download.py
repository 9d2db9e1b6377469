"""Downloads from a server run by the tests, which fails in every way a server can. No test uses the network."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from flowreel.engine.errors import DownloadError, OutputExistsError, OutputWriteError, UsageError
from flowreel.engine.models import build_model
from flowreel.engine.models import download as module
from flowreel.engine.models.checkpoints import Checkpoint, Source
from flowreel.engine.models.download import download
from flowreel.engine.models.web import Manners

DATA = np.random.default_rng(0).bytes(600_000)
PAGE = "<html><head><title>{title}</title></head><body>{body}</body></html>"
FORM = """<form id="download-form" action="/bytes" method="get"><input type="hidden" name="id" value="7">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="a b&amp;c"></form>"""


class Handler(BaseHTTPRequestHandler):
    """Answers a path with the behaviour the test put there."""

    server: Server

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        self.server.paths[path](self)

    def log_message(self, *arguments: object) -> None:
        pass

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.ended = threading.Event()

    def handle_error(self, *arguments: object) -> None:
        pass  # the client hangs up on purpose

    def source(self, path: str, behaviour: Callable[[Handler], None], asks_first: bool = False) -> Source:
        self.paths[path] = behaviour
        return Source(f"source {path}", f"http://127.0.0.1:{self.server_port}{path}", asks_first)

    def ranges(self) -> list[str | None]:
        return [asked[1] for asked in self.asked]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.ended.set()
        server.shutdown()
        thread.join()


def gives(
    data: bytes = DATA, *, drops: tuple[int, ...] = (), ranges: bool = True, tags: tuple[str | None, ...] = ('"one"',)
) -> Callable[[Handler], None]:
    """Serves ``data``. The first requests break off after ``drops`` bytes; the tag changes with each request."""
    left, versions = list(drops), list(tags)

    def behaviour(handler: Handler) -> None:
        tag = versions.pop(0) if len(versions) > 1 else versions[0]
        asked, condition = handler.headers.get("Range"), handler.headers.get("If-Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges else 0
        if condition is not None and condition != tag:
            start = 0
        if start >= len(data):
            return handler.head(416)
        told = {"Content_Length": len(data) - start, **({"ETag": tag} if tag else {})}
        if start:
            handler.head(206, Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}", **told)
        else:
            handler.head(200, **told)
        handler.wfile.write(data[start:][: left.pop(0) if left else len(data)])

    return behaviour


def refuses(code: int, title: str = "") -> Callable[[Handler], None]:
    def behaviour(handler: Handler) -> None:
        handler.head(code, Content_Type="text/html; charset=utf-8")
        handler.wfile.write(PAGE.format(title=title, body="").encode())

    return behaviour


def known(*sources: Source, data: bytes = DATA) -> Checkpoint:
    sha256 = hashlib.sha256(data).hexdigest()
    return Checkpoint("Some-Net", "FlowNet2C", "some.pth.tar", len(data), len(data), sha256, sources)


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def manners(pauses: list[float]) -> Manners:
    return Manners(timeout_s=20, schemes=("http",), sleep=pauses.append)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_plain_download(server: Server, manners: Manners, tmp_path: Path) -> None:
    shown: list[tuple[int, int | None]] = []
    said: list[str] = []
    wanted = known(server.source("/a", gives()))
    path = download(
        wanted, tmp_path / "new" / "x.pth.tar", show=lambda *at: shown.append(at), tell=said.append, manners=manners
    )
    assert path.read_bytes() == DATA
    assert leftovers(path.parent) == ["x.pth.tar"]
    assert shown[-1] == (len(DATA), len(DATA))
    assert "sha256 are right" in said[-1]
    assert download(wanted, path, manners=manners) == path
    assert len(server.asked) == 1  # it was there already
    download(wanted, path, overwrite=True, manners=manners)
    assert len(server.asked) == 2


def test_into_a_folder_and_into_the_cache(
    server: Server, manners: Manners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = known(server.source("/a", gives()))
    there: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: there.append((tmp_path / "some.pth.tar").exists()))
    assert download(wanted, tmp_path, manners=manners) == tmp_path / "some.pth.tar"
    assert there == [False]  # all bytes are on the disk before it has its name
    monkeypatch.setenv("FLOWREEL_CACHE", str(tmp_path / "cache"))
    assert not wanted.downloaded
    assert download(wanted, manners=manners) == tmp_path / "cache" / "weights" / "some.pth.tar"
    assert wanted.downloaded
    with pytest.raises(UsageError, match="convert"):
        download(wanted, tmp_path / "x.SafeTensors", manners=manners)


def test_a_dropped_connection_goes_on_where_it_stopped(
    server: Server, manners: Manners, pauses: list[float], tmp_path: Path
) -> None:
    wanted = known(server.source("/a", gives(drops=(100_000, 50_000, 0))))
    path = download(wanted, tmp_path / "x", manners=manners)
    assert path.read_bytes() == DATA
    assert server.ranges() == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]
    assert {asked[2] for asked in server.asked[1:]} == {'"one"'}
    assert pauses == [1, 2, 4]


def test_a_connection_that_keeps_breaking(
    server: Server, manners: Manners, pauses: list[float], tmp_path: Path
) -> None:
    wanted = known(server.source("/a", gives(drops=(1000,) * 99)))
    with pytest.raises(DownloadError, match=r"ended after 5000 of 600000 bytes, 5 times in a row"):
        download(wanted, tmp_path / "x", manners=manners)
    assert len(server.asked) == 5
    assert pauses == [1, 2, 4, 8]
    assert leftovers(tmp_path) == ["x.partial"]  # correct so far: the next download continues from it
    server.paths["/a"] = gives()
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA
    assert server.ranges()[-1] == "bytes=5000-"


def test_tries_start_anew_when_a_connection_was_worth_it(
    server: Server, manners: Manners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GAIN_BYTES", 1000)
    wanted = known(server.source("/a", gives(drops=(20_000,) * 20)))
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA


def test_a_server_that_ignores_the_range_starts_over(server: Server, manners: Manners, tmp_path: Path) -> None:
    wanted = known(server.source("/a", gives(drops=(400_000,), ranges=False)))
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA
    assert server.ranges() == [None, "bytes=400000-"]


def test_a_file_that_changed_in_between_starts_over(server: Server, manners: Manners, tmp_path: Path) -> None:
    other = gives(bytes(len(DATA)), drops=(1000,), tags=('"zero"',))
    right = gives(tags=('"one"',))
    behaviours = [other, right]
    wanted = known(server.source("/a", lambda handler: behaviours.pop(0)(handler)))
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA
    assert server.asked[1][1:] == ("bytes=1000-", '"zero"')


def test_a_file_of_untold_length_that_breaks_off(server: Server, manners: Manners, tmp_path: Path) -> None:
    def plain(handler: Handler) -> None:
        handler.head(200)
        handler.wfile.write(DATA[:1000])

    def in_chunks(handler: Handler) -> None:
        handler.head(200, Transfer_Encoding="chunked")
        handler.wfile.write(b"7d0\r\n" + DATA[:1000])

    behaviours = [plain, in_chunks, gives()]
    wanted = known(server.source("/a", lambda handler: behaviours.pop(0)(handler)))
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA
    assert server.ranges() == [None, "bytes=1000-", "bytes=1000-"]


def test_what_an_earlier_download_left_is_checked(server: Server, manners: Manners, tmp_path: Path) -> None:
    wanted = known(server.source("/a", gives()))
    for left, ranges in (
        (DATA[:1000], ["bytes=1000-"]),
        (bytes(1000), ["bytes=1000-", None]),  # the sha256 shows that it is wrong, and all is fetched again
        (DATA, []),
        (bytes(len(DATA)), [None]),
        (DATA + b"more", [None]),
    ):
        server.asked.clear()
        (tmp_path / "x.partial").write_bytes(left)
        assert download(wanted, tmp_path / "x", overwrite=True, manners=manners).read_bytes() == DATA
        assert server.ranges() == ranges
    behaviours = [lambda handler: handler.head(416), gives()]
    server.paths["/a"] = lambda handler: behaviours.pop(0)(handler)
    (tmp_path / "x.partial").write_bytes(DATA[:1000])
    assert download(wanted, tmp_path / "x", overwrite=True, manners=manners).read_bytes() == DATA
    assert server.ranges()[-2:] == ["bytes=1000-", None]


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (gives(bytes(len(DATA))), f"expected sha256 {hashlib.sha256(DATA).hexdigest()}, got"),
        (gives(DATA[:-1]), "expected 600000 bytes, got 599999"),
        (gives(DATA + b"x"), "expected 600000 bytes, got 600001"),
        (refuses(404, "Not here"), "HTTP 404 Not Found: Not here"),
        (refuses(403, "Access denied"), "HTTP 403 Forbidden: Access denied"),
        (refuses(200, "Google Drive - Quota exceeded"), "web page instead of the file: Google Drive - Quota exceeded"),
        (refuses(429), "HTTP 429 Too Many Requests, 5 times in a row"),
        (refuses(503), "HTTP 503 Service Unavailable, 5 times in a row"),
        (lambda handler: handler.head(302, Location="ftp://127.0.0.1/x"), "ftp://127.0.0.1/x is not http"),
        (lambda handler: handler.head(302, Location="file:///etc/hostname"), "HTTP 302"),
        (lambda handler: handler.head(302, Location="/a"), "HTTP 302"),
        (lambda handler: None, "no connection"),
        (lambda handler: handler.head(206, Content_Range="bytes 5-9/600000"), "bytes from 0, got those from 5"),
        (lambda handler: handler.head(206), "without saying which"),
    ],
    ids=lambda value: value.split(":")[0][:20] if isinstance(value, str) else "",
)
def test_a_source_that_fails_is_named_and_leaves_nothing(
    behaviour: Callable[[Handler], None], words: str, server: Server, manners: Manners, tmp_path: Path
) -> None:
    wanted = known(server.source("/a", behaviour))
    with pytest.raises(DownloadError) as caught:
        download(wanted, tmp_path / "x", manners=manners)
    said = str(caught.value)
    for part in (words, "source /a", "Some-Net", "By hand", "600000 bytes", str(wanted.sha256), "--weights"):
        assert part in said
    assert leftovers(tmp_path) == []


def test_the_next_source_takes_over(server: Server, manners: Manners, tmp_path: Path) -> None:
    """Bytes of an earlier source are kept if they may be right, and dropped if they were wrong."""
    dead = server.source("/dead", refuses(404))
    wrong = server.source("/wrong", gives(bytes(len(DATA))))
    broken = server.source("/broken", gives(drops=(1000,) * 99))
    good = server.source("/good", gives())
    said: list[str] = []
    path = download(known(dead, wrong, broken, good), tmp_path / "x", tell=said.append, manners=manners)
    assert path.read_bytes() == DATA
    assert server.asked[-1][:2] == ("/good", "bytes=5000-")
    assert any("wrong file" in line for line in said)
    assert [asked[0] for asked in server.asked].count("/wrong") == 1
    with pytest.raises(DownloadError, match=r"source /dead.*HTTP 404.*source /wrong.*wrong file"):
        download(known(dead, wrong), tmp_path / "y", manners=manners)
    with pytest.raises(DownloadError, match="no source"):
        download(known(), tmp_path / "y", manners=manners)


def drive(page: str) -> Callable[[Handler], None]:
    def behaviour(handler: Handler) -> None:
        handler.head(200, Content_Type="text/html; charset=utf-8", Set_Cookie="seen=yes; Path=/")
        handler.wfile.write(PAGE.format(title="Google Drive - Virus scan warning", body=page).encode())

    return behaviour


def test_drives_page_in_between(server: Server, manners: Manners, tmp_path: Path) -> None:
    """The form on it leads to the file if its token, id and cookie are sent, also when resuming."""
    file = gives(drops=(1000,))

    def guarded(handler: Handler) -> None:
        confirmed = handler.path == "/bytes?id=7&confirm=t&uuid=a+b%26c" and handler.headers.get("Cookie") == "seen=yes"
        (file if confirmed else refuses(403))(handler)

    server.paths["/bytes"] = guarded
    path = download(known(server.source("/uc", drive(FORM), asks_first=True)), tmp_path / "x", manners=manners)
    assert path.read_bytes() == DATA
    assert server.ranges() == [None, None, None, "bytes=1000-"]


def test_drive_without_its_page(server: Server, manners: Manners, tmp_path: Path) -> None:
    (tmp_path / "x.partial").write_bytes(DATA[:1000])
    path = download(known(server.source("/uc", gives(), asks_first=True)), tmp_path / "x", manners=manners)
    assert path.read_bytes() == DATA
    assert server.ranges() == [None, "bytes=1000-"]


@pytest.mark.parametrize("page", ["", FORM.replace("confirm", "other"), "<form><input name=confirm>", "<<<&;<form id="])
def test_drives_refusals(page: str, server: Server, manners: Manners, tmp_path: Path) -> None:
    why = '<p class="uc-error-caption">Too many users have\n viewed it.</p>'
    wanted = known(server.source("/uc", drive(why + page), asks_first=True))
    with pytest.raises(DownloadError, match="Virus scan warning: Too many users have viewed it"):
        download(wanted, tmp_path / "x", manners=manners)
    server.paths["/bytes"] = refuses(200, "Quota exceeded")
    with pytest.raises(DownloadError, match="Quota exceeded"):
        download(known(server.source("/uc", drive(FORM), asks_first=True)), tmp_path / "x", manners=manners)


def test_a_server_that_falls_silent(server: Server, manners: Manners, tmp_path: Path) -> None:
    def silent(handler: Handler) -> None:
        handler.head(200, Content_Length=len(DATA))
        handler.wfile.write(DATA[:1000])
        server.ended.wait()

    wanted = known(server.source("/a", silent))
    with pytest.raises(DownloadError, match="timed out"):
        download(wanted, tmp_path / "x", manners=replace(manners, timeout_s=0.1, tries=2))


def test_a_server_that_never_ends(server: Server, manners: Manners, tmp_path: Path) -> None:
    def endless(handler: Handler) -> None:
        handler.head(200)
        while not server.ended.is_set():
            handler.wfile.write(bytes(100_000))

    with pytest.raises(DownloadError, match="expected at most 600000 bytes"):
        download(known(server.source("/a", endless)), tmp_path / "x", manners=manners)
    assert leftovers(tmp_path) == []


def test_nobody_there(manners: Manners, server: Server, tmp_path: Path) -> None:
    closed = Source("closed", "http://127.0.0.1:1/x")
    with pytest.raises(DownloadError, match="no connection"):
        download(known(closed), tmp_path / "x", manners=manners)
    with pytest.raises(DownloadError, match="not https"):
        download(known(server.source("/a", gives())), tmp_path / "x")  # by default only https is allowed
    assert server.asked == []


def test_another_file_in_the_way_is_kept(server: Server, manners: Manners, tmp_path: Path) -> None:
    wanted = known(server.source("/a", gives()))
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"expected 600000 bytes, got 4.*--overwrite"):
        download(wanted, tmp_path / "notes", manners=manners)
    assert (tmp_path / "notes").read_text() == "mine"
    assert server.asked == []
    with pytest.raises(DownloadError):
        download(known(server.source("/b", refuses(404))), tmp_path / "notes", overwrite=True, manners=manners)
    assert (tmp_path / "notes").read_text() == "mine"


def test_two_at_a_time(server: Server, manners: Manners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = known(server.source("/a", gives()))
    (tmp_path / "x.partial").write_bytes(DATA[:5])
    with module._Partial.open(tmp_path / "x"), pytest.raises(OutputWriteError, match="another download"):
        download(wanted, tmp_path / "x", manners=manners)
    assert (tmp_path / "x.partial").read_bytes() == DATA[:5]

    def locked_once_published(_: int) -> bool:
        (tmp_path / "x.partial").rename(tmp_path / "x")
        return True

    monkeypatch.setattr(module, "locked", locked_once_published)
    with pytest.raises(OutputWriteError, match="another download"):
        download(wanted, tmp_path / "x", manners=manners)
    assert (tmp_path / "x").read_bytes() == DATA[:5]


def test_a_full_disk(server: Server, manners: Manners, tmp_path: Path, files_up_to: Callable[[int], object]) -> None:
    wanted = known(server.source("/a", gives()))
    with files_up_to(300_000), pytest.raises(OutputWriteError, match="cannot write"):  # type: ignore[attr-defined]
        download(wanted, tmp_path / "x", manners=manners)
    assert leftovers(tmp_path) == ["x.partial"]
    assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == DATA
    (tmp_path / "file").touch()
    with pytest.raises(OutputWriteError, match="cannot write"):
        download(wanted, tmp_path / "file" / "x", manners=manners)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint file of a narrow FlowNet2S."""
    path = tmp_path_factory.mktemp("made") / "x.pth.tar"
    torch.save({"state_dict": build_model("FlowNet2S", width=0.05).state_dict()}, path)
    return path.read_bytes()


class TestOfUnknownHash:
    """Checkpoints without a known sha256: only their model is known."""

    @pytest.fixture(autouse=True)
    def _narrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PUBLISHED_WIDTH", 51 / 1024)

    def wanted(self, data: bytes, *sources: Source, model: str = "FlowNet2S") -> Checkpoint:
        return Checkpoint("Some-S", model, "s.pth.tar", len(data), None, None, sources)

    def test_loads(self, data: bytes, server: Server, manners: Manners, tmp_path: Path) -> None:
        said: list[str] = []
        wanted = self.wanted(data, server.source("/a", gives(data)))
        assert download(wanted, tmp_path / "x", tell=said.append, manners=manners).read_bytes() == data
        assert "loads as FlowNet2S" in said[-1]
        download(wanted, tmp_path / "x", manners=manners)
        assert len(server.asked) == 1
        (tmp_path / "y").write_text("mine")
        with pytest.raises(OutputExistsError):
            download(wanted, tmp_path / "y", manners=manners)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda data: data[:-1000], "does not load"),
            (lambda data: DATA, "does not load"),
            (lambda data: data * 3, "expected about"),
        ],
    )
    def test_is_something_else(
        self,
        change: Callable[[bytes], bytes],
        words: str,
        data: bytes,
        server: Server,
        manners: Manners,
        tmp_path: Path,
    ) -> None:
        wanted = self.wanted(data, server.source("/a", gives(change(data))))
        with pytest.raises(DownloadError, match=words):
            download(wanted, tmp_path / "x", manners=manners)
        assert leftovers(tmp_path) == []

    def test_is_another_network(
        self, data: bytes, server: Server, manners: Manners, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = server.source("/a", gives(data))
        with pytest.raises(DownloadError, match=r"expected FlowNet2SD .*got FlowNet2S "):
            download(self.wanted(data, source, model="FlowNet2SD"), tmp_path / "x", manners=manners)
        monkeypatch.setattr(module, "PUBLISHED_WIDTH", 1.0)
        with pytest.raises(DownloadError, match=r"width 1, got FlowNet2S of width 0\.0"):
            download(self.wanted(data, source), tmp_path / "x", manners=manners)

    @pytest.mark.parametrize(("tag", "second"), [('"one"', "bytes=1000-"), (None, None), ('W/"weak"', None)])
    def test_goes_on_only_where_the_server_names_the_version(
        self, tag: str | None, second: str | None, data: bytes, server: Server, manners: Manners, tmp_path: Path
    ) -> None:
        """Without a hash nothing else would show that two halves are of different files."""
        (tmp_path / "x.partial").write_bytes(data[:500])  # of an unknown version
        wanted = self.wanted(data, server.source("/a", gives(data, drops=(1000,), tags=(tag,))))
        assert download(wanted, tmp_path / "x", manners=manners).read_bytes() == data
        assert server.ranges() == [None, second]

    def test_halves_of_two_sources_are_not_joined(
        self, data: bytes, server: Server, manners: Manners, tmp_path: Path
    ) -> None:
        first = server.source("/first", gives(data, drops=(1000, 1000)))
        second = server.source("/second", gives(data))
        wanted = self.wanted(data, first, second)
        assert download(wanted, tmp_path / "x", manners=replace(manners, tries=2)).read_bytes() == data
        assert [asked[:2] for asked in server.asked][-1] == ("/second", None)
