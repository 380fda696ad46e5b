"""A "group" in the json of a sample, in a mixture, on two ranks: what shows the same thing is positive, in whichever
source or rank. The oracle is one plain process that reads the groups off the captions it was given."""

import json
import re

import torch

from tests.training.conftest import flava_config, write_shards
from tests.training.coupled_oracle import infonce
from tests.training.plain import differences, gradients_of
from tests.training.ranks import launch
from training.data import Loader, named, open_sources
from training.families import build

SOURCES = "{first: {kind: pairs}, second: {kind: pairs}, texts: {kind: texts}}"
OVERRIDES = ["--loader.sources", SOURCES, "--loader.mixing", "round_robin", "--loader.unit", "4"]
OVERRIDES += ["--loader.batch", "24", "--loader.chunk", "3", "--loader.retain", "0", "--precision", "fp32"]
OVERRIDES += ["--objective.duplicates", "positive"]
OVERRIDES += ["--flava.masks", "{patches: 6, min_block: 3, tokens: 0.3, mismatched: 0.0}"]


def written(folder, start):
    """Shards whose captions all differ within a source, in three groups that both sources have."""

    def record(number):
        caption = f"thing {number} of colour {number * 37 % 256}"
        return {"json": json.dumps({"uid": f"{start + number:032x}", "caption": caption, "group": f"g{number % 3}"})}

    return write_shards(folder, [20], members=record)


def test_groups_of_a_mixture_are_positives_on_two_ranks(tmp_path):
    folders = {name: written(tmp_path / name, 100 * n) for n, name in enumerate(("first", "second", "texts"))}
    words, run = [f"{name}={folder}" for name, folder in folders.items()], tmp_path / "run"
    overrides = [*OVERRIDES, *(x for word in words for x in ("--data", word))]
    launch("rank_gradients.py", 2, ",".join(words), run, "3", "flava", *overrides)
    saved = torch.load(run / "gradients.pt", weights_only=True)["flava"]
    assert saved["chunks"] > 2

    config = flava_config(*overrides, "--loader.chunk", "24")
    sources = open_sources(config.loader, named(config.loader, words))
    family = build(config, run / "flava" / "tokenizer", lambda: iter(()))
    family.prepare(sources)
    place = {"seed": config.seed, "rank": 0, "world_size": 1, "extra": family.extra, "mismatched": family.mismatched}
    pairs, texts = next(Loader(sources, config.loader, family.image, family.encode_text, **place).batches(0, 1))
    model, said = family.model, family.tokenizer.batch_decode(pairs["input_ids"])
    groups = [int(re.search(r"thing (\d+)", line).group(1)) % 3 for line in said]
    assert len(pairs["valid"]) == 16 and pairs["coupled"].all() and sorted(set(groups)) == [0, 1, 2]

    def plain(same, duplicates):
        model.zero_grad()
        out, alone = model(pairs, separable=True), model(texts, separable=True)
        s = out["scalars"]["log_scale"].exp() * out["left"] @ out["right"].T
        loss = infonce(s, same, {}, duplicates=duplicates, reduction="mean")
        labels = {"itm": "itm_labels", "mmm_image": "image_labels", "mmm_text": "text_labels"}
        for name, total in out["sums"].items():
            loss = loss + total / (pairs[labels[name]] >= 0).sum()
        loss = loss + alone["sums"]["mlm"] / (texts["text_labels"] >= 0).sum()
        loss.backward()
        return float(loss.detach()), gradients_of(model)

    loss, expected = plain(groups, "positive")
    whole, worst = differences(saved["gradients"], expected)
    assert whole < 1e-6 and worst < 2e-6, (whole, worst)
    assert abs(float(saved["loss"]) - loss) < 1e-5
    for other in (plain(groups, "negative"), plain(said, "positive")):  # groups left out, and groups of equal captions
        assert differences(saved["gradients"], other[1])[0] > 1e-4
