"""The folded state of one domain in LMDB, and what is known from it.

    tables                        the state as ordered maps of bytes, and its typed rows
    memory_tables, lmdb_tables    the two kinds of tables
    view                          the LMDB environment: transactions, growth, what damage leads to
    proof                         what may be retired, after all of a view was read
    index, chunk_rows             where chunks lie and what refers to them, record by record
    filling, sorted_runs          the same for a rebuild, all at once
    listing, stats, tally         what a state says: its backups, and counts
    trust                         which chunks are known to be damaged

Read first: tables, view.
"""
