"""An adapter's gradients on two ZeRO-3 ranks against one plain process that sees the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from jobs.launch import free_port
from tests.conftest import ROOT
from tests.training.plain import differences
from tests.training.test_adapters import moved
from tests.training.vlm import ADAPTER, RECIPE
from training import adapters
from training.data import Loader, Shards
from training.families import build
from training.train import parse


@pytest.mark.parametrize("kind", ["lora", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("vera", "dora"))])
def test_two_ranks_equal_one_plain_process(shards, tmp_path, kind):
    """Float32, real launcher; the adapter begins away from zero, so that every part of it has a gradient."""
    run, begin = tmp_path / "run", tmp_path / "begin"
    target = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    chosen = [f"--adapter.kind={kind}", f"--adapter.target_modules={target}"]
    captions = Shards(shards).every_caption
    config = parse([*RECIPE, *ADAPTER, *chosen])[0]
    family = build(config, run / "tokenizer", captions)
    moved(family.model)
    adapters.export(family.model, config.adapter, begin)
    chosen.append(f"--adapter.init_from={begin / adapters.FOLDER}")

    script = str(ROOT / "tests/training/rank_adapter.py")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
    command = [*launcher, str(free_port()), script, str(shards), str(run), *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert (run / "gradients.pt").exists(), done.stdout[-3000:] + done.stderr[-5000:]
    saved = torch.load(run / "gradients.pt", weights_only=True)

    config = parse([*RECIPE, *ADAPTER, *chosen])[0]
    family = build(config, run / "tokenizer", captions)
    settings = {"seed": 0, "rank": 0, "world_size": 1, "extra": family.extra}
    loader = Loader(Shards(shards), config.loader, family.image, family.encode_text, **settings)
    (chunks,) = list(loader.batches(0, 1))
    outs = [family.model(chunk) for chunk in chunks]
    left, right = (torch.cat([out[side] for out in outs]) for side in ("left", "right"))
    s = outs[0]["scalars"]["log_scale"].exp() * left @ right[:, 0].T
    own = torch.arange(len(s))
    loss = (F.cross_entropy(s, own) + F.cross_entropy(s.T, own)) / 2
    loss.backward()
    expected = {n: p.grad.clone() for n, p in family.model.named_parameters() if p.requires_grad}
    assert set(saved["gradients"]) == set(expected) and all(g.any() for g in expected.values())
    whole, worst = differences(saved["gradients"], expected)
    print(json.dumps({"kind": kind, "whole": whole, "worst_parameter": worst}))
    assert whole < 1e-6 and worst < 1e-6, (whole, worst)
    assert abs(float(saved["loss"] - loss)) < 1e-5
