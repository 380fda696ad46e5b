import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from curation.errors import UserError
from evaluation import results
from evaluation.evaluate import EvaluateConfig, evaluate, load_config
from evaluation.report import report
from evaluation.tasks import TASKS, retrieval
from evaluation.tasks.captioning import CaptioningSettings
from evaluation.tasks.retrieval import RetrievalSettings
from evaluation.watch import watch
from tests.training.conftest import largest_file

FIELDS = {
    "schema_version", "checkpoint", "step", "task", "dataset", "metric",
    "value", "n", "part", "chance", "ci95", "hashes", "details",
}  # fmt: skip


@pytest.fixture
def grade_with(pairs_folder, classes_folder, tmp_path):
    def run(
        model, tasks=("retrieval", "classification", "captioning"), out=tmp_path / "out" / "results.jsonl", **options
    ):
        data = {task: classes_folder if task == "classification" else pairs_folder for task in TASKS}
        return evaluate(
            checkpoint=Path("run/step_5"), tasks=list(tasks), data=data, out=out, load=lambda path: model, **options
        )

    return run


def test_lines_follow_the_contract(grade_with, make_model, tmp_path, pairs_folder):
    rows = grade_with(make_model(step=5))
    out = tmp_path / "out" / "results.jsonl"
    assert rows == [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["task"] for row in rows} == {"retrieval", "classification", "captioning"} <= set(TASKS)
    for row in rows:
        assert set(row) == FIELDS
        assert (row["step"], row["checkpoint"]) == (5, "run/step_5")
        low, high = row["ci95"]
        assert low <= row["value"] <= high, row["metric"]
        assert set(row["hashes"]) == {"weights", "preprocess", "data", "settings", "software", "result"}
    assert {row["dataset"] for row in rows if row["task"] == "captioning"} == {pairs_folder.name}
    by_metric = {row["metric"]: row for row in rows}
    scores, clusters = results.per_query(out, by_metric["text_to_image_mrr"])
    assert scores.mean() == by_metric["text_to_image_mrr"]["value"] and len(clusters) == len(scores)
    scores, clusters = results.per_query(out, by_metric["acc1"])
    assert scores.mean() == by_metric["acc1"]["value"] and clusters is None
    assert results.per_query(out, by_metric["mean_per_class_recall"]) is None
    assert len(results.records(out, by_metric["cider_d"])) == 23


def test_a_limit_is_told_by_the_line_the_rows_and_the_page(grade_with, make_model, tmp_path, capsys):
    whole = grade_with(make_model())
    assert {row["part"] for row in whole} == {None} and "first" not in capsys.readouterr().out
    grade_with(make_model(), config=load_config(["--captioning.limit", "23"]))
    config = load_config(["--captioning.limit", "5", "--classification.limit", "9"])
    few = {row["metric"]: row for row in grade_with(make_model(), config=config)}
    said = capsys.readouterr().out
    assert (few["cider_d"]["n"], few["cider_d"]["part"]) == (5, "first 5 of 23 pictures")
    assert "captioning on scenes (n 5, first 5 of 23 pictures) in" in said
    assert few["acc1"]["part"] == "first 9 of 30 pictures" and few["text_to_image_mrr"]["part"] is None
    page = report(tmp_path / "out").read_text()
    assert "Captioning on scenes, 5 queries (first 5 of 23 pictures)<" in page
    assert "Captioning on scenes, 23 queries<" in page


def test_second_run_does_nothing_and_says_so(grade_with, make_model, tmp_path, capsys):
    rows = grade_with(make_model())
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    again = make_model()
    capsys.readouterr()
    assert grade_with(again) == rows
    assert not again.calls
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    assert capsys.readouterr().out.count("nothing to do") == 3


def test_what_changed_is_graded_again(grade_with, make_model, tmp_path, tar_writer, pairs_folder, image_of):
    def lines():
        return len((tmp_path / "out" / "results.jsonl").read_text().splitlines())

    grade_with(make_model(), tasks=["retrieval"])
    first = lines()
    grade_with(make_model(1), tasks=["retrieval"])
    assert lines() == 2 * first, "other weights under the same path"
    config = EvaluateConfig(retrieval=RetrievalSettings(captions="first"))
    grade_with(make_model(), tasks=["retrieval"], config=config)
    assert lines() == 3 * first, "other settings"
    tar_writer(pairs_folder / "00002.tar", [("x.png", image_of(99)), ("x.txt", b"one more")])
    grade_with(make_model(), tasks=["retrieval"])
    assert lines() == 4 * first, "other data in the same folder"


def test_cache_serves_a_second_results_file(grade_with, make_model, tmp_path):
    one, two = make_model(), make_model()
    first = grade_with(one, tasks=["retrieval"], cache=tmp_path / "cache")
    second = grade_with(two, tasks=["retrieval"], cache=tmp_path / "cache", out=tmp_path / "other.jsonl")
    assert one.calls and not two.calls
    assert [row["value"] for row in first] == [row["value"] for row in second]


def test_results_do_not_depend_on_batch_or_blocks(grade_with, make_model, tmp_path, monkeypatch):
    values = []
    for batch, cells in ((64, 4_000_000), (5, 10), (1, 100)):
        monkeypatch.setattr(retrieval, "CELLS", cells)
        rows = grade_with(make_model(), out=tmp_path / f"{batch}.jsonl", config=EvaluateConfig(batch=batch))
        values.append([(row["metric"], row["value"], *row["ci95"]) for row in rows])
    assert values[0] == values[1] == values[2]


def test_users_errors(grade_with, make_model, tmp_path, pairs_folder):
    with pytest.raises(UserError, match=r"--tasks retreival: unknown; the tasks are retrieval, classification"):
        grade_with(make_model(), tasks=["retreival"])
    with pytest.raises(UserError, match="tasks"):
        grade_with(make_model(), tasks=[])
    with pytest.raises(UserError, match="no folder for captioning"):
        evaluate(checkpoint=tmp_path, tasks=["captioning"], data={"retrieval": pairs_folder}, out=tmp_path / "r.jsonl")
    with pytest.raises(UserError, match=r"retrieval\.captions"):
        config = EvaluateConfig(retrieval=RetrievalSettings(captions="some"))
        grade_with(make_model(), tasks=["retrieval"], config=config)
    for words in (["--batch", "0"], ["--retrieval.limit", "0"], ["--captioning.bootstrap", "-3"]):
        with pytest.raises(UserError, match=f"^{' '.join(words)}: is below 1"):
            load_config(words)
    assert not (tmp_path / "out").exists()


def test_a_torn_line_is_passed_over_and_closed(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    rows = [{"schema_version": 1, "hashes": {"result": "x"}, "metric": m, "details": ""} for m in ("a", "b")]
    results.append(path, rows[:1])
    with open(path, "a") as f:
        f.write('{"schema_version": 1, "val')
    results.append(path, rows[1:])
    assert results.read(path) == rows
    assert "torn" in capsys.readouterr().out
    assert results.find(path, "x") == rows and results.find(path, "y") == []


def test_a_block_that_ends_early_is_no_result_until_it_is_written_again(tmp_path, pairs_folder, model, capsys):
    path = tmp_path / "results.jsonl"
    run = partial(
        evaluate, checkpoint=Path("m"), tasks=["retrieval"], data=pairs_folder, out=path, load=lambda _: model
    )
    rows = run()
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert results.read(path) == [] and "not written whole" in capsys.readouterr().out
    assert [row["metric"] for row in run()] == [row["metric"] for row in rows]
    assert results.read(path) == rows, "each once"
    assert run() == rows and "nothing to do" in capsys.readouterr().out


def test_where_nothing_can_be_written_nothing_is_graded(grade_with, make_model, tmp_path, pairs_folder):
    (tmp_path / "file").write_text("")
    places = {
        "--out .*/scenes: cannot be written .Is a directory": {"out": pairs_folder},
        "--out .*r.jsonl: cannot be written": {"out": tmp_path / "file" / "r.jsonl"},
        "--cache .*file: cannot be written": {"out": tmp_path / "r.jsonl", "cache": tmp_path / "file"},
    }
    for said, where in places.items():
        with pytest.raises(UserError, match=said):
            grade_with(model := make_model(), tasks=["retrieval"], **where)
        assert not model.calls
        with pytest.raises(UserError, match=said):
            watch(run=tmp_path, tasks=["retrieval"], data=pairs_folder, idle_seconds=0, **where)
    with largest_file(1000), pytest.raises(UserError, match=r"--out .*: cannot be written .File too large.*make room"):
        grade_with(model := make_model(), out=tmp_path / "r.jsonl")
    assert not model.calls and not (tmp_path / "r.jsonl").exists()


def test_a_disk_that_fills_up_while_grading_is_named_and_the_figures_are_told(grade_with, make_model, tmp_path, capsys):
    said = r"--out .*r\.jsonl: (a file grows beyond|no space left).*run the same command again"
    with largest_file(4096), pytest.raises(UserError, match=said):
        grade_with(make_model(), tasks=["classification", "retrieval"], out=tmp_path / "r.jsonl")
    assert {row["task"] for row in results.read(tmp_path / "r.jsonl")} == {"classification"}
    assert "text_to_image_mrr 0." in capsys.readouterr().out
    rows = grade_with(make_model(), tasks=["classification", "retrieval"], out=tmp_path / "r.jsonl")
    assert results.read(tmp_path / "r.jsonl") == rows


def test_records_are_cut_where_lines_end_alone(tmp_path):
    """Captions of the web hold U+2028, U+2029 and U+0085, at which `splitlines` cuts too."""
    told = [{"caption": f"a dog{separator}that runs\n"} for separator in "\u2028\u2029\x85\x0b\x0c\x1c\r"]
    path = tmp_path / "results.jsonl"
    details = results.save_details(path, "x", results.Graded(measurements=[], records=told), [])
    assert results.records(path, {"details": details}) == told


def test_many_writers_tear_nothing(tmp_path):
    path = tmp_path / "results.jsonl"

    def write(number):
        shared = {"schema_version": 1, "hashes": {"result": str(number)}, "pad": "x" * 3000, "details": ""}
        results.append(path, [shared | {"metric": str(line)} for line in range(5)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    found = results.read(path)
    assert len(found) == 200
    assert all([row["metric"] for row in found[i : i + 5]] == list("01234") for i in range(0, 200, 5))


@pytest.mark.parametrize(
    "line", ['{"step": 1, "loss": 2.0}', '{"schema_version": 1, "metric": "x"}', "[1, 2]", "3", "null"]
)
def test_a_file_of_something_else_is_named_with_its_line(grade_with, make_model, tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is no line of results"):
        results.read(path)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: is no line of results"):
        grade_with(model := make_model(), tasks=["retrieval"], out=path)
    assert not model.calls and path.read_text() == f"\n{line}\n"


def test_newer_schema_and_absent_file_are_refused(tmp_path):
    (tmp_path / "new.jsonl").write_text('{"schema_version": 99}\n')
    with pytest.raises(UserError, match="newer"):
        results.read(tmp_path / "new.jsonl")
    with pytest.raises(UserError, match="no such results file"):
        results.read(tmp_path / "absent.jsonl")


def test_fixed_captions_count_by_content(grade_with, make_model, tmp_path):
    file = tmp_path / "fixed.txt"
    config = EvaluateConfig(captioning=CaptioningSettings(fixed_captions=file))
    hashes = []
    for text in ("red circle", "blue square"):
        file.write_text(text)
        hashes.append(grade_with(make_model(), tasks=["captioning"], config=config)[0]["hashes"]["result"])
    assert hashes[0] != hashes[1]


def test_import_is_light():
    code = "import sys, evaluation.evaluate, evaluation.watch, evaluation.report, evaluation.compare\n"
    code += "print([m for m in ('torch', 'transformers', 'matplotlib', 'pycocoevalcap', 'jinja2') if m in sys.modules])"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "[]\n"


def test_no_ratio_of_numbers_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.append(tmp_path / "r.jsonl", [{"value": np.nan}])
