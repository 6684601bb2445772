"""Log records: what they carry, and how they become bytes and come back.

A record is untrusted until it has been decoded here: every field is typed and bounded, and its
digest and place in the chain are checked by the reader (storage.log.log).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from blake3 import blake3

from storage.errors import Damaged, Refused
from storage.format.framing import decode_body, decode_object, encode_object

MAGIC = b"VKRE"
BODY_LIMIT_BYTES = 64 << 20
LABEL_LIMIT_BYTES = 1 << 20
DISKS_LIMIT = 256
HOLDS_LIMIT = 256

SessionId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$", max_length=32)]
# A pack or manifest is named by its session and number, which is also its path in the domain.
FileId = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}/[0-9a-f]{8}$", max_length=41)]
Uuid = Annotated[
    str, msgspec.Meta(pattern="^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", max_length=36)
]
Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Digest16: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Digest32: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Label: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=LABEL_LIMIT_BYTES)]
HostId: TypeAlias = Annotated[str, msgspec.Meta(max_length=64)]
SessionKind: TypeAlias = Literal["backup", "read", "gc", "import"]


def file_id(session: str, n: int) -> str:
    """The FileId of a session's n-th pack or manifest."""
    return f"{session}/{n:08x}"


class _Op(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    pass


class FileSeal(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed pack or manifest: `digest` is its tail's, which fixes table and items."""

    n: Number
    size_bytes: Size
    count: Number
    digest: Digest16


class DiskSeal(msgspec.Struct, frozen=True, kw_only=True):
    """One disk of a backup; `manifest` is the n of a manifest of the same record."""

    disk: Uuid
    capacity: Size
    manifest: Number
    parent: Annotated[str, msgspec.Meta(max_length=36)] = ""


class BackupSeal(msgspec.Struct, frozen=True, kw_only=True):
    """A backup that becomes live. `label` is opaque here: the engine's words about it."""

    backup: Uuid
    label: Label
    disks: Annotated[tuple[DiskSeal, ...], msgspec.Meta(max_length=DISKS_LIMIT)]
    parent: Annotated[str, msgspec.Meta(max_length=36)] = ""


class Rebase(msgspec.Struct, frozen=True, kw_only=True):
    """The manifest `manifest` of this record replaces a disk's own part of its chain.

    `was` and `parent` are the disk's manifest and parent when it was written: while both stand, so
    does the layer that it was made from.
    """

    disk: Uuid
    manifest: Number
    was: FileId
    parent: Annotated[str, msgspec.Meta(max_length=36)] = ""


class Open(_Op, frozen=True, kw_only=True, tag="open"):
    session: SessionId
    kind: SessionKind
    host: HostId
    incarnation: HostId
    holds: Annotated[tuple[Uuid, ...], msgspec.Meta(max_length=HOLDS_LIMIT)] = ()


class Commit(_Op, frozen=True, kw_only=True, tag="commit"):
    session: SessionId
    packs: tuple[FileSeal, ...] = ()
    manifests: tuple[FileSeal, ...] = ()
    backups: tuple[BackupSeal, ...] = ()


class Abort(_Op, frozen=True, kw_only=True, tag="abort"):
    session: SessionId


class Forget(_Op, frozen=True, kw_only=True, tag="forget"):
    backups: tuple[Uuid, ...]


class Retire(_Op, frozen=True, kw_only=True, tag="retire"):
    session: SessionId
    packs: tuple[FileSeal, ...] = ()
    retired: tuple[FileId, ...] = ()
    manifests: tuple[FileSeal, ...] = ()
    rebased: tuple[Rebase, ...] = ()


class Checkpoint(_Op, frozen=True, kw_only=True, tag="checkpoint"):
    seq: Size
    digest: Digest32
    size_bytes: Size


Op: TypeAlias = Open | Commit | Abort | Forget | Retire | Checkpoint


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One file of the log. `previous` is the digest of record seq − 1, zeros before the first."""

    seq: Size
    previous: Digest32
    nonce: Digest16
    host: HostId
    ops: tuple[Op, ...]


FIRST_PREVIOUS = bytes(32)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Record)


def encode_record(record: Record) -> bytes:
    """The record's whole file. Refused for one that decode_record would not give back."""
    body = _encoder.encode(record)
    if len(body) > BODY_LIMIT_BYTES:
        raise Refused(f"record of {len(body)} bytes; the limit is {BODY_LIMIT_BYTES}")
    try:
        decode_body(_decoder, body, "record")
    except Damaged as error:
        raise Refused(str(error)) from error
    return encode_object(MAGIC, body)


def decode_record(file_bytes: bytes, what: str) -> Record:
    """Raises Damaged or PointNewerFormat; `what` names the file."""
    body = decode_object(MAGIC, file_bytes, BODY_LIMIT_BYTES, what)
    return decode_body(_decoder, body, f"{what}: not a record")


def record_digest(file_bytes: bytes) -> bytes:
    """The 32-byte digest by which the next record names this one."""
    return blake3(file_bytes).digest()
