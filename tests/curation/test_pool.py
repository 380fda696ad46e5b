"""Reading samples: every kind of broken one is a row with its reason, and pixels are Pillow's."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import sources
from curation.errors import UserError
from curation.images import MAX_PIXELS, decode
from curation.pool import list_shards, read_row
from curation.tar import open_shard, samples
from tests.curation.conftest import picture, sample, write_tar


def row_of(tmp_path: Path, **members: bytes):
    data = open_shard(write_tar(tmp_path / "one.tar", {"000": members}))
    found, _ = samples(data)
    return read_row(data, found[0])


def test_uid_is_the_jsons_or_the_md5_of_image_and_caption(tmp_path: Path) -> None:
    assert row_of(tmp_path, **sample(7)).uid == f"{7:032x}"
    plain = sample(7, json=b'{"uid": "../../etc"}')
    expected = hashlib.md5(plain["jpg"] + plain["txt"]).hexdigest()
    assert row_of(tmp_path, **plain).uid == expected
    del plain["json"]
    row = row_of(tmp_path, **plain)
    assert (row.uid, row.error) == (expected, None)


def test_caption_comes_from_txt_and_else_from_json(tmp_path: Path) -> None:
    both = sample(1, txt=b"from the text")
    assert row_of(tmp_path, **both).caption == "from the text"
    del both["txt"]
    assert row_of(tmp_path, **both).caption == json.loads(both["json"])["caption"]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({**sample(1), "json": b"{"}, "json_parse"),
        ({**sample(1), "json": b"[1]"}, "json_parse"),
        ({**sample(1), "json": b"[" * 100_000}, "json_parse"),
        ({**sample(1), "txt": b"\xff\xfe"}, "caption_not_utf8"),
        ({"jpg": picture(1), "json": b'{"caption": "\\ud800"}'}, "caption_not_utf8"),
        ({"jpg": picture(1)}, "caption_missing"),
        ({"txt": b"words alone"}, "image_missing"),
        ({**sample(1), "x" * 60: b""}, "unsafe_name"),
    ],
)
def test_broken_members_are_reasons(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    assert row_of(tmp_path, **members).error == reason


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "I;16"])
def test_pixels_and_mode_are_pillows(kind: str, mode: str) -> None:
    buffer = io.BytesIO()
    source = Image.open(io.BytesIO(picture(5, (61, 47), "PNG")))
    image = source.convert("L").convert("I").convert("I;16") if mode == "I;16" else source.convert(mode)
    try:
        image.save(buffer, kind)
    except (OSError, ValueError):
        pytest.skip(f"{kind} has no {mode}")
    raw = buffer.getvalue()
    expected = Image.open(io.BytesIO(raw))
    ours, found, error = decode(raw)
    assert error is None and ours is not None
    assert found == {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}[kind]
    assert ours.mode == expected.mode
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(expected))


def test_bombs_and_damaged_images_are_reasons() -> None:
    buffer = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(buffer, "PNG")
    assert decode(buffer.getvalue())[2] == "decompression_bomb"
    assert decode(picture(1)[:400])[2] == "image_decode"
    assert decode(b"no image at all")[2] == "image_decode"
    assert decode(b"")[2] == "image_decode"
    assert MAX_PIXELS < 30_000 * 30_000


def test_shards_are_in_one_order_whatever_the_pools_order(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        write_tar(tmp_path / folder / "00000.tar", {"1": sample(1)})
    one = list_shards([str(tmp_path / "a"), str(tmp_path / "b")])
    other = list_shards([str(tmp_path / "b"), str(tmp_path / "a"), str(tmp_path / "a")])
    assert one == other and [Path(s.path).parent.name for s in one] == ["a", "b"]


def test_refusals_name_the_pool(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for pools in ([], [str(tmp_path / "absent")], [str(tmp_path / "empty")], ["nosuch://bucket/pool"]):
        with pytest.raises(UserError, match="--pool"):
            list_shards(pools)


def test_a_pool_that_is_named_a_level_too_high(tmp_path: Path) -> None:
    write_tar(tmp_path / "datacomp" / "shards" / "0.tar", {"1": sample(1)})
    (tmp_path / "datacomp" / "shards" / "0_stats.json").write_text("{}")
    (tmp_path / "datacomp" / "metadata").mkdir()
    pq.write_table(pa.table({"uid": ["ab"], "text": ["words"]}), tmp_path / "datacomp" / "metadata" / "a.parquet")
    below = (
        r"datacomp: holds no samples at its top, but shards or tables below, in /.*/metadata, /.*/shards; name these"
    )
    for modality in ("pairs", "images", "texts"):
        with pytest.raises(UserError, match=below):
            list_shards([str(tmp_path / "datacomp")], modality)
    (tmp_path / "datacomp" / "notes.txt").write_text("words")
    assert list_shards([str(tmp_path / "datacomp")], "texts"), "a text beside them is one"
    (tmp_path / "datacomp" / "1.jpg").write_bytes(picture(1))
    assert list_shards([str(tmp_path / "datacomp")]), "and so is a picture"


def test_img2datasets_files_are_folders_beside_their_tables(tmp_path: Path) -> None:
    for shard in range(2):
        (tmp_path / f"{shard:05d}").mkdir()
        for extension, data in sample(shard).items():
            (tmp_path / f"{shard:05d}" / f"{shard:09d}.{extension}").write_bytes(data)
        pq.write_table(pa.table({"key": [f"{shard:09d}"], "caption": ["words"]}), tmp_path / f"{shard:05d}.parquet")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    shards = list_shards([str(tmp_path)])
    assert [shard.path for shard in shards] == [f"{tmp_path}/{shard:05d}#0-1" for shard in range(2)]
    for shard in shards:
        with sources.open_shard(shard.path) as tape:
            (one,), damage = tape.samples()
            assert damage is None and read_row(tape, one).error is None


def test_names_that_leave_the_folder_and_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.jpg", "../up.txt", "twice.jpg", "twice.jpg", "twice.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    data = open_shard(path)
    found, _ = samples(data)
    assert [read_row(data, s).error for s in found] == ["unsafe_name", "caption_missing", "duplicate_key"]
