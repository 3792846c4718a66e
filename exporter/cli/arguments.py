"""Command-line arguments that several commands share. Defines no command."""

from typing import Annotated

import typer

CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Directory, .gguf file, or `smollm2`.")
]
