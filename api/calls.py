"""A call of the API as data: route, request, answer, and the function that does it.

routes/*.py list Calls; app.py makes routes of them, openapi.py the document, dispatch.py does
them. `run` is plain synchronous code over the Engine, in a worker thread: it takes the checked
request and returns a Reply, or raises an EngineError or StorageError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar

from api.schemas import Answer, Request, ScopeMembers
from api.schemas_backup import BatchRequest
from engine.service import Engine
from engine.verb_types import Scope

RequestT = TypeVar("RequestT", bound=Request)
AnswerT = TypeVar("AnswerT", bound=Answer)

Method: TypeAlias = Literal["GET", "POST"]
Pace: TypeAlias = Literal["quick", "slow"]


@dataclass(frozen=True, slots=True)
class Reply(Generic[AnswerT]):
    """What goes into `data`, and headers beside it."""

    data: AnswerT
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[RequestT, AnswerT]):
    """One route. GET reads its request from the query, POST from the body.

    pace: "slow" calls touch the files of a point or a pool, and have threads of their own.
    target, named: the members of the body that the operation log is told.
    headers: what a success carries beside its body: name → meaning.
    """

    method: Method
    path: str
    summary: str
    tag: str
    request: type[RequestT]
    answer: type[AnswerT]
    run: Callable[[Engine, RequestT], Reply[AnswerT]]
    pace: Pace = "quick"
    target: str = ""
    named: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The call in the operation log: its path without the version."""
        return self.path.removeprefix("/v1/")


# Calls of all types side by side: each one's own types were checked where it was made.
AnyCall: TypeAlias = Call[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A POST whose `items` are bodies of `each`; every item is done and logged by itself."""

    path: str
    summary: str
    tag: str
    each: AnyCall
    answer: Callable[..., Answer]  # BatchOutput's shape: success, fail, results
    method: Method = "POST"
    request: type[BatchRequest] = BatchRequest
    target: str = ""
    named: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def pace(self) -> Pace:
        return self.each.pace

    @property
    def what(self) -> str:
        return self.path.removeprefix("/v1/")


def scope_of(request: ScopeMembers) -> Scope:
    """The engine's Scope out of a request's scope members."""
    return Scope(
        cluster_uuid=request.cluster_uuid,
        tenant=request.tenant,
        namespace_uuid=request.namespace_uuid,
        multiple=request.multiple,
        vm_type=request.vm_type,
    )
