"""The OpenAPI document and its page: complete, consistent, escaped."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from api import VERSION, docs
from api.errors import ERRORS
from api.openapi import document
from api.routes import CALLS
from api.routes.system import HANDLERS

DOCUMENT = document(CALLS)


def _walk(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from _walk(child)
    elif isinstance(node, list):
        for child in node:
            yield from _walk(child)


def _resolve(ref: str) -> Any:
    node: Any = DOCUMENT
    for step in ref.removeprefix("#/").split("/"):
        node = node[step]
    return node


def test_the_version_is_the_projects() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == VERSION


def test_every_route_is_described() -> None:
    assert set(DOCUMENT["paths"]) == {call.path for call in CALLS} | set(HANDLERS)


def test_every_call_of_the_contract_is_there() -> None:
    contract = [
        "compute/backup/list",
        "compute/backup/inspect",
        "compute/backup/create",
        "compute/backup/delete",
        "compute/backup/restore",
        "compute/backup/remote/list",
        "compute/backup/remote/import",
        "compute/backup/batch/create",
        "compute/backup/batch/delete",
        "cluster/list",
        "tenant/list",
        "namespace/list",
        "zone/list",
        "object_group/list",
        "pool/list",
        "compute/list",
        "compute/inspect",
        "compute/create",
        "compute/delete",
        "backup_point/list",
        "backup_point/inspect",
        "backup_point/create",
        "backup_point/delete",
        "backup_point/verify",
        "backup_point/gc",
        "backup_point/rebuild",
        "job/list",
        "job/inspect",
        "job/cancel",
        "job/events",
        "operation/list",
    ]
    assert {f"/v1/{call}" for call in contract} <= set(DOCUMENT["paths"])


def test_every_reference_resolves() -> None:
    refs = [node["$ref"] for node in _walk(DOCUMENT) if isinstance(node.get("$ref"), str)]
    assert len(refs) > 100
    for ref in refs:
        assert _resolve(ref)


def test_component_names_are_plain() -> None:
    for name in DOCUMENT["components"]["schemas"]:
        assert re.fullmatch(r"[A-Za-z_]+", name), name


def test_every_call_answers_with_the_envelope() -> None:
    for call in CALLS:
        responses = DOCUMENT["paths"][call.path][call.method.lower()]["responses"]
        schema = responses["200"]["content"]["application/json"]["schema"]
        assert _resolve(schema["$ref"])["required"] == [
            "scode",
            "desc",
            "message",
            "message_cn",
            "stack",
            "data",
        ]


def test_every_error_is_listed_under_its_status() -> None:
    for row in ERRORS:
        response = DOCUMENT["components"]["responses"][f"Error{row.status}"]
        schema = response["content"]["application/json"]["schema"]
        assert row.scode in schema["allOf"][1]["properties"]["scode"]["enum"]


def test_both_spellings_are_shown() -> None:
    names = [
        one["name"] for one in DOCUMENT["paths"]["/v1/compute/backup/list"]["get"]["parameters"]
    ]
    assert {"page_number", "page_num", "filter_vm_uuid", "vm_type"} <= set(names)
    create = DOCUMENT["components"]["schemas"]["BackupCreate"]
    assert {"backup_point_uuid", "backuppoint_uuid"} <= set(create["properties"])
    assert set(create["required"]) == {"backup_point_uuid", "compute_uuid", "backup_name"}


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_everything_and_loads_nothing() -> None:
    page = _Page()
    page.feed(docs.page(DOCUMENT))
    for call in CALLS:
        assert f"{call.method} {call.path}" in page.text
    for row in ERRORS:
        assert row.message_cn in page.text
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "form"}
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "/openapi.json"))


def test_the_pages_links_have_targets() -> None:
    page = _Page()
    page.feed(docs.page(DOCUMENT))
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    links = {str(attributes.get("href")) for tag, attributes in page.tags if tag == "a"}
    assert {link[1:] for link in links if link.startswith("#")} <= ids


@pytest.mark.parametrize("text", ["<script>", "`<b>`", '"><x'])
def test_the_page_escapes(text: str) -> None:
    summary = {"get": {"summary": text, "responses": {}}}
    shown = docs.page(DOCUMENT | {"paths": {f"/{text}": summary}})
    assert text not in shown
    assert "<script" not in shown
