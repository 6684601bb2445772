"""storage.files.growing: the same bytes whichever way they are written, nothing left by errors."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from storage.files import growing
from storage.files.fs import NO_FD, Buffer, OsFs
from storage.files.growing import STAGE_BYTES, GrowingFile
from tests.failing_fs import open_below
from tests.rig import random_bytes

PIECE_BYTES = 700_001


class Writes(OsFs):
    """Notes (past the cache?, bytes) of each write; `refusal` is what those past it fail with."""

    def __init__(self, *, direct: bool = True, refusal: int = 0) -> None:
        self.seen: list[tuple[bool, int]] = []
        self.direct = direct
        self.refusal = refusal

    def open_direct(self, fd: int, path: str) -> int:
        return super().open_direct(fd, path) if self.direct else NO_FD

    def pwrite(self, fd: int, pieces: Sequence[Buffer], offset: int) -> int:
        direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        self.seen.append((direct, sum(len(piece) for piece in pieces)))
        if direct and self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return super().pwrite(fd, pieces, offset)


def has_direct(directory: Path) -> bool:
    file = GrowingFile(OsFs(), f"{directory}/probe", large=True)
    found = file._direct_fd != NO_FD
    file.abandon()
    return found


def grow(fs: OsFs, path: Path, content: bytes) -> None:
    file = GrowingFile(fs, str(path), large=True)
    offsets = range(0, len(content), PIECE_BYTES)
    for offset in offsets:
        assert (
            file.append([content[offset : offset + 56], content[offset + 56 :][: PIECE_BYTES - 56]])
            == offset
        )
    assert file.size_bytes == len(content)
    os.close(file.finish())


@pytest.mark.parametrize(
    "size_bytes", [0, 1, 4096, STAGE_BYTES - 1, STAGE_BYTES, STAGE_BYTES + 1, 2 * STAGE_BYTES + 777]
)
@pytest.mark.parametrize(("direct", "refusal"), [(True, 0), (True, errno.EINVAL), (False, 0)])
def test_the_same_bytes(tmp_path: Path, size_bytes: int, direct: bool, refusal: int) -> None:
    content = random_bytes(size_bytes)
    grow(Writes(direct=direct, refusal=refusal), tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == content
    assert open_below(tmp_path) == []


def test_only_the_rest_goes_through_the_cache(tmp_path: Path) -> None:
    fs = Writes()
    grow(fs, tmp_path / "x", random_bytes(2 * STAGE_BYTES + 777))
    if has_direct(tmp_path):
        assert fs.seen == [(True, STAGE_BYTES), (True, STAGE_BYTES), (False, 777)]
    else:
        assert not any(direct for direct, _ in fs.seen)


def test_a_full_file_system_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    fs = Writes(refusal=errno.ENOSPC)
    file = GrowingFile(fs, f"{tmp_path}/x", large=True)
    if has_direct(tmp_path):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            file.append([bytes(STAGE_BYTES)])
    file.abandon()
    file.abandon()
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


def test_no_second_descriptor_leaves_nothing(tmp_path: Path) -> None:
    class Fails(OsFs):
        def open_direct(self, fd: int, path: str) -> int:
            raise OSError(errno.EMFILE, f"{path} {fd}")

    with pytest.raises(OSError, match="Errno 24"):
        GrowingFile(Fails(), f"{tmp_path}/x", large=True)
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


def test_no_memory_to_write_from_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_: int) -> memoryview:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    if not has_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    monkeypatch.setattr(growing, "large_buffer", refused)
    with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
        GrowingFile(OsFs(), f"{tmp_path}/x", large=True)
    assert os.listdir(tmp_path) == []
    assert open_below(tmp_path) == []


@pytest.fixture
def without_direct(tmp_path: Path) -> Iterator[Path]:
    """A file system whose open() refuses O_DIRECT."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root (a mount)")
    path = tmp_path / "ramfs"
    path.mkdir()
    command = ["mount", "-t", "ramfs", "none", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mounts here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.root
def test_a_file_system_without_it_is_written_through_the_cache(without_direct: Path) -> None:
    content = random_bytes(STAGE_BYTES + 777)
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        os.open(without_direct / "y", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    fs = Writes()
    grow(fs, without_direct / "x", content)
    assert (without_direct / "x").read_bytes() == content
    assert fs.seen
    assert not any(direct for direct, _ in fs.seen)
    assert open_below(without_direct) == []
