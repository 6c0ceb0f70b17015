"""When a run must have ended: by what it takes alone, or by its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import Template

from ._mix import Mix

ServiceTime = Callable[[str, int, int, int], float]
"""(model, prompt tokens, output tokens, cached tokens) -> seconds alone on a resident model."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """`kind` as the user wrote it. Either `factor` times the idle time, or seconds by class."""

    kind: str
    factor: float = 1.0
    by_class: Mapping[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Due:
    """Seconds from a run's start. `deadline_s` leaves out people's pauses, as the scheduler's clock
    does; on a calendar the run is due after `deadline_s + pauses_s`."""

    deadline_s: float
    pauses_s: float


def parse_deadline(text: str, mix: Mix) -> Deadline:
    """`proportional:2.5`, or `fixed:NAME` with a name of the mix's `deadlines`.

    Raises:
        ConfigError: it is neither.
    """
    kind, _, value = text.partition(":")
    if kind == "proportional":
        try:
            factor = float(value)
        except ValueError:
            factor = 0.0
        if 0.0 < factor < float("inf"):
            return Deadline(text, factor)
    elif kind == "fixed" and value in mix.deadlines:
        return Deadline(text, by_class=mix.deadlines[value])
    known = ", ".join(f"fixed:{name}" for name in mix.deadlines) or "none in this mix"
    raise ConfigError(
        f"deadline {text!r}: write proportional:FACTOR such as proportional:2.5, "
        f"or a fixed one ({known})"
    )


@dataclass(slots=True)
class DueTimes:
    """Deadlines of templates, each reckoned once.

    Proportional: the longest way through the run's calls, where a call takes its gap and then
    `factor` times its service alone: model resident, true lengths, prefix cached. Fixed: what the
    mix says of the class. Pauses are those of people on the longest way (factor 1 where fixed).
    """

    deadline: Deadline
    service_s: ServiceTime
    _known: dict[tuple[str, str], Due] = field(default_factory=dict)

    def __call__(self, template: Template) -> Due:
        due = self._known.get(template.key)
        if due is None:
            due = self._known[template.key] = self._reckoned(template)
        return due

    def _reckoned(self, template: Template) -> Due:
        total_s, pauses_s = longest_way(template, self.service_s, self.deadline.factor)
        fixed = self.deadline.by_class
        if fixed is None:
            return Due(total_s - pauses_s, pauses_s)
        if template.slo not in fixed:
            raise ConfigError(
                f"deadline {self.deadline.kind!r} says nothing of class {template.slo!r}: add it"
            )
        return Due(fixed[template.slo], pauses_s)


def longest_way(
    template: Template, service_s: ServiceTime, factor: float = 1.0
) -> tuple[float, float]:
    """Seconds of the longest way through a run, people included; and those that people take."""
    ways: list[tuple[float, float]] = []
    for call in template.calls:
        before = max((ways[index] for index in call.after), default=(0.0, 0.0))
        work_s = service_s(call.model, call.prompt_tokens, call.output_tokens, call.prefix_tokens)
        pause_s = call.gap_s if call.human else 0.0
        ways.append((before[0] + call.gap_s + factor * work_s, before[1] + pause_s))
    return max(ways, default=(0.0, 0.0))
