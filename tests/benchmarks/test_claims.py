"""Committed figures of claims are those of whole runs, and what a folder does not have stays."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import claims
from curation.errors import UserError
from curation.manifest import write_manifest
from jobs.reproduce.run import summarise


def _summary(name: str, better: float, **settings: Any) -> dict[str, Any]:
    claim = claims.CLAIMS[name]
    scores = {
        arm: [
            {metric: [0.2 + 0.01 * seed + better * (number == 0), 0.0] for metric in claim.shown} for seed in range(5)
        ]
        for number, arm in enumerate(claim.arms)
    }
    return summarise(name, scores, **{"seeds": 5, "scale": 1.0, "wall_s": 600.0, **settings})


def test_claims_are_brought_together_and_shown(tmp_path: Path) -> None:
    results, out = tmp_path / "claims.json", tmp_path / "out"
    write_manifest(out / "joint.json", _summary("joint", 0.1))
    assert list(claims.collect(out, results)) == ["joint"]
    (out / "joint.json").unlink()
    write_manifest(out / "instruct.json", _summary("instruct", -0.1))
    found = claims.collect(out, results)
    assert list(found) == ["joint", "instruct"] and found == json.loads(results.read_text())
    lines = claims.table(found).splitlines()[2:]
    assert len(lines) == 2 + sum(len(summary["tests"]) for summary in found.values())
    assert lines[2].startswith(
        "| `joint` | holds | 10 | MRR is at most 10% lower for both than for contrastive | +0.1 "
    )
    assert "| `instruct` | contradicted | 10 |" in "\n".join(lines)


@pytest.mark.parametrize("settings", [{"seeds": 4}, {"scale": 0.5}])
def test_a_rehearsal_is_no_figure(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_manifest(tmp_path / "out/joint.json", _summary("joint", 0.1, **settings))
    with pytest.raises(UserError, match=r"joint.json: is a rehearsal, (with 4 seeds|at 0.5 of)"):
        claims.collect(tmp_path / "out", tmp_path / "claims.json")
    with pytest.raises(UserError, match="no figures of any claim"):
        claims.collect(tmp_path, tmp_path / "claims.json")
    write_manifest(tmp_path / "out/joint.json", _summary("joint", 0.1) | {"sizes": {"samples": 12_288}})
    with pytest.raises(UserError, match=r"registered before .12,288 samples.; run it as it is now"):
        claims.collect(tmp_path / "out", tmp_path / "claims.json")
    assert not (tmp_path / "claims.json").exists()
