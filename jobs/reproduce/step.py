"""What claims do beside the project's commands, each as a process of its own: `python -m jobs.reproduce.step NAME ...`.

A grading step writes its scores to the last path; the others write their outputs themselves.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.manifest import write_json
from jobs.reproduce import probes, rows


def make_tokenizer(out: str, *words: str) -> None:
    """OUT as the tokenizer's folder of a run with these words of `gemsmith train`."""
    from training.data import every_caption, open_sources
    from training.families import build
    from training.train import parse

    if not Path(out).exists():  # there whole or not at all
        config, data, _, _ = parse([*words, "--out", "."])
        sources = open_sources(config.loader, data)
        build(config, Path(out), lambda: every_caption(sources))


def write_backbone(export: str, out: str) -> None:
    """OUT as a folder that `vlm2vec.name_or_path` reads: the backbone of a run's export, with its processor."""
    from transformers import AutoProcessor

    from training.models.vlm2vec import Vlm2Vec

    Vlm2Vec.from_pretrained(export).backbone.save_pretrained(out)
    AutoProcessor.from_pretrained(export).save_pretrained(out)


def grade_bits(checkpoint: Path, first: Path, pool: Path) -> dict[str, tuple[float, float]]:
    """same_bits: share of the pool's pictures and texts whose embeddings by the two checkpoints have the same bits."""
    import numpy as np

    from evaluation.data import open_retrieval
    from evaluation.encode import encode_images, encode_texts
    from training.inference import load

    data = open_retrieval(pool)
    texts = [captions[0] for captions in data.captions]
    models = [load(checkpoint), load(first)]
    a, b = (np.concatenate([encode_images(m, data.pictures), encode_texts(m, texts)]) for m in models)
    return {"same_bits": (float((a.view(np.uint32) == b.view(np.uint32)).all(axis=1).mean()), 0.0)}


STEPS: dict[str, Callable[..., Any]] = {
    "write_rows": rows.write_rows,
    "make_tokenizer": make_tokenizer,
    "write_backbone": write_backbone,
    "grade_rows": rows.grade_rows,
    "grade_bits": grade_bits,
    "grade_probes": probes.grade_probes,
}


def main(name: str, *words: str) -> None:
    if name.startswith("grade_"):
        write_json(Path(words[-1]), STEPS[name](*map(Path, words[:-1])))
    else:
        STEPS[name](*words)


if __name__ == "__main__":
    main(*sys.argv[1:])
