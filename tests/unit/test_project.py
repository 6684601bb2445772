"""The files around the code: locks, package list, service file, configuration, README."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from msgspec.structs import replace
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from api import server
from api.cli import cli, exits
from engine.config import Limits, load_config

ROOT = Path(__file__).parent.parent.parent
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# Packages whose docstring says what is in each module.
MAPPED = (
    "engine",
    "engine/points",
    "engine/snapshot",
    "storage/domain",
    "storage/files",
    "storage/format",
    "storage/view",
)
DOCUMENTS = (
    "README.md",
    "docs/design.md",
    "docs/operations.md",
    "docs/reliability.md",
    "docs/benchmarks.md",
)


def pinned(lock: Path) -> dict[str, str]:
    pins = re.findall(r"^([a-z0-9-]+)==(\S+) \\$", lock.read_text(), re.MULTILINE)
    assert pins, lock
    return dict(pins)


def needed_by(name: str, python: str) -> set[str]:
    """What a package needs on a version of Python, by its metadata."""
    on = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    wanted = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return {
        canonicalize_name(requirement.name)
        for requirement in wanted
        if requirement.marker is None or requirement.marker.evaluate(on)
    }


def test_there_is_a_lock_for_each_purpose() -> None:
    assert [lock.name for lock in LOCKS] == [
        "check.txt",
        "libvirt.txt",
        "runtime.txt",
        "test.txt",
    ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_name_no_registry_and_no_path_of_a_machine(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"https?://|file://", text)
    assert not re.search(r"^--", text, re.MULTILINE), "an option, such as --index-url"
    assert not re.search(r"(^|[ =])/[a-z]", text, re.MULTILINE)
    assert str(ROOT) not in text


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_pin_has_hashes(lock: Path) -> None:
    for block in re.split(r"\n(?=[a-z0-9-]+==)", lock.read_text())[1:]:
        assert block.count("--hash=sha256:") >= 1, block.splitlines()[0]


def test_the_locks_agree_with_one_another() -> None:
    runtime, test, check = (
        pinned(ROOT / "requirements" / f"{purpose}.txt") for purpose in ("runtime", "test", "check")
    )
    assert runtime.items() <= test.items() <= check.items()
    assert runtime.items() <= pinned(ROOT / "requirements" / "libvirt.txt").items()


def test_the_runtime_lock_holds_what_pyproject_asks_for() -> None:
    pins = pinned(ROOT / "requirements" / "runtime.txt")
    for text in [*PYPROJECT["project"]["dependencies"], *PYPROJECT["build-system"]["requires"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[wanted.name]), text


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("purpose", ["runtime", "test"])
def test_no_version_of_python_needs_a_package_that_is_not_pinned(purpose: str, python: str) -> None:
    pins = pinned(ROOT / "requirements" / f"{purpose}.txt")
    assert {
        f"{name} needs {other}" for name in pins for other in needed_by(name, python) - pins.keys()
    } == set()


def test_every_folder_is_a_package() -> None:
    """Else setuptools, which is to find them, leaves it out of an installation."""
    found = {
        str(init.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("storage", "engine", "api")
        for init in (ROOT / top).rglob("__init__.py")
    }
    folders = {
        str(module.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("storage", "engine", "api")
        for module in (ROOT / top).rglob("*.py")
    }
    assert found == folders


@pytest.mark.parametrize("package", MAPPED)
def test_a_map_of_a_package_has_all_of_its_modules(package: str) -> None:
    folder = ROOT / package
    told = re.findall(r"\w+", (folder / "__init__.py").read_text())
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", *told} == set()


def test_the_service_file_is_sound(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = (ROOT / "deploy" / "vmkeep.service").read_text()
    assert "Type=notify" in unit
    installed = tmp_path / "vmkeep.service"
    installed.write_text(unit.replace("/opt/vmkeep/bin/vmkeep", sys.executable))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(installed)], capture_output=True, text=True, check=False
    )
    assert (verified.stdout + verified.stderr, verified.returncode) == ("", 0)


def test_the_service_file_uses_options_that_serve_has() -> None:
    unit = (ROOT / "deploy" / "vmkeep.service").read_text()
    line = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert set(re.findall(r"--[a-z-]+", line)) <= options_of(["serve"])


def test_the_service_file_knows_what_serve_needs() -> None:
    unit = dict(
        line.split("=", 1)
        for line in (ROOT / "deploy" / "vmkeep.service").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    assert int(unit["RestartPreventExitStatus"]) == exits.USAGE
    most_cores = 1024
    assert int(unit["TasksMax"]) > Limits().max_jobs * (most_cores + 1)
    assert int(unit["LimitNOFILE"]) == server.MOST_FILES


def test_the_example_configuration_is_one() -> None:
    path = ROOT / "deploy" / "vmkeep.toml"
    config = load_config(str(path))
    assert [pool.name for pool in config.pools] == ["default"]
    assert [point.name for point in config.points] == ["default"]


def test_the_example_configuration_shows_the_defaults(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.touch()
    defaults = load_config(str(empty))
    shown = load_config(str(ROOT / "deploy" / "vmkeep.toml"))
    assert replace(shown, pools=(), points=()) == defaults


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md", "CHANGELOG.md"])
def test_documented_commands_exist(document: str) -> None:
    """Every `vmkeep …` line of the docs: the command is there, and has the options."""
    commands = documented_commands((ROOT / document).read_text())
    assert commands or document == "CHANGELOG.md"
    for words in commands:
        assert set(re.findall(r"--[a-z-]+", " ".join(words))) <= options_of(words), words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_files_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(
        r"\b((?:storage|engine|api|docs|deploy|bench|tests|requirements)/[\w./-]+\w)", text
    )
    missing = {name for name in named if not (ROOT / name).exists()}
    assert missing == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_modules_exist(document: str) -> None:
    """Whatever `python -m` is told to run of ours."""
    named = re.findall(r"python -m ((?:tests|bench)(?:\.\w+)*)", (ROOT / document).read_text())
    paths = [ROOT.joinpath(*name.split(".")) for name in named]
    assert all(path.is_dir() or path.with_suffix(".py").exists() for path in paths), named


def test_documented_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for document in (
        "README.md",
        "docs/operations.md",
        "docs/adr/0002-plain-top-level-packages.md",
    ):
        for target in re.findall(r"`make ([a-z-]+)", (ROOT / document).read_text()):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def documented_commands(text: str) -> list[list[str]]:
    blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = re.findall(
        r"^(?:\$ )?(?:\.venv/bin/)?vmkeep (?!\d)(.*?)(?:\s+#.*)?(?: &)?$", blocks, re.MULTILINE
    )
    return [part.removeprefix("vmkeep ").split() for line in lines for part in line.split(" && ")]


def options_of(words: list[str]) -> set[str]:
    """The options of the command that these words name. Fails when there is no such command."""
    command: click.Command = cli
    for word in words:
        if not isinstance(command, click.Group):
            break
        if word.startswith("-"):
            break
        assert word in command.commands, f"no command {words}"
        command = command.commands[word]
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return {*names, "--help", "--version"}
