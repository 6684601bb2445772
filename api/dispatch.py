"""One request from its bytes to the envelope's bytes: parse, check, run, log, encode.

Synchronous, in a worker thread. Whatever happens comes back as an Answered; nothing is raised.
Every POST leaves one line in the operation log (a batch: one for each item), the refused ones too.
A line that cannot be written is an error of ours in the service's log, and doesn't change the
answer: what was asked for has been done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from api.calls import AnyCall, Batch
from api.decode import parse_body, parse_query, to_request
from api.envelope import Output, failed, succeeded
from api.errors import INTERNAL, ApiError, row_of
from api.schemas import Answer
from api.schemas_backup import BatchRequest
from engine.service import Engine

log = logging.getLogger(__name__)

Members: TypeAlias = Mapping[str, object]

# A POST's body, a GET's query, or why there is none.
Received: TypeAlias = bytes | Sequence[tuple[str, str]] | ApiError

_NO_HEADERS: Mapping[str, str] = {}
_MAX_LOGGED_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Answered:
    """A complete answer. `scode` is the envelope's."""

    body: bytes
    status: int
    scode: int
    headers: Mapping[str, str] = field(default_factory=dict)


def answer(engine: Engine, call: AnyCall | Batch, received: Received, who: str) -> Answered:
    """Does what was asked for. Never raises."""
    members: Members = {}
    try:
        members = _parse(received)
        if isinstance(call, Batch):
            batch = to_request(members, BatchRequest, from_text=False)
            return _encoded(_perform_batch(engine, call, batch, who), _NO_HEADERS)
    except ApiError as error:
        _log_operation(engine, call, members, who, error)
        return answer_error(error)
    return _encoded(*_perform(engine, call, members, who))


def answer_error(error: BaseException) -> Answered:
    """The envelope of an error that ends a request. A defect of ours goes to the service's log."""
    return _encoded(_failed(error), _NO_HEADERS)


def _parse(received: Received) -> Members:
    if isinstance(received, ApiError):
        raise received
    return parse_body(received) if isinstance(received, bytes) else parse_query(received)


def _perform(
    engine: Engine, call: AnyCall, members: Members, who: str
) -> tuple[Output[Answer | None], Mapping[str, str]]:
    """Checks, runs and logs one call: its envelope, and the headers of a success."""
    try:
        request = to_request(members, call.request, from_text=call.method == "GET")
        reply = call.run(engine, request)
    except Exception as error:  # noqa: BLE001 - every error becomes an envelope
        _log_operation(engine, call, members, who, error)
        return _failed(error), _NO_HEADERS
    _log_operation(engine, call, members, who, None)
    return succeeded(reply.data), reply.headers


def _perform_batch(
    engine: Engine, call: Batch, batch: BatchRequest, who: str
) -> Output[Answer | None]:
    results = [_perform(engine, call.each, item, who)[0] for item in batch.items]
    done = sum(result.scode == 0 for result in results)
    return succeeded(call.answer(success=done, fail=len(results) - done, results=results))


def _failed(error: BaseException) -> Output[Answer | None]:
    if row_of(error) is INTERNAL:
        log.error("internal_error", exc_info=error)
    return failed(error, None)


def _encoded(output: Output[Answer | None], headers: Mapping[str, str]) -> Answered:
    status = output.scode // 100 or 200
    return Answered(msgspec.json.encode(output), status, output.scode, headers)


def _log_operation(
    engine: Engine,
    call: AnyCall | Batch,
    members: Members,
    who: str,
    error: Exception | None,
) -> None:
    """One line of the operation log for a POST, and of the service's log for every call."""
    scode = row_of(error).scode if error else 0
    desc = _kept(str(error)) if error else ""
    log.log(
        logging.DEBUG if call.method == "GET" else logging.INFO,
        "call",
        extra={"what": call.what, "who": who, "scode": scode, "desc": desc},
    )
    if call.method == "GET":
        return
    target = _text_of(members, call.target)
    name = _text_of(members, call.named)
    vm_type = _text_of(members, "vm_type")
    try:
        engine.log_operation(who, call.what, target, name, vm_type, scode, desc)
    except Exception:  # whatever it is, the call has been done
        log.exception("operation_not_logged", extra={"what": call.what, "target": target})


def _text_of(members: Members, name: str) -> str:
    """A member as it came, checked or not, made fit to be kept."""
    value = members.get(name)
    if not isinstance(value, str):
        return ""
    return _kept(value)


def _kept(text: str) -> str:
    """As much of it as is kept; a path in it need not be Unicode."""
    return text[:_MAX_LOGGED_CHARS].encode(errors="replace").decode()
