"""The command line without a server: parsing, units, help, and that no call is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from api.cli import cli, follow, jobs, names, params, units
from api.cli.exits import REFUSED, USAGE, Failure, of_status
from api.cli.names import Named
from api.cli.params import DiskSpec
from api.cli.screen import Screen, card, table
from api.cli.serve import _tell
from api.client import AnswerT, Client, Reply
from api.routes import CALLS
from api.routes.jobs import job_row
from api.schemas import MAX_ITEMS, Request
from api.schemas_backup import (
    ComputeRemoteBackup,
    ImportedBackups,
    RemoteBackupList,
    RemoteImport,
    RemoteListQuery,
)
from engine.model import Job

SOURCES = Path(cli.callback.__code__.co_filename).parent if cli.callback else Path()
NOWHERE = Client("http://127.0.0.1:1")


def leaves(group: click.Group, path: str = "vmkeep") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize(("path", "command"), list(leaves(cli)), ids=str)
def test_every_command_has_help_and_documented_options(path: str, command: click.Command) -> None:
    assert command.help, path
    if path not in ("vmkeep serve", "vmkeep point check"):
        flags = {flag for param in command.params for flag in param.opts}
        assert {"--server", "--json"} <= flags, path


@pytest.mark.parametrize("words", ["serve --listen x --data=", "point check --deep / --resume="])
def test_no_directory_at_all_is_not_the_current_one(words: str) -> None:
    """As when a variable in a script is not set."""
    ran = CliRunner().invoke(cli, words.split())
    assert ran.exit_code == USAGE
    assert f"Invalid value for '{words.split()[-1][:-1]}': the path is empty" in ran.output


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.path)
def test_every_call_of_the_api_has_a_command(call: object) -> None:
    path = getattr(call, "path").removeprefix("/v1/")  # noqa: B009 - Call or Batch
    used = "".join(source.read_text() for source in SOURCES.glob("*.py"))
    assert f'"{path}"' in used


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("sda=fast:web01", DiskSpec("sda", "fast", "web01")),
        ("sda=fast:web01:20G", DiskSpec("sda", "fast", "web01", 20 << 30)),
        ("sda=fast:web01:SSD", DiskSpec("sda", "fast", "web01", 0, "SSD")),
        ("sda=fast:web01:1.5T:HDD", DiskSpec("sda", "fast", "web01", 3 << 39, "HDD")),
        ("vdb=p:v:4096:x", DiskSpec("vdb", "p", "v", 4096, "x")),
    ],
)
def test_disks_are_understood(text: str, spec: DiskSpec) -> None:
    assert params.disk(text) == spec


@pytest.mark.parametrize(
    "text", ["", "sda", "sda=", "sda=fast", "=fast:web", "sda=:web", "sda=fast:"]
)
def test_disks_without_their_parts_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        params.disk(text)


@pytest.mark.parametrize("text", ["sda=p:v:1G:SSD:more", "sda=p:v:SSD:HDD", "sda=p:v:20X"])
def test_disks_with_parts_too_many_or_wrong_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        params.disk(text)


@given(st.integers(min_value=0, max_value=1 << 62))
def test_a_size_is_read_back_within_its_three_digits(size_bytes: int) -> None:
    text = units.size(size_bytes)
    unit = text.split()[1]
    if unit != "EiB":
        assert units.parse_size(text) == pytest.approx(size_bytes, rel=0.0061, abs=0.5)


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1 << 20, "1.00 MiB"),
        (999.6 * 1024, "0.98 MiB"),
    ],
)
def test_sizes_as_people_read_them(size_bytes: float, text: str) -> None:
    assert units.size(size_bytes) == text


@pytest.mark.parametrize("text", ["", "G", "12Q", "-1G", "1G1"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (12.4, "12 s"), (65, "1:05"), (7322, "2:02:02")]
)
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_times() -> None:
    assert units.parse_time("1763900000") == 1763900000
    assert units.parse_time(units.time(1763900000)) == 1763900000
    assert units.time(0) == "-"


ROWS = [
    Named("aaaa1111-0000-4000-8000-000000000001", "web01"),
    Named("aaaa2222-0000-4000-8000-000000000002", "web02"),
    Named("bbbb3333-0000-4000-8000-000000000003", "twin"),
    Named("cccc4444-0000-4000-8000-000000000004", "twin"),
]


@pytest.mark.parametrize(
    ("wanted", "row"), [("web01", 0), ("aaaa2", 1), ("bbbb", 2), ("CCCC4444-0000", 3)]
)
def test_names_and_prefixes_stand_for_uuids(wanted: str, row: int) -> None:
    assert names.pick(NOWHERE, "VM", wanted, lambda _: ROWS) == ROWS[row].uuid


def test_nothing_stands_for_nothing() -> None:
    """As when a variable in a script is not set: it was the one job, which has no name."""
    with pytest.raises(Failure, match="no job ''"):
        names.pick(NOWHERE, "job", "", lambda _: [Named(ROWS[0].uuid, "")])


@pytest.mark.parametrize(
    "content", [b'{"items": [{"a": "\xff"}]}', b'{"items": [{"a": %s' % (b"[" * 5000), b"[]"]
)
def test_a_file_that_is_no_batch_is_wrong_usage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "items").write_bytes(content)
    ran = CliRunner().invoke(cli, ["backup", "batch-create", "--file", str(tmp_path / "items")])
    assert ran.exit_code == USAGE
    assert "items: " in ran.output


def test_a_whole_uuid_asks_nobody() -> None:
    def listing(_: Client) -> list[Named]:
        raise AssertionError("asked")

    uuid = "dddd4444-0000-4000-8000-000000000004"
    assert names.pick(NOWHERE, "VM", uuid, listing) == uuid


@pytest.mark.parametrize("wanted", ["twin", "aaaa"])
def test_what_could_be_two_is_a_usage_error_that_names_both(wanted: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        names.pick(NOWHERE, "VM", wanted, lambda _: ROWS)
    fits = [row for row in ROWS if wanted in (row.name, row.uuid[:4])]
    assert all(row.uuid in caught.value.message for row in fits)


@pytest.mark.parametrize("wanted", ["web", "aaa", "nobody"])
def test_what_fits_nothing_is_refused(wanted: str) -> None:
    with pytest.raises(Failure) as caught:
        names.pick(NOWHERE, "VM", wanted, lambda _: ROWS)
    assert caught.value.exit_code == REFUSED


def test_what_is_not_named_is_the_only_one_or_default() -> None:
    default = Named("eeee5555-0000-4000-8000-000000000005", "default")
    assert names.pick_or_only(NOWHERE, "pool", "", lambda _: ROWS[:1]) == ROWS[0].uuid
    assert names.pick_or_only(NOWHERE, "pool", "", lambda _: [*ROWS, default]) == default.uuid
    with pytest.raises(click.UsageError):
        names.pick_or_only(NOWHERE, "pool", "", lambda _: ROWS[:2])
    with pytest.raises(Failure):
        names.pick_or_only(NOWHERE, "pool", "", lambda _: [])


class Point(Client):
    """A server whose one point has `count` backups; it keeps the imports that it is asked for."""

    def __init__(self, count: int) -> None:
        super().__init__("http://127.0.0.1:1")
        self.imports: list[list[str]] = []
        self._row = ComputeRemoteBackup(
            uuid="",
            namespace="",
            vm_uuid="",
            point_uuid=ROWS[0].uuid,
            name="",
            description="",
            create_time=0,
            disks={},
            status=0,
            filename="",
            expired_time=0,
            cluster_uuid="",
            cluster_name="",
            cluster_mode="",
        )
        self._uuids = [str(number) for number in range(count)]

    def get(self, call: str, answer: type[AnswerT], query: Request | None = None) -> Reply[AnswerT]:
        assert call == "compute/backup/remote/list"
        assert isinstance(query, RemoteListQuery)
        begin = (query.page_number - 1) * query.page_size
        rows = [replace(self._row, uuid=uuid) for uuid in self._uuids[begin:][: query.page_size]]
        found = RemoteBackupList(total_count=len(self._uuids), backups=rows, vm_infos={})
        return Reply(msgspec.convert(found, answer), b"", {})

    def post(self, call: str, answer: type[AnswerT], body: Request) -> Reply[AnswerT]:
        assert call == "compute/backup/remote/import"
        assert isinstance(body, RemoteImport)
        self.imports.append([ref.uuid for ref in body.backup])
        rows = [replace(self._row, uuid=ref.uuid) for ref in body.backup]
        return Reply(msgspec.convert(ImportedBackups(backups=rows, vm_infos={}), answer), b"", {})


@pytest.mark.parametrize("count", [0, 1, MAX_ITEMS, 2 * MAX_ITEMS + 1])
def test_all_of_a_point_is_imported_however_much_it_is(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Point(count)
    monkeypatch.setattr(import_module("api.cli.client_command"), "Client", lambda _server: point)
    where = ["--point", ROWS[0].uuid, "--cluster", ROWS[1].uuid]
    ran = CliRunner().invoke(cli, ["backup", "import", "--all", "--json", *where])
    assert ran.exit_code == 0, ran
    assert len(json.loads(ran.output)["backups"]) == count
    assert all(len(uuids) <= MAX_ITEMS for uuids in point.imports)
    assert [*chain(*point.imports)] == [str(number) for number in range(count)]


def test_exit_codes_follow_the_class_of_the_status() -> None:
    assert [of_status(status) for status in (400, 404, 409, 500, 503, 507)] == [4, 4, 4, 5, 5, 5]


@given(st.integers(min_value=-(1 << 63), max_value=(1 << 64) - 1))
def test_any_time_can_be_shown(unix_s: int) -> None:
    assert units.time(unix_s)


def test_a_time_that_no_calendar_has_is_shown_as_a_number() -> None:
    assert units.time(1 << 60) == str(1 << 60)


NASTY = "[/]\x1b]0;x\x07 :car:\n\x9b31m\u202e[bold]x"
TAME = "[/]\\x1b]0;x\\x07 :car:\\n\\x9b31m\\u202e[bold]x"


def test_names_are_printed_as_they_are_and_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json=False)
    screen.line(NASTY)
    screen.answer(Reply(NASTY, b"", {}), lambda data: data)
    screen.answer(Reply(NASTY, b"", {}), lambda data: table(("name",), [(data,)]))
    screen.answer(Reply(NASTY, b"", {}), lambda data: card([(data, data)]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "─" not in line]
    words = TAME.split()
    assert lines == [words, words, ["name"], words, words * 2]
    assert str(Failure(REFUSED, NASTY)) == TAME.replace("\\n", " ")


def test_a_stalled_job_says_so_and_on_what() -> None:
    """In the list, in the card and in the bar, instead of a rate of a minute ago."""
    moving = job_row(Job(uuid="j", kind="backup", state="running"))
    hung = job_row(
        Job(uuid="j", kind="backup", state="running", stalled_s=65.0, stalled_on="backup point nas")
    )
    said = "stalled 1:05: backup point nas does not answer"
    assert (follow.stall(moving), follow.stall(hung)) == ("", said)
    assert (follow.pace(moving), follow.pace(hung)) == ("0 B of 0 B", said)
    assert jobs._row(hung)[3] == said
    assert jobs._row(moving)[3].startswith("0 B of 0 B")


def test_what_the_service_tells_is_written_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a line of its log, which comes from another thread, gets into it."""
    written = []

    class Unbuffered(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Unbuffered())
    _tell("listens on http://127.0.0.1:8080")
    assert [text for text in written if text] == ["listens on http://127.0.0.1:8080\n"]
