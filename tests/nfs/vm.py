"""A small virtual machine whose root file system is the host's, read-only, with a layer over it.

QEMU emulates the processor (no KVM is asked for), so this works wherever tests run, and Python is
eight to ten times slower inside. There is no image: an initrd of busybox and a few modules mounts
the host's `/` and the layer over 9p, and a tmpfs over both takes all writes. One directory, the
work directory, is shared for writing, at the same path inside and outside. What the host has below
/dev, /proc, /run and /sys is not there.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.initrd import Initrd, with_needs
from tests.nfs.kit import Kit, find_tool

MEMORY_MIB = 1536
CPUS = 2
_BOOT_MODULES = ("virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay")
_NINE = "trans=virtio,version=9p2000.L,msize=512000"
_DIRECTORIES = ("bin", "proc", "sys", "dev", "host", "layer", "over", "root", "modules")

# Runs as the first process, from the initrd.
_INIT = """#!/bin/busybox sh
say() {{ /bin/busybox echo "[init] $*"; }}
lost() {{ say "failed: $*"; /bin/busybox poweroff -f; }}
on() {{ /bin/busybox "$@" || lost "$@"; }}
on mount -t proc proc /proc
on mount -t sysfs sys /sys
on mount -t devtmpfs dev /dev
for module in /modules/*; do on insmod $module; done
on mount -t 9p -o {nine},cache=loose,ro host /host
on mount -t 9p -o {nine},cache=loose,ro layer /layer
on mount -t tmpfs -o size=70% over /over
on mkdir /over/upper /over/work
on mount -t overlay -o lowerdir=/layer:/host,upperdir=/over/upper,workdir=/over/work over /root
for place in proc sys dev; do on mount --move /$place /root/$place; done
on mkdir -p '/root{work}'
on mount -t 9p -o {nine},cache=none work '/root{work}'
exec /bin/busybox switch_root /root /bin/sh '{work}/vm-start'
"""

# Runs as the first process, from the real root.
_START = """export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root LANG=C.UTF-8
mount -t tmpfs run /run; mkdir -p /run/lock /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm; mount -t devpts pts /dev/pts; busybox ip link set lo up
cd '{work}'; echo "[start] $(cut -d' ' -f1 /proc/uptime) s"
( {command} ) < /dev/null; echo $? > vm-status
sync; busybox poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """`status`: the command's exit status, -1 when it did not get to its end."""

    status: int
    console: str


def run_vm(kit: Kit, work: Path, command: str, disks: Sequence[Path], timeout_s: float) -> Ran:
    """Boots, runs the shell command in `work`, powers off. `disks` become /dev/vda, /dev/vdb, …

    After `timeout_s` the machine is switched off. `work` has no space or quote in its path.
    """
    work = work.resolve()
    (work / "vm-start").write_text(_START.format(work=work, command=command))
    (work / "vm-initrd").write_bytes(_initrd(kit, _INIT.format(work=work, nine=_NINE)))
    console = work / "vm-console"
    with console.open("wb") as output:
        machine = subprocess.Popen(
            _qemu(kit, work, disks),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            machine.wait(timeout_s)
        except subprocess.TimeoutExpired:
            output.write(f"\nswitched off after {timeout_s:g} s\n".encode())
        finally:
            machine.kill()
            machine.wait()
    status = work / "vm-status"
    ended = int(status.read_text()) if status.exists() else -1
    return Ran(ended, console.read_text(errors="replace"))


def _qemu(kit: Kit, work: Path, disks: Sequence[Path]) -> list[str]:
    command = [find_tool("qemu-system-x86_64"), "-machine", "q35", "-cpu", "max"]
    command += ["-accel", "tcg,thread=multi,tb-size=512", "-smp", str(CPUS), "-m", str(MEMORY_MIB)]
    command += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-net", "none"]
    command += ["-serial", "stdio", "-device", "virtio-rng-pci"]
    command += ["-kernel", str(kit.kernel), "-initrd", str(work / "vm-initrd"), "-append"]
    command += ["console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on"]
    shares = {"host": "/,readonly=on", "layer": f"{kit.layer},readonly=on", "work": str(work)}
    for tag, path in shares.items():
        share = f"local,mount_tag={tag},security_model=none,multidevs=remap,path={path}"
        command += ["-virtfs", share]
    for disk in disks:
        command += ["-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"]
    return command


def _initrd(kit: Kit, init: str) -> bytes:
    initrd = Initrd()
    for name in _DIRECTORIES:
        initrd.directory(name)
    initrd.console()
    initrd.file("bin/busybox", Path(find_tool("busybox")).read_bytes(), 0o755)
    for number, module in enumerate(with_needs(kit.modules, _BOOT_MODULES)):
        initrd.file(f"modules/{number:02}.ko", module.read_bytes())
    initrd.file("init", init.encode(), 0o755)
    return initrd.sealed()
