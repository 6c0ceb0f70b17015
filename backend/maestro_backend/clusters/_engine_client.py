"""Asks an OpenAI-compatible engine and takes the time of every piece of its answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Any, Self

import httpx

from maestro_agents.protocol import ConfigError

_PATIENCE_S = 300.0
_NOT_HERE = (404, 405)
_REFUSED = (400, 422)


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer. `sent` and `pieces` are monotonic seconds; a piece may hold several tokens."""

    sent: float
    pieces: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int

    @property
    def first_s(self) -> float:
        return self.pieces[0] - self.sent


class EngineClient:
    """One model of a server at `url` (with /v1). Use it as an async context manager.

    Text completions are asked for, or chats where the server has none. Every prompt begins with
    words of its own, so that no prefix cache helps. `key` is sent and never shown.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        seed: int | None = None,
    ) -> None:
        self.model = model
        self._url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            headers=headers, timeout=_PATIENCE_S, limits=limits, transport=transport
        )
        self._random = Random(seed)
        self._path = "/completions"
        self._extras: dict[str, Any] = {"ignore_eos": True}
        self._words_per_token = 0.25
        self._aside = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def longest(self) -> int | None:
        """The context that the server tells of the model, in tokens; None where it tells none.

        Raises:
            ConfigError: no server answers, or it does not serve the model.
        """
        try:
            reply = await self._http.get(f"{self._url}/models")
        except httpx.TransportError as error:
            raise self._silent(error) from error
        if reply.status_code in (401, 403):
            raise ConfigError(f"{self._url} wants a key; name its variable with --api-key-env")
        try:
            served = {entry["id"]: entry for entry in reply.json()["data"]}
        except (KeyError, TypeError, ValueError):
            return None
        if served and self.model not in served:
            known = ", ".join(served)
            raise ConfigError(f"{self._url} does not serve {self.model!r} (it serves: {known})")
        told = served.get(self.model, {}).get("max_model_len")
        return told if isinstance(told, int) else None

    async def learn(self) -> None:
        """Two calls that warm the engine up and tell how many tokens a word has."""
        short = await self._asked(8, 2)
        long = await self._asked(72, 2)
        more = max(1, long.prompt_tokens - short.prompt_tokens)
        self._words_per_token = 64 / more
        self._aside = max(0.0, short.prompt_tokens - 8 / self._words_per_token)

    async def ask(self, prompt_tokens: int, output_tokens: int) -> Timed:
        """One call with a prompt of about so many tokens, and the times of its answer."""
        words = (prompt_tokens - self._aside) * self._words_per_token
        return await self._asked(max(1, round(words)), output_tokens)

    async def _asked(self, words: int, output_tokens: int) -> Timed:
        prompt = " ".join(f"{self._random.randrange(16**6):06x}" for _ in range(words))
        while True:
            body = {
                "model": self.model,
                "max_tokens": output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._extras,
            }
            if self._path == "/completions":
                body["prompt"] = prompt
            else:
                body["messages"] = [{"role": "user", "content": prompt}]
            answer = await self._timed(body)
            if answer is not None:
                return answer

    async def _timed(self, body: dict[str, Any]) -> Timed | None:
        """None where the server wants to be asked in another way, which is then set."""
        sent = time.monotonic()
        path = self._path
        try:
            async with self._http.stream("POST", f"{self._url}{path}", json=body) as reply:
                if reply.status_code != 200:
                    self._adapt(path, body, reply.status_code, await reply.aread())
                    return None
                return await _read(sent, reply.aiter_lines())
        except httpx.TransportError as error:
            raise self._silent(error) from error

    def _adapt(self, path: str, body: dict[str, Any], status: int, text: bytes) -> None:
        if status in _NOT_HERE and path == "/completions" and b"model" not in text:
            self._path = "/chat/completions"
        elif status in _REFUSED and "ignore_eos" in body and b"ignore_eos" in text:
            self._extras = {}
        else:
            told = text.decode(errors="replace")[:200]
            hint = "; does --url end in /v1?" if status in _NOT_HERE else ""
            raise ConfigError(f"{self._url}{path} answered {status}: {told}{hint}")

    def _silent(self, error: Exception) -> ConfigError:
        return ConfigError(f"no engine answers at {self._url} ({error or type(error).__name__})")


async def _read(sent: float, lines: AsyncIterator[str]) -> Timed:
    pieces: list[float] = []
    usage: dict[str, Any] = {}
    async for line in lines:
        if not line.startswith("data: {"):
            continue
        now = time.monotonic()
        event = json.loads(line[6:])
        if event.get("error"):
            raise ConfigError(f"the engine failed: {str(event['error'])[:200]}")
        usage = event.get("usage") or usage
        if any(_has_text(choice) for choice in event.get("choices", ())):
            pieces.append(now)
    if not usage:
        raise ConfigError("the engine tells no usage at the end of a stream; it cannot be measured")
    if not pieces:
        raise ConfigError("the engine's answers are empty; it cannot be measured")
    return Timed(sent, tuple(pieces), usage["prompt_tokens"], usage["completion_tokens"])


def _has_text(choice: dict[str, Any]) -> bool:
    told = choice.get("delta") or choice
    return any(told.get(key) for key in ("text", "content", "reasoning", "reasoning_content"))
