"""The parts of a check that read all bytes: of packs' frames, and of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from blake3 import blake3

from storage.check.places import Place, Standing
from storage.check.report import MOST_FINDINGS, CheckReport, Watch
from storage.errors import Damaged, StorageError, translated
from storage.files.bad_places import BadPlace, open_to_read, read_at
from storage.files.fs import Fs
from storage.format.chunks import FRAME_HEADER_BYTES, Decoder
from storage.format.packs import FrameView, PackEntry, parse_frame, require_content, require_entry
from storage.format.patches import parse_patch, patched
from storage.log.rebuild import COPY_BYTES
from storage.point import Point

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
            fd = open_to_read(self._fs, path)
            try:
                for entry, frame in _frames(self._fs, fd, entries, path):
                    if isinstance(frame, BadPlace):
                        self._note(entry.chunk_id, str(frame))
                        bad.add(entry.offset)
                        continue
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
            require_entry(view, entry, what)
            if entry.base:
                parse_patch(view.payload, view.raw_len)  # `unfit` proves its content
                return True
            require_content(view, decoder, self._point.hasher, what)
        except StorageError as error:
            self._note(entry.chunk_id, str(error))
            return False
        return True

    def _note(self, chunk: bytes, detail: str) -> None:
        if len(self.details) < MOST_FINDINGS:
            self.details[chunk] = detail

    def unfit(self, found: Standing, path_of: Callable[[int], str]) -> list[bytes]:
        """Those of a base's patches that don't give their chunks; or the base, if that is damaged:
        all frames were read before, but not all of them by this check, or with this outcome."""
        decoder, wrong = Decoder(), []
        try:
            base = self._payload(path_of, found.base_place)
            content = decoder.decode(base.codec, base.payload, base.raw_len)
        except Damaged as error:
            self._note(found.base, str(error))
            return [found.base]
        for chunk, place in found.patches:
            try:
                view = self._payload(path_of, place)
                made = patched(view.payload, view.raw_len, content, decoder)
                if self._point.hasher.full(made) != chunk:
                    raise Damaged("content does not have its id")
            except Damaged as error:
                self._note(chunk, f"{path_of(place.number)} at {place.offset}: {error}")
                wrong.append(chunk)
        return wrong

    def _payload(self, path_of: Callable[[int], str], place: Place) -> FrameView:
        path = path_of(place.number)
        size_bytes = FRAME_HEADER_BYTES + place.stored_len
        self._watch.pause(size_bytes)
        self._report.bytes_read += size_bytes
        with translated(path):
            fd = open_to_read(self._fs, path)
            try:
                frame = read_at(self._fs, fd, size_bytes, place.offset, path)
            finally:
                self._fs.close(fd)
        return parse_frame(memoryview(frame), self._point.chunk_size, f"{path} at {place.offset}")


def _frames(
    fs: Fs, fd: int, entries: list[PackEntry], path: str
) -> Iterator[tuple[PackEntry, memoryview | BadPlace]]:
    """Each entry with its frame's bytes, read in large pieces. Entries lie without gaps."""
    at = 0
    while at < len(entries):
        start, end, last = entries[at].offset, entries[at].offset, at
        while last < len(entries) and (end - start < READ_BYTES or last == at):
            end += FRAME_HEADER_BYTES + entries[last].stored_len
            last += 1
        try:
            piece = memoryview(read_at(fs, fd, end - start, start, path))
        except BadPlace as error:
            if last - at == 1:
                yield entries[at], error
            else:
                for entry in entries[at:last]:
                    yield from _frames(fs, fd, [entry], path)
            at = last
            continue
        for entry in entries[at:last]:
            offset = entry.offset - start
            yield entry, piece[offset : offset + FRAME_HEADER_BYTES + entry.stored_len]
        at = last


def file_digest(fs: Fs, path: str, report: CheckReport, watch: Watch) -> bytes | None:
    """The file's BLAKE3; None when it has gone."""
    hasher = blake3()
    try:
        fd = open_to_read(fs, path)
    except FileNotFoundError:
        return None
    try:
        offset = 0
        while piece := read_at(fs, fd, COPY_BYTES, offset, path):
            hasher.update(piece)
            offset += len(piece)
            report.bytes_read += len(piece)
            watch.pause(len(piece))
    finally:
        fs.close(fd)
    return hasher.digest()
