"""The paper's table: all peers on recorded runs, on a simulated cluster of eight A100.

    benchmarks/paper/run                        # an hour on two cores
    benchmarks/paper/run --calls 2000 --seeds 2 # a rough table in minutes

What this script does not know goes to `maestro simulate`. A quarter of each source's tasks is
replayed; a model is trained on the other three. Three sources are replayed whole and learned from
not at all: apps that nobody has seen, a fifth of the runs. Results go to build/paper (--out).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from zlib import crc32

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
UNSEEN = ("tau1", "lmcache_miniswe", "parrot_metagpt")
LOADS = "0.8,1.0,1.2"
DEADLINES = ("proportional:1.5", "proportional:2.5", "proportional:4", "fixed:interactive")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of recorded runs")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "paper")
    parser.add_argument("--rounds", help="at most so many boosting rounds: a quick trial")
    options, others = parser.parse_known_args()
    if not options.data.is_dir():
        sys.stderr.write(f"skipped: there are no recorded runs at {options.data}\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    past, replayed = split(options.data, options.out)
    model = options.out / "model"
    if not model.is_dir():
        rounds = ["--rounds", options.rounds] if options.rounds else []
        maestro("train", "--traces", past, "--out", model, *rounds)
    out = options.out
    maestro(
        "simulate",
        *("--workflows", replayed, "--model", model, "--cluster", "paper"),
        *("--arrivals", options.data / "arrivals" / "azure2023_conv.parquet"),
        *("--load", LOADS),
        *(part for deadline in DEADLINES for part in ("--deadline", deadline)),
        *("--json", out / "paper.json", "--dump", out / "paper.parquet"),
        *("--table", out / "paper.md", "--plots", out / "plots"),
        *others,
    )
    return 0


def split(data: Path, out: Path) -> tuple[Path, Path]:
    """Folders of what is learned from and what is replayed: no task is in both."""
    from pyarrow import parquet

    past, replayed = out / "past", out / "replayed"
    for folder in (past, replayed):
        folder.mkdir(exist_ok=True)
    for file in sorted(data.glob("*.parquet")):
        rows = parquet.read_table(file)
        tasks = rows.column("task_id").to_pylist()
        later = [file.stem in UNSEEN or crc32(task.encode()) % 4 == 0 for task in tasks]
        parquet.write_table(rows.filter(later), replayed / file.name)
        if not all(later):
            parquet.write_table(rows.filter([not late for late in later]), past / file.name)
    return past, replayed


def maestro(*arguments: str | Path) -> None:
    """Paths from here, so that the results do not tell whose machine it was."""
    told = [os.path.relpath(one, ROOT) if isinstance(one, Path) else one for one in arguments]
    subprocess.run([sys.executable, "-m", "maestro_backend", *told], check=True, cwd=ROOT)


if __name__ == "__main__":
    raise SystemExit(main())
