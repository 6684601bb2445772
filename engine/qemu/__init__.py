"""qcow2 volumes, by QEMU's own tools: only they follow all that an image may refer to.

Read header.py (what an image says of itself), process.py (the tools as children that end with us),
bitmaps.py, stopped.py (backing up), new_qcow2.py (restoring).
"""
