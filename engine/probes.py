"""Asking a medium that may hang (an NFS mount), without ever hanging oneself.

The question runs in a thread of its own. Only one is under way for a key: whoever asks meanwhile
waits for the same answer, so a medium that hangs holds one thread, not one per request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TypeVar, cast

AnswerT = TypeVar("AnswerT")


class Probes:
    """Bounded questions. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[str, Future[object]] = {}

    def ask(self, key: str, question: Callable[[], AnswerT], timeout_s: float) -> AnswerT:
        """What `question()` returns or raises; TimeoutError if it does neither in time.

        Everybody who uses a `key` must ask the same question under it. RuntimeError when the system
        has no thread for it.
        """
        answer = self._begun(key, question)
        try:
            return cast(AnswerT, answer.result(timeout_s))
        except FutureTimeoutError:
            if answer.done():
                raise
            raise TimeoutError(f"no answer in {timeout_s:g} s") from None

    def ask_each(
        self, questions: Mapping[str, Callable[[], AnswerT]], timeout_s: float
    ) -> dict[str, AnswerT | Exception]:
        """What `ask` returns or raises, for each key. All are asked at once: that takes `timeout_s`
        at most, however many hang."""
        deadline_s = time.monotonic() + timeout_s
        answers = [self._begun(key, question) for key, question in questions.items()]
        wait(answers, deadline_s - time.monotonic())
        found: dict[str, AnswerT | Exception] = {}
        for key, answer in zip(questions, answers, strict=True):
            if not answer.done():
                found[key] = TimeoutError(f"no answer in {timeout_s:g} s")
            elif isinstance(error := answer.exception(), Exception):
                found[key] = error
            else:
                found[key] = cast(AnswerT, answer.result())
        return found

    def _begun(self, key: str, question: Callable[[], object]) -> Future[object]:
        with self._lock:
            answer = self._asked.get(key)
            if answer is None:
                answer = Future()
                args = (key, question, answer)
                threading.Thread(target=self._run, args=args, name="probe", daemon=True).start()
                self._asked[key] = answer  # now that somebody is going to answer
            return answer

    def _run(self, key: str, question: Callable[[], object], answer: Future[object]) -> None:
        try:
            found = question()
        except BaseException as error:  # noqa: BLE001 - raised where the question was asked
            self._forget(key)
            answer.set_exception(error)
        else:
            self._forget(key)
            answer.set_result(found)

    def _forget(self, key: str) -> None:
        with self._lock:
            del self._asked[key]
