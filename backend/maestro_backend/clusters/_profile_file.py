"""A calibrated profile as YAML that a cluster file can use."""

from __future__ import annotations

from ._calibrate import Calibration


def profile_yaml(found: Calibration, name: str, like: str) -> str:
    """A catalogue with one profile: what was fitted, and the rest of profile `like`.

    Shares are 1: `bandwidth` and `flops` are what the engine reaches, of each device. What devices
    tell each other in a step is in the fitted figures, so `allreduce` is 0.
    """
    fit = found.fit
    span = fit.geometry.tensor_parallel
    step = f"{fit.step_s * 1000:.3f}ms"
    said = f"given ({step}), not fitted" if fit.step_fixed else "fitted"
    return f"""\
# Made by `maestro calibrate` with the geometry of {fit.geometry.name}.
# Fitted: bandwidth and flops as they are reached, by each of {span} device(s); step was {said}.
# Median relative error {found.median_error:.1%} over {len(found.prefills)} prompt lengths and \
{len(found.decodes)} batches. Not measured, as in {like}: all else.
profiles:
  {name}:
    like: {like}
    bandwidth: {_short(fit.bandwidth / span)}B/s
    flops: {_short(fit.flops / span)}FLOPS
    memory_share: 1.0
    compute_share: 1.0
    step: {step}
    allreduce: 0ms
"""


def _short(value: float) -> str:
    """Four digits and a prefix: 2.039e12 -> `2.039T`."""
    units = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
    prefix, unit = next((pair for pair in units if value >= pair[1]), units[-1])
    digits = max(0, 4 - len(f"{value / unit:.0f}"))
    return f"{value / unit:.{digits}f}{prefix}"
