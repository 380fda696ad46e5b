"""One page for all claims that were tried: verdict, every seed's figures, the differences with their intervals.

Nothing is computed here but pictures: the figures come from OUT/NAME.json.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curation.manifest import read_manifest
from evaluation.report import PALETTE, environment
from jobs.reproduce.claim import LIMIT_S, SEEDS
from jobs.reproduce.claims import CLAIMS

TEMPLATES = Path(__file__).parent.parent / "templates"
LABELS = {
    "mrr": "MRR",
    "region_mrr": "region MRR",
    "cider_d": "CIDEr-D",
    "region_cider_d": "region CIDEr-D",
    "bleu_4": "BLEU-4",
    "mean": "mean hit@1",
    "peak_memory_mib": "peak memory (MiB)",
}
REGISTRATIONS = {"joint": 3, "batch": 2, "flava": 3}
"""How often a claim was registered, each time at larger sizes after a first result, where more than once;
docs/reproduce.md has what was found before."""
TAGS = {"holds": "good", "contradicted": "bad", "not shown": "", "not judged": ""}


def write_page(out: Path) -> Path:
    """OUT/index.html over every OUT/NAME.json."""
    found = {name: summary for name in CLAIMS if (summary := read_manifest(out / f"{name}.json")) is not None}
    sections = [_section(name, summary) for name, summary in found.items()]
    page = out / "index.html"
    text = (
        environment(TEMPLATES)
        .get_template("reproduce.html.j2")
        .render(
            title="Claims, shown in small",
            sections=sections,
            missing=[name for name in CLAIMS if name not in found],
        )
    )
    page.write_text(text)
    return page


def _section(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    claim = CLAIMS[name]
    columns = [{"title": "", "number": False}, *({"title": _words(m), "number": True} for m in summary["chance"])]
    rows = [[{"text": arm, "small": claim.arms[arm].says}, *_means(summary, arm)] for arm in claim.arms]
    rows.append(["guessing", *(f"{chance:.4g}" if chance else "-" for chance in summary["chance"].values())])
    return {
        "name": name,
        "claim": claim,
        "summary": summary,
        "tag": TAGS[overall(summary)],
        "verdict": overall(summary),
        "rehearsal": rehearsal(summary),
        "earlier": earlier(summary),
        "registrations": REGISTRATIONS.get(name, 1),
        "columns": columns,
        "rows": rows,
        "tests": [in_words(test) for test in summary["tests"]],
        "figures": [_seeds(summary), _forest(summary)],
        "time": _time(summary),
        "in_time": summary["wall_s"] <= LIMIT_S,
    }


def overall(summary: Mapping[str, Any]) -> str:
    """The worst verdict of the claim's hypotheses."""
    verdicts = [test["verdict"] for test in summary["tests"]]
    return next((v for v in ("not judged", "contradicted", "not shown") if v in verdicts), "holds")


def rehearsal(summary: Mapping[str, Any]) -> str:
    """What of it was not as registered; empty where all was."""
    seeds = f"with {summary['seeds']} seeds in place of {SEEDS}" if summary["seeds"] != SEEDS else ""
    scale = f"at {summary['scale']:.2g} of the registered sizes" if summary["scale"] != 1 else ""
    return ", ".join(filter(None, (seeds, scale)))


def earlier(summary: Mapping[str, Any]) -> str:
    """The sizes that were registered when it was run, where others are now; empty where they are the same, or where
    the file is from before sizes were kept in it."""
    now = CLAIMS[summary["claim"]].sizes
    return ", ".join(f"{n:,} {what}" for what, n in summary.get("sizes", {}).items() if now.get(what) != n)


def _time(summary: Mapping[str, Any]) -> str:
    """What the claim took, beside what it may take."""
    within = "within" if summary["wall_s"] <= LIMIT_S else "over"
    return f"{summary['wall_s'] / 60:.1f} of {LIMIT_S / 60:.0f} minutes, {within} the bound"


def _words(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def _means(summary: Mapping[str, Any], arm: str) -> list[Any]:
    """Mean over the seeds, and their standard deviation, of every shown metric; a dash where the arm has none."""
    cells: list[Any] = []
    for metric in summary["chance"]:
        values = summary["arms"][arm].get(metric)
        spread = "" if values is None else f"± {np.std(values, ddof=1):.2g}"
        cells.append("-" if values is None else {"text": f"{np.mean(values):.4g}", "small": spread})
    return cells


def _asks(test: Mapping[str, Any]) -> str:
    """The hypothesis in words."""
    h = test["hypothesis"]
    if h["margin"] == 0:
        return f"{_words(h['metric'])} is the same for {h['arm']} and for {h['against']}, in every seed"
    wanted, feared = ("lower", "higher") if h["lower"] else ("higher", "lower")
    how = wanted if h["margin"] is None else f"at most {h['margin']:.0%} {feared}"
    return f"{_words(h['metric'])} is {how} for {h['arm']} than for {h['against']}"


def in_words(test: Mapping[str, Any]) -> dict[str, Any]:
    """A judged hypothesis with its figures, as they are shown."""
    low, high = test["interval"]
    share = "-" if test["share"] is None else f"{test['share']:+.1%}"
    within = "" if test["within"] is None else "within ±margin" if test["within"] else "not within ±margin"
    return {
        "asks": _asks(test),
        "difference": f"{test['difference']:+.4g}",
        "interval": f"[{low:+.4g}, {high:+.4g}]",
        "bound": f"{test['bound']:+.4g}" if test["bound"] else "0",
        "share": share,
        "within": within,
        "signs": test["signs"],
        "verdict": test["verdict"],
        "tag": TAGS[test["verdict"]],
    }


def as_text(summary: Mapping[str, Any]) -> str:
    """The verdict and the tests for a terminal."""
    lines = [f"{summary['claim']}: {overall(summary)} ({summary['seeds']} seeds, {_time(summary)})"]
    if how := rehearsal(summary):
        lines[0] += f"; a rehearsal {how}"
    if sizes := earlier(summary):
        lines[0] += f"; at sizes that were registered before: {sizes}"
    elif (times := REGISTRATIONS.get(summary["claim"], 1)) > 1:
        lines[0] += f"; registered {times} times, at larger sizes each time"
    for test in map(in_words, summary["tests"]):
        interval = f"{test['difference']} {test['interval']}, bound {test['bound']}"
        seeds = f"more in {test['signs']} of {summary['seeds']} seeds"
        lines.append(f"  {test['verdict']:12} {test['asks']}: {interval}, {seeds}")
    return "\n".join(lines)


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "gemsmith"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _bare(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa3b0")
    axes.tick_params(length=0, labelsize=9)


def _seeds(summary: Mapping[str, Any]) -> str:
    """A panel for each judged metric: every seed a line across the arms that are compared, the mean a bar."""
    from matplotlib.figure import Figure

    tests = summary["tests"]
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    for axes, test in zip(np.atleast_1d(figure.subplots(1, len(tests))), tests, strict=True):
        h = test["hypothesis"]
        arms: Sequence[str] = (h["against"], h["arm"])
        values = np.array([summary["arms"][arm][h["metric"]] for arm in arms])  # [2, seeds]
        axes.plot([0, 1], values, color="#9aa3b0", linewidth=1, zorder=1)
        for place, row in enumerate(values):
            axes.scatter([place] * len(row), row, color=PALETTE[place], s=22, zorder=2)
            axes.plot([place - 0.16, place + 0.16], [row.mean()] * 2, color="#1c2430", linewidth=1.6, zorder=3)
        if chance := summary["chance"][h["metric"]]:
            axes.axhline(chance, color="#1c2430", linewidth=1, linestyle=(0, (1, 2)))
        axes.set_xlim(-0.45, 1.45)
        axes.set_xticks([0, 1], [arm.replace(" ", "\n", 1) for arm in arms])
        axes.grid(axis="y", color="#e3e7ed", linewidth=0.8)
        _bare(axes, _words(h["metric"]).replace(" (", "\n("))  # a third of a figure is narrow
    return _svg(figure)


def _above(summary: Mapping[str, Any], test: Mapping[str, Any]) -> float:
    """What the other arm scores above chance, on average over the seeds."""
    h = test["hypothesis"]
    return float(np.mean(summary["arms"][h["against"]][h["metric"]])) - summary["chance"][h["metric"]]


def _forest(summary: Mapping[str, Any]) -> str:
    """Each difference with its interval, as a share of what the other arm scores above chance, and its bound."""
    from matplotlib.figure import Figure

    tests = [test for test in summary["tests"] if _above(summary, test) > 0]
    guesses = [_words(test["hypothesis"]["metric"]) for test in summary["tests"] if test not in tests]
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, test in enumerate(tests):
        percent = 100 / _above(summary, test)
        low, high = (percent * edge for edge in test["interval"])
        colour = {"holds": "#1b7f4b", "contradicted": "#b3372f"}.get(test["verdict"], "#5d6878")
        axes.plot([low, high], [place] * 2, color=colour, linewidth=2.4, solid_capstyle="butt")
        axes.plot(percent * test["difference"], place, "o", color=colour, markersize=7)
        axes.plot([percent * test["bound"]] * 2, [place - 0.3, place + 0.3], color="#1c2430", linewidth=1.4)
    axes.axvline(0, color="#9aa3b0", linewidth=1, linestyle=(0, (1, 2)), zorder=0)
    asked = [test["hypothesis"] for test in tests]
    axes.set_yticks(range(len(tests)), [f"{_words(h['metric'])}\nagainst {h['against']}" for h in asked])
    axes.set_ylim(-0.7, max(len(tests), 1) - 0.3)
    axes.invert_yaxis()
    left_out = f"\nnot drawn, since the other arm guesses: {', '.join(guesses)}" if guesses else ""
    axes.set_xlabel(f"difference in % of what the other arm scores above chance{left_out}", fontsize=9)
    axes.grid(axis="x", color="#e3e7ed", linewidth=0.8)
    _bare(axes, "Difference, 95 % interval, bound")
    return _svg(figure)
