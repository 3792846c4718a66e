"""Keys and signatures; a bundle without the required signature is never opened."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from graphs.errors import MistralcError, UsageError
from graphs.manifest import FileEntry, read_manifest
from runtime.bundle import open as opening
from runtime.bundle import signature
from runtime.bundle.open import open_bundle
from runtime.load import load
from tests.conftest import Command

Copy = Callable[[Path], Path]


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key with its public key beside it."""
    path = tmp_path_factory.mktemp("keys") / "release"
    signature.write_keys(path)
    return path


@pytest.fixture
def signed(mistralc: Command, sliding_bundle: Path, copy_of: Copy, keys: Path) -> Path:
    """A signed bundle that a test may damage."""
    bundle = copy_of(sliding_bundle)
    ended = mistralc("sign", bundle, "--key", keys)
    assert ended.code == 0, ended.err
    return bundle


def public(key: Path) -> Path:
    return signature.public_path(key)


def resign(bundle: Path, key: Path) -> None:
    """Sign the current manifest, as someone with access to the key could."""
    signed, _ = signature.sign((bundle / "manifest.json").read_bytes(), key)
    signature.write_signature(bundle, signed)


# Keys


def test_only_the_owner_can_read_a_private_key_and_it_is_never_overwritten(
    mistralc: Command, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    created = json.loads(mistralc("keygen", "-o", key, "--json").out)
    assert created["private"] == str(key)
    assert created["public"] == f"{key}.pub"
    assert created["fingerprint"].startswith("SHA256:")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), public(key).read_bytes()
    ended = mistralc("keygen", "-o", key)
    assert ended.code == 2
    assert "is left alone" in ended.err
    public(key).unlink()
    assert mistralc("keygen", "-o", key).code == 2, "the private key exists without its public key"
    assert not public(key).exists(), "a public key without its private key"
    assert key.read_bytes() == before[0]


def test_openssl_accepts_a_signature(signed: Path, keys: Path) -> None:
    # A host can therefore check a bundle without any code of this project.
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public(keys), "-rawin",
               "-in", signed / "manifest.json", "-sigfile", signed / "manifest.sig"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("content", [b"", b"not a key", None], ids=["empty", "text", "public"])
def test_a_file_that_is_not_a_private_key_cannot_sign(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy, keys: Path, tmp_path: Path,
    content: bytes | None,
) -> None:  # fmt: skip
    bundle, key = copy_of(sliding_bundle), tmp_path / "key"
    key.write_bytes(public(keys).read_bytes() if content is None else content)
    ended = mistralc("sign", bundle, "--key", key)
    assert ended.code == 2
    assert "is not a private key" in ended.err
    assert not (bundle / "manifest.sig").exists()


def test_a_key_that_is_not_ed25519_is_refused(signed: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "key.pub").write_bytes(pem)
    with pytest.raises(UsageError, match="expected an Ed25519 key in PEM"):
        open_bundle(signed, require_signature=tmp_path / "key.pub")


# Signing


def test_a_damaged_bundle_is_not_signed(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy, keys: Path
) -> None:
    bundle = copy_of(sliding_bundle)
    open_bundle(bundle)
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[100] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    ended = mistralc("sign", bundle, "--key", keys)
    assert ended.code == 1
    assert "model.onnx was changed" in ended.err
    assert not (bundle / "manifest.sig").exists()


def test_a_failed_write_keeps_the_old_signature(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (signed / "manifest.sig").read_bytes()

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MistralcError, match="could not be written"):
        signature.write_signature(signed, bytes(64))
    assert (signed / "manifest.sig").read_bytes() == before
    assert sorted(path.name for path in signed.glob("manifest*")) == [
        "manifest.json", "manifest.sig"
    ]  # fmt: skip


def test_a_bundle_can_be_signed_again_with_another_key(
    mistralc: Command, signed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    fingerprint = signature.write_keys(other)
    result = json.loads(mistralc("sign", signed, "--key", other, "--json").out)
    assert result == {"signature": str(signed / "manifest.sig"), "signed_by": fingerprint}
    assert open_bundle(signed, require_signature=public(other)).signed_by == fingerprint


def test_verify_keeps_a_signature_valid(mistralc: Command, signed: Path, keys: Path) -> None:
    before = (signed / "manifest.json").read_bytes()
    ended = mistralc("verify", signed, "--short", "--require-signature", public(keys))
    assert ended.code == 0
    assert "not recorded" in ended.err
    assert (signed / "manifest.json").read_bytes() == before


# Requiring a signature

OPENING = ("generate", "chat", "bench", "verify", "eval", "inspect", "doctor", "diff", "report",
           "serve")  # fmt: skip
ARGUMENTS = {
    "generate": ("hi", "-n", "2"),
    "bench": ("--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1"),
    "verify": ("--short",),
    "serve": ("--port", "0"),
    "eval": ("--length", "8", "--limit", "1"),
}


def run(mistralc: Command, name: str, bundle: Path, *options: object) -> tuple[int, str]:
    """Run a command that opens a bundle; return its exit status and all output."""
    more = (bundle,) if name == "diff" else ARGUMENTS.get(name, ())
    ended = mistralc(name, bundle, *more, *options)
    return ended.code, ended.out + ended.err


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make everything that parses a file of a bundle fail the test."""

    def fail(*_arguments: object, **_named: object) -> None:
        pytest.fail("a file of the bundle was parsed before the signature was checked")

    import onnxruntime
    import tokenizers

    from graphs.manifest import Manifest

    monkeypatch.setattr(Manifest, "from_text", fail)
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    monkeypatch.setattr(tokenizers.Tokenizer, "from_str", fail)
    monkeypatch.setattr(opening, "sha256", fail)


@pytest.mark.parametrize("name", OPENING)
def test_no_command_opens_an_unsigned_bundle_if_a_signature_is_required(
    mistralc: Command, sliding_bundle: Path, keys: Path, untouched: None, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, output = run(mistralc, name, sliding_bundle, "--require-signature", public(keys))
    assert code == 1
    assert "is not signed" in output


@pytest.mark.parametrize("name", OPENING)
def test_the_environment_variable_requires_a_signature_in_every_command(
    mistralc: Command, signed: Path, untouched: None, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    signature.write_keys(tmp_path / "wrong")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(signature.VARIABLE, "wrong.pub")
    code, output = run(mistralc, name, signed)
    assert code == 1
    assert "is not a signature of manifest.json by the required key wrong.pub" in output


def test_the_environment_variable_also_binds_programs_that_load_a_bundle(
    sliding_bundle: Path, keys: Path, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signature.VARIABLE, str(public(keys)))
    with pytest.raises(MistralcError, match="is not signed"):
        load(sliding_bundle)


def test_an_empty_environment_variable_is_an_error(
    mistralc: Command, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signature.VARIABLE, "")
    ended = mistralc("inspect", signed)
    assert ended.code == 2
    assert "is set but empty" in ended.err


@pytest.mark.parametrize("name", ["inspect", "generate", "doctor", "diff"])
def test_a_signed_bundle_opens_with_its_required_key(
    mistralc: Command, signed: Path, keys: Path, name: str
) -> None:
    code, output = run(mistralc, name, signed, "--require-signature", public(keys))
    assert code == 0, output


def test_inspect_and_doctor_show_the_signing_key(
    mistralc: Command, signed: Path, keys: Path
) -> None:
    required = ("--require-signature", public(keys))
    fingerprint = open_bundle(signed, require_signature=public(keys)).signed_by
    assert fingerprint is not None
    assert f"by the required key {fingerprint}" in mistralc("inspect", signed, *required).out
    assert f"by the required key {fingerprint}" in mistralc("doctor", signed, *required).out
    assert json.loads(mistralc("inspect", signed, *required, "--json").out)["signed_by"] == (
        fingerprint
    )
    assert "yes, but not checked" in mistralc("inspect", signed).out


def test_a_changed_manifest_with_a_valid_checksum_is_refused_unparsed(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    manifest = replace(read_manifest(signed), precision="int8")
    (signed / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    assert open_bundle(signed).manifest.precision == "int8", (
        "everything but the signature must be valid"
    )
    request.getfixturevalue("untouched")
    with pytest.raises(MistralcError, match="the manifest was changed after it was signed"):
        open_bundle(signed, require_signature=public(keys))


@pytest.mark.parametrize("length", [0, 63, 65, 100_000])
def test_a_signature_of_another_length_is_refused(signed: Path, keys: Path, length: int) -> None:
    valid = (signed / "manifest.sig").read_bytes()
    (signed / "manifest.sig").write_bytes((valid + bytes(length))[:length])
    with pytest.raises(MistralcError, match="is not a signature of"):
        open_bundle(signed, require_signature=public(keys))


@pytest.mark.parametrize("name", ["extra.py", "report/extra.json", "report/deep/extra"])
def test_an_unlisted_file_is_refused_if_a_signature_is_required(
    signed: Path, keys: Path, name: str
) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_bytes(b"1")
    assert open_bundle(signed).path == signed
    with pytest.raises(MistralcError, match="is not listed in the signed"):
        open_bundle(signed, require_signature=public(keys))


def test_a_link_to_a_directory_counts_as_an_unlisted_file(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    (signed / "extra").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(MistralcError, match="is not listed in the signed"):
        open_bundle(signed, require_signature=public(keys))


def test_the_hash_cache_is_ignored_if_a_signature_is_required(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A forged cache entry simulates a change that keeps size, times and inode.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(opening, "SETTLED_NS", 0)
    weights = signed / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    right = read_manifest(signed).files["weights.safetensors"].sha256
    cache = opening._HashCache(opening.cache_file())
    cache.put(weights, opening._identity(weights), right, 2**63)
    cache.save()
    assert open_bundle(signed).path == signed, (
        "without a required signature the forged cache is trusted"
    )
    with pytest.raises(MistralcError, match=r"weights\.safetensors was changed"):
        open_bundle(signed, require_signature=public(keys))


def test_a_signed_manifest_cannot_list_a_file_outside_the_bundle(signed: Path, keys: Path) -> None:
    manifest = read_manifest(signed)
    outside = {"../other": FileEntry(size=0, sha256="0" * 64)}
    text = replace(manifest, files={**manifest.files, **outside}).to_text()
    (signed / "manifest.json").write_text(text, encoding="utf-8")
    resign(signed, keys)
    with pytest.raises(MistralcError, match="not inside the bundle"):
        open_bundle(signed, require_signature=public(keys))


def test_without_cryptography_the_error_says_what_to_install(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(MistralcError, match=r"pip install 'mistralc\[sign\]'"):
        open_bundle(signed, require_signature=public(keys))


def test_doctor_passes_no_plan_to_tensorrt_whose_hash_is_wrong(
    mistralc: Command, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.doctor import bundle_checks

    def fail(*_arguments: object) -> None:
        pytest.fail("a plan with a wrong hash was passed to TensorRT")

    (signed / "engine.plan").write_bytes(b"a plan that nobody built")
    manifest = read_manifest(signed)
    entry = FileEntry(size=24, sha256="0" * 64)
    text = replace(manifest, target="rtx", files={**manifest.files, "engine.plan": entry}).to_text()
    (signed / "manifest.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bundle_checks, "check_engine", fail)
    ended = mistralc("doctor", signed)
    assert ended.code == 1
    assert "engine.plan was changed" in ended.out
