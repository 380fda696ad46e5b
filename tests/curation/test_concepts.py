"""Concept matching against naive substring search, and balancing against the formula, entry by entry."""

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import store
from curation.config import load_config, parse_config
from curation.errors import UserError
from curation.measure import Measuring
from curation.pool import list_shards
from curation.selection.concept_balance import TOP, ConceptBalance, share_to_t, t_to_share
from curation.selection.engine import Part
from curation.signals.concepts import MARKS, Concepts, ConceptsMeter
from curation.store import Unit
from tests.curation.conftest import sample, write_tar
from tests.curation.selecting import select
from tests.curation.test_selection import write_parts

ROWS, ENTRIES = 10_000, 300


def naive_form(caption: str) -> str:
    text = f" {caption} "
    for mark in [",", ".", ";", ":", "?", "!", "`"]:
        text = text.replace(mark, f" {mark} ")
    for white in ["\t", "\n", "\r"]:
        text = text.replace(white, " ")
    return text


def naive(caption: str, entries: Sequence[str]) -> list[int]:
    """As MetaCLIP's paper has it: replace by replace, entry by entry."""
    text = naive_form(caption)
    return [i for i, entry in enumerate(entries) if f" {entry} " in text]


def test_every_match_of_a_naive_search_and_no_other() -> None:
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdeéДß犬'-"), rng.integers(1, 4))) for _ in range(400)])
    words = np.concatenate([words, np.char.upper(words[:100])])
    entries = [" ".join(rng.choice(words, rng.integers(1, 4))) for _ in range(20_000)]
    entries[:4] = ["st. louis", "a,b", "", "a\tb"]
    entries[7_000:7_500] = entries[500:1_000]
    glue = [" ", " ", " ", " ", ", ", ".", "\n", "\t", "  ", "?!", "`"]
    captions = ["", " ", ".", "a", "in st. louis", "a,b", "a\tb"]
    captions += ["".join(w + rng.choice(glue) for w in rng.choice(words, rng.integers(0, 15))) for _ in range(493)]
    meter = ConceptsMeter(entries, "concepts")
    found = [meter.match(caption) for caption in captions]
    assert found == [naive(caption, entries) for caption in captions]
    assert sum(map(len, found)) > 5_000
    matched = {entry for entries_of_one in found for entry in entries_of_one}
    assert 2 in matched and not {0, 1, 3} & matched
    assert any(twin in matched for twin in range(7_000, 7_500))
    assert {e for e in matched if 500 <= e < 1_000} == {e - 6_500 for e in matched if 7_000 <= e < 7_500}


@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(st.text("aA b.", max_size=5), max_size=30),
    captions=st.lists(st.text("aA b.,\t\n", max_size=12), max_size=10),
)
def test_small_alphabets_match_as_naively(entries: list[str], captions: list[str]) -> None:
    meter = ConceptsMeter(entries, "concepts")
    assert [meter.match(caption) for caption in captions] == [naive(caption, entries) for caption in captions]


def between_spaces(captions: Sequence[str], entries: Sequence[str]) -> Iterator[list[int]]:
    """The naive search from the other side: " entry " is in the text where the entry stands between two of its spaces,
    so every stretch between two spaces is looked up. A hundred thousand times as fast as `naive`, and as exact."""
    places: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        places.setdefault(entry, []).append(place)
    for caption in captions:
        text = naive_form(caption)
        spaces = [i for i, character in enumerate(text) if character == " "]
        stretches = {text[i + 1 : j] for i, j in itertools.combinations(spaces, 2)}
        yield sorted(place for stretch in stretches for place in places.get(stretch, ()))


def test_half_a_million_entries_match_ten_thousand_captions_as_naively() -> None:
    rng = np.random.default_rng(3)
    letters = np.array(list("abcdefghij"))
    words = np.unique(["".join(row[:n]) for row, n in zip(rng.choice(letters, (9_000, 5)), rng.integers(1, 6, 9_000))])
    lengths = rng.integers(1, 5, 500_000)
    drawn = rng.choice(words, (500_000, 4))
    entries = [" ".join(row[:n]) for row, n in zip(drawn.tolist(), lengths.tolist())]
    # With two spaces, at a comma; never, since marks are wrapped and tabs go; and "", between two spaces.
    entries[:8] = ["a  b", ", b", "a ,", "st. louis", "a\tb", "", " ", "b , "]
    entries[8:16] = entries[:8]
    # Captions are made of entries, so that long ones match, with the shorter ones that overlap them or lie inside.
    glue = np.array([" ", " ", " ", ", ", ".", "\n", "\t", "  ", "", "?! ", "`"])
    picks, glued = rng.integers(0, 500_000, (9_980, 5)), rng.choice(glue, (9_980, 5))
    captions = ["".join(entries[i] + g for i, g in zip(*row)) for row in zip(picks.tolist(), glued.tolist())]
    captions += ["", " ", "   ", ".", "a  b", "a, b", "a,b", "in st. louis", "a\tb", "A", "a" * 5_000, captions[0]]
    captions += [" ".join(entries[i] for i in rng.integers(0, 500_000, 60)) for _ in range(8)]
    assert len(captions) == 10_000

    meter = ConceptsMeter(entries, "concepts")
    found = [meter.match(caption) for caption in captions]
    for match, expected in zip(found, between_spaces(captions, entries), strict=True):
        assert match == expected
    # The naive search itself: every entry with some captions, every caption with some entries.
    some = [0, 1, 2, *range(9_980, 9_990)]
    assert [found[i] for i in some] == [naive(captions[i], entries) for i in some]
    few = [*range(16), *range(16, 500_000, 2_000)]
    listed = set(few)
    assert [[e for e in match if e in listed] for match in found[::10]] == [
        [few[i] for i in naive(caption, [entries[e] for e in few])] for caption in captions[::10]
    ]
    assert len(set(entries)) < 450_000, "there are duplicates"
    assert sum(len(entries[i].split()) > 1 for match in found for i in match) > 20_000
    assert max(map(len, found)) > 1_000 and [] in found


NO_SPACES = ("CJK ", "THAI ", "LAO ", "TIBETAN ", "MYANMAR ", "KHMER ", "IDEOGRAPHIC DESCRIPTION", "KANGXI")


def naive2(caption: str, entries: Sequence[str]) -> list[int]:
    """MetaCLIP 2, by what Unicode calls the characters."""

    def open_end(character: str) -> bool:
        is_mark = unicodedata.category(character)[0] in "PS" and (character.isascii() or character in MARKS)
        return is_mark or unicodedata.name(character).startswith(NO_SPACES)

    ends = [("" if e and open_end(e[0]) else " ", "" if e and open_end(e[-1]) else " ") for e in entries]
    text = naive_form(caption)
    return [i for i, (entry, (left, right)) in enumerate(zip(entries, ends)) if f"{left}{entry}{right}" in text]


def test_scripts_without_spaces_match_as_metaclip_2_has_it() -> None:
    alphabet = "aé猫犬ねコ한ไລໝའမខ⼀⿰豈𠀀,.-'、。$ "
    rng = np.random.default_rng(4)

    def text(most: int) -> str:
        return "".join(rng.choice(list(alphabet), rng.integers(0, most)))

    entries = ["", "犬", "猫が", "dog", "-", "a犬", "犬a", *(text(4) for _ in range(800))]
    captions = ["白い犬と猫が寝る", "a dog", "hotdog", "a犬a", *(text(20) for _ in range(400))]
    meter = ConceptsMeter(entries, "concepts", "metaclip2")
    assert [meter.match(caption) for caption in captions] == [naive2(caption, entries) for caption in captions]
    assert meter.match("白い犬と猫が寝る")[:1] == [1]
    assert ConceptsMeter(entries, "concepts").match("白い犬と猫が寝る") == []
    assert 3 in meter.match("a dog") and 3 not in meter.match("hotdog")


def test_the_rule_changes_what_is_measured(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('["犬"]')
    one, two = (Concepts(metadata=str(tmp_path / "metadata.json"), rule=r) for r in ("metaclip", "metaclip2"))
    assert one.content() != two.content()
    assert [signal.load("c").match("白い犬") for signal in (one, two)] == [[], [0]]


def test_balancing_needs_concepts() -> None:
    for column in ("caption", "extensions"):
        with pytest.raises(
            UserError, match=rf"selectors\.b\.column: {column} holds no lists of concepts; name a signal"
        ):
            parse_config({"selectors": {"b": {"kind": "concept_balance", "column": column, "t": 1}}})


def test_measured_into_the_store(tmp_path: Path) -> None:
    entries = ["picture", "the thing", "the", "Picture", "number 3", "picture", "table", "st. louis"]
    (tmp_path / "metadata.json").write_text(json.dumps(entries))
    samples = {str(n): sample(n) for n in range(70)}
    samples["broken"] = {"jpg": b"no picture", "txt": b"a picture"}
    samples["odd"] = sample(99, txt=b"nothing. to see", json=b"{}")
    write_tar(tmp_path / "pool" / "0.tar", samples)
    config = parse_config({"signals": {"concepts": {"kind": "concepts", "metadata": str(tmp_path / "metadata.json")}}})
    shard = list_shards([str(tmp_path / "pool")])[0]
    unit = Unit(shard=shard, number=0, rows=72)
    signal_set = store.open_set(tmp_path / "store", config.signals, 1000, [unit])
    Measuring(signals=config.signals, signal_set=signal_set)()(unit)
    table = pq.read_table(signal_set.path(unit))
    assert table.schema.field("concepts").type == pa.list_(pa.int32())
    for row in table.to_pylist():
        assert row["concepts"] == (None if row["error"] else naive(row["caption"], entries))
    assert table["concepts"][3].as_py() == [0, 1, 2, 4, 5, 6]
    assert table["concepts"][70].as_py() is None and table["concepts"][71].as_py() == []


def test_the_metadata_file_is_known_by_its_content_and_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "metadata.json"
    signal = Concepts(metadata=str(file))
    with pytest.raises(UserError, match=r"metadata .*metadata\.json: no such file; name"):
        signal.content()
    for text, message in (("[", "not JSON"), ('{"a": 1}', "not a list of strings"), ('["a", 1]', "not a list")):
        file.write_text(text)
        with pytest.raises(UserError, match=rf"metadata .*metadata\.json: {message}"):
            signal.content()
    file.write_text('["a"]')
    before = signal.content()
    file.write_text('["b"]')
    assert signal.content() != before


@pytest.fixture(scope="module")
def table() -> pa.Table:
    """Captions in three languages, with entries from some that nearly all name to some that hardly any does."""
    rng = np.random.default_rng(1)
    frequency = 0.6 / np.arange(1, ENTRIES + 1)
    concepts = [np.flatnonzero(rng.random(ENTRIES) < frequency).tolist() for _ in range(ROWS)]
    concepts[:50] = [[] for _ in range(50)]
    error = [None if n % 40 else "image_decode" for n in range(ROWS)]
    return pa.table(
        {
            "uid": [f"{h:032x}" for h in rng.integers(0, 2**62, ROWS)],
            "error": pa.array(error, pa.string()),
            "concepts": pa.array([None if e else c for c, e in zip(concepts, error)], pa.list_(pa.int32())),
            "language": pa.array(rng.choice(["en", "de", ""], ROWS, p=[0.7, 0.2, 0.1]).tolist(), pa.string()),
        }
    )


def run(selector: ConceptBalance, parts: list[Part]) -> tuple[np.ndarray, dict[str, object]]:
    """(bool [rows] dropped, what the stage says)"""
    selection = select({"it": selector}, parts)
    return selection.failed[:, 0], selection.stages[0]["concepts"]


def captions_of(table: pa.Table, per_language: bool) -> list[tuple[int, list[tuple[str, int]]]]:
    """(row, [(group, entry)]) of every row without an error."""
    return [
        (i, [(row["language"] if per_language else "all", entry) for entry in row["concepts"]])
        for i, row in enumerate(table.to_pylist())
        if row["error"] is None
    ]


def metaclip2_t(counts: list[int], share: float) -> int:
    """`p_to_t` of MetaCLIP 2, in exact arithmetic over the entries that something matches."""
    ascending, running, nearest = sorted(counts), 0, (2.0, 0)
    for count in ascending:
        running += count
        nearest = min(nearest, (abs(running / sum(ascending) - share), count))
    return nearest[1]


def test_a_language_that_a_field_lacks_is_the_unknown_one(table: pa.Table, tmp_path: Path) -> None:
    lacking = pa.array([language or None for language in table["language"].to_pylist()], pa.string())
    other = table.set_column(table.schema.get_field_index("language"), "language", lacking)
    both = []
    for name, one in (("there", table), ("lacking", other)):
        (tmp_path / name).mkdir()
        both.append(run(ConceptBalance(tail_share=0.3, per_language=True), write_parts(tmp_path / name, one, [3])))
    np.testing.assert_array_equal(both[0][0], both[1][0])
    assert both[0][1] == both[1][1]


@pytest.mark.parametrize(
    "chosen",
    [{"t": 40}, {"tail_share": 0.3}, {"t": 40, "per_language": True}, {"tail_share": 0.3, "per_language": True}],
)
def test_kept_counts_lie_at_the_formulas_sum(table: pa.Table, tmp_path: Path, chosen: dict[str, object]) -> None:
    captions = captions_of(table, "per_language" in chosen)
    counts = Counter(pair for _, pairs in captions for pair in pairs)
    groups = sorted({group for group, _ in counts})
    of = {g: [count for (group, _), count in counts.items() if group == g] for g in groups}
    share = chosen.get("tail_share", sum(c for c in of[groups[-1]] if c < 40) / sum(of[groups[-1]]))  # "en" is last
    t = {g: metaclip2_t(of[g], share) for g in groups} | ({groups[-1]: 40} if "t" in chosen else {})
    keep = {i: 1 - np.prod([1 - min(1, t[p[0]] / counts[p]) for p in pairs]) for i, pairs in captions}

    parts = write_parts(tmp_path, table, [])
    seeds = 100
    kept = np.zeros(ROWS)
    for seed in range(seeds):
        dropped, said = run(ConceptBalance(seed=seed, **chosen), parts)
        kept[list(keep)] += ~dropped[list(keep)]
    sure = [i for i, p in keep.items() if p == 1]
    never = [i for i, pairs in captions if not pairs]
    assert len(sure) > 100 and (kept[sure] == seeds).all()
    assert len(never) > 40 and (kept[never] == 0).all()
    p, drawn = np.array(list(keep.values())), kept[list(keep)]
    assert abs(drawn.sum() - seeds * p.sum()) < 4 * np.sqrt(seeds * (p * (1 - p)).sum())
    for low in (0.0, 0.25, 0.5, 0.75):  # in each range of probabilities too, so that no entry pays for another
        band = (p > low) & (p <= low + 0.25) & (p < 1)
        assert band.sum() == 0 or abs(drawn[band].sum() - seeds * p[band].sum()) < 4 * np.sqrt(
            seeds * (p * (1 - p))[band].sum()
        )

    assert {g: one["t"] for g, one in said["groups"].items()} == t
    for g, one in said["groups"].items():
        assert (one["entries"], one["matches"]) == (len(of[g]), sum(of[g]))
        assert one["tail_share"] == pytest.approx(sum(c for c in of[g] if c < t[g]) / sum(of[g]))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    assert [(group, entry, before) for group, entry, before, _ in said["top"]] == [(*p, c) for p, c in ranked]
    after = Counter(pair for i, pairs in captions if not dropped[i] for pair in pairs)
    assert [a for *_, a in said["top"]] == [after[pair] for pair, _ in ranked]


@pytest.mark.parametrize("chosen", [{"t": 40}, {"t": 40, "per_language": True}, {"tail_share": 0.3}])
def test_the_same_choice_for_any_partition_and_order(
    table: pa.Table, tmp_path: Path, chosen: dict[str, object]
) -> None:
    selector = ConceptBalance(seed=7, **chosen)
    whole = run(selector, write_parts(tmp_path, table, []))
    # The first part holds unmatched captions alone, and one part nothing at all.
    for cuts in ([45, 45, 1000, 1001], [2000], list(range(100, ROWS, 100))):
        dropped, said = run(selector, write_parts(tmp_path, table, cuts))
        assert dropped.tobytes() == whole[0].tobytes()
        assert json.dumps(said) == json.dumps(whole[1])
    mixed = np.random.default_rng(0).permutation(ROWS)
    dropped, said = run(selector, write_parts(tmp_path, table.take(pa.array(mixed)), [777]))
    np.testing.assert_array_equal(dropped, whole[0][mixed])
    assert json.dumps(said) == json.dumps(whole[1])
    other, _ = run(ConceptBalance(seed=8, **chosen), write_parts(tmp_path, table, []))
    assert 0 < (other != whole[0]).mean() < 0.5


def test_where_nothing_matches_all_goes(tmp_path: Path) -> None:
    nothing = pa.table(
        {
            "uid": ["a", "b"],
            "error": pa.nulls(2, pa.string()),
            "concepts": pa.array([[], []], pa.list_(pa.int32())),
            "language": ["en", "de"],
        }
    )
    for per_language in (False, True):
        dropped, said = run(ConceptBalance(t=5, per_language=per_language), write_parts(tmp_path, nothing, [1]))
        assert dropped.all() and said == {"groups": {}, "top": []}


@settings(max_examples=200, deadline=None)
@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=40), share=st.floats(0, 1), t=st.integers(1, 60))
def test_thresholds_and_shares(counts: list[int], share: float, t: int) -> None:
    array = np.array(counts)
    ascending = np.sort(array)
    running = np.cumsum(ascending) / ascending.sum()
    found = share_to_t(array, share)
    reached = running[ascending == found]
    assert np.abs(reached - share).min() == np.abs(running - share).min()
    assert t_to_share(array, t) == sum(c for c in counts if c < t) / sum(counts)


def test_settings_and_a_missing_language_are_refused_by_name(table: pa.Table, tmp_path: Path) -> None:
    for chosen, message in (
        ({}, "exactly one of t and tail_share"),
        ({"t": 3, "tail_share": 0.1}, "exactly one of t and tail_share"),
        ({"t": 0}, "t 0 is not at least 1"),
        ({"tail_share": 0.0}, r"tail_share 0\.0 is not in \(0, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            ConceptBalance(**chosen)
    selector = ConceptBalance(t=40, per_language=True, reference_language="fr")
    with pytest.raises(UserError, match=r"reference_language fr: .* name one of de, en, or"):
        run(selector, write_parts(tmp_path, table, []))


def test_the_published_recipe() -> None:
    selector = load_config(Path("recipes/curate/metaclip_400m.yaml")).selectors["concepts"]
    assert isinstance(selector, ConceptBalance) and (selector.t, selector.per_language) == (20_000, False)
