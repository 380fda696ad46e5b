"""The page's own example: a signal that is one file and one line, measured and selected by its recipe."""

import io
import re
from pathlib import Path

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

PAGE = (ROOT / "docs" / "curation.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


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


def test_every_kind_is_on_the_page() -> None:
    for kind in (*SIGNALS, *SELECTORS):
        assert f"| `{kind}` |" in PAGE, kind


def test_the_example_of_a_service_is_a_recipe() -> None:
    config = parse_config(yaml.safe_load(block("yml")))
    assert list(config.signals["nsfw"].schema("nsfw")) == ["nsfw_probability", "nsfw_label", "nsfw_unanswered"]
