"""The Triton model repository: what is written, and that its model answers as the bundle does.

Triton itself is not here; a stand-in for its Python backend calls the model
(tests/support/cluster/triton_host.py).
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.bundle import triton_repository
from exporter.bundle.staging import list_files
from graphs.errors import MistralcError, UsageError
from graphs.manifest import read_manifest
from runtime.bundle.open import open_bundle
from tests.conftest import Command
from tests.support.cluster.triton_config import parse

HOST = Path(__file__).parents[1] / "support" / "cluster" / "triton_host.py"


@pytest.fixture(scope="module")
def model(sliding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory in a repository around `sliding_bundle`."""
    return triton_repository.write_repository(
        sliding_bundle, tmp_path_factory.mktemp("triton") / "models"
    )


def config_of(model: Path) -> dict[str, Any]:
    """`config.pbtxt` as the JSON that Triton hands to models."""
    return parse((model / "config.pbtxt").read_text(encoding="utf-8"))


def run(model: Path, *requests: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Load the model in a process without our packages, ask, unload; what the host printed."""
    requested = [
        {"inputs": {k: v for k, v in one.items() if k != "cancel_after"}, **one} for one in requests
    ]
    asked = {"config": config_of(model), "requests": requested, **more}
    done = subprocess.run(
        [sys.executable, HOST, model], input=json.dumps(asked), capture_output=True, text=True,
        cwd=model, env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def text_of(responses: list[dict[str, str]]) -> str:
    return "".join(response["text"] for response in responses)


def test_the_repository_has_a_configuration_a_model_and_a_whole_copy(
    model: Path, sliding_bundle: Path
) -> None:
    files = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    listed = read_manifest(sliding_bundle).files
    copies = {f"1/bundle/{name}" for name in (*listed, "manifest.json")}
    assert files == {"config.pbtxt", "1/model.py"} | copies
    assert not any(path.is_symlink() for path in model.rglob("*"))
    open_bundle(model / "1" / "bundle")


def test_the_configuration_is_a_model_config_in_text_format(model: Path) -> None:
    config = config_of(model)
    assert (config["name"], config["backend"]) == (model.name, "python")
    assert config["model_transaction_policy"] == {"decoupled": True}
    assert config["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    assert {one["name"]: one["data_type"] for one in config["input"]} == {
        name: f"TYPE_{kind}" for name, (kind, _) in triton_repository.INPUTS.items()
    }
    assert all(one["optional"] for one in config["input"])
    assert [one["name"] for one in config["output"]] == list(triton_repository.OUTPUTS)
    for target, kind in (("cpu", "KIND_CPU"), ("cuda", "KIND_GPU"), ("rtx", "KIND_GPU")):
        manifest = replace(read_manifest(model / "1" / "bundle"), target=target)
        (group,) = parse(triton_repository.config('a "name" of ünusual kind', manifest))[
            "instance_group"
        ]
        assert group["kind"] == kind


def test_parameters_that_are_the_backends_own_may_be_added(model: Path) -> None:
    config = config_of(model)
    config["parameters"]["EXECUTION_ENV_PATH"] = {"string_value": "/srv/python.tar.gz"}
    (served,) = run(model, {"prompt": "x", "max_tokens": 1}, config=config)["responses"]
    assert served[-1]["finish_reason"] in ("stop", "length")


def test_requests_stream_the_text_that_the_bundle_generates_and_stay_apart(
    model: Path, sliding_bundle: Path, mistralc: Command
) -> None:
    prompts = ["The ring turns", "Once upon a time", "x"]
    asked = [{"prompt": prompt, "max_tokens": 24, "temperature": 0.0} for prompt in prompts]
    result = run(model, *asked)
    assert result["runtime"].startswith(str(model / "1" / "bundle" / "run.pyz"))
    for prompt, responses in zip(prompts, result["responses"], strict=True):
        alone = json.loads(
            mistralc("generate", sliding_bundle, prompt, "-n", 24, "-t", 0, "--json").out
        )
        assert text_of(responses) == alone["text"]
        reasons = [response["finish_reason"] for response in responses]
        assert reasons == [""] * (len(reasons) - 1) + [alone["finish_reason"]]
    assert max(map(len, result["responses"])) > 2, "nothing was streamed"


def test_seeds_chats_and_stop_strings_work_as_in_generate(
    model: Path, sliding_bundle: Path, mistralc: Command
) -> None:
    sampled = {"prompt": "The ring", "max_tokens": 16, "temperature": 1.0, "seed": 7}
    chat = {"messages": json.dumps([{"role": "user", "content": "Hi"}]), "max_tokens": 8,
            "temperature": 0.0}  # fmt: skip
    twice, again, answer = run(model, sampled, sampled, chat)["responses"]
    assert text_of(twice) == text_of(again)
    alone = ("generate", sliding_bundle, "Hi", "--chat", "-n", 8, "-t", 0, "--json")
    assert text_of(answer) == json.loads(mistralc(*alone).out)["text"]
    text = text_of(twice)
    stop = text[4:6]
    (stopped,) = run(model, sampled | {"stop": [stop, "\0never"]})["responses"]
    assert text_of(stopped) == text[: text.index(stop)]
    assert stopped[-1]["finish_reason"] == "stop"


def test_a_request_that_cannot_be_served_gets_one_error_and_others_go_on(model: Path) -> None:
    good = {"prompt": "The ring", "max_tokens": 4}
    *bad, served = run(
        model, {"prompt": "x", "messages": "[]"}, {}, {"messages": "{"},
        {"messages": '[{"role": "user", "content": 1}]'}, {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "temperature": -1.0}, {"prompt": "x", "stop": [""]}, {"prompt": []}, good,
    )["responses"]  # fmt: skip
    said = ["prompt or messages", "prompt or messages", "messages is", "messages is",
            "max_tokens is 0", "temperature is -1.0", "stop string is empty",
            "prompt or messages"]  # fmt: skip
    for responses, words in zip(bad, said, strict=True):
        assert len(responses) == 1
        assert words in responses[0]["error"]
        assert responses[0]["code"] == "INVALID_ARG"
    assert served[-1]["finish_reason"] in ("stop", "length")


def test_a_request_beyond_the_limit_is_told_to_try_again(model: Path) -> None:
    config = config_of(model)
    config["parameters"]["max_waiting"]["string_value"] = "0"
    (refused,) = run(model, {"prompt": "x"}, config=config)["responses"]
    assert [response["code"] for response in refused] == ["UNAVAILABLE"]


def test_a_cancelled_request_ends_long_before_its_tokens_do(
    sliding_bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    bundle = copy_of(sliding_bundle)  # with no token that ends a text
    (bundle / "generation_config.json").write_text('{"eos_token_id": []}', encoding="utf-8")
    manifest = replace(read_manifest(bundle), files=list_files(bundle))
    (bundle / "manifest.json").write_text(manifest.to_text(), encoding="utf-8")
    model = triton_repository.write_repository(bundle, tmp_path / "models")
    left, served = run(
        model, {"prompt": "The ring", "max_tokens": 4096, "cancel_after": 1},
        {"prompt": "The ring", "max_tokens": 64},
    )["responses"]  # fmt: skip
    assert left[-1]["code"] == "CANCELLED"
    assert served[-1]["finish_reason"] == "length"


def test_unloading_lets_what_runs_finish(model: Path) -> None:
    request = {"prompt": "The ring", "max_tokens": 32, "temperature": 0.0}
    early = run(model, request, unload_at_once=True)["responses"]
    assert early == run(model, request)["responses"]


def test_a_damaged_copy_is_refused_when_it_is_loaded(
    model: Path, copy_of: Callable[[Path], Path]
) -> None:
    copy = copy_of(model)
    with (copy / "1" / "bundle" / "tokenizer.json").open("r+b") as file:
        file.write(b" ")
    asked = json.dumps({"config": config_of(copy), "requests": []})
    done = subprocess.run([sys.executable, HOST, copy], input=asked, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TritonModelException" in done.stderr
    assert "tokenizer.json" in done.stderr


def test_nothing_is_replaced_and_nothing_is_left_of_a_bundle_that_cannot_be_used(
    sliding_bundle: Path, copy_of: Callable[[Path], Path], tmp_path: Path, mistralc: Command
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    for destination in (taken, taken / "file"):
        with pytest.raises(UsageError, match="not an empty directory"):
            triton_repository.write_repository(sliding_bundle, destination)
    old = copy_of(sliding_bundle)
    with zipfile.ZipFile(old / "run.pyz", "w"):
        pass
    with pytest.raises(MistralcError, match=r"run\.pyz"):
        triton_repository.write_repository(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    ended = mistralc("triton", sliding_bundle, "-o", taken)
    assert (ended.code, "not an empty directory" in ended.err) == (2, True)


def test_export_writes_a_repository_beside_the_bundle(
    sliding_checkpoint: Path, tmp_path: Path, mistralc: Command
) -> None:
    bundle, repository = tmp_path / "tiny-cpu", tmp_path / "models"
    ended = mistralc("export", sliding_checkpoint, "-o", bundle, "--triton", repository, "-q")
    assert ended.code == 0, ended.err
    open_bundle(repository / "tiny-cpu" / "1" / "bundle")
    again = mistralc("export", sliding_checkpoint, "-o", tmp_path / "b", "--triton", repository)
    assert again.code == 2
    assert not (tmp_path / "b").exists(), "it was exported before the repository was refused"
