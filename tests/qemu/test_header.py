"""engine.qemu.header: what images say of themselves, and what may not be followed."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from engine.errors import DiskServerRefused, EngineError, PoolUnreachable
from engine.qemu.header import Qcow2Header, chain_below, parse_header, read_header
from engine.snapshot.sources import open_volume
from tests.qemu.images import MIB, create, qemu_img


def header_of(image: Path) -> Qcow2Header:
    fd = open_volume(str(image))
    try:
        return read_header(fd, str(image))
    finally:
        os.close(fd)


def chain_of(image: Path, *roots: Path) -> list[str]:
    return chain_below(str(image), header_of(image), [str(root) for root in roots])


def test_an_image(tmp_path: Path) -> None:
    assert header_of(create(tmp_path / "v", "7G")) == Qcow2Header(3, 7 << 30)
    assert header_of(create(tmp_path / "old", "5M", "-o", "compat=0.10")) == Qcow2Header(2, 5 * MIB)


def test_what_is_no_image(tmp_path: Path) -> None:
    for number, start in enumerate(
        [b"", b"QFI\xfb", bytes(512), b"QFI\xfb\0\0\0\x04" + bytes(500)]
    ):
        (tmp_path / str(number)).write_bytes(start)
        with pytest.raises(DiskServerRefused, match="qcow2"):
            header_of(tmp_path / str(number))


def test_lies_about_the_backing_file() -> None:
    for place, size_bytes in [(1 << 40, 9), (100, 0), (100, 5000), (65530, 100)]:
        start = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, place, size_bytes, 16, MIB, 0)
        with pytest.raises(DiskServerRefused, match="a backing file's name"):
            parse_header(start.ljust(65536, b"\0"), "v")


class TestChains:
    def make(self, tmp_path: Path, *names: str, form: str = "qcow2") -> Path:
        base = tmp_path / names[0]
        if form == "raw":
            base.write_bytes(bytes(16 * MIB))
        else:
            create(base)
        for name in names[1:]:
            create(
                tmp_path / name, "16M", "-b", base, "-F", form if base.name == names[0] else "qcow2"
            )
            base = tmp_path / name
        return base

    def test_alone(self, tmp_path: Path) -> None:
        assert chain_of(self.make(tmp_path, "a")) == []

    def test_nearest_first(self, tmp_path: Path) -> None:
        top = self.make(tmp_path, "a", "b", "c")
        assert chain_of(top) == [str(tmp_path / "b"), str(tmp_path / "a")]

    def test_raw_at_the_bottom_is_not_looked_into(self, tmp_path: Path) -> None:
        """A guest wrote what looks like an image that stands on a secret of ours."""
        top = self.make(tmp_path, "raw", "top", form="raw")
        trap = create(tmp_path / "trap", "16M", "-u", "-b", "/etc/shadow", "-F", "raw")
        (tmp_path / "raw").write_bytes(trap.read_bytes().ljust(16 * MIB, b"\0"))
        assert chain_of(top) == [str(tmp_path / "raw")]

    def test_a_format_that_is_not_declared(self, tmp_path: Path) -> None:
        create(tmp_path / "a")
        top = create(tmp_path / "top", "16M", "-b", tmp_path / "a", "-F", "qcow2")
        declared = b"\xe2\x79\x2a\xca"
        assert declared in top.read_bytes()[:512]
        top.write_bytes(top.read_bytes().replace(declared, b"\0\0\0\x01", 1))
        with pytest.raises(DiskServerRefused, match="does not declare"):
            chain_of(top)

    @pytest.mark.parametrize(
        ("backing", "why"),
        [
            ("/etc/shadow", "in no pool"),
            ("../outside", "in no pool"),
            ("nbd://127.0.0.1:1/x", "no file"),
            ('json:{"driver":"null-co"}', "no file"),
        ],
    )
    def test_places_that_are_not_allowed(self, tmp_path: Path, backing: str, why: str) -> None:
        (tmp_path / "outside").write_bytes(bytes(MIB))
        (tmp_path / "pool").mkdir()
        top = create(tmp_path / "pool" / "top", "16M", "-u", "-b", backing, "-F", "raw")
        with pytest.raises(DiskServerRefused, match=why):
            chain_of(top)

    def test_another_pool_is_allowed_and_a_link_out_of_it_is_not(self, tmp_path: Path) -> None:
        (tmp_path / "pool").mkdir()
        (tmp_path / "templates").mkdir()
        create(tmp_path / "templates" / "a")
        top = create(tmp_path / "pool" / "top", "16M", "-b", "../templates/a", "-F", "qcow2")
        assert chain_of(top, tmp_path / "templates") == [str(tmp_path / "templates" / "a")]
        (tmp_path / "templates" / "a").rename(tmp_path / "secret")
        (tmp_path / "templates" / "a").symlink_to(tmp_path / "secret")
        with pytest.raises(DiskServerRefused, match="in no pool"):
            chain_of(top, tmp_path / "templates")

    def test_one_that_is_not_there(self, tmp_path: Path) -> None:
        top = create(tmp_path / "top", "16M", "-u", "-b", tmp_path / "gone", "-F", "qcow2")
        with pytest.raises(PoolUnreachable, match="gone"):
            chain_of(top)

    def test_a_circle_ends(self, tmp_path: Path) -> None:
        self.make(tmp_path, "a", "b")
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", tmp_path / "b", tmp_path / "a")
        with pytest.raises(EngineError, match="over 64 backing files"):
            chain_of(tmp_path / "a")

    def test_data_elsewhere(self, tmp_path: Path) -> None:
        top = create(tmp_path / "v", "16M", "-o", f"data_file={tmp_path}/d")
        with pytest.raises(DiskServerRefused, match="data in another file"):
            chain_of(top)
