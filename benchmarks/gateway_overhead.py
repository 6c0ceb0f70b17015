"""What the gateway costs: the stub engine asked directly and through Maestro, side by side.

    make bench NAME=gateway_overhead

Both ways alternate in rounds of one run, so a noisy machine hits both; ratios are what counts.
Prints median and spread over the rounds as JSON. The client shares the machine with the servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

BODY = {
    "model": "smollm2-135m",
    "messages": [{"role": "user", "content": "Summarise the notes on KV memory."}],
    "max_tokens": 16,
}
CONFIG = "models: {smollm2-135m: {source: 'random:tiny-llama', engine: stub, max_num_seqs: 256}}\n"


@contextmanager
def server(*command: str, says: str) -> Iterator[str]:
    """A server process; yields the word after `says` in its output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if says in line:
                yield line.split(says)[1].split()[0]
                return
        raise SystemExit(f"{command[2]} ended before it listened")
    finally:
        process.terminate()
        process.communicate(timeout=60)


async def ask(client: httpx.AsyncClient, count: int, at_once: int) -> tuple[float, list[float]]:
    """Requests per second, and each request's milliseconds."""
    times: list[float] = []
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            began = time.perf_counter()
            reply = await client.post("/chat/completions", json=BODY)
            reply.raise_for_status()
            times.append((time.perf_counter() - began) * 1000)

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return count / (time.perf_counter() - began), times


async def measure(urls: dict[str, str], rounds: int, count: int) -> dict[str, object]:
    """Alternate over `urls`; per concurrency the median and the spread of the rounds."""
    report: dict[str, object] = {}
    limits = httpx.Limits(max_connections=None)
    for at_once in (1, 32):
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in urls}
        for turn in range(rounds + 1):
            for name, url in urls.items():
                async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:
                    rate, times = await ask(client, count, at_once)
                if turn:  # the first round warms both up
                    rows[name].append((rate, statistics.median(times)))
        report[f"{at_once} at once"] = {name: summary(row) for name, row in rows.items()}
    return report


def summary(rows: list[tuple[float, float]]) -> dict[str, object]:
    rates, medians = zip(*rows, strict=True)
    return {
        "requests_s": {"median": round(statistics.median(rates)), "spread": spread(rates)},
        "latency_ms": {"median": round(statistics.median(medians), 2), "spread": spread(medians)},
    }


def spread(values: tuple[float, ...]) -> list[float]:
    return [round(min(values), 2), round(max(values), 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=400, help="requests in a round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(CONFIG + f"state_dir: {folder}\n")
        stub = (sys.executable, "-m", "maestro_agents.testing", "--model", "smollm2-135m")
        serve = (sys.executable, "-m", "maestro_backend", "serve", "--port", "0")
        with (
            server(*stub, "--port", "0", says=" on ") as direct,
            server(*serve, "--config", str(config), says="listening on ") as maestro,
        ):
            direct_url = direct if direct.endswith("/v1") else f"{direct}/v1"
            urls = {"direct": direct_url, "maestro": maestro}
            result = asyncio.run(measure(urls, options.rounds, options.count))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
