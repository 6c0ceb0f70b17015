"""What kind of work a role does, told by the words of its name and of its stage's."""

from __future__ import annotations

import re
from functools import lru_cache

KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("user", ("user", "customer", "human", "simulator")),
    ("router", ("router", "route", "supervisor", "selector", "ledger", "triage", "dispatch")),
    (
        "reviewer",
        ("review", "critic", "critique", "reflect", "feedback", "comment", "verif", "valid"),
    ),
    ("judge", ("judge", "check", "grade", "evaluat", "score", "rank", "vote", "risk")),
    ("tester", ("test", "debug", "qa", "error")),
    (
        "planner",
        ("plan", "orchestr", "manager", "lead", "chief", "decompos", "coordinat", "officer"),
    ),
    ("designer", ("design", "architect")),
    (
        "coder",
        ("cod", "program", "engineer", "develop", "swe", "implement", "modif", "revise", "fix"),
    ),
    ("searcher", ("search", "retriev", "brows", "web", "explore", "surfer", "scrap", "fetch")),
    ("extractor", ("extract", "parse", "classif", "label", "tag", "choose")),
    ("writer", ("writ", "draft", "report", "summar", "doc", "manual", "answer", "editor", "final")),
    ("debater", ("debat", "bull", "bear", "advocate", "debator")),
    ("tool_agent", ("tool", "action", "act", "execut", "assistant", "agent")),
    ("expert", ("expert", "analy", "research", "specialist", "advisor")),
)
"""Kinds and the beginnings of words that tell of them; the first that matches holds (ours)."""

OTHER = len(KINDS)

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


@lru_cache(maxsize=4096)
def kind_of(stage: str, role: str) -> int:
    """The index in `KINDS`, `OTHER` if no word tells. The stage's own words come first."""
    for text in (stage.rpartition("/")[2], role):
        words = [word.lower() for word in _WORDS.findall(text)]
        for index, (_, stems) in enumerate(KINDS):
            if any(word.startswith(stem) for word in words for stem in stems):
                return index
    return OTHER
