"""What a frozen FLAVA knows of a scene, read off by linear probes (logistic regressions) on its states.

    probe        features                    asks                                              score
    image        [CLS] of the picture        which shapes and colours are there (27 times)     mean average precision
    text         [CLS] of the caption        the same                                          mean average precision
    multimodal   both [CLS], and [CLS_M]     does a short statement fit the picture            accuracy

Statements name one thing ("a small striped red cone"); half of them with a
colour or a shape that is nowhere in the picture. An arm that never trained its
multimodal encoder has a random [CLS_M] beside the states of its two encoders,
so that it is not asked to do without them.

Features are standardised; the regressions' C is 0.1, which nothing was tuned
to. The first two thirds of the scenes train the probes, the others grade them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from curation.hashing import hash64
from curation.scenes import COLOURS, SHAPES

C = 0.1


def statement(row: Mapping[str, Any]) -> tuple[str, bool]:
    """A phrase of one thing of the scene, or one that fits nothing there; drawn from the scene's uid."""
    draw = hash64("statement", row["uid"])
    number = draw % len(row["objects"])
    phrase, thing = row["phrases"][number], row["objects"][number]
    if draw >> 32 & 1:
        return phrase, True
    what, words = ("colour", COLOURS) if draw >> 33 & 1 else ("shape", SHAPES)
    absent = [word for word in words if word not in {other[what] for other in row["objects"]}]
    return phrase.replace(thing[what], absent[(draw >> 34) % len(absent)]), False


def presence(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """bool [n, 27]: which shapes, then which colours, each scene has."""
    return np.array(
        [
            [any(thing["shape"] == shape for thing in row["objects"]) for shape in SHAPES]
            + [any(thing["colour"] == colour for thing in row["objects"]) for colour in COLOURS]
            for row in rows
        ]
    )


def scores_of(features: np.ndarray, labels: np.ndarray, *, ranked: bool) -> tuple[float, float]:
    """(score, chance) of a probe a column: features [n, D], labels bool [n, L]. Mean average precision, whose chance is
    the share of positives, or accuracy, whose chance is the larger class."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score
    from sklearn.preprocessing import StandardScaler

    cut = 2 * len(features) // 3
    scaler = StandardScaler().fit(features[:cut])
    train, test = scaler.transform(features[:cut]), scaler.transform(features[cut:])
    found = []
    for truth in labels.T:
        known, asked = truth[:cut], truth[cut:]
        if known.all() or not known.any() or not asked.any():
            continue  # nothing to learn, or nothing to find, in a handful of scenes
        probe = LogisticRegression(C=C, max_iter=2_000).fit(train, known)
        if ranked:
            found.append((average_precision_score(asked, probe.decision_function(test)), asked.mean()))
        else:
            found.append((probe.score(test, asked), max(asked.mean(), 1 - asked.mean())))
    value, chance = np.mean(found, axis=0)
    return float(value), float(chance)


def grade_probes(checkpoint: Path, pool: Path) -> dict[str, tuple[float, float]]:
    """(score, chance) of the three probes, on the scenes of a clean pool of `gemsmith synth`."""
    import pyarrow.parquet as pq
    import torch

    from evaluation.data import open_retrieval
    from evaluation.encode import BATCH, batches
    from training.inference import load

    model, data = load(checkpoint), open_retrieval(pool)
    truth = {row["uid"]: row for row in pq.read_table(pool / "truth.parquet").to_pylist()}
    rows = [truth[uid] for uid in data.uids]
    statements = [statement(row) for row in rows]
    flava = model.family.model
    states: dict[str, list[np.ndarray]] = {"image": [], "text": [], "multimodal": []}
    with torch.no_grad():
        for indices in batches(len(rows), BATCH):
            pixels = model.images([data.pictures[index] for index in indices]).to(model.device)
            captions, said = (
                model.family.encode_text(texts)["input_ids"].to(model.device)
                for texts in ([data.captions[i][0] for i in indices], [statements[i][0] for i in indices])
            )
            image = flava.get_image_features(pixels).last_hidden_state[:, 0]
            states["image"].append(image.cpu().numpy())
            states["text"].append(flava.get_text_features(captions).last_hidden_state[:, 0].cpu().numpy())
            text = flava.get_text_features(said).last_hidden_state[:, 0]
            joint = flava.get_multimodal_features(pixels, said).pooler_output
            states["multimodal"].append(torch.cat([image, text, joint], 1).cpu().numpy())
    features = {name: np.concatenate(found)[: len(rows)] for name, found in states.items()}
    there, fits = presence(rows), np.array([[fits] for _, fits in statements])
    return {
        "image": scores_of(features["image"], there, ranked=True),
        "text": scores_of(features["text"], there, ranked=True),
        "multimodal": scores_of(features["multimodal"], fits, ranked=False),
    }
