"""The runner with a stand-in for the `gemsmith` command: real processes, locks and kills, seconds instead of minutes.

What the stand-in cannot show (that the words it is given train and grade) is in test_claims.py.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from curation.errors import UserError
from curation.manifest import write_manifest
from jobs.reproduce import run as running
from jobs.reproduce import workshop as workshops
from jobs.reproduce.claim import SEEDS, Arm, Claim, Hypothesis, Score
from jobs.reproduce.claims import CLAIMS
from jobs.reproduce.page import as_text, write_page
from jobs.reproduce.run import reproduce, summarise
from jobs.reproduce.workshop import Seed, locked, training
from tests.conftest import ROOT

STAND_IN = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
out = words[words.index("--out") + 1]
with open({calls!r}, "a") as f:
    f.write(json.dumps(words) + chr(10))
if words[0] == "train":
    end = time.monotonic() + 600  # of one that a failed test leaves behind
    while os.path.exists({held!r}) and open({calls!r}).read().count('["train"') > 1 and time.monotonic() < end:
        time.sleep(0.05)
    if os.path.exists({broken!r}) and "good" in out:
        print("error: optim.lr: is too high; lower it", file=sys.stderr)
        sys.exit(2)
    os.makedirs(out, exist_ok=True)
    seed = int(words[words.index("--seed") + 1])
    open(out + "/value", "w").write(str(0.5 + 0.01 * seed + (0.1 if "good" in out else 0)))
"""


def toy() -> Claim:
    return Claim(
        title="Good is better", source="nowhere", says="Good is better.", recipe="recipes/train/tiny_clip.yaml",
        sizes={"samples": 1_000, "train": 500},
        arms={"good": Arm(says="good", overrides=("--lr", "{data}/x")), "plain": Arm(says="plain", times=2)},
        hypotheses=(Hypothesis(metric="m", arm="good", against="plain"),), why=("A toy.",),
        prepare=lambda workshop: None,
        prepare_seed=lambda seed: seed.workshop.synth(seed.data / "train", seed.workshop.size("train", 1), seed.number),
        grade=lambda seed, arm, run: {"m": Score(float((run / "value").read_text()), 0.1)},
        shown=("m",), minutes=1,
    )  # fmt: skip


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """(folder, calls so far, file that makes one arm fail). A file `held` beside the folder holds all but the first."""
    script, calls, broken = tmp_path / "gemsmith", tmp_path / "calls", tmp_path / "broken"
    files = {"calls": str(calls), "broken": str(broken), "held": str(tmp_path / "held")}
    script.write_text(STAND_IN.format(python=sys.executable, **files))
    script.chmod(0o755)
    monkeypatch.setattr(workshops, "tool", lambda name: str(script))
    monkeypatch.setattr(workshops, "precision", lambda: "fp32")
    monkeypatch.setitem(CLAIMS, "toy", toy())

    def said(command: str) -> list[list[str]]:
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [words for words in map(json.loads, lines) if words[0] == command]

    return tmp_path / "out", said, broken


def test_arms_are_paired_and_judged(bench) -> None:
    out, said, _ = bench
    (summary,) = reproduce("toy", out, seeds=3, workers=2)
    assert summary["arms"]["good"]["m"] == pytest.approx([0.6, 0.61, 0.62])
    assert summary["arms"]["plain"]["m"] == pytest.approx([0.5, 0.51, 0.52]), "in the order of the seeds"
    assert summary["tests"][0]["difference"] == pytest.approx(0.1)
    assert summary["interval"] == [pytest.approx((0.1, 0.1))] and summary["margin"] == [None]
    assert json.loads((out / "toy.json").read_text())["tests"][0]["signs"] == 3
    train = {words[words.index("--out") + 1]: words for words in said("train")}
    assert len(train) == 6 == len(said("train"))
    for number in range(3):
        seed = out / "work" / "toy" / f"seed_{number}"
        good, plain = (train[str(seed / "arms" / arm / "run")] for arm in ("good", "plain"))
        for words, samples in ((good, "1000"), (plain, "2000")):
            assert words[words.index("--seed") + 1] == str(number)
            assert words[words.index("--data") + 1] == str(seed / "data" / "train")
            assert words[words.index("--samples") + 1] == samples
        assert good[-2:] == ["--lr", f"{seed / 'data'}/x"]


def test_what_is_finished_is_not_run_again(bench) -> None:
    out, said, _ = bench
    first = reproduce("toy", out, seeds=2, workers=2)
    again = reproduce("toy", out, seeds=2, workers=2)
    assert len(said("train")) == 4 and len(said("synth")) == 2
    assert again == first and first[0]["wall_s"] > 0, "to find all of it finished takes no time from its bound"
    more = reproduce("toy", out, seeds=3, workers=2)
    assert len(said("train")) == 6, "a seed more is two arms more"
    assert more[0]["wall_s"] > first[0]["wall_s"]


def test_only_the_registered_seeds_and_sizes_are_judged(bench) -> None:
    """Who may add seeds until a claim holds will see it hold."""
    out, _, _ = bench
    for seeds in (SEEDS - 1, SEEDS, SEEDS + 1):
        (summary,) = reproduce("toy", out, seeds=seeds)
        as_registered = seeds == SEEDS
        assert summary["holds"] == as_registered
        assert summary["tests"][0]["verdict"] == ("holds" if as_registered else "not judged")
        how = f"rehearsal with {seeds} seeds in place of 5"
        assert (how in as_text(summary)) != as_registered
        page = (out / "index.html").read_text().replace("</span>", "")
        assert (how in page) != as_registered and ('<span class="tag good">holds' in page) == as_registered
    (summary,) = reproduce("toy", out.with_name("smaller"), scale=0.5)
    assert not summary["holds"] and "a rehearsal at 0.5 of the registered sizes" in as_text(summary)


def test_another_grader_is_another_experiment(bench, tmp_path, monkeypatch) -> None:
    out, _, _ = bench
    code = tmp_path / "code" / "jobs" / "reproduce"
    code.mkdir(parents=True)
    for name in ("probes.py", "page.py"):
        (code / name).write_text("C = 0.1")
    (tmp_path / "code" / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.setattr(running, "ROOT", tmp_path / "code")
    reproduce("toy", out, seeds=2)
    (code / "page.py").write_text("other colours")
    reproduce("toy", out, seeds=2)
    (code / "probes.py").write_text("C = 1.0")
    with pytest.raises(UserError, match="different code"):
        reproduce("toy", out, seeds=2)


def test_another_experiment_is_refused(bench, monkeypatch) -> None:
    out, _, _ = bench
    reproduce("toy", out, seeds=2)
    with pytest.raises(UserError, match="different scale"):
        reproduce("toy", out, seeds=2, scale=0.5)
    changed = toy()
    object.__setattr__(changed, "hypotheses", (Hypothesis(metric="m", arm="plain", against="good"),))
    monkeypatch.setitem(CLAIMS, "toy", changed)
    with pytest.raises(UserError, match="different hypotheses"):
        reproduce("toy", out, seeds=2)


def test_a_failed_step_names_its_reason_and_its_log_and_the_rest_is_kept(bench) -> None:
    out, said, broken = bench
    broken.touch()
    with pytest.raises(UserError, match=r"train --config error: optim.lr: is too high; lower it; .*arms/good/log"):
        reproduce("toy", out, seeds=2, workers=1)
    assert not (out / "toy.json").exists()
    broken.unlink()
    done = len(list(out.rglob("result.json")))
    before = len(said("train"))
    (summary,) = reproduce("toy", out, seeds=2, workers=1)
    assert summary["tests"][0]["signs"] == 2 and len(said("train")) == before + 4 - done


def test_an_arm_may_be_a_run_that_was_made_before(bench, monkeypatch) -> None:
    out, said, _ = bench

    def prepare_seed(seed: Seed) -> None:
        words = training("recipe", seed.data / "made", seed=seed.number, samples=256)
        seed.workshop.gemsmith(seed.data / "made.log", *words)

    arms = {"good": Arm(says="good"), "plain": Arm(says="made before", run="{data}/made")}
    monkeypatch.setitem(CLAIMS, "toy", dataclasses.replace(toy(), arms=arms, prepare_seed=prepare_seed))
    (summary,) = reproduce("toy", out, seeds=2, workers=2)
    assert summary["arms"]["plain"]["m"] == pytest.approx([0.5, 0.51])
    assert len(said("train")) == 4, "two made before, two arms"


@pytest.mark.parametrize(
    "options, said",
    [
        ({"name": "all of it"}, "no such claim; one of joint, "),
        ({"seeds": 1}, "--seeds 1"),
        ({"scale": 0.0}, "--scale 0.0"),
        ({"scale": 2.0}, "--scale 2.0"),
    ],
)
def test_wrong_words(options, said, tmp_path) -> None:
    with pytest.raises(UserError, match=said):
        reproduce(**{"name": "joint", "out": tmp_path, **options})


def test_a_claim_is_tried_by_one_at_a_time(tmp_path) -> None:
    with (
        locked(tmp_path / "a.lock", "a"),
        pytest.raises(UserError, match="is being worked on"),
        locked(tmp_path / "a.lock", "a"),
    ):
        raise AssertionError
    with locked(tmp_path / "a.lock", "a"):
        pass  # free again


CHILD = """
import sys
from pathlib import Path
from jobs.reproduce import run as running, workshop as workshops
from jobs.reproduce.claims import CLAIMS
from tests.jobs.reproduce.test_run import toy
script, out = sys.argv[1:]
workshops.tool = lambda name: script
workshops.precision = lambda: "fp32"
CLAIMS["toy"] = toy()
running.reproduce("toy", Path(out), seeds=2, workers=1)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_and_a_restart(bench, number) -> None:
    """SIGTERM ends the steps too; what SIGKILL leaves running holds the lock until it ends. Then it goes on."""
    out, said, _ = bench
    (held := out.parent / "held").touch()
    command = [sys.executable, "-c", CHILD, str(out.parent / "gemsmith"), str(out)]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 240
    while len(said("train")) < 2 and time.monotonic() < deadline:  # the first arm has ended, the second is at work
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(number)
    assert process.wait(240) == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number == signal.SIGKILL:
        with pytest.raises(UserError, match="left behind"):
            reproduce("toy", out, seeds=2, workers=1)
        held.unlink()
        psutil.wait_procs(children, timeout=240)
    held.unlink(missing_ok=True)
    assert not any(child.is_running() for child in children)
    done = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(done) == 1
    (summary,) = reproduce("toy", out, seeds=2, workers=1)
    assert summary["tests"][0]["signs"] == 2 and all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())


def test_the_page_says_what_was_found(bench) -> None:
    out, _, _ = bench
    reproduce("toy", out, seeds=2, scale=0.5)
    page = (out / "index.html").read_text()
    assert "with 2 seeds in place of 5, at 0.5 of the registered sizes" in page
    assert "m is higher for good than for plain" in page and "2 of 2" in page
    assert page.count("data:image/svg+xml") == 2
    assert "Not tried here: joint, " in page
    assert write_page(out).read_text() == page, "the same figures, the same page"


def test_the_time_stands_beside_its_bound(bench) -> None:
    out, _, _ = bench
    (summary,) = reproduce("toy", out, seeds=2)
    assert summary["limit_s"] == 30 * 60 and summary["in_time"]
    found = {arm: [{"m": (0.5, 0.1)}] * 2 for arm in ("good", "plain")}
    assert [summarise("toy", found, seeds=2, scale=1, wall_s=s)["in_time"] for s in (1800, 1800.1)] == [True, False]
    for seconds, says, tag in ((1140.0, "19.0 of 30 minutes, within the bound", "good"), (1860, "31.0 of 30", "bad")):
        write_manifest(out / "toy.json", summary | {"wall_s": seconds})
        page = write_page(out).read_text()
        assert f'<span class="tag {tag}">{says}' in page and page.count(says) == 2, "and in the footer"
    assert "31.0 of 30 minutes, over the bound" in as_text(summary | {"wall_s": 1860})
