"""The guest: Debian's kernel, busybox and QEMU's guest agent in an initrd, and a shell on a wire.

The second serial line is a unix socket of the host. Each line that is sent there is run by the
guest's shell; what it printed comes back, then a line that ends it and says the exit status. A busy
machine once lost 16 bytes on the way, as many as the line's buffer holds: so the command's length
goes before it, and one of another length is not run but asked for again.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from pathlib import Path

from tests.initrd import Initrd, with_needs
from tests.nfs.kit import Kit, find_tool

AGENT_PORT = "org.qemu.guest_agent.0"
PATIENCE_S = 120.0
_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console", "virtio_net"),
    *("crc32c_generic", "ext4", "efivarfs"),
)
_DIRECTORIES = ("bin", "dev", "proc", "sys", "run", "tmp", "mnt", "modules", "etc", "var")
_DONE = "@done"
_AGAIN = "@again"
_UP = "@up"

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module 2>/dev/null; done
mdev -s
agent_port() {{ grep -lx {AGENT_PORT} /sys/class/virtio-ports/*/name 2>/dev/null; }}
if grep -q agent=yes /proc/cmdline; then
  while [ -z "$(agent_port)" ]; do usleep 20000; done
  port=$(agent_port); port=${{port%/name}}
  qemu-ga -d -m virtio-serial -p /dev/${{port##*/}} -t /run -f /run/agent.pid
fi
stty -F /dev/ttyS1 raw -echo
exec 0</dev/ttyS1 1>/dev/ttyS1 2>&1
echo {_UP}
while read -r size line; do
  if [ "${{#line}}" != "$size" ]; then echo {_AGAIN}; continue; fi
  ( eval "$line" ) </dev/null
  printf '\\n{_DONE} %s\\n' $?
done
"""


class GuestFailed(Exception):
    """A command in the guest ended with another status than 0, or the guest is gone."""


def make_initrd(kit: Kit) -> bytes:
    """The guest as the kernel unpacks it."""
    initrd = Initrd()
    agent = Path(find_tool("qemu-ga"))
    libraries = re.findall(r"(/\S+) \(0x", _output("ldd", str(agent)))
    places = {str(place) for path in libraries for place in Path(path).parents} - {"/"}
    for name in (*_DIRECTORIES, *sorted(place.lstrip("/") for place in places)):
        initrd.directory(name)
    initrd.console()
    for path in libraries:
        initrd.file(path.lstrip("/"), Path(path).read_bytes(), 0o755)
    initrd.file("bin/busybox", Path(find_tool("busybox")).read_bytes(), 0o755)
    initrd.file("bin/qemu-ga", agent.read_bytes(), 0o755)
    for number, module in enumerate(with_needs(kit.modules, _MODULES)):
        initrd.file(f"modules/{number:02}.ko", module.read_bytes())
    initrd.file("init", _INIT.encode(), 0o755)
    return initrd.sealed()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Guest:
    """A guest's shell. It is up when this is made."""

    def __init__(self, wire: Path) -> None:
        self._socket = _connected(wire)
        self._socket.settimeout(PATIENCE_S)
        self._file = self._socket.makefile("rwb", buffering=0)
        while self._line() != _UP:
            pass

    def run(self, command: str) -> str:
        """What the shell printed. GuestFailed."""
        self.begin(command)
        return self.answer(command)

    def answer(self, command: str) -> str:
        """What the shell printed for the command that was begun. GuestFailed."""
        lines = []
        while not (line := self._line()).startswith(_DONE):
            if line == _AGAIN:
                self.begin(command)
            else:
                lines.append(line)
        printed = "\n".join(lines).strip("\n")
        if line != f"{_DONE} 0":
            raise GuestFailed(f"{command!r}: {line}: {printed}")
        return printed

    def begin(self, command: str) -> None:
        """Sends the command, one line, and does not wait for its `answer`."""
        self._file.write(f"{len(command)} {command}\n".encode())

    def sha256(self, *paths: str) -> list[str]:
        """Of files or whole disks, as the guest sees them."""
        return [line.split()[0] for line in self.run(f"sha256sum {' '.join(paths)}").splitlines()]

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def _line(self) -> str:
        line = self._file.readline()
        if not line:
            raise GuestFailed("the guest is gone")
        return bytes(line).decode(errors="replace").rstrip("\r\n")


def _connected(wire: Path) -> socket.socket:
    end = time.monotonic() + PATIENCE_S
    while True:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(str(wire))
        except OSError:
            made.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
        else:
            return made
