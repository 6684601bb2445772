"""`make demo-libvirt`: a VM is backed up while it writes, destroyed, restored, and boots again.

A libvirt of its own (session mode, as an unprivileged user) runs a small Linux guest under
emulation; all is gone afterwards. Exit code 1 when the guest's own checksums differ. Needs root.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from engine.model import Backup
from tests.engine_rig import EngineRig
from tests.libvirt.guest import Guest
from tests.libvirt.host import MIB, Host
from tests.libvirt.site import rig_on, wait_for_vm
from tests.nfs.kit import NoKit, make_kit

FILES = ("/mnt/one", "/mnt/two", "/mnt/three")
BUSY = "while true; do dd if=/dev/urandom of=/mnt/busy bs=64k count=8 conv=fsync; done"


def main() -> int:
    """The exit code."""
    console = Console()
    try:
        kit = make_kit()
    except NoKit as error:
        console.print(f"not here: {error}")
        return 2
    with contextlib.ExitStack() as undo:
        work = Path(undo.enter_context(tempfile.TemporaryDirectory()))
        cache = work / "cache"
        cache.mkdir()
        work.chmod(0o755)
        host = undo.enter_context(contextlib.closing(Host(kit, cache)))
        rig = undo.enter_context(rig_on(work / "data", host))
        return _show(console, host, rig)


def _show(console: Console, host: Host, rig: EngineRig) -> int:
    disks = [
        host.image("vda", "a.qcow2", 64 * MIB),
        host.image("vdb", "b.raw", 16 * MIB, "raw"),
    ]
    _make_pool(host)
    domain = host.define("shop", disks)
    guest = host.boot(domain)
    console.print("a VM runs:", guest.run("uname -sr"))
    guest.run("mke2fs -q /dev/vda && mount /dev/vda /mnt")
    for number, path in enumerate(FILES[:2]):
        guest.run(f"dd if=/dev/urandom of={path} bs=1M count={number + 2} conv=fsync")
    guest.run(f"( {BUSY} ) >/dev/null 2>&1 &")
    vm = wait_for_vm(rig, "shop", lambda vm: vm is not None and vm.state == "running")
    _tell(console, rig, rig.back_up(vm))
    guest.run(f"dd if=/dev/urandom of={FILES[2]} bs=1M count=1 conv=fsync")
    truth = guest.sha256(*FILES)
    backup = rig.back_up(vm)
    _tell(console, rig, backup)
    guest.close()
    domain.destroy()
    domain.undefineFlags(1 << 4)
    console.print("the VM is destroyed and undefined")
    again = _revived(host, rig, backup)
    console.print("the restored VM runs:", again.run("uname -sr"))
    found = again.sha256(*FILES)
    again.close()
    for path, before, after in zip(FILES, truth, found, strict=True):
        console.print(
            f"{path:12} {before[:16]}… {after[:16]}… {'equal' if before == after else 'DIFFERS'}"
        )
    return 0 if truth == found else 1


def _make_pool(host: Host) -> None:
    """Where the restored volumes go."""
    path = f"<target><path>{host.root}/pool</path></target>"
    host.connection.storagePoolDefineXML(
        f"<pool type='dir'><name>pool</name>{path}</pool>"
    ).create()


def _tell(console: Console, rig: EngineRig, backup: Backup) -> None:
    job = next(job for job in rig.engine.jobs() if job.backup_uuid == backup.uuid)
    seconds = job.finished_at - job.started_at
    label = backup.label
    console.print(
        f"backup, {'full' if label.full else 'incremental'}: {seconds:.2f} s, "
        f"{job.progress.bytes_read / MIB:.0f} MiB read, "
        f"{'guest frozen at its begin' if label.frozen else 'crash-consistent'}: "
        f"{'; '.join(label.notes)}"
    )


def _revived(host: Host, rig: EngineRig, backup: Backup) -> Guest:
    vm_uuid, job = rig.ask_restore(backup, "shop-again")
    rig.succeed(job)
    guest = host.boot(host.connection.lookupByUUIDString(vm_uuid))
    guest.run("mount /dev/vda /mnt")
    return guest


if __name__ == "__main__":
    sys.exit(main())
