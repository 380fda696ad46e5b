"""Shards from afar: fetched when needed, once a host, evicted; gone, lying or damaged ones; the error budget."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import pytest
import torch
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from curation import files, tar
from curation.errors import UserError
from curation.hashing import hash64
from tests.training.conftest import write_shards
from training.config import LoaderConfig
from training.data import Budget, ImageSpec, Loader, Shards, keep_counts, open_sources
from training.data.cache import ShardCache

SPEC = ImageSpec(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
SIZES = [6, 5, 4, 7, 5, 6, 3, 4]


class Counted(MemoryFileSystem):
    """A store that counts what is downloaded, and can fail."""

    protocol = "counted"
    store, pseudo_dirs = {}, [""]
    fetched: list[str] = []  # noqa: RUF012
    failures = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("counted://", "memory://"))

    def get_file(self, rpath, lpath, **kwargs):
        if Counted.failures:
            Counted.failures -= 1
            raise ConnectionError("the line broke")
        super().get_file(rpath, lpath, **kwargs)
        Counted.fetched.append(rpath.rpartition("/")[2])


register_implementation("counted", Counted, clobber=True)


@pytest.fixture
def remote(tmp_path):
    folder = write_shards(tmp_path / "here", SIZES)
    (folder / "sizes.json").write_text(json.dumps({f"{n:08d}.tar": size for n, size in enumerate(SIZES)}))
    Counted.store.clear()
    Counted.pseudo_dirs[:] = [""]
    store = Counted()
    for path in folder.iterdir():
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    Counted.fetched, Counted.failures = [], 0
    return folder


def encode(captions):
    return {"input_ids": torch.tensor([int(c.split()[1]) if c else -1 for c in captions])}


def loader(sources, **changes):
    config = dataclasses.replace(LoaderConfig(batch=8, chunk=4, window_shards=2, prefetch=0), **changes)
    return Loader(sources, config, SPEC, encode, seed=5, rank=0, world_size=1)


def numbers(batches):
    return [int(n) for chunks in batches for c in chunks for n in c["input_ids"]]


def open_remote(tmp_path, **changes):
    config = LoaderConfig(window_shards=2, cache_dir=str(tmp_path / "cache"), **changes)
    return open_sources(config, {"data": "counted://bucket"})


def test_remote_shards_give_the_same_batches_and_are_fetched_a_window_ahead(remote, tmp_path):
    expected = numbers(loader(Shards(remote)).batches(0, 10))
    sources = open_remote(tmp_path)
    assert Counted.fetched == [], "sizes.json is all that is read at the start"
    it = loader(sources)
    seen, batches = [], it.batches(0, 10)
    order = it.orders[0]
    for number, chunks in enumerate(batches):
        seen.append(chunks)
        allowed = {f"{s:08d}.tar" for p in range(8 * number + 8) for s in order.ahead(p)}
        assert set(Counted.fetched) <= allowed, "the window in hand and the next, nothing else"
    assert numbers(seen) == expected
    assert sorted(Counted.fetched) == [f"{n:08d}.tar" for n in range(8)], "each once in two epochs"


def test_what_is_cached_is_not_fetched_again_and_a_changed_shard_is(remote, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1 << 30)
    file = files.listed("counted://bucket")[0]
    ranks = [threading.Thread(target=ShardCache(tmp_path / "cache", 1 << 30).open, args=(file,)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert bytes(cache.open(file)) == (remote / "00000000.tar").read_bytes() and len(Counted.fetched) == 1
    cache.open(dataclasses.replace(file, stamp="another"))
    assert len(Counted.fetched) == 2


def test_the_least_recently_used_is_evicted_and_stays_readable(remote, tmp_path):
    listed = [f for f in files.listed("counted://bucket") if f.name.endswith(".tar")]
    limit = sum(sorted((f.size for f in listed), reverse=True)[:3])
    cache = ShardCache(tmp_path / "cache", limit)
    first = cache.open(listed[0])
    before = bytes(first)

    def held():
        return {p.name[-12:] for p in (tmp_path / "cache").glob("*.tar")}

    for n in (1, 2, 0, 3):
        cache.open(listed[n])
        assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("*.tar")) <= limit
    assert "00000001.tar" not in held() and {"00000000.tar", "00000003.tar"} <= held()
    for f in listed[4:]:
        cache.open(f)
    assert "00000000.tar" not in held() and bytes(first) == before, "a map outlives its file"
    assert not list((tmp_path / "cache").glob(".*.part"))


def test_a_broken_line_is_tried_again_and_a_dead_one_is_one_clear_line(remote, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSE", 0.0)
    cache, file = ShardCache(tmp_path / "cache", 1 << 30), files.listed("counted://bucket")[0]
    Counted.failures = 2
    assert len(cache.open(file)) == file.size
    Counted.failures = 99
    with pytest.raises(UserError, match=r"--data .*00000001.tar: cannot be read, 5 times"):
        cache.open(files.listed("counted://bucket")[1])
    assert {p.suffix for p in (tmp_path / "cache").iterdir() if not p.name.startswith(".lock")} == {".tar"}


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_shard_that_vanishes_in_mid_run_leaves_counted_holes(remote, tmp_path, where):
    expected = numbers(loader(Shards(remote)).batches(0, 5))
    it = loader(Shards(remote) if where == "here" else open_remote(tmp_path))
    last = it.orders[0](38)[1]  # a shard of the last window of the first epoch
    (remote / f"{last:08d}.tar").unlink()
    Counted().rm_file(f"/bucket/{last:08d}.tar")
    found = numbers(it.batches(0, 5))
    gone = [a for a, b in zip(expected, found) if b < 0]
    first = int(np.cumsum([0, *SIZES])[last])
    assert sorted(gone) == list(range(first, first + SIZES[last]))
    assert all(a == b for a, b in zip(expected, found) if b >= 0), "nothing else moves"
    assert it.holes == {"shard_gone": SIZES[last]}


def test_a_remote_pool_needs_sizes_and_a_cache_that_holds_two_windows(remote, tmp_path):
    with pytest.raises(UserError, match=r"loader.cache_gib: .*two windows of 2 shards"):
        open_remote(tmp_path, cache_gib=1e-5)
    Counted().rm_file("/bucket/sizes.json")
    with pytest.raises(UserError, match=r"neither sizes.json nor index.json"):
        open_remote(tmp_path)
    shards = [{"url": f"{n:08d}.tar", "nsamples": size} for n, size in enumerate(SIZES)]
    Counted().pipe_file("/bucket/index.json", json.dumps({"shardlist": shards}).encode())
    (source,) = open_remote(tmp_path)
    assert source.samples.sizes.tolist() == SIZES and Counted.fetched == []


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"00000000.tar": 5, "00000001.tar": 3}, "says 3 samples for 00000001.tar, found 4; build"),
        ({"00000000.tar": 5}, "says None samples for 00000001.tar"),
        ({"00000000.tar": 5, "00000001.tar": 4, "00000002.tar": 1}, "for 00000002.tar, found no such file"),
        ({"00000000.tar": -5, "00000001.tar": 4}, "is broken"),
        ([1, 2], "is broken"),
    ],
)
def test_sizes_that_lie_are_one_clear_line(tmp_path, sizes, said):
    folder = write_shards(tmp_path / "data", [5, 4])
    (folder / "sizes.json").write_text(json.dumps(sizes))
    with pytest.raises(UserError, match=said) as raised:
        list(loader(Shards(folder)).batches(0, 2))
    assert str(folder / "sizes.json") in str(raised.value) and "\n" not in str(raised.value)


def test_shards_that_do_not_say_their_size_are_counted_once(tmp_path, monkeypatch):
    folder, counts, read = write_shards(tmp_path / "data", SIZES), tmp_path / "run" / "counts", []
    data, samples = {"data": str(folder)}, tar.samples
    monkeypatch.setattr(tar, "samples", lambda bytes_: read.append(1) or samples(bytes_))
    sources = open_sources(LoaderConfig(), data, counts)
    assert len(read) == 8 and sources[0].samples.sizes.tolist() == SIZES
    keep_counts(sources, counts)
    before = counts.stat().st_mtime_ns
    again = open_sources(LoaderConfig(), data, counts)
    assert len(read) == 8 and again[0].samples.sizes.tolist() == SIZES
    assert numbers(loader(again).batches(0, 5)) == numbers(loader(Shards(folder)).batches(0, 5))
    keep_counts(again, counts)
    assert counts.stat().st_mtime_ns == before, "nothing new"
    other = write_shards(tmp_path / "other", [9])
    (folder / "00000003.tar").write_bytes((other / "00000000.tar").read_bytes())
    read.clear()
    changed = open_sources(LoaderConfig(), data, counts)
    assert len(read) == 1 and changed[0].samples.sizes.tolist() == [*SIZES[:3], 9, *SIZES[4:]]


def test_few_shards_stay_open(tmp_path):
    shards = Shards(write_shards(tmp_path / "data", [2] * 12), keep=3)
    for i in range(24):
        assert shards.sample(i)["uid"] == f"{i:032x}"
        assert len(shards._open) <= 3
    assert [shards.key(i) for i in (23, 0)] == ["000023", "000000"]


def test_holes_are_counted_by_reason(tmp_path):
    def parts(n):
        from PIL import Image

        Image.new("RGB", (20, 20)).save(tmp_path / "p.jpg")
        jpg, text = (tmp_path / "p.jpg").read_bytes(), f"thing {n}".encode()
        return {
            0: {"jpg": jpg, "txt": text},
            1: {"txt": text},
            2: {"jpg": jpg},
            3: {"jpg": jpg, "txt": b"\xff\xfe"},
            4: {"jpg": b"\xff\xd8\xffrubbish", "txt": text},
            5: {"jpg": jpg, "txt": text, "json": b"{"},
            6: {"jpg": jpg, "txt": text, "json": b'{"captions": 7}'},
            7: {"jpg": jpg, "txt": text, "json": b"[]"},
        }[n]

    out = []
    for n in range(8):
        for extension, payload in parts(n).items():
            out += [tar.header(f"{n}.{extension}", len(payload)), payload]
            out += [bytes(tar.padded(len(payload)) - len(payload))]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.tar").write_bytes(b"".join([*out, tar.END]))
    it = loader(Shards(tmp_path / "data"), threads=3)
    (chunks,) = it.batches(0, 1)
    assert it.holes == {
        **{r: 1 for r in ("image_missing", "caption_missing", "caption_not_utf8", "image_broken", "captions_broken")},
        "json_broken": 2,
    }
    assert sum(int(c["valid"].sum()) for c in chunks) == 1


def test_half_a_surrogate_pair_in_the_json_ends_no_run(tmp_path):
    """json may hold one and UTF-8 may not: it is hashed as what it is, others as ever."""
    half, folder = "\ud83d", write_shards(tmp_path / "data", [8])
    (tar_file,) = folder.glob("*.tar")
    raw = bytearray(tar_file.read_bytes())
    for member in tar.members(bytes(raw)):
        number, _, extension = member.name.partition(".")
        if extension == "json" and int(number) < 4:
            changed = {"uid": half + number} if int(number) < 2 else {"uid": number, "group": half}
            raw[member.offset : member.offset + member.size] = json.dumps(changed).encode().ljust(member.size)
    tar_file.write_bytes(raw)
    it = loader(Shards(folder))
    (chunks,) = it.batches(0, 1)
    assert it.holes == {} and all(c["valid"].all() for c in chunks)
    assert len({int(d) for c in chunks for d in c["draws"]}) == 8, "each its own draw"
    groups = {int(n): int(g) for c in chunks for n, g in zip(c["input_ids"], c["groups"])}
    assert groups[2] == groups[3] and len(set(groups.values())) == 7
    digest = hashlib.blake2b("0\x00a\x00é".encode(), digest_size=8).digest()
    assert hash64(0, "a", "é") == int.from_bytes(digest, "little")


def test_the_uid_decides_what_is_drawn_and_the_key_only_without_one(tmp_path):
    one, two = (write_shards(tmp_path / name, [3], members=lambda n: {}) for name in ("one", "two"))
    raw = bytearray((two / "00000000.tar").read_bytes())
    for member in tar.members(bytes(raw)):  # other keys, the same uids
        at = member.offset - tar.BLOCK
        raw[at : at + tar.BLOCK] = tar.header("k" + member.name, member.size)
    (two / "00000000.tar").write_bytes(raw)
    rows = [[loader(Shards(f)).row("pairs", (0, p)).draw for p in range(3)] for f in (one, two)]
    assert rows[0] == rows[1] and Shards(two).key(0) == "k000000"
    assert sorted(rows[0]) == sorted(hash64(5, 0, f"{i:032x}") for i in range(3))


def test_the_budget_sees_a_bad_stretch_late_in_a_long_run():
    budget = Budget(0.01, 1_000)
    for step in range(1, 101):
        budget.check(step * 100, {"image_broken": step // 2})  # 0.5 % throughout
    with pytest.raises(UserError, match=r"25 of the last 1000 samples .*\(shard_gone 20, image_broken 5\)"):
        budget.check(10_100, {"image_broken": 50, "shard_gone": 20})
    with pytest.raises(UserError, match="2 of the last 100 samples"):
        Budget(0.01, 1_000).check(100, {"unreadable": 2})
    Budget(0.01, 1_000).check(100, {"unreadable": 1})


def test_one_hole_is_no_share_of_a_run_that_has_begun():
    budget = Budget(0.01, 1_000)
    budget.check(32, {"image_broken": 1})
    budget.check(64, {"image_broken": 1})
    with pytest.raises(UserError, match="2 of the last 96 samples"):
        budget.check(96, {"image_broken": 2})
    with pytest.raises(UserError, match="1 of the last 32 samples"):
        Budget(0.0, 1_000).check(32, {"image_broken": 1})


def test_pictures_without_regions_are_no_errors_unless_there_is_nothing_else():
    budget = Budget(0.01, 1_000)
    budget.check(500, {"region_none": 400})
    budget.check(1_000, {"region_none": 900, "region_broken": 10})
    with pytest.raises(UserError, match=r"11 of the last 1000 samples .*\(region_broken 11\)"):
        Budget(0.01, 1_000).check(1_000, {"region_none": 900, "region_broken": 11})
    with pytest.raises(UserError, match=r"1000 of the last 1000 samples .*region_none 1000"):
        Budget(0.01, 1_000).check(1_000, {"region_none": 1_000})


def test_a_resumed_run_keeps_its_budgets_past():
    """A shard that vanishes late is within the budget of the run, and not of the steps since a resume."""

    def holes(step):
        return {"shard_gone": min(9, max(0, step - 50))}

    whole = Budget(0.01, 1_000)
    for step in range(1, 80):
        whole.check(step * 100, holes(step))
        if step == 51:
            kept = json.loads(json.dumps(whole.state()))
    resumed = Budget(0.01, 1_000)
    resumed.restore(kept)
    for step in range(52, 80):
        resumed.check(step * 100, holes(step))
    assert resumed.state() == whole.state()
    for budget in (whole, resumed):
        with pytest.raises(UserError, match="11 of the last 1000 samples"):
            budget.check(8_000, {"shard_gone": 20})
