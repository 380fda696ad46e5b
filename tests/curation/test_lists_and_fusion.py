"""Block lists, decontamination and score fusion against plain Python, over parts cut in two ways."""

from contextlib import nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.manifest import write_manifest
from curation.selection import decontamination
from curation.selection.block_list import BlockList
from curation.selection.decontamination import Decontamination
from curation.selection.engine import Part
from curation.selection.fraction import Fraction
from curation.selection.fusion import ScoreFusion
from curation.selection.interface import Selector
from curation.selection.language import LanguageIs
from curation.selection.threshold import Threshold
from tests.conftest import ROOT
from tests.curation.selecting import select
from tests.curation.test_selection import keeps, valid_of, write_parts

ROWS, WIDTH = 10_000, 24
HOSTS = """example.com EXAMPLE.com:8080 user:p@ss@example.com img.example.com. a.b.example.com notexample.com
example.com.evil.org example.org com fine.net FINE.net:80 [::1]:80 192.168.0.1 x@fine.net sub.fine.net finer.net
.example.com münchen.de deep.down.blocked.co.uk blocked.co.uk:443 co.uk"""
SHAPES = ["http://{}/a", "HTTPS://{}", "//{}/x?u=//example.com/", "ftp://{}?@example.com", " http://{}#@fine.net"]
ODD = [None, "", "example.com/a.jpg", "data:image/png;base64,AA", "http://", "no url", "/example.com/x"]


def with_identity(table: pa.Table, identity: str) -> pa.Table:
    fields = [field.with_metadata({"identity": f"{identity} {field.name}"}) for field in table.schema]
    return table.cast(pa.schema(fields))


def measured(folder: Path, tables: list[pa.Table]) -> str:
    """An OUT folder with a finished measure of these parts."""
    folder.mkdir()
    names = [f"{n}.parquet" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        pq.write_table(table, folder / name)
    write_manifest(folder / "measure.manifest.json", {"signal_set": str(folder), "parts": names})
    return str(folder)


def pictures(rng: np.random.Generator, rows: int, start: int) -> tuple[list[bytes], list[int], np.ndarray]:
    hashes = [int(h) for h in rng.integers(0, 2**64, rows, dtype=np.uint64)]
    return [(start + i).to_bytes(32, "big") for i in range(rows)], hashes, rng.normal(size=(rows, WIDTH))


def picture_table(digests: list[bytes], hashes: list[int], points: np.ndarray, error: list[str | None]) -> pa.Table:
    bad = np.array([e is not None for e in error])
    unit = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
    return pa.table(
        {
            "error": pa.array(error, pa.string()),
            "image_sha256": pa.array(digests, pa.binary(32), mask=bad),
            "phash": pa.array(np.array(hashes, np.uint64), pa.uint64(), mask=bad),
            "embedding": pa.array(list(unit), pa.list_(pa.float16(), WIDTH), mask=bad),
        }
    )


@pytest.fixture(scope="module")
def reference_table() -> pa.Table:
    digests, hashes, points = pictures(np.random.default_rng(1), 400, 10**6)
    return picture_table(digests, hashes, points, ["image_decode" if i % 40 == 7 else None for i in range(400)])


@pytest.fixture(scope="module")
def table(reference_table: pa.Table) -> pa.Table:
    """Pairs of which every eleventh is near to a reference picture in one of three ways, or to a broken one."""
    rng = np.random.default_rng(0)
    digests, hashes, points = pictures(rng, ROWS, 0)
    there = reference_table.to_pylist()
    for i in range(0, ROWS, 11):
        row = there[i % len(there)]
        if row["error"] is not None:
            continue
        if i % 3 == 0:
            digests[i] = row["image_sha256"]
        elif i % 3 == 1:
            hashes[i] = row["phash"] ^ sum(1 << bit for bit in rng.permutation(64)[: rng.integers(0, 9)].tolist())
        else:
            points[i] = np.array(row["embedding"], np.float64) + rng.choice([0.02, 0.07]) * rng.normal(size=WIDTH)
    error = ["image_decode" if e else None for e in rng.random(ROWS) < 0.03]
    bad = np.array([e is not None for e in error])
    urls = [*ODD, *(shape.format(host) for host in HOSTS.split() for shape in SHAPES)]
    coarse = rng.normal(5, 2, ROWS).round(1).astype(np.float32)  # rounded, so that there are ties
    coarse[[3, 50, 777]] = np.nan
    wild = np.append(np.repeat(np.float32([np.nan, np.inf, -np.inf, 0.0]), 100), rng.normal(size=ROWS - 400))
    columns = {
        "uid": pa.array([f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)]),
        "url": pa.array([urls[i] for i in rng.integers(0, len(urls), ROWS)], pa.string()),
        "language": pa.array(rng.choice(["en", "de"], ROWS).tolist(), pa.string(), mask=bad),
        "language_probability": pa.array(rng.random(ROWS).astype(np.float32), mask=bad),
        "score": pa.array(rng.normal(0.2, 0.1, ROWS).round(2).astype(np.float32), mask=bad),
        "coarse": pa.array(coarse, mask=bad | (np.arange(ROWS) % 71 == 0)),
        "wild": pa.array(rng.permutation(wild).astype(np.float32), mask=bad | (np.arange(ROWS) % 53 == 0)),
        "words": pa.array(rng.integers(0, 30, ROWS), pa.int32(), mask=bad),
        "flat": pa.array(np.full(ROWS, 2.5, np.float32), mask=bad),
        "empty": pa.nulls(ROWS, pa.float32()),
    }
    made = with_identity(picture_table(digests, hashes, points, error), "A")
    for name, values in columns.items():
        made = made.append_column(name, values)
    return made


@pytest.fixture(scope="module")
def cuts(tmp_path_factory: pytest.TempPathFactory, table: pa.Table) -> list[list[Part]]:
    """The same rows in parts of two cuts; the second has a part of one row and an empty one."""
    folder = tmp_path_factory.mktemp("parts")
    return [write_parts(folder, table, [1000, 7000]), write_parts(folder, table, [1, 1, 19, 650, 9_990])]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, reference_table: pa.Table) -> str:
    tables = [with_identity(reference_table.slice(start, 150), "A") for start in (0, 150, 300)]
    return measured(tmp_path_factory.mktemp("reference") / "out", tables)


def kept(selector: Selector, cuts: list[list[Part]]) -> np.ndarray:
    """bool [rows], the same for every cut; rows with an error are True."""
    first, *others = [keeps(selector, parts) for parts in cuts]
    for other in others:
        np.testing.assert_array_equal(other, first)
    return first


def write_list(path: Path, entries: list[str]) -> str:
    lines = [f"{e}  # why" if i % 5 == 2 else f"  {e}\t" if i % 5 == 3 else e for i, e in enumerate(entries)]
    path.write_text("\n".join(["# a list", "", *lines, "   ", "  # end"]), encoding="utf-8")
    return str(path)


def test_exact_lists_of_text(table: pa.Table, cuts: list[list[Part]], tmp_path: Path) -> None:
    for column in ("uid", "url"):
        listed = [v for v in dict.fromkeys(table[column].to_pylist()[::4]) if v and v == v.strip()]
        expected = [v not in set(listed) for v in table[column].to_pylist()]
        selector = BlockList(column=column, file=write_list(tmp_path / f"{column}.txt", listed))
        valid = valid_of(table)
        np.testing.assert_array_equal(kept(selector, cuts)[valid], np.array(expected)[valid])
        assert not all(expected)


def test_exact_lists_of_image_hashes_in_either_case(table: pa.Table, cuts: list[list[Part]], tmp_path: Path) -> None:
    digests = table["image_sha256"].to_pylist()
    listed = {d for d in digests[::6] if d}
    entries = [d.hex().upper() if i % 2 else d.hex() for i, d in enumerate(sorted(listed))]
    selector = BlockList(column="image_sha256", file=write_list(tmp_path / "list.txt", entries))
    valid = valid_of(table)
    np.testing.assert_array_equal(kept(selector, cuts)[valid], np.array([d not in listed for d in digests])[valid])


def test_domains_as_urllib_sees_them(table: pa.Table, cuts: list[list[Part]], tmp_path: Path) -> None:
    entries = ["Example.com", "fine.net.", "blocked.co.uk", "münchen.de", "192.168.0.1"]
    names = [e.lower().rstrip(".") for e in entries]

    def blocked(url: str | None) -> bool:
        host = (urlsplit(url or "").hostname or "").rstrip(".")
        return any(host == name or host.endswith(f".{name}") for name in names)

    expected = np.array([not blocked(url) for url in table["url"].to_pylist()])
    selector = BlockList(column="url", file=write_list(tmp_path / "list.txt", entries), match="domain")
    valid = valid_of(table)
    np.testing.assert_array_equal(kept(selector, cuts)[valid], expected[valid])
    for url, drop in (("http://a.example.com:1/x", True), ("http://notexample.com", False), (None, False)):
        assert blocked(url) == drop
    assert select({"it": selector}, cuts[0]).stages[0]["listed"] == len(entries)


@pytest.mark.parametrize(
    ("column", "match", "entry", "message"),
    [
        ("url", "domain", "https://example.com/", "is no domain"),
        ("url", "domain", "*.example.com", "is no domain"),
        ("url", "domain", ".", "is no domain"),
        ("image_sha256", "exact", "abcd", "write 64 hex digits"),
        ("image_sha256", "exact", "z" * 64, "write 64 hex digits"),
        ("image_sha256", "domain", "example.com", "needs text"),
        ("score", "exact", "0.5", "needs text or bytes"),
    ],
)
def test_lists_that_mean_nothing_are_refused(
    cuts: list[list[Part]], tmp_path: Path, column: str, match: str, entry: str, message: str
) -> None:
    file = write_list(tmp_path / "list.txt", [entry])
    with pytest.raises(UserError, match=message):
        keeps(BlockList(column=column, file=file, match=match), cuts[0])  # type: ignore[arg-type]


def test_a_list_that_cannot_be_read(cuts: list[list[Part]], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("münchen.de".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: cannot be read"):
        keeps(BlockList(column="url", file=str(tmp_path / "latin.txt"), match="domain"), cuts[0])


def near_by_all_pairs(table: pa.Table, reference: pa.Table, bits: int | None, cosine: float | None) -> np.ndarray:
    ours, there = (t.filter(t["error"].is_null()) for t in (table, reference))
    digests = set(there["image_sha256"].to_pylist())
    near = np.array([digest in digests for digest in ours["image_sha256"].to_pylist()])
    if bits is not None:
        differ = ours["phash"].to_numpy()[:, None] ^ there["phash"].to_numpy()
        near |= (np.bitwise_count(differ) <= bits).any(axis=1)
    if cosine is not None:
        points, others = (np.array(t["embedding"].to_pylist(), np.float64) for t in (ours, there))
        points, others = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (points, others))
        near |= (points @ others.T >= cosine).any(axis=1)
    return near


NEAR = [(None, None), (0, None), (4, None), (7, None), (15, None), (None, 0.98), (None, 0.8), (4, 0.9)]


@pytest.mark.parametrize("near", NEAR)
def test_decontamination_by_all_pairs(
    table: pa.Table, cuts: list[list[Part]], reference: str, reference_table: pa.Table, near: tuple[int, float]
) -> None:
    bits, cosine = near
    selector = Decontamination(reference=reference, phash_bits=bits, cosine=cosine, column="embedding")
    expected = near_by_all_pairs(table, reference_table, bits, cosine)
    np.testing.assert_array_equal(kept(selector, cuts)[valid_of(table)], ~expected)
    assert 50 < expected.sum() < ROWS / 2
    assert select({"it": selector}, cuts[0]).stages[0]["reference_pictures"] == 390


def test_a_cosine_at_the_bound_is_decided_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest by float32 need not be the nearest: of rows that float32 cannot tell apart, one reaches the bound."""
    monkeypatch.setattr(decontamination, "BLOCK", 128)
    rng = np.random.default_rng(5)
    base = rng.normal(size=512)
    reference = base + 1e-9 * rng.normal(size=(300, 512))
    points = base + 0.5 * rng.normal(size=(40, 512))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (points, reference)]
    cosines = (unit[0][:, None] * unit[1][None]).sum(axis=2).max(axis=1)
    for i, best in enumerate(cosines):
        assert decontamination.within_cosine(points[i : i + 1], reference, best - 1e-14)[0]
        assert not decontamination.within_cosine(points[i : i + 1], reference, best + 1e-14)[0]
    assert decontamination.within_cosine(np.tile(points, (5, 1)), reference, float(np.median(cosines))).sum() == 100


def test_references_are_refused(
    cuts: list[list[Part]], reference: str, reference_table: pa.Table, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no finished measure"):
        keeps(Decontamination(reference=str(tmp_path)), cuts[0])
    other = measured(tmp_path / "other", [with_identity(reference_table, "B")])
    with pytest.raises(UserError, match="its image_sha256 was not measured by the same"):
        keeps(Decontamination(reference=other), cuts[0])
    lacks = measured(tmp_path / "lacks", [with_identity(reference_table.drop_columns(["phash"]), "A")])
    with pytest.raises(UserError, match="its phash was not measured"):
        keeps(Decontamination(reference=lacks), cuts[0])
    for name, tables in (("broken", [reference_table.slice(7, 1)]), ("nothing", [])):
        nothing = measured(tmp_path / name, [with_identity(t, "A") for t in tables])
        with pytest.raises(UserError, match="holds no pictures"):
            keeps(Decontamination(reference=nothing), cuts[0])
    assert Decontamination(reference=str(tmp_path)).content() == ""
    assert Decontamination(reference=reference).content() != Decontamination(reference=other).content() != ""
    for settings in ({"phash_bits": 16}, {"phash_bits": -1}, {"cosine": 0.0}, {"cosine": 1.5}):
        with pytest.raises(UserError, match="is not in"):
            Decontamination(reference=reference, **settings)


def fused_by_numpy(table: pa.Table, weights: dict[str, float]) -> np.ndarray:
    valid, total = valid_of(table), np.zeros(ROWS)
    for column, weight in weights.items():
        values = np.array([np.nan if v is None else v for v in table[column].to_pylist()], np.float64)
        values[~valid] = np.nan
        finite = values[np.isfinite(values)]
        if not len(finite) or finite.min() == finite.max():
            continue
        low, high = finite.min(), finite.max()
        total += weight * ((np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low))
    return total


WEIGHTS = [{"score": 0.5, "coarse": 0.5}, {"words": 2.0}, {"wild": 1.0, "score": 0.25}]
WEIGHTS += [{"coarse": 0.2, "words": 0.7, "flat": 3.0, "empty": 1.0}]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_fusion(table: pa.Table, cuts: list[list[Part]], weights: dict[str, float]) -> None:
    fused, uids, valid = fused_by_numpy(table, weights), table["uid"].to_pylist(), valid_of(table)
    minimum = 0.501 * fused[valid].max()
    np.testing.assert_array_equal(
        kept(ScoreFusion(weights=weights, minimum=minimum), cuts)[valid], (fused >= minimum)[valid]
    )
    order = sorted(np.flatnonzero(valid), key=lambda i: (-fused[i], uids[i]))
    assert len(set(fused[valid])) < len(order)  # there are ties
    for fraction in (0.0001, 0.2, 0.65, 1.0):
        stay = kept(ScoreFusion(weights=weights, fraction=fraction, mode="exact"), cuts)
        assert set(np.flatnonzero(stay & valid)) == set(order[: int(len(order) * fraction)])


def test_one_column_fused_is_the_exact_fraction(cuts: list[list[Part]]) -> None:
    fused, alone = (
        select({"it": selector}, cuts[0])
        for selector in (
            ScoreFusion(weights={"score": 0.3}, fraction=0.2, mode="exact"),
            Fraction(column="score", fraction=0.2, mode="exact"),
        )
    )
    np.testing.assert_array_equal(fused.failed, alone.failed)
    low, high = fused.stages[0]["ranges"]["score"]
    threshold = alone.stages[0]["thresholds"]["score"][0]
    assert fused.stages[0]["fused_minimum"] == pytest.approx(0.3 * (threshold - low) / (high - low), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "score_fusion", "weights": {"uid": 1.0}, "minimum": 0.5}, r"x\.weights\.uid: uid holds no numbers"),
        ({"kind": "score_fusion", "weights": {"caption_words": 1}}, "exactly one of fraction and minimum"),
        ({"kind": "score_fusion", "weights": {"a": 1}, "minimum": 0, "fraction": 0.2}, "exactly one of"),
        ({"kind": "score_fusion", "weights": {"a": 1}, "fraction": 1.2}, r"fraction 1\.2 is not in"),
        ({"kind": "score_fusion", "weights": {}, "fraction": 0.2}, "weights is empty"),
        ({"kind": "score_fusion", "weights": {"a": 0}, "fraction": 0.2}, r"weights\.a 0(\.0)? is not a number above 0"),
        ({"kind": "block_list", "column": "url", "file": "no/such.txt"}, r"no/such\.txt: no such file"),
        ({"kind": "decontamination", "reference": "r"}, "column image_sha256 is not measured"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config({"signals": {"text": {"kind": "text"}}, "selectors": {"x": settings}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "block_list", "column": "phash"}, r"selectors\.x: .*column phash is uint64; .*needs text or bytes"),
        ({"kind": "block_list", "column": "image_sha256", "match": "domain"}, r"selectors\.x: .*domain needs text"),
        ({"kind": "decontamination", "cosine": 0.9, "column": "url"}, r"selectors\.x\.column: url holds no embeddings"),
        ({"kind": "block_list", "column": "image_sha256"}, None),
        ({"kind": "block_list", "column": "url", "match": "domain"}, None),
        ({"kind": "decontamination", "column": "of no signal"}, None),  # nor is it read
    ],
)
def test_a_column_of_another_type_is_refused_before_it_is_measured(
    settings: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("example.com")
    file = {"file": str(tmp_path / "list.txt")} if settings["kind"] == "block_list" else {"reference": str(tmp_path)}
    recipe = {"signals": {"it": {"kind": "fingerprints"}}, "selectors": {"x": {**settings, **file}}}
    with pytest.raises(UserError, match=message) if message else nullcontext():
        parse_config(recipe)


def test_the_laion_recipe() -> None:
    config = load_config(ROOT / "recipes/curate/laion2b.yaml")
    assert config.selectors["language"] == LanguageIs(languages=["en"])
    assert config.selectors["clip_b32"] == Threshold(column="clip_b32_similarity_score", min=0.28)
