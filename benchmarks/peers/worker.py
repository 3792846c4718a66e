"""Run one engine in its own process for `benchmarks.peers.compare`.

    python benchmarks/peers/worker.py ENGINE MODEL THREADS

Reads requests and prints answers, one JSON object per line, after a first line with the engine's
version. An engine is imported only in its own process, so each may have its own environment. Times
are those of the engine's Python interface: greedy, token ids in and out, without a tokenizer.

    {"do": "time", "prompt": [ids], "count": n}   {"prefill": s, "decode": s, "tokens": [ids]}
    {"do": "score", "windows": [[ids]]}           {"nll": nats a token}
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

CONTEXT = 1024


class Engine(Protocol):
    """What every engine provides: greedy tokens one by one, and logits of a whole text."""

    version: str

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Yield `count` greedy tokens after the prompt, starting from an empty cache."""

    def logits(self, ids: Sequence[int]) -> Any:
        """Return the logits [n, V] after each of `ids`, or None if the engine has none."""


class Mistralc:
    """mistralc: a bundle on ONNX Runtime CPU."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime

        from runtime.load import load

        self.version = f"onnxruntime {onnxruntime.__version__}"
        self._generator = load(Path(model), threads=threads).generator

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        from runtime.decoding.sampling import SamplingParams

        generator = self._generator
        generator.rewind(0)
        greedy = SamplingParams(temperature=0)
        for one in generator.generate(generator.feed(prompt), greedy, max_new_tokens=count):
            yield one.token_id

    def logits(self, ids: Sequence[int]) -> Any:
        generator = self._generator
        generator.rewind(0)
        pieces = generator.sequence.feed(np.array(ids, np.int64), np.arange(len(ids)))
        return np.concatenate([piece.logits.copy() for piece in pieces])


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._api, self._model, self._threads = llama_cpp, model, threads
        self._llama = self._load(every=False)

    def _load(self, *, every: bool) -> Any:
        return self._api.Llama(
            self._model, n_ctx=CONTEXT, n_batch=512, n_ubatch=512, n_threads=self._threads,
            n_threads_batch=self._threads, logits_all=every, verbose=False,
        )  # fmt: skip

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        llama, ids = self._llama, list(prompt)
        llama.reset()
        for _ in range(count):
            llama.eval(ids)
            row = self._api.llama_get_logits_ith(llama._ctx.ctx, -1)
            ids = [int(np.ctypeslib.as_array(row, (llama.n_vocab(),)).argmax())]
            yield ids[0]

    def logits(self, ids: Sequence[int]) -> Any:
        llama = self._load(every=True)
        llama.eval(list(ids))
        return np.array(llama.scores[: len(ids)])


class Genai:
    """onnxruntime-genai; MODEL is a directory of its model builder."""

    def __init__(self, model: str, threads: int) -> None:
        import onnxruntime_genai as genai

        self.version = f"onnxruntime-genai {genai.__version__}"
        config = genai.Config(model)
        options = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._api, self._model = genai, genai.Model(config)
        self._pruned = Path(model).name.endswith("pruned")

    def _generator(self) -> Any:
        params = self._api.GeneratorParams(self._model)
        params.set_search_options(max_length=CONTEXT, do_sample=False)
        return self._api.Generator(self._model, params)

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        generator = self._generator()
        generator.append_tokens(np.array(prompt, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def logits(self, ids: Sequence[int]) -> Any:
        if self._pruned:
            return None
        generator = self._generator()
        generator.append_tokens(np.array(ids, np.int32))
        return generator.get_output("logits")[0]


class Transformers:
    """Hugging Face transformers; MODEL is a directory and a type, as in `hf:bfloat16`."""

    def __init__(self, model: str, threads: int) -> None:
        import torch
        import transformers

        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        path, _, dtype = model.rpartition(":")
        torch.set_num_threads(threads)
        self._torch = torch
        loader = transformers.AutoModelForCausalLM
        self._model = loader.from_pretrained(path, dtype=getattr(torch, dtype)).eval()  # type: ignore[no-untyped-call]

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        ids, cache = self._torch.tensor([list(prompt)]), None
        for _ in range(count):
            with self._torch.inference_mode():
                out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)

    def logits(self, ids: Sequence[int]) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.tensor([list(ids)])).logits[0].float().numpy()


class OpenVino:
    """OpenVINO GenAI; MODEL is a GGUF file or a directory."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino_genai

        self.version = f"openvino-genai {openvino_genai.__version__}"
        self._api = openvino_genai
        self._pipe = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        import openvino

        row = openvino.Tensor(np.array([prompt], np.int64))
        inputs = self._api.TokenizedInputs(row, openvino.Tensor(np.ones_like(row.data)))
        times: list[float] = []

        class Clock(self._api.StreamerBase):  # type: ignore[misc, name-defined]
            def write(self, token: Any) -> Any:
                times.extend([perf_counter()] * (len(token) if isinstance(token, list) else 1))
                return openvino_genai_running

            def end(self) -> None:
                pass

        openvino_genai_running = self._api.StreamingStatus.RUNNING
        found = self._pipe.generate(
            inputs, max_new_tokens=count, do_sample=False, ignore_eos=True, streamer=Clock()
        )
        self.times = times
        yield from found.tokens[0]

    def logits(self, ids: Sequence[int]) -> Any:
        return None  # the pipeline does not expose logits


ENGINES: dict[str, Callable[[str, int], Engine]] = {
    "mistralc": Mistralc, "llama.cpp": LlamaCpp, "onnxruntime-genai": Genai,
    "transformers": Transformers, "openvino-genai": OpenVino,
}  # fmt: skip


def timed(engine: Engine, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Generate once; `prefill` is the time to the first token, `decode` that of the others."""
    began, found, times = perf_counter(), [], []
    for token in engine.tokens(prompt, count):
        found.append(token)
        times.append(perf_counter())
    times = getattr(engine, "times", times)
    return {"prefill": times[0] - began, "decode": times[-1] - times[0], "tokens": found}


def scored(engine: Engine, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Mean negative log-likelihood of every token but the first of each window, in nats."""
    total, count = 0.0, 0
    for ids in windows:
        logits = engine.logits(ids)
        if logits is None:
            return {"nll": None}
        rows = np.asarray(logits, np.float64)[:-1]
        top = rows.max(-1)
        norm = top + np.log(np.exp(rows - top[:, None]).sum(-1))
        total += float((norm - rows[np.arange(len(rows)), list(ids[1:])]).sum())
        count += len(rows)
    return {"nll": total / count}


def main() -> None:
    name, model, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # output of the engine itself goes to standard error
    os.dup2(2, 1)
    try:
        engine: Engine = ENGINES[name](model, int(threads))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return
    print(json.dumps({"version": engine.version}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "time":
                answer = timed(engine, request["prompt"], request["count"])
            else:
                answer = scored(engine, request["windows"])
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
