"""Restoring: restore_job (request and job), restore (the data path), new_volume."""
