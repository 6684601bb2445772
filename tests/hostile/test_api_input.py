"""Every call of the API, fed with mutated bodies and queries: an envelope comes back, never a 500.

Through the same function that the server runs for each request (api.dispatch.answer), so that some
thousands of requests fit. tests/integration/test_schemathesis.py goes through HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from api.calls import AnyCall, Batch
from api.dispatch import Received, answer
from api.routes import CALLS
from engine.config import Config, Limits
from tests.engine_rig import ANYWHERE, EngineRig, disk_bytes
from tests.hostile.mutating import ROUNDS, mutants

AnyOne = AnyCall | Batch
# Makes a stray point wherever a mutated path leads; test_schemathesis tries it in a cage.
CAGED = "/v1/backup_point/create"
POSTS = [call for call in CALLS if call.method == "POST" and call.path != CAGED]
POSTS.sort(key=lambda call: call.path == "/v1/backup_point/delete")  # the others need one
GETS = [call for call in CALLS if call.method == "GET" and "events" not in call.path]
ODD = [
    "",
    "\0",
    "\ud800",
    "-1",
    "9" * 400,
    "1e999",
    "../..",
    "ﬀ",
    "%00",
    "null",
    "true",
    "x" * 9_000,
]
DEEP = b'{"items":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
BOMBS = [b"", b"{", b"[]", b"null", DEEP, b'{"a":1e400}', b'{"a":' + b"9" * 5000 + b"}", b"\xff{}"]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineRig]:
    data: Path = tmp_path_factory.mktemp("hostile") / "data"
    with EngineRig(data, Config(limits=Limits(max_jobs=1))) as rig:
        rig.back_up(rig.make_vm("web", disk_bytes(1 << 16, 1)))
        yield rig


def members(rig: EngineRig, chance: random.Random) -> dict[str, object]:
    """Members that calls read: some right, some odd."""
    points = [state.point.uuid for state in rig.engine.points()]
    point = points[0] if points else "detached by a mutant"
    right: dict[str, object] = {
        "cluster_uuid": rig.cluster_uuid,
        "backup_uuid": rig.listed()[0] if rig.listed() else "none",
        "compute_uuid": next((vm.uuid for vm in rig.engine.vms(ANYWHERE)), "none"),
        "backup_point_uuid": point,
        "pool_uuid": rig.pool_uuid,
        "backup_name": "b",
        "new_vm_name": "copy",
        "compute_name": "vm",
        "job_uuid": "x",
        "name": "n",
        "full_backup": True,
        "page_number": 1,
        "page_size": 10,
        "disks": [{"target_device": "sda", "pool_uuid": rig.pool_uuid, "volume_name": "v"}],
        "restore_disks": [
            {"target_device": "sda", "pool_uuid": rig.pool_uuid, "volume_name": "r", "usd_type": ""}
        ],
        "backup": [{"UUID": "x", "BpUUID": point}],
        "items": [{"backup_uuid": "x"}],
    }
    odd: list[object] = [*ODD, 1 << 64, -1, 0.5, None, [], {}, [[]], {"a": {}}]
    for name in chance.sample(list(right), chance.randint(0, 6)):
        right[name] = chance.choice(odd)
    return right


def assert_answered(rig: EngineRig, call: AnyOne, received: Received) -> int:
    """The answer is an envelope and no defect of ours; its scode."""
    found = answer(rig.engine, call, received, "hostile")
    output = msgspec.json.decode(found.body)
    assert output["scode"] == found.scode
    assert found.scode // 100 not in (500,), (call.path, received, output)
    return found.scode


def sound(text: str) -> str:
    return text.encode(errors="replace").decode()


@pytest.mark.parametrize("call", POSTS, ids=lambda call: call.what)
def test_bodies(rig: EngineRig, call: AnyOne) -> None:
    chance = random.Random(call.path)
    refused = 0
    for body in BOMBS:
        assert assert_answered(rig, call, body)
    for number in range(max(ROUNDS // 10, 10)):
        made = members(rig, chance)
        clean = {name: sound(one) if isinstance(one, str) else one for name, one in made.items()}
        body = msgspec.json.encode(clean)
        for mutant in mutants(body, number, 3):
            refused += assert_answered(rig, call, mutant) != 0
        assert_answered(rig, call, body)
    assert refused


@pytest.mark.parametrize("call", GETS, ids=lambda call: call.what)
def test_queries(rig: EngineRig, call: AnyOne) -> None:
    chance = random.Random(call.path)
    for _ in range(ROUNDS):
        made = members(rig, chance)
        pairs = [(name, str(one)) for name, one in made.items() if not isinstance(one, list)]
        if chance.random() < 0.2:
            pairs.append(chance.choice(pairs))
        if chance.random() < 0.3:
            pairs.append((chance.choice(ODD), chance.choice(ODD)))
        assert_answered(rig, call, pairs)
