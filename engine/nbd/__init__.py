"""An NBD client of our own: reads and writes disks that QEMU and its like serve.

Read protocol.py (what is on the wire), connection.py (one socket, bounded in time), handshake.py,
exchange.py (many threads, one connection), client.py (what the engine uses), then source.py.
"""
