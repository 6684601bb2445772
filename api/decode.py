"""From bytes and query pairs to request Structs, or an ApiError that names the member.

JSON is decoded strictly (UTF-8, no lone surrogates, no duplicate members, no NaN); a query's texts
are read as what the Struct's member is ("12", "true", "1"). Pure. A body is at most MAX_BODY_BYTES.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import msgspec

from api.errors import ApiError
from api.schemas import OTHER_SPELLINGS, Request

RequestT = TypeVar("RequestT", bound=Request)

MAX_BODY_BYTES = 1 << 20

_PLACE = re.compile(r" - at `(?:key in )?\$\.?(.*?)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(.*?)`")


def parse_body(body: bytes) -> dict[str, object]:
    """The members of a JSON object. ApiError `malformed`, or `invalid_member` for a duplicate."""
    try:
        members = msgspec.json.decode(body)
        json.loads(body, object_pairs_hook=_refuse_duplicates)
    except ApiError:
        raise
    except RecursionError:
        raise ApiError("malformed", "JSON is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise ApiError("malformed", f"body is not JSON: {error}") from None
    if not isinstance(members, dict):
        raise ApiError("malformed", "body is not a JSON object")
    return members


def parse_query(pairs: Iterable[tuple[str, str]]) -> dict[str, object]:
    """The parameters of a query, without the empty ones: "" is as good as absent."""
    members: dict[str, object] = {}
    seen: set[str] = set()
    for name, text in pairs:
        if name in seen:
            raise ApiError("invalid_member", f"{_shown(name)}: given twice")
        seen.add(name)
        if not (_is_unicode(name) and _is_unicode(text)):
            raise ApiError("invalid_member", f"{_shown(name)}: not UTF-8")
        if text:
            members[name] = text
    return members


def to_request(
    members: Mapping[str, object], request_type: type[RequestT], *, from_text: bool
) -> RequestT:
    """Checks members against the Struct. `from_text`: values are texts of a query.

    Raises ApiError `invalid_member`, which names the member and what was expected of it.
    """
    respelled = _respelled(members, request_type)
    try:
        return msgspec.convert(respelled, request_type, strict=not from_text)
    except msgspec.ValidationError as error:
        where, reason = _explain(str(error))
        if where in OTHER_SPELLINGS and where not in members and where in respelled:
            where = OTHER_SPELLINGS[where]
        raise ApiError("invalid_member", f"{where}: {reason}") from None


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ApiError("invalid_member", f"{_shown(name)}: given twice")
        seen.add(name)


def _respelled(members: Mapping[str, object], request_type: type[Request]) -> Mapping[str, object]:
    """Members under the names that the Struct uses, whichever of two spellings came."""
    respelled = dict(members)
    fields = request_type.__struct_fields__
    for name, other in OTHER_SPELLINGS.items():
        if name not in fields or other not in members:
            continue
        if members.get(name, "") in ("", members[other]):
            respelled[name] = members[other]
        elif members[other] != "":
            raise ApiError("invalid_member", f"{name}: {other} is given too, and differs")
    return respelled


def _explain(text: str) -> tuple[str, str]:
    """Where, and what was expected, from msgspec's message."""
    place = _PLACE.search(text)
    where = place.group(1) if place else ""
    missing = _MISSING.match(text)
    if missing:
        return ".".join(filter(None, [where, missing.group(1)])), "missing or empty"
    reason = text[: place.start()] if place else text
    if reason.endswith("of length >= 1"):
        reason = "missing or empty"
    return where or "body", reason


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(name: str) -> str:
    """A member's name as it may be echoed: short, and valid Unicode."""
    return name[:64].encode(errors="replace").decode()
