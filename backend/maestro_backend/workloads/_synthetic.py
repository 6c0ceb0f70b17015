"""Made-up runs where there is no data: a few shapes with lognormal lengths (ours)."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import SimCall, Template

PREFIX = "synthetic:"
_RUNS = 100
_PROMPT = (1200.0, 0.7, 32, 16_000)
_OUTPUT = (200.0, 0.8, 4, 2_000)
"""Median, sigma of the logarithm, least and most, in tokens."""


def synthetic(name: str) -> list[Template]:
    """`synthetic:NAME` -> 100 templates of each shape, always the same.

    `chain`: 4 to 12 calls in a row. `fanout`: a planner, 2 to 6 workers side by side, a join.
    `loop`: a writer and a critic take turns on a growing prompt. `single`: one call. `mixed`: all.

    Raises:
        ConfigError: there is no such shape.
    """
    wanted = name.removeprefix(PREFIX)
    if wanted not in (*_SHAPES, "mixed"):
        known = ", ".join(f"{PREFIX}{shape}" for shape in (*_SHAPES, "mixed"))
        raise ConfigError(f"there are no made-up workflows {name!r} (known: {known})")
    chosen = _SHAPES if wanted == "mixed" else {wanted: _SHAPES[wanted]}
    return [
        Template(f"synthetic-{shape}", f"{shape}-{at:03d}", tuple(make(dice)), f"synthetic-{shape}")
        for shape, make in chosen.items()
        for dice in [Random(f"{PREFIX}{shape}")]
        for at in range(_RUNS)
    ]


def _tokens(dice: Random, of: tuple[float, float, int, int]) -> int:
    median, sigma, least, most = of
    return min(most, max(least, round(median * dice.lognormvariate(0.0, sigma))))


def _made(dice: Random, stage: str, *after: int, gap_s: float = 0.0) -> SimCall:
    prompt, output = _tokens(dice, _PROMPT), _tokens(dice, _OUTPUT)
    return SimCall(stage, "", prompt, output, role=stage, after=after, gap_s=gap_s)


def _chain(dice: Random) -> list[SimCall]:
    count = dice.randint(4, 12)
    return [
        _made(
            dice,
            f"step-{at % 3}",
            *([at - 1] if at else []),
            gap_s=dice.expovariate(1.0) if at else 0.0,
        )
        for at in range(count)
    ]


def _fanout(dice: Random) -> list[SimCall]:
    width = dice.randint(2, 6)
    workers = [_made(dice, "work", 0) for _ in range(width)]
    return [_made(dice, "plan"), *workers, _made(dice, "join", *range(1, width + 1))]


def _loop(dice: Random) -> list[SimCall]:
    calls: list[SimCall] = []
    prompt = _tokens(dice, _PROMPT)
    for at in range(2 * dice.randint(1, 5)):
        stage = "criticise" if at % 2 else "write"
        output = _tokens(dice, _OUTPUT)
        shared = at - 2 if at > 1 else None
        tokens = calls[shared].prompt_tokens if shared is not None else 0
        calls.append(
            SimCall(
                stage,
                "",
                prompt,
                output,
                role=stage,
                after=(at - 1,) if at else (),
                prefix_of=shared,
                prefix_tokens=tokens,
            )
        )
        prompt += output
    return calls


def _single(dice: Random) -> list[SimCall]:
    return [_made(dice, "answer")]


_SHAPES: dict[str, Callable[[Random], list[SimCall]]] = {
    "chain": _chain,
    "fanout": _fanout,
    "loop": _loop,
    "single": _single,
}
