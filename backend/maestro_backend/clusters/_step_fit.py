"""Fits the simulator's step time to what was measured on an engine.

A step takes `step_s + max(bytes / bandwidth, tokens * token_s)`: weights and the KV that it reads
over the memory that decode reaches, or two operations per parameter and token over the computing
that prefill reaches. The time to a first token has `first_s` on top: the network, the tokenizer
and the queue, which are no part of a profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
from numpy.typing import NDArray

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import ModelGeometry

Floats = NDArray[np.float64]

_ROUNDS = 30
_SEEN = 1.2
"""The slowest first token over the fastest, at the least: else prefill was not seen."""
_MOST_OVERHEAD = 0.75
"""Of the fastest step, where the overhead is given: reading the weights takes some time, too."""
_TOLD_APART = 1.2
"""So much more must one of two batches of a size read: else overhead and bandwidth are one sum."""


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """Seconds to the first token of a prompt of so many tokens, alone in the engine."""

    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Seconds between two tokens, with `batch` requests of `context` tokens each."""

    batch: int
    context: float
    seconds: float


Point = PrefillPoint | DecodePoint


@dataclass(frozen=True, slots=True)
class StepFit:
    """What was fitted. `bandwidth` (bytes/s) and `flops` (per second) are those that are reached,
    over all devices of the model; `step_fixed` tells that `step_s` was given, not fitted."""

    step_s: float
    bandwidth: float
    flops: float
    first_s: float
    step_fixed: bool
    geometry: ModelGeometry

    @property
    def prefill_tokens_s(self) -> float:
        return self.flops / (2 * self.geometry.parameters)

    def seconds(self, point: Point) -> float:
        """What the fit says of a point."""
        read = _bytes(point, self.geometry) / self.bandwidth
        computed = _tokens(point) / self.prefill_tokens_s
        first_s = self.first_s if isinstance(point, PrefillPoint) else 0.0
        return first_s + self.step_s + max(read, computed)

    def error(self, point: Point) -> float:
        """Of a point, relative to what was measured."""
        return self.seconds(point) / point.seconds - 1

    def median_error(self, points: Sequence[Point]) -> float:
        return median(abs(self.error(point)) for point in points)


def fit_steps(
    geometry: ModelGeometry,
    prefills: Sequence[PrefillPoint],
    decodes: Sequence[DecodePoint],
    *,
    step_s: float,
) -> StepFit:
    """Least squares of relative errors; no figure below zero.

    What a step costs besides, and what reading the weights costs, can be told apart only where a
    batch read much more KV than another one of its size. Where none did, `step_s` (at most 0.75 of
    the fastest step) is taken as given, and only the bandwidth is fitted.

    Raises:
        ConfigError: too few points, or prompts so short that none shows prefill.
    """
    if len(prefills) < 2 or not decodes:
        raise ConfigError(
            f"{len(prefills)} prompt lengths and {len(decodes)} batch sizes were measured, two and "
            "one are needed; give it more time with --seconds"
        )
    points: list[Point] = [*prefills, *decodes]
    problem = _Problem(
        np.array([_bytes(point, geometry) for point in points]),
        np.array([_tokens(point) for point in points], dtype=float),
        np.array([isinstance(point, PrefillPoint) for point in points]),
        np.array([point.seconds for point in points]),
        min(step_s, _MOST_OVERHEAD * min(point.seconds for point in decodes)),
    )
    batches = sorted({point.batch for point in decodes})
    found = [
        solution
        for limit in (*batches[1:], batches[-1] + 1)
        if (solution := problem.solved(limit)) is not None
    ]
    shortest = min(point.seconds for point in prefills)
    if not found or max(point.seconds for point in prefills) < _SEEN * shortest:
        raise ConfigError(
            "longer prompts took no longer: prefill cannot be measured; give it more time with "
            "--seconds, or an engine that does nothing else"
        )
    best = min(found, key=lambda solution: solution.cost)
    overhead, per_byte, per_token, first_s = (float(value) for value in best.values)
    flops = 2 * geometry.parameters / per_token
    return StepFit(overhead, 1 / per_byte, flops, first_s, best.fixed, geometry)


@dataclass(frozen=True, slots=True)
class _Solution:
    """Seconds: of a step, per byte, per token, of a first token. `fixed`: the first was given."""

    values: Floats
    fixed: bool
    cost: float


@dataclass(frozen=True, slots=True)
class _Problem:
    """All points: what their step reads and computes, which are first tokens, what they took."""

    sizes: Floats
    tokens: Floats
    first: NDArray[np.bool_]
    seconds: Floats
    step_s: float

    def solved(self, limit: int) -> _Solution | None:
        """The best from a first guess: prompts, and batches of `limit` or more, are bound by
        computing. Which are is guessed anew from each solution until nothing changes."""
        best = None
        computing = self.first | (self.tokens >= limit)
        for _ in range(_ROUNDS):
            found = self._linear(computing)
            _, per_byte, per_token, _ = found.values
            if per_byte > 0 and per_token > 0 and (best is None or found.cost < best.cost):
                best = found
            again = self.tokens * per_token > self.sizes * per_byte
            if (again == computing).all() or not again[self.first].any():
                break
            computing = again
        return best

    def _told_apart(self, reading: NDArray[np.bool_]) -> bool:
        """Whether batches of one size read much more KV the one time than the other: between sizes,
        KV looks like anything else that every request costs."""
        alike = (self.sizes[reading & (self.tokens == batch)] for batch in set(self.tokens))
        return any(part.size > 1 and part.max() >= _TOLD_APART * part.min() for part in alike)

    def _linear(self, computing: NDArray[np.bool_]) -> _Solution:
        fixed = not self._told_apart(~computing & ~self.first)
        columns = np.column_stack(
            [
                np.full_like(self.seconds, 0.0 if fixed else 1.0),
                np.where(computing, 0.0, self.sizes),
                np.where(computing, self.tokens, 0.0),
                self.first.astype(float),
            ]
        )
        target = self.seconds - self.step_s if fixed else self.seconds
        values = _no_less_than_zero(columns / self.seconds[:, None], target / self.seconds)
        if fixed:
            values[0] = self.step_s
        overhead, per_byte, per_token, first_s = values
        guess = np.maximum(self.sizes * per_byte, self.tokens * per_token)
        guess = guess + overhead + first_s * self.first
        return _Solution(values, fixed, float(((guess / self.seconds - 1) ** 2).sum()))


def _no_less_than_zero(columns: Floats, target: Floats) -> Floats:
    """The least-squares solution without negative parts: four unknowns, so each subset is tried."""
    best, best_cost = np.zeros(columns.shape[1]), float((target**2).sum())
    used = [at for at in range(columns.shape[1]) if columns[:, at].any()]
    for size in range(1, len(used) + 1):
        for chosen in combinations(used, size):
            part = columns[:, chosen]
            scale = np.abs(part).max(axis=0)
            found = np.linalg.lstsq(part / scale, target, rcond=None)[0] / scale
            cost = float(((part @ found - target) ** 2).sum())
            if (found >= 0).all() and cost < best_cost:
                best_cost = cost
                best = np.zeros(columns.shape[1])
                best[list(chosen)] = found
    return best


def _bytes(point: Point, geometry: ModelGeometry) -> float:
    """Weights, and the KV of all requests of a decode step."""
    kv = point.batch * point.context if isinstance(point, DecodePoint) else 0.0
    return geometry.weights_bytes + geometry.kv_bytes_per_token * kv


def _tokens(point: Point) -> int:
    return point.batch if isinstance(point, DecodePoint) else point.tokens
