"""Checkpoints by parameter: written by any number of ranks at any ZeRO stage, read by any other.

    RUN/checkpoints/step_00000100/  rank_00000.safetensors         what this rank's shards hold, stretch after stretch:
                                                                   fp32 weights, both moments; buffers
                                    rank_00000_frozen.safetensors  its frozen weights, the same file in all checkpoints
                                    manifest.json                  written last: step, samples, recipe, shapes, each
                                                                   file's size, the weights' hash for evaluation's cache

A file's header says which stretch of which parameter lies where and how many
steps the optimiser took with it (training/zero.py), so a rank finds what it
needs by name, and no rank ever holds the whole. DeepSpeed's own format is tied
to the number of ranks, and its universal one loses frozen parameters, the
second learning rate and Adam's step count.

The position in the data, the learning rate and the random state are functions
of the step, so nothing else has to be kept. Without a device, `consolidated`
puts the whole weights together.
"""

import json
import math
import shutil
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from curation.errors import UserError
from curation.hashing import config_hash
from curation.manifest import read_manifest, write_manifest
from training import rank_files, zero
from training.distributed import World
from training.optim import MOMENTS, Sharded
from training.rank_files import WEIGHTS
from training.zero import Stretch

APPEARS_S = 60.0
"""Until a network's file system shows a host what another has written (NFS: `acdirmax`)."""


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def complete(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; one that is removed meanwhile may be among them or not."""
    found = []
    with suppress(OSError):  # all of it goes, or it is not there
        found = sorted(folder for folder in (run / "checkpoints").iterdir() if folder.name.startswith("step_"))
    return [folder for folder in found if _has_manifest(folder)]


def _has_manifest(folder: Path) -> bool:
    try:
        return (folder / "manifest.json").exists()
    except OSError:  # ESTALE: another host has removed it
        return False


class Saver:
    """Writes checkpoints; `wait` until the last one is complete.

    Args:
        background: copy what is to be written and write it beside the training (costs a copy in host memory).
    """

    def __init__(self, run: Path, keep_last: int, background: bool = False) -> None:
        self.run, self.keep_last, self.background = run, keep_last, background
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None
        self._written = math.inf  # when every rank had written its files
        self._frozen: dict[str, Any] | None = None  # the header of this rank's frozen weights, once they were hashed

    def save(self, engine: Any, optimizer: Sharded, step: int, facts: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, its manifest last; then drop all but the last and the best ones.

        Raises:
            UserError: it could not be written (on every rank); the one before is still there.
        """
        self.wait()
        world, folder = World.current(), step_folder(self.run, step)
        self._written = math.inf
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # the remains of a save that was cut short
        world.barrier()
        tensors, table = rank_files.collect(engine, optimizer)
        frozen_file = rank_files.frozen_path(folder, world.rank)
        frozen = self._frozen_to_write(engine, optimizer, frozen_file)
        facts = {"step": step, "world_size": world.size, **facts, "shapes": zero.shapes(engine)}
        facts["shared"] = rank_files.shared_names(engine)

        def write() -> None:
            try:
                if frozen is not None:
                    assert self._frozen is not None
                    rank_files.write(frozen_file, frozen, self._frozen)
                header = rank_files.header_of(tensors, table) | {"frozen": self._frozen is not None}
                rank_files.write(rank_files.path(folder, world.rank), tensors, header)
                if world.rank == 0 and self.background:
                    self._close(folder, facts)
            except (OSError, SafetensorError) as error:
                self._failure = error

        if self.background:
            self._writing = threading.Thread(target=write, name="checkpoint")
            self._writing.start()
            return
        write()
        self._agree(world)
        self._written = time.monotonic()
        if world.rank == 0:
            try:
                self._close(folder, facts)
            except OSError as error:
                self._failure = error
        self._agree(world)

    def _frozen_to_write(self, engine: Any, optimizer: Sharded, file: Path) -> rank_files.Tensors | None:
        """This rank's frozen weights; None where it keeps none, or `file` is a link to an older checkpoint's now."""
        tensors: rank_files.Tensors = {}
        if self._frozen is None:
            tensors, table = rank_files.collect_frozen(engine, optimizer)
            if not tensors:
                return None
            self._frozen = rank_files.header_of(tensors, table)
        if rank_files.link(file, self._frozen):
            return None
        return tensors or rank_files.collect_frozen(engine, optimizer)[0]

    def wait(self) -> None:
        """Until what is being written is complete on all ranks.

        Raises:
            UserError: it could not be written.
        """
        if self._writing is not None:
            world = World.current()
            if world.rank > 0:
                self._writing.join()
            # Rank 0 waits for every rank's file, so it must know first that none of them failed.
            failed = world.any(self._failure is not None)
            self._written = time.monotonic()
            if not failed:
                self._writing.join()
            self._writing = None
            self._agree(world)

    def _agree(self, world: World) -> None:
        if world.any(self._failure is not None):
            why = self._failure or "another rank could not write its part"
            raise UserError(
                f"--out {self.run}: the checkpoint could not be written ({why}); make room on a disk that all hosts "
                "share: the one before is whole and the run resumes from it"
            )

    def _close(self, folder: Path, facts: dict[str, Any]) -> None:
        """The manifest, once the files of all ranks are seen; older checkpoints go once it is on the disk.

        Raises:
            OSError: one is written, and not seen here.
        """
        files = [rank_files.path(folder, rank) for rank in range(facts["world_size"])]
        headers = self._seen(files)
        frozen = [rank_files.frozen_path(folder, rank) for rank, found in enumerate(headers) if found.get("frozen")]
        headers += self._seen(frozen)
        sizes = {f.name: f.stat().st_size for f in files + frozen}
        named = config_hash([[found["weights"] for found in headers], facts["shapes"]])
        write_manifest(folder / "manifest.json", {"weights_hash": named, "files": sizes, **facts})
        for place in (folder, folder.parent, self.run):  # each holds the name of the one before it
            rank_files.to_disk(place)
        self._drop()

    def _seen(self, files: list[Path]) -> list[dict[str, Any]]:
        """The headers of files that all were written, once they are seen here."""
        while missing := [file for file in files if not file.exists()]:
            if time.monotonic() > self._written + APPEARS_S:
                raise OSError(f"{missing[0].name} was written, and is not seen on rank 0's host")
            time.sleep(0.1)
        return [rank_files.read_header(file) for file in files]

    def _drop(self) -> None:
        """Remove older checkpoints, and remains of saves and removals that were cut short. What cannot go now (it is
        read-only, or open on another host) is tried again at the next save: the new one is whole."""
        for old in complete(self.run)[: -self.keep_last]:
            if old.name != best(self.run):
                with suppress(OSError):
                    (old / "manifest.json").unlink()  # first, so that no reader takes the rest for complete
        for remains in set((self.run / "checkpoints").glob("step_*")) - set(complete(self.run)):
            shutil.rmtree(remains, ignore_errors=True)


def best(run: Path) -> str | None:
    """The folder name of the checkpoint that `gemsmith watch --best` found best so far: it is never dropped."""
    record = read_manifest(run / "best.json")
    return record["checkpoint"] if record else None


def check(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there.

    Raises:
        UserError: no such folder, no manifest, or a file missing or cut short.
    """
    if not folder.is_dir():
        raise UserError(f"--checkpoint {folder}: no such folder; name a RUN/checkpoints/step_* or an export")
    manifest = read_manifest(folder / "manifest.json")
    if manifest is None:
        raise UserError(f"--checkpoint {folder}: has no manifest.json, so it was cut short; take an earlier one")
    if "files" not in manifest:
        raise UserError(f"--checkpoint {folder}: is no checkpoint; name a RUN/checkpoints/step_* or an export")
    if (lacking := _lacking(folder, manifest["files"])) is not None:
        raise UserError(f"--checkpoint {folder}: {lacking}; take another checkpoint")
    return manifest


def _lacking(folder: Path, files: Mapping[str, int]) -> str | None:
    """What is missing of these files {name: bytes}, or None."""
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return None


def is_coming(folder: Path) -> bool:
    """Whether its manifest is seen here, and not all of the files that it names: they are on another host, or gone."""
    try:
        manifest = read_manifest(folder / "manifest.json")
    except (OSError, ValueError):
        return False
    return manifest is not None and _lacking(folder, manifest.get("files", {})) is not None


def latest(run: Path) -> Path | None:
    found = complete(run)
    return found[-1] if found else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch as a file keeps it: elements [at, at + size) of its `KIND.part` tensors."""

    file: Path
    part: str
    at: int
    offset: int
    size: int
    steps: int


class Reader:
    """Finds stretches of parameters in the files of a checkpoint, whatever ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, check(folder)
        self.pieces: dict[str, list[Piece]] = {}
        self._open: dict[Path, Any] = {}
        for name in self.manifest["files"]:
            file = folder / name
            table = json.loads(self._file(file).metadata()["table"])
            for part, stretches in table.get("stretches", table).items():  # older ones hold nothing else
                at = 0
                for parameter, offset, size, steps in stretches:
                    self.pieces.setdefault(parameter, []).append(Piece(file, part, at, offset, size, steps))
                    at += size

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, "pt")
            except SafetensorError as error:
                why = f"{file.name} cannot be read ({error})"
                raise UserError(f"--checkpoint {self.folder}: {why}; take another checkpoint") from None
        return self._open[file]

    def read(self, kind: str, stretch: Stretch, into: torch.Tensor) -> int:
        """Fill `into` [stretch.size] with that stretch's weights or moment; the steps the optimiser took with it."""
        found, steps = 0, 0
        for piece in self.pieces.get(stretch.name, ()):
            if kind != WEIGHTS and piece.part.startswith("frozen"):
                continue  # it has no moments
            a = max(piece.offset, stretch.offset)
            b = min(piece.offset + piece.size, stretch.offset + stretch.size)
            if a < b:
                first = piece.at + a - piece.offset
                values = self._file(piece.file).get_slice(f"{kind}.{piece.part}")[first : first + b - a]
                into[a - stretch.offset : b - stretch.offset].copy_(values)
                found, steps = found + b - a, piece.steps
        if found != stretch.size:
            raise UserError(
                f"--checkpoint {self.folder}: has {found} of {stretch.size} values of {stretch.name}; "
                "it belongs to another model: name the recipe that it was trained with"
            )
        return steps

    def buffers(self) -> dict[str, torch.Tensor]:
        names = [(f, n) for f in sorted(self._open) for n in self._open[f].keys() if n.startswith("buffer.")]  # noqa: SIM118
        return {name.removeprefix("buffer."): self._open[file].get_tensor(name) for file, name in names}


@torch.no_grad()
def resume(engine: Any, optimizer: Sharded, folder: Path) -> int:
    """Load a checkpoint into the engine; the step that it was saved after.

    Raises:
        UserError: cut short, or of another model.
    """
    reader = Reader(folder)
    shapes, theirs = zero.shapes(engine), reader.manifest["shapes"]
    if shapes != theirs:
        name = min(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n))
        raise UserError(
            f"--out {folder}: {name} is {theirs.get(name)} there and {shapes.get(name)} in this recipe; "
            "resume with the recipe that it was trained with"
        )
    for state in optimizer.states.values():
        flat = state.shard.flat.detach().view(-1)
        for number, stretch in enumerate(state.shard.stretches):
            part = slice(stretch.start, stretch.start + stretch.size)
            state.steps[number] = reader.read(WEIGHTS, stretch, flat[part])
            for kind in MOMENTS:
                reader.read(kind, stretch, state.moments[kind][part])
    for stretch, values in zero.frozen(engine, everywhere=True).items():
        reader.read(WEIGHTS, stretch, values)
    for stretch, values in optimizer.frozen.items():
        reader.read(WEIGHTS, stretch, values)
    buffers = dict(engine.module.named_buffers())
    for name, value in reader.buffers().items():
        buffers[name].copy_(value)
    zero.publish(engine)
    return reader.manifest["step"]


def consolidated(folder: Path) -> dict[str, torch.Tensor]:
    """The fp32 weights of a checkpoint, on the CPU, by parameter name, and its buffers."""
    reader, state = Reader(folder), {}
    for name, shape in reader.manifest["shapes"].items():
        whole = torch.empty(torch.Size(shape).numel())
        reader.read(WEIGHTS, Stretch(name, 0, 0, whole.numel()), whole)
        state[name] = whole.view(shape)
    state |= reader.buffers()
    for alias, name in reader.manifest["shared"].items():
        state[alias] = state[name]
    return state
