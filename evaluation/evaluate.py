"""`gemsmith evaluate`: one checkpoint, some tasks, lines in a results file.

A row says of how many queries it is (`n`) and, where a limit left some out, of
what part of the data (`part`: "first 500 of 2,000 pictures", else null). The
limit is one of the settings: results under another are others, which `compare`
does not pair. The identity of a result is the hash of the weights, the
preprocessing, the data, the task's settings and the library versions. What is
already in the file is not computed again, and the command says so.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curation.errors import UserError, full_disk_named, one_line
from curation.hashing import config_hash, file_hash
from curation.manifest import SCHEMA_VERSION
from evaluation import encode, results
from evaluation.data import RegionData
from evaluation.encode import Model
from evaluation.tasks import TASKS
from evaluation.tasks.captioning import CaptioningSettings
from evaluation.tasks.classification import ClassificationSettings
from evaluation.tasks.region_captioning import RegionCaptioningSettings
from evaluation.tasks.region_retrieval import RegionRetrievalSettings
from evaluation.tasks.retrieval import RetrievalSettings

Load = Callable[[Path], Model]
Sources = Path | Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """`batch`: items encoded at a time (it changes numbers in the last digits, so it is part of every identity); null
    is 64, and 4 pictures for a model that sees them whole.

    Raises:
        UserError: a number below 1, of which there is none here that means anything.
    """

    batch: int | None = None
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    classification: ClassificationSettings = field(default_factory=ClassificationSettings)
    captioning: CaptioningSettings = field(default_factory=CaptioningSettings)
    region_retrieval: RegionRetrievalSettings = field(default_factory=RegionRetrievalSettings)
    region_captioning: RegionCaptioningSettings = field(default_factory=RegionCaptioningSettings)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            numbers = {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
            for setting, number in numbers.items():
                if isinstance(number, int) and number < 1:
                    raise UserError(f"--{setting} {number}: is below 1; leave it out for the usual")


def make_parser() -> Any:
    """Of a recipe's settings, and their help."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe, e.g. recipes/evaluate/flickr8k.yaml")
    parser.add_class_arguments(EvaluateConfig, sub_configs=True)
    return parser


def load_config(overrides: Sequence[str]) -> EvaluateConfig:
    """Settings from a recipe and dotted overrides, such as `["--config", "recipes/evaluate/flickr8k.yaml"]` or
    `["--retrieval.captions", "first"]`.

    Raises:
        UserError: an unknown setting, or a value of the wrong kind.
    """
    from jsonargparse import ArgumentError

    parser = make_parser()
    try:
        parsed = parser.instantiate(parser.parse_args(list(overrides)))
    except (ArgumentError, TypeError) as error:
        raise UserError(one_line(error, None)) from None
    return EvaluateConfig(**{name: getattr(parsed, name) for name in EvaluateConfig.__dataclass_fields__})


def load_checkpoint(checkpoint: Path, embed_tokens: int | None = None, trust_remote_code: bool = False) -> Model:
    """The project's own loader; torch is imported with it."""
    from training.inference import load

    return load(checkpoint, embed_tokens, trust_remote_code=trust_remote_code)


def limit_threads(threads: int | None) -> None:
    """Of torch; None leaves it at one a core.

    Raises:
        UserError: less than one.
    """
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads {threads}: is below 1; leave it out for one a core")
    import torch

    torch.set_num_threads(threads)


def open_sources(tasks: Sequence[str], data: Sources) -> dict[str, Any]:
    """The opened data of every task; tasks that read one folder share it.

    Raises:
        UserError: an unknown task, no folder for a task, or data that cannot be used.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown or not tasks:
        raise UserError(f"--tasks {','.join(unknown)}: unknown; the tasks are {', '.join(TASKS)}")
    opened: dict[Any, Any] = {}
    sources = {}
    for task in tasks:
        if isinstance(data, Mapping) and task not in data:
            raise UserError(f"--data: names no folder for {task}; give one folder for all tasks or one for each")
        folder = Path(data[task] if isinstance(data, Mapping) else data)
        key = (TASKS[task].open, folder)
        if key not in opened:
            opened[key] = TASKS[task].open(folder)
        sources[task] = opened[key]
    return sources


def evaluate(
    *,
    checkpoint: Path,
    tasks: list[str],
    data: Sources,
    out: Path,
    cache: Path | None = None,
    config: EvaluateConfig | None = None,
    load: Load = load_checkpoint,
) -> list[dict[str, Any]]:
    """Grade one checkpoint and append the lines to `out`.

    Args:
        checkpoint: what `load` takes.
        tasks: names of `TASKS`.
        data: one folder for all tasks, or a folder for each.
        out: the results file; details go beside it.
        cache: a folder for embeddings; None keeps none.
        config: settings of the tasks.
        load: how a path becomes a model, to grade models that are not ours.

    Returns:
        The rows of all tasks, new or found in `out`.

    Raises:
        UserError: unknown tasks, unusable data, NaN or collapsed embeddings, what
            `load` refuses, and an `out` or `cache` that cannot be written to (which is
            seen before anything is graded) or whose disk is full.
    """
    sources = open_sources(tasks, data)
    results.check_writable(out, cache)
    rows: list[dict[str, Any]] = []
    with full_disk_named(*filter(None, (out, cache))):
        model = load(checkpoint)
        for task in tasks:
            how = config or EvaluateConfig()
            rows += grade(model, checkpoint, task, sources[task], out=out, cache=cache, config=how)
    return rows


def grade(
    model: Model, checkpoint: Path, task: str, data: Any, *, out: Path, cache: Path | None, config: EvaluateConfig
) -> list[dict[str, Any]]:
    """One task of a loaded model: the rows appended to `out`, or those found there."""
    settings = getattr(config, task)
    hashes = _hashes(model, task, data.content_hash, settings, encode.batch_of(model, config.batch))
    if known := results.find(out, hashes["result"]):
        print(f"{checkpoint}: {task} on {data.name} is already in {out}, nothing to do", flush=True)
        return known
    began = time.perf_counter()
    graded = TASKS[task].grade(model, data, settings, cache=cache, batch=config.batch)
    figures = ", ".join(f"{m.metric} {m.value:.4g}" for m in graded.measurements)
    part = _part(data, settings.limit)
    n = " and ".join(f"{n:,}" for n in dict.fromkeys(m.n for m in graded.measurements)) + (f", {part}" if part else "")
    # Before they are written: a disk that is full by now takes them from the file, not from the log.
    seconds = time.perf_counter() - began
    print(f"{checkpoint}: {task} on {data.name} (n {n}) in {seconds:.1f} s: {figures}", flush=True)
    details = results.save_details(out, hashes["result"], graded, data.left_out)
    rows = [
        {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": str(checkpoint),
            "step": model.step,
            "task": task,
            "dataset": data.name,
            **dataclasses.asdict(measurement),
            "ci95": list(measurement.ci95),
            "part": part,
            "hashes": hashes | ({"queries": graded.queries} if graded.queries else {}),
            "details": details,
        }
        for measurement in graded.measurements
    ]
    results.append(out, rows)
    return rows


def _part(data: Any, limit: int | None) -> str | None:
    """What of the data a limit leaves, in words; None where that is all of it."""
    total, what = (len(data.regions), "regions") if isinstance(data, RegionData) else (len(data.pictures), "pictures")
    return None if limit is None or limit >= total else f"first {limit:,} of {total:,} {what}"


def _hashes(model: Model, task: str, data_hash: str, settings: Any, batch: int) -> dict[str, str]:
    """Everything a result depends on, and `result`, the hash of it all. Files named in settings count by content."""
    plain = dataclasses.asdict(settings)
    for name, value in plain.items():
        if isinstance(value, Path):
            plain[name] = file_hash([value]) if value.is_file() else "absent"
    parts = {
        "weights": model.weights_hash,
        "preprocess": config_hash(model.preprocess),
        "data": data_hash,
        "settings": config_hash({"task": task, "batch": batch, **plain}),
        "software": config_hash(encode.software()),
    }
    return {**parts, "result": config_hash(parts)}
