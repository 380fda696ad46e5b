"""`gemsmith inspect`: one sample of a curated output, with all that decided about it.

Everything comes from the files that curation has left: the signals, the
ledger, and the build's plan, which is a function of them, so no tar is searched.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from curation import shards, store
from curation.errors import UserError, one_line
from curation.manifest import read_manifest
from curation.phases import recorded_parts
from curation.plan import plan
from curation.selection import SELECTORS
from curation.selection.engine import Part, partitions
from curation.sources import open_shard
from curation.tar import IMAGE_EXTENSIONS

LONGEST = 2_000  # characters of a text that a terminal is shown
WORDS = {True: "passes", False: "FAILS", None: "not asked"}  # or, of one of several, not recorded


def inspect(uid: str, out: Path) -> list[dict[str, Any]]:
    """What is known of the samples with this uid; more than one where the pool holds it more than once.

    Returns:
        For each: {"uid", "shard", "key", "index", "members": {extension: bytes}, "caption", "url", "error",
        "signals": {column: value}, "verdict", "reason", "selectors": [{"name", "passes", "thresholds", "selectors":
        those that it joins}], "went": [{"shard", "key"}], "picture": path or None, "no_picture": why there is none, or
        None}. A selector that looks at survivors alone was not asked of a sample that was out already: its "passes" is
        None. So is that of one inside a union whose decision stands in files and not in the manifest (a list, a
        reference), unless it follows from the others'. The picture is copied to OUT/inspect, if its shard is what was
        measured: in another, its place may be another's.

    Raises:
        UserError: OUT holds no finished selection, or the pool has no such uid.
    """
    parts, selected = recorded_parts(out), read_manifest(out / "select.manifest.json")
    if parts is None or selected is None:
        raise UserError(f"--out {out}: holds no selection; run `gemsmith curate` to its end first")
    places = [(part, row) for part in parts for row in _rows(part, uid)]
    if not places:
        raise UserError(f"inspect {uid}: not among the {selected['seen']:,} samples of {out}; look into its ledger")
    went = _destinations(parts, places, out, selected) if (out / "shards").is_dir() else {}
    return [_sample(part, row, out, selected, went) for part, row in places]


def _rows(part: Part, uid: str) -> list[int]:
    uids = pq.read_table(part.path, columns=["uid"])["uid"]
    return pc.indices_nonzero(pc.equal(uids, pa.scalar(uid))).to_pylist()


def _destinations(
    parts: list[Part], places: list[tuple[Part, int]], out: Path, selected: dict[str, Any]
) -> dict[int, list[dict[str, str]]]:
    """row of the pool -> where its copies are"""
    config = selected["config"]
    settings = {name: config[name] for name in ("seed", "shard_samples", "members")}
    went: dict[int, list[dict[str, str]]] = {}
    with TemporaryDirectory() as folder:
        made = plan(partitions(parts), out / "ledger", Path(folder), **settings)
        for part, row in places:
            uid = pq.read_table(part.path, columns=["uid"])["uid"][row].as_py()
            went[part.first + row] = [
                {"shard": shards.tar_name(entry["output"]), "key": f"{uid}-{entry['copy']}"}
                for entry in made.entries(part).to_pylist()
                if entry["row"] == row
            ]
    return went


def _sample(
    part: Part, row: int, out: Path, selected: dict[str, Any], went: dict[int, list[dict[str, str]]]
) -> dict[str, Any]:
    table = pq.read_table(part.path).slice(row, 1)
    record = table.to_pylist()[0]
    table = table.append_column("row", pa.array([part.first + row]))
    judged = pq.read_table(out / "ledger" / part.path.name).slice(row, 1).to_pylist()[0]
    members = dict(
        zip(record["extensions"] or (), zip(record["offsets"] or (), record["sizes"] or (), strict=True), strict=True)
    )
    picture, no_picture = _picture(part, record, part.first + row, members, out)
    return {
        **{name: record[name] for name in ("uid", "shard", "key", "index", "caption", "url", "error")},
        "members": {extension: size for extension, (_, size) in members.items()},
        "signals": {name: value for name, value in record.items() if name not in store.BASE.names},
        "verdict": judged["verdict"],
        "reason": judged["reason"],
        "selectors": [] if record["error"] else _verdicts(selected, set(judged["failed"]), table),
        "went": went.get(part.first + row, []),
        "picture": picture,
        "no_picture": no_picture,
    }


def _verdicts(selected: dict[str, Any], failed: set[str], table: pa.Table) -> list[dict[str, Any]]:
    """What each selector of the recipe said of the one row, in its order."""
    said = {stage["name"]: stage for stage in selected["stages"]}
    verdicts: list[dict[str, Any]] = []
    out = False
    for name, settings in selected["config"]["selectors"].items():
        kind: Any = SELECTORS[settings["kind"]]
        asked = name in failed or not (out and kind.scope == "survivors")
        passes = name not in failed if asked else None
        inner = _joined(settings, said[name], table, passes)
        verdicts.append({**_verdict(name, said[name], passes), "selectors": inner})
        out |= name in failed
    return verdicts


def _verdict(name: str, said: dict[str, Any], passes: bool | None) -> dict[str, Any]:
    return {"name": name, "passes": passes, "thresholds": said.get("thresholds", {}), "selectors": []}


def _joined(
    settings: dict[str, Any], said: dict[str, Any], table: pa.Table, passes: bool | None
) -> list[dict[str, Any]]:
    """What each one inside says of the row, where together they say `passes` (None: that is not known)."""
    if "selectors" not in settings:
        return []
    if_all = settings["kind"] == "all_of"  # what they say together only if each of them does
    verdicts = []
    for name, one in settings["selectors"].items():
        told, kind = said[settings["kind"]][name], SELECTORS[one["kind"]]
        verdict = _verdict(name, told, if_all if passes == if_all else None)
        verdict["selectors"] = _joined(one, told, table, verdict["passes"])
        if verdict["passes"] is None and verdict["selectors"]:
            inner, all_inner = {v["passes"] for v in verdict["selectors"]}, one["kind"] == "all_of"
            if (not all_inner) in inner or None not in inner:
                verdict["passes"] = all_inner if inner == {all_inner} else not all_inner
        elif verdict["passes"] is None and (hasattr(kind, "recorded") or not hasattr(kind, "decide")):
            selector: Any = kind(**{key: value for key, value in one.items() if key != "kind"})
            decision = selector.recorded(told) if hasattr(kind, "recorded") else None
            verdict["passes"] = bool(selector.apply(table, decision)[0])
        verdicts.append(verdict)
    unknown = [verdict for verdict in verdicts if verdict["passes"] is None]
    if passes == (not if_all) and len(unknown) == 1 and all(v["passes"] in (if_all, None) for v in verdicts):
        unknown[0]["passes"] = passes  # it must have been this one
    return verdicts


def _picture(
    part: Part, record: dict[str, Any], row: int, members: dict[str, tuple[int, int]], out: Path
) -> tuple[Path | None, str | None]:
    """The image's own bytes, as a file to look at, or why there are none. It has its row in its name: keys may be too
    long for one."""
    extension = next((e for e in IMAGE_EXTENSIONS if e in members), None)
    if extension is None:
        return None, "the sample has none"
    offset, size = members[extension]
    path = out / "inspect" / f"{record['uid']}-{row}.{extension}"
    try:
        with open_shard(record["shard"], part.path.name.rpartition("-")[0]) as data:
            picture = data[offset : offset + size]
    except (OSError, UserError) as reason:
        return None, one_line(reason, None)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(picture)
    return path, None


def as_text(sample: dict[str, Any]) -> str:
    """The sample for a terminal."""
    members = ", ".join(f"{extension} {size:,} B" for extension, size in sample["members"].items())
    lines = [
        f"uid      {sample['uid']}",
        f"in       {_safe(sample['shard'])}, sample {sample['index']}, key {_safe(sample['key'])} ({_safe(members)})",
        f"picture  {sample['picture'] or 'none: ' + sample['no_picture']}",
        f"caption  {None if sample['caption'] is None else _cut(sample['caption'])!r}",
        f"url      {_short(sample['url'] or '')}",
        "signals",
        *(f"  {name:26} {_short(value)}" for name, value in sample["signals"].items()),
        f"verdict  {sample['verdict']}" + (f" by {sample['reason']}" if sample["reason"] else ""),
    ]
    lines += _told(sample["selectors"], "  ", WORDS)
    lines += [f"went     {place['shard']} as {place['key']}" for place in sample["went"]] or ["went     nowhere"]
    return "\n".join(lines)


def _told(verdicts: list[dict[str, Any]], indent: str, words: Mapping[bool | None, str]) -> Iterator[str]:
    """A line for each verdict, those of the selectors that it joins below it."""
    for one in verdicts:
        bounds = "; ".join(f"{column} at {', '.join(map(_short, v))}" for column, v in one["thresholds"].items())
        own = "" if one["selectors"] else bounds
        yield f"{indent + one['name']:28} {words[one['passes']]:9} {own}".rstrip()
        yield from _told(one["selectors"], indent + "  ", {**words, None: "not recorded"})


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(_short, value[:4]))}, ... {len(value)} values]"
    return _safe(_cut(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... {len(text):,} characters"


def _safe(text: str) -> str:
    """Text of the web, without what a terminal would obey: escape sequences, another direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
