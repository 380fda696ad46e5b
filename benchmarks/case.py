"""What one row of the benchmarks is: two ways to do the same work, and how they are to compare."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LATEST = Path(__file__).parent / "results" / "latest.json"
Measure = Callable[[], float]  # does the work once and returns the figure, in the case's unit


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row. `ratio` is ours / peer; `reach` bounds it from below where higher is better, else from above.

    Each figure is the mean of so many `calls`, of either side in turn: a second's work is at the mercy of what else is
    done.
    """

    name: str
    area: Literal["curation", "training", "evaluation"]
    unit: str
    better: Literal["higher", "lower"]
    reach: float
    peer_name: str
    ours: Measure
    peer: Measure
    calls: int = 1


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and how large: a folder for its files, and `quick` for a size that only shows that all works."""

    work: Path
    quick: bool
