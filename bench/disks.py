"""An ext4 file system of this machine's own files, and changes to it: for demo and corpora."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

SOURCES = ("/usr/lib", "/usr/bin", "/usr/share", "/usr/local", "/opt", "/var/lib")
TOOLS = ("mke2fs", "e2fsck", "debugfs")
BLOCK = 4096
MADE_UP_BYTES = 1 << 20
WORDS = tuple(f"word{n}" for n in range(5000))


def missing_tools() -> list[str]:
    """The commands of TOOLS that this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=with_sbin()["PATH"]) is None]


def stage_files(into: Path, size_bytes: int, choice: random.Random | None = None) -> int:
    """Fills the new directory with hard links to, or copies of, real files; returns their size
    in whole blocks.

    The first ones there are, or such a choice of all. What the machine can't supply is made up, as
    text.
    """
    into.mkdir()
    staged = 0
    for source in _files() if choice is None else _chosen(choice):
        if size_bytes - staged < MADE_UP_BYTES:
            return staged
        room = -(-source.stat().st_size // BLOCK) * BLOCK
        target = into / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if staged + room <= size_bytes and _link_or_copy(source, target):
            staged += room
    chance = random.Random(1)
    while staged < size_bytes:
        text = " ".join(chance.choices(WORDS, k=MADE_UP_BYTES // 8)).encode()[:MADE_UP_BYTES]
        (into / f"made-up-{staged}.txt").write_bytes(text)
        staged += MADE_UP_BYTES
    return staged


def make_ext4(image: Path, size_bytes: int, content: Path, *, seed: int = 0) -> None:
    """A new sparse image with an ext4 file system that holds the directory's files.

    With a seed nothing in it is of the moment or by chance, but the files' own times.
    """
    with image.open("xb") as file:
        file.truncate(size_bytes)
    argv: list[str | Path] = ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0"]
    argv += ["-b", str(BLOCK), "-i", "16384"]
    env = with_sbin()
    if seed:
        made_up = str(uuid.UUID(int=seed))
        argv += ["-U", made_up, "-E", f"hash_seed={made_up}"]
        env["E2FSPROGS_FAKE_TIME"] = "1700000000"
    subprocess.run([*argv, "-d", content, image], check=True, env=env)


def change_inside(image: Path, scratch: Path) -> str:
    """Edits, deletes and adds files in the image's file system; says how, and how much."""
    new = scratch / "new.bin"
    new.write_bytes(random.Random(2).randbytes(24 << 20))
    try:
        with _mounted(image, scratch / "mnt") as root:
            return "loop mount: " + _edit(root, new)
    except (subprocess.CalledProcessError, OSError):
        return "debugfs: " + _edit_with_debugfs(image, new)


def check_ext4(image: Path) -> None:
    """Raises CalledProcessError unless e2fsck finds nothing to mend."""
    subprocess.run(["e2fsck", "-fn", image], check=True, capture_output=True, env=with_sbin())


def sha256(path: Path) -> str:
    """The hex digest of a volume."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files() -> Iterator[Path]:
    for top in SOURCES:
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                if path.is_file() and not path.is_symlink():
                    yield path


def _chosen(choice: random.Random) -> Iterator[Path]:
    """All files, in groups of 50 that lie side by side, as packages do."""
    files = list(_files())
    groups = [files[at : at + 50] for at in range(0, len(files), 50)]
    choice.shuffle(groups)
    for group in groups:
        yield from group


def _link_or_copy(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError:
            return False
    return True


def _edit(root: Path, new: Path) -> str:
    files = sorted(path for path in (root / "usr").rglob("*") if path.is_file())[::400][:20]
    for path in files[:10]:
        path.unlink()
    for path in files[10:]:
        with path.open("ab") as file:
            file.write(b"changed by the demo\n" * 1000)
    shutil.copy(new, root / "new.bin")
    return f"deleted {len(files[:10])} files, appended to {len(files[10:])}, added 24 MiB"


def _edit_with_debugfs(image: Path, new: Path) -> str:
    commands = f"write {new} new.bin\nmkdir made-by-the-demo\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image],
        input=commands.encode(),
        check=True,
        capture_output=True,
        env=with_sbin(),
    )
    return "added 24 MiB"


@contextlib.contextmanager
def _mounted(image: Path, at: Path) -> Iterator[Path]:
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True, capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def with_sbin() -> dict[str, str]:
    """This process's environment, with the system's commands on the path."""
    return {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
