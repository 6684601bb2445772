"""Attached backup points: maintenance, and what others left there. Read first: points, keeper."""
