"""`gemsmith inspect` against the ledger and the tars themselves."""

import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.config import parse_config
from curation.errors import UserError
from curation.inspection import as_text, inspect
from curation.pipeline import curate
from tests.curation.conftest import sample
from tests.curation.test_kill import in_this_process


def ledger(out: Path) -> list[dict[str, object]]:
    return pa.concat_tables([pq.read_table(p) for p in sorted((out / "ledger").iterdir())]).to_pylist()


def test_every_sample_is_told_as_the_ledger_and_the_shards_have_it(done: Path) -> None:
    lying = {}
    for path in sorted((done / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith((".jpg", ".png")):
                    content = tar.extractfile(member)
                    assert content is not None
                    lying[path.name, member.name.rpartition(".")[0]] = content.read()
    found = {}
    for row in ledger(done):
        for told in inspect(str(row["uid"]), done):
            found[told["shard"], told["key"]] = told
    assert len(found) == 140
    for row in ledger(done):
        told = found[row["shard"], row["key"]]
        assert (told["verdict"], told["reason"]) == (row["verdict"], row["reason"])
        assert [s["name"] for s in told["selectors"] if s["passes"] is False] == row["failed"]
        assert len(told["went"]) == row["copies"]
        for place in told["went"]:
            assert told["picture"].read_bytes() == lying.pop((place["shard"], place["key"]))
    assert not lying


def test_a_selector_that_sees_survivors_alone_was_not_asked_of_what_was_out(done: Path) -> None:
    told = next(t for row in ledger(done) if row["reason"] == "language" for t in inspect(str(row["uid"]), done))
    said = {s["name"]: s["passes"] for s in told["selectors"]}
    assert said["language"] is False and said["copies"] is None and said["score"] is not None
    text = as_text(told)
    assert "dropped by language" in text and "not asked" in text and "nowhere" in text


def test_what_is_not_there_is_one_line(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="inspect nobody: not among the 140"):
        inspect("nobody", done)
    with pytest.raises(UserError, match="holds no selection"):
        inspect("nobody", tmp_path)


def test_a_key_may_be_longer_than_the_name_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_this_process(monkeypatch)
    key = "folder/" * 20 + "x" * 200
    for n in range(2):
        for extension, payload in sample(n, json=b'{"uid": "the_same"}').items():
            path = tmp_path / "pool" / f"{key}{n}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(payload)
    config = parse_config({"signals": {"text": {"kind": "text"}}})
    curate(config, pools=[str(tmp_path / "pool")], out=tmp_path / "out")
    told = inspect("the_same", tmp_path / "out")
    assert [Path(one["picture"]).read_bytes() for one in told] == [sample(n)["jpg"] for n in range(2)]
