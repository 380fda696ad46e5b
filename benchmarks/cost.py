"""What a pool costs to curate, by the measured speeds: `python -m benchmarks.cost [--pairs N]`.

Reads benchmarks/results/latest.json and selection_scale.json, so that no figure
is typed by hand; the bench writes the table into docs/curation.md when it has
written the first. A phase's core-hours are pairs / (its speed / cores) / 3600, where its speed is the
row's on the cores that the row names; storage is pairs x bytes a pair, which are
assumed here and not measured: put in those of your pool. What the
bench does not measure (the disk's and the network's own limits, a GPU; the page
lists the signals and selectors) is not in it: divide by your machines, and take
the slower of this and of your storage.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.building_rows import SAMPLES, SHARDS
from benchmarks.case import LATEST
from benchmarks.cluster_rows import CLUSTER
from curation.errors import UserError, exit_code

PAIRS = 12_800_000_000
PAIR_BYTES = 30_000  # assumed: what a picture of the build's rows takes
EMBEDDING_BYTES = 768 * 2  # ViT-L/14 in float16
ROW_BYTES = 300  # assumed: a uid, a caption, a url and a dozen numbers in compressed parquet, and the verdict
BUILD_PAIRS = SHARDS * SAMPLES  # that one run of the build's row moves
SCALE = LATEST.with_name("selection_scale.json")


class Phase(NamedTuple):
    """The row's `side` says pairs a second, or the seconds of one run over `pairs`; on all cores of its device or on
    one."""

    name: str
    row: str
    single: bool = False
    side: Literal["ours", "peer"] = "ours"
    pairs: int = 1


PHASES = (
    Phase("CLIPScore and embedding, ViT-B/32, CPU", "measure_clip_b32"),
    # What selecting again is compared with is to measure again: text, language, image, fingerprints and a tiny CLIP.
    Phase("decode and all small signals", "reselect", side="peer"),
    Phase("concepts, 500,000 entries", "concepts_naive", single=True),
    Phase("select by thresholds and copies", "reselect"),
    Phase("select by eight selectors: near duplicates, concepts, clusters, ...", "selection_scale"),
    Phase("image-based, 100,000 centroids, exact", "assign_exact", single=True),
    Phase("image-based, 100,000 centroids, fast", "assign_fast_clustered", single=True),
    Phase(f"semantic duplicates within clusters of {CLUSTER:,}", "semantic_dedup", pairs=CLUSTER),
    Phase("build, everything kept", "build_keep_1.0", pairs=BUILD_PAIRS),
)


def core_hours(row: Mapping[str, Any], pairs: int, phase: Phase) -> float:
    """Of one phase: cores x seconds a pair x pairs / 3600."""
    found = re.search(r"(\d+) cores", row["device"])
    assert found, row["device"]
    cores = 1 if phase.single else int(found[1])
    figure = row[phase.side]
    seconds_a_pair = figure / phase.pairs if row["unit"] == "s" else 1 / figure
    return cores * seconds_a_pair * pairs / 3600


def table(rows: Mapping[str, Mapping[str, Any]], pairs: int) -> str:
    """Tables in Markdown, of the phases whose rows are there; the others are named.

    Raises:
        UserError: none of the rows is measured.
    """
    there = [phase for phase in PHASES if phase.row in rows]
    if not there:
        raise UserError("benchmarks/results/latest.json: has no row of curation; run make bench first")
    lines = [f"| {pairs:,} pairs | row | measured | on | core-hours |", "|---|---|---|---|---|"]
    for phase in there:
        row = rows[phase.row]
        hours, value = core_hours(row, pairs, phase), row[phase.side]
        figure = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        measured = f"{figure} {row['unit']} | {row['device']}"
        side = "" if phase.side == "ours" else f", its {phase.side}"
        lines.append(f"| {phase.name} | `{phase.row}`{side} | {measured} | {hours:,.0f} |")
    if lacking := ", ".join(dict.fromkeys(f"`{phase.row}`" for phase in PHASES if phase not in there)):
        lines += ["", f"Not measured yet: {lacking}."]
    lines += ["", "| storage | bytes a pair, assumed | TB |", "|---|---|---|"]
    for name, size in (
        ("pool, and shards at keep = 1.0", PAIR_BYTES),
        ("signals and ledger", ROW_BYTES),
        ("one embedding, 768 x float16", EMBEDDING_BYTES),
    ):
        lines.append(f"| {name} | {size:,} | {size * pairs / 1e12:,.1f} |")
    return "\n".join(lines)


def read(results: Path, scale: Path = SCALE) -> dict[str, dict[str, Any]]:
    """The rows by name, and as one of them the largest selection of `benchmarks.selection_scale` by columns."""
    rows = {row["name"]: row for row in json.loads(results.read_text())}
    columns = json.loads(scale.read_text())["kinds"]["columns"]
    pairs, largest = max(columns["sizes"].items(), key=lambda one: int(one[0]))
    speed = int(pairs) / largest["wall_s"]
    return {**rows, "selection_scale": {"ours": speed, "unit": "rows/s", "device": columns["device"]}}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", allow_abbrev=False)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--results", type=Path, default=LATEST, help="what `make bench` wrote")
    a = parser.parse_args()
    print(table(read(a.results), a.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
