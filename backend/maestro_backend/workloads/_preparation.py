"""Recorded runs made fit for a cluster: models by role, a class, and what a context can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import ModelGeometry, SimCall, Template

from ._mix import Mix
from ._recorded import Kinds, Recorded


def prepare(
    recorded: Recorded, mix: Mix, models: Mapping[str, ModelGeometry]
) -> tuple[Template, ...]:
    """Every call with a model of the cluster, and no longer than its context; in the same order.

    A call that names a model itself (a Mooncake file of ours) keeps it, or gets the nearest.
    A prompt is cut to what the answer leaves, but never below half the context; then the answer is.
    What is shared with an earlier prompt is cut in the same proportion, and none where that call
    went to another model. Every prompt and every answer has at least one token.
    """
    here = mix.onto(models)
    return tuple(_fitted(t, mix, here, models, recorded.kinds) for t in recorded.templates)


def _fitted(
    template: Template,
    mix: Mix,
    here: Mapping[str, str],
    models: Mapping[str, ModelGeometry],
    kinds: Kinds,
) -> Template:
    source, run = template.source, template.name
    entry = mix.of(source)
    calls: list[SimCall] = []
    for call in template.calls:
        kind = kinds.get((source, call.stage, call.role), "")
        own = call.model if call.model in models else here.get(call.model)
        model = own or here[mix.model_of(source, run, call.role, kind)]
        prompt, output = _lengths(call, models[model])
        of, tokens = _prefix(call, model, prompt, calls)
        most_s = mix.max_pause_s if call.human else mix.max_gap_s
        calls.append(
            SimCall(
                stage=call.stage,
                model=model,
                prompt_tokens=prompt,
                output_tokens=output,
                role=call.role,
                after=call.after,
                gap_s=min(call.gap_s, most_s),
                human=call.human,
                prefix_of=of,
                prefix_tokens=tokens,
            )
        )
    return replace(template, calls=tuple(calls), slo=entry.slo, tenant=entry.tenant)


def _lengths(call: SimCall, model: ModelGeometry) -> tuple[int, int]:
    context = model.max_model_len
    if context < 2:
        raise ConfigError(f"model {model.name}: max_model_len must be 2 or more, got {context}")
    output = max(1, call.output_tokens)
    prompt = min(max(1, call.prompt_tokens), max(context - output, context // 2))
    return prompt, min(output, context - prompt)


def _prefix(call: SimCall, model: str, prompt: int, calls: list[SimCall]) -> tuple[int | None, int]:
    if call.prefix_of is None or calls[call.prefix_of].model != model:
        return None, 0
    before = calls[call.prefix_of]
    tokens = min(
        call.prefix_tokens * prompt // max(1, call.prompt_tokens),
        before.prompt_tokens + before.output_tokens,
        prompt,
    )
    return (call.prefix_of, tokens) if tokens > 0 else (None, 0)
