"""A column of texts, which is looked through for a part of them again and again.

One by one, a hundred thousand texts take 4 ms, in which nobody else gets on. So they are laid one
behind the other once more, when they are first looked through after a change; there the few places
where a part occurs are found in under 1 ms, and the line breaks before a place say whose it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_END, _OTHER = "\n", "\0"
_DENSE = 16  # where one text in so many has the part, looking at each is as quick


class Texts:
    """A list of texts. Not thread-safe."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._joined: str | None = None

    def append(self, text: str) -> None:
        self.insert(len(self._texts), text)

    def insert(self, at: int, text: str) -> None:
        self._texts.insert(at, text)
        self._joined = None

    def remove(self, at: int) -> None:
        del self._texts[at]
        self._joined = None

    def having(self, part: str, among: Sequence[int]) -> list[int]:
        """Those of the numbers `among`, which ascend, whose text has that part in it."""
        if len(among) * _DENSE > len(self._texts) and not {_END, _OTHER} & set(part):
            joined = self._lines()
            if joined.count(part) * _DENSE < len(among):
                wanted = among if isinstance(among, range) else set(among)
                return [at for at in _lines_having(joined, part) if at in wanted]
        texts = self._texts
        return [at for at in among if part in texts[at]]

    def _lines(self) -> str:
        """A line for each text."""
        if self._joined is None:
            joined = _END.join(self._texts)
            if joined.count(_END) >= len(self._texts):
                joined = _END.join(text.replace(_END, _OTHER) for text in self._texts)
            self._joined = joined
        return self._joined


def _lines_having(text: str, part: str) -> Iterator[int]:
    """The numbers of the lines with that part, which is not empty, in them."""
    line = counted = 0
    place = text.find(part)
    while place >= 0:
        line += text.count(_END, counted, place)
        yield line
        counted = text.find(_END, place)
        place = text.find(part, counted) if counted >= 0 else -1
