"""Decoding: what is accepted, and which member a refusal names."""

from __future__ import annotations

import pytest

from api.decode import parse_body, parse_query, to_request
from api.errors import ApiError
from api.schemas_backup import (
    BackupCreate,
    BackupListQuery,
    BackupRestore,
    RemoteImport,
    RemoteListQuery,
)

CREATE: dict[str, object] = {
    "backup_point_uuid": "p",
    "compute_uuid": "c",
    "backup_name": "n",
}
DISK: dict[str, object] = {
    "target_device": "sda",
    "pool_uuid": "p",
    "volume_name": "v",
    "usd_type": "HDD",
}
RESTORE: dict[str, object] = {
    "backup_uuid": "b",
    "new_vm_name": "n",
    "restore_disks": [DISK],
    "object_group": "g",
    "zone_uuid": "z",
}


def _query(*pairs: tuple[str, str]) -> BackupListQuery:
    return to_request(parse_query(pairs), BackupListQuery, from_text=True)


def _refusal(code: str, call: object) -> str:
    assert callable(call)
    with pytest.raises(ApiError) as caught:
        call()
    assert caught.value.code == code
    return str(caught.value)


def test_the_documents_list_example() -> None:
    query = _query(
        ("cluster_uuid", "c"),
        ("tenant", "t"),
        ("filter_vm_uuid", "v"),
        ("filter_backup_name", ""),
        ("filter_backup_description", ""),
        ("start_time", "0"),
        ("end_time", "0"),
        ("page_num", "3"),
        ("page_size", "10"),
    )
    assert query == BackupListQuery(
        cluster_uuid="c", tenant="t", filter_vm_uuid="v", page_number=3, page_size=10
    )


@pytest.mark.parametrize("text", ["true", "1", "True"])
def test_a_bool_in_a_query_is_text(text: str) -> None:
    assert _query(("multiple", text)).multiple is True


@pytest.mark.parametrize("name", ["page_number", "page_num"])
def test_both_spellings_of_the_page(name: str) -> None:
    assert _query((name, "7")).page_number == 7


@pytest.mark.parametrize("name", ["backup_point_uuid", "backuppoint_uuid"])
def test_both_spellings_of_the_point(name: str) -> None:
    members = parse_query([("cluster_uuid", "c"), (name, "p")])
    assert to_request(members, RemoteListQuery, from_text=True).backup_point_uuid == "p"


def test_an_empty_spelling_gives_way_to_the_other() -> None:
    members = CREATE | {"backup_point_uuid": "", "backuppoint_uuid": "q"}
    assert to_request(members, BackupCreate, from_text=False).backup_point_uuid == "q"


def test_two_spellings_that_differ_are_refused() -> None:
    members = CREATE | {"backuppoint_uuid": "q"}
    refusal = _refusal("invalid_member", lambda: to_request(members, BackupCreate, from_text=False))
    assert refusal.startswith("backup_point_uuid: ")


def test_unknown_members_are_ignored() -> None:
    members = RESTORE | {"compute_name": "", "compute_uuid": 5, "else": {"x": []}}
    assert to_request(members, BackupRestore, from_text=False).new_vm_name == "n"


def test_only_two_members_of_an_import_entry_are_read() -> None:
    entry = {"UUID": "u", "BpUUID": "p", "Ctime": "not a number", "DiskBackups": 3}
    members = {"cluster_uuid": "c", "backup": [entry]}
    assert to_request(members, RemoteImport, from_text=False).backup[0].uuid == "u"


@pytest.mark.parametrize(
    ("pairs", "member"),
    [
        ([("page_size", "x")], "page_size"),
        ([("page_size", "-1")], "page_size"),
        ([("page_size", "1001")], "page_size"),
        ([("page_num", "x")], "page_num"),
        ([("start_time", "1e99")], "start_time"),
        ([("end_time", "9" * 400)], "end_time"),
        ([("multiple", "yes")], "multiple"),
        ([("tenant", "a"), ("tenant", "a")], "tenant"),
        ([("tenant", "a\0")], "tenant"),
        ([("tenant", "\udc80")], "tenant"),
        ([("tenant", "x" * 65)], "tenant"),
        ([("filter_backup_name", "x" * 256)], "filter_backup_name"),
    ],
)
def test_a_bad_parameter_is_named(pairs: list[tuple[str, str]], member: str) -> None:
    assert _refusal("invalid_member", lambda: _query(*pairs)).startswith(f"{member}: ")


@pytest.mark.parametrize("member", sorted(CREATE))
@pytest.mark.parametrize("value", [None, 1, [], "", "\0", "x" * 256])
def test_a_bad_member_is_named(member: str, value: object) -> None:
    members = CREATE | {member: value}
    refusal = _refusal("invalid_member", lambda: to_request(members, BackupCreate, from_text=False))
    assert refusal.startswith(f"{member}: ")


@pytest.mark.parametrize("member", sorted(RESTORE))
def test_a_missing_member_is_named(member: str) -> None:
    members = {name: value for name, value in RESTORE.items() if name != member}
    refusal = _refusal(
        "invalid_member", lambda: to_request(members, BackupRestore, from_text=False)
    )
    assert refusal == f"{member}: missing or empty"


@pytest.mark.parametrize("member", sorted(DISK))
def test_a_member_inside_a_list_is_named(member: str) -> None:
    members = RESTORE | {"restore_disks": [DISK, DISK | {member: ""}]}
    refusal = _refusal(
        "invalid_member", lambda: to_request(members, BackupRestore, from_text=False)
    )
    assert refusal == f"restore_disks[1].{member}: missing or empty"


@pytest.mark.parametrize("flag", ["true", 1, 0, None])
def test_a_bool_in_a_body_is_a_bool(flag: object) -> None:
    members = CREATE | {"full_backup": flag}
    refusal = _refusal("invalid_member", lambda: to_request(members, BackupCreate, from_text=False))
    assert refusal.startswith("full_backup: ")


@pytest.mark.parametrize("name", [".", "..", ".x", "a/b", "/", "a\0", "x" * 201])
def test_a_volume_name_is_plain(name: str) -> None:
    members = RESTORE | {"restore_disks": [DISK | {"volume_name": name}]}
    refusal = _refusal(
        "invalid_member", lambda: to_request(members, BackupRestore, from_text=False)
    )
    assert refusal.startswith("restore_disks[0].volume_name: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"{}x",
        b"\xff",
        b'{"a": NaN}',
        b'{"a": 1e999}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xed\xa0\x80"}',
        b"[" * 500_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        "{}".encode("utf-16"),
    ],
    ids=range(15),
)
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    _refusal("malformed", lambda: parse_body(body))


@pytest.mark.parametrize("body", [b'{"a": 1, "a": 1}', b'{"b": [{"a": 1, "\\u0061": 2}]}'])
def test_a_duplicate_member_is_named(body: bytes) -> None:
    assert _refusal("invalid_member", lambda: parse_body(body)) == "a: given twice"


def test_the_name_of_a_duplicate_is_shown_shortly() -> None:
    name = b'"' + b"x" * 9999 + b'"'
    refusal = _refusal("invalid_member", lambda: parse_body(b"{%b: 1, %b: 2}" % (name, name)))
    assert len(refusal) < 100
