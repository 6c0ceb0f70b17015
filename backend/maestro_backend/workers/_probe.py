"""Asks a running engine over its unix socket: is it well, what can it hold, does it answer."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families

from maestro_agents.protocol import BackendError

_HEALTH_TIMEOUT_S = 10.0
_WARM_UP_TIMEOUT_S = 600.0


class Probe:
    """A client of one engine. Use it as an async context manager."""

    def __init__(self, address: Path) -> None:
        transport = httpx.AsyncHTTPTransport(uds=str(address))
        self._http = httpx.AsyncClient(
            transport=transport, base_url="http://worker", timeout=_HEALTH_TIMEOUT_S
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def healthy(self) -> bool:
        """Whether `/health` answers 200 in time."""
        try:
            return (await self._http.get("/health")).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    async def warm_up(self, model: str) -> None:
        """Make two short calls, sampled and greedy: a CPU engine sets each up only then.

        Raises:
            BackendError: it does not answer a call.
        """
        for sampling in ({}, {"temperature": 0}):
            chat = {"messages": [{"role": "user", "content": "Hi"}], **sampling}
            answer = await self._generate("/v1/chat/completions", model, chat)
            if answer.is_client_error:  # a base model has no chat template
                prompt = {"prompt": "Hi", **sampling}
                answer = await self._generate("/v1/completions", model, prompt)
            if not answer.is_success:
                said = f"{answer.status_code}: {answer.text[:300]}"
                raise BackendError(f"the warm-up call got {said}")

    async def _generate(self, path: str, model: str, body: dict[str, Any]) -> httpx.Response:
        body = {"model": model, "max_tokens": 8, **body}
        try:
            return await self._http.post(path, json=body, timeout=_WARM_UP_TIMEOUT_S)
        except httpx.TransportError as error:
            raise BackendError(f"the warm-up call failed: {error!r}") from error

    async def kv_blocks(self) -> tuple[int, int]:
        """The blocks of its KV cache and the tokens in one, by its own count."""
        text = (await self._get("/metrics")).text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "vllm:cache_config_info":
                    labels = sample.labels
                    return int(labels["num_gpu_blocks"]), int(labels["block_size"])
        raise BackendError("the engine does not report its KV cache (vllm:cache_config_info)")

    async def max_model_len(self) -> int:
        """Its longest context in tokens; 0 where it does not say."""
        cards = (await self._get("/v1/models")).json()["data"]
        return int(cards[0].get("max_model_len") or 0)

    async def _get(self, path: str) -> httpx.Response:
        try:
            return (await self._http.get(path)).raise_for_status()
        except httpx.HTTPError as error:
            raise BackendError(f"the engine does not answer {path}: {error}") from error
