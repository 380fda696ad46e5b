"""What is logged, by whom it can be read, and when slow data is named."""

import dataclasses
import importlib.util
import json
import logging
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from curation.errors import UserError
from tests.training.conftest import tiny_config
from training.bottleneck import Timers
from training.config import LogConfig
from training.distributed import World
from training.flops import FlopMeter
from training.log import RunLog, check_wandb, open_rank_log
from training.sight import JUDGED_STEPS, Sight, summary

GROUPS = [{"lr": 0.1, "name": "heads"}, {"lr": 0.01}]


@pytest.fixture(autouse=True)
def quiet_after():
    """Loggers and warnings as they were."""
    import faulthandler

    import training.log

    before = {name: list(logging.getLogger(name).handlers) for name in training.log.LIBRARIES}
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers
    logging.captureWarnings(False)
    faulthandler.enable()


def run_of(tmp_path, steps, work, errors, timers, computing=lambda: None, **log):
    config = dataclasses.replace(
        tiny_config("--samples", str(steps * 32), "--log_every", "5"), log=LogConfig(hang_seconds=60.0, **log)
    )
    flops, lines = FlopMeter(), []
    with Sight(config, tmp_path, World(), torch.device("cpu"), flops, start=0) as sight:
        for step, wait in enumerate(sight.waiting(iter(work)), 1):
            del wait
            computing()
            layer, x = nn.Linear(8, 8), torch.randn(4, 8)
            loss = flops.forward(lambda layer=layer, x=x: layer(x).sum(), {"x": x}, True)
            flops.backward(loss.backward)
            metrics = {"loss": 1.0 / step, "temperature": 0.07, "grad_norm": 2.0}
            lines.append(
                sight.step(step, metrics, draws=2**63 - step, errors=errors, seconds=timers.seconds, groups=GROUPS)
            )
    return lines, sight


def test_a_line_holds_the_figures_of_its_steps_and_tensorboard_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    errors = {"truncated": 2, "no_image": 1}
    begun = time.monotonic()
    lines, sight = run_of(tmp_path, 12, range(12), errors, Timers(), profile_steps=(2, 3))
    spent = time.monotonic() - begun
    assert [n for n, line in enumerate(lines, 1) if line is not None] == [5, 10, 12]
    written = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in written] == [5, 10, 12] and written[0]["samples"] == 160
    last = written[-1]
    assert last["batch_id"] == f"{2**63 - 12:016x}"
    assert (last["lr_heads"], last["lr_1"], last["errors"]) == (0.1, 0.01, 3)
    assert last["errors_by_reason"] == {"truncated": 2, "no_image": 1}
    assert last["samples_per_second"] > 2 * 32 / spent and 0 <= last["data_share"] < 1
    # work / (time * peak), both figures by hand: 2 steps of one forward and the weight's gradient
    seconds = 2 * 32 / last["samples_per_second"]
    assert last["mfu"] == pytest.approx(2 * 2 * 2 * 4 * 8 * 8 / (seconds * sight.peak)) and last["hfu"] == last["mfu"]
    assert last["peak_gflops"] == pytest.approx(sight.peak / 1e9)
    assert last["useful_gflop"] == last["executed_gflop"] == 2 * 2 * 4 * 8 * 8 / 1e9, "of one step"
    assert 50 < last["memory_mib"] < 100_000
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "mfu", "lr_heads", "memory_mib", "errors_by_reason/truncated"):
        assert [(e.step, e.value) for e in board.Scalars(name)][-1] == (
            12,
            pytest.approx(last["errors_by_reason"]["truncated"] if "/" in name else last[name], rel=1e-6),
        )
    trace = json.loads((tmp_path / "profile" / "steps_00000002_00000003.json").read_text())
    assert sum(e.get("name") == "aten::addmm" for e in trace["traceEvents"]) == 2, "of two steps, and no more"
    assert "aten::addmm" in (tmp_path / "profile" / "steps_00000002_00000003.txt").read_text()


def test_the_figures_of_ranks_become_one():
    rank = {"waited": 1.0, "spent": 10.0, "useful": 300, "executed": 400, "peak": 100.0, "memory": 2**20, "errors": {}}
    slow = {**rank, "waited": 4.0, "useful": 100, "peak": 300.0, "memory": 3 * 2**20, "errors": {"no_image": 2}}
    both = summary([rank, slow])
    assert both["data_share"] == 0.4 and both["memory_mib"] == 3.0 and both["errors"] == 2
    assert both["mfu"] == pytest.approx(400 / 4000) and both["hfu"] == pytest.approx(800 / 4000)


def test_slow_data_is_named_once_by_the_part_that_is_slow(tmp_path, capsys, monkeypatch):
    """By a clock of its own: what else the machine does is no part of it."""
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now, perf_counter=lambda: now)
    for module in ("sight", "bottleneck"):
        monkeypatch.setattr(f"training.{module}.time", clock)
    timers, steps = Timers(), 3 * JUDGED_STEPS

    def passes(seconds):
        nonlocal now
        now += seconds

    def work(decode, read):
        for n in range(steps):
            with timers("decode"):
                passes(decode)
            with timers("read"):
                passes(read)
            yield n

    run_of(tmp_path, steps, work(0.02, 0.002), {}, timers, lambda: passes(0.1))
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert (
        len(said) == 1
        and "18% of the time" in said[0]
        and "decoding, cropping and resizing are slow: raise loader.threads (now 1)" in said[0]
        and "(91% of the loader's time is decode)" in said[0]
    )
    run_of(tmp_path / "fast", steps, work(0.008, 0.002), {}, timers, lambda: passes(0.1))
    assert "warning: " not in capsys.readouterr().err, "9 % is below the bound"


def test_a_rank_keeps_its_warnings_and_its_libraries_words(tmp_path):
    open_rank_log(tmp_path, 3)
    logging.getLogger("DeepSpeed").warning("of DeepSpeed")
    warnings.warn("of a library", UserWarning, stacklevel=1)
    text = (tmp_path / "logs" / "rank_00003.log").read_text()
    assert "WARNING DeepSpeed: of DeepSpeed" in text and "UserWarning: of a library" in text


def test_wandb_that_is_not_installed_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_wandb(None)
    with pytest.raises(UserError, match=r"log\.wandb: gems needs the wandb package; `pip install"):
        check_wandb("gems")


def test_wandb_offline_holds_the_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path, 0, 2, wandb="gems", config={"seed": 1})
    log(
        1, {"loss": 2.0, "temperature": 0.07, "grad_norm": 1.0, "samples_per_second": 3.0, "errors_by_reason": {"x": 1}}
    )
    assert log.wandb.summary["loss"] == 2.0 and log.wandb.summary["errors_by_reason/x"] == 1
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "option", [("--log.profile_steps", "[5, 2]"), ("--log.hang_seconds", "0"), ("--optim.max_loss_ratio", "0.5")]
)
def test_settings_that_cannot_be_are_named(option):
    with pytest.raises(UserError, match=option[0].removeprefix("--")):
        tiny_config(*option)
