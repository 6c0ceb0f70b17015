"""Pictures of a study, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any

from maestro_agents.protocol import ConfigError
from maestro_backend.simulator import CallSpan, MemorySample

from ._study import Drawn

_STYLES = ("-", "--", ":")
_MARKS = "osD^vP*X<>"
_GIB = 2**30


def check_drawing() -> None:
    """Raises:
    ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plots needs matplotlib: pip install 'maestro-mas[sim]'") from error


def draw_plots(folder: Path, found: Mapping[str, Any], drawn: Drawn) -> list[Path]:
    """Everything that can be drawn of the results, into the folder; what was written.

    Raises:
        ConfigError: a picture cannot be written.
    """
    looks = {name: _look(at) for at, name in enumerate(found["policies"])}
    shown = _shown(found)
    memory = {name: drawn.memory[name] for name in shown if drawn.memory.get(name)}
    spans = {name: drawn.spans[name] for name in shown if drawn.spans.get(name)}
    figures = {
        f"attainment-{_file_name(deadline)}.png": _attainment(found, deadline, looks)
        for deadline in found["deadlines"]
    }
    figures["latency.png"] = _latency(found, drawn, looks)
    where = f"load {max(found['loads']):g}, deadline {found['deadlines'][0]}, seed 0"
    if memory:
        figures["memory.png"] = _memory(memory, where)
    if spans:
        figures["run.png"] = _gantt(spans, where)
    for name, figure in figures.items():
        try:
            figure.savefig(folder / name, dpi=120)
        except OSError as error:
            raise ConfigError(f"cannot write {folder / name}: {error}") from error
    return [folder / name for name in figures]


def _shown(found: Mapping[str, Any]) -> list[str]:
    """The first policy and the best one; if it is the first, the next best."""
    here = [
        entry["policy"]
        for entry in found["summary"]
        if entry["load"] == max(found["loads"]) and entry["deadline"] == found["deadlines"][0]
    ]
    first = next(iter(found["policies"]))
    return [first, *[name for name in here if name != first][:1]]


def _canvas(width: float, height: float, rows: int = 1, shared: bool = False) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, squeeze=False, sharex=shared)[:, 0]


def _look(at: int) -> dict[str, Any]:
    """Ten colours, then again with another line and mark."""
    style, mark = _STYLES[at // 10 % len(_STYLES)], _MARKS[(at + at // 10 * 3) % len(_MARKS)]
    return {"color": f"C{at % 10}", "linestyle": style, "marker": mark}


def _attainment(found: Mapping[str, Any], kind: str, looks: Mapping[str, Any]) -> Any:
    figure, (axes,) = _canvas(9, 5.5)
    entries = [entry for entry in found["summary"] if entry["deadline"] == kind]
    by_policy = {name: [e for e in entries if e["policy"] == name] for name in looks}
    spread = _spread(sorted({entry["load"] for entry in entries}), len(looks))
    for at, (name, mine) in enumerate(by_policy.items()):
        mine = sorted(mine, key=lambda entry: entry["load"])
        shares = [entry["figures"]["slo_attainment"] for entry in mine]
        means = [100 * (share["mean"] or 0.0) for share in shares]
        halves = [
            100 * ((share["high"] or share["mean"] or 0.0) - (share["mean"] or 0.0))
            for share in shares
        ]
        places = [entry["load"] + (at - len(looks) / 2) * spread for entry in mine]
        label = f"{name} (bound)" if mine and mine[0]["bound"] else name
        axes.errorbar(
            places,
            means,
            halves,
            label=label,
            capsize=2,
            markersize=4,
            linewidth=1.2,
            **looks[name],
        )
    axes.set(
        xlabel="load (1.0: fcfs saturates)",
        ylabel="runs in time, %",
        ylim=(0, 102),
        title=f"Runs in time, deadline {kind} (bars: 95 % over seeds)",
    )
    axes.set_xticks(sorted({entry["load"] for entry in entries}))
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def _spread(loads: Sequence[float], policies: int) -> float:
    """Policies stand a little apart, or their bars would hide each other."""
    gaps = [b - a for a, b in pairwise(loads)]
    return 0.15 * min(gaps, default=0.2) / max(1, policies)


def _latency(found: Mapping[str, Any], drawn: Drawn, looks: Mapping[str, Any]) -> Any:
    figure, (axes,) = _canvas(9, 5.5)
    load = max(found["loads"])
    for name in looks:
        seeds = [quantiles for quantiles in drawn.latencies.get(name, []) if quantiles]
        if not seeds:
            continue
        points = sorted(value for quantiles in seeds for value in quantiles)
        shares = [100 * (at + 1) / len(points) for at in range(len(points))]
        seen = [(x, y) for x, y in zip(points, shares, strict=True) if isfinite(x)]
        look = {**looks[name], "markevery": (10, max(1, len(seen) // 8)), "markersize": 4}
        axes.plot(*zip(*seen, strict=True), label=name, linewidth=1.2, **look)
    axes.set_xscale("log")
    axes.set(
        xlabel="latency of runs, s (tools and people included)",
        ylabel="measured runs that have ended, %",
        ylim=(0, 102),
        title=f"Latency at load {load:g}, deadline {found['deadlines'][0]}, all seeds",
    )
    axes.grid(alpha=0.3)
    _legend(axes)
    return figure


def _memory(by_policy: Mapping[str, Sequence[MemorySample]], where: str) -> Any:
    """Of all devices together: weights at the bottom, limits of KV caches above them."""
    figure, panels = _canvas(9, 1 + 3 * len(by_policy), len(by_policy), shared=True)
    figure.suptitle(f"Memory of all devices: {where}")
    for axes, (name, samples) in zip(panels, by_policy.items(), strict=True):
        times, weights, limits, reserved, used = _summed(samples)
        tops = [w + limit for w, limit in zip(weights, limits, strict=True)]
        axes.fill_between(times, 0, weights, step="post", color="C7", alpha=0.6, label="weights")
        axes.fill_between(
            times, weights, tops, step="post", color="C0", alpha=0.25, label="KV limits"
        )
        for values, look, label in (
            (reserved, "C3-", "KV reserved"),
            (used, "k:", "KV used"),
        ):
            above = [w + value for w, value in zip(weights, values, strict=True)]
            axes.step(times, above, look, where="post", linewidth=1, label=label)
        axes.set(ylabel="GiB", title=name)
        _legend(axes)
    highest = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, highest)
    panels[-1].set(xlabel="time, s", xlim=(0, None))
    return figure


def _summed(samples: Sequence[MemorySample]) -> tuple[list[float], ...]:
    """Times, and in GiB over all devices: weights, KV limits, KV reserved, KV used."""
    times: list[float] = []
    sums: tuple[list[float], ...] = ([], [], [], [])
    for at, here in groupby(samples, attrgetter("at")):
        times.append(at)
        parts = [
            (s.weights_bytes, s.kv_limit_bytes, s.kv_reserved_bytes, s.kv_used_bytes) for s in here
        ]
        for values, column in zip(sums, zip(*parts, strict=True), strict=True):
            values.append(sum(column) / _GIB)
    return times, *sums


def _gantt(by_policy: Mapping[str, Sequence[CallSpan]], where: str) -> Any:
    """One bar per call: waiting, the prompt, the answer. Coloured by model."""
    from matplotlib.patches import Patch

    most = max(len(spans) for spans in by_policy.values())
    height = 1.2 + len(by_policy) * (0.9 + 0.24 * min(most, 40))
    figure, panels = _canvas(10, height, len(by_policy), shared=True)
    figure.suptitle(f"One run: {where}")
    models = sorted({span.model for spans in by_policy.values() for span in spans})
    colours = {model: f"C{at % 10}" for at, model in enumerate(models)}
    for axes, (name, all_spans) in zip(panels, by_policy.items(), strict=True):
        spans = sorted(all_spans, key=attrgetter("index"))[:40]
        start = min(span.arrived for span in spans)
        for row, span in enumerate(spans):
            colour = colours[span.model]
            for begin, end, look in (
                (span.arrived, span.dispatched, {"color": "0.85"}),
                (span.dispatched, span.first_token, {"color": colour, "alpha": 0.45}),
                (span.first_token, span.ended, {"color": colour}),
            ):
                axes.barh(row, end - begin, left=begin - start, height=0.7, **look)
        axes.set_yticks(range(len(spans)), [f"{s.index} {s.stage}"[:28] for s in spans])
        axes.tick_params(axis="y", labelsize=7)
        axes.invert_yaxis()
        axes.set_title(name)
    panels[-1].set_xlabel("time since the run's first call, s")
    keys = [Patch(color="0.85", label="waiting")]
    keys += [Patch(color="0.3", alpha=0.45, label="prompt"), Patch(color="0.3", label="answer")]
    keys += [Patch(color=colours[model], label=model) for model in models]
    _legend(panels[0], handles=keys)
    return figure


def _legend(axes: Any, **options: Any) -> None:
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1), **options)


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in ".-" else "-" for letter in text)
