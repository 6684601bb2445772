"""Holding a VM's disks still, and comparing clones.

    snapshot, freeze             all disks at one instant: cloned or read directly; the guest frozen
    sources                      a disk that is held, as bytes and allocated ranges
    hold                         what other ways of holding disks have to keep to
    tracking, extents            what changed between two clones
    baselines, baseline_tending  the clones that are kept for that, and when they go
    pinned, stuns                the room that these take; how long VMs stood still

Read first: snapshot, freeze, tracking.
"""
