"""The one way every claim is tried: prepare what all share, then each seed's data, then all arms of all seeds, judge.

    OUT/NAME.json                        figures and verdict          OUT/index.html    all claims that are there
    OUT/work/NAME/shared/                what all seeds share (held-out scenes)
    OUT/work/NAME/seed_S/data/           what the arms of a seed share
    OUT/work/NAME/seed_S/arms/ARM/       run/, log, result.json (written last: such an arm is not run again)

Arms run side by side, one process and one core each, so that the seconds of a
claim are those of its steps over the cores. Trainings take the plain path
(`gemsmith train --ranks 1`, ZeRO-1) and resume from their last checkpoint.
"""

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import reduce
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.hashing import file_hash
from curation.manifest import claim as claim_folder
from curation.manifest import read_manifest, write_manifest
from jobs.reproduce.claim import LIMIT_S, SEEDS, Claim
from jobs.reproduce.claims import CLAIMS
from jobs.reproduce.verdict import judge
from jobs.reproduce.workshop import Seed, Workshop, locked, training
from training.config import ROOT

MEASURES = ("jobs/reproduce/*.py", "evaluation/tasks/*.py", "evaluation/statistics.py")
"""What prepares a claim, grades its arms and judges them; all but page.py, which draws what was found."""


def reproduce(
    name: str,
    out: Path,
    *,
    seeds: int = SEEDS,
    scale: float = 1.0,
    workers: int | None = None,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Try one claim, or all of them, and write their figures and the page.

    Args:
        name: of `CLAIMS`, or "all".
        seeds: repetitions, 2 at least; more than were run before adds to them. Other than `SEEDS` is a rehearsal.
        scale: share of the registered data and samples; below 1 is a rehearsal, of which nothing is judged.
        workers: steps that run side by side, a core each; as many as there are cores where None.

    Returns:
        The contents of each OUT/NAME.json.

    Raises:
        UserError: an unknown claim, too few seeds, a scale out of range, or a step that failed.
    """
    if name != "all" and name not in CLAIMS:
        raise UserError(f"reproduce {name}: no such claim; one of {', '.join(CLAIMS)}, or all")
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: a paired interval needs 2 at least; the claims are registered with {SEEDS}")
    if not 0 < scale <= 1:
        raise UserError(f"--scale {scale}: is not above 0 and at most 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: is below 1; leave it out for one a core")
    workers = workers or len(os.sched_getaffinity(0))
    from jobs.reproduce.page import as_text, write_page

    summaries = []
    for one in CLAIMS if name == "all" else (name,):
        print(f"=== {one}: {CLAIMS[one].title}", flush=True)
        summary = _try(one, out.resolve(), range(seeds), scale, workers, overwrite)
        write_manifest(out / f"{one}.json", summary)
        print(as_text(summary), flush=True)
        summaries.append(summary)
        page = write_page(out)
    print(page)
    return summaries


def _try(name: str, out: Path, seeds: Sequence[int], scale: float, workers: int, overwrite: bool) -> dict[str, Any]:
    claim, folder = CLAIMS[name], out / "work" / name
    with locked(out / "work" / f"{name}.lock", name) as lock:
        claim_folder(folder, registered(claim) | {"scale": scale}, overwrite=overwrite)
        workshop = Workshop(name, claim.sizes, folder, scale, lock)
        repetitions = [Seed(workshop, number) for number in seeds]
        finished = all((seed.arm(arm) / "result.json").exists() for seed in repetitions for arm in claim.arms)
        begun, before = time.monotonic(), (read_manifest(folder / "seconds.json") or {"wall_s": 0.0})["wall_s"]

        def so_far() -> float:
            """Seconds of this and of all earlier runs that had something to do, written down: a kill leaves out what
            follows."""
            wall = before if finished else before + time.monotonic() - begun
            write_manifest(folder / "seconds.json", {"wall_s": wall})
            return wall

        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            _once(workshop.shared / "done.json", lambda: claim.prepare(workshop))
            with ThreadPoolExecutor(workers) as pool:
                try:
                    for made in as_completed([pool.submit(_prepare, claim, seed) for seed in repetitions]):
                        made.result()
                    done = {
                        pool.submit(_arm, claim, seed, arm): (seed, arm) for seed in repetitions for arm in claim.arms
                    }
                    for count, graded in enumerate(as_completed(done), start=1):
                        seed, arm = done[graded]
                        figures = ", ".join(f"{m} {v[0]:.4g}" for m, v in graded.result()["scores"].items())
                        print(f"{name}: seed {seed.number}, {arm}: {figures} ({count} of {len(done)})", flush=True)
                        so_far()
                finally:
                    workshop.stop()  # what still runs where a step failed, or this was told to end
                    pool.shutdown(cancel_futures=True)
        finally:
            workshop.stop()
            wall = so_far()
            signal.signal(signal.SIGTERM, previous)
        found = {arm: [_result(seed, arm) for seed in repetitions] for arm in claim.arms}
    return summarise(name, found, seeds=len(seeds), scale=scale, wall_s=wall)


def registered(claim: Claim) -> dict[str, Any]:
    """All that was chosen beforehand: another of any of it is another experiment."""
    code = sorted(path for pattern in MEASURES for path in ROOT.glob(pattern) if path.name != "page.py")
    return {
        "recipe": file_hash([ROOT / name for name in (claim.recipe, *claim.recipes)]),
        "code": file_hash(code),
        "sizes": claim.sizes,
        "overrides": claim.overrides,
        "arms": {name: dataclasses.asdict(arm) for name, arm in claim.arms.items()},
        "hypotheses": [dataclasses.asdict(hypothesis) for hypothesis in claim.hypotheses],
    }


def _once(mark: Path, work: Callable[[], None]) -> None:
    """Commands that are complete do nothing when they are run again, but each takes a second to say so."""
    if read_manifest(mark) is None:
        work()
        write_manifest(mark, {})


def _prepare(claim: Claim, seed: Seed) -> None:
    _once(seed.data / "done.json", lambda: claim.prepare_seed(seed))


def _filled(words: Iterable[str], seed: Seed) -> list[str]:
    folders = {"{data}": str(seed.data), "{shared}": str(seed.workshop.shared)}
    return [reduce(lambda word, name: word.replace(name, folders[name]), folders, word) for word in words]


def words_of_training(claim: Claim, seed: Seed, arm: str) -> list[str]:
    """The words of `gemsmith` that train one arm."""
    settings = claim.arms[arm]
    samples = max(round(seed.workshop.size("samples", least=256) * settings.times), 256)
    words = training(claim.recipe, seed.arm(arm) / "run", seed=seed.number, samples=samples)
    words += [word for folder in settings.data for word in ("--data", folder)]
    return _filled([*words, *claim.overrides, *settings.overrides], seed)


def _arm(claim: Claim, seed: Seed, arm: str) -> dict[str, Any]:
    """Train and grade one arm of one seed, unless its result is there."""
    result = seed.arm(arm) / "result.json"
    if (found := read_manifest(result)) is None:
        begun, made = time.monotonic(), claim.arms[arm].run
        run = seed.arm(arm) / "run" if made is None else Path(*_filled([made], seed))
        if made is None:
            seed.workshop.gemsmith(seed.arm(arm) / "log", *words_of_training(claim, seed, arm))
        scores = claim.grade(seed, arm, run)
        found = {"scores": scores, "seconds": time.monotonic() - begun}
        write_manifest(result, found)
    return found


def _result(seed: Seed, arm: str) -> dict[str, list[float]]:
    found = read_manifest(seed.arm(arm) / "result.json")
    assert found is not None
    return found["scores"]


def summarise(
    name: str, found: dict[str, list[dict[str, list[float]]]], *, seeds: int, scale: float, wall_s: float
) -> dict[str, Any]:
    """What OUT/NAME.json holds; of its tests, one a hypothesis, interval and margin once more as lists.

    found: by arm, the scores {metric: (value, chance)} of every seed.
    """
    claim = CLAIMS[name]
    arms = {
        arm: {metric: [scores[metric][0] for scores in each] for metric in claim.shown if metric in each[0]}
        for arm, each in found.items()
    }
    chance = {
        metric: scores[metric][1] for each in found.values() for scores in each[:1] for metric in scores
    }  # fmt: skip
    tests = [judge(h, arms[h.arm][h.metric], arms[h.against][h.metric], chance[h.metric]) for h in claim.hypotheses]
    if seeds != SEEDS or scale != 1:
        tests = [dataclasses.replace(test, verdict="not judged") for test in tests]
    return {
        "claim": name,
        "arms": arms,
        "chance": {metric: chance[metric] for metric in claim.shown if metric in chance},
        "tests": [dataclasses.asdict(test) for test in tests],
        "interval": [test.interval for test in tests],
        "margin": [test.hypothesis.margin for test in tests],
        "holds": all(test.verdict == "holds" for test in tests),
        "sizes": dict(claim.sizes),
        "seeds": seeds,
        "scale": scale,
        "wall_s": wall_s,
        "limit_s": LIMIT_S,
        "in_time": wall_s <= LIMIT_S,
    }
