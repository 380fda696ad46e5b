"""How much of a pool may be unusable: judged by all of it, and before that only where the rest cannot mend it.

What is broken may lie in the shards that come first, in those that another job
measures or in what was measured before. So it is compared with the samples that
there will be, as if none of those to come were broken: of most shards their
number is known before they are read.
"""

from collections import Counter
from collections.abc import Sequence

from curation.errors import UserError
from curation.pool import Shard

FREE_ERRORS = 100  # so many broken samples stop no run, however small the pool, unless none are allowed


def check_budget(errors: Counter[str], seen: int, max_error_rate: float, what: str = "samples") -> None:
    """
    Raises:
        UserError: more than this share of what was seen cannot be used, and more than a hundred; at 0, one.
    """
    broken = errors.total()
    if broken > FREE_ERRORS and broken / seen > max_error_rate if max_error_rate else broken:
        found = ", ".join(f"{reason} {n}" for reason, n in errors.most_common())
        raise UserError(
            f"max_error_rate: {broken} of {seen} {what} cannot be used ({found}), "
            f"more than {max_error_rate:g} of them; mend the pool or raise max_error_rate"
        )


class Expected:
    """The samples of a pool of which some shards were not looked into yet.

    Where the listing does not tell it, which is of tars elsewhere, they are taken to have as many a byte as those that
    were looked into.
    """

    def __init__(self, found: int, known: Sequence[Shard], ahead: Sequence[Shard]) -> None:
        """`found` samples are in the shards that are `known`."""
        self._ahead = {shard.path: shard for shard in ahead}
        self._found = found
        self._bytes = sum(shard.size for shard in known)
        self._told = sum(shard.samples or 0 for shard in ahead)
        self._untold = sum(shard.size for shard in ahead if shard.samples is None)

    def found(self, path: str, samples: int) -> None:
        """This shard has so many; of one that was known already nothing changes."""
        if shard := self._ahead.pop(path, None):
            self._found += samples
            self._bytes += shard.size
            self._told -= shard.samples or 0
            self._untold -= shard.size if shard.samples is None else 0

    @property
    def samples(self) -> int:
        return self._found + self._told + self._untold * self._found // max(self._bytes, 1)
