"""Freezing a VM's file systems for the instant of a snapshot, and never longer.

The operator names a command; we run `COMMAND freeze VM_UUID` and `COMMAND thaw VM_UUID`, without a
shell. Between the two stands a watchdog, a child process that holds the other end of a pipe: when
the pipe closes without a word (we were killed), or when `hold_s` has passed (a clone takes
too long), it runs the thaw by itself. It ignores the signals that a service manager sends to all of
a service. So no failure of ours leaves a VM frozen, and none keeps it so for long. Where the thaw
of a frozen VM fails, as when the hypervisor's daemon is away, the watchdog asks for it again and
again, and the backup waits for that.

A freeze that fails is no reason not to back up: the snapshot is then what a power cut would leave,
and says so in its notes.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

log = logging.getLogger(__name__)

_THAW_ATTEMPTS = 3
_THAW_FOR_S = 120.0  # how long the watchdog tries to thaw what is frozen for sure, or may be
_FROZE_TOO_LONG, _NOT_THAWED = 3, 4  # exit statuses

# Small on purpose: it is started for each backup. argv: hold_s timeout_s patience_s command...
# It is told f when the VM is frozen, d when it is thawed again, o to try the thaw once: the VM was
# not frozen as far as is known.
_WATCHDOG = f"""
import select, signal, subprocess, sys, os, time
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
os.write(1, b"r")
hold, limit, trying = (float(number) for number in sys.argv[1:4])
late = True
for patience in (limit + 1, hold):
    if not select.select([0], [], [], patience)[0]:
        break
    word = os.read(0, 1)
    if word == b"d":
        sys.exit(0)
    if word == b"o":
        trying = 0
    if word != b"f":
        late = False
        break
end = time.monotonic() + trying
while True:
    try:
        no = subprocess.DEVNULL
        if subprocess.run(sys.argv[4:], timeout=limit, stdin=no, stdout=no).returncode == 0:
            break
    except (OSError, subprocess.TimeoutExpired):
        pass
    if time.monotonic() >= end:
        sys.exit({_NOT_THAWED})
    time.sleep(0.5)
sys.exit({_FROZE_TOO_LONG} if late else 0)
"""


@dataclass(frozen=True, slots=True)
class FreezeHook:
    """How to freeze one VM. No `command`: nothing is frozen.

    `timeout_s` limits each run of the command, `hold_s` the time between freeze and thaw. `inside`
    does what the command does, without a process: given the verb, it says why it failed, or "".
    The command is then the watchdog's only. `go_on` is called when no thaw succeeded, the
    watchdog's included: it goes on trying, and returns at once.
    """

    command: Sequence[str] = ()
    vm_uuid: str = ""
    timeout_s: float = 10.0
    hold_s: float = 10.0
    inside: Callable[[str], str] | None = None
    go_on: Callable[[], None] | None = None


NO_HOOK = FreezeHook()


@dataclass(slots=True)
class Freeze:
    """What came of it. `held` and `notes` are final once the `frozen` block has ended."""

    held: bool = False
    held_s: float = 0.0  # from asking for the freeze to the end of the thaw
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def frozen(hook: FreezeHook) -> Iterator[Freeze]:
    """The VM is frozen inside the block, as far as its hook can do it. The thaw always runs."""
    freeze = Freeze()
    watchdog = _start_watchdog(hook, freeze) if hook.command else None
    if watchdog is None:
        yield freeze
        return
    began_s = time.monotonic()
    try:
        freeze.held = _run(hook, "freeze")
        if freeze.held:
            _tell(watchdog, b"f")
        if not freeze.held:
            freeze.notes.append("freeze failed: the snapshot is crash-consistent")
        yield freeze
    finally:
        thawed = _thaw(hook)
        freeze.held_s = time.monotonic() - began_s if freeze.held else 0.0
        word = b"d" if thawed else b"" if freeze.held else b"o"
        outcome = _dismiss(watchdog, word, hook)
        if outcome == _FROZE_TOO_LONG and freeze.held:
            freeze.held = False
            freeze.notes.append(
                f"thawed after {hook.hold_s:g} s, before the snapshot was complete: "
                "the snapshot is crash-consistent"
            )
        if not thawed and outcome == 0:
            freeze.notes.append("thawed late: the thaw failed at first")
        elif not thawed:
            freeze.notes.append("thaw failed: the VM may still be frozen")
            log.error("thaw_failed", extra={"vm": hook.vm_uuid})
            if hook.go_on is not None:
                hook.go_on()


def _run(hook: FreezeHook, verb: str) -> bool:
    """Whether it was done; why not goes to the log."""
    why = hook.inside(verb) if hook.inside else _run_command(hook, verb)
    if why:
        log.warning("freeze_hook_failed", extra={"verb": verb, "vm": hook.vm_uuid, "why": why})
    return not why


def _run_command(hook: FreezeHook, verb: str) -> str:
    """Why the command failed, or ""."""
    # A file and not a pipe: what the command leaves running in the background may hold it open.
    with tempfile.TemporaryFile() as complaints:
        try:
            status = subprocess.run(
                [*hook.command, verb, hook.vm_uuid],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=complaints,
                timeout=hook.timeout_s,
                check=False,
            ).returncode
            if status:
                complaints.seek(0)
                return f"exit status {status}: {complaints.read(500).decode(errors='replace')}"
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    return ""


def _thaw(hook: FreezeHook) -> bool:
    return any(_run(hook, "thaw") for _ in range(_THAW_ATTEMPTS))


def _start_watchdog(hook: FreezeHook, freeze: Freeze) -> subprocess.Popen[bytes] | None:
    """The watchdog, once it is ready. None if there can be none: then nothing must be frozen."""
    limits = [str(hook.hold_s), str(hook.timeout_s), str(_THAW_FOR_S)]
    argv = [sys.executable, "-ISc", _WATCHDOG, *limits, *hook.command, "thaw", hook.vm_uuid]
    try:
        watchdog = subprocess.Popen(
            argv,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        log.error("freeze_watchdog_failed", extra={"vm": hook.vm_uuid, "why": str(error)})
        freeze.notes.append("not frozen: no watchdog could be started")
        return None
    assert watchdog.stdout is not None
    with watchdog.stdout as ready:
        if ready.read(1) == b"r":
            return watchdog
    _dismiss(watchdog, b"d", hook)
    freeze.notes.append("not frozen: the watchdog did not start")
    return None


def _tell(watchdog: subprocess.Popen[bytes], word: bytes) -> None:
    assert watchdog.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it gave up waiting, which its exit status says
        watchdog.stdin.write(word)


def _dismiss(watchdog: subprocess.Popen[bytes], word: bytes, hook: FreezeHook) -> int | None:
    """Ends the watchdog, whose last word this is; with b"" it thaws. Returns its exit status."""
    assert watchdog.stdin is not None
    _tell(watchdog, word)
    watchdog.stdin.close()
    try:
        return watchdog.wait(_THAW_FOR_S + hook.timeout_s + 5)
    except subprocess.TimeoutExpired:
        watchdog.kill()
        return watchdog.wait()
