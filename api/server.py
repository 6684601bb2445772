"""`vmkeep serve`: the composition root. Signals, environment and addresses end here.

Start: configuration, engine (which locks the data directory), listening socket; then it is ready
(/healthz, and READY=1 to systemd). Stop, on SIGTERM or SIGINT: no new connections, streams and
requests end, the engine stops, all within EXIT_TIMEOUT_S. What hangs by then (a dead mount) is left
to die with the process: nothing in memory is needed (docs/design.md I10).
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Collection

from aiohttp import web

from api import VERSION, logs
from api.app import make_runner
from engine.config import Config, load_config
from engine.service import Engine

log = logging.getLogger(__name__)

EXIT_TIMEOUT_S = 9.5
ENGINE_STOP_TIMEOUT_S = 6.5
MOST_FILES = 65536

_LOOPBACK = ("127.", "::1", "localhost")


class CannotListen(Exception):
    """The address is not one, is taken, or is not this host's."""


def run(
    data: str,
    listen: str,
    config_path: str = "",
    *,
    json_logs: bool | None = None,
    tell: Callable[[str], None] = print,
) -> int:
    """Serves the data directory until a signal; 0. From the main thread, once in a process.

    json_logs: None = as configured.

    Raises EngineError, StorageError, CannotListen when it can't begin.
    """
    config = load_config(config_path) if config_path else Config()
    as_json = config.log.form == "json" if json_logs is None else json_logs
    logs.set_up(json_lines=as_json, level=getattr(logging, config.log.level))
    host, port = parse_listen(listen)
    raise_file_limit()
    engine = Engine.start(data, config)
    try:
        asyncio.run(_serve(engine, host, port, _own_names(host, config), tell))
    finally:
        engine.stop(ENGINE_STOP_TIMEOUT_S)
    log.info("stopped")
    return 0


def parse_listen(listen: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`. Port 0: any free one. CannotListen."""
    host, colon, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise CannotListen(f"{listen!r} is not host:port")
    return host, int(port)


def raise_file_limit() -> None:
    """To MOST_FILES, as far as we may. A VM may have 256 disks, each open twice in a restore; the
    usual 1024 are for programs that use select(), which we don't."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def notify(message: str) -> None:
    """Tells systemd, if it started us and wants to know (sd_notify's protocol)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        log.warning("notify_failed", extra={"reason": str(error)})


def _own_names(host: str, config: Config) -> Collection[str] | None:
    """What this machine may be called by: on loopback only few know it by a name. On a network
    anything may be right, and anyone may call."""
    if not host.startswith(_LOOPBACK):
        return None
    return {*config.api.host_names, socket.gethostname()}


async def _serve(
    engine: Engine,
    host: str,
    port: int,
    host_names: Collection[str] | None,
    tell: Callable[[str], None],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _begin_exit, stop)
    runner = make_runner(engine, host_names)
    await runner.setup()
    try:
        await _listen(runner, host, port)
        _introduce(engine, host, runner.addresses[0][1], tell)
        notify("READY=1")
        await stop.wait()
        notify("STOPPING=1")
        log.info("stopping")
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    if not host.startswith(_LOOPBACK):
        log.warning("open_to_network", extra={"host": host, "why": "anyone there may call"})
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise CannotListen(f"{host}:{port}: {error.strerror or error}") from error


def _begin_exit(stop: asyncio.Event) -> None:
    stop.set()
    watch = threading.Timer(EXIT_TIMEOUT_S, os._exit, (0,))
    watch.daemon = True
    watch.start()


def _introduce(engine: Engine, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Where it listens, and what there is to work with."""
    shown = f"[{host}]" if ":" in host else host
    tell(f"vmkeep {VERSION} listens on http://{shown}:{port}")
    for cluster in engine.clusters():
        tell(f"  cluster       {cluster.uuid}  {cluster.name}")
    for tenant in engine.tenants():
        tell(f"  tenant        {tenant.uuid}  {tenant.name}")
    for namespace in engine.namespaces():
        tell(f"  namespace     {namespace.uuid}  {namespace.name}")
    for zone in engine.zones():
        tell(f"  zone          {zone.uuid}  {zone.name}")
    for group in engine.object_groups():
        tell(f"  object group  {group.uuid}  {group.name}")
    for state in engine.pools():
        tell(f"  pool          {state.pool.uuid}  {state.pool.name}  {state.pool.path}")
    for point in (state.point for state in engine.points()):
        tell(f"  backup point  {point.uuid}  {point.name}  {point.path}")
