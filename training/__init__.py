"""Contrastive and generative training under DeepSpeed, through one gradient-cached step."""

import os

# Whoever keeps DeepSpeed off the GPUs keeps torch off them too: its launcher shows ranks GPUs by number all the same.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
