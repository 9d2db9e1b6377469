"""Files over HTTP from servers that are slow, break off, or answer with a page: one GET, and how to read its reply.

Failures are of three kinds: ``Broken``, worth a retry; ``Gone``, not worth one; and ``RangeRefused``, when the file has
no bytes from the requested offset on.
"""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException, HTTPMessage
from importlib import metadata
from typing import IO, TYPE_CHECKING, NoReturn
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPCookieProcessor, HTTPRedirectHandler, Request, build_opener

if TYPE_CHECKING:
    from http.client import HTTPResponse

PAGE_BYTES = 1 << 20  # read at most of an HTML page that came instead of a file


@dataclass(frozen=True)
class Manners:
    """Time-outs, retries and allowed URL schemes."""

    timeout_s: float = 30  # of every connect and every read
    tries: int = 5  # consecutive tries at one source that bring little, before giving it up
    first_pause_s: float = 1  # before the second try; doubles with each further one
    longest_pause_s: float = 30
    schemes: tuple[str, ...] = ("https",)
    sleep: Callable[[float], None] = time.sleep

    def pause_s(self, failed: int) -> float:
        """The pause before the next try, after ``failed`` consecutive failures."""
        return min(self.first_pause_s * 2.0 ** (failed - 1), self.longest_pause_s)


class Broken(Exception):
    """This try failed; the next may not."""


class Gone(Exception):
    """This source does not have the file, or refuses it to us."""


class RangeRefused(Exception):
    """HTTP 416: the file has no bytes from that offset on."""


class Web:
    """GET over allowed schemes only, with cookies, time-outs and redirects; failures raise one of the three above."""

    def __init__(self, manners: Manners) -> None:
        self.manners = manners
        self.opener = build_opener(_Redirects(manners.schemes), HTTPCookieProcessor())

    def get(self, url: str, offset: int = 0, version: str = "") -> HTTPResponse:
        """The reply to a GET: from byte ``offset`` on, or the whole file if it is no longer ``version``."""
        _require_scheme(url, self.manners.schemes)
        agent = f"flowreel/{metadata.version('flowreel')}"
        request = Request(url, headers={"User-Agent": agent, "Accept-Encoding": "identity"})
        if offset:
            request.add_header("Range", f"bytes={offset}-")
            if version:
                request.add_header("If-Range", version)
        try:
            reply: HTTPResponse = self.opener.open(request, timeout=self.manners.timeout_s)
        except HTTPError as error:
            with error:
                _sort(error)
        except (OSError, HTTPException, ValueError) as error:
            cause = error.reason if isinstance(error, URLError) else error
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise Gone(f"its certificate is not trusted ({words(cause)})") from error
            if isinstance(cause, socket.gaierror):
                raise Gone(f"{urlsplit(url).hostname} is not found; is there a network?") from error
            raise Broken(f"no connection ({words(cause)})") from error
        return reply


class _Redirects(HTTPRedirectHandler):
    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        try:
            _require_scheme(newurl, self.schemes)
        except Gone:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_scheme(url: str, schemes: tuple[str, ...]) -> None:
    if urlsplit(url).scheme not in schemes:
        raise Gone(f"{url} is not {' or '.join(schemes)}: not followed")


def _sort(error: HTTPError) -> NoReturn:
    """Raises RangeRefused for 416, Broken for statuses that may be temporary, else Gone."""
    said = f"HTTP {error.code} {error.reason}"
    if error.code == 416:
        raise RangeRefused from error
    if error.code in (408, 425, 429) or error.code >= 500:
        raise Broken(said) from error
    if is_page(error):
        with suppress(OSError, HTTPException):
            said = f"{said}: {read_page(error).says}"
    raise Gone(said) from error


def is_page(reply: HTTPResponse | HTTPError) -> bool:
    return (reply.headers.get_content_type() if "Content-Type" in reply.headers else "") == "text/html"


def span_of(reply: HTTPResponse) -> tuple[int, int | None]:
    """(first byte, size of the whole file in bytes) of a reply; the size is None if the server does not give it."""
    if reply.status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", reply.headers.get("Content-Range", "").strip())
        if told is None:
            raise Broken("the server gave a part without saying which")
        return int(told[1]), None if told[2] == "*" else int(told[2])
    length = reply.headers.get("Content-Length", "")
    return 0, int(length) if length.isdecimal() else None


def version_of(reply: HTTPResponse) -> str:
    """The reply's validator for If-Range: a strong ETag, else Last-Modified; empty if there is neither."""
    tag: str = reply.headers.get("ETag", "")
    return tag if tag.startswith('"') else reply.headers.get("Last-Modified", "")


def read_page(reply: HTTPResponse | HTTPError) -> Page:
    page = Page()
    try:
        with closing(reply):
            page.feed(reply.read(PAGE_BYTES).decode("utf-8", "replace"))
    except (OSError, HTTPException) as error:
        raise Broken(f"the connection broke ({words(error)})") from error
    return page


class Page(HTMLParser):
    """The title and caption of an HTML page, and where its download form leads."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.caption = ""  # Drive's explanation of a refusal
        self._inside = ""
        self._action: str | None = None
        self._in_form = False
        self._fields: dict[str, str] = {}

    @property
    def says(self) -> str:
        said = ": ".join(" ".join(part.split()) for part in (self.title, self.caption) if part.strip())
        return said[:300] or "a page without a title"

    @property
    def target(self) -> str | None:
        """The URL of the page's confirmation form, perhaps relative; None if there is no such form."""
        if self._action is None or "confirm" not in self._fields:
            return None
        return f"{self._action}{'&' if '?' in self._action else '?'}{urlencode(self._fields)}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        if tag == "title":
            self._inside = "title"
        elif "uc-error-caption" in told.get("class", ""):
            self._inside = "caption"
        elif tag == "form" and told.get("id") == "download-form":
            self._action, self._in_form = told.get("action", ""), True
        elif tag == "input" and self._in_form and told.get("name"):
            self._fields[told["name"]] = told.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._in_form = False
        if tag in ("title", "p", "div"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "title":
            self.title += data
        elif self._inside == "caption":
            self.caption += data


def words(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
