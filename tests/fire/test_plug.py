"""The plug is pulled at random moments: nothing that was acknowledged is lost. See plug.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
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


@pytest.mark.root
def test_a_file_system_that_somebody_else_has_still_is_not_mounted_again(tmp_path: Path) -> None:
    """What a new mount shows would be its memory, which a pulled plug has none of."""
    if os.geteuid() != 0:
        pytest.skip("needs root (loop mounts)")
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES["ext4"])
    subprocess.run([*MAKE_FS["ext4"], str(image)], check=True)
    mount(image, place)
    with subprocess.Popen(["unshare", "--mount", "cat"], stdin=subprocess.PIPE) as other:
        while os.readlink(f"/proc/{other.pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt"):
            time.sleep(0.01)
        with pytest.raises(Held):
            unmount(image, place, patience_s=0.1)
        other.kill()
    mount(image, place)
    unmount(image, place)
