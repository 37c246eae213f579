from __future__ import annotations

import base64
import io
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lowvram.errors import MediaError, OptionError
from lowvram.media.sources import open_stored, source_name
from lowvram.options import Limits

CONTENT = bytes(range(256)) * 40
HASTY = Limits(network_timeout_s=0.3, max_media_bytes=20_000)


def read(source, limits: Limits = HASTY) -> bytes:
    with open_stored(source, limits) as stored, stored.reader() as file:
        return file.read()


class Web(BaseHTTPRequestHandler):
    """A server with one address for each way in which servers behave."""

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        asked.append(self.path)
        getattr(self, self.path.split("?")[0].rpartition("/")[2].partition("%")[0])()

    def begin(self, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def clip(self) -> None:
        self.begin(Content_Length=len(CONTENT))
        self.wfile.write(CONTENT)

    def undeclared(self) -> None:
        self.begin()
        self.wfile.write(CONTENT)

    def missing(self) -> None:
        self.send_error(404)

    def silent(self) -> None:
        closing.wait(10)

    def trickle(self) -> None:
        self.begin(Content_Length=len(CONTENT))
        while not closing.wait(0.02):
            self.wfile.write(b"x")

    def huge(self) -> None:
        self.begin(Content_Length=10**12)

    def endless(self) -> None:
        self.begin()
        while not closing.is_set():
            self.wfile.write(CONTENT)

    def torn(self) -> None:
        self.begin(Content_Length=len(CONTENT) + 1)
        self.wfile.write(CONTENT)

    def moved(self) -> None:
        self.begin(302, Location="/clip")

    def astray(self) -> None:
        self.begin(302, Location="ftp://127.0.0.1/clip")

    def circle(self) -> None:
        self.begin(302, Location="/circle")

    def chatter(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    def paint(self) -> None:
        self.wfile.write(b"HTTP/1.0 404 \x1b[31mred\r\n\r\n")


asked: list[str] = []
closing = threading.Event()


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients here hang up on purpose
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("no_proxy", "127.0.0.1")
        yield f"http://127.0.0.1:{server.server_port}"
    closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "name", ["a clip.mp4", "Besuch in Köln – 日本.mkv", "12:30 call.webm", "C:\\clip.mp4", "data", "-x"]
)
def test_a_string_without_a_scheme_is_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / name).write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert read(name) == read(tmp_path / name) == CONTENT


def test_a_path_object_is_never_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data:,hello").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert read(Path("data:,hello")) == CONTENT


@pytest.mark.parametrize("host", ["", "localhost"])
def test_a_file_url_is_unescaped(host: str, tmp_path: Path):
    (tmp_path / "a clip #1.mp4").write_bytes(CONTENT)
    assert read(f"file://{host}{tmp_path.as_posix()}/a%20clip%20%231.mp4") == CONTENT


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
@pytest.mark.parametrize("ending", [0, 1, 2])
def test_a_data_url_may_have_either_alphabet_line_breaks_and_no_padding(encode: Callable, ending: int):
    content = CONTENT[: len(CONTENT) - ending]
    text = encode(content).decode()
    assert read(f"data:;base64,{text}") == read(f"data:;base64,{text.rstrip().rstrip('=')}") == content


@pytest.mark.parametrize("head", ["data:video/mp4;base64,", "DATA:;base64,"])
def test_a_data_url_is_decoded(head: str):
    assert read(head + base64.b64encode(CONTENT).decode()) == CONTENT
    assert read("data:text/plain,a%20b") == b"a b"


@pytest.mark.parametrize(("url", "reason"), [("data:image/png;base64,@@", "base64"), ("data:image/png", "no comma")])
def test_a_bad_data_url_says_what_is_wrong_with_it(url: str, reason: str):
    with pytest.raises(MediaError, match=reason):
        read(url)


@pytest.mark.parametrize(
    "source", [CONTENT, bytearray(CONTENT), memoryview(CONTENT), memoryview(CONTENT * 2)[:: 2 * len(CONTENT) // 10_240]]
)
def test_bytes_may_be_of_any_kind(source: bytes | bytearray | memoryview):
    assert read(source) == bytes(source)
    assert source_name(source) == f"{len(bytes(source))} bytes"


def test_bytes_that_change_later_are_read_as_they_were():
    source = bytearray(CONTENT)
    with open_stored(source, HASTY) as stored:
        source[:] = b""
        assert stored.read_at(0, len(CONTENT)) == CONTENT


def test_a_path_of_no_characters_is_an_option_error():
    with pytest.raises(OptionError, match="the path of a medium is empty: 0 characters"):
        read("")


def test_readers_of_one_medium_do_not_disturb_one_another():
    with open_stored(CONTENT, HASTY) as stored:
        first, second = stored.reader(), stored.reader()
        first.seek(100)
        assert second.read(2) == CONTENT[:2]
        assert first.read(2) == CONTENT[100:102]
        first.close()
        assert second.seek(-1, io.SEEK_END) == len(CONTENT) - 1
        assert second.read() == CONTENT[-1:]


def test_a_seekable_file_is_read_from_its_beginning_and_left_open():
    file = io.BytesIO(CONTENT)
    file.seek(0, io.SEEK_END)
    assert read(file) == CONTENT
    assert not file.closed


def test_a_file_that_is_deleted_meanwhile_stays_readable(tmp_path: Path):
    path = tmp_path / "clip"
    path.write_bytes(CONTENT)
    with open_stored(path, HASTY) as stored, stored.reader() as file:
        path.rename(tmp_path / "elsewhere")
        assert file.read() == CONTENT


def pipe_with(content: bytes) -> io.BufferedReader:
    outlet, inlet = os.pipe()
    with os.fdopen(inlet, "wb") as file:
        file.write(content)
    return os.fdopen(outlet, "rb")


def test_a_pipe_is_read_once_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pipe_with(CONTENT) as pipe, open_stored(pipe, HASTY) as stored:
        for _ in range(2):
            with stored.reader() as file:
                assert file.read() == CONTENT
    assert not list(tmp_path.iterdir())


def test_a_pipe_beyond_the_limit_is_refused_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pipe_with(CONTENT * 3) as pipe, pytest.raises(MediaError, match="at most 20,000 bytes") as caught:
        read(pipe)
    assert caught.value.limit == "max_media_bytes"
    assert not list(tmp_path.iterdir())


class WindowsPipe(io.FileIO):
    """A pipe as Windows has them: it calls itself seekable, and its end is at 0."""

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return 0


def test_a_pipe_that_calls_itself_seekable_is_read_whole():
    outlet, inlet = os.pipe()
    with os.fdopen(inlet, "wb") as file:
        file.write(CONTENT)
    with WindowsPipe(outlet) as pipe:
        assert read(pipe) == CONTENT


def test_a_file_on_disk_that_cannot_go_back_is_read_whole(tmp_path: Path):
    class OneWay(io.FileIO):
        def seekable(self) -> bool:
            return False

    (tmp_path / "clip.mp4").write_bytes(CONTENT)
    with OneWay(tmp_path / "clip.mp4") as file:
        assert read(file) == CONTENT


def test_a_dash_is_stdin_and_can_be_read_once(monkeypatch: pytest.MonkeyPatch):
    with pipe_with(CONTENT) as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        assert read("-") == CONTENT
        with pytest.raises(MediaError, match=r"stdin is empty: 0 bytes \(a pipe can be read only once"):
            read("-")


def test_a_program_without_stdin_says_that_nothing_is_piped_in(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(MediaError, match="nothing is piped in"):
        read("-")


def test_an_open_text_file_is_refused():
    with pytest.raises(MediaError, match='mode "rb"'):
        read(io.StringIO("hello"))


def test_an_object_that_holds_no_bytes_is_refused():
    with pytest.raises(MediaError, match="cannot be read from int"):
        read(17)


def test_a_missing_file_is_named_with_the_folder_looked_in():
    with pytest.raises(MediaError, match=f"cannot read nowhere.mp4: No such file.*{os.getcwd()}") as caught:
        read("nowhere.mp4")
    assert caught.value.path == "nowhere.mp4"


def test_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(MediaError, match="it is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "https://[broken"])
def test_an_impossible_name_is_a_media_error(name: str):
    with pytest.raises(MediaError, match="cannot read"):
        read(name)


def test_a_file_that_cannot_be_opened_is_a_media_error(tmp_path: Path):
    (tmp_path / "file").write_bytes(CONTENT)
    with pytest.raises(MediaError, match="Not a directory"):
        read(tmp_path / "file" / "clip.mp4")


def test_a_file_that_may_not_be_read_is_a_media_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "private.mp4").write_bytes(CONTENT)
    (tmp_path / "private.mp4").chmod(0)
    if os.access(
        tmp_path / "private.mp4", os.R_OK
    ):  # the superuser may read everything: then refuse as the system does

        def refuse(path: Path, *_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match=r"private\.mp4: Permission denied \(check who may read it"):
        read(tmp_path / "private.mp4")


@pytest.mark.parametrize("source", [b"", "data:,", bytearray(), io.BytesIO()])
def test_nothing_at_all_is_refused(source: object):
    with pytest.raises(MediaError, match="is empty: 0 bytes"):
        read(source)


def test_a_disk_that_fails_midway_is_a_media_error():
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(5, "Input/output error")
            return super().read(size)

    with open_stored(Failing(CONTENT), HASTY) as stored, pytest.raises(MediaError, match="Input/output error"):
        stored.read_at(100, 10)


@pytest.mark.parametrize("page", ["clip", "undeclared", "moved"])
def test_a_url_is_downloaded(page: str, web: str):
    assert read(f"{web}/{page}") == CONTENT


def test_a_url_is_escaped_as_people_paste_it(web: str):
    assert read(f"{web}/ordner/für mich/clip?v=ä b%20c#t=3") == CONTENT
    assert asked[-1] == "/ordner/f%C3%BCr%20mich/clip?v=%C3%A4%20b%20c"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("missing", "404 Not Found"),
        ("silent", "timed out.*network_timeout_s"),
        ("trickle", "stalled: [0-9]+ bytes in"),
        ("huge", "1,000,000,000,000 bytes, where at most 20,000 bytes"),
        ("endless", "at most 20,000 bytes"),
        ("torn", "broke off after 10,240 of 10,241 bytes"),
        ("astray", "cannot read .*ftp"),
    ],
)
def test_a_server_that_misbehaves_is_a_media_error_soon(page: str, message: str, web: str):
    started_s = time.monotonic()
    with pytest.raises(MediaError, match=message):
        read(f"{web}/{page}")
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("page", ["circle", "chatter", "paint"])
def test_a_servers_own_words_are_told_in_one_line_and_steer_no_terminal(page: str, web: str):
    with pytest.raises(MediaError) as caught:
        read(f"{web}/{page}")
    assert str(caught.value).isprintable()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority of our own, ca.pem, and what it vouches for: 127.0.0.1 by server.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made by the program openssl, which is not here")
    folder = tmp_path_factory.mktemp("authority")
    new_key = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj"]
    (folder / "server.cnf").write_text("subjectAltName=IP:127.0.0.1")
    for arguments in (
        [*new_key, "/CN=tests of lowvram", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem"],
        [*new_key, "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.csr"],
        [
            "x509",
            "-req",
            "-in",
            "server.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "server.cnf",
            "-out",
            "server.pem",
        ],
    ):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def secure_web(authority: Path, web: str) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.pem", authority / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign]
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_https_is_downloaded_from_whom_an_authority_in_ssl_cert_file_vouches_for(
    secure_web: str, authority: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    assert read(f"{secure_web}/clip") == read(f"{secure_web}/moved") == CONTENT


def test_https_from_whom_nobody_vouches_for_is_refused(secure_web: str):
    with pytest.raises(MediaError, match=r"CERTIFICATE_VERIFY_FAILED.*name its certificate in SSL_CERT_FILE"):
        read(f"{secure_web}/clip")


def test_a_server_that_is_not_there_is_a_media_error():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(MediaError, match="Connection refused"):
            read(f"http://127.0.0.1:{reserved.getsockname()[1]}/clip")


def test_a_name_for_messages_is_short_and_keeps_secrets():
    assert source_name("https://me:secret@host/clip.mp4?token=1") == "https://host/clip.mp4"
    assert source_name("data:image/png;base64," + "A" * 99_978) == "data: URL of 100000 characters"
    assert source_name(Path("a/b.mp4")) == str(Path("a/b.mp4"))
    assert source_name(b"12345") == "5 bytes"
