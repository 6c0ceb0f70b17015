"""A small app as recorded: plan, code, then review and code in turn, done after the last review."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache

from predictor.recorded import call

from maestro_backend.evaluation import Trained, shortened, train
from maestro_backend.foresight import foresee
from maestro_backend.predictor import Example, RunExamples
from maestro_backend.simulator import CallForesight, Foresight

ROLES = {"plan": "planner", "code": "coder", "review": "reviewer"}
USUAL = {"plan": 60.0, "code": 400.0, "review": 120.0}
GAP_S = 3.0


def step(
    run: str, index: int, stage: str, *parents: int, tokens: float = 0.0, gap_s: float = GAP_S
) -> Example:
    made = call(
        run,
        index,
        tokens or USUAL.get(stage, 50.0),
        stage=stage,
        role=ROLES.get(stage, "other"),
        parents=parents,
        app="team",
        prompt=1000 + 100 * index,
    )
    return replace(made, shape=replace(made.shape, gap_s=gap_s))


def chain(name: str, *stages: str, source: str = "made_up") -> RunExamples:
    parents = [((index - 1,) if index else ()) for index in range(len(stages))]
    calls = (step(name, at, stage, *parents[at]) for at, stage in enumerate(stages))
    return RunExamples(source, name, tuple(replace(one, source=source) for one in calls))


def fork(name: str, *reviews: float) -> RunExamples:
    """plan, several reviews at once, code that waits for all of them."""
    many = len(reviews)
    calls = [step(name, 0, "plan")]
    calls += [step(name, 1 + at, "review", 0, tokens=n) for at, n in enumerate(reviews)]
    calls.append(step(name, 1 + many, "code", *range(1, 1 + many)))
    return RunExamples("made_up", name, tuple(calls))


def team_history(count: int = 24, source: str = "made_up") -> list[RunExamples]:
    """Each run goes through one, two or three rounds, and writes long or short as a whole."""
    found = []
    for number in range(count):
        rng = random.Random(number)
        rounds = ("code", "review") * rng.choice((1, 1, 2, 3))
        mood = rng.choice((0.5, 1.0, 2.0))
        run = chain(f"past-{number}", "plan", *rounds, source=source)
        calls = (longer(one, mood * rng.uniform(0.9, 1.1)) for one in run.calls)
        found.append(replace(run, calls=tuple(calls)))
    return found


def longer(one: Example, times: float) -> Example:
    tokens = round(times * one.outcome.output_tokens)
    return replace(one, outcome=replace(one.outcome, output_tokens=tokens))


@lru_cache(maxsize=1)
def small_model() -> Trained:
    return train([*team_history(), *team_history(8, "elsewhere")], recipes=shortened(5))


def models(one: Example) -> str:
    return "large" if one.shape.role == "coder" else "small"


def service_s(model: str, prompt: int, output: float) -> float:
    return prompt / 1000 + output / (20 if model == "large" else 100)


def foreseen(*runs: RunExamples, history: list[RunExamples] | None = None) -> Foresight:
    past = team_history() if history is None else history
    return foresee(runs, trained=small_model(), history=past, models=models, service_s=service_s)


def of(run: RunExamples, history: list[RunExamples] | None = None) -> tuple[CallForesight, ...]:
    return foreseen(run, history=history)[run.source, run.run]
