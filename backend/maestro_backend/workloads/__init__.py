"""What a cluster is asked for: recorded runs, when they start, which models and deadlines they get.

recorded = read_workflows(["traces/"])
mix = load_mix("paper")
templates = prepare(recorded, mix, cluster.models)
runs = draw(templates, mix, read_arrivals("poisson"), rate=0.5, calls=20_000, seed=1)
"""

from ._arrivals import Arrivals, read_arrivals
from ._deadlines import Deadline, Due, DueTimes, ServiceTime, longest_way, parse_deadline
from ._drawing import backlog, draw, shares
from ._mix import Mix, SourceMix, load_mix
from ._mooncake import read_mooncake
from ._mooncake_export import BLOCK_TOKENS, export_mooncake
from ._preparation import prepare
from ._recorded import Recorded
from ._traces import read_workflows

__all__ = [
    "BLOCK_TOKENS",
    "Arrivals",
    "Deadline",
    "Due",
    "DueTimes",
    "Mix",
    "Recorded",
    "ServiceTime",
    "SourceMix",
    "backlog",
    "draw",
    "export_mooncake",
    "load_mix",
    "longest_way",
    "parse_deadline",
    "prepare",
    "read_arrivals",
    "read_mooncake",
    "read_workflows",
    "shares",
]
