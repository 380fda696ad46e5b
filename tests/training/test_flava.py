"""FLAVA against transformers' FlavaForPreTraining on the same masks, and its cached step against plain autograd."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from curation.errors import UserError
from curation.hashing import hash64
from curation.manifest import write_manifest
from tests.training.conftest import flava_config
from tests.training.plain import differences, doubled, gradients_of, patched_float, plain_gradients, whole_batch
from tests.training.step import cached_gradients, chunks_of
from training.config import ObjectiveConfig, as_dict
from training.data import Drawn
from training.distributed import World
from training.families import build
from training.inference import load
from training.models.codebook import train_codebook
from training.models.flava import Flava
from training.objectives.coupled import Rows
from training.objectives.infonce import InfoNCE

CAPTIONS = [
    f"a {c} {s} beside {n} balloons" + " in the wide park" * (n % 3)
    for n in range(8)
    for c, s in [("red", "dog"), ("blue", "cat")]
]


def pictures(n):
    rng = np.random.default_rng(0)
    return [np.kron(rng.integers(0, 256, (8, 8, 3), np.uint8), np.ones((4, 4, 1), np.uint8)) for _ in range(n)]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    family = build(flava_config(), tmp_path_factory.mktemp("run") / "tokenizer", lambda: CAPTIONS)
    with torch.no_grad():  # zeros at the start would hide a position or a mask token that is left out
        for name, p in family.model.named_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    return family


@pytest.fixture(scope="module")
def collate(family):
    return collated(family)


def collated(family):
    """(rows, kind) -> a chunk, as the loader puts it together."""
    family.extra.codebook = train_codebook(pictures(30), 16)
    mean, std = (torch.tensor(x)[:, None, None] for x in (family.image.mean, family.image.std))

    def chunk(rows, kind):
        blank = np.zeros((32, 32, 3), np.uint8)
        pixels = torch.from_numpy(np.stack([row.fields.get("pixels", blank) for row in rows])).permute(0, 3, 1, 2)
        own = {} if kind == "texts" else {"pixel_values": (pixels / 255 - mean) / std}
        return {**own, **family.extra(kind, rows), "valid": torch.tensor([not row.reason for row in rows])}

    return chunk


def drawn(n, others):
    return [
        Drawn(hash64(0, 0, f"u{i}"), {"pixels": p, "text": CAPTIONS[i], "other": CAPTIONS[i + others]})
        for i, p in enumerate(pictures(n))
    ]


@pytest.fixture(scope="module")
def batch():
    """11 pairs, of which some are mismatched and one is a hole."""
    rows = drawn(11, 1)
    rows[4] = Drawn(0, {}, "image_broken")
    return rows


def published(family):
    """transformers' own model with the weights of ours."""
    from transformers import FlavaConfig, FlavaForPreTraining

    config = family.model.config
    theirs = FlavaForPreTraining(
        FlavaConfig(
            image_config=config.image_config,
            text_config=config.text_config,
            multimodal_config=config.multimodal_config,
            projection_dim=config.embed_dim,
            hidden_size=config.multimodal_config["hidden_size"],
            init_codebook=False,
        )
    ).eval()
    state = theirs.state_dict()
    for name, tensor in family.model.state_dict().items():
        name = "flava.logit_scale" if name == "log_scale" else name if "head" in name else f"flava.{name}"
        state[name] = tensor.reshape(state[name].shape)
        if name.endswith("head.decoder.bias"):
            state[name.replace("decoder.", "")] = tensor
    theirs.load_state_dict(state)
    return theirs


def their_losses(theirs, chunk, rows, **more):
    """Its means over these rows; every tensor is a copy, since it writes over labels."""
    given = {
        "input_ids": "input_ids",
        "masked_ids": "input_ids_masked",
        "attention_mask": "attention_mask",
        "text_labels": "mlm_labels",
        "pixel_values": "pixel_values",
        "image_mask": "bool_masked_pos",
        "image_labels": "mim_labels",
        "itm_labels": "itm_labels",
    }
    inputs = {theirs_name: chunk[name][rows].clone() for name, theirs_name in given.items() if name in chunk}
    with torch.no_grad():
        return theirs(**inputs, **more, return_loss=True).loss_info


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
def test_sums_are_transformers_means_times_counts(family, collate, batch, kind):
    chunk, theirs, model = collate(batch, kind), published(family), family.model.eval()
    theirs.global_contrastive_weight = 0.0
    rows = torch.tensor([not row.reason for row in batch])  # its losses know no holes
    with torch.no_grad():
        sums = model(chunk, separable=True)["sums"]
    counts = model.counts(chunk)
    assert (
        set(sums)
        == set(counts)
        == {"pairs": {"itm", "mmm_image", "mmm_text"}, "images": {"mim"}, "texts": {"mlm"}}[kind]
    )
    expected = their_losses(theirs, chunk, rows)
    for name, total in sums.items():
        assert counts[name] > 0
        torch.testing.assert_close(total / counts[name], expected[name], rtol=1e-5, atol=1e-6)
    if kind == "pairs":
        assert counts["itm"] == 10 and (chunk["itm_labels"] == 0).any()


def test_the_contrastive_part_is_infonce_of_the_projections(family, collate, batch):
    """Where every pair matches, transformers' own head says the same (a mismatched pair stays a column in it)."""
    chunk, model = collate(batch, "pairs"), family.model.eval()
    rows = chunk["coupled"]
    with torch.no_grad():
        out = model(chunk, separable=True)
        clean = model(chunk, separable=False)
    for side in ("left", "right"):  # stacked with the masked inputs or alone
        torch.testing.assert_close(out[side], clean[side], rtol=1e-5, atol=1e-6)
    given = Rows(rows, rows[:, None])
    found = InfoNCE(reduction="mean")(out["left"], out["right"][:, None], out["scalars"], given, World()).value
    s = out["scalars"]["log_scale"].exp() * out["left"][rows] @ out["right"][rows].T
    target = torch.arange(len(s))
    torch.testing.assert_close(found, (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2)
    matches = {k: v for k, v in chunk.items() if k != "itm_labels"}
    expected = their_losses(published(family), matches, rows).global_contrastive
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_features_are_transformers_features(family, collate, batch):
    chunk, theirs, model = collate(batch, "pairs"), published(family).flava, family.model.eval()
    given = {name: chunk[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        expected = theirs(**given)
        image, text = (theirs.image_projection, theirs.text_projection)
        image, text = image(expected.image_embeddings[:, 0]), text(expected.text_embeddings[:, 0])
    found = model.get_image_features(chunk["pixel_values"]), model.get_text_features(chunk["input_ids"])
    for ours, other in zip(found, (image, text)):
        torch.testing.assert_close(ours.pooler_output, F.normalize(other, dim=-1), rtol=1e-5, atol=1e-5)
    joint = model.get_multimodal_features(chunk["pixel_values"], chunk["input_ids"])
    torch.testing.assert_close(joint.last_hidden_state, expected.multimodal_embeddings, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(joint.pooler_output, expected.multimodal_embeddings[:, 0], rtol=1e-4, atol=1e-5)


OBJECTIVE = ObjectiveConfig(reduction="mean", weights={"itm": 1.0, "mmm_image": 0.5, "mmm_text": 2.0})


@pytest.mark.parametrize("chunk", [1, 3, 8, 11])
@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("case", ["mixed", "nothing masked", "all mismatched", "patches dropped"])
def test_float64_equals_the_full_batch(family, collate, batch, chunk, retain, case):
    """`nothing masked` and `all mismatched` are about the first rows, which are whole chunks of 1 and 3."""
    model = family.model.double().eval()

    def changed(part):
        if case == "nothing masked":
            part["text_labels"], part["image_labels"] = (
                torch.full_like(part[n], -100) for n in ("text_labels", "image_labels")
            )
            part["masked_ids"], part["image_mask"] = part["input_ids"], torch.zeros_like(part["image_mask"])
        if case == "all mismatched":
            part["itm_labels"] = torch.zeros_like(part["itm_labels"])
            part["coupled"] = torch.zeros_like(part["coupled"])
            part["text_labels"], part["image_labels"] = (
                torch.full_like(part[n], -100) for n in ("text_labels", "image_labels")
            )
        return part

    first, rest = changed(doubled(collate(batch[:3], "pairs"))), doubled(collate(batch[3:], "pairs"))
    whole = whole_batch([first, rest])
    if case == "patches dropped":
        whole["patches"] = kept_patches(11)
    chunks = [{n: x[i : i + chunk] for n, x in whole.items()} for i in range(0, 11, chunk)]
    for part in chunks:  # as the loader pads it
        longest = int(part["attention_mask"].sum(1).max())
        for name in ("input_ids", "attention_mask", "masked_ids", "text_labels"):
            part[name] = part[name][:, :longest]
    with patched_float():
        loss, expected = plain_gradients(model, [whole], OBJECTIVE)
        metrics, found = cached_gradients(model, chunks, OBJECTIVE, retain)
    model.float()
    error, worst = differences(found, expected)
    assert error < 1e-13 and worst < 1e-12, (error, worst)
    assert abs(float(metrics["loss"] - loss)) < 1e-12
    assert all(torch.isfinite(g).all() for g in found.values())
    unused = {n for n, g in expected.items() if not g.any()}
    assert {n for n in unused if n.startswith(("mim_head", "mlm_head"))} and "log_scale" not in unused


def kept_patches(b, keep=9, patches=16):
    rng = np.random.default_rng(4)
    return torch.from_numpy(np.stack([np.sort(rng.choice(patches, keep, replace=False)) for _ in range(b)]))


@pytest.mark.parametrize("kind", ["pairs", "images"])
def test_patches_left_out_are_as_if_nobody_attended_to_them(family, collate, batch, kind, monkeypatch):
    """The oracle runs every patch through an encoder whose attention to the others is cut off."""
    model, kept = family.model.eval(), kept_patches(11)
    chunk = collate(batch, kind)
    out = model({**chunk, "patches": kept}, separable=True)
    counts = model.counts({**chunk, "patches": kept})
    seen = torch.zeros(11, 16, dtype=torch.bool).scatter_(1, kept, True)
    labels = chunk["image_labels"].masked_fill(~seen, -100)
    name = {"pairs": "mmm_image", "images": "mim"}[kind]
    assert 0 < counts[name] == int((labels >= 0).sum()) < model.counts(chunk)[name]
    image_model, encode, read = model.image_model, model.image_model.encoder.forward, model.multimodal_model.forward
    cut = torch.cat([torch.zeros(11, 1), torch.zeros(11, 16).masked_fill(~seen, -torch.inf)], 1)

    def encoded(hidden, attention_mask=None, **more):
        twice = len(hidden) // 11  # clean and masked
        return encode(hidden, attention_mask=cut.repeat(twice, 1)[:, None, None], **more)

    def joined(states, attention_mask=None, **more):
        """[CLS_M], then [CLS_I] and the patches, then tokens."""
        mask = torch.cat([attention_mask[:, :1], (cut == 0).long(), attention_mask[:, 18:]], 1)
        return read(states, attention_mask=mask, **more)

    monkeypatch.setattr(image_model.encoder, "forward", encoded)
    monkeypatch.setattr(model.multimodal_model, "forward", joined)
    expected = model({**chunk, "image_labels": labels}, separable=True)
    assert out.keys() == expected.keys() and out["sums"].keys() == expected["sums"].keys()
    for side in out.keys() & {"left", "right"}:
        torch.testing.assert_close(out[side], expected[side], atol=1e-5, rtol=1e-4)
    for name, total in out["sums"].items():
        torch.testing.assert_close(total, expected["sums"][name], atol=1e-4, rtol=1e-5)
    monkeypatch.undo()
    assert not torch.allclose(model(chunk, separable=True)["sums"][name], out["sums"][name])


def test_the_loader_drops_them_in_training_alone(tmp_path, shards):
    config = flava_config("--flava.patch_dropout", "0.5", "--loader.batch", "8", "--loader.chunk", "3")
    family = build(config, tmp_path / "tokenizer", lambda: CAPTIONS)
    chunks = chunks_of(shards, family, config)
    assert all(c["patches"].shape == (len(c["valid"]), 8) for c in chunks)
    for name in ("mmm_image", "mmm_text", "itm"):
        assert sum(family.model.counts(c)[name] for c in chunks) > 0
    assert family.model.get_image_features(chunks[0]["pixel_values"]).last_hidden_state.shape[1] == 17


def test_a_batch_of_mismatched_pairs_alone_still_learns_to_match(family, collate, batch):
    model = family.model.double().eval()
    whole = doubled(collate(batch[:3], "pairs"))
    whole["coupled"], whole["itm_labels"] = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    whole["text_labels"], whole["image_labels"] = (
        torch.full_like(whole[n], -100) for n in ("text_labels", "image_labels")
    )
    with patched_float():
        loss, expected = plain_gradients(model, [whole], OBJECTIVE)
        metrics, found = cached_gradients(model, [whole], OBJECTIVE)
    model.float()
    assert differences(found, expected)[0] < 1e-13 and float(metrics["loss"]) == pytest.approx(float(loss))
    assert expected["itm_head.seq_relationship.weight"].any() and not found["image_projection.weight"].any()


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_unimodal_chunks_add_up_and_touch_their_own_parameters(family, collate, batch, kind):
    model = family.model.double().eval()
    name = {"images": "mim", "texts": "mlm"}[kind]
    with patched_float():
        parts = [doubled(collate(batch[i : i + 4], kind)) for i in range(0, 11, 4)]
        whole = doubled(collate(batch, kind))
        assert model(whole, separable=False) == {}
        model.zero_grad()
        model(whole, separable=True)["sums"][name].backward()
        expected = gradients_of(model)
        without = {n for n, p in model.named_parameters() if p.grad is None}
        model.zero_grad()
        for part in parts:
            model(part, separable=True)["sums"][name].backward()
        found = gradients_of(model)
    model.float()
    assert sum(model.counts(p)[name] for p in parts) == model.counts(whole)[name] > 0
    assert differences(found, expected)[0] < 1e-13
    own = {"images": ("image_model.", "mim_head."), "texts": ("text_model.", "mlm_head.")}[kind]
    assert without == {n for n, _ in model.named_parameters() if not n.startswith(own)}


def test_every_loss_falls_when_the_streams_take_turns(tmp_path):
    """One masked batch of 16 samples by heart, mismatched pairs among them."""
    family = build(flava_config(), tmp_path / "tokenizer", lambda: CAPTIONS)
    model, collate = family.model.train(), collated(family)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=3e-3), {}
    rows = drawn(16, -1)
    chunks = {kind: collate(rows, kind) for kind in ("pairs", "images", "texts")}
    for _ in range(60):
        for kind, chunk in chunks.items():
            optimizer.zero_grad()
            out, counts = model(chunk, separable=True), model.counts(chunk)
            losses = {name: total / max(counts[name], 1) for name, total in out["sums"].items()}
            if kind == "pairs":
                s = out["scalars"]["log_scale"].exp() * out["left"][chunk["coupled"]] @ out["right"][chunk["coupled"]].T
                losses["contrastive"] = F.cross_entropy(s, torch.arange(len(s)))
            sum(losses.values()).backward()
            optimizer.step()
            for name, loss in losses.items():
                seen.setdefault(name, []).append(float(loss.detach()))
    fallen = {name: x[-1] / x[0] for name, x in seen.items()}
    assert set(fallen) == {"contrastive", *model.separable}
    assert all(share < 0.8 for share in fallen.values()), sorted(fallen.items())


def test_an_export_opens_again_and_embeds_the_same(family, tmp_path):
    from PIL import Image

    config = flava_config()
    folder = tmp_path / "run" / "export"
    family.export(family.model.state_dict(), folder)
    write_manifest(folder / "gemsmith.json", {"steps": 1, "samples": 256, "config": as_dict(config)})
    opened = load(folder)
    pixels = opened.images([Image.fromarray(p) for p in pictures(3)])
    texts = ["a red dog", "a blue cat in the wide park"]
    image, text = opened.embed_images(pixels), opened.embed_texts(texts)
    assert image.shape == (3, 24) and text.shape == (2, 24) and not opened.can_caption
    torch.testing.assert_close(image, family.model.eval().get_image_features(pixels).pooler_output)
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(opened.embed_texts(texts[:1])[0], text[0], atol=1e-5, rtol=0)  # padding is masked
    again = Flava.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in family.model.state_dict().items())


def test_published_weights_load(family, tmp_path):
    published(family).save_pretrained(tmp_path / "published")
    path = str(tmp_path / "published")
    for temperature in ("null", "0.02"):  # the checkpoint's, or what the recipe says
        words = ("--flava.name_or_path", path, "--objective.temperature", temperature)
        found = build(flava_config(*words), tmp_path / "tokenizer", lambda: CAPTIONS).model.state_dict()
        scale = found.pop("log_scale")
        expected = family.model.log_scale if temperature == "null" else torch.tensor([50.0]).log()
        torch.testing.assert_close(scale, expected.detach(), rtol=0, atol=1e-6)
        assert all(torch.equal(tensor, family.model.state_dict()[name]) for name, tensor in found.items())
    for section, value, named in [
        ("embed_dim", 16, r"image_projection.bias is \[24\] there and \[16\] in the recipe"),
        ("image_layers", 3, r"layer\.2\.\S+ is missing there and \[\d+\] in the recipe"),
        ("text_layers", 1, r"text_model\.\S+layer\.1\.\S+ is \[\d+\] there and missing in the recipe"),
    ]:
        other = flava_config("--flava.name_or_path", path, f"--flava.{section}", str(value))
        with pytest.raises(UserError, match=f"flava.name_or_path.*{named}; give the checkpoint's sizes") as error:
            build(other, tmp_path / "tokenizer", lambda: CAPTIONS)
        assert "\n" not in str(error.value)


def test_other_families_are_named(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mmgem"}))
    for opening in (
        lambda: Flava.from_pretrained(tmp_path),
        lambda: build(flava_config("--flava.name_or_path", str(tmp_path)), tmp_path / "tokenizer", lambda: CAPTIONS),
    ):
        with pytest.raises(UserError, match="holds a 'mmgem'") as error:
            opening()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (("--flava.masks.tokens", "0"), "flava.masks.tokens: 0.0 masks next to nothing"),
        (("--flava.masks.patches", "16"), "flava.masks.patches: 16 masks all of 16"),
        (("--flava.patch_size", "5"), "flava.patch_size: 5 does not divide"),
        (("--flava.num_attention_heads", "3"), "flava.num_attention_heads: 3 does not divide"),
        (("--loader.max_tokens", "65"), "loader.max_tokens: 65 .*max_position_embeddings 64"),
        (("--objective.weights", "{generate: 1.0}"), "has no loss 'generate'"),
    ],
)
def test_recipes_that_cannot_work_are_named_before_anything_is_built(override, named):
    with pytest.raises(UserError, match=named) as error:
        flava_config(*override)
    assert "\n" not in str(error.value)
