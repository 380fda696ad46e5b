import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from curation.errors import UserError
from evaluation.data import open_classification, open_retrieval


def test_retrieval_reads_what_tarfile_reads(pairs_folder):
    data = open_retrieval(pairs_folder)
    assert (len(data.pictures), len(data.uids), len(data.captions), data.left_out) == (23, 23, 23, [])
    position = 0
    for path in sorted(pairs_folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in (name for name in tar.getnames() if name.endswith(".json")):
                record = json.load(tar.extractfile(name))
                pixels = Image.open(io.BytesIO(tar.extractfile(name.replace(".json", ".png")).read())).convert("RGB")
                assert data.uids[position] == record["uid"]
                assert data.captions[position] == record["captions"]
                assert np.array_equal(np.asarray(data.pictures[position]), np.asarray(pixels))
                position += 1
    assert position == 23


def test_broken_samples_are_left_out_with_a_reason(tmp_path, tar_writer, image_of, capsys):
    good = image_of(1)
    members = [
        ("a.png", good), ("a.txt", b"fine"),
        ("b.png", good[: len(good) // 2]), ("b.txt", b"cut image"),
        ("c.png", good), ("c.json", b"{not json"),
        ("d.png", good), ("d.txt", b"\xff\xfe caption"),
        ("e.txt", b"no image"),
        ("f.png", good), ("f.json", b'{"caption": null}'),
        ("g.png", good), ("g.json", b"[1]"),
        ("h.png", good), ("h.json", b'{"captions": "abc"}'),
        ("i.png", good), ("i.json", b'{"caption": "\\ud800"}'),
        ("j.png", good), ("j.json", b"[" * 100_000),
        ("k.png", good), ("k.json", b'{"caption": "json"}'), ("k.txt", b"\xff\xfe"),
    ]  # fmt: skip
    tar_writer(tmp_path / "x" / "0.tar", members)
    whole = (tmp_path / "x" / "0.tar").read_bytes()
    (tmp_path / "x" / "1.tar").write_bytes(whole[:1200])
    (tmp_path / "x" / "2.tar").touch()
    data = open_retrieval(tmp_path / "x")
    assert data.captions[0] == ["fine"]
    reasons = {row["key"]: row["reason"].split(":")[0] for row in data.left_out if row["shard"] == "0.tar"}
    assert reasons == {
        "b": "image_broken",
        "c": "json_broken",
        "d": "caption_not_utf8",
        "e": "image_missing",
        "f": "caption_missing",
        "g": "json_broken",
        "h": "captions_broken",
        "i": "caption_not_utf8",
        "j": "json_broken",
        "k": "caption_not_utf8",
    }
    damaged = [row["shard"] for row in data.left_out if row["reason"].startswith("shard_damaged")]
    assert damaged == ["1.tar", "2.tar"]
    assert f"{len(data.left_out)} samples left out" in capsys.readouterr().out


def test_data_is_named_by_content_not_by_path(pairs_folder, tmp_path):
    shutil.copytree(pairs_folder, tmp_path / "renamed")
    one, two = open_retrieval(pairs_folder), open_retrieval(tmp_path / "renamed")
    assert (one.content_hash, one.pictures.content_hash) == (two.content_hash, two.pictures.content_hash)
    assert one.pictures.head(5).content_hash != one.pictures.content_hash
    with open(tmp_path / "renamed" / "00000.tar", "r+b") as f:
        f.seek(600)
        f.write(b"X")
    assert open_retrieval(tmp_path / "renamed").content_hash != one.content_hash


def test_missing_data_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_retrieval(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.tar"):
        open_retrieval(tmp_path / "empty")
    with pytest.raises(UserError, match=r"classnames\.txt"):
        open_classification(tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("zeroshot_classification_templates.txt", "a photo\n", "{c}"),
        ("dataset_type.txt", "multilabel", "multilabel"),
        ("test/nshards.txt", "3", r"2\.tar"),
        ("test/nshards.txt", "two", "nshards"),
    ],
)
def test_wrong_classification_layout_is_refused(classes_folder, file, text, match):
    (classes_folder / file).write_text(text)
    with pytest.raises(UserError, match=match):
        open_classification(classes_folder)


def test_classification_layout(classes_folder):
    data = open_classification(classes_folder)
    assert data.labels == [n * n % 7 for n in range(30)]
    assert len(data.class_names) == 7 and len(data.templates) == 3
    (classes_folder / "classnames.txt").write_text("cat\ndog\nhorse\nfish\n")
    smaller = open_classification(classes_folder)
    assert smaller.labels == [n * n % 7 for n in range(30) if n * n % 7 < 4]
    assert smaller.left_out and all(row["reason"].startswith("class_unknown") for row in smaller.left_out)
    assert smaller.content_hash != data.content_hash
