"""Submitting to a real Ray head on loopback: the job's true end, its one-line errors, signals, broken log streams."""

import asyncio
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.ray.submit import Log, entrypoint, follow
from tests.conftest import ROOT

Head = tuple[str, dict[str, str]]  # address, environment of its clients


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a token of its own, started in another folder than ours, as on a cluster."""
    folder = Path(tempfile.mkdtemp(prefix="gs", dir="/tmp"))  # Ray's socket names must stay below 108 characters
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    port = free_port()
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += ["--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=2", "--include-dashboard=true"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--temp-dir={folder / 'r'}"]
    command += ["--object-store-memory=100000000", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # its default is one port for all Rays of a host
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        request = urllib.request.Request(f"{address}/api/version")
        request.add_header("Authorization", f"Bearer {environment['RAY_AUTH_TOKEN']}")
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(request, timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield address, environment
    finally:
        process.terminate()  # --block brings its own processes down, and those of no other Ray
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def command(head: Head, *words: object) -> list[str]:
    return [sys.executable, "-m", "jobs.ray.submit", "--address", head[0], "--", "curate", *map(str, words)]


def submitted(head: Head, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(head, *words), cwd=ROOT, env=head[1] | environment, capture_output=True, text=True, timeout=240
    )


def test_curates_on_the_cluster_and_leaves_a_manifest(head: Head, raw_pool: Path, tmp_path: Path) -> None:
    words = ["--config", "recipes/curate/flickr8k.yaml", "--pool", raw_pool, "--max_error_rate", "0.5", "--out"]
    done = submitted(head, *words, os.path.relpath(tmp_path / "out", ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["seen"] == 200 and manifest["kept"] > 20
    assert list((tmp_path / "out" / "shards").glob("*.tar"))
    assert "measure: 200 of 200 pairs" in done.stdout, "the job's log is shown"
    again = submitted(head, *words, tmp_path / "out")
    assert again.returncode == 0 and "already complete" in again.stdout


def test_a_failed_job_is_one_line_and_its_exit_code(head: Head, tmp_path: Path) -> None:
    done = submitted(
        head, "--config", "recipes/curate/tiny_raw.yaml", "--pool", tmp_path / "none", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: --pool {tmp_path}/none: no such folder or file; name one that holds samples"
    ]
    assert not (tmp_path / "out").exists()


def test_no_head_and_a_wrong_token_are_one_line(head: Head) -> None:
    nobody = submitted((f"http://127.0.0.1:{free_port()}", head[1]))
    stranger = submitted(head, RAY_AUTH_MODE="disabled")
    for done, wanted in ((nobody, "no Ray job server"), (stranger, "RAY_AUTH_TOKEN")):
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: --address http")
        assert wanted in done.stderr


def test_sigterm_stops_the_job(head: Head, raw_pool: Path, tmp_path: Path) -> None:
    """Its recipe is a pipe that nobody writes, so the job is in the midst of its work whenever the signal comes."""
    from ray.job_submission import JobStatus

    os.mkfifo(recipe := tmp_path / "recipe.yaml")
    words = ["--config", recipe, "--pool", raw_pool, "--out", tmp_path / "out"]
    process = subprocess.Popen(command(head, *words), cwd=ROOT, env=head[1], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    job = process.stdout.readline().split()[1]
    writer = opened_by_a_reader(recipe)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM
    assert client(head).get_job_status(job) == JobStatus.STOPPED
    with pytest.raises(BrokenPipeError):  # the job's process has ended
        os.write(writer, b"curate: {}")
    os.close(writer)


def opened_by_a_reader(pipe: Path) -> int:
    deadline = time.monotonic() + 240
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline, f"nobody opens {pipe}"
            time.sleep(0.1)


def client(head: Head) -> Any:
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(
        head[0], headers={"Authorization": f"Bearer {head[1]['RAY_AUTH_TOKEN']}"}, create_cluster_if_needed=False
    )


class Breaking:
    """A real client whose log streams end after one message, as a proxy that drops WebSockets makes them.

    again: a file that it makes when it is asked for a second one.
    """

    def __init__(self, real: Any, again: Path) -> None:
        self._real, self._again = real, again
        self.streams = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def tail_job_logs(self, job: str) -> Any:
        self.streams += 1
        if self.streams == 2:
            self._again.touch()
        async for text in self._real.tail_job_logs(job):
            yield text
            if self.streams % 2:
                return
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def test_broken_log_streams_neither_end_the_job_nor_repeat_a_line(
    head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking = Breaking(client(head), again := tmp_path / "again")
    waits = f"timeout 240 sh -c 'until [ -e {again} ]; do sleep 0.1; done'"  # the job is not over before
    lines = "for i in {}; do echo line $i; sleep 0.2; done"
    job = breaking.submit_job(entrypoint=f"{lines.format('1 2 3 4')}; {waits}; {lines.format('5 6 7 8')}; exit 7")
    details = asyncio.run(follow(breaking, job, Log()))
    assert (str(details.status), details.driver_exit_code) == ("FAILED", 7)
    assert breaking.streams >= 2
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("line")]
    assert shown == [f"line {i}" for i in range(1, 9)]


def test_the_entrypoint_has_absolute_paths_and_quotes() -> None:
    made = entrypoint(["--config=r.yaml", "--pool", "a b", "--selectors.x.out", "word"], shared=True)
    assert made.startswith(f"cd {os.getcwd()} && exec {Path(sys.executable).with_name('gemsmith')} curate ")
    assert f"--config={os.getcwd()}/r.yaml --pool '{os.getcwd()}/a b' --selectors.x.out word" in made
    assert made.endswith(" --ray.address auto")
    urls = ["--pool", "s3://bucket/pool", "--signals=gs://bucket/store"]
    assert shlex.join(urls) in entrypoint(urls, shared=True)
