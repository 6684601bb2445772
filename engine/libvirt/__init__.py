"""libvirt as an inventory, and live backups through it.

Read domains.py (what a domain's XML says), binding.py (libvirt itself), watch.py (one host, kept in
sight), inventory.py (all of them as an Inventory), then live.py (a backup of a running domain).
"""
