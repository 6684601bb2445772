"""A caller's side of the HTTP API: one connection, typed answers, errors by whose fault they are.

Synchronous on the outside, for the command line and the demo; aiohttp inside, in an event loop of
its own. Not for threads. Requests and answers are the Structs of api.schemas*; a newer server's
unknown members are ignored, and kept in `Reply.raw`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

import aiohttp
import msgspec

from api.envelope import Output
from api.schemas import Request

AnswerT = TypeVar("AnswerT")

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 900.0  # an import copies packs where the point has no hard links

_ENVELOPE = msgspec.json.Decoder(Output[msgspec.Raw])


class ServerUnreachable(Exception):
    """Nobody answered there, or what answered went away. The call may or may not have been done."""


class NotVmkeep(Exception):
    """Something answered, but not with the envelope of this API."""


class CallFailed(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, output: Output[msgspec.Raw], raw: bytes) -> None:
        super().__init__(_sentence(output))
        self.status = status
        self.output = output
        self.raw = raw


@dataclass(frozen=True, slots=True)
class Reply(Generic[AnswerT]):
    """A successful answer: `data` decoded, `raw` as it was sent, and the HTTP headers."""

    data: AnswerT
    raw: bytes
    headers: Mapping[str, str]


class Client:
    """A connection to one server, such as `http://127.0.0.1:8080`. A context manager.

    Every call raises ServerUnreachable, NotVmkeep or CallFailed; nothing is tried twice.
    """

    def __init__(self, server: str) -> None:
        self.server = server.rstrip("/")
        self._loop = asyncio.Runner()
        self._http: aiohttp.ClientSession | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        if self._http is not None:
            self._loop.run(self._http.close())
        self._loop.close()

    def get(self, call: str, answer: type[AnswerT], query: Request | None = None) -> Reply[AnswerT]:
        """GET /v1/<call>. Members of `query` that say nothing ("", 0, False) are not sent."""
        sent = {} if query is None else _query(query)
        return _reply(self._loop.run(self._ask("GET", f"/v1/{call}", sent, None)), answer)

    def post(self, call: str, answer: type[AnswerT], body: Request) -> Reply[AnswerT]:
        """POST /v1/<call> with a JSON body."""
        sent = msgspec.json.encode(body)
        return _reply(self._loop.run(self._ask("POST", f"/v1/{call}", {}, sent)), answer)

    def text(self, path: str) -> str:
        """GET of a path that answers without an envelope, such as /openapi.json."""
        status, body, _ = self._loop.run(self._ask("GET", path, {}, None))
        if status != 200:
            raise NotVmkeep(f"{self.server}{path} answered with HTTP {status}")
        return body.decode()

    async def _ask(
        self, method: str, path: str, query: Mapping[str, str], body: bytes | None
    ) -> tuple[int, bytes, Mapping[str, str]]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with self._session().request(
                method, self.server + path, params=query, data=body, headers=headers
            ) as answer:
                return answer.status, await answer.read(), answer.headers
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            what = "is not an address such as http://127.0.0.1:8080"
            raise ServerUnreachable(f"{self.server} {what}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerUnreachable(f"no answer from {self.server}: {_reason(error)}") from error

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            limits = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=ANSWER_TIMEOUT_S
            )
            self._http = aiohttp.ClientSession(timeout=limits)
        return self._http


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno:
        return os.strerror(error.os_error.errno)
    return str(error) or type(error).__name__


def _query(query: Request) -> dict[str, str]:
    members: dict[str, object] = msgspec.to_builtins(query)
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in members.items()
        if value
    }


def _reply(answered: tuple[int, bytes, Mapping[str, str]], answer: type[AnswerT]) -> Reply[AnswerT]:
    status, body, headers = answered
    try:
        output = _ENVELOPE.decode(body)
        if output.scode != 0 or status >= 400:
            raise CallFailed(status, output, body)
        raw = bytes(output.data)
        return Reply(msgspec.json.decode(raw, type=answer), raw, headers)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotVmkeep(f"HTTP {status}, but not an answer of vmkeep: {error}") from error


def _sentence(output: Output[msgspec.Raw]) -> str:
    detail = f": {output.desc}" if output.desc else ""
    return f"{output.message}{detail} (scode {output.scode})"
