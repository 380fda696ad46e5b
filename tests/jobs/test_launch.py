"""Ranks that outlive the `deepspeed` runner, by stand-ins: whole runs are tests/training/test_train.py's."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest

from jobs import launch
from tests.conftest import ROOT

STUBBORN = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(900)"


def test_ranks_that_do_not_end_are_killed_and_nobody_else_is(tmp_path, monkeypatch, capsys):
    words = [sys.executable, "-c", STUBBORN, launch.SCRIPT]
    other = subprocess.Popen(words, start_new_session=True)
    # A runner that leaves two such ranks behind: one has written its id, the other still starts.
    runner = subprocess.Popen(
        ["sh", "-c", '"$@" & echo $!; "$@" & echo $!', "sh", *words], start_new_session=True, stdout=subprocess.PIPE
    )
    runner.wait()
    assert runner.stdout is not None
    lines = [runner.stdout.readline() for _ in range(4)]  # two ids, and an empty line of each that ignores SIGTERM
    ranks = [int(line) for line in lines if line.strip()]
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "0.pid").write_text(str(ranks[0]))
    (tmp_path / "ranks" / "1.pid").write_text(str(other.pid))  # as a file of a killed run may name anybody
    try:
        monkeypatch.setattr(launch, "PATIENCE", 1.0)
        begun, told = time.monotonic(), set()
        launch._end_orphans(runner.pid, tmp_path, told)
        assert 1.0 < time.monotonic() - begun < 300 and told == {ranks[0]}
        alive = {pid for pid in ranks if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"}
        assert not alive and other.poll() is None
        assert "the launcher is gone" in capsys.readouterr().err
    finally:
        other.kill()
        other.wait()


def test_a_port_is_nobody_elses_from_when_it_is_chosen():
    """Until the ranks have met; rank 0's own store opens it all the same."""
    import torch.distributed as dist

    with launch.held_port() as port, launch.held_port() as another, socket.socket() as stranger:
        assert port != another
        with pytest.raises(OSError, match="in use"):
            stranger.bind(("", port))
        store = dist.TCPStore("127.0.0.1", port, 1, True, timeout=timedelta(seconds=60))
        store.set("rank", "0")
        assert (store.port, store.get("rank")) == (port, b"0")


def world_of(words, monkeypatch):
    """{host: its GPUs} for which deepspeed's own runner would start ranks, by these words."""
    from deepspeed.launcher import runner

    started: list[list[str]] = []
    ended = SimpleNamespace(wait=lambda: 0, returncode=0)
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, **_: started.append(command) or ended)
    runner.main(words[1:])
    told = next(word for word in started[0] if word.startswith("--world_info="))
    return json.loads(base64.urlsafe_b64decode(told.removeprefix("--world_info=")))


def test_ranks_are_of_this_host_alone(monkeypatch, tmp_path):
    """By deepspeed's runner, which here takes the number of GPUs from LOCAL_SIZE; nothing touches one."""
    from deepspeed.launcher import runner

    (tmp_path / "hosts").write_text("one slots=4\ntwo slots=4\n")
    monkeypatch.setattr(runner, "DLTS_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("LOCAL_SIZE", "4")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert world_of(launch.command([], 2, 29999), monkeypatch) == {"localhost": [0, 1]}


RUNNER = f"""
import os, signal, sys, time
from pathlib import Path
run, script = Path(sys.argv[-1]), {launch.SCRIPT!r}
signal.signal(signal.SIGTERM, lambda *_: ((run / "saved").touch(), os._exit(0)))
(run / "ranks").mkdir()
(run / "ranks" / "0.pid").write_text(str(os.getpid()))
time.sleep(900)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_the_end_of_its_terminal_is_a_signal_to_save_unless_it_is_ignored(tmp_path, ignored):
    """The runner is a stand-in that saves when it is told to, as ranks do."""
    (tmp_path / "deepspeed").write_text(f"#!{sys.executable}\n{RUNNER}")
    (tmp_path / "deepspeed").chmod(0o755)
    (run := tmp_path / "run").mkdir()
    words = "import signal, sys; from pathlib import Path; from jobs.launch import launch; run = sys.argv[1]\n"
    if not ignored:  # as it is where these tests are themselves under nohup
        words += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    words += f"sys.executable = {str(tmp_path / 'python')!r}; sys.exit(launch([run], Path(run), 1))"
    command = ["nohup"] * ignored + [sys.executable, "-c", words, str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (run / "ranks" / "0.pid").exists())
        os.kill(process.pid, signal.SIGHUP)
        if ignored:
            time.sleep(1.0)
            assert process.poll() is None and not (run / "saved").exists()
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143 and (run / "saved").exists()
    finally:
        process.kill()


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
