"""A domain's TPM: what swtpm keeps of it, in a file below a directory that libvirt has for all.

    <directory>/<domain's uuid>/tpm2/tpm2-00.permall

swtpm replaces the file as a whole, so it is sound at any time. Its owner is swtpm's user: libvirt
sees to that when a domain is started, if libvirt is root's; else it is the directory's owner.
"""

from __future__ import annotations

import contextlib
import os
import shutil

from engine.libvirt.files import hand_over, read_bounded, write_new

MOST_TPM_BYTES = 128 << 10  # with all else, a label has a limit
_PLACES = {"2.0": ("tpm2", "tpm2-00.permall"), "1.2": ("tpm1.2", "tpm-00.permall")}


def read_tpm(directory: str, domain: str, version: str) -> bytes:
    """The state. Raises OSError; FileNotFoundError for one that was never used, too."""
    place, name = _place_of(version)
    return read_bounded(f"{directory}/{domain}/{place}/{name}", MOST_TPM_BYTES)


def write_tpm(directory: str, domain: str, version: str, state: bytes) -> None:
    """For a domain that is not defined yet; durable. Raises OSError, then there is none."""
    place, name = _place_of(version)
    os.makedirs(directory, mode=0o711, exist_ok=True)
    root = f"{directory}/{domain}"
    os.mkdir(root, 0o711)
    try:
        os.mkdir(f"{root}/{place}", 0o700)
        write_new(f"{root}/{place}/{name}", state)
        for path in (root, f"{root}/{place}", f"{root}/{place}/{name}"):
            hand_over(path)
    except OSError:
        remove_tpm(directory, domain)
        raise


def remove_tpm(directory: str, domain: str) -> None:
    """As far as that can be."""
    with contextlib.suppress(OSError):
        shutil.rmtree(f"{directory}/{domain}")


def _place_of(version: str) -> tuple[str, str]:
    if version not in _PLACES:
        raise FileNotFoundError(f"TPM version {version!r} is unknown")
    return _PLACES[version]
