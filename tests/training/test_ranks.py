"""Ranks that a test starts end with it, whatever became of them."""

import psutil
import pytest

from tests.training.ranks import launch

SCRIPT = """
import os, sys, time
print("here is rank", os.environ["RANK"], *sys.argv[1:], flush=True)
if os.environ["RANK"] in sys.argv[1:]:
    sys.exit("gives up")
time.sleep(0 if "well" in sys.argv else 3600)
"""


@pytest.mark.parametrize(
    ("arguments", "timeout", "said"),
    [(["1"], 800, "rank 1 ended with 1: here is rank 1 1\ngives up"), ([], 1, "rank 0 ended with None")],
)
def test_ranks_end_where_one_fails_or_time_is_up(tmp_path, arguments, timeout, said):
    (tmp_path / "script.py").write_text(SCRIPT)
    before = psutil.Process().children()
    with pytest.raises(AssertionError, match=said):
        launch(str(tmp_path / "script.py"), 2, *arguments, timeout=timeout)
    assert psutil.Process().children() == before


def test_what_ranks_print_is_given_by_rank(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = launch(str(tmp_path / "script.py"), 2, "well")
    assert printed == ["here is rank 0 well\n", "here is rank 1 well\n"]
