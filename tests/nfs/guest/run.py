"""Runs checks in the VM, one after the other, and writes a line of JSON on each.

`python -m tests.nfs.guest.run RESULTS CHECK…`
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from tests.nfs.guest import hung, misfortune, ordinary, refusals, server
from tests.nfs.guest.site import Site

Check = Callable[[Site], None]

# Run in every `make check`.
SHORT: tuple[Check, ...] = (
    ordinary.round_trip,
    refusals.soft_mount_is_refused,
    misfortune.full_only_at_fsync,
    hung.server_away_during_a_backup,
)
REST: tuple[Check, ...] = (
    ordinary.view_is_in_the_data_directory,
    ordinary.imported_by_a_second_cluster,
    ordinary.two_hosts_in_one_domain,
    refusals.other_unsound_mounts_are_refused,
    refusals.wrong_kind_is_refused,
    refusals.read_only_mount,
    misfortune.names_of_deleted_files,
    misfortune.pack_moved_while_open_by_another_host,
    misfortune.stale_names_delete_nothing,
    misfortune.volume_that_another_host_writes_to,
)
BY_NAME = {check.__name__: check for check in (*SHORT, *REST)}


class Result(msgspec.Struct, frozen=True):
    """`trace` is empty for a check that passed."""

    name: str
    seconds: float
    notes: list[str]
    trace: str = ""


def main(results: str, *names: str) -> None:
    server.start()
    print(f"[server] {Path('/proc/uptime').read_text().split()[0]} s", flush=True)
    for name in names:
        result = _result(name)
        print(f"[check] {name}: {result.seconds:.1f} s {result.trace}", flush=True)
        with Path(results).open("ab") as file:
            file.write(msgspec.json.encode(result) + b"\n")


def _result(name: str) -> Result:
    site = Site(server.MOUNTED / "big" / name / "point", Path("/dev/shm") / name)
    began = time.monotonic()
    trace = ""
    try:
        site.point.mkdir(parents=True)
        site.local.mkdir()
        BY_NAME[name](site)
    except Exception:  # noqa: BLE001 - whatever it is, it is the result
        trace = traceback.format_exc()
    return Result(name, round(time.monotonic() - began, 1), site.notes, trace)


if __name__ == "__main__":
    main(*sys.argv[1:])
