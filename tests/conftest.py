"""What all tests share: where the repository is, real photographs where they are at hand, and small training runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT.parent / "shared" / "data"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing here is a GPU's: two ranks would need two, and what is held to the bit was measured on cores.
os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session")
def photographs() -> Path:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no real photographs at {PHOTOGRAPHS}")
    return PHOTOGRAPHS


def gemsmith(*arguments: object, check: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run the installed command and return it with its output."""
    executable = Path(sys.executable).with_name("gemsmith")
    done = subprocess.run(
        [str(executable), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    if check and done.returncode:
        raise AssertionError(
            f"gemsmith {arguments} exited {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        )
    return done
