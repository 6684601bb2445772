"""Log lines: an event with fields, never more than a line that a caller could forge."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.logs import JsonLines, TextLines

ROOT = Path(__file__).parent.parent.parent
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}


def _record(message: str, **fields: object) -> logging.LogRecord:
    logger = logging.getLogger("engine.jobs.jobs")
    return logger.makeRecord(logger.name, logging.INFO, "file", 1, message, (), None, extra=fields)


def test_text_is_one_line_with_fields() -> None:
    line = TextLines().format(_record("job_ended", job="j", state="failed"))
    assert line.endswith("Z INFO engine.jobs.jobs job_ended job=j state=failed")


def test_a_callers_text_forges_no_line_and_no_escape() -> None:
    line = TextLines().format(_record("call", desc="a\n2026 INFO \x1b[31m"))
    assert "\n" not in line
    assert "\x1b" not in line


def test_it_is_told_that_no_file_may_be_opened_any_more() -> None:
    program = """
import resource
from api.printable import one_line
resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
print(one_line("a\\nb"))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert ran.stdout == b"a\\nb\n"


def test_json_is_an_object_a_line() -> None:
    line = JsonLines().format(_record("call", desc="a\nb", error=ValueError("x"), scode=0))
    assert "\n" not in line
    read = json.loads(line)
    assert (read["event"], read["desc"], read["error"], read["scode"]) == ("call", "a\nb", "x", 0)
    assert read["level"] == "INFO"


def test_a_traceback_is_told() -> None:
    record = _record("broken")
    try:
        raise KeyError("x")
    except KeyError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    assert "KeyError" in json.loads(JsonLines().format(record))["trace"]
    assert "KeyError" in TextLines().format(record)


def test_lone_surrogates_do_not_break_a_line() -> None:
    assert json.loads(JsonLines().format(_record("call", path="/srv/\udcff")))["path"]


def _log_calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """(method, call) of what a module logs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            if method in LEVELS and ast.unparse(node.func.value) == "log":
                yield method, node


def _is_event(words: list[ast.expr]) -> bool:
    """Whether the arguments are a bare name and nothing else."""
    match words:
        case [ast.Constant(value=str(text))]:
            return re.fullmatch("[a-z0-9_]+", text) is not None
    return False


def _fields(tree: ast.Module, call: ast.Call) -> Iterator[str]:
    """The names in `extra`: a literal, or a variable, then in all literals that it is set to."""
    for given in (word.value for word in call.keywords if word.arg == "extra"):
        named = ast.unparse(given)
        sets = (node for node in ast.walk(tree) if isinstance(node, ast.Assign))
        found = [given, *(node.value for node in sets if ast.unparse(node.targets[0]) == named)]
        literals = [each for each in found if isinstance(each, ast.Dict)]
        assert literals, f"line {call.lineno}: which fields?"
        yield from (ast.literal_eval(key) for each in literals for key in each.keys if key)


@pytest.mark.parametrize("top", ["storage", "engine", "api"])
def test_what_is_logged_is_an_event_with_fields(top: str) -> None:
    """A name to look for, and no field that hides one of the line's own or that logging refuses."""
    plain = _record("plain")
    taken = {*vars(plain), "message", "asctime", *json.loads(JsonLines().format(plain)), "trace"}
    found, wrong = 0, []
    for module in sorted((ROOT / top).rglob("*.py")):
        tree = ast.parse(module.read_text())
        for method, call in _log_calls(tree):
            found += 1
            event = call.args[1:] if method == "log" else call.args
            if not _is_event(event) or taken.intersection(_fields(tree, call)):
                wrong.append(f"{module.relative_to(ROOT)}:{call.lineno} {ast.unparse(call)}")
    assert found
    assert wrong == []
