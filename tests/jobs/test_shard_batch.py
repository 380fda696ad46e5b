"""Shards built in slices, by the batch and by the Slurm scripts, against one plain `gemsmith curate`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, gemsmith

SLURM = ROOT / "jobs" / "slurm"


def words(pool: Path, out: Path) -> list[str]:
    recipe = str(ROOT / "recipes" / "curate" / "flickr8k.yaml")
    return ["--config", recipe, "--pool", str(pool), "--out", str(out), "--max_error_rate", "0.5"]


def digests(out: Path) -> dict[str, str]:
    files = [*sorted((out / "shards").iterdir()), *sorted((out / "ledger").iterdir())]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def plain(raw_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("plain") / "out"
    gemsmith("curate", *words(raw_pool, out))
    found = digests(out)
    assert sum(name.endswith(".tar") for name in found) >= 1 and sum(name.endswith(".parquet") for name in found) >= 4
    return found


def batch(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "jobs.shard_batch", *arguments]


def test_slices_give_the_bytes_of_one_run_though_one_is_killed(
    plain: dict[str, str], raw_pool: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = batch("--slices", "3", "--parallel", "2", "--", *words(raw_pool, out))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        kill_one(process.pid, "2/3")
        code = process.wait()
    said = (tmp_path / "log").read_text()
    assert code == 0, said
    assert "[measure 2/3] exited with -9; once more" in said
    assert digests(out) == plain
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "[merge]" in again.stdout and "already complete" in again.stdout


def kill_one(parent: int, part: str) -> None:
    """SIGKILL the child that does this slice, as soon as it is there."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        for child in psutil.Process(parent).children():
            if part in child.cmdline():
                child.send_signal(signal.SIGKILL)
                return
        time.sleep(0.05)
    raise AssertionError(f"no child for slice {part}")


def test_a_users_error_is_not_tried_again(tmp_path: Path) -> None:
    done = subprocess.run(
        batch("--slices", "2", "--", *words(tmp_path / "none", tmp_path / "out")),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: measure 1/2: --pool ") and "no such folder" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["--overwrite", "--phase=select", "--part"])
def test_what_the_batch_decides_is_refused(bad: str, tmp_path: Path) -> None:
    done = subprocess.run(
        batch("--slices", "2", "--", *words(tmp_path, tmp_path / "out"), bad),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(f"error: {bad}: ")


@pytest.mark.parametrize("script", sorted(SLURM.iterdir()), ids=lambda p: p.name)
def test_slurm_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


ITS_CORES = '[[ $SRUN_CPUS_PER_TASK == "$SLURM_CPUS_PER_TASK" ]] || exit 3\n'
"""What a stand-in of `srun` holds its caller to: Slurm's gives a step one core unless it is told by name."""

SBATCH = """#!/bin/bash
# Runs the script at once, each array task in its turn, as Slurm would in the end; refuses what is out of order.
echo "$*" >> "$CALLS"
array=1
while [[ $1 == --* ]]; do
    case $1 in
        --array=1-*) array=${1#--array=1-}; export SLURM_ARRAY_TASK_COUNT=$array ;;
        --dependency=afterok:*) [[ -e "$STATE/${1#--dependency=afterok:}" ]] || exit 1 ;;
    esac
    shift
done
script=$1
shift
export SLURM_CPUS_PER_TASK=1
for ((i = 1; i <= array; i++)); do
    SLURM_ARRAY_TASK_ID=$i bash "$script" "$@" >> "$LOG" 2>&1 || exit 1
done
job=$(wc -l < "$CALLS")
touch "$STATE/$job"
echo "$job"
"""


def test_slurm_chain_runs_in_order_and_gives_the_same_bytes(
    plain: dict[str, str], raw_pool: Path, tmp_path: Path
) -> None:
    """The scripts as they are; where Slurm would queue them, a small `sbatch` runs them."""
    binaries, out = tmp_path / "bin", tmp_path / "out"
    binaries.mkdir()
    for name, body in (("sbatch", SBATCH), ("srun", f'#!/bin/bash\n{ITS_CORES}exec "$@"\n')):
        (binaries / name).write_text(body)
        (binaries / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "LOG": str(tmp_path / "log"),
        "STATE": str(tmp_path),
    }
    command = [str(SLURM / "submit.sh"), "2", *words(raw_pool, out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    log = (tmp_path / "log").read_text()
    assert done.returncode == 0 and done.stdout.strip() == "4", done.stderr + log
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [("--array=1-2" in call, "afterok" in call) for call in calls] == [
        (True, False),
        (False, True),
        (True, True),
        (False, True),
    ]
    assert digests(out) == plain


SRUN = f"""#!/bin/bash
# Starts two tasks, as `srun` does on one node.
{ITS_CORES}[[ $MASTER_PORT -lt $(cut -f 1 /proc/sys/net/ipv4/ip_local_port_range) ]] || exit 4
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" > "$STATE/rank1.log" 2>&1 &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@"
code=$?
wait $! || code=$?
exit $code
"""


def test_slurm_training_trains_on_two_ranks(raw_pool: Path, tmp_path: Path) -> None:
    """The script as it is: two real ranks meet, step and finish; only `srun` and `scontrol` are stand-ins."""
    binaries, run = tmp_path / "bin", tmp_path / "run"
    binaries.mkdir()
    for name, body in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\n")):
        (binaries / name).write_text(body)
        (binaries / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "STATE": str(tmp_path),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": str(13_000 + os.getpid() % 7_000),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    words = ["--config", "recipes/train/tiny_clip.yaml", "--data", str(raw_pool), "--out", str(run)]
    words += ["--samples", "32", "--loader.batch", "16", "--loader.chunk", "8", "--loader.retain", "0"]
    words += ["--loader.max_error_rate", "0.5"]
    command = ["bash", str(SLURM / "train.sbatch"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    manifest = json.loads((run / "manifest.json").read_text())
    assert (manifest["steps"], manifest["samples"]) == (2, 32)
    checkpoint = json.loads((run / "checkpoints" / "step_00000002" / "manifest.json").read_text())
    assert checkpoint["world_size"] == 2
