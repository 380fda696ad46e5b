"""The page: one static HTML file that shows what curation did, with nothing fetched from anywhere.

It is made from the summary, the manifests and the pictures to show alone, so it
can be made again at any time. Captions come from the web and are hostile:
everything goes through jinja2's autoescape, pictures are decoded and encoded
anew, and the page's own policy forbids scripts and any address but data.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from curation import figures
from curation.errors import UserError
from curation.files import is_remote
from curation.images import decode
from curation.selection.engine import Part, read_columns
from curation.sources import open_shard
from curation.sources.folder import is_range
from curation.summary import thresholds_of
from curation.tar import IMAGE_EXTENSIONS

THUMBNAIL = 168  # pixels, the longer side
CAPTION = 2_000  # characters of a caption that the page holds, which shows some lines of it
LANGUAGES = 12  # rows of the table; the rest is one row
GROUPS = 24  # rows of a table of concepts by language
TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    out: Path,
    manifest: Mapping[str, Any],
    parts: Sequence[Part],
    phases: Mapping[str, Any],
    summary: Mapping[str, Any],
) -> Path:
    """Write `out`/report/index.html.

    Args:
        manifest: of the selection, or the final one.
        parts: as the summary was made of.
        phases: what each phase reported, None where it did not run here.
        summary: by `curation.summary.summarise`.
    """
    stages = manifest["stages"]
    html = _template().render(
        manifest=manifest,
        out=out.resolve().name,
        errors=sum(manifest["errors"].values()),
        dropped=sum(manifest["dropped"].values()),
        copied=sum(int(copies) * n for copies, n in summary["copies"].items()),
        kinds={name: settings["kind"] for name, settings in manifest["config"]["selectors"].items()},
        histograms=[{"column": h["column"], "figure": figures.histogram(h)} for h in summary["histograms"]],
        groups=_samples(parts, manifest, summary),
        made_by=manifest["made_by"],
        language_by=language_by(manifest),
        languages=_languages(summary["languages"]),
        clusters=[_clusters(stage) for stage in stages if stage.get("clusters", {}).get("before")],
        references=[stage for stage in stages if stage.get("centroids")],
        concepts=[_concepts(stage, summary["concepts"][stage["name"]]) for stage in stages if "concepts" in stage],
        phases={name: result for name, result in phases.items() if result},
    )
    path = out / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["n"] = lambda value: f"{value:,}"
    environment.filters["percent"] = _percent
    environment.filters["value"] = lambda value: f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return environment.get_template("report.html.j2")


def language_by(manifest: Mapping[str, Any]) -> str:
    """What told the languages. A store may have them from another recipe, which this one does not say."""
    named = [n for n, signal in manifest["config"]["signals"].items() if signal["kind"] == "language"]
    return manifest["made_by"][named[0]] if named else "another recipe of this signal store"


def _percent(part: float, whole: float) -> str:
    """Of a whole, as a number for text or CSS; nothing of nothing is 0."""
    return f"{100 * part / whole:.1f}" if whole else "0.0"


def _clusters(stage: Mapping[str, Any]) -> dict[str, Any]:
    found = stage["clusters"]
    filled = [size for size in found["before"] if size]
    return {
        "name": stage["name"],
        "cap": found.get("cap"),
        "filled": len(filled),
        "largest": max(filled, default=0),
        "figure": figures.clusters(found["before"], found["after"], found.get("cap")),
    }


def _concepts(stage: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The most frequent entries before and after, each with the t of its language, and a table of the languages."""
    found = stage["concepts"]
    groups = [{"language": language, **said} for language, said in found["groups"].items()]
    groups.sort(key=lambda group: (-group["matches"], group["language"]))
    entries = [
        {"name": name, "language": language, "before": before, "after": after, "t": found["groups"][language]["t"]}
        for name, (language, _, before, after) in zip(names, found["top"], strict=True)
    ]
    most = max((entry["before"] for entry in entries), default=0)
    return {
        "name": stage["name"],
        "entries": entries,
        "most": most,
        "several": len(groups) > 1,
        "groups": groups[:GROUPS],
        "more": len(groups) - GROUPS,
    }


def _languages(counted: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    total = sum(seen for _, seen, _ in counted)
    rows = [[language, seen, kept] for language, seen, kept in counted[:LANGUAGES]]
    if rest := counted[LANGUAGES:]:
        rows.append([f"{len(rest)} others", sum(seen for _, seen, _ in rest), sum(kept for _, _, kept in rest)])
    return [{"language": language, "seen": seen, "kept": kept, "total": total} for language, seen, kept in rows]


def _samples(parts: Sequence[Part], manifest: Mapping[str, Any], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Groups of samples to show: the kept ones, then each reason in the order of the funnel."""
    counts = {"": manifest["kept"], **manifest["errors"], **manifest["dropped"]}
    order = ["", *(stage["name"] for stage in manifest["stages"]), *manifest["errors"]]
    clip = [name for name, signal in manifest["config"]["signals"].items() if signal["kind"] == "clip"]
    scores = list(dict.fromkeys([*clip, *thresholds_of(manifest["stages"])]))
    chosen = {place for places in summary["samples"].values() for place in map(tuple, places)}
    values = _values(parts, chosen, scores)
    sound: set[str] = set()
    return [
        {
            "reason": reason,
            "error": reason in manifest["errors"],
            "count": counts.get(reason, 0),
            "samples": [
                _show(values[part, row], parts[part].path, scores, sound) for part, row in summary["samples"][reason]
            ],
        }
        for reason in dict.fromkeys(order)
        if summary["samples"].get(reason)
    ]


def _values(
    parts: Sequence[Part], places: Iterable[tuple[int, int]], scores: Sequence[str]
) -> dict[tuple[int, int], dict[str, Any]]:
    """By place, what a sample's row says; each part is read once."""
    columns = ["uid", "caption", "shard", "key", "extensions", "offsets", "sizes", "error", *scores]
    found = {}
    for part, group in groupby(sorted(places), key=lambda place: place[0]):
        rows = [row for _, row in group]
        told = read_columns(parts[part].path, columns).take(rows).to_pylist()
        found.update({(part, row): one for row, one in zip(rows, told, strict=True)})
    return found


def _show(values: Mapping[str, Any], path: Path, scores: Sequence[str], sound: set[str]) -> dict[str, Any]:
    members = dict(
        zip(values["extensions"] or [], zip(values["offsets"] or [], values["sizes"] or [], strict=True), strict=True)
    )
    image = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
    thumbnail = None
    if image is not None and not values["error"]:
        thumbnail = _thumbnail(values["shard"], path.name.rpartition("-")[0], sound, *image)
    return {
        "uid": values["uid"],
        "key": values["key"],
        "caption": _cut(values["caption"]),
        "thumbnail": thumbnail,
        "scores": {c: values[c] for c in scores if values[c] is not None},
    }


def _cut(caption: str | None) -> str | None:
    return caption if caption is None or len(caption) <= CAPTION else f"{caption[:CAPTION]}…"


def _thumbnail(shard: str, fingerprint: str, sound: set[str], offset: int, size: int) -> str | None:
    """A small JPEG as a data URI; None where the pool is no longer there or not what it was.

    A shard is compared with its fingerprint once, and is `sound` from then on. One of thousands of remote files is
    not: a request for each of them would be asked for the sake of one picture.
    """
    known = shard in sound or (is_range(shard) and is_remote(shard))
    try:
        with open_shard(shard, None if known else fingerprint) as tape:
            sound.add(shard)
            image, _, _ = decode(tape[offset : offset + size])
    except (OSError, UserError):
        return None
    if image is None:
        return None
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
