"""FLAVA: do its five losses give better states than the contrastive loss alone, for pictures, for texts and for both?

Both arms see the same pairs in the same order. The full arm sees unpaired
pictures and unpaired texts too, a batch of each in turn, as the paper adds
unimodal data; that is three times the samples, and it is said on the page.
"""

import json
from pathlib import Path

from jobs.reproduce.claim import Arm, Claim, Hypothesis, Score
from jobs.reproduce.workshop import HELDOUT, Seed, Workshop

UNPAIRED = 2_000_029  # added to a seed: scenes of its unpaired pictures and texts
BATCH = 32
SINGLE = {"pairs": {"kind": "pairs"}}
NO_OTHERS = {name: 0.0 for name in ("itm", "mim", "mlm", "mmm_image", "mmm_text")}


def prepare(workshop: Workshop) -> None:
    workshop.synth(workshop.shared / "heldout", workshop.size("heldout", least=240), HELDOUT)


def prepare_seed(seed: Seed) -> None:
    """One tokenizer for both arms, trained on the pairs' captions: the same model, and the same initial weights."""
    workshop, data = seed.workshop, seed.data
    workshop.synth(data / "train", workshop.size("train", least=256), seed.number)
    workshop.synth(data / "pictures", workshop.size("unpaired", least=256), seed.number + UNPAIRED)
    workshop.synth(data / "texts", workshop.size("unpaired", least=256), seed.number + 2 * UNPAIRED)
    workshop.tokenizer(data / "tokenizer", "--config", CLAIM.recipe, "--data", data / "train")


def grade(seed: Seed, arm: str, run: Path) -> dict[str, Score]:
    return seed.grade("grade_probes", arm, run, seed.workshop.shared / "heldout")


CLAIM = Claim(
    title="All five losses give better states than the contrastive loss alone",
    source="FLAVA, arXiv 2112.04482, table 4",
    says="Linear probes on the frozen states of pictures, of texts and of both together score higher after all five "
    "losses than after the contrastive one, with the same pairs seen.",
    recipe="recipes/train/tiny_flava.yaml",
    sizes={"samples": 18_432, "train": 3_000, "unpaired": 1_500, "heldout": 2_400},
    overrides=(
        "--flava.tokenizer.name_or_path", "{data}/tokenizer", "--loader.captions", "random",
        *(word for name in ("batch", "chunk", "unit") for word in (f"--loader.{name}", str(BATCH))),
    ),
    arms={
        "all losses": Arm(
            says="pairs, pictures and texts in turn; contrastive, matching, and three maskings",
            data=("pairs={data}/train", "images={data}/pictures", "texts={data}/texts"),
            times=3,
        ),
        "contrastive": Arm(
            says="the same pairs, all other losses weighted by 0, no pair given another's text",
            data=("pairs={data}/train",),
            overrides=(
                "--loader.sources", json.dumps(SINGLE), "--objective.weights", json.dumps(NO_OTHERS),
                "--flava.masks.mismatched", "0",
            ),
        ),
    },
    hypotheses=tuple(
        Hypothesis(metric=metric, arm="all losses", against="contrastive")
        for metric in ("image", "text", "multimodal")
    ),
    why=(
        "Equal pairs, not equal work: the full arm also sees as many pictures and as many texts alone, because "
        "unpaired data is what the other losses are for. A difference is that of the whole scheme.",
        "image, text: mean average precision of 27 questions (which shapes, which colours) from [CLS]. multimodal: "
        "accuracy of whether a statement fits the picture, from the two [CLS] and [CLS_M] together, in both arms.",
        "Batches of 32, so that a few minutes have steps enough to learn in.",
        "1.9 million weights from scratch, k-means codes in place of DALL-E's, and scenes in place of 35 tasks.",
    ),
    prepare=prepare,
    prepare_seed=prepare_seed,
    grade=grade,
    shown=("image", "text", "multimodal"),
    minutes=27,
)  # fmt: skip
