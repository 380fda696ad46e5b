"""Start the ranks of a test as the launcher would, without its ten seconds."""

import os
import subprocess
import sys

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
