"""The page: one static HTML file that shows what curation did, with nothing fetched from anywhere.

It is made from the signals, the ledger and the manifests alone, so it can be
made again at any time. Captions come from the web and are hostile: everything
goes through jinja2's autoescape, pictures are decoded and encoded anew.
"""

import base64
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import store
from curation.errors import UserError
from curation.hashing import hash64_many
from curation.images import decode
from curation.ledger import read_column
from curation.selection.engine import Part
from curation.sources import open_shard
from curation.tar import IMAGE_EXTENSIONS

SHOWN_KEPT, SHOWN_DROPPED = 18, 6  # samples of the page, by hash
THUMBNAIL = 168  # pixels, the longer side
KEPT, DROPPED, INK = "#2f9e8f", "#d9822b", "#8a8f98"  # readable on white and on near-black
LANGUAGES, BINS = 12, 60


def write_report(out: Path, manifest: Mapping[str, Any], parts: Sequence[Part], phases: Mapping[str, Any]) -> Path:
    """Write `out`/report/index.html from a select (or final) manifest and what each phase reported."""
    ledger = out / "ledger"
    thresholds: dict[str, list[float]] = defaultdict(list)
    for stage in manifest["stages"]:
        for column, bounds in stage.get("thresholds", {}).items():
            thresholds[column] += bounds
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True
    )
    environment.filters["n"] = lambda value: f"{value:,}"
    html = environment.get_template("report.html.j2").render(
        manifest=manifest,
        out=out.resolve().name,
        errors=sum(manifest["errors"].values()),
        dropped=sum(manifest["dropped"].values()),
        histograms=_histograms(parts, ledger, thresholds),
        groups=_samples(parts, ledger, manifest, thresholds),
        languages=_languages(parts, ledger),
        clusters=[
            {"name": s["name"], "cap": s["clusters"]["cap"], "figure": _cluster_figure(s["clusters"])}
            for s in manifest["stages"]
            if s.get("clusters", {}).get("before")
        ],
        phases={name: result for name, result in phases.items() if result},
    )
    path = out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html)
    return path


def _signal_fields(parts: Sequence[Part]) -> list[pa.Field]:
    base = set(store.BASE.names)
    return [field for field in pq.read_schema(parts[0].path) if field.name not in base]


def _column(parts: Sequence[Part], column: str) -> np.ndarray:
    values = [pq.read_table(part.path, columns=[column])[column].cast(pa.float64()).to_numpy() for part in parts]
    return np.concatenate(values)


def _histograms(parts: Sequence[Part], ledger: Path, thresholds: Mapping[str, list[float]]) -> list[dict[str, str]]:
    kept = np.concatenate([read_column(ledger, part, "copies") > 0 for part in parts])
    figures = []
    for field in _signal_fields(parts):
        if not (pa.types.is_floating(field.type) or pa.types.is_signed_integer(field.type)):
            continue
        values = _column(parts, field.name)
        present = np.isfinite(values)
        if present.any():
            whole = pa.types.is_integer(field.type)
            figure = _histogram(values[present & kept], values[present & ~kept], thresholds.get(field.name, []), whole)
            figures.append({"name": field.name, "figure": figure})
    return figures


def _histogram(kept: np.ndarray, dropped: np.ndarray, bounds: Sequence[float], whole: bool) -> str:
    """Stacked counts of kept and dropped; the top and bottom half per cent are gathered at the ends."""
    both = np.concatenate([kept, dropped])
    low, high = np.quantile(both, [0.005, 0.995])
    low, high = min([low, *bounds]), max([high, *bounds])
    if low == high:
        low, high = low - 0.5, high + 0.5
    if whole:  # bins that hold equally many whole numbers
        low = np.floor(low) - 0.5
        high = low + BINS * np.ceil((high + 0.5 - low) / BINS) if high - low > BINS else np.ceil(high) + 0.5
    edges = np.linspace(low, high, int(high - low) + 1 if whole and high - low <= BINS else BINS + 1)
    axes = _axes(4.2, 2.1)
    counts = [np.histogram(np.clip(v, low, high), edges)[0] for v in (kept, dropped)]
    width = np.diff(edges)
    axes.bar(edges[:-1], counts[0], width, align="edge", color=KEPT)
    axes.bar(edges[:-1], counts[1], width, bottom=counts[0], align="edge", color=DROPPED)
    for bound in bounds:
        axes.axvline(bound, color=INK, linewidth=1.2, linestyle="--")
    return _svg(axes)


def _cluster_figure(clusters: Mapping[str, Any]) -> str:
    order = np.argsort(clusters["before"])[::-1]
    before, after = np.array(clusters["before"])[order], np.array(clusters["after"])[order]
    axes = _axes(8.6, 2.3)
    places = np.arange(len(order))
    axes.bar(places, after, 1.0, color=KEPT)
    axes.bar(places, before - after, 1.0, bottom=after, color=DROPPED)
    axes.axhline(clusters["cap"], color=INK, linewidth=1.2, linestyle="--")
    axes.set_xlabel("clusters, largest first")
    return _svg(axes)


def _axes(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(8)
    axes.locator_params(nbins=5)
    return axes


def _svg(axes: Any) -> str:
    """A data URI; an <img> keeps the ids of one figure out of the other's."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "gemsmith"}):
        axes.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _languages(parts: Sequence[Part], ledger: Path) -> list[dict[str, Any]]:
    if "language" not in {field.name for field in _signal_fields(parts)}:
        return []
    seen: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    for part in parts:
        languages = pq.read_table(part.path, columns=["language"])["language"].to_pylist()
        for language, copies in zip(languages, read_column(ledger, part, "copies"), strict=True):
            if language is not None:
                seen[language or "unknown"] += 1
                kept[language or "unknown"] += int(copies > 0)
    total = max(seen.total(), 1)
    rows = [{"language": k, "seen": n, "kept": kept[k], "share": n / total} for k, n in seen.most_common(LANGUAGES)]
    rest = seen.total() - sum(n for _, n in seen.most_common(LANGUAGES))
    if rest:
        others = kept.total() - sum(kept[k] for k, _ in seen.most_common(LANGUAGES))
        rows.append(
            {"language": f"{len(seen) - LANGUAGES} others", "seen": rest, "kept": others, "share": rest / total}
        )
    return rows


def _samples(
    parts: Sequence[Part], ledger: Path, manifest: Mapping[str, Any], thresholds: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """Groups of samples to show: the kept ones, then each reason in the order of the funnel."""
    chosen: dict[str, list[tuple[int, int, int]]] = defaultdict(list)  # reason -> (hash, part, row), the lowest hashes
    for p, part in enumerate(parts):
        table = pq.read_table(ledger / part.path.name, columns=["uid", "verdict", "reason"])
        hashes = hash64_many(f"{manifest['seed']}/page", table["uid"].to_pylist()).tolist()
        reasons = [r or "" for r in table["reason"].to_pylist()]
        candidates = defaultdict(list)
        for row, (h, reason) in enumerate(zip(hashes, reasons, strict=True)):
            candidates[reason].append((h, p, row))
        for reason, rows in candidates.items():
            limit = SHOWN_DROPPED if reason else SHOWN_KEPT
            chosen[reason] = heapq.nsmallest(limit, [*chosen[reason], *rows])
    counts = {"": manifest["kept"], **manifest["errors"], **manifest["dropped"]}
    order = ["", *(s["name"] for s in manifest["stages"]), *manifest["errors"]]
    clip = [n for n, s in manifest["config"]["signals"].items() if s["kind"] == "clip"]
    scores = [*clip, *(c for c in thresholds if c not in clip)]
    groups = []
    for reason in [r for r in order if chosen.get(r)]:
        by_place = [_show(parts[p].path, row, scores) for _, p, row in chosen[reason]]
        groups.append({"reason": reason, "count": counts.get(reason, 0), "samples": by_place})
    return groups


def _show(path: Path, row: int, scores: Sequence[str]) -> dict[str, Any]:
    columns = ["uid", "caption", "shard", "key", "extensions", "offsets", "sizes", "error", *scores]
    values = pq.read_table(path, columns=columns).slice(row, 1).to_pylist()[0]
    members = dict(
        zip(values["extensions"] or [], zip(values["offsets"] or [], values["sizes"] or [], strict=True), strict=True)
    )
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    thumbnail = None
    if image is not None and not values["error"]:
        try:
            with open_shard(values["shard"]) as data:
                thumbnail = _thumbnail(data[image[0] : image[0] + image[1]])
        except (OSError, UserError):
            pass  # the pool is no longer there, and the page is not what says so
    return {
        "uid": values["uid"],
        "key": values["key"],
        "caption": values["caption"],
        "thumbnail": thumbnail,
        "scores": {c: values[c] for c in scores if values[c] is not None},
    }


def _thumbnail(raw: bytes) -> str | None:
    image, _, _ = decode(raw)
    if image is None:
        return None
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
