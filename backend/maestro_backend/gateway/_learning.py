"""What the predictor learns for good: stored calls, versions of the model, training."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from math import inf
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.config import Config
from maestro_backend.predictor import (
    CallOutcome,
    Estimate,
    Estimator,
    LiveCall,
    Predictor,
    Recent,
    RunExamples,
    base_model,
    explain,
    load_model,
)
from maestro_backend.predictor.store import Predicted, Store, StoreView
from maestro_backend.predictor.training import Retraining, TrainerProcess, Version, Versions
from maestro_backend.workflows import Journeys

_log = logging.getLogger("maestro.predictor")

BASE = "base"
"""The name of the model that ships with Maestro."""

_WARM_UP_CALLS = 20_000
"""So many stored calls, the newest, are learned from again at the start: ten seconds (ours)."""
_EXPLAINED = 2_000
"""Calls whose predictions can be explained, the last ones (ours)."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What was predicted of a call that has ended well, and by whom."""

    version: str
    estimate: Estimate | None
    estimator: Estimator | None


class Learning:
    """Around one predictor: gives it a model, keeps what ended, trains again in the background."""

    def __init__(self, config: Config, predictor: Predictor, journeys: Journeys) -> None:
        self._predictor = predictor
        self._journeys = journeys
        self._config = config.predictor
        self._folder = config.state_dir
        self._store: Store | None = None
        self._closing = False
        self._opening: asyncio.Future[Version | None] | None = None
        self._retraining: Retraining | None = None
        self._explained: Recent[str, Remembered] = Recent(_EXPLAINED)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Until the block ends. Serving never waits for it, nor fails with it."""
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            self._closing = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._opening is not None:
                await asyncio.gather(self._opening, return_exceptions=True)
            if self._store is not None:
                await asyncio.to_thread(self._store.close)

    async def _run(self) -> None:
        try:
            await self._learn()
        except Exception:  # what is in use goes on
            _log.exception("learning has ended")

    async def _learn(self) -> None:
        versions = Versions(self._folder / "models")
        self._opening = asyncio.ensure_future(asyncio.to_thread(self._begin, versions))
        version = await asyncio.shield(self._opening)
        try:
            await self._use(version)
        except ConfigError as error:
            _log.warning("%s is not used: %s", version.name if version else BASE, error)
            version = None
            await self._use(None)
        store = self._store
        if store is None:
            return
        for run in await asyncio.to_thread(self._stored, _WARM_UP_CALLS):
            if run.run:
                self._journeys.learn(_named(run))
                await asyncio.sleep(0)
        if not self._config.retrain or self._predictor.estimator is None:
            return
        process = TrainerProcess(store.path, versions.folder, self._folder / "logs" / "trainer.log")
        new_calls = await asyncio.to_thread(self._new_calls, version)
        self._retraining = Retraining(
            process, versions, self._use, current=version, new_calls=new_calls
        )
        await self._retraining.run()

    def _begin(self, versions: Versions) -> Version | None:
        """Open the store, find the version to use."""
        if self._config.store and not self._closing:
            try:
                path = self._folder / "calls.sqlite"
                self._store = Store(path, self._config.store_size, self._config.store_age)
            except ConfigError as error:
                _log.warning("finished calls are not stored: %s", error)
        return versions.current()

    async def _use(self, version: Version | None) -> None:
        estimator = await asyncio.to_thread(self._estimator, version)
        self._predictor.use(estimator, version.name if version else BASE)

    def _estimator(self, version: Version | None) -> Estimator | None:
        """Load a version, or the base model, and catch up with what has ended since.

        Raises:
            ConfigError: a version cannot be loaded; without the base model, plain tables predict.
        """
        try:
            estimator = Estimator(load_model(version.folder) if version else base_model())
        except ConfigError as error:
            if version is not None:
                raise
            _log.warning("plain tables predict: %s", error)
            return None
        limit = _WARM_UP_CALLS if version is None else self._new_calls(version)
        open_runs = self._predictor.open_runs()  # these are learned from when they end
        for run in self._stored(min(limit, _WARM_UP_CALLS)):
            if self._closing:
                break
            if run.run not in open_runs:
                estimator.follow(run)
        return estimator

    def _stored(self, limit: int) -> list[RunExamples]:
        """The newest stored runs, of so many calls at most."""
        if self._store is None or not limit:
            return []
        try:
            return self._store.runs(limit=limit)
        except ConfigError as error:
            _log.warning("stored calls cannot be read: %s", error)
            return []

    def _new_calls(self, version: Version | None) -> int:
        """Stored calls that the version has not learned from: those it was judged on, and later."""
        if self._store is None:
            return 0
        self._store.flush()
        try:
            with StoreView(self._store.path) as view:
                stored = view.count()
                if version is None:
                    return stored
                judged = int(version.manifest.metrics.get("calls", 0))
                return min(stored, view.count(since=version.manifest.made_at) + judged)
        except ConfigError as error:
            _log.warning("stored calls cannot be counted: %s", error)
            return 0

    # --- from calls -----------------------------------------------------------------------------

    def ended(self, call: str, live: LiveCall, outcome: CallOutcome, now: float) -> None:
        """A call has ended well: learn from it, and keep it."""
        self._explained[call] = Remembered(live.version, live.estimate, self._predictor.estimator)
        fallback = self._predictor.quick(live).length.p50
        example = self._predictor.finish(live, outcome, now)
        if example.outcome.output_tokens <= 0:
            return
        served = _predicted(live.estimate, live.shape.max_tokens)
        if self._store is not None:
            self._store.add(example, served, live.version, time.time())
        if self._retraining is not None and served.p50 is not None and served.p90 is not None:
            version = "" if live.version == BASE else live.version
            self._retraining.call_ended(version, example.length, served.p50, served.p90, fallback)

    def remembered(self) -> dict[str, Remembered]:
        """The last calls that ended well, by id."""
        return dict(self._explained)

    def stored(self) -> list[RunExamples]:
        """All runs in the store. Waits for the disk."""
        return self._store.runs() if self._store is not None else []

    # --- for people -----------------------------------------------------------------------------

    def explanation(self, call: str) -> dict[str, Any] | None:
        """What was predicted of a call and why; None if it is not remembered."""
        known = self._explained.get(call)
        if known is None:
            return None
        if known.estimate is None or known.estimator is None:
            return {"version": known.version, "predicted": None, "why": None}
        why = explain(known.estimator, known.estimate)
        predicted = asdict(_predicted(known.estimate))
        return {"version": known.version, "predicted": predicted, "why": asdict(why)}

    def recalled(self, run: str) -> list[dict[str, Any]]:
        """The calls of a run that ended before this process began: what was predicted, not why."""
        if self._store is None:
            return []
        try:
            with StoreView(self._store.path) as view:
                found = view.calls(run)
        except ConfigError as error:
            _log.warning("a run cannot be recalled: %s", error)
            return []
        return [
            {
                "call": "",
                "stage": one.example.shape.stage,
                "role": one.example.shape.role,
                "model": one.example.shape.model,
                "status": "done",
                "output_tokens": one.example.outcome.output_tokens,
                "predicted_tokens": one.predicted.p50,
                "version": one.version,
                "predicted": asdict(one.predicted),
                "why": None,
            }
            for one in found
        ]


def _predicted(made: Estimate | None, max_tokens: int | None = None) -> Predicted:
    """As it was served: not above `max_tokens`."""
    if made is None:
        return Predicted()
    most = max_tokens or inf
    p50, p90, p95, p99 = (min(q, most) for q in (made.p50, made.p90, made.p95, made.p99))
    return Predicted(p50, p50, p90, p95, p99, made.rest_p50)


def _named(run: RunExamples) -> RunExamples:
    """As the book learns runs: a call without a stage goes by its role."""
    calls = (
        call
        if call.shape.stage
        else replace(call, shape=replace(call.shape, stage=call.shape.role))
        for call in run.calls
    )
    return replace(run, calls=tuple(calls))
