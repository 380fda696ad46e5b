"""Any AutoModelForImageTextToText as a backbone of VLM2Vec: real kinds in small, from folders of their library."""

import types

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.models.smolvlm import processing_smolvlm as smolvlm_processor

from curation.errors import UserError
from tests.training.vlm import CAPTIONS, LLAVA, TEXT, assert_alone_as_padded, picture, tiny
from training import adapters
from training.config import AdapterConfig, ObjectiveConfig
from training.family_config import Vlm2VecRecipe
from training.models import vlm_inputs, vlm_processor
from training.models.vlm2vec import Vlm2Vec, recipe_processor
from training.models.vlm_inputs import IMAGE, Inputs, Item, Row, instruct
from training.tokenizer import train_bpe

VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip


def words(**special):
    """A tokenizer that knows its kind's own tokens by name, as theirs do."""
    base = train_bpe(CAPTIONS, 300)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )


def text_config(tokenizer, **more):
    return {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **more}


def gemma3():
    tokenizer = words(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    layers = {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3Config(
        text_config=text_config(tokenizer, sliding_window=8, **layers),
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def idefics3():
    tokenizer = words()
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = transformers.Idefics3Config(
        text_config={"model_type": "llama", **text_config(processor.tokenizer)},
        vision_config=VISION,
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return config, processor


def llava():
    tokenizer = words(image_token="<image>")
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config=LLAVA["vision_config"],
        image_token_index=tokenizer.image_token_id,
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return config, transformers.LlavaProcessor(images, tokenizer, 4, "default", num_additional_image_tokens=1)


def smolvlm():
    special = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "video_token": "<video>"}
    tokenizer = words(**special, end_of_utterance_token="<end_of_utterance>", global_image_token="<global-img>")
    images = transformers.SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    processor = transformers.SmolVLMProcessor(images, tokenizer, transformers.SmolVLMVideoProcessor(), image_seq_len=4)
    config = transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **text_config(tokenizer)},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
    )
    return config, processor


def qwen3_vl():
    tokenizer = words()
    tokenizer.add_tokens(vlm_processor.QWEN_TOKENS, special_tokens=True)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), vlm_processor.QWEN_TOKENS, strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = transformers.Qwen3VLConfig(
        text_config=text_config(tokenizer, head_dim=16, rope_parameters=rope),
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
            "out_hidden_size": TEXT["hidden_size"], "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
        },
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in ids.items()},
    )  # fmt: skip
    images = transformers.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 64 * 64}
    )
    return config, transformers.Qwen3VLProcessor(images, tokenizer, transformers.Qwen3VLVideoProcessor())


FOREIGN = {"gemma3": gemma3, "idefics3": idefics3, "llava": llava, "smolvlm": smolvlm, "qwen3_vl": qwen3_vl}
KINDS = pytest.mark.parametrize("kind", FOREIGN)


@pytest.fixture(scope="module", autouse=True)
def num2words():
    """SmolVLM's processor wants the package to be there, though it spells nothing but how many frames a video has."""
    with pytest.MonkeyPatch.context() as patched:
        if not smolvlm_processor.num2words:
            patched.setattr(smolvlm_processor, "num2words", str)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    known = {}

    def made(kind):
        if kind not in known:
            torch.manual_seed(0)
            config, processor = FOREIGN[kind]()
            model = transformers.AutoModelForImageTextToText.from_config(config)
            with torch.no_grad():  # embeddings that differ make a test sharp
                for name, p in model.named_parameters():
                    if not p.any() and p.ndim > 1:  # what Gemma3 projects pictures by begins at zero
                        p.normal_(std=0.2)
                    elif p.ndim > 1 and ("embed" in name or "proj" in name):
                        p.mul_(4.0)
            known[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(known[kind])
            processor.save_pretrained(known[kind])
        return known[kind]

    return made


def opened(folder, side="left"):
    """(model, inputs) by a recipe that names the folder."""
    recipe = Vlm2VecRecipe(name_or_path=str(folder), padding_side=side)
    processor, settings = recipe_processor(recipe, None, list)
    model = Vlm2Vec.from_recipe(recipe, settings, ObjectiveConfig(temperature=0.02))
    return model.eval(), Inputs(processor, settings, max_tokens=40)


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_embeds_the_same_alone_and_padded_on_either_side(kind, side, folder):
    model, inputs = opened(folder(kind), side)
    assert_alone_as_padded(model, inputs)


@KINDS
def test_the_embedding_is_the_backbones_own_last_state_and_sees_the_picture(kind, folder):
    model, inputs = opened(folder(kind))
    shown = [Item(text=instruct("find", "cube", True), image=picture(number)) for number in (1, 2)]
    row = inputs.side(shown[:1])
    with torch.no_grad():
        state = model.backbone(**row, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(model.embed(row)[0], F.normalize(state, dim=-1))
        assert torch.pdist(model.embed(inputs.side(shown))).min() > 1e-3


@KINDS
def test_a_chunk_of_texts_runs_the_vision_tower_and_moves_nothing_in_it(kind, folder):
    model, inputs = opened(folder(kind))
    chunk = inputs.collate([Row(query=Item(text=t), positive=Item(text=t + " x")) for t in ("a", "b", "c")])
    assert "query.pixel_values" in chunk
    model(chunk)["left"].square().sum().backward()
    seen = [p.grad for n, p in model.named_parameters() if "vision_" in n or ".visual." in n]
    assert any(g is not None for g in seen) and all(g is None or not g.any() for g in seen)


@KINDS
def test_texts_of_mmeb_show_their_picture_by_the_backbones_own_token(kind, folder):
    _, inputs = opened(folder(kind))
    token = {"gemma3": "<start_of_image>", "qwen3_vl": vlm_inputs.QWEN}.get(kind, "<image>")
    shown = Item(text=f"{IMAGE}\nRepresent the given image.", image=picture(1))
    assert inputs.text(shown) == f"{token}\nRepresent the given image."
    forged = "".join(sorted(inputs.special))
    assert inputs.text(Item(text=f"a {forged} forged", image=picture(1))) == f"{token} a  forged"


PROMPT = AdapterConfig(kind="prompt", module="backbone", tokens=3)


@pytest.mark.parametrize("kind", sorted(FOREIGN.keys() - {"gemma3"}))
def test_a_prompt_of_words_is_those_words_before_the_text(kind, folder):
    """Qwen3-VL's decoder adds to the states where pictures are: there, and not `tokens` before it."""
    model, inputs = opened(folder(kind), "right")
    bare, _ = opened(folder(kind), "right")
    adapters.apply(model, PROMPT)
    decoder, first = model.backbone.get_decoder(), torch.tensor([7, 30, 11])
    with torch.no_grad():
        decoder.prompt_encoder.embedding.weight.copy_(bare.backbone.get_input_embeddings().weight[first])
        for item in (Item(text="a red cube"), Item(text=instruct("find", "cube", True), image=picture(1))):
            side = inputs.side([item], picture=False)
            more = {"input_ids": first, "attention_mask": torch.ones(3, dtype=torch.long)}
            more["mm_token_type_ids"] = torch.zeros(3, dtype=torch.long)
            longer = {n: torch.cat([more[n][None], x], 1) if n in more else x for n, x in side.items()}
            assert (model.embed(side) - bare.embed(longer)).abs().max() < 1e-5
            assert (model.embed(side) - bare.embed(side)).abs().max() > 1e-3
    assert_alone_as_padded(model, inputs)


def test_a_prompt_has_no_place_in_gemma3_s_masks(folder):
    model, _ = opened(folder("gemma3"))
    with pytest.raises(
        UserError, match=r"^adapter\.kind: Gemma3ForCond\w+ hands its decoder masks .*take lora"
    ) as error:
        adapters.apply(model, PROMPT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["qwen2_vl", "llava_next"])
def test_rows_made_one_by_one_are_those_of_a_batch(kind, side, monkeypatch):
    """How Phi-3-V's processor must be asked; another kind's can be asked in both ways."""
    _, inputs, _ = tiny(kind, padding_side=side)
    items = [Item(text="a red cube"), Item(image=picture(1)), Item(text="b"), Item(text="at a table", image=picture(2))]
    together = inputs.side(items)
    inputs.alone = True
    found = inputs.side(items)
    assert found.keys() == together.keys()
    assert all(torch.equal(found[name], together[name]) for name in found)


def test_what_cannot_be_a_backbone_is_one_line():
    with pytest.raises(UserError, match="paligemma cannot embed here: it reads no text without a picture") as error:
        Inputs(None, types.SimpleNamespace(model_type="paligemma"), max_tokens=8)
    assert "\n" not in str(error.value)


def test_a_processor_that_takes_no_texts_beside_pictures_is_one_line_before_anything_is_read():
    tokenizer = words(image_token="<|image|>")
    processor = transformers.MllamaProcessor(transformers.MllamaImageProcessor(), tokenizer)
    with pytest.raises(UserError, match="vlm2vec: MllamaProcessor makes no chunk of a text and two pictures") as error:
        Inputs(processor, transformers.MllamaConfig(image_token_index=tokenizer.image_token_id), max_tokens=8)
    assert "\n" not in str(error.value)


def test_phi_3_v_keeps_its_own_mark():
    """MMEB's mark is Phi-3-V's; its processor, from the model's repository, has no image token."""
    _, _, processor = tiny("llava_next")
    processor.image_token = None
    inputs = Inputs(processor, types.SimpleNamespace(model_type="phi3_v"), max_tokens=8)
    assert inputs.alone and inputs.text(Item(text=f"{IMAGE} a", image=picture(1))) == f"{IMAGE} a"
    assert vlm_inputs.PLACES["phi3_v"] == IMAGE
