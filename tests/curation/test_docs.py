"""The page's own examples: a signal and a selector that are one file and one line, each used by its recipe."""

import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from curation import store
from curation.config import parse_config
from curation.measure import Measuring
from curation.pool import list_shards
from curation.selection import SELECTORS, engine
from curation.signals import SIGNALS
from curation.store import Unit
from tests.conftest import ROOT
from tests.curation.conftest import sample, write_tar
from tests.curation.selecting import select
from tests.curation.test_selection import write_parts

PAGE = (ROOT / "docs" / "curation.md").read_text()


def block(language: str, number: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[number]


def test_the_example_of_a_signal_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "flatness"}
    exec(block("python"), names)
    monkeypatch.setitem(SIGNALS, "flatness", names["Flatness"])
    config = parse_config(yaml.safe_load(block("yaml")))
    buffer = io.BytesIO()
    Image.new("RGB", (90, 70), (10, 200, 30)).save(buffer, "PNG")
    flat = {"png": buffer.getvalue(), "txt": b"nothing but green"}
    write_tar(tmp_path / "pool" / "0.tar", {"a": sample(1), "b": flat})
    signal_set = store.open_set(tmp_path / "store", config.signals, 100, None)
    measure = Measuring(signals=config.signals, signal_set=signal_set)()
    shard = list_shards([str(tmp_path / "pool")])[0]
    measure(shard)
    unit = Unit(shard=shard, number=0, rows=2)
    measure(unit)
    path = signal_set.path(unit)
    values = pq.read_table(path)["flatness"].to_pylist()
    assert values[1] == 1.0 and 0 < values[0] < 0.5
    result = select(config.selectors, [engine.Part(path=path, first=0, rows=2)])
    assert result.failed[:, 0].tolist() == [False, True]


def test_the_example_of_a_selector_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "near_best"}
    exec(block("python", 1), names)
    monkeypatch.setitem(SELECTORS, "near_best", names["NearBest"])
    config = parse_config(yaml.safe_load(block("yaml", 1)))
    words = [3, 9, None, 20, 10, 11, 2, 19, 0, 30, 7, 15]
    error = ["image_decode" if n == 9 else None for n in range(12)]  # the longest is of no sound sample
    table = pa.table({"error": pa.array(error, pa.string()), "caption_words": pa.array(words, pa.int32())})
    for cuts in ([], [1, 1, 4]):
        found = select(config.selectors, write_parts(tmp_path, table, cuts), partition_rows=3)
        assert np.flatnonzero(~found.failed[:, 0]).tolist() == [3, 4, 5, 7, 9, 11]
        assert found.stages[0]["thresholds"] == {"caption_words": [10.0]}
    again = parse_config(config.to_dict())
    assert again == config


def test_every_kind_is_on_the_page() -> None:
    for kind in (*SIGNALS, *SELECTORS):
        assert f"| `{kind}` |" in PAGE, kind


def test_the_example_of_a_union_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("a")
    recipe = yaml.safe_load(block("yml").replace("keep.txt", str(tmp_path / "keep.txt")))
    signals = {"language": {"kind": "language"}, "f": {"kind": "fields", "fields": {"clip_score": "float32"}}}
    good = parse_config({"signals": signals, **recipe}).selectors["good"]
    assert list(good.selectors) == ["listed", "english"] and set(good.needs) == {  # type: ignore[attr-defined]
        *("uid", "language", "language_probability", "clip_score")
    }


def test_the_example_of_a_service_is_a_recipe() -> None:
    config = parse_config(yaml.safe_load(block("yml", 1)))
    assert list(config.signals["nsfw"].schema("nsfw")) == ["nsfw_probability", "nsfw_label", "nsfw_unanswered"]
