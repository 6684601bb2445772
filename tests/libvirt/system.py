"""A libvirt host as one is in earnest: libvirtd as root, whose QEMUs are another user's.

It has /etc, /run and /var of its own, by mount namespace, so it runs beside any other, and nothing
of it stays. libvirt owns the images (dynamic ownership): those that root makes for it, restored
ones included, belong to QEMU's user while the domain runs.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.libvirt.host import Host
from tests.nfs.kit import find_tool

QEMU_USER = "libvirt-qemu"
QEMU_UID = 64055  # Debian's
_START = f"""
set -e
root=$1
mount -t tmpfs none /mnt
for name in etc var; do
  mkdir -p /mnt/$name.new /mnt/$name.work
  mount -t overlay none -o lowerdir=/$name,upperdir=/mnt/$name.new,workdir=/mnt/$name.work /$name
done
mount -t tmpfs none /run
sed -i /^{QEMU_USER}:/d /etc/passwd /etc/group
echo {QEMU_USER}:x:{QEMU_UID}:{QEMU_UID}::/nonexistent:/usr/sbin/nologin >>/etc/passwd
echo {QEMU_USER}:x:{QEMU_UID}: >>/etc/group
# root could use it where QEMU's user can't, for which libvirt probes QEMU anew again and again
touch /mnt/none && chmod 0 /mnt/none
[ ! -e /dev/kvm ] || mount --bind /mnt/none /dev/kvm
mkdir -p /etc/libvirt /var/lib/libvirt/swtpm /var/cache/libvirt
mount --bind $root/swtpm /var/lib/libvirt/swtpm
mount --bind $2 /var/cache/libvirt
cp $root/qemu.conf /etc/libvirt/qemu.conf
exec "$3" -f $root/libvirtd.conf
"""
_QEMU_CONF = f"""
stdio_handler = "file"
user = "{QEMU_USER}"
group = "{QEMU_USER}"
swtpm_user = "{QEMU_USER}"
swtpm_group = "{QEMU_USER}"
namespaces = []
"""
_LIBVIRTD_CONF = """
unix_sock_dir = "{root}"
unix_sock_group = "root"
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:{root}/libvirtd.log"
"""


class SystemHost(Host):
    """A Host whose libvirtd is the machine's."""

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.root}/libvirt-sock"

    @property
    def tpm_directory(self) -> Path:
        return self.root / "swtpm"

    def own(self, *places: Path) -> None:  # noqa: ARG002
        """libvirt sees to that; but the directory that QEMU makes files in is QEMU's."""
        os.chown(self.scratch, QEMU_UID, QEMU_UID)

    def _launched(self) -> subprocess.Popen[bytes]:
        (self.root / "qemu.conf").write_text(_QEMU_CONF)
        (self.root / "libvirtd.conf").write_text(_LIBVIRTD_CONF.format(root=self.root))
        self.tpm_directory.mkdir(exist_ok=True)
        started = ["sh", "-c", _START, "sh", str(self.root), str(self._cache)]
        return subprocess.Popen(
            [find_tool("unshare"), "--mount", *started, find_tool("libvirtd")],
            env={"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
