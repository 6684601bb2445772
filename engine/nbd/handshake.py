"""The handshake: from a connected socket to an export that can be read.

In order: greeting, structured replies (without them there is no block status), the metadata
contexts, GO. A server that lacks structured replies or a context is still a server; what it lacks
is missing in the facts. The number and length of its answers are bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.errors import DiskServerBroken, DiskServerRefused
from engine.nbd import protocol
from engine.nbd.connection import Connection
from engine.nbd.protocol import ExportFacts


def negotiate(connection: Connection, export: str, contexts: Sequence[str]) -> ExportFacts:
    """Enters the transmission phase. DiskServerRefused, DiskServerLost, DiskServerBroken."""
    _greet(connection)
    structured = _ask_structured(connection)
    ids = _ask_contexts(connection, export, contexts) if structured and contexts else {}
    return _go(connection, export, structured, ids)


def _greet(connection: Connection) -> None:
    first, second, flags = protocol.GREETING.unpack(connection.receive(protocol.GREETING.size))
    if (first, second) != (protocol.INIT_MAGIC, protocol.OPTION_MAGIC):
        raise DiskServerBroken(f"a greeting of {first:#x} {second:#x}: not an NBD server")
    if not flags & protocol.HANDSHAKE_FIXED_NEWSTYLE:
        raise DiskServerBroken("it does not know the fixed newstyle handshake")
    # Each of our flags may be sent only if the server has it too.
    ours = protocol.HANDSHAKE_FIXED_NEWSTYLE | protocol.HANDSHAKE_NO_ZEROES
    connection.send(protocol.CLIENT_FLAGS.pack(flags & ours))


def _ask_structured(connection: Connection) -> bool:
    connection.send(protocol.encode_option(protocol.OPT_STRUCTURED_REPLY, b""))
    answers = _answers(connection, protocol.OPT_STRUCTURED_REPLY)
    return [kind for kind, _ in answers] == [protocol.REP_ACK]


def _ask_contexts(connection: Connection, export: str, contexts: Sequence[str]) -> dict[str, int]:
    option = protocol.OPT_SET_META_CONTEXT
    connection.send(protocol.encode_option(option, protocol.encode_contexts(export, contexts)))
    found: dict[str, int] = {}
    for kind, body in _answers(connection, option):
        if kind == protocol.REP_META_CONTEXT:
            number, name = protocol.decode_context(body)
            if name not in contexts or name in found or number in found.values():
                raise DiskServerBroken(f"a metadata context {name!r} that was not asked for")
            found[name] = number
        elif kind == protocol.REP_ERR_UNSUP:
            return {}
        elif kind != protocol.REP_ACK:
            raise _refusal(kind, body, export)
    return found


def _go(
    connection: Connection, export: str, structured: bool, contexts: dict[str, int]
) -> ExportFacts:
    connection.send(protocol.encode_option(protocol.OPT_GO, protocol.encode_go(export)))
    size: tuple[int, int] | None = None
    blocks: tuple[int, int] | None = None
    for kind, body in _answers(connection, protocol.OPT_GO):
        if kind == protocol.REP_INFO:
            what = protocol.info_kind(body)
            if what == protocol.INFO_EXPORT:
                size = protocol.decode_export(body)
            elif what == protocol.INFO_BLOCK_SIZE:
                blocks = protocol.decode_block_sizes(body)
        elif kind != protocol.REP_ACK:
            raise _refusal(kind, body, export)
    if size is None:
        raise DiskServerBroken("it did not tell the export's size")
    facts = ExportFacts(*size, structured, contexts)
    if blocks:
        facts = ExportFacts(*size, structured, contexts, *blocks)
    if facts.size_bytes % facts.min_block_bytes:
        raise DiskServerBroken(
            f"an export of {facts.size_bytes} bytes in blocks of {facts.min_block_bytes}"
        )
    return facts


def _answers(connection: Connection, option: int) -> Iterator[tuple[int, bytes]]:
    """(kind, body) of each answer to one option, up to and with an ACK or an error."""
    for _ in range(protocol.MOST_OPTION_REPLIES):
        head = connection.receive(protocol.OPTION_REPLY.size)
        magic, answered, kind, size_bytes = protocol.OPTION_REPLY.unpack(head)
        if magic != protocol.OPTION_REPLY_MAGIC or answered != option:
            raise DiskServerBroken(f"an answer {magic:#x} to option {answered}, not {option}")
        if size_bytes > protocol.MOST_OPTION_REPLY_BYTES:
            raise DiskServerBroken(f"an answer of {size_bytes} bytes to option {option}")
        yield kind, connection.receive(size_bytes)
        if kind == protocol.REP_ACK or kind & protocol.REP_ERROR:
            return
    raise DiskServerBroken(f"more than {protocol.MOST_OPTION_REPLIES} answers to option {option}")


_REFUSALS = {
    1: "it can't do that",
    2: "policy",
    3: "invalid",
    5: "it wants TLS",
    6: "no such export",
}


def _refusal(kind: int, body: bytes, export: str) -> DiskServerBroken | DiskServerRefused:
    if not kind & protocol.REP_ERROR:
        return DiskServerBroken(f"an answer of kind {kind}")
    number = kind & ~protocol.REP_ERROR
    text = body[: protocol.MOST_NAME_BYTES].decode(errors="replace")
    why = _REFUSALS.get(number, f"error {number}")
    return DiskServerRefused(f"export {export!r}: {why}{f' ({text})' if text else ''}")
