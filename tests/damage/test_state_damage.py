"""The host's own state: what is damaged in it is named at the start, and never believed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import lmdb
import pytest

from engine.model import Tenant
from engine.state import State
from storage.errors import Damaged, StorageError
from tests.damage import site as sites
from tests.damage.site import cant_read, damaged

PLACES = 300
ROWS = [Tenant(uuid=f"{number:08d}", name=f"tenant {number}" * 20) for number in range(200)]


@pytest.fixture
def path(memory: Path) -> Path:
    where = memory / "state"
    shutil.rmtree(where, ignore_errors=True)
    state = State(str(where))
    state.tenants.put_all(ROWS)
    state.close()
    return where


def test_it_opens_as_it_was_closed(path: Path) -> None:
    for _ in range(2):
        state = State(str(path))
        assert state.tenants.values() == ROWS
        state.close()


def test_a_closed_state_that_is_damaged_does_not_open(path: Path) -> None:
    chance = random.Random(5)
    file = path / "data.mdb"
    content = file.read_bytes()
    tried = 0
    while tried < PLACES:
        changed = chance.choice(sites.WAYS)(chance, content, content)
        if changed == content:
            continue
        tried += 1
        with damaged(file, changed), pytest.raises(Damaged, match=r"data\.mdb is not what it was"):
            State(str(path))
    State(str(path)).close()


def test_a_damaged_seal_is_told_too(path: Path) -> None:
    seal = path / "data.mdb.seal"
    with damaged(seal, seal.read_bytes()[:-1] + b"?"), pytest.raises(Damaged):
        State(str(path))


def test_a_state_that_was_not_closed_has_no_seal(path: Path) -> None:
    state = State(str(path))
    assert not (path / "data.mdb.seal").exists()
    state.close()
    assert (path / "data.mdb.seal").exists()


def test_pages_that_are_damaged_after_a_kill_are_told_or_harmless(path: Path) -> None:
    """LMDB would go by what they say, and the process might end. `older`: a write was lost."""
    (path / "data.mdb.seal").unlink()
    file = path / "data.mdb"
    older = file.read_bytes()
    state = State(str(path))
    state.tenants.put_all(ROWS[:20])
    state.tenants.delete("00000100")
    state.close()
    (path / "data.mdb.seal").unlink()
    chance = random.Random(6)
    whole, told = file.read_bytes(), 0
    for _ in range(PLACES):
        changed = chance.choice(sites.WAYS[:-1])(chance, whole, older)
        with damaged(file, changed):
            try:
                state = State(str(path))
                rows = state.tenants.values()
                state.close()
                assert rows == ROWS[:100] + ROWS[101:] or changed == older
            except StorageError as error:
                told += "state" in str(error)
            (path / "data.mdb.seal").unlink(missing_ok=True)
    assert told > PLACES // 3


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
def test_a_state_that_cant_be_read_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    if killed:
        (path / "data.mdb.seal").unlink()
    cant_read(monkeypatch, path / "data.mdb")
    with pytest.raises(Damaged, match=r"data\.mdb"):
        State(str(path))


@pytest.mark.parametrize("changed", ["value", "key", "other"])
def test_a_wrong_row_is_not_believed(path: Path, changed: str) -> None:
    """Without a seal, as after a kill: each row is checked by itself."""
    (path / "data.mdb.seal").unlink()
    env = lmdb.open(str(path), max_dbs=64)
    with env.begin(write=True) as txn:
        db = env.open_db(b"tenants", txn)
        body = bytearray(txn.get(b"00000007", db=db) or b"")
        if changed == "value":
            body[20] ^= 1
            txn.put(b"00000007", bytes(body), db=db)
        elif changed == "key":
            txn.delete(b"00000007", db=db)
            txn.put(b"00000\xff07", bytes(body), db=db)
        else:
            txn.put(b"00000008", bytes(body), db=db)
    env.close()
    state = State(str(path))
    with pytest.raises(StorageError, match="state"):
        state.tenants.values()
    state.close()
