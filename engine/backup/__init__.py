"""Backing up: backups (the verb and its job), backup (one run), pipeline (the data path)."""
