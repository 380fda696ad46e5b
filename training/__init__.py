"""Contrastive and generative training under DeepSpeed, through one gradient-cached step."""

import os

# Whoever keeps DeepSpeed off the GPUs keeps torch off them too: its launcher shows ranks GPUs by number all the same.
if os.environ.get("DS_ACCELERATOR") == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
elif "GEMSMITH_GPUS" in os.environ:  # those that `gemsmith train` was shown: the launcher would take the host's first
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["GEMSMITH_GPUS"]
