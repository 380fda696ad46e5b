"""The same pictures as tars, parquet, lists and folders, here and behind a URL: one set of verdicts, one set of bytes.

What should be in the shards is read by tarfile, pyarrow, csv and from the disk,
never by what is tested. Workers run in this process, because memory:// is its own.
"""

import csv
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import files, phases, pipeline
from curation.config import parse_config
from curation.inspection import inspect
from curation.pipeline import curate
from curation.sources import open_shard
from curation.workers import Workers
from tests.curation.conftest import picture, write_tar
from tests.curation.test_kill import here

PAIRS = 30
RECIPE: dict[str, Any] = {
    "signals": {"text": {"kind": "text"}, "image": {"kind": "image"}, "fingerprints": {"kind": "fingerprints"}},
    "selectors": {
        "long": {"kind": "threshold", "column": "caption_words", "min": 7},
        "copies": {"kind": "exact_duplicates"},
    },
    "unit_samples": 7,
    "shard_samples": 8,
    "max_error_rate": 1,
}
SIGNALS = ("caption_words", "width", "min_side", "image_bytes", "image_format", "image_sha256", "phash")


def uid(n: int) -> str:
    return f"{n:032x}"


def caption(n: int) -> str:
    return f'picture {n}, of „this" and\nthat' + " with more words to it" * (n % 3 > 0)


def image(n: int) -> bytes:
    if n == 17:
        return picture(17)[:200]  # cannot be decoded
    kind = ("JPEG", "PNG", "WEBP")[n % 3]
    return picture(4, kind="PNG") if n in (4, 10) else picture(n, (64 + n, 48), kind)


def extension(n: int) -> str:
    return "jpg" if n == 17 else "png" if n in (4, 10) else ("jpg", "png", "webp")[n % 3]


def url(n: int) -> str:
    return f"https://example.org/{n}"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "map", here)
    for module in (phases, pipeline):
        monkeypatch.setattr(module, "write_report", lambda *a, **k: None)


def as_tars(folder: Path) -> Path:
    for shard in range(2):
        chosen = range(shard * 15, shard * 15 + 15)
        rows = {n: {"uid": uid(n), "url": url(n), "caption": caption(n)} for n in chosen}
        samples = {
            f"{n:09d}": {extension(n): image(n), "txt": caption(n).encode(), "json": json.dumps(rows[n]).encode()}
            for n in chosen
        }
        write_tar(folder / f"{shard:05d}.tar", samples)
    return folder


def as_parquet(folder: Path, struct: bool) -> Path:
    folder.mkdir()
    images = [{"bytes": image(n), "path": f"{n}.anything"} if struct else image(n) for n in range(PAIRS)]
    columns = {"TEXT": [caption(n) for n in range(PAIRS)], "URL": [url(n) for n in range(PAIRS)]}
    table = pa.table({"uid": [uid(n) for n in range(PAIRS)], "image": images, **columns})
    for shard in range(2):  # row groups that are no multiple of a unit
        pq.write_table(table.slice(shard * 15, 15), folder / f"part-{shard}.parquet", row_group_size=4)
    return folder


def write_pictures(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    for n in range(PAIRS):
        (folder / "deep" / f"{n:03d}.{extension(n)}").write_bytes(image(n))


def as_csv(folder: Path) -> Path:
    write_pictures(folder)
    with open(folder / "metadata.csv", "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["file_name", "text", "uid", "url"])
        rows.writerows([f"deep/{n:03d}.{extension(n)}", caption(n), uid(n), url(n)] for n in range(PAIRS))
    return folder


def as_jsonl(folder: Path) -> Path:
    write_pictures(folder)
    lines = [
        json.dumps({"file_name": f"deep/{n:03d}.{extension(n)}", "caption": caption(n), "uid": uid(n), "url": url(n)})
        for n in range(PAIRS)
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


def as_stems(folder: Path) -> Path:
    write_pictures(folder)
    for n in range(PAIRS):
        (folder / "deep" / f"{n:03d}.txt").write_bytes(caption(n).encode())
        (folder / "deep" / f"{n:03d}.json").write_text(json.dumps({"uid": uid(n), "url": url(n)}))
    return folder


LAYOUTS = {
    "tars": as_tars,
    "parquet": partial(as_parquet, struct=False),
    "parquet_struct": partial(as_parquet, struct=True),
    "csv": as_csv,
    "jsonl": as_jsonl,
    "stems": as_stems,
}


def memory(folder: Path) -> str:
    fs = fsspec.filesystem("memory")
    target = f"/{folder.parent.name}/{folder.name}"
    fs.put(str(folder), target, recursive=True)
    return f"memory:/{target}"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """The address at which a server of this machine shows tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # else requests side by side wait a second each to be let in

    server = Server(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def outcome(out: Path) -> dict[str, tuple[Any, ...]]:
    """By uid: verdict, reason and signals."""
    manifest = json.loads((out / "measure.manifest.json").read_text())
    found = {}
    for part in manifest["parts"]:
        signals = pq.read_table(out / manifest["signal_set"] / part).to_pylist()
        for signal, row in zip(signals, pq.read_table(out / "ledger" / part).to_pylist(), strict=True):
            values = (signal[name] for name in ("caption", "url", *SIGNALS))
            found[row["uid"]] = (row["verdict"], row["reason"], *values)
    return found


def shipped(out: Path) -> list[tuple[str, str, bytes]]:
    """(output shard, name, bytes) of the members, in order; json as what it says of uid and url."""
    found = []
    for path in sorted((out / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                content = tar.extractfile(info).read()  # type: ignore[union-attr]
                if info.name.endswith(".json"):
                    said = json.loads(content)
                    content = json.dumps([said["uid"], said["url"]]).encode()
                found.append((path.name, info.name, content))
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[tuple[str, str, bytes]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workers, "map", here)
        for module in (phases, pipeline):
            patch.setattr(module, "write_report", lambda *a, **k: None)
        folder = tmp_path_factory.mktemp("expected")
        curate(parse_config(RECIPE), pools=[str(as_tars(folder / "pool"))], out=folder / "out")
    return outcome(folder / "out"), shipped(folder / "out")


def test_what_is_expected_is_what_was_put_in(expected: tuple[dict[str, Any], list[tuple[str, str, bytes]]]) -> None:
    verdicts, members = expected
    assert len(verdicts) == PAIRS and {v[1] for v in verdicts.values()} == {None, "long", "copies", "image_decode"}
    by_name = {name: content for _, name, content in members}
    kept = [n for n in range(PAIRS) if verdicts[uid(n)][0] == "kept"]
    assert len(kept) > 10 and len(by_name) == 3 * len(kept)
    for n in kept:
        assert by_name[f"{uid(n)}-0.{extension(n)}"] == image(n)
        assert by_name[f"{uid(n)}-0.txt"] == caption(n).encode()


@pytest.mark.parametrize(
    ("layout", "where"), [("tars", "file"), *((layout, w) for layout in LAYOUTS for w in ("here", "memory", "http"))]
)
def test_every_layout_gives_the_same(
    layout: str,
    where: str,
    tmp_path: Path,
    served: str,
    expected: tuple[dict[str, Any], list[tuple[str, str, bytes]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = LAYOUTS[layout](tmp_path / "pool")
    monkeypatch.setattr("curation.sources.folder.SHARD_ENTRIES", 15)
    pool = {"here": str(folder), "file": f"file://{folder}", "memory": memory(folder), "http": f"{served}/pool"}[where]
    if where == "http" and layout in ("csv", "jsonl"):
        pool += "/metadata.csv" if layout == "csv" else "/captions.jsonl"
    fetches: list[str] = []
    fetched = files.fetched
    monkeypatch.setattr(files, "fetched", lambda name: (fetches.append(name), fetched(name))[1])
    out = tmp_path / "out"
    manifest = curate(parse_config(RECIPE), pools=[pool], out=out)
    assert manifest["seen"] == PAIRS
    verdicts, members = expected
    assert outcome(out) == verdicts
    order = ["jpg", "png", "webp", "txt", "json"]
    assert {name: content for _, name, content in shipped(out)} == {name: content for _, name, content in members}
    assert [name for _, name, _ in shipped(out) if name.rpartition(".")[2] in order[:3]] == [
        name for _, name, _ in members if name.rpartition(".")[2] in order[:3]
    ]
    if (where, layout) == ("http", "tars") or (where == "memory" and layout in ("tars", "parquet", "parquet_struct")):
        assert len(fetches) == 4 and len(set(fetches)) == 2, "each shard once in measure and once in build"

    shown = inspect(uid(12), out)[0]
    assert Path(shown["picture"]).read_bytes() == image(12)
    ledger = pq.read_table(sorted((out / "ledger").glob("*"))[0])["shard"][0].as_py()
    with open_shard(ledger) as tape:
        assert tape is not None


def test_a_grown_pool_behind_a_url_is_measured_only_where_it_is_new(tmp_path: Path) -> None:
    pool, config = memory(as_tars(tmp_path / "pool")), parse_config(RECIPE)
    for run, new in (("a", PAIRS), ("b", 0)):
        curate(config, pools=[pool], out=tmp_path / run, signals=tmp_path / "signals")
        assert json.loads((tmp_path / run / "measure.manifest.json").read_text())["measured"] == new
    write_tar(tmp_path / "more.tar", {"x": {"jpg": picture(99), "txt": b"one more"}})
    fsspec.filesystem("memory").put(str(tmp_path / "more.tar"), f"{pool.removeprefix('memory:/')}/more.tar")
    curate(config, pools=[pool], out=tmp_path / "c", signals=tmp_path / "signals")
    assert json.loads((tmp_path / "c" / "measure.manifest.json").read_text())["measured"] == 1


def test_a_list_that_grew_at_its_end_is_measured_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("curation.sources.folder.SHARD_ENTRIES", 12)
    pool, config = as_jsonl(tmp_path / "pool"), parse_config(RECIPE)
    curate(config, pools=[str(pool)], out=tmp_path / "a", signals=tmp_path / "signals")
    with open(pool / "captions.jsonl", "a") as f:
        f.write('\n{"file_name": "deep/001.png", "caption": "once more"}')
    curate(config, pools=[str(pool)], out=tmp_path / "b", signals=tmp_path / "signals")
    manifest = json.loads((tmp_path / "b" / "measure.manifest.json").read_text())
    assert (manifest["seen"], manifest["measured"]) == (PAIRS + 1, PAIRS + 1 - 24)
