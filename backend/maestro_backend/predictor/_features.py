"""One row of numbers per call: the same function for training, evaluation and gateway."""

from __future__ import annotations

from math import log2, nan

from ._call import CallShape
from ._history import History, Strand
from ._kinds import kind_of
from ._tables import Keys, Tables, keys_of

_NO_STRAND = Strand()
_FORMATS = {"": 0.0, "json": 1.0, "schema": 2.0}
_CHOICES = {"": 0.0, "auto": 1.0, "required": 2.0}
_FINISHES = {
    "": nan,
    "stop": 0.0,
    "end_turn": 0.0,
    "tool_calls": 1.0,
    "tool_use": 1.0,
    "length": 2.0,
}


def features(shape: CallShape, keys: Keys, history: History, tables: Tables) -> dict[str, float]:
    """The row of a call that is about to run, by name, always in the same order.

    Lengths and sizes are log2(1 + tokens) or log2(1 + characters); nan stands for unknown. What
    the tables and the run's own past say is given relative to `base`, the usual length.
    """
    base = tables.usual(keys)
    return {
        "base": base,
        **_of_shape(shape, history, base),
        **_of_tables(keys, tables, base),
        **_of_run(shape, history, base),
        **_of_future(keys, tables),
    }


def _of_shape(shape: CallShape, history: History, base: float) -> dict[str, float]:
    tokens = shape.prompt_tokens
    growth = tokens - history.previous.outcome.prompt_tokens if history.previous else nan
    return {
        "prompt_tokens": _log(tokens),
        "messages": _log(shape.messages),
        "prompt_lines": _log(shape.prompt_lines),
        "code_chars": _log(shape.code_chars),
        "code_to_base": _log(shape.code_chars) - base if shape.code_chars > 0 else nan,
        "line_chars": shape.prompt_chars / max(1, shape.prompt_lines)
        if shape.prompt_chars > 0
        else nan,
        "code_share": shape.code_chars / shape.prompt_chars if shape.prompt_chars > 0 else nan,
        "tools": float(shape.tools) if shape.tools >= 0 else nan,
        "tool_choice": _CHOICES.get(shape.tool_choice, nan),
        "output_format": _FORMATS.get(shape.output_format, nan),
        "max_tokens": nan if shape.max_tokens is None else _log(shape.max_tokens),
        "kind": float(kind_of(shape.stage, shape.role)),
        "gap_s": _log(shape.gap_s) if shape.gap_s == shape.gap_s else nan,
        "growth": _signed_log(growth),
    }


def _of_tables(keys: Keys, tables: Tables, base: float) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in ("model", "index", "stage", "role", "kind", "app"):
        known = tables.read(getattr(keys, name))
        row[f"{name}_n"] = log2(1.0 + known.count)
        row[f"{name}_median"] = known.median - base if known.count else nan
        if name in ("model", "index", "stage", "kind"):
            row[f"{name}_low"] = known.low - known.median if known.count else nan
            row[f"{name}_high"] = known.high - known.median if known.count else nan
    same, count = tables.repeated(keys)
    row["same_n"], row["same_mean"] = count, same - base if count > 0.5 else nan
    row["verbosity"], count = tables.verbosity(keys)
    row["verbosity_n"] = log2(1.0 + count)
    return row


def _of_future(keys: Keys, tables: Tables) -> dict[str, float]:
    """What runs still produced after such a call; not relative to anything."""
    row: dict[str, float] = {}
    for name in ("index", "stage", "step"):
        known = tables.future(getattr(keys, name))
        row[f"future_{name}"] = known.median if known.count else nan
        row[f"future_{name}_n"] = log2(1.0 + known.count)
    known = tables.future(keys.index if tables.future(keys.index).count >= 3 else keys.stage)
    row["future_low"] = known.low if known.count else nan
    row["future_high"] = known.high if known.count else nan
    return row


def _of_run(shape: CallShape, history: History, base: float) -> dict[str, float]:
    own = history.own.get((shape.stage, shape.role), _NO_STRAND)
    previous, tokens = history.previous, shape.prompt_tokens
    return {
        "calls": float(history.all.count),
        "stages": float(len(history.own)),
        "surprise": history.surprise,
        "last_surprise": history.all.residual if history.all.count else nan,
        "spent": log2(1.0 + history.tokens),
        **_of_strand("own", own, base),
        **_of_strand("role", history.roles.get(shape.role, _NO_STRAND), base),
        **_of_strand("all", history.all, base),
        "own_by_prompt": own.last + _log(tokens) - _log(own.prompt) - base if own.count else nan,
        "own_by_code": own.last + _log(shape.code_chars) - _log(own.code) - base
        if own.count and min(own.code, shape.code_chars) > 0
        else nan,
        "own_surprise": own.residual if own.count else nan,
        "own_growth": _signed_log(tokens - own.prompt) if own.count else nan,
        "own_code_change": _signed_log(shape.code_chars - own.code)
        if own.count and min(own.code, shape.code_chars) >= 0
        else nan,
        "previous_tokens": _log(previous.length) if previous else nan,
        "previous_to_base": _log(previous.length) - base if previous else nan,
        "previous_finish": _FINISHES.get(previous.outcome.finish, nan) if previous else nan,
        "previous_same": float(
            (previous.shape.stage, previous.shape.role) == (shape.stage, shape.role)
        )
        if previous
        else nan,
        "fresh": _signed_log(tokens - previous.outcome.prompt_tokens - previous.length)
        if previous
        else nan,
    }


def _of_strand(name: str, strand: Strand, base: float) -> dict[str, float]:
    if not strand.count:
        return {f"{name}_{part}": nan for part in _PARTS} | {f"{name}_calls": 0.0}
    spread = max(0.0, strand.square - strand.mean**2) ** 0.5
    values = (strand.last, strand.before, strand.mean, strand.top, strand.low, strand.moving)
    relative = {f"{name}_{part}": value - base for part, value in zip(_PARTS, values, strict=False)}
    return {**relative, f"{name}_spread": spread, f"{name}_calls": float(strand.count)}


_PARTS = ("last", "before", "mean", "top", "low", "moving", "spread")


def _log(value: float) -> float:
    return nan if value < 0 else log2(1.0 + value)


def _signed_log(value: float) -> float:
    return log2(1.0 + value) if value >= 0 else -log2(1.0 - value)


FEATURES = tuple(features(CallShape(""), keys_of(CallShape(""), 0, 0), History(), Tables()))
"""The names, in order."""
