"""Small batches, every step worked out by hand."""

from __future__ import annotations

from math import inf

import pytest

from maestro_backend.simulator._engine import Engine
from maestro_backend.simulator._requests import Request, What
from maestro_backend.simulator._steps import StepCosts

# A step takes 1 s, 0.25 s per call... see `step`: memory and compute weigh so that both matter.
COSTS = StepCosts(fixed_s=1.0, weights_s=2.0, context_s=0.5, token_s=1.0, chunk_tokens=8)


def step(decoding: int, context: int, prompt: int = 0) -> float:
    return 1.0 + max(2.0 + 0.5 * context, 1.0 * (decoding + prompt))


def engine(blocks: int = 100, seqs: int = 4, tokens: int = 8, size: int = 4) -> Engine:
    return Engine(COSTS, blocks, size, seqs, tokens)


def run(served: Engine) -> list[tuple[float, str]]:
    """All that is left: (time, what:call)."""
    found = []
    while served.next_at() < inf:
        for happening in served.advance(served.next_at()):
            found.append((happening.at, f"{happening.what.value}:{happening.request.call}"))
    return found


def test_one_call() -> None:
    served = engine()
    request = Request("a", prompt_tokens=5, output_tokens=3)
    served.add(request, 10.0)
    # The prompt's step yields the first token; two more, over 6 and 7 tokens.
    first = 10 + step(0, 0, 5)
    assert first == 16.0
    assert run(served) == [(first + step(1, 6) + step(1, 7), "finished:a")]
    assert request.first_at == first
    assert served.running == 0


def test_two_prompts_share_a_step() -> None:
    served = engine()
    served.add(Request("a", 3, 2), 0.0)
    served.add(Request("b", 4, 3), 0.0)
    both = step(0, 0, 7)
    ended = both + step(2, 4 + 5)
    assert run(served) == [(ended, "finished:a"), (ended + step(1, 6), "finished:b")]


def test_a_late_call_joins_at_the_next_boundary() -> None:
    served = engine()
    first, late = Request("a", 5, 5), Request("b", 2, 2)
    served.add(first, 0.0)
    boundary = step(0, 0, 5) + step(1, 6)
    served.add(late, boundary - 1.0)
    joined = boundary + step(1, 7, 2)
    ended = joined + step(2, 8 + 3)
    assert run(served) == [(ended, "finished:b"), (ended + step(1, 9), "finished:a")]
    assert late.first_at == joined


def test_a_call_at_a_boundary_joins_there() -> None:
    served = engine()
    served.add(Request("a", 5, 5), 0.0)
    boundary = step(0, 0, 5)
    late = Request("b", 2, 2)
    served.add(late, boundary)
    served.advance(served.next_at())
    assert late.first_at == boundary + step(1, 6, 2)


def test_a_long_prompt_comes_in_chunks_beside_decoding() -> None:
    served = engine()
    served.add(Request("a", 2, 9), 0.0)
    long = Request("b", 16, 1)
    served.add(long, 1.0)
    now = step(0, 0, 2)
    now += step(1, 3, 7) + step(1, 4, 7)  # one of 8 tokens is a's
    assert now + step(1, 5, 2) == run(served)[0][0] == long.first_at


def test_what_a_chunk_leaves_of_a_step_goes_to_the_next_prompt() -> None:
    served = engine()
    long, short = Request("long", 10, 1), Request("short", 3, 1)
    served.add(long, 0.0)
    served.add(short, 0.0)
    # 8, then 2 and all 3.
    both = step(0, 0, 8) + step(0, 0, 5)
    assert run(served) == [(both, "finished:long"), (both, "finished:short")]


def test_three_calls_and_two_seats() -> None:
    served = engine(seqs=2)
    for name in "abc":
        served.add(Request(name, 2, 2), 0.0)
    assert (served.running, served.waiting) == (2, 1)
    ended = step(0, 0, 4) + step(2, 6)
    last = ended + step(0, 0, 2) + step(1, 3)
    assert run(served) == [(ended, "finished:a"), (ended, "finished:b"), (last, "finished:c")]


def test_the_queue_is_by_priority_then_arrival() -> None:
    served = engine(seqs=1)
    served.add(Request("running", 2, 2), 0.0)
    served.add(Request("later", 2, 1, priority=5), 0.1)
    served.add(Request("sooner", 2, 1, priority=1), 0.2)
    served.add(Request("soon", 2, 1, priority=1), 0.3)
    names = [what for _, what in run(served)]
    assert names == [f"finished:{name}" for name in ("running", "sooner", "soon", "later")]


def test_marks() -> None:
    served = engine()
    served.add(Request("a", 5, 6, mark=2), 0.0)
    first = step(0, 0, 5)
    (marked,) = served.advance(served.next_at())
    assert (marked.at, marked.what) == (first + step(1, 6), What.MARK)
    served.watch("a", 4)
    (again,) = served.advance(served.next_at())
    assert again.at == marked.at + step(1, 7) + step(1, 8)
    assert again.what is What.MARK
    assert run(served) == [(again.at + step(1, 9) + step(1, 10), "finished:a")]


def test_a_mark_set_while_steps_run() -> None:
    served = engine()
    served.add(Request("a", 5, 6), 0.0)
    served.watch("a", 3)
    (marked,) = served.advance(served.next_at())
    assert marked.at == step(0, 0, 5) + step(1, 6) + step(1, 7)


def test_a_call_taken_off_leaves_at_the_next_boundary() -> None:
    served = engine()
    served.add(Request("a", 2, 9), 0.0)
    served.add(Request("b", 3, 9), 0.0)
    boundary = step(0, 0, 5) + step(2, 3 + 4)
    # By then b has 3 prompt tokens and 2 output tokens.
    assert served.remove("b", boundary - 0.5) == 5
    served.watch("a", 3)
    (marked,) = served.advance(served.next_at())
    assert marked.at == boundary + step(1, 4)
    assert served.running == 1


def test_a_call_that_would_have_ended_at_the_boundary_is_gone_too() -> None:
    served = engine()
    served.add(Request("a", 2, 1), 0.0)
    assert served.remove("a", 0.5) == 3
    assert run(served) == []
    assert served.running == served.blocks_in_use == 0


def test_a_queued_call_taken_off() -> None:
    served = engine(seqs=1)
    served.add(Request("a", 2, 1), 0.0)
    served.add(Request("b", 2, 1), 0.0)
    assert served.remove("b", 0.0) == 0
    assert served.waiting == 0
    assert [what for _, what in run(served)] == ["finished:a"]


def test_the_last_admitted_goes_back_when_blocks_run_out() -> None:
    served = engine(blocks=4)
    first, second = Request("a", 6, 4), Request("b", 6, 4)
    served.add(first, 0.0)
    served.add(second, 0.0)
    # 12 tokens in chunks of 8: a's 6 and 2 of b's, then 4 of b's beside a's decoding.
    now = step(0, 0, 8) + step(1, 7, 4)
    # Both hold two of four blocks, a over 7 tokens, b over 6: a third block is needed for a's 9th.
    now += step(2, 8 + 7)
    happened = run(served)
    assert happened[0] == (now, "preempted:b")
    now += step(1, 9)  # nobody is admitted here
    assert happened[1] == (now, "finished:a")
    # b begins again with 6 + 2 tokens, of which its first block is still there; its third output
    # token comes with the rest.
    now += step(0, 0, 4) + step(1, 9)
    assert happened[2] == (now, "finished:b")
    assert (second.preemptions, second.recomputed_tokens) == (1, 3)
    assert first.preemptions == 0


def test_the_least_urgent_goes_back_first() -> None:
    served = engine(blocks=4)
    served.add(Request("a", 6, 4, priority=2), 0.0)
    served.add(Request("b", 6, 4, priority=1), 0.0)
    assert run(served)[0][1] == "preempted:a"


def test_a_lone_call_goes_on_over_the_limit() -> None:
    served = engine(blocks=1)
    served.add(Request("a", 6, 4), 0.0)
    served.add(Request("b", 1, 1), 0.0)
    assert served.blocks_in_use == 2
    assert [what for _, what in run(served)] == ["finished:a", "finished:b"]


def test_a_lower_limit_comes_as_calls_end() -> None:
    served = engine(blocks=10)
    served.add(Request("a", 4, 4), 0.0)
    served.add(Request("b", 4, 9), 0.0)
    # The second step gives each its second block; the limit moves at its end.
    served.set_blocks(3, step(0, 0, 8) + 0.5)
    assert not served.settled()
    assert (served.blocks_in_use, served.pending_blocks) == (4, 1)
    served.add(Request("c", 4, 1), served.next_at() - 0.5)
    assert served.waiting == 1
    (ended,) = served.advance(served.next_at())
    assert ended.request.call == "a"
    assert served.settled()
    assert (served.running, served.waiting) == (2, 0)
    assert [what for _, what in run(served)] == ["finished:c", "finished:b"]


def test_calls_may_grow_to_the_old_limit_while_a_lower_one_is_due() -> None:
    served = engine(blocks=6)
    served.add(Request("a", 4, 8), 0.0)
    served.add(Request("b", 4, 8), 0.0)
    served.advance(step(0, 0, 8))
    served.set_blocks(3, step(0, 0, 8) + 0.5)
    assert [what for _, what in run(served)] == ["finished:a", "finished:b"]
    assert served.settled()


def test_a_higher_limit_admits_the_queue() -> None:
    served = engine(blocks=1)
    served.add(Request("a", 4, 5), 0.0)
    served.add(Request("b", 4, 1), 0.0)
    assert served.waiting == 1
    served.set_blocks(4, step(0, 0, 4) + 0.5)
    assert (served.running, served.waiting) == (2, 0)


def test_a_limit_moved_in_the_last_step_knows_what_is_in_use() -> None:
    served = engine(blocks=100)
    served.add(Request("a", 4, 80), 0.0)
    served.add(Request("b", 4, 90), 0.0)
    served.set_blocks(30, served.next_at() - 0.1)
    # Each holds 4 tokens and the 78 that it has decoded.
    assert served.blocks_in_use == 2 * 21
    assert (served.settled(), served.pending_blocks) == (False, 12)


def test_a_call_comes_back_while_its_last_step_runs() -> None:
    served = engine()
    served.add(Request("a", 4, 2, mark=1), 0.0)
    served.remove("a", 0.5)
    served.add(Request("a", 4, 3), 0.6)
    served.watch("a", 2)
    first = 2 * step(0, 0, 4)
    assert run(served) == [
        (first + step(1, 5), "mark:a"),
        (first + step(1, 5) + step(1, 6), "finished:a"),
    ]


def test_block_seconds() -> None:
    served = engine()
    served.add(Request("a", 4, 2), 0.0)
    run(served)
    # One block while the prompt runs, half of the second in the step that fills it.
    assert served.used_block_s == pytest.approx(step(0, 0, 4) + 1.5 * step(1, 5))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens"):
        engine(seqs=9)
    with pytest.raises(ValueError, match="call a"):
        engine().add(Request("a", 1, 0), 0.0)
    served = engine()
    served.add(Request("a", 1, 1), 0.0)
    with pytest.raises(ValueError, match="advance"):
        served.add(Request("b", 1, 1), 100.0)
