"""The tasks by name: how each opens its data and how it grades a model.

A new task is one file with its settings and `grade`, and one line here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.data import open_classification, open_regions, open_retrieval
from evaluation.results import Graded
from evaluation.tasks import captioning, classification, region_captioning, region_retrieval, retrieval


class Task(NamedTuple):
    """`open(folder)` gives the data, `grade(model, data, settings, cache=, batch=)` the measurements."""

    open: Callable[[Path], Any]
    grade: Callable[..., Graded]


TASKS = {
    "retrieval": Task(open_retrieval, retrieval.grade),
    "classification": Task(open_classification, classification.grade),
    "captioning": Task(open_retrieval, captioning.grade),
    "region_retrieval": Task(open_regions, region_retrieval.grade),
    "region_captioning": Task(open_regions, region_captioning.grade),
}
