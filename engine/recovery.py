"""What a start does about what the last process left: nothing stays in the middle of anything.

Jobs that were queued or running are failed, backups in progress get status 2, VMs lose their
action. A VM that was being restored, and is not noted as complete, is failed, and its volumes are
removed: those that the restore has made, and not what somebody else has put there under their
names. While a hypervisor is away they stay, for it may have the VM and them. Sessions on the points
are aborted when the points are opened. A backup whose COMMIT made it is found there then, and
counts as done after all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from engine.core import Core
from engine.errors import EngineError
from engine.inventory.volumes import volume_path
from engine.jobs.jobs import RESTARTED
from engine.model import Pool, Vm
from engine.restore.new_volume import unname_left
from engine.restore.restore_job import after_restore
from engine.snapshot.snapshot import clear_leftovers

log = logging.getLogger(__name__)

POOL_TIMEOUT_S = 10.0


def recover(core: Core) -> frozenset[str]:
    """Before any job starts. A pool that does not answer is left as it is. Returns the paths of the
    pools that were known."""
    jobs = core.jobs.recover()
    backups = core.catalogue.fail_running(RESTARTED)
    _undo_restores(core)
    vms = core.inventory.end_all_actions(_ended)
    kept = _settled_baselines(core)
    pools = core.inventory.places.pools
    for pool in pools:
        _bounded(core, f"clear {pool.uuid}", partial(clear_leftovers, pool.path, kept))
    if jobs or backups or vms:
        fields = {"jobs": len(jobs), "backups": len(backups), "vms": len(vms)}
        log.warning("recovered", extra=fields)
    return frozenset(pool.path for pool in pools)


def _settled_baselines(core: Core) -> frozenset[str]:
    """The files of the baselines. Without tracking there are none; what is left of them goes."""
    if not core.config.tracking.enabled:
        for row in core.baselines.rows():
            core.baselines.drop(row, "tracking was not enabled")
    return core.baselines.files()


def _ended(vm: Vm) -> Vm:
    return after_restore(vm, RESTARTED) if vm.action == "restoring" else vm


def _undo_restores(core: Core) -> None:
    """Removes what restores have made that are not noted as complete. Pool by pool: however many
    there are, one that does not answer is waited for once."""
    left = [
        vm
        for vm in core.inventory.vms()
        if vm.action == "restoring" and vm.state == "restoring" and not vm.host
    ]
    away = [host.name for host in core.inventory.hypervisors() if host.problem]
    if away:
        for vm in left:
            log.warning("restore_not_undone", extra={"vm": vm.uuid, "away": away})
        return
    disks = [disk for vm in left for disk in vm.disks]
    for pool in core.inventory.places.pools:
        names = [disk.volume_name for disk in disks if disk.pool_uuid == pool.uuid]
        if names:
            _bounded(core, f"undo {pool.uuid}", partial(_remove_made, pool, names))


def _remove_made(pool: Pool, names: Sequence[str]) -> int:
    """The count of volumes that had their names already."""
    return sum(_remove_one(pool, name) for name in names)


def _remove_one(pool: Pool, name: str) -> bool:
    try:
        return unname_left(volume_path(pool, name))
    except EngineError as error:
        log.warning("volume_kept", extra={"volume": name, "error": str(error)})
        return False


def _bounded(core: Core, key: str, act: Callable[[], int]) -> None:
    try:
        core.probes.ask(key, act, POOL_TIMEOUT_S)
    except (OSError, EngineError) as error:
        log.warning("pool_not_recovered", extra={"what": key, "error": str(error)})
