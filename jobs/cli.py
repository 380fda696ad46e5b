"""The `gemsmith` command: one subcommand per arrow of the pipeline, each importing only what it runs.

A user's error is one line on stderr and exit code 2. Whatever is not a
command's own option goes to its recipe as a dotted override.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from curation.errors import UserError, exit_code

COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {}
TRUST: dict[str, Any] = {"action": "store_true", "help": "run code that a VLM's folder brings (vlm2vec)"}


def command(name: str, summary: str) -> Callable[[Callable[[list[str]], int]], Callable[[list[str]], int]]:
    def keep(function: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
        COMMANDS[name] = (summary, function)
        return function

    return keep


def _parser(name: str) -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(f"gemsmith {name}: {message}; `gemsmith {name} --help` shows the options")

    return Parser(prog=f"gemsmith {name}", description=COMMANDS[name][0], allow_abbrev=False)


@command("synth", "make an embedded pool with known noise, or a clean evaluation set")
def synth(arguments: list[str]) -> int:
    parser = _parser("synth")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", action="store_true", help="no noise: trusted pairs or an evaluation set")
    parser.add_argument("--layout", choices=["pairs", "classification", "colours"], default="pairs")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--overwrite", action="store_true")
    a = parser.parse_args(arguments)
    from curation.synth import synthesise

    how = {"layout": a.layout, "workers": a.workers, "overwrite": a.overwrite}
    synthesise(out=a.out, pairs=a.pairs, seed=a.seed, noise=not a.clean, **how)
    return 0


@command("curate", "measure, select, build: a raw pool becomes shards")
def curate(arguments: list[str]) -> int:
    parser = _parser("curate")
    parser.add_argument("--config", type=Path, required=True, help="recipe, e.g. recipes/curate/datacomp_basic.yaml")
    parser.add_argument(
        "--pool",
        action="append",
        required=True,
        help="folder, file or URL (s3://, gs://, https://, ...) of tars, parquet with pictures, a list of captions "
        "(csv, tsv, jsonl), or pictures and texts; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", choices=["measure", "select", "build", "all"], default="all")
    parser.add_argument("--signals", type=Path, metavar="STORE", help="signal store (default: OUT/signals)")
    parser.add_argument("--workers", type=int, help="Ray actors (default: one a CPU)")
    parser.add_argument("--part", metavar="I/N", help="only the I-th of N slices of the measure or build phase")
    parser.add_argument("--ray.address", dest="ray_address", help="a running cluster (default: start Ray here)")
    parser.add_argument("--dry-run", action="store_true", help="say what each phase finds done and what it would do")
    parser.add_argument("--overwrite", action="store_true", help="discard what OUT holds")
    a, overrides = parser.parse_known_args(arguments)
    from curation.config import load_config
    from curation.pipeline import curate as run

    run(
        load_config(a.config, overrides),
        pools=a.pool,
        out=a.out,
        phase=a.phase,
        signals=a.signals,
        workers=a.workers,
        part=a.part,
        dry_run=a.dry_run,
        overwrite=a.overwrite,
        ray_address=a.ray_address,
    )
    return 0


@command("documents", "interleaved documents: pages and sentence lists with their pictures become shards")
def documents(arguments: list[str]) -> int:
    parser = _parser("documents")
    parser.add_argument("--config", type=Path, required=True, help="recipe, e.g. recipes/documents/obelics.yaml")
    parser.add_argument("--pool", action="append", required=True, help="folder or URL: pages, tars, jsonl; repeatable")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, help="Ray actors (default: one a CPU)")
    parser.add_argument("--ray.address", dest="ray_address", help="a running cluster (default: start Ray here)")
    parser.add_argument("--overwrite", action="store_true", help="discard what OUT holds")
    a, overrides = parser.parse_known_args(arguments)
    from curation.documents.config import load_config
    from curation.documents.pipeline import documents as run

    how = {"workers": a.workers, "overwrite": a.overwrite, "ray_address": a.ray_address}
    run(load_config(a.config, overrides), pools=a.pool, out=a.out, **how)
    return 0


@command("neighbours", "the nearest pictures of every picture of curated shards, for `loader.neighbours`")
def neighbours(arguments: list[str]) -> int:
    parser = _parser("neighbours")
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--signals", type=Path, required=True, help="signal store of the curation that made them")
    parser.add_argument("--column", default="clip_image_embedding")
    parser.add_argument("--k", type=int, default=3)
    a = parser.parse_args(arguments)
    from training.data.neighbours import FILE, find_neighbours

    found = find_neighbours(a.shards, a.signals, a.column, a.k)
    print(f"{a.shards / FILE}: {found.shape[1]} neighbours of {len(found)} samples")
    return 0


@command("inspect", "one sample of a curated output: picture, signals, every selector's verdict, where it went")
def inspect(arguments: list[str]) -> int:
    parser = _parser("inspect")
    parser.add_argument("uid")
    parser.add_argument("--out", type=Path, required=True, help="what `gemsmith curate` wrote")
    a = parser.parse_args(arguments)
    from curation.inspection import as_text
    from curation.inspection import inspect as run

    print("\n\n".join(as_text(sample) for sample in run(a.uid, a.out)))
    return 0


@command("share", "what was measured, in the files of clip-retrieval, DataComp or SemDeDup")
def share(arguments: list[str]) -> int:
    from curation.share import LAYOUTS
    from curation.share import share as run

    parser = _parser("share")
    parser.add_argument("--out", type=Path, required=True, help="what `gemsmith curate` wrote")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--to", type=Path, required=True, help="a new folder")
    parser.add_argument("--signal", help="clip-retrieval: whose embeddings, where the recipe has several of kind clip")
    a = parser.parse_args(arguments)
    print(f"{a.to}: {run(a.out, a.to, a.layout, a.signal):,} rows")
    return 0


@command("train", "train a recipe on shards, through the deepspeed launcher")
def train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        from training.config import make_parser

        make_parser().print_help()
        print("\n--ranks N: processes to launch here (default: GPUs, else 2)")
        return 0
    ranks_parser = _parser("train")
    ranks_parser.add_argument("--ranks", type=int)
    a, rest = ranks_parser.parse_known_args(arguments)
    import torch

    from jobs.launch import launch
    from training.distributed import check_ranks
    from training.train import parse, prepare

    ranks = a.ranks if a.ranks is not None else torch.cuda.device_count() or 2
    check_ranks(ranks)
    config, data, run, overwrite = parse(rest)
    if not prepare(config, data, run, world_size=ranks, overwrite=overwrite):
        return 0
    return launch([word for word in rest if word != "--overwrite"], run, ranks)


@command("export", "a checkpoint as a folder that others open, without a GPU")
def export(arguments: list[str]) -> int:
    parser = _parser("export")
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/step_*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--merge", action="store_true", help="add the adapter into the weights; needs no peft to open")
    parser.add_argument("--overwrite", action="store_true", help="discard what OUT holds")
    parser.add_argument("--trust-remote-code", **TRUST)
    a = parser.parse_args(arguments)
    from training.export import export as run

    run(a.checkpoint, a.out, a.dtype, merge=a.merge, overwrite=a.overwrite, trust_remote_code=a.trust_remote_code)
    return 0


def _grading(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    names = "retrieval, classification, captioning, region_retrieval, region_captioning"
    how = "a list with commas; their settings are options too, such as TASK.limit N: the first N only (default: all)"
    parser.add_argument("--tasks", required=True, help=f"{names}: {how}")
    parser.add_argument(
        "--data", action="append", required=True, metavar="[TASK=]DIR", help="a folder for all tasks, or TASK=DIR each"
    )
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl; lines are appended")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings by content")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--trust-remote-code", **TRUST)
    if {"-h", "--help"} & set(arguments):
        from evaluation.evaluate import make_parser

        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "settings:\n" + "".join(make_parser().format_help().partition("  --config")[1:])


def _sources(tasks: Sequence[str], data: Sequence[str]) -> Any:
    named = dict(item.split("=", 1) for item in data if item.partition("=")[0] in tasks)
    common = [item for item in data if item.partition("=")[0] not in tasks]  # a folder may have a "=" of its own
    if len(common) > 1:
        raise UserError(f"--data {common[1]}: a second folder for all tasks; write TASK=DIR")
    missing = [task for task in tasks if task not in named] if not common else []
    if missing:
        raise UserError(f"--data: no folder for {', '.join(missing)}; add {missing[0]}=DIR")
    return {task: Path(named.get(task, common[0] if common else "")) for task in tasks}


@command("evaluate", "grade one checkpoint")
def evaluate(arguments: list[str]) -> int:
    parser = _parser("evaluate")
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/step_* or RUN/export")
    parser.add_argument("--embed-tokens", type=int, help="cut texts there and not where training did (mmgem)")
    _grading(parser, arguments)
    a, overrides = parser.parse_known_args(arguments)
    from evaluation.evaluate import evaluate as run
    from evaluation.evaluate import limit_threads, load_checkpoint, load_config

    limit_threads(a.threads)
    tasks = a.tasks.split(",")
    run(
        load=lambda folder: load_checkpoint(folder, a.embed_tokens, a.trust_remote_code),
        checkpoint=a.checkpoint,
        tasks=tasks,
        data=_sources(tasks, a.data),
        out=a.out,
        cache=a.cache,
        config=load_config(overrides),
    )
    return 0


@command("heatmap", "where a picture shows a text, drawn over it")
def heatmap(arguments: list[str]) -> int:
    parser = _parser("heatmap")
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/step_* or RUN/export")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the PNG to write")
    a = parser.parse_args(arguments)
    from evaluation.heatmap import heat_map

    found = heat_map(a.checkpoint, a.image, a.text, a.out)
    print(f"{a.out}: cosine {found.min():.3f} to {found.max():.3f} over {found.shape[0]} x {found.shape[1]} patches")
    return 0


@command("watch", "grade each checkpoint of a run as it lands")
def watch(arguments: list[str]) -> int:
    parser = _parser("watch")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--idle-seconds", type=float, help="give up after so long without a new checkpoint")
    parser.add_argument("--best", metavar="TASK.METRIC", help="name the best checkpoint in RUN/best.json and keep it")
    _grading(parser, arguments)
    a, overrides = parser.parse_known_args(arguments)
    from evaluation.evaluate import load_checkpoint, load_config
    from evaluation.watch import watch as run

    tasks = a.tasks.split(",")
    run(
        run=a.run,
        tasks=tasks,
        data=_sources(tasks, a.data),
        out=a.out,
        cache=a.cache,
        config=load_config(overrides),
        idle_seconds=a.idle_seconds,
        threads=a.threads,
        best=a.best,
        load=partial(load_checkpoint, trust_remote_code=a.trust_remote_code),
    )
    return 0


@command("search", "the pictures of a folder that answer a text or a picture, on one page")
def search(arguments: list[str]) -> int:
    parser = _parser("search")
    parser.add_argument("text", nargs="*", help="what to look for; each text is a query of its own")
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/step_* or RUN/export")
    parser.add_argument(
        "--data", required=True, help="folder, file or URL of pictures: whatever `gemsmith curate` reads as a pool"
    )
    parser.add_argument("--image", type=Path, action="append", default=[], help="a picture to look for; repeatable")
    parser.add_argument("--top", type=int, default=12, help="pictures shown a query (default: 12)")
    parser.add_argument("--out", type=Path, help="folder of the index and the page (default: DATA.search)")
    parser.add_argument("--batch", type=int, help="pictures embedded at a time (default: 64, of a VLM 4)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--trust-remote-code", **TRUST)
    a = parser.parse_intermixed_args(arguments)
    from evaluation.evaluate import limit_threads, load_checkpoint
    from evaluation.search import as_text
    from evaluation.search import search as run

    limit_threads(a.threads)
    load = partial(load_checkpoint, trust_remote_code=a.trust_remote_code)
    asked = {"texts": a.text, "images": a.image, "top": a.top}
    found, page = run(checkpoint=a.checkpoint, data=a.data, **asked, out=a.out, batch=a.batch, load=load)
    print(f"{as_text(a.text, a.image, found)}\n{page}")
    return 0


@command("compare", "compare two results files, paired query by query")
def compare(arguments: list[str]) -> int:
    parser = _parser("compare")
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    which = "in {}, by the end of its path or the beginning of its hash (default: of the last step)"
    parser.add_argument("--a-checkpoint", metavar="NAME", help=which.format("A"))
    parser.add_argument("--b-checkpoint", metavar="NAME", help=which.format("B"))
    a = parser.parse_args(arguments)
    from evaluation.compare import as_text
    from evaluation.compare import compare as run

    print(as_text(run(a=a.a, b=a.b, checkpoint_a=a.a_checkpoint, checkpoint_b=a.b_checkpoint)))
    return 0


@command("report", "one static page over all results below a folder")
def report(arguments: list[str]) -> int:
    parser = _parser("report")
    parser.add_argument("folder", type=Path)
    a = parser.parse_args(arguments)
    from evaluation.report import report as run

    print(run(a.folder))
    return 0


@command("demo", "the whole path on an embedded pool, ending in one page")
def demo(arguments: list[str]) -> int:
    parser = _parser("demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="discard what OUT holds")
    a = parser.parse_args(arguments)
    from jobs.demo import demo as run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step at work is ended too
    run(a.out, a.seed, overwrite=a.overwrite)
    return 0


@command("reproduce", "a paper's claim shown in small: arms, paired seeds, a verdict with intervals, one page")
def reproduce(arguments: list[str]) -> int:
    parser = _parser("reproduce")
    parser.add_argument("name", help="joint, stage2, batch, instruct, flava, curate; or all")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--seeds", type=int, default=5, help="paired repetitions (default: 5, as registered)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the registered sizes, for a rehearsal")
    parser.add_argument("--workers", type=int, help="arms that run side by side, a core each (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="discard what the claim's folder holds")
    a = parser.parse_args(arguments)
    # What a claim takes and how many arms run side by side are registered for cores, GPU or not.
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    from jobs.reproduce.run import reproduce as run

    run(a.name, a.out, seeds=a.seeds, scale=a.scale, workers=a.workers, overwrite=a.overwrite)
    return 0


def main() -> None:
    # The launcher's ranks and Ray's workers inherit both: forked tokenizers warn, and Ray reports its use, unless told.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print("usage: gemsmith COMMAND ...  (gemsmith COMMAND --help shows its options)\n")
        print("\n".join(f"  {n:10} {summary}" for n, (summary, _) in COMMANDS.items()))
        return
    sys.exit(exit_code(lambda: _command(name)(arguments)))


def _command(name: str) -> Callable[[list[str]], int]:
    if name not in COMMANDS:
        raise UserError(f"gemsmith {name}: no such command; one of {', '.join(COMMANDS)}")
    return COMMANDS[name][1]
