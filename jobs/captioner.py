"""The captioner of ours for curation's recipes: `captioner: jobs.captioner:mmgem`, `model: RUN/export`.

Curation may not import training, so a recipe names this function and the
workers import it.
"""

from pathlib import Path
from typing import Any

from curation.captioner import Captioner
from curation.device import Device, torch_device
from curation.errors import UserError


def mmgem(model: str, device: Device) -> Captioner:
    """An export of an MM-GEM run (or a checkpoint of it) as curation's captioner.

    Raises:
        UserError: no such folder, none that training wrote, or a model without a language head.
    """
    from training.inference import load

    there = torch_device(device, f"captioner model {model}")
    loaded = load(Path(model))
    if not loaded.can_caption:
        raise UserError(f"captioner model {model}: writes no captions; name an export of an mmgem run")

    network = loaded.family.model.to(there)

    def generate(pixels_b3ss: Any, **settings: Any) -> Any:
        return network.generate(pixels_b3ss.to(there), **settings)

    return Captioner(
        pixels=lambda image: loaded.images([image])[0],
        generate=generate,
        decode=lambda ids: loaded.family.tokenizer.batch_decode(ids, skip_special_tokens=True),
    )
