"""engine.restore.stage: what is put on a stage comes to its place on the disk, in few writes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.restore import stage as stage_module
from engine.restore.stage import Stage

CHUNK = 64 << 10
SLOTS = 4


class Disk:
    """A VolumeWriter that remembers; memory stands for the file."""

    def __init__(self, size_bytes: int) -> None:
        self.content = bytearray(size_bytes)
        self.writes: list[tuple[int, int]] = []

    def write(self, content: memoryview, offset: int) -> None:
        self.writes.append((offset, len(content)))
        self.content[offset : offset + len(content)] = content

    def resize(self, size_bytes: int) -> None:
        raise NotImplementedError

    def set_aside(self, offset: int, size_bytes: int) -> None:
        raise NotImplementedError

    def allocated_bytes(self) -> int:
        raise NotImplementedError

    def make_durable(self) -> None:
        raise NotImplementedError

    def name(self) -> None:
        raise NotImplementedError

    def unname(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Disk:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def small_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_module, "STAGE_BYTES", SLOTS * CHUNK)


def content_of(number: int, size_bytes: int = CHUNK) -> bytes:
    """Of a number; no two places of it are alike, so that what is shifted shows."""
    return random.Random(number).randbytes(size_bytes)


def test_neighbours_are_written_at_once() -> None:
    disk = Disk(10 * CHUNK)
    stage = Stage(disk, CHUNK)
    for at in (0, 1, 2, 5, 6, 7, 8):
        stage.room(CHUNK)[:] = content_of(at)
        stage.put(stage.room(CHUNK), at * CHUNK)
    stage.flush()
    assert disk.writes == [(0, 3 * CHUNK), (5 * CHUNK, CHUNK), (6 * CHUNK, 3 * CHUNK)]
    for at in (0, 1, 2, 5, 6, 7, 8):
        assert disk.content[at * CHUNK : (at + 1) * CHUNK] == content_of(at)


@pytest.mark.parametrize("made_elsewhere", [False, True])
def test_a_content_goes_to_many_places(made_elsewhere: bool) -> None:
    disk = Disk(12 * CHUNK)
    stage = Stage(disk, CHUNK)
    for at in range(4):
        content = memoryview(bytearray(CHUNK)) if made_elsewhere else stage.room(CHUNK)
        content[:] = content_of(at)
        for copy in range(3):
            stage.put(content, (at + 4 * copy) * CHUNK)
    stage.flush()
    assert disk.content == b"".join(content_of(at) for _ in range(3) for at in range(4))


def test_copies_behind_the_disk_s_short_end_are_whole() -> None:
    """They lie on the stage beside one another, and must not lie across what they are made of."""
    disk = Disk(20 * CHUNK)
    stage = Stage(disk, CHUNK)
    short = stage.room(2 * 4096)
    short[:] = content_of(19, 2 * 4096)
    stage.put(short, 19 * CHUNK)
    for at in (0, 1, 2):
        content = stage.room(CHUNK)
        content[:] = content_of(at)
        stage.put(content, at * CHUNK)
    for at in range(3, 12):
        stage.put(content, at * CHUNK)
    stage.flush()
    assert disk.content[19 * CHUNK :][: 2 * 4096] == content_of(19, 2 * 4096)
    for at in range(12):
        assert disk.content[at * CHUNK : (at + 1) * CHUNK] == content_of(min(at, 2))


def test_a_room_that_is_not_used_costs_nothing() -> None:
    disk = Disk(2 * CHUNK)
    stage = Stage(disk, CHUNK)
    for at in range(2):
        stage.room(CHUNK)[:] = b"x" * CHUNK  # was damaged, say
        stage.room(CHUNK)[:] = content_of(at)
        stage.put(stage.room(CHUNK), at * CHUNK)
    stage.flush()
    assert disk.writes == [(0, 2 * CHUNK)]
    assert disk.content == content_of(0) + content_of(1)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), slots=st.integers(1, 3))
def test_any_order_gives_the_disk(data: st.DataObject, slots: int) -> None:
    last_bytes = data.draw(st.sampled_from([CHUNK, 1, 4095, 4096, 5000]))
    count = data.draw(st.integers(1, 12))
    kinds = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    size_bytes = (count - 1) * CHUNK + last_bytes
    disk, want = Disk(size_bytes), bytearray(size_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "STAGE_BYTES", slots * CHUNK)
        stage = Stage(disk, CHUNK)
    for at in order:
        size = last_bytes if at == count - 1 else CHUNK
        content = stage.room(size) if kinds[at] else memoryview(bytearray(size))
        content[:] = content_of(at, size)
        for place in (at, *(other for other in order if kinds[at] == 2 and other < count - 1)):
            if place == at or size == CHUNK:
                stage.put(content, place * CHUNK)
                want[place * CHUNK : place * CHUNK + size] = content_of(at, size)
    stage.flush()
    assert disk.content == want
    assert all(offset % 4096 == 0 for offset, _ in disk.writes)
