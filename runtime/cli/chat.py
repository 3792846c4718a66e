"""The command chat: a conversation on a terminal. Knows nothing about how tokens are made.

All messages are rendered again every turn, and the ring keeps the prefix that they share with the
last turn, so a turn costs only its own tokens. Taking an answer back costs nothing while the ring
still reaches that far.

Heavy imports are inside the functions, so that `mistralc --help` answers at once.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphs.errors import MistralcError, UsageError
from runtime.cli import options
from runtime.decoding.sampling import SamplingParams
from runtime.decoding.sampling_defaults import sampling_params
from runtime.system.progress import stage_for

if TYPE_CHECKING:
    from runtime.completion import Completion, Limits
    from runtime.load import Loaded

Message = dict[str, str]

HELP = """\
/new    start over            /undo   take the last question and answer back
/stats  speed of the last answer      /quit   leave (or Ctrl-D); Ctrl-C stops an answer
"""


def chat(
    *,
    bundle: options.BundlePath,
    system: options.SystemMessage = None,
    limit_options: options.LimitOptions,
    sampling: options.SamplingOptions,
    session: options.SessionFile = None,
    loading: options.LoadOptions,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a bundle. Earlier turns stay in the ring, so a turn costs only its own tokens."""
    from runtime.cli.session_file import resume, save

    limits = limit_options.limits()
    loaded = loading.load(bundle, stage_for(quiet=quiet))
    talk = Chat(loaded, sampling_params(loaded.defaults, sampling.given), limits, system)
    if session is None:
        talk.run()
        return
    talk.resume(resume(session, loaded).get("messages", []))
    try:
        talk.run()
    finally:
        save(session, loaded, {"messages": talk.messages})


class Chat:
    """The messages so far, and the loop that adds to them."""

    def __init__(
        self, loaded: "Loaded", params: SamplingParams, limits: "Limits", system: str | None
    ) -> None:
        self.loaded, self.params, self.limits = loaded, params, limits
        self.opening: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages = list(self.opening)
        self.last: Completion | None = None

    def resume(self, messages: Sequence[Message]) -> None:
        """Continue from the messages of a saved chat.

        Raises UsageError if that chat began with another system message than this one,
        MistralcError if the value is not a list of messages.
        """
        if not _are_messages(messages):
            raise MistralcError(
                f"The file of --session holds {messages!r:.80}; expected the messages of a chat. "
                "Name another file to start a new chat."
            )
        if not messages:
            return
        opening = [message for message in messages[:1] if message["role"] == "system"]
        if self.opening and opening != self.opening:
            raise UsageError(
                "--system differs from the system message that the chat in --session began with. "
                "Leave --system out to continue that chat, or name another file to start a new "
                "one."
            )
        self.opening, self.messages = opening, list(messages)

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
        """Run the line as a command, or answer it as a question."""
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
        """Print the answer to the last message while it is generated, and remember it."""
        from runtime.completion import Completion

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
