"""A folder of webdataset tars, here or behind a URL: which sample lies where, and the members of a sample.

Sizes come from `sizes.json` or `index.json` beside the tars, as `gemsmith
curate` writes them; without either, local tars are counted by their headers,
once a run (training/data/sources.py).
A tar is opened, and its index checked against those sizes, when its first
sample is asked for; as many stay open as two windows of the order have.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from curation import files, tar
from curation.captions import read_captions
from curation.errors import UserError
from training import regions
from training.data.cache import ShardCache

Fields = Mapping[str, Any]
"""A sample by extension, as webdataset has it: bytes, but `json` parsed; and its "uid"."""
REASONS = (
    *("shard_gone", "json_broken", "caption_missing", "caption_not_utf8", "captions_broken"),
    *("image_missing", "image_broken", "unreadable"),
    *regions.REASONS,
)
"""Why a sample is a hole."""
FETCHES = 2  # shards that are fetched at a time, ahead of need


class Hole(Exception):
    """A sample that cannot be had; the message is one of REASONS."""


class Shards:
    """The samples of a folder of tars, numbered through in the order of the tars' names."""

    def __init__(
        self,
        folder: Path | str,
        *,
        cache: ShardCache | None = None,
        keep: int = 16,
        known: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        """cache: where remote tars are kept · keep: tars that stay open · known: what `counted` gave before.

        Raises:
            UserError: no such folder, no tars or no samples in it, damage, or sizes that are not those of the tars.
        """
        self.folder, self.cache, self.keep = str(folder), cache, keep
        listed = files.listed(self.folder)
        if listed is None:
            raise UserError(f"--data {folder}: no such folder; name one that holds *.tar shards")
        self.files = [file for file in listed if file.name.endswith(".tar")]
        if not self.files:
            raise UserError(f"--data {folder}: holds no *.tar; name the shards folder of a curated output")
        assert cache is not None or not files.is_remote(self.folder), "remote shards need a cache"
        self._open: OrderedDict[int, tuple[tar.Bytes, list[tar.Sample]]] = OrderedDict()
        self._gone: set[int] = set()
        self._lock = threading.Lock()
        self._opening = [threading.Lock() for _ in self.files]
        self._ahead: dict[int, Future] = {}
        self._pool = ThreadPoolExecutor(FETCHES, "fetch")
        self.recorded, sizes = self._recorded(listed)
        if sizes is None:
            sizes = {_base(file.name): self._count(n, known or {}) for n, file in enumerate(self.files)}
        names = [_base(file.name) for file in self.files]
        for name in sorted({*names, *sizes}):
            if name not in names or name not in sizes:
                self._lie(name, sizes.get(name), "it" if name in names else "no such file")
        self.sizes = np.array([sizes[name] for name in names], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        if not len(self):
            raise UserError(f"--data {folder}: its shards hold no sample; curate less strictly")

    def __len__(self) -> int:
        return int(self.first[-1])

    def _recorded(self, listed: Sequence[files.File]) -> tuple[str, dict[str, int] | None]:
        """(the file that holds the sizes, samples by name of the tar), or ("", None) where there is none."""
        there = {_base(file.name): file.name for file in listed}
        found = next((name for name in ("sizes.json", "index.json") if name in there), None)
        if found is None:
            if files.is_remote(self.folder):
                raise UserError(
                    f"--data {self.folder}: has neither sizes.json nor index.json, without which all of it would "
                    "have to be downloaded first; `gemsmith curate` writes both"
                )
            return "", None
        try:
            content = json.loads(files.read(there[found]))
            if found == "index.json":
                content = {_base(shard["url"]): shard["nsamples"] for shard in content["shardlist"]}
            sizes = {str(name): int(n) for name, n in content.items()}
            if min(sizes.values(), default=0) < 0:
                raise ValueError("a negative size")
        except (ValueError, TypeError, KeyError, AttributeError) as reason:
            raise UserError(f"--data {there[found]}: is broken ({reason!r}); build the shards again") from None
        return there[found], sizes

    def _count(self, shard: int, known: Mapping[str, Sequence[Any]]) -> int:
        file = self.files[shard]
        *told, samples = known.get(file.name, (0,))
        return samples if told == [file.size, file.stamp] else len(self._indexed(shard)[1])

    def counted(self) -> dict[str, list[Any]]:
        """{name: [size, stamp, samples]} of tars that had to be counted."""
        if self.recorded:
            return {}
        return {file.name: [file.size, file.stamp, int(n)] for file, n in zip(self.files, self.sizes)}

    def _lie(self, name: str, said: int | None, found: int | str) -> None:
        where = self.recorded or self.folder
        raise UserError(f"--data {where}: says {said} samples for {name}, found {found}; build the shards again")

    def place(self, i: int) -> tuple[int, int]:
        """(shard, index in it) of sample i."""
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        return shard, i - int(self.first[shard])

    def opened(self, shard: int) -> tuple[tar.Bytes, list[tar.Sample]]:
        """The bytes and the index of a shard.

        Raises:
            Hole: it is gone.
            UserError: it is damaged, or holds another number of samples than recorded.
        """
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
        with self._opening[shard]:
            with self._lock:
                if shard in self._open:
                    return self._open[shard]
            found = self._indexed(shard)
            name = _base(self.files[shard].name)
            if len(found[1]) != self.sizes[shard]:
                self._lie(name, int(self.sizes[shard]), len(found[1]))
            with self._lock:
                self._open[shard] = found
                while len(self._open) > self.keep:
                    self._open.popitem(last=False)
            return found

    def _indexed(self, shard: int) -> tuple[tar.Bytes, list[tar.Sample]]:
        file = self.files[shard]
        if shard in self._gone:
            raise Hole("shard_gone")
        try:
            data = tar.open_tape(file.name) if self.cache is None else self.cache.open(file)
        except FileNotFoundError:
            self._gone.add(shard)  # asked for once, not for each of its samples
            raise Hole("shard_gone") from None
        samples, damage = tar.samples(data)
        if damage:
            raise UserError(f"--data {file.name}: {damage}; build the shard again")
        return data, samples

    def ahead(self, shards: Sequence[int]) -> None:
        """These will be read soon, in this order: remote ones are fetched from now on, what is not named is left."""
        if self.cache is None:
            return
        for shard, under_way in list(self._ahead.items()):
            if under_way.done() or (shard not in shards and under_way.cancel()):
                del self._ahead[shard]
        for shard in shards:
            if shard not in self._ahead and shard not in self._open and shard not in self._gone:
                # What fails here is raised to whoever needs the shard.
                self._ahead[shard] = self._pool.submit(self.cache.open, self.files[shard])

    def key(self, i: int) -> str:
        shard, index = self.place(i)
        return self.opened(shard)[1][index].key

    def sample(self, i: int) -> Fields:
        """The members of sample i.

        Raises:
            Hole: its shard is gone, or its json cannot be parsed.
        """
        shard, index = self.place(i)
        data, samples = self.opened(shard)
        sample = samples[index]
        fields: dict[str, Any] = {e: data[m.offset : m.offset + m.size] for e, m in sample.members.items()}
        record = {}
        if "json" in fields:
            try:
                record = fields["json"] = json.loads(fields["json"])
            except (ValueError, RecursionError):
                raise Hole("json_broken") from None
        uid = record.get("uid") if isinstance(record, dict) else None
        fields["uid"] = uid if isinstance(uid, str) else sample.key
        return fields

    def every_caption(self, members: Mapping[str, float] | None = None) -> Iterator[str]:
        """Every readable caption, shard by shard; where `members` are named, the texts of those."""
        for i in range(len(self)):
            try:
                fields = self.sample(i)
                yield from weighted_texts(fields, members) if members else read_captions(*_texts(fields))[1]
            except UserError:
                raise
            except (Hole, ValueError):  # counted when the sample is drawn
                continue


def drawn_text(fields: Fields, setting: str | Mapping[str, float], rng: np.random.Generator) -> str:
    """The caption of a sample by `loader.captions`: the scored one, one of all, or a member's by weight.

    Raises:
        Hole: why there is none.
    """
    try:
        if isinstance(setting, str):
            scored, captions = read_captions(*_texts(fields))
            return captions[int(rng.integers(len(captions)))] if setting == "random" else scored
        texts = weighted_texts(fields, setting)
    except ValueError as reason:
        raise Hole(str(reason) if str(reason) in REASONS else "captions_broken") from None
    weights = np.array(list(texts.values()))
    return list(texts)[int(rng.choice(len(texts), p=weights / weights.sum()))]


def weighted_texts(fields: Fields, members: Mapping[str, float]) -> dict[str, float]:
    """The texts of these members that the sample has, with the weight of each; "txt" is the scored caption.

    Raises:
        ValueError: what is wrong with a text or the json, or "caption_missing" where all of them are.
    """
    texts: dict[str, float] = {}
    for member, weight in members.items():
        try:
            text = read_captions(*_texts(fields))[0] if member == "txt" else fields.get(member, b"").decode()
        except UnicodeDecodeError:
            raise ValueError("caption_not_utf8") from None
        if text:
            texts[text] = texts.get(text, 0.0) + weight
    if not texts:
        raise ValueError("caption_missing")
    return texts


def drawn_region(fields: Fields, rng: np.random.Generator) -> tuple[regions.Region, tuple[int, int]]:
    """One of the sample's regions, each as likely, and the (width, height) of its picture.

    Raises:
        Hole: there is none, or the drawn one cannot be used.
    """
    payload = picture(fields)
    try:
        size = regions.size_of(payload)
    except Exception:  # Pillow's decoders raise almost anything
        raise Hole("image_broken") from None
    try:
        found = regions.entries(fields.get("json"))
        return regions.read_region(found[int(rng.integers(len(found)))], *size), size
    except ValueError as reason:
        raise Hole(str(reason)) from None


def picture(fields: Fields) -> bytes:
    """The image member, the preferred of several.

    Raises:
        Hole: there is none.
    """
    found = next((fields[e] for e in tar.IMAGE_EXTENSIONS if e in fields), None)
    if found is None:
        raise Hole("image_missing")
    return found


def _texts(fields: Fields) -> tuple[Any, bytes | None]:
    return fields.get("json", {}), fields.get("txt")


def _base(name: str) -> str:
    return name.rpartition("/")[2]
