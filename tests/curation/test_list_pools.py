"""Lists of captions and folders of files: what a shard of them costs, and what of a broken list is still read.

Rows are read by the csv and json modules for comparison; costs are counted in calls and bytes, never in seconds.
"""

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec
import pytest

from curation import files
from curation.pool import Shard, list_shards
from curation.sources import folder, lists, open_shard, whole_shard
from curation.sources.lists import BROKEN, all_rows, rows_between
from curation.tar import Sample


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "SHARD_ENTRIES", 10)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of those functions by which files are known and read, and the bytes that came."""
    counted: Counter[str] = Counter()
    lock = Lock()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = function(*arguments, **options)
            with lock:
                counted[name] += 1
                counted["bytes"] += len(found) if isinstance(found, bytes) else 0
            return found

        return call

    for name in ("look", "listed", "fetched", "opened", "read"):
        monkeypatch.setattr(files, name, counting(name, getattr(files, name)))
    for name in ("stat", "scandir"):
        monkeypatch.setattr(files.os, name, counting(name, getattr(files.os, name)))
    return counted


def as_list(where: Path, entries: int) -> str:
    where.mkdir()
    for n in range(entries):
        (where / f"{n:06d}.jpg").write_bytes(b"bytes of a picture %06d" % n)
    (where / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{n:06d}.jpg,caption {n:06d}\n" for n in range(entries))
    )
    return str(where)


def as_names(where: Path, entries: int) -> str:
    where.mkdir()
    for n in range(entries):
        (where / f"{n:06d}.jpg").write_bytes(b"bytes of a picture %06d" % n)
        (where / f"{n:06d}.txt").write_text(f"caption {n:06d}")
    return str(where)


def in_memory(pool: str) -> str:
    target = f"/{Path(pool).parent.name}/{Path(pool).name}"
    fsspec.filesystem("memory").put(pool, target, recursive=True)
    return f"memory:/{target}"


def contents(shard: Shard) -> list[tuple[str, dict[str, bytes], str | None]]:
    with whole_shard(shard.path, shard.fingerprint) as tape:
        found: list[Sample] = tape.samples()[0]
        return [(s.key, {e: tape[m.offset : m.offset + m.size] for e, m in s.members.items()}, s.error) for s in found]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("layout", [as_list, as_names])
def test_what_a_shard_costs_does_not_grow_with_the_pool(
    layout: Callable[[Path, int], str],
    remote: bool,
    tmp_path: Path,
    costs: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lists, "HEADER", 64)  # else all of a small list is read for it
    spent = {}
    for entries in (40, 400):
        pool = layout(tmp_path / f"pool_{entries:03d}", entries)
        shards = list_shards([in_memory(pool) if remote else pool])
        assert len(shards) == entries // 10
        assert [key for shard in shards for key, _, _ in contents(shard)] == [f"{n:06d}" for n in range(entries)]
        costs.clear()
        last = shards[-1]
        assert contents(last)[-1][1]["txt"] == b"caption %06d" % (entries - 1)
        spent[entries] = dict(costs)
        costs.clear()
        with open_shard(last.path) as tape:
            assert tape[3 << 40 : (3 << 40) + 25] == b"bytes of a picture %06d" % (entries - 7)
        assert costs["look"] <= 2, "files of other samples were asked for"
    assert spent[40] == spent[400]
    assert "listed" not in spent[400] and "fetched" not in spent[400] and "scandir" not in spent[400]


def test_a_folder_is_listed_once_by_a_process(tmp_path: Path, costs: Counter[str]) -> None:
    shards = list_shards([as_names(tmp_path / "pool", 100)])
    costs.clear()
    for shard in shards:
        contents(shard)
    assert costs["listed"] == 1


def test_names_that_are_older_than_the_listing_are_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = as_names(tmp_path / "pool", 20)
    contents(list_shards([pool])[0])
    (tmp_path / "pool" / "000000a.jpg").write_bytes(b"between the first and the second")
    with monkeypatch.context() as patch:  # as if another process listed it
        patch.setattr(folder, "forget_names", lambda: None)
        shards = list_shards([pool])
    assert [key for key, _, _ in contents(shards[0])][:3] == ["000000", "000000a", "000001"]


def test_a_full_shard_stays_when_its_list_grows(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"number {n}"}) for n in range(20)))  # no end of the last line
    before = list_shards([str(path)])
    with open(path, "a") as f:
        f.write('\n{"text": "one more"}\n')
    after = list_shards([str(path)])
    assert [(s.path, s.fingerprint) for s in after if "#20-" not in s.path] == [(s.path, s.fingerprint) for s in before]
    assert len(after) == 3


def texts(seed: int) -> list[list[str]]:
    rng = random.Random(seed)
    pieces = ["word", ",", "\t", '"', "\n", "\r\n", "\r", "é", "\u2028", " ", "\x1c", "\0"]
    return [["".join(rng.choices(pieces, k=rng.randrange(6))) for _ in range(3)] for _ in range(60)]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_any_stretch_of_rows_is_read_as_csv_reads_it(tmp_path: Path, kind: str, line_end: str, start: bytes) -> None:
    buffer = io.StringIO(newline="")
    delimiter = "\t" if kind == "tsv" else ","
    for row in [["text", "two\nlines", "c"], *texts(len(line_end))]:
        quotes = csv.QUOTE_ALL if any("\n" in text or "\r" in text for text in row) else csv.QUOTE_MINIMAL
        csv.writer(buffer, delimiter=delimiter, lineterminator=line_end, quoting=quotes).writerow(row)
        buffer.write(line_end * (len(row[0]) % 2))  # an empty line
    raw = start + buffer.getvalue().encode().replace("é".encode(), b"\xe9")
    path = tmp_path / f"texts.{kind}"
    path.write_bytes(raw)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
        expected = list(csv.DictReader(f, delimiter=delimiter))
    found = list(all_rows(str(path)))
    assert [row for _, _, row in found] == expected and len(expected) == 60
    for first, last in ((0, 0), (0, 59), (7, 31), (59, 59)):
        assert list(rows_between(str(path), found[first][0], found[last][1])) == found[first : last + 1]


def test_a_broken_row_is_that_row_alone(tmp_path: Path) -> None:
    sound = [[f"{n}.jpg", f"words, and {n}" if n % 3 else f"words {n}"] for n in range(6000)]
    buffer = io.StringIO(newline="")
    written = csv.writer(buffer, lineterminator="\n")
    written.writerow(["file_name", "text"])
    written.writerows(sound)
    lines = buffer.getvalue().splitlines()
    broken = {
        100: '100.jpg,"never closed',  # and quotes follow soon
        3000: f"3000.jpg,{'x' * 200_000}",  # longer than a field may be
        3001: f'3001.jpg,"{"x" * 200_000}"',
        5999: '5999.jpg,"the end of the file',
    }
    for n, line in broken.items():
        lines[n + 1] = line
    lines[201] = '200.jpg,"odd" quotes, "as" ever'  # three fields
    lines[202] = '201.jpg,"odd" quotes'  # garbled, and read as csv reads it
    path = tmp_path / "metadata.csv"
    path.write_text("\n".join(lines) + "\n")
    expected: list[Any] = [dict(zip(("file_name", "text"), row)) for row in sound]
    for n in (*broken, 200):
        expected[n] = BROKEN
    expected[201] = {"file_name": "201.jpg", "text": "odd quotes"}
    found = list(all_rows(str(path)))
    assert [row for _, _, row in found] == expected
    for first, last in ((0, 100), (100, 100), (100, 3001), (3000, 3000), (3001, 5999), (5999, 5999)):
        assert list(rows_between(str(path), found[first][0], found[last][1])) == found[first : last + 1]


def test_an_open_quote_in_a_list_without_others(tmp_path: Path) -> None:
    """It would else take the next 131,072 characters along, or in a shorter list all that follows as one caption."""
    for rows in (30, 9000):
        path = tmp_path / f"{rows}.csv"
        path.write_text("file_name,text\n" + "".join(f"{n}.jpg,{chr(34) * (n == 5)}words {n}\n" for n in range(rows)))
        expected: list[Any] = [{"file_name": f"{n}.jpg", "text": f"words {n}"} for n in range(rows)]
        expected[5] = BROKEN
        assert [row for _, _, row in all_rows(str(path))] == expected


def test_a_list_without_a_header_is_damaged_whoever_reads_it(tmp_path: Path) -> None:
    for name, header in (("open", 'file_name,"text'), ("long", "file_name,text," + "x" * 70_000)):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"{header}\n" + "1.jpg,words\n" * 10_000)
        (shard,) = list_shards([str(path)])
        with whole_shard(shard.path, shard.fingerprint) as tape:
            found, damage = tape.samples()
        assert found == [] and damage is not None and damage.startswith("list_unreadable: no header")
