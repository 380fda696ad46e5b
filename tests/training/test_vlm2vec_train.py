"""MMEB-train subsets through `gemsmith train` on two ZeRO-3 ranks: trained, resumed bit for bit, exported, opened."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from curation.errors import UserError
from tests.conftest import ROOT, gemsmith
from tests.training.test_train import cut_short, state_of
from tests.training.vlm import ADAPTER, QWEN, picture, tiny
from training import adapters, checkpoint
from training.inference import load
from training.models.vlm_inputs import IMAGE
from training.train import parse

ROWS, BATCH, STEPS = 10, 16, 4
SUBSETS = ("MSCOCO_i2t", "VisualNews_t2i", "NIGHTS")


def columns(name: str, images: list[str]) -> dict[str, list[str]]:
    """A subset with hard negatives, under the other spelling; one of texts that find pictures; one of texts alone."""
    show, empty = f"{IMAGE}\nRepresent the given image.\n", [""] * ROWS
    texts = [f"the thing {number} of {name}" for number in range(ROWS)]
    if name == "MSCOCO_i2t":
        negatives = {"neg_text": [*texts[1:], ""], "neg_img_path": [images[1], *empty[1:]]}
        return {"qry": [show] * ROWS, "qry_img_path": images, "pos_text": texts, "pos_img_path": empty, **negatives}
    if name == "VisualNews_t2i":
        negatives = {"neg_text": [show] * ROWS, "neg_image_path": images[1:] + images[:1]}
        found = {"qry": [f"Find it: {text}" for text in texts], "qry_image_path": empty, "pos_text": [show] * ROWS}
        return {**found, "pos_image_path": images, **negatives}
    return {
        "qry": texts,
        "qry_image_path": empty,
        "pos_text": [f"{text}, again" for text in texts],
        "pos_image_path": empty,
    }


@pytest.fixture(scope="module")
def mmeb(tmp_path_factory) -> Path:
    """Three subsets and their pictures, one of which is lost."""
    folder = tmp_path_factory.mktemp("mmeb")
    (folder / "images").mkdir()
    images = [f"images/{number}.png" for number in range(ROWS)]
    for number, path in enumerate(images[:-1]):
        picture(number).save(folder / path)
    for name in SUBSETS:
        (folder / name).mkdir()
        pq.write_table(pa.table(columns(name, images)), folder / name / "original-00000-of-00001.parquet")
    return folder


def arguments(mmeb: Path, out: Path, *more: str) -> list[str]:
    sources = {name: {"path": str(mmeb / name), "kind": "rows"} for name in SUBSETS}
    sources[SUBSETS[0]]["path"] += "/original-00000-of-00001.parquet"
    numbers = [
        "--samples",
        str(STEPS * BATCH),
        "--loader.batch",
        str(BATCH),
        "--loader.chunk",
        "4",
        "--loader.unit",
        "4",
    ]
    numbers += ["--loader.retain", "4", "--checkpoint_every", "2", "--log_every", "1", "--loader.max_error_rate", "0.5"]
    numbers += ["--vlm2vec.tokenizer.vocab_size", "300", "--vlm2vec.negatives", "1", "--loader.threads", "2"]
    numbers += ["--vlm2vec.backbone", json.dumps(QWEN)]
    loss = ["--objective.directions", "left_to_right", "--objective.temperature_schedule", "constant"]
    recipe = ["--config", str(ROOT / "recipes/train/tiny_vlm2vec.yaml"), "--loader.sources", json.dumps(sources)]
    return [*recipe, *numbers, *loss, "--out", str(out), *more]


@pytest.mark.parametrize("kind", ["whole", pytest.param("lora", marks=pytest.mark.long)])
def test_rows_train_resume_and_open(kind, mmeb, tmp_path):
    more: list[str] = []
    if kind == "lora":  # of a pretrained backbone, whose frozen weights are in the checkpoints
        model, _, processor = tiny("qwen2_vl")
        model.backbone.save_pretrained(tmp_path / "vlm")
        processor.save_pretrained(tmp_path / "vlm")
        more = ["--vlm2vec.backbone", "null", "--vlm2vec.name_or_path", str(tmp_path / "vlm"), *ADAPTER]
        more += ["--activation_checkpointing", "true", "--precision", "fp32"]
    run = tmp_path / "run"
    gemsmith("train", *arguments(mmeb, run, *more), "--ranks", 2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == STEPS and all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert all(line["temperature"] == pytest.approx(0.07) for line in lines)
    assert 0 < lines[-1]["errors_by_reason"]["image_missing"] < STEPS * BATCH / 4
    assert set(lines[-1]["errors_by_reason"]) == {"image_missing"}

    again = cut_short(run, tmp_path / "again")
    assert "resuming after step 2" in gemsmith("train", *arguments(mmeb, again, *more), "--ranks", 2).stdout
    found, expected = state_of(again), state_of(run)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    counted = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])["errors_by_reason"]
    assert counted == lines[-1]["errors_by_reason"], "holes are counted over the run, not since it was resumed"
    kept = [checkpoint.check(checkpoint.latest(r)) for r in (run, again)]
    assert kept[0]["holes"] == kept[1]["holes"] == counted and kept[0]["budget"] == kept[1]["budget"]
    begun = checkpoint.consolidated(checkpoint.step_folder(run, 2))
    ended = checkpoint.consolidated(checkpoint.latest(run))
    moved = {name for name in ended if not torch.equal(begun[name], ended[name])}
    assert moved and all("lora_" in name for name in moved) == (kind == "lora") and "log_scale" not in moved

    trained, exported = load(checkpoint.latest(run)), load(run / "export")
    pictures, texts = [picture(n, (24, 40)) for n in range(3)], ["a thing", "the thing 3 of NIGHTS"]
    images, words = trained.embed_images(trained.images(pictures)), trained.embed_texts(texts)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    opened = [exported]
    if kind == "lora":
        assert (run / "export" / adapters.FOLDER / "adapter_config.json").exists()
        gemsmith("export", "--checkpoint", checkpoint.latest(run), "--out", tmp_path / "merged", "--merge")
        gemsmith("export", "--checkpoint", checkpoint.latest(run), "--out", tmp_path / "half", "--dtype", "bf16")
        opened.append(load(tmp_path / "merged"))
        assert float((load(tmp_path / "half").embed_texts(texts) * words).sum(1).min()) > 0.999
    for model in opened:
        assert model.step == STEPS
        assert (model.embed_images(model.images(pictures)) - images).abs().max() < 1e-5
        assert (model.embed_texts(texts) - words).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--loader.sources.NIGHTS.kind", "texts"], "loader.sources.NIGHTS.kind: vlm2vec trains on pairs and rows"),
        (["--loader.sources.NIGHTS.limit", "0"], "loader.sources.NIGHTS.limit"),
        (["--loader.retain", "auto"], "loader.retain"),
        (["--loader.resize_mode", "squash"], r"loader\.resize_mode: squash: a VLM sees whole pictures"),
        (["--loader.decode_size", "null"], r"loader\.cache_decoded: .* give loader\.decode_size"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(more, named, mmeb, tmp_path):
    with pytest.raises(UserError, match=named) as error:
        parse(arguments(mmeb, tmp_path / "run", *more))
    assert "\n" not in str(error.value)
