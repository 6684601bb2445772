"""What a backup is: VMs, snapshots, jobs, the data path. Synchronous; runs in threads.

Read first: service, then backup, restore, pipeline.
"""
