"""How much of a prompt an earlier call of the run has had already.

Where a trace counts it (`cached_prefix_tokens`: Claude Code's sessions), the trace is believed: the
prompt begins like the latest parent's prompt and answer. Elsewhere the rule is ours. A call begins
like the latest of its ancestors with the same stage and role whose prompt is not longer:

- like all of that prompt, where it is as long, or longer by at least that call's answer (the same
  question again, or a conversation that has grown);
- like half of it, where it is only a little longer (the same instructions about other content);
- like no earlier call, where there is no such ancestor.

Checked on recorded text. Of 2,300 pairs of prompts that are known whole (the earlier one has 4,500
characters at most) the common beginning is 0.99 of the earlier prompt where the rule says all, and
two thirds where it says half. The first 2,000 characters agree in 61,200 of 62,800 pairs. The
exception is one source of independent drafts (agentsim): 0.35 where the rule says all, in 7 % of
its calls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from maestro_backend.predictor import Example

Prefix = tuple[int, int]
"""The earlier call, and how many tokens are the same."""


def prefixes(calls: Sequence[Example]) -> list[Prefix | None]:
    """One entry per call, None where it begins like no earlier call of the run."""
    if any(call.outcome.cached_tokens for call in calls):
        return [_counted(call, calls) for call in calls]
    return _guessed(calls)


def _counted(call: Example, calls: Sequence[Example]) -> Prefix | None:
    if not call.parents or not call.outcome.cached_tokens:
        return None
    before = calls[call.parents[-1]].outcome
    most = min(call.outcome.prompt_tokens, before.prompt_tokens + before.output_tokens)
    return call.parents[-1], min(call.outcome.cached_tokens, most)


def _guessed(calls: Sequence[Example]) -> list[Prefix | None]:
    found: list[Prefix | None] = []
    ancestors: list[int] = []  # a bit per earlier call
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, call in enumerate(calls):
        bits = 0
        for parent in call.parents:
            bits |= ancestors[parent] | 1 << parent
        ancestors.append(bits)
        same = alike[call.shape.stage, call.shape.role]
        found.append(_latest(call, [earlier for earlier in same if bits >> earlier & 1], calls))
        same.append(index)
    return found


def _latest(call: Example, ancestors: list[int], calls: Sequence[Example]) -> Prefix | None:
    prompt = call.outcome.prompt_tokens
    for earlier in reversed(ancestors):
        before = calls[earlier].outcome
        if not 0 < before.prompt_tokens <= prompt:
            continue
        grown = prompt - before.prompt_tokens
        whole = grown == 0 or grown >= before.output_tokens
        tokens = before.prompt_tokens if whole else before.prompt_tokens // 2
        return (earlier, tokens) if tokens else None
    return None
