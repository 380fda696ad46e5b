"""Croissant 1.0 (MLCommons, arXiv 2403.19546): the shards as JSON-LD that other programs find and read a dataset by.

Every tar is a file object with its checksum; the members of each kind, told by
their extension, are a file set over all tars, and a record set. Records are
joined by their key. What Croissant's own reader makes of it is tested.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curation.manifest import read_manifest, write_json
from curation.tar import IMAGE_EXTENSIONS, open_shard, samples

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""Croissant 1.0's, word for word: readers compare it."""


@dataclass(frozen=True, kw_only=True)
class Tar:
    """An output shard: its bytes, their digest in 64 hex digits, and how many members have each extension."""

    name: str
    size: int
    sha256: str
    members: Counter[str]


def digest(records: Path, path: Path) -> None:
    """Read a shard for its checksum, which is what a download of the dataset is checked by, and record that.

    The copying cannot take it on the way: samples come to a shard in any order, and sha256 wants its bytes in theirs.
    """
    data = open_shard(path)
    found, _ = samples(data)
    tar = Tar(
        name=path.name,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        members=Counter(extension for sample in found for extension in sample.members),
    )
    write_json(_record(records, path.name), vars(tar))


def recorded(records: Path, name: str) -> Tar | None:
    """What `digest` recorded of the shard of this name, or None."""
    said = read_manifest(_record(records, name))
    return None if said is None else Tar(**{**said, "members": Counter(said["members"])})


def _record(records: Path, name: str) -> Path:
    return records / f"{name}.json"


def croissant(name: str, said: str, extensions: list[str], tars: list[Tar]) -> dict[str, Any]:
    """JSON-LD: the tars with their checksums, the members of each kind in them, and the records of each kind."""
    images = [e for e in extensions if e in IMAGE_EXTENSIONS]
    kinds = {"image": images} if images else {}
    kinds |= {field: [e] for field, e in (("caption", "txt"), ("json", "json")) if e in extensions}
    names = _patterns(extensions, sum(tar.members.total() for tar in tars))
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": said + ". The licence of each sample is its owner's, and not known here.",
        "license": "unknown",
        "distribution": [
            *(
                {
                    "@type": "cr:FileObject",
                    "@id": tar.name,
                    "name": tar.name,
                    "contentUrl": f"shards/{tar.name}",
                    "contentSize": f"{tar.size} B",
                    "encodingFormat": "application/x-tar",
                    "sha256": tar.sha256,
                }
                for tar in tars
            ),
            *(
                {
                    "@type": "cr:FileSet",
                    "@id": f"{field}-members",
                    "name": f"{field}-members",
                    "containedIn": [{"@id": tar.name} for tar in tars],
                    "encodingFormat": MIME[field],
                    "includes": [pattern for extension in found for pattern in names[extension]],
                }
                for field, found in kinds.items()
            ),
        ],
        "recordSet": [_records(kind) for kind in kinds],
    }


def _patterns(extensions: list[str], members: int) -> dict[str, list[str]]:
    """By extension, the globs of its members alone: "*.txt" fits x-0.recaption.txt too, which is no caption. Where
    there is such, the digits of the copy's number, which is below that of all members, are told one by one."""
    found = {}
    for extension in extensions:
        longer = any(other.endswith(f".{extension}") for other in extensions)
        stems = [f"*-{'[0-9]' * digits}" for digits in range(1, len(str(members)) + 1)] if longer else ["*"]
        found[extension] = [f"{stem}.{extension}" for stem in stems]
    return found


MIME = {"image": "image/*", "caption": "text/plain", "json": "application/json"}
DATA_TYPE = {"image": "sc:ImageObject", "caption": "sc:Text", "json": "sc:Text"}


def _records(kind: str) -> dict[str, Any]:
    """Of each sample: its key and its uid, from the member's name, and the member's content.

    One record set for each kind of member rather than one for all: Croissant's
    own reader joins no more than two kinds of files.
    """

    def field(name: str, data_type: str, extract: str, regex: str | None = None) -> dict[str, Any]:
        source: dict[str, Any] = {"fileSet": {"@id": f"{kind}-members"}, "extract": {"fileProperty": extract}}
        if regex:
            source["transform"] = {"regex": regex}
        return {"@type": "cr:Field", "@id": f"{kind}/{name}", "name": name, "dataType": data_type, "source": source}

    return {
        "@type": "cr:RecordSet",
        "@id": kind,
        "name": kind,
        "description": f"The {kind} of each sample. Records with one key are one sample; uid is its name in the pool.",
        "key": {"@id": f"{kind}/key"},
        "field": [
            field("key", "sc:Text", "filename", r"^(.+)\.[^.]+$"),
            field("uid", "sc:Text", "filename", r"^(.+)-\d+\.[^.]+$"),
            field(kind, DATA_TYPE[kind], "content"),
        ],
    }
