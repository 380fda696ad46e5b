"""A function over the parts of a pool: with the builtin map, or over Ray where there are partitions enough to pay.

Parts are many and what is done with one is short, so they go to the workers in
bundles. Results come back in the order of the items, though the bundles do not.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from curation.shuffle import MapParts
from curation.workers import Workers, progress

BUNDLE = 64  # items that go to a worker together, where there are many: a call costs a millisecond
RAY_PARTITIONS = 4  # from so many on, selection is spread over Ray; below, starting it costs more than it gives


def spread(workers: Workers, pool: Sequence[Any], label: str) -> MapParts:
    """A map that suits a pool of so many partitions, and shows how far it is."""

    def shown(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        results = map(function, items) if len(pool) < RAY_PARTITIONS else bundled(function, items)
        doing = getattr(function, "label", label)
        return progress(results, label=doing, total=len(items), unit="steps", amount=lambda _: 1, brief=True)

    def bundled(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
        size = max(1, min(BUNDLE, len(items) // 256))
        bundles = [items[start : start + size] for start in range(0, len(items), size)]
        early: dict[int, list[Any]] = {}  # results that came before an earlier bundle's: about one for each worker
        following = 0
        for number, results in workers.map(_Bundled(function), list(enumerate(bundles))):
            early[number] = results
            while following in early:
                yield from early.pop(following)
                following += 1

    return shown


class _Bundled:
    """A function over (number, items) that hands the number back, because results come in any order."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self) -> Callable[[tuple[int, Sequence[Any]]], tuple[int, list[Any]]]:
        return lambda numbered: (numbered[0], [self._function(item) for item in numbered[1]])
