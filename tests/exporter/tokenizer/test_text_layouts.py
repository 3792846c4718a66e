"""Every layout of tokenizer files against the program that defines it; see `text_layouts.py`."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers

from exporter.checkpoint.gguf_file import read_gguf
from exporter.checks import text_references
from exporter.checks.text_agreement import Difference, compare_text, examine
from exporter.checks.text_references import Missing, references
from exporter.checks.text_samples import chats, strings
from exporter.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from exporter.tokenizer.read import TokenizerFiles, read_tokenizer, require_rows
from exporter.tokenizer.text_files import read_text_files
from exporter.tokenizer.transformers_rules import has_wrong_split, with_mistral_split
from graphs.errors import MistralcError
from tests.support import text_layouts, text_vocabularies
from tests.support.text_layouts import LAYOUTS
from tests.support.text_vocabularies import PIECES, STRINGS, Vocabularies, plain
from tests.support.vocabularies import SENTENCEPIECE

Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Vocabularies:
    return text_vocabularies.train(tmp_path_factory.mktemp("vocabularies"))


@pytest.fixture(scope="module")
def made(vocabularies: Vocabularies, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(name)` writes that layout into a directory of its own."""

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        LAYOUTS[name](vocabularies, folder)
        return folder

    return write


def test_there_are_300_strings_and_30_chats() -> None:
    assert len(strings()) == len(set(strings())) == 300
    assert len(chats()) == len(set(map(str, chats()))) == 30
    assert len(plain()) == STRINGS


@pytest.mark.parametrize("name", LAYOUTS)
def test_ids_of_320_strings_and_20_chats_or_more_equal_the_checkpoints_own_tooling(
    made: Made, name: str
) -> None:
    folder = made(name)
    ours = read_tokenizer(folder).open()
    found = examine(folder, ours).agreed
    assert found, "the program that defines the layout is installed in CI"
    for reference in (one.reference for one in found):
        for text in plain():
            ids = ours.encode(text, add_bos=reference.with_bos)
            assert ids == list(reference.encode(text)), repr(text)
    most = max(one.chats for one in found)
    assert most == (20 if name == "gemma2" else 30)  # Gemma's template refuses system messages


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_of_every_file_is_in_the_bundle_at_its_id(made: Made, name: str) -> None:
    folder = made(name)
    ours = json.loads(read_tokenizer(folder).tokenizer_json)
    ids = {entry["content"]: entry["id"] for entry in ours["added_tokens"]}
    for text, i in _declared(folder):
        assert ids[text] == i


def _declared(folder: Path) -> Iterator[tuple[str, int]]:
    for file in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        yield from content.items() if file == "added_tokens.json" else ()
        yield from (
            (e["content"], int(i)) for i, e in content.get("added_tokens_decoder", {}).items()
        )
        yield from ((entry["content"], entry["id"]) for entry in content.get("added_tokens", ()))


@pytest.mark.parametrize(
    "name", ["hermes", "hermes_not_legacy", "hermes_json", "older_json_with_decoder",
             "older_json_with_added_tokens", "named_only"],
)  # fmt: skip
def test_open_hermes_has_one_id_for_its_marks_and_stops_at_the_end_of_a_turn(
    made: Made, name: str
) -> None:
    ours = read_tokenizer(made(name)).open()
    start, end = (PIECES, PIECES + 1) if name == "named_only" else (PIECES + 1, PIECES)
    if name == "named_only":  # numbered in the order in which the settings name them
        start, end = PIECES + 1, PIECES
    ids = ours.encode_chat([{"role": "user", "content": "Hi <|im_start|> there"}])
    assert ids[0] == start
    assert ids.count(start) == 2, "the turn's and the answer's, not the user's"
    assert ids.count(end) == 1
    assert end in ours.stop_ids
    assert ours.decode([start, end]) == ""


def test_the_split_that_mistral_corrected_is_put_right_as_transformers_does(made: Made) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = made("llama3")
    _change(folder, "config.json", model_type="mistral")
    files = read_text_files(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    assert not has_wrong_split(files, document), "a vocabulary of 1,505 is not tekken's"
    document["model"]["vocab"] = dict.fromkeys(map(str, range(100_001)), 0)
    assert has_wrong_split(files, document)
    patched = PreTrainedTokenizerFast._patch_mistral_regex(
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")), str(folder),
        is_local=True, fix_mistral_regex=True,
    )  # fmt: skip
    ours = with_mistral_split(document)
    assert ours["pre_tokenizer"] == json.loads(patched.to_str())["pre_tokenizer"]
    assert not has_wrong_split(files, ours)
    _change(folder, "config.json", transformers_version="5.1.0")
    assert not has_wrong_split(read_text_files(folder), document)


def test_a_control_piece_that_a_fine_tune_renamed_has_its_new_name(tmp_path: Path) -> None:
    shutil.copy(SENTENCEPIECE["v3"], tmp_path / "tokenizer.model")
    tokens = text_layouts.decoder(text_layouts.entry(10, "<|im_start|>"))
    _change(tmp_path, "tokenizer_config.json", added_tokens_decoder=tokens)
    document = json.loads(read_tokenizer(tmp_path).tokenizer_json)
    renamed = next(entry for entry in document["added_tokens"] if entry["id"] == 10)
    assert (renamed["content"], renamed["special"]) == ("<|im_start|>", True)
    assert "[control_8]" not in document["model"]["vocab"]


def test_mistrals_chat_format_is_given_to_mistrals_models_only(made: Made) -> None:
    folder = made("hermes")
    _change(folder, "tokenizer_config.json", chat_template=None, legacy=None)
    files = read_tokenizer(folder)
    assert "[INST]" in files.tokenizer_config["chat_template"]
    chat = files.open().encode_chat([{"role": "user", "content": "Hi"}])
    assert chat == [1, *files.open().encode("[INST] Hi [/INST]", add_bos=False)]
    _change(folder, "config.json", model_type="llama")
    assert read_tokenizer(folder).tokenizer_config["chat_template"] is None


def test_thoughts_and_tool_calls_stay_visible(made: Made) -> None:
    folder = made("qwen2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(text_vocabularies.CHATML + "{# <tool_call> #}")
    assert "<tool_call>" not in settings.get("extra_special_tokens", ())
    ours = read_tokenizer(folder).open()
    ids = ours.encode("<tool_call>{}")
    assert ours.decode(ids) == "<tool_call>{}"
    assert len(ours.encode("<tool_call>")) == 1


# What cannot be carried over


def _change(folder: Path, file: str, **changes: Any) -> Path:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))
    return folder


def test_files_that_contradict_one_another_are_an_error(made: Made) -> None:
    folder = _change(made("hermes_json"), "added_tokens.json", **{"<|im_end|>": PIECES + 9})
    assert read_tokenizer(folder).tokenizer_config["eos_token_id"] == PIECES  # the decoder counts
    tokens = text_layouts.decoder(text_layouts.entry(PIECES + 7, "<|im_end|>"))
    _change(folder, "tokenizer_config.json", added_tokens_decoder=tokens)
    with pytest.raises(MistralcError, match=rf"two ids, {PIECES} and {PIECES + 7}; expected one"):
        read_tokenizer(folder)
    tokens = text_layouts.decoder(text_layouts.entry(PIECES, "<|other|>"))
    _change(folder, "tokenizer_config.json", added_tokens_decoder=tokens)
    with pytest.raises(MistralcError, match=rf"the id {PIECES} to two tokens"):
        read_tokenizer(folder)


def test_an_id_that_leaves_a_gap_is_kept(made: Made) -> None:
    tokens = text_layouts.decoder(text_layouts.entry(PIECES + 5, "<|late|>"))
    folder = made("older_json_with_added_tokens")
    (folder / "added_tokens.json").unlink()
    _change(folder, "tokenizer_config.json", added_tokens_decoder=tokens)
    files = read_tokenizer(folder)
    assert files.largest_id() == (PIECES + 7, "<|im_start|>")  # after it: those without an id
    with pytest.raises(MistralcError, match=r"expected a row for every token"):
        require_rows(files, PIECES + 2)


def test_a_tekken_file_beside_another_vocabulary_is_an_error(made: Made) -> None:
    folder = made("tekken_beside_wrong_json")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"] = dict(
        zip(document["model"]["vocab"], reversed(document["model"]["vocab"].values()), strict=True)
    )
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(MistralcError, match="expected the same vocabulary in both"):
        read_tokenizer(folder)


def test_a_post_processor_that_writes_more_than_bos_is_an_error(made: Made) -> None:
    folder = made("llama3")
    document = json.loads((folder / "tokenizer.json").read_text())
    single = document["post_processor"]["single"]
    document["post_processor"]["single"] = [single[0], *single]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(MistralcError, match="puts 2 tokens before every text"):
        read_tokenizer(folder)
    document["post_processor"]["single"] = [*single, single[0]]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    assert "puts an end of text after every text" in read_tokenizer(folder).notes[-1]


# The comparison at export


def _damaged(files: TokenizerFiles, **changes: Any) -> TokenizerFiles:
    document = json.loads(files.tokenizer_json) | changes
    return TokenizerFiles(
        tokenizer_json=json.dumps(document),
        tokenizer_config=files.tokenizer_config,
        generation_config=files.generation_config,
    )


def test_a_tokenizer_that_gives_other_ids_is_refused_with_an_example(made: Made) -> None:
    folder = made("llama3")
    files = read_tokenizer(folder)
    assert compare_text(folder, files)["strings"] == 300
    level = json.loads(files.tokenizer_json)["pre_tokenizer"]["pretokenizers"][1]
    wrong = _damaged(files, pre_tokenizer=level)
    with pytest.raises(MistralcError, match=r"gives other token ids for \d+ of 300 strings"):
        compare_text(folder, wrong)
    template = files.tokenizer_config["chat_template"].replace("| trim", "")
    other = TokenizerFiles(
        tokenizer_json=files.tokenizer_json, generation_config=files.generation_config,
        tokenizer_config={**files.tokenizer_config, "chat_template": template},
    )  # fmt: skip
    with pytest.raises(MistralcError, match="For example, of chat"):
        compare_text(folder, other)


def test_a_class_that_discards_a_part_of_the_file_is_overruled_and_named(made: Made) -> None:
    folder = made("smollm2")
    record = compare_text(folder, read_tokenizer(folder))
    assert "PreTrainedTokenizerFast" in record["compared_with"]
    assert re.search(
        r"AutoTokenizer \(GPT2Tokenizer\) gives other ids for \d+ of 330", record["overruled"][0]
    )


def test_the_record_says_that_nothing_was_compared(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(text_references.importlib, "import_module", absent)
    folder = made("granite")
    record = compare_text(folder, read_tokenizer(folder))
    assert record["compared_with"].startswith("nothing: transformers is not installed")
    assert (record["strings"], record["chats"]) == (0, 0)


def test_a_difference_shows_the_tokens_around_it() -> None:
    found = Difference(what="chat 3", expected=[1, 2, 3, 4], got=[1, 2, 3])
    assert str(found) == "of chat 3, tokens 1 to 7 are [2, 3] here and [2, 3, 4] there"
    assert str(Difference(what="chat 3", expected=[1], got=None)) == "chat 3 is refused here"


# GGUF, by llama.cpp's expressions as they stand in src/llama-vocab.cpp

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENGLISH = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UP, _LOW = r"((?=[\p{L}])([^a-z]))", r"((?=[\p{L}])([^A-Z]))"
_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
LLAMA_CPP = {
    "llama-bpe": ([rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}{_TAIL}"], True),
    "dbrx": ([rf"{_ENGLISH}|{_WORDS}|\p{{N}}{{1,3}}{_TAIL}"], False),
    "qwen2": ([rf"{_ENGLISH}|{_WORDS}|\p{{N}}{_TAIL}"], False),
    "tekken": (
        [rf"{_LEAD}{_UP}*{_LOW}+|{_LEAD}{_UP}+{_LOW}*|\p{{N}}{_SLASH}"], True,
    ),
    "gpt-4o": (
        [rf"{_LEAD}{_UP}*{_LOW}+{_ENGLISH}?|{_LEAD}{_UP}+{_LOW}*{_ENGLISH}?|\p{{N}}{{1,3}}{_SLASH}"],
        False,
    ),
    "smollm": ([r"\p{N}", _GPT2], False),
    "refact": ([r"\p{N}", _GPT2], False),
    "gpt-2": ([_GPT2], False),
    "default": ([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], False),
    None: ([r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], False),
}  # fmt: skip


def _by_hand(path: Path, splits: list[str], whole: bool) -> Callable[[str], list[int]]:
    metadata = read_gguf(path).metadata
    ids = {text: i for i, text in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(m.split(" ")): r for r, m in enumerate(metadata["tokenizer.ggml.merges"])}
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    letters = {byte: chr(byte if byte in kept else next(spare)) for byte in range(256)}

    def cut(pieces: list[str], split: str) -> list[str]:
        """What an expression matches, and what lies between, are pieces of their own."""
        found = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(split, piece):
                found += [piece[end : match.start()], match[0]]
                end = match.end()
            found.append(piece[end:])
        return [piece for piece in found if piece]

    def merge(word: str) -> list[int]:
        pieces = [letters[byte] for byte in word.encode()]
        if whole and "".join(pieces) in ids:
            return [ids["".join(pieces)]]
        while True:
            pairs = [(ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(pieces))]
            rank, i = min(pairs, default=(len(ranks), 0))
            if rank == len(ranks):
                return [ids[piece] for piece in pieces]
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

    def encode(text: str) -> list[int]:
        pieces = [text] if text else []
        for split in splits:
            pieces = cut(pieces, split)
        return [i for piece in pieces for i in merge(piece)]

    return encode


@pytest.mark.parametrize("pre", LLAMA_CPP)
def test_a_gguf_splits_text_by_llama_cpps_expressions(
    vocabularies: Vocabularies, tmp_path: Path, pre: str | None
) -> None:
    path = tmp_path / "model.gguf"
    text_vocabularies.write_bpe_gguf(vocabularies, path, pre)
    files = read_tokenizer(path)
    ours, splits = files.open(), LLAMA_CPP[pre]
    encode = _by_hand(path, *splits)
    for text in plain():
        assert ours.encode(text, add_bos=False) == encode(text), repr(text)
    assert files.tokenizer_config["add_bos_token"] is (pre in ("llama-bpe", "tekken"))
    assert bool(files.notes) is (pre is None)
    assert ours.stop_ids == {files.tokenizer_config["eos_token_id"], len(vocabularies.words) + 3}


_ORIGINAL = {
    "llama-bpe": text_layouts.LLAMA3_SPLIT,
    "qwen2": text_layouts.LLAMA3_SPLIT.replace("{1,3}", ""),
    "tekken": text_layouts.MISTRAL_SPLIT,
    "gpt-2": _GPT2 + r"|\s+",
}


@pytest.mark.parametrize("pre", _ORIGINAL)
def test_a_gguf_has_the_ids_of_the_original_tokenizer_on_text_without_rare_letters(
    vocabularies: Vocabularies, tmp_path: Path, pre: str
) -> None:
    # llama.cpp's expression for tekken knows neither capitals beyond ASCII nor combining marks.
    alike = [t for t in plain() if pre != "tekken" or not regex.search(r"[^\x00-\x7f]", t)]
    assert len(alike) > STRINGS // 3
    path = tmp_path / "model.gguf"
    text_vocabularies.write_bpe_gguf(vocabularies, path, pre)
    ours = read_tokenizer(path).open()
    original, _ = text_vocabularies.byte_level(vocabularies, _ORIGINAL[pre], ("<s>",))
    original.model.ignore_merges = PRE_TOKENIZERS[pre].whole_words
    for text in alike:
        assert ours.encode(text, add_bos=False) == original.encode(text).ids, repr(text)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_user_defined_chat_tokens_of_a_gguf_are_one_id_each(
    vocabularies: Vocabularies, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "model.gguf"
    if kind == "llama":
        text_vocabularies.write_sentencepiece_gguf(vocabularies, path)
        end, start = PIECES, PIECES + 1
    else:
        text_vocabularies.write_bpe_gguf(vocabularies, path, "qwen2")
        start, end = len(vocabularies.words) + 2, len(vocabularies.words) + 3
    ours = read_tokenizer(path).open()
    ids = ours.encode_chat([{"role": "user", "content": "Hi <|im_start|>"}])
    assert (ids[0], ids.count(start), ids.count(end)) == (start, 2, 1)
    assert end in ours.stop_ids
    found = list(references(path, ours))
    assert [one.why for one in found if isinstance(one, Missing)] in (
        [], ["llama-cpp-python is not installed"],
    )  # fmt: skip


def test_a_pre_tokenizer_that_is_not_known_is_named(
    vocabularies: Vocabularies, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    text_vocabularies.write_bpe_gguf(vocabularies, path, "kimi-k2")
    with pytest.raises(MistralcError, match="by the rules named 'kimi-k2'; expected one of `llama"):
        read_tokenizer(path)


def test_an_adapters_tokenizer_keeps_the_base_models_settings(made: Made, tmp_path: Path) -> None:
    base = made("hermes_json")
    (base / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.5}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).rename(tmp_path / name)
    files = read_tokenizer(tmp_path, base)
    assert files.generation_config["eos_token_id"] == [2, PIECES]
    assert files.generation_config["temperature"] == 0.5
    assert read_tokenizer(tmp_path).generation_config == {"eos_token_id": [PIECES]}
