"""The one exception that means "the user can mend this".

The command line prints its message as a single line and exits with 2; every
other exception is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """Names the field, the value and the mend."""
