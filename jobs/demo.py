"""The main job in small, end to end: does curation pay?

    pool ──┬── as it is ─────────────▶ raw arm     ─┐
           ├── gemsmith curate ──────▶ curated arm ─┼─▶ same model, same samples seen ─▶ same held-out scenes
           └── truth.parquet ────────▶ oracle arm  ─┘
    trusted pairs ─▶ small CLIP ─┬▶ the CLIPScore of `curate` (the data-filtering-network recipe)
                                 └▶ the ViT that every arm begins from, as MM-GEM begins from OpenCLIP's

Every step is the command that users run, as a process of its own: nothing here
has another way in. The training goes through the plain `deepspeed` launcher
with `gemsmith watch` grading checkpoints beside it. The page tells the story.
"""

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from curation.errors import UserError
from curation.manifest import claim, write_manifest
from jobs.launch import held_port, shown_gpus
from jobs.memory import PeakMemory
from jobs.steps import precision, ranks, tool
from training.config import ROOT

ARMS = ("raw", "curated", "oracle")
RECIPE = "recipes/train/tiny_demo.yaml"


@dataclass(frozen=True, kw_only=True)
class DemoSizes:
    """Pairs in each set, and samples seen by each model. The pool and the clean sets of one seed share no scene."""

    pool: int = 12_000
    trusted: int = 6_000  # trains the scorer
    reference: int = 1_000  # sets its threshold: trusted pairs that it was not trained on
    heldout: int = 4_000
    classes: int = 800
    scorer_samples: int = 30_720
    arm_samples: int = 10_240  # the same for every arm
    watched: int = 500  # held-out scenes that checkpoints are graded on while they land
    captioned: int = 500


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """SIGTERM is taken afterwards: a process that is just being started would be left to itself."""
    held: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
    for number in held:
        signal.raise_signal(number)


@dataclass(slots=True)
class Story:
    """The folders of one demo and the seconds its steps took."""

    out: Path
    seed: int
    sizes: DemoSizes
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self, name: str, *command: object, threads: int = 1) -> None:
        """Run a step of so many threads a process; it must end well."""
        self._run(name, [command], threads)

    def run_watched(self, name: str, *command: object, watch: Sequence[object], leaves: Path) -> None:
        """Run a step with another process beside it; both must end well.

        leaves: what the step writes last. The plain launcher ends with 0 where it was killed, and what watches it
        would wait for that file.
        """
        # The training has the cores; grading takes what it leaves.
        self._run(name, [command, ("nice", "-n", "19", *watch)], 1, leaves)

    def _run(self, name: str, commands: Sequence[Sequence[object]], threads: int, leaves: Path | None = None) -> None:
        print(f"\n=== {name}: {' '.join(map(str, commands[0][:2]))} ...", flush=True)
        begun, environment = time.monotonic(), {**os.environ, **shown_gpus(), "OMP_NUM_THREADS": str(threads)}
        running: list[subprocess.Popen[bytes]] = []
        try:
            with _sigterm_held():
                # Each in a group of its own, launchers and ranks included: what is left can be ended as a whole.
                for words in commands:
                    line = [*map(str, words)]
                    running.append(subprocess.Popen(line, cwd=ROOT, env=environment, process_group=0))
            for process in running:
                if code := process.wait() or int(leaves is not None and not leaves.exists()):
                    break
        finally:
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait()
        self.seconds[name] = time.monotonic() - begun
        if code:
            raise UserError(f"demo: the step {name!r} ended with {code}; what it printed above says why")

    def gemsmith(self, name: str, *arguments: object, threads: int = 1) -> None:
        self.run(name, tool("gemsmith"), *arguments, threads=threads)


def demo(out: Path, seed: int, sizes: DemoSizes | None = None, *, overwrite: bool = False) -> dict[str, Any]:
    """Run the story into `out` and return its summary; a finished one is only pointed at."""
    page, summary_file = out / "report" / "index.html", out / "summary.json"
    out = out.resolve()
    sizes = sizes or DemoSizes()
    claim(out, {"seed": seed, "sizes": dataclasses.asdict(sizes)}, overwrite=overwrite)
    if summary_file.exists():
        print(f"already complete: {page}")
        return json.loads(summary_file.read_text())
    begun = time.monotonic()
    story = Story(out, seed, sizes)
    with PeakMemory() as memory:
        make_data(story)
        make_scorer(story)
        curate_arms(story)
        for arm in ARMS:
            train_arm(story, arm)
        for arm in ARMS:
            grade_arm(story, arm)
        from jobs.demo_page import summarise, write_page

        summary = summarise(out)
        write_page(out, summary, story.seconds)
    summary |= {
        "seed": seed,
        "wall_s": time.monotonic() - begun,
        "peak_pss_mib": memory.peak_mib,
        "seconds": story.seconds,
    }
    write_page(out, summary, story.seconds)
    write_manifest(summary_file, summary)
    closed = summary["gap_closed"]
    gap = "there is no gap to close" if closed is None else f"curated closes {closed:.0%} of the gap"
    print(f"\n{gap}; {summary['wall_s']:.0f} s, {memory.peak_mib:.0f} MiB at most")
    print(page)
    return summary


def make_data(story: Story) -> None:
    """The pool and three clean sets. Clean sets of one seed are the same scenes, so each takes its own."""
    out, seed, sizes = story.out, story.seed, story.sizes
    story.gemsmith("synth pool", "synth", "--out", out / "pool", "--pairs", sizes.pool, "--seed", seed)
    for number, (name, pairs) in enumerate(
        (("heldout", sizes.heldout), ("trusted", sizes.trusted), ("reference", sizes.reference))
    ):
        other = seed + number * 1_000_003
        story.gemsmith(f"synth {name}", "synth", "--out", out / name, "--pairs", pairs, "--seed", other, "--clean")
    story.gemsmith(
        "synth classes", "synth", "--out", out / "classes", "--pairs", sizes.classes, "--seed", seed,
        "--layout", "classification",
    )  # fmt: skip


def make_scorer(story: Story) -> None:
    """A small CLIP on the trusted pairs, by one rank: ranks would exchange its many words, most of its weights."""
    story.gemsmith(
        "train scorer", "train", "--config", "recipes/train/tiny_clip.yaml", "--data", story.out / "trusted",
        "--out", story.out / "scorer", "--seed", story.seed, "--precision", precision(),
        "--samples", story.sizes.scorer_samples, "--ranks", 1, "--deepspeed", "ds_configs/zero1.json",
        "--loader.chunk", 128, threads=2,
    )  # fmt: skip


def curate_arms(story: Story) -> None:
    """The same pool three times, from one signal store: measured once, selected and built for each arm."""
    out, store = story.out, story.out / "signals"
    scorer = out / "scorer" / "export"
    recipe = ["--config", "recipes/curate/tiny_demo.yaml", "--signals.clip_score.model", scorer, "--seed", story.seed]
    recipe += ["--selectors.clip_score.reference", out / "reference_measured"]
    story.gemsmith(
        "measure reference", "curate", *recipe, "--pool", out / "reference", "--phase", "measure",
        "--out", out / "reference_measured",
    )  # fmt: skip
    pool = ("--pool", out / "pool", "--signals", store)
    story.gemsmith("curate curated", "curate", *recipe, *pool, "--out", out / "curated")
    raw = ("--config", "recipes/curate/tiny_raw.yaml", "--seed", story.seed)
    story.gemsmith("curate raw", "curate", *raw, *pool, "--out", out / "raw")
    uids = out / "clean_uids.txt"
    truth = pq.read_table(out / "pool" / "truth.parquet", columns=["uid", "noise"]).to_pylist()
    uids.write_text("".join(f"{row['uid']}\n" for row in truth if row["noise"] == "clean"))
    oracle = ("--selectors.truth.kind", "uids", "--selectors.truth.file", uids)
    story.gemsmith("curate oracle", "curate", *raw, *oracle, *pool, "--out", out / "oracle")


def train_arm(story: Story, arm: str) -> None:
    """Through the plain launcher, with every checkpoint graded as it lands."""
    out, run = story.out, story.out / "runs" / arm
    watch = [
        tool("gemsmith"), "watch", "--run", run, "--tasks", "retrieval", "--data", out / "heldout",
        "--out", out / "watched" / arm / "results.jsonl", "--threads", 1,
        "--config", "recipes/evaluate/tiny_demo.yaml", "--retrieval.limit", story.sizes.watched,
    ]  # fmt: skip
    with held_port() as port:
        story.run_watched(
            f"train {arm}", tool("deepspeed"), "--num_accelerators", ranks(), "--master_port", port,
            "training/train.py", "--config", RECIPE, "--mmgem.vision.arch", f"local-dir:{out / 'scorer' / 'export'}",
            "--data", out / arm / "shards", "--out", run,
            "--seed", story.seed, "--precision", precision(), "--samples", story.sizes.arm_samples,
            "--mmgem.tokenizer.name_or_path", tokenizer(story),
            watch=watch, leaves=run / "manifest.json",
        )  # fmt: skip


def tokenizer(story: Story) -> Path:
    """One tokenizer for the three arms, trained on the pool's own captions: the same model everywhere."""
    folder = story.out / "tokenizer"
    if not folder.exists():
        from training.data import Shards
        from training.family_config import TokenizerConfig
        from training.tokenizer import load_tokenizer, save_tokenizer
        from training.train import parse

        recipe = parse(["--config", str(ROOT / RECIPE), "--data", ".", "--out", "."])[0]
        assert recipe.mmgem is not None
        size = recipe.mmgem.tokenizer.vocab_size
        captions = Shards(story.out / "raw" / "shards").every_caption
        save_tokenizer(load_tokenizer(TokenizerConfig(vocab_size=size), captions), folder)
    return folder


def grade_arm(story: Story, arm: str) -> None:
    """All tasks for the last checkpoint, opened from its shards."""
    from training.checkpoint import latest

    out = story.out
    story.gemsmith(
        f"evaluate {arm}", "evaluate", "--checkpoint", latest(out / "runs" / arm),
        "--tasks", "retrieval,classification,captioning",
        "--data", f"retrieval={out / 'heldout'}", "--data", f"captioning={out / 'heldout'}",
        "--data", f"classification={out / 'classes'}", "--out", out / "graded" / arm / "results.jsonl",
        "--config", "recipes/evaluate/tiny_demo.yaml", "--captioning.limit", story.sizes.captioned, "--threads", 2,
        "--cache", out / "embeddings",
    )  # fmt: skip
