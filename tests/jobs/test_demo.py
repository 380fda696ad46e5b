"""The whole path in small: every step is a command in a process of its own, as in `make demo`."""

import json
import subprocess
import time

import psutil
import pytest

from curation.errors import UserError
from curation.noise import KINDS
from jobs.demo import ARMS, DemoSizes, Story, demo
from jobs.steps import tool

SMALL = DemoSizes(
    pool=900, trusted=300, reference=150, heldout=120, classes=64,
    scorer_samples=1_024, arm_samples=1_024, watched=60, captioned=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    return out, demo(out, 7, SMALL)


def test_the_summary_holds_every_figure_of_the_contract(story):
    out, _ = story
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["arms"]) == set(ARMS)
    for metrics in summary["arms"].values():
        assert {"text_to_image_mrr", "image_to_text_recall@10", "acc1", "cider_d", "bleu_4"} <= set(metrics)
        assert 0 < metrics["text_to_image_mrr"] <= 1
    assert {"gap_closed", "gap_ci95", "p_value", "filters", "clean_recall", "clean_precision"} <= set(summary)
    assert summary["queries"] == SMALL.heldout and summary["wall_s"] > 10
    assert 500 < summary["peak_pss_mib"] < 8192
    assert summary["filters"]["resolution"]["recall"] == 1.0 and summary["filters"]["aspect"]["recall"] == 1.0


def test_the_three_arms_come_from_one_pool_and_are_conserved(story):
    out, _ = story
    manifests = {arm: json.loads((out / arm / "manifest.json").read_text()) for arm in ARMS}
    for manifest in manifests.values():
        assert manifest["seen"] == SMALL.pool
        dropped, errors = (sum(manifest[key].values()) for key in ("dropped", "errors"))
        assert manifest["seen"] == manifest["kept"] + dropped + errors
    assert manifests["raw"]["kept"] > manifests["oracle"]["kept"] > 0.4 * SMALL.pool
    for arm in ARMS:
        assert list((out / arm / "shards").glob("*.tar"))
        steps = {row["step"] for row in map(json.loads, (out / "watched" / arm / "results.jsonl").open())}
        saved = {int(p.name[5:]) for p in (out / "runs" / arm / "checkpoints").glob("step_*")}
        assert steps >= saved  # every checkpoint was graded as it landed


def test_the_page_tells_the_story_and_a_second_run_only_points_at_it(story, capsys):
    out, summary = story
    page = (out / "report" / "index.html").read_text()
    assert all(kind.replace("_", " ") in page for kind in KINDS)
    assert page.count("data:image/svg+xml") >= 4 and page.count("data:image/jpeg") > 20
    assert demo(out, 7, SMALL)["gap_closed"] == summary["gap_closed"]
    assert "already complete" in capsys.readouterr().out


def test_sigterm_ends_the_step_at_work(tmp_path):
    process = subprocess.Popen([tool("gemsmith"), "demo", "--out", str(tmp_path / "demo")], stdout=subprocess.PIPE)
    assert process.stdout is not None and any(b"synth pool" in line for line in process.stdout)
    while not (steps := psutil.Process(process.pid).children()):
        time.sleep(0.05)
    process.terminate()
    assert process.wait(240) == 143
    assert not any(step.is_running() for step in steps) and not (tmp_path / "demo" / "summary.json").exists()


def test_what_waits_beside_a_step_that_left_nothing_is_ended(tmp_path):
    before = psutil.Process().children()
    with pytest.raises(UserError, match="the step 'train' ended with 1"):
        Story(tmp_path, 0, SMALL).run_watched("train", "true", watch=["sleep", 3600], leaves=tmp_path / "manifest.json")
    assert psutil.Process().children() == before


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_curation_pays(tmp_path, seed):
    """The demo's claims, on seeds that nothing was tuned to but the first."""
    summary = demo(tmp_path / "demo", seed)
    figures = {k: summary[k] for k in ("oracle_over_raw", "gap_closed", "gap_ci95", "p_value", "clean_recall")}
    print(json.dumps(figures | {k: summary[k] for k in ("clean_precision", "wall_s", "peak_pss_mib")}))
    assert summary["queries"] >= 4_000
    assert summary["oracle_over_raw"] >= 0.15
    assert summary["p_value"] < 0.01 and summary["gap_closed"] >= 0.70
    assert summary["clean_recall"] >= 0.90 and summary["clean_precision"] >= 0.95
    assert summary["wall_s"] <= 15 * 60 and summary["peak_pss_mib"] <= 8192
