"""What the demo and `gemsmith reproduce` share: they run the project's commands as processes of their own."""

import sys
from pathlib import Path


def tool(name: str) -> str:
    """A command of the environment that runs this."""
    return str(Path(sys.executable).with_name(name))


def ranks() -> int:
    """Two, or one where there is a single GPU. A batch is the global one, so either sees the same samples."""
    import torch

    return min(2, torch.cuda.device_count() or 2)


def precision() -> str:
    """bf16 where the processor multiplies it, else fp32: emulated bf16 is slower than fp32."""
    import torch

    return "bf16" if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported() else "fp32"
