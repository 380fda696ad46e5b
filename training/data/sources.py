"""What a run reads: named sources, each with its samples, its weight in the mixture and its kind.

Whatever has `Samples`' four members is a source: shards of pairs, or subsets of
MMEB-train, whose rows are queries and their targets. The recipe names sources (`loader.sources`), and
`--data NAME=DIR` says or replaces where they lie; `--data DIR` is one source of pairs, or all sources of a recipe whose
sources are of different kinds: FLAVA's pairs, images and texts out of the same shards.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from curation import files
from curation.errors import UserError
from curation.manifest import read_manifest, write_manifest
from training.config import Kind, LoaderConfig, SourceConfig
from training.data.cache import ShardCache
from training.data.mmeb import Subset, read_of
from training.data.neighbours import FILE as NEIGHBOURS
from training.data.shards import Shards

COUNTS = "counted_shards.json"
"""In a run's folder: the samples of each tar that was counted there."""
ONE = "data"  # the name of the source that `--data DIR` means


class Samples(Protocol):
    """Samples by number, 0 .. sum(sizes) - 1."""

    @property
    def sizes(self) -> np.ndarray:
        """int64 [parts]: samples of each part; a part is what is read together (a shard). One part where it is all
        the same."""

    def key(self, i: int) -> str:
        """The id of sample i."""

    def sample(self, i: int) -> Mapping[str, Any]:
        """The fields of sample i, read by several threads at once: "uid", of which its random draws are made, and for
        pairs, regions, images and texts the members as webdataset names them, for rows the "row" and, where several
        show the same thing, their "group". A `Hole` where it cannot be had."""

    def ahead(self, parts: Sequence[int]) -> None:
        """These parts will be read soon, in this order."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples in the mixture. kind: what a chunk of them holds; chunks are of one kind."""

    name: str
    samples: Samples
    weight: float = 1.0
    kind: Kind = "pairs"


def named(config: LoaderConfig, data: Sequence[str]) -> dict[str, str]:
    """The path or URL of each source, from the recipe and the words of `--data`.

    Raises:
        UserError: a name that the recipe does not have, a folder without a name where there are several sources of a
            kind, a source without a path, or none at all.
    """
    paths = {name: source.path for name, source in config.sources.items()}
    kinds = [source.kind for source in config.sources.values()]
    for word in data:
        name, equals, path = word.partition("=")
        if not equals or not name.isidentifier():  # a folder may have a "=" of its own
            if len(data) > 1 or len(set(kinds)) < len(kinds):
                raise UserError(f"--data {word}: one of several sources; write NAME={word}")
            return dict.fromkeys(paths or [ONE], word)
        if config.sources and name not in config.sources:
            raise UserError(f"--data {word}: the recipe has no source {name}; it has {', '.join(config.sources)}")
        if sum(other.startswith(f"{name}=") for other in data) > 1:
            raise UserError(f"--data {word}: a second folder for {name}; give one, or another name")
        paths[name] = path
    if not paths:
        raise UserError("--data: is missing; name a folder of webdataset shards, or NAME=DIR for each of several")
    for name, path in paths.items():
        if not path:
            raise UserError(f"loader.sources.{name}.path: is missing; write it there or add --data {name}=DIR")
    return paths


def open_sources(
    config: LoaderConfig, paths: Mapping[str, str], counts: Path | None = None, negatives: int | None = None
) -> list[Source]:
    """Open every source's shards or subset; remote shards share one cache on this host.

    Args:
        counts: what `keep_counts` wrote before, or nothing.
        negatives: hard negatives that are read of each of a subset's rows, at most; None: all.

    Raises:
        UserError: what `Shards` or `Subset` finds, or a cache too small for two windows of the remote shards.
    """
    cache = None
    if any(files.is_remote(files.full_name(path)) for path in paths.values()):
        folder = Path(config.cache_dir) if config.cache_dir else Path(tempfile.gettempdir()) / "gemsmith-shards"
        cache = ShardCache(folder, int(config.cache_gib * 2**30))
    keep, sources, need = 2 * config.window_shards, [], 0
    known = read_manifest(counts) if counts is not None else None
    for name, path in paths.items():
        settings = config.sources.get(name, SourceConfig())
        if settings.kind == "rows":
            rows = Subset(Path(path), limit=settings.limit, negatives=negatives)
            sources.append(Source(name=name, samples=rows, weight=settings.weight, kind="rows"))
            continue
        full = files.full_name(path)
        remote = files.is_remote(full)
        shards = Shards(full if remote else Path(path), cache=cache if remote else None, keep=keep, known=known)
        if remote:
            need += sum(sorted(file.size for file in shards.files)[-keep:])
        sources.append(Source(name=name, samples=shards, weight=settings.weight, kind=settings.kind))
    if cache is not None and cache.limit < need:
        raise UserError(
            f"loader.cache_gib: {config.cache_gib:g} does not hold two windows of {config.window_shards} shards "
            f"({need / 2**30:.3g} GiB); raise it or lower loader.window_shards"
        )
    return sources


def keep_counts(sources: Sequence[Source], counts: Path) -> None:
    """Write down how many samples lie in shards that do not say so, for every rank and every start to come: reading all
    headers of a large folder takes minutes."""
    found: dict[str, Any] = {}
    for source in sources:
        if isinstance(source.samples, Shards):
            found |= source.samples.counted()
    if not found.items() <= (read_manifest(counts) or {}).items():
        write_manifest(counts, found)


def fingerprint(config: LoaderConfig, paths: Mapping[str, str]) -> list[Any]:
    """What tells these data from others: name, size and stamp of every file of shards or rows, by source where there
    are several."""
    found = []
    for name, path in paths.items():
        rows = config.sources.get(name, SourceConfig()).kind == "rows"
        folder, _, only = path.rpartition("/") if path.endswith(".parquet") else (path, "", "")
        there = {file.name.rpartition("/")[2]: file for file in files.listed(folder or ".") or []}
        read = [only] if only else [file for file in there if file.endswith(".parquet" if rows else ".tar")]
        read = read_of(read) if rows else read
        for file, told in there.items():
            if file in read or (config.neighbours and file.endswith(NEIGHBOURS)):
                entry = (file, told.size, told.stamp)
                found.append(entry if len(paths) == 1 else (name, *entry))
    return found


def every_caption(sources: Sequence[Source], members: Mapping[str, float] | None = None) -> Iterator[str]:
    """Every caption of all shards that have captions and every text of rows, for training a tokenizer."""
    for source in sources:
        if source.kind != "images" and isinstance(source.samples, Shards):
            yield from source.samples.every_caption(members)
        elif isinstance(source.samples, Subset):
            yield from source.samples.texts()
