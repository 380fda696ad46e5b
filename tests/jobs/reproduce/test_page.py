"""The forest plot has a row for every hypothesis, also for a difference of nothing; one that has no scale is named.

A claim that was registered anew says so.
"""

import dataclasses
import re
from typing import Any

import pytest
from matplotlib.figure import Figure

from curation.manifest import write_manifest
from jobs.reproduce import page
from jobs.reproduce.claim import SEEDS, Hypothesis, Score
from jobs.reproduce.claims import CLAIMS
from jobs.reproduce.run import summarise
from jobs.reproduce.verdict import judge
from tests.conftest import ROOT


def summary_of(arms: dict[str, dict[str, list[float]]], *hypotheses: Hypothesis) -> dict[str, Any]:
    """What the page reads of a claim's summary, where guessing scores 0.1 of everything but bits."""
    chance = {metric: 0.0 if metric == "same_bits" else 0.1 for metric in arms["a"]}
    tests = [judge(h, arms[h.arm][h.metric], arms[h.against][h.metric], chance[h.metric]) for h in hypotheses]
    return {"arms": arms, "chance": chance, "tests": [dataclasses.asdict(test) for test in tests]}


@pytest.fixture
def drawn(monkeypatch) -> Any:
    """summary -> axes of its forest plot."""
    monkeypatch.setattr(page, "_svg", lambda figure: figure)

    def axes(summary: dict[str, Any]) -> Any:
        figure: Any = page._forest(summary)
        assert isinstance(figure, Figure)
        return figure.axes[0]

    return axes


def test_every_difference_has_its_row(drawn) -> None:
    arms = {
        "a": {"mrr": [0.5, 0.6, 0.55], "same_bits": [1.0, 1.0, 1.0], "mean": [0.3, 0.4, 0.35]},
        "b": {"mrr": [0.3, 0.3, 0.3], "same_bits": [1.0, 1.0, 1.0], "mean": [0.05, 0.06, 0.07]},
    }
    bits = Hypothesis(metric="same_bits", arm="a", against="b", margin=0.0)
    better = [Hypothesis(metric=metric, arm="a", against="b") for metric in ("mrr", "mean")]
    summary = summary_of(arms, *better, bits)
    assert [test["share"] for test in summary["tests"]] == [pytest.approx(1.25), None, 0.0]
    axes = drawn(summary)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["MRR\nagainst b", "same bits\nagainst b"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [tuple(point.get_xydata()[0]) for point in points] == [(pytest.approx(125.0), 0), (0.0, 1)]
    low, high = (100 * edge / 0.2 for edge in summary["tests"][0]["interval"])
    assert list(axes.lines[0].get_xdata()) == pytest.approx([low, high])
    assert axes.get_xlabel().endswith("not drawn, since the other arm guesses: mean hit@1")


def test_where_all_are_drawn_nothing_is_said_to_be_left_out(drawn) -> None:
    arms = {"a": {"mrr": [0.5, 0.6]}, "b": {"mrr": [0.3, 0.4]}}
    axes = drawn(summary_of(arms, Hypothesis(metric="mrr", arm="a", against="b", margin=0.1)))
    assert "not drawn" not in axes.get_xlabel()
    bound = [line for line in axes.lines if list(line.get_ydata()) == [-0.3, 0.3]]
    assert list(bound[0].get_xdata()) == pytest.approx([-10.0, -10.0]), "the margin, in % of what b scores above chance"


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_says_how_often_it_was_registered(name, tmp_path) -> None:
    """As the docs have it, where each registration before is a row."""
    before = len(re.findall(rf"^\| `{name}` \| [^|]*\(commit ", (ROOT / "docs/reproduce.md").read_text(), re.MULTILINE))
    found = {arm: [{m: Score(0.5) for m in CLAIMS[name].shown}] * SEEDS for arm in CLAIMS[name].arms}
    summary = summarise(name, found, seeds=SEEDS, scale=1.0, wall_s=60.0)
    write_manifest(tmp_path / f"{name}.json", summary)
    said = page.write_page(tmp_path).read_text()
    assert ("Registered " in said) == (before > 0)
    if before:
        assert f"Registered {before + 1} times" in said
        assert f"registered {before + 1} times" in page.as_text(summary)
        write_manifest(tmp_path / f"{name}.json", summary | {"sizes": {"samples": 1}})
        assert "Registered " not in page.write_page(tmp_path).read_text(), "found at other sizes than the last"
