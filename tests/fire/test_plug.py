"""The plug is pulled at random moments: nothing that was acknowledged is lost. See plug.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.fire.plug import MAKE_FS, Bench, Told, image_of, pulled

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
