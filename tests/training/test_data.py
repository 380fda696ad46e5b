"""The loader: one order for any world size, each sample once an epoch, resume without replay, holes for broken ones."""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import tar
from curation.errors import UserError, full_disk_named
from tests.training.conftest import largest_file, write_shards
from training.config import LoaderConfig
from training.data import ImageSpec, Loader, Order, Shards
from training.data.decoded import Decoded

SPEC = ImageSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
CONFIG = LoaderConfig(batch=12, chunk=4, window_shards=2)


def encode(captions):
    return {"number": torch.tensor([int(c.split()[1]) if c else -1 for c in captions])}


def loader(folder, rank=0, world_size=1, cache=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return Loader(Shards(folder), config, SPEC, encode, seed=5, rank=rank, world_size=world_size, cache=cache)


def numbers(chunks):
    return [int(n) for c in chunks for n in c["number"]]


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=9), window=st.integers(1, 10), seed=st.integers(0, 99))
def test_an_epoch_is_a_permutation_and_positions_are_independent(sizes, window, seed):
    total, order = sum(sizes), Order(np.array(sizes), seed, window)
    for epoch in (0, 1):
        drawn = [order(epoch * total + i) for i in range(total)]
        assert {e for e, _, _ in drawn} == {epoch}
        assert sorted((s, i) for _, s, i in drawn) == [(s, i) for s, n in enumerate(sizes) for i in range(n)]
        fresh = [Order(np.array(sizes), seed, window)(epoch * total + i) for i in (total - 1, 0, total // 2)]
        assert fresh == [drawn[i] for i in (total - 1, 0, total // 2)]
        shards_in_turn = [s for _, s, _ in drawn]
        first_window = {s for s in shards_in_turn[: sum(sorted(sizes)[:window])]}
        assert len(first_window) <= window


def test_global_batches_do_not_depend_on_the_world_size(shards):
    alone = [numbers(b) for b in loader(shards).batches(0, 20)]
    halves = [[numbers(b) for b in loader(shards, r, 2).batches(0, 20)] for r in (0, 1)]
    assert alone == [a + b for a, b in zip(*halves)]
    assert sorted(n for batch in alone for n in batch)[:2] == [0, 0]  # 240 draws of 100 samples: epochs follow on
    keys = [[int(k) for k in loader(shards).ids(b)] for b in range(20)]
    assert keys == alone


def test_resuming_is_starting_at_another_batch(shards):
    whole = [numbers(b) for b in loader(shards, threads=3).batches(0, 12)]
    assert [numbers(b) for b in loader(shards).batches(7, 12)] == whole[7:]


def test_pixels_are_the_normalised_picture_with_and_without_the_cache(shards, tmp_path):
    plain = list(loader(shards).batches(0, 9))
    first = list(loader(shards, cache=tmp_path / "decoded.u8").batches(0, 9))
    again = list(loader(shards, cache=tmp_path / "decoded.u8").batches(0, 9))
    for a, b, c in zip(plain, first, again):
        for x, y, z in zip(a, b, c):
            assert torch.equal(x["pixel_values"], y["pixel_values"]) and torch.equal(
                x["pixel_values"], z["pixel_values"]
            )
    chunk = plain[0][0]
    red = chunk["number"] * 37 % 256
    back = chunk["pixel_values"][:, 0].mean((1, 2)) * 0.2 + 0.5
    torch.testing.assert_close(back * 255, red.float(), atol=3.0, rtol=0)  # JPEG moves a flat colour a little


def test_kept_pictures_are_those_written_whole(tmp_path):
    """A hole of the file, a record that was cut, and one with a part of another are decoded again."""
    draws = np.random.default_rng(0)
    first, second = draws.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    kept = Decoded(tmp_path / "kept", side=8)
    kept.write(5, first)
    assert np.array_equal(Decoded(tmp_path / "kept", side=8).read(5), first), "another rank's"
    kept.write(6, second)
    whole = (tmp_path / "kept").read_bytes()
    assert [kept.read(i) for i in (0, 4, 7)] == [None] * 3
    (tmp_path / "kept").write_bytes(whole[:-1])
    assert kept.read(6) is None and np.array_equal(kept.read(5), first)
    (tmp_path / "kept").write_bytes(whole[: len(whole) // 7 * 6 - 40] + bytes(30) + whole[len(whole) // 7 * 6 - 10 :])
    assert kept.read(5) is None and np.array_equal(kept.read(6), second)


def test_kept_pictures_have_their_own_shape_and_another_layout_is_not_misread(tmp_path):
    shapes = [(8, 8), (3, 8), (8, 1), (1, 2)]
    written = [np.random.default_rng(i).integers(0, 256, (*shape, 3), np.uint8) for i, shape in enumerate(shapes)]
    kept = Decoded(tmp_path / "kept", side=8)
    for i in reversed(range(len(shapes))):
        kept.write(i, written[i])
    assert all(np.array_equal(kept.read(i), pixels) for i, pixels in enumerate(written))
    kept.write(0, written[1])
    assert np.array_equal(kept.read(0), written[1]) and kept.read(4) is None
    data = bytearray((tmp_path / "kept").read_bytes())
    data[0], data[4] = data[4], data[0]  # as high as wide it would have the same bytes
    (tmp_path / "kept").write_bytes(data)
    assert kept.read(0) is None and np.array_equal(kept.read(1), written[1])

    squares = [np.full((8, 8, 3), value, np.uint8).tobytes() for value in (1, 2, 3, 4)]  # the first layout's records
    (tmp_path / "old").write_bytes(b"".join(p + zlib.crc32(p).to_bytes(4, "little") for p in squares))
    old = Decoded(tmp_path / "old", side=8)
    assert [old.read(i) for i in range(4)] == [None] * 4


def test_no_room_for_kept_pictures_is_no_broken_picture(shards, tmp_path):
    limit = rf"--out {tmp_path}: a file grows beyond the limit .*make room"
    with largest_file(5 * 16 * 16 * 3), pytest.raises(UserError, match=limit), full_disk_named(tmp_path):
        list(loader(shards, cache=tmp_path / "decoded").batches(0, 9))


def test_one_of_the_captions_is_drawn_by_seed_epoch_and_sample(tmp_path):
    folder = write_shards(tmp_path / "five", [30], captions=lambda n: [f"thing {n * 10 + i}" for i in range(5)])
    epochs = [numbers(b) for b in loader(folder, batch=30, captions="random").batches(0, 4)]
    assert [n // 10 for n in epochs[0]] != sorted(n // 10 for n in epochs[0])
    by_epoch = [{n // 10: n % 10 for n in e} for e in epochs]
    assert len({tuple(sorted(e.items())) for e in by_epoch}) == 4  # another draw each epoch
    assert {c for e in by_epoch for c in e.values()} == {0, 1, 2, 3, 4}
    assert [numbers(b) for b in loader(folder, batch=30, captions="random", threads=4).batches(0, 4)] == epochs


def test_members_are_mixed_by_weight_seed_epoch_and_sample(tmp_path):
    second = {n: f"thing {n + 1000} anew" for n in range(40) if n % 4}
    folder = write_shards(tmp_path / "two", [40], members=lambda n: {"recaption.txt": second[n]} if n in second else {})
    mix = {"txt": 1.0, "recaption.txt": 3.0}
    epochs = [numbers(b) for b in loader(folder, batch=40, captions=mix).batches(0, 60)]
    for n in range(40):
        drawn = [d for e in epochs for d in e if d % 1000 == n]
        share = sum(d >= 1000 for d in drawn) / len(drawn)
        assert share == 0 if n not in second else 0.5 < share < 0.95  # 60 draws of p = 0.75: 4 sigma
    share = np.mean([d >= 1000 for e in epochs for d in e if d % 4])
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 1800)
    assert [numbers(b) for b in loader(folder, batch=40, captions=mix, threads=4).batches(30, 60)] == epochs[30:]
    halves = [[numbers(b) for b in loader(folder, r, 2, batch=40, captions=mix).batches(0, 3)] for r in (0, 1)]
    assert [a + b for a, b in zip(*halves)] == epochs[:3]
    only = loader(folder, batch=40, captions={"recaption.txt": 1.0})
    (chunks,) = only.batches(0, 1)
    assert sum(int((~c["valid"]).sum()) for c in chunks) == only.holes.total() == 10, "no text, no weight"
    assert sorted(Shards(folder).every_caption(mix)) == sorted([*second.values(), *Shards(folder).every_caption()])


def test_a_broken_sample_leaves_a_hole_and_later_ids_do_not_shift(shards, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        data = bytearray(path.read_bytes())
        if path.name == "00000001.tar":
            found, _ = tar.samples(bytes(data))
            broken = found[3].members["jpg"]
            data[broken.offset : broken.offset + broken.size] = bytes(broken.size)
        (folder / path.name).write_bytes(data)
    whole, holed = (list(loader(f).batches(0, 9)) for f in (shards, folder))
    holes = [(int(a["number"][i]), float(b["pixel_values"][i].std())) for x, y in zip(whole, holed)
             for a, b in zip(x, y) for i in range(len(a["number"])) if not b["valid"][i]]  # fmt: skip
    assert [n for n, _ in holes] == [43] * len(holes) and 1 <= len(holes) <= 2
    for a, b in zip(whole, holed):
        rest = [(x, y) for x, y in zip(numbers(a), numbers(b)) if y >= 0]
        assert all(x == y for x, y in rest)


def test_crops_and_flips_are_functions_of_the_position(shards):
    settings = {"decode_size": 24, "crop_scale": (0.5, 0.9), "flip": True}
    once = list(loader(shards, **settings).batches(0, 3))
    twice = list(loader(shards, threads=4, **settings).batches(0, 3))
    assert all(torch.equal(x["pixel_values"], y["pixel_values"]) for a, b in zip(once, twice) for x, y in zip(a, b))


@pytest.mark.parametrize("trouble", ["missing", "empty", "truncated", "one without bytes", "lying sizes"])
def test_bad_shards_are_one_clear_line(shards, tmp_path, trouble):
    folder = tmp_path / "data"
    if trouble != "missing":
        folder.mkdir()
    if trouble == "truncated":
        (folder / "00000000.tar").write_bytes((shards / "00000000.tar").read_bytes()[:9_000])
    if trouble == "one without bytes":
        (folder / "00000000.tar").write_bytes((shards / "00000000.tar").read_bytes())
        (folder / "00000001.tar").touch()
    if trouble == "lying sizes":
        (folder / "00000000.tar").write_bytes((shards / "00000000.tar").read_bytes())
        (folder / "sizes.json").write_text(json.dumps({"00000000.tar": 41}))
    with pytest.raises(UserError, match=str(folder)):
        Shards(folder).key(0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("retain", n) for n in (-1, -64)),
        *(("retain_gib", x) for x in (0.0, -1.0, math.nan)),
        *(("max_tokens", n) for n in (-1, 0, 2)),
        *(("decode_size", n) for n in (0, -8)),
        *(("crop_scale", x) for x in ((0.0, 1.0), (0.9, 0.5), (0.5, 1.5), (math.nan, 1.0))),
        *(("max_error_rate", x) for x in (-0.1, 1.1, math.nan)),
        *(("color_jitter_prob", x) for x in (-0.1, 1.1)),
        ("gray_scale_prob", 2.0),
        *(("color_jitter", x) for x in ((-0.1, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.6))),
    ],
)
def test_numbers_that_no_batch_can_be_made_with_are_one_clear_line(name, value):
    LoaderConfig().check()
    with pytest.raises(UserError, match=rf"^loader\.{name}: ") as error:
        LoaderConfig(**{name: value}).check()
    assert "\n" not in str(error.value)


def test_rows_of_one_caption_are_a_group(tmp_path):
    folder = write_shards(tmp_path / "same", [9], captions=lambda n: [f"thing {n % 3}"])
    ((chunk,),) = loader(folder, batch=9, chunk=9, captions="random").batches(0, 1)
    texts, groups = chunk["number"].tolist(), chunk["groups"].tolist()
    assert sorted(texts) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(set(groups)) == 3 and len(set(zip(texts, groups))) == 3
