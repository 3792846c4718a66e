"""Which texts verification and the quality gate read: fewer and shorter for a large model.

Knows nothing about sessions or the reference, and imports no torch, so that an estimate can count
the tokens before anything is loaded. What an export leaves out is named in the manifest's records
and in `report/verify.md`; `mistralc verify` and `mistralc eval` read as much as they are asked to.
"""

from dataclasses import dataclass

from graphs.build import Build

SHORT = 160  # tokens of the longest case in a short verification: two turns of a 64-slot ring
LENGTH = 512  # tokens of a window of the quality gate
WINDOWS = 4  # of the text: seconds for a small model
LEAST_LENGTH = 128
"""Tokens of the shortest window. SmolLM2 in 4 bits (blocks of 128, no zero points) lost 77% of its
perplexity on 32 of them, with a standard deviation of 25%: one tells a loss to within a third."""

VERIFY_WORK = 1.5e12
GATE_WORK = 3.75e12
"""Weights times tokens that an export reads with the reference, at most, before it shortens.

The reference takes 2 operations for each in float32: 7.5 trillion take 75 s on 2 cores. Mistral-7B
reads one window of 512 tokens, and models of up to 1.8 billion weights all four.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Turns of these lengths, each fed at once unless it is a single token."""

    name: str
    turns: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Length of the whole text."""
        return sum(self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A case that a short verification does not run, and the reason in words."""

    case: str
    tokens: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GateText:
    """How much the gate reads: `windows` of `length` tokens, and why, if less than usual."""

    windows: int
    length: int
    shortened: str | None = None

    @property
    def tokens(self) -> int:
        """Predictions that are made: the last token of a window is not read."""
        return self.windows * (self.length - 1)


def cases(build: Build, *, short: bool) -> list[Case]:
    """Return the lengths at which a window or a ring can go wrong: W-1, W, W+1, 2W+3, and turns.

    Without a window the chunk takes its place. `short` is for export; see `cases_left_out`.
    """
    wanted = _fitting(build)
    if short:
        left_out = {one.case for one in cases_left_out(build)}
        wanted = [case for case in wanted if case.name not in left_out]
    if not any(case.name == "turns" for case in wanted):
        room = SHORT if build.spec.slides else min(SHORT, build.ring.context)
        turns = (room // 2, 1, 1, room // 4) if room > 5 else (1,) * room
        wanted.append(Case(name="turns", turns=turns))
    return wanted


def cases_left_out(build: Build) -> list[LeftOut]:
    """Return what a short verification leaves out.

    Texts of more than 160 tokens. For a large model also those of W-1, W and W+1 tokens, if 2W+3 is
    run: all its positions are compared, and those are among them.
    """
    whole = _fitting(build)
    why = f"longer than {SHORT} tokens; `mistralc verify` runs it"
    found = {c.name: LeftOut(case=c.name, tokens=c.tokens, why=why) for c in whole
             if c.tokens > SHORT}  # fmt: skip
    kept = [case for case in whole if case.name not in found]
    weights = build.spec.num_parameters
    if weights * sum(case.tokens for case in kept) > VERIFY_WORK:
        covering = next((case for case in kept if case.name.startswith("2")), None)
        for case in kept:
            if covering is not None and case.name not in (covering.name, "turns"):
                why = f"{covering.name} has the same positions, and {weights:,} weights are slow"
                found[case.name] = LeftOut(case=case.name, tokens=case.tokens, why=why)
    return list(found.values())


def gate_text(build: Build) -> GateText:
    """Return how much the quality gate reads: 4 windows of 512 tokens, or what is affordable."""
    spec = build.spec
    length = LENGTH if spec.slides else min(LENGTH, build.ring.context)
    affordable = int(GATE_WORK / spec.num_parameters)  # tokens
    if affordable >= WINDOWS * length:
        return GateText(windows=WINDOWS, length=length)
    shorter = min(length, max(LEAST_LENGTH, affordable // 64 * 64))
    return GateText(
        windows=max(1, affordable // length),
        length=shorter,
        shortened=f"{WINDOWS} windows of {length} tokens are read for a model of up to "
        f"{GATE_WORK / (WINDOWS * length) / 1e9:.1f} billion weights; this one has "
        f"{spec.num_parameters / 1e9:.1f} billion",
    )


def _fitting(build: Build) -> list[Case]:
    """All cases that the ring has room for."""
    window = next((size for size in build.spec.windows if size is not None), None)
    unit = build.ring.chunk if window is None else window
    letter = "chunk" if window is None else "W"
    every = [
        Case(name=f"{letter}-1", turns=(unit - 1,)),
        Case(name=letter, turns=(unit,)),
        Case(name=f"{letter}+1", turns=(unit + 1,)),
        Case(name=f"2{letter}+3", turns=(2 * unit + 3,)),
        Case(name="turns", turns=(unit // 2 + 1, *[1] * 5, unit // 2 + 7, *[1] * 5)),
    ]
    endless, context = build.spec.slides, build.ring.context
    return [case for case in every if case.tokens > 0 and (endless or case.tokens <= context)]
