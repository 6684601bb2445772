"""What there is to back up, who may see it, and the volumes in pools. Read first: inventory."""
