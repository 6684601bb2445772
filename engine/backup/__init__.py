"""Backing up: backup_job (request, job), backup (one run), pipeline (the data path), deletion."""
