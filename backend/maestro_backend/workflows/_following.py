"""What follows one stage: the graph's belief, what was learned, what a call announced."""

from __future__ import annotations

from collections.abc import Collection

from maestro_agents.protocol import END, Announcement, Workflow

from ._nouns import Expected
from ._transitions import Transitions


def chances(
    workflow: Workflow,
    stage: str,
    transitions: Transitions,
    announcement: Announcement | None = None,
    visit: int = 1,
) -> dict[str, float]:
    """P(next) after the `visit`-th execution of `stage`, END among them: the graph's belief,
    narrowed by what its call announced."""
    known = transitions.probabilities(workflow, stage, visit)
    if announcement is None or not announcement.successors:
        return known
    return _narrowed(known, announcement)


def next_stages(
    workflow: Workflow,
    stage: str,
    transitions: Transitions,
    announcement: Announcement | None = None,
    visit: int = 1,
) -> list[Expected]:
    """What follows `stage`, as `chances` has it."""
    said = announcement.successors if announcement else ()
    certain = {*workflow.successors(stage).certain} | {s.stage for s in said if s.certain}
    widths = {s.stage: s.width for s in said}
    found = chances(workflow, stage, transitions, announcement, visit)
    return [
        Expected(s, p, s in certain, stage, widths.get(s)) for s, p in found.items() if s != END
    ]


def _narrowed(graph: dict[str, float], announcement: Announcement) -> dict[str, float]:
    """The announced successors: certain ones, then by stated, then by learned probability.

    Candidates of which nothing is known share what the others leave. An open-ended list says
    nothing of what is missing in it: there the graph stays believed and nothing is shared out.
    """
    successors = announcement.successors
    certain = dict.fromkeys((s.stage for s in successors if s.certain), 1.0)
    stated = {s.stage: s.probability for s in successors if s.probability is not None}
    known = {s.stage: graph[s.stage] for s in successors if s.stage in graph} | stated
    rest = max(0.0, 1.0 - sum(p for stage, p in known.items() if stage not in certain))
    known |= certain
    if announcement.open_ended:
        return graph | known
    unknown = {s.stage: 0.0 for s in successors if s.stage not in known}
    return known | dict.fromkeys(unknown, rest / max(1, len(unknown)))


def leads(workflow: Workflow, source: str, target: str, closed: Collection[str]) -> bool:
    """Whether a path goes from `source` to `target`, passing through no stage of `closed`."""
    seen, agenda = {source}, [source]
    while agenda:
        certain, candidates = workflow.successors(agenda.pop())
        following = {*certain, *candidates} - seen
        if target in following:
            return True
        seen |= following
        agenda.extend(stage for stage in following if stage not in closed)
    return False
