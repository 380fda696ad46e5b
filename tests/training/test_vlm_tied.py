"""A backbone whose head is its input embeddings, as Qwen2-VL-2B's: one matrix, saved once, tied again when opened."""

import pytest
import torch
from safetensors.torch import load_file

from curation.manifest import write_manifest
from tests.conftest import gemsmith
from tests.training.conftest import vlm2vec_config, write_shards
from tests.training.vlm import CAPTIONS, QWEN, RECIPE, picture
from training import checkpoint
from training.auto import AutoModel
from training.config import as_dict
from training.export import save
from training.families import build
from training.inference import load
from training.models.vlm2vec import Vlm2Vec
from training.partitioned import Deferred

TIED = ["--vlm2vec.backbone", str({**QWEN, "tie_word_embeddings": True})]
WORDS = "backbone.model.language_model.embed_tokens.weight"


def assert_tied(model):
    words = model.backbone.get_input_embeddings().weight
    assert model.backbone.get_output_embeddings().weight is words, "one matrix"
    return words


def test_a_tied_head_is_one_matrix_through_export_and_back(tmp_path):
    config, export = vlm2vec_config(*TIED), tmp_path / "RUN" / "export"
    family = build(config, tmp_path / "RUN" / "tokenizer", lambda: CAPTIONS)
    assert assert_tied(family.model).requires_grad, "it embeds the words"
    with (deferred := Deferred()):  # as ZeRO-3 builds it: every parameter made again alone
        parts = build(config, tmp_path / "RUN" / "tokenizer", lambda: CAPTIONS).model
        wanted = dict(family.model.named_parameters())
        for name, parameter in parts.named_parameters():
            with deferred.values(parameter):
                assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted and assert_tied(parts) is not None
    with torch.no_grad():
        for number, p in enumerate(family.model.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
    state = {name: x.clone() for name, x in family.model.state_dict().items()}
    inputs = family.encode_images([picture(1), picture(2, (40, 30))])
    with torch.no_grad():
        wanted = family.model.eval().embed(inputs)
    save(config, family, family.model.state_dict(), export)
    write_manifest(export / "gemsmith.json", {"steps": 1, "samples": 16, "config": as_dict(config)})
    kept = [name for file in export.glob("*.safetensors") for name in load_file(file)]
    assert len([name for name in kept if name.endswith(("embed_tokens.weight", "lm_head.weight"))]) == 1
    for again in (Vlm2Vec.from_pretrained(export), AutoModel.from_pretrained(export), load(export).family.model):
        found = again.eval().state_dict()
        assert found.keys() == state.keys() and all(torch.equal(x, state[n]) for n, x in found.items())
        assert_tied(again)
        with torch.no_grad():
            assert torch.equal(again.embed(inputs), wanted)


@pytest.mark.long
def test_a_tied_head_trains_under_zero_3_and_opens_from_checkpoint_and_export(tmp_path):
    run, data = tmp_path / "RUN", write_shards(tmp_path / "shards", [32])
    few = ["--samples", "48", "--checkpoint_every", "1", "--data", str(data), "--out", str(run)]
    gemsmith("train", *RECIPE[:2], *RECIPE[6:], *TIED, *few, "--ranks", 1)
    begun, ended = (checkpoint.consolidated(checkpoint.step_folder(run, step)) for step in (1, 3))
    assert not torch.equal(begun[WORDS], ended[WORDS]), "it moved"
    assert torch.equal(ended[WORDS], ended["backbone.lm_head.weight"])
    models = load(checkpoint.latest(run)), load(run / "export")
    shown = [picture(n, (24, 40)) for n in range(3)]
    for model in models:
        assert torch.equal(assert_tied(model.family.model).cpu(), ended[WORDS])
    first, second = (model.embed_images(model.images(shown)) for model in models)
    assert torch.equal(first, second)
