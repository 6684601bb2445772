"""The service's own log: an event name with fields, a line each, to standard error.

`log.info("backup_deleted", extra={"backup": uuid})` becomes
`2026-01-02T03:04:05Z INFO engine.backup.deletion backup_deleted backup=…`, or a JSON object a line.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from api.printable import one_line

_OWN = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}


def set_up(*, json_lines: bool, level: str = "INFO") -> None:
    """Replaces what the root logger does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else TextLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # It tells a traceback for whatever isn't HTTP. All that is ours, api.app catches.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


class TextLines(logging.Formatter):
    """One line for a person; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname, record.name, one_line(record.getMessage())]
        words += [f"{name}={one_line(str(value))}" for name, value in fields(record).items()]
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return "\n".join([" ".join(words), *map(one_line, trace.splitlines())])


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        line.update(fields(record))
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # ASCII: whatever a path holds, a line comes out


def fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _OWN}


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
