"""Real weights: SmolLM2-135M, 30 layers, against transformers reading the same file for itself.

transformers has its own reader for GGUF (its own names, its own un-permuting of Q and K), so
nothing of ours stands between the file and the reference. Deselect with `-m "not smollm2"`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from exporter.bundle import write_model
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import override_window
from exporter.model import load_decoder
from exporter.tokenizer import read_tokenizer
from exporter.trace import trace
from exporter.weights import write_weights
from graphs.pipeline import lower
from graphs.spec import ModelSpec, RingSpec
from runtime.generator import Generator
from runtime.ring import Ring
from runtime.sampling import SamplingParams
from runtime.session_ort import OrtSession
from tests import tiny

pytestmark = pytest.mark.smollm2

WINDOW, CHUNK, NEW_TOKENS = 64, 32, 400

PROMPT = """<|im_start|>system
You are a patient teacher. You answer at length and in plain words.<|im_end|>
<|im_start|>user
Tell me about the rivers of Europe: where the Danube, the Rhine, the Loire, the Vistula and the Po
rise, which countries and cities they pass, what was carried on them in the Middle Ages, and which
of them a small boat can still travel today from beginning to end. Then compare two of them as you
would for a child who has never seen a river: how wide they are, how fast the water runs in spring,
what lives in it, and what people on their banks are afraid of.<|im_end|>
<|im_start|>assistant
"""

TOLERANCE = 2e-4
"""What is promised. Logits reach 30 here, of which float32 keeps 2e-6, and 30 layers of sums in
another order were seen to move them by up to 7e-5.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The prompt, and the tokens that our runtime continued it with."""

    prompt: list[int]
    generated: list[int]

    @property
    def text(self) -> tiny.Ids:
        """What was written to the ring: all but the last token, which nothing follows."""
        return np.array(self.prompt + self.generated[:-1])


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    return open_checkpoint("smollm2")


@pytest.fixture(scope="session")
def spec(checkpoint: Checkpoint) -> ModelSpec:
    return override_window(checkpoint.spec, WINDOW)


@pytest.fixture(scope="session")
def session(
    checkpoint: Checkpoint, spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory
) -> OrtSession:
    """The exported graph and weights for `cpu`, with a sliding window."""
    directory: Path = tmp_path_factory.mktemp("smollm2")
    model = trace(spec, "float32")
    lower(model, spec, "cpu")
    write_weights(model, checkpoint, directory)
    write_model(model, directory)
    loaded = OrtSession(directory / "model.onnx", spec)
    (directory / "weights.safetensors").unlink()  # half a gigabyte, and it has been read
    return loaded


@pytest.fixture(scope="session")
def run(session: OrtSession, spec: ModelSpec, checkpoint: Checkpoint) -> Run:
    """400 tokens, greedily, from a prompt longer than two windows that is fed in chunks."""
    tokenizer = Tokenizer.from_str(read_tokenizer(checkpoint.path).tokenizer_json)
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False).ids
    assert len(prompt) > 2 * WINDOW, "the prompt is to slide and to take several chunks"
    generator = Generator(session, sliding_ring(spec), spec.vocab_size)
    logits = generator.feed(prompt)
    greedy = SamplingParams(temperature=0)
    steps = generator.generate(logits, greedy, max_new_tokens=NEW_TOKENS)
    return Run(prompt=prompt, generated=[step.token_id for step in steps])


def sliding_ring(spec: ModelSpec) -> Ring:
    return Ring(spec, RingSpec(chunk=CHUNK, context=1))


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> MistralForCausalLM:
    """transformers' model with its own reading of the file, and the window that we chose."""
    settings = load_gguf_checkpoint(str(checkpoint.path))["config"]
    for name in ("model_type", "_model_name_or_path"):
        settings.pop(name)
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(**settings))  # what the file calls itself
    read = load_gguf_checkpoint(str(checkpoint.path), return_tensors=True, model_to_load=names)
    model = MistralForCausalLM(
        MistralConfig(**settings, sliding_window=WINDOW, attn_implementation="eager")
    )
    result = model.load_state_dict(read["tensors"], strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], []), "it is tied"
    model.tie_weights()
    return model.eval()


@pytest.fixture(scope="session")
def expected(reference: MistralForCausalLM, run: Run) -> tiny.Logits:
    """The reference's logits at every position of the text that our runtime wrote."""
    with torch.inference_mode():
        ids = torch.from_numpy(run.text)[None]
        return reference(ids, use_cache=False).logits[0].numpy()


def test_greedy_text_is_identical_token_by_token_for_400_tokens(run: Run, expected: tiny.Logits):
    """By induction: after the same text the reference, too, takes the token that was taken.

    One pass over the finished text asks it for its choice at all 400 places. That is the text it
    would write itself, and cheaper than letting it.
    """
    assert len(run.generated) == NEW_TOKENS
    choices = expected[len(run.prompt) - 1 :].argmax(-1).tolist()
    parted = [at for at, (a, b) in enumerate(zip(run.generated, choices, strict=True)) if a != b]
    assert not parted, f"the texts part after {parted[0]} of {NEW_TOKENS} tokens"
    assert len(set(run.generated)) > 40, "a text of a few words again and again shows little"


def test_the_window_has_its_say_in_the_text(
    run: Run, expected: tiny.Logits, reference: MistralForCausalLM
):
    """Else the same text could have come from a model without a window."""
    reference.model.config.sliding_window = 10**6
    try:
        with torch.inference_mode():
            ids = torch.from_numpy(run.text[: 3 * WINDOW])[None]
            full = reference(ids, use_cache=False).logits[0].numpy()
    finally:
        reference.model.config.sliding_window = WINDOW
    differences = np.abs(full - expected[: 3 * WINDOW]).max(-1)
    assert (differences[:WINDOW] <= TOLERANCE).all(), "nothing is forgotten yet"
    assert (differences[WINDOW:] > 100 * TOLERANCE).all(), "the reference does not slide"


def test_our_graph_agrees_with_transformers_at_every_position(
    run: Run, expected: tiny.Logits, session: OrtSession, spec: ModelSpec
):
    steps = [len(run.prompt), *[1] * 60]
    ids = run.text[: sum(steps)]
    got = tiny.in_turns(session, sliding_ring(spec), ids, steps)
    rest = len(run.text) - len(ids)
    difference = float(np.abs(got - expected[: len(ids)]).max())
    print("ONNX", difference, np.abs(expected).max(), rest)
    assert difference <= TOLERANCE


def test_our_decoder_agrees_with_transformers_at_every_position(
    run: Run, expected: tiny.Logits, checkpoint: Checkpoint, spec: ModelSpec
):
    decoder = load_decoder(spec, checkpoint.tensor)
    ids = run.text[: 4 * WINDOW]
    difference = float(np.abs(tiny.at_once(decoder, ids) - expected[: len(ids)]).max())
    print("DEC", difference)
    assert difference <= TOLERANCE
