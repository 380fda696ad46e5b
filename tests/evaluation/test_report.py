import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from curation.errors import UserError
from evaluation import report as pages
from evaluation import results
from evaluation.data import open_retrieval
from evaluation.encode import encode_images, encode_texts
from evaluation.evaluate import EvaluateConfig, evaluate
from evaluation.tasks.retrieval import RetrievalSettings


class Page(HTMLParser):
    """What a browser would see: texts, image sources and tags that load or run something."""

    def __init__(self, text):
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path, pairs_folder, classes_folder, make_model):
    folder = tmp_path / "run <script>alert(1)</script>"
    for step in (10, 20):
        evaluate(
            checkpoint=Path(f"arm/step_{step}"),
            tasks=["retrieval", "classification", "captioning"],
            data={"retrieval": pairs_folder, "captioning": pairs_folder, "classification": classes_folder},
            out=folder / "results.jsonl",
            load=lambda path, step=step: make_model(step, step=step),
        )
    lines = [json.dumps({"step": step, "loss": 3 / step, "lr": 1e-3}) for step in range(1, 40)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 40, "lo')
    return folder


def test_one_static_escaped_page(run):
    page = pages.report(run)
    assert page == run / "report.html"
    seen = Page(page.read_text())
    assert "script" not in seen.tags and "link" not in seen.tags
    assert seen.sources and all(source.startswith("data:image/") for source in seen.sources)
    assert "<script>alert(1)</script>" in seen.text, "shown as text"
    for row in results.read(run / "results.jsonl"):
        assert row["metric"] in seen.text and f"{row['value']:.4g}" in seen.text
        assert f"[{row['ci95'][0]:.4g}, {row['ci95'][1]:.4g}]" in seen.text
    assert "a dark blue square" in seen.text, "written captions"
    assert len(seen.sources) == 15 + 2, "a curve for each metric with two steps, and two of the training"
    first = page.read_bytes()
    assert pages.report(run).read_bytes() == first


def test_runs_and_settings_have_lines_and_sections_of_their_own(tmp_path, pairs_folder, make_model, monkeypatch):
    drawn = []
    monkeypatch.setattr(pages, "curve", lambda lines, **_: drawn.append(lines) or "data:image/png;base64,")
    for run, limit in (("raw", None), ("clean", None), ("raw", 9)):
        for step in (10, 20):
            model = make_model(step + len(run), step=step)
            evaluate(
                checkpoint=Path(f"{run}/checkpoints/step_{step}"),
                tasks=["retrieval"],
                data=pairs_folder,
                out=tmp_path / "results.jsonl",
                config=EvaluateConfig(retrieval=RetrievalSettings(limit=limit)),
                load=lambda _, model=model: model,
            )
    text = Page(pages.report(tmp_path).read_text()).text
    counts = {row["n"] for row in results.read(tmp_path / "results.jsonl") if row["metric"] == "text_to_image_mrr"}
    assert len(counts) == 2 and all(f"Retrieval on scenes, {n} queries" in text for n in counts)
    assert {tuple(lines) for lines in drawn} == {("raw", "clean"), ("raw",)}
    assert all(steps == [10, 20] for lines in drawn for steps, _ in lines.values())


def test_training_alone_and_nothing(tmp_path, run):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "Training" in pages.report(tmp_path / "t").read_text()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no results"):
        pages.report(tmp_path / "empty")
    with pytest.raises(UserError, match="no such folder"):
        pages.report(tmp_path / "absent")


def test_a_run_that_was_begun_anew_is_not_joined_to_the_one_before(tmp_path, pairs_folder, make_model, monkeypatch):
    drawn = []
    monkeypatch.setattr(pages, "curve", lambda lines, **_: drawn.append(lines) or "data:image/png;base64,")
    for seed, step in ((1, 10), (2, 20), (3, 10), (4, 20)):  # the last two under the same names, in the same file
        evaluate(
            checkpoint=Path(f"run/checkpoints/step_{step}"),
            tasks=["captioning", "retrieval"],
            data=pairs_folder,
            out=tmp_path / "results.jsonl",
            load=lambda _, seed=seed, step=step: make_model(seed, step=step),
        )
    text = Page(pages.report(tmp_path).read_text()).text
    assert "2 checkpoints of run were graded with several weights" in text
    rows = results.read(tmp_path / "results.jsonl")
    newest = [row for row in rows if row["hashes"]["weights"] in ("weights-3", "weights-4")]
    expected = [
        [row["value"] for row in newest if row["metric"] == metric]
        for metric in dict.fromkeys(row["metric"] for row in newest)
    ]
    assert [lines["run"] for lines in drawn] == [([10, 20], values) for values in expected]


def test_files_of_something_else_are_passed_over_with_a_word(tmp_path, run, capsys):
    (run / "search_results.jsonl").write_text('{"query": "a dog", "score": 0.5}\n')
    (run / "other").mkdir()
    (run / "other" / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2.0}\n')
    seen, said = Page(pages.report(run).read_text()), capsys.readouterr().out
    for told in (seen.text, said):
        assert "search_results.jsonl:1: is no line of results" in told and "other/metrics.jsonl: is no file" in told
    assert len(seen.sources) == 15 + 2, "everything else is there"


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_retrieval_gallery_shows_the_true_ranking(pairs_folder, model):
    data = open_retrieval(pairs_folder)
    shown = pages.retrieval_gallery(model, data, [3, 11], top=4)
    images = encode_images(model, data.pictures)
    for query, entry in zip([3, 11], shown):
        scores = images @ encode_texts(model, [data.captions[query][0]])[0]
        order = np.argsort(-scores)
        assert entry["rank"] == 1 + list(order).index(query) and entry["total"] == 23
        assert [hit["caption"] for hit in entry["hits"]] == [data.captions[i][0] for i in order[:4]]
        assert [hit["right"] for hit in entry["hits"]] == [i == query for i in order[:4]]
        assert decoded(entry["hits"][0]["thumbnail"]).size == (12, 12)


def test_caption_gallery_pairs_captions_with_their_pictures(run, pairs_folder):
    data = open_retrieval(pairs_folder)
    row = next(row for row in results.read(run / "results.jsonl") if row["metric"] == "cider_d")
    cards = pages.caption_gallery(run / "results.jsonl", row, data, count=6)
    assert [card["reference"] for card in cards] == [captions[0] for captions in data.captions[:6]]
    assert np.array_equal(decoded(cards[4]["thumbnail"]), decoded(pages.thumbnail(data.pictures, 4)))
    html = pages.environment().from_string('{% import "parts.html.j2" as parts %}{{ parts.captions(cards) }}')
    assert cards[0]["caption"] in html.render(cards=cards)
