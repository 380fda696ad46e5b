"""`gemsmith search`: hits against brute force, an index that is made once, a page that captions cannot break out of."""

import io
import json
import re
import tarfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from curation.errors import UserError
from evaluation.search import search
from tests.evaluation.conftest import SmallModel, image_bytes, pair, write_tar

TEXTS = ["red square", "blue circle above", "shiny"]
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too' {{ 7 * 7 }} \u202e"


def brute_force(model, folder, query, top):
    """(score, uid) of the best: every picture by itself, decoded by Pillow, in double precision."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if not name.endswith(".png"):
                    continue
                picture = Image.open(io.BytesIO(tar.extractfile(name).read())).convert("RGB")
                uid = json.loads(tar.extractfile(name.replace(".png", ".json")).read())["uid"]
                vector = model.embed_images(model.images([picture]))[0].double().numpy()
                found.append((-round(float(vector @ query), 6), uid))
    return [(-score, uid) for score, uid in sorted(found)][:top]


def run(model, data, **settings):
    return search(checkpoint=data, data=str(data), load=lambda _: model, **settings)


@pytest.mark.parametrize("top", [1, 5, 23, 40])
def test_hits_are_those_of_brute_force(model, pairs_folder, top):
    picture = pairs_folder.parent / "asked.png"
    picture.write_bytes(image_bytes(7))
    found, _ = run(model, pairs_folder, texts=TEXTS, images=[picture], top=top)
    queries = [model.embed_texts([text])[0] for text in TEXTS]
    queries.append(model.embed_images(model.images([Image.open(picture).convert("RGB")]))[0])
    for hits, query in zip(found, queries, strict=True):
        wanted = brute_force(model, pairs_folder, query.double().numpy(), top)
        assert [hit.uid for hit in hits] == [uid for _, uid in wanted]
        assert np.allclose([hit.score for hit in hits], [score for score, _ in wanted], atol=2e-6)
    assert found[-1][0].uid == "uid-00007" and found[-1][0].score == pytest.approx(1, abs=1e-6)
    assert len(found[0]) == min(top, 23)


def test_ties_go_by_uid_even_across_the_last_hit(model, tmp_path):
    """Sixteen copies of two pictures, in two shards: whatever a copy's place, the smallest uids are shown."""
    order = np.random.default_rng(0).permutation(16)
    members = [pair(f"{n:03d}", int(n) % 2, ["a"]) for n in order]
    for shard in range(2):
        write_tar(tmp_path / "d" / f"{shard}.tar", [m for one in members[shard::2] for m in one])
    hits = run(model, tmp_path / "d", texts=["red"], top=11)[0][0]
    halves = sorted((f"uid-{n:03d}" for n in range(16)), key=lambda uid: int(uid[-3:]) % 2)
    first = halves[:8] if int(hits[0].uid[-3:]) % 2 == 0 else halves[8:]
    rest = [uid for uid in halves if uid not in first]
    assert [hit.uid for hit in hits] == sorted(first) + sorted(rest)[:3]


def embedded(model):
    """Batches of pictures since the last call, less the query's."""
    calls, model.calls = [kind for kind, _ in model.calls], []
    return calls.count("images")


def test_an_index_is_made_once_and_again_where_the_data_changed(model, pairs_folder):
    first, page = run(model, pairs_folder, texts=TEXTS)
    out = pairs_folder.with_name("scenes.search")
    assert page == out / "hits.html" and embedded(model) == 2
    index = (out / "index.faiss").read_bytes()
    assert run(model, pairs_folder, texts=TEXTS)[0] == first and embedded(model) == 0
    assert (out / "index.faiss").read_bytes() == index

    write_tar(pairs_folder / "00002.tar", pair("00099", 99, ["one more"]))
    more, _ = run(model, pairs_folder, texts=TEXTS, top=24)
    assert embedded(model) == 1, "only the shard that is new"
    fresh, _ = run(model, pairs_folder, texts=TEXTS, top=24, out=pairs_folder.with_name("elsewhere"))
    assert [[(h.uid, h.score) for h in hits] for hits in more] == [[(h.uid, h.score) for h in hits] for hits in fresh]
    assert {hit.uid for hit in more[0]} >= {"uid-00099"} and embedded(model) == 3

    write_tar(pairs_folder / "00000.tar", pair("00000", 4711, ["another"]))
    changed, _ = run(model, pairs_folder, texts=TEXTS, top=40)
    assert embedded(model) == 1 and len(changed[0]) == 13
    other = SmallModel(seed=5)
    assert run(other, pairs_folder, texts=TEXTS)[0] != changed and embedded(other) == 3


def test_the_batch_bounds_what_the_model_sees_at_once_and_belongs_to_the_index(pairs_folder, tmp_path, capsys):
    """Every call is a full batch, the query's too; few pictures at a time where a model sees them whole."""
    picture = tmp_path / "asked.png"
    picture.write_bytes(image_bytes(7))

    def sizes(model, **settings):
        found, _ = run(model, pairs_folder, images=[picture], texts=TEXTS, **settings)
        return found, [number for kind, number in model.calls if kind == "images"]

    usual, seen = sizes(SmallModel())
    assert seen == [64, 64, 64]
    small, seen = sizes(SmallModel(), batch=5)
    assert seen == [5] * (3 + 3 + 1), "12 and 11 pictures, and the query's"
    assert "made of the same checkpoint in another way (--batch" in capsys.readouterr().out
    assert sizes(SmallModel(), batch=5) == (small, [5]), "it is up to date"
    assert [[hit.uid for hit in hits] for hits in small] == [[hit.uid for hit in hits] for hits in usual]
    assert small[-1][0].uid == "uid-00007" and small[-1][0].score == pytest.approx(1, abs=1e-6)
    whole = SmallModel()
    whole.preprocess = {"size": 0, "resize_mode": "fit"}
    assert sizes(whole)[1] == [4] * 7
    with pytest.raises(UserError, match="--batch 0: is below 1"):
        sizes(SmallModel(), batch=0)


def test_a_killed_index_goes_on_where_it_stopped(pairs_folder):
    class Killed(SmallModel):
        def embed_images(self, pixels):
            if embedded_once:
                raise KeyboardInterrupt
            embedded_once.append(1)
            return super().embed_images(pixels)

    embedded_once = []
    with pytest.raises(KeyboardInterrupt):
        run(Killed(), pairs_folder, texts=TEXTS)
    out = pairs_folder.with_name("scenes.search")
    assert not (out / "manifest.json").exists() and len(list((out / "parts").iterdir())) == 1
    whole = SmallModel()
    found, _ = run(whole, pairs_folder, texts=TEXTS)
    assert embedded(whole) == 1 and not (out / "parts").exists()
    assert found == run(SmallModel(), pairs_folder, texts=TEXTS, out=out.with_name("new"))[0]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.said, self.others = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        self.others += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.said += data


def test_the_page_shows_hits_and_escapes_what_comes_from_the_web(model, tmp_path, capsys):
    data = tmp_path / "<b>data"
    members = pair("000", 0, [HOSTILE]) + pair("001", 1, ["a cat"]) + pair("002", 2, ["a dog"])
    broken = [("003.png", image_bytes(3)[:70]), ("003.txt", b"cut short"), ("004.txt", b"no picture")]
    write_tar(data / "0.tar", members + broken)
    asked = tmp_path / "<i>asked.png"
    asked.write_bytes(image_bytes(2))
    found, path = run(model, data, texts=[f"cat {HOSTILE}"], images=[asked])
    text = path.read_text()
    page = Page(text)
    assert "script" not in page.tags and "i" in page.tags and "b" not in page.tags and page.others == []
    assert "http" not in "".join(page.sources) and all(s.startswith("data:image/jpeg") for s in page.sources)
    assert page.tags.count("img") == 3 + 3 + 1, "each query's hits, and the picture that was asked for"
    assert page.said.count(HOSTILE) == 3, "as hits of both queries, and as a query's end"
    assert re.search(r"Left out:\s+image decode 1,\s+image missing 1\.", page.said)
    assert found[1][0].uid == "uid-002" and "3 pictures" in page.said
    assert "2 left out" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["list", "stems"])
def test_a_folder_of_pictures_with_captions(model, tmp_path, layout):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(image_bytes(number))
        if layout == "stems":
            (folder / f"{number}.txt").write_text(f"photo {number}")
    if layout == "list":
        rows = [f"{number}.png,photo {number}" for number in range(5)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    found, _ = run(model, folder, images=[folder / "3.png"], top=5)
    assert found[0][0].caption == "photo 3" and len({hit.uid for hit in found[0]}) == 5


def test_a_picture_that_the_model_refuses_is_left_out(tmp_path):
    """As Qwen's processor refuses what is very long: in a full batch, in the last one, and alone in a shard."""

    class Picky(SmallModel):
        def images(self, images):
            if any(max(image.size) > 200 * min(image.size) for image in images):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return super().images(images)

    line = io.BytesIO()
    Image.new("RGB", (1, 300)).save(line, "PNG")
    members = [(f"{n:03d}", line.getvalue() if n in (5, 70) else image_bytes(n)) for n in range(72)]
    found = {}
    for name, cut in (("d", 70), ("good", 69)):
        kept = [one for one in members if name == "d" or one[1] != line.getvalue()]
        for shard, part in enumerate((kept[:cut], kept[cut:])):
            files = [file for key, raw in part for file in ((f"{key}.png", raw), (f"{key}.txt", b"words"))]
            write_tar(tmp_path / name / f"{shard}.tar", files)
        found[name] = run(Picky(), tmp_path / name, texts=TEXTS, top=9)[0]
    write_tar(tmp_path / "d" / "2.tar", [("9.png", line.getvalue()), ("9.txt", b"words")])
    run(Picky(), tmp_path / "d", texts=TEXTS)
    manifest = json.loads((tmp_path / "d.search" / "manifest.json").read_text())
    assert [shard["left_out"] for shard in manifest["shards"]] == [{"image_broken": 1}] * 3
    assert manifest["pictures"] == 70 and [shard["rows"] for shard in manifest["shards"]] == [69, 1, 0]
    for hits, wanted in zip(found["d"], found["good"], strict=True):
        assert [hit.uid for hit in hits] == [hit.uid for hit in wanted]
        assert np.allclose([hit.score for hit in hits], [hit.score for hit in wanted], atol=2e-6)
    (tmp_path / "asked.png").write_bytes(line.getvalue())
    with pytest.raises(UserError, match=r"--image asked\.png: the model refuses it .*aspect ratio") as refused:
        run(Picky(), tmp_path / "d", images=[tmp_path / "asked.png"])
    assert "\n" not in str(refused.value)


def test_what_cannot_be_searched_is_one_line(model, pairs_folder, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    write_tar(tmp_path / "broken" / "0.tar", [("0.png", b"nothing of a picture"), ("0.txt", b"words")])
    (tmp_path / "full.search").mkdir()
    (tmp_path / "full.search" / "thesis.txt").write_text("the only copy")
    no_picture = tmp_path / "no.png"
    no_picture.write_bytes(b"words")

    class Dead(SmallModel):
        def embed_images(self, pixels):
            return super().embed_images(pixels) * float("nan")

    good = {"texts": ["a"]}
    for model_, data, settings, said in (
        (model, pairs_folder, {}, "nothing to look for"),
        (model, pairs_folder, {"texts": [" "]}, "is empty"),
        (model, pairs_folder, {**good, "top": 0}, "--top: 0"),
        (model, pairs_folder, {"images": [tmp_path / "none.png"]}, "--image .*none.png: cannot be read"),
        (model, pairs_folder, {"images": [no_picture]}, r"--image .*no.png: .*image_decode"),
        (model, tmp_path / "none", good, "--data .*none: no such folder"),
        (model, empty, good, "--data .*empty: holds no"),
        (model, tmp_path / "broken", good, r"no usable picture \(image_decode 1\)"),
        (Dead(), pairs_folder, good, "NaN"),
        (model, pairs_folder, {**good, "out": pairs_folder / "index"}, "lies within --data"),
        (model, pairs_folder, {**good, "out": tmp_path / "full.search"}, "--out .*not empty"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            run(model_, data, **settings)
        assert "\n" not in str(refused.value) and "--pool" not in str(refused.value)
