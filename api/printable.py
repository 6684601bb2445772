"""Text of somebody else's, made fit for a log and for a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """The text with escapes for all that does not print: it forges no line, and tells no terminal
    what to do."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
