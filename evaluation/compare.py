"""`gemsmith compare A B`: two checkpoints on the same queries, with a paired test.

Only rows with the same data, the same settings and the same queries are compared
(by hash, so a renamed folder is still the same data; models that crop pictures
otherwise see other regions of them). Where the scores by query are at hand,
the difference has a bootstrap interval and a sign-flip p-value; both resample
images, not captions, where an image has several.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.errors import UserError
from evaluation import results, statistics
from evaluation.statistics import Interval

LOWER_IS_BETTER = ("median_rank",)
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of two checkpoints; `difference` is b - a, its interval and p-value None without scores by query."""

    task: str
    dataset: str
    metric: str
    a: float
    b: float
    difference: float
    ci95: Interval | None
    p_value: float | None
    n: int
    lower_is_better: bool


def rows_of(path: Path, step: int | None = None) -> list[Row]:
    """The rows of one checkpoint in a results file: those of `step`, or of its last step.

    Raises:
        UserError: no file, or no row of that step.
    """
    rows = results.read(path)
    steps = {row["step"] for row in rows}
    if not rows or (step is not None and step not in steps):
        known = ", ".join(map(str, sorted(s for s in steps if s is not None)))
        raise UserError(f"{path}: no row of step {step}; it has {f'the steps {known}' if known else 'no rows'}")
    if step is None:
        step = max((s for s in steps if s is not None), default=None)
    return [row for row in rows if row["step"] == step]


def compare(
    *, a: Path, b: Path, step_a: int | None = None, step_b: int | None = None, flips: int = statistics.FLIPS
) -> list[Comparison]:
    """Compare two results files metric by metric (a may be b, with two steps).

    Args:
        a, b: results files; the details folders beside them give the paired tests.
        step_a, step_b: which checkpoint; None takes the last step in the file.
        flips: draws of the permutation test.

    Raises:
        UserError: a file is missing, or the two share no metric on the same data with the same settings.
    """
    left = {_identity(row): row for row in rows_of(a, step_a)}
    right = {_identity(row): row for row in rows_of(b, step_b)}
    shared = [key for key in left if key in right]
    if not shared:
        raise UserError(
            f"{a} and {b}: share no metric on the same data with the same settings (and regions that both "
            "models see); evaluate both alike"
        )
    return [_compare_rows(a, left[key], b, right[key], flips) for key in shared]


def _identity(row: Row) -> tuple[str, ...]:
    hashes = row["hashes"]
    return row["task"], hashes["data"], hashes["settings"], hashes.get("queries", ""), row["metric"]


def _compare_rows(a: Path, left: Row, b: Path, right: Row, flips: int) -> Comparison:
    ci95, p_value = None, None
    before, after = results.per_query(a, left), results.per_query(b, right)
    if before and after:
        (x, clusters), (y, _) = before, after
        ci95 = statistics.difference_interval(x, y, clusters=clusters)
        p_value = statistics.paired_p(x, y, clusters=clusters, flips=flips)
    return Comparison(
        task=left["task"],
        dataset=left["dataset"],
        metric=left["metric"],
        a=left["value"],
        b=right["value"],
        difference=right["value"] - left["value"],
        ci95=ci95,
        p_value=p_value,
        n=left["n"],
        lower_is_better=left["metric"].endswith(LOWER_IS_BETTER),
    )


def as_text(comparisons: Sequence[Comparison]) -> str:
    """A plain table for the terminal."""
    head = ("task", "dataset", "metric", "A", "B", "B - A", "95 % interval", "p", "n")
    lines = [head]
    for c in comparisons:
        interval = f"[{c.ci95[0]:+.4g}, {c.ci95[1]:+.4g}]" if c.ci95 else "-"
        p = "-" if c.p_value is None else f"{c.p_value:.2g}"
        numbers = (f"{c.a:.4g}", f"{c.b:.4g}", f"{c.difference:+.4g}")
        lines.append((c.task, c.dataset, c.metric, *numbers, interval, p, str(c.n)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
