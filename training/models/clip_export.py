"""An exported CLIP or SigLIP as a `PreTrainedModel`, around the files that open_clip opens.

RUN/export of this family is open_clip's folder (training/models/clip.py), so
that whatever knows open_clip reads it. The config.json beside it names this
class, whose weights are read from, and saved as, open_clip's one file.
"""

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from training.config import ObjectiveConfig
from training.family_config import ClipRecipe
from training.models.clip import Clip, export, read_export
from training.models.kind import check_kind

OPEN_CLIP = "open_clip_config.json"


class OpenClipConfig(PretrainedConfig):
    """model_cfg, preprocess_cfg: as in open_clip_config.json · siglip: whether it has SigLIP's bias."""

    model_type = "gemsmith_open_clip"

    def __init__(
        self,
        model_cfg: dict[str, Any] | None = None,
        preprocess_cfg: dict[str, Any] | None = None,
        siglip: bool = False,
        **kwargs: Any,
    ) -> None:
        self.model_cfg, self.preprocess_cfg, self.siglip = model_cfg or {}, preprocess_cfg or {}, siglip
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own config: its text tower is configured by the dict."""
        return self


class OpenClip(PreTrainedModel):
    """Embeds pictures and texts in one space."""

    config_class = OpenClipConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"

    def __init__(self, config: OpenClipConfig) -> None:
        super().__init__(config)
        objective = ObjectiveConfig(coupled="siglip" if config.siglip else "infonce")
        self.clip = Clip.from_recipe(ClipRecipe(model_cfg=config.model_cfg), objective)
        if hasattr(self.clip, "generate"):  # CoCa writes
            self.generate = self.clip.generate

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **settings: Any) -> Self:
        """Of a local folder; of transformers' settings, `config` and `dtype` alone are known.

        Raises:
            UserError: the folder holds another family's model.
        """
        folder, dtype = Path(pretrained_model_name_or_path), settings.get("dtype")
        check_kind(folder, OpenClipConfig.model_type, "OpenClip.from_pretrained")
        model = cls(settings.get("config") or OpenClipConfig.from_pretrained(folder))
        model.clip.load_state_dict(read_export(model.clip, folder))
        return model.eval() if dtype in (None, "auto") else model.to(dtype).eval()

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """open_clip's folder, and config.json."""
        export(self.clip, self.clip.state_dict(), self.config.preprocess_cfg, Path(save_directory))
        self.config.save_pretrained(save_directory)

    @torch.no_grad()
    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit image embeddings [B, E]."""
        towers = self.clip.towers
        found = towers.encode_image(pixel_values.to(next(towers.parameters()).dtype))
        return BaseModelOutputWithPooling(pooler_output=F.normalize(found.float(), dim=-1))

    @torch.no_grad()
    def get_text_features(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit text embeddings [B, E]."""
        found = self.clip.towers.encode_text(input_ids)
        return BaseModelOutputWithPooling(pooler_output=F.normalize(found.float(), dim=-1))


def describe(folder: Path) -> None:
    """Write the config.json of an exported folder."""
    from safetensors import safe_open

    known = json.loads((folder / OPEN_CLIP).read_text())
    with safe_open(folder / "open_clip_model.safetensors", framework="pt") as file:
        OpenClipConfig(**known, siglip="logit_bias" in file.keys()).save_pretrained(folder)  # noqa: SIM118
