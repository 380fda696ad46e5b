"""Evaluation data: read, checked and named by content before anything is graded.

Two layouts. Retrieval and captioning read a folder of img2dataset tars (all
captions of a sample, as `curation.captions` reads them), and the region tasks
the `regions` in their json; classification reads CLIP_benchmark's webdataset
layout. One folder may hold both.

Every image is decoded once while opening, so that what cannot be read is left
out of every task alike, with a reason, and the number of queries does not
depend on the task or on what a cache holds. Pixels are not kept: `Pictures`
decodes again on demand, which costs about a millisecond an image and keeps the
memory flat. Data is identified by the bytes of its files, never by its path.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curation.captions import read_captions
from curation.errors import UserError
from curation.hashing import file_hash
from curation.images import formats
from curation.tar import IMAGE_EXTENSIONS, Bytes, Member, Sample, open_shard, samples
from training.regions import Region, read_region, size_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Pictures:
    """The images of a dataset as byte ranges of its shards, decoded on demand to RGB."""

    def __init__(self, shards: list[Bytes], places: list[tuple[int, Member]]) -> None:
        self.shards = shards
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def raw(self, index: int) -> bytes:
        shard, member = self.places[index]
        return bytes(self.shards[shard][member.offset : member.offset + member.size])

    def __getitem__(self, index: int) -> "Image":
        return decode(self.raw(index))

    def head(self, limit: int | None) -> "Pictures":
        """The first `limit` images (all of them for None)."""
        return self if limit is None or limit >= len(self) else Pictures(self.shards, self.places[:limit])

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits over the encoded bytes of all images, in order."""
        digest = hashlib.blake2b(digest_size=8)
        for index in range(len(self)):
            raw = self.raw(index)
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class RetrievalData:
    """N images with one caption or more each; `left_out` has a row {shard, key, reason} for what could not be read."""

    name: str
    content_hash: str
    pictures: Pictures
    uids: list[str]
    captions: list[list[str]]
    left_out: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """N images with one class each; `templates` hold `{c}` where the class name goes."""

    name: str
    content_hash: str
    pictures: Pictures
    labels: list[int]
    class_names: list[str]
    templates: list[str]
    left_out: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class RegionData:
    """R regions of N pictures: `owner` [R] is the picture of each, ascending; `sizes` [N] are (width, height)."""

    name: str
    content_hash: str
    pictures: Pictures
    uids: list[str]
    sizes: list[tuple[int, int]]
    regions: list[Region]
    owner: np.ndarray
    left_out: list[dict[str, str]]


def decode(raw: bytes) -> "Image":
    """A whole decode to RGB; raises whatever Pillow raises for broken bytes."""
    from PIL import Image

    with Image.open(io.BytesIO(raw), formats=formats()) as picture:
        return picture.convert("RGB")


class _Unreadable(Exception):
    """One sample cannot be used; the message is the reason."""


def _payload(shard: Bytes, member: Member) -> bytes:
    return bytes(shard[member.offset : member.offset + member.size])


def _image_member(shard: Bytes, sample: Sample) -> Member:
    if sample.error:
        raise _Unreadable(sample.error)
    member = next((sample.members[e] for e in IMAGE_EXTENSIONS if e in sample.members), None)
    if member is None:
        raise _Unreadable("image_missing")
    try:
        decode(_payload(shard, member))
    except Exception as error:  # Pillow's plugins raise almost anything on broken bytes
        raise _Unreadable(f"image_broken: {type(error).__name__}") from None
    return member


def _uid_and_captions(shard: Bytes, sample: Sample, image: Member) -> tuple[str, list[str]]:
    members, record = sample.members, _record(shard, sample)
    try:
        scored, captions = read_captions(record, _payload(shard, members["txt"]) if "txt" in members else None)
    except ValueError as reason:
        raise _Unreadable(str(reason)) from None
    if not all(caption.strip() for caption in captions):
        raise _Unreadable("caption_missing")
    uid = record.get("uid")
    if not isinstance(uid, str) or not uid:
        uid = hashlib.md5(_payload(shard, image) + scored.encode()).hexdigest()
    return uid, captions


def _label(shard: Bytes, sample: Sample, classes: int) -> int:
    if "cls" not in sample.members:
        raise _Unreadable("class_missing")
    text = _payload(shard, sample.members["cls"]).decode("utf-8", "replace").strip()
    if not text.isdecimal() or int(text) >= classes:
        raise _Unreadable(f"class_unknown: {text!r}")
    return int(text)


def _read(paths: list[Path], extra: Any) -> tuple[Pictures, list[Any], list[dict[str, str]]]:
    """Pictures, what `extra(shard, sample, image member)` returns for each of them, and the samples left out."""
    shards: list[Bytes] = [open_shard(path) for path in paths]
    places: list[tuple[int, Member]] = []
    extras: list[Any] = []
    left_out: list[dict[str, str]] = []
    for index, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        found, damage = samples(shard)
        for sample in found:
            try:
                member = _image_member(shard, sample)
                extras.append(extra(shard, sample, member))
                places.append((index, member))
            except _Unreadable as reason:
                left_out.append({"shard": path.name, "key": sample.key, "reason": str(reason)})
        if damage:
            left_out.append({"shard": path.name, "key": "", "reason": f"shard_damaged: {damage}"})
    return Pictures(shards, places), extras, left_out


def _checked(folder: Path, pictures: Pictures, left_out: list[dict[str, str]]) -> None:
    if not len(pictures):
        first = f", the first because of {left_out[0]['reason']}" if left_out else ""
        raise UserError(f"--data {folder}: no usable sample ({len(left_out)} left out{first}); name another folder")
    if left_out:
        what = "{shard} {key}: {reason}".format(**left_out[0])
        print(f"{folder}: {len(left_out)} samples left out, the first is {what}", flush=True)


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder; name the folder that holds the evaluation tars")
    return folder


def _img2dataset(folder: Path, read: Any) -> tuple[list[Path], Pictures, list[Any], list[dict[str, str]]]:
    """(tars, pictures, what `read` finds of each sample, samples left out)"""
    paths = sorted(_folder(folder).glob("*.tar"))
    if not paths:
        raise UserError(f"--data {folder}: holds no .tar; all but classification read img2dataset tars at its top")
    pictures, extras, left_out = _read(paths, read)
    _checked(folder, pictures, left_out)
    return paths, pictures, extras, left_out


def open_retrieval(folder: Path) -> RetrievalData:
    """Images and captions of a folder of img2dataset tars.

    Raises:
        UserError: no folder, no tar in it, or no usable sample.
    """
    paths, pictures, extras, left_out = _img2dataset(folder, _uid_and_captions)
    return RetrievalData(
        name=folder.resolve().name,
        content_hash=file_hash(paths),
        pictures=pictures,
        uids=[uid for uid, _ in extras],
        captions=[captions for _, captions in extras],
        left_out=left_out,
    )


def open_regions(folder: Path) -> RegionData:
    """The regions of a folder of img2dataset tars; samples without any are none of this data, and no error.

    Raises:
        UserError: no folder, no tar in it, or no usable region.
    """
    paths, pictures, extras, left_out = _img2dataset(folder, _uid_and_regions)
    regions: list[Region] = []
    owner: list[int] = []
    kept = [number for number, (_, _, found) in enumerate(extras) if found]
    broken = []
    for place, number in enumerate(kept):
        uid, size, found = extras[number]
        for entry in found:
            try:
                regions.append(read_region(entry, *size))
                owner.append(place)
            except ValueError as reason:
                broken.append({"shard": "", "key": uid, "reason": str(reason)})
    if not regions:
        why = f"all {len(broken)} broken, the first {broken[0]['reason']}" if broken else "no json names `regions`"
        raise UserError(f"--data {folder}: no usable region ({why}); name a set with boxes or masks")
    if broken:
        print(f"{folder}: {len(broken)} regions left out, the first is {broken[0]['key']}: {broken[0]['reason']}")
    return RegionData(
        name=folder.resolve().name,
        content_hash=file_hash(paths),
        pictures=Pictures(pictures.shards, [pictures.places[number] for number in kept]),
        uids=[extras[number][0] for number in kept],
        sizes=[extras[number][1] for number in kept],
        regions=regions,
        owner=np.array(owner),
        left_out=left_out + broken,
    )


def _uid_and_regions(shard: Bytes, sample: Sample, image: Member) -> tuple[str, tuple[int, int], list[Any]]:
    """(uid, (width, height), the regions as the json has them)"""
    record = _record(shard, sample)
    found, uid = (record.get(name) if isinstance(record, dict) else None for name in ("regions", "uid"))
    payload = _payload(shard, image)
    if not isinstance(uid, str) or not uid:
        uid = hashlib.md5(payload).hexdigest()
    return uid, size_of(payload), found if isinstance(found, list) else []


def _record(shard: Bytes, sample: Sample) -> Any:
    try:
        return json.loads(_payload(shard, sample.members["json"])) if "json" in sample.members else {}
    except (ValueError, RecursionError):
        raise _Unreadable("json_broken") from None


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 (byte {error.start}: {error.reason}); convert it") from None
    except FileNotFoundError:
        layout = "classification reads CLIP_benchmark's layout"
        raise UserError(f"--data {path.parent}: holds no {path.name}; {layout}") from None
    return [line for line in lines if line]


def open_classification(folder: Path) -> ClassificationData:
    """Images, classes and templates of CLIP_benchmark's layout (split `test`).

    Raises:
        UserError: a file of the layout is missing, a template has no `{c}`,
            or the data is not single-label.
    """
    names = _lines(_folder(folder) / "classnames.txt")
    templates = _lines(folder / "zeroshot_classification_templates.txt")
    wrong = [template for template in templates if "{c}" not in template]
    if wrong or not templates:
        file = "zeroshot_classification_templates.txt"
        raise UserError(f"--data {folder}: {file} needs lines with {{c}} for the class name, found {wrong or 'none'}")
    kind_file = folder / "dataset_type.txt"
    if kind_file.exists() and (kind := kind_file.read_text().strip().lower()) in ("retrieval", "multilabel"):
        raise UserError(f"--data {folder}: dataset_type is {kind!r}; classification grades single-label data")
    count = " ".join(_lines(folder / "test" / "nshards.txt"))
    if not count.isdecimal():
        raise UserError(f"--data {folder}: test/nshards.txt says {count!r}; it needs the number of shards")
    paths = [folder / "test" / f"{index}.tar" for index in range(int(count))]
    if missing := [path.name for path in paths if not path.exists()]:
        raise UserError(f"--data {folder}: test/nshards.txt promises {count} shards, but {missing} are missing")
    pictures, labels, left_out = _read(paths, lambda shard, sample, _: _label(shard, sample, len(names)))
    _checked(folder, pictures, left_out)
    described = [folder / "classnames.txt", folder / "zeroshot_classification_templates.txt"]
    return ClassificationData(
        name=folder.resolve().name,
        content_hash=file_hash([*paths, *described]),
        pictures=pictures,
        labels=labels,
        class_names=names,
        templates=templates,
        left_out=left_out,
    )
