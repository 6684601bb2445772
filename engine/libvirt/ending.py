"""Ending backup jobs: as long as one is on, QEMU puts aside what the guest overwrites.

So none may stay. libvirt is asked again and again; when it is away for long the backup's end does
not wait for it, but a thread goes on (`end_later`). What a killed service left is ended before the
next backup, and at the next start.
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
from engine.libvirt.half_begun import end_in_qemu, is_half_begun
from engine.libvirt.jobxml import job_socket
from engine.libvirt.scratch import remove_left

log = logging.getLogger(__name__)

END_TIMEOUT_S = 90.0  # libvirt may be blind for 30 s around a change of the agent's channel
LATER_TIMEOUT_S = 86400.0
LATER_PAUSE_S = 1.0
_POLL_S = 0.02
_RETRY_S = 0.2

FindDomain: TypeAlias = Callable[[], Domain]
End: TypeAlias = Literal["running", "stopped", "unknown"]  # what the domain does now


def end_job(find: FindDomain, scratch: str) -> End:
    """Ends the backup job, and waits until it has; `unknown` if libvirt does not answer.

    `scratch`: the directory where it puts things aside.
    """
    deadline_s = time.monotonic() + END_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            domain = find()
            with contextlib.suppress(LibvirtFault):
                domain.abortJob()
            while _is_on(domain, scratch):
                if time.monotonic() > deadline_s:
                    break
                time.sleep(_POLL_S)
            else:
                return "running" if domain.isActive() else "stopped"
        except NotFound:
            return "stopped"
        except (LibvirtFault, EngineError) as error:
            if code_of(error) in (OPERATION_INVALID, NO_SUCH_DOMAIN):
                return "stopped"
            time.sleep(_RETRY_S)
    log.error("job_not_ended", extra={"after_s": END_TIMEOUT_S})
    return "unknown"


def _is_on(domain: Domain, scratch: str) -> bool:
    """Whether a job is on. One that libvirt can't end has none of QEMU's any more."""
    try:
        return bool(domain.jobInfo()[0])
    except LibvirtFault as error:
        if not is_half_begun(error):
            raise
    end_in_qemu(domain, scratch)
    return False


def end_left_job(find: FindDomain, scratch: str) -> None:
    """Ends a backup job that a killed service left: one that serves its disks in our directory."""
    if not scratch:
        return
    try:
        domain = find()
        _is_on(domain, scratch)
        socket = job_socket(domain.backupGetXMLDesc())
    except (LibvirtFault, ValueError):
        return
    if socket.startswith(f"{scratch}/"):
        log.warning("left_job_ended", extra={"socket": socket})
        end_job(find, scratch)
        remove_left([socket])


def end_later(find: FindDomain, scratch: str, socket: str, files: Sequence[str]) -> None:
    """Goes on ending the job that serves at `socket`, in a thread; then `files` are removed."""

    def go_on() -> None:
        deadline_s = time.monotonic() + LATER_TIMEOUT_S
        while time.monotonic() < deadline_s:
            time.sleep(LATER_PAUSE_S)
            if not _still_serves(find, scratch, socket):
                break
            if end_job(find, scratch) != "unknown":
                log.info("job_ended_late", extra={"socket": socket})
                break
        remove_left(files)

    threading.Thread(target=go_on, name="end of a backup job", daemon=True).start()


def _still_serves(find: FindDomain, scratch: str, socket: str) -> bool:
    """Whether that job is on, as far as we know; another one is not ours to end."""
    try:
        domain = find()
        _is_on(domain, scratch)
        return job_socket(domain.backupGetXMLDesc()) == socket
    except (NotFound, ValueError):
        return False
    except EngineError:
        return True
    except LibvirtFault as error:
        return code_of(error) not in (NO_SUCH_BACKUP_JOB, OPERATION_INVALID, NO_SUCH_DOMAIN)
