"""An index of the pictures of a folder by a model's embeddings: made once, and again only where something changed.

    OUT/index.faiss         FAISS' exact inner products, fp32 [N, D]
    OUT/pictures.parquet    a row each: uid, caption, and where its bytes lie
    OUT/manifest.json       written last: the model, the shards with their fingerprints, what was left out and why

Whatever curation reads as a pool is read here, by the same code. A shard whose
fingerprint (path, size, time) and model are those of the manifest keeps its
rows; a killed command leaves its finished shards in OUT/parts, where the next
one finds them. A picture that cannot be read is counted by its reason.

All pictures are embedded in batches of one size, filled up by repetition, since
kernels and so the last bits go by it: equal pictures then get equal vectors,
whatever stands beside them. The size is part of what an index is made of.
"""

import hashlib
import itertools
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from curation.errors import UserError
from curation.hashing import config_hash
from curation.images import decode
from curation.manifest import claim, read_manifest, write_manifest
from curation.pool import UNREADABLE, Shard, list_shards, read_row
from curation.sources import whole_shard
from evaluation.encode import BATCH, Model, refuse_broken, seen, software

if TYPE_CHECKING:
    from PIL.Image import Image

TEXTS, NUMBERS = ("uid", "caption", "shard"), ("offset", "size")
ROWS = pa.schema([*((name, pa.string()) for name in TEXTS), *((name, pa.int64()) for name in NUMBERS)])


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one shard holds: unit vectors fp32 [n, D], their rows, and how many samples were left out by reason."""

    vectors: np.ndarray
    rows: pa.Table
    left_out: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Index:
    """vectors: `faiss.IndexFlatIP` of N pictures · rows: theirs, as ROWS · left_out: samples by reason."""

    vectors: Any
    rows: pa.Table
    left_out: dict[str, int] = field(default_factory=dict)


def shards_of(data: str) -> list[Shard]:
    """
    Raises:
        UserError: no such folder, file or URL, or nothing in it that this reads.
    """
    try:
        return list_shards([data], "images")
    except UserError as error:
        raise _of_data(error) from None


def build(model: Model, data: str, shards: Sequence[Shard], out: Path, batch: int = BATCH) -> Index:
    """The index of these shards in `out`: the one that is there, or made now of what is known and what is not.

    Args:
        batch: pictures that are embedded at a time.

    Raises:
        UserError: `out` holds something else; no usable picture; NaN or collapsed embeddings.
    """
    try:
        claim(out, {"holds": "pictures to search"})
    except PermissionError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder by --out") from None
    identity = config_hash([model.weights_hash, model.preprocess, batch, software()])
    keys = [config_hash([identity, shard.fingerprint]) for shard in shards]
    manifest = read_manifest(out / "manifest.json")
    if manifest is not None and [shard["key"] for shard in manifest["shards"]] == keys:
        found = _opened(out, manifest)
        print(f"{out}: the index of {len(found.rows):,} pictures is up to date", flush=True)
        return found
    known, began = (_parts(out, manifest) if manifest is not None else {}), time.perf_counter()
    new = [key for key in keys if key not in known]
    if manifest is not None:
        why = "other data" if manifest["identity"] == identity else "another checkpoint"
        if why == "another checkpoint" and manifest["weights"] == model.weights_hash:
            why = "the same checkpoint in another way (--batch, or what is installed)"
        print(f"{out}: was made of {why}; {len(new)} of {len(keys)} shards are embedded", flush=True)
    parts = []
    with tqdm(total=0, desc="embed", unit="picture", disable=None) as bar:
        for number, (shard, key) in enumerate(zip(shards, keys, strict=True), 1):
            parts.append(known.get(key) or _part(model, shard, batch, out / "parts" / f"{key}.parquet", bar))
            if bar.disable:  # no terminal: a line in a log
                print(f"{out}: {number} of {len(shards)} shards, {len(parts[-1].rows):,} pictures", flush=True)
    left_out = dict(sum((Counter(part.left_out) for part in parts), Counter[str]()))
    if not (total := sum(len(part.rows) for part in parts)):
        reasons = ", ".join(f"{reason} {n}" for reason, n in left_out.items()) or "it holds no sample"
        raise UserError(f"--data {data}: no usable picture ({reasons}); name another folder")
    _write(out, [part for part in parts if len(part.rows)])
    listed = [
        {"key": key, "shard": shard.path, "rows": len(part.rows), "left_out": part.left_out}
        for key, shard, part in zip(keys, shards, parts, strict=True)
    ]
    facts = {"checkpoint": model.name, "step": model.step, "weights": model.weights_hash, "identity": identity}
    write_manifest(out / "manifest.json", {**facts, "data": data, "pictures": total, "shards": listed})
    shutil.rmtree(out / "parts", ignore_errors=True)
    said = f"{total:,} pictures, {sum(left_out.values())} left out"
    print(f"{out}: {said}, in {time.perf_counter() - began:.1f} s", flush=True)
    return _opened(out, {"shards": listed})


def _part(model: Model, shard: Shard, batch: int, kept: Path, bar: Any) -> Part:
    """A shard, embedded now or by a command that was killed later."""
    if kept.exists():
        table = pq.read_table(kept)
        vectors = np.stack(table["vector"].to_numpy()) if len(table) else np.zeros((0, 0), np.float32)
        left_out = json.loads(table.schema.metadata[b"left_out"])
        return Part(vectors=vectors, rows=table.drop_columns("vector"), left_out=left_out)
    part = _embedded(model, shard, batch, bar)
    table = part.rows.append_column("vector", pa.array(list(part.vectors), pa.list_(pa.float32())))
    kept.parent.mkdir(exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(table.replace_schema_metadata({"left_out": json.dumps(part.left_out)}), temporary)
    temporary.rename(kept)
    return part


def _embedded(model: Model, shard: Shard, batch: int, bar: Any) -> Part:
    left_out: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    vectors: list[np.ndarray] = []
    first: dict[bytes, int] = {}  # digest of a picture's bytes -> the first row that shows it
    waiting: list[tuple[dict[str, Any], bytes, Image]] = []

    def flush() -> None:
        if not waiting:
            return
        shown = [picture for _, _, picture in waiting]
        pixels, refused = seen(model, shown + shown[-1:] * (batch - len(shown)))
        whole = ~refused[: len(waiting)]
        vectors.append(model.embed_images(pixels).float().cpu().numpy()[: len(waiting)][whole])
        if not whole.all():
            left_out["image_broken"] += int((~whole).sum())
        for row, raw, _ in itertools.compress(waiting, whole):
            first.setdefault(hashlib.md5(raw).digest(), len(rows))
            rows.append(row)
        waiting.clear()

    for row, raw, picture, reason in _pictures(shard, bar):
        if picture is None:
            left_out[reason] += 1
            continue
        waiting.append((row, raw, picture))
        if len(waiting) == batch:
            flush()
    flush()
    found = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    if rows:
        refuse_broken(found[list(first.values())], model=model.name, modality="images")
    return Part(vectors=found, rows=pa.Table.from_pylist(rows, ROWS), left_out=dict(left_out))


def _pictures(shard: Shard, bar: Any) -> Iterator[tuple[dict[str, Any], bytes, "Image | None", str]]:
    """(row, bytes, picture, "") of each sample, or a reason and no picture."""
    try:
        tape = whole_shard(shard.path, shard.fingerprint)
    except UserError as error:
        raise _of_data(error) from None
    with tape:
        samples, damage = tape.samples()
        bar.total += len(samples)
        bar.refresh()
        for sample in samples:
            bar.update()
            try:
                row = read_row(tape, sample, "images")
                if row.error is not None or row.image is None:
                    yield {}, b"", None, row.error or "image_missing"
                    continue
                raw = tape[row.image.offset : row.image.offset + row.image.size]
            except OSError:
                yield {}, b"", None, UNREADABLE
                continue
            picture, reason = rgb(raw)
            captions = row.record.get("captions")
            several = [words for words in captions if isinstance(words, str)] if isinstance(captions, list) else []
            said = row.caption if row.caption is not None else next(iter(several), "")
            where = {"shard": shard.path, "offset": row.image.offset, "size": row.image.size}
            yield {"uid": row.uid, "caption": said, **where}, raw, picture, reason
        if damage:
            yield {}, b"", None, damage.partition(":")[0]


def rgb(raw: bytes) -> tuple["Image | None", str]:
    """A picture of these bytes, or None and the reason."""
    picture, _, reason = decode(raw)
    try:
        return (picture.convert("RGB") if picture is not None else None), reason or ""
    except MemoryError:  # of the machine, not of the picture
        raise
    except Exception:  # what Pillow raises of pixels that no mode fits
        return None, "image_decode"


def _write(out: Path, parts: Sequence[Part]) -> None:
    import faiss

    index = faiss.IndexFlatIP(parts[0].vectors.shape[1])
    for part in parts:
        index.add(np.ascontiguousarray(part.vectors))
    # Without a manifest what stands here counts as nothing, so these two need not change at once.
    (out / "manifest.json").unlink(missing_ok=True)
    faiss.write_index(index, str(out / "index.faiss"))
    pq.write_table(pa.concat_tables(part.rows for part in parts), out / "pictures.parquet")


def _opened(out: Path, manifest: dict[str, Any]) -> Index:
    import faiss

    left_out = sum((Counter(shard["left_out"]) for shard in manifest["shards"]), Counter[str]())
    vectors = faiss.read_index(str(out / "index.faiss"))
    return Index(vectors=vectors, rows=pq.read_table(out / "pictures.parquet"), left_out=dict(left_out))


def _parts(out: Path, manifest: dict[str, Any]) -> dict[str, Part]:
    """The shards of a finished index, by key."""
    index, parts, at = _opened(out, manifest), {}, 0
    vectors = index.vectors.reconstruct_n(0, index.vectors.ntotal)
    for shard in manifest["shards"]:
        n = shard["rows"]
        parts[shard["key"]] = Part(
            vectors=vectors[at : at + n], rows=index.rows.slice(at, n), left_out=shard["left_out"]
        )
        at += n
    return parts


def _of_data(error: UserError) -> UserError:
    """Curation names its own option."""
    return UserError(str(error).replace("--pool", "--data", 1))
