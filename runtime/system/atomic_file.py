"""Write a file whole or not at all. Knows nothing about its contents."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file, readable by this user only, that replaces `path` at the end of the block.

    If the block raises or the disk is full, `path` is unchanged. Raises OSError.
    """
    temporary = None
    try:
        with NamedTemporaryFile(dir=path.absolute().parent, prefix=path.name, delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
