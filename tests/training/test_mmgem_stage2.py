"""Stage 2 through the launcher: only its own parts move, and whole pictures and texts keep their embeddings' bits."""

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import gemsmith
from tests.training.stage2 import arguments, region_shards, stage1
from tests.training.test_train import cut_short
from training import checkpoint
from training.inference import load


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(stage 1's export, the captioning run, the retrieval run from its checkpoint, its words), trained in bf16."""
    folder = tmp_path_factory.mktemp("stage2")
    shards = region_shards(folder / "shards")
    first = stage1(folder / "stage1", shards)
    more = ["--data", shards, "--samples", "96", "--checkpoint_every", "2"]
    captions, retrieval = folder / "captions", folder / "retrieval"
    gemsmith("train", *arguments("captioning", first, *more), "--out", captions, "--ranks", 2)
    second = [*arguments("retrieval", checkpoint.latest(captions), *more), "--deepspeed", "ds_configs/zero1.json"]
    gemsmith("train", *second, "--out", retrieval, "--ranks", 1)
    return first, captions, retrieval, second


def changed(before, after):
    one, two = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name in one.keys() | two.keys() if name not in one or not torch.equal(one[name], two[name])}


def test_each_part_trains_alone_and_embeddings_keep_their_bits(runs):
    first, captions, retrieval, _ = runs
    assert changed(first, captions / "export") == {"h3.weight", "h3.bias", "prompts"}
    assert changed(captions / "export", retrieval / "export") == {"h4.weight", "h4.bias"}
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = ["a red thing", "thing 7 of colour 3", "a large spot"]
    models = [
        load(folder) for folder in (first, captions / "export", retrieval / "export", checkpoint.latest(captions))
    ]
    for model in models[1:]:
        assert model.embed_images(pixels).numpy().tobytes() == models[0].embed_images(pixels).numpy().tobytes()
        assert model.embed_texts(texts).numpy().tobytes() == models[0].embed_texts(texts).numpy().tobytes()
    maps, weights = models[0].feature_maps(pixels), torch.eye(16)[:3]
    assert torch.equal(models[0].embed_regions(maps, weights), models[1].embed_regions(maps, weights))
    assert not torch.equal(models[1].embed_regions(maps, weights), models[2].embed_regions(maps, weights))
    assert models[1].caption(pixels, 5) == models[2].caption(pixels, 5), "h4 is not on the way to the captions"


@pytest.mark.long  # a third launch
def test_a_run_cut_short_resumes_to_the_same_bits(runs, tmp_path):
    *_, retrieval, words = runs
    wanted = load_file(retrieval / "export/model.safetensors")
    again = cut_short(retrieval, tmp_path / "again")
    assert "resuming after step 2" in gemsmith("train", *words, "--out", again, "--ranks", 1).stdout
    found = load_file(again / "export/model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
