"""A libvirt host of its own: a session-mode libvirtd of an unprivileged user, in one directory.

Several may run side by side. Its QEMUs outlive libvirtd, so `close` ends them first.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.libvirt.binding import Connection, Domain, LibvirtFault, connect
from tests.libvirt.guest import AGENT_PORT, PATIENCE_S, Guest, make_initrd
from tests.nfs.kit import Kit, find_tool

USER = "nobody"
MIB = 1 << 20
LOGGED = "2:qemu.qemu_monitor"  # what QEMU is told to do


@dataclass(frozen=True, slots=True)
class Image:
    """A disk of a domain: its name there, its file, its format."""

    target: str
    path: Path
    format: str = "qcow2"


class Host:
    """`root` is short: sockets lie in it. `cache` may be shared, which saves libvirtd seconds."""

    def __init__(self, kit: Kit, cache: Path) -> None:
        self._user = pwd.getpwnam(USER)
        self._cache = cache
        self.root = Path(tempfile.mkdtemp(prefix="vk", dir="/tmp"))
        self.root.chmod(0o755)
        for name in ("run", "config/libvirt", "data", "images", "pool", "scratch"):
            (self.root / name).mkdir(parents=True)
        (self.root / "config/libvirt/qemu.conf").write_text('stdio_handler = "file"\n')
        (self.root / "config/libvirt/libvirtd.conf").write_text(
            f'log_outputs = "2:file:{self.log}"\nlog_filters = "{LOGGED}"\n'
        )
        self._lend_kernel(kit)
        self.own(self.root, cache)
        self._daemon: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"qemu+unix:///session?socket={self.root}/run/libvirt/libvirt-sock"

    @property
    def log(self) -> Path:
        return self.root / "libvirtd.log"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    def own(self, *places: Path) -> None:
        """Gives all of it to the user."""
        for place in places:
            for path in (place, *place.rglob("*")):
                os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)

    # libvirtd -----------------------------------------------------------------------------------

    def start(self) -> None:
        """libvirtd runs and answers."""
        self._daemon = self._launched()
        self.connection = self._connected()

    def _launched(self) -> subprocess.Popen[bytes]:
        home = str(self.root)
        places = {"RUNTIME_DIR": "run", "CONFIG_HOME": "config", "DATA_HOME": "data"}
        environment = {f"XDG_{name}": f"{home}/{place}" for name, place in places.items()}
        environment |= {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin", "HOME": home}
        return subprocess.Popen(
            [find_tool("libvirtd")],
            env=environment | {"XDG_CACHE_HOME": str(self._cache)},
            user=self._user.pw_uid,
            group=self._user.pw_gid,
            extra_groups=[],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def stop(self) -> None:
        """libvirtd is gone; the guests run on."""
        assert self._daemon is not None
        with contextlib.suppress(LibvirtFault):
            self.connection.close()
        self._daemon.terminate()
        self._daemon.wait(PATIENCE_S)

    @contextlib.contextmanager
    def hung(self) -> Iterator[Callable[[], None]]:
        """Its call makes libvirtd hang, which the end of the block ends."""
        assert self._daemon is not None
        daemon = self._daemon
        try:
            yield lambda: daemon.send_signal(signal.SIGSTOP)
        finally:
            daemon.send_signal(signal.SIGCONT)

    def go_on(self) -> None:
        """It hung, and does no more."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """libvirtd crashes; the guests run on."""
        assert self._daemon is not None
        self._daemon.kill()
        self._daemon.wait(PATIENCE_S)

    def restart_with_job(self, name: str, job: str) -> None:
        """libvirtd is started anew, and finds `job` in its notes about a domain that runs."""
        self.stop()
        notes = self.root / f"run/libvirt/qemu/run/{name}.xml"
        found = re.sub("<job [^>]*/>", "", notes.read_text())
        notes.write_text(found.replace("</qemuCaps>", f"</qemuCaps>{job}"))
        self.start()

    def close(self) -> None:
        try:
            with contextlib.suppress(LibvirtFault):
                for domain in self.connection.listAllDomains():
                    if domain.isActive():
                        domain.destroy()
        finally:
            self.stop()
            shutil.rmtree(self.root, ignore_errors=True)

    def qemu_pid(self, name: str) -> int:
        return int((self.root / f"run/libvirt/qemu/run/{name}.pid").read_text())

    def kill_qemu(self, name: str) -> None:
        """As a crash of the host would."""
        os.kill(self.qemu_pid(name), signal.SIGKILL)

    def _connected(self) -> Connection:
        assert self._daemon is not None
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                connection = connect(self.uri)
                connection.getVersion()
            except LibvirtFault:
                if time.monotonic() > end or self._daemon.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return connection

    # Domains ------------------------------------------------------------------------------------

    def image(
        self, target: str, name: str, size_bytes: int, form: str = "qcow2", *options: str
    ) -> Image:
        """A new image."""
        path = self.root / "images" / name
        command = [find_tool("qemu-img"), "create", "-q", "-f", form, *options]
        subprocess.run([*command, str(path), str(size_bytes)], check=True)
        self.own(path)
        return Image(target, path, form)

    def define(
        self,
        name: str,
        images: Sequence[Image],
        *,
        agent: bool = True,
        extra: str = "",
        uuid: str = "",
    ) -> Domain:
        """A domain that boots the guest. `extra`: more XML, before the devices."""
        disks = "".join(disk_xml(image) for image in images)
        channel = f"<channel type='unix'><target type='virtio' name='{AGENT_PORT}'/></channel>"
        return self.connection.defineXML(f"""<domain type='qemu'><name>{name}</name>
            {f"<uuid>{uuid}</uuid>" if uuid else ""}
            <memory unit='MiB'>192</memory><vcpu>1</vcpu>
            <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{self.root}/vmlinux</kernel>
            <initrd>{self.root}/initrd</initrd>
            <cmdline>quiet panic=1 mitigations=off {"agent=yes" if agent else ""}</cmdline></os>
            <features><acpi/></features><on_reboot>destroy</on_reboot>{extra}<devices>{disks}
            <disk type='file' device='cdrom'><target dev='sdz' bus='sata'/></disk>
            <controller type='usb' model='none'/>
            <serial type='file'><source path='{self.root}/{name}.console'/></serial>
            <serial type='unix'><source mode='bind' path='{self.root}/{name}.wire'/></serial>
            {channel if agent else ""}<memballoon model='none'/></devices></domain>""")

    def boot(self, domain: Domain) -> Guest:
        """Starts it if need be; the guest's shell, and its agent if it has one, answers."""
        if not domain.isActive():
            domain.create()
        guest = Guest(self.root / f"{domain.name()}.wire")
        end = time.monotonic() + PATIENCE_S
        while AGENT_PORT in domain.XMLDesc() and not _agent_answers(domain):
            assert time.monotonic() < end, "the agent does not answer"
            time.sleep(0.05)
        return guest

    def _lend_kernel(self, kit: Kit) -> None:
        shutil.copy(kit.kernel, self.root / "vmlinux")
        (self.root / "initrd").write_bytes(make_initrd(kit))


def disk_xml(image: Image) -> str:
    return (
        f"<disk type='file' device='disk'><driver name='qemu' type='{image.format}'"
        f" discard='unmap'/><source file='{image.path}'/>"
        f"<target dev='{image.target}' bus='virtio'/></disk>"
    )


def _agent_answers(domain: Domain) -> bool:
    try:
        domain.fsInfo()
    except LibvirtFault:
        return False
    return True
