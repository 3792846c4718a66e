"""A bundle as a model of lm-evaluation-harness, which only `mistralc[eval]` installs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.evaluation.multiple_choice import measure_accuracy, read_questions
from graphs.errors import MistralcError
from runtime.completion import Completion, Limits
from runtime.decoding.sampling import SamplingParams
from runtime.load import load
from tests.conftest import CONTEXT
from tests.support import tiny
from tests.support.make_checkpoint import tiny_spec

pytest.importorskip(
    "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mistralc[eval]'"
)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from calib.evaluation.lm_eval_adapter import BundleModel

BOS = 1
LONG = "The ring turns and turns. " * 12  # longer than the plain bundle's context
TOLERANCE = 1e-4  # a sum of up to 300 float32 log-probabilities, each within 1e-6 (summation order)


@pytest.fixture(scope="module")
def sliding(sliding_bundle: Path) -> BundleModel:
    return BundleModel(str(sliding_bundle), threads=1)


@pytest.fixture(scope="module")
def plain(plain_bundle: Path) -> BundleModel:
    return BundleModel(str(plain_bundle), threads=1)


def requests(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=one, idx=i)
        for i, one in enumerate(arguments)
    ]


def by_hand(ids: list[int], start: int, window: int | None = None) -> tuple[float, bool]:
    """Return the log-likelihood of ids[start:] in one pass, and whether all are greedy."""
    logits = tiny.at_once(tiny.decoder(tiny_spec(window=window)), np.array(ids))[start - 1 : -1]
    wide = logits.astype(np.float64)
    wide -= np.logaddexp.reduce(wide, axis=-1, keepdims=True)
    log = np.take_along_axis(wide, np.array(ids)[start:, None], -1).sum()
    return float(log), bool((wide.argmax(-1) == ids[start:]).all())


def test_the_harness_finds_the_model_by_name():
    assert get_model("mistralc") is BundleModel


def test_likelihoods_are_those_of_one_pass(sliding: BundleModel):
    pairs = [("The ring", " turns"), ("The ring", " stands"), ("", "The"), (LONG, "on"),
             ("space ", "moves"), ("The ring", " turns")]  # fmt: skip
    found = sliding.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (log, greedy) in zip(pairs, found, strict=True):
        ids = sliding.tok_encode(context + continuation)
        assert ids[0] == BOS
        start = 1 + len(context.rstrip())  # a token for each byte; spaces go to the continuation
        expected = by_hand(ids, start, window=8)
        assert log == pytest.approx(expected[0], abs=TOLERANCE)
        assert greedy == expected[1]
    assert found[0] == found[-1]


def test_a_context_that_is_too_long_loses_its_beginning(plain: BundleModel):
    ((log, _),) = plain.loglikelihood(requests((LONG, "on")), disable_tqdm=True)
    ids = plain.tok_encode(LONG + "on")[-(CONTEXT + 1) :]
    assert log == pytest.approx(by_hand(ids, CONTEXT + 1 - 3)[0], abs=TOLERANCE)


def test_a_model_with_a_window_reads_a_whole_text_at_once(sliding: BundleModel):
    assert sliding.loglikelihood_rolling(requests(("",)), disable_tqdm=True) == [0]
    (log,) = sliding.loglikelihood_rolling(requests((LONG,)), disable_tqdm=True)
    assert log == pytest.approx(by_hand(sliding.tok_encode(LONG), 1, window=8)[0], abs=TOLERANCE)


def test_a_model_without_a_window_reads_a_long_text_in_pieces(plain: BundleModel):
    (log,) = plain.loglikelihood_rolling(requests((LONG,)), disable_tqdm=True)
    ids = plain.tok_encode(LONG)  # BOS first: every token after it is predicted once
    done, expected = 1, 0.0
    while done < len(ids):
        end = min(done + CONTEXT, len(ids))
        begin = max(0, end - 1 - CONTEXT)  # as much context as fits
        expected += by_hand(ids[begin:end], done - begin)[0]
        done = end
    assert log == pytest.approx(expected, abs=TOLERANCE)


def test_answers_equal_those_of_the_runtime(sliding: BundleModel, sliding_bundle: Path):
    loaded = load(sliding_bundle, threads=1)

    def answer(text: str, count: int, temperature: float = 0.0, **more: Any) -> str:
        params = SamplingParams(temperature=temperature, **more)
        ids, limits = loaded.tokenizer.encode(text), Limits(max_new_tokens=count)
        return "".join(Completion(loaded.generator, loaded.tokenizer, ids, params, limits))

    whole = answer("The ring", 60)
    stop = whole[20:23]
    cases = [
        ({}, answer("The ring", 256)),
        ({"max_gen_toks": 60, "until": []}, whole),
        ({"max_gen_toks": 60, "until": stop}, whole[: whole.index(stop)]),
        ({"max_gen_toks": 60, "until": ["", "never there", stop]}, whole[: whole.index(stop)]),
        ({"max_gen_toks": 60, "do_sample": False, "temperature": 2.0}, whole),
        ({"max_gen_toks": 30, "do_sample": True, "seed": 3}, answer("The ring", 30, 1.0, seed=3)),
    ]
    found = sliding.generate_until(
        requests(*(("The ring", s) for s, _ in cases)), disable_tqdm=True
    )
    assert found == [expected for _, expected in cases]


def test_a_long_prompt_loses_its_beginning_to_make_room_for_the_answer(
    plain: BundleModel, plain_bundle: Path
):
    (found,) = plain.generate_until(requests((LONG, {"max_gen_toks": 20})), disable_tqdm=True)
    loaded = load(plain_bundle, threads=1)
    ids = loaded.tokenizer.encode(LONG)[-(CONTEXT - 20) :]
    limits, greedy = Limits(max_new_tokens=20), SamplingParams(temperature=0.0)
    expected = Completion(loaded.generator, loaded.tokenizer, ids, greedy, limits)
    assert found == "".join(expected)
    assert found


def test_a_chat_keeps_its_control_tokens(sliding: BundleModel):
    chat = [{"role": "user", "content": "hi <s>"}]
    text = sliding.apply_chat_template(chat)
    ids = sliding.tok_encode(text)
    assert ids.count(BOS) == 1, "the template's own"
    ((log, _),) = sliding.loglikelihood(requests((text, " yes")), disable_tqdm=True)
    whole = [*ids, *sliding.tok_encode(" yes", add_special_tokens=False)]
    assert log == pytest.approx(by_hand(whole, len(ids), window=8)[0], abs=TOLERANCE)
    with pytest.raises(MistralcError, match="without --apply_chat_template"):
        sliding.apply_chat_template(chat, add_generation_prompt=False)


def test_a_task_has_the_accuracy_that_eval_reports(
    sliding: BundleModel, sliding_bundle: Path, tmp_path: Path
):
    lines = [
        {"question": "The ring turns", "choices": ["a", "bc de", "fghijklmno"], "answer": 2},
        {"question": "Zwei und", "choices": ["drei", "4"], "answer": 0},
        {"question": "Once", "choices": ["upon a time", "more"], "answer": 1},
        {"question": "x y", "choices": ["z", "and so on"], "answer": 0},
    ]
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task = {
        "task": "tiny", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    }  # fmt: skip
    found = simple_evaluate(sliding, tasks=[task], bootstrap_iters=0)["results"]["tiny"]
    loaded = load(sliding_bundle, threads=1)
    expected = measure_accuracy(
        loaded.session, loaded.bundle.manifest.build, loaded.tokenizer, read_questions(file)
    )
    assert found["acc,none"] == expected.accuracy
    assert found["acc_norm,none"] == expected.normalized
    assert not math.isnan(found["acc,none"])
