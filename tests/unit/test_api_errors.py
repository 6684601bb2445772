"""The error table: complete, stable, and what an error looks like from outside."""

from __future__ import annotations

import re
from typing import get_args

import pytest

import engine.errors
import storage.errors
from api.envelope import failed, succeeded
from api.errors import BY_NAME, ERRORS, INTERNAL, ApiError, desc_of, row_of
from api.schemas import Empty
from engine.errors import Conflict, ConflictCode, EngineError, Invalid, NotFound, PoolFull, Thing
from storage.errors import PointFull, StorageError

# What clients were told once holds for ever: a change here breaks them.
PUBLISHED = {
    40000: "malformed",
    40001: "invalid_member",
    40002: "disk_not_in_backup",
    40003: "usd_type_not_offered",
    40300: "foreign_origin",
    40301: "foreign_host",
    40400: "route_not_found",
    40401: "cluster_not_found",
    40402: "tenant_not_found",
    40403: "namespace_not_found",
    40404: "zone_not_found",
    40405: "object_group_not_found",
    40406: "pool_not_found",
    40407: "vm_not_found",
    40408: "backup_not_found",
    40409: "backup_point_not_found",
    40410: "job_not_found",
    40411: "backup_not_on_point",
    40500: "method_not_allowed",
    41300: "body_too_large",
    40900: "vm_busy",
    40901: "vm_no_disks",
    40902: "backup_running",
    40903: "backup_failed",
    40904: "name_taken",
    40905: "volume_in_use",
    40906: "point_in_use",
    40907: "job_finished",
    40908: "volume_changed",
    40909: "cancelled",
    40910: "interrupted",
    40911: "point_read_only",
    40912: "point_not_empty",
    40913: "point_newer_format",
    40914: "point_unsafe_mount",
    40915: "refused",
    40916: "session_ended",
    40917: "backup_already_on_point",
    40918: "already_running",
    40919: "managed_by_libvirt",
    40920: "domain_busy",
    40921: "domain_stopped",
    40922: "format_not_readable",
    50000: "internal",
    50001: "engine_failed",
    50002: "storage_failed",
    50003: "data_damaged",
    50004: "chunk_missing",
    50005: "config_invalid",
    50006: "disk_server_refused",
    50007: "disk_server_broken",
    50008: "hypervisor_refused",
    50300: "point_unreachable",
    50301: "point_not_ready",
    50302: "pool_unreachable",
    50303: "shutting_down",
    50304: "overloaded",
    50305: "disk_server_lost",
    50306: "hypervisor_unreachable",
    50307: "state_unreachable",
    50700: "point_full",
    50701: "pool_full",
    50702: "scratch_full",
}


def _leaves(root: type[Exception]) -> set[type[Exception]]:
    found = {root}
    for child in root.__subclasses__():
        found |= _leaves(child)
    return found


def _codes() -> set[str]:
    """Every code that the layers below can raise."""
    codes = {f"{thing}_not_found" for thing in get_args(Thing)} | set(get_args(ConflictCode))
    modules = (engine.errors.__name__, storage.errors.__name__)
    for leaf in _leaves(EngineError) | _leaves(StorageError):
        if leaf.__module__ in modules and leaf not in (NotFound, Conflict):
            codes.add(str(vars(leaf).get("code") or getattr(leaf, "code", "")))
    return codes - {""}


def test_published_scodes_never_change() -> None:
    assert {row.scode: row.name for row in ERRORS} == PUBLISHED


def test_names_and_scodes_are_unique() -> None:
    assert len({row.name for row in ERRORS}) == len({row.scode for row in ERRORS}) == len(ERRORS)


def test_every_code_of_the_layers_below_has_a_row() -> None:
    assert _codes() - BY_NAME.keys() == set()


def test_every_row_has_both_texts_and_a_status_of_its_class() -> None:
    for row in ERRORS:
        assert row.message.isascii()
        assert re.search(r"[\u4e00-\u9fff]", row.message_cn), row
        assert row.status in {400, 403, 404, 405, 409, 413, 500, 503, 507}, row


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (Invalid("volume_name", "no"), "invalid_member"),
        (NotFound("vm", "x"), "vm_not_found"),
        (Conflict("vm_busy", "x"), "vm_busy"),
        (PointFull("x"), "point_full"),
        (ApiError("malformed", "x"), "malformed"),
        (KeyError("secret"), "internal"),
    ],
)
def test_row_of(error: Exception, name: str) -> None:
    assert row_of(error).name == name


def test_a_defect_tells_its_type_only() -> None:
    assert desc_of(KeyError("/etc/secret")) == "KeyError"


@pytest.mark.parametrize("kind", [PointFull, PoolFull])
def test_a_path_that_is_no_unicode_can_be_told(kind: type[Exception]) -> None:
    assert desc_of(kind("/srv/\udcff")) == r"/srv/\udcff"


def test_success_is_the_documents_envelope() -> None:
    output = succeeded(Empty())
    assert (output.scode, output.desc, output.message) == (0, "", "success")
    assert (output.message_cn, output.stack, output.data) == ("成功", None, Empty())


def test_stack_names_our_own_frames_only() -> None:
    import json

    from api.decode import parse_body

    def fails(_pairs: object) -> None:
        parse_body(b"{")

    with pytest.raises(ApiError) as caught:
        json.loads("{}", object_pairs_hook=fails)
    stack = failed(caught.value, None).stack
    assert stack is not None
    assert [step.rpartition(":")[0] for step in stack] == ["api.decode:parse_body"]


def test_internal_is_a_500() -> None:
    assert INTERNAL.status == 500
