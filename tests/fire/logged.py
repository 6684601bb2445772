"""In the VM: the work of tests.fire.plug, on a file system whose device logs its writes.

`python -m tests.fire.logged TOLD KIND WORDS SEED`: the disk is /dev/vda, its log /dev/vdb, both of
device mapper's target log-writes. Each word of the work becomes a line of TOLD, after the first,
which is the cluster; then a mark in the log, with the line's number. See tests.fire.replay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.fire.plug import work
from tests.fire.site import Site

DISK, LOG = "/dev/vda", "/dev/vdb"
NAME = "logged"
PLACE = Path("/mnt") / NAME


class Enough(Exception):
    """As many words were told as were asked for."""


def main(told: Path, kind: str, words: int, seed: int) -> None:
    _run("modprobe", "-a", kind, "dm-log-writes")
    sectors = _run("blockdev", "--getsz", DISK).strip()
    _run("dmsetup", "create", NAME, "--table", f"0 {sectors} log-writes {DISK} {LOG}")
    _run("dmsetup", "mknodes")  # there is no udev
    PLACE.mkdir(parents=True)
    _run("mount", "-t", kind, f"/dev/mapper/{NAME}", str(PLACE))
    site = Site(PLACE, PLACE)
    site.domain.close()
    lines = [json.dumps(["cluster", site.label.cluster_uuid])]

    def tell(verb: str, what: str) -> None:
        lines.append(json.dumps([verb, what]))
        _run("dmsetup", "message", NAME, "0", "mark", str(len(lines) - 1))
        if len(lines) > words:
            raise Enough

    try:
        work(site, seed, tell)
    except Enough:
        told.write_text("\n".join(lines))
    # The file system is in use; by force the target is let go, which first writes the log's end.
    _run("dmsetup", "remove", "--force", "--deferred", NAME)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
