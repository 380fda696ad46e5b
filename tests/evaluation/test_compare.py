from pathlib import Path

import numpy as np
import pytest

from curation.errors import UserError
from evaluation import results, statistics
from evaluation.compare import as_text, compare
from evaluation.evaluate import EvaluateConfig, evaluate
from evaluation.tasks.retrieval import RetrievalSettings


@pytest.fixture
def graded(tmp_path, pairs_folder, make_model):
    def run(name, seed, step=None, config=None, checkpoint=None):
        out = tmp_path / f"{name}.jsonl"
        evaluate(
            checkpoint=Path(checkpoint or name),
            tasks=["retrieval", "captioning"],
            data=pairs_folder,
            out=out,
            load=lambda path: make_model(seed, step=step),
            config=config,
        )
        return out

    return run


def test_differences_and_paired_p(graded):
    a, b = graded("a", 0), graded("b", 1)
    found = {c.metric: c for c in compare(a=a, b=b)}
    rows = [{row["metric"]: row for row in results.read(path)} for path in (a, b)]
    assert set(found) == set(rows[0])
    c = found["text_to_image_mrr"]
    assert (c.a, c.b) == tuple(r["text_to_image_mrr"]["value"] for r in rows)
    x, clusters = results.per_query(a, rows[0]["text_to_image_mrr"])
    y, _ = results.per_query(b, rows[1]["text_to_image_mrr"])
    assert c.difference == pytest.approx((y - x).mean())
    assert c.p_value == statistics.paired_p(x, y, clusters=clusters)
    assert c.ci95[0] <= c.difference <= c.ci95[1]
    assert found["bleu_4"].p_value is None and found["text_to_image_median_rank"].lower_is_better
    text = as_text(list(found.values()))
    assert "text_to_image_mrr" in text and len(text.splitlines()) == 3 + len(found)
    assert text.startswith("A: a\nB: b\n")


def test_the_same_checkpoint_differs_nowhere(graded):
    for c in compare(a=graded("a", 0), b=graded("b", 0)):
        assert c.difference == 0 and c.p_value in (None, 1.0)


def test_checkpoints_of_one_file(graded):
    graded("run", 0, step=10, checkpoint="run/checkpoints/step_10")
    path = graded("run", 1, step=20, checkpoint="run/export")
    values = {(row["metric"], row["step"]): row["value"] for row in results.read(path)}
    for name in ("step_10", "checkpoints/step_10/", "weights-0"):
        c = {c.metric: c for c in compare(a=path, b=path, checkpoint_a=name)}["image_to_text_recall@5"]
        assert (c.a, c.b) == (values[c.metric, 10], values[c.metric, 20])
        assert (c.checkpoint_a, c.checkpoint_b) == ("run/checkpoints/step_10", "run/export")
    with pytest.raises(UserError, match=r"no row of checkpoint step_1; it has run/checkpoints/step_10 \(weights-0, "):
        compare(a=path, b=path, checkpoint_a="step_1")


def test_of_several_models_none_is_picked(graded):
    """Two runs that end at the same step, graded into one file: the one asked for may be the earlier."""
    graded("both", 0, step=10, checkpoint="raw/export")
    both, other = graded("both", 1, step=10, checkpoint="curated/export"), graded("other", 2, step=10)
    with pytest.raises(UserError, match=r"raw/export \(weights-0, .*curated/export \(weights-1, .*--b-checkpoint"):
        compare(a=other, b=both)
    values = {(row["checkpoint"], row["metric"]): row["value"] for row in results.read(both)}
    for name in ("raw/export", "curated/export"):
        for c in compare(a=both, b=other, checkpoint_a=name):
            assert (c.checkpoint_a, c.a) == (name, values[name, c.metric])


def test_other_settings_are_not_compared(graded):
    config = EvaluateConfig(retrieval=RetrievalSettings(captions="first"))
    found = compare(a=graded("a", 0), b=graded("b", 1, config=config))
    assert {c.task for c in found} == {"captioning"}


def test_nothing_in_common_is_refused(graded, tmp_path):
    a = graded("a", 0)
    row = {**results.read(a)[0], "metric": "another", "details": ""}
    results.append(tmp_path / "c.jsonl", [row])
    with pytest.raises(UserError, match="share no metric"):
        compare(a=a, b=tmp_path / "c.jsonl")


def test_a_lost_details_folder_leaves_the_plain_difference(graded, tmp_path):
    import shutil

    a, b = graded("a", 0), graded("b", 1)
    shutil.rmtree(tmp_path / "b.details")
    assert all(c.p_value is None and np.isfinite(c.difference) for c in compare(a=a, b=b))
