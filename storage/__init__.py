"""What outlives the process: files, the log, packs, manifests, LMDB. It knows no VM and no HTTP.

Each package stands on those below it only (`lint-imports` holds them to it):

    check     the checker
    domain    what one host does in its cluster's domain: sessions, reads, gc, imports
    log       numbered records, and what each of them does to the state
    view      the folded state of a domain, in LMDB
    lmdb_env  an LMDB environment that is opened without risk, and the host's own tables in one
    format    what lies on a point, to the byte
    files     the file system, as it really is

point.py, between check and domain, makes and opens a point. Read first: docs/design.md, then
log/fold, log/log, domain/domain, domain/session.
"""
