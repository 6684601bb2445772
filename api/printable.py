"""Text of somebody else's, made fit for a log and for a terminal."""

from __future__ import annotations

import codecs

# Now, as it is loaded from a file: when none may be opened any more, the log has to say so.
_escape = codecs.getencoder("unicode_escape")


def one_line(text: str) -> str:
    """The text with escapes for all that does not print: it forges no line, and tells no terminal
    what to do."""
    return "".join(c if c.isprintable() else _escape(c)[0].decode() for c in text)
