"""Publishing checkpoints: immutable compact copies of a view, which save others the long way."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from typing import TYPE_CHECKING

from blake3 import blake3

from storage.errors import PointFull, translated
from storage.files.ballast import reserve_bytes
from storage.files.publish import close_discarded, discard, make_dirs, publish
from storage.format.record import Checkpoint
from storage.log.rebuild import COPY_BYTES, checkpoint_name
from storage.view import tables

if TYPE_CHECKING:
    from storage.domain.domain import Domain

KEPT = 2

log = logging.getLogger(__name__)


def publish_checkpoint(domain: Domain) -> None:
    """Copies the view, gives the copy its name on the point, appends CHECKPOINT, drops old ones.

    The caller holds the domain's lock, so the view does not move meanwhile.
    """
    copy_directory = f"{domain.view.path}.copy"
    shutil.rmtree(copy_directory, ignore_errors=True)
    _require_room(domain)
    try:
        with translated(copy_directory):
            os.makedirs(copy_directory, mode=0o700)
            copy = domain.view.copy_to(copy_directory)
        with domain.view.read() as state:
            seq, _ = tables.applied(state)
        digest, size_bytes = _put(domain, copy, seq)
    finally:
        shutil.rmtree(copy_directory, ignore_errors=True)
    op = Checkpoint(seq=seq, digest=digest, size_bytes=size_bytes)
    domain.append(lambda _: [op], spend_ballast=False)
    log.info(
        "checkpoint_published",
        extra={"domain": domain.paths.root, "seq": seq, "size_bytes": size_bytes},
    )
    _drop_old(domain)


def _require_room(domain: Domain) -> None:
    """A checkpoint only saves time: it does not take the room that deleting needs, nor does its
    first copy, which lies beside the view."""
    size_bytes = domain.view.ask(lambda state: state.copy_bytes())
    if domain.view_on_point:
        size_bytes *= 2
    with translated(domain.paths.checkpoints):
        room = domain.fs.room(domain.paths.checkpoints)
    if room.free_bytes < size_bytes + reserve_bytes(room):
        raise PointFull(f"{domain.paths.checkpoints}: no room for {size_bytes} bytes")


def _put(domain: Domain, copy: str, seq: int) -> tuple[bytes, int]:
    """Copies a local file to the point; returns (BLAKE3, bytes). Durable on return."""
    fs, paths = domain.fs, domain.paths
    hasher = blake3()
    tmp = os.path.join(paths.host_tmp(domain.host), f"checkpoint-{secrets.token_hex(8)}")
    with translated(paths.checkpoints), open(copy, "rb") as source:
        make_dirs(fs, os.path.dirname(tmp), paths.root)
        fd = fs.open_new(tmp)
        try:
            offset = 0
            while piece := source.read(COPY_BYTES):
                hasher.update(piece)
                offset += fs.pwrite(fd, [piece], offset)
        except BaseException:
            close_discarded(fs, fd)
            discard(fs, tmp)
            raise
        name = checkpoint_name(seq, hasher.digest())
        try:
            publish(fs, fd, tmp, os.path.join(paths.checkpoints, name))
        except FileExistsError:
            log.info("checkpoint_there_already", extra={"checkpoint": name})
    return hasher.digest(), offset


def _drop_old(domain: Domain) -> None:
    with translated(domain.paths.checkpoints):
        names = [n for n in domain.fs.listdir(domain.paths.checkpoints) if n.endswith(".mdb")]
        for name in names[:-KEPT]:
            discard(domain.fs, os.path.join(domain.paths.checkpoints, name))
