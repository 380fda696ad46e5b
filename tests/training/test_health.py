"""Which steps may be taken, by values alone."""

import json
import math
from statistics import median

import pytest

from curation.errors import UserError
from training.health import Health, kind_of


def test_what_is_not_finite_is_skipped_counted_and_named():
    health = Health(max_ratio=None, max_skipped=5)
    assert health.skip(1, 2.0, 1.0) is None and health.skip(2, 2.0) is None
    assert health.skip(3, math.nan) == "the loss is nan"
    assert health.skip(4, 2.0, math.inf) == "the gradient's norm is inf"
    assert health.skip(5, 1e30, 1e30) is None, "without a ratio, whatever is finite is taken"
    assert health.skipped == 2 and health.state()["losses"] == {"": [2.0, 2.0, 1e30]}


def test_a_loss_far_above_the_running_median_is_skipped():
    health = Health(max_ratio=3.0, max_skipped=100)
    losses = [10.0 - 0.01 * n for n in range(300)]
    assert not any(health.skip(n, loss) for n, loss in enumerate(losses))
    bound = 3.0 * median(losses[-100:])
    assert health.skip(300, bound + 0.01) and not health.skip(301, bound - 0.01)
    resumed = Health(max_ratio=3.0, max_skipped=100)
    resumed.restore(json.loads(json.dumps(health.state())))
    assert resumed.skip(302, 10 * bound) == health.skip(302, 10 * bound) != None  # noqa: E711


def test_steps_are_compared_with_those_of_the_same_losses():
    """Pictures alone lose 100 where pairs lose 1: neither looks like an explosion beside the other, nor hides one."""
    health = Health(max_ratio=3.0, max_skipped=100)
    pictures, pairs = kind_of({"loss": 0, "loss_mim": 0, "lr": 0}), kind_of(["loss_mim", "loss_embed", "loss"])
    assert pictures == "mim" and pairs == "embed+mim"
    for n in range(40):
        kind, loss = (pictures, 100.0) if n % 4 == 0 else (pairs, 1.0)
        assert health.skip(n, loss, 1.0, kind) is None
    assert health.skip(40, 3.1, 1.0, pairs) and not health.skip(41, 2.9, 1.0, pairs)
    assert health.skip(42, 301.0, 1.0, pictures) and not health.skip(43, 299.0, 1.0, pictures)
    assert health.skip(44, 1e6, 1.0, "mlm") is None, "a kind that is new has nothing to be judged by"


def test_too_many_in_a_row_end_the_run_in_one_line():
    health = Health(max_ratio=None, max_skipped=2)
    for step, loss in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan]):
        health.skip(step, loss)
    with pytest.raises(UserError, match=r"max_skipped: 3 steps in a row .* step 5 because the loss is nan") as error:
        health.skip(5, math.nan)
    assert "\n" not in str(error.value) and health.skipped == 5
