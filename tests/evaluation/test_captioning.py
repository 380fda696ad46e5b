"""Caption scores against pycocoevalcap called directly, and a golden row on real captions."""

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from curation.errors import UserError
from evaluation.data import open_retrieval
from evaluation.tasks import captioning
from evaluation.tasks.captioning import CaptioningSettings, grade


def test_tokeniser():
    assert captioning.tokenise("A Dog , running . ") == "a dog running"
    assert captioning.tokenise("A dog, running.") == "a dog running"
    assert captioning.tokenise(" , .") == ""


@pytest.fixture
def texts():
    generator = np.random.default_rng(0)
    words = ["a", "the", "red", "blue", "dog", "cat", "runs", "sits", "on", "under", "big", "small", "tree", "house"]
    captions = [" ".join(generator.choice(words, size=generator.integers(0, 12))) for _ in range(40)]
    references = [
        [" ".join(generator.choice(words, size=generator.integers(3, 10))) for _ in range(generator.integers(1, 5))]
        for _ in range(40)
    ]
    references[3][0] = captions[3] = "the red dog sits under a big tree"
    return captions, references


def test_scores_are_those_of_pycocoevalcap(texts):
    captions, references = texts
    truth = dict(enumerate(references))
    written = {i: [caption] for i, caption in enumerate(captions)}
    cider, by_image = Cider().compute_score(truth, written)
    scores = captioning.cider_d(captions, references)
    assert np.allclose(scores, by_image) and scores.mean() == pytest.approx(cider)
    bleu, _ = Bleu(4).compute_score(truth, written, verbose=0)
    counts = captioning.bleu_counts(captions, references)
    assert captioning.bleu4(counts.sum(0)[None])[0] == pytest.approx(bleu[3])


def test_bleu_of_a_resample_is_bleu_of_those_images(texts):
    captions, references = texts
    counts = captioning.bleu_counts(captions, references)
    chosen = np.random.default_rng(1).integers(0, 40, size=40)
    truth = {i: references[j] for i, j in enumerate(chosen)}
    bleu, _ = Bleu(4).compute_score(truth, {i: [captions[j]] for i, j in enumerate(chosen)}, verbose=0)
    assert captioning.bleu4(counts[chosen].sum(0)[None])[0] == pytest.approx(bleu[3])


def test_golden_row_on_flickr8k_dev(photographs):
    """Caption #0 against #1-4, computed once with pycocoevalcap alone after lower() and dropping " ." and " ,".

    With its Java tokeniser the row is CIDEr-D 0.80366, BLEU-4 0.21160.
    """
    data = open_retrieval(photographs / "flickr8k/dev")
    captions, references = [c[0] for c in data.captions], [c[1:] for c in data.captions]
    assert len(captions) == 1000
    assert captioning.cider_d(captions, references).mean() == pytest.approx(0.8032635571447331, abs=1e-9)
    counts = captioning.bleu_counts(captions, references)
    assert captioning.bleu4(counts.sum(0)[None])[0] == pytest.approx(0.2117426243109739, abs=1e-9)


def test_grade_writes_captions_in_order_for_any_batch(pairs_folder, model):
    data = open_retrieval(pairs_folder)
    expected = [model.caption(model.images([data.pictures[i]]))[0] for i in range(23)]
    assert len(set(expected)) == 2
    for batch in (1, 7, 64):
        graded = grade(model, data, CaptioningSettings(bootstrap=50), batch=batch)
        assert [record["caption"] for record in graded.records] == expected
    found = {m.metric: m for m in graded.measurements}
    truth = {i: captions for i, captions in enumerate(data.captions)}
    cider, _ = Cider().compute_score(truth, {i: [caption.replace(" .", "")] for i, caption in enumerate(expected)})
    assert found["cider_d"].value == pytest.approx(cider)
    assert found["cider_d"].n == 23 and found["cider_d"].chance is None
    assert found["cider_d"].ci95[0] <= cider <= found["cider_d"].ci95[1]
    assert [record["uid"] for record in graded.records] == data.uids
    assert len(grade(model, data, CaptioningSettings(limit=5)).records) == 5
    short = grade(model, data, CaptioningSettings(max_new_tokens=2)).records
    assert {record["caption"] for record in short} == {"a bright", "a dark"}


def test_fixed_captions_stand_in_for_chance(pairs_folder, model, tmp_path):
    data = open_retrieval(pairs_folder)
    lines = [data.captions[0][0], "nothing of this", data.captions[7][0]]
    (tmp_path / "fixed.txt").write_text("\n".join(lines))
    graded = grade(model, data, CaptioningSettings(fixed_captions=tmp_path / "fixed.txt"))
    truth = {i: captions for i, captions in enumerate(data.captions)}
    best = max(Cider().compute_score(truth, {i: [line] for i in truth})[0] for line in lines)
    assert graded.measurements[0].chance == pytest.approx(best)
    with pytest.raises(UserError, match="fixed_captions"):
        grade(model, data, CaptioningSettings(fixed_captions=tmp_path / "absent.txt"))


def test_a_model_without_language_head_is_refused(pairs_folder, make_model):
    with pytest.raises(UserError, match="writes no captions"):
        grade(make_model(can_caption=False), open_retrieval(pairs_folder), CaptioningSettings())
