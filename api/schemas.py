"""What requests and answers are made of: text types with their limits, the scope, paging, lists.

The Structs of api/schemas*.py are the single source of validation (api.decode), of the OpenAPI
document and of /docs (api.openapi). Members are spelled as on the wire. A request Struct's member
with a default is optional, and "" means absent; one without must be there and must not be empty.
Unknown members are ignored. Wire only: the state's own rows are engine.model's.

The *contract* is the API document that this service was given to implement: seven calls, whose
members, spellings and order it fixes. All other calls are ours.

Read next: schemas_backup (the contract's calls), schemas_companion (all other calls).
"""

from __future__ import annotations

from typing import Annotated, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

RowT = TypeVar("RowT")

# Both spellings occur in the contract; each is accepted wherever the other is.
OTHER_SPELLINGS = {"page_number": "page_num", "backup_point_uuid": "backuppoint_uuid"}

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 20
MAX_ITEMS = 1000  # of a batch or an import
MAX_DISKS = 256  # docs/design.md §4.3
MAX_CAPACITY_BYTES = 1 << 60
MAX_UNIX_TIME = 1 << 53  # exact in every JSON reader

NO_NUL = r"^[^\x00]*$"

# 64 characters are at most 256 bytes of UTF-8: a key of the state (LMDB keys end at 511 bytes).
OptionalId: TypeAlias = Annotated[str, Meta(max_length=64, pattern=NO_NUL)]
Id: TypeAlias = Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
OptionalName: TypeAlias = Annotated[str, Meta(max_length=255, pattern=NO_NUL)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=255, pattern=NO_NUL)]
# Of a VM, a point: other names are derived from it.
ShortName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=200, pattern=NO_NUL)]
Label: TypeAlias = Annotated[str, Meta(max_length=64, pattern=NO_NUL)]
Description: TypeAlias = Annotated[str, Meta(max_length=4096, pattern=NO_NUL)]
AbsolutePath: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=4096, pattern=r"^/[^\x00]*$", description="Absolute.")
]
VolumeName: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$",
        description="A plain name: no separators, no leading dot, no control characters; "
        "at most 200 bytes of UTF-8.",
    ),
]
DeviceName: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=64, pattern=NO_NUL, description="Such as `sda`.")
]
UnixTime: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_UNIX_TIME, description="Unix seconds.")]
SizeBytes: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_CAPACITY_BYTES, description="Bytes.")]
PageNumber: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 31, description="From 1; 0 = 1.")]
PageSize: TypeAlias = Annotated[
    int, Meta(ge=0, le=MAX_PAGE_SIZE, description=f"0 = {DEFAULT_PAGE_SIZE}.")
]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what a caller sends, as a query or as a body."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Base of what goes into an envelope's `data`. Every member is always sent."""


class NoArguments(Request, frozen=True, kw_only=True):
    """Nothing is read from the request."""


class Empty(Answer, frozen=True, kw_only=True):
    """`{}`: all that there is to say is in the envelope."""


class RowList(Answer, Generic[RowT], frozen=True, kw_only=True):
    """All rows, or one page of `total_count`."""

    rows: list[RowT] = msgspec.field(name="list")
    total_count: int


class ScopeMembers(Request, frozen=True, kw_only=True):
    """CommonClusterTenantScope: where the request applies. Names and mode are not read."""

    cluster_uuid: Annotated[
        OptionalId, Meta(description="Empty: every managed cluster, or the object's own.")
    ] = ""
    cluster_name: Annotated[OptionalName, Meta(description="Not read.")] = ""
    cluster_mode: Annotated[OptionalName, Meta(description="Not read.")] = ""
    tenant: Annotated[OptionalId, Meta(description="Tenant uuid. Empty: every tenant.")] = ""
    tenant_name: Annotated[OptionalName, Meta(description="Not read.")] = ""
    namespace_uuid: Annotated[OptionalId, Meta(description="Empty: see `multiple`.")] = ""
    namespace_name: Annotated[OptionalName, Meta(description="Not read.")] = ""
    multiple: Annotated[
        bool,
        Meta(
            description="Counts for the tenant `default` only: true = all managed namespaces, "
            "false = the default namespace."
        ),
    ] = False
    vm_type: Annotated[Label, Meta(description="`GCD` or `GDT`: a label in the operation log.")] = (
        ""
    )


class Paging(Request, frozen=True, kw_only=True):
    page_number: PageNumber = 0
    page_size: PageSize = 0


def page_of(page_number: int, page_size: int) -> tuple[int, int]:
    """The page (from 1) and the page size that a request means."""
    return page_number or 1, page_size or DEFAULT_PAGE_SIZE
