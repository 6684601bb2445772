"""engine.catalogue.texts, beside a look at each text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.catalogue.texts import Texts

words = st.text(alphabet="ab\n\0é日", max_size=6)


@given(
    st.lists(words, max_size=60),
    st.lists(st.tuples(st.integers(0, 99), words | st.none()), max_size=6),
    st.text(alphabet="ab\n\0é日", min_size=1, max_size=3),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_it_finds_what_a_look_at_each_does(
    first: list[str], changes: list[tuple[int, str | None]], part: str, start: int, end: int
) -> None:
    texts, plain = Texts(), list(first)
    for text in first:
        texts.append(text)
    for place, changed in [(0, "ab"), *changes]:
        at = place % (len(plain) + 1)
        if changed is not None:
            plain.insert(at, changed)
            texts.insert(at, changed)
        elif at < len(plain):
            del plain[at]
            texts.remove(at)
        among = range(min(start, len(plain)), min(end, len(plain)))
        assert texts.having(part, among) == [n for n in among if part in plain[n]]
        some = [n for n in among if n % 3]
        assert texts.having(part, some) == [n for n in some if part in plain[n]]


def test_few_among_many_and_many_among_many() -> None:
    texts = Texts()
    plain = [f"daily {n}" + " by plan" * (n % 7 > 0) for n in range(1000)]
    for text in plain:
        texts.append(text)
    whole = range(1000)
    for part in ("daily", "plan", "y 99", "999", "0 by", "none", "daily 5"):
        assert texts.having(part, whole) == [n for n in whole if part in plain[n]]
    assert texts.having("daily 5", range(500, 600)) == list(range(500, 600))
    assert texts.having("daily 77", range(3, 78)) == [77]
