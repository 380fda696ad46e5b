"""Whose folder this is: transformers warns where a folder holds another kind of model, and draws its weights at random.

Code that a folder brings is never run unless the recipe says so (`vlm2vec.trust_remote_code`).
"""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from curation.errors import UserError


def check_kind(folder: Any, expected: str, field: str) -> None:
    """
    Raises:
        UserError: no model there, or one of another kind.
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


def opened(auto: Any, name: str, field: str) -> Any:
    """`auto.from_pretrained(name)`, without code that the folder brings.

    Raises:
        UserError: nothing there that this class opens.
    """
    try:
        return auto.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{field}: {name} brings code of its own, which is not run here; name another") from None
        raise UserError(f"{field}: {name} cannot be read ({' '.join(str(error).split())[:200]})") from None
