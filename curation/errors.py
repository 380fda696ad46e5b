"""The one exception that means "the user can mend this".

Every command prints its message as a single line and exits with 2; any other
exception is a defect of ours and keeps its traceback.
"""

import errno
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "no space left in the quota",
    errno.EFBIG: "a file grows beyond the limit for files there (ulimit -f, or the file system's)",
}


class UserError(ValueError):
    """Names the field, the value and the mend."""


def one_line(reason: object, most: int | None = 300) -> str:
    """What an exception says, in one line of at most so many characters."""
    return " ".join(str(reason).split())[:most]


def exit_code(main: Callable[[], int]) -> int:
    """What a command ends with: its own code, or 2 and one line on stderr for a user's error."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


@contextmanager
def full_disk_named(*folders: Path) -> Iterator[None]:
    """Turn a full disk into a user's error that names what is written to; any other exception stays as it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # Libraries in Rust (safetensors, tokenizers) raise exceptions of their own and say the number in words.
        told = re.search(r"\(os error (\d+)\)", str(error))
        why = FULL.get(number or int(told[1] if told else 0))
        if why is None:
            raise
        where = " or ".join(str(folder) for folder in folders)
        raise UserError(
            f"--out {where}: {why} ({error}); make room and run the same command again, "
            "which goes on where this one stopped"
        ) from error
