"""One rank of a training run; the launcher starts as many as there are accelerators:

    deepspeed --num_accelerators 2 training/train.py --config recipes/train/tiny_mmgem.yaml --data SHARDS --out RUN

`gemsmith train` wraps just that. User's errors are found before anything is
launched or joined, so they come out as one line, and exit code 2.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A script's own folder comes first on the path, where data.py or config.py would hide packages of those names.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from curation.errors import UserError, exit_code, full_disk_named, one_line
from curation.manifest import claim, occupied, occupy, read_manifest
from training import begin, checkpoint, resumption
from training.config import TrainConfig, as_dict, make_parser
from training.data import COUNTS, Mixture, fingerprint, keep_counts, named, open_sources
from training.deepspeed_config import computing, deepspeed_config
from training.log import check_wandb


def parse(arguments: list[str]) -> tuple[TrainConfig, dict[str, str], Path, bool]:
    """(config, path of each source, run, overwrite) from the command line; the launcher's `--local_rank` is ignored.

    Raises:
        UserError: an unknown key, a value of the wrong kind, a recipe that does not exist.
    """
    from jsonargparse import ArgumentError

    parser = make_parser()
    kept = [a for a in arguments if not a.startswith("--local_rank")]
    try:
        parsed = parser.instantiate(parser.parse_args(kept))
    except (ArgumentError, TypeError, ValueError) as error:
        told: BaseException | None = error
        while told is not None and not isinstance(told, UserError):  # a section's own words, which jsonargparse wraps
            told = told.__cause__ or told.__context__
        raise UserError(one_line(told or error, None)) from None
    names = TrainConfig.__dataclass_fields__
    config = begin.resolved(TrainConfig(**{name: getattr(parsed, name) for name in names}))
    return config, named(config.loader, parsed.data), Path(parsed.out), parsed.overwrite


def prepare(config: TrainConfig, data: dict[str, str], run: Path, *, world_size: int, overwrite: bool) -> bool:
    """Check what can be checked before launching and claim the folder; False where the run is complete already."""
    check_free(run)
    with occupied(run):  # an --overwrite would empty it under another
        pass
    begin.check(config)
    deepspeed_config(config, world_size)
    sources = open_sources(config.loader, data, run / COUNTS)
    weights = {source.name: source.weight for source in sources}
    Mixture(weights, seed=config.seed, unit=config.loader.unit, mixing=config.loader.mixing)
    check_wandb(config.log.wandb)
    computed = {name: value for name, value in as_dict(config).items() if name not in ("log", "deepspeed")}
    for name in ("max_error_rate", "error_window"):  # what may be missing changes no step, and is raised to go on
        del computed["loader"][name]
    identity = {"config": computed, "deepspeed": computing(config), "data": fingerprint(config.loader, data)}
    with full_disk_named(run):
        claim(run, identity, overwrite=overwrite)
        keep_counts(sources, run / COUNTS)
    if (done := read_manifest(run / "manifest.json")) is not None:
        print(f"{run} is already complete: {done['steps']} steps, {done['samples']} samples")
        return False
    if (last := checkpoint.latest(run)) is not None:
        resumption.check_resumable(last, as_dict(config))
    return True


def check_free(run: Path) -> None:
    """
    Raises:
        UserError: ranks on this host train there already, though whatever launched them may be gone.
    """
    import psutil

    at_work = []
    for file in (run / "ranks").glob("*.pid"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):  # gone, or half written
            process, written = psutil.Process(int(file.read_text())), file.stat().st_mtime
            # One that began after the file was written has been given a dead rank's number.
            if process.create_time() < written + 1 and any(w.endswith("training/train.py") for w in process.cmdline()):
                at_work.append(process.pid)
    if at_work:
        raise UserError(
            f"--out {run}: processes {sorted(at_work)} train there; wait, or end them with SIGTERM, which saves"
        )


def save_config(config: TrainConfig, run: Path) -> None:
    import yaml

    (run / "config.yaml").write_text(yaml.safe_dump(_plain(as_dict(config)), sort_keys=False))


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples that other readers know."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if v is not None}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def main(arguments: list[str]) -> int:
    config, data, run, overwrite = parse(arguments)
    with full_disk_named(run):
        return work(config, data, run, overwrite=overwrite)


def work(config: TrainConfig, data: dict[str, str], run: Path, *, overwrite: bool) -> int:
    """All of one rank: 0 at the run's end, 143 where it was stopped before."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        # The folder is claimed by one rank; the others meet it at the process group.
        if not prepare(config, data, run, world_size=world_size, overwrite=overwrite):
            return 0
        occupy(run)  # to its end: of two that have started at the same moment, one ends here
        save_config(config, run)
    elif not overwrite and read_manifest(run / "manifest.json") is not None:
        return 0
    import torch.distributed as dist

    from training.distributed import open_group
    from training.loop import train
    from training.traffic import TRAFFIC

    tune_for_cpu(config.precision)
    TRAFFIC.install()  # before the process group is opened
    open_group()
    (run / "ranks").mkdir(parents=True, exist_ok=True)
    pid_file = run / "ranks" / f"{rank}.pid"
    pid_file.write_text(str(os.getpid()))  # `gemsmith train` passes SIGTERM on by these
    with full_gpu_named(config):
        finished = train(config, data, run)
    dist.barrier()
    pid_file.unlink()
    return 0 if finished else 143


@contextlib.contextmanager
def full_gpu_named(config: TrainConfig) -> Iterator[None]:
    """
    Raises:
        UserError: in place of torch's words for a GPU without memory left, which name no setting of a recipe.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"loader.chunk: a GPU's memory does not hold {config.loader.chunk} samples at a time beside the model "
            f"({one_line(error, 160)}); lower it or loader.retain or set activation_checkpointing: true, in another "
            "--out or with --overwrite; or go on with more ranks, which share the model under ZeRO"
        ) from error


def tune_for_cpu(precision: str) -> None:
    """One thread pool per rank, and under bf16 plain attention: torch's fused CPU kernel then takes three times as long
    in the backward pass (64 tokens, heads of 64); in fp32 it takes two thirds of plain attention's. GPUs keep theirs.
    """
    import torch

    if torch.cuda.is_available():
        return
    torch.backends.cuda.enable_flash_sdp(precision != "bf16")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else it casts to fp32 and back; sums stay fp32
    with contextlib.suppress(KeyError):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    code = exit_code(lambda: main(sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    # Gloo's threads can abort the interpreter's own exit after all is done and written.
    os._exit(code)
