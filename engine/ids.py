"""Uuids: canonical text in lower case, everywhere inside the engine."""

from __future__ import annotations

import uuid as uuids


def new_id() -> str:
    """A fresh one."""
    return str(uuids.uuid4())


def normal(uuid: str) -> str:
    """As we would write it, if it is one; else something that nobody has."""
    return uuid.lower()


def canonical(text: str) -> str | None:
    """The canonical form of a uuid in any spelling; None if it is none."""
    try:
        return str(uuids.UUID(text))
    except ValueError:
        return None
