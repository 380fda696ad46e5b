"""The demo's figures and its one page: what the filters did, what it changed, and what the models see and say.

All numbers come from the files that the commands left (ledger, manifests,
metrics, results); nothing is kept in memory between the steps.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from curation.manifest import read_manifest
from curation.noise import CAUGHT_BY, KINDS
from evaluation import data as evaluation_data
from evaluation import report as pages
from evaluation import results, statistics
from training.checkpoint import latest
from training.inference import load

HEADLINE = "text_to_image_mrr"
TEMPLATES = Path(__file__).with_name("templates")
FILTER_OF = {  # selector of recipes/curate/tiny_demo.yaml -> the filter that it is, as the pool's truth names filters
    "language": "language",
    "caption_rules": "caption",
    "resolution": "resolution",
    "aspect": "aspect",
    "clip_score": "clip_score",
    "exact_duplicates": "duplicates",
    "near_duplicates": "duplicates",
}
BALANCE = "balance"


def joined(out: Path) -> pa.Table:
    """The ledger with the true `noise` of every sample, found by its place: a broken json hides its uid."""
    ledger = ds.dataset(out / "curated" / "ledger", format="parquet").to_table()
    truth = pq.read_table(out / "pool" / "truth.parquet", columns=["shard", "key", "noise"]).to_pylist()
    noise = {(Path(row["shard"]).stem, row["key"]): row["noise"] for row in truth}
    places = zip(ledger["shard"].to_pylist(), ledger["key"].to_pylist())
    return ledger.append_column("noise", pa.array([noise[Path(shard).stem, key] for shard, key in places]))


def filter_quality(table: pa.Table) -> tuple[dict[str, dict[str, float | None]], float, float]:
    """Every filter against the truth, and the recall and precision of clean pairs past all filters but balancing.

    A filter's precision: share of noise in what it would drop. Its recall: share that it would drop of the kinds
    it is there for. (A duplicate filter sees only what earlier ones left, so its recall is among those.)
    """
    noise = np.array(table["noise"].to_pylist(), dtype=object)
    failed = table["failed"].to_pylist()
    error = np.array([verdict == "error" for verdict in table["verdict"].to_pylist()])
    by_name = {name: np.array([name in f for f in failed]) for name in FILTER_OF}
    clean = noise == "clean"
    order = list(FILTER_OF)
    quality = {}
    for name, dropped in by_name.items():
        kinds = CAUGHT_BY[FILTER_OF[name]]
        if FILTER_OF[name] == "duplicates":
            kinds = ("exact_duplicate",) if name == "exact_duplicates" else ("near_duplicate",)
            earlier = order[: order.index(name)]
            reached = ~error & ~np.any([by_name[n] for n in earlier], axis=0)
        else:
            reached = ~error
        target = np.isin(noise, kinds) & reached
        quality[name] = {
            "dropped": int(dropped.sum()),
            "precision": float((~clean[dropped]).mean()) if dropped.any() else None,
            "recall": float(dropped[target].mean()) if target.any() else None,
        }
    passed = ~error & ~np.any(list(by_name.values()), axis=0)
    return quality, float(passed[clean].mean()), float(clean[passed].mean())


def arm_rows(out: Path, arm: str) -> list[dict[str, Any]]:
    return results.read(out / "graded" / arm / "results.jsonl")


def summarise(out: Path) -> dict[str, Any]:
    """The summary's figures, from the files of a finished demo."""
    from jobs.demo import ARMS

    rows = {arm: {row["metric"]: row for row in arm_rows(out, arm)} for arm in ARMS}
    scores = {}
    for arm in ARMS:
        found = results.per_query(out / "graded" / arm / "results.jsonl", rows[arm][HEADLINE])
        assert found is not None
        scores[arm] = found[0]
    gap = statistics.gap_closed(scores["raw"], scores["curated"], scores["oracle"])
    quality, recall, precision = filter_quality(joined(out))
    return {
        "arms": {arm: {metric: row["value"] for metric, row in rows[arm].items()} for arm in ARMS},
        "queries": int(rows["raw"][HEADLINE]["n"]),
        "oracle_over_raw": float(scores["oracle"].mean() / scores["raw"].mean() - 1),
        "gap_closed": gap.value,
        "gap_ci95": gap.ci95,
        "p_value": gap.p_value,
        "filters": quality,
        "clean_recall": recall,
        "clean_precision": precision,
    }


def write_page(out: Path, summary: dict[str, Any], seconds: dict[str, float]) -> Path:
    """Render OUT/report/index.html."""
    from jobs.demo import ARMS

    page = out / "report" / "index.html"
    page.parent.mkdir(exist_ok=True)
    heldout = evaluation_data.open_retrieval(out / "heldout")
    model = load(latest(out / "runs" / "curated") or out)
    manifest = read_manifest(out / "curated" / "manifest.json")
    assert manifest is not None
    table = joined(out)
    rows = {arm: {row["metric"]: row for row in arm_rows(out, arm)} for arm in ARMS}
    spread = np.linspace(0, len(heldout.captions) - 1, 6).astype(int).tolist()
    text = (
        pages.environment(TEMPLATES)
        .get_template("demo.html.j2")
        .render(
            title="Does curation pay?",
            summary=summary,
            seconds=seconds,
            arms=ARMS,
            rows=rows,
            metrics=[m for m in rows["raw"] if not m.endswith("median_rank")],
            cell=pages.figure_cell,
            manifest=manifest,
            kinds=_fates(table),
            funnel=_funnel(manifest),
            scores=_score_histogram(out),
            curves=_curves(out, ARMS),
            retrieval=pages.retrieval_gallery(model, heldout, spread, cache=out / "embeddings"),
            captions={
                arm: pages.caption_gallery(
                    out / "graded" / arm / "results.jsonl", rows[arm]["cider_d"], heldout, count=8
                )
                for arm in ARMS
            },
            curated_page=Path("..") / "curated" / "report" / "index.html",
        )
    )
    page.write_text(text)
    return page


def _fates(table: pa.Table) -> list[dict[str, Any]]:
    """Where each kind of the pool went: [{kind, total, kept, dropped by selector}]."""
    noise, reasons = table["noise"].to_pylist(), table["reason"].to_pylist()
    fates = []
    for kind in KINDS:
        mine = [r for n, r in zip(noise, reasons) if n == kind]
        by_reason = {str(r): mine.count(r) for r in dict.fromkeys(mine) if r is not None}
        ordered = dict(sorted(by_reason.items(), key=lambda item: -item[1]))
        fates.append({"kind": kind.replace("_", " "), "total": len(mine), "kept": mine.count(None), "by": ordered})
    return fates


def _svg(figure: Any) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _axes(title: str, width: float = 5.6, height: float = 3.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3b0")
    axes.tick_params(length=0)
    return figure, axes


def _funnel(manifest: dict[str, Any]) -> str:
    """How many samples each stage leaves."""
    stages = manifest["stages"]
    names = ["pool", *(s["name"].replace("_", " ") for s in stages)]
    left = [manifest["seen"], *(s["out"] for s in stages)]
    figure, axes = _axes("What each filter leaves")
    places = np.arange(len(names))
    axes.barh(places, left, color="#2457c5", height=0.62)
    for place, count in zip(places, left):
        axes.text(count, place, f" {count:,}", va="center", fontsize=9, color="#1c2430")
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, left[0] * 1.13)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return _svg(figure)


def _score_histogram(out: Path) -> str:
    """CLIPScores of true and of swapped captions, with the threshold that the trusted pairs set."""
    signals = ds.dataset([str(p) for p in (out / "signals").rglob("*.parquet")], format="parquet", schema=None)
    table = signals.to_table(columns=["uid", "clip_score"])
    truth = pq.read_table(out / "pool" / "truth.parquet", columns=["uid", "noise"])
    found = table.join(truth, keys="uid", join_type="inner")
    score, noise = found["clip_score"].to_numpy(), np.array(found["noise"].to_pylist(), dtype=object)
    failed = ds.dataset(out / "curated" / "ledger", format="parquet").to_table(columns=["uid", "failed"])
    low = {u for u, f in zip(failed["uid"].to_pylist(), failed["failed"].to_pylist()) if "clip_score" in f}
    kept = np.array([u not in low for u in found["uid"].to_pylist()]) & np.isfinite(score)
    figure, axes = _axes("CLIPScore by the small scorer")
    bins = np.linspace(np.nanmin(score), np.nanmax(score), 60)
    axes.hist(score[noise == "clean"], bins, color="#1b7f4b", alpha=0.75, label="true captions")
    axes.hist(score[noise == "swapped"], bins, color="#b3372f", alpha=0.65, label="swapped captions")
    axes.axvline(score[kept].min(), color="#1c2430", linewidth=1.3, linestyle=(0, (1, 2)), label="threshold")
    axes.set_yticks([])
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure)


def _curves(out: Path, arms: tuple[str, ...]) -> list[str]:
    """Training loss, and the retrieval that `watch` measured while the models trained."""
    import json

    steps: dict[str, Any] = {}
    losses: dict[str, Any] = {}
    bands: dict[str, Any] = {}
    for arm in arms:
        seen = [r for r in results.read(out / "watched" / arm / "results.jsonl") if r["metric"] == HEADLINE]
        steps[arm] = ([r["step"] for r in seen], [r["value"] for r in seen])
        bands[arm] = tuple(zip(*(r["ci95"] for r in seen)))
        lines = [json.loads(line) for line in (out / "runs" / arm / "metrics.jsonl").read_text().splitlines()]
        losses[arm] = ([line["step"] for line in lines], [line["loss"] for line in lines])
    return [
        pages.curve(steps, title="Retrieval as checkpoints land (MRR, 500 scenes)", bands=bands),
        pages.curve(losses, title="Training loss"),
    ]
