"""The real `vmkeep` command against a real service: what people and scripts see, and exit codes."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import uuid as uuids
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest import mock

import pytest

from api.cli.check import check_and_tell
from api.cli.exits import FAILED, Failure
from api.cli.screen import Screen
from bench.service import Service
from storage.check.frames import FrameCheck
from tests.forging import small_object
from tests.store import cluster, new_point, open_domain

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Ran:
    """What one call of the command gave."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, object]:
        """The one JSON document on standard output."""
        decoded = json.loads(self.out)
        assert isinstance(decoded, dict)
        return decoded


@dataclass(frozen=True, slots=True)
class Command:
    """`vmkeep`, with a server to talk to."""

    url: str
    data: Path

    def __call__(self, *words: str) -> Ran:
        ran = subprocess.run(
            [sys.executable, "-m", "api.cli", *words],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "VMKEEP_SERVER": self.url},
            timeout=120,
        )
        assert "Traceback" not in ran.stderr, ran.stderr
        return Ran(ran.returncode, ran.stdout, ran.stderr)

    def ok(self, *words: str) -> str:
        """Its output; it must have exit code 0 and be silent on stderr."""
        ran = self(*words)
        assert (ran.code, ran.err) == (0, ""), (words, ran)
        return ran.out

    def json(self, *words: str) -> dict[str, object]:
        """Its JSON document; it must have exit code 0."""
        ran = self(*words, "--json")
        assert ran.code == 0, (words, ran)
        return ran.document


@pytest.fixture(scope="module")
def vmkeep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    data = tmp_path_factory.mktemp("one")
    with Service(data) as service:
        yield Command(service.url, data)


@pytest.fixture
def machine(vmkeep: Command) -> str:
    """A new VM's name. Its one volume, of the same name, is 3 MiB of noise and 1 MiB of zeros."""
    name = f"vm-{uuids.uuid4()}"
    noise = random.Random(name).randbytes(3 * MIB)
    volume(vmkeep, name).write_bytes(noise + bytes(MIB))
    vmkeep.ok("vm", "create", name, "--disk", f"sda=default:{name}")
    return name


def volume(vmkeep: Command, name: str) -> Path:
    return vmkeep.data / "pool" / name


def test_a_backup_comes_back_bit_for_bit(vmkeep: Command, machine: str) -> None:
    made = vmkeep.ok("backup", "create", machine, "--name", f"{machine}-1", "--wait")
    assert made.startswith("backup ")
    assert "succeeded: 4.00 MiB of 4.00 MiB, read 4.00 MiB, changed 3.00 MiB" in made
    restored = vmkeep.ok("backup", "restore", f"{machine}-1", "--as", f"{machine}-new", "--wait")
    assert restored.startswith("VM ")
    original = volume(vmkeep, machine).read_bytes()
    assert volume(vmkeep, f"{machine}-new-sda").read_bytes() == original
    vmkeep.ok("backup", "delete", f"{machine}-1")
    assert vmkeep("backup", "inspect", f"{machine}-1").code == 4


def test_a_restore_puts_the_disk_where_it_is_told(vmkeep: Command, machine: str) -> None:
    vmkeep.ok("backup", "create", machine, "--name", machine, "--wait")
    place = f"sda=default:{machine}-moved:HDD"
    vmkeep.ok("backup", "restore", machine, "--as", f"{machine}-x", "--disk", place, "--wait")
    assert volume(vmkeep, f"{machine}-moved").read_bytes() == volume(vmkeep, machine).read_bytes()
    shown = vmkeep.json("vm", "inspect", f"{machine}-x")
    disks = shown["disks"]
    assert isinstance(disks, list)
    assert [disk["usd_type"] for disk in disks] == ["HDD"]


def test_as_json_each_command_prints_one_document(vmkeep: Command, machine: str) -> None:
    made = vmkeep.json("backup", "create", machine, "--name", machine, "--wait")
    assert set(made) == {"backup_uuid", "job"}
    assert isinstance(made["job"], dict)
    assert made["job"]["state"] == "succeeded"
    restored = vmkeep.json("backup", "restore", machine, "--as", f"{machine}-j", "--wait")
    assert set(restored) == {"compute_uuid", "job"}
    started = vmkeep.json("backup", "restore", machine, "--as", f"{machine}-k")
    assert set(started) == {"compute_uuid", "job_uuid"}
    assert set(vmkeep.json("point", "verify", "default", "--wait")) == {"job"}
    vmkeep.ok("job", "watch")
    assert vmkeep.json("backup", "delete", machine) == {"deleted": [made["backup_uuid"]]}


def test_names_prefixes_and_uuids_mean_the_same(vmkeep: Command, machine: str) -> None:
    made = vmkeep.json("backup", "create", machine, "--name", f"b-{machine}")
    uuid = str(made["backup_uuid"])
    by_name = vmkeep.json("backup", "inspect", f"b-{machine}")
    assert by_name["uuid"] == uuid
    assert vmkeep.json("backup", "inspect", uuid[:13])["uuid"] == uuid
    assert vmkeep.json("backup", "inspect", uuid)["compute_name"] == machine


def test_lists_show_names_and_filter(vmkeep: Command, machine: str) -> None:
    for number in (1, 2):
        vmkeep.ok("backup", "create", machine, "--name", f"{machine}-{number}", "--wait")
    shown = vmkeep.ok("backup", "list", "--vm", machine)
    assert f"{machine}-1" in shown
    assert f"{machine}-2" in shown
    only = vmkeep.json("backup", "list", "--vm", machine, "--name", f"{machine}-2")
    assert only["total_count"] == 1
    first = vmkeep.ok("backup", "list", "--vm", machine, "--page-size", "1")
    assert "page 1: 1 of 2; more with --page 2" in first
    last = vmkeep.ok("backup", "list", "--vm", machine, "--page-size", "1", "--page", "2")
    assert last.endswith("page 2: 1 of 2\n")
    none = vmkeep.json("backup", "list", "--vm", machine, "--until", "2001-01-01")
    assert none["total_count"] == 0
    assert "incremental" in vmkeep.ok("backup", "record", f"{machine}-2")
    assert machine in vmkeep.ok("vm", "list")


@pytest.mark.parametrize(
    "thing", ["cluster", "tenant", "namespace", "zone", "group", "pool", "point"]
)
def test_what_the_embedded_default_has(vmkeep: Command, thing: str) -> None:
    assert "default" in vmkeep.ok(thing, "list")
    listed = vmkeep.json(thing, "list")
    assert listed["total_count"] == 1


def test_batches(vmkeep: Command, machine: str, tmp_path: Path) -> None:
    made = vmkeep.json("backup", "batch-create", machine, "--name", f"{machine}-b")
    assert (made["success"], made["fail"]) == (1, 0)
    vmkeep.ok("job", "watch")
    listed = vmkeep.json("backup", "list", "--name", f"{machine}-b")
    rows = listed["list"]
    assert isinstance(rows, list)
    items = tmp_path / "items.json"
    bodies = [{"backup_uuid": rows[0]["uuid"]}, {"backup_uuid": str(uuids.uuid4())}]
    items.write_text(json.dumps({"items": bodies}))
    mixed = vmkeep("backup", "batch-delete", "--file", str(items))
    assert mixed.code == 1
    assert "success" in mixed.out
    assert "backup not found" in mixed.out
    assert mixed.err == "vmkeep: 1 of the batch failed\n"


def test_a_batch_can_be_waited_for(vmkeep: Command, machine: str) -> None:
    vmkeep.ok("backup", "batch-create", machine, "--name", f"{machine}-w", "--wait")
    listed = vmkeep.json("backup", "list", "--name", f"{machine}-w")
    rows = listed["list"]
    assert isinstance(rows, list)
    assert [row["status"] for row in rows] == [0]


@pytest.mark.parametrize("verb", ["verify", "gc", "rebuild"])
def test_upkeep_of_a_point(vmkeep: Command, machine: str, verb: str) -> None:
    vmkeep.ok("backup", "create", machine, "--wait")
    assert "succeeded" in vmkeep.ok("point", verb, "default", "--wait")
    assert "job " in vmkeep.ok("point", verb, "default")
    vmkeep.ok("job", "watch")


def test_the_offline_check(vmkeep: Command, machine: str) -> None:
    vmkeep.ok("backup", "create", machine, "--wait")
    path = str(vmkeep.data / "point")
    assert "no findings" in vmkeep.ok("point", "check", path, "--deep")
    assert vmkeep.json("point", "check", path)["findings"] == []


def test_an_offline_check_says_what_only_a_newer_version_can_check(tmp_path: Path) -> None:
    point = new_point(tmp_path)
    label = Path(open_domain(point, cluster()).paths.label)
    label.unlink()
    label.write_bytes(small_object(b"VKDO", b"of tomorrow", version=2))
    with pytest.raises(Failure, match=f"could not all be checked: {label}: format 2") as caught:
        check_and_tell(Screen(json=False), Path(point.path), deep=False)
    assert caught.value.exit_code == FAILED


def test_an_offline_check_goes_on_where_it_was_interrupted(
    vmkeep: Command, machine: str, tmp_path: Path
) -> None:
    vmkeep.ok("backup", "create", machine, "--wait", "--full")
    volume(vmkeep, machine).write_bytes(random.Random(4).randbytes(4 * MIB))
    vmkeep.ok("backup", "create", machine, "--wait", "--full")
    path, mark = vmkeep.data / "point", tmp_path / "mark"
    one_pack = mock.patch.object(FrameCheck, "damaged", _one_pack(FrameCheck.damaged))
    with one_pack, pytest.raises(KeyboardInterrupt):
        check_and_tell(Screen(json=False), path, deep=True, resume=mark)
    told = vmkeep.ok("point", "check", str(path), "--deep", "--resume", str(mark), "--rate", "1G")
    assert "1 packs had been read before it was interrupted" in told
    told = vmkeep.ok("point", "check", str(path), "--deep", "--resume", str(mark))
    assert "interrupted" not in told


def _one_pack(read: Callable[..., set[int]]) -> Callable[..., set[int]]:
    """Reads one pack, then is Ctrl-C."""
    done: list[bool] = []

    def read_one(*arguments: object) -> set[int]:
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return read(*arguments)

    return read_one


def test_a_flipped_bit_is_found_and_mended_as_the_docs_say(vmkeep: Command, tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Service(data) as service:
        other = Command(service.url, data)
        volume(other, "v").write_bytes(random.Random(3).randbytes(2 * MIB))
        other.ok("vm", "create", "v", "--disk", "sda=default:v")
        other.ok("backup", "create", "v", "--name", "hit", "--wait")
    pack = flip_a_bit(data / "point")
    found = vmkeep("point", "check", str(data / "point"), "--deep")
    assert found.code == 1
    assert pack.name in found.out
    with Service(data) as service:
        other = Command(service.url, data)
        assert other("point", "verify", "default", "--deep", "--wait").code == 1
        assert other("backup", "restore", "hit", "--as", "bad", "--wait").code == 1
        assert not volume(other, "bad-sda").exists()
        left = other.ok("backup", "restore", "hit", "--as", "left", "--allow-damaged", "--wait")
        assert "missing offset=" in left
        other.ok("backup", "create", "v", "--name", "anew", "--full", "--wait")
        for name in ("anew", "hit"):
            other.ok("backup", "restore", name, "--as", f"from-{name}", "--wait")
            assert volume(other, f"from-{name}-sda").read_bytes() == volume(other, "v").read_bytes()
        other.ok("point", "verify", "default", "--deep", "--wait")


def flip_a_bit(point: Path) -> Path:
    """Damages a stored chunk; the pack that it is in."""
    pack = next(iter(point.rglob("packs/*/*")))
    body = bytearray(pack.read_bytes())
    body[MIB] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(body)
    return pack


def test_a_point_is_made_and_detached(vmkeep: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "backup point " in vmkeep.ok("point", "create", "second", str(tmp_path / "empty"))
    assert "second" in vmkeep.ok("point", "list")
    assert "ambiguous" not in vmkeep.ok("point", "inspect", "second")
    vmkeep.ok("point", "delete", "second")
    assert (tmp_path / "empty" / "POINT").exists()
    assert "second" not in vmkeep.ok("point", "list")


def test_what_a_newer_version_keeps_from_being_listed_is_said(
    vmkeep: Command, machine: str
) -> None:
    vmkeep.ok("backup", "create", machine, "--name", "mine", "--wait")
    stranger = str(uuids.uuid4())
    directory = vmkeep.data / "point" / "domains" / stranger
    directory.mkdir()
    (directory / "DOMAIN").write_bytes(small_object(b"VKDO", b"of tomorrow", version=2))
    try:
        for words in (("remote-list",), ("remote-list", "--json"), ("import", "--all")):
            ran = vmkeep("backup", *words)
            assert ran.code == 0
            assert "mine" in ran.out
            assert f"could not be read: {stranger} point_newer_format" in ran.err
    finally:
        shutil.rmtree(directory)


def test_another_cluster_imports(vmkeep: Command, machine: str, tmp_path: Path) -> None:
    vmkeep.ok("backup", "create", machine, "--name", f"{machine}-far", "--wait")
    with Service(tmp_path / "two") as service:
        two = Command(service.url, tmp_path / "two")
        two.ok("point", "create", "shared", str(vmkeep.data / "point"))
        assert f"{machine}-far" in two.ok("backup", "remote-list", "--point", "shared")
        assert f"{machine}-far" in two.ok("backup", "import", "--all", "--point", "shared")
        two.ok("backup", "restore", f"{machine}-far", "--as", "here", "--wait")
        assert volume(two, "here-sda").read_bytes() == volume(vmkeep, machine).read_bytes()


def test_jobs_and_operations(vmkeep: Command, machine: str) -> None:
    vmkeep.ok("backup", "create", machine, "--wait")
    listed = vmkeep.json("job", "list")
    rows = listed["list"]
    assert isinstance(rows, list)
    newest = rows[0]
    assert newest["kind"] == "backup"
    assert "succeeded" in vmkeep.ok("job", "inspect", newest["job_uuid"])
    assert newest["job_uuid"] in vmkeep.ok("job", "inspect", newest["job_uuid"][:13])
    assert "succeeded" in vmkeep.ok("job", "watch", newest["job_uuid"])
    assert vmkeep("job", "cancel", newest["job_uuid"]).code == 4
    assert "compute/backup/create" in vmkeep.ok("operation", "list")


def test_the_openapi_document(vmkeep: Command) -> None:
    assert "/v1/compute/backup/create" in json.loads(vmkeep.ok("openapi"))["paths"]


def test_a_vm_is_deleted_with_its_volumes_when_told_so(vmkeep: Command, machine: str) -> None:
    asked = vmkeep("vm", "delete", machine, "--volumes")
    assert asked.code == 1, "nobody there to confirm"
    assert volume(vmkeep, machine).exists()
    vmkeep.ok("vm", "delete", machine, "--volumes", "--yes")
    assert not volume(vmkeep, machine).exists()


def test_waiting_for_a_job_that_fails_is_exit_code_1(vmkeep: Command, machine: str) -> None:
    volume(vmkeep, machine).unlink()
    failed = vmkeep("backup", "create", machine, "--wait")
    assert failed.code in (1, 4, 5)
    if failed.code == 1:
        assert failed.err.startswith("vmkeep: backup failed: ")


@pytest.mark.parametrize(
    "words",
    [
        ("backup", "create"),
        ("backup", "list", "--since", "yesterday"),
        ("vm", "create", "x", "--disk", "nonsense"),
        ("nonsense",),
        ("backup", "import"),
        ("backup", "batch-create"),
        ("point", "check", "/nonexistent"),
    ],
)
def test_wrong_usage_is_exit_code_2(vmkeep: Command, words: tuple[str, ...]) -> None:
    assert vmkeep(*words).code == 2


def test_nobody_there_is_exit_code_3(vmkeep: Command) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ran = vmkeep("vm", "list", "--server", url)
    assert ran.code == 3
    assert ran.err == f"vmkeep: no answer from {url}: Connection refused\n"


@pytest.mark.parametrize("server", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://["])
def test_what_is_no_address_of_a_server_is_told_so(vmkeep: Command, server: str) -> None:
    ran = vmkeep("vm", "list", "--server", server)
    assert ran.code == 3
    assert ran.err == f"vmkeep: {server} is not an address such as http://127.0.0.1:8080\n"


def test_a_refusal_is_exit_code_4_in_one_line(vmkeep: Command) -> None:
    uuid = str(uuids.uuid4())
    ran = vmkeep("backup", "inspect", uuid)
    assert (ran.code, ran.out) == (4, "")
    assert ran.err.startswith("vmkeep: backup not found: ")
    assert ran.err.endswith("(scode 40408)\n")
    assert ran.err.count("\n") == 1


def test_a_refusal_as_json_is_the_envelope(vmkeep: Command) -> None:
    ran = vmkeep("backup", "inspect", str(uuids.uuid4()), "--json")
    assert ran.code == 4
    assert ran.document["scode"] == 40408


def test_a_directory_that_is_no_point_is_exit_code_5(vmkeep: Command, tmp_path: Path) -> None:
    assert vmkeep("point", "check", str(tmp_path)).code == 5


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>a proxy</html>",
        b'{"scode": 50000, "desc": "", "message": "oops", '
        b'"message_cn": "", "stack": null, "data": null}',
    ],
)
def test_a_server_that_fails_is_exit_code_5(
    vmkeep: Command, failing_server: Callable[[bytes], str], answer: bytes
) -> None:
    ran = vmkeep("vm", "list", "--server", failing_server(answer))
    assert ran.code == 5
    assert ran.err.count("\n") == 1


@pytest.fixture
def failing_server() -> Iterator[Callable[[bytes], str]]:
    """A server that answers everything with HTTP 500 and this body."""
    servers: list[HTTPServer] = []

    def start(body: bytes) -> str:
        class Failing(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(500)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        server = HTTPServer(("127.0.0.1", 0), Failing)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
