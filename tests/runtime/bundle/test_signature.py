"""Keys and signatures, and what a bundle without the required one gets to do: nothing."""

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
    """A private key; its public key lies beside it."""
    path = tmp_path_factory.mktemp("keys") / "release"
    signature.write_keys(path)
    return path


@pytest.fixture
def signed(mistralc: Command, sliding_bundle: Path, copy_of: Copy, keys: Path) -> Path:
    """A signed bundle, to be damaged."""
    bundle = copy_of(sliding_bundle)
    ended = mistralc("sign", bundle, "--key", keys)
    assert ended.code == 0, ended.err
    return bundle


def public(key: Path) -> Path:
    return signature.public_path(key)


def resign(bundle: Path, key: Path) -> None:
    """Sign whatever the manifest is now, as an accomplice would."""
    made, _ = signature.sign((bundle / "manifest.json").read_bytes(), key)
    signature.write_signature(bundle, made)


# Keys


def test_a_private_key_is_for_its_owner_only_and_never_overwritten(
    mistralc: Command, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    made = json.loads(mistralc("keygen", "-o", key, "--json").out)
    assert made["private"] == str(key)
    assert made["public"] == f"{key}.pub"
    assert made["fingerprint"].startswith("SHA256:")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes(), public(key).read_bytes()
    ended = mistralc("keygen", "-o", key)
    assert ended.code == 2
    assert "is left alone" in ended.err
    public(key).unlink()
    assert mistralc("keygen", "-o", key).code == 2, "a private key is there, without its public one"
    assert not public(key).exists(), "a public key that belongs to no private one"
    assert key.read_bytes() == before[0]


def test_a_signature_is_one_that_openssl_accepts(signed: Path, keys: Path) -> None:
    # So a host can check a bundle without trusting, or having, anything of ours.
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public(keys), "-rawin",
               "-in", signed / "manifest.json", "-sigfile", signed / "manifest.sig"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("content", [b"", b"not a key", None], ids=["empty", "text", "public"])
def test_what_is_no_private_key_does_not_sign(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy, keys: Path, tmp_path: Path,
    content: bytes | None,
) -> None:  # fmt: skip
    bundle, key = copy_of(sliding_bundle), tmp_path / "key"
    key.write_bytes(public(keys).read_bytes() if content is None else content)
    ended = mistralc("sign", bundle, "--key", key)
    assert ended.code == 2
    assert "is not a private key" in ended.err
    assert not (bundle / "manifest.sig").exists()


def test_a_key_of_another_kind_is_refused(signed: Path, tmp_path: Path) -> None:
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


def test_a_signature_that_cannot_be_written_leaves_the_old_one(
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


def test_a_bundle_is_signed_again_by_another_key(
    mistralc: Command, signed: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    fingerprint = signature.write_keys(other)
    told = json.loads(mistralc("sign", signed, "--key", other, "--json").out)
    assert told == {"signature": str(signed / "manifest.sig"), "signed_by": fingerprint}
    assert open_bundle(signed, require_signature=public(other)).signed_by == fingerprint


def test_verify_does_not_break_a_signature(mistralc: Command, signed: Path, keys: Path) -> None:
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
    """Run a command that opens a bundle: its status and all that it printed."""
    more = (bundle,) if name == "diff" else ARGUMENTS.get(name, ())
    ended = mistralc(name, bundle, *more, *options)
    return ended.code, ended.out + ended.err


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that parses a bundle's files fails the test, the manifest's parser first."""

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
def test_no_command_opens_an_unsigned_bundle_where_a_signature_is_required(
    mistralc: Command, sliding_bundle: Path, keys: Path, untouched: None, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, said = run(mistralc, name, sliding_bundle, "--require-signature", public(keys))
    assert code == 1
    assert "is not signed" in said


@pytest.mark.parametrize("name", OPENING)
def test_the_environment_requires_a_signature_of_every_command(
    mistralc: Command, signed: Path, untouched: None, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    signature.write_keys(tmp_path / "wrong")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(signature.VARIABLE, "wrong.pub")
    code, said = run(mistralc, name, signed)
    assert code == 1
    assert "is not a signature of manifest.json by the required key wrong.pub" in said


def test_a_program_that_loads_a_bundle_by_itself_is_held_to_the_environment(
    sliding_bundle: Path, keys: Path, untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signature.VARIABLE, str(public(keys)))
    with pytest.raises(MistralcError, match="is not signed"):
        load(sliding_bundle)


def test_an_empty_variable_does_not_switch_the_requirement_off(
    mistralc: Command, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(signature.VARIABLE, "")
    ended = mistralc("inspect", signed)
    assert ended.code == 2
    assert "is set but empty" in ended.err


@pytest.mark.parametrize("name", ["inspect", "generate", "doctor", "diff"])
def test_a_signed_bundle_works_where_its_key_is_required(
    mistralc: Command, signed: Path, keys: Path, name: str
) -> None:
    code, said = run(mistralc, name, signed, "--require-signature", public(keys))
    assert code == 0, said


def test_inspect_and_doctor_say_who_signed(mistralc: Command, signed: Path, keys: Path) -> None:
    required = ("--require-signature", public(keys))
    fingerprint = open_bundle(signed, require_signature=public(keys)).signed_by
    assert fingerprint is not None
    assert f"by the required key {fingerprint}" in mistralc("inspect", signed, *required).out
    assert f"by the required key {fingerprint}" in mistralc("doctor", signed, *required).out
    assert json.loads(mistralc("inspect", signed, *required, "--json").out)["signed_by"] == (
        fingerprint
    )
    assert "yes, but not checked" in mistralc("inspect", signed).out


def test_a_manifest_that_was_changed_and_is_whole_in_itself_is_refused_unparsed(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    manifest = replace(read_manifest(signed), precision="int8")
    (signed / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    assert open_bundle(signed).manifest.precision == "int8", "it must be whole but for who signed"
    request.getfixturevalue("untouched")
    with pytest.raises(MistralcError, match="the manifest was changed after it was signed"):
        open_bundle(signed, require_signature=public(keys))


@pytest.mark.parametrize("length", [0, 63, 65, 100_000])
def test_a_signature_of_another_length_is_refused(signed: Path, keys: Path, length: int) -> None:
    made = (signed / "manifest.sig").read_bytes()
    (signed / "manifest.sig").write_bytes((made + bytes(length))[:length])
    with pytest.raises(MistralcError, match="is not a signature of"):
        open_bundle(signed, require_signature=public(keys))


@pytest.mark.parametrize("name", ["extra.py", "report/extra.json", "report/deep/extra"])
def test_a_file_that_nobody_signed_is_refused_where_a_signature_is_required(
    signed: Path, keys: Path, name: str
) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_bytes(b"1")
    assert open_bundle(signed).path == signed
    with pytest.raises(MistralcError, match="is not listed in the signed"):
        open_bundle(signed, require_signature=public(keys))


def test_a_link_to_a_directory_is_a_file_that_nobody_signed(
    signed: Path, keys: Path, tmp_path: Path
) -> None:
    (signed / "extra").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(MistralcError, match="is not listed in the signed"):
        open_bundle(signed, require_signature=public(keys))


def test_nothing_remembered_about_a_file_counts_where_a_signature_is_required(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A forged cache stands for any change that size, times and inode do not show.
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
    assert open_bundle(signed).path == signed, "the forgery must deceive who only fears accidents"
    with pytest.raises(MistralcError, match=r"weights\.safetensors was changed"):
        open_bundle(signed, require_signature=public(keys))


def test_an_accomplice_with_the_key_cannot_sign_a_file_outside_the_bundle_in(
    signed: Path, keys: Path
) -> None:
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


def test_doctor_shows_tensorrt_no_plan_of_other_bytes_than_the_manifest_lists(
    mistralc: Command, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.doctor import bundle_checks

    def fail(*_arguments: object) -> None:
        pytest.fail("a plan was shown to TensorRT before its hash was right")

    (signed / "engine.plan").write_bytes(b"a plan that nobody built")
    manifest = read_manifest(signed)
    entry = FileEntry(size=24, sha256="0" * 64)
    text = replace(manifest, target="rtx", files={**manifest.files, "engine.plan": entry}).to_text()
    (signed / "manifest.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr(bundle_checks, "check_engine", fail)
    ended = mistralc("doctor", signed)
    assert ended.code == 1
    assert "engine.plan was changed" in ended.out
