"""The commands on the pages, as they stand: all their words are read, with the recipe they name, and none is run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from curation.errors import UserError
from jobs.cli import COMMANDS
from tests.conftest import ROOT
from tests.jobs.test_cli import FLAGS, TRAIN_FLAGS

PAGES = [ROOT / "README.md", ROOT / "jobs/ray/README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORK = {  # what a command calls once it has read its words
    "curate": "curation.pipeline.curate",
    "documents": "curation.documents.pipeline.documents",
    "neighbours": "training.data.neighbours.find_neighbours",
    "train": "training.train.prepare",
    "export": "training.export.export",
    "evaluate": "evaluation.evaluate.evaluate",
    "heatmap": "evaluation.heatmap.heat_map",
    "watch": "evaluation.watch.watch",
    "search": "evaluation.search.search",
    "compare": "evaluation.compare.compare",
    "report": "evaluation.report.report",
    "reproduce": "jobs.reproduce.run.reproduce",
}
ANY_RECIPE = {"curate": "recipes/curate/tiny_raw.yaml", "train": "recipes/train/tiny_mmgem.yaml"}  # `--config R`
TYPED = re.compile(r"^(?: {4})?((?:gemsmith|deepspeed|python -m jobs\.\S+) .*)$", re.MULTILINE)
INLINE = re.compile(r"`gemsmith (\w+)([^`]*)`")


class Read(Exception):
    """All words were read."""


def commands(page: Path) -> list[list[str]]:
    """[command of `gemsmith`, its words] of each line of the page that one could type; what is optional is there."""
    found = []
    for line in TYPED.findall(page.read_text().replace("\\\n", " ")):
        words = shlex.split(re.sub(r"\[([^\]]*)\]", r"\1", line), comments=True)
        if "training/train.py" in words:
            words = ["train", *words[words.index("training/train.py") + 1 :]]
        else:
            words = words[words.index("--") + 1 if "--" in words else 1 :]
        found.append(words)
    return found


def read(words: list[str], patch: pytest.MonkeyPatch) -> None:
    """
    Raises:
        UserError: words that the command refuses.
    """
    name, rest = words[0], ["1" if word == "N" else word for word in words[1:]]
    if "--config" in rest:
        recipe = rest.index("--config") + 1
        rest[recipe] = str(ROOT / (ANY_RECIPE[name] if rest[recipe].isupper() else rest[recipe]))
    if "..." in rest:
        rest.remove("...")
        sources = yaml.safe_load(Path(rest[recipe]).read_text())["loader"].get("sources", {})
        given = {word.partition("=")[0] for word in rest}
        rest += [word for source in sources if source not in given for word in ("--data", f"{source}=D")]
        rest += [] if "--data" in rest else ["--data", "D"]
        rest += [] if "--out" in rest else ["--out", "RUN"]
    module, _, function = WORK[name].rpartition(".")

    def stop(*_: object, **__: object) -> None:
        raise Read

    patch.setattr(importlib.import_module(module), function, stop)
    patch.setattr("training.begin.resolved", lambda config: config)  # opens the run that stage 2 begins from
    with pytest.raises(Read):
        COMMANDS[name][1](rest)


@pytest.mark.parametrize("words", [words for page in PAGES for words in commands(page)], ids=lambda words: words[0])
def test_a_command_on_a_page_is_read(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read(words, monkeypatch)


def test_the_readme_overrides_what_the_recipes_beside_it_have(monkeypatch: pytest.MonkeyPatch) -> None:
    (paragraph,) = re.findall(r"every key can be overridden \(([^)]*)\)", (ROOT / "README.md").read_text())
    overrides = [found.split() for found in re.findall(r"`(--[^`]*)`", paragraph)]
    assert len(overrides) >= 2
    typed = {words[0]: words for words in commands(ROOT / "README.md")[:3]}
    for override in overrides:
        command = "train" if override[0].removeprefix("--").split(".")[0] in ("optim", "loader") else "curate"
        read([*typed[command], *override], monkeypatch)
        with pytest.raises(UserError):
            read([*typed[command], f"{override[0]}_of_nothing", *override[1:]], monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_command_in_a_sentence_has_its_flags(page: Path) -> None:
    known = {name: {*flags.split()} for name, flags in FLAGS.items()} | {"train": {*TRAIN_FLAGS.split()}}
    for name, rest in INLINE.findall(page.read_text()):
        said = {flag for flag in re.findall(r"--[\w.-]+", rest) if "." not in flag or name == "train"}
        assert said <= known[name], f"gemsmith {name}{rest}"


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20
    assert {words[0] for page in PAGES for words in commands(page)} <= WORK.keys()
