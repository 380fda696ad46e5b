"""One rank of two: a gradient-cached ZeRO-3 step of a VLM with an adapter, whose gradients rank 0 saves.

deepspeed --num_accelerators 2 rank_adapter.py SHARDS RUN OVERRIDE...
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.training.rank_gradients import arguments, gradients, open_ranks, save
from tests.training.vlm import ADAPTER, RECIPE
from training.train import parse

if __name__ == "__main__":
    shards, run, *overrides = arguments()
    config = parse([*RECIPE, *ADAPTER, "--optim.gradient_clipping", "0", *overrides])[0]
    open_ranks()
    save(gradients(config, shards, Path(run)), Path(run))
