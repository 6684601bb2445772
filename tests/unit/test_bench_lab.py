"""What questions work with: measured commands, pairs in turns, discovery, failing questions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import machine
from bench.lab import CommandFailed, Cost, Lab, descendants, measured, series, tree_bytes, warm
from bench.results import Note, Result
from bench.runner import Question, ask, questions

MIB = 1 << 20


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(full=False, cache=tmp_path, work=tmp_path, repeats=3, cores=2)


def test_the_peak_is_that_of_the_whole_tree() -> None:
    """Two processes that hold 64 MiB each at the same time; the parent alone holds less."""
    hold = "import sys; held = b'x' * (64 << 20); print('here', flush=True); sys.stdin.read()"
    parent = (
        "import subprocess, sys\n"
        f"children = [subprocess.Popen([sys.executable, '-c', {hold!r}], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE) for _ in range(2)]\n"
        "for child in children: child.stdout.readline()\n"
        "import time; time.sleep(0.2)\n"
        "for child in children: child.communicate()\n"
        "print('done')"
    )
    cost, output = measured([sys.executable, "-c", parent])
    assert output == "done\n"
    assert cost.peak_bytes > 128 * MIB
    assert cost.elapsed_s > cost.cpu_s / 2 > 0


def test_a_command_that_fails_is_an_error_with_its_words() -> None:
    with pytest.raises(CommandFailed, match="exit 3: oh no"):
        measured([sys.executable, "-c", "import sys; print('oh no', file=sys.stderr); sys.exit(3)"])


def test_nothing_is_below_a_process_that_is_not_there() -> None:
    assert descendants(2**22 + 1) == []


def test_acts_are_done_in_turns_and_no_one_always_goes_first(lab: Lab) -> None:
    done: list[str] = []

    def act(who: str) -> Cost:
        done.append(who)
        return Cost(len(done))

    costs = lab.interleave({"a": lambda: act("a"), "b": lambda: act("b")})
    assert done == ["a", "b", "b", "a", "a", "b"]
    assert [cost.elapsed_s for cost in costs["a"]] == [1, 4, 5]


def test_scratch_is_gone_afterwards(lab: Lab) -> None:
    with lab.scratch() as path:
        (path / "file").write_bytes(b"x" * 5000)
        assert tree_bytes(path) >= 5000
        warm(path / "file")
    assert not path.exists()


def test_only_what_was_measured_becomes_a_series() -> None:
    found = list(series("w", {"a": [Cost(1.0, peak_bytes=5)], "b": [Cost(2.0)]}))
    assert [(one.what, one.who, one.unit, one.values) for one in found] == [
        ("w", "a", "s", (1.0,)),
        ("w", "b", "s", (2.0,)),
        ("w: peak memory", "a", "B", (5.0,)),
    ]


def test_a_question_that_fails_keeps_what_it_had(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Lab) -> Iterator[Result]:
        yield Note("first")
        raise RuntimeError("broken")

    answer = ask(Question("name", "why?", run), lab)
    assert (answer.results, answer.error) == ((Note("first"),), "RuntimeError: broken")
    assert "broken" in capsys.readouterr().err


def test_every_question_has_a_text_and_a_name_of_its_own() -> None:
    found = questions()
    assert all(question.text and question.text == question.text.strip() for question in found)
    assert len({question.name for question in found}) == len(found)


def test_the_file_system_is_that_of_the_longest_mount_and_the_last_one_there(
    tmp_path: Path,
) -> None:
    mounts = (
        f"x / ext4 rw 0 0\nx {tmp_path} xfs rw 0 0\nx {tmp_path} btrfs rw 0 0\n"
        f"x {tmp_path}/other nfs rw 0 0\n"
    )
    assert machine.file_system(tmp_path, mounts) == "btrfs"
    assert machine.file_system(Path("/"), mounts) == "ext4"


def test_the_description_names_no_host() -> None:
    import platform

    here = machine.describe(Path("/"))
    assert here.cores > 0
    assert here.memory_bytes > 1 << 28
    assert platform.node() not in (here.cpu, here.kernel, here.file_system)
