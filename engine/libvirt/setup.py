"""What live backups need to know of this service and its configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LiveSetup:
    """`host` tells our checkpoints from another service's. Freezing: engine/snapshot/freeze.py.

    `tpm_directory`: engine/libvirt/tpm.py.
    """

    host: str
    scratch: str
    reserve_bytes: int
    limit_bytes: int
    freeze_timeout_s: float
    freeze_hold_s: float
    tpm_directory: str = ""

    @property
    def ours(self) -> str:
        """What the paths of all that we have in the scratch directory begin with."""
        return f"{self.scratch}/{self.host}-"
