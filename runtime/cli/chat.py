"""A conversation on a terminal. Knows how to talk to a person, not how tokens are made.

The messages are rendered whole every turn, and the ring keeps what they have in common with the
last turn, so a turn costs its own tokens; an answer taken back costs nothing while the ring still
reaches that far.
"""

import sys
from collections.abc import Sequence

from graphs.errors import MistralcError, UsageError
from runtime.completion import Completion, Limits
from runtime.decoding.sampling import SamplingParams
from runtime.load import Loaded

Message = dict[str, str]

HELP = """\
/new    start over            /undo   take the last question and answer back
/stats  speed of the last answer      /quit   leave (or Ctrl-D); Ctrl-C stops an answer
"""


class Chat:
    """The messages so far, and the loop that adds to them."""

    def __init__(
        self, loaded: Loaded, params: SamplingParams, limits: Limits, system: str | None
    ) -> None:
        self.loaded, self.params, self.limits = loaded, params, limits
        self.opening: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages = list(self.opening)
        self.last: Completion | None = None

    def resume(self, messages: Sequence[Message]) -> None:
        """Go on from these messages, of a chat that was kept.

        Raises UsageError where it began with another system message than was given for this one,
        MistralcError where they are no messages.
        """
        if not _are_messages(messages):
            raise MistralcError(
                f"The file of --session holds {messages!r:.80} where a chat's messages are "
                "expected. Name another file to start a new chat."
            )
        if not messages:
            return
        began = [message for message in messages[:1] if message["role"] == "system"]
        if self.opening and began != self.opening:
            raise UsageError(
                "--system is not what the chat in --session began with. Leave --system out to go "
                "on with it, or name another file to start a new one."
            )
        self.opening, self.messages = began, list(messages)

    def run(self) -> None:
        """Read, answer, repeat, until the input ends."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  (arrow keys and history in input())

            print(f"{self.loaded.bundle.manifest.checkpoint['name']}; /help lists the commands.")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except UnicodeDecodeError as error:
                raise MistralcError(
                    f"Standard input is not UTF-8 (byte {error.start}). Convert it first, for "
                    "example with iconv."
                ) from error
            if line == "/quit":
                return
            if line:
                self.turn(line)

    def turn(self, line: str) -> None:
        """Do what one line asks: a command, or a question to answer."""
        if line.startswith("/"):
            self.command(line)
            return
        self.messages.append({"role": "user", "content": line})
        try:
            self.answer()
        except MistralcError as error:
            self.messages.pop()
            print(f"mistralc: {error} (/new starts over.)", file=sys.stderr)

    def command(self, line: str) -> None:
        """Run one of the commands that begin with a slash."""
        if line == "/new":
            self.messages = list(self.opening)
        elif line == "/undo":
            del self.messages[max(len(self.opening), len(self.messages) - 2) :]
        elif line == "/stats" and self.last is not None and self.last.timings is not None:
            for name, value in self.last.timings.to_json().items():
                print(f"{name:22} {value:,.3f}" if value is not None else f"{name:22} -")
        else:
            print(HELP, end="")

    def answer(self) -> None:
        """Print the answer to the last message as it comes, and remember it."""
        ids = self.loaded.tokenizer.encode_chat(self.messages)
        self.last = Completion(
            self.loaded.generator, self.loaded.tokenizer, ids, self.params, self.limits, chat=True
        )
        try:
            for piece in self.last:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" …", end="")
        print()
        self.messages.append({"role": "assistant", "content": self.last.text})


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
