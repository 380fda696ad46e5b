"""`max_error_rate` is of the whole pool: nothing within it is stopped, whatever comes first, is there already or is
another job's; what cannot come within it any more is stopped early. Pools of texts, since those are quick to make."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.budget import Expected
from curation.config import parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.pool import Shard
from tests.curation.conftest import write_tar
from tests.curation.test_kill import in_this_process

BROKEN = {"json": b"{", "txt": b"a caption beside a broken json"}
RECIPE: dict[str, Any] = {"modality": "texts", "signals": {"text": {"kind": "text"}}, "unit_samples": 150}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)


def run(pool: Path | str, out: Path, **more: Any) -> dict[str, Any]:
    recipe = {**RECIPE, **more.pop("recipe", {})}
    return curate(parse_config(recipe), pools=[str(pool)], out=out, **more)


def write_parquet(path: Path, captions: list[str | None], others: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"caption": pa.array(captions, pa.string()), "note": others}), path)


def write_tars(pool: Path, tars: list[dict[str, bytes]], each: int) -> Path:
    for n, members in enumerate(tars):
        write_tar(pool / f"{n}.tar", {f"{i:05d}": members for i in range(each)})
    return pool


def test_a_broken_file_that_comes_first_is_weighed_against_the_others(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(150_000).hex()
    heavy = [noise[i * 2000 : (i + 1) * 2000] for i in range(150)]  # broken rows that are most of the pool's bytes
    write_parquet(tmp_path / "pool" / "0.parquet", [None] * 150, heavy)
    write_parquet(tmp_path / "pool" / "1.parquet", [f"text {n}" for n in range(2000)], [""] * 2000)
    manifest = run(tmp_path / "pool", tmp_path / "out")
    assert (manifest["seen"], manifest["kept"], manifest["errors"]) == (2150, 2000, {"caption_missing": 150})
    with pytest.raises(UserError, match=r"max_error_rate: 150 of 2150 samples cannot be used \(caption_missing 150\)"):
        run(tmp_path / "pool", tmp_path / "strict", recipe={"max_error_rate": 0.06})
    assert len(list((tmp_path / "strict" / "signals").glob("*/*.parquet"))) == 1, "the second file was measured too"


def test_a_killed_run_goes_on_at_a_unit_that_is_mostly_broken(tmp_path: Path) -> None:
    captions: list[str | None] = [f"text {n}" for n in range(1500)]
    captions[-120:] = [None] * 120
    write_parquet(tmp_path / "pool" / "0.parquet", captions, [""] * 1500)
    run(tmp_path / "pool", tmp_path / "a", phase="measure", signals=tmp_path / "store")
    (last,) = (tmp_path / "store").glob("*/*-00009.parquet")
    last.unlink()
    done = run(tmp_path / "pool", tmp_path / "b", phase="measure", signals=tmp_path / "store")
    assert (done["measured"], done["errors"]) == (150, {"caption_missing": 120})
    last.unlink()
    with pytest.raises(UserError, match="max_error_rate: 120 of 1500"):
        strict = {"max_error_rate": 0.07}
        run(tmp_path / "pool", tmp_path / "c", phase="measure", signals=tmp_path / "store", recipe=strict)


def test_a_broken_slice_is_judged_with_the_others(tmp_path: Path) -> None:
    pool, out = write_tars(tmp_path / "pool", [BROKEN, *[{"txt": b"a text"}] * 9], 110), tmp_path / "out"
    for slices in ("1/2", "2/2"):
        run(pool, out, phase="measure", part=slices)
    assert run(pool, out)["errors"] == {"json_parse": 110}
    worse = write_tars(tmp_path / "worse", [BROKEN, *[{"txt": b"a text"}] * 8], 110)
    for slices in ("1/2", "2/2"):
        run(worse, tmp_path / "none", phase="measure", part=slices)
    for phase in ("select", "all"):
        with pytest.raises(UserError, match="max_error_rate: 110 of 990 samples"):
            run(worse, tmp_path / "none", phase=phase)
    with pytest.raises(UserError, match=r"max_error_rate: 110 of 550 .*more than 0 of them"):
        run(pool, tmp_path / "zero", phase="measure", part="1/2", recipe={"max_error_rate": 0})


def test_a_pool_elsewhere_that_is_hopelessly_broken_is_not_read_to_its_end(tmp_path: Path) -> None:
    folder = write_tars(tmp_path / "pool", [BROKEN] * 10, 120)
    fsspec.filesystem("memory").put(str(folder), f"/{tmp_path.name}", recursive=True)
    with pytest.raises(UserError, match="max_error_rate: 240 of 1200 samples"):
        run(f"memory://{tmp_path.name}", tmp_path / "out")
    assert len(list((tmp_path / "out" / "signals" / "shards").iterdir())) == 2


def test_what_is_expected_ends_at_what_there_is() -> None:
    """Told shards exactly from the start; tars by their bytes, as those that are known."""

    def shard(name: str, size: int, samples: int | None) -> Shard:
        return Shard(path=name, fingerprint=name, size=size, index=0, samples=samples)

    known = [shard("a.tar", 1000, None)]
    ahead = [shard("b.parquet", 7, 40), shard("c.tar", 3000, None), shard("d.tar", 0, None)]
    assert Expected(0, [], ahead).samples == 40
    expected = Expected(10, known, ahead)
    assert expected.samples == 10 + 40 + 30
    for path, samples, after in (("c.tar", 90, 140), ("a.tar", 4, 140), ("d.tar", 1, 141), ("b.parquet", 41, 142)):
        expected.found(path, samples)
        assert expected.samples == after
