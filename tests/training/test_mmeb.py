"""MMEB-train folders in the forms that are published: spellings, missing columns, empty sides, lost pictures."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from tests.training.vlm import picture, tiny
from training.bottleneck import Timers
from training.config import LoaderConfig, SourceConfig
from training.data import Hole
from training.data.mmeb import Subset
from training.data.sources import fingerprint, open_sources
from training.models.vlm_inputs import IMAGE

I2T = {
    "qry": [f"{IMAGE}\nFind an image caption describing the given everyday image.\n"] * 3,
    "qry_image_path": ["images/COCO/a.png", "images/COCO/b.png", "images/COCO/lost.png"],
    "pos_text": ["a man", "a dog", "a boat"],
    "pos_image_path": ["", "", ""],
    "neg_text": ["a cat", "", "a tree"],
    "neg_image_path": ["", "", ""],
}
CIRR = {
    "qry": [f"{IMAGE}\nGiven an image, find a similar everyday image with the described changes: fewer dogs\n"],
    "qry_img_path": ["images/CIRR/c.png"],
    "pos_text": [f"{IMAGE}\nRepresent the given image.\n"],
    "pos_img_path": ["images/COCO/a.png"],
}
LISTS = {
    "qry": ["Find the picture: a dog"],
    "qry_image_path": [""],
    "pos_text": [f"{IMAGE} Represent the given image."],
    "pos_image_path": ["images/COCO/b.png"],
    "neg_text": [["one", "", f"{IMAGE} two"]],
    "neg_image_path": [["", "images/COCO/a.png", "images/CIRR/c.png"]],
}


@pytest.fixture
def folder(tmp_path):
    for number, path in enumerate(["COCO/a.png", "COCO/b.png", "CIRR/c.png"]):
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / "images" / path)
    for name, columns in {"MSCOCO_i2t": I2T, "CIRR": CIRR, "Lists": LISTS}.items():
        (tmp_path / name).mkdir()
        pq.write_table(pa.table(columns), tmp_path / name / "original-00000-of-00001.parquet")
    return tmp_path


def subsets(folder):
    return {file.parent.name: Subset(file.parent) for file in sorted(folder.glob("*/*.parquet"))}


def same(item, text, number):
    assert item.text == text
    assert (item.image is None) == (number is None)
    if number is not None:
        assert item.image.tobytes() == picture(number).tobytes()
    return True


def test_subsets_are_read_as_published(folder):
    found = subsets(folder)
    assert {name: len(subset) for name, subset in found.items()} == {"CIRR": 1, "Lists": 1, "MSCOCO_i2t": 3}
    row = found["MSCOCO_i2t"].sample(0)["row"]
    assert same(row.query, I2T["qry"][0], 0) and same(row.positive, "a man", None)
    assert len(row.negatives) == 1 and same(row.negatives[0], "a cat", None)
    assert found["MSCOCO_i2t"].sample(1)["row"].negatives == [], "an empty text without a picture is no negative"
    row = found["CIRR"].sample(0)["row"]
    assert same(row.query, CIRR["qry"][0], 2) and same(row.positive, CIRR["pos_text"][0], 0) and not row.negatives
    row = found["Lists"].sample(0)["row"]
    assert same(row.query, "Find the picture: a dog", None) and same(row.positive, LISTS["pos_text"][0], 1)
    assert [n.text for n in row.negatives] == ["one", "", f"{IMAGE} two"]
    assert same(row.negatives[1], "", 0) and same(row.negatives[2], f"{IMAGE} two", 2)
    assert found["Lists"].sample(0)["uid"] == "Lists/00000000"
    keys = {subset.key(i) for subset in found.values() for i in range(len(subset))}
    assert len(keys) == 5 and "MSCOCO_i2t/00000002" in keys
    assert "a dog" in found["MSCOCO_i2t"].texts() and "one" in found["Lists"].texts()


def test_rows_become_chunks_and_a_lost_picture_a_hole(folder):
    (folder / "images/COCO/torn.png").write_bytes((folder / "images/COCO/b.png").read_bytes()[:60])
    torn = {name: value[:1] for name, value in I2T.items()} | {"qry_image_path": ["images/COCO/torn.png"]}
    (folder / "Torn").mkdir()
    pq.write_table(pa.table(torn), folder / "Torn" / "x.parquet")
    rows, lost = [], []
    for subset in subsets(folder).values():
        for number in range(len(subset)):
            try:
                rows.append(subset.sample(number)["row"])
            except Hole as hole:
                rows.append(None)
                lost.append((subset.key(number), str(hole)))
    assert lost == [("MSCOCO_i2t/00000002", "image_missing"), ("Torn/00000000", "image_broken")]
    rows.pop()
    model, inputs, processor = tiny("qwen2_vl", negatives=2)
    chunk = inputs.collate(rows)
    assert chunk["valid"].tolist() == [True, True, True, True, False]
    assert chunk["right_valid"].tolist() == [
        [True, False, False],
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [False, False, False],
    ]
    assert len(chunk["query.image_grid_thw"]) == 3 and len(chunk["target.image_grid_thw"]) == 3
    texts = processor.tokenizer.batch_decode(chunk["query.input_ids"])
    assert all("image_1" not in text for text in texts)
    assert texts[0].count("<|vision_start|>") == 1
    assert model(chunk)["right"].shape == (5, 3, 32)


def test_decoding_is_told_from_reading(folder):
    timers = Timers()
    with timers("read"):
        subsets(folder)["MSCOCO_i2t"].sample(0)
    assert timers.seconds.keys() == {"read", "decode"} and timers.seconds["decode"] > 0


def test_where_the_first_pictures_are_lost_the_others_are_found(folder):
    first = {**I2T, "qry_image_path": ["images/COCO/lost.png", "images/COCO/lost too.png", "images/COCO/b.png"]}
    pq.write_table(pa.table(first), folder / "MSCOCO_i2t" / "original-00000-of-00001.parquet")
    subset = Subset(folder / "MSCOCO_i2t")
    for number in (0, 1):
        with pytest.raises(Hole, match="image_missing"):
            subset.sample(number)
    assert same(subset.sample(2)["row"].query, I2T["qry"][2], 1)


def test_negatives_beyond_those_asked_for_are_not_read(folder):
    """Whoever trains without them neither decodes their pictures nor loses a row with a lost one."""
    (folder / "images/CIRR/c.png").unlink()
    with pytest.raises(Hole, match="image_missing"):
        Subset(folder / "Lists").sample(0)
    config = LoaderConfig(sources={"Lists": SourceConfig(kind="rows")})
    for number, texts in ((0, []), (2, ["one", ""])):
        source = open_sources(config, {"Lists": str(folder / "Lists")}, negatives=number)[0]
        assert [item.text for item in source.samples.sample(0)["row"].negatives] == texts


def test_a_part_of_a_subset(folder):
    only = Subset(folder / "MSCOCO_i2t", limit=2)
    assert len(only) == 2 and only.sizes.tolist() == [2] and only.sample(1)["row"].query.text == I2T["qry"][1]
    file = folder / "CIRR" / "original-00000-of-00001.parquet"
    assert Subset(file).images == folder and Subset(file).sample(0)["row"].query.image.size == picture(2).size


def test_of_several_splits_only_the_papers_is_read_unless_another_is_named(folder):
    there = folder / "CIRR"
    config = LoaderConfig(sources={"CIRR": SourceConfig(kind="rows")})
    before, alone = fingerprint(config, {"CIRR": str(there)}), Subset(there).texts()
    (there / "diverse_instruction-00000-of-00001.parquet").write_bytes(b"cut short")
    assert Subset(there).texts() == alone and fingerprint(config, {"CIRR": str(there)}) == before
    with pytest.raises(UserError, match="fetch it again"):
        Subset(there / "diverse_instruction-00000-of-00001.parquet")
    (there / "original-00000-of-00001.parquet").rename(there / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match="holds several splits and no 'original'; name a file"):
        Subset(there)
    assert Subset(there / "train-00000-of-00001.parquet").texts() == alone


def test_what_cannot_be_read_is_one_clear_line(folder, tmp_path):
    (folder / "Odd").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), folder / "Odd" / "x.parquet")
    (folder / "Far").mkdir()
    far = {**I2T, "qry_image_path": ["images/far/x.png"] * 3}
    pq.write_table(pa.table(far), folder / "Far" / "x.parquet")
    (folder / "Farther").mkdir()
    farther = {**I2T, "qry_image_path": [f"images/far/{number}.png" for number in range(3)]}
    pq.write_table(pa.table(farther), folder / "Farther" / "x.parquet")
    (folder / "Empty").mkdir()
    pq.write_table(pa.table(I2T).slice(0, 0), folder / "Empty" / "x.parquet")
    for name, named in [
        ("absent", "no such folder"),
        ("images", r"no \*.parquet"),
        ("Odd", "no column 'qry'"),
        ("Far", "images/far/x.png is in none of"),
        ("Farther", "images/far/0.png and the next 2 pictures are in none of"),
        ("Empty", "hold no row"),
    ]:
        with pytest.raises(UserError, match=named) as error:
            Subset(folder / name)
        assert "\n" not in str(error.value)


def test_a_row_without_a_query_is_a_hole(folder):
    nothing = {**{k: v[:1] for k, v in I2T.items()}, "qry": [""], "qry_image_path": [""]}
    pq.write_table(pa.table(nothing), folder / "nothing.parquet")
    with pytest.raises(Hole, match="caption_missing"):
        Subset(folder / "nothing.parquet").sample(0)
