"""The page: complete, self-contained, safe against what web pools hold, and made of exact counts."""

import html.parser
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import figures, report
from curation.config import parse_config
from curation.ledger import SCHEMA
from curation.phases import recorded_parts
from curation.pipeline import curate
from curation.report import write_report
from curation.selection.engine import Part
from curation.summary import BINS, SAMPLED, SHOWN_DROPPED, SHOWN_KEPT, summarise
from tests.curation.conftest import sample, write_tar

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \" ' & {{ 7 * 7 }}"


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, pool: Path, recipe: dict[str, object], ray_here: None) -> Path:
    """A run with every section of the page, and markup wherever a pool or a recipe can put it."""
    folder = tmp_path_factory.mktemp("report")
    entries = ["picture", "the", "table", "thing", "number"]
    (folder / "metadata.json").write_text(json.dumps(entries))
    np.save(folder / "reference.npy", np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32))
    hostile = {f"x{n}</title><script>{n}": sample(n, txt=HOSTILE.encode()) for n in range(300, 303)}
    hostile["said"] = sample(303, json=json.dumps({"uid": "<script>", "url": "javascript:alert(1)"}).encode())
    write_tar(folder / "hostile" / "0.tar", hostile)
    clip = "clip_image_embedding"
    selectors = {
        "language": {"kind": "language", "languages": ["en"]},
        "<script>either": {
            "kind": "any_of",
            "selectors": {
                "<script>a": {"kind": "fraction", "column": "clip_score", "fraction": 0.4},
                "words": {"kind": "threshold", "column": "caption_words", "min": 12},
            },
        },
        "copies": {"kind": "exact_duplicates"},
        "like": {"kind": "image_based", "column": clip, "reference": str(folder / "reference.npy"), "clusters": 6},
        "semantic": {"kind": "semantic_duplicates", "clusters": 3, "eps": 0.001},
        "concepts": {"kind": "concept_balance", "t": 5},
        "balance": {"kind": "cluster_balance", "clusters": 5, "cap_quantile": 0.5},
    }
    signals = {**recipe["signals"], "concepts": {"kind": "concepts", "metadata": str(folder / "metadata.json")}}  # type: ignore[dict-item]
    config = parse_config({**recipe, "signals": signals, "selectors": selectors})
    curate(config, pools=[str(pool), str(folder / "hostile")], out=folder / "<b>out", workers=1)
    return folder / "<b>out"


@pytest.fixture(scope="module")
def page(out: Path) -> Page:
    return Page((out / "report" / "index.html").read_text())


def test_nothing_is_fetched_and_nothing_runs(out: Path, page: Page) -> None:
    assert not {t for t, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    sources = [a["src"] for t, a in page.tags if t == "img"]
    assert len(sources) > 12 and all(s and s.startswith("data:image/jpeg;base64,") for s in sources)
    assert all(href.startswith("#") for t, a in page.tags if (href := a.get("href")))
    assert not [a for _, a in page.tags for name in a if name.startswith("on")]
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert not re.search(r"url\(|@import", (out / "report" / "index.html").read_text())


def test_markup_in_captions_keys_uids_and_names_is_text(page: Page) -> None:
    assert HOSTILE in page.text
    assert "<script>either" in page.text and any("or <script>a" in text for text in page.text)
    assert "Curation of <b>out" in page.text
    titles = [str(a["title"]) for t, a in page.tags if a.get("class") == "sample"]
    assert any("</title><script>300" in title for title in titles)


def test_it_names_every_stage_reason_and_phase(page: Page) -> None:
    text = " ".join(page.text)
    words = ["readable", "language", "copies", "like", "semantic", "concepts", "balance", "json_parse", "image_decode"]
    for word in [*words, "144", "clip_score", "caption_words", "measure", "select", "build", "Error: caption_missing"]:
        assert word in text, word
    assert {a["id"] for t, a in page.tags if t == "h2"} == {
        *("funnel", "signals", "clusters", "concepts", "languages", "samples", "throughput", "recipe")
    }


def test_figures_show_the_counts_of_the_manifest(out: Path, page: Page) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    stages = {stage["name"]: stage for stage in manifest["stages"]}
    rows = pa.concat_tables([pq.read_table(p) for p in (out / "ledger").iterdir()]).to_pylist()
    for name in ("semantic", "balance"):
        found = stages[name]["clusters"]
        assert sum(found["before"]) == stages[name]["in"] and sum(found["after"]) == stages[name]["out"]
    text = " ".join(" ".join(page.text).split())
    for _, _, before, after in stages["concepts"]["concepts"]["top"]:
        assert f"{after} of {before}" in text
    assert f"{stages['like']['centroids_touched']} of 6 clusters" in text
    union = stages["<script>either"]
    keeps = [inner["keeps"] for inner in union["any_of"].values()]
    readable = sum(r["verdict"] != "error" for r in rows)
    assert all(f"keeps {n} of the pool" in text for n in keeps)
    assert max(keeps) <= readable - union["would_drop"] <= sum(keeps)
    warnings = [warning for stage in manifest["stages"] for warning in stage.get("warnings", [])]
    assert warnings and all(warning in text for warning in warnings)
    svgs = [a["aria-label"] for t, a in page.tags if t == "svg"]
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert len(svgs) == len(summary["histograms"]) + 2
    kept = {r["uid"] for r in rows if r["verdict"] == "kept"}
    shown = [a["title"] for t, a in page.tags if a.get("class") == "sample"]
    assert {str(t).partition(",")[0] for t in shown[: min(len(kept), SHOWN_KEPT)]} <= kept


def test_concepts_are_escaped_and_a_pool_that_is_gone_shows_no_picture(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    summary = json.loads((out / "report" / "summary.json").read_text())
    summary["concepts"]["concepts"][0] = HOSTILE
    monkeypatch.setattr(report, "open_shard", lambda shard, _: Path(shard + " which is gone").read_bytes())
    found = Page(write_report(tmp_path, manifest, recorded_parts(out) or [], {}, summary).read_text())
    assert HOSTILE in found.text
    assert not [t for t, _ in found.tags if t in ("img", "script")] and found.text.count("no picture") > 12


ROWS = 30_000


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """More rows than are sampled, with NaN, infinite and missing values."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=ROWS).astype(np.float32)
    score[:30] = np.nan
    score[30:60] = np.inf
    return pa.table(
        {
            "uid": [f"{n:032x}" for n in rng.permutation(ROWS)],
            "score": pa.array(score, mask=rng.random(ROWS) < 0.01),
            "words": pa.array(rng.geometric(0.1, ROWS).astype(np.int32)),
            "wide": pa.array(rng.integers(0, 10**6, ROWS)),
            "language": pa.array(rng.choice(["en", "de", ""], ROWS).tolist(), pa.string()),
            "reason": pa.array(rng.choice([None, "words", "rare"], ROWS, p=[0.5, 0.4999, 0.0001]).tolist()),
        }
    )


def summary_of(folder: Path, table: pa.Table, cuts: list[int]) -> dict[str, object]:
    (folder / "ledger").mkdir(parents=True)
    parts = []
    copies = pa.array([2 if r is None else 0 for r in table["reason"].to_pylist()], pa.int32())
    for n, (start, end) in enumerate(zip([0, *cuts], [*cuts, table.num_rows], strict=True)):
        rows = table.slice(start, end - start)
        pq.write_table(rows.drop_columns(["reason"]), folder / f"{n}.parquet")
        judged = {"uid": rows["uid"], "reason": rows["reason"], "copies": copies.slice(start, end - start)}
        others = {name: pa.nulls(len(rows), SCHEMA.field(name).type) for name in SCHEMA.names if name not in judged}
        pq.write_table(pa.table({**judged, **others}), folder / "ledger" / f"{n}.parquet")
        parts.append(Part(path=folder / f"{n}.parquet", first=start, rows=end - start))
    stages = [{"name": "words", "thresholds": {"words": [3], "score": [-np.inf]}}]
    config = {"signals": {}, "selectors": {"words": {"kind": "threshold"}}}
    found = summarise(parts, folder / "ledger", {"stages": stages, "seed": 0, "config": config})
    firsts = [part.first for part in parts]
    samples = {reason: [firsts[p] + row for p, row in rows] for reason, rows in found["samples"].items()}
    return {**json.loads(json.dumps(found)), "samples": samples}


def test_counts_are_exact_and_the_same_for_any_parts(table: pa.Table, tmp_path: Path) -> None:
    assert ROWS > SAMPLED
    whole = summary_of(tmp_path / "whole", table, [])
    assert summary_of(tmp_path / "cut", table, [7, 7, 9000, 29_999]) == whole
    kept = np.array([reason is None for reason in table["reason"].to_pylist()])
    axes = {h["column"]: h for h in whole["histograms"]}  # type: ignore[attr-defined]
    assert list(axes) == ["score", "words", "wide"]
    for column, h in axes.items():
        values = table[column].to_numpy().astype(float)
        low, high = np.nanquantile(values[np.isfinite(values)], [0.005, 0.995])
        assert abs(h["low"] - low) < 0.1 * (high - low) and abs(h["high"] - high) < 0.1 * (high - low)
        for verdict, rows in (("kept", kept), ("dropped", ~kept)):
            finite = values[rows & np.isfinite(values)]
            assert sum(h[verdict]) == len(finite)
            edges = np.linspace(h["low"], h["high"], len(h[verdict]) + 1)
            middle = [((finite >= a) & (finite < b)).sum() for a, b in itertools.pairwise(edges[1:-1])]
            assert np.abs(np.array(h[verdict][1:-1]) - middle).max() <= 1  # an edge may round to the other side
    assert axes["words"]["thresholds"] == [3] and axes["score"]["thresholds"] == []
    steps = {(h["high"] - h["low"]) / len(h["kept"]) for h in (axes["words"], axes["wide"])}
    assert all(step == int(step) for step in steps) and len(axes["wide"]["kept"]) <= BINS
    spoken = {name or "unknown": (table["language"].to_numpy() == name) for name in ("en", "de", "")}
    assert {k: (n, m) for k, n, m in whole["languages"]} == {  # type: ignore[attr-defined]
        k: (rows.sum(), (rows & kept).sum()) for k, rows in spoken.items()
    }
    assert whole["copies"] == {"2": kept.sum()}
    assert len(whole["samples"][""]) == SHOWN_KEPT and len(whole["samples"]["words"]) == SHOWN_DROPPED  # type: ignore[index]
    for reason, rows in whole["samples"].items():  # type: ignore[attr-defined]
        assert {table["reason"][row].as_py() for row in rows} == {reason or None}


STRANGE = {  # values, and the bins that they get
    "same_instant": (np.full(70, 1_700_000_000_123_456_789), 1),
    "following_ids": (10**17 + np.arange(70), 1),
    "far_apart": (np.array([-(2**63), 2**63 - 1] * 35), BINS),
    "same_large": (np.full(70, 1e17), 1),
    "some_roundings_apart": (0.1 + np.arange(70) % 4 * np.spacing(0.1), 1),
    "all_there_is": (np.array([-1.7e308, 1.7e308] * 35), BINS),
    "next_to_nothing": (np.array([0, 5e-324] * 35), 1),
    "small": (np.arange(70), 35),
    "around_2_to_52": (2**52 + np.arange(70) % 3, 1),
    "of_15_digits": (10**15 + np.arange(70) % 7, 7),
    "zero": (np.zeros(70), BINS),
}


def test_numbers_too_close_together_for_their_size_are_one_bar(tmp_path: Path) -> None:
    """int64 beyond 2^53 and neighbours among floats: no bin can be narrower than what is between two of them."""
    columns = {name: values for name, (values, _) in STRANGE.items()}
    table = pa.table({"uid": [f"{n:032x}" for n in range(70)], "reason": [None, "rare"] * 35, **columns})
    shown = summary_of(tmp_path / "all", table, [33])["histograms"]
    bins = {}
    for h in shown:  # type: ignore[attr-defined]
        assert sum(h["kept"]) == sum(h["dropped"]) == 35, h
        edges = np.linspace(h["low"], h["high"], len(h["kept"]) + 1)
        assert (np.diff(edges) > 0).all(), h
        drawn = figures.histogram(h)
        assert drawn["kept"].count("M") == sum(n > 0 for n in h["kept"]) and "nan" not in str(drawn)
        bins[h["column"]] = len(h["kept"])
    assert bins == {name: expected for name, (_, expected) in STRANGE.items()}


def test_ticks_and_bars() -> None:
    assert figures.nice_ticks(0, 97, 5) == [0, 20, 40, 60, 80]
    assert figures.nice_ticks(-0.21, 0.38, 5) == [-0.2, 0, 0.2]
    assert [figures.short(v) for v in (0.28, 340, 9999, 15_300, 2e7, 1.28e10)] == [
        *("0.28", "340", "9999", "15.3k", "20M", "12.8B")
    ]
    many = figures.clusters([5] * 1000, [3] * 1000, 4)
    assert many["kept"].count("M") == figures.BARS and many["ylines"] == [(many["y"](4), "4")]
    assert figures.clusters([5, 0], [5, 0], None)["ylines"] == []
