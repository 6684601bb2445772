"""One libvirt host, kept in sight by a thread of its own.

The thread connects, looks at everything, tells `on_sight`, and waits for an event, or for
`LOOK_AGAIN_S`: events may be lost, and a disk that grows makes none. When libvirt is gone, that has
a reason (`problem`) and the thread tries again, for ever: a host that comes back is in sight again
by itself. One that hangs holds the thread; that is noticed by another, which asks it for nothing
but an answer. Nobody else ever waits for a host that hangs, unless it asks for that host.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.errors import HypervisorAway
from engine.libvirt.binding import (
    ACTIVE_STATES,
    NO_SUCH_DOMAIN,
    Connection,
    Domain,
    LibvirtFault,
    code_of,
    connect,
    listen,
)
from engine.libvirt.capacity import capacity_of
from engine.libvirt.domains import DomainFacts, PoolFacts, read_domain, read_pool

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 30.0
SETTLE_S = 0.05  # events come in swarms
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 15.0
STOP_S = 2.0
ASK_EVERY_S = 2.0
SILENT_AFTER_S = 10.0  # without an answer for so long a host counts as away


@dataclass(frozen=True, slots=True)
class DomainSeen:
    """A domain at the time of a look; `capacities` by target, of the disks that could be asked."""

    facts: DomainFacts
    state: str
    capacities: dict[str, int]


@dataclass(frozen=True, slots=True)
class Sight:
    """All of a host at the time of a look."""

    domains: tuple[DomainSeen, ...]
    pools: tuple[PoolFacts, ...]


class Watch:
    """A host. `name` is its URI. Thread-safe."""

    def __init__(self, uri: str, on_sight: Callable[[Watch, Sight], None]) -> None:
        self.name = uri
        self._on_sight = on_sight
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._lost_connection: Connection | None = None
        self._problem = "not looked at yet"
        self._pause_s = FIRST_PAUSE_S  # before the next attempt; the thread's own
        self._asked_s = 0.0  # since when an answer is awaited; 0 = none is
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"libvirt {uri}", daemon=True)

    @property
    def problem(self) -> str:
        """Why the host is away; "" while it is in sight."""
        with self._lock:
            problem, asked_s = self._problem, self._asked_s
        silent_s = time.monotonic() - asked_s if asked_s else 0.0
        if not problem and silent_s >= SILENT_AFTER_S:
            return f"no answer for {silent_s:.0f} s"
        return problem

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, or leaves it to its end if libvirt hangs."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():  # not where a start failed before it came to that
            self._thread.join(STOP_S)

    def first_look(self, timeout_s: float) -> bool:
        """Whether the host was looked at, or found away, within that time."""
        return self._looked.wait(timeout_s)

    def connection(self) -> Connection:
        """The live connection. HypervisorAway."""
        with self._lock:
            if self._connection is None:
                raise HypervisorAway(f"{self.name}: {self._problem}")
            return self._connection

    def domain(self, uuid: str) -> Domain:
        """The domain. HypervisorAway, LibvirtFault."""
        return self.connection().lookupByUUIDString(uuid)

    def has(self, uuid: str) -> bool:
        """Whether there is such a domain now. HypervisorAway, LibvirtFault."""
        return _is_there(partial(self.domain, uuid))

    def has_named(self, name: str) -> bool:
        """Whether a domain has that name now. HypervisorAway, LibvirtFault."""
        return _is_there(partial(self.connection().lookupByName, name))

    def look_again(self) -> None:
        """Soon, in the host's own thread."""
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                connection = connect(self.name)
                listen(connection, self.look_again)
                self._keep_in_sight(connection)
            except LibvirtFault as error:
                self._lost(str(error))
            except Exception as error:
                log.exception("libvirt_look_failed", extra={"host": self.name})
                self._lost(f"{type(error).__name__}: {error}")
            self._stopping.wait(self._pause_s)
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)

    def _keep_in_sight(self, connection: Connection) -> None:
        """Returns when we stop; LibvirtFault when the host is gone."""
        with self._lock:
            self._connection = connection
        asker = threading.Thread(
            target=self._ask_on, args=(connection,), name="libvirt asked", daemon=True
        )
        asker.start()
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                self._on_sight(self, look(connection))
                self._found()
                self._wake.wait(LOOK_AGAIN_S)
                self._stopping.wait(SETTLE_S)
        finally:
            with self._lock:
                self._connection = None
            self._let_go(connection, asker)

    def _let_go(self, connection: Connection, asker: threading.Thread) -> None:
        """Closes it once no call on it is under way any more, for which libvirt does not wait. The
        calls on one that was lost return at once: they have by the time that the next one is."""
        before, self._lost_connection = self._lost_connection, connection
        if self._stopping.is_set():
            asker.join()
            before = connection
        if before is not None:
            with contextlib.suppress(LibvirtFault):
                before.close()

    def _ask_on(self, connection: Connection) -> None:
        """Whether there is an answer, again and again; ends with the connection."""
        while not self._stopping.wait(ASK_EVERY_S):
            with self._lock:
                if self._connection is not connection:
                    return
                self._asked_s = time.monotonic()
            try:
                connection.getVersion()
            except LibvirtFault:
                return  # who looks finds out why
            finally:
                self._asked_s = 0.0

    def _found(self) -> None:
        self._pause_s = FIRST_PAUSE_S
        with self._lock:
            news, self._problem = bool(self._problem), ""
        self._looked.set()
        if news:
            log.info("libvirt_in_sight", extra={"host": self.name})

    def _lost(self, why: str) -> None:
        with self._lock:
            news, self._problem, self._connection = why != self._problem, why, None
        self._looked.set()
        if news:
            log.warning("libvirt_away", extra={"host": self.name, "why": why})


def _is_there(find: Callable[[], Domain]) -> bool:
    try:
        find()
    except LibvirtFault as error:
        if code_of(error) == NO_SUCH_DOMAIN:
            return False
        raise
    return True


def look(connection: Connection) -> Sight:
    """Everything on the host. LibvirtFault when it does not answer."""
    connection.getVersion()  # a connection that is gone says so here, whatever it has listed
    domains = [look_at(domain) for domain in connection.listAllDomains()]
    return Sight(tuple(seen for seen in domains if seen is not None), _pools(connection))


def look_at(domain: Domain) -> DomainSeen | None:
    """None for a domain that has gone meanwhile. LibvirtFault."""
    try:
        facts = read_domain(domain.XMLDesc())
        state = ACTIVE_STATES.get(domain.state()[0], "")
        active = bool(domain.isActive())
    except LibvirtFault as error:
        if code_of(error) == NO_SUCH_DOMAIN:
            return None
        raise
    capacities = {}
    for disk in facts.disks:
        if size_bytes := capacity_of(domain, disk, active=active):
            capacities[disk.target] = size_bytes
    return DomainSeen(facts, state or ("running" if active else "stopped"), capacities)


def _pools(connection: Connection) -> tuple[PoolFacts, ...]:
    try:
        pools = [pool for pool in connection.listAllStoragePools() if pool.isActive()]
        found = [read_pool(pool.XMLDesc()) for pool in pools]
    except LibvirtFault:  # no storage driver: domains are still to be seen
        return ()
    return tuple(pool for pool in found if pool is not None)
