"""A scene out of what the user names: traces, arrivals, a cluster, a mix, a trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.clusters import load_cluster
from maestro_backend.evaluation import Trained, load_trained
from maestro_backend.foresight import foresee, overlap
from maestro_backend.predictor import Example
from maestro_backend.simulator import Cluster, Foresight, Service, SimRun, Template, idle_service
from maestro_backend.workloads import (
    Arrivals,
    DueTimes,
    Mix,
    Recorded,
    backlog,
    draw,
    load_mix,
    longest_way,
    parse_deadline,
    prepare,
    read_arrivals,
    read_workflows,
)

from ._plan import Plan
from ._saturation import saturation
from ._scene import Draw, Scene


@dataclass(frozen=True, slots=True)
class Named:
    """What the user named, as it was named. `model`: a folder, None for the model that ships.
    `saturation`: runs/s that are load 1.0, None to find out."""

    workflows: tuple[str, ...]
    history: tuple[str, ...] = ()
    arrivals: str = "poisson"
    cluster: str = "paper"
    mix: str = "paper"
    model: Path | None = None
    saturation: float | None = None


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was read. `templates` are `recorded` made fit for the cluster."""

    cluster: Cluster
    mix: Mix
    arrivals: Arrivals
    recorded: Recorded
    templates: tuple[Template, ...]
    history: Recorded
    trained: Trained | None


def read(named: Named) -> Replayed:
    """Every file that was named.

    Raises:
        ConfigError: something named is not there, or is wrong.
    """
    cluster, mix = load_cluster(named.cluster), load_mix(named.mix)
    arrivals = read_arrivals(named.arrivals)
    recorded = read_workflows(named.workflows).cut(mix.max_calls)
    return Replayed(
        cluster,
        mix,
        arrivals,
        recorded,
        prepare(recorded, mix, cluster.models),
        (read_workflows(named.history) if named.history else Recorded((), ())).cut(mix.max_calls),
        None if named.model is None else load_trained(named.model),
    )


def make_scene(
    named: Named, replayed: Replayed, plan: Plan, say: Callable[[str], None] = lambda line: None
) -> Scene:
    """Predictions are made here, ahead of all cells, and so is load 1.0.

    Raises:
        ConfigError: a deadline or what is learned from does not fit what is replayed, or with so
            few calls no run is measured.
    """
    cluster, mix, templates = replayed.cluster, replayed.mix, replayed.templates
    service = idle_service(cluster)
    due = {text: DueTimes(parse_deadline(text, mix), service) for text in plan.deadlines}
    idle_s = {one.key: longest_way(one, service)[0] for one in templates}
    for times in due.values():
        for template in templates:
            times(template)
    arrivals = replayed.arrivals

    def drawn(rate: float, calls: int, seed: int) -> Iterator[SimRun]:
        return draw(templates, mix, arrivals, rate, calls, seed)

    _check_runs(plan, drawn)
    foresight: Foresight = {}
    seen: tuple[str, ...] = ()
    if any(system.needs_foresight for system in plan.systems):
        foresight, seen = _foreseen(replayed, service, say)
    if seen:
        say(f"note: the model was trained on runs of {', '.join(seen)}; it may have seen these")
    return Scene(
        cluster,
        foresight,
        drawn,
        due,
        lambda template: idle_s[template.key],
        _saturation(named, replayed, service, say),
        _told(named, replayed, seen),
    )


def _check_runs(plan: Plan, drawn: Draw) -> None:
    for seed in range(plan.seeds):
        if not any(run.measured for run in drawn(1.0, plan.calls, seed)):
            raise ConfigError(
                f"--calls {plan.calls} leaves no run to measure (seed {seed}): take more"
            )


def _saturation(
    named: Named, replayed: Replayed, service: Service, say: Callable[[str], None]
) -> float:
    if named.saturation is not None:
        return named.saturation
    say("looking for load 1.0")

    def waiting(calls: int, seed: int) -> Iterator[Template]:
        return backlog(replayed.templates, replayed.mix, calls, seed)

    return saturation(replayed.cluster, service, waiting)


def _foreseen(
    replayed: Replayed, service: Service, say: Callable[[str], None]
) -> tuple[Foresight, tuple[str, ...]]:
    """Of each call; and the sources whose runs the model may have seen in training."""
    recorded, cluster, mix = replayed.recorded, replayed.cluster, replayed.mix
    past = prepare(replayed.history, mix, cluster.models)
    models = {one.key: [call.model for call in one.calls] for one in past}
    for template in replayed.templates:
        if template.key in models:
            raise ConfigError(
                f"run {template.name!r} of source {template.source!r} is in --history and in "
                "--workflows: what is replayed cannot be learned from in advance"
            )
        models[template.key] = [call.model for call in template.calls]

    def model_of(example: Example) -> str:
        return models[example.source, example.run][example.index]

    found = foresee(
        recorded.runs,
        trained=replayed.trained,
        history=replayed.history.runs,
        models=model_of,
        service_s=lambda model, prompt, output: service(model, prompt, round(output), 0),
        say=say,
    )
    return found, overlap(recorded.runs, replayed.trained)


def _told(named: Named, replayed: Replayed, seen: Sequence[str]) -> Mapping[str, Any]:
    templates = replayed.templates
    return {
        "workflows": list(named.workflows),
        "history": list(named.history),
        "arrivals": named.arrivals,
        "cluster": named.cluster,
        "mix": named.mix,
        "model": None if named.model is None else str(named.model),
        "templates": len(templates),
        "template_calls": sum(len(template.calls) for template in templates),
        "sources_in_training": list(seen),
    }
