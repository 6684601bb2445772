"""The configuration, mutated: understood, or refused by name."""

from __future__ import annotations

from functools import partial

from engine.config import parse_config
from engine.errors import ConfigInvalid
from tests.hostile.mutating import mutants, only_named

CONFIG = b"""
[limits]
max_jobs = 2
point_refresh_s = 3.5
[freeze]
command = ["/bin/true", "x"]
[[pools]]
name = "fast"
path = "/srv/pools/fast"
usd_types = ["SSD"]
[[vms]]
name = "mail"
disks = [{ target_device = "sda", pool = "fast", volume_name = "mail.raw" }]
"""


def test_configurations_are_understood_or_refused_by_name() -> None:
    parse_config(CONFIG, "here")
    deep = b"x = " + b"[" * 5_000 + b"]" * 5_000
    refused = sum(
        only_named(partial(parse_config, mutant, "here"), (ConfigInvalid,))
        for mutant in [*mutants(CONFIG, 8), b"\xff\xfe", deep, b"a." * 5_000 + b"b = 1"]
    )
    assert refused > 50
