"""The commands keygen and sign. Knows only the command line."""

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import options
from runtime.system.progress import stage_for


def keygen(
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE",
                     help="Write the private key to FILE and the public key to FILE.pub."),
    ],
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Make a pair of Ed25519 keys: one to sign bundles with, one to check signatures with."""
    from runtime.bundle import signature

    fingerprint = signature.write_keys(output)
    public = signature.public_path(output)
    if as_json:
        print(json.dumps({"private": str(output), "public": str(public),
                          "fingerprint": fingerprint}))  # fmt: skip
        return
    print(f"{output}: keep it secret, and away from hosts that run bundles.")
    print(f"{public}: {fingerprint}, for --require-signature.")


def sign(
    *,
    bundle: options.BundlePath,
    key: Annotated[
        Path, typer.Option("--key", metavar="FILE", help="A private key that keygen wrote.")
    ],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check every file of a bundle, and sign its manifest, which lists their hashes."""
    from graphs.manifest import SIGNATURE, manifest_bytes, parse_manifest
    from runtime.bundle import signature
    from runtime.bundle.open import check_files

    data = manifest_bytes(bundle)
    made, fingerprint = signature.sign(data, key)
    with stage_for(quiet=quiet or as_json)("Checking the bundle", None):
        check_files(bundle, parse_manifest(data, bundle), in_full=True)
    signature.write_signature(bundle, made)
    if as_json:
        print(json.dumps({"signature": str(bundle / SIGNATURE), "signed_by": fingerprint}))
    else:
        print(f"{bundle} is signed by {fingerprint}.")
