"""libvirt-python, which is an optional extra: the only module that imports it.

Nobody imports this module before the configuration has asked for libvirt; `require_libvirt` says so
when the extra is missing. libvirt-python has no usable types, so what we use of it is written down
here as protocols.

libvirt's events need an event loop that runs before the first connection is opened: a thread of
its own, one in a process, for ever.

Calls to a libvirtd that hangs return when it goes on, or dies. libvirt's keepalive would end them,
but when it does while several threads wait on the connection, libvirt (9.0) takes the process down.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.errors import ConfigInvalid

try:
    import libvirt
    import libvirt_qemu
except ImportError:
    libvirt = None

log = logging.getLogger(__name__)


class _NeverRaised(Exception):
    """Stands for libvirt's exception where there is no libvirt."""


LibvirtFault: type[Exception] = libvirt.libvirtError if libvirt else _NeverRaised

# libvirt's numbers for what a caller may have to tell apart.
INTERNAL_ERROR = 1
NO_SUCH_DOMAIN = 42
NO_SUCH_CHECKPOINT = 103
CHECKPOINT_INCONSISTENT = 109
NO_SUCH_BACKUP_JOB = 104
OPERATION_INVALID = 55
INCREMENTAL_LOST = (NO_SUCH_CHECKPOINT, CHECKPOINT_INCONSISTENT)

ACTIVE_STATES = {1: "running", 2: "running", 3: "paused", 7: "paused"}
BACKUP_REUSE_EXTERNAL = 1
METADATA_ONLY = 2
XML_SECURE = 1
XML_INACTIVE = 2
XML_MIGRATABLE = 8


class Checkpoint(Protocol):
    def getName(self) -> str: ...
    def getXMLDesc(self, flags: int = 0) -> str: ...
    def delete(self, flags: int = 0) -> int: ...


class Domain(Protocol):
    """libvirt's virDomain, as far as we use it."""

    def name(self) -> str: ...
    def UUIDString(self) -> str: ...
    def XMLDesc(self, flags: int = 0) -> str: ...
    def isActive(self) -> int: ...
    def state(self, flags: int = 0) -> Sequence[int]: ...
    def blockInfo(self, path: str, flags: int = 0) -> Sequence[int]: ...
    def create(self) -> int: ...
    def destroy(self) -> int: ...
    def undefineFlags(self, flags: int = 0) -> int: ...
    def backupBegin(self, xml: str, checkpoint_xml: str | None, flags: int = 0) -> int: ...
    def backupGetXMLDesc(self, flags: int = 0) -> str: ...
    def jobInfo(self) -> Sequence[int]: ...
    def abortJob(self) -> int: ...
    def listAllCheckpoints(self, flags: int = 0) -> list[Checkpoint]: ...
    def checkpointCreateXML(self, xml: str, flags: int = 0) -> Checkpoint: ...
    def checkpointLookupByName(self, name: str, flags: int = 0) -> Checkpoint: ...
    def agentSetResponseTimeout(self, timeout_s: int, flags: int = 0) -> int: ...
    def fsInfo(self, flags: int = 0) -> object: ...
    def fsFreeze(self) -> int: ...
    def fsThaw(self) -> int: ...


class StoragePool(Protocol):
    def name(self) -> str: ...
    def UUIDString(self) -> str: ...
    def XMLDesc(self, flags: int = 0) -> str: ...
    def isActive(self) -> int: ...
    def create(self, flags: int = 0) -> int: ...
    def refresh(self, flags: int = 0) -> int: ...


class Connection(Protocol):
    """libvirt's virConnect, as far as we use it."""

    def close(self) -> int: ...
    def getVersion(self) -> int: ...
    def isAlive(self) -> int: ...
    def listAllDomains(self, flags: int = 0) -> list[Domain]: ...
    def lookupByUUIDString(self, uuid: str) -> Domain: ...
    def lookupByName(self, name: str) -> Domain: ...
    def defineXML(self, xml: str) -> Domain: ...
    def listAllStoragePools(self, flags: int = 0) -> list[StoragePool]: ...
    def storagePoolDefineXML(self, xml: str, flags: int = 0) -> StoragePool: ...


_starting = threading.Lock()
_loop: threading.Thread | None = None


def require_libvirt() -> None:
    """ConfigInvalid when libvirt-python is not installed."""
    if libvirt is None:
        how = "pip install --require-hashes --no-build-isolation -r requirements/libvirt.txt"
        raise ConfigInvalid(f'inventory = "libvirt" needs libvirt-python: {how}')


def connect(uri: str) -> Connection:
    """A connection. LibvirtFault. Takes for ever if libvirtd hangs."""
    require_libvirt()
    _run_events()
    connection: Connection = libvirt.open(uri)
    return connection


def listen(connection: Connection, changed: Callable[[], None]) -> None:
    """Calls `changed` from the event thread after whatever may change what a host's lists say."""

    def on_event(*_: object) -> None:
        changed()

    known = libvirt.virConnect
    events = (
        *("LIFECYCLE", "BLOCK_JOB_2", "DEVICE_ADDED", "DEVICE_REMOVED", "METADATA_CHANGE"),
        *("REBOOT", "BLOCK_THRESHOLD", "JOB_COMPLETED"),
    )
    for name in events:
        number = getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{name}")
        known.domainEventRegisterAny(connection, None, number, on_event, None)
    for name in ("LIFECYCLE", "REFRESH"):
        number = getattr(libvirt, f"VIR_STORAGE_POOL_EVENT_ID_{name}")
        known.storagePoolEventRegisterAny(connection, None, number, on_event, None)
    known.registerCloseCallback(connection, on_event, None)


def ask_qemu(domain: Domain, command: str, **arguments: object) -> object:
    """QEMU's answer to a command of its own, past libvirt. LibvirtFault, also if QEMU refuses."""
    asked = json.dumps({"execute": command, "arguments": arguments})
    answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, asked, 0))
    if "error" in answer:
        raise LibvirtFault(f"QEMU refused {command}: {answer['error'].get('desc')}")
    return answer["return"]


def code_of(error: Exception) -> int:
    """libvirt's number for a LibvirtFault; 0 for anything else."""
    code = error.get_error_code() if isinstance(error, libvirt.libvirtError) else 0
    return int(code or 0)


def _run_events() -> None:
    global _loop
    with _starting:
        if _loop is not None:
            return
        # libvirt prints errors to stderr by itself otherwise.
        libvirt.registerErrorHandler(_ignore, None)
        libvirt.virEventRegisterDefaultImpl()
        _loop = threading.Thread(target=_events, name="libvirt-events", daemon=True)
        _loop.start()


def _ignore(_context: object, _error: object) -> None:
    """Errors are raised as well."""


def _events() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except LibvirtFault:
            log.exception("libvirt_event_failed")
