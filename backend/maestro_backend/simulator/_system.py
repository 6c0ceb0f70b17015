"""A system under test: the scheduler's policy and everything that is around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maestro_backend.scheduler.policies import POLICIES

Kv = Literal["max_tokens", "paged", "quantile+growth"]
Weights = Literal["planned", "lru", "prefetch-all", "belady", "static"]
Lengths = Literal["none", "median", "predicted", "true"]
Future = Literal["none", "routed", "learned", "announced", "true"]
Placement = Literal["load", "affinity"]


@dataclass(frozen=True, slots=True)
class System:
    """What one name of `--policies` stands for.

    `order` names the scheduler's policy. `kv`: what is reserved for a call at its start. `weights`:
    which models are brought in and put away. `lengths`: what is told of a call's output (none: the
    class default). `future`: what is told of the calls after it: nothing; what the app's routing
    has decided; what past runs let expect; both (announced); the truth. `elastic`: whether KV
    limits move; if not, each engine's cache has one size. `whole_device`: such a cache
    takes all that the weights leave, so that one model at a time is on a device. `preempts`:
    whether a call that has waited long for KV memory takes a less urgent one's. `about` says what
    it stands for, and what was adapted or left out. Those that are not `ranked` know what nobody
    can.
    """

    name: str
    about: str
    order: str = "maestro"
    kv: Kv = "quantile+growth"
    weights: Weights = "planned"
    lengths: Lengths = "predicted"
    future: Future = "announced"
    elastic: bool = True
    placement: Placement = "load"
    preempts: bool = True
    whole_device: bool = False
    ranked: bool = True

    @property
    def uses_deadlines(self) -> bool:
        """Whether its decisions can depend on when runs are due."""
        return POLICIES[self.order].uses_deadlines

    @property
    def needs_foresight(self) -> bool:
        return self.future not in ("none", "true") or self.lengths in ("median", "predicted")
