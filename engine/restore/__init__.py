"""Restoring: restores (the verb and its job), restore (the data path), new_volume."""
