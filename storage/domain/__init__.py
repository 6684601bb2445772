"""What a host does in its cluster's domain on a point.

    domain, appender         the domain; keeping its view in step with its log
    session, new_packs       writing: manifests and packs, until a record makes them count
    maps, reader             reading: which chunks a disk has, and what is in them
    gc, orphans              freeing space: packs, and files of nobody
    imports, adopted         other clusters' backups; what may be relied on in their packs
    salvage                  what interrupted backups had stored
    heartbeats, leftovers    hosts that have died, and what they have left
    checkpoints, bundling    copies of the view and of the log that save reading the whole log

Read first: domain, session, reader.
"""
