"""Save and restore a row of the ring, in memory or in a file. Knows no backend and no text.

A snapshot has the row's tokens, its position, and the keys and values of all filled slots. A text
that continues from it gets bit-identical logits. A snapshot can be restored into any row of a
session of the same bundle, and of no other bundle. The file:

    "MCLCRING"   header's length, 4 bytes   header, JSON   tokens, int32   caches   SHA-256 of all

Numbers are little-endian. Layers are in order, each with its key before its value, [K, slots, D].
Nothing in a file is parsed before its SHA-256 has been checked.
"""

import hashlib
import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graphs import window
from graphs.dtypes import item_size
from graphs.errors import MistralcError
from graphs.manifest import Manifest
from runtime.backends.session import Caches, Session, Slots
from runtime.decoding.ring import Ring
from runtime.system.atomic_file import replacing

FORMAT = 1
MAGIC = b"MCLCRING"
DIGEST = hashlib.sha256().digest_size

# Fields of the header, apart from `format`.
_FIELDS = {"bundle": str, "tokens": int, "written": int, "note": dict}
_REMEDY = "Start over without it, or save it again."


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One row: all its `tokens`, and the slots that `written` tokens have filled.

    `bundle` is the SHA-256 of the bundle's manifest. `note` is the caller's own data, as JSON.
    """

    bundle: str
    tokens: "array[int]"
    written: int
    caches: Caches
    note: Mapping[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the tokens and caches, without the note."""
        return len(self.tokens) * 4 + sum(cache.nbytes for cache in self.caches)


def fingerprint(manifest: Manifest) -> str:
    """What identifies a bundle: the SHA-256 of its manifest, which has those of all files."""
    return hashlib.sha256(manifest.to_text().encode()).hexdigest()


def take(
    session: Session,
    ring: Ring,
    tokens: Sequence[int],
    manifest: Manifest,
    *,
    row: int = 0,
    note: Mapping[str, Any] | None = None,
) -> Snapshot:
    """Copy a row out of the ring; `tokens` must be those that it holds."""
    written = ring.written[row]
    if len(tokens) != ring.positions[row]:
        raise MistralcError(
            f"{len(tokens)} tokens were given for a row that holds {ring.positions[row]}. Give "
            "the tokens that were written to it."
        )
    return Snapshot(
        bundle=fingerprint(manifest),
        tokens=array("i", tokens),
        written=written,
        caches=session.read_row(row, _filled(ring, written)),
        note=dict(note or {}),
    )


def restore(
    snapshot: Snapshot, session: Session, ring: Ring, manifest: Manifest, *, row: int = 0
) -> None:
    """Restore a snapshot into a row; the other rows are not touched.

    Raises MistralcError, and changes nothing, if the snapshot is of another bundle.
    """
    check(snapshot, manifest)
    if ring.grow_to(snapshot.written):
        session.resize(ring.capacities)
    session.write_row(row, _filled(ring, snapshot.written), snapshot.caches)
    ring.positions[row], ring.written[row] = len(snapshot.tokens), snapshot.written


def check(snapshot: Snapshot, manifest: Manifest) -> None:
    """Raise MistralcError unless the snapshot is of this bundle and fits its ring."""
    if snapshot.bundle != fingerprint(manifest):
        raise MistralcError(
            f"The snapshot was taken from another bundle (manifest {snapshot.bundle[:12]}…; this "
            f"one's is {fingerprint(manifest)[:12]}…). Use the bundle that it was taken from, or "
            "start over without it."
        )
    spec, ring = manifest.model, manifest.ring
    tokens, written = snapshot.tokens, snapshot.written
    position = len(tokens)
    oldest = max(window.oldest_rewind(written, size, ring.capacity(size)) for size in spec.windows)
    fits = (
        position <= written
        and (oldest <= position or not position)  # a text may always start over
        and all(0 <= token < spec.vocab_size for token in tokens)
        and [cache.shape for cache in snapshot.caches] == _shapes(manifest, written)
    )
    if not fits or (not spec.slides and written > ring.capacity(None)):
        raise MistralcError(
            f"The snapshot's {position} tokens and {len(snapshot.caches)} caches are not what this "
            f"bundle's ring holds. {_REMEDY}"
        )


def save(snapshot: Snapshot, path: Path) -> None:
    """Write the snapshot to `path` atomically; only this user can read the file."""
    header = json.dumps(
        {
            "format": FORMAT,
            "bundle": snapshot.bundle,
            "tokens": len(snapshot.tokens),
            "written": snapshot.written,
            "note": snapshot.note,
        }
    ).encode()
    parts: list[bytes | memoryview] = [MAGIC, struct.pack("<I", len(header)), header]
    parts.append(np.array(snapshot.tokens, "<i4").tobytes())
    parts += [np.ascontiguousarray(cache).data for cache in snapshot.caches]
    digest = hashlib.sha256()
    try:
        with replacing(path) as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
    except OSError as error:
        raise MistralcError(
            f"The snapshot could not be written to {path} ({error}). Free some disk space, or "
            "name a file in a directory that this user may write to."
        ) from error


def load(path: Path, manifest: Manifest) -> Snapshot:
    """Read a snapshot of this bundle.

    Raises MistralcError if the file is damaged, truncated, not a snapshot, of another format, or of
    another bundle.
    """
    try:
        data = _checked(path)
    except OSError as error:
        raise MistralcError(
            f"The snapshot {path} could not be read ({error}). Check the path and its permissions."
        ) from error
    try:
        (length,) = struct.unpack_from("<I", data, len(MAGIC))
        begin = len(MAGIC) + 4
        header = json.loads(bytes(data[begin : begin + length]))
        if header["format"] != FORMAT:
            raise MistralcError(
                f"{path} is a snapshot of format {header['format']!r} and this mistralc reads "
                f"format {FORMAT}. Use the version that wrote it, or start over without it."
            )
        begin += length
        count, written = _counts(header)
        tokens = array("i", np.frombuffer(data, "<i4", count, begin).tolist())
        ours = header["bundle"] == fingerprint(manifest)
        caches = _caches(data[begin + 4 * count :], manifest, written) if ours else []
        snapshot = Snapshot(
            bundle=header["bundle"], tokens=tokens, written=written, caches=caches,
            note=header["note"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, struct.error) as error:
        raise MistralcError(f"{path} is not a snapshot ({error}). {_REMEDY}") from error
    check(snapshot, manifest)
    return snapshot


def _checked(path: Path) -> memoryview:
    """The file's contents without its SHA-256, which was checked."""
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise MistralcError(f"{path} is not a snapshot, or its beginning is damaged. {_REMEDY}")
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        data = bytearray(size)
        if file.readinto(data) != size:
            raise MistralcError(f"{path} changed while it was being read. {_REMEDY}")
    body = memoryview(data)[: size - DIGEST]
    if size < len(MAGIC) + 4 + DIGEST or hashlib.sha256(body).digest() != data[-DIGEST:]:
        raise MistralcError(
            f"{path} is damaged: the SHA-256 at its end does not match its {size:,} bytes. "
            f"{_REMEDY}"
        )
    return body


def _counts(header: dict[str, Any]) -> tuple[int, int]:
    """The header's `tokens` and `written`. Raises ValueError if a field is invalid."""
    for name, kind in _FIELDS.items():
        if type(header[name]) is not kind:
            raise ValueError(f"{name} is {header[name]!r:.40}; a JSON {kind.__name__} is expected")
    count, written = header["tokens"], header["written"]
    if min(count, written) < 0:
        raise ValueError(f"{count} tokens and {written} written; neither can be negative")
    return count, written


def _caches(data: memoryview, manifest: Manifest, written: int) -> Caches:
    """Split the bytes into each layer's key and value. Raises ValueError if sizes differ."""
    item = np.dtype("<f4" if item_size(manifest.activation) == 4 else "<u2")
    found, begin = [], 0
    for shape in _shapes(manifest, written):
        count = shape[0] * shape[1] * shape[2]
        found.append(np.frombuffer(data, item, count, begin).reshape(shape))
        begin += count * item.itemsize
    if begin != len(data):
        raise ValueError(f"{len(data):,} bytes of keys and values, {begin:,} expected")
    return found


def _shapes(manifest: Manifest, written: int) -> list[tuple[int, int, int]]:
    spec, ring = manifest.model, manifest.ring
    return [
        (spec.num_key_value_heads, min(written, ring.capacity(size)), spec.head_dim)
        for size in spec.layer_windows
        for _ in ("key", "value")
    ]


def _filled(ring: Ring, written: int) -> Slots:
    """The slots that hold anything, by window: all of them once a ring has wrapped."""
    return {size: slice(0, min(written, full)) for size, full in ring.full.items()}
