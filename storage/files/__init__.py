"""The file system, as it really is: mounts that hang, disks with bad places, names made durable.

    fs, in_flight       every call to it, and which of them are under way
    publish, growing    how a file gets its name; how a large one is written
    bad_places          what can't be read though the medium answers
    mounts              whether a mount keeps what a point needs
    ballast             room that is set aside for deleting
    uncached, memory    reading past the page cache, and into what

Read first: fs, publish.
"""
