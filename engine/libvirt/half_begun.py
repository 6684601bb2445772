"""A backup job that libvirtd died in the middle of beginning.

Started again, libvirtd (seen with 9.0) takes the job for one that is beginning still, knows nothing
more of it, and lets nobody begin another or end this one. QEMU may run it all the same: then it
puts aside what the guest overwrites, until the room for that is used up and the guest's writes
fail. So it is ended past libvirt, by QEMU's own commands; libvirt notes that as a taint of the
domain. What libvirt itself holds on to only an operator can undo (docs/operations.md).

Of a backup that somebody begins just now libvirt says the same. Then QEMU may be creating an image,
and may abort when it is asked for its nodes (capacity.py). So it is asked for nothing until
libvirt has said so for long, and for its nodes only once it was seen to create nothing for long.
"""

from __future__ import annotations

import contextlib
import logging
import time

import msgspec

from engine.libvirt.binding import INTERNAL_ERROR, Domain, LibvirtFault, ask_qemu, code_of

log = logging.getLogger(__name__)

_SAID = "backup job data missing"
_TYPES = ("backup", "create")  # the latter makes the file that things are put aside in
_PATIENCE_S = 30.0
_BEGINS_S = 3.0
_POLL_S = 0.05


class _Node(msgspec.Struct, rename="kebab"):
    """What QEMU has open; `file`: its path, or a description in JSON that has the path."""

    node_name: str = ""
    drv: str = ""
    file: str = ""


class _QemuJob(msgspec.Struct):
    id: str = ""
    type: str = ""
    status: str = ""


def is_half_begun(error: Exception) -> bool:
    """Whether this is what libvirt answers, asked for the domain's job, in that state; also while
    somebody's backup begins."""
    return code_of(error) == INTERNAL_ERROR and _SAID in str(error)


def is_stuck(domain: Domain) -> bool:
    """Whether it stays in that state, which takes some seconds to tell. LibvirtFault."""
    began_s = time.monotonic()
    while _is_beginning(domain):
        waited_s = time.monotonic() - began_s
        if waited_s > _BEGINS_S and _is_creating(domain):
            return False
        if waited_s > 2 * _BEGINS_S:
            return True
        time.sleep(_POLL_S)
    return False


def _is_beginning(domain: Domain) -> bool:
    try:
        domain.jobInfo()
    except LibvirtFault as error:
        if is_half_begun(error):
            return True
        raise
    return False


def _is_creating(domain: Domain) -> bool:
    return any(job.type == "create" and job.status != "concluded" for job in _jobs(domain))


def end_in_qemu(domain: Domain, ours: str) -> None:
    """Ends the job, and lets go of its files, if it is one that puts aside in files of `ours`.

    Only of a domain that is stuck. LibvirtFault if QEMU can't be asked, or refuses; then it may be
    tried again.
    """
    if not _nodes(domain, ours):
        return
    log.warning("half_begun_job_ended", extra={"files": ours})
    _end_jobs(domain)
    with contextlib.suppress(LibvirtFault):  # there may be no server yet
        ask_qemu(domain, "nbd-server-stop")
    for node in _nodes(domain, ours):
        ask_qemu(domain, "blockdev-del", **{"node-name": node})


def _nodes(domain: Domain, ours: str) -> list[str]:
    """What of ours is open; what stands on others first."""
    asked = ask_qemu(domain, "query-named-block-nodes", flat=True)
    nodes = msgspec.convert(asked, type=list[_Node])
    found = [node for node in nodes if ours in node.file]
    return [node.node_name for node in sorted(found, key=lambda node: node.drv == "file")]


def _end_jobs(domain: Domain) -> None:
    """There is one backup at most in a domain, with a job for each disk."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline_s:
        jobs = [job for job in _jobs(domain) if job.type in _TYPES]
        if not jobs:
            return
        for job in jobs:
            over = job.status == "concluded"
            with contextlib.suppress(LibvirtFault):  # it may have ended by itself meanwhile
                ask_qemu(domain, "job-dismiss" if over else "job-cancel", id=job.id)
        time.sleep(_POLL_S)


def _jobs(domain: Domain) -> list[_QemuJob]:
    return msgspec.convert(ask_qemu(domain, "query-jobs"), type=list[_QemuJob])
