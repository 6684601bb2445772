"""Every decoder of what lies on a point, fed with damaged and with forged bytes.

Damaged: the bytes around a digest are mutated, so it does not match. Forged: what the digest covers
is mutated and the digest made right again, as somebody who means it would.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.catalogue.labels import UNREADABLE_NAME, decode_label, encode_label
from engine.model import BackupLabel, DiskBackup
from storage.domain.heartbeats import Heartbeat, load_beat
from storage.errors import Damaged, PointNewerFormat, Refused
from storage.files.fs import Buffer, OsFs
from storage.format.chunks import MAX_CHUNK_BYTES, ChunkHasher, Decoder, Encoder
from storage.format.manifests import ManifestReader, decode_page, encode_page
from storage.format.packs import MAX_PACK_ROWS, FrameView, parse_frame, read_footer, require_entry
from storage.format.patches import patched
from storage.format.record import (
    BackupSeal,
    Checkpoint,
    Commit,
    DiskSeal,
    FileSeal,
    Forget,
    Open,
    Rebase,
    Record,
    Retire,
    decode_record,
    encode_record,
)
from storage.point import ClusterLabel, Point, PointLabel
from storage.view.listing import BackupRow, DiskRow
from tests import forging
from tests.forging import CHUNK_SIZE
from tests.hostile.mutating import mutants, only_named, peak_bytes
from tests.store import new_uuid

MIB = 1 << 20
HASHER = ChunkHasher(bytes(32))
SESSION = "ab" * 16
CONTENTS = [b"compressible " * 90, b"raw one", b"z" * 700, random.Random(1).randbytes(300)]
BASE = random.Random(2).randbytes(5 * 4096 + 7)
PATCHED = BASE[:4096] + b"changed" * 700 + BASE[4096 + 4900 :]
# As docs/design.md §4.2 has it: the base's id, one byte of bitmap, the second and third block.
PATCH = HASHER.full(BASE) + b"\x06" + PATCHED[4096 : 3 * 4096]
FILE = FileSeal(n=1, size_bytes=1000, count=3, digest=bytes(16))
UUID = new_uuid()
RECORD = Record(
    seq=7,
    previous=bytes(range(32)),
    nonce=bytes(16),
    host="host",
    ops=(
        Open(session=SESSION, kind="backup", host="host", incarnation="in", holds=(UUID,)),
        Commit(
            session=SESSION,
            packs=(FILE,),
            manifests=(FILE,),
            backups=(
                BackupSeal(
                    backup=UUID,
                    label=b"label",
                    disks=(DiskSeal(disk=UUID, capacity=1 << 40, manifest=1),),
                ),
            ),
        ),
        Forget(backups=(UUID,)),
        Retire(
            session=SESSION,
            retired=(f"{SESSION}/00000001",),
            rebased=(Rebase(disk=UUID, manifest=1, was=f"{SESSION}/00000000"),),
        ),
        Checkpoint(seq=5, digest=bytes(32), size_bytes=9),
    ),
)
LABEL = BackupLabel(
    vm_uuid=UUID,
    vm_name="web",
    tenant="t",
    tenant_name="tenant",
    namespace="n",
    namespace_name="namespace",
    name="nightly",
    description="words",
    create_time=1,
    full=True,
    disks=(DiskBackup(target_device="sda", disk_uuid=UUID, capacity=5),),
    notes=("full: nothing to build on",),
)


def pack_bytes() -> bytes:
    items, rows = b"", []
    for content in CONTENTS:
        frame = Encoder().encode(HASHER.full(content), content)
        payload = bytes(frame.payload)
        place = (frame.chunk_id, frame.codec, len(content), payload)
        rows.append(forging.pack_row(64 + len(items), *place))
        items += forging.frame(*place)
    place = (HASHER.full(PATCHED), 2, len(PATCHED), PATCH)
    rows.append(forging.pack_row(64 + len(items), *place))
    items += forging.frame(*place)
    return forging.pack(items, rows, PATCH[:32]).encoded()


def manifest_sealed(capacity: int = 3 << 40) -> forging.Sealed:
    items, rows = b"", []
    for page_no in (0, 1, 5):
        entries = {at: HASHER.full(bytes([page_no, at])) for at in (0, 3, 9)}
        page = encode_page(entries)
        rows.append(forging.page_row(page_no, len(entries), 64 + len(items), page))
        items += page
    return forging.manifest(items, rows, capacity)


def resealed(found: bytes) -> bytes:
    """A sealed file whose tail's digest is made to match whatever its header and table say."""
    if len(found) < 112:
        return found
    (offset,) = struct.unpack_from("<Q", found, len(found) - 48)
    signed = found[-48:-32]
    table = found[offset:-48] if 64 <= offset <= len(found) - 48 else b""
    return found[:-32] + forging.digest16(found[:64] + table + signed) + found[-16:]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "file"


# Small objects ------------------------------------------------------------------------------


def decoded_point(body: bytes, place: Path) -> object:
    place.mkdir(exist_ok=True)
    (place / "POINT").write_bytes(body)
    return Point.open(str(place))


def decoded_cluster(body: bytes, place: Path) -> object:
    domain = place / "domains" / UUID
    if not domain.exists():
        place.mkdir()
        Point.create(str(place), "p")
        domain.mkdir()
    (domain / "DOMAIN").write_bytes(body)
    return Point.open(str(place)).cluster(UUID)


def decoded_beat(body: bytes, place: Path) -> object:
    place.write_bytes(body)
    load_beat(OsFs(), str(place))
    return None


def decoded_record(body: bytes, _place: Path) -> object:
    return decode_record(body, "record")


_encode = msgspec.msgpack.Encoder().encode
SMALL: dict[str, tuple[bytes, bytes, Callable[[bytes, Path], object]]] = {
    "point": (
        b"VKPO",
        _encode(PointLabel(uuid=UUID, name="p", chunk_size=1 << 20, key=bytes(32))),
        decoded_point,
    ),
    "domain": (
        b"VKDO",
        _encode(ClusterLabel(cluster_uuid=UUID, cluster_name="c", cluster_mode="m")),
        decoded_cluster,
    ),
    "heartbeat": (b"VKHB", _encode(Heartbeat(incarnation="i" * 32, counter=9)), decoded_beat),
    "record": (b"VKRE", encode_record(RECORD)[12:-16], decoded_record),
}


@pytest.mark.parametrize("kind", SMALL)
def test_damaged_small_objects_are_refused(kind: str, place: Path) -> None:
    magic, body, decode = SMALL[kind]
    sample = forging.small_object(magic, body)
    decode(sample, place)
    for mutant in mutants(sample, seed=1):
        assert only_named(partial(decode, mutant, place)), mutant


@pytest.mark.parametrize("kind", SMALL)
def test_forged_small_objects_are_understood_or_refused(kind: str, place: Path) -> None:
    magic, body, decode = SMALL[kind]
    refused = 0
    for mutant in mutants(body, seed=2):
        sample = forging.small_object(magic, mutant)
        refused += only_named(partial(decode, sample, place))
    assert refused


DEEP = b"\x81\xa4junk" + b"\x91" * 200_000 + b"\x90"  # {"junk": [[[…]]]}
SURROGATE = b"\x81\xa4name\xa3\xed\xa0\x80"
ENDLESS = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc1"]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("body", [DEEP, SURROGATE, b"", *ENDLESS], ids=lambda body: body[:6].hex())
def test_bodies_that_try_the_parser(kind: str, body: bytes, place: Path) -> None:
    magic, _, decode = SMALL[kind]
    sample = forging.small_object(magic, body[: 4000 if kind == "heartbeat" else len(body)])
    assert only_named(lambda: decode(sample, place))


@pytest.mark.parametrize("kind", SMALL)
def test_a_length_of_4_gib_costs_nothing(kind: str, place: Path) -> None:
    magic, _, decode = SMALL[kind]
    sample = magic + struct.pack("<HHI", 1, 0, 0xFFFFFFFF) + bytes(100)
    decode(forging.small_object(magic, SMALL[kind][1]), place)  # what is made once, is made now
    assert peak_bytes(lambda: only_named(lambda: decode(sample, place))) < MIB // 4


@given(body=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_any_record_body(body: bytes) -> None:
    only_named(lambda: decode_record(forging.small_object(b"VKRE", body), "record"))


def test_a_record_that_nobody_could_read_is_never_written() -> None:
    seal = BackupSeal(backup=UUID, label=bytes(MIB + 1), disks=())
    commit = Commit(session=SESSION, backups=(seal,))
    with pytest.raises(Refused):
        encode_record(msgspec.structs.replace(RECORD, ops=(commit,)))


@pytest.mark.parametrize("name", [SESSION + "\n", "../" + SESSION, SESSION.upper(), "", "a" * 31])
def test_a_session_is_no_path(name: str) -> None:
    body = msgspec.msgpack.encode(
        {
            "seq": 1,
            "previous": bytes(32),
            "nonce": bytes(16),
            "host": "h",
            "ops": [{"op": "abort", "session": name}],
        }
    )
    with pytest.raises(Damaged):
        decode_record(forging.small_object(b"VKRE", body), "record")


def test_a_newer_format_is_told_apart() -> None:
    with pytest.raises(PointNewerFormat):
        decode_record(forging.small_object(b"VKRE", b"\x80", version=2), "record")


# Sealed files -------------------------------------------------------------------------------


def read_pack(content: bytes, place: Path) -> None:
    """All that a restore reads of a pack."""
    place.write_bytes(content)
    whole = memoryview(content)
    for entry in read_footer(OsFs(), str(place))[1]:
        found = parse_frame(whole[entry.offset :], CHUNK_SIZE, "here")
        require_entry(found, entry, "here")
        if HASHER.full(decoded(found)) != found.chunk_id:
            raise Damaged("not its id")


def decoded(found: FrameView) -> Buffer:
    if found.codec == 2:
        return patched(found.payload, found.raw_len, BASE, Decoder())
    return Decoder().decode(found.codec, found.payload, found.raw_len)


def read_manifest(content: bytes, place: Path) -> None:
    place.write_bytes(content)
    with ManifestReader(OsFs(), str(place)) as reader:
        for _, page in reader.pages():
            decode_page(page)


SEALED = {
    "pack": (pack_bytes(), read_pack),
    "manifest": (manifest_sealed().encoded(), read_manifest),
}


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize("seal", [bytes, resealed], ids=["damaged", "forged"])
def test_sealed_files(kind: str, seal: Callable[[bytes], bytes], place: Path) -> None:
    sample, read = SEALED[kind]
    read(sample, place)
    refused = sum(
        only_named(partial(read, seal(mutant), place))
        for mutant in mutants(sample, seed=3, rounds=5 * 100)
    )
    assert refused > 400


@pytest.mark.parametrize("kind", SEALED)
@pytest.mark.parametrize(
    "lie",
    [
        {"count": 0xFFFFFFFF},
        {"table_offset": (1 << 64) - 1},
        {"file_size": (1 << 64) - 1},
        {"chunk_size": 1 << 31},
        {"row_size": 0},
        {"row_size": 0xFFFFFFFF},
        {"version": 2},
        {"flags": 1},
        {"annex_size": 1},
        {"annex_size": 0xFFFFFFFF},
        {"annex": b"x" * 32},
        {"annex": b"x" * 33},
    ],
    ids=str,
)
def test_tails_that_lie(kind: str, lie: dict[str, object], place: Path) -> None:
    sealed = manifest_sealed()
    if kind == "pack":
        sealed = forging.pack(b"", [forging.pack_row(64, bytes(32), 0, 1, b"x")])
    sample, read = sealed.but(**lie).encoded(), SEALED[kind][1]
    assert peak_bytes(lambda: only_named(lambda: read(sample, place))) < MIB
    assert only_named(lambda: read(sample, place))


def test_a_sparse_pack_of_4_gib_is_not_read(place: Path) -> None:
    """Only its end is: a table of 2^32 / 56 rows that are not there."""
    count = ((1 << 30) - 200) // 56
    size = (1 << 32) - 1
    with place.open("wb") as file:
        file.write(pack_bytes()[:64])
        file.truncate(size)
        file.seek(size - 48)
        signed = struct.pack("<QII", size - 48 - count * 56, count, 56)
        file.write(signed + bytes(16) + struct.pack("<QI4s", size, 0, b"VKEN"))
    assert count > MAX_PACK_ROWS
    with pytest.raises(Damaged, match="rows"):
        read_footer(OsFs(), str(place))
    assert peak_bytes(lambda: only_named(lambda: read_footer(OsFs(), str(place)))) < MIB


def test_a_manifest_of_2_to_the_60_entries(place: Path) -> None:
    """Its header may claim any capacity; what is read is what is there."""
    sample = manifest_sealed(capacity=(1 << 64) - 1).encoded()
    assert peak_bytes(lambda: read_manifest(sample, place)) < MIB
    claims = forging.manifest(b"", [struct.pack("<IIQ16s", 0, 0xFFFFFFFF, 64, bytes(16))], 1 << 62)
    assert peak_bytes(lambda: only_named(lambda: read_manifest(claims.encoded(), place))) < MIB
    with pytest.raises(Damaged):
        read_manifest(claims.encoded(), place)


# Frames and pages ---------------------------------------------------------------------------


def decoded_frame(content: bytes) -> None:
    decoded(parse_frame(memoryview(content), CHUNK_SIZE, "here"))


def test_frames() -> None:
    content = CONTENTS[0]
    frame = Encoder().encode(HASHER.full(content), content)
    sample = forging.frame(frame.chunk_id, frame.codec, len(content), bytes(frame.payload))
    decoded_frame(sample)
    refused = sum(only_named(partial(decoded_frame, mutant)) for mutant in mutants(sample, 4))
    assert refused > 50
    for payload in mutants(bytes(frame.payload), 5):
        # The checksum of the payload is right, so zstd itself is what is tried.
        forged = forging.frame(frame.chunk_id, 1, len(content), payload[: len(content) - 1])
        only_named(partial(decoded_frame, forged))


def test_patches() -> None:
    sample = forging.frame(HASHER.full(PATCHED), 2, len(PATCHED), PATCH)
    decoded_frame(sample)
    refused = sum(only_named(partial(decoded_frame, mutant)) for mutant in mutants(sample, 4))
    assert refused > 50
    compressed = PATCH[:33] + zstandard.compress(PATCH[33:])
    for payload in (*mutants(PATCH, 5), *mutants(compressed, 6)):
        forged = forging.frame(bytes(31) + b"x", 2, len(PATCHED), payload[: len(PATCHED) - 1])
        only_named(partial(decoded_frame, forged))


@pytest.mark.parametrize("base", [HASHER.full(PATCHED), bytes(32)], ids=["itself", "zero mark"])
def test_bases_that_can_not_be(base: bytes, place: Path) -> None:
    chunk = (HASHER.full(PATCHED), 2, len(PATCHED), base + PATCH[32:])
    with pytest.raises(Damaged):
        parse_frame(memoryview(forging.frame(*chunk)), CHUNK_SIZE, "here")
    pack = forging.pack(forging.frame(*chunk), [forging.pack_row(64, *chunk)], base)
    place.write_bytes(pack.encoded())
    with pytest.raises(Damaged):
        read_footer(OsFs(), str(place))


def test_a_footer_that_names_another_base(place: Path) -> None:
    chunk = (HASHER.full(PATCHED), 2, len(PATCHED), PATCH)
    pack = forging.pack(forging.frame(*chunk), [forging.pack_row(64, *chunk)], bytes(31) + b"x")
    with pytest.raises(Damaged):
        read_pack(pack.encoded(), place)


@pytest.mark.parametrize("length", [CHUNK_SIZE + 1, 1 << 31, 0xFFFFFFFF, 0])
def test_frames_that_claim_much(length: int) -> None:
    for codec in (0, 1, 2):
        sample = forging.frame(bytes(32), codec, length, b"x" * 10)
        decode = partial(decoded_frame, sample)
        assert peak_bytes(partial(only_named, decode)) < MIB
        with pytest.raises(Damaged):
            decode()
    header = struct.pack("<4sBBHII32sQ", b"VKFR", 0, 0, 0, length, length, bytes(32), 0)
    with pytest.raises(Damaged):
        parse_frame(memoryview(header + b"x"), CHUNK_SIZE, "here")


def bombs() -> list[bytes]:
    """zstd frames of a few bytes that become a GiB, with and without saying so."""
    zeros = bytes(64 * MIB)
    told = zstandard.ZstdCompressor(level=19, write_content_size=True).compress(zeros)
    silent = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(zeros)
    # Single segment flag, 8-byte content size: 2^62.
    liar = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 62) + told[9:]
    window = b"\x28\xb5\x2f\xfd" + b"\x80\xff" + struct.pack("<I", CHUNK_SIZE) + told[9:]
    return [told, silent, liar, window, told * 3]


@pytest.mark.parametrize("number", range(5))
def test_a_zstd_bomb_ends_at_the_raw_length(number: int) -> None:
    bomb = bombs()[number]
    for raw_len in (1, CHUNK_SIZE, MAX_CHUNK_BYTES):

        def decode(raw_len: int = raw_len) -> None:
            Decoder().decode(1, bomb, raw_len)

        assert peak_bytes(lambda: only_named(decode)) < 2 * MAX_CHUNK_BYTES
        with pytest.raises(Damaged):
            decode()


@given(page=st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_page(page: bytes) -> None:
    try:
        entries = decode_page(page)
    except Damaged:
        return
    assert encode_page(entries) == page


def test_pages() -> None:
    sample = encode_page({at: HASHER.full(bytes([at])) for at in range(0, 60, 7)})
    for mutant in mutants(sample, 6):
        only_named(partial(decode_page, mutant))


# Labels -------------------------------------------------------------------------------------

ROW = BackupRow(UUID, "", encode_label(LABEL), 3, (DiskRow(UUID, 77),))


def test_labels_always_give_a_label_with_the_true_disks() -> None:
    assert decode_label(ROW).name == "nightly"
    for mutant in [*mutants(ROW.label, 7), DEEP, SURROGATE, *ENDLESS]:
        label = decode_label(BackupRow(UUID, "", mutant, 3, ROW.disks))
        assert [(disk.disk_uuid, disk.capacity) for disk in label.disks] == [(UUID, 77)]
        msgspec.json.encode(label)
    assert decode_label(BackupRow(UUID, "", DEEP, 3, ())).name == UNREADABLE_NAME
