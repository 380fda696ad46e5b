"""The one exception that means "the user can mend this".

Every command prints its message as a single line and exits with 2; any other
exception is a defect of ours and keeps its traceback.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Names the field, the value and the mend."""


def exit_code(main: Callable[[], int]) -> int:
    """What a command ends with: its own code, or 2 and one line on stderr for a user's error."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
