"""All backups of the managed clusters, found without looking at all. Read first: catalogue."""
