"""`gemsmith compare A B`: two checkpoints on the same queries, with a paired test.

Only rows with the same data, the same settings and the same queries are compared
(by hash, so a renamed folder is still the same data; models that crop pictures
otherwise see other regions of them). Where the scores by query are at hand,
the difference has a bootstrap interval and a sign-flip p-value; both resample
images, not captions, where an image has several.

A results file may hold many checkpoints. The one of its last step is taken, or
the one that is named; where that leaves several models for one metric, none is
picked: they are named, for the user to choose from.
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

    checkpoint_a: str
    checkpoint_b: str
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


def rows_of(path: Path, checkpoint: str | None = None) -> list[Row]:
    """The rows of one checkpoint in a results file: of the one named (as in `compare`), or of the file's last step.

    Raises:
        UserError: no file, or no row of that checkpoint.
    """
    rows = results.read(path)
    if not rows:
        raise UserError(f"{path}: holds no results; write some with `gemsmith evaluate --out {path}`")
    found = [row for row in rows if checkpoint is None or _is(row, checkpoint)]
    if not found:
        raise UserError(f"{path}: no row of checkpoint {checkpoint}; it has {_models(rows)}")
    step = max((row["step"] for row in found if row["step"] is not None), default=None)
    return [row for row in found if row["step"] == step]


def _is(row: Row, checkpoint: str) -> bool:
    end = Path(checkpoint).parts
    hashes = (row["hashes"]["weights"], row["hashes"]["preprocess"])
    return Path(row["checkpoint"]).parts[-len(end) :] == end or any(h.startswith(checkpoint) for h in hashes)


def _models(rows: Sequence[Row], most: int = 8) -> str:
    """The models of these rows, by all that tells them apart."""
    names = list(dict.fromkeys("{checkpoint} ({weights}, {preprocess})".format(**row, **row["hashes"]) for row in rows))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _by_identity(path: Path, checkpoint: str | None, option: str) -> dict[tuple[str, ...], Row]:
    """The row of each metric, of which `path` has one model alone; of one graded twice (other libraries) the newest."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows_of(path, checkpoint):
        model = row["hashes"]["weights"], row["hashes"]["preprocess"]
        found.setdefault(_identity(row), {})[model] = row
    for models in found.values():
        if len(models) > 1:
            rows = list(models.values())
            raise UserError(
                f"{path}: several models of step {rows[0]['step']}: {_models(rows)}; name one with {option}, "
                "by the end of its path or by a hash of it (weights, preprocessing)"
            )
    return {key: row for key, models in found.items() for row in models.values()}


def compare(
    *,
    a: Path,
    b: Path,
    checkpoint_a: str | None = None,
    checkpoint_b: str | None = None,
    flips: int = statistics.FLIPS,
) -> list[Comparison]:
    """Compare two results files metric by metric (a may be b, with two checkpoints).

    Args:
        a, b: results files; the details folders beside them give the paired tests.
        checkpoint_a, checkpoint_b: the end of a checkpoint's path (`step_00000100`, `RUN/export`), or the beginning
            of its weights' or its preprocessing's hash; None takes the last step in the file.
        flips: draws of the permutation test.

    Raises:
        UserError: a file is missing or has no such checkpoint, or several models of one step and metric, or the two
            share no metric on the same data with the same settings.
    """
    left = _by_identity(a, checkpoint_a, "--a-checkpoint")
    right = _by_identity(b, checkpoint_b, "--b-checkpoint")
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
        checkpoint_a=left["checkpoint"],
        checkpoint_b=right["checkpoint"],
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
    """A plain table for the terminal, under the checkpoints that are compared."""
    names = ([c.checkpoint_a for c in comparisons], [c.checkpoint_b for c in comparisons])
    title = [f"{side}: {', '.join(dict.fromkeys(found))}" for side, found in zip("AB", names, strict=True)]
    head = ("task", "dataset", "metric", "A", "B", "B - A", "95 % interval", "p", "n")
    lines = [head]
    for c in comparisons:
        interval = f"[{c.ci95[0]:+.4g}, {c.ci95[1]:+.4g}]" if c.ci95 else "-"
        p = "-" if c.p_value is None else f"{c.p_value:.2g}"
        numbers = (f"{c.a:.4g}", f"{c.b:.4g}", f"{c.difference:+.4g}")
        lines.append((c.task, c.dataset, c.metric, *numbers, interval, p, str(c.n)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    table = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join([*title, *table])
