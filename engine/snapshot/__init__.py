"""Holding a VM's disks still, and comparing clones. Read first: snapshot, freeze, tracking."""
