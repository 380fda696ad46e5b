import numpy as np
import pytest

from evaluation.data import open_classification
from evaluation.tasks.classification import ClassificationSettings, grade


def test_figures_against_plain_numpy(classes_folder, model):
    data = open_classification(classes_folder)
    graded = grade(model, data, ClassificationSettings(bootstrap=200))
    found = {m.metric: m for m in graded.measurements}

    images = np.concatenate([model.embed_images(model.images([data.pictures[i]])).numpy() for i in range(30)])
    weights = []
    for name in data.class_names:
        prompts = [f"a photo of a {name}", f"a drawing of the {name}", name]
        mean = np.mean([model.embed_texts([prompt]).numpy()[0] for prompt in prompts], axis=0)
        weights.append(mean / np.linalg.norm(mean))
    order = np.argsort(-(images @ np.array(weights).T), axis=1)
    labels = np.array([n * n % 7 for n in range(30)])
    right = order[:, 0] == labels
    assert found["acc1"].value == pytest.approx(right.mean())
    assert found["acc5"].value == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    recalls = [right[labels == label].mean() for label in range(7) if (labels == label).any()]
    assert found["mean_per_class_recall"].value == pytest.approx(np.mean(recalls))
    assert [found[m].chance for m in ("acc1", "acc5", "mean_per_class_recall")] == [1 / 7, 5 / 7, 1 / 7]
    assert all(m.n == 30 and m.ci95[0] <= m.value <= m.ci95[1] for m in found.values())


def test_limit_takes_the_first_images(classes_folder, model):
    data = open_classification(classes_folder)
    whole, part = grade(model, data, ClassificationSettings()), grade(model, data, ClassificationSettings(limit=10))
    assert part.measurements[0].n == 10
    assert np.array_equal(part.per_query["acc1"], whole.per_query["acc1"][:10])
