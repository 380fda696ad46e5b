"""transformers' AutoModel and AutoProcessor, which know the families here once this module is imported.

    from training.auto import AutoModel, AutoProcessor
    model, processor = AutoModel.from_pretrained("RUN/export"), AutoProcessor.from_pretrained("RUN/export")

A new family is a line in `FAMILIES`. An adapter alone is opened by peft; `gemsmith export --merge` writes it whole.
"""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PretrainedConfig

from curation.errors import UserError
from training.models.bridge import Bridge, BridgeConfig
from training.models.clip_export import OpenClip, OpenClipConfig
from training.models.flava import Flava, FlavaConfig
from training.models.mmgem import MMGem, MMGemConfig
from training.models.vlm2vec import Vlm2Vec, Vlm2VecConfig
from training.processor import ClipProcessor, FlavaProcessor, MMGemProcessor, Vlm2VecProcessor

__all__ = ["AutoModel", "AutoProcessor"]

FAMILIES: list[tuple[Any, Any, Any]] = [
    (MMGemConfig, MMGem, MMGemProcessor),
    (BridgeConfig, Bridge, MMGemProcessor),
    (OpenClipConfig, OpenClip, ClipProcessor),
    (FlavaConfig, Flava, FlavaProcessor),
    (Vlm2VecConfig, Vlm2Vec, Vlm2VecProcessor),
]
"""The classes of a family: its config's `model_type` is what a folder names it by."""

for _config, _model, _processor in FAMILIES:
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)


class AutoProcessor:
    """transformers' own, but for the families here: a VLM2Vec folder holds its backbone's processor too, which
    transformers would open in place of ours."""

    @staticmethod
    def from_pretrained(folder: str | Path, **settings: Any) -> Any:
        """The processor saved beside a model.

        Raises:
            UserError: a folder of ours that was exported without one.
        """
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
        ours = {config.model_type: processor for config, _, processor in FAMILIES}.get(kind)
        if ours is None:
            return transformers.AutoProcessor.from_pretrained(folder, **settings)
        if not (Path(folder) / ours.FILE).exists():
            raise UserError(f"{folder}: has no {ours.FILE}; write it anew by `gemsmith export`")
        return ours.from_pretrained(folder, **settings)
