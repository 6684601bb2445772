"""What a backup is: VMs, snapshots, jobs, the data path. Synchronous; runs in threads.

    inventory  what there is to back up: clusters, tenants, pools, VMs and their volumes
    snapshot   holding a VM's disks still, and knowing what changed on them since
    backup     making a backup: the request, its job, the data path; deleting one
    restore    the same for a restore
    points     attached backup points, each with a thread of its own; maintenance
    catalogue  all backups of the managed clusters, in memory
    jobs       long work: threads, progress, cancelling, a record that outlives the process
    libvirt    domains of libvirt hosts as the inventory; live backups
    qemu, nbd  qcow2 images, by way of qemu-nbd and our own NBD client

Beside them: service (the Engine: every verb), core (the parts that verbs work with), verb_types
(what verbs take and answer), model and state (rows, and the tables that they are kept in), config,
host (the data directory), recovery (what a start does about the last process), amends (what could
not be noted just now), probes (asking what may hang), turns (who waits for it), oplog, errors, ids.

Read first: service, then backup/backup_job, backup/backup, backup/pipeline, restore/restore.
"""
