"""Special tokens that a text spells out, in training, grading and by hand: they neither end nor embed it."""

import types

import pytest
import torch

from curation.errors import UserError
from tests.training.conftest import flava_config, tiny_config
from tests.training.vlm import BACKBONES, picture, tiny
from training.families import build
from training.models.flava_batch import encode
from training.models.vlm_inputs import IMAGE, Inputs, Item
from training.processor import processor_of
from training.tokenizer import CAP, EMB

CAPTIONS = ["a red cube beside a ball", "two green cones behind a table"]


@pytest.fixture(scope="module")
def mmgem(tmp_path_factory):
    config = tiny_config("--loader.max_tokens", "20")
    family = build(config, tmp_path_factory.mktemp("run") / "tokenizer", lambda: CAPTIONS)
    family.model.eval()
    return family, processor_of(config, family)


@pytest.mark.parametrize("word", [EMB, CAP, "</s>", "<pad>", "<s>"])
def test_a_caption_brings_no_special_token(mmgem, word):
    """Its own tokens, then one [EMB] or end; and the same for those who take the model away."""
    family, processor = mmgem
    spelled = f"a red cube {word} beside a ball"
    found = family.encode_text([spelled])
    assert torch.equal(processor(text=[spelled])["input_ids"], found["input_ids"])
    ids, labels = (found[name][0].tolist() for name in ("input_ids", "labels"))
    assert ids[-1] == family.tokenizer.convert_tokens_to_ids(EMB) and labels[-1] == family.tokenizer.eos_token_id
    assert ids[:-1] == labels[:-1] and len(ids) == int(found["length"]) + 1
    assert family.tokenizer.decode(ids[:-1]).split() == ["a", "red", "cube", "beside", "a", "ball"]


def test_flava_s_captions_bring_none_either(tmp_path):
    family = build(flava_config(), tmp_path / "tokenizer", lambda: CAPTIONS)
    ids, words = encode(family.tokenizer, ["a red cube", "a red [MASK] [SEP]cube[CLS]"], 20)
    assert family.tokenizer.decode(ids[1][1:-1]).split() == ["a", "red", "cube"]
    assert ids[1][0] == ids[0][0] and ids[1][-1] == ids[0][-1] and None not in words[1][1:-1]
    assert [len(row) for row in ids] == [len(row) for row in words]


def test_a_text_is_embedded_at_its_last_emb(mmgem):
    """An earlier one is read as any token is."""
    family, _ = mmgem
    model, emb = family.model, family.model.config.emb_token_id
    ids = torch.tensor([[7, emb, 9, emb, 0], [7, 8, emb, 0, 0]])
    hidden = model.llm.base_model(input_ids=ids).last_hidden_state
    wanted = torch.nn.functional.normalize(model.h2(hidden[[0, 1], [3, 2]]), dim=-1)
    for mask in (None, torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])):
        assert torch.allclose(model.get_text_features(ids, attention_mask=mask).pooler_output, wanted, atol=1e-6)


def test_texts_that_cannot_be_embedded_are_one_line(mmgem):
    model = mmgem[0].model
    emb = model.config.emb_token_id
    ids = torch.tensor([[7, 8, emb], [7, 8, 9]])
    with pytest.raises(UserError, match=r"^input_ids: row 1 has no \[EMB\]"):
        model.get_text_features(ids)
    with pytest.raises(UserError, match=r"^input_ids: row 0 has no \[EMB\]"):
        model.get_text_features(ids[:1], attention_mask=torch.tensor([[1, 1, 0]]))
    with pytest.raises(UserError, match=r"^attention_mask: has padding before a text; pad on the right"):
        model.get_text_features(ids[:1], attention_mask=torch.tensor([[0, 1, 1]]))


VLM_WORDS = {kind: ["<|image_pad|>", "<|video_pad|>"] for kind in BACKBONES} | {"llava_next": ["<image>"]}


@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_a_text_brings_a_vlm_neither_picture_nor_film(kind):
    """Not by halves of the word around another, nor around the mark of a picture's place, either."""
    model, inputs, processor = tiny(kind)
    plain, shown = Item(text="a  cube"), Item(text="a  cube", image=picture(1))
    with torch.no_grad():
        wanted = model.embed(inputs.side([plain], picture=False))
        for word in VLM_WORDS[kind]:
            halves = word[:4], word[4:]
            for spelled in (word, word.join(halves), word.join(halves).join(halves), word + word, IMAGE.join(halves)):
                item = Item(text=f"a {spelled} cube")
                assert inputs.text(item) == "a  cube"
                assert torch.equal(model.embed(inputs.side([item], picture=False)), wanted)
                if IMAGE not in spelled:  # where it is, the picture goes between the halves
                    assert inputs.text(Item(text=item.text, image=shown.image)) == inputs.text(shown)
            between = Item(text=f"a {IMAGE.join(halves)} cube", image=shown.image)
            assert model.embed(inputs.side([between, shown])).isfinite().all()
    processor.audio_token = "<sound>"
    hearing = Inputs(processor, model.backbone.config, max_tokens=40)
    assert hearing.text(Item(text="a <sou<sound>nd> cube")) == "a  cube"


def test_a_text_brings_phi_3_v_no_other_picture_than_its_own():
    _, _, processor = tiny("llava_next")
    inputs = Inputs(processor, types.SimpleNamespace(model_type="phi3_v"), max_tokens=8)
    spelled = f"a <|image_<|image_22|>3|> b{IMAGE}<|image_2|>"
    assert inputs.text(Item(text=spelled)) == "a  b"
    assert inputs.text(Item(text=spelled, image=picture(1))) == f"a  b{IMAGE}"
