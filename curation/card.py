"""The dataset card: what was curated from what and how, for people (README.md) and for machines (croissant.json).

README.md is a Hugging Face card. Its front matter points at the shards alone,
so that `load_dataset("OUT")`, and OUT's README.md and shards/ in a repository
of the Hub, give the samples and not the ledger or the signals beside them.
croissant.json is Croissant 1.0 (MLCommons) over the same tars: their checksums, and
a sample's members by their extension, with its key to join them by.

Neither holds times, machine paths or anything else that two runs would differ
in; the recipe's files appear by name alone. What the card cannot know, such as
the licence of web pictures, it says so.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2
import yaml

from curation.croissant import Tar, croissant
from curation.manifest import write_json
from curation.report import TEMPLATES, language_by
from curation.shards import tar_name
from curation.sources.folder import is_range, pool_order
from curation.sources.lists import is_list
from curation.tar import IMAGE_EXTENSIONS

SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")  # the Hub's size categories end at these
LANGUAGE_SHARE = 0.01  # of the kept captions, for a language to be named
UNKNOWN = "unknown"  # a detector's answer where it has none
SHARDS = "shards/*.tar"


def write_cards(out: Path, manifest: Mapping[str, Any], summary: Mapping[str, Any], tars: Iterable[Tar]) -> None:
    """Write `out`/README.md and `out`/croissant.json.

    Args:
        manifest: the final one; its shards lie in `out`/shards.
        summary: by `curation.summary.summarise`.
        tars: the digest of every shard, in any order.
    """
    name = out.resolve().name
    tars = sorted(tars, key=lambda tar: tar.name)
    extensions = _extensions(tars)
    copied = sum(int(copies) * n for copies, n in summary["copies"].items())
    said = (
        f"{copied:,} samples in {manifest['shards']:,} webdataset shards, curated by Gemsmith "
        f"from {manifest['seen']:,} samples of {', '.join(_pools(manifest['pool']))}"
    )
    (out / "README.md").write_text(_readme(name, said, manifest, summary, extensions, copied), encoding="utf-8")
    write_json(out / "croissant.json", croissant(name, said, extensions, tars))


def _extensions(tars: Iterable[Tar]) -> list[str]:
    """What the samples have as members, the image first, then by how many have it."""
    counted = sum((tar.members for tar in tars), Counter[str]())
    return sorted(counted, key=lambda e: (e not in IMAGE_EXTENSIONS, -counted[e], e))


def _pools(paths: list[str]) -> list[str]:
    """The folders of the pool's shards, without where on this machine they lie and without credentials."""
    folders = Counter(map(_folder, paths))
    names = []
    for folder, count in folders.items():
        url = urlsplit(folder)
        host = url.netloc.rpartition("@")[2]
        where = f"{url.scheme}://{host}{url.path}" if url.netloc else Path(folder).name
        names.append(f"{where} ({count:,} shards)")
    return names


def _folder(shard: str) -> str:
    """The folder in which the file of a shard lies, or of which the shard is a part."""
    base, _ = pool_order(shard)
    return base if is_range(shard) and not is_list(base) else base.rpartition("/")[0]


def _readme(
    name: str, said: str, manifest: Mapping[str, Any], summary: Mapping[str, Any], extensions: list[str], copied: int
) -> str:
    spoken = [(language, kept) for language, _, kept in summary["languages"] if kept]
    total = sum(kept for _, kept in spoken)
    languages = [k for k, n in sorted(spoken, key=lambda kn: (-kn[1], kn[0])) if n >= LANGUAGE_SHARE * total]
    pictured, captioned = any(e in IMAGE_EXTENSIONS for e in extensions), "txt" in extensions
    front = {
        "pretty_name": name,
        "license": "unknown",
        **({"language": [k for k in languages if k != UNKNOWN]} if set(languages) - {UNKNOWN} else {}),
        **({"task_categories": ["image-to-text", "text-to-image"]} if pictured and captioned else {}),
        "size_categories": [size_category(copied)],
        "tags": ["webdataset", "gemsmith", *(["image"] if pictured else []), *(["text"] if captioned else [])],
        "dataset_info": {"features": _features(extensions)},
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": SHARDS}]}],
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, whose cells and code are made safe by the filters below
    )
    environment.filters["n"] = lambda value: f"{value:,}"
    environment.filters["cell"] = cell
    return environment.get_template("card.md.j2").render(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        name=name,
        said=said,
        manifest=manifest,
        kinds={selector: settings["kind"] for selector, settings in manifest["config"]["selectors"].items()},
        extensions=extensions,
        language_by=language_by(manifest),
        languages=summary["languages"],
        copied=copied,
        braces=braces(manifest["shards"]),
        recipe=yaml.safe_dump(_without_paths(manifest["config"]), sort_keys=False, allow_unicode=True),
    )


def _features(extensions: list[str]) -> list[dict[str, str]]:
    """The columns of `load_dataset`, which by itself refuses samples with images of several kinds.

    json members are not among them: their fields are whatever the pool says, and one that is of two types would stop
    the loading.
    """
    kinds = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "txt": "string"}
    columns = [{"name": extension, "dtype": kinds[extension]} for extension in extensions if extension in kinds]
    return [{"name": "__key__", "dtype": "string"}, *columns]


def braces(count: int) -> str:
    """The shards as webdataset and open_clip expand them."""
    first, last = (tar_name(n).removesuffix(".tar") for n in (0, max(count - 1, 0)))
    return f"shards/{{{first}..{last}}}.tar"


def size_category(samples: int) -> str:
    """The Hub's word for so many samples."""
    place = max(0, len(str(samples)) - 3)  # below a thousand, below ten thousand, ...
    if place == 0:
        return "n<1K"
    return f"{SIZES[place - 1]}<n<{SIZES[place]}" if place < len(SIZES) else "n>1T"


def cell(value: Any) -> str:
    """Text for a cell of a Markdown table: one line, and nothing in it is markup."""
    text = f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())
    return "".join(f"\\{c}" if c in "\\`*_[]|#~" else {"<": "&lt;", "&": "&amp;"}.get(c, c) for c in text)


def _without_paths(value: Any) -> Any:
    """The recipe with the files of this machine by their names alone."""
    if isinstance(value, Mapping):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value
