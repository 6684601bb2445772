"""The OpenAPI 3.1 document, made from the Calls and the msgspec Structs that they are checked by.

Pure: the same code makes the same document. What is no Call (events, health, metrics) is described
at the end, by hand.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import msgspec

from api import VERSION
from api.calls import AnyCall, Batch
from api.decode import MAX_BODY_BYTES
from api.envelope import Output
from api.errors import ERRORS, ErrorRow
from api.schemas import OTHER_SPELLINGS
from api.schemas_companion import Health, JobRow

Object: TypeAlias = dict[str, Any]  # a piece of the JSON document

_MODULE = re.compile(r"\bapi\.schemas\w*\.|(?<=_)api\.schemas\w*?\.")
_PREFIX = "#/components/schemas/"
_GET_STATUSES = (400, 403, 404, 409, 500, 503, 507)
_POST_STATUSES = (400, 403, 404, 409, 413, 500, 503, 507)
_STATUS_MEANINGS = {
    400: "The request is not what it has to be.",
    403: "Not from where this request came.",
    404: "Something that is named is not there.",
    405: "The wrong method for this path.",
    409: "Busy, or not valid in the present state.",
    413: f"The body is over {MAX_BODY_BYTES} bytes.",
    500: "A defect of ours, or damaged data.",
    503: "Unreachable, or not ready. May work later.",
    507: "No room left.",
}


class Failure(Output[None], frozen=True, kw_only=True):
    """The envelope of an error."""


def document(calls: Sequence[AnyCall | Batch]) -> Object:
    """The whole document."""
    types: list[Any] = [Failure, Output[Health], JobRow]
    types += [call.request for call in calls] + [_output_type(call) for call in calls]
    refs, schemas = _readably_named(
        msgspec.json.schema_components(types, ref_template=_PREFIX + "{name}")
    )
    ref_of = dict(zip(map(str, types), refs, strict=True))
    _name_errors(schemas)
    for name in {call.request.__name__ for call in calls}:
        _spell_twice(schemas[name])
    paths: Object = {}
    for call in calls:
        operation = _operation(call, schemas[call.request.__name__], ref_of)
        paths[call.path] = {call.method.lower(): operation}
    for query in {call.request.__name__ for call in calls if call.method == "GET"}:
        if all(call.method == "GET" for call in calls if call.request.__name__ == query):
            del schemas[query]  # it stands in the parameters
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vmkeep",
            "version": VERSION,
            "description": "VM backups. Every answer is an envelope: `scode` 0 is success, "
            "any other is one of those listed at `Failure.scode`.",
        },
        "paths": paths | _other_paths(ref_of[str(Output[Health])], ref_of[str(JobRow)]),
        "components": {
            "schemas": schemas,
            "responses": {_response_name(s): _error_response(s) for s in _STATUS_MEANINGS},
        },
    }


def _readably_named(generated: tuple[Any, Object]) -> tuple[list[Object], Object]:
    """With `Output_RowList_JobRow` for `Output_api.schemas.RowList_api….JobRow__`, everywhere."""
    text = msgspec.json.encode(generated).decode()
    for name in generated[1]:
        short = _MODULE.sub("", name).replace("___None_", "_or_null").rstrip("_")
        text = text.replace(f'"{_PREFIX}{name}"', f'"{_PREFIX}{short}"')
        text = text.replace(f'"{name}":', f'"{short}":')
    renamed: tuple[list[Object], Object] = msgspec.json.decode(text, type=tuple[list[Any], Any])
    return renamed


def _output_type(call: AnyCall | Batch) -> Any:
    return Output[call.answer]  # type: ignore[name-defined]


def _name_errors(schemas: Object) -> None:
    """msgspec knows that `scode` is a number; the table knows which."""
    schemas["Failure"]["properties"]["scode"] = {
        "type": "integer",
        "oneOf": [_error_choice(row) for row in ERRORS],
    }


def _error_choice(row: ErrorRow) -> Object:
    return {
        "const": row.scode,
        "title": row.name,
        "description": f"{row.message} · {row.message_cn} · HTTP {row.status}",
    }


def _spell_twice(definition: Object) -> None:
    """Shows the second spelling of a member beside the first."""
    properties: Object = definition["properties"]
    for name, other in OTHER_SPELLINGS.items():
        if name in properties:
            schema = copy.deepcopy(properties[name])
            properties[other] = schema | {"description": f"The same as `{name}`."}


def _operation(call: AnyCall | Batch, definition: Object, ref_of: Object) -> Object:
    statuses = _GET_STATUSES if call.method == "GET" else _POST_STATUSES
    success: Object = {
        "description": "Done, or begun.",
        "content": {"application/json": {"schema": ref_of[str(_output_type(call))]}},
    }
    if call.headers:
        success["headers"] = {
            name: {"description": meaning, "schema": {"type": "string"}}
            for name, meaning in call.headers.items()
        }
    operation: Object = {
        "operationId": call.what.replace("/", "_"),
        "summary": call.summary,
        "tags": [call.tag],
        "responses": {"200": success} | {str(status): _error_ref(status) for status in statuses},
    }
    if call.method == "GET":
        operation["parameters"] = _parameters(definition)
    else:
        content = {"application/json": {"schema": ref_of[str(call.request)]}}
        operation["requestBody"] = {"required": True, "content": content}
    if isinstance(call, Batch):
        operation["description"] = f"Each item is a `{call.each.request.__name__}`."
    return operation


def _parameters(definition: Object) -> list[Object]:
    required = definition.get("required", [])
    return [
        _parameter(name, schema, name in required)
        for name, schema in definition["properties"].items()
    ]


def _parameter(name: str, schema: Object, required: bool) -> Object:
    """An optional one may also be given empty, which is as good as absent."""
    schema = {key: value for key, value in schema.items() if key != "default"}
    description = schema.pop("description", "")
    if not required and schema["type"] != "string":
        schema = {"anyOf": [schema, {"type": "string", "maxLength": 0}]}
    parameter: Object = {"name": name, "in": "query", "required": required, "schema": schema}
    return parameter | ({"description": description} if description else {})


def _response_name(status: int) -> str:
    return f"Error{status}"


def _error_ref(status: int) -> Object:
    return {"$ref": f"#/components/responses/{_response_name(status)}"}


def _error_response(status: int) -> Object:
    codes = [row.scode for row in ERRORS if row.status == status]
    failure = {"$ref": _PREFIX + "Failure"}
    schema = {"allOf": [failure, {"properties": {"scode": {"enum": codes}}}]}
    return {
        "description": _STATUS_MEANINGS[status],
        "content": {"application/json": {"schema": schema}},
    }


def _other_paths(health: Object, job_row: Object) -> Object:
    return {
        "/v1/job/events": _get(
            "job",
            "Server-sent events, one for each change of a job: `event: job`, `data:` a JobRow. "
            "First the unfinished jobs as they are. A slow reader gets each job's latest state.",
            {"text/event-stream": {"schema": {"type": "string"}, "x-event-data": job_row}},
            (403, 503),
        ),
        "/healthz": _get(
            "service",
            "200 when calls are answered.",
            {"application/json": {"schema": health}},
            (403, 503),
        ),
        "/metrics": _get(
            "service",
            "Counters and gauges for Prometheus.",
            {"text/plain": {"schema": {"type": "string"}}},
            (403, 500, 503),
        ),
        "/openapi.json": _get(
            "service",
            "This document.",
            {"application/json": {"schema": {"type": "object"}}},
            (403,),
        ),
        "/docs": _get(
            "service",
            "This document as a page.",
            {"text/html": {"schema": {"type": "string"}}},
            (403,),
        ),
    }


def _get(tag: str, summary: str, content: Object, statuses: Iterable[int]) -> Object:
    responses = {"200": {"description": "As it says.", "content": content}}
    return {
        "get": {
            "summary": summary,
            "tags": [tag],
            "responses": responses | {str(status): _error_ref(status) for status in statuses},
        }
    }
