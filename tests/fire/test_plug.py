"""The plug is pulled at random moments: nothing that was acknowledged is lost. See plug.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fire.loops import Held, mount, unmount
from tests.fire.plug import MAKE_FS, SIZE_BYTES, Bench, Told, image_of, pulled

ROUNDS = 100  # of each kind


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MAKE_FS))
def test_pulling_the_plug(tmp_path: Path, kind: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (loop mounts)")
    if shutil.which(MAKE_FS[kind][0], path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin") is None:
        pytest.skip(f"needs {MAKE_FS[kind][0]}")
    with Bench(tmp_path, kind) as bench:
        assert len(list(pulled(bench, range(ROUNDS)))) == ROUNDS
    assert bench.counts["acknowledged"] > ROUNDS
    assert bench.counts["restored"] > ROUNDS
    print(kind, dict(bench.counts))


def test_a_content_follows_from_its_label() -> None:
    assert image_of(b"1,2") != image_of(b"1")
    assert image_of(b"1,2") == image_of(b"1,2")


def test_what_a_child_tells() -> None:
    told = Told()
    for line in (b'["saving", "1,2"]', b'["saved", "u"]', b'["forgotten", "v"]'):
        told.hear(line)
    assert (told.saving, told.saved, told.forgotten) == ({b"1,2"}, {"u"}, {"v"})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root (loop mounts)")
    made = tmp_path / "image"
    with made.open("wb") as file:
        file.truncate(SIZE_BYTES["ext4"])
    subprocess.run([*MAKE_FS["ext4"], str(made)], check=True)
    return made


@contextlib.contextmanager
def other_mount_namespace() -> Iterator[None]:
    """One with a copy of all mounts that this process has now."""
    with subprocess.Popen(["unshare", "--mount", "cat"], stdin=subprocess.PIPE) as other:
        while os.readlink(f"/proc/{other.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
            time.sleep(0.01)
        yield
        other.kill()


@pytest.mark.root
def test_a_file_system_that_somebody_else_has_still_is_not_mounted_again(image: Path) -> None:
    """What a new mount shows would be its memory, which a pulled plug has none of."""
    place = image.with_name("place")
    place.mkdir()
    mount(image, place)
    with other_mount_namespace(), pytest.raises(Held):
        unmount(image, place, patience_s=0.1)
    mount(image, place)
    unmount(image, place)


_MOUNTS = """
import sys
from pathlib import Path
from tests.fire.loops import enter_own_mounts, mount, unmount
enter_own_mounts()
image, place = map(Path, sys.argv[1:])
mount(image, place)
print("mounted", flush=True)
sys.stdin.readline()
unmount(image, place, patience_s=5)
"""


@pytest.mark.root
def test_nobody_else_gets_what_is_mounted_in_a_namespace_of_its_own(image: Path) -> None:
    place = image.with_name("place")
    place.mkdir()
    command = [sys.executable, "-c", _MOUNTS, str(image), str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as us:
        assert us.stdout is not None
        assert us.stdout.readline() == "mounted\n"
        with other_mount_namespace():
            us.communicate("\n")
    assert us.returncode == 0


@pytest.mark.root
def test_tests_mount_in_such_a_one() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root (mount namespaces)")
    assert os.readlink("/proc/self/ns/mnt") != os.readlink(f"/proc/{os.getppid()}/ns/mnt")
