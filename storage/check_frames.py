"""The parts of a check that read all bytes: of packs' frames, and of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from storage.check_report import MOST_FINDINGS, CheckReport, Watch
from storage.chunks import FRAME_HEADER_BYTES, Decoder
from storage.errors import Damaged, StorageError, translated
from storage.fs import Fs
from storage.packs import PackEntry, parse_frame
from storage.point import Point
from storage.rebuild import COPY_BYTES

READ_BYTES = 8 << 20


class FrameCheck:
    """Reads packs. `details`: what is wrong with a damaged chunk, of the first ones."""

    def __init__(self, fs: Fs, point: Point, report: CheckReport, watch: Watch) -> None:
        self._fs = fs
        self._point = point
        self._report = report
        self._watch = watch
        self.details: dict[bytes, str] = {}

    def damaged(self, path: str, entries: list[PackEntry]) -> set[int]:
        """The offsets of the frames that are damaged."""
        decoder = Decoder()
        bad = set()
        with translated(path):
            fd = self._fs.open_read(path)
            try:
                for entry, frame in _frames(self._fs, fd, entries):
                    self._watch.pause(len(frame))
                    self._report.bytes_read += len(frame)
                    if not self._is_sound(decoder, path, entry, frame):
                        bad.add(entry.offset)
            finally:
                self._fs.close(fd)
        return bad

    def _is_sound(
        self,
        decoder: Decoder,
        path: str,
        entry: PackEntry,
        frame: memoryview,
    ) -> bool:
        what = f"{path} at {entry.offset}"
        try:
            view = parse_frame(frame, self._point.chunk_size, what)
            if view[:4] != (entry.chunk_id, entry.raw_len, entry.stored_len, entry.codec):
                raise Damaged(f"{what}: is not the frame that the pack's table says")
            raw = decoder.decode(view.codec, view.payload, view.raw_len)
            if self._point.hasher.full(raw) != entry.chunk_id:
                raise Damaged(f"{what}: content does not have its id")
        except StorageError as error:
            if len(self.details) < MOST_FINDINGS:
                self.details[entry.chunk_id] = str(error)
            return False
        return True


def _frames(fs: Fs, fd: int, entries: list[PackEntry]) -> Iterator[tuple[PackEntry, memoryview]]:
    """Each entry with its frame's bytes, read in large pieces. Entries lie without gaps."""
    at = 0
    while at < len(entries):
        start, end, last = entries[at].offset, entries[at].offset, at
        while last < len(entries) and (end - start < READ_BYTES or last == at):
            end += FRAME_HEADER_BYTES + entries[last].stored_len
            last += 1
        piece = memoryview(fs.pread(fd, end - start, start))
        for entry in entries[at:last]:
            offset = entry.offset - start
            yield entry, piece[offset : offset + FRAME_HEADER_BYTES + entry.stored_len]
        at = last


def file_digest(fs: Fs, path: str, report: CheckReport, watch: Watch) -> bytes | None:
    """The file's BLAKE3; None when it has gone."""
    hasher = blake3()
    try:
        fd = fs.open_read(path)
    except FileNotFoundError:
        return None
    try:
        offset = 0
        while piece := fs.pread(fd, COPY_BYTES, offset):
            hasher.update(piece)
            offset += len(piece)
            report.bytes_read += len(piece)
            watch.pause(len(piece))
    finally:
        fs.close(fd)
    return hasher.digest()
