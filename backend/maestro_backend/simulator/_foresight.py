"""What may be known of calls before they happen, computed ahead for each template.

Everything here is data made from past runs and from the prefix of the run itself. What is
true instead (`Truth`) only bounds may ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from maestro_backend.scheduler import ForecastCall, Length, Rest


@dataclass(frozen=True, slots=True)
class CallForesight:
    """Of one call of a template.

    `length`, `rest`: predicted as it arrives, from its own prompt size and the ended calls of its
    run that it waited for. `median`: what a table of past calls of its role says. `ahead`: what
    past runs let expect after it, as it arrives. `confirmed`: what the app says when the call has
    ended, its routing done: the followers that will certainly come, with lengths expected of such
    stages.
    """

    length: Length
    median: Length
    rest: Rest | None = None
    ahead: tuple[ForecastCall, ...] = ()
    confirmed: tuple[ForecastCall, ...] = ()


Foresight = Mapping[tuple[str, str], tuple[CallForesight, ...]]
"""By `Template.key`, one entry per call."""
