"""Ed25519 signatures (RFC 8032) of a bundle's manifest. Knows keys and bytes; opens no bundle.

The manifest has the SHA-256 of every other file, so a signature of the manifest covers the whole
bundle. `manifest.sig` is the 64 bytes of the signature and nothing else. Keys are PEM files (PKCS
#8 and SubjectPublicKeyInfo), so `openssl pkeyutl -verify -rawin` can check a signature too.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphs.errors import MistralcError, UsageError
from graphs.manifest import FILE_NAME, SIGNATURE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

VARIABLE = "MISTRALC_REQUIRE_SIGNATURE"
"""Environment variable: the public key that must have signed, unless the command line names one."""

LENGTH = 64  # bytes of an Ed25519 signature


def required_key(given: Path | None, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file of the public key that must have signed a bundle; None if none is required.

    Raises UsageError if the variable is set but empty: a deployment that fills it from a variable
    of its own, which is missing, must not switch the check off.
    """
    if given is not None:
        return given
    value = environment.get(VARIABLE)
    if value == "":
        raise UsageError(
            f"{VARIABLE} is set but empty; expected the file of a public key. Name one, or unset "
            "the variable to open unsigned bundles."
        )
    return None if value is None else Path(value)


def write_keys(path: Path) -> str:
    """Write a new private key to `path` and its public key to `path`.pub; return the fingerprint.

    The private key is not encrypted, and only this user may read it. Nothing is overwritten.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    _create(public_path(path), public, 0o644)
    try:
        _create(path, private, 0o600)
    except BaseException:
        public_path(path).unlink(missing_ok=True)
        raise
    return fingerprint(key.public_key())


def public_path(path: Path) -> Path:
    """Return where `write_keys` puts the public key of the private key in `path`."""
    return path.with_name(f"{path.name}.pub")


def sign(message: bytes, path: Path) -> tuple[bytes, str]:
    """Sign with the private key in the file `path`; return the 64 bytes and the fingerprint."""
    key = _private_key(path)
    return key.sign(message), fingerprint(key.public_key())


def check_signature(message: bytes, bundle: Path, path: Path) -> str:
    """Check that the key in the file `path` signed the manifest's bytes; return its fingerprint.

    Raises MistralcError for an unsigned bundle, a changed manifest or another key. Reads nothing
    in the bundle but the signature.
    """
    key = _public_key(path)
    signature = read_signature(bundle)
    if signature is None:
        raise MistralcError(
            f"{bundle} is not signed: it has no {SIGNATURE}, but a signature by {path} is "
            "required. Do not use it, or ask those who built it to sign it with `mistralc sign`."
        )
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature as error:
        raise MistralcError(
            f"{bundle / SIGNATURE} is not a signature of {FILE_NAME} by the required key {path} "
            f"({fingerprint(key)}): the manifest was changed after it was signed, or another key "
            "signed it. Do not use this bundle; copy it again from where it was signed, or ask "
            "those who signed it for their public key."
        ) from error
    return fingerprint(key)


def read_signature(bundle: Path) -> bytes | None:
    """Return the bundle's signature, by whichever key; None if there is none."""
    try:
        with (bundle / SIGNATURE).open("rb") as file:
            return file.read(LENGTH + 1)  # one more byte, so that a longer file is refused
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MistralcError(
            f"{bundle / SIGNATURE} could not be read ({error}). Check its permissions and the disk."
        ) from error


def write_signature(bundle: Path, signature: bytes) -> None:
    """Write the signature into the bundle, replacing an older one, whole or not at all."""
    path = bundle / SIGNATURE
    partial = bundle / f"{SIGNATURE}.partial"
    try:
        try:
            with partial.open("wb") as file:
                file.write(signature)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise MistralcError(
            f"The signature could not be written to {path} ({error}). Make the bundle writable, "
            "and sign again."
        ) from error


def fingerprint(key: "Ed25519PublicKey") -> str:
    """Return `SHA256:` and the base64 hash of the key's 32 bytes, without padding, as OpenSSH."""
    digest = hashlib.sha256(key.public_bytes_raw()).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _create(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        raise UsageError(
            f"{path} exists and is left alone, because an overwritten key is lost. Choose another "
            "name."
        ) from error
    except OSError as error:
        raise MistralcError(
            f"The key could not be written to {path} ({error}). Check the path."
        ) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise MistralcError(
            f"The key could not be written to {path} ({error}). Check the disk."
        ) from error


def _private_key(path: Path) -> "Ed25519PrivateKey":
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key: Any = None
    with suppress(ValueError, TypeError):  # not PEM, another kind of key, or encrypted
        key = serialization.load_pem_private_key(_read(path), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(
            f"{path} is not a private key to sign with; expected an unencrypted Ed25519 key in "
            "PEM. Give the file that `mistralc keygen` wrote."
        )
    return key


def _public_key(path: Path) -> "Ed25519PublicKey":
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    key: Any = None
    with suppress(ValueError):
        key = serialization.load_pem_public_key(_read(path))
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(
            f"{path} is not a public key to check signatures with; expected an Ed25519 key in PEM. "
            "Give the file ending in .pub that `mistralc keygen` wrote."
        )
    return key


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"The key {path} could not be read ({error}). Check the path and its permissions."
        ) from error


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise MistralcError(
            "Signatures need the package cryptography, which is not installed here. Install it: "
            "pip install 'mistralc[sign]', or cryptography alone."
        ) from error
