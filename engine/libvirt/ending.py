"""Ending backup jobs: as long as one is on, QEMU puts aside what the guest overwrites.

So none may stay. libvirt is asked again and again; when it is away for long the backup's end does
not wait for it, but a thread goes on (`end_later`). What a former process left is ended when the
host is first in sight again, and before the next backup.

A domain has one job at a time, whosever it is, and libvirt ends the one that there is. So a job is
known by the socket that it serves its disks at, and what is not ours is left alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from engine.errors import EngineError, NotFound
from engine.libvirt.binding import (
    NO_SUCH_BACKUP_JOB,
    NO_SUCH_DOMAIN,
    OPERATION_INVALID,
    Domain,
    LibvirtFault,
    code_of,
)
from engine.libvirt.half_begun import end_in_qemu, is_stuck
from engine.libvirt.jobxml import job_socket
from engine.libvirt.scratch import remove_left

log = logging.getLogger(__name__)

END_TIMEOUT_S = 90.0  # libvirt may be blind for 30 s around a change of the agent's channel
LATER_TIMEOUT_S = 86400.0
LATER_PAUSE_S = 1.0
_POLL_S = 0.02
_RETRY_S = 0.2
_NOT_RUNNING = (OPERATION_INVALID, NO_SUCH_DOMAIN)

FindDomain: TypeAlias = Callable[[], Domain]
End: TypeAlias = Literal["running", "stopped", "unknown"]  # what the domain does now


def end_job(find: FindDomain, ours: str, socket: str) -> End:
    """Ends the backup job that serves at `socket`, if it is on, and waits until it has; `unknown`
    if libvirt does not answer. `ours`: see LiveSetup.
    """
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            domain = find()
            if _socket_of(domain, ours) == socket:
                with contextlib.suppress(LibvirtFault):
                    domain.abortJob()
            while _socket_of(domain, ours) == socket:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(_POLL_S)
            else:
                return "running" if domain.isActive() else "stopped"
        except NotFound:
            return "stopped"
        except (LibvirtFault, EngineError) as error:
            if code_of(error) in _NOT_RUNNING:
                return "stopped"
            time.sleep(_RETRY_S)
    log.error("job_not_ended", extra={"after_s": END_TIMEOUT_S})
    return "unknown"


def abort_job(find: FindDomain, ours: str, socket: str) -> bool:
    """Tells the backup job that serves at `socket` to end, if it is on, and does not wait for that.
    Whether it ends now, or is over; else libvirt has to be asked again."""
    try:
        domain = find()
        if _socket_of(domain, ours) == socket:
            domain.abortJob()
    except NotFound:
        return True
    except (LibvirtFault, EngineError) as error:
        return code_of(error) in _NOT_RUNNING
    return True


def _socket_of(domain: Domain, ours: str) -> str:
    """Where its backup job serves its disks; "" if none is on. LibvirtFault.

    One that libvirt can't end has none of QEMU's any more.
    """
    if is_stuck(domain):
        end_in_qemu(domain, ours)
        return ""
    try:
        return job_socket(domain.backupGetXMLDesc())
    except LibvirtFault as error:
        if code_of(error) != NO_SUCH_BACKUP_JOB:
            raise
    return ""


def end_left_job(find: FindDomain, ours: str) -> None:
    """Ends a backup job that a former process of ours left on the domain. LibvirtFault if libvirt
    can't be asked; what `find` raises."""
    try:
        socket = _socket_of(find(), ours)
    except LibvirtFault as error:
        if code_of(error) in _NOT_RUNNING:
            return
        raise
    if socket.startswith(ours):
        log.warning("left_job_ended", extra={"socket": socket})
        if end_job(find, ours, socket) == "unknown":
            end_later(find, ours, socket, [socket])
        remove_left([socket])


def end_later(find: FindDomain, ours: str, socket: str, files: Sequence[str]) -> None:
    """Goes on ending the job that serves at `socket`, in a thread; then `files` are removed."""

    def go_on() -> None:
        deadline_s = time.monotonic() + LATER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            time.sleep(LATER_PAUSE_S)
            if not _still_serves(find, ours, socket):
                break
            if end_job(find, ours, socket) != "unknown":
                log.info("job_ended_late", extra={"socket": socket})
                break
        remove_left(files)

    threading.Thread(target=go_on, name="end of a backup job", daemon=True).start()


def _still_serves(find: FindDomain, ours: str, socket: str) -> bool:
    """Whether that job is on, as far as we know."""
    try:
        return _socket_of(find(), ours) == socket
    except NotFound:
        return False
    except EngineError:
        return True
    except LibvirtFault as error:
        return code_of(error) not in _NOT_RUNNING
