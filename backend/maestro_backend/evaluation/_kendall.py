"""Kendall's tau-b: whether two lists order the same things alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import sqrt


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Between -1 and 1, ties counted as tau-b does; 0 where one of the lists has but one value.

    In n log n steps (Knight, 1966).
    """
    pairs = sorted(zip(first, second, strict=True))
    total = _pairs(len(pairs))
    alike_first = sum(map(_pairs, Counter(x for x, _ in pairs).values()))
    alike_second = sum(map(_pairs, Counter(y for _, y in pairs).values()))
    alike_both = sum(map(_pairs, Counter(pairs).values()))
    scale = sqrt((total - alike_first) * (total - alike_second))
    if not scale:
        return 0.0
    swaps = _swaps([y for _, y in pairs])
    return (total - alike_first - alike_second + alike_both - 2 * swaps) / scale


def _pairs(number: int) -> int:
    return number * (number - 1) // 2


def _swaps(values: Iterable[float]) -> int:
    """How many pairs stand in the wrong order: a merge sort from below."""
    parts = [[value] for value in values]
    swaps = 0
    while len(parts) > 1:
        merged = []
        for at in range(0, len(parts) - 1, 2):
            both, wrong = _merged(parts[at], parts[at + 1])
            merged.append(both)
            swaps += wrong
        parts = merged + parts[len(parts) - len(parts) % 2 :]
    return swaps


def _merged(low: list[float], high: list[float]) -> tuple[list[float], int]:
    both: list[float] = []
    at = swaps = 0
    for value in high:
        while at < len(low) and low[at] <= value:
            both.append(low[at])
            at += 1
        both.append(value)
        swaps += len(low) - at
    return both + low[at:], swaps
