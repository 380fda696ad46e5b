"""Captioning signals against BLIP stepped by hand, SIEVE's score against pooling by hand; tiny models, real code."""

import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from curation import store
from curation.captioner import HUGGINGFACE, captioner_content, load_captioner
from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.hashing import hash64
from curation.measure import Measuring
from curation.selection.fusion import ScoreFusion
from curation.signals import identity
from curation.signals.sieve import strip_phrases
from tests.conftest import ROOT
from tests.curation.conftest import WORDS, picture, sample, write_tar
from tests.curation.test_signals import measure_alone


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, bytes]]]:
    folder = tmp_path_factory.mktemp("captioned")
    said = ["a photo of the red dog", "the photographer sits on grass", "Image of a tree and water"]
    samples = {f"{n:03d}": sample(n, txt=said[n % 3].encode()) for n in range(12)}
    samples["copy"] = sample(99, jpg=picture(3))
    write_tar(folder / "pool" / "0.tar", samples)
    return folder / "pool", samples


def by_hand(folder: Path, jpg: bytes, choose, least: int, most: int) -> list[int]:
    """Token ids of one picture, a whole forward pass a step; `choose` gets (step, logits float64 [V])."""
    from transformers import AutoImageProcessor, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    image = Image.open(io.BytesIO(jpg)).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = model.vision_model(pixels)[0]
        ids = [2]
        for step in range(most):
            logits = model.text_decoder(torch.tensor([ids]), encoder_hidden_states=seen).logits[0, -1].double().numpy()
            if step < least:
                logits[3] = -np.inf
            ids.append(choose(step, logits))
            if ids[-1] == 3:
                break
    return ids[1:]


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i - 5] for i in ids if i >= 5)


def test_captions_are_drawn_by_picture_and_seed(blip: Path, pool) -> None:
    folder, samples = pool
    settings = {"kind": "captions", "model": str(blip), "n": 3, "top_k": 9, "top_p": 0.8, "seed": 7}
    rows = measure_alone(folder, folder.parent / "a", {"drawn": {**settings, "min_tokens": 3, "max_tokens": 8}})
    for place in (0, 5, 11):
        jpg = list(samples.values())[place]["jpg"]
        for j in range(3):
            uniform = np.random.default_rng(hash64(7, hashlib.sha256(jpg).hexdigest(), j)).random(8)

            def choose(step: int, logits: np.ndarray, uniform: np.ndarray = uniform) -> int:
                order = np.argsort(-logits)[:9]
                p = np.exp(logits[order] - logits[order].max())
                p /= p.sum()
                nucleus = sorted(order[: int((np.cumsum(p) < 0.8).sum()) + 1])  # up to the word that crosses 0.8
                q = np.exp(logits[nucleus])
                return int(nucleus[int((np.cumsum(q / q.sum()) <= uniform[step]).sum())])

            assert rows[place]["drawn"][j] == words(by_hand(blip, jpg, choose, 3, 8))
    assert rows[-1]["drawn"] == rows[3]["drawn"], "the same picture elsewhere says the same"
    assert len({caption for row in rows for caption in row["drawn"]}) > 20
    other = measure_alone(folder, folder.parent / "a", {"drawn": {**settings, "seed": 8}})
    assert [row["drawn"] for row in other] != [row["drawn"] for row in rows]


def test_recaption_is_the_likeliest_and_scored_by_clip(blip: Path, pool, tiny_clip: tuple[Path, Path]) -> None:
    import open_clip

    folder, samples = pool
    clip = {"clip": str(tiny_clip[0]), "clip_pretrained": str(tiny_clip[1])}
    settings = {"kind": "recaption", "model": str(blip), "beams": 1, "min_tokens": 2, "max_tokens": 6, **clip}
    rows = measure_alone(folder, folder.parent / "b", {"recaption": settings})
    open_clip.add_model_config(tiny_clip[0])
    model, _, transform = open_clip.create_model_and_transforms(tiny_clip[0].stem, pretrained=str(tiny_clip[1]))
    model.eval()
    for row, members in zip(rows, samples.values(), strict=True):
        greedy = by_hand(blip, members["jpg"], lambda step, logits: int(logits.argmax()), 2, 6)
        assert row["recaption"] == words(greedy)
        with torch.no_grad():
            image = model.encode_image(transform(Image.open(io.BytesIO(members["jpg"])))[None], normalize=True)[0]
            text = model.encode_text(open_clip.get_tokenizer(tiny_clip[0].stem)([row["recaption"]]), normalize=True)[0]
        assert row["recaption_score"] == pytest.approx(float(image @ text), abs=1e-5)
    beams = measure_alone(folder, folder.parent / "b", {"recaption": {**settings, "beams": 3}})
    assert [row["recaption"] for row in beams] != [row["recaption"] for row in rows]


@pytest.mark.parametrize("strip", ["sieve", "word"])
def test_sieve_is_the_nearest_drawn_caption(blip: Path, encoder: Path, pool, strip: str) -> None:
    from transformers import BertModel, BertTokenizer

    folder, samples = pool
    settings = {"kind": "sieve", "model": str(blip), "encoder": str(encoder), "n": 4, "strip": strip}
    rows = measure_alone(folder, folder.parent / "c", {"sieve_score": {**settings, "min_tokens": 1, "max_tokens": 6}})
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizer.from_pretrained(encoder)

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():  # alone, without padding: the mean over all positions
            mean = model(**tokenizer(strip_phrases(text, strip), return_tensors="pt")).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).numpy()

    for row, members in zip(rows, samples.values(), strict=True):
        cosines = [float(embed(members["txt"].decode()) @ embed(drawn)) for drawn in row["sieve_captions"]]
        best = row["sieve_captions"][int(np.argmax(cosines))]
        expected = max(cosines) if strip_phrases(best, strip) else 0.0
        assert row["sieve_score"] == pytest.approx(expected, abs=1e-5)
    assert np.std([row["sieve_score"] for row in rows]) > 1e-3


def test_phrases_go_as_published_or_as_words() -> None:
    assert strip_phrases("A photo of a photographer, Stock Photo", "sieve") == " grapher, "
    assert strip_phrases("A photo of a photographer, Stock Photo", "word") == " a photographer, "
    assert strip_phrases("an image of imagery, an image", "sieve") == " ry, "
    assert strip_phrases("an image of imagery, an image", "word") == " imagery, "


def test_a_captioner_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from curation.captioner import huggingface\ndef load(model, device):\n    return huggingface(model, device)\n"
    )
    (tmp_path / "my_captioner.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_captioner", raising=False)
    content = captioner_content("my_captioner:load", "some/name")
    assert content["model"] == "some/name" and content["captioner"]["function"] == "my_captioner:load"
    (tmp_path / "my_captioner.py").write_text(f"{source}\n# changed")
    assert captioner_content("my_captioner:load", "some/name") != content
    for name in ("my_captioner", "my_captioner:lost", "nowhere_at_all:load"):
        with pytest.raises(UserError, match=f"captioner {name}: .*write package.module:function"):
            load_captioner(name, "x")
    with pytest.raises(UserError, match="captioner nowhere_at_all:load: no such module"):
        captioner_content("nowhere_at_all:load", "x")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_captioner(HUGGINGFACE, str(tmp_path))


def test_the_sieve_recipe() -> None:
    config = load_config(ROOT / "recipes/curate/sieve.yaml")
    weights = {"clip_l14_similarity_score": 0.5, "sieve_score": 0.5}
    assert config.selectors["fusion"] == ScoreFusion(weights=weights, fraction=0.2)
    again = parse_config(config.to_dict())
    assert again.signals == config.signals


def test_the_device_is_the_recipes_and_part_of_the_identity(
    blip: Path, encoder: Path, tiny_clip: tuple[Path, Path]
) -> None:
    clip = {"model": str(tiny_clip[0]), "pretrained": str(tiny_clip[1])}
    kinds: dict[str, dict[str, str]] = {
        "clip": clip,
        "captions": {"model": str(blip)},
        "recaption": {"model": str(blip), "clip": clip["model"], "clip_pretrained": clip["pretrained"]},
        "sieve": {"model": str(blip), "encoder": str(encoder)},
    }
    for kind, settings in kinds.items():
        plain, cpu, cuda = (
            parse_config({"signals": {"s": {"kind": kind, **settings, **device}}}).signals
            for device in ({}, {"device": "cpu"}, {"device": "cuda"})
        )
        assert identity("s", plain["s"]) == identity("s", cpu["s"]) != identity("s", cuda["s"])
        wanting = [
            Measuring(signals=signals, signal_set=store.open_set(Path("none"), signals, 10, None)).gpu
            for signals in (plain, cuda)
        ]
        assert wanting == [False, True]
        with pytest.raises(UserError, match="device cuda: PyTorch finds no GPU in this worker"):  # tests see none
            cuda["s"].load("s")
