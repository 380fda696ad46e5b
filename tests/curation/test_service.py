"""A real HTTP server that answers, stalls, breaks and refuses, and what becomes of it in the store."""

import base64
import hashlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from curation.config import parse_config
from curation.errors import UserError
from curation.pipeline import curate
from curation.workers import Workers
from tests.curation.conftest import sample, write_tar
from tests.curation.test_kill import here
from tests.curation.test_signals import measure_alone

COLUMNS = {"nsfw": "float32", "label": "string"}
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Answers each question by `reply(number of the question, items)`; keeps all questions and their headers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/classify"
        self.questions: list[list[dict[str, Any]]] = []
        self.headers: list[dict[str, str]] = []
        self.reply: Callable[[int, list[dict[str, Any]]], Reply] = lambda _, items: (200, judge(items))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
        self.server.questions.append(items)
        self.server.headers.append(dict(self.headers))
        status, answer, *more = self.server.reply(len(self.server.questions) - 1, items)
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in more[0].items() if more else ():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def verdict(item: dict[str, Any]) -> dict[str, Any]:
    score = int(item["sha256"][:4], 16) / 65536
    return {"nsfw": score, "label": "bad" if score > 0.5 else "safe", "unasked": 1}


def judge(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {"items": [verdict(item) for item in items]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    made = Server()
    thread = Thread(target=made.serve_forever, args=(0.02,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, bytes]]]:
    """(pool, members) of a hundred samples, more than a batch; the json of the last has no uid."""
    folder = tmp_path_factory.mktemp("service") / "pool"
    made = [sample(n) for n in range(100)]
    made[-1]["json"] = b"{}"
    write_tar(folder / "0.tar", {f"{n:03d}": one for n, one in enumerate(made)})
    return folder, made


def measure(pool: Path, root: Path, url: str | None = None, **settings: Any) -> list[dict[str, Any]]:
    signal = {"kind": "service", "columns": COLUMNS, "backoff": 0.01, "timeout": 5.0, **settings}
    if url is not None:
        signal["url"] = url
    return measure_alone(pool, root, {"nsfw_check": signal})


def expected(members: dict[str, bytes]) -> tuple[float, str, bool]:
    one = verdict({"sha256": hashlib.sha256(members["jpg"]).hexdigest()})
    return float(np.float32(one["nsfw"])), one["label"], False


def columns(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["nsfw"], row["label"], row["nsfw_check_unanswered"]) for row in rows]


def test_every_sample_is_asked_once_and_answered(server: Server, samples: Any, tmp_path: Path) -> None:
    pool, made = samples
    rows = measure(pool, tmp_path, server.url, batch=20)
    assert columns(rows) == [expected(members) for members in made]
    asked = [item for question in server.questions for item in question]
    assert max(map(len, server.questions)) == 20 and len(asked) == 100
    for item, members, row in zip(asked, made, rows, strict=True):
        digest = hashlib.sha256(members["jpg"]).hexdigest()
        assert base64.b64decode(item["image"]) == members["jpg"] and item["sha256"] == digest
        assert (item["uid"], item["caption"]) == (row["uid"], members["txt"].decode())
    measure(pool, tmp_path, server.url, batch=7, retries=1)  # how it is asked changes no answer
    assert len(server.questions) == 6
    measure(pool, tmp_path, server.url, revision="2", send=["sha256"])
    assert len(server.questions) > 6 and set(server.questions[-1][0]) == {"sha256"}


def test_what_passes_by_itself_is_tried_again(server: Server, samples: Any, tmp_path: Path) -> None:
    asked: list[float] = []
    given_up = Event()

    def stumble(number: int, items: list[dict[str, Any]]) -> Reply:
        asked.append(time.monotonic())
        if number == 3:
            given_up.wait(60)
        elif number > 3:
            given_up.set()
        broken: list[Reply] = [(503, b""), (429, b"", {"Retry-After": "1"}), (200, b"<html>"), (200, judge(items))]
        return [*broken, (200, {"items": None})][number] if number < 5 else (200, judge(items))

    server.reply = stumble
    rows = measure(samples[0], tmp_path, server.url, timeout=3.0, retries=5)  # long enough for a whole answer anywhere
    assert columns(rows) == [expected(members) for members in samples[1]]
    assert asked[2] - asked[1] >= 1, "as long as the service asked to wait"
    assert [len(question) for question in server.questions] == [64] * 6 + [36]


def test_unanswered_is_null_and_counted_or_stops_the_run(server: Server, samples: Any, tmp_path: Path) -> None:
    server.reply = lambda number, items: (200, judge(items)) if items[0]["uid"].endswith("0") else (500, b"")
    rows = measure(samples[0], tmp_path / "null", server.url, batch=1, retries=1, on_failure="skip")
    for row, members in zip(rows, samples[1], strict=True):
        answered = row["uid"].endswith("0")
        assert columns([row]) == [expected(members) if answered else (None, None, True)]
    assert 5 < sum(row["nsfw_check_unanswered"] for row in rows) < 100
    server.questions.clear()
    with pytest.raises(UserError, match=r"check: 1 samples without an answer \(status 500, 3 tries\); mend"):
        measure(samples[0], tmp_path / "stop", server.url, batch=1, retries=2)
    assert len(server.questions) == 4


def test_a_refused_sample_is_found_and_the_others_answered(server: Server, samples: Any, tmp_path: Path) -> None:
    bad = {f"{n:032x}" for n in (7, 8, 70)}
    server.reply = lambda _, items: (422, b"") if bad & {item["uid"] for item in items} else (200, judge(items))
    rows = measure(samples[0], tmp_path, server.url, on_failure="skip")
    assert {row["uid"] for row in rows if row["nsfw_check_unanswered"]} == bad
    assert [one for one, row in zip(columns(rows), rows) if row["uid"] not in bad] == [
        expected(members) for n, members in enumerate(samples[1]) if n not in (7, 8, 70)
    ]
    assert len(server.questions) < 50


def test_answers_of_another_shape(server: Server, samples: Any, tmp_path: Path) -> None:
    odd = [None, {"nsfw": "0.3"}, {"nsfw": True, "label": 5}, {"label": "x"}]
    server.reply = lambda _, items: (200, {"items": odd + judge(items)["items"][4:]})
    rows = measure(samples[0], tmp_path / "a", server.url)
    assert columns(rows)[:4] == [(None, None, True), (None, None, False), (None, None, False), (None, "x", False)]
    server.reply = lambda _, items: (200, {"items": judge(items)["items"][1:]})
    with pytest.raises(UserError, match="its answer is no list of 64 records"):
        measure(samples[0], tmp_path / "b", server.url)


def test_mistakes_of_the_recipe_stop_at_once(
    server: Server, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for status, mend in ((401, "variable that token_env names"), (404, "mend url"), (302, "mend url")):
        server.questions.clear()
        server.reply = lambda *_, status=status: (status, b"", {"Location": server.url})
        with pytest.raises(UserError, match=rf"service nsfw_check: http://.* answers with status {status}; .*{mend}"):
            measure(samples[0], tmp_path / str(status), server.url, on_failure="skip")
        assert len(server.questions) == 1
    with socket.socket() as deaf:  # bound, so that nobody else gets the port, but not listening
        deaf.bind(("127.0.0.1", 0))
        port = deaf.getsockname()[1]
        down = rf"nsfw_check: nothing answers at 127.0.0.1:{port} \(.*refused\); start it"
        with pytest.raises(UserError, match=down):
            measure(samples[0], tmp_path / "down", f"http://127.0.0.1:{port}/", on_failure="skip")
    for value in ("", "two\nlines"):
        monkeypatch.setenv("NSFW_TOKEN", value)
        with pytest.raises(UserError, match="NSFW_TOKEN") as refused:
            measure(samples[0], tmp_path / "token", server.url, token_env="NSFW_TOKEN")
        assert "two" not in str(refused.value)


def test_the_token_goes_to_the_service_and_nowhere_else(
    server: Server, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSFW_TOKEN", "very-secret-4711")
    measure(samples[0], tmp_path / "direct", server.url, token_env="NSFW_TOKEN")
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer very-secret-4711"}
    server.headers.clear()
    measure(samples[0], tmp_path / "key", server.url, token_env="NSFW_TOKEN", token_header="X-Api-Key", revision="k")
    assert {headers["X-Api-Key"] for headers in server.headers} == {"very-secret-4711"}
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"very-secret" not in file.read_bytes()


def test_a_run_selects_by_what_a_function_said(
    samples: Any, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "signals": {"hit": {"kind": "service", "function": f"{__name__}:known", "columns": {"match": "bool"}}},
        "selectors": {"hit": {"kind": "values", "column": "match", "deny": [True], "missing": "drop"}},
    }
    manifest = curate(parse_config(recipe), pools=[str(samples[0])], out=tmp_path / "out", workers=1)
    assert (manifest["kept"], manifest["dropped"]) == (50, {"hit": 50})
    assert manifest["config"]["signals"]["hit"]["function"] == f"{__name__}:known"


def test_the_unanswered_are_counted(
    samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Workers, "map", here)
    service = {"kind": "service", "function": f"{__name__}:half_known", "columns": {"match": "bool"}}
    services = {name: {**service, "revision": name} for name in ("<hit>", "again")}
    services["again"]["columns"] = {"other": "bool"}
    recipe = {
        "signals": services,
        "selectors": {"hit": {"kind": "values", "column": "match", "deny": [True]}},
        "unit_samples": 7,
    }
    manifest = curate(parse_config(recipe), pools=[str(samples[0])], out=tmp_path / "out")
    assert (manifest["kept"], manifest["dropped"]) == (75, {"hit": 25}), "a deny list lets the unanswered through"
    measured = json.loads((tmp_path / "out" / "measure.manifest.json").read_text())
    assert measured["unanswered"] == {"<hit>": 50, "again": 50} and not measured["errors"]
    assert "measure: service <hit> gave no answer for 50 samples; another `revision`" in capsys.readouterr().err
    assert "Without an answer of &lt;hit&gt;: 50." in (tmp_path / "out" / "report" / "index.html").read_text()
    again = curate(parse_config(recipe), pools=[str(samples[0])], out=tmp_path / "out", overwrite=True, phase="measure")
    assert again["measured"] == 0 and again["unanswered"] == measured["unanswered"], "what the store has counts too"


def half_known(items: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """Of one in two no answer, of one in four a match."""
    return [None if (n := int(one["caption"].split()[7])) % 2 else {"match": n % 4 == 0} for one in items]


def known(items: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    assert all(hashlib.sha256(item["image"]).hexdigest() == item["sha256"] for item in items)
    return [{"match": np.bool_(int(item["caption"].split()[7]) % 2)} for item in items]


def broken(items: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    raise RuntimeError("no model\nhere")


def test_functions_that_fail_or_are_not_there(samples: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(RuntimeError: no model here, 2 tries\)"):
        measure(samples[0], tmp_path / "a", function=f"{__name__}:broken", retries=1)
    with pytest.raises(UserError, match="the module has no such function"):
        measure(samples[0], tmp_path / "b", function=f"{__name__}:missing")
    for name in ("no_such_package.module:f", "", ":f", "no_such_package:f"):
        with pytest.raises(UserError, match=r"to import; write package\.module:function"):
            measure(samples[0], tmp_path / "c", function=name)
    settings: list[tuple[dict[str, Any], str]] = [
        ({}, "exactly one of url and function"),
        ({"url": "http://a/b", "function": "a:b"}, "exactly one of url and function"),
        ({"url": "ftp://a/b"}, "is no address of HTTP"),
        ({"url": "ftp://me:pw@a/b"}, "'a/b' is no address of HTTP"),
        ({"url": "http://me:pw@localhost:PORT/v1"}, "service: url 'localhost:PORT/v1': .*; write https://host:8080/"),
        ({"url": "http://localhost:65536/v1"}, "service: url .*Port out of range"),
        ({"url": "http://[::1/x"}, "service: url .*Invalid IPv6 URL"),
        ({"url": "http://a..b/x"}, "service: url .*label empty"),
        ({"url": "http://me:pw@a/b"}, "the url of a holds credentials; name a variable in token_env"),
        ({"url": "http://a/b", "columns": {}}, "columns and send must name something"),
        ({"url": "http://a/b", "timeout": 0.0}, r"timeout 0\.0 is not at least"),
        ({"url": "http://a/b", "send": ["pixels"]}, "pixels"),
    ]
    for chosen, message in settings:
        with pytest.raises(UserError, match=message) as refused:
            parse_config({"signals": {"s": {"kind": "service", "columns": COLUMNS, **chosen}}})
        assert "pw" not in str(refused.value)
