"""Batches from webdataset shards, in one order that is a function of (seed, epoch) alone.

A run is a line of positions 0, 1, 2, ...; position p of epoch e is one sample
of one shard, found in O(1): shards are permuted, cut into windows of K, and
samples are permuted inside their window, so that a step touches few shards.
Global batch b holds positions [b * B, (b + 1) * B) whatever the number of
ranks or threads, and resuming is starting at another position.

A sample that cannot be read stays in the batch as a hole without weight, so
later positions do not shift; holes are counted and bounded by `max_error_rate`.

Pictures are decoded by threads (the decoders release the GIL), scaled in the
DCT where the JPEG allows it, and may be kept decoded in one memory-mapped file
that all ranks of a host share: later epochs then cost a copy.
"""

import io
import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from curation import tar
from curation.captions import read_captions
from curation.errors import UserError
from curation.hashing import hash64
from training.config import LoaderConfig


class Shards:
    """A folder of webdataset tars, indexed by header: which sample lies where."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise UserError(f"--data {folder}: no such folder; name one that holds *.tar shards")
        self.paths = sorted(folder.glob("*.tar"))
        if not self.paths:
            raise UserError(f"--data {folder}: holds no *.tar; name the shards folder of a curated output")
        self.data, self.samples = [], []
        for path in self.paths:
            data = tar.open_shard(path)
            samples, damage = tar.samples(data)
            if damage:
                raise UserError(f"--data {path}: {damage}; build the shard again")
            self.data.append(data)
            self.samples.append(samples)
        self.sizes = np.array([len(s) for s in self.samples])
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        recorded = folder / "sizes.json"
        if recorded.exists() and (lies := self._lies(json.loads(recorded.read_text()))):
            raise UserError(f"--data {recorded}: {lies}; build the shards again")
        if not len(self):
            raise UserError(f"--data {folder}: its shards hold no sample; curate less strictly")

    def __len__(self) -> int:
        return int(self.first[-1])

    def _lies(self, sizes: dict[str, int]) -> str | None:
        found = {p.name: int(n) for p, n in zip(self.paths, self.sizes)}
        for name in sorted({*sizes, *found}):
            if sizes.get(name) != found.get(name):
                return f"says {sizes.get(name)} samples for {name}, found {found.get(name)}"
        return None

    def member(self, shard: int, index: int, *extensions: str) -> bytes | None:
        """The bytes of the first of these members that the sample has."""
        members = self.samples[shard][index].members
        for extension in extensions:
            if extension in members:
                m = members[extension]
                return self.data[shard][m.offset : m.offset + m.size]
        return None

    def captions(self, shard: int, index: int) -> tuple[str, list[str]]:
        """The caption that curation scored, and all captions of a sample.

        Raises:
            ValueError: what is wrong with the text or the json.
        """
        record = json.loads(self.member(shard, index, "json") or b"{}")
        return read_captions(record, self.member(shard, index, "txt"))

    def mixed(self, shard: int, index: int, members: Mapping[str, float]) -> dict[str, float]:
        """The texts of these members that the sample has, with the weight of each; "txt" is the scored caption.

        Raises:
            ValueError: what is wrong with a text or the json, or "caption_missing" where all of them are.
        """
        texts: dict[str, float] = {}
        for member, weight in members.items():
            found = self.member(shard, index, member)
            text = self.captions(shard, index)[0] if member == "txt" else (found or b"").decode()
            if text:
                texts[text] = texts.get(text, 0.0) + weight
        if not texts:
            raise ValueError("caption_missing")
        return texts

    def every_caption(self, members: Mapping[str, float] | None = None) -> Iterator[str]:
        """Every readable caption, shard by shard; where `members` are named, the texts of those."""
        for shard, samples in enumerate(self.samples):
            for index in range(len(samples)):
                try:
                    yield from self.mixed(shard, index, members) if members else self.captions(shard, index)[1]
                except (ValueError, RecursionError):  # counted when the sample is drawn
                    continue


class Order:
    """position -> (epoch, shard, index), as a function of (seed, epoch) alone."""

    def __init__(self, sizes: np.ndarray, seed: int, window: int) -> None:
        self.sizes, self.seed, self.window = sizes, seed, window
        self.total = int(sizes.sum())
        self._epoch = -1
        self._windows: dict[int, np.ndarray] = {}

    def __call__(self, position: int) -> tuple[int, int, int]:
        epoch, at = divmod(position, self.total)
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, {}
            self._shards = np.random.default_rng(hash64(self.seed, "shards", epoch)).permutation(len(self.sizes))
            self._starts = np.concatenate([[0], np.cumsum(self.sizes[self._shards])])
        place = int(np.searchsorted(self._starts, at, side="right")) - 1  # place of the shard in this epoch
        number = place // self.window
        members = self._shards[number * self.window : (number + 1) * self.window]
        if number not in self._windows:
            rng = np.random.default_rng(hash64(self.seed, "window", epoch, number))
            self._windows = {number: rng.permutation(int(self.sizes[members].sum()))}
        drawn = int(self._windows[number][at - self._starts[number * self.window]])
        ends = np.cumsum(self.sizes[members])
        which = int(np.searchsorted(ends, drawn, side="right"))
        return epoch, int(members[which]), drawn - int(ends[which] - self.sizes[members[which]])


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Side of the model's input and its statistics."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def decode(payload: bytes, side: int, resize_mode: str) -> np.ndarray:
    """uint8 [side, side, 3], scaled in the DCT where the format can: for training, never for measuring."""
    image = Image.open(io.BytesIO(payload))
    image.draft("RGB", (side, side))
    rgb = image.convert("RGB")
    box = None
    if resize_mode == "shortest":
        short, (w, h) = min(rgb.size), rgb.size
        box = ((w - short) / 2, (h - short) / 2, (w + short) / 2, (h + short) / 2)
    return np.asarray(rgb.resize((side, side), Image.Resampling.BICUBIC, box=box))


class Loader:
    """This rank's chunks of every global batch, from `position` on, prefetched by threads.

    Args:
        encode_text: captions -> tensors of a chunk.
        cache: file for decoded pictures, or None.
        collate: (picture uint8 [S, S, 3], caption) of each row, None for a hole -> a chunk, in place of `encode_text`.
    """

    def __init__(
        self,
        shards: Shards,
        config: LoaderConfig,
        image: ImageSpec,
        encode_text: Callable[[list[str]], dict[str, torch.Tensor]],
        *,
        seed: int,
        rank: int,
        world_size: int,
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
        collate: Callable[[list[tuple[np.ndarray, str] | None]], dict[str, torch.Tensor]] | None = None,
    ) -> None:
        self.shards, self.config, self.image, self.encode_text = shards, config, image, encode_text
        self.collate = collate
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.order = Order(shards.sizes, seed, config.window_shards)
        self.side = config.decode_size or image.size
        scale = 1 / (255 * np.array(image.std, np.float32))
        self._scale = torch.from_numpy(scale)[:, None, None]
        self._shift = torch.tensor([-m / s for m, s in zip(image.mean, image.std)])[:, None, None]
        self.dtype = dtype
        self.errors = 0
        self._pixels = self._known = None
        if cache is not None:
            n = len(shards)
            self._pixels = _shared_array(cache, (n, self.side, self.side, 3))
            self._known = _shared_array(cache.with_suffix(".known"), (n,))

    def _decoded(self, shard: int, index: int) -> np.ndarray:
        row = int(self.shards.first[shard]) + index
        if self._known is not None and self._known[row]:
            return self._pixels[row]  # type: ignore[index]
        payload = self.shards.member(shard, index, *tar.IMAGE_EXTENSIONS)
        if payload is None:
            raise KeyError("no image member")
        pixels = decode(payload, self.side, self.config.resize_mode)
        if self._known is not None:
            self._pixels[row] = pixels  # type: ignore[index]
            self._known[row] = 1
        return pixels

    def _sample(self, place: tuple[int, int, int]) -> tuple[np.ndarray, str, bool]:
        """(uint8 [S, S, 3], caption, valid) at (epoch, shard, index); a sample that cannot be read is a hole."""
        epoch, shard, index = place
        size = self.image.size
        try:
            rng = np.random.default_rng(hash64(self.seed, epoch, self.shards.samples[shard][index].key))
            if isinstance(self.config.captions, dict):
                texts = self.shards.mixed(shard, index, self.config.captions)
                weights = np.array(list(texts.values()))
                caption = list(texts)[int(rng.choice(len(texts), p=weights / weights.sum()))]
            else:
                scored, captions = self.shards.captions(shard, index)
                caption = captions[int(rng.integers(len(captions)))] if self.config.captions == "random" else scored
            pixels = self._decoded(shard, index)
        except Exception:  # Pillow's decoders raise almost anything; `max_error_rate` bounds what is forgiven
            self.errors += 1
            return np.zeros((size, size, 3), np.uint8), "", False
        low, high = self.config.crop_scale
        if low < 1.0:
            pixels = _crop(pixels, size, rng, low, high)
        elif pixels.shape[0] != size:
            pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
        if self.config.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels, caption, True

    def _collate(self, rows: list[tuple[np.ndarray, str, bool]]) -> dict[str, torch.Tensor]:
        if self.collate is not None:
            return self.collate([row[:2] if row[2] else None for row in rows])
        pixels = torch.from_numpy(np.stack([r[0] for r in rows])).permute(0, 3, 1, 2)  # [c, 3, S, S]
        return {
            "pixel_values": (pixels.float() * self._scale + self._shift).to(self.dtype),
            "valid": torch.tensor([r[2] for r in rows]),
            **self.encode_text([r[1] for r in rows]),
        }

    def batches(self, step: int, steps: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """The chunks of this rank for the batches `step` .. `steps` - 1."""
        local = self.config.batch // self.world_size
        kept = min(self.config.retain, local)
        bounds = [*([0] if kept else []), *range(kept, local, self.config.chunk), local]
        ready: queue.Queue = queue.Queue(maxsize=2)
        stop = threading.Event()

        def offer(item: Any) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            try:
                with ThreadPoolExecutor(self.config.threads) as pool:
                    for batch in range(step, steps):
                        start = batch * self.config.batch + self.rank * local
                        places = [self.order(p) for p in range(start, start + local)]  # in this thread: it has a state
                        rows = list(pool.map(self._sample, places))
                        if not offer([self._collate(rows[a:b]) for a, b in itertools.pairwise(bounds)]):
                            return
                offer(None)
            except BaseException as error:  # handed to the training thread, which raises it
                offer(error)

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def ids(self, batch: int) -> list[str]:
        """Keys of the whole global batch, in order."""
        found = (self.order(p) for p in range(batch * self.config.batch, (batch + 1) * self.config.batch))
        return [self.shards.samples[shard][index].key for _, shard, index in found]


def _crop(pixels: np.ndarray, size: int, rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A random box of `low`..`high` of the area and an aspect of 3/4..4/3, resized to [size, size, 3]."""
    side = pixels.shape[0]
    area, aspect = rng.uniform(low, high), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w, h = (min(1.0, float(np.sqrt(area * a))) * side for a in (aspect, 1 / aspect))
    x, y = rng.uniform(0, side - w), rng.uniform(0, side - h)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h)))


def _shared_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A zeroed uint8 array in a sparse file that every rank of the host maps."""
    size = int(np.prod(shape))
    with open(path, "ab") as f:
        f.truncate(size)
    return np.memmap(path, np.uint8, "r+", shape=shape)
