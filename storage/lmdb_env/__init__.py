"""LMDB environments that are opened without risk, and the host's own tables in one (kv)."""
