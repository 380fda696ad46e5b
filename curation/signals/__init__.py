"""The signals by kind. A new one is a file beside these and a line here."""

from collections.abc import Mapping

from curation.hashing import config_hash
from curation.signals.captions import Captions
from curation.signals.cat import Cat
from curation.signals.clip import Clip
from curation.signals.concepts import Concepts
from curation.signals.exposure import Exposure
from curation.signals.fields import Fields
from curation.signals.fingerprints import Fingerprints
from curation.signals.image import ImageShape
from curation.signals.interface import Signal
from curation.signals.language import Language
from curation.signals.recaption import Recaption
from curation.signals.service import Service
from curation.signals.sieve import Sieve
from curation.signals.synsets import Synsets
from curation.signals.text import Text
from curation.signals.text_regions import TextRegions

SIGNALS: dict[str, type] = {
    "text": Text,
    "language": Language,
    "cat": Cat,
    "image": ImageShape,
    "exposure": Exposure,
    "fingerprints": Fingerprints,
    "clip": Clip,
    "concepts": Concepts,
    "fields": Fields,
    "synsets": Synsets,
    "service": Service,
    "text_regions": TextRegions,
    "captions": Captions,
    "recaption": Recaption,
    "sieve": Sieve,
}


def made_by(signals: Mapping[str, Signal]) -> dict[str, str]:
    """By signal, the tool or model that makes its values, where a recipe leaves the choice: what stands in for what."""
    return {name: signal.made_by() for name, signal in signals.items() if hasattr(signal, "made_by")}


def identity(name: str, signal: Signal) -> str:
    """16 hex digits that change when the values of this signal's columns could.

    Raises:
        UserError: a file that the signal names cannot be read.
    """
    return config_hash([name, type(signal).__name__, signal.version, signal.content()])
