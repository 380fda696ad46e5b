"""Run the benchmarks, print a table, and write one row for each comparison to benchmarks/results/latest.json.

    python -m benchmarks.run                    all rows, five runs of either side
    python -m benchmarks.run --only build_keep  those whose name contains this; other rows of the file stay
    python -m benchmarks.run --quick            small sizes, one run: whether it works, not how fast it is

The tables that docs/ shows of the figures, docs/speed.md and the costs in docs/curation.md, are written along.

Both sides of a row run in turn in one process on the same data, so that
whatever else the machine does hits both, and the side that begins changes with
each call. A figure is the median of its runs; the ratio is that of the medians.
A row that misses its reach is written like any other, with "passed": false.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    building_rows,
    cluster_rows,
    cost,
    curation_rows,
    loader_rows,
    loss_rows,
    matching_rows,
    pages,
    selection_rows,
    step_cost_rows,
    step_peer_rows,
    training_rows,
    waiting_rows,
)
from benchmarks.case import LATEST, Bench, Case, Measure
from curation.errors import UserError, exit_code
from curation.manifest import SCHEMA_VERSION, write_json

RUNS = 5
Group = Callable[[Bench], Iterator[Case]]
GROUPS: dict[str, tuple[Group, tuple[str, ...]]] = {
    "measure": (curation_rows.measuring, ("measure_tiny_clip", "reselect")),
    "clip": (curation_rows.scoring, ("measure_clip_b32",)),
    "filter": (selection_rows.filtering, ("filters", "exact_dedup")),
    "match": (matching_rows.matching, ("concepts_naive", "concepts_pyahocorasick", "concepts_2_workers")),
    "cluster": (
        cluster_rows.clusters,
        ("semantic_dedup", "semantic_dedup_memory", "assign_exact", "assign_fast_isotropic", "assign_fast_clustered"),
    ),
    "spread": (matching_rows.spreading, ("ray_nothing",)),
    "build": (building_rows.building, ("build_keep_1.0", "build_keep_0.2", "build_tarwriter")),
    "step": (
        training_rows.steps,
        (
            "step_chunk_8_of_64",
            "step_zero3_8_of_64",
            "step_chunk_32_of_256",
            "step_zero3_32_of_256",
            "reduce_scatters",
            "step_retained_256",
        ),
    ),
    "peer": (
        step_peer_rows.step_peers,
        (
            "step_open_clip_8_of_64",
            "step_sentence_transformers_8_of_64",
            "step_open_clip_32_of_256",
            "step_sentence_transformers_32_of_256",
        ),
    ),
    "held": (step_cost_rows.step_memory, ("activation_memory",)),
    "waited": (waiting_rows.data_share, ("data_share",)),
    "loss": (
        loss_rows.losses,
        ("loss_8192_time", "loss_8192_products", "loss_8192_memory", "loss_32768_memory", "loss_doubled_batch"),
    ),
    "load": (loader_rows.loading, ("loader_small", "loader_web", "loader_raw")),
}
"""Cases that share what is set up for them, with their names, so that `--only` sets up nothing in vain."""


def measure(case: Case, runs: int) -> dict[str, Any]:
    """The row of one case, after one call of each side that is not counted."""
    sides = case.peer, case.ours
    figures: dict[Measure, list[float]] = {side: [] for side in sides}
    for turn in range(1 + runs * case.calls):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            figure = side()
            if turn:  # the first one warms caches
                figures[side].append(figure)
    ours, peer = (_means(figures[side], case.calls) for side in (case.ours, case.peer))
    ratio = statistics.median(ours) / statistics.median(peer)
    return {
        "schema_version": SCHEMA_VERSION,
        "name": case.name,
        "area": case.area,
        "ours": statistics.median(ours),
        "peer": statistics.median(peer),
        "peer_name": case.peer_name,
        "ratio": ratio,
        "better": case.better,
        "reach": case.reach,
        "passed": ratio >= case.reach if case.better == "higher" else ratio <= case.reach,
        "unit": case.unit,
        "runs": runs,
        "ours_runs": ours,
        "peer_runs": peer,
        "device": device(),
        "command": f"python -m benchmarks.run --only {case.name}",
    }


def _means(figures: Sequence[float], calls: int) -> list[float]:
    """Of so many figures after one another each."""
    return [statistics.fmean(figures[n : n + calls]) for n in range(0, len(figures), calls)]


def device() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores"


COLUMNS = ("row", "ours", "peer", "unit", "ratio", "asked", "", "peer is")


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [COLUMNS, *_cells(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def in_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same rows, of either area under its heading and with where they were measured."""
    said = []
    for area in dict.fromkeys(row["area"] for row in rows):
        of = [row for row in rows if row["area"] == area]
        lines = [COLUMNS, ("---",) * len(COLUMNS), *_cells(of)]
        on = ", ".join(dict.fromkeys(row["device"] for row in of))
        said.append(f"## {area.title()} ({on})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(said)


def _cells(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in rows:
        sign = ">=" if row["better"] == "higher" else "<="
        figures = (f"{row['ours']:,.4g}", f"{row['peer']:,.4g}", row["unit"], f"{row['ratio']:.3g}")
        verdict = "passed" if row["passed"] else "MISSED"
        yield row["name"], *figures, f"{sign} {row['reach']:.3g}", verdict, row["peer_name"]


def run(only: str, quick: bool, work: Path | None, out: Path) -> list[dict[str, Any]]:
    """Measure the chosen rows and bring them into `out`, each as soon as it is there.

    Raises:
        UserError: no row has such a name.
    """
    names = [name for _, group in GROUPS.values() for name in group]
    chosen = [name for name in names if only in name]
    if not chosen:
        raise UserError(f"--only {only}: in no row's name; the rows are {', '.join(names)}")
    kept = {row["name"]: row for row in json.loads(out.read_text())} if out.exists() else {}
    rows = []
    with tempfile.TemporaryDirectory(prefix="gemsmith-bench-", dir=work) as folder:
        for label, (group, of) in GROUPS.items():
            if not set(of) & set(chosen):
                continue
            place = Path(folder) / label
            place.mkdir()
            for case in group(Bench(work=place, quick=quick)):
                assert case.name in of, case.name
                if case.name not in chosen:
                    continue
                row = measure(case, 1 if quick else RUNS)
                print(f"{case.name}: {row['ours']:.4g} to {row['peer']:.4g} {case.unit}", file=sys.stderr, flush=True)
                rows.append(row)
                kept[case.name] = row
                write_json(out, [kept[name] for name in names if name in kept])
    return rows


def into_docs() -> None:
    """Put the tables of the committed results into the pages."""
    pages.put(pages.DOCS / "speed.md", "benchmarks.run", in_markdown(json.loads(LATEST.read_text())))
    pages.put(pages.DOCS / "curation.md", "benchmarks.cost", cost.table(cost.read(LATEST), cost.PAIRS))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", allow_abbrev=False)
    parser.add_argument("--only", default="", metavar="NAME", help="rows whose name contains this")
    parser.add_argument("--quick", action="store_true", help="small sizes and one run: no figures to go by")
    parser.add_argument("--work", type=Path, help="where to put the data (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="results file (default: benchmarks/results/latest.json)")
    a = parser.parse_args()
    if a.quick and a.out is None:
        parser.error("--quick figures are no results: name another file with --out")
    print(table(run(a.only, a.quick, a.work, a.out or LATEST)))
    if a.out is None:
        into_docs()
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
