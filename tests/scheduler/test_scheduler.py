"""One behaviour of the scheduler each: events in, commands out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduler.scenes import GIB, arrival, dispatched, node, ready, scheduler, stopped, worker

from maestro_backend.scheduler import (
    Abort,
    CallCancelled,
    CallFailed,
    CallFinished,
    CallProgress,
    CommandApplied,
    CommandFailed,
    Dispatch,
    ForecastCall,
    ForecastChanged,
    InvariantError,
    Length,
    NodeJoined,
    NodeLost,
    Reject,
    RejectReason,
    Residency,
    RunEnded,
    RunPaused,
    RunResumed,
    RunStarted,
    Scheduler,
    SetResidency,
    Settings,
    StageEnded,
    Tick,
    WorkerChanged,
    WorkerState,
)
from maestro_backend.scheduler.policies import policy


def future(model: str = "m", probability: float = 1.0, service_s: float = 5.0) -> ForecastCall:
    return ForecastCall("next", "", model, probability, 0.0, 10, Length(8, 16), service_s)


def test_a_call_goes_to_the_ready_worker_at_once() -> None:
    core = scheduler(worker())
    [command] = core.handle(arrival("a"), 1.0)
    assert isinstance(command, Dispatch)
    assert (command.call, command.worker) == ("a", "n/m")


def test_the_window_holds_calls_back_and_an_end_lets_the_next_go() -> None:
    core = scheduler(worker(window=1))
    assert dispatched(core.handle(arrival("a"), 1.0)) == ["a"]
    assert dispatched(core.handle(arrival("b"), 2.0)) == []
    assert dispatched(core.handle(CallFinished("a"), 3.0)) == ["b"]


def test_the_same_call_is_never_taken_twice() -> None:
    core = scheduler(worker())
    core.handle(arrival("a"), 1.0)
    assert core.handle(arrival("a"), 1.1) == []


def test_kv_memory_holds_the_head_back_and_nothing_smaller_overtakes() -> None:
    core = scheduler(worker(window=8, kv=100))
    assert dispatched(core.handle(arrival("big", kv=80), 1.0)) == ["big"]
    assert dispatched(core.handle(arrival("second", kv=50), 2.0)) == []
    assert dispatched(core.handle(arrival("small", kv=1), 3.0)) == []
    assert dispatched(core.handle(CallFinished("big"), 4.0)) == ["second", "small"]


def test_a_call_larger_than_the_kv_limit_still_runs_alone() -> None:
    core = scheduler(worker(kv=100))
    assert dispatched(core.handle(arrival("huge", kv=5000), 1.0)) == ["huge"]
    assert dispatched(core.handle(arrival("next", kv=1), 1.0)) == []
    core.validate()


def test_progress_grows_the_reservation_within_the_limit() -> None:
    core = scheduler(worker(kv=100))
    core.handle(arrival("a", kv=10), 1.0)
    core.handle(CallProgress("a", 40, 20), 2.0)
    assert core.ledger.claims["n/m"].reservations == {"a": 60}
    core.handle(CallProgress("a", 40, 5000), 3.0)
    assert core.ledger.claims["n/m"].reservations == {"a": 100}
    core.validate()


def lost(call: str) -> CallFailed:
    return CallFailed(call, "reset", retryable=True, worker_lost=True)


def test_a_call_whose_worker_is_lost_is_retried_in_its_old_place_until_the_limit() -> None:
    core = scheduler(worker(window=1), settings=Settings(max_attempts=2, suspect_s=0))
    core.handle(arrival("a"), 1.0)
    core.handle(arrival("b"), 2.0)
    assert dispatched(core.handle(lost("a"), 3.0)) == ["a"]
    reject, dispatch = core.handle(lost("a"), 4.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.RETRIES_EXHAUSTED
    assert "reset" in reject.detail
    assert isinstance(dispatch, Dispatch) and dispatch.call == "b"


def test_a_worker_that_broke_a_call_rests_until_its_node_speaks_or_time_passes() -> None:
    core = scheduler(worker(), settings=Settings(suspect_s=2))
    core.handle(arrival("a"), 1.0)
    assert core.handle(lost("a"), 3.0) == []
    assert core.handle(Tick(), 4.9) == []
    assert dispatched(core.handle(Tick(), 5.0)) == ["a"]
    assert core.handle(lost("a"), 6.0) == []
    assert core.handle(Tick(), 9.9) == [], "twice as long the second time"
    assert dispatched(core.handle(WorkerChanged(worker()), 9.9)) == ["a"]


def test_an_error_of_a_healthy_engine_is_tried_once_more_and_delays_nobody() -> None:
    core = scheduler(worker())
    error = CallFailed("a", "HTTP 500", retryable=True)
    core.handle(arrival("a"), 1.0)
    assert dispatched(core.handle(error, 2.0)) == ["a"]
    [reject] = core.handle(error, 3.0)
    assert isinstance(reject, Reject) and "HTTP 500" in reject.detail
    assert dispatched(core.handle(arrival("b"), 3.0)) == ["b"]


def test_a_call_that_failed_after_its_first_byte_is_not_retried() -> None:
    core = scheduler(worker())
    core.handle(arrival("a"), 1.0)
    assert core.handle(CallFailed("a", "gone", retryable=False), 2.0) == []
    assert core.calls.by_id == {}


def test_cancel_aborts_a_running_call_and_forgets_a_queued_one() -> None:
    core = scheduler(worker(window=1))
    core.handle(arrival("a"), 1.0)
    core.handle(arrival("b"), 1.0)
    assert core.handle(CallCancelled("b"), 2.0) == []
    [abort] = core.handle(CallCancelled("a"), 3.0)
    assert isinstance(abort, Abort) and abort.worker == "n/m"
    assert core.ledger.claims["n/m"].reservations == {}
    assert core.handle(CallCancelled("a"), 4.0) == []


def test_an_unknown_model_is_rejected_by_name() -> None:
    [reject] = scheduler(worker()).handle(arrival("a", model="nope"), 1.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.UNKNOWN_MODEL
    assert "nope" in reject.detail


def test_a_full_queue_says_when_to_come_back() -> None:
    core = scheduler(worker(window=1), settings=Settings(max_queued=1))
    core.handle(arrival("a"), 1.0)
    core.handle(arrival("b"), 1.0)
    [reject] = core.handle(arrival("c"), 1.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.QUEUE_FULL
    assert reject.retry_after_s is not None


def test_a_join_waits_for_earlier_source_calls_only() -> None:
    core = scheduler(worker(window=8))
    core.handle(arrival("a", stage="research"), 1.0)
    assert dispatched(core.handle(arrival("j", stage="write", waits_for=("research",)), 2.0)) == []
    assert dispatched(core.handle(arrival("late", stage="research"), 3.0)) == ["late"]
    assert dispatched(core.handle(CallFinished("a"), 4.0)) == ["j"]


def test_a_join_opens_at_once_for_a_call_of_another_model() -> None:
    core = scheduler(worker("a"), worker("b"))
    core.handle(arrival("a", stage="research", model="a"), 1.0)
    joined = arrival("j", stage="write", model="b", waits_for=("research",))
    assert dispatched(core.handle(joined, 1.1)) == []
    assert dispatched(core.handle(CallFinished("a"), 1.2)) == ["j"]


def test_another_runs_join_is_not_ours() -> None:
    core = scheduler(worker(window=8))
    core.handle(arrival("a", "r1", stage="research"), 1.0)
    joined = arrival("j", "r2", stage="write", waits_for=("research",))
    assert dispatched(core.handle(joined, 2.0)) == ["j"]


def test_maestro_prefers_the_run_with_the_least_work_left() -> None:
    core = scheduler(worker(window=1), rule="maestro")
    core.handle(arrival("first", "r0"), 0.0)
    core.handle(ForecastChanged("long", (future(service_s=50),)), 0.0)
    core.handle(arrival("long-1", "long", service_s=1), 1.0)
    core.handle(arrival("short-1", "short", service_s=3), 2.0)
    assert dispatched(core.handle(CallFinished("first"), 3.0)) == ["short-1"]


def test_an_unlikely_future_does_not_count() -> None:
    core = scheduler(worker(window=1), rule="maestro")
    core.handle(arrival("first", "r0"), 0.0)
    core.handle(ForecastChanged("maybe", (future(probability=0.4, service_s=50),)), 0.0)
    core.handle(arrival("maybe-1", "maybe", service_s=1), 1.0)
    core.handle(arrival("short-1", "short", service_s=3), 2.0)
    assert dispatched(core.handle(CallFinished("first"), 3.0)) == ["maybe-1"]


def test_a_long_wait_beats_shortness() -> None:
    core = scheduler(worker(window=1), rule="maestro")
    core.handle(arrival("first", "r0"), 0.0)
    core.handle(arrival("old", "old", service_s=1000), 1.0)
    core.handle(arrival("new", "new", service_s=1), 1801.0)
    assert dispatched(core.handle(CallFinished("first"), 1802.0)) == ["old"]


def test_engine_priority_is_lower_for_the_sooner_call() -> None:
    core = scheduler(worker(window=8), rule="maestro")
    [short] = core.handle(arrival("s", "r1", service_s=1), 0.0)
    [long] = core.handle(arrival("l", "r2", service_s=9), 0.0)
    assert isinstance(short, Dispatch) and isinstance(long, Dispatch)
    assert 0 <= short.priority < long.priority


def test_a_pause_moves_the_deadline() -> None:
    core = scheduler(worker())
    core.handle(RunStarted("r", deadline_s=20), 0.0)
    core.handle(RunPaused("r"), 5.0)
    core.handle(RunResumed("r"), 105.0)
    assert core.runs.by_id["r"].deadline == 120.0


def test_an_ended_run_is_forgotten_with_its_last_call() -> None:
    core = scheduler(worker())
    core.handle(RunStarted("r"), 0.0)
    core.handle(arrival("a"), 1.0)
    core.handle(RunEnded("r"), 2.0)
    assert "r" in core.runs.by_id
    core.handle(CallFinished("a"), 3.0)
    assert core.runs.by_id == {}


def test_an_event_after_the_end_brings_no_run_back() -> None:
    core = scheduler(worker())
    core.handle(RunStarted("r"), 0.0)
    core.handle(RunEnded("r"), 2.0)
    for late in (StageEnded("r", "s"), RunPaused("r"), RunResumed("r")):
        core.handle(late, 3.0)
    assert core.runs.by_id == {}


def test_a_silent_run_is_forgotten_in_time() -> None:
    core = scheduler(worker(), settings=Settings(run_idle_s=10))
    core.handle(RunStarted("r"), 0.0)
    core.handle(Tick(), 10.0)
    assert "r" in core.runs.by_id
    core.handle(Tick(), 10.1)
    assert core.runs.by_id == {}


def test_a_call_brings_its_model_in_and_is_dispatched_when_it_is_ready() -> None:
    asleep = worker(state=WorkerState.STOPPED)
    core = scheduler(asleep)
    [bring] = core.handle(arrival("a"), 1.0)
    assert isinstance(bring, SetResidency)
    assert (bring.model, bring.residency) == ("m", Residency.DEVICE)
    assert core.handle(Tick(), 2.0) == [], "asked once only"
    core.handle(CommandApplied(bring.id), 3.0)
    assert dispatched(core.handle(WorkerChanged(ready(asleep)), 3.0)) == ["a"]


def test_an_announced_model_is_brought_in_before_its_call() -> None:
    core = scheduler(worker("a"), worker("b", state=WorkerState.STOPPED))
    [bring] = core.handle(ForecastChanged("r", (future("b"),)), 1.0)
    assert isinstance(bring, SetResidency) and bring.model == "b"


def test_an_announced_model_never_evicts_one_with_calls() -> None:
    core = scheduler(worker("a"), worker("b", state=WorkerState.STOPPED), capacity=GIB + 5000)
    core.handle(arrival("x", model="a"), 0.5)
    assert core.handle(ForecastChanged("r", (future("b"),)), 1.0) == []


def test_a_waiting_call_evicts_the_idle_model_and_then_starts_its_own() -> None:
    idle, wanted = worker("a"), worker("b", state=WorkerState.STOPPED)
    core = scheduler(idle, wanted, capacity=GIB + 5000)
    [away] = core.handle(arrival("x", model="b"), 1.0)
    assert isinstance(away, SetResidency)
    assert (away.model, away.residency) == ("a", Residency.DISK)
    core.validate()
    [bring] = core.handle(WorkerChanged(stopped(idle)), 2.0)
    assert isinstance(bring, SetResidency)
    assert (bring.model, bring.residency) == ("b", Residency.DEVICE)
    core.validate()


def test_a_pinned_model_never_makes_room_and_nobody_waits_for_it_to() -> None:
    pinned = Settings(pinned=("a",), patience_s=10)
    wanted = worker("b", state=WorkerState.STOPPED)
    core = scheduler(worker("a"), wanted, capacity=GIB + 5000, settings=pinned)
    [reject] = core.handle(arrival("x", model="b"), 1.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.MODEL_TOO_LARGE


def test_a_busy_model_drains_for_an_older_call_after_patience() -> None:
    busy, wanted = worker("a"), worker("b", state=WorkerState.STOPPED)
    core = scheduler(busy, wanted, capacity=GIB + 5000, settings=Settings(patience_s=10))
    core.handle(arrival("a1", model="a"), 0.0)
    assert core.handle(arrival("b1", model="b"), 1.0) == []
    assert core.handle(Tick(), 12.0) == [], "draining: a1 still runs"
    assert dispatched(core.handle(arrival("a2", model="a"), 13.0)) == []
    [away] = core.handle(CallFinished("a1"), 14.0)
    assert isinstance(away, SetResidency) and away.residency is Residency.DISK


def test_a_model_that_fits_nowhere_is_rejected_with_numbers() -> None:
    core = scheduler(worker(state=WorkerState.STOPPED), capacity=GIB // 2)
    [reject] = core.handle(arrival("a"), 1.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.MODEL_TOO_LARGE
    assert f"{GIB // 2:,}" in reject.detail


def test_a_failed_start_rejects_with_its_reason_and_is_tried_again_later() -> None:
    core = scheduler(worker(state=WorkerState.STOPPED), settings=Settings(failure_pause_s=30))
    [bring] = core.handle(arrival("a"), 1.0)
    [reject] = core.handle(CommandFailed(bring.id, "no such model file"), 2.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.MODEL_FAILED
    assert reject.detail == "no such model file"
    assert reject.retry_after_s == pytest.approx(30)
    [again] = core.handle(arrival("b"), 33.0)
    assert isinstance(again, SetResidency)


def test_a_model_whose_size_is_learned_at_its_start_is_planned_again() -> None:
    unknown = replace(worker("b", state=WorkerState.STOPPED), weights_bytes=0)
    core = scheduler(worker("a"), unknown, capacity=GIB + 5000)
    [bring] = core.handle(arrival("x", model="b"), 1.0)
    assert core.handle(WorkerChanged(replace(unknown, weights_bytes=GIB)), 2.0) == []
    [away] = core.handle(CommandFailed(bring.id, "does not fit yet"), 2.1)
    assert isinstance(away, SetResidency)
    assert (away.model, away.residency) == ("a", Residency.DISK)
    core.validate()


def test_calls_wait_while_a_worker_restarts() -> None:
    core = scheduler(worker())
    core.handle(arrival("a"), 1.0)
    core.handle(WorkerChanged(replace(worker(), state=WorkerState.RESTARTING)), 2.0)
    assert core.handle(lost("a"), 2.1) == []
    core.validate()
    assert dispatched(core.handle(WorkerChanged(worker()), 3.0)) == ["a"]


def test_a_lost_node_keeps_its_calls_until_another_comes() -> None:
    core = scheduler(worker())
    core.handle(arrival("a"), 1.0)
    core.handle(NodeLost("n"), 2.0)
    core.validate()
    assert core.handle(lost("a"), 2.1) == []
    assert dispatched(core.handle(NodeJoined(node(worker())), 3.0)) == ["a"]
    core.validate()


def test_calls_that_outlive_the_loss_of_their_node_keep_their_memory() -> None:
    core = scheduler(worker(window=8, kv=100))
    core.handle(arrival("a", kv=90), 1.0)
    core.handle(NodeLost("n"), 2.0)
    core.handle(NodeJoined(node(worker(window=8, kv=100))), 3.0)
    core.validate()
    assert dispatched(core.handle(arrival("b", kv=90), 4.0)) == []
    assert dispatched(core.handle(CallFinished("a"), 5.0)) == ["b"]


def test_without_any_node_calls_wait_a_minute_and_no_longer() -> None:
    core = scheduler(worker())
    core.handle(NodeLost("n"), 10.0)
    assert core.handle(arrival("a"), 11.0) == []
    assert core.handle(Tick(), 69.9) == []
    [reject] = core.handle(Tick(), 70.0)
    assert isinstance(reject, Reject) and reject.reason is RejectReason.NO_NODE


def test_a_call_without_a_run_leaves_nothing_behind() -> None:
    core = scheduler(worker())
    core.handle(arrival("a", run="a"), 1.0)
    core.handle(CallFinished("a"), 2.0)
    assert core.runs.by_id == {} and core.calls.by_id == {}


def test_a_command_that_fails_after_the_worker_is_ready_fails_no_model() -> None:
    asleep = worker(state=WorkerState.STOPPED)
    core = scheduler(asleep)
    [bring] = core.handle(arrival("a"), 1.0)
    core.handle(WorkerChanged(ready(asleep)), 2.0)
    core.handle(CommandFailed(bring.id, "lost the reply"), 2.1)
    assert dispatched(core.handle(arrival("b"), 3.0)) == ["b"]
    core.validate()


def test_validate_notices_a_running_call_without_memory() -> None:
    core = scheduler(worker())
    core.handle(arrival("a"), 1.0)
    core.ledger.release("n/m", "a")
    with pytest.raises(InvariantError, match="without a reservation"):
        core.validate()


def test_a_kv_limit_that_shrinks_under_calls_is_not_overrun() -> None:
    core = scheduler(worker(window=8, kv=100))
    core.handle(arrival("a", kv=90), 1.0)
    core.handle(WorkerChanged(worker(window=8, kv=50)), 2.0)
    core.validate()


def test_validate_notices_a_leaked_reservation() -> None:
    core = scheduler(worker())
    core.ledger.reserve("n/m", "ghost", 10)
    with pytest.raises(InvariantError, match="ghost"):
        core.validate()


def test_preload_brings_everything_that_fits_and_evicts_nothing() -> None:
    core = Scheduler(policy("fcfs"))
    workers = [worker(m, state=WorkerState.STOPPED) for m in "abc"]
    event = NodeJoined(node(*workers, capacity=2 * GIB + 5000), preload=("a", "b", "c"))
    moves = core.handle(event, 0.0)
    assert [m.model for m in moves if isinstance(m, SetResidency)] == ["a", "b"]
    core.validate()


def test_a_preload_that_found_no_room_does_not_hinder_the_forecast() -> None:
    core = Scheduler(policy("fcfs"))
    workers = [worker("a"), worker("b", state=WorkerState.STOPPED)]
    event = NodeJoined(node(*workers, capacity=GIB + 5000), preload=("a", "b"))
    assert core.handle(event, 0.0) == []
    [away] = core.handle(ForecastChanged("r", (future("b"),)), 1.0)
    assert isinstance(away, SetResidency) and away.model == "a"
