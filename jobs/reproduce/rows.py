"""Rows in MMEB-train's form out of synth's scenes, whose truth is known, and the grading of a model on such rows.

    task      asks for                       finds
    caption   the caption                    one of all captions
    colour    the colour of the largest      one of the colours
    shape     the shape of the largest       one of the shapes
    count     how many things there are      one of four numbers

Pictures are written at the size that tiny models see, so that training and
grading show them alike.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASKS = {
    "caption": "Find the caption of the picture.",
    "colour": "Find the colour of the largest thing.",
    "shape": "Find the shape of the largest thing.",
    "count": "Find how many things there are.",
}
SIDE = 64  # pixels
COUNTS = {1: "one thing", 2: "two things", 3: "three things", 4: "four things"}
CLEARLY = 1.25  # a thing is the largest where its box has so many times the area of the next


def answers(truth: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(task, answer) of one row of synth's truth; colour and shape only where one thing is clearly the largest."""
    yield "caption", truth["caption"]
    yield "count", COUNTS[len(truth["objects"])]
    areas = [width * height for _, _, width, height in truth["boxes"]]
    order = sorted(range(len(areas)), key=lambda k: -areas[k])
    if len(order) == 1 or areas[order[0]] >= CLEARLY * areas[order[1]]:
        largest = truth["objects"][order[0]]
        yield "colour", largest["colour"]
        yield "shape", largest["shape"]


def write_rows(pool: Path | str, out: Path | str) -> None:
    """OUT/images, OUT/{asked,plain}/TASK/rows.parquet: MMEB-train's columns, with and without the instruction."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from evaluation.data import open_retrieval
    from training.models.vlm_inputs import IMAGE, instruct

    pool, out = Path(pool), Path(out)
    data = open_retrieval(pool)
    truth = {row["uid"]: row for row in pq.read_table(pool / "truth.parquet").to_pylist()}
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[tuple[str, str]]] = {task: [] for task in TASKS}
    for index, uid in enumerate(data.uids):
        name = f"images/{index:06d}.png"
        data.pictures[index].resize((SIDE, SIDE)).save(out / name, compress_level=1)
        for task, answer in answers(truth[uid]):
            rows[task].append((name, answer))
    for form in ("asked", "plain"):
        for task, found in rows.items():
            query = instruct(TASKS[task], image=True) if form == "asked" else IMAGE
            table = pa.table(
                {
                    "qry": [query] * len(found),
                    "qry_image_path": [name for name, _ in found],
                    "pos_text": [answer for _, answer in found],
                    "pos_image_path": [""] * len(found),
                }
            )
            folder = out / form / task
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, folder / "rows.parquet")


def grade_rows(checkpoint: Path, rows: Path) -> dict[str, tuple[float, float]]:
    """TASK_hit_at_1 and TASK_mrr, each with its chance, of every task below `rows` (or of the one that `rows` is): the
    query's positive among the distinct positives of the task, ties shared fairly."""
    import numpy as np
    import torch

    from evaluation.encode import BATCH, batches, refuse_broken
    from evaluation.tasks.retrieval import Ranks, best_ranks, expected_hit, expected_reciprocal
    from training.data import Drawn
    from training.data.mmeb import Subset
    from training.inference import load
    from training.models.vlm_inputs import of_side

    model = load(checkpoint)
    assert model.family.extra is not None
    scores = {}
    for folder in [rows] if list(rows.glob("*.parquet")) else sorted(rows.iterdir()):
        subset = Subset(folder)
        drawn = [Drawn(fields=subset.sample(number)) for number in range(len(subset))]
        answers = [row.fields["row"].positive.text for row in drawn]
        candidates = sorted(set(answers))
        queries = []
        with torch.no_grad():
            for indices in batches(len(drawn), BATCH):
                chunk = model.family.extra("rows", [drawn[index] for index in indices])
                side = {name: x.to(model.device) for name, x in of_side(chunk, "query").items()}
                queries.append(model.family.model.embed(side)[: len(indices)].cpu().numpy())
            texts = [
                model.embed_texts([candidates[index] for index in indices]).numpy()
                for indices in batches(len(candidates), BATCH)
            ]
        left, right = np.concatenate(queries)[: len(drawn)], np.concatenate(texts)[: len(candidates)]
        refuse_broken(left, model=model.name, modality=f"queries of {folder.name}")
        refuse_broken(right, model=model.name, modality=f"answers of {folder.name}")
        place = {text: index for index, text in enumerate(candidates)}
        positives = np.array([place[answer] for answer in answers])
        ranks = best_ranks(left, right, np.arange(len(left) + 1), positives)
        guess = Ranks(np.array([0]), np.array([len(candidates)]), np.array([1]))  # all tied
        for metric, expected in (("hit_at_1", lambda r: expected_hit(r, 1)), ("mrr", expected_reciprocal)):
            scores[f"{folder.name}_{metric}"] = (float(expected(ranks).mean()), float(expected(guess).mean()))
    return scores
