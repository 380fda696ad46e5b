"""Training: how long a step waits for its data, in the demo's own training through the launcher.

It is cut to fewer steps, with a ViT of the scorer's sizes in place of the
scorer's: what metrics.jsonl says of it, over all of its steps.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.case import Bench, Case
from benchmarks.ranks import ROOT
from curation.synth import synthesise

SCORERS_VIT = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4}


def data_share(bench: Bench) -> Iterator[Case]:
    import yaml

    from jobs.demo import RECIPE
    from jobs.launch import held_port
    from jobs.steps import precision, tool

    batch, steps = (32, 2) if bench.quick else (128, 30)
    pool, recipe, number = bench.work / "pool", bench.work / "recipe.yaml", itertools.count()
    synthesise(out=pool, pairs=batch * steps, seed=0, noise=False)  # as in the demo, no picture is seen twice
    demo = yaml.safe_load((ROOT / RECIPE).read_text())
    del demo["mmgem"]["vision"]["arch"]
    demo["mmgem"]["vision"] |= SCORERS_VIT
    recipe.write_text(yaml.safe_dump(demo))

    def share() -> float:
        run = bench.work / f"run-{next(number)}"
        words = ["--config", recipe, "--precision", precision(), "--samples", batch * steps, "--loader.batch", batch]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with held_port() as port:
            launcher = [tool("deepspeed"), "--num_accelerators", 2, "--master_port", port, "training/train.py"]
            command = [*map(str, [*launcher, *words, "--data", pool, "--out", run])]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert (run / "manifest.json").exists(), done.stdout[-2000:] + done.stderr[-4000:]
        return _share(run / "metrics.jsonl")

    yield Case(
        name="data_share",
        area="training",
        unit="of the time",
        better="lower",
        reach=0.05,
        peer_name=f"all the time of the demo's training, {steps} steps of {batch} on two ranks",
        ours=share,
        peer=lambda: 1.0,
    )


def _share(metrics: Path) -> float:
    """The part of a run's steps that the slowest rank waited for data."""
    waited = spent = 0.0
    samples = 0
    for line in map(json.loads, metrics.read_text().splitlines()):
        seconds = (line["samples"] - samples) / line["samples_per_second"]
        waited, spent, samples = waited + line["data_share"] * seconds, spent + seconds, line["samples"]
    return waited / spent
