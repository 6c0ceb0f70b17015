"""Finished calls for tests."""

from __future__ import annotations

from math import nan

from maestro_backend.predictor import CallOutcome, CallShape, Example, RunExamples


def example(
    run: str = "r1",
    index: int = 0,
    tokens: int = 40,
    parents: tuple[int, ...] = (),
    task: str = "",
    stage: str = "write",
) -> Example:
    return Example(
        source="live",
        run=run,
        index=index,
        shape=CallShape("m", "w@1", stage, "writer", prompt_bytes=400, prompt_tokens=100),
        outcome=CallOutcome(101, tokens, total_s=1.5, finish="stop"),
        parents=parents,
        task=task,
        started_s=nan,
    )


def full_example(run: str = "r1", index: int = 1) -> Example:
    """Every field has a value of its own."""
    shape = CallShape(
        model="qwen",
        workflow="essay@abc",
        stage="research/write",
        role="writer",
        prompt_bytes=4001,
        max_tokens=512,
        n=2,
        prompt_tokens=1001,
        messages=7,
        prompt_chars=3999,
        prompt_lines=55,
        code_chars=321,
        tools=3,
        tool_choice="auto",
        output_format="schema",
        gap_s=0.25,
    )
    outcome = CallOutcome(1003, 88, cached_tokens=900, first_s=0.5, total_s=2.5, finish="length")
    return Example("live", run, index, shape, outcome, (0,), "task-7", 12.75)


def run_of(run: str, calls: int, tokens: int = 40, task: str = "") -> RunExamples:
    """A chain of calls."""
    return RunExamples(
        "live",
        run,
        tuple(
            example(run, index, tokens, (index - 1,) if index else (), task)
            for index in range(calls)
        ),
    )
