"""Small recorded runs: a line per call, `stage < parents`."""

from __future__ import annotations

from maestro_backend.predictor import CallOutcome, CallShape, Example, RunExamples


def call(
    stage: str,
    index: int,
    *parents: int,
    tokens: int = 100,
    prompt: int = 1_000,
    finish: str = "",
    run: str = "r",
    app: str = "app",
) -> Example:
    return Example(
        source="here",
        run=run,
        index=index,
        shape=CallShape("m", app, stage, stage, prompt_tokens=prompt, gap_s=2.0),
        outcome=CallOutcome(prompt, tokens, finish=finish),
        parents=parents,
    )


def chain(*stages: str, run: str = "r", app: str = "app", tokens: int = 100) -> RunExamples:
    """A run in which each call waited for the one before; its prompts grow by 50 tokens a call."""
    calls = tuple(
        call(
            s, at, *([at - 1] if at else []), run=run, app=app, tokens=tokens, prompt=500 + 50 * at
        )
        for at, s in enumerate(stages)
    )
    return RunExamples("here", run, calls)
