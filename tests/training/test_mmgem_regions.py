"""MM-GEM stage 2 against its formulas written plainly, and what it begins from, pools, writes and refuses."""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from curation.errors import UserError
from curation.manifest import read_manifest
from tests.training.plain import differences, patched_float
from tests.training.stage2 import region_shards, stage1, stage2_config
from training import begin
from training.data import Loader, Shards, Source
from training.distributed import World
from training.families import build
from training.family_config import TokenizerConfig
from training.gradient_cache import Outputs, gradient_cached_step
from training.inference import config_from, load
from training.models.mmgem_regions import TRAINED, begin_from
from training.objectives.infonce import InfoNCE
from training.train import parse, save_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return region_shards(tmp_path_factory.mktemp("regions"))


@pytest.fixture(scope="module")
def first(shards, tmp_path_factory):
    return stage1(tmp_path_factory.mktemp("stage1"), shards, "--objective.temperature", "0.1")


def family_of(stage, first, folder):
    family = build(stage2_config(stage, first), folder / "tokenizer", lambda: [])
    family.prepare([])
    return family


def chunks_of(family, config, shards, chunk):
    settings = dataclasses.replace(config.loader, chunk=chunk, retain=0)
    source = Source(name="regions", samples=Shards(shards), kind="regions")
    loader = Loader([source], settings, family.image, family.encode_text, seed=0, rank=0, world_size=1)
    (chunks,) = list(loader.batches(0, 1))
    return chunks


def doubled(chunks):
    return [{k: v.double() if v.is_floating_point() else v for k, v in c.items()} for c in chunks]


def plain_loss(model, chunk, stage):
    """The loss of a batch in one piece, row by row, by the formulas at the top of mmgem_regions.py."""
    _, patches = model.vision(chunk["pixel_values"])
    rows = torch.nonzero(chunk["valid"]).flatten().tolist()
    h1 = [model.h1((chunk["regions"][i][:, None] * patches[i]).sum(0)) for i in rows]
    words = model.llm.get_input_embeddings().weight
    if stage == "captioning":
        total, tokens = 0.0, 0
        for pooled, i in zip(h1, rows):
            labels = chunk["labels"][i]
            labels = labels[labels >= 0]
            told = [model.h3(pooled)[None], model.prompts, words[labels[:-1]]]
            logits = model.llm(inputs_embeds=torch.cat(told)[None]).logits[0, -len(labels) :]
            total = total + F.cross_entropy(logits, labels, reduction="sum")
            tokens += len(labels)
        return total / tokens
    left = F.normalize(torch.stack([model.h4(pooled) for pooled in h1]), dim=-1)
    right = []
    for i in rows:
        ids = chunk["input_ids"][i][: int(chunk["length"][i]) + 1]
        right.append(model.h2(model.llm.model(input_ids=ids[None]).last_hidden_state[0, -1]))
    s = model.log_scale.exp() * left @ F.normalize(torch.stack(right), dim=-1).T
    groups = chunk["groups"][rows]
    same = (groups[:, None] == groups[None]) & ~torch.eye(len(rows), dtype=torch.bool)
    s = s.masked_fill(same, -torch.inf)  # another row of the same phrase is no negative
    target = torch.arange(len(rows))
    return F.cross_entropy(s, target) + F.cross_entropy(s.T, target)


@pytest.mark.parametrize("stage", ["captioning", "retrieval"])
@pytest.mark.parametrize(("chunk", "retain"), [(5, False), (8, True)])
def test_gradients_are_those_of_the_formulas(stage, chunk, retain, shards, first, tmp_path):
    config = stage2_config(stage, first)
    family = family_of(stage, first, tmp_path)
    model = family.model.double()
    chunks = doubled(chunks_of(family, config, shards, chunk))
    chunks[0]["valid"][1] = False
    (whole,) = doubled(chunks_of(family, config, shards, 32))
    whole["valid"][1] = False
    with patched_float():
        plain_loss(model, whole, stage).backward()
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert expected.keys() == set(TRAINED[stage])
        model.zero_grad()
        metrics = gradient_cached_step(
            forward=lambda c, separable: Outputs(**model(c, separable=separable)),
            backward=lambda loss: loss.backward(),
            chunks=chunks,
            counts={n: sum(model.counts(c)[n] for c in chunks) for n in model.separable},
            weights={},
            coupled=InfoNCE(reduction="sum", duplicates="masked"),
            world=World(),
            retain=retain,
        )
        assert abs(float(metrics["loss"]) - float(plain_loss(model, whole, stage).detach())) < 1e-10
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert max(differences(found, expected)) < 1e-10


def test_stage_2_begins_where_stage_1_ended(shards, first, tmp_path):
    before = build(begin_config(first), tmp_path / "one", lambda: [])
    before.model.load_state_dict(before.read_export(first))
    assert float(before.model.log_scale.detach()) == pytest.approx(math.log(10)), "not where one from scratch begins"
    for stage in ("captioning", "retrieval"):
        model = family_of(stage, first, tmp_path / stage).model
        for name, value in before.model.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        if stage == "captioning":
            cap = model.llm.get_input_embeddings().weight[model.config.cap_token_id]
            assert model.prompts.shape == (5, 32) and all(torch.equal(p, cap) for p in model.prompts)
        else:
            pooled = torch.randn(7, 24)
            assert torch.equal(model.region_embedding(pooled), before.model.region_embedding(pooled)), "the identity"


def test_a_temperature_that_the_recipe_names_is_begun_with(shards, first, tmp_path):
    """null takes stage 1's, above."""
    family = build(stage2_config("retrieval", first, "--objective.temperature", "0.02"), tmp_path / "t", lambda: [])
    family.prepare([])
    assert float(family.model.log_scale.detach()) == pytest.approx(math.log(50))


def begin_config(first):
    """Stage 1's own recipe, with the tokenizer of its export."""
    config = config_from(read_manifest(first / "gemsmith.json")["config"])
    words = TokenizerConfig(name_or_path=str(first))
    return dataclasses.replace(config, mmgem=dataclasses.replace(config.mmgem, tokenizer=words))


def test_the_whole_picture_as_a_region_is_the_picture(shards, first, tmp_path):
    model = family_of("retrieval", first, tmp_path).model
    pixels, whole = torch.randn(4, 3, 32, 32), torch.full((4, 16), 1 / 16)
    maps = model.feature_map(pixels)
    image, region = model.get_image_features(pixels), model.get_region_features(maps, whole)
    torch.testing.assert_close(region.pooler_output, image.pooler_output, rtol=0, atol=1e-6)
    captioner = family_of("captioning", first, tmp_path / "c").model
    written = captioner.generate_region(captioner.feature_map(pixels), whole, max_new_tokens=6)
    assert torch.equal(written, captioner.generate(pixels, max_new_tokens=6))
    told = torch.cat([captioner.h3(captioner._pooled(pixels))[:, None], captioner.prompts.expand(4, -1, -1)], 1)
    assert torch.equal(written[:, 0], captioner.llm(inputs_embeds=told).logits[:, -1].argmax(-1))


def test_a_heat_map_is_every_patch_beside_the_text(shards, first, tmp_path):
    family = family_of("retrieval", first, tmp_path)
    model = family.model
    torch.nn.init.normal_(model.h4.weight)
    pixels = torch.randn(1, 3, 32, 32)
    ids = family.encode_query(["a red thing"])["input_ids"]
    found = model.heat_map(pixels, ids)[0]
    assert found.shape == (4, 4)
    maps, text = model.feature_map(pixels), model.get_text_features(ids).pooler_output
    for row in range(4):
        for column in range(4):
            one = torch.zeros(1, 4, 4)
            one[0, row, column] = 1
            patch = model.get_region_features(maps, one.flatten(1)).pooler_output
            assert abs(float(found[row, column]) - float(F.cosine_similarity(patch, text))) < 1e-6


def test_long_texts_are_embedded_whole_where_the_recipe_says_so(shards, first, tmp_path):
    words = " ".join(["thing"] * 40)
    one, other = f"{words} of colour 1", f"{words} of colour 2"
    found = {}
    for name, more in {"cut": [], "whole": ["--mmgem.embed_tokens", "100"]}.items():
        config = stage2_config("captioning", first, *more)
        family = build(config, tmp_path / "tokenizer", lambda: [])
        family.prepare([])
        assert family.encode_text([one])["input_ids"].shape[1] == config.loader.max_tokens == 32, "in training"
        inputs = family.encode_query([one, other, "a thing"])
        found[name] = family.model.get_text_features(inputs["input_ids"]).pooler_output
    assert float((found["cut"][0] - found["cut"][1]).norm()) < 1e-6, "what differs is cut off"
    assert float((found["whole"][0] - found["whole"][1]).norm()) > 1e-4
    torch.testing.assert_close(found["cut"][2], found["whole"][2], rtol=0, atol=1e-6)
    opened = {tokens: load(first, tokens).embed_texts([one, other]) for tokens in (None, 100)}
    assert float((opened[None][0] - opened[None][1]).norm()) < 1e-6
    torch.testing.assert_close(opened[100], found["whole"][:2], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"mmgem\.embed_tokens: 500 is more than the 128 positions"):
        build(stage2_config("captioning", first, "--mmgem.embed_tokens", "500"), tmp_path / "tokenizer", lambda: [])


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--mmgem.embed_dim", "32"], r"mmgem\.embed_dim: is that of"),
        (["--mmgem.vision.width", "64"], r"mmgem\.vision: is that of"),
        (["--loader.resize_mode", "shortest"], r"loader\.resize_mode"),
        (["--loader.crop_scale", "[0.5, 1.0]"], r"loader\.crop_scale"),
        (["--loader.sources", "{regions: {kind: pairs}}"], r"stage2: captioning trains on regions, not pairs"),
        (["--mmgem.stage2", "null"], r"stage 1 trains on pairs, not regions"),
        (["--adapter", "{module: llm}"], r"adapter: a run from mmgem\.init"),
        (["--mmgem.init", "/nothing/here"], r"mmgem\.init: /nothing/here: no such folder"),
        (["--objective.coupled", "siglip"], r"objective\.coupled"),
        (["--mmgem.prompts", "-1"], r"mmgem\.prompts"),
    ],
)
def test_recipes_that_contradict_the_checkpoint_are_refused(more, named, first):
    with pytest.raises(UserError, match=named) as error:
        stage2_config("captioning", first, *more)
    assert "\n" not in str(error.value)


def test_a_completed_recipe_is_a_recipe(first, tmp_path):
    config = stage2_config("captioning", first)
    save_config(config, tmp_path)
    assert parse(["--config", str(tmp_path / "config.yaml"), "--data", "d", "--out", "o"])[0] == config


def test_a_checkpoint_of_another_model_is_refused(shards, first, tmp_path):
    wide = stage1(tmp_path / "wide", shards, "--mmgem.embed_dim", "40")
    family = build(stage2_config("captioning", first), tmp_path / "tokenizer", lambda: [])
    with pytest.raises(UserError, match=r"mmgem\.init: there is of another model: h1\.bias is \(40,\) there, \(24,\)"):
        begin_from(family.model, begin.weights(str(wide)), "there")
    lone = dataclasses.replace(stage2_config("captioning", first).mmgem, init=None)
    with pytest.raises(UserError, match=r"mmgem\.init: stage 2 begins from"):
        begin.check(dataclasses.replace(stage2_config("captioning", first), mmgem=lone))


@pytest.mark.parametrize(
    ("stage", "batch", "steps", "prompts"), [("captioning", 2048, 60_000, 64), ("retrieval", 49_152, 15_000, 0)]
)
def test_the_papers_numbers_are_in_the_recipes(stage, batch, steps, prompts):
    recipe = ["--config", f"recipes/train/mmgem_stage2_{stage}.yaml", "--data", "d", "--out", "o"]
    config = parse(recipe)[0]
    assert (config.loader.batch, config.steps, config.mmgem.prompts) == (batch, steps, prompts)
    assert config.objective.temperature is None, "stage 1's, which stays as it is"
    with pytest.raises(UserError, match=r"mmgem\.init: stage 2 begins from"):
        begin.check(config)
