"""Measures a live engine: prompts of several lengths alone, then batches of several sizes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import ModelGeometry

from ._engine_client import EngineClient, Timed
from ._step_fit import DecodePoint, Point, PrefillPoint, StepFit, fit_steps

Say = Callable[[str], None]

_SHORTEST = 128
_REPEATS = 3
_BATCHES = (1, 2, 4, 8, 16, 32)
_PROMPT = 64
_LONG_BATCH = 4
_PREFILL_PART = 0.4
_DECODE_PART = 0.75
"""Of the time given: prefill stops here, batches stop there, the rest is for a long context."""
_TOKENS = (24, 128)
_ROOM = 160
"""Tokens of the context that are left to the answer and to a prompt that turns out longer."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured of an engine and what was fitted to it."""

    fit: StepFit
    prefills: tuple[PrefillPoint, ...]
    decodes: tuple[DecodePoint, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        return (*self.prefills, *self.decodes)

    @property
    def median_error(self) -> float:
        """Of all points, relative."""
        return self.fit.median_error(self.points)


async def calibrate(
    client: EngineClient,
    geometry: ModelGeometry,
    *,
    seconds: float,
    step_s: float,
    say: Say = lambda line: None,
) -> Calibration:
    """Measure for about `seconds` and fit. `step_s` is what a step costs besides, where that cannot
    be told from reading the weights.

    The engine should do nothing else meanwhile. A measurement that has begun is ended.

    Raises:
        ConfigError: it does not answer as an OpenAI server does, or too little was measured.
    """
    longest = await client.longest() or geometry.max_model_len
    await client.learn()
    began = time.monotonic()

    def left(part: float) -> float:
        return part * seconds - (time.monotonic() - began)

    prefills = await _prefills(client, longest - _ROOM, left, say)
    decodes = await _batches(client, left, say)
    for point in reversed(prefills):
        if left(1.0) > 2 * _LONG_BATCH * point.seconds:
            step = decodes[0].seconds
            long = await _decode(client, _LONG_BATCH, point.tokens, step, left(0.8), say)
            decodes += [long] if long is not None else []
            break
    fit = fit_steps(geometry, prefills, decodes, step_s=step_s)
    return Calibration(fit, tuple(prefills), tuple(decodes))


async def _prefills(
    client: EngineClient, longest: int, left: Callable[[float], float], say: Say
) -> list[PrefillPoint]:
    points: list[PrefillPoint] = []
    length = _SHORTEST
    while length <= longest:
        expected_s = 2.5 * points[-1].seconds if points else 0.0
        if len(points) >= 2 and expected_s > left(_PREFILL_PART):
            break
        repeats = _REPEATS if _REPEATS * expected_s < left(_PREFILL_PART) else 1
        answers = [await client.ask(length, 1) for _ in range(repeats)]
        tokens = round(median(answer.prompt_tokens for answer in answers))
        points.append(PrefillPoint(tokens, median(answer.first_s for answer in answers)))
        say(f"prompt of {tokens} tokens: {points[-1].seconds * 1000:.1f} ms to the first token")
        length *= 2
    return points


async def _batches(
    client: EngineClient, left: Callable[[float], float], say: Say
) -> list[DecodePoint]:
    points: list[DecodePoint] = []
    for batch in _BATCHES:
        last_s = points[-1].seconds if points else 0.0
        if points and left(_DECODE_PART) < 2 * _TOKENS[0] * last_s:
            break
        room = left(_DECODE_PART) / (len(_BATCHES) - len(points))
        point = await _decode(client, batch, _PROMPT, last_s, room, say)
        if point is None:
            break
        points.append(point)
    if not points:
        raise ConfigError(
            "the answers are too short to time a token: the engine must take ignore_eos, and stream"
        )
    return points


async def _decode(
    client: EngineClient, batch: int, prompt: int, step_s: float, room_s: float, say: Say
) -> DecodePoint | None:
    """A batch that begins at once; only what all of them decode together counts. None if the first
    have ended before the last begin: their prompts take longer than so many tokens."""
    fewest, most = _TOKENS
    wanted = fewest if step_s == 0 else int(min(most, max(fewest, room_s / (2 * step_s))))
    answers = await asyncio.gather(*(client.ask(prompt, wanted) for _ in range(batch)))
    point = _together(list(answers))
    if point is None:
        say(f"{batch} at once never decode together: no larger batch is measured")
        return None
    say(
        f"{batch} at once, {point.context:.0f} tokens each: {point.seconds * 1000:.1f} ms per token"
    )
    return point


def _together(answers: list[Timed]) -> DecodePoint | None:
    begin = max(answer.pieces[0] for answer in answers)
    end = min(answer.pieces[-1] for answer in answers)
    made, context = [], []
    for answer in answers:
        per_piece = answer.output_tokens / len(answer.pieces)
        before = sum(piece <= begin for piece in answer.pieces) * per_piece
        inside = [piece for piece in answer.pieces if begin < piece <= end]
        span_s = (inside[-1] - begin) if inside else 0.0
        made.append((len(inside) * per_piece, span_s))
        context.append(answer.prompt_tokens + before + len(inside) * per_piece / 2)
    tokens = sum(count for count, _ in made)
    if tokens < 2 * len(answers):
        return None
    seconds = (end - begin) * len(answers) / tokens
    return DecodePoint(len(answers), sum(context) / len(context), seconds)
