"""What lies on a backup point, to the byte (docs/design.md §4 and §5).

    framing, record, bundles      small objects: the log's records, and many of them in one file
    sealed, packs, manifests      files with a footer: of frames, and of the chunks of a disk
    chunks, patches               chunk ids, and what is in a frame
    paths                         where all of it lies
    ranges                        (offset, length) of disks

Read first: docs/design.md §4, then record and sealed.
"""
