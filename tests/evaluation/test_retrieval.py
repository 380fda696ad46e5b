"""Ranks and chance levels against enumeration of every order of every tie."""

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest

from evaluation.data import open_retrieval
from evaluation.encode import encode_images, encode_texts
from evaluation.tasks import retrieval
from evaluation.tasks.retrieval import Ranks, RetrievalSettings, best_ranks, grade, grade_embeddings


def every_order(scores: np.ndarray, positives: set[int]) -> list[int]:
    """The best positive's rank in each order of the candidates that respects the scores."""
    ranks = []
    for order in permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in pairwise(order)):
            ranks.append(1 + min(order.index(p) for p in positives))
    return ranks


@pytest.mark.parametrize("seed", range(40))
def test_ties_give_the_expectation_over_all_orders(seed):
    generator = np.random.default_rng(seed)
    total = int(generator.integers(2, 8))
    scores = generator.integers(0, 3, size=total) / 4.0  # few levels: many ties
    positives = generator.permutation(total)[: int(generator.integers(1, total + 1))]
    query = np.array([[1.0, 0.0]])
    candidates = np.column_stack([scores, np.zeros(total)])
    ranks = best_ranks(query, candidates, np.array([0, len(positives)]), positives)
    expected = np.array(every_order(scores, set(positives.tolist())))
    assert retrieval.expected_rank(ranks)[0] == pytest.approx(expected.mean())
    assert retrieval.expected_reciprocal(ranks)[0] == pytest.approx((1 / expected).mean())
    for k in (1, 2, 3, 5, 10):
        assert retrieval.expected_hit(ranks, k)[0] == pytest.approx((expected <= k).mean()), k


@pytest.mark.parametrize(("total", "positives"), [(1, 1), (6, 1), (7, 3), (9, 5), (5, 5)])
def test_first_position_by_enumeration(total, positives):
    first = [min(chosen) for chosen in combinations(range(total), positives)]
    expected = np.bincount(first, minlength=total - positives + 1) / len(first)
    assert np.allclose(retrieval.first_position(total, positives), expected)


def brute_force(images: np.ndarray, texts: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks where nothing ties: a full sort of the full matrix."""
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    to_text, to_image = [], []
    for image in range(len(images)):
        order = np.argsort(-scores[image])
        to_text.append(1 + min(np.flatnonzero(owner[order] == image)))
    for text in range(len(texts)):
        to_image.append(1 + list(np.argsort(-scores[:, text])).index(owner[text]))
    return np.array(to_text), np.array(to_image)


def embeddings(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    owner = np.repeat(np.arange(images), generator.integers(1, 6, size=images))
    base = generator.standard_normal((images, 24))
    noisy = base[owner] + 2.0 * generator.standard_normal((len(owner), 24))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (base, noisy)]
    return unit[0].astype(np.float32), unit[1].astype(np.float32), owner


@pytest.mark.parametrize("cells", [1, 5_000, 4_000_000])
def test_all_figures_against_brute_force_in_any_block_size(monkeypatch, cells):
    monkeypatch.setattr(retrieval, "CELLS", cells)
    images, texts, owner = embeddings(150)
    graded = grade_embeddings(images, texts, owner, RetrievalSettings(bootstrap=50))
    value = {m.metric: m.value for m in graded.measurements}
    for name, ranks in zip(("image_to_text", "text_to_image"), brute_force(images, texts, owner)):
        for k in (1, 5, 10):
            assert value[f"{name}_recall@{k}"] == pytest.approx((ranks <= k).mean())
        assert value[f"{name}_mrr"] == pytest.approx((1 / ranks).mean())
        assert value[f"{name}_median_rank"] == np.median(ranks)
        assert np.allclose(graded.per_query[f"{name}_mrr"], 1 / ranks)
    assert np.array_equal(graded.per_query["cluster/text_to_image_mrr"], owner)
    assert "cluster/image_to_text_mrr" not in graded.per_query


def test_constant_embeddings_score_chance_exactly():
    images, texts, owner = embeddings(60, seed=3)
    constant = np.ones_like(images[:1]) / np.sqrt(images.shape[1])
    graded = grade_embeddings(
        np.repeat(constant, len(images), 0), np.repeat(constant, len(texts), 0), owner, RetrievalSettings(bootstrap=20)
    )
    for m in graded.measurements:
        if m.metric != "image_to_text_median_rank":  # the median of expected ranks, not the expected median
            assert m.value == pytest.approx(m.chance), m.metric


def test_chance_is_what_random_embeddings_score():
    generator = np.random.default_rng(1)
    _, _, owner = embeddings(60, seed=3)
    totals: dict[str, list[float]] = {}
    for _ in range(60):
        random_images, random_texts = generator.standard_normal((60, 32)), generator.standard_normal((len(owner), 32))
        for m in grade_embeddings(random_images, random_texts, owner, RetrievalSettings(bootstrap=2)).measurements:
            totals.setdefault(m.metric, []).append(m.value - m.chance)
    for metric, excess in totals.items():
        slack = 0.6 if metric.endswith("median_rank") else 0.0  # the mean of a sample's median is not the median
        assert abs(np.mean(excess)) < 4 * np.std(excess) / np.sqrt(len(excess)) + slack, metric


def test_recall_chance_is_hypergeometric():
    from scipy.stats import hypergeom

    images, texts, owner = embeddings(40)
    found = {
        m.metric: m.chance for m in grade_embeddings(images, texts, owner, RetrievalSettings(bootstrap=2)).measurements
    }
    counts = np.bincount(owner)
    for k in (1, 5, 10):
        expected = np.mean([1 - hypergeom(len(texts), m, k).pmf(0) for m in counts])
        assert found[f"image_to_text_recall@{k}"] == pytest.approx(expected)
        assert found[f"text_to_image_recall@{k}"] == pytest.approx(k / 40)
    assert found["text_to_image_mrr"] == pytest.approx(np.mean(1 / np.arange(1, 41)))
    assert found["text_to_image_median_rank"] == 20.5


def test_noise_of_float32_does_not_decide_between_copies():
    generator = np.random.default_rng(0)
    texts = generator.standard_normal((8, 16))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    images = np.vstack([texts, texts]) + 1e-8 * generator.standard_normal((16, 16))
    ranks = best_ranks(texts, images, np.arange(9), np.arange(8))
    assert np.array_equal(ranks.tied, np.full(8, 2))
    assert np.allclose(retrieval.expected_hit(ranks, 1), 0.5)
    assert np.allclose(retrieval.expected_reciprocal(ranks), 0.75)


def test_all_positives_in_the_tie_leave_nothing_to_chance():
    ranks = Ranks(np.array([2]), np.array([3]), np.array([3]))
    assert (retrieval.expected_reciprocal(ranks)[0], retrieval.expected_hit(ranks, 3)[0]) == (1 / 3, 1.0)
    assert retrieval.expected_hit(ranks, 2)[0] == 0.0


@pytest.mark.parametrize("captions", ["first", "all"])
@pytest.mark.parametrize("limit", [None, 9])
def test_grade_on_a_folder(pairs_folder, model, captions, limit):
    data = open_retrieval(pairs_folder)
    graded = grade(model, data, RetrievalSettings(captions=captions, limit=limit, bootstrap=20))
    chosen = [c[:1] if captions == "first" else c for c in data.captions[:limit]]
    owner = np.array([i for i, c in enumerate(chosen) for _ in c])
    images = encode_images(model, data.pictures.head(limit))
    texts = encode_texts(model, [text for c in chosen for text in c])
    to_text, to_image = brute_force(images, texts, owner)
    value = {m.metric: m for m in graded.measurements}
    assert value["image_to_text_mrr"].value == pytest.approx((1 / to_text).mean())
    assert value["text_to_image_recall@5"].value == pytest.approx((to_image <= 5).mean())
    assert (value["image_to_text_mrr"].n, value["text_to_image_mrr"].n) == (len(chosen), len(owner))
