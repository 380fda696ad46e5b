"""A head that fails while a job is submitted, stopped or read, by stand-ins: jobs that run are test_ray_submit.py's."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from curation.errors import UserError
from jobs.ray import submit as module
from jobs.ray.submit import submit

CURATE = ["--config", "r.yaml", "--pool", "p", "--out"]


class Head:
    """The client of a head whose job has this status, and that fails where it is told to."""

    def __init__(self, status: str, **fails: Exception) -> None:
        from ray.job_submission import JobStatus

        self.status, self.fails, self.log = JobStatus(status), fails, "a line\nerror: --pool p: gone\n"
        self.logs = 0
        self.asked: Callable[[], object] = lambda: None

    def submit_job(self, **_: Any) -> str:
        self._fail("submit")
        return "job"

    def get_job_info(self, job: str) -> Any:
        self.asked()
        return SimpleNamespace(status=self.status, driver_exit_code=2, message="ended")

    def get_job_logs(self, job: str) -> str:
        self.logs += 1
        if self.logs > 1:
            self._fail("logs")
        return self.log

    async def tail_job_logs(self, job: str) -> Any:
        for line in ():
            yield line

    def stop_job(self, job: str) -> None:
        self._fail("stop")

    def _fail(self, where: str) -> None:
        if where in self.fails:
            raise self.fails[where]


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(head: Head) -> Head:
        monkeypatch.setattr("ray.job_submission.JobSubmissionClient", lambda _: head)
        return head

    monkeypatch.setattr(module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    monkeypatch.setattr(module, "APPEARS_SECONDS", 3.0)
    return use


def test_a_head_that_goes_while_a_job_is_submitted_is_one_line(heads: Any) -> None:
    heads(Head("PENDING", submit=ConnectionResetError("reset by peer")))
    with pytest.raises(UserError, match=r"^--address a: the head takes no job \(reset by peer\)"):
        submit("a", [*CURATE, "out"])


def test_a_head_that_goes_when_its_job_has_failed_does_not_hide_why(heads: Any) -> None:
    heads(Head("FAILED", logs=ConnectionResetError("reset by peer")))
    with pytest.raises(UserError, match=r"^--pool p: gone$"):
        submit("a", [*CURATE, "out"])


@pytest.mark.parametrize(
    ("fails", "said"),
    [({"stop": ConnectionResetError("reset by peer")}, "reset by peer"), ({}, "it has not ended for")],
)
def test_a_job_that_cannot_be_stopped_is_said_and_the_signal_is_the_exit_code(
    heads: Any, capsys: pytest.CaptureFixture[str], fails: dict[str, Exception], said: str
) -> None:
    head = heads(Head("RUNNING", **fails))
    signals = iter([signal.SIGTERM])
    head.asked = lambda: [signal.raise_signal(number) for number in signals]
    assert submit("a", [*CURATE, "out"]) == 128 + signal.SIGTERM
    assert f"job job may go on ({said}" in capsys.readouterr().err


def test_a_manifest_that_is_seen_late_is_waited_for(heads: Any, tmp_path: Path) -> None:
    """As a network's file system shows another host's files."""
    heads(Head("SUCCEEDED"))
    threading.Timer(1.0, (tmp_path / "manifest.json").touch).start()
    assert submit("a", [*CURATE, str(tmp_path)]) == 0
    begun = time.monotonic()
    assert submit("a", [*CURATE, str(tmp_path / "elsewhere")]) == 1 and time.monotonic() - begun >= 3.0
