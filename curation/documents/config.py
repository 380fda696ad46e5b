"""The recipe of `gemsmith documents`: rules for pictures, texts, documents and the pool, and whether to assign.

    images: {formats: [jpg, png, webp], min_side: 150, max_aspect: 2}
    paragraphs: {min_words: 4}
    pool: {repeated_paragraphs: true}
    assign: {clip: {model: ViT-L-14-quickgelu, pretrained: openai}, min_similarity: 0.15}

Without `assign` a picture keeps its place in the page (OBELICS); with it the place
in the page is forgotten, texts are split into sentences and each picture goes to the
sentence that CLIP gives it (MMC4). Every setting is overridable by its path.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import jsonargparse

from curation.config import read_recipe
from curation.documents.filters import ImageRules, ListFiles, TextRules
from curation.errors import UserError, one_line
from curation.signals.clip import Clip


@dataclass(frozen=True, kw_only=True)
class DocumentRules:
    """What a document must be, counted over what is left of it; `language` is fastText's top 1 over all its texts."""

    text: TextRules = field(default_factory=TextRules)
    language: str | None = None
    min_language_probability: float = 0.0
    min_images: int = 1
    max_images: int = 1_000_000
    min_texts: int = 1
    max_texts: int = 1_000_000


@dataclass(frozen=True, kw_only=True)
class PoolRules:
    """What the whole pool decides.

    `max_image_documents`: pictures (by their bytes) in more documents than this go everywhere.
    `one_per_url`: of documents with one address one stays; equal documents (by uid) never stay twice.
    `repeated_paragraphs`: paragraphs that occur more than once in a domain go everywhere in it.
    `one_per_image_set`: of documents with the same set of pictures one stays.
    """

    max_image_documents: int | None = None
    one_per_url: bool = False
    repeated_paragraphs: bool = False
    one_per_image_set: bool = False


@dataclass(frozen=True, kw_only=True)
class AssignRules:
    """Pictures to sentences. `clip` is the model; a picture must reach `min_similarity` (cosine) with some sentence.

    `place`: the picture comes before or after its sentence. `min_well_matched` is the share of a document's
    assignments that must be above `well_matched` (mmc4-core).
    """

    clip: Clip
    min_similarity: float = -1.0
    place: Literal["before", "after"] = "before"
    well_matched: float = -1.0
    min_well_matched: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DocumentsConfig:
    """A checked recipe.

    `near_distance`: within a document, the later of two pictures whose perceptual hashes differ in at most so many of
    64 bits goes; without it only equal bytes do.
    `max_boilerplate_words`: paragraphs with at least this share of words of a page's furniture go.
    """

    images: ImageRules = field(default_factory=ImageRules)
    paragraphs: TextRules = field(default_factory=TextRules)
    document: DocumentRules = field(default_factory=DocumentRules)
    pool: PoolRules = field(default_factory=PoolRules)
    assign: AssignRules | None = None
    lists: ListFiles = field(default_factory=ListFiles)
    near_distance: int | None = None
    max_boilerplate_words: float | None = None
    seed: int = 0
    unit_documents: int = 1_000  # pages of a folder that are measured, retried and resumed together
    shard_documents: int = 1_000  # documents of an output shard, at most
    max_html_bytes: int = 10_000_000
    max_image_bytes: int = 50_000_000
    max_items: int = 20_000  # pictures and texts of one document
    max_error_rate: float = 0.1  # share of documents that may be unusable before the run stops, or a hundred; 0: none

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every setting resolved, as JSON has it."""
        return dataclasses.asdict(self)

    def measured(self) -> dict[str, Any]:
        """The settings that decide what is measured of a pool; all others only select."""
        names = ("max_html_bytes", "max_image_bytes", "max_items", "unit_documents")
        clip = self.assign and self.assign.clip
        return {**{name: getattr(self, name) for name in names}, "clip": clip and [clip.version, clip.content()]}


def load_config(path: Path, overrides: Sequence[str] = ()) -> DocumentsConfig:
    """Read a recipe and apply overrides such as `["--images.min_side", "100"]`.

    Raises:
        UserError: no such file, not YAML, an unknown key, or a value of the wrong type.
    """
    return parse_config(read_recipe(path, overrides))


def parse_config(raw: Mapping[str, Any]) -> DocumentsConfig:
    """The checked recipe of a plain mapping.

    Raises:
        UserError: as `load_config`.
    """
    _check_keys(DocumentsConfig, raw, "recipe")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DocumentsConfig, as_group=False)
    try:
        config = DocumentsConfig(**vars(parser.instantiate_classes(parser.parse_object(dict(raw)))))
    except jsonargparse.ArgumentError as reason:
        raise UserError(f"recipe: {one_line(reason, None)}") from None
    for name in ("unit_documents", "shard_documents", "max_html_bytes", "max_image_bytes", "max_items"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}: {getattr(config, name)} is not at least 1")
    if not config.max_error_rate >= 0:  # NaN too
        raise UserError(f"max_error_rate: {config.max_error_rate} is not at least 0")
    for where, rules in (("paragraphs", config.paragraphs), ("document.text", config.document.text)):
        if rules.max_flagged_words < 1 and config.lists.flagged_words is None:
            raise UserError(f"{where}.max_flagged_words: no list of flagged words; name a file as lists.flagged_words")
        if rules.min_common_words > 0 and config.lists.common_words is None:
            raise UserError(f"{where}.min_common_words: no list of common words; name a file as lists.common_words")
    return config


def _check_keys(cls: type, settings: Mapping[str, Any], where: str) -> None:
    """Refuse what jsonargparse lets pass: unknown keys at the top, and null where there is a default."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in settings.items():
        if name not in fields:
            raise UserError(f"{where}.{name}: unknown setting; this takes {', '.join(fields)}")
        kinds = (fields[name], *get_args(fields[name]))
        if value is None and type(None) not in kinds:
            raise UserError(f"{where}.{name}: null; give it a value or leave it out")
        for kind in kinds:
            if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
                _check_keys(kind, value, f"{where}.{name}")
