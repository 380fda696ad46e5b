"""Heads over vocabularies: logits never exist whole, adapters leave them alone, and a causal LM's loss is its own."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from curation.errors import UserError
from tests.training.conftest import flava_config, tiny_config
from tests.training.plain import patched_float
from training.families import build
from training.models.flava import Flava, FlavaConfig
from training.models.head import Head, finish_of
from training.models.mmgem import MMGem
from training.tokenizer import train_bpe

CAPTIONS = ["a red dog", "two blue cats in the park"]
HEADS = ("mim_head", "mmm_image_head", "mlm_head", "mmm_text_head")


@pytest.mark.parametrize("kind", ["pairs", "images", "texts"])
def test_whole_logits_are_never_made(kind):
    """What a vocabulary of 8,192 adds to the bytes that autograd saves, against those of its logits."""
    b, n, saved = 48, 16, {}
    generator = torch.Generator().manual_seed(0)
    codes, ids = (torch.randint(0, 16, (b, n), generator=generator) for _ in range(2))
    mask = torch.ones(b, n, dtype=torch.bool)
    pictures = {"pixel_values": torch.randn(b, 3, 32, 32), "image_mask": mask, "image_labels": codes}
    texts = {"input_ids": ids, "attention_mask": mask.long(), "masked_ids": ids, "text_labels": ids}
    chunk = {"images": {}, "texts": texts, "pairs": {**texts, "itm_labels": torch.ones(b, dtype=torch.long)}}[kind]
    chunk = chunk if kind == "texts" else {**chunk, **pictures}
    for vocabulary in (16, 8192):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        image = {**sizes, "image_size": 32, "patch_size": 8, "vocab_size": vocabulary}
        text = {**sizes, "vocab_size": vocabulary, "max_position_embeddings": n}
        model = Flava(FlavaConfig(image_config=image, text_config=text, multimodal_config=sizes, embed_dim=8))
        held = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes_of = {}  # of every storage, once

        def pack(x, held=held, sizes_of=sizes_of):
            if (storage := x.untyped_storage()).data_ptr() not in held:
                sizes_of[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sums = model(chunk, separable=True)["sums"]
        saved[vocabulary] = sum(sizes_of.values())
        sum(sums.values()).backward()
    logits = 4 * 8192 * b * n * (2 if kind == "pairs" else 1)
    assert saved[16] > 0 and saved[8192] - saved[16] < logits / 8, (saved, logits)


class Largest(TorchDispatchMode):
    """numel: of the largest tensor that was made inside."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


N, H, V = 1500, 24, 640
FINISHES = [{}, {"scale": 0.6}, {"scale": 1.7, "cap": 2.0}]


def a_chunk(dtype, device="cpu", **finish):
    """(head, states [N, H] that ask for a gradient, labels [N]) with numbers of bf16's."""
    torch.manual_seed(3)
    head = Head(H, V).bfloat16().to(device, dtype)
    for name, value in finish.items():
        setattr(head, name, value)
    states = (2 * torch.randn(N, H)).bfloat16().to(device, dtype).requires_grad_()
    return head, states, (torch.rand(N).square() * V).long().to(device)


def backward(loss, head, states, factor):
    """[loss, gradients of states, weight and bias] in float64 of `factor` times a loss, as autograd hands them out."""
    for p in head.parameters():
        p.grad = None
        p.grad_dtype = torch.promote_types(p.dtype, torch.float32)  # as the engine sums them
    states.grad = None
    (loss * factor).backward()
    return [loss.detach().double(), *(x.grad.double() for x in (states, head.weight, head.bias))]


@pytest.mark.parametrize("finish", FINISHES, ids=str)
def test_bf16_loses_nothing_between_pieces(finish, monkeypatch):
    """47 pieces of a chunk, against the textbook loss of the same numbers in float64; and against other pieces."""
    scale, cap, factor = finish.get("scale", 1.0), finish.get("cap"), 1.37 / N
    head, states, labels = a_chunk(torch.float64)
    logits = scale * F.linear(states, head.weight, head.bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = backward(F.cross_entropy(logits, labels, reduction="sum"), head, states, factor)

    head, states, labels = a_chunk(torch.bfloat16, **finish)
    found = {}
    for rows in (32, 700, N):
        monkeypatch.setattr("training.models.head.PIECE", rows * V)
        with Largest() as made:
            loss = head(states, labels)
        assert loss.dtype == torch.float32 and made.numel == max(rows * V, N * H)
        found[rows] = backward(loss, head, states, factor)
    apart = lambda a, b: [float((x - y).norm() / y.norm()) for x, y in zip(a, b)]  # noqa: E731
    figures = [apart(found[32], expected), apart(found[32], found[N]), apart(found[700], found[N])]
    print(figures)
    for loss, of_states, of_weight, of_bias in figures:  # what is handed to the states alone is rounded, twice
        assert loss < 1e-5 and of_states < 4e-3 and of_weight < 1e-5 and of_bias < 1e-5, figures
    assert all(float(x) < 1e-5 for x in figures[1][2:] + figures[2][2:]), "pieces change nothing"


class Products(TorchDispatchMode):
    """made: (operation, dtypes of its two factors, dtype of what came of them) of every product inside."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            self.made.add((str(func), tensors[-2].dtype, tensors[-1].dtype, out.dtype))
        return out


@pytest.mark.parametrize("finish", FINISHES, ids=str)
def test_off_the_cpu_products_of_bf16_are_given_in_fp32(finish, monkeypatch):
    """By torch's own checks of devices without numbers: which products a GPU is asked for, and that there are such."""
    monkeypatch.setattr("training.models.head.PIECE", 32 * V)
    head, states, labels = a_chunk(torch.bfloat16, "meta", **finish)
    with Products() as products:
        backward(head(states, labels), head, states, 1.37 / N)
    low, full = torch.bfloat16, torch.float32
    assert products.made == {
        ("aten.mm.dtype_out", low, low, full),
        ("aten.mm.default", low, low, low),
        ("aten.addmm.dtype_out", low, low, full),
    }
    assert head.weight.grad.dtype == head.bias.grad.dtype == full and states.grad.dtype == low


def test_what_a_parameter_sums_in_bf16_is_rounded_once(monkeypatch):
    monkeypatch.setattr("training.models.head.PIECE", 32 * V)
    factor, kept = 1.37 / N, []
    for dtype in (torch.float64, torch.bfloat16):
        head, states, labels = a_chunk(dtype)
        (head(states, labels) * factor).backward()
        kept.append(head.weight.grad)
    expected, found = kept
    assert found.dtype == torch.bfloat16
    assert bool(((found - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * expected.abs().max()).all())
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_only_what_is_asked_for_is_made():
    """A frozen head hands a gradient to its states alone; and no gradient is made where none is kept, nor twice."""
    head, states, labels = a_chunk(torch.float32)
    head.requires_grad_(False)
    with Largest() as made, torch.no_grad():
        alone = head(states, labels)
    assert not alone.requires_grad and made.numel == N * V
    head(states[:1], labels[:1]).backward()
    assert head.weight.grad is None and states.grad[0].any() and not states.grad[1:].any()
    head.requires_grad_(True)
    nothing = head(states[:0], labels[:0])  # a chunk of holes: every rank's backward still meets the head
    nothing.backward()
    assert nothing.item() == 0 and head.weight.grad is not None and not head.weight.grad.any()
    loss = head(states, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_adapters_leave_the_heads_alone(tmp_path):
    adapted = build(flava_config("--adapter", "{module: ''}"), tmp_path / "tokenizer", lambda: CAPTIONS).model
    assert all(type(getattr(adapted, name).decoder) is Head for name in HEADS)
    assert type(adapted.itm_head.seq_relationship) is not torch.nn.Linear, "it is adapted"
    with pytest.raises(UserError, match=r"adapter\.target_modules: mim_head\.decoder gives a loss"):
        build(
            flava_config("--adapter", "{module: '', target_modules: '.*decoder'}"),
            tmp_path / "tokenizer",
            lambda: CAPTIONS,
        )


SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FINISHED = {
    "llama": ({}, (1.0, None)),
    "gpt2": ({"n_embd": 32, "n_layer": 1, "n_head": 2}, (1.0, None)),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, (1.0, None)),
    "mamba": ({"state_size": 4}, (1.0, None)),
    "mixtral": ({"num_local_experts": 2}, (1.0, None)),
    "cohere": ({"logit_scale": 0.0625}, (0.0625, None)),
    "granite": ({"logits_scaling": 6.0}, (1 / 6.0, None)),
    "hyperclovax": ({"logits_scaling": 6.0}, (6.0, None)),
    "minicpm3": ({"dim_model_base": 8}, (0.25, None)),
    "gemma": ({}, (1.0, None)),
    "gemma2": ({"final_logit_softcapping": 2.0}, (1.0, 2.0)),
    "gemma3_text": ({"final_logit_softcapping": 3.0}, (1.0, 3.0)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16},
        (0.25, None),
    ),
}
"""Causal LMs by kind: sizes of their own, and what they make of their logits: (scale, cap)."""


@pytest.mark.parametrize("kind", FINISHED)
def test_what_a_model_makes_of_its_logits_is_read_off_its_forward(kind):
    own, wanted = FINISHED[kind]
    config = AutoConfig.for_model(kind, **{**SIZES, **own})
    with torch.device("meta"):
        found = finish_of(AutoModelForCausalLM.from_config(config))
    assert found[0] == pytest.approx(wanted[0], rel=1e-12) and found[1] == wanted[1]


@pytest.mark.parametrize("kind", ["llama", "cohere", "granite", "hyperclovax", "gemma2"])
def test_the_loss_is_the_causal_lm_s_own(kind, tmp_path, monkeypatch):
    """Value and gradients of a caption's loss against transformers' own, in float64; in pieces of three rows."""
    monkeypatch.setattr("training.models.head.PIECE", 3 * 300)
    tokenizer = train_bpe(CAPTIONS, 300)
    own = FINISHED[kind][0]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **own}))
    with torch.no_grad():
        for p in theirs.parameters():  # logits beyond the cap
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "lm")
    vision = tiny_config().mmgem.vision
    language = tiny_config("--mmgem.language.name_or_path", str(tmp_path / "lm")).mmgem.language
    model = MMGem.from_backbones(vision, language, tokenizer, embed_dim=24).double().eval()
    ids = torch.randint(5, 300, (2, 7), generator=torch.Generator().manual_seed(1))
    chunk = {"pixel_values": torch.randn(2, 3, 32, 32, dtype=torch.float64), "valid": torch.ones(2, dtype=torch.bool)}
    chunk |= {"input_ids": ids, "labels": ids, "length": torch.tensor([6, 6])}
    with patched_float():
        model(chunk, separable=True)["sums"]["generate"].backward()
        ours, found = model(chunk, separable=True)["sums"]["generate"], model.llm.get_input_embeddings().weight.grad
        model.zero_grad()
        words = model.llm.get_input_embeddings()(ids[:, :-1])
        prompt = model.caption_prompt(model._pooled(chunk["pixel_values"]))
        labels = torch.cat([torch.full((2, 2), -100), ids], 1)  # shifted inside: [picture, CAP, words] -> words
        inputs = torch.cat([prompt, words, words[:, :1]], 1)
        loss = 14 * model.llm(inputs_embeds=inputs, labels=labels).loss
        loss.backward()
    assert abs(float(ours - loss)) < 1e-10 * float(loss)
    wanted = model.llm.get_input_embeddings().weight.grad
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10


def test_a_head_that_is_more_than_a_matrix_is_refused():
    config = AutoConfig.for_model("bert", **{**SIZES, "is_decoder": True})
    with pytest.raises(UserError, match=r"mmgem\.language\.name_or_path: how a 'bert' makes its logits") as refused:
        finish_of(AutoModelForCausalLM.from_config(config))
    assert "\n" not in str(refused.value)
