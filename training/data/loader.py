"""This rank's chunks of every global batch, in one order that is a function of (seed, epoch) alone.

A run is a line of positions 0, 1, 2, ...; the mixture says of which source each
is, and that source's order which sample. Global batch b holds positions
[b * B, (b + 1) * B) whatever the number of ranks or threads, and resuming is
starting at another position. What is random in a sample (its caption, crop,
colours, kept patches) is drawn from (seed, epoch, uid).

A chunk holds one kind of sample. Each rank takes an equal part of every kind in
the batch, holes filling it up, so that all ranks run chunks of the same kinds
and sizes in the same order. A sample that cannot be read stays in its place as
a hole without weight, so later positions do not shift; holes are counted by reason.

Chunks are read in pieces by threads (decoders and tokenizers release the GIL);
the thread that reads the last piece of a chunk closes it, beside others: only
in a tokenizer they take turns (training/tokenizer.py). Pixels are written
normalised into the chunk's tensor, pinned where there is a GPU, some batches
ahead of the step. Pictures may be kept decoded in one file that all ranks of a
host share (training/data/decoded.py): later epochs then cost a copy.
"""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curation.errors import UserError
from curation.hashing import hash64
from training.bottleneck import Timers
from training.config import LoaderConfig
from training.data import images
from training.data.decoded import Decoded
from training.data.images import ImageSpec
from training.data.mixture import Mixture
from training.data.neighbours import read_neighbours
from training.data.order import Order
from training.data.shards import REASONS, Hole, Shards, drawn_region, drawn_text, picture
from training.data.sources import ONE, Source
from training.regions import Region, Unseen, region_weights

PIECE = 16  # rows that a thread reads at a time
Chunk = dict[str, torch.Tensor]


@dataclass(slots=True)
class Drawn:
    """A row of a chunk: `draw` = hash64(seed, epoch, uid), from which all that is random in it comes.

    fields: "text" and "pixels" (as `Loader._pixels` gives them) where its kind has them, "other"
    (the text of the sample after it in its source, or None) of a mismatched pair; of `rows` what the source gave ·
    reason: why it is a hole, "" where it is none, "padding" for what only fills a rank's part · group: int64, equal
    where rows show the same thing: of the json's (or the row's) "group" where it has one, else of the text
    (or the uid); of a region always the phrase.
    """

    draw: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    group: int = 0


class Loader:
    """Chunks by batch, from any batch on.

    Args:
        sources: or one folder of pairs.
        encode_text: captions -> tensors of a chunk; called by several threads at once, as `extra` is.
        extra: (kind, rows) -> more tensors of a chunk, such as masks; all of them for chunks of `rows`, and of any kind
            where `image.raw` is set, "valid" among them: a row whose picture it can make nothing of is not.
        mismatched: (draw) -> whether that row of pairs is given another's text too, as "other".
        cache: where decoded pictures are kept, a file for each source, or None.

    A chunk has "valid" bool [c], "groups" int64 [c] and "draws" int64 [c] (half of each row's `draw`, which says what
    sample of what epoch it is; 0 of a hole), and by its kind "pixel_values" [c, 3, S, S], what
    `encode_text` gives, "regions" fp32 [c, N] (a row's region as weights of the patches), and "patches" int64 [c, keep]
    (numbers of the patches that the step sees, ascending) where `image.keep` is set.
    """

    def __init__(
        self,
        sources: Sequence[Source] | Shards,
        config: LoaderConfig,
        image: ImageSpec,
        encode_text: Callable[[list[str]], Chunk],
        *,
        seed: int,
        rank: int,
        world_size: int,
        dtype: torch.dtype = torch.float32,
        cache: Path | None = None,
        extra: Callable[[str, Sequence[Drawn]], Chunk] | None = None,
        mismatched: Callable[[int], bool] | None = None,
    ) -> None:
        self.sources = [Source(name=ONE, samples=sources)] if isinstance(sources, Shards) else list(sources)
        self.config, self.image, self.encode_text, self.extra = config, image, encode_text, extra
        self.mismatched = mismatched
        self.seed, self.rank, self.world_size = seed, rank, world_size
        weights = {source.name: source.weight for source in self.sources}
        self.mixture = Mixture(weights, seed=seed, unit=config.unit, mixing=config.mixing)
        self.orders = [Order(s.samples.sizes, hash64(seed, s.name), config.window_shards) for s in self.sources]
        self.near = [_near(s) if config.neighbours else None for s in self.sources]
        self.first = [np.concatenate([[0], np.cumsum(s.samples.sizes)]) for s in self.sources]
        self.side = config.decode_size or image.size
        std = np.array(image.std, np.float32)
        self._scale = torch.from_numpy(1 / (255 * std))[:, None, None]
        self._shift = torch.from_numpy(-np.array(image.mean, np.float32) / std)[:, None, None]
        self.dtype, self.pinned = dtype, torch.cuda.is_available()
        retain = config.chunk if config.retain is None else config.retain
        self.retain = retain if isinstance(retain, int) else 0  # "auto" is settled later
        self.longest = False  # give every row the longest text there may be: what a chunk of the run takes at most
        self.holes: Counter[str] = Counter()  # of the batches given so far, on this rank, by reason
        self.timers = Timers()
        pictures = [source.kind in ("pairs", "images", "regions") for source in self.sources]
        self._decoded = [
            Decoded(cache.with_suffix(f".{source.name}.u8"), self.side) if cache and has else None
            for source, has in zip(self.sources, pictures)
        ]

    def batches(self, step: int, steps: int) -> Iterator[list[Chunk]]:
        """The chunks of this rank for the batches `step` .. `steps` - 1."""
        pool = ThreadPoolExecutor(self.config.threads, "loader")
        begun: deque[list[Future]] = deque()
        following = iter(range(step, steps))
        try:
            while True:
                for batch in itertools.islice(following, 1 + self.config.prefetch - len(begun)):
                    begun.append(self._begin(pool, batch))
                if not begun:
                    return
                made = [future.result() for future in begun.popleft()]
                for _, holes in made:
                    self.holes += holes
                yield [chunk for chunk, _ in made]
        finally:
            pool.shutdown(cancel_futures=True)
            for source in self.sources:
                source.samples.ahead(())

    def of_each_kind(self) -> list[Chunk]:
        """A chunk of every kind that the run has, of a source's first samples, with texts as long as they may be: what
        a chunk of the run takes at most. Its holes are not counted."""
        rows = min(self.config.chunk, self.config.batch // self.world_size)
        first: dict[str, int] = {}
        for number, source in enumerate(self.sources):
            first.setdefault(source.kind, number)
        self.longest = True
        with ThreadPoolExecutor(self.config.threads, "loader") as pool:
            for number in first.values():
                self.sources[number].samples.ahead(self.orders[number].ahead(0))
            places = {kind: [(number, own) for own in range(rows)] for kind, number in first.items()}
            made = [_Making(self, kind, those).begin(pool) for kind, those in places.items()]
            chunks = [future.result()[0] for future in made]
        self.longest = False
        return chunks

    def ids(self, batch: int) -> list[str]:
        """Keys of the whole global batch, in order."""
        return [self.sources[s].samples.key(self._sample(s, own)[1]) for _, s, own in self._drawn(batch)]

    def _drawn(self, batch: int) -> list[tuple[int, int, int]]:
        """(position, source, position in that source) of every sample of a global batch."""
        positions = np.arange(batch * self.config.batch, (batch + 1) * self.config.batch)
        return list(zip(positions.tolist(), *(a.tolist() for a in self.mixture(positions))))

    def _sample(self, source: int, own: int) -> tuple[int, int]:
        """(epoch, number of the sample) at a position of a source."""
        epoch, part, index = self.orders[source](self._drawn_at(source, own))
        i = int(self.first[source][part]) + index
        if (near := self.near[source]) is not None and own % 2:
            i = int(near[i, hash64(self.seed, epoch, "neighbour", i) % near.shape[1]])
        return epoch, i

    def _drawn_at(self, source: int, own: int) -> int:
        """Where the order is asked for a position: two of these share one, the sample and then a neighbour of its."""
        return own if self.near[source] is None else own // 2

    def _begin(self, pool: ThreadPoolExecutor, batch: int) -> list[Future]:
        """Have this rank's chunks of a batch made; each future gives (chunk, its holes by reason)."""
        places: dict[str, list[tuple[int, int]]] = {}  # by kind, in the order of the sources
        drawn = self._drawn(batch)
        for number, source in enumerate(self.sources):
            mine = [own for _, s, own in drawn if s == number]
            if mine:
                source.samples.ahead(self.orders[number].ahead(self._drawn_at(number, mine[0])))
                places.setdefault(source.kind, [])
        for _, s, own in drawn:
            places[self.sources[s].kind].append((s, own))
        chunks = []
        for group, (kind, all_of_it) in enumerate(places.items()):
            local = -(-len(all_of_it) // self.world_size)
            rows: list[tuple[int, int] | None] = list(all_of_it[self.rank * local : (self.rank + 1) * local])
            rows += [None] * (local - len(rows))
            kept = min(self.retain, local) if group == 0 else 0
            bounds = [*([0] if kept else []), *range(kept, local, self.config.chunk), local]
            chunks += [_Making(self, kind, rows[a:b]).begin(pool) for a, b in itertools.pairwise(bounds)]
        return chunks

    def row(self, kind: str, place: tuple[int, int] | None) -> Drawn:
        """Read one row; what cannot be read is a hole, with its reason."""
        if place is None:
            return Drawn(reason="padding")
        source, own = place
        epoch, i = self._sample(source, own)
        try:
            fields = self._read(source, i)
            draw = hash64(self.seed, epoch, fields["uid"])
            if kind == "rows":
                return Drawn(draw, fields, group=hash64("group", str(fields.get("group", fields["uid"]))) >> 1)
            rng = np.random.default_rng(draw)
            read: dict[str, Any] = {}
            region, picture_size, flipped = None, (0, 0), False
            if kind == "regions":
                region, picture_size = drawn_region(fields, rng)
                read["text"] = region.phrase
            elif kind != "images":
                read["text"] = drawn_text(fields, self.config.captions, rng)
            if self.longest and "text" in read:
                read["text"] = "a " * self.config.max_tokens
            if kind == "pairs" and self.mismatched is not None and self.mismatched(draw):
                read["other"] = self._other(source, own + 1)
            if kind != "texts":
                with self.timers("decode"):
                    read["pixels"], flipped = self._pixels(source, i, fields, rng)
            if region is not None:
                read["region"] = self._weights(region, picture_size, flipped)
            record = fields.get("json")
            same = record.get("group") if isinstance(record, dict) and region is None else None
            same = same if same is not None else read.get("text", fields["uid"])
            return Drawn(draw, read, group=hash64("group", str(same)) >> 1)
        except Hole as hole:
            return Drawn(reason=str(hole))

    def _read(self, source: int, i: int) -> Mapping[str, Any]:
        """The fields of a sample; a `Hole` where its source cannot give it."""
        try:
            with self.timers("read"):
                return self.sources[source].samples.sample(i)
        except (UserError, Hole):
            raise
        except Exception:  # whatever a source's own reader raises; `max_error_rate` bounds what is forgiven
            raise Hole("unreadable") from None

    def _other(self, source: int, own: int) -> str | None:
        """The text at another position of the source, as it is drawn there; None where that is a hole."""
        epoch, i = self._sample(source, own)
        try:
            fields = self._read(source, i)
            rng = np.random.default_rng(hash64(self.seed, epoch, fields["uid"]))
            return drawn_text(fields, self.config.captions, rng)
        except Hole:
            return None

    def _weights(self, region: Region, size: tuple[int, int], flipped: bool) -> np.ndarray:
        """float32 [N]: the region's weights over the patches of the picture as the model sees it."""
        try:
            return region_weights(region, size, self.image.grid, self.image.resize_mode, flipped)
        except Unseen:
            raise Hole("region_outside") from None

    def _pixels(
        self, source: int, i: int, fields: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[np.ndarray, bool]:
        """The picture as the model sees it but for normalising, uint8 [S, S, 3] ("fit": [h, w, 3]), and whether it is
        flipped."""
        config, image = self.config, self.image
        low, high = config.crop_scale
        box = images.draw_box(rng, low, high) if low < 1.0 else images.WHOLE
        decoded = self._decoded[source]
        payload = picture(fields)
        kept = decoded.read(i) if decoded else None
        try:
            if kept is not None:
                whole = kept
            elif decoded:
                whole = images.decode(payload, self.side, image.resize_mode, interpolation=image.interpolation)
            else:
                whole = images.decode(payload, image.size, image.resize_mode, box, image.interpolation)
            pixels = images.cut(whole, image.size, image.resize_mode, box, image.interpolation) if decoded else whole
        except Exception:  # Pillow's decoders raise almost anything
            raise Hole("image_broken") from None
        if decoded and kept is None:
            decoded.write(i, whole)
        flipped = config.flip and rng.random() < 0.5
        if flipped:
            pixels = pixels[:, ::-1]
        if config.color_jitter_prob and rng.random() < config.color_jitter_prob:
            pixels = images.jitter(np.ascontiguousarray(pixels), config.color_jitter, rng)
        if config.gray_scale_prob and rng.random() < config.gray_scale_prob:
            pixels = images.grey(np.ascontiguousarray(pixels))
        return pixels, flipped

    def normalise(self, pixels: np.ndarray, out: torch.Tensor) -> None:
        """uint8 [S, S, 3] -> out [3, S, S]"""
        planes = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if out.dtype == torch.float32:
            torch.mul(planes, self._scale, out=out).add_(self._shift)
        else:
            out.copy_((planes * self._scale).add_(self._shift))

    def close(self, kind: str, rows: list[Drawn], pixels: torch.Tensor | None) -> Chunk:
        """The tensors of a chunk whose rows are all read; what the family can make nothing of becomes a hole."""
        more: Chunk = {}
        if self.extra is not None:
            with self.timers("prepare"):
                more = self.extra(kind, rows)
            for i in (~more["valid"]).nonzero().flatten().tolist() if "valid" in more else ():
                rows[i] = rows[i] if rows[i].reason else Drawn(reason="image_broken")
        chunk: Chunk = {"valid": torch.tensor([not row.reason for row in rows])}
        chunk["groups"] = torch.tensor([row.group for row in rows])
        chunk["draws"] = torch.tensor([row.draw >> 1 for row in rows])
        if kind in ("pairs", "texts", "regions") and not self.image.raw:
            with self.timers("tokenise"):
                chunk |= self.encode_text([row.fields.get("text", "") for row in rows])
        if kind == "regions":
            whole = np.full(int(np.prod(self.image.grid)), 1 / np.prod(self.image.grid), np.float32)
            chunk["regions"] = torch.from_numpy(np.stack([row.fields.get("region", whole) for row in rows]))
        if pixels is not None and self.image.keep:
            chunk["patches"] = torch.from_numpy(np.stack([self._patches(row.draw) for row in rows]))
        chunk |= more
        if self.pinned:
            chunk = {name: tensor.pin_memory() for name, tensor in chunk.items()}
        return chunk if pixels is None else {"pixel_values": pixels, **chunk}

    def _patches(self, draw: int) -> np.ndarray:
        """int64 [keep] of `image.patches`, ascending."""
        rng = np.random.default_rng(hash64(draw, "patches"))
        return np.sort(rng.choice(self.image.patches, self.image.keep, replace=False))


def _near(source: Source) -> np.ndarray:
    assert isinstance(source.samples, Shards)  # pairs: LoaderConfig
    return read_neighbours(source.samples.folder, len(source.samples))


class _Making:
    """A chunk in the making: its rows are read in pieces, and the thread that reads the last one closes it."""

    def __init__(self, loader: Loader, kind: str, places: Sequence[tuple[int, int] | None]) -> None:
        self.loader, self.kind, self.places = loader, kind, places
        self.rows: list[Drawn] = [Drawn()] * len(places)
        self.pixels: torch.Tensor | None = None
        self.lock, self.left, self.done = threading.Lock(), len(places), Future[tuple[Chunk, Counter[str]]]()

    def begin(self, pool: ThreadPoolExecutor) -> Future:
        for start in range(0, len(self.places), PIECE):
            pool.submit(self._read, start, min(start + PIECE, len(self.places)))
        return self.done

    def _read(self, start: int, stop: int) -> None:
        loader = self.loader
        try:
            with self.lock:
                if self.pixels is None and self.kind in ("pairs", "images", "regions") and not loader.image.raw:
                    shape = (len(self.places), 3, loader.image.size, loader.image.size)
                    self.pixels = torch.empty(shape, dtype=loader.dtype, pin_memory=loader.pinned)
            for i in range(start, stop):
                row = self.rows[i] = loader.row(self.kind, self.places[i])
                if self.pixels is not None:
                    if row.reason:
                        self.pixels[i].zero_()
                    else:
                        with loader.timers("collate"):
                            loader.normalise(row.fields["pixels"], self.pixels[i])
            with self.lock:
                self.left -= stop - start
                last = self.left == 0
            if last:
                chunk = loader.close(self.kind, self.rows, self.pixels)
                holes = Counter(row.reason for row in self.rows if row.reason in REASONS)
                self.done.set_result((chunk, holes))
        except BaseException as error:  # handed to the training thread, which raises it
            with self.lock:
                if not self.done.done():
                    self.done.set_exception(error)
