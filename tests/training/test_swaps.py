"""Hard negative captions: the swaps against lists made by hand, and the loss with them pair by pair in float64."""

import dataclasses
from collections import Counter

import pytest
import torch

from curation.errors import UserError
from curation.hashing import hash64
from tests.training import coupled_oracle
from tests.training.conftest import clip_config, tiny_config, write_shards
from tests.training.coupled_oracle import candidates
from tests.training.plain import differences, patched_float
from training.config import ClipRecipe
from training.data import Drawn, Loader, Shards
from training.data.swaps import Swaps, builtin, swapped, tagger_of
from training.distributed import World
from training.families import build
from training.gradient_cache import Outputs, gradient_cached_step, rows_of
from training.objectives.infonce import InfoNCE
from training.objectives.siglip import SigLIP

BY_HAND = {
    "A black cat sits on a white chair.": {
        "A white cat sits on a black chair.",
        "A black chair sits on a white cat.",
        "A white chair sits on a black cat.",
    },
    "the horse is eating the grass": {"the grass is eating the horse"},
    "A man is quickly followed by a boy who walks slowly": {
        "A boy is quickly followed by a man who walks slowly",
        "A man is slowly followed by a boy who walks quickly",
        "A man walks by a boy who is quickly followed slowly",
    },
    "The car is red and the house is white": {
        "The house is red and the car is white",
        "The car is white and the house is red",
    },
    "two dogs watch three cats": {"three dogs watch two cats", "two cats watch three dogs"},
    # Another order of the same, or nothing to swap.
    "a cat and a dog": set(),
    "a dog in black, red and white": set(),
    "a dog sits": set(),
    "a dog chases a Dog": set(),
    "": set(),
}


@pytest.mark.parametrize("caption", BY_HAND)
def test_every_swap_of_a_caption(caption):
    for draw in range(3):
        found = swapped(caption, 100, draw)
        assert len(found) == len(set(found)) and set(found) == BY_HAND[caption]
        words = lambda text: Counter(text.lower().split())  # noqa: E731
        assert all(words(text.replace(".", " .")) == words(caption.replace(".", " .")) for text in found)


def test_a_draw_is_a_function_of_its_number_and_kinds_are_equally_likely():
    caption = "A black cat sits on a white chair."
    drawn = [swapped(caption, 1, hash64(0, 0, f"u{n}"))[0] for n in range(600)]
    assert drawn == [swapped(caption, 1, hash64(0, 0, f"u{n}"))[0] for n in range(600)]
    counts = Counter(drawn)
    assert set(counts) == BY_HAND[caption] and all(150 < n < 250 for n in counts.values()), counts
    long = "a red dog " * 150
    assert all(text[1000:] == long[1000:] and text != long for text in swapped(long, 3, 0))


NEGATIVES = ("--loader.batch", "12", "--clip.negatives", "2")


CAPTIONS = [
    *("a dog", "a cat and a dog", "a man watches a boy", "the horse is eating the grass", "a bird", "a red cup"),
    *(f"a {one} ball beside a blue {thing}" for one in ("red", "green") for thing in ("cup", "box", "car")),
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("pairs"), [12], members=lambda n: {"txt": CAPTIONS[n]})


def chunks_of(pairs, family, config, chunk, *, rank=0, ranks=1):
    settings = dataclasses.replace(config.loader, chunk=chunk, retain=0)
    place = {"seed": 0, "rank": rank, "world_size": ranks}
    loader = Loader(Shards(pairs), settings, family.image, family.encode_text, **place, extra=family.extra)
    return next(loader.batches(0, 1))


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_the_loss_is_the_pair_by_pair_one(pairs, tmp_path, loss, chunk):
    """Value and all gradients; the texts of the oracle are made here, from what was drawn for each row."""
    siglip = ("--objective.coupled", "siglip") if loss == "siglip" else ()
    config = clip_config(*NEGATIVES, *siglip)
    family = build(config, tmp_path / "tokenizer", list)
    model = family.model.double()
    chunks = chunks_of(pairs, family, config, chunk)
    chunks = [{k: v.double() if v.is_floating_point() else v for k, v in c.items()} for c in chunks]
    for c in chunks:  # a hole's negatives do not count either
        c["valid"] &= ~(c["input_ids"] == chunks[0]["input_ids"][0]).all(1)
    batch = {name: torch.cat([c[name] for c in chunks]) for name in chunks[0]}
    rows = rows_of([batch], 3)
    assert 0 < rows.right_valid[rows.valid][:, 1:].float().mean() < 1 and int(rows.valid.sum()) == 11

    with patched_float():
        model.zero_grad()
        image = model.towers.encode_image(batch["pixel_values"], normalize=True)
        texts = torch.cat([batch["input_ids"][:, None], batch["negative.input_ids"]], 1)
        text = torch.stack([model.towers.encode_text(row, normalize=True) for row in texts])
        scalars = {name: getattr(model, name) for name in model.scalars}
        s, groups = candidates(image, text, scalars, rows)
        value = getattr(coupled_oracle, loss)(s, groups, scalars)
        value.backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        metrics = gradient_cached_step(
            forward=lambda chunk, separable: Outputs(**model(chunk, separable=separable)),
            backward=lambda loss: loss.backward(),
            chunks=chunks,
            counts={},
            weights={},
            coupled=SigLIP() if loss == "siglip" else InfoNCE(reduction="mean"),
            world=World(),
        )
    found = {n: p.grad for n, p in model.named_parameters()}
    whole, worst = differences(found, expected)
    assert abs(float(metrics["loss"] - value.detach())) < 1e-11 and whole < 1e-12 and worst < 1e-11, (whole, worst)


def test_chunks_hold_the_swaps_of_their_rows_on_any_number_of_ranks(pairs, tmp_path):
    config = clip_config(*NEGATIVES)
    family = build(config, tmp_path / "tokenizer", list)
    (batch,) = chunks_of(pairs, family, config, 12)
    words = family.tokenizer
    seen = Counter()
    for row in range(12):
        caption = words.decode(batch["input_ids"][row, 1 : batch["input_ids"][row].argmax()].tolist()).strip()
        possible = {words([text])[0].tolist().__repr__() for text in swapped(caption, 100, 0)}
        negatives = batch["negative.input_ids"][row][batch["right_valid"][row, 1:]]
        assert len(negatives) == min(2, len(possible)) and {n.tolist().__repr__() for n in negatives} <= possible
        seen[len(negatives)] += 1
    assert set(seen) == {0, 1, 2}
    parts = [chunks_of(pairs, family, config, 3, rank=rank, ranks=2) for rank in (0, 1)]
    for name in batch:
        assert torch.equal(batch[name], torch.cat([c[name] for c in [*parts[0], *parts[1]]])), name


def test_mmgem_embeds_them_beside_its_captions(pairs, tmp_path):
    """Each as it embeds a text alone, in either pass; the captions' losses are those without negatives."""
    tiny = ("--mmgem.negatives", "1", "--loader.batch", "12")
    family = build(tiny_config(*tiny), tmp_path / "tokenizer", Shards(pairs).every_caption)
    model, texts = family.model.eval(), {}
    (chunk,) = chunks_of(pairs, family, tiny_config(*tiny), 12)
    for row, caption in enumerate(family.tokenizer.batch_decode(chunk["input_ids"], skip_special_tokens=True)):
        ids = chunk["negative.input_ids"][row, 0]
        for text in swapped(caption.strip(), 100, 0):
            alone = family.encode_text([text])["input_ids"][0]
            if torch.equal(alone, ids[: len(alone)]):
                texts[row] = model.get_text_features(alone[None]).pooler_output[0]
    there = chunk["right_valid"][:, 1].nonzero()[:, 0].tolist()
    assert sorted(texts) == there and 0 < len(there) < 12
    plain = model({n: x for n, x in chunk.items() if not n.startswith("negative.")}, separable=True)
    for out in (model(chunk), model(chunk, separable=True)):
        assert out["right"].shape == (12, 2, 24)
        assert (out["right"][there, 1] - torch.stack([texts[row] for row in there])).abs().max() < 1e-5
        assert (out["right"][:, 0] - plain["right"]).abs().max() < 1e-5
    assert abs(float((out["sums"]["generate"] - plain["sums"]["generate"]).detach())) < 1e-3


def test_what_the_model_cannot_tell_apart_is_no_negative():
    """A swap beyond the context's end leaves the same tokens; a hole has none at all."""

    def ids(texts):
        words = [[len(word) * 1000 + ord(word[0]) for word in f"{text} . . . .".split()[:4]] for text in texts]
        return {"input_ids": torch.tensor(words)}

    rows = [
        Drawn(1, {"text": "a dog bites a cat"}),
        Drawn(2, {"text": "here and there and a dog bites a cat"}),
        Drawn(3, {"text": "a dog bites a cat"}, "image_broken"),
    ]
    short = Swaps(1, builtin, ids)("pairs", rows)
    assert short["right_valid"].tolist() == [[True, True], [True, False], [False, False]]


def test_any_spacy_pipeline_tells_parts_of_speech(tmp_path):
    spacy = pytest.importorskip("spacy")
    tags = {"dog": "NN", "cats": "NNS", "birds": "NNS", "big": "JJ", "small": "JJ", "sees": "VBZ", "and": "CC"}
    kinds = {"NN": "NOUN", "NNS": "NOUN", "JJ": "ADJ", "VBZ": "VERB", "CC": "CCONJ"}

    @spacy.Language.component("listed")
    def listed(document):
        for word in document:
            word.tag_ = tags.get(word.text, "DT")
            word.pos_ = kinds.get(word.tag_, "DET")
        return document

    pipeline = spacy.blank("en")
    pipeline.add_pipe("listed")
    pipeline.to_disk(tmp_path / "pipeline")
    tagger = tagger_of(str(tmp_path / "pipeline"))
    found = swapped("The big cats and a dog see small birds", 10, 0, tagger)
    assert set(found) == {
        "The small cats and a dog see big birds",
        "The big birds and a dog see small cats",
    }


def test_bad_settings_are_one_line():
    with pytest.raises(UserError, match=r"clip\.negatives: -1 is below 0"):
        ClipRecipe(model_cfg={}, negatives=-1)
    with pytest.raises(UserError, match="spaCy"):
        tagger_of("no_such_pipeline")
