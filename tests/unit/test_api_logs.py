"""Log lines: an event with fields, never more than a line that a caller could forge."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

from api.logs import JsonLines, TextLines


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
