"""Measure the gain of prompt-lookup speculation on repetitive and on ordinary text.

    python -m benchmarks.prompt_lookup BUNDLE [--speculate 8]

Answers each prompt greedily, with and without speculation in turn. Prints the machine and a
Markdown table: tokens per second of both, their ratio, and whether the tokens were the same.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

from runtime.load import Loaded, load
from runtime.measure.bench import GREEDY, machine

CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    average = mean(values)
    total = 0
    for value in values:
        total += (value - average) ** 2
    return total / len(values)
"""
LOG = "".join(
    f"2026-11-0{day} 10:0{minute}:00 INFO worker-{minute} request finished in {minute}7 ms\n"
    for day in (1, 2)
    for minute in range(5)
)
REPETITIVE = {
    "edit a file": f"```python\n{CODE}```\n\n"
    "Add a function `deviation` to this file. Print the whole file.",
    "summarise a log": f"Summarise this log, line by line:\n\n{LOG}",
}
ORDINARY = {
    "explain": "Explain in a few paragraphs why the sky is blue.",
    "story": "Write a short story about a lighthouse keeper and a lost ship.",
    "list": "What should one see in Italy? Give reasons.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--speculate", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    loaded = load(arguments.bundle)
    print(json.dumps(machine()))
    print(
        "| | prompt | answer, tokens | without, tokens/s | with, tokens/s | ratio | same tokens |"
    )
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for kind, prompts in (("repetitive", REPETITIVE), ("ordinary", ORDINARY)):
        for name, text in prompts.items():
            print(f"| {kind} | {name} | {row(loaded, text, arguments)} |", flush=True)


def row(loaded: Loaded, text: str, arguments: argparse.Namespace) -> str:
    """Answer one prompt without and with speculation in turn; return the table's figures."""
    ids = loaded.tokenizer.encode_chat([{"role": "user", "content": text}])
    rates: dict[int, list[float]] = {0: [], arguments.speculate: []}
    answers: dict[int, list[int]] = {}
    for _ in range(arguments.rounds + 1):
        for speculate, found in rates.items():
            rate, answers[speculate] = answer(loaded, ids, speculate, arguments.new_tokens)
            found.append(rate)
    plain, speculative = (median(found[1:]) for found in rates.values())
    same = "yes" if answers[0] == answers[arguments.speculate] else "no"
    ratio = speculative / plain
    return f"{len(answers[0])} | {plain:.0f} | {speculative:.0f} | {ratio:.2f} | {same}"


def answer(loaded: Loaded, ids: list[int], speculate: int, count: int) -> tuple[float, list[int]]:
    """Tokens per second after the first token, and all tokens."""
    generator = loaded.generator
    generator.rewind(0)
    steps = generator.generate(
        generator.feed(ids), GREEDY, max_new_tokens=count,
        stop_ids=loaded.tokenizer.stop_ids, speculate=speculate,
    )  # fmt: skip
    tokens = [next(steps).token_id]
    began = perf_counter()
    tokens += [one.token_id for one in steps]
    return (len(tokens) - 1) / (perf_counter() - began), tokens


if __name__ == "__main__":
    main()
