"""What the VM is made of: Debian's kernel and NFS programs, fetched and unpacked, never installed.

The packages come by `apt-get download`, so in the version that the machine's own apt knows. They
lie unpacked in .cache/nfs-vm, which git ignores; while that is there, nothing is fetched again.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "nfs-vm"

# command: Debian package (the host's own; everything else is fetched into the cache)
HOST_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dmsetup": "dmsetup",
    "blockdev": "util-linux",
    "mkfs.xfs": "xfsprogs",
    "unshare": "util-linux",
    "mke2fs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "apt-get": "apt",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-ga": "qemu-guest-agent",
    "libvirtd": "libvirt-daemon",
}
NFS_PACKAGES = (
    *("nfs-common", "nfs-kernel-server", "keyutils", "libnfsidmap1", "libwrap0"),
    *("libtirpc3", "libtirpc-common", "libevent-core-2.1-7"),
)
_XZ_MAGIC = b"\xfd7zXZ\0"
_MERGED = ("bin", "sbin", "lib")  # links into usr/ on the host, which real ones would hide
_FETCH_TIMEOUT_S = 300.0


class NoKit(Exception):
    """The kit can't be had here; says why."""


@dataclass(frozen=True, slots=True)
class Kit:
    """`layer` goes over the host's root file system; `modules` is in it.

    `kernel` is unpacked, which boots faster; `packed` is what firmware starts (UEFI).
    """

    kernel: Path
    packed: Path
    modules: Path
    layer: Path


def find_tool(name: str) -> str:
    """The absolute path of a host tool. NoKit, naming the package."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise NoKit(f"needs {name} (Debian package {HOST_TOOLS[name]})")
    return found


def make_kit() -> Kit:
    """The kit, made if the cache has none. One process at a time. NoKit."""
    for tool in HOST_TOOLS:
        find_tool(tool)
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (CACHE / "kit" / "vmlinuz").exists():
            _build(CACHE / "kit.new")
            shutil.rmtree(CACHE / "kit", ignore_errors=True)  # an older one
            (CACHE / "kit.new").rename(CACHE / "kit")
    return _kit_in(CACHE / "kit")


def _kit_in(place: Path) -> Kit:
    (modules,) = (place / "layer/usr/lib/modules").iterdir()
    return Kit(place / "vmlinux", place / "vmlinuz", modules, place / "layer")


def _build(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    debs, layer = place / "debs", place / "layer"
    debs.mkdir(parents=True)
    try:
        _download(debs, _kernel_package())
        for deb in debs.iterdir():
            _run("dpkg", "-x", str(deb), str(layer))
        _merge_usr(layer)
        kit = _kit_in(place)
        _run(find_tool("depmod"), "-b", str(layer / "usr"), kit.modules.name)
        (packed,) = (layer / "boot").glob("vmlinuz-*")
        shutil.copy(packed, kit.packed)
        kit.kernel.write_bytes(_unpacked(packed.read_bytes()))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise NoKit(f"no kernel or NFS packages: {error}") from error
    shutil.rmtree(debs)
    shutil.rmtree(layer / "boot")


def _kernel_package() -> str:
    """The package that the architecture's kernel is in now; its name has the version."""
    try:
        return _kernel_of(_run("apt-cache", "depends", "linux-image-amd64"))
    except (ValueError, subprocess.SubprocessError):
        _run("apt-get", "-qq", "update")  # no package lists yet
        return _kernel_of(_run("apt-cache", "depends", "linux-image-amd64"))


def _kernel_of(depends: str) -> str:
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise ValueError(f"linux-image-amd64 depends on no kernel: {depends!r}")
    return found[1]


def _download(place: Path, kernel: str) -> None:
    # As root apt would fetch as the user _apt, who can't write here.
    command = ("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download")
    _run(*command, kernel, *NFS_PACKAGES, cwd=place)


def _merge_usr(layer: Path) -> None:
    for name in _MERGED:
        if (layer / name).is_dir():
            shutil.copytree(layer / name, layer / "usr" / name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(layer / name)


def _unpacked(vmlinuz: bytes) -> bytes:
    """The kernel inside: QEMU starts it without the seconds that unpacking it in the VM takes."""
    return lzma.LZMADecompressor().decompress(vmlinuz[vmlinuz.index(_XZ_MAGIC) :])


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=_FETCH_TIMEOUT_S
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command[:4])}…: {done.stderr.strip()[-500:]}")
    return done.stdout
