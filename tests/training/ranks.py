"""Start the ranks of a test: as the launcher would, without its ten seconds; or through the launcher itself."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from jobs.launch import held_port
from tests.conftest import ROOT


def launch(script: str, ranks: int, *arguments: object, timeout: float = 800) -> list[str]:
    """What each rank of tests/training/`script` printed; all of them have ended well."""
    codes, outputs = group_of(script, ranks, *arguments, timeout=timeout)
    ends = zip(codes, outputs)
    assert codes == [0] * ranks, "\n".join(f"rank {r} ended with {c}: {o[-3000:]}" for r, (c, o) in enumerate(ends))
    return outputs


def group_of(
    script: str, ranks: int, *arguments: object, timeout: float, fails: tuple[int, ...] = ()
) -> tuple[list[int | None], list[str]]:
    """(exit code, what it printed) of each rank of tests/training/`script`, all of which have ended.

    None is left behind: where one fails its peers would wait for it, so they are ended, as all are after `timeout` s.
    `fails`: codes of those that are waited for although others fail.
    """
    group: list[subprocess.Popen[str]] = []
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(held_port())
        # A pipe that nobody reads fills up and holds its rank.
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(ranks)]
        try:
            for rank, file in enumerate(files):
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
                env = {**os.environ, **{k: str(v) for k, v in numbers.items()}}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                command = [sys.executable, str(ROOT / "tests/training" / script), *map(str, arguments)]
                group.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
            deadline = time.monotonic() + timeout
            while None in (codes := [process.poll() for process in group]) and not any(
                code and code not in fails for code in codes
            ):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for process in group:
                process.kill()
                process.wait()
        for file in files:
            file.seek(0)
        return codes, [file.read() for file in files]


def launched(shards: object, run: Path, stage: str, family: str, *overrides: str) -> tuple[dict, str]:
    """What rank 0 of two found of a family's first step (rank_gradients.py) under the real launcher, and what they
    printed."""
    with held_port() as port:
        command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port"]
        command += [str(port), str(ROOT / "tests/training/rank_gradients.py"), str(shards), str(run), stage]
        process = subprocess.Popen(
            [*command, family, *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, complained = process.communicate(timeout=800)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the launcher's ranks too, which are of its group
            process.wait()
            raise
    assert (run / "gradients.pt").exists(), printed[-3000:] + complained[-5000:]
    return torch.load(run / "gradients.pt", weights_only=True)[family], printed
