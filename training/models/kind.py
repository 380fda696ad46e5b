"""Whose folder this is: transformers warns where a folder holds another kind of model, and draws its weights at random.

Code that a folder brings is never run unless the recipe says so (`vlm2vec.trust_remote_code`).

It also only warns where a folder of the right kind lacks weights (a decoder saved without its head, encoders without
what they were pretrained by), and draws these at random: here that is refused.

What a recipe names is loaded here, by its own library, from files that are mapped where they can be: a ZeRO-3 run makes
one parameter of them after the other (training/partitioned.py).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from curation.errors import UserError, one_line
from curation.preprocess import HUB, LOCAL, check_activation
from training.partitioned import lasting_sources

OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""What transformers' `from_pretrained` knows of where something comes from."""


def check_whole(folder: Path, field: str) -> None:
    """
    Raises:
        UserError: weights in this folder are cut short, which safetensors tells by an exception of its own.
    """
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise _unreadable(file, field, error) from None


def json_of(file: Path, field: str) -> Any:
    """
    Raises:
        FileNotFoundError: it is not there.
        UserError: it is cut short.
    """
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise _unreadable(file, field, error) from None


def _unreadable(file: Path, field: str, error: Exception) -> UserError:
    return UserError(f"{field}: {file} cannot be read ({one_line(error, 200)}); copy or write it again")


def check_kind(folder: Any, expected: str, field: str) -> None:
    """
    Raises:
        UserError: no model there, one of another kind, or one that is cut short.
    """
    try:
        kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    except OSError as error:
        raise UserError(f"{field}: {folder} cannot be read ({str(error).splitlines()[0]})") from None
    if kind is None:
        raise UserError(f"{field}: {folder} holds no model; name the folder that has its config.json")
    if kind != expected:
        where = Path(str(folder)).name
        raise UserError(f"{field}: {folder} holds a {kind!r}, not a {expected!r}; name another than {where}")
    check_whole(Path(str(folder)), field)


def opened(auto: Any, name: str, field: str, trust_remote_code: bool = False, **settings: Any) -> Any:
    """`auto.from_pretrained(name)`, without code that the folder brings unless it is trusted.

    Raises:
        UserError: nothing there that this class opens, or weights that are cut short.
    """
    try:
        with lasting_sources():
            return auto.from_pretrained(name, trust_remote_code=trust_remote_code, **settings)
    except (OSError, ValueError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{field}: {name} brings code of its own, which is not run here; name another") from None
        raise UserError(f"{field}: {name} cannot be read ({one_line(error, 200)}); name another") from None


def opened_model(auto: Any, name: str, field: str, unread: str = "^$", **settings: Any) -> Any:
    """A model as `opened` has it, with all its weights.

    Args:
        unread: what weights need not be there, since nothing reads them: a regular expression of their names.

    Raises:
        UserError: as `opened`; weights are missing.
    """

    def load(**more: Any) -> Any:
        return opened(auto, name, field, **settings, **more)

    return whole(load, name, field, unread)


def whole(load: Callable[..., Any], where: Any, field: str, unread: str = "^$", **settings: Any) -> Any:
    """`load(**settings)`, transformers' loading of a model; with what it says of it, too, where that is asked for.

    Raises:
        UserError: the folder lacks weights of the model, which would be random.
    """
    asked = settings.pop("output_loading_info", False)
    model, info = load(output_loading_info=True, **settings)
    drawn = info["missing_keys"] & dict(model.named_parameters(remove_duplicate=False)).keys()  # buffers are no draws
    if missing := sorted(name for name in drawn if not re.search(unread, name)):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{field}: {where} lacks weights of a {type(model).__name__} ({missing[0]}{more}), which would be random; "
            "name a folder that holds all of them"
        )
    return (model, info) if asked else model


def opened_clip(arch: str, pretrained: str | None, field: str) -> Any:
    """open_clip's model with weights: `pretrained` (a tag or a file), or those of a hf-hub: or local-dir: name.

    Patches are not dropped by it: that is ours (training/models/patches.py).

    Raises:
        UserError: no such model or weights (open_clip would only warn, and draw them at random), or weights of another
            activation than the architecture's.
    """
    import open_clip
    from torch.utils.serialization import config

    def made(mapped: bool) -> Any:
        with lasting_sources(), config.patch("load.mmap", mapped):  # type: ignore[attr-defined]
            return open_clip.create_model(arch, pretrained, force_patch_dropout=0.0, require_pretrained=True)

    if pretrained and arch.startswith((HUB, LOCAL)):
        raise UserError(f"{field}: {arch} brings its own weights; remove `pretrained`")
    check_activation(arch, pretrained, field)
    try:
        try:
            return made(mapped=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return made(mapped=False)  # a pickle as torch wrote them before 1.6
    except (OSError, RuntimeError, ValueError, UnpicklingError, SafetensorError) as error:
        raise UserError(f"{field}: {arch}: {one_line(error, 200)}") from None
