"""What outlives the process: files, the log, packs, manifests, LMDB. It knows no VM and no HTTP.

Read first: docs/design.md, then fold, log, domain, session.
"""
