"""What goes wrong at a user's, each with an exit status, one clear paragraph and nothing left."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from exporter import export as exporting
from exporter.bundle import staging as writing
from graphs.manifest import Manifest, read_manifest
from runtime.bundle.open import open_bundle
from tests.conftest import CONTEXT, Command, Ended
from tests.support.make_checkpoint import tiny_spec, write_checkpoint
from tests.support.tiny import traced

Copy = Callable[[Path], Path]

ROOT = Path(__file__).resolve().parents[1]


def refused(ended: Ended, *said: str, code: int = 1) -> None:
    """Assert that a command ended with `code` and one paragraph that holds every text of `said`."""
    assert ended.code == code, ended
    assert ended.out == "", "a refusal has no result"
    assert ended.err.startswith("mistralc: ")
    assert ended.err.endswith(".\n")
    assert ended.err.count("\n") == 1, f"one paragraph is expected, not:\n{ended.err}"
    assert "Traceback" not in ended.err
    assert 40 < len(ended.err) < 700, "long enough to say what to do, short enough to read"
    for text in said:
        assert text in ended.err, f"{text!r} is not in: {ended.err}"


def wrong_usage(ended: Ended, *said: str) -> None:
    """The same for what the option parser finds by itself; it prints its usage in a frame."""
    assert ended.code == 2, ended
    assert ended.out == ""
    assert ended.err.startswith("Usage: ")
    assert "Traceback" not in ended.err
    unframed = " ".join(ended.err.replace("│", " ").split())
    for text in said:
        assert text in unframed, f"{text!r} is not in: {unframed}"


@pytest.fixture
def checkpoint(sliding_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(sliding_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def refuse_export(mistralc: Command, tmp_path: Path) -> Callable[..., None]:
    """Export what must be refused, and see that nothing is left of the attempt."""

    def run(source: object, *arguments: object, said: tuple[str, ...], code: int = 1) -> None:
        out = tmp_path / "out"
        out.mkdir()
        refused(mistralc("export", source, "-o", out / "bundle", *arguments), *said, code=code)
        assert list(out.iterdir()) == [], "something was left behind"
        out.rmdir()
        refused(mistralc("export", source, "-o", out / "bundle", *arguments), *said, code=code)
        assert not out.exists(), "the directory made for the bundle was left behind"

    return run


def configure(checkpoint: Path, **values: object) -> None:
    """Change `config.json`."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}), encoding="utf-8")


# Checkpoints


def test_a_path_that_is_not_there(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    missing = tmp_path / "no such checkpoint"
    refuse_export(missing, said=("There is no checkpoint at", str(missing), "smollm2"))


def test_an_empty_directory(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse_export(empty, said=(str(empty), "empty directory", "config.json"))


def test_a_file_that_is_no_checkpoint(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.write_text("weights", encoding="utf-8")
    refuse_export(file, said=(str(file), "not a GGUF file"))


def test_a_truncated_file_of_weights(refuse_export: Callable[..., None], checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    refuse_export(checkpoint, said=("model.safetensors", "truncated", "Fetch the file again"))


def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "sharded", tiny_spec(window=8), shard_size=100_000)


def test_a_truncated_shard(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size // 2)
    refuse_export(folder, said=(shard.name, "truncated", "Fetch the file again"))


def test_an_index_that_names_a_missing_shard(
    refuse_export: Callable[..., None], tmp_path: Path
) -> None:
    folder = sharded(tmp_path)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    refuse_export(
        folder, said=("model.safetensors.index.json", shard.name, "fetch the missing one")
    )


def test_weights_of_a_type_that_is_not_read(
    refuse_export: Callable[..., None], checkpoint: Path
) -> None:
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"model.norm.weight":{"dtype":"F32"',
                                          b'"model.norm.weight":{"dtype":"I32"')  # fmt: skip
    assert header != data[8 : 8 + length]
    weights.write_bytes(data[:8] + header + data[8 + length :])
    refuse_export(checkpoint, said=("model.norm.weight", "I32", "float32", "--precision"))


@pytest.mark.parametrize(("value", "count"), [(np.nan, "1 NaN"), (np.inf, "1 infinite")])
def test_a_weight_that_is_not_a_number(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    checkpoint: Path,
    tmp_path: Path,
    value: float,
    count: str,
) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"  # one that is merged with others
    poison(checkpoint / "model.safetensors", name, value)
    monkeypatch.setattr(exporting, "trace", traced)
    before = sorted(tmp_path.iterdir())
    refused(
        mistralc("export", checkpoint, "-o", tmp_path / "made" / "bundle"),
        name, count, "fetch it again",
    )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


def poison(weights: Path, name: str, value: float) -> None:
    """Overwrite one number of a float32 tensor in the middle."""
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    begin, end = json.loads(data[8:start])[name]["data_offsets"]
    at = start + (begin + end) // 2 // 4 * 4
    data[at : at + 4] = np.float32(value).tobytes()
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_local_experts": 8}, ("num_local_experts", "mixture of experts", "another")),
        ({"attention_bias": True}, ("attention_bias", "biases", "another")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "linear", "another")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
        ({"architectures": ["GemmaForCausalLM"]}, ("GemmaForCausalLM", "MistralForCausalLM")),
        ({"num_hidden_layers": None}, ("num_hidden_layers", "missing")),
        ({"hidden_size": 128}, ("model.embed_tokens.weight", "[320, 64]", "[320, 128]")),
    ],
    ids=["experts", "bias", "rope scaling", "activation", "architecture", "missing", "shape"],
)
def test_a_configuration_beyond_the_dense_architecture(
    refuse_export: Callable[..., None],
    checkpoint: Path,
    values: Mapping[str, Any],
    said: tuple[str, ...],
) -> None:
    configure(checkpoint, **values)
    refuse_export(checkpoint, said=said)


def test_a_gguf_of_another_architecture(refuse_export: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "falcon")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuse_export(path, said=(str(path), "falcon", "llama"))


def test_a_checkpoint_without_a_tokenizer(
    refuse_export: Callable[..., None], checkpoint: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    refuse_export(checkpoint, said=("no tokenizer", "tokenizer.model"))


# Options of export


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--target", "tpu"), ("--target", "'tpu'", "cpu")),
        (("--precision", "int3"), ("--precision", "'int3'", "fp32")),
        (("--window", "8", "--context", "9"), ("--window and --context exclude each other",)),
        (("--context", "64"), ("--context is 64", "slides", "Leave it out")),
    ],
    ids=["target", "precision", "window and context", "context of what slides"],
)
def test_options_that_cannot_be(
    refuse_export: Callable[..., None],
    sliding_checkpoint: Path,
    arguments: tuple[str, ...],
    said: tuple[str, ...],
) -> None:
    refuse_export(sliding_checkpoint, *arguments, said=said, code=2)


def test_a_context_beyond_the_checkpoints_positions(
    refuse_export: Callable[..., None], plain_checkpoint: Path
) -> None:
    said = ("--context is 513", "512", "--window")
    refuse_export(plain_checkpoint, "--context", 513, said=said, code=2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("export",), "CHECKPOINT"),
        (("export", "x", "--window", "0"), "--window"),
        (("export", "x", "--chunk", "many"), "--chunk"),
        (("generate", "x", "--unknown"), "No such option: --unknown"),
        (("generate", "x", "y", "z"), "unexpected extra argument"),
        (("generate", "x", "y", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("generate", "x", "y", "--temperature", "warm"), "--temperature"),
        (("verify",), "BUNDLE"),
        (("bench", "x", "--repeat", "0"), "--repeat"),
        (("nonsense",), "No such command 'nonsense'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_shows_the_usage(
    mistralc: Command, arguments: tuple[str, ...], said: str
) -> None:
    wrong_usage(mistralc(*arguments), said)


# The place of an export


def test_a_bundle_is_not_overwritten_unless_it_is_asked_for(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_bundle: Path,
    plain_checkpoint: Path,
    copy_of: Copy,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    bundle = copy_of(sliding_bundle)
    old = bundle.stat().st_ino, read_manifest(bundle)
    ended = mistralc("export", plain_checkpoint, "-o", bundle)
    refused(ended, str(bundle), "--force", code=2)
    assert (bundle.stat().st_ino, read_manifest(bundle)) == old

    ended = mistralc("export", plain_checkpoint, "-o", bundle, "--force")
    assert ended.code == 0, ended.err
    assert open_bundle(bundle).manifest.model.layer_windows == (None, None)
    assert list(bundle.parent.iterdir()) == [bundle], "the old bundle was left beside the new one"


def test_a_failing_replacement_leaves_the_old_bundle(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_bundle: Path,
    checkpoint: Path,
    copy_of: Copy,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    poison(checkpoint / "model.safetensors", "lm_head.weight", np.nan)
    bundle = copy_of(sliding_bundle)
    refused(mistralc("export", checkpoint, "-o", bundle, "--force"), "lm_head.weight")
    assert open_bundle(bundle).manifest == read_manifest(sliding_bundle)
    assert list(bundle.parent.iterdir()) == [bundle]


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "with --force"])
def test_a_directory_that_is_no_bundle_is_never_touched(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path, force: tuple[str, ...]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious", encoding="utf-8")
    ended = mistralc("export", sliding_checkpoint, "-o", home, *force)
    refused(ended, str(home), "not a bundle", "another name", code=2)
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]
    ended = mistralc("export", sliding_checkpoint, "-o", home / "thesis.txt", *force)
    refused(ended, "thesis.txt", "another name", code=2)
    ended = mistralc("export", sliding_checkpoint, "-o", home / "thesis.txt" / "x", *force)
    refused(ended, "thesis.txt", "is a file", code=2)
    assert (home / "thesis.txt").read_text(encoding="utf-8") == "precious"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`tmpfs(kib)` mounts a small file system in memory. Skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        place = tmp_path / f"tmpfs-{len(mounted)}"
        place.mkdir()
        if os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmpfs: Callable[[int], Path],
) -> None:
    def never(*_arguments: object) -> None:
        pytest.fail("the decoder was traced although the disk is known to be too small")

    monkeypatch.setattr(exporting, "trace", never)
    disk = tmpfs(300)
    ended = mistralc("export", sliding_checkpoint, "-o", disk / "bundle")
    refused(ended, str(disk), "bytes free", "another disk")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("kib", "during"), [(200, "weights.safetensors"), (412, "model.onnx"), (432, "tokenizer.json")]
)
def test_a_disk_that_fills_up_during_an_export(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmpfs: Callable[[int], Path],
    kib: int,
    during: str,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    # Another program takes the space after it was looked at.
    monkeypatch.setattr(exporting, "require_host", lambda _plan, _destination: None)
    written: list[set[str]] = []
    explained = writing._explained

    def noting(error: OSError, destination: Path) -> Exception:
        assert error.errno == errno.ENOSPC
        return explained(error, destination)

    real = shutil.rmtree

    def looking(path: Path, **arguments: Any) -> None:
        written.append({file.name for file in Path(path).iterdir()})
        real(path, **arguments)

    monkeypatch.setattr(writing, "_explained", noting)
    monkeypatch.setattr(writing.shutil, "rmtree", looking)
    disk = tmpfs(kib)
    ended = mistralc("export", sliding_checkpoint, "-o", disk / "made" / "bundle")
    refused(ended, "The disk was full", str(disk / "made" / "bundle"), "Free some space")
    assert during in written[-1], "the disk was full at another file than this test means"
    assert list(disk.iterdir()) == []


def test_a_full_disk_during_verify_leaves_the_bundle_whole(
    mistralc: Command,
    sliding_bundle: Path,
    tmpfs: Callable[[int], Path],
) -> None:
    disk = tmpfs(1024)
    bundle = Path(shutil.copytree(sliding_bundle, disk / "bundle"))
    free = shutil.disk_usage(disk).free
    # Room for one page: the new report, and not the new manifest.
    (disk / "filler").write_bytes(bytes(free - 4096))
    before = read_manifest(bundle)
    ended = mistralc("verify", bundle, "--short")
    assert ended.code == 1
    assert "Verdict: passed" in ended.out, "the result is told although it cannot be kept"
    refused(Ended(ended.code, "", ended.err), str(bundle), "No space left", "verify again")
    assert open_bundle(bundle).manifest == before
    assert not list(bundle.rglob("*.partial"))


def test_a_kill_during_an_export_leaves_nothing_that_looks_like_a_bundle(
    mistralc: Command, sliding_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    # The child stops itself in the middle of the weights, so that the kill cannot come too late.
    code = """
import os, signal, sys
from exporter import export, weights
write = weights._weight
def stopping(checkpoint, recipe, name, layout, file):
    if "layers.1" in name:
        os.kill(os.getpid(), signal.SIGSTOP)
    yield from write(checkpoint, recipe, name, layout, file)
weights._weight = stopping
import mistralc
mistralc.main()
"""
    command = [sys.executable, "-c", code, "export", sliding_checkpoint, "-o", out / "bundle"]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    wait_for_stop(child)
    (staging,) = out.iterdir()
    assert staging.name.startswith(writing.PARTIAL)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == [staging.name], "a hidden leftover, no bundle"

    monkeypatch.setattr(exporting, "trace", traced)
    ended = mistralc("export", sliding_checkpoint, "-o", out / "another")
    assert ended.code == 0, ended.err
    assert [path.name for path in out.iterdir()] == ["another"], "the leftover was not swept"
    open_bundle(out / "another")


def wait_for_stop(child: subprocess.Popen[bytes]) -> None:
    """Wait until a child process has stopped itself."""
    deadline = time.monotonic() + 120  # it imports torch first, which may take long on a busy host
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child.pid, os.WUNTRACED | os.WNOHANG)
        if pid and os.WIFSTOPPED(status):
            return
        assert pid == 0, f"the export ended before it could be killed: {status}"
        time.sleep(0.02)
    child.kill()
    pytest.fail("the export did not reach the weights within two minutes")


def test_ctrl_c_during_an_export_leaves_nothing(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    real = exporting.stream_weights

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as a terminal does
        time.sleep(0.5)  # weights are written beside the main thread, which gets the signal

    monkeypatch.setattr(exporting, "stream_weights", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    try:
        ended = mistralc("export", sliding_checkpoint, "-o", tmp_path / "made" / "bundle")
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.code == 130
    assert ended.out == ""
    assert ended.err == "mistralc: stopped.\n"
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_computes_something_else_is_not_published(
    mistralc: Command,
    monkeypatch: pytest.MonkeyPatch,
    sliding_checkpoint: Path,
    tmp_path: Path,
) -> None:
    # A window that is off by one, as a faulty pass would leave it.
    def wrong(spec: Any, activation: Any) -> Any:
        from dataclasses import replace

        return traced(replace(spec, layer_windows=(7, 7)), activation)

    monkeypatch.setattr(exporting, "trace", wrong)
    ended = mistralc("export", sliding_checkpoint, "-o", tmp_path / "made" / "bundle")
    refused(ended, "does not compute what the checkpoint does", "W", "report this")
    assert list(tmp_path.iterdir()) == []


# Bundles


@pytest.mark.parametrize("command", ["generate", "chat", "inspect", "verify", "bench"])
def test_a_bundle_that_is_not_there(mistralc: Command, tmp_path: Path, command: str) -> None:
    ended = mistralc(command, tmp_path / "nothing", stdin=b"hi\n")
    refused(ended, "There is no bundle at", "nothing", "mistralc export")


def test_a_checkpoint_in_place_of_a_bundle(mistralc: Command, sliding_checkpoint: Path) -> None:
    said = (str(sliding_checkpoint), "is not a bundle", "run `mistralc export` on it first")
    refused(mistralc("generate", sliding_checkpoint, "hi"), *said)
    refused(mistralc("inspect", sliding_checkpoint / "config.json"), "is not a bundle")


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx", "weights.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "run.pyz", "report/verify.md", "manifest.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "verify"])
def test_a_bundle_with_one_flipped_bit(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy, name: str, command: str
) -> None:
    bundle = copy_of(sliding_bundle)
    path = bundle / name
    data = bytearray(path.read_bytes())
    # In the manifest it is the window, which becomes a 9 and would still be a valid manifest.
    at = (
        data.index(b"8,", data.index(b"layer_windows"))
        if name == "manifest.json"
        else len(data) // 2
    )
    data[at] ^= 1
    path.write_bytes(data)
    refused(mistralc(command, bundle, stdin=b"hi"), name, "was changed after", "export it again")


def test_the_parametrization_above_names_every_file(sliding_bundle: Path) -> None:
    mark = test_a_bundle_with_one_flipped_bit.pytestmark  # type: ignore[attr-defined]
    names = next(m.args[1] for m in mark if m.args[0] == "name")
    assert {*read_manifest(sliding_bundle).files, "manifest.json"} == set(names)


def test_a_bundle_of_a_newer_schema(mistralc: Command, sliding_bundle: Path, copy_of: Copy) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = bundle / "manifest.json"
    data = {**json.loads(manifest.read_bytes()), "schema": 2, "new": {"field": 1}}
    manifest.write_text(json.dumps(data), encoding="utf-8")
    refused(mistralc("generate", bundle, "hi"), "schema 2", "newer version", "Install")


def test_a_bundle_for_a_target_that_this_host_cannot_run(
    mistralc: Command, sliding_bundle: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    manifest = read_manifest(bundle)
    values = {name: getattr(manifest, name) for name in manifest.__slots__}
    plan = manifest.files["model.onnx"]
    (bundle / "model.onnx").rename(bundle / "engine.plan")
    files = {**manifest.files, "engine.plan": plan}
    del files["model.onnx"]
    other = Manifest(**{**values, "target": "rtx", "files": files})
    (bundle / "manifest.json").write_text(other.to_text(), encoding="utf-8")
    refused(mistralc("generate", bundle, "hi"), "rtx", "GPU")


def test_verify_against_another_checkpoint(
    mistralc: Command, sliding_bundle: Path, plain_checkpoint: Path, copy_of: Copy
) -> None:
    bundle = copy_of(sliding_bundle)
    ended = mistralc("verify", bundle, "--against", plain_checkpoint)
    refused(ended, str(plain_checkpoint), "another checkpoint", "leave --against out")
    assert open_bundle(bundle).manifest == read_manifest(sliding_bundle), "nothing was recorded"


@pytest.fixture
def read_only(tmp_path: Path, tmpfs: Callable[[int], Path], sliding_bundle: Path) -> Iterator[Path]:
    """A bundle that cannot be written to: by its permissions, or for root by its mount."""
    if os.geteuid() == 0:
        disk = tmpfs(1024)
        bundle = Path(shutil.copytree(sliding_bundle, disk / "bundle"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        yield bundle
        return
    bundle = Path(shutil.copytree(sliding_bundle, tmp_path / "bundle"))
    folders = (bundle, bundle / "report")
    for folder in folders:
        folder.chmod(0o555)
    yield bundle
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_bundle_runs_and_verify_says_that_it_cannot_record(
    mistralc: Command, read_only: Path
) -> None:
    ended = mistralc("generate", read_only, "hi", "-n", "3")
    assert (ended.code, ended.err) == (0, "")
    assert mistralc("inspect", read_only).code == 0
    ended = mistralc("verify", read_only, "--short")
    assert "Verdict: passed" in ended.out, "the result is told although it cannot be kept"
    refused(Ended(ended.code, "", ended.err), str(read_only), "could not be written", "writable")


# Prompts


def test_a_prompt_longer_than_the_context(mistralc: Command, plain_bundle: Path) -> None:
    ended = mistralc("generate", plain_bundle, "x" * CONTEXT)
    refused(ended, f"{CONTEXT + 1} tokens", f"holds {CONTEXT} in all", "--window")


@pytest.mark.parametrize("arguments", [("",), ("-",), ()], ids=["argument", "dash", "nothing"])
def test_an_empty_prompt(
    mistralc: Command, sliding_bundle: Path, arguments: tuple[str, ...]
) -> None:
    refused(mistralc("generate", sliding_bundle, *arguments), "prompt is empty", code=2)


def test_an_empty_file_as_the_prompt(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "empty.txt"
    file.touch()
    refused(mistralc("generate", sliding_bundle, "-f", file), "prompt is empty", code=2)


def test_a_prompt_that_is_not_utf8(mistralc: Command, sliding_bundle: Path, tmp_path: Path) -> None:
    latin1 = "café".encode("latin-1")
    said = ("not UTF-8", "byte 3 is 0xe9", "iconv")
    refused(mistralc("generate", sliding_bundle, stdin=latin1), "standard input", *said)
    file = tmp_path / "latin1.txt"
    file.write_bytes(latin1)
    refused(mistralc("generate", sliding_bundle, "--file", file), str(file), *said)
    refused(mistralc("chat", sliding_bundle, stdin=latin1), "Standard input", "not UTF-8", "iconv")
    argument = os.fsdecode(latin1)  # as Python hands over an argument that is not UTF-8
    refused(mistralc("generate", sliding_bundle, argument), "Valid Unicode is expected")


def test_a_prompt_file_that_cannot_be_read(
    mistralc: Command, sliding_bundle: Path, tmp_path: Path
) -> None:
    said = ("could not be read", str(tmp_path), "--file")
    refused(mistralc("generate", sliding_bundle, "--file", tmp_path / "missing"), *said)
    refused(mistralc("generate", sliding_bundle, "--file", tmp_path), *said)


def test_a_system_message_that_the_template_refuses(
    mistralc: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "trace", traced)
    settings = checkpoint / "tokenizer_config.json"
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    settings.write_text(
        json.dumps({**json.loads(settings.read_bytes()), "chat_template": template}),
        encoding="utf-8",
    )
    bundle = tmp_path / "bundle"
    assert mistralc("export", checkpoint, "-o", bundle).code == 0
    ended = mistralc("generate", bundle, "hi", "--chat", "--system", "x")
    refused(ended, "No system!", "template refuses", code=2)


# Options of generate, chat and bench


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--stop", ""), ("stop string is empty", "leave the option out")),
        (("--logit-bias", "garbage"), ("--logit-bias", "'garbage'", "42=-100")),
        (("--logit-bias", "1=nan"), ("logit_bias", "nan")),
        (("--temperature", "-1"), ("temperature is -1.0", "0 is greedy")),
        (("--top-p", "1.5"), ("top_p is 1.5", "from 0 to 1")),
        (("--top-k", "-3"), ("top_k is -3", "0 is off")),
        (("--seed", "-3"), ("seed is -3",)),
        (("--logprobs", "3"), ("--logprobs", "add --json")),
        (("--system", "be brief"), ("--system", "add --chat")),
        (("--file", "also.txt"), ("--file", "give one of them")),
    ],
    ids=lambda value: (
        " ".join(value[:2]) if isinstance(value[0], str) and value[0][0] == "-" else ""
    ),
)
def test_an_option_that_cannot_be_is_refused_before_anything_is_loaded(
    mistralc: Command, tmp_path: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    # Were the bundle looked at first, the error would be that it is not there.
    refused(mistralc("generate", tmp_path / "nothing", "hi", *arguments), *said, code=2)


def test_a_logit_bias_for_a_token_that_the_model_lacks(
    mistralc: Command, sliding_bundle: Path
) -> None:
    ended = mistralc("generate", sliding_bundle, "hi", "--logit-bias", "320=1")
    refused(ended, "Token 320", "0 to 319", code=2)


def test_chat_refuses_the_same_options(mistralc: Command, tmp_path: Path) -> None:
    refused(mistralc("chat", tmp_path, "-t", "-1"), "temperature is -1.0", code=2)
    refused(mistralc("chat", tmp_path, "--stop", ""), "stop string is empty", code=2)


def test_a_plot_is_refused_before_the_measurement_it_would_show(
    mistralc: Command, tmp_path: Path
) -> None:
    bench = ("bench", tmp_path / "nothing", "--plot")
    refused(mistralc(*bench, tmp_path / "x.png"), "--positions N", code=2)
    missing = tmp_path / "missing" / "x.png"
    refused(mistralc(*bench, missing, "--positions", 9), str(missing), "existing directory", code=2)
    refused(mistralc(*bench, tmp_path, "--positions", 9), "existing directory", code=2)


def test_positions_beyond_the_context(mistralc: Command, plain_bundle: Path) -> None:
    ended = mistralc("bench", plain_bundle, "--positions", 10 * CONTEXT)
    refused(ended, f"ended at {CONTEXT} tokens of {10 * CONTEXT}", "--window")
