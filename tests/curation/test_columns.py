"""Samples of which a signal makes no number, or on which it fails: error rows with a reason and a cause, and all others
as if those were not there."""

import errno
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from curation.columns import Gathering, not_finite
from curation.config import parse_config
from curation.errors import UserError, exit_code
from curation.pipeline import curate
from curation.signals import SIGNALS
from curation.signals.interface import Decoded
from jobs.cli import COMMANDS
from tests.curation.conftest import picture, sample, write_tar
from tests.curation.test_kill import in_this_process
from tests.curation.test_signals import measure_alone

WIDTH, ROWS = 8, 90
ODD = {3: "nan", 17: "inf", 30: "hole", 41: "nan", 64: "hole", 89: "-inf"}
ABSENT = {5: "null", 70: "null"}


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Columns `score` and `vector`, by the sample's number; its caption may ask for something odd."""

    version: ClassVar[int] = 1

    def schema(self, name: str) -> dict[str, pa.DataType]:
        return {"score": pa.float32(), "vector": pa.list_(pa.float16(), WIDTH)}

    def content(self) -> dict[str, Any]:
        return {}

    def load(self, name: str) -> "Scorer":
        return self

    def see(self, sample: Decoded) -> tuple[int, str]:
        return int(sample.uid, 16), sample.caption

    def columns(self, seen: Sequence[tuple[int, str]]) -> dict[str, pa.Array]:
        if any(caption == "breaks" for _, caption in seen):
            raise ValueError("cannot be\n  parsed")
        scores: list[float | None] = []
        vectors = np.empty((len(seen), WIDTH), np.float16)
        for row, (n, caption) in enumerate(seen):
            vector = np.random.default_rng(n - n % 3).normal(size=WIDTH)  # two of three have a copy before them
            vectors[row] = vector / np.linalg.norm(vector)
            if caption == "hole":
                vectors[row, 2] = np.nan
            odd = caption in ("nan", "inf", "-inf")
            scores.append(None if caption == "null" else float(caption) if odd else n / 100)
        vector_column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTH)
        return {"score": pa.array(scores, pa.float32()), "vector": vector_column}


def written(folder: Path, odd: dict[int, str], without: Sequence[int] = (), rows: int = ROWS) -> Path:
    here = [n for n in range(rows) if n not in without]
    asked = {n: {"txt": odd[n].encode()} if n in odd else {} for n in here}
    write_tar(folder / "0.tar", {f"{n:09d}": sample(n, jpg=picture(n, (24, 16)), **asked[n]) for n in here})
    return folder


def ledger(out: Path) -> dict[str, tuple[str, str, list[str]]]:
    rows = [row for part in sorted((out / "ledger").iterdir()) for row in pq.read_table(part).to_pylist()]
    return {row["uid"]: (row["verdict"], row["reason"], row["failed"]) for row in rows}


def test_what_is_no_number_is_an_error_of_its_sample_and_selection_never_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    monkeypatch.setitem(SIGNALS, "scorer", Scorer)
    reference = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    np.save(tmp_path / "reference.npy", reference)
    clusters = {"column": "vector", "clusters": 6}
    selectors = {
        "score": {"kind": "threshold", "column": "score", "min": 0.02, "missing": "keep"},
        "based": {"kind": "image_based", "reference": str(tmp_path / "reference.npy"), **clusters},
        "semantic": {"kind": "semantic_duplicates", "eps": 0.01, **clusters},
        "balance": {"kind": "cluster_balance", "cap": 2, **clusters},
    }
    config = parse_config({"signals": {"s": {"kind": "scorer"}}, "selectors": selectors, "unit_samples": 50})
    pools = written(tmp_path / "odd", ODD | ABSENT), written(tmp_path / "plain", ABSENT, without=list(ODD))
    found, plain = (
        curate(config, pools=[str(p)], out=tmp_path / p.name / "out", signals=tmp_path / "s") for p in pools
    )
    assert found["errors"] == {"not_finite": len(ODD)} and plain["errors"] == {}
    assert (found["seen"], found["kept"]) == (ROWS, plain["kept"]) and plain["kept"] > 5
    assert set(plain["dropped"]) == set(selectors)
    verdicts = ledger(tmp_path / "odd" / "out")
    assert {n: verdicts.pop(f"{n:032x}") for n in ODD} == dict.fromkeys(ODD, ("error", "not_finite", []))
    assert verdicts == ledger(tmp_path / "plain" / "out")
    assert "score" not in {reason for n in ABSENT for reason in verdicts[f"{n:032x}"][2]}, "null is no error"
    causes = [line for line in capsys.readouterr().err.splitlines() if "not_finite" in line]
    assert causes == [
        f"measure: {tmp_path}/odd/0.tar {n:09d}: not_finite: signal s: {column} is NaN or infinite"
        for n, column in ((3, "score"), (89, "score"))
    ]


def test_a_checkpoint_that_gives_nothing_but_nan_stops_the_run_by_the_budget(
    pool: Path, tiny_clip: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    in_this_process(monkeypatch)
    state = torch.load(tiny_clip[1], weights_only=True)
    torch.save({**state, "visual.proj": torch.full_like(state["visual.proj"], torch.nan)}, tmp_path / "diverged.pt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"signals: {{s: {{kind: clip, model: {tiny_clip[0]}, pretrained: {tmp_path}/diverged.pt}}}}")
    words = ["--config", str(recipe), "--pool", str(pool), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert exit_code(lambda: COMMANDS["curate"][1](words)) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: max_error_rate: 120 of 140 samples cannot be used (not_finite 120)")
    assert not list((tmp_path / "out").glob("*manifest.json"))


def test_a_sample_that_breaks_a_batch_is_a_row_and_all_others_have_their_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_this_process(monkeypatch)
    monkeypatch.setitem(SIGNALS, "scorer", Scorer)
    broken = {n: "breaks" for n in (0, 10, 11, 63, 88)} | {20: "nan"}
    config = parse_config({"signals": {"s": {"kind": "scorer"}, "text": {"kind": "text"}}})
    pools = written(tmp_path / "broken", broken), written(tmp_path / "plain", {}, without=list(broken))
    tables = []
    for folder in pools:
        curate(config, pools=[str(folder)], out=folder / "out", phase="measure")
        (part,) = (folder / "out" / "signals").glob("*/*.parquet")
        tables.append(pq.read_table(part))
    errors = dict(enumerate(tables[0]["error"].to_pylist()))
    assert {n: error for n, error in errors.items() if error} == {
        n: "not_finite" if caption == "nan" else "signal_failed" for n, caption in broken.items()
    }
    sound = tables[0].filter(tables[0]["error"].is_null())
    measured = ["uid", "score", "vector", "caption_chars", "caption_words", "caption_tokens"]
    assert sound.select(measured).equals(tables[1].select(measured))
    assert tables[0].filter(tables[0]["error"].is_valid())["caption_chars"].null_count == len(broken)
    causes = [line for line in capsys.readouterr().err.splitlines() if "signal_failed" in line]
    assert causes == [
        f"measure: {tmp_path}/broken/0.tar {0:09d}: signal_failed: signal s: ValueError: cannot be parsed"
    ], "the first of each unit and reason"


def test_the_error_of_one_signal_is_none_for_recipes_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIGNALS, "scorer", Scorer)
    folder = written(tmp_path / "pool", {1: "nan"}, rows=3)
    both = {"s": {"kind": "scorer"}, "text": {"kind": "text"}}
    rows = measure_alone(folder, tmp_path / "store", both)
    assert [row["error"] for row in rows] == [None, "not_finite", None]
    rows = measure_alone(folder, tmp_path / "store", {"text": both["text"]})
    assert [(row["error"], row["caption_words"]) for row in rows] == [(None, 11), (None, 1), (None, 11)]


class Failing:
    """A meter that raises this on sample 2 alone, in `see` or in `columns`."""

    def __init__(self, where: str, reason: Exception) -> None:
        self._where, self._reason = where, reason

    def see(self, sample: Decoded) -> str:
        if self._where == "see" and sample.uid == "2":
            raise self._reason
        return sample.uid

    def columns(self, seen: Sequence[str]) -> dict[str, pa.Array]:
        if "2" in seen:
            raise self._reason
        return {"score": pa.array(map(float, seen), pa.float32()), "vector": pa.nulls(len(seen), VECTOR)}


VECTOR = Scorer().schema("")["vector"]


@pytest.mark.parametrize("where", ["see", "columns"])
@pytest.mark.parametrize(
    ("reason", "fatal"),
    [
        (KeyError("word"), False),
        (RuntimeError("size mismatch"), False),
        (OSError("broken data stream"), False),  # as Pillow has it
        (OSError(errno.ENOSPC, "no space left"), True),
        (UserError("the recipe is wrong"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("of the GPU"), True),
        (torch.AcceleratorError("device-side assert"), True),
    ],
)
def test_what_is_no_fault_of_the_sample_is_raised(where: str, reason: Exception, fatal: bool) -> None:
    gathered = Gathering({"s": Failing(where, reason)}, {"s": Scorer()})

    def see_all() -> None:
        for n in range(5):
            image = Image.new("L", (1, 1))
            gathered.see(n, Decoded(uid=str(n), caption="", image=image, image_format="png", raw=b"", record={}))
        gathered.flush()

    if fatal:
        gpu = isinstance(reason, torch.OutOfMemoryError | torch.AcceleratorError)
        with pytest.raises(UserError if gpu else type(reason), match="the GPU has failed" if gpu else None):
            see_all()
        return
    see_all()
    assert gathered.errors == {2: "signal_failed"} and list(gathered.causes) == ["signal_failed"]
    valid = np.array([n != 2 for n in range(5)])
    assert gathered.column("s", "score", valid).to_pylist() == [0.0, 1.0, None, 3.0, 4.0]


def test_a_meter_that_gives_too_few_rows_is_no_silent_shift() -> None:
    class Short(Failing):
        def columns(self, seen: Sequence[str]) -> dict[str, pa.Array]:
            return {name: values[:-1] for name, values in super().columns(seen).items()}

    gathered = Gathering({"s": Short("", ValueError())}, {"s": Scorer()})
    image = Image.new("L", (1, 1))
    gathered.see(0, Decoded(uid="0", caption="", image=image, image_format="png", raw=b"", record={}))
    gathered.flush()
    assert gathered.causes["signal_failed"] == (0, "signal s: ValueError: column score: 0 of float, not 1 of float")


def finite(value: Any) -> bool:
    """Whether no float in it, at whatever depth, is NaN or infinite."""
    if isinstance(value, list):
        return all(map(finite, value))
    return not isinstance(value, float | np.floating) or math.isfinite(value)


NUMBERS = [0.5, math.nan, None, -math.inf, 3.0, math.inf, 1e30]
LISTS = [[1.0, 2.0], None, [], [None, math.nan], [math.inf], [0.0, None], [5.0]]
PAIRS = [[1.0, 2.0], None, [math.nan, 1.0], [None, 2.0], [0.0, -math.inf]]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(NUMBERS, pa.float64()),
        pa.array(NUMBERS, pa.float32()),
        pa.array(LISTS, pa.list_(pa.float32())),
        pa.array(LISTS, pa.large_list(pa.float64())),
        pa.array([LISTS, [], None, LISTS[:3], LISTS[4:5]], pa.list_(pa.list_(pa.float32()))),
        pa.array(PAIRS, pa.list_(pa.float32(), 2)),
        pa.array([[[1.0, 2.0]], None, PAIRS], pa.list_(pa.list_(pa.float64(), 2))),
        pa.array(np.array([1, np.nan, np.inf, 2], np.float16)),
        pa.array([np.float16(1), None, np.float16(np.nan)], pa.float16()),
        pa.array([], pa.list_(pa.float16(), 4)),
        pa.array([1, None, 3]),
        pa.array(["nan", None]),
        pa.array([["inf"], None]),
    ],
)
def test_not_finite_against_plain_python(values: pa.Array) -> None:
    for some in (values, values[1:], values[2:4]):
        assert not_finite(some).tolist() == [not finite(value) for value in some.to_pylist()]
