"""The recipe of `gemsmith curate`: which signals to measure, which selectors to apply, and the few sizes beside them.

    signals:                      name -> {kind: one of curation.signals.SIGNALS, its settings}
      text: {kind: text}
      clip_score: {kind: clip, model: ViT-B-32-quickgelu, pretrained: openai}
    selectors:                    name -> {kind: one of curation.selection.SELECTORS, its settings}, in this order
      words: {kind: threshold, column: caption_words, min: 3}
    members:                      extension -> column: texts that become new members of each sample in the shards
      recaption.txt: recaption
    seed: 0

Every setting is overridable by its path, `--selectors.words.min 5`. jsonargparse
checks each entry against its dataclass, so unknown keys and wrong types are
refused with the entry's name.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import jsonargparse
import pyarrow as pa
import yaml
from pyarrow.types import (
    is_fixed_size_list,
    is_floating,
    is_integer,
    is_list,
    is_nested,
    is_string,
    is_uint64,
)

from curation import store
from curation.errors import UserError, one_line
from curation.pool import MAX_EXTENSION, Modality
from curation.selection import SELECTORS
from curation.selection.block_list import BlockList
from curation.selection.cluster_balance import ClusterBalance
from curation.selection.concept_balance import ConceptBalance
from curation.selection.decontamination import Decontamination
from curation.selection.exact_duplicates import ExactDuplicates
from curation.selection.fraction import Fraction
from curation.selection.fusion import ScoreFusion
from curation.selection.image_based import ImageBased
from curation.selection.interface import Selector
from curation.selection.joined import Joined
from curation.selection.near_duplicates import NearDuplicates
from curation.selection.reference_quantile import ReferenceQuantile
from curation.selection.semantic_duplicates import SemanticDuplicates
from curation.selection.threshold import Threshold
from curation.selection.values import Values
from curation.signals import SIGNALS
from curation.signals.interface import Signal
from curation.tar import IMAGE_EXTENSIONS

EXTENSION = re.compile(r"[a-z0-9]+(\.[a-z0-9]+)*")
ABSENT = {"images": "caption", "texts": "image"}
Fits = Callable[[pa.DataType], bool]


@dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """A checked recipe. `signals` and `selectors` are by name, the selectors in the order they act."""

    signals: Mapping[str, Signal]
    selectors: Mapping[str, Selector]
    members: Mapping[str, str] = field(default_factory=dict)  # extension -> column of texts: new members of the shards
    modality: Modality = "pairs"  # images: captions may be missing; texts: images may
    seed: int = 0
    unit_samples: int = 1_000  # samples that are measured, retried and resumed together
    shard_samples: int = 10_000  # samples of an output shard, at most
    max_error_rate: float = 0.1  # share of samples that may be unusable before the run stops, or a hundred; 0: none

    def to_dict(self) -> dict[str, Any]:
        """The recipe with every setting resolved, as JSON has it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["signals"] = {n: _entry(s, SIGNALS) for n, s in self.signals.items()}
        plain["selectors"] = {n: _entry(s, SELECTORS) for n, s in self.selectors.items()}
        return plain


def load_config(path: Path, overrides: Sequence[str] = ()) -> CurateConfig:
    """Read a recipe and apply overrides such as `["--selectors.words.min", "5", "--seed=1"]`.

    Raises:
        UserError: no such file, not YAML, an unknown key, kind or column, or a
            value of the wrong type.
    """
    return parse_config(read_recipe(path, overrides))


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings in a file of YAML, with overrides at their paths; nothing of them is checked.

    Raises:
        UserError: no such file, or not a mapping in YAML.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"--config {path}: cannot be read as text; name a recipe such as recipes/curate/tiny_raw.yaml"
        ) from None
    except yaml.YAMLError as reason:
        raise UserError(f"--config {path}: not YAML ({one_line(reason, None)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: not a mapping of settings")
    for dotted, value in _pairs(overrides):
        _set(raw, dotted, value)
    return raw


def parse_config(raw: Mapping[str, Any]) -> CurateConfig:
    """The checked recipe of a plain mapping.

    Raises:
        UserError: as `load_config`.
    """
    top = {**raw}
    signals = _entries(top.pop("signals", None), SIGNALS, "signals", {})
    sizes = [f for f in dataclasses.fields(CurateConfig) if f.name not in ("signals", "selectors", "members")]
    sizes_class = dataclasses.make_dataclass(
        "Sizes", [(f.name, f.type, f.default) for f in sizes], frozen=True, kw_only=True
    )
    selector_settings, members = top.pop("selectors", None), top.pop("members", None) or {}
    checked = _typed(sizes_class, top, "recipe")
    for name, least in (("unit_samples", 1), ("shard_samples", 1), ("max_error_rate", 0), ("seed", 0)):
        if not getattr(checked, name) >= least:  # NaN too
            raise UserError(f"{name}: {getattr(checked, name)} is not at least {least}")
    selectors = _entries(selector_settings, SELECTORS, "selectors", {"seed": checked.seed})
    config = CurateConfig(signals=signals, selectors=selectors, members=members, **dataclasses.asdict(checked))
    _check_columns(config)
    return config


def _entry(entry: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    kind = next(k for k, c in kinds.items() if c is type(entry))
    if isinstance(entry, Joined):
        return {"kind": kind, "selectors": {n: _entry(s, kinds) for n, s in entry.selectors.items()}}
    return {"kind": kind, **dataclasses.asdict(entry)}


def _entries(raw: Any, kinds: Mapping[str, type], section: str, inherited: Mapping[str, Any]) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{section}: not a mapping of names to settings")
    out = {}
    for name, settings in raw.items():
        where = f"{section}.{name}"
        if not isinstance(settings, dict):
            raise UserError(f"{where}: not a mapping; write {{kind: ..., settings}}")
        rest = dict(settings)
        kind = rest.pop("kind", None)
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"{where}.kind: {kind!r} is unknown; one of {', '.join(kinds)}")
        if issubclass(kinds[kind], Joined):  # what it holds are entries themselves
            rest["selectors"] = _entries(rest.get("selectors"), kinds, f"{where}.selectors", inherited)
        fields = {f.name for f in dataclasses.fields(kinds[kind])}
        rest = {**{k: v for k, v in inherited.items() if k in fields}, **rest}
        out[str(name)] = _typed(kinds[kind], rest, where)
    return out


def _typed(cls: type, settings: Mapping[str, Any], where: str) -> Any:
    """Check the settings against a dataclass and make it."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False)
    unknown = sorted(set(settings) - {f.name for f in dataclasses.fields(cls)}, key=str)
    if unknown:
        known = ", ".join(f.name for f in dataclasses.fields(cls)) or "no settings"
        raise UserError(f"{where}.{unknown[0]}: unknown setting; this takes {known}")
    for f in dataclasses.fields(cls):  # jsonargparse lets null pass where there is a default
        if settings.get(f.name, ...) is None and type(None) not in get_args(f.type):
            raise UserError(f"{where}.{f.name}: null; give it a value or leave it out")
    try:
        return cls(**vars(parser.parse_object(dict(settings))))
    except jsonargparse.ArgumentError as reason:
        raise UserError(f"{where}: {one_line(reason, None)}") from None


def _check_columns(config: CurateConfig) -> None:
    """Every selector's columns are measured, and none is measured twice; nothing reads what the modality has not."""
    absent = ABSENT.get(config.modality)
    measured: dict[str, str] = {c: "every sample" for c in store.BASE.names if c != absent}
    kinds: dict[str, pa.DataType] = {field.name: field.type for field in store.BASE}
    for name, signal in config.signals.items():
        if absent in getattr(signal, "reads", ("image", "caption")):
            raise UserError(f"signals.{name}: reads the {absent}, which modality {config.modality} is without; drop it")
        for column, kind in signal.schema(name).items():
            if column in measured:
                raise UserError(f"signals.{name}: its column {column} is already that of {measured[column]}; drop one")
            measured[column], kinds[column] = f"signal {name}", kind
    for name, selector in _each(config.selectors):
        for column in selector.needs:
            if column not in measured:
                raise UserError(
                    f"selectors.{name}: column {column} is not measured; add its signal or use one of "
                    f"{', '.join(measured)}"
                )
        compared, fits, lacks = _compared(selector)
        for setting, column in compared.items():
            if not fits(kinds[column]):
                raise UserError(f"selectors.{name}.{setting}: {column} {lacks}")
        if isinstance(selector, Values | BlockList):
            try:
                selector.check(kinds[selector.column])
            except UserError as reason:
                raise UserError(f"selectors.{name}: {reason}") from None
    _check_members(config.members, kinds)


def _compared(selector: Selector) -> tuple[dict[str, str], Fits, str]:
    """Its columns by the setting that names them; which types fit there, and what is said of one that does not."""
    match selector:
        case Threshold() | Fraction() | ReferenceQuantile():
            return {"column": selector.column}, _is_number, "holds no numbers; name a column that does"
        case ScoreFusion():
            weighed = {f"weights.{column}": column for column in selector.weights}
            return weighed, _is_number, "holds no numbers; name a column that does"
        case ConceptBalance():
            lacks = "holds no lists of concepts; name a signal of kind concepts"
            return {"column": selector.column}, lambda kind: is_list(kind) and is_integer(kind.value_type), lacks
        case NearDuplicates():
            return (
                {"column": selector.column},
                is_uint64,
                "holds no hashes; name phash, by a signal of kind fingerprints",
            )
        case Decontamination(cosine=None):
            pass  # its column is not read
        case ClusterBalance() | SemanticDuplicates() | ImageBased() | Decontamination():
            lacks = "holds no embeddings; name a column that ends in _image_embedding"
            return {"column": selector.column}, is_fixed_size_list, lacks
        case ExactDuplicates():
            return (
                {f"by.{column}": column for column in selector.by},
                lambda kind: not is_nested(kind),
                "holds lists; name others",
            )
    return {}, lambda kind: True, ""


def _is_number(kind: pa.DataType) -> bool:
    return is_integer(kind) or is_floating(kind)


def _check_members(members: Any, kinds: Mapping[str, pa.DataType]) -> None:
    if not isinstance(members, dict):
        raise UserError("members: not a mapping of extensions to columns; write {recaption.txt: recaption}")
    for extension, column in members.items():
        taken = extension in ("txt", "json", *IMAGE_EXTENSIONS)
        if taken or not EXTENSION.fullmatch(str(extension)) or len(str(extension)) > MAX_EXTENSION:
            raise UserError(f"members.{extension}: no extension for a new member; name one such as recaption.txt")
        if column not in kinds or not is_string(kinds[column]):
            raise UserError(f"members.{extension}: {column} is no column of texts; name one that a signal gives")


def _each(selectors: Mapping[str, Selector]) -> Iterator[tuple[str, Selector]]:
    """Every selector by its path, those inside an any_of or all_of in place of it."""
    for name, selector in selectors.items():
        if isinstance(selector, Joined):
            yield from ((f"{name}.selectors.{path}", inner) for path, inner in _each(selector.selectors))
        else:
            yield name, selector


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 1` and `--a.b=1` as (("a.b"), 1)."""
    pairs: list[tuple[str, Any]] = []
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word}: not understood; overrides are --path.to.setting VALUE")
        dotted, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{word}: has no value; write {word} VALUE")
            value = rest.pop(0)
        try:
            pairs.append((dotted, yaml.safe_load(value)))
        except yaml.YAMLError as reason:
            raise UserError(f"--{dotted} {value}: not YAML ({one_line(reason, None)})") from None
    return pairs


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for depth, parent in enumerate(parents):
        inner = raw.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise UserError(f"--{dotted}: {'.'.join(parents[: depth + 1])} holds no settings")
        raw = inner
    raw[last] = value
