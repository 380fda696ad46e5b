"""The captioner of ours for curation's recipes: `captioner: jobs.captioner:mmgem`, `model: RUN/export`.

Curation may not import training, so a recipe names this function and the
workers import it.
"""

from pathlib import Path
from typing import Any

from curation.captioner import Captioner
from curation.errors import UserError


def mmgem(model: str) -> Captioner:
    """An export of an MM-GEM run (or a checkpoint of it) as curation's captioner.

    Raises:
        UserError: no such folder, none that training wrote, or a model without a language head.
    """
    import torch

    from training.inference import load

    torch.set_num_threads(1)
    loaded = load(Path(model))
    if not loaded.can_caption:
        raise UserError(f"captioner model {model}: writes no captions; name an export of an mmgem run")

    def generate(pixels_b3ss: Any, **settings: Any) -> Any:
        return loaded.family.model.generate(pixels_b3ss.to(loaded.device), **settings)

    return Captioner(
        pixels=lambda image: loaded.images([image])[0],
        generate=generate,
        decode=lambda ids: loaded.family.tokenizer.batch_decode(ids, skip_special_tokens=True),
    )
