"""What lies on a backup point, to the byte (docs/design.md §4 and §5)."""
