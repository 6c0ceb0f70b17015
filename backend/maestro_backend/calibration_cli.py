"""`maestro calibrate`: its arguments and its output."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from maestro_agents.protocol import ConfigError
from maestro_backend.clusters import (
    Calibration,
    EngineClient,
    PrefillPoint,
    calibrate,
    find_geometry,
    load_geometry,
    load_profile,
    profile_yaml,
)
from maestro_backend.simulator import ModelGeometry


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """What `maestro calibrate` takes."""
    parser.add_argument("--url", help="a running engine, as http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key-env", metavar="NAME", help="variable that holds the key")
    parser.add_argument("--model", required=True, metavar="NAME", help="as the engine serves it")
    parser.add_argument(
        "--geometry",
        metavar="NAME|FILE",
        help="a known model, or a YAML file with one under models: (default: by --model)",
    )
    parser.add_argument(
        "--like",
        default="a100-80g",
        metavar="PROFILE",
        help="the profile that gives what is not measured (a100-80g)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the profile here")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="measure for about so long (60)"
    )
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> int:
    """Measure a live engine; a table of points on stdout, the profile there or in a file."""
    if options.url is None:
        raise ConfigError("give --url of a running engine; maestro calibrate starts none")
    if not options.url.startswith(("http://", "https://")):
        raise ConfigError(f"--url: {options.url!r} does not begin with http:// or https://")
    if not options.seconds > 0:
        raise ConfigError("--seconds must be more than 0")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {options.out.parent} to write {options.out} in")
    geometry = _geometry(options.model, options.geometry)
    like = load_profile(options.like)
    key = _key(options.api_key_env)

    async def measured() -> Calibration:
        async with EngineClient(options.url, options.model, key) as client:
            return await calibrate(
                client, geometry, seconds=options.seconds, step_s=like.step_s, say=_say
            )

    found = asyncio.run(measured())
    for line in table(found):
        _out(line)
    name = "calibrated" if options.out is None else options.out.stem
    text = profile_yaml(found, name, like.name)
    if options.out is None:
        _out("\n" + text.rstrip())
        return 0
    try:
        options.out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {options.out}: {error}") from error
    _say(f"{options.out} holds the profile {name!r}: name it under catalogues: of a cluster file")
    return 0


def table(found: Calibration) -> Iterator[str]:
    """Every point, measured and fitted, and what came out."""
    fit = found.fit
    yield f"{'step':<34} {'measured':>11} {'fitted':>11} {'error':>7}"
    for point in found.points:
        if isinstance(point, PrefillPoint):
            what = f"first token, {point.tokens} tokens"
        else:
            what = f"token, {point.batch} at once of {point.context:.0f}"
        measured, fitted = point.seconds * 1000, fit.seconds(point) * 1000
        yield f"{what:<34} {measured:>8.1f} ms {fitted:>8.1f} ms {fit.error(point):>+7.1%}"
    yield ""
    said = "given" if fit.step_fixed else "fitted"
    step_ms, first_ms = fit.step_s * 1000, fit.first_s * 1000
    yield f"besides: {step_ms:.2f} ms a step ({said}), {first_ms:.1f} ms a first token"
    yield (
        f"reached: {fit.bandwidth / 1e9:.1f} GB/s, {fit.flops / 1e12:.3f} TFLOPS, prefill "
        f"{fit.prefill_tokens_s:.0f} tokens/s; median error {found.median_error:.1%}"
    )


def _geometry(model: str, given: str | None) -> ModelGeometry:
    if given is not None:
        return load_geometry(given)
    known = find_geometry(model)
    if known is None:
        raise ConfigError(
            f"no geometry is known for {model!r}: give --geometry, a known model's name or a YAML "
            "file with one under models:"
        )
    return known


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"--api-key-env: the variable {variable} is not set")
    return key


def _say(line: str) -> None:
    sys.stderr.write(f"maestro: {line}\n")
    sys.stderr.flush()


def _out(line: str) -> None:
    sys.stdout.write(line + "\n")
