"""Exit codes of `vmkeep`, and what stands behind each. Scripts rely on them: they never change."""

from __future__ import annotations

from api.printable import one_line

OK = 0
FAILED = 1  # the operation failed, a check found something, or Ctrl-C
USAGE = 2  # the command line, or the configuration file, is wrong
UNREACHABLE = 3  # no server there
REFUSED = 4  # the server refused: HTTP 4xx
BROKEN = 5  # the server, a point or a pool is at fault: HTTP 5xx

EPILOG = """\b
Exit codes:
  0  done
  1  the operation failed, or a check found something
  2  wrong usage or configuration
  3  the server can't be reached
  4  the server refused (no such thing, busy, taken, ...)
  5  the server, a backup point or a pool has a problem
"""


class Failure(Exception):
    """Ends the command with one line on stderr and this exit code."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(one_line(" ".join(message.split())))
        self.exit_code = exit_code


def of_status(status: int) -> int:
    """The exit code for an HTTP status."""
    return REFUSED if 400 <= status < 500 else BROKEN
