"""Ranks that outlive the `deepspeed` runner, by stand-ins: whole runs are tests/training/test_train.py's."""

import subprocess
import sys
import time

import psutil

from jobs import launch

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
