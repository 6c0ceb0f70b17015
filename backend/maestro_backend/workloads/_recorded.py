"""Recorded runs as they were: lengths, order and pauses; no model, class or limit is chosen yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isnan

from maestro_backend.predictor import CallOutcome, CallShape, Example, RunExamples
from maestro_backend.simulator import SimCall, Template

from ._prefixes import Prefix, prefixes

END_OF_TURN = "end_turn"
"""How a call finishes that leaves the word to a person (Claude Code's sessions)."""

Kinds = Mapping[tuple[str, str, str], str]
"""(source, stage, role) -> kind of role: coder, judge, user_sim, ..."""

_BYTES_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Recorded:
    """`runs[i]` is what predictors see of `templates[i]`: same source, name and call indices."""

    templates: tuple[Template, ...]
    runs: tuple[RunExamples, ...]
    kinds: Kinds = field(default_factory=dict)

    def cut(self, calls: int) -> Recorded:
        """The first `calls` calls of each run, for templates and predictors alike."""
        templates = (replace(one, calls=one.calls[:calls]) for one in self.templates)
        runs = (replace(one, calls=one.calls[:calls]) for one in self.runs)
        return Recorded(tuple(templates), tuple(runs), self.kinds)


def from_examples(runs: Iterable[RunExamples], kinds: Kinds) -> Recorded:
    """Templates of runs that were read by `maestro_backend.predictor.read_traces`."""
    kept = tuple(runs)
    return Recorded(tuple(map(_template, kept)), kept, kinds)


def from_templates(templates: Iterable[Template]) -> Recorded:
    """The other way: what predictors would see of templates that come from elsewhere."""
    kept = tuple(templates)
    return Recorded(kept, tuple(map(_examples, kept)))


def _template(run: RunExamples) -> Template:
    shared = prefixes(run.calls)
    calls = tuple(
        _call(run, example, prefix) for example, prefix in zip(run.calls, shared, strict=True)
    )
    return Template(run.source, run.run, calls, run.calls[0].shape.workflow)


def _call(run: RunExamples, example: Example, prefix: Prefix | None) -> SimCall:
    """What the call's latest parent ended with tells whether a person filled the gap before it."""
    shape, outcome = example.shape, example.outcome
    gap_s = 0.0 if isnan(shape.gap_s) else shape.gap_s
    human = bool(example.parents) and (run.calls[example.parents[-1]].outcome.finish == END_OF_TURN)
    of, tokens = prefix or (None, 0)
    return SimCall(
        stage=shape.stage,
        model="",
        prompt_tokens=outcome.prompt_tokens,
        output_tokens=outcome.output_tokens,
        role=shape.role,
        after=example.parents,
        gap_s=gap_s,
        human=human and gap_s > 0.0,
        prefix_of=of,
        prefix_tokens=tokens,
    )


def _examples(template: Template) -> RunExamples:
    humans = {parent for call in template.calls if call.human for parent in call.after[-1:]}
    calls = tuple(
        Example(
            source=template.source,
            run=template.name,
            index=index,
            shape=CallShape(
                model="",
                workflow=template.workflow,
                stage=call.stage,
                role=call.role,
                prompt_bytes=call.prompt_tokens * _BYTES_PER_TOKEN,
                prompt_tokens=call.prompt_tokens,
                gap_s=call.gap_s,
            ),
            outcome=CallOutcome(
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                cached_tokens=call.prefix_tokens,
                finish=END_OF_TURN if index in humans else "",
            ),
            parents=call.after,
            task=template.name,
        )
        for index, call in enumerate(template.calls)
    )
    return RunExamples(template.source, template.name, calls)
