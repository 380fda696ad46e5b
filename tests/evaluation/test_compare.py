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
    def run(name, seed, step=None, config=None):
        out = tmp_path / f"{name}.jsonl"
        evaluate(
            checkpoint=Path(name),
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
    assert "text_to_image_mrr" in text and len(text.splitlines()) == 1 + len(found)


def test_the_same_checkpoint_differs_nowhere(graded):
    for c in compare(a=graded("a", 0), b=graded("b", 0)):
        assert c.difference == 0 and c.p_value in (None, 1.0)


def test_steps_of_one_file(graded):
    graded("run", 0, step=10)
    path = graded("run", 1, step=20)
    forward = {c.metric: c for c in compare(a=path, b=path, step_a=10)}
    values = {(row["metric"], row["step"]): row["value"] for row in results.read(path)}
    c = forward["image_to_text_recall@5"]
    assert (c.a, c.b) == (values[c.metric, 10], values[c.metric, 20])
    with pytest.raises(UserError, match="no row of step 30; it has the steps 10, 20"):
        compare(a=path, b=path, step_a=30)


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
