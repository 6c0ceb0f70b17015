"""Made-up recorded runs: small apps whose lengths follow simple rules."""

from __future__ import annotations

import random
from dataclasses import replace

from maestro_backend.predictor import CallOutcome, CallShape, Example, RunExamples

STAGES = (("plan", "planner", 60.0), ("code", "coder", 400.0), ("review", "reviewer", 120.0))


def call(
    run: str,
    index: int,
    tokens: float,
    *,
    stage: str = "s",
    role: str = "r",
    parents: tuple[int, ...] | None = None,
    source: str = "made_up",
    app: str = "app",
    task: str = "",
    prompt: int = 500,
    model: str = "m",
) -> Example:
    """A call that waited for the one before it, unless told otherwise."""
    if parents is None:
        parents = (index - 1,) if index else ()
    shape = CallShape(
        model=model,
        workflow=app,
        stage=stage,
        role=role,
        prompt_bytes=4 * prompt,
        prompt_tokens=prompt,
        messages=2,
        prompt_chars=4 * prompt,
        prompt_lines=prompt // 10,
        code_chars=0,
    )
    outcome = CallOutcome(prompt, round(tokens), finish="stop")
    return Example(source, run, index, shape, outcome, parents, task or run)


def team_run(
    number: int, *, source: str = "made_up", app: str = "team", scale: float = 1.0
) -> RunExamples:
    """plan, then code and review in turn; a run writes long or short as a whole."""
    rng = random.Random(f"{source}{app}{number}")
    mood = scale * rng.choice((0.5, 1.0, 2.0))
    calls: list[Example] = []
    for index in range(7):
        stage, role, usual = STAGES[0] if index == 0 else STAGES[1 + index % 2]
        tokens = usual * mood * rng.uniform(0.9, 1.1)
        calls.append(
            call(f"{app}-{number}", index, tokens, stage=stage, role=role, source=source, app=app)
        )
    return RunExamples(source, f"{app}-{number}", tuple(calls))


def team_runs(count: int, **options: float | str) -> list[RunExamples]:
    return [team_run(number, **options) for number in range(count)]  # type: ignore[arg-type]


def with_tokens(run: RunExamples, index: int, tokens: int) -> RunExamples:
    """The same run, in which one call produced something else."""
    calls = list(run.calls)
    old = calls[index]
    calls[index] = replace(old, outcome=replace(old.outcome, output_tokens=tokens))
    return replace(run, calls=tuple(calls))
