"""The one exception family the commands print. Knows nothing about where it is caught.

Every message is one paragraph that says what was got, what was expected and what to do.
Anything else that escapes is a defect of ours and is allowed to show its traceback.
"""

import re

LONGEST = 1200  # characters; what a file says of itself may be of any length
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class MistralcError(Exception):
    """A condition the user can understand and act on. The command exits with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        """One paragraph, whatever names and values from a file are quoted in it."""
        text = _CONTROL.sub(" ", super().__str__())
        if len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"  # the remedy is at the end


class UsageError(MistralcError):
    """The command was called with arguments that cannot mean anything; nothing was started."""

    exit_code = 2
