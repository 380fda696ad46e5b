"""MMEB-train folders, read as they are published (TIGER-Lab/MMEB-train), for VLM2Vec.

    MMEB/
      MSCOCO_i2t/original-00000-of-00001.parquet             the papers' rows
      MSCOCO_i2t/diverse_instruction-00000-of-00001.parquet  the same in other words, read where it is named
      images/...                                             where the rows' image paths lead

A row has `qry, qry_image_path, pos_text, pos_image_path` and, in most subsets,
`neg_text, neg_image_path` (CIRR has none). Instructions are inside `qry`, and
`<|image_1|>` stands where the picture goes. Some files spell the columns
`qry_img_path`, `pos_img_path`. An empty path is a side without a picture; an
empty text and path together are no side at all.

Each subset is a source of the mixture (`loader.sources`, kind rows). Texts and
pictures are read when the row is drawn, in the loader's threads. A row that
names a picture which is not there, or broken, is a hole.
"""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from curation.errors import UserError, one_line
from curation.images import formats
from training.bottleneck import apart
from training.data.rows import Item, Row
from training.data.shards import Hole

SIDES = ("qry", "pos", "neg")
SPLIT = "original"
"""Of a folder that holds several: what both papers train on."""
TRIED = 256
"""Pictures that are looked for until one is there; where none is, they lie elsewhere, and all rows would be holes."""


def read_of(names: Sequence[str]) -> list[str]:
    """Of a folder's parquet files those that are read: all where they are of one split, else those of `SPLIT`. The hub
    names them SPLIT-00000-of-00001.parquet."""
    splits = [found[1] if (found := re.fullmatch(r"(.+)-\d+-of-\d+\.parquet", name)) else "" for name in names]
    return [name for name, split in zip(names, splits) if split == SPLIT or len(set(splits)) == 1]


class Subset:
    """One data set of MMEB-train: rows by number.

    Args:
        folder: the subset's own folder of parquet files, or one such file, of whatever split.
        limit: read no more rows than this (the paper takes at most 50,000 to 100,000 of each).
        negatives: of each row, at most; None: all. The pictures of others are neither decoded nor missed.
    """

    def __init__(self, folder: Path, *, limit: int | None = None, negatives: int | None = None) -> None:
        """The pictures' paths begin at the first of the folder and its parents, or their `images`, where one of the
        first `TRIED` leads to something.

        Raises:
            UserError: no parquet files, none with such columns or rows, none of the split, or pictures that are
                nowhere near.
        """
        import pyarrow.parquet as pq

        self.negatives = negatives
        self.name = folder.stem if folder.is_file() else folder.name
        names = sorted(file.name for file in folder.glob("*.parquet"))
        self._files = [folder] if folder.is_file() else [folder / name for name in read_of(names)]
        if not self._files and names:
            raise UserError(f"--data {folder}: holds several splits and no {SPLIT!r}; name a file, {folder / names[0]}")
        if not self._files:
            there = "holds no *.parquet" if folder.is_dir() else "no such folder"
            raise UserError(f"--data {folder}: {there}; name a subset's folder of MMEB-train")
        try:
            self._columns = _columns(pq.read_schema(self._files[0]).names, self._files[0])
            tables = [
                pq.read_table(file, columns=list(self._columns.values()), memory_map=True) for file in self._files
            ]
        except UserError:
            raise
        except Exception as error:  # pyarrow has many
            raise UserError(f"--data {folder}: {one_line(error, 200)}; fetch it again") from None
        import pyarrow as pa

        table = pa.concat_tables(tables)
        self._table = table if limit is None else table.slice(0, limit)
        if not len(self):
            raise UserError(f"--data {folder}: its files hold no row; fetch it again")
        self.images = self._find_images(folder if folder.is_dir() else folder.parent)

    def __len__(self) -> int:
        return self._table.num_rows

    def key(self, number: int) -> str:
        """What names a row whatever else is mixed in."""
        return f"{self.name}/{number:08d}"

    @property
    def sizes(self) -> np.ndarray:
        """int64 [1]: all rows are one part."""
        return np.array([len(self)])

    def ahead(self, parts: Sequence[int]) -> None:
        """All of it is here."""

    def texts(self) -> list[str]:
        """Every text of every side, for a tokenizer that is trained on them."""
        names = [self._columns[f"{side}_text"] for side in SIDES if f"{side}_text" in self._columns]
        return [text for name in names for value in self._table[name].to_pylist() for text in _many(value) if text]

    def sample(self, number: int) -> Mapping[str, Any]:
        """{"uid", "row", "group"}: a row with its pictures decoded; rows of one positive are a group.

        Raises:
            Hole: a picture is missing or broken, or neither text nor picture in the query or the positive.
        """
        record = self._table.slice(number, 1).to_pylist()[0]
        query, positive = (self._items(record, side) for side in ("qry", "pos"))
        if not query or not positive:
            raise Hole("caption_missing")
        row = Row(query=query[0], positive=positive[0], negatives=self._items(record, "neg", self.negatives))
        same = [record.get(self._columns.get(f"pos_{part}", "")) for part in ("text", "image")]
        return {"uid": self.key(number), "row": row, "group": same}

    def _items(self, record: dict[str, Any], side: str, most: int | None = None) -> list[Item]:
        """The side's items: one, or as many negatives as its lists hold, and `most`."""
        texts, paths = (_many(record.get(self._columns.get(f"{side}_{part}", ""))) for part in ("text", "image"))
        number = max(len(texts), len(paths))
        pairs = zip(*(list(part) + [""] * (number - len(part)) for part in (texts, paths)))
        there = [(text, path) for text, path in pairs if text or path][:most]
        return [Item(text=text, image=self._picture(path) if path else None) for text, path in there]

    def _picture(self, path: str) -> Image.Image:
        try:
            payload = (self.images / path).read_bytes()
            with apart("decode"), Image.open(io.BytesIO(payload), formats=formats()) as opened:
                return opened.convert("RGB")
        except FileNotFoundError:
            raise Hole("image_missing") from None
        except Exception:  # Pillow's decoders raise almost anything
            raise Hole("image_broken") from None

    def _find_images(self, folder: Path) -> Path:
        columns = [self._table[name] for side in SIDES if (name := self._columns.get(f"{side}_image"))]
        paths = (path for column in columns for value in column.to_pylist() for path in _many(value) if path)
        named = list(dict.fromkeys(islice(paths, TRIED)))
        roots = [root for parent in (folder, *folder.resolve().parents[:2]) for root in (parent, parent / "images")]
        if not named:
            return folder
        found = next((root for path in named for root in roots if (root / path).exists()), None)
        if found is None:
            which = f"{named[0]} is" if len(named) == 1 else f"{named[0]} and the next {len(named) - 1} pictures are"
            raise UserError(
                f"--data {folder}: {which} in none of {', '.join(str(root) for root in roots[:4])}; "
                "unpack the images beside the subsets"
            )
        return found


def _many(value: Any) -> Sequence[str]:
    """A text, a list of texts, or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [text or "" for text in value]


def _columns(names: Sequence[str], file: Path) -> dict[str, str]:
    """{side_part: the file's own column}."""
    spellings = {f"{side}_text": [f"{side}_text"] for side in SIDES} | {
        f"{side}_image": [f"{side}_image_path", f"{side}_img_path"] for side in SIDES
    }
    spellings["qry_text"] = ["qry", "qry_text"]
    found = {part: name for part, known in spellings.items() for name in known if name in names}
    for part in ("qry_text", "pos_text"):
        if part not in found:
            raise UserError(
                f"--data {file}: has no column {spellings[part][0]!r} but {', '.join(names)}; is this MMEB-train?"
            )
    return found
