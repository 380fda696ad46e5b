"""`gemsmith report DIR`: one static HTML page over all results and training curves under a folder.

The page needs no server, no script and no file beside it: pictures and curves
are embedded, and every text from data or file names is escaped. The pieces
(curve, table, galleries, templates/base.html.j2 and parts.html.j2) are made
for other pages to use too.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.errors import UserError
from evaluation import encode, results
from evaluation.data import Pictures, RetrievalData
from evaluation.encode import Model

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATES = Path(__file__).parent / "templates"
PALETTE = ("#2457c5", "#c8553d", "#1b7f4b", "#7a4fb5", "#b8860b", "#0f8b8d")
TRAINING_CURVES = ("loss", "loss_embed", "loss_generate", "temperature", "grad_norm", "lr", "samples_per_second")
Row = dict[str, Any]
Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def environment(*folders: Path) -> Any:
    """A jinja2 environment over `folders` and the shared templates, escaping everything, refusing unknown names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([*folders, TEMPLATES])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def curve(
    series: Series,
    *,
    title: str,
    x: str = "step",
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    chance: float | None = None,
) -> str:
    """A line chart as the data URI of an SVG.

    Args:
        series: label → (x values, y values).
        bands: label → (lower, upper) around the line of that label.
        chance: drawn as a dotted line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "gemsmith", "font.family": "sans-serif", "font.size": 10.5}
    with rc_context(style):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, (label, (xs, ys)) in enumerate(series.items()):
            colour = PALETTE[index % len(PALETTE)]
            marker = "o" if len(xs) < 30 else None
            axes.plot(xs, ys, color=colour, linewidth=1.8, label=label, marker=marker, markersize=3.5)
            if bands and label in bands:
                axes.fill_between(xs, *bands[label], color=colour, alpha=0.14, linewidth=0)
        if chance is not None:
            axes.axhline(chance, color="#1c2430", linewidth=1.2, linestyle=(0, (1, 2)), label="chance")
        axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
        axes.set_xlabel(x)
        axes.grid(axis="y", color="#e3e7ed", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#9aa3b0")
        axes.tick_params(length=0)
        if len(series) > 1 or chance is not None:
            axes.legend(frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(pictures: Pictures, index: int, size: int = 200) -> str:
    """One picture as the data URI of a JPEG, at most `size` pixels wide and high."""
    return inline(pictures[index], size)


def inline(picture: "Image", size: int) -> str:
    """An RGB picture, which is made smaller, as the data URI of a JPEG."""
    picture.thumbnail((size, size))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure_cell(row: Mapping[str, Any]) -> dict[str, str]:
    """A result row as a table cell: the value, and its interval in small print."""
    low, high = row["ci95"]
    return {"text": f"{row['value']:.4g}", "small": f"[{low:.4g}, {high:.4g}]"}


def results_table(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[list[Any]]]:
    """Columns and rows for `parts.table`: one line a checkpoint and metric."""
    columns = [
        {"title": title, "number": title not in ("checkpoint", "metric")}
        for title in ("checkpoint", "metric", "value", "chance", "n")
    ]
    lines: list[list[Any]] = [
        [
            "/".join(Path(row["checkpoint"]).parts[-3:]),
            row["metric"],
            figure_cell(row),
            "-" if row["chance"] is None else f"{row['chance']:.4g}",
            f"{row['n']:,}",
        ]
        for row in rows
    ]
    return columns, lines


def retrieval_gallery(
    model: Model, data: RetrievalData, queries: Sequence[int], *, top: int = 5, cache: Path | None = None
) -> list[dict[str, Any]]:
    """What text-to-image retrieval finds for the first captions of some images.

    Args:
        queries: indices of images whose first caption is the query.
        top: pictures shown a query.
        cache: the embeddings' cache, where the evaluation before has left them.

    Returns:
        A dict a query: text, rank (of its own picture; ties count against it), total, and hits: a list of
        {thumbnail, caption, score, right}.
    """
    images = encode.encode_images(model, data.pictures, cache=cache).astype(np.float64)
    texts = encode.encode_texts(model, [data.captions[query][0] for query in queries], cache=cache).astype(np.float64)
    gallery = []
    for query, scores in zip(queries, texts @ images.T, strict=True):
        best = np.argsort(-scores, kind="stable")[:top]
        hits = [
            {
                "thumbnail": thumbnail(data.pictures, int(index)),
                "caption": data.captions[index][0],
                "score": float(scores[index]),
                "right": bool(index == query),
            }
            for index in best
        ]
        rank = int((scores >= scores[query]).sum())
        gallery.append({"text": data.captions[query][0], "rank": rank, "total": len(images), "hits": hits})
    return gallery


def caption_gallery(path: Path, row: Row, data: RetrievalData, *, count: int = 12) -> list[dict[str, str]]:
    """The first captions behind a captioning row of the results file `path`, with thumbnails.

    Returns:
        A list of {thumbnail, caption, reference}.
    """
    index = {uid: number for number, uid in enumerate(data.uids)}
    return [
        {
            "thumbnail": thumbnail(data.pictures, index[record["uid"]]),
            "caption": record["caption"],
            "reference": record["references"][0],
        }
        for record in results.records(path, row)[:count]
    ]


def report(folder: Path) -> Path:
    """Write `folder`/report.html over every results and metrics file below it.

    Results files are those with `results` in their name; training curves come from `metrics.jsonl`. Files of such a
    name that are of something else are passed over with a word, on the page too. Of a checkpoint that a file has with
    several weights at one step (its run was begun anew, under a watch that went on) the newest are shown, with a word.

    Raises:
        UserError: there is nothing to report on.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a folder with results.jsonl or metrics.jsonl below it")
    notes: list[str] = []
    graded = _ours(folder.rglob("*results*.jsonl"), results.read, notes)
    graded = {path: _newest(path, rows, notes) for path, rows in graded.items()}
    trained = _ours(folder.rglob("metrics.jsonl"), _metrics, notes)
    for note in notes:
        print(note, flush=True)
    if not graded and not trained:
        raise UserError(f"{folder}: holds no results.jsonl and no metrics.jsonl; evaluate or train into it first")
    page = folder / "report.html"
    template = environment().get_template("report.html.j2")
    text = template.render(
        title=f"Results of {folder.resolve().name}",
        folder=str(folder),
        notes=notes,
        results=_sections(graded),
        training=_training_curves(folder, trained),
    )
    page.write_text(text)
    return page


def _ours(paths: Iterable[Path], read: Callable[[Path], list[Row]], notes: list[str]) -> dict[Path, list[Row]]:
    """What `read` finds in the files that it takes; why it does not take the others goes into `notes`."""
    found = {}
    for path in sorted(paths):
        try:
            found[path] = read(path)
        except UserError as error:
            notes.append(f"Passed over: {error}")
    return found


def _newest(path: Path, rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """Rows in the order of the file, without those whose weights later ones of the same checkpoint and step replace."""
    weights = {(row["checkpoint"], row["step"]): row["hashes"]["weights"] for row in rows}
    replaced: dict[Path, set[tuple[str, int | None]]] = {}
    kept = []
    for row in rows:
        checkpoint = row["checkpoint"], row["step"]
        if row["hashes"]["weights"] == weights[checkpoint]:
            kept.append(row)
        else:
            replaced.setdefault(_line_of(path, row)[1], set()).add(checkpoint)
    for run, found in replaced.items():
        notes.append(
            f"{path}: {len(found)} checkpoints of {run} were graded with several weights, as a run that was begun anew "
            "leaves them: the newest are shown; its other checkpoints may still be those of before"
        )
    return kept


def _metrics(path: Path) -> list[Row]:
    """The lines of a metrics file; a line that is still being written is left for the next time."""
    try:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
    except ValueError as error:
        raise UserError(f"{path}: is no file of a training's metrics ({error})") from None
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path}: is no file of a training's metrics, whose lines have a step each")
    return rows


def _sections(graded: Mapping[Path, Sequence[Row]]) -> list[dict[str, Any]]:
    """One section for each task, dataset (by content) and settings: curves over steps, and the table."""
    groups: dict[tuple[str, str, str], list[tuple[Path, Row]]] = {}
    for path, rows in graded.items():
        for row in rows:
            groups.setdefault((row["task"], row["hashes"]["data"], row["hashes"]["settings"]), []).append((path, row))
    sections = []
    for (task, *_), found in sorted(groups.items()):
        found.sort(key=lambda pair: (str(pair[0]), pair[1]["step"] is None, pair[1]["step"] or 0))
        columns, lines = results_table([row for _, row in found])
        queries = max(row["n"] for _, row in found)
        part = f" ({of})" if (of := found[-1][1].get("part")) else ""  # rows of before say nothing
        sections.append(
            {
                "title": f"{task.capitalize()} on {found[0][1]['dataset']}, {queries:,} queries{part}",
                "columns": columns,
                "rows": lines,
                "curves": _result_curves(found),
                "captions": _caption_table(*found[-1]),
            }
        )
    return sections


def _result_curves(found: Sequence[tuple[Path, Row]]) -> list[tuple[str, str]]:
    """A curve for each metric with more than one step, one line a run in a results file, with its interval."""
    keys = dict.fromkeys(_line_of(path, row) for path, row in found)
    runs = Counter(run.name for _, run in keys)
    labels = {(path, run): run.name if runs[run.name] == 1 else f"{run} in {path}" for path, run in keys}
    curves = []
    for metric in dict.fromkeys(row["metric"] for _, row in found):
        lines: dict[str, list[Row]] = {}
        for path, row in found:
            if row["metric"] == metric and row["step"] is not None:
                lines.setdefault(labels[_line_of(path, row)], []).append(row)
        lines = {label: rows for label, rows in lines.items() if len({row["step"] for row in rows}) > 1}
        if not lines:
            continue
        first = next(iter(lines.values()))[0]
        uri = curve(
            {label: ([r["step"] for r in rows], [r["value"] for r in rows]) for label, rows in lines.items()},
            title=metric.replace("_", " "),
            bands={
                label: ([r["ci95"][0] for r in rows], [r["ci95"][1] for r in rows]) for label, rows in lines.items()
            },
            chance=first["chance"],
        )
        curves.append((uri, ""))
    return curves


def _line_of(path: Path, row: Row) -> tuple[Path, Path]:
    """The results file, and the run that a row's checkpoint is of: RUN/checkpoints/step_* or RUN/export."""
    folder = Path(row["checkpoint"]).parent
    return path, folder.parent if folder.name == "checkpoints" else folder


def _caption_table(path: Path, row: Row) -> dict[str, Any] | None:
    """Some written captions beside a reference, for a captioning row."""
    shown = results.records(path, row)[:8]
    if not shown:
        return None
    columns = [{"title": title, "number": title == "CIDEr-D"} for title in ("written", "a reference", "CIDEr-D")]
    lines = [[record["caption"], record["references"][0], f"{record['cider_d']:.3f}"] for record in shown]
    return {"columns": columns, "rows": lines}


def _training_curves(folder: Path, trained: Mapping[Path, Sequence[Row]]) -> list[tuple[str, str]]:
    curves = []
    for name in TRAINING_CURVES:
        series = {}
        for path, rows in trained.items():
            points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
            if points:
                label = str(path.parent.relative_to(folder)) if path.parent != folder else folder.name
                series[label] = ([step for step, _ in points], [value for _, value in points])
        if series:
            curves.append((curve(series, title=name.replace("_", " ")), ""))
    return curves
