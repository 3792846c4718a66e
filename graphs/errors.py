"""The errors that commands print as one paragraph: what was got, what was expected, what to do.

Any other exception that escapes is a defect of ours and shows its traceback.
"""

import re

LONGEST = 1200  # characters; text quoted from a file may have any length
_CONTROL = re.compile(r"[\x00-\x1f\x7f]+")


class MistralcError(Exception):
    """A condition the user can understand and act on. The command exits with `exit_code`."""

    exit_code = 1

    def __str__(self) -> str:
        """The message as one paragraph, without control characters that a quoted file may hold."""
        text = _CONTROL.sub(" ", super().__str__())
        if len(text) <= LONGEST:
            return text
        return f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"  # the remedy is at the end


class UsageError(MistralcError):
    """The arguments of a command contradict each other or mean nothing; nothing was started."""

    exit_code = 2
