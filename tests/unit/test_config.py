"""engine.config: one file, clear errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import (
    ClusterConfig,
    Config,
    DiskConfig,
    NamespaceConfig,
    PointConfig,
    PoolConfig,
    VmConfig,
    load_config,
    parse_config,
)
from engine.errors import ConfigInvalid

EXAMPLE = Path(__file__).parents[2] / "deploy" / "vmkeep.toml"


def test_nothing_is_the_default() -> None:
    assert parse_config(b"", "x") == Config()
    assert Config().worker_count >= 2


def test_all_of_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "vmkeep.toml"
    path.write_text(
        """
        [limits]
        max_jobs = 4
        workers = 7
        [gc]
        sparse_below = 0.5
        [freeze]
        command = ["/bin/freeze", "-v"]
        [[clusters]]
        name = "east"
        mode = "hci"
        [[tenants]]
        name = "acme"
        [[namespaces]]
        name = "prod"
        tenant = "acme"
        [[pools]]
        name = "fast"
        path = "/srv/fast"
        [[points]]
        name = "nas"
        kind = "nfs"
        path = "/mnt/nas"
        [[vms]]
        name = "mail"
        disks = [{ target_device = "sda", volume_name = "mail.raw", share = true }]
        """
    )
    config = load_config(str(path))
    assert (config.limits.max_jobs, config.worker_count) == (4, 7)
    assert config.freeze.command == ("/bin/freeze", "-v")
    assert config.clusters[0].mode == "hci"
    assert config.points[0].kind == "nfs"
    assert config.vms[0].disks[0].share


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[limits]\nmax_jobs = 0", "max_jobs"),
        ("[limits]\nmax_job = 2", "max_job"),
        ("[limits]\nmax_jobs = 'two'", "max_jobs"),
        ("[[pools]]\nname = 'p'", "path"),
        ("[[pools]]\nname = 'p'\npath = 'relative'", "path"),
        ("[[pools]]\nname = 'p'\npath = '/p'\nusd_types = []", "usd_types"),
        ("[[points]]\nname = 'p'\npath = '/p'\nkind = 's3'", "kind"),
        ("[[pools]]\nname = 'p'\npath = '/p'\nusd_types = ['%s']" % ("x" * 65), "usd_types"),
        ('[[pools]]\nname = "p"\npath = "/p\\u0000"', "path"),
        ('[[points]]\nname = "p"\npath = "/p\\u0000"', "path"),
        ('[libvirt]\nscratch = "/s\\u0000"', "scratch"),
        ('[libvirt]\ntpm_directory = "/t\\u0000"', "tpm_directory"),
        ('[[points]]\nname = "p\\u0000"\npath = "/p"', "name"),
        ("[freeze]\ncommand = ['']", "command"),
        ("[[clusters]]\nname = ''", "name"),
        ("[[vms]]\nname = 'v'", "disks"),
        (
            "[[vms]]\nname = 'v'\ndisks = [{target_device = '%s', volume_name = 'v'}]" % ("x" * 65),
            "target_device",
        ),
        ("[limits", "limits"),
    ],
)
def test_mistakes_are_named(text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config(text.encode(), "the-file")
    assert "the-file" in str(caught.value)
    assert said in str(caught.value) or "TOML" in str(caught.value) or text == "[limits"


def test_files_that_can_not_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"none\.toml"):
        load_config(str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid, match=r"binary\.toml"):
        load_config(str(tmp_path / "binary.toml"))


def test_the_example_names_every_member_and_says_the_defaults() -> None:
    """But for those of [libvirt], which are in docs/operations.md."""
    text, config = EXAMPLE.read_text(), load_config(str(EXAMPLE))
    for name in ("limits", "gc", "freeze", "clone", "tracking", "log"):
        section = getattr(config, name)
        assert section == getattr(Config(), name)
        for member in section.__struct_fields__:
            assert re.search(rf"^(# )?{member} = ", text, re.MULTILINE), member
    for kind in (ClusterConfig, NamespaceConfig, PoolConfig, PointConfig, DiskConfig, VmConfig):
        for member in kind.__struct_fields__:
            assert member in text, (kind, member)
    assert config.pools == (PoolConfig("default", "/srv/vmkeep/pool"),)
    assert config.points == (PointConfig("default", "/srv/vmkeep/point"),)
