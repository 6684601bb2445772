"""`vmkeep serve` as a process: what it says, how it ends, and what keeps it from starting."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import pytest
from click.testing import CliRunner

from api.cli import cli
from api.cli.exits import USAGE, Failure
from api.server import CannotListen, notify, parse_listen, run
from engine.config import Config
from engine.errors import AlreadyRunning, ConfigInvalid
from engine.service import Engine

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`run` sets up the process's log; the tests' is put back."""
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.getLogger("aiohttp.server").setLevel(logging.NOTSET)


@contextlib.contextmanager
def _serve(
    data: Path,
    *,
    listen: str = "127.0.0.1:0",
    config: str = "",
    files: int = 1024,
    **environment: str,
) -> Iterator[subprocess.Popen[str]]:
    code = "import sys; from api.server import run; sys.exit(run(*sys.argv[1:]))"
    python = ["prlimit", f"--nofile={files}:", sys.executable, "-u", "-c", code]
    with subprocess.Popen(
        [*python, str(data), listen, config],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def _told(server: subprocess.Popen[str], last: str) -> list[str]:
    """Its lines up to the one that begins with `last`."""
    lines: list[str] = []
    assert server.stdout is not None
    for line in server.stdout:
        lines.append(line.rstrip())
        if line.strip().startswith(last):
            return lines
    raise AssertionError(lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_what_it_made_and_ends_in_time(tmp_path: Path, number: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(30)
        with _serve(tmp_path / "data", NOTIFY_SOCKET=str(tmp_path / "notify")) as server:
            lines = _told(server, "backup point")
            assert supervisor.recv(100) == b"READY=1"
            assert re.match(r"vmkeep \S+ listens on http://127\.0\.0\.1:\d+$", lines[0])
            kinds = [re.split(r"\s{2,}", line.strip())[0] for line in lines[1:]]
            assert kinds == [
                "cluster",
                "tenant",
                "namespace",
                "zone",
                "object group",
                "pool",
                "backup point",
            ]
            port = int(lines[0].rpartition(":")[2])
            with socket.create_connection(("127.0.0.1", port)) as stream:
                stream.sendall(b"GET /v1/job/events HTTP/1.1\r\nHost: x\r\n\r\n")
                assert stream.recv(15) == b"HTTP/1.1 200 OK"
                began = time.monotonic()
                server.send_signal(number)
                assert supervisor.recv(100) == b"STOPPING=1"
                assert server.wait(timeout=30) == 0
                assert time.monotonic() - began < 10


def test_it_opens_as_many_files_as_it_may(tmp_path: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    with _serve(tmp_path / "data", files=256) as server:
        _told(server, "backup point")
        found = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    assert found == (most, hard)


OURS = ["127.0.0.1:8080", "[::1]:8080", "LOCALHOST", "localhost.:8080", "web.localhost", "host7"]
CONFIGURED = "backup.example"
OTHERS = ["evil.example:8080", "127.0.0.1.evil.example", "evil.localhost.example", "[", "x.y."]


def test_a_name_that_was_made_to_lead_to_loopback_is_refused(tmp_path: Path) -> None:
    """By its Host alone: for a browser such a page is of our origin. On a network any name is."""
    config = tmp_path / "vmkeep.toml"
    config.write_text('[api]\nhost_names = ["Backup.Example"]\n')
    with _serve(tmp_path / "data", config=str(config)) as server:
        port = int(_told(server, "vmkeep")[0].rpartition(":")[2])
        for name in [*OURS, CONFIGURED, socket.gethostname()]:
            assert _scode(port, "GET", "/v1/compute/list", name) == 0, name
        for name in OTHERS:
            assert _scode(port, "GET", "/v1/compute/list", name) == 40301, name
            assert _scode(port, "POST", "/v1/compute/delete", name) == 40301, name
        # Without the port: what is told is what can be listed.
        answer = _answer(port, "GET", "/v1/compute/list", "Evil.example:8080")
        assert answer["desc"] == "'evil.example' is not in [api] host_names"
    with _serve(tmp_path / "data", listen="0.0.0.0:0") as server:
        port = int(_told(server, "vmkeep")[0].rpartition(":")[2])
        assert _scode(port, "GET", "/v1/compute/list", OTHERS[0]) == 0


def _scode(port: int, method: str, path: str, host: str) -> int:
    scode = _answer(port, method, path, host)["scode"]
    assert isinstance(scode, int)
    return scode


def _answer(port: int, method: str, path: str, host: str) -> dict[str, object]:
    with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=30)) as http:
        http.request(method, path, headers={"Host": host, "Origin": f"http://{host}"})
        answer = json.loads(http.getresponse().read())
    assert isinstance(answer, dict)
    return answer


@pytest.mark.usefixtures("own_logging")
def test_two_servers_on_one_directory(tmp_path: Path) -> None:
    engine = Engine.start(str(tmp_path), Config())
    with pytest.raises(AlreadyRunning):
        run(str(tmp_path), "127.0.0.1:0")
    engine.stop()


@pytest.mark.usefixtures("own_logging")
def test_a_bad_configuration_starts_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[limits]\nmax_job = 2\n")
    with pytest.raises(ConfigInvalid):
        run(str(tmp_path / "data"), "127.0.0.1:0", str(config))
    assert not (tmp_path / "data").exists()


@pytest.mark.usefixtures("own_logging")
def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match="in use"):
            run(str(tmp_path / "data"), f"127.0.0.1:{port}")
    Engine.start(str(tmp_path / "data"), Config()).stop()


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("127.0.0.1:8080", ("127.0.0.1", 8080)), ("[::1]:0", ("::1", 0)), ("h:65535", ("h", 65535))],
)
def test_listen(text: str, parsed: tuple[str, int]) -> None:
    assert parse_listen(text) == parsed


def test_a_wrong_address_to_listen_on_is_wrong_usage(tmp_path: Path) -> None:
    ran = CliRunner().invoke(cli, ["serve", "--data", str(tmp_path / "d"), "--listen", "nowhere"])
    assert isinstance(ran.exception, Failure)
    assert ran.exception.exit_code == USAGE
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("text", ["", "8080", ":8080", "h:", "h:x", "h:65536", "h:-1", "h:٣"])
def test_listen_that_is_no_address(text: str) -> None:
    with pytest.raises(CannotListen):
        parse_listen(text)


def test_notify_speaks_to_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"vmkeep-{os.getpid()}-{threading.get_ident()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(f"\0{name}")
        supervisor.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1")
        assert supervisor.recv(100) == b"READY=1"


def test_notify_without_a_supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
