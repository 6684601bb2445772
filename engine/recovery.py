"""What a start does about what the last process left: nothing stays in the middle of anything.

Jobs that were queued or running are failed, backups in progress get status 2, VMs lose their
action. A VM that was being restored, and is not noted as complete, is failed, and its volumes are
removed: those that the restore has made, and not what somebody else has put there under their
names. While a hypervisor is away they stay, for it may have the VM and them; the VM says which they
are. Sessions on the points are aborted when the points are opened. A backup whose COMMIT made it is
found there then, and counts as done after all.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
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
    pools = core.inventory.places.pools
    left = [vm for vm in core.inventory.vms() if _is_left(vm)]
    away = [host.name for host in core.inventory.hypervisors() if host.problem]
    _tidy(core, pools, [] if away else left, _settled_baselines(core))
    vms = core.inventory.end_all_actions(partial(_ended, pools, away))
    if away:
        for vm in left:
            what = {"vm": vm.uuid, "away": away, "volumes": _volumes(pools, vm)}
            log.warning("restore_not_undone", extra=what)
    if jobs or backups or vms:
        fields = {"jobs": len(jobs), "backups": len(backups), "vms": len(vms)}
        log.warning("recovered", extra=fields)
    return frozenset(pool.path for pool in pools)


def _is_left(vm: Vm) -> bool:
    """Whether it was being restored, and is not noted as complete."""
    return vm.action == "restoring" and vm.state == "restoring" and not vm.host


def _volumes(pools: Sequence[Pool], vm: Vm) -> str:
    """Their paths; the name only of one whose pool is not known just now."""
    paths = {pool.uuid: f"{pool.path}/" for pool in pools}
    return ", ".join(f"{paths.get(disk.pool_uuid, '')}{disk.volume_name}" for disk in vm.disks)


def _settled_baselines(core: Core) -> frozenset[str]:
    """The files of the baselines. Without tracking there are none; what is left of them goes."""
    if not core.config.tracking.enabled:
        core.baselines.drop_all("tracking was not enabled")
    return core.baselines.files()


def _ended(pools: Sequence[Pool], away: Sequence[str], vm: Vm) -> Vm:
    if vm.action != "restoring":
        return vm
    reason = RESTARTED
    if away:
        reason += f"; as libvirt was away its volumes may be left: {_volumes(pools, vm)}"
    return after_restore(vm, reason)


def _tidy(core: Core, pools: Sequence[Pool], undo: Sequence[Vm], kept: Collection[str]) -> None:
    """All pools at once: however many do not answer, and however much is left in them, they are
    waited for once."""
    names = dict[str, list[str]]()
    for disk in (disk for vm in undo for disk in vm.disks):
        names.setdefault(disk.pool_uuid, []).append(disk.volume_name)
    acts = {
        f"tidy {pool.uuid}": partial(_tidy_pool, pool, names.get(pool.uuid, ()), kept)
        for pool in pools
    }
    for key, error in core.probes.ask_each(acts, POOL_TIMEOUT_S).items():
        if isinstance(error, OSError | EngineError):
            log.warning("pool_not_recovered", extra={"what": key, "error": str(error)})
        elif isinstance(error, Exception):
            raise error


def _tidy_pool(pool: Pool, undo: Sequence[str], kept: Collection[str]) -> None:
    """In this order: a volume is known as a restore's by what is cleared then."""
    for name in undo:
        _remove_one(pool, name)
    clear_leftovers(pool.path, kept)


def _remove_one(pool: Pool, name: str) -> None:
    try:
        unname_left(volume_path(pool, name))
    except EngineError as error:
        log.warning("volume_kept", extra={"volume": name, "error": str(error)})
