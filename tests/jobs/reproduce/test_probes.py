"""Questions and rows against the scenes' own record; probes against data that is known to answer them, or not to."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.scenes import COLOURS, SHAPES
from curation.synth import synthesise
from jobs.reproduce import probes, rows
from training.data.mmeb import Subset


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probes") / "pool"
    synthesise(out=folder, pairs=60, seed=1, noise=False, workers=1)
    return folder


@pytest.fixture(scope="module")
def truth(pool: Path) -> list[dict]:
    return pq.read_table(pool / "truth.parquet").to_pylist()


def test_statements_fit_or_name_a_thing_that_is_not_there(truth: list[dict]) -> None:
    fitting = []
    for row in truth:
        said, fits = probes.statement(row)
        fitting.append(fits)
        *_, colour, shape = said.split()
        there = [(thing["colour"], thing["shape"]) for thing in row["objects"]]
        assert ((colour, shape) in there) is fits, said
        if not fits:
            assert colour not in {c for c, _ in there} or shape not in {s for _, s in there}
        assert colour in COLOURS and shape in SHAPES
    assert 0.3 < np.mean(fitting) < 0.7


def test_presence_is_what_the_scene_has(truth: list[dict]) -> None:
    there = probes.presence(truth)
    for row, flags in zip(truth, there, strict=True):
        named = {word for word, flag in zip([*SHAPES, *COLOURS], flags, strict=True) if flag}
        assert named == {thing[what] for thing in row["objects"] for what in ("shape", "colour")}


def test_probes_find_what_is_there_and_nothing_in_noise() -> None:
    generator = np.random.default_rng(0)
    labels = generator.random((900, 3)) < 0.3
    noise = generator.normal(size=(900, 8))
    clear = np.column_stack([noise, labels * 5.0 + 100])
    for ranked in (True, False):
        value, chance = probes.scores_of(clear, labels, ranked=ranked)
        assert value > 0.99
        assert chance == pytest.approx(0.3 if ranked else 0.7, abs=0.05)
        value, chance = probes.scores_of(noise, labels, ranked=ranked)
        assert value == pytest.approx(chance, abs=0.08)


def test_a_label_that_is_never_there_is_left_out() -> None:
    generator = np.random.default_rng(0)
    labels = np.column_stack([generator.random(90) < 0.5, np.zeros(90, bool)])
    features = np.column_stack([labels[:, 0] * 4.0, generator.normal(size=90)])
    assert probes.scores_of(features, labels, ranked=True)[0] > 0.99


def test_answers_are_of_the_largest_thing_where_there_is_one(truth: list[dict]) -> None:
    asked = 0
    for row in truth:
        found = dict(rows.answers(row))
        number = ("one", "two", "three", "four")[len(row["objects"]) - 1]
        assert found["caption"] == row["caption"] and found["count"].startswith(number)
        areas = sorted(
            ((w * h, thing) for (_, _, w, h), thing in zip(row["boxes"], row["objects"])), key=lambda p: -p[0]
        )
        clear = len(areas) == 1 or areas[0][0] / areas[1][0] >= rows.CLEARLY
        assert ("colour" in found) is clear is ("shape" in found)
        if clear:
            assert (found["colour"], found["shape"]) == (areas[0][1]["colour"], areas[0][1]["shape"])
            asked += 1
    assert asked > 20


def test_rows_are_mmeb_train_in_two_forms(pool: Path, truth: list[dict], tmp_path: Path) -> None:
    rows.write_rows(pool, tmp_path)
    for task, instruction in rows.TASKS.items():
        asked, plain = Subset(tmp_path / "asked" / task), Subset(tmp_path / "plain" / task)
        assert len(asked) == len(plain) > 0
        for number in range(len(asked)):
            a, b = asked.sample(number)["row"], plain.sample(number)["row"]
            assert a.query.text == f"<|image_1|> Instruct: {instruction} Query:" and b.query.text == "<|image_1|>"
            assert a.positive == b.positive and a.query.image.size == (rows.SIDE, rows.SIDE)
            assert a.query.image.tobytes() == b.query.image.tobytes()
