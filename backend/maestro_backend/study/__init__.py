"""Many simulations side by side: each policy at each load, deadline and seed, and what they say."""

from ._dump import COLUMNS, dumping
from ._estimates import Estimate, estimate, t975
from ._figures import CellResult, JobResult, RunRow, jain, measure, run_figures
from ._markdown import markdown
from ._parallel import CellError, in_processes
from ._plan import Cell, Job, Plan
from ._plots import check_drawing, draw_plots
from ._progress import Progress
from ._saturation import saturation
from ._scene import Draw, Scene
from ._setting import Named, Replayed, make_scene, read
from ._study import FORMAT, Drawn, progress, run_job, run_study, runs_of
from ._summary import FIGURES, REFERENCE, summary, value

__all__ = [
    "COLUMNS",
    "FIGURES",
    "FORMAT",
    "REFERENCE",
    "Cell",
    "CellError",
    "CellResult",
    "Draw",
    "Drawn",
    "Estimate",
    "Job",
    "JobResult",
    "Named",
    "Plan",
    "Progress",
    "Replayed",
    "RunRow",
    "Scene",
    "check_drawing",
    "draw_plots",
    "dumping",
    "estimate",
    "in_processes",
    "jain",
    "make_scene",
    "markdown",
    "measure",
    "progress",
    "read",
    "run_figures",
    "run_job",
    "run_study",
    "runs_of",
    "saturation",
    "summary",
    "t975",
    "value",
]
