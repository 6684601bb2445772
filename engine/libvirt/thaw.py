"""A command: `python thaw.py URI thaw VM_UUID`. What the watchdog runs when we were killed.

It stands alone, and imports nothing of ours: whatever state the service is in, this has to work.
"""

from __future__ import annotations

import sys

import libvirt

TIMEOUT_S = 10


def main(uri: str, _verb: str, uuid: str) -> int:
    """0 when the guest's file systems are thawed."""
    try:
        domain = libvirt.open(uri).lookupByUUIDString(uuid)
        domain.agentSetResponseTimeout(TIMEOUT_S, 0)
        domain.fsThaw()
    except libvirt.libvirtError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
