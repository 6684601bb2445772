"""The checker: every invariant of docs/design.md §3, as a program that only reads."""
