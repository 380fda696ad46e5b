"""A function that a recipe names as package.module:function, for what curation does not bring itself.

A text detector, a captioner: workers import it where they run, so the package
must be installed there (or travel with the job, as `ray job submit`'s
working_dir does).
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation.errors import UserError
from curation.hashing import file_hash


def load_function(setting: str, name: str) -> Callable[..., Any]:
    """The function; `setting` is who asks, for the message.

    Raises:
        UserError: not of the form package.module:function, or it cannot be imported.
    """
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ImportError("there is no colon in it")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as reason:
        raise UserError(
            f"{setting} {name}: not a function to import ({reason}); write package.module:function"
        ) from None
    return found


def function_content(setting: str, name: str) -> dict[str, str]:
    """What decides the function's values, as far as one file tells: its name, and the hash of its module's source.

    Raises:
        UserError: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None or ":" not in name:
        raise UserError(f"{setting} {name}: no such module; write package.module:function")
    return {"function": name, "source": file_hash([Path(spec.origin)]) if spec.origin else ""}
