"""What a forecast is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ._transitions import Numbers, Transitions


@dataclass(frozen=True, slots=True)
class Expected:
    """A stage that may start next, with what is believed of it now.

    A candidate is not `certain`, however likely; `after` is the stage whose end it waited for;
    `width` is the number of instances that were announced, None where nothing was said.
    """

    stage: str
    probability: float
    certain: bool = True
    after: str = ""
    width: int | None = None


@dataclass(frozen=True, slots=True)
class Habits:
    """What past runs taught: where stages lead, how wide they fan out, how often they call.

    `gap_s(source, target)`: seconds from the end of a stage to the next; `growth_tokens(stage)`:
    by how much each further prompt of a stage is longer.
    """

    transitions: Transitions = field(default_factory=Transitions)
    widths: Numbers = field(default_factory=Numbers)
    calls: Numbers = field(default_factory=Numbers)
    gap_s: Callable[[str, str], float] = lambda source, target: 0.0
    growth_tokens: Callable[[str], float] = lambda stage: 0.0


@dataclass(frozen=True, slots=True)
class Past:
    """What the run's past says about its future.

    `visits` are executions so far; `arrived(source, target)`: a join need not wait for that
    source; `copies`: instances still due of a stage in a fan-out; `running`: executions that run
    now, and the calls they have made; `ahead`: executions that have called and of which nothing
    else was heard yet; `step_width`: how many tasks, of this and other stages, run beside those.
    """

    visits: Mapping[str, int] = field(default_factory=dict)
    arrived: Callable[[str, str], bool] = lambda source, target: False
    copies: Callable[[str], int] = lambda stage: 1
    running: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    ahead: Callable[[str], int] = lambda stage: 0
    step_width: Mapping[str, int] = field(default_factory=dict)
