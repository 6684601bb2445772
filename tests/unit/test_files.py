"""Small files of a domain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from engine.libvirt.files import hand_over


@pytest.mark.root
def test_the_owner_of_a_directory_gets_nothing_of_another_that_is_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write above a pool could have had any file that is named as the volume."""
    pool, system = tmp_path / "pool", tmp_path / "system"
    for place in (pool, system):
        place.mkdir()
        (place / "shadow").write_text(place.name)
    os.chown(pool, 1234, 1234)
    chown = os.chown

    def swapped(*args: Any, **how: Any) -> None:
        pool.rename(tmp_path / "aside")
        pool.symlink_to(system)
        chown(*args, **how)

    monkeypatch.setattr(os, "chown", swapped)
    hand_over(f"{pool}/shadow")
    assert (system / "shadow").stat().st_uid == os.getuid()
    assert (tmp_path / "aside" / "shadow").stat().st_uid == 1234
