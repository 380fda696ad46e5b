"""Start the ranks of a test: as the launcher would, without its ten seconds; or through the launcher itself."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from jobs.launch import free_port
from tests.conftest import ROOT


def launch(script: str, ranks: int, *arguments: object) -> list[str]:
    """What each rank of tests/training/`script` printed; all of them have ended well."""
    port, group = str(free_port()), []
    for rank in range(ranks):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
        env = {**os.environ, **{k: str(v) for k, v in numbers.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(ROOT / "tests/training" / script), *map(str, arguments)]
        group.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=800)[0] for process in group]
    assert not any(process.returncode for process in group), "\n".join(text[-3000:] for text in outputs)
    return outputs


def launched(shards: object, run: Path, stage: str, family: str, *overrides: str) -> tuple[dict, str]:
    """What rank 0 of two found of a family's first step (rank_gradients.py) under the real launcher, and what they
    printed."""
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
    command += [str(free_port()), str(ROOT / "tests/training/rank_gradients.py"), str(shards), str(run), stage, family]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert (run / "gradients.pt").exists(), done.stdout[-3000:] + done.stderr[-5000:]
    return torch.load(run / "gradients.pt", weights_only=True)[family], done.stdout
