"""What a signal is: one file with a frozen dataclass of settings, and one line in `curation.signals.SIGNALS`.

The settings object lives in the driver and is cheap; `load` runs once in each
worker and returns the meter that does the work. A meter sees each decoded
sample once (`see`) and turns up to 64 of what it took from them into columns
(`columns`), so a picture is never held longer than all meters need to look at
it, and a model still works in batches. The batches are fixed by the sample's
place in its shard: values do not depend on workers or their number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from PIL import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A sample without error: its caption, its bytes as they lie in the shard, its pixels in their own mode, and what
    its json says ({} where it has none)."""

    uid: str
    caption: str
    image: Image.Image
    image_format: str
    raw: bytes
    record: Mapping[str, Any]


class Meter(Protocol):
    """The working half of a signal, in a worker."""

    def see(self, sample: Decoded) -> Any:
        """Take from one sample what `columns` needs, without keeping the image."""

    def columns(self, seen: Sequence[Any]) -> dict[str, pa.Array]:
        """One array per column, of the schema's type, in the order of `seen`.

        Null is for a sample that has no value; one that gets NaN or an infinite number is an error row. Where this
        raises, it is asked again for halves of `seen`, down to the samples that it fails on: those are error rows too.
        """


class Signal(Protocol):
    """The settings of a signal; `version` goes up when the same settings give other values.

    A signal may have `reads: tuple[str, ...]`, of "image" and "caption", what of a sample it needs; one that
    has not is taken to need both, so that it is for pools of pairs alone. It may have `made_by() -> str`, the tool that
    makes the values, where a recipe leaves the choice; the manifest, the page and the card name it.
    It may have a setting `device`: "cuda" gets its workers a share of a GPU (`curation.device`).
    """

    version: ClassVar[int]

    def schema(self, name: str) -> dict[str, pa.DataType]:
        """Columns and their types, where `name` is what the recipe calls this signal."""

    def content(self) -> dict[str, Any]:
        """What decides the values beside `version`: settings, and hashes of the files they name.

        Raises:
            UserError: a named file does not exist or cannot be read.
        """

    def load(self, name: str) -> Meter:
        """Load models and return the meter."""
