"""The captioning loss is a mean over the tokens of the global batch: chunks, padding and ranks change neither it nor
its gradient. Ranks take turns in one process: what they agree on in a step are sums, known here beforehand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.training.conftest import coca_config, tiny_config
from tests.training.plain import FILL, differences, gradients_of, patched_float
from training.families import build
from training.gradient_cache import Outputs, gradient_cached_step

WORDS = ["a", "red", "dog", "beside", "two", "cats", "in", "the", "wide", "park"]
B = 8


class Turn:
    """One of `size` ranks: a sum over ranks is `total` when it is asked first, and noted after that."""

    def __init__(self, size, total):
        self.size, self.total, self.noted = size, total, []

    def sum(self, x):
        if self.total is None:
            self.noted.append(x)
            return x
        total, self.total = self.total, None
        return torch.tensor([total], dtype=torch.float64)


@pytest.fixture(scope="module", params=["mmgem", "coca"])
def captioning(request, tmp_path_factory):
    """(model, captions -> chunk, the mean over tokens of whole logits)"""
    config = tiny_config() if request.param == "mmgem" else coca_config()
    folder = tmp_path_factory.mktemp("run") / "tokenizer"
    family = build(config, folder, lambda: [" ".join(WORDS[i:]) for i in range(len(WORDS))])
    model = family.model

    def plain(batch):
        if request.param == "coca":
            _, picture = model.image(batch["pixel_values"])
            _, words = model.text(batch["input_ids"])
            hidden = model.towers.text_decoder(picture, words[:, :-1])
            labels = batch["input_ids"][:, 1:].masked_fill(batch["input_ids"][:, 1:] == 0, -100)
            logits = model.towers.text_decoder.head(hidden)
        else:
            labels, tokens = batch["labels"], model.llm.get_input_embeddings()(batch["input_ids"])
            prompt = model.caption_prompt(model.h1(model.feature_map(batch["pixel_values"])).mean(1))
            logits = model.llm(inputs_embeds=torch.cat([prompt, tokens[:, :-1]], 1)).logits[:, 1:]
        labels = labels.masked_fill(~batch["valid"][:, None], -100)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    return model, family.encode_text, plain


def widened(chunk, by):
    """The same captions with more padding, where it is not of one length always (CoCa's)."""
    if "labels" not in chunk:
        return chunk
    wider = lambda n, x: F.pad(x, (0, by), value=FILL[n]) if n in ("input_ids", "labels") else x  # noqa: E731
    return {name: wider(name, x) for name, x in chunk.items()}


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10), min_size=B, max_size=B),
    holes=st.sets(st.integers(1, B - 1), max_size=4),
    ranks=st.sampled_from([1, 2, 4]),
    chunk=st.integers(1, B),
    padding=st.lists(st.integers(0, 5), min_size=B, max_size=B),
    retain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_chunks_padding_and_ranks_change_nothing(captioning, lengths, holes, ranks, chunk, padding, retain, seed):
    model, encode, plain = captioning
    torch.manual_seed(seed)
    texts = [" ".join(WORDS[:n]) for n in lengths]
    pixels, valid = torch.randn(B, 3, 32, 32), torch.tensor([i not in holes for i in range(B)])

    def part(rows):
        dtype = next(model.parameters()).dtype
        return {
            **encode([texts[i] for i in rows]),
            "pixel_values": pixels[list(rows)].to(dtype),
            "valid": valid[[*rows]],
        }

    def stepped():
        """The loss that the ranks' steps come to; their gradients are left in the model."""
        model.zero_grad()
        found, own, total = 0.0, B // ranks, sum(model.counts(part([i]))["generate"] for i in range(B))
        for first in range(0, B, own):
            chunks = [part(range(i, min(i + chunk, first + own))) for i in range(first, first + own, chunk)]
            world = Turn(ranks, total)
            gradient_cached_step(
                # Captions alone: without embeddings there is no coupled loss.
                forward=lambda chunk, separable: Outputs(sums=model(chunk, separable=separable).get("sums", {})),
                backward=lambda loss: loss.backward(),
                chunks=[widened(c, padding[n]) for n, c in enumerate(chunks)],
                counts={"generate": sum(model.counts(c)["generate"] for c in chunks)},
                weights={},
                coupled=None,
                world=world,
                retain=retain,
            )
            (share,) = world.noted
            found += float(share)
        return found

    model.double().zero_grad()
    with patched_float():
        loss = plain(part(range(B)))
        loss.backward()
        expected, found = gradients_of(model), stepped()
    gradients = {name: g / ranks for name, g in gradients_of(model).items()}  # as ZeRO averages them
    whole, worst = differences(gradients, expected)
    exact = float(loss.detach())
    assert abs(found - exact) < 1e-12 * exact and whole < 1e-12 and worst < 1e-11, (found, exact, whole, worst)
    model.float()
    assert abs(stepped() - exact) < 1e-6 * exact
