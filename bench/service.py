"""A real `vmkeep serve` as a child process: for the demo, the soaks, benchmarks and tests."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from bench.lab import peak_bytes

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
RESTING_CPU_S = 0.1
REST_TIMEOUT_S = 60.0

SERVE = (sys.executable, "-m", "api.cli", "serve", "--log-format", "text")

_LISTENING = re.compile(r"http://[0-9.:\[\]a-f]+:\d+")


class Service:
    """Started by the constructor; on return it listens at `url`. A context manager that stops it.

    Its output goes to `output`, line by line, and on to the file `log`. Raises RuntimeError with
    that output when it ends before it listens.
    """

    def __init__(
        self,
        data: Path,
        *options: str,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.output: list[str] = []
        self._log = log
        self._child = subprocess.Popen(
            [*SERVE, "--data", str(data), "--listen", "127.0.0.1:0", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=Path(__file__).parent.parent,
        )
        self._address: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.url = self._address.get(timeout=START_TIMEOUT_S)
        except queue.Empty:
            self.url = ""
        if not self.url:
            self.kill()
            raise RuntimeError("the service did not start:\n" + "\n".join(self.output))

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._child.poll() is None:
            self.stop()

    @property
    def pid(self) -> int:
        return self._child.pid

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """The exit code. Killed, and TimeoutExpired raised, if it takes too long."""
        self._child.send_signal(how)
        try:
            return self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._reader.join(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """SIGKILL: as a power failure is for it."""
        self._child.kill()
        self._child.wait()
        self._reader.join(STOP_TIMEOUT_S)

    def peak_memory_bytes(self) -> int:
        """The largest resident size so far, memory-mapped files included."""
        return peak_bytes(self.pid)

    def memory_bytes(self) -> tuple[int, int]:
        """(resident now, memory-mapped files included; of that its own)."""
        sizes = {}
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("VmRSS", "RssAnon"):
                sizes[name] = int(rest.split()[0]) << 10
        return sizes["VmRSS"], sizes["RssAnon"]

    def await_rest(self) -> None:
        """Until it has used next to no processor time for a second."""
        deadline_s = time.monotonic() + REST_TIMEOUT_S
        before_s = -1.0
        while (used_s := _cpu_s(self.pid)) - before_s > RESTING_CPU_S:
            if time.monotonic() > deadline_s:
                raise RuntimeError("the service does not come to rest")
            before_s = used_s
            time.sleep(1.0)

    def _read(self) -> None:
        assert self._child.stdout is not None
        with self._child.stdout as lines:
            for line in lines:
                self._take(line)
        self._address.put("")

    def _take(self, line: str) -> None:
        self.output.append(line.rstrip("\n"))
        if self._log is not None:
            with self._log.open("a") as log:
                log.write(line)
        if (found := _LISTENING.search(line)) is not None:
            self._address.put(found.group())


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
