"""One rank of those that test_partitioned.py starts: a deep model built in parts and then whole, in measured memory;
the weights that a ZeRO-3 run begins from; and an LLM of 300 MiB that a recipe names, in measured memory.

    rank_partitioned.py SHARDS RUN LLM
"""

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.training.conftest import tiny_config
from tests.training.resident import Resident
from training import zero
from training.data import Shards
from training.distributed import World, open_group
from training.families import build
from training.loop import make_trainer
from training.partitioned import Deferred, partition

LAYERS, WIDTH = 8, 3072
SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def deep(layers: int = LAYERS, width: int = WIDTH) -> nn.Module:
    """288 MiB, drawn twice as transformers' models are: by the layers' constructors, and then by the model's."""
    torch.manual_seed(5)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for layer in model:
        nn.init.trunc_normal_(layer.weight, std=0.02)
    return model


def memory(run: Path) -> dict[str, float]:
    from deepspeed.runtime.zero import GatheredParameters

    for layers in (1, LAYERS):  # the first time for what is allocated once
        with Resident() as built, (deferred := Deferred()):
            parts = deep(layers)
        with Resident() as cut_up:
            partition(parts, deferred, SETTINGS, torch.float32)
    with Resident() as built_whole:
        whole = deep()
    if World.current().rank == 0:
        save_file(whole.state_dict(), run / "deep.safetensors")
    torch.distributed.barrier()
    with torch.device("meta"):
        mapped = deep()
    mapped.load_state_dict(load_file(run / "deep.safetensors"), assign=True)
    with Resident() as taken:
        partition(mapped, Deferred(), SETTINGS, torch.float32)
    same = True
    for a, b, c in zip(parts.parameters(), whole.parameters(), mapped.parameters()):
        with GatheredParameters([a, c]):
            same &= torch.equal(a, b) and torch.equal(c, b)
    growth = {"built": built.most, "parts": cut_up.most, "whole": built_whole.most, "mapped": taken.most}
    return growth | {"tracked": deferred.peak / 2**20, "same": same}


def beginning(precision: str, shards: Path, run: Path) -> dict[str, torch.Tensor]:
    """The fp32 master weights of a run before its first step."""
    config = tiny_config("--deepspeed", str(ROOT / "ds_configs/zero3.json"), "--precision", precision)
    trainer = make_trainer(config, Shards(shards), run)
    shapes = zero.shapes(trainer.engine)
    found = {name: torch.zeros(torch.Size(shape).numel()) for name, shape in shapes.items()}
    for shard in zero.shards(trainer.engine):
        for s in shard.stretches:
            found[s.name][s.offset : s.offset + s.size] = shard.flat.detach().view(-1)[s.start : s.start + s.size]
    return {name: trainer.world.sum(flat).view(shapes[name]) for name, flat in found.items()}


def named(llm: Path, shards: Path, run: Path) -> dict[str, float]:
    """A model around an LLM that is loaded, in parts and then whole."""
    from deepspeed.runtime.zero import GatheredParameters

    config, captions = tiny_config("--mmgem.language.name_or_path", str(llm)), Shards(shards).every_caption
    with Resident() as built, (deferred := Deferred()):
        parts = build(config, run / "tokenizer", captions).model
    with Resident() as cut_up:
        partition(parts, deferred, SETTINGS, torch.float32)
    with Resident() as built_whole:
        whole = build(config, run / "tokenizer", captions).model
    growth = {"built": built.most, "cut_up": cut_up.most, "whole": built_whole.most}
    same = True
    for (name, a), (other, b) in zip(parts.named_parameters(), whole.named_parameters()):
        with GatheredParameters([a]):
            same &= name == other and torch.equal(a, b)
    return growth | {"size": sum(p.nbytes for p in whole.parameters()) / 2**20, "same": same}


def main() -> None:
    shards, run, llm = map(Path, sys.argv[1:4])
    open_group()
    rank = World.current().rank
    run.mkdir(parents=True, exist_ok=True)
    (run / f"memory_{rank}.json").write_text(json.dumps(memory(run)))
    begun = {precision: beginning(precision, shards, run) for precision in ("fp32", "bf16")}
    if rank == 0:
        torch.save(begun, run / "beginnings.pt")
    torch.distributed.barrier()  # the tokenizer is there
    (run / f"named_{rank}.json").write_text(json.dumps(named(llm, shards, run)))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
