"""Region retrieval and captioning against counts by hand; what cannot be used is left out; the heat map's colours."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import roi_align

from curation.errors import UserError
from evaluation.compare import compare
from evaluation.data import open_regions
from evaluation.evaluate import evaluate, load_config
from evaluation.heatmap import draw, heat_map
from evaluation.regions import Seen, encode_regions
from evaluation.results import records
from evaluation.tasks.region_retrieval import RegionRetrievalSettings, grade_embeddings
from tests.evaluation.conftest import SmallModel, image_bytes, write_tar
from tests.training.stage2 import region_shards, stage1
from training.inference import load
from training.regions import Unseen, region_weights

GRID = (4, 4)


class RegionModel(SmallModel):
    """A 4 x 4 map of mean colours; a region is described by whether it is bright."""

    can_regions = True

    def region_weights(self, region, size):
        return region_weights(region, size, GRID, "squash")

    def feature_maps(self, pixels):
        self.calls.append(("maps", len(pixels)))
        return torch.nn.functional.avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def embed_regions(self, maps, weights):
        self.calls.append(("regions", len(maps)))
        colour = torch.einsum("bn,bnd->bd", weights, maps)
        return torch.nn.functional.normalize(colour @ self.vision[:3], dim=1)

    def caption_regions(self, maps, weights, max_new_tokens=32):
        return [
            "thing 0 here now" if value > 0 else "thing 1 here now" for value in (weights[..., None] * maps).sum((1, 2))
        ]


def sample(key, regions):
    record = {"uid": f"uid-{key}", "caption": "a caption", "regions": regions}
    return [(f"{key}.png", image_bytes(int(key))), (f"{key}.txt", b"x"), (f"{key}.json", json.dumps(record).encode())]


def box(number, x=0):
    return {"name": f"thing {number} here now", "bbox_xywh": [x, number % 4, 6, 8]}


@pytest.fixture
def folder(tmp_path):
    """Pictures of 12 x 12: twenty with one to three good regions, one with none, three with a bad one, one broken."""
    members = []
    for number in range(20):
        members += sample(f"{number:03d}", [box((number + k) % 7, x=3 * k) for k in range(1 + number % 3)])
    members += sample("020", [])
    members += sample("021", [box(0), box(1, x=40)])
    members += sample("022", [{"name": "empty", "segmentation": {"size": [12, 12], "counts": [144]}}, box(2)])
    members += sample("023", [{"bbox_xywh": [0, 0, 5, 5]}])
    members += [("024.png", b"no picture"), ("024.json", b"{}"), ("024.txt", b"x")]
    write_tar(tmp_path / "set" / "00000.tar", members)
    return tmp_path / "set"


def test_regions_are_read_or_left_out_with_a_reason(folder, capsys):
    data = open_regions(folder)
    assert len(data.regions) == sum(1 + n % 3 for n in range(20)) + 2 and len(data.pictures) == 23
    assert data.uids[:2] == ["uid-000", "uid-001"] and data.sizes[0] == (12, 12)
    assert [region.phrase for region in data.regions[:3]] == [f"thing {n} here now" for n in (0, 1, 2)]
    assert data.owner[:4].tolist() == [0, 1, 1, 2]
    reasons = sorted((row["key"], row["reason"].split(":")[0]) for row in data.left_out)
    assert reasons == [
        ("024", "image_broken"),
        ("uid-021", "region_outside"),
        ("uid-022", "mask_empty"),
        ("uid-023", "region_broken"),
    ]
    assert "3 regions left out" in capsys.readouterr().out


def test_sets_without_regions_are_refused(tmp_path):
    write_tar(tmp_path / "none" / "0.tar", sample("000", []))
    write_tar(tmp_path / "bad" / "0.tar", sample("000", [box(0, x=99)]))
    for name, why in (("none", "no json names `regions`"), ("bad", "all 1 broken, the first region_outside")):
        with pytest.raises(UserError, match=why):
            open_regions(tmp_path / name)


def test_retrieval_is_counted_over_different_phrases():
    rng = np.random.default_rng(0)
    regions, texts = (
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rng.normal(size=(30, 5)), rng.normal(size=(9, 5)))
    )
    phrase = np.concatenate([np.arange(9), rng.integers(0, 9, 21)])
    owner = np.sort(rng.integers(0, 12, 30))
    graded = grade_embeddings(regions, texts, phrase, owner, RegionRetrievalSettings(k=(1, 5)))
    found = {m.metric: m for m in graded.measurements}
    scores = regions @ texts.T
    for k in (1, 5):
        top = np.argsort(-scores, axis=1)[:, :k]
        one = found[f"region_to_phrase_recall@{k}"]
        assert one.value == pytest.approx(np.mean([phrase[i] in top[i] for i in range(30)])) and one.n == 30
        assert one.chance == pytest.approx(k / 9)
        back = np.argsort(-scores.T, axis=1)[:, :k]
        other = found[f"phrase_to_region_recall@{k}"]
        assert other.value == pytest.approx(np.mean([t in phrase[back[t]] for t in range(9)])) and other.n == 9
        drawn = [
            np.isin(rng.permutation(30)[:k], np.flatnonzero(phrase == t)).any() for t in range(9) for _ in range(2000)
        ]
        assert other.chance == pytest.approx(np.mean(drawn), abs=0.02)
        assert one.ci95[0] < one.value < one.ci95[1] or one.value in (0, 1)
    assert (graded.per_query["cluster/region_to_phrase_recall@1"] == owner).all()


def test_the_tasks_run_from_a_checkpoint_to_lines(folder, tmp_path):
    model, out = RegionModel(), tmp_path / "r.jsonl"
    tasks = ["region_retrieval", "region_captioning"]
    rows = evaluate(checkpoint=tmp_path, tasks=tasks, data=folder, out=out, cache=tmp_path / "c", load=lambda _: model)
    figures = {(row["task"], row["metric"]): row for row in rows}
    assert figures["region_retrieval", "region_to_phrase_recall@1"]["n"] == 41
    assert figures["region_retrieval", "region_to_phrase_recall@1"]["chance"] == pytest.approx(1 / 7)
    assert all(size == 16 for name, size in model.calls if name == "maps")
    assert all(size == 64 for name, size in model.calls if name == "regions")
    captioned = figures["region_captioning", "cider_d"]
    written = records(out, captioned)
    assert captioned["n"] == 41 == len(written)
    right = [r["caption"] == r["references"][0] for r in written]
    assert 0 < sum(right) < 41 and [r["cider_d"] > 5 for r in written] == right
    assert 0 < figures["region_captioning", "bleu_4"]["value"] < 1
    calls = len(model.calls)
    evaluate(
        checkpoint=tmp_path,
        tasks=tasks,
        data=folder,
        out=tmp_path / "s.jsonl",
        cache=tmp_path / "c",
        load=lambda _: model,
    )
    assert {name for name, _ in model.calls[calls:]} == {"maps"}, "embeddings come from the cache; captions do not"


def test_models_that_see_other_regions_are_not_compared(folder, tmp_path):
    class Cropping(RegionModel):
        def region_weights(self, region, size):
            if region.box[0] == 0:  # outside of what it sees
                raise Unseen
            return super().region_weights(region, size)

    files = [tmp_path / f"{name}.jsonl" for name in ("whole", "alike", "cropped")]
    for number, (out, kind) in enumerate(zip(files, (RegionModel, RegionModel, Cropping), strict=True)):
        model = kind(number)
        evaluate(checkpoint=tmp_path, tasks=["region_retrieval"], data=folder, out=out, load=lambda _, m=model: m)
    assert compare(a=files[0], b=files[1])
    with pytest.raises(UserError, match="regions that both models see"):
        compare(a=files[0], b=files[2])


def test_a_region_does_not_depend_on_its_neighbours(folder):
    model, data = RegionModel(), open_regions(folder)
    seen = Seen(model, data, "region_retrieval", None)
    for number in (0, 5, 40):
        maps, weights = seen.batch([number])
        alone = model.feature_maps(model.images([data.pictures[int(data.owner[number])]]))
        assert torch.equal(maps, alone)
        assert torch.equal(weights[0], torch.from_numpy(region_weights(data.regions[number], (12, 12), GRID, "squash")))
        assert torch.equal(seen.batch([number, 12])[0][0], alone[0])


def test_models_without_regions_are_refused(folder, tmp_path):
    for task in ("region_retrieval", "region_captioning"):
        with pytest.raises(UserError, match=f"--tasks {task}: checkpoint small-0 takes no regions"):
            evaluate(checkpoint=tmp_path, tasks=[task], data=folder, out=tmp_path / "x", load=lambda _: SmallModel())


@pytest.mark.parametrize("resize_mode", ["squash", "shortest"])
def test_a_heat_map_is_hot_where_the_cosine_is_high(resize_mode):
    cosines = np.full((4, 4), -0.2, np.float32)
    cosines[0, 3] = 0.5
    sheet = draw(Image.new("RGB", (60, 40), (128, 128, 128)), cosines, "a very " * 40, resize_mode)
    wide = 448 if resize_mode == "shortest" else 672
    assert sheet.size == (wide, 448 + 46)
    pixels = np.asarray(sheet).astype(int)
    redness = pixels[..., 0] - pixels[..., 2]
    hot, cold = redness[28, wide - 56], redness[300, 56]
    assert hot > 40 > 0 > cold or hot - cold > 40
    assert (redness[:448, : wide // 2] < hot).all()


def test_a_checkpoint_of_stage_1_is_graded_and_drawn(tmp_path):
    """Through the project's own loader, against RoIAlign by torchvision's kernel over the ViT's map, then h1."""
    shards = region_shards(tmp_path / "shards")
    first = stage1(tmp_path / "stage1", shards)
    settings = load_config(["--region_retrieval.limit", "30", "--region_captioning.limit", "4"])
    tasks = ["region_retrieval", "region_captioning"]
    rows = evaluate(checkpoint=first, tasks=tasks, data=shards, out=tmp_path / "r.jsonl", config=settings)
    assert {(row["task"], row["n"]) for row in rows if "cider" in row["metric"] or "to_phrase" in row["metric"]} == {
        ("region_retrieval", 30),
        ("region_captioning", 4),
    }
    model, data = load(first), open_regions(shards)
    found = encode_regions(Seen(model, data, "region_retrieval", 30), cache=None, batch=8)
    inner = model.family.model
    for number in (0, 1, 17):
        picture = data.pictures[int(data.owner[number])]
        _, patches = inner.vision(model.images([picture]))
        map_ = patches.transpose(1, 2).unflatten(2, (4, 4))
        corners = torch.tensor(data.regions[number].box) / torch.tensor([48, 40, 48, 40]) * 4
        pooled = roi_align(map_, [corners[None]], (1, 1), sampling_ratio=4, aligned=True).flatten(1)
        expected = torch.nn.functional.normalize(inner.h1(pooled), dim=-1)[0].detach().numpy()
        np.testing.assert_allclose(found[number], expected, atol=2e-6)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    cosines = heat_map(first, tmp_path / "red.png", "a red thing", tmp_path / "out" / "map.png")
    with Image.open(tmp_path / "out" / "map.png") as drawn:
        assert drawn.format == "PNG" and drawn.size == (597, 448 + 46)
    text = model.embed_texts(["a red thing"])
    patches = torch.nn.functional.normalize(
        inner.h1(inner.feature_map(model.images([Image.new("RGB", (80, 60), "red")]))), dim=-1
    )
    np.testing.assert_allclose(cosines, (patches @ text[0]).detach().numpy().reshape(4, 4), atol=2e-6)
    for image, said, why in (
        (tmp_path / "none.png", "a", "--image .*none.png: cannot be read"),
        (shards / "00000000.tar", "a", "cannot be read"),
        (tmp_path / "red.png", " ", "--text: is empty"),
    ):
        with pytest.raises(UserError, match=why):
            heat_map(first, image, said, tmp_path / "x.png")
    with pytest.raises(UserError, match=r"--out .*: cannot be written"):
        heat_map(first, tmp_path / "red.png", "a", tmp_path)
    (tmp_path / "latest").symlink_to(first)
    assert load(tmp_path / "latest").name == model.name
