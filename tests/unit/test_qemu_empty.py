"""What a new qcow2 image is made of."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from engine.errors import DiskServerRefused
from engine.qemu.empty import empty_qcow2


def test_no_place_for_temporary_files_is_no_fault_of_the_disks_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(DiskServerRefused, match=r"/disk: no empty image .*vmkeep-qcow2-"):
        empty_qcow2("/disk", 1 << 20)
