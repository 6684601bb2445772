"""Output: the envelope of every answer, errors included."""

from __future__ import annotations

from types import TracebackType
from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from api.errors import desc_of, row_of

DataT = TypeVar("DataT")

_OWN_PACKAGES = frozenset({"api", "engine", "storage"})


class Output(msgspec.Struct, Generic[DataT], frozen=True, kw_only=True):
    """`scode` 0 is success. On an error `data` is null, and `stack` the path through our code."""

    scode: Annotated[int, Meta(description="0: success; else see the table of errors.")]
    desc: Annotated[str, Meta(description="Particulars: which object, what was expected.")]
    message: str
    message_cn: str
    stack: Annotated[list[str] | None, Meta(description="`module:function:line` of the service.")]
    data: DataT


def succeeded(data: DataT) -> Output[DataT]:
    """The envelope of an answer."""
    return Output(scode=0, desc="", message="success", message_cn="成功", stack=None, data=data)


def failed(error: BaseException, data: DataT) -> Output[DataT]:
    """The envelope of an error. `data` is None but where the contract says otherwise."""
    row = row_of(error)
    return Output(
        scode=row.scode,
        desc=desc_of(error),
        message=row.message,
        message_cn=row.message_cn,
        stack=stack_of(error.__traceback__),
        data=data,
    )


def stack_of(trace: TracebackType | None) -> list[str]:
    """`module:function:line` of our own frames, outermost first: no paths, no values."""
    steps: list[str] = []
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] in _OWN_PACKAGES:
            steps.append(f"{module}:{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return steps
