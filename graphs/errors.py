"""The one exception family the commands print. Knows nothing about where it is caught.

Every message is one paragraph that says what was got, what was expected and what to do.
Anything else that escapes is a defect of ours and is allowed to show its traceback.
"""


class MistralcError(Exception):
    """A condition the user can understand and act on. The command exits with `exit_code`."""

    exit_code = 1


class UsageError(MistralcError):
    """The command was called with arguments that cannot mean anything; nothing was started."""

    exit_code = 2
