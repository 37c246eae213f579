"""Where media come from: a path, URL, `data:` URL, bytes, file object or stdin -> bytes that can be read many times.

Nothing here knows what the bytes mean. A pipe and a download are spooled once, bounded, into a temporary file that
has no name where the system allows it and is gone when the `Stored` is closed, whatever happens in between.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import http.client
import io
import os
import re
import ssl
import stat
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO
from urllib.parse import quote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from ..errors import MediaError, OptionError
from ..options import Limits

Bytes = bytes | bytearray | memoryview
"""A whole file in memory."""

Picture = str | Path | Bytes | np.ndarray | Image.Image
"""One still picture, however it is held."""

Source = str | Path | Bytes | BinaryIO | np.ndarray | Image.Image | Sequence[Picture]
"""What a user may hand in as a medium. A sequence is a video, picture by picture."""

READ_BYTES = 256 * 1024
SLOWEST_BYTES_PER_S = 32 * 1024
"""A download slower than this, on average after the first `network_timeout_s`, has stalled."""

FILE_SCHEME = "file://"
_SCHEMES = re.compile(r"(https?|file)://|data:", re.IGNORECASE)
"""How a string says that it is an address. Everything else is a path: `C:\\clip.mp4`, `12:30 call.mkv`."""


class Stored:
    """Bytes at rest: `name` for messages, `size_bytes`, and any number of independent readers.

    All readers share one open file, so a file that is renamed or deleted meanwhile stays readable.
    """

    def __init__(self, file: BinaryIO, name: str, *, owned: bool = True) -> None:
        self.name = name
        self._file = file
        self._owned = owned
        self._lock = threading.Lock()
        self.size_bytes = file.seek(0, io.SEEK_END)

    def reader(self) -> io.BufferedReader:
        """A binary file at position 0; closing it leaves the bytes open for others."""
        return io.BufferedReader(_View(self), READ_BYTES)

    def read_at(self, offset: int, size_bytes: int) -> bytes:
        """Raises MediaError where a disk fails, or the medium was closed."""
        try:
            with self._lock:
                self._file.seek(offset)
                return self._file.read(size_bytes)
        except (OSError, ValueError) as error:
            raise _unreadable(self.name, error) from error

    def digest(self) -> str:
        """SHA-256 of the bytes: two sources alike in it hold the same."""
        found = hashlib.sha256()
        with self.reader() as file:
            while piece := file.read(READ_BYTES):
                found.update(piece)
        return found.hexdigest()

    def close(self) -> None:
        """Close what this package opened; a caller's own file object stays open."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Stored:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _View(io.RawIOBase):
    """One reader's own position over shared bytes."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stored.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._stored.read_at(self._position, len(buffer))
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def open_stored(source: str | Path | Bytes | BinaryIO, limits: Limits) -> Stored:
    """Open the bytes behind a source; the caller closes the result.

    A string that begins with `http://`, `https://`, `file://` or `data:` is an address, `-` is stdin, any other string
    is a path, and a `Path` is always a path. A file object is read from its beginning, in place, if it can be, and
    otherwise spooled from where it is. Bytes that may change (bytearray, memoryview) are copied.

    Raises MediaError: nothing there, not readable, empty, not answering, or beyond `limits.max_media_bytes`;
    OptionError: a path of 0 characters.
    """
    if isinstance(source, str) and not source:
        raise OptionError(
            "the path of a medium is empty: 0 characters", hint="name a file or an address, or - for stdin"
        )
    name = source_name(source)
    try:
        stored = _opened(source, name, limits)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unreadable(name, error) from error
    if stored.size_bytes == 0:
        stored.close()
        hint = "a pipe can be read only once" if name == "stdin" else "copy or download it again"
        raise MediaError(f"{name} is empty: 0 bytes", path=name, hint=hint)
    return stored


def source_name(source: object) -> str:
    """How messages call a source: short, and without the password or query of a URL."""
    match source:
        case str() if source == "-":  # a bare literal would compare arrays element by element
            return "stdin"
        case str() if _SCHEMES.match(source) and source[:5].lower() == "data:":
            return f"data: URL of {len(source)} characters"
        case str() if _SCHEMES.match(source):
            return re.sub("//[^/@]*@", "//", source.partition("?")[0])
        case str() | Path():
            return str(source)
        case bytes() | bytearray() | memoryview():
            return f"{memoryview(source).nbytes} bytes"
        case np.ndarray():
            return f"array {list(source.shape)} {source.dtype}"
    name = getattr(source, "name", "")
    return name if isinstance(name, str) and name else type(source).__name__


def _opened(source: str | Path | Bytes | BinaryIO, name: str, limits: Limits) -> Stored:
    match source:
        case bytes() | bytearray() | memoryview():
            return Stored(io.BytesIO(bytes(source)), name)
        case "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise MediaError("stdin has no medium: nothing is piped in", path=name, hint="lowvram run - < clip.mp4")
            return _from_file(sys.stdin.buffer, name, limits)
        case str() if (scheme := _SCHEMES.match(source)) is not None:
            return _from_address(source, scheme[0].lower(), name, limits)
        case str() | Path():
            return _from_path(Path(source), name, limits)
    return _from_file(source, name, limits)


def _from_address(address: str, scheme: str, name: str, limits: Limits) -> Stored:
    if scheme == "data:":
        return Stored(io.BytesIO(_decode_data_url(address, name)), name)
    if scheme == FILE_SCHEME:
        return _from_path(_path_of_address(address), name, limits)
    return Stored(_download(address, name, limits), name)


def local_path(source: str) -> Path | None:
    """Where on this machine the medium lies that a string names; None for stdin, `data:` and the web, and for a file's
    address that cannot be one on Windows."""
    scheme = _SCHEMES.match(source)
    if scheme is None:
        return None if source == "-" else Path(source)
    with suppress(OSError):
        return _path_of_address(source) if scheme[0].lower() == FILE_SCHEME else None
    return None


def _path_of_address(address: str) -> Path:
    local = address[len(FILE_SCHEME) :].removeprefix("localhost")
    if os.name == "nt" and not local.startswith("/"):
        local = f"//{local}"  # a share: file://server/folder/clip.mp4
    return Path(urllib.request.url2pathname(local))


def _from_path(path: Path, name: str, limits: Limits) -> Stored:
    # On Windows opening a folder reads as "permission denied".
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    file = path.open("rb")
    if _at_rest(file):
        return Stored(file, name)
    with file:
        return Stored(_spool(lambda: file.read1(READ_BYTES), name, limits), name)


def _from_file(file: BinaryIO, name: str, limits: Limits) -> Stored:
    if not callable(getattr(file, "read", None)):
        raise MediaError(
            f"a medium cannot be read from {type(file).__name__}",
            path=name,
            hint="pass a path, a URL, bytes, a binary file, a numpy array or a PIL image",
        )
    if not isinstance(file.read(0), bytes):
        raise MediaError(f"{name} is open as text", path=name, hint='open it with mode "rb"')
    if _at_rest(file):
        return Stored(file, name, owned=False)
    return Stored(_spool(lambda: file.read(READ_BYTES), name, limits), name)


def _at_rest(file: BinaryIO) -> bool:
    """Whether a file can be read again from its beginning.

    Windows calls pipes seekable, and their end is then at 0: where the system has an opinion, the kind decides.
    """
    seekable = getattr(file, "seekable", None)
    if seekable is None or not seekable():
        return False
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (AttributeError, OSError):  # in memory, or inside another file
        return True


def _decode_data_url(url: str, name: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma:
        raise MediaError(f"{name} has no comma before its content", path=name, hint="data:image/png;base64,...")
    content = unquote_to_bytes(payload)
    if not head.lower().endswith(";base64"):
        return content
    try:
        return decode_base64(content)
    except binascii.Error as error:
        raise MediaError(f"{name} is not valid base64: {error}", path=name, hint="encode the file again") from error


def decode_base64(text: bytes) -> bytes:
    """Base64 of either alphabet (RFC 4648, 4 and 5: `+/` or `-_`), padded or not, broken into lines or not.

    Raises binascii.Error for anything else.
    """
    letters = b"".join(text.split()).translate(bytes.maketrans(b"-_", b"+/"))
    return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)


def _download(url: str, name: str, limits: Limits) -> BinaryIO:
    """Fetch `url` into a temporary file.

    A server has `network_timeout_s` for each answer and must keep up `SLOWEST_BYTES_PER_S` on average after that: a
    long file on a slow line arrives, and a trickle does not last for ever.
    """
    started_s = time.monotonic()
    try:
        with _web().open(_request(url), timeout=limits.network_timeout_s) as response:
            declared_bytes = int(response.headers.get("Content-Length") or 0)
            if declared_bytes > limits.max_media_bytes:
                raise _too_large(name, f"{declared_bytes:,} bytes", limits)
            pieces = _timely(lambda: response.read1(READ_BYTES), started_s, name, limits)
            file = _spool(lambda: next(pieces, b""), name, limits)
    except urllib.error.HTTPError as error:
        with error:
            raise MediaError(
                f"{name} cannot be had: the server answered {error.code} {_one_line(error.reason)}",
                path=name,
                hint="open the address in a browser",
            ) from error
    received_bytes = file.tell()
    if received_bytes < declared_bytes:
        file.close()
        raise MediaError(
            f"{name} broke off after {received_bytes:,} of {declared_bytes:,} bytes", path=name, hint="try again"
        )
    return file


def _web() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS only: a redirect must not lead to `file:` or `ftp:`."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _request(url: str) -> urllib.request.Request:
    """The request for a URL as people paste it: spaces and letters outside ASCII are escaped, `%20` is left alone."""
    parts = urlsplit(url)
    escaped = parts._replace(
        path=quote(parts.path, safe="/%:@!$&'()*+,;=~"), query=quote(parts.query, safe="/%:@!$&'()*+,;=~?"), fragment=""
    )
    return urllib.request.Request(escaped.geturl(), headers={"User-Agent": "lowvram"})


def _timely(read: Callable[[], bytes], started_s: float, name: str, limits: Limits) -> Iterator[bytes]:
    received_bytes = 0
    while piece := read():
        received_bytes += len(piece)
        spent_s = time.monotonic() - started_s
        if spent_s > limits.network_timeout_s + received_bytes / SLOWEST_BYTES_PER_S:
            raise MediaError(
                f"{name} stalled: {received_bytes:,} bytes in {spent_s:.0f} s",
                path=name,
                limit="network_timeout_s",
                hint="download it first, or raise network_timeout_s",
            )
        yield piece


def _spool(read: Callable[[], bytes], name: str, limits: Limits) -> BinaryIO:
    """Copy what `read` gives until it gives nothing, into a temporary file that vanishes when closed."""
    with ExitStack() as undo:
        file = undo.enter_context(tempfile.TemporaryFile(prefix="lowvram-"))
        while piece := read():
            if file.tell() + len(piece) > limits.max_media_bytes:
                raise _too_large(name, "more", limits)
            file.write(piece)
        file.flush()
        undo.pop_all()
        return file


def _too_large(name: str, size: str, limits: Limits) -> MediaError:
    return MediaError(
        f"{name} is too large: {size}, where at most {limits.max_media_bytes:,} bytes are read",
        path=name,
        limit="max_media_bytes",
        hint="cut it, or raise max_media_bytes",
    )


def _unreadable(name: str, error: OSError | ValueError | http.client.HTTPException) -> MediaError:
    cause: object = error.reason if isinstance(error, urllib.error.URLError) else error
    reason = _one_line(getattr(cause, "strerror", None) or str(cause)) or type(cause).__name__
    limit = "network_timeout_s" if isinstance(cause, TimeoutError) else ""
    return MediaError(f"cannot read {name}: {reason}", path=name, limit=limit, hint=_way_out(cause))


def _one_line(reason: str) -> str:
    """A server's own words, and what urllib says of a circle of redirects, may run over several lines, or hold codes
    that steer a terminal."""
    return "".join(filter(str.isprintable, " ".join(reason.split())))


def _way_out(cause: object) -> str:
    match cause:
        case FileNotFoundError(filename=str() | Path()):
            return f"looked in {os.getcwd()}; an address begins with http://, https://, file:// or data:"
        case IsADirectoryError():
            return "name one file in it"
        case PermissionError():
            return "check who may read it"
        case TimeoutError():
            return "try again, or raise network_timeout_s"
        case ssl.SSLCertVerificationError():
            return "if the server's authority is your own, name its certificate in SSL_CERT_FILE"
        case OSError(errno=errno.ENAMETOOLONG) | ValueError():
            return "check the path or the address"
    return "check the address, the connection and the space for temporary files"
