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
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.generic import can_return_tuple

from curation.errors import UserError, one_line
from training.config import ObjectiveConfig
from training.family_config import ClipRecipe
from training.models.clip import Clip, export, read_export
from training.models.kind import OF_HUB, check_kind

OPEN_CLIP, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
FIELD = "OpenClip.from_pretrained"
PASSED = ("adapter_kwargs", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors")
"""What `AutoModel` hands on, and what changes nothing here."""


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
        """Of a local folder, or by name from the hub; of transformers' other settings, `config` and `dtype` are known.

        Raises:
            UserError: nothing there, another family's model, or another setting.
        """
        name, hub = pretrained_model_name_or_path, {key: settings.pop(key) for key in OF_HUB if key in settings}
        config, old = settings.pop("config", None), settings.pop("torch_dtype", None)
        dtype = settings.pop("dtype", old)
        if unknown := sorted(key for key in settings if key not in PASSED and not key.startswith("_")):
            raise UserError(
                f"{FIELD}: {unknown[0]} is not known here; leave it out, and do it to the model by `.to(...)`"
            )
        folder = Path(name) if Path(name).is_dir() else _fetched(name, CONFIG_NAME, hub).parent
        check_kind(folder, OpenClipConfig.model_type, FIELD)
        weights = _fetched(name, WEIGHTS, hub)
        model = cls(config or OpenClipConfig.from_pretrained(folder))
        model.clip.load_state_dict(read_export(model.clip, weights.parent))
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        return model.eval() if dtype in (None, "auto") else model.to(dtype).eval()

    def save_pretrained(self, save_directory: Any, *_: Any, **__: Any) -> None:
        """open_clip's folder, and config.json."""
        export(self.clip, self.clip.state_dict(), self.config.preprocess_cfg, Path(save_directory))
        self.config.save_pretrained(save_directory)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit image embeddings [B, E]; `last_hidden_state`: a ViT's states [B, N, W] (with its class
        token, where it has one, before its last norm), None of a ResNet."""
        towers = self.clip.towers
        visual = towers.visual
        last = getattr(visual, "transformer", None) or getattr(getattr(visual, "trunk", None), "norm", None)
        return _features(towers.encode_image, pixel_values.to(next(towers.parameters()).dtype), last)

    @can_return_tuple
    def get_text_features(self, input_ids: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output`: unit text embeddings [B, E]; `last_hidden_state`: the text tower's states [B, T, W] (of a
        CoCa with its own [CLS] behind them, before the last norm)."""
        towers = self.clip.towers
        tower = getattr(towers, "text", towers)
        normed = getattr(tower, "cls_emb", None) is None and hasattr(tower, "ln_final")
        return _features(towers.encode_text, input_ids, tower.ln_final if normed else tower.transformer)


def _fetched(name: Any, file: str, hub: dict[str, Any]) -> Path:
    """A file of a folder, or of a repository on the hub."""
    try:
        return Path(cached_file(str(name), file, **hub) or "")
    except OSError as error:
        raise UserError(f"{FIELD}: {name} cannot be read ({one_line(error, 200)}); name a CLIP's export") from None


def _features(encode: Any, inputs: torch.Tensor, last: torch.nn.Module | None) -> BaseModelOutputWithPooling:
    """Unit embeddings by a tower of open_clip's, which keeps its states to itself, and what `last` in it gave."""
    seen: list[Any] = []
    hook = None if last is None else last.register_forward_hook(lambda module, given, out: seen.append(out))
    try:
        pooled = F.normalize(encode(inputs).float(), dim=-1)
    finally:
        if hook is not None:
            hook.remove()
    states = getattr(seen[0], "last_hidden_state", seen[0]) if seen else None  # a Hugging Face tower has an output
    return BaseModelOutputWithPooling(pooler_output=pooled, last_hidden_state=states)


def describe(folder: Path) -> None:
    """Write the config.json of an exported folder."""
    from safetensors import safe_open

    known = json.loads((folder / OPEN_CLIP).read_text())
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        OpenClipConfig(**known, siglip="logit_bias" in file.keys()).save_pretrained(folder)  # noqa: SIM118
