"""Fuzz the inputs of calibration and evaluation: texts, questions, tables, work directories."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from hypothesis import strategies as st
from safetensors import SafetensorError

from calib.evaluation.multiple_choice import read_questions
from calib.layers.work_directory import LayerResult, WorkDirectory
from exporter.checkpoint.open import open_checkpoint
from exporter.checks.corpus import read_corpus
from exporter.decide import decide
from exporter.options import BuildOptions, QuantizeOptions
from exporter.quantization import calibration_table
from exporter.quantization.calibration_table import JSON_NAME, TENSORS_NAME, CalibrationTable
from exporter.quantization.make_recipe import (
    check_calibration,
    describe,
    make_recipe,
    weight_facts,
)
from exporter.quantization.recipe import INPUT_SCALE, SMOOTHING
from exporter.tokenizer.read import read_tokenizer
from graphs.precisions import PRECISIONS
from graphs.quant_scheme import SCALE, groups
from graphs.spec import ModelSpec
from graphs.targets import target_named
from tests.reliability.harness.damage import Draw, damaged_bytes, damaged_json
from tests.reliability.harness.target import Files, Folder, Prepared, Target
from tests.reliability.targets.checkpoints import PREAMBLE, small_spec
from tests.support.make_checkpoint import tiny_spec, write_checkpoint

LINES: tuple[dict[str, Any], ...] = (
    {"text": "It was a bright cold day in April."},
    {"messages": [{"role": "user", "content": "Hello é"}, {"role": "assistant", "content": "Hi"}]},
)
QUESTIONS = ({"question": "Two and two?", "choices": ["four", "five"], "answer": 0},)


def _lines(
    name: str, good: tuple[Any, ...], read: Callable[[Path], None]
) -> Callable[[Path], Prepared]:
    """A JSON lines file with one line edited as a tree, or the whole file edited as bytes."""

    @st.composite
    def cases(draw: Draw) -> Files:
        lines = [json.dumps(line).encode() for line in draw(st.lists(st.sampled_from(good)))]
        lines.append(draw(st.sampled_from(good).flatmap(damaged_json)))
        data = draw(st.sampled_from((b"\n", b"\r\n", b"\n\n", b"\r"))).join(lines)
        return {name: draw(damaged_bytes(data)) if draw(st.booleans()) else data}

    def prepare(folder: Path) -> Prepared:
        (folder / name).touch()
        return Prepared(
            cases=cases(),
            read=Folder(folder).reader(lambda it: read(it / name)),
            good={name: json.dumps(good[0]).encode()},
        )

    return prepare


def _corpus(folder: Path) -> Prepared:
    tokenizer = read_tokenizer(write_checkpoint(folder / "model", tiny_spec(hidden_size=16))).open()

    def read(path: Path) -> None:
        corpus = read_corpus([path], tokenizer, "evaluation")
        assert corpus.documents
        assert all(len(ids) and 0 <= ids.min() <= ids.max() < 320 for ids in corpus.documents)

    lines = _lines("text.jsonl", LINES, read)(folder)
    plain = (st.binary(max_size=300) | st.text(max_size=300).map(str.encode)).map(
        lambda data: {"text.txt": data}
    )
    folder_of_texts = Folder(folder)

    def read_one(case: Files) -> None:
        folder_of_texts.write(case)
        read(folder / next(iter(case)))

    return Prepared(cases=lines.cases | plain, read=read_one, good={"text.txt": b"It was cold."})


def _questions(path: Path) -> None:
    for question in read_questions(path):
        assert len(question.choices) >= 2
        assert 0 <= question.answer < len(question.choices)


def tensors_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The tensors of a SmoothQuant table: smoothing factors, row scales and input scales."""
    shapes, found = spec.weight_shapes(), {}
    for group in groups(spec):
        found[group.name + SMOOTHING] = torch.ones(shapes[group.readers[0]][1])
        found[group.name + INPUT_SCALE] = torch.tensor(0.5)
        found |= {name + SCALE: torch.full((shapes[name][0], 1), 0.01) for name in group.readers}
    return found


def _table(folder: Path) -> Prepared:
    """Damage that the table's checksums detect, and changes with recomputed checksums."""
    spec = small_spec()
    checkpoint = open_checkpoint(write_checkpoint(folder / "model", spec))
    table = CalibrationTable(
        precision="int8", method="smoothquant", checkpoint=checkpoint.fingerprint(),
        data={"source": "text"}, versions={"mistralc": "0.1.0"}, tensors=tensors_of(spec),
        schemes={n: calibration_table.Scheme(codes="int8", activation="int8")
                 for group in groups(spec) for n in group.readers},
    )  # fmt: skip
    path = folder / "table"
    path.mkdir()
    table.write(path)
    table_json, numbers = (
        json.loads((path / JSON_NAME).read_bytes()),
        (path / TENSORS_NAME).read_bytes(),
    )
    length = int.from_bytes(numbers[:PREAMBLE], "little")
    header, body = json.loads(numbers[8 : 8 + length]), numbers[8 + length :]

    @st.composite
    def cases(draw: Draw) -> Files:
        tensors = numbers
        if draw(st.booleans()):
            text = draw(damaged_json(header))
            tensors = len(text).to_bytes(PREAMBLE, "little") + text + body
        elif draw(st.booleans()):
            tensors = draw(damaged_bytes(numbers, [(0, PREAMBLE)]))
        data = (
            draw(damaged_json(table_json))
            if draw(st.booleans())
            else json.dumps(table_json).encode()
        )
        if draw(st.booleans()):
            data = _restamped(data, tensors)
        return {JSON_NAME: data, TENSORS_NAME: tensors}

    def read(it: Path) -> None:
        found = CalibrationTable.read(it)
        found.require(checkpoint.fingerprint(), "the checkpoint")
        for target in ("cpu", "rtx"):
            check_calibration(PRECISIONS["int8"], QuantizeOptions(), spec, found)
            facts = weight_facts(checkpoint, found)
            build = decide(spec, target_named(target), BuildOptions(precision="int8"), facts)
            recipe = make_recipe(build, checkpoint, found)
            json.dumps(describe(recipe, found))
            for name in spec.weight_shapes():
                weight = recipe.smoothed(name, checkpoint.tensor(name))
                if name in recipe.schemes:
                    recipe.quantized(name, weight)

    return Prepared(cases=cases(), read=Folder(path).reader(read))


def _restamped(data: bytes, tensors: bytes) -> bytes:
    """The table's JSON with recomputed checksums, if they can be computed."""
    try:
        value = json.loads(data)
        value.pop("sha256", None)
        value["tensors_sha256"] = calibration_table._sha256(safetensors.torch.load(tensors))
        return json.dumps(value | {"sha256": calibration_table._checksum(value)}).encode()
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError, SafetensorError):
        return data


def _work_directory(folder: Path) -> Prepared:
    """The decisions of a layer, from which an interrupted calibration resumes."""
    work = WorkDirectory(directory=folder)
    work.finish(0, LayerResult(tensors=tensors_of(small_spec()), facts={"kl": 0.5}), {})
    (file,) = folder.glob("layer-*")
    cases = damaged_bytes(file.read_bytes(), [(0, PREAMBLE)]).map(lambda data: {file.name: data})

    def read(it: Path) -> None:
        layer = WorkDirectory(directory=it).layer(0)
        assert isinstance(layer.facts, dict)

    return Prepared(cases=cases, read=Folder(folder).reader(read))


TARGETS = (
    Target(name="text and JSON lines", prepare=_corpus, examples=150),
    Target(name="questions", prepare=_lines("questions.jsonl", QUESTIONS, _questions), examples=60),
    Target(name="calibration table", prepare=_table, examples=120),
    Target(name="work directory of a stopped calibration", prepare=_work_directory, examples=60),
)
