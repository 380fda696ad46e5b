"""The processor that a signal's models run on: what its recipe says (`device`), never what happens to be there.

A GPU's values differ from a CPU's in their last bits, so a store must not mix
them: the device is in the signal's identity. Workers whose signals want a GPU ask
Ray for a share of one (`curation.workers`), which shows them that one alone.
"""

from typing import TYPE_CHECKING, Any, Literal

from curation.errors import UserError

if TYPE_CHECKING:
    import torch

Device = Literal["cpu", "cuda"]


def device_content(device: Device) -> dict[str, Any]:
    """What of the device goes into a signal's identity."""
    return {"device": device} if device != "cpu" else {}


def torch_device(device: Device, whose: str) -> "torch.device":
    """The device for PyTorch, which then computes in full fp32 and on one thread of the processor, so that what comes
    out does not depend on how many there are.

    Raises:
        UserError: there is no such device.
    """
    import torch

    torch.set_num_threads(1)
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"{whose}: device cuda: PyTorch finds no GPU in this worker; install its CUDA build and a driver "
                "there, or set device: cpu"
            )
        torch.backends.cudnn.allow_tf32 = False  # convolutions alone would have ten bits, unasked
    return torch.device(device)
