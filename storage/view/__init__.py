"""The folded state of one domain in LMDB, and what is known from it. Read first: tables, view."""
