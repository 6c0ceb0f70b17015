"""The predictor: what a call will take, from a trained model, tables, and learned rates."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import nan

import numpy as np

from maestro_backend.scheduler import Length

from ._call import UNKNOWN, CallOutcome, CallShape, Example, RunExamples
from ._estimator import Estimate, Estimator
from ._history import History
from ._matrix import follow_run
from ._model import Model
from ._rates import Rates
from ._recent import Recent
from ._replay import Pasts
from ._tables import Keys, Tables, keys_of

_log = logging.getLogger("maestro.predictor")

TABLES = ""
"""The version of a prediction that no model made."""

LIVE = "live"
"""The source of calls that were served here."""

_MAX_RUNS = 10_000
_MAX_STAGES = 10_000
_MAX_CALLS = 2_000
"""After so many finished calls a run counts as a new one (ours)."""
_STALE = 16
"""What is expected of a stage is made anew after so many runs have ended (ours)."""
_GIVE_UP = 20
"""A model that fails for so many calls in a row is asked no more (ours)."""
_SILENT_S = 600.0
"""A run without a call for so long is over (ours)."""
_NEWEST = 0.2
"""Share of the newest sample in the bytes of a token (ours)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Tokens and seconds. `length` is that of one choice.

    `kv_tokens` = prompt + 90th percentile of the output, for each choice: they share the prompt.
    `rest` is what the run will still produce on its critical path, this call included: median and
    90th percentile in tokens, None where no model says. `version` names the model, "" the tables.
    """

    prompt_tokens: int
    length: Length
    kv_tokens: int
    service_s: float
    rest: tuple[float, float] | None = None
    version: str = TABLES


@dataclass(slots=True)
class LiveCall:
    """A call between its arrival and its end, with what is needed to predict and to learn."""

    shape: CallShape
    keys: Keys
    history: History
    run: _Run | None = None
    parents: tuple[int, ...] = ()
    started_s: float = nan
    estimate: Estimate | None = None
    version: str = TABLES


@dataclass(slots=True)
class _Run:
    """A run as far as predictions need it. `frontier`: calls that have ended and that no other
    ended call waited for; a new call waited for all of them. `over`: it gets no more calls;
    `closed`: it has been learned from. Times are the gateway's seconds."""

    name: str
    began: float
    last_end: float
    pasts: Pasts = field(default_factory=Pasts)
    frontier: set[int] = field(default_factory=set)
    live: int = 0
    over: bool = False
    closed: bool = False


class Predictor:
    """Predicts calls, learns from how they ended. Counts only, never text.

    A prediction is made in two steps: `quick` reads plain tables, at once; `foretell` asks the
    model, for many calls together. Without a model, or if it fails, the tables hold.
    """

    def __init__(self, model: Model | None = None, version: str = TABLES) -> None:
        self.version = TABLES
        self._rates: dict[str, Rates] = {}
        self._sizes: Recent[tuple[str, str, str], float] = Recent(_MAX_STAGES)
        self._runs: Recent[str, _Run] = Recent(_MAX_RUNS)
        self.estimator: Estimator | None = None
        self.tables = Tables()
        self._failures = 0
        self._learned = 0
        self._expected: Recent[tuple[str, str, str, str, int], tuple[int, Length]] = Recent(
            _MAX_STAGES
        )
        if model is not None:
            self.use(Estimator(model), version)

    def use(self, estimator: Estimator | None, version: str) -> None:
        """From now on predict with this model and its tables; None: by the tables as they are."""
        self.estimator, self.version, self._failures = estimator, version, 0
        self._expected.clear()
        if estimator is not None:
            self.tables = estimator.tables

    # --- before a call --------------------------------------------------------------------------

    def predict(self, shape: CallShape) -> Prediction:
        """By plain tables, of a call that is in no run yet."""
        return self._prediction(shape, self.tables.length(keys_of(shape, 0, 0)))

    def expect(self, shape: CallShape) -> Prediction:
        """By the model, of a call that is still to come: as if it were the first of its run.

        Remembered for some time, so that a forecast costs little.
        """
        octave = self._sized(shape).prompt_tokens.bit_length()
        key = shape.workflow, shape.stage, shape.role, shape.model, octave
        known = self._expected.get(key)
        if known is None or self._learned - known[0] >= _STALE:
            sized = self._sized(shape) if shape.prompt_bytes else shape
            sized = replace(sized, max_tokens=None)
            [made] = self.foretell([LiveCall(sized, keys_of(shape, 0, 0), History())])
            known = self._expected[key] = self._learned, made.length
        return self._prediction(shape, known[1])

    def arrive(self, run: str | None, shape: CallShape, now: float) -> LiveCall:
        """A call has arrived; follow with `finish` or `drop`."""
        if run is None:
            history = History()
            return LiveCall(self._sized(shape), keys_of(shape, 0, 0), history)
        known = self._runs.use(run, lambda: _Run(run, now, now))
        if known.over or len(known.pasts.calls) >= _MAX_CALLS:
            self._close(known)
            known = self._runs[run] = _Run(run, now, now)
        known.live += 1
        parents = tuple(sorted(known.frontier))
        history = known.pasts.before(parents)
        shape = replace(self._sized(shape, history), gap_s=now - known.last_end if parents else nan)
        keys = keys_of(shape, history.count_of(shape), history.all.count)
        return LiveCall(shape, keys, history, known, parents, now - known.began)

    def quick(self, call: LiveCall) -> Prediction:
        """By plain tables: some microseconds."""
        return self._prediction(call.shape, self.tables.length(call.keys))

    def foretell(self, calls: Sequence[LiveCall]) -> list[Prediction]:
        """By the model, all calls at once; by the tables if there is none or it fails."""
        estimator = self.estimator
        if estimator is None or self._failures >= _GIVE_UP or not calls:
            return [self.quick(call) for call in calls]
        try:
            rows = [estimator.row(call.shape, call.keys, call.history) for call in calls]
            keys = [call.keys for call in calls]
            found = estimator.estimates(np.array(rows, np.float32), keys)
        except Exception:  # a broken model must cost its predictions, not the calls
            if len(calls) > 1:  # one of them may be to blame
                return [prediction for call in calls for prediction in self.foretell([call])]
            self._failures += 1
            if self._failures == 1:
                _log.exception("model %s fails: plain tables predict", self.version)
            return [self.quick(call) for call in calls]
        self._failures = 0
        for call, estimate in zip(calls, found, strict=True):
            call.estimate, call.version = estimate, self.version
        return [self._estimated(call, e) for call, e in zip(calls, found, strict=True)]

    def service_s(self, model: str, prompt_tokens: int, output_tokens: float) -> float:
        """Predicted seconds in the engine, alone."""
        return (self._rates.get(model) or Rates()).service_s(prompt_tokens, output_tokens)

    def _estimated(self, call: LiveCall, estimate: Estimate) -> Prediction:
        length = Length(estimate.p50, estimate.p90, estimate.p95, estimate.p99)
        prediction = self._prediction(call.shape, length)
        return replace(
            prediction, rest=(estimate.rest_p50, estimate.rest_p90), version=self.version
        )

    def _prediction(self, shape: CallShape, length: Length) -> Prediction:
        length = clipped(length, shape.max_tokens)
        prompt_tokens = self._sized(shape).prompt_tokens
        return Prediction(
            prompt_tokens=prompt_tokens,
            length=length,
            kv_tokens=prompt_tokens + int(shape.n * length.p90),
            service_s=self.service_s(shape.model, prompt_tokens, length.p50),
        )

    def _sized(self, shape: CallShape, history: History | None = None) -> CallShape:
        """With prompt tokens: those of the stage's last prompt in the run, and what has been added
        at the bytes of a token there; else all by the bytes of a token."""
        if shape.prompt_tokens != UNKNOWN:
            return shape
        per_token = self._sizes.get(_place(shape))
        if per_token is None:
            per_token = (self._rates.get(shape.model) or Rates()).bytes_per_token
        tokens = shape.prompt_bytes / per_token
        own = history.own.get((shape.stage, shape.role)) if history else None
        if own is not None and own.prompt > 0:
            tokens = own.prompt + (shape.prompt_bytes - own.prompt_bytes) / per_token
        return replace(shape, prompt_tokens=max(1, round(tokens)))

    # --- after a call ---------------------------------------------------------------------------

    def finish(self, call: LiveCall, outcome: CallOutcome, now: float) -> Example:
        """The call has ended well: learn from it. Returns what to remember of it."""
        self._learn_rates(call.shape, outcome)
        run = call.run if call.run and not call.run.closed else None
        index = len(run.pasts.calls) if run else 0
        example = Example(
            source=LIVE,
            run=run.name if run else "",
            index=index,
            shape=call.shape,
            outcome=outcome,
            parents=call.parents if run else (),
            started_s=call.started_s,
        )
        if outcome.output_tokens <= 0:
            self.drop(call)
            return example
        cut_off = outcome.finish == "length"  # how long it would have been is not known
        mine = call.estimate is not None and call.version == self.version
        if call.estimate is not None and self.estimator and mine and not cut_off:
            self.estimator.learn_call(call.keys, call.estimate, example.length)
        if run is None:
            follow_run(RunExamples(LIVE, "", (example,)), self.tables)
            self._learned += 1
            return example
        run.pasts.end(example, call.history, self.tables.residual(call.keys, example.length))
        run.frontier.difference_update(call.parents)
        run.frontier.add(index)
        self._leave(run, now)
        return example

    def drop(self, call: LiveCall) -> None:
        """The call failed or was cancelled: it teaches nothing."""
        if call.run is not None:
            self._leave(call.run, call.run.last_end)

    def learn(self, shape: CallShape, outcome: CallOutcome) -> None:
        """From a call that was in no run."""
        self.finish(self.arrive(None, shape, 0.0), outcome, 0.0)

    def end_run(self, name: str) -> None:
        """The run is over; its last calls may still be."""
        if (run := self._runs.get(name)) is not None:
            run.over = True
            self._forget_if_over(run)

    def sweep(self, now: float) -> None:
        """Runs that nobody ends: after ten silent minutes they count as over."""
        for run in [r for r in self._runs.values() if not r.live and now - r.last_end > _SILENT_S]:
            self.end_run(run.name)

    def open_runs(self) -> set[str]:
        """Those that have not been learned from yet."""
        return {*self._runs}

    def _leave(self, run: _Run, now: float) -> None:
        run.live -= 1
        run.last_end = now
        self._forget_if_over(run)

    def _forget_if_over(self, run: _Run) -> None:
        if run.over and not run.live:
            self._close(run)
            if self._runs.get(run.name) is run:
                del self._runs[run.name]

    def _close(self, run: _Run) -> None:
        """Learn from all of a run's calls, once."""
        if run.closed:
            return
        run.closed = True
        calls = tuple(run.pasts.calls[index] for index in range(len(run.pasts.calls)))
        examples = RunExamples(LIVE, run.name, calls)
        follow_run(examples, self.tables)
        self._learned += 1

    def _learn_rates(self, shape: CallShape, outcome: CallOutcome) -> None:
        rates = self._rates.setdefault(shape.model, Rates())
        if outcome.prompt_tokens > 0 and shape.prompt_bytes > 0:
            rates.learn_prompt(shape.prompt_bytes, outcome.prompt_tokens)
            per_token = shape.prompt_bytes / outcome.prompt_tokens
            known = self._sizes.get(_place(shape), per_token)
            self._sizes[_place(shape)] = known + _NEWEST * (per_token - known)
        if outcome.first_s is not None:
            uncached = outcome.prompt_tokens - outcome.cached_tokens
            decode_s = outcome.total_s - outcome.first_s
            per_choice = outcome.output_tokens / max(1, shape.n)
            rates.learn_speed(uncached, outcome.first_s, per_choice, decode_s)


def clipped(length: Length, max_tokens: int | None) -> Length:
    """No quantile above `max_tokens`."""
    if max_tokens is None:
        return length
    p95 = None if length.p95 is None else min(length.p95, max_tokens)
    p99 = None if length.p99 is None else min(length.p99, max_tokens)
    return Length(min(length.p50, max_tokens), min(length.p90, max_tokens), p95, p99)


def _place(shape: CallShape) -> tuple[str, str, str]:
    return shape.model, shape.workflow, shape.stage
