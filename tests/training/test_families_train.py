"""Every family the whole way through the commands: trained, cut short and resumed to the same bits, taken away, graded.

MM-GEM goes this way in test_train.py and test_mmgem_stage2.py, FLAVA in test_flava_ranks.py and VLM2Vec in
test_vlm2vec_train.py.
"""

import json

import pytest
import torch

from curation.errors import UserError
from evaluation import results
from evaluation.data import open_retrieval
from evaluation.evaluate import evaluate
from tests.conftest import gemsmith
from tests.training.bridges import COLOURS, MAPPINGS
from tests.training.bridges import arguments as bridge
from tests.training.conftest import CLIP, COCA, write_shards
from tests.training.test_train import cut_short, state_of
from training import checkpoint
from training.auto import AutoModel, AutoProcessor

STEPS, PAIRS, NAMES, THINGS = 4, 36, [*COLOURS], ("cup", "box", "car", "ball", "dog", "tree")
NUMBERS = ["--loader.batch", "32", "--loader.chunk", "8", "--loader.retain", "8", "--optim.warmup_steps", "2"]
NUMBERS += ["--samples", str(32 * STEPS), "--checkpoint_every", "2", "--log_every", "1", "--ranks", "1"]


def dual(recipe, sizes, *more):
    return ["--config", f"recipes/train/{recipe}.yaml", "--clip.model_cfg", sizes, *more]


FAMILIES = {
    "clip": lambda backbones: dual("tiny_clip", CLIP),
    "siglip": lambda backbones: dual("tiny_clip", CLIP, "--objective.coupled", "siglip", "--clip.patch_dropout", "0.5"),
    "negclip": lambda backbones: dual("tiny_negclip", CLIP),
    "coca": lambda backbones: dual("tiny_coca", json.dumps(COCA)),
    **{name: lambda backbones, name=name: bridge(backbones, name) for name in MAPPINGS},
}
SHORT = ("siglip", "limber")
LOSSES = {"coca": {"loss_embed", "loss_generate"}, **dict.fromkeys(MAPPINGS, frozenset({"loss_generate"}))}
TASKS = {"coca": ("retrieval", "captioning"), **dict.fromkeys(MAPPINGS, ("captioning",))}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pictures of one colour each, and captions that all differ and have words to swap."""

    def text(n):
        one, two = (f"a {NAMES[(n + i) % 6]} {THINGS[(n // 6 + 2 * i) % 6]}" for i in (0, 1))
        return f"{one} beside {two}"

    folder = tmp_path_factory.mktemp("families") / "pairs"
    return write_shards(folder, [20, PAIRS - 20], captions=lambda n: [text(n)], members=lambda n: {"txt": text(n)})


@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in FAMILIES]
)
def test_a_family_goes_the_whole_way(name, pairs, backbones, tmp_path):
    run, words = tmp_path / "run", ["train", *FAMILIES[name](backbones), *NUMBERS, "--data", pairs]
    gemsmith(*words, "--out", run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["errors"] == 0 for line in lines)
    assert {key for key in lines[0] if key.startswith("loss_")} == LOSSES.get(name, {"loss_embed"})
    begun, ended = (checkpoint.consolidated(checkpoint.step_folder(run, step)) for step in (2, STEPS))
    moved = {n.split(".")[0] for n, x in ended.items() if not torch.equal(begun[n], x)}
    assert ("logit_bias" in moved) == (name == "siglip")
    assert moved - {"logit_bias"} == ({"mapping"} if name in MAPPINGS else {"towers", "log_scale"})

    again = cut_short(run, tmp_path / "again")
    assert "resuming after step 2" in gemsmith(*words, "--out", again).stdout
    expected, found = state_of(run), state_of(again)
    assert expected.keys() == found.keys() and all(torch.equal(expected[n], x) for n, x in found.items())

    out = tmp_path / "results.jsonl"
    tasks = TASKS.get(name, ("retrieval",))
    grading = ["--checkpoint", again / "export", "--data", pairs, "--out", out, "--threads", "1"]
    gemsmith("evaluate", *grading, "--tasks", ",".join(tasks))
    rows = {row["metric"]: row for row in results.read(out)}
    assert all(row["step"] == STEPS for row in rows.values())
    model, processor = (auto.from_pretrained(run / "export") for auto in (AutoModel, AutoProcessor))
    data = open_retrieval(pairs)
    pictures = [data.pictures[n] for n in range(PAIRS)]
    pixels = processor(images=pictures)
    if "retrieval" in tasks:
        images = model.eval().get_image_features(**pixels).pooler_output
        texts = model.get_text_features(**processor(text=[captions[0] for captions in data.captions])).pooler_output
        for way, s in {"image_to_text": images @ texts.T, "text_to_image": texts @ images.T}.items():
            ranks = (s > s.diagonal()[:, None]).sum(1) + 1
            row = rows[f"{way}_mrr"]
            assert row["value"] == pytest.approx(float((1 / ranks).mean()), abs=0.02), "graded as it was taken away"
            assert row["n"] == PAIRS and 0 < rows[f"{way}_recall@1"]["chance"] < 0.05
    if "captioning" in tasks:
        ids = model.eval().generate(**pixels, max_new_tokens=32)
        written = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        assert [record["caption"] for record in results.records(out, rows["cider_d"])] == written
    if name in MAPPINGS:
        with pytest.raises(UserError, match=r"mmgem\.mapping: .* embeds nothing; grade captioning"):
            evaluate(checkpoint=again / "export", tasks=["retrieval"], data=pairs, out=out)
