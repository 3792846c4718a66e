"""Build the tokenizer of a directory from all of its text files. Reads no weights.

The ids are those of transformers' fast tokenizer, or of `mistral-common` where there is a tekken
vocabulary; see `transformers_rules.py` and `added_tokens.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporter.tokenizer import sentencepiece
from exporter.tokenizer.added_tokens import (
    check_settings,
    declared_tokens,
    named_tokens,
    read_entries,
    require_ids,
    text_of,
    with_tokens,
)
from exporter.tokenizer.bpe import AddedToken, document
from exporter.tokenizer.sentencepiece import PieceType
from exporter.tokenizer.source import Source, from_sentencepiece, read_source, to_json
from exporter.tokenizer.text_files import TextFiles, is_sentencepiece
from exporter.tokenizer.transformers_rules import (
    MISTRAL,
    as_llama,
    has_wrong_split,
    reads_as_llama,
    with_mistral_split,
)
from graphs.errors import MistralcError
from runtime.text.tokenizer import is_token_id, parse_tokenizer

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_directory(files: TextFiles) -> Source:
    """Return the tokenizer of a directory. Raises MistralcError if its files contradict another."""
    path = files.vocabularies[0]
    check_settings(files)
    source = _vocabulary(files, path)
    try:
        source = _completed(source, files, path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MistralcError(
            f"{path} cannot be read as a tokenizer ({type(error).__name__}: {error!s:.200}). A "
            "tokenizer.json of the `tokenizers` library is expected; the file is damaged or cut "
            "short: get it again."
        ) from error
    return _with_settings(source, files)


def _vocabulary(files: TextFiles, path: Path) -> Source:
    """Read the vocabulary: tekken's own file rather than its copy in tokenizer.json."""
    if path.name == "vocab.json":
        return _from_pairs(files, path)
    if is_sentencepiece(path.name):
        return _from_model(files, path)
    source = read_source(path)
    if path.name != "tokenizer.json" or files.tekken is None:
        return source
    own = read_source(files.tekken)
    _require_same(files, own, source)
    copied = read_entries(json.loads(source.tokenizer_json)["added_tokens"])
    merged = _with_missing(json.loads(own.tokenizer_json), copied)
    return replace(own, tokenizer_json=to_json(merged))


def _completed(source: Source, files: TextFiles, path: Path) -> Source:
    """Add the tokens of the other files, and apply transformers' rules."""
    original = json.loads(source.tokenizer_json)
    vocabulary = original["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        return source  # of a kind that cannot be decoded, which is reported when it is opened
    changed = original
    notes = list(source.notes)
    if reads_as_llama(files, original):
        changed = as_llama(changed, files.settings)
    elif has_wrong_split(files, original):
        if files.settings.get("fix_mistral_regex") is True:
            changed = with_mistral_split(changed)
        else:
            notes.append(
                "tokenizer.json does not split text as Mistral's tekken.json does; the bundle "
                "follows it, as transformers does. To split as in training, add tekken.json to the "
                "directory, or `fix_mistral_regex: true` to tokenizer_config.json"
            )
    listed = read_entries(original["added_tokens"])
    tokens = declared_tokens(files, vocabulary, listed)
    if [token.entry() for token in tokens] != [token.entry() for token in listed]:
        changed = with_tokens(changed, tokens)
    if changed is original:
        return replace(source, notes=tuple(notes))
    text = to_json(changed)
    require_ids(parse_tokenizer(text, str(path)), tokens, str(files.directory))
    return replace(source, tokenizer_json=text, notes=tuple(notes))


def _from_model(files: TextFiles, path: Path) -> Source:
    """Convert a SentencePiece model, with control pieces renamed as `added_tokens_decoder` says."""
    vocabulary = sentencepiece.read_model(path)
    decoder = files.settings.get("added_tokens_decoder")
    pieces = list(vocabulary.pieces)
    for key, entry in (decoder if isinstance(decoder, Mapping) else {}).items():
        i, text = int(key) if str(key).isdigit() else -1, text_of(entry)
        if not 0 <= i < len(pieces) or text is None or pieces[i].text == text:
            continue
        if pieces[i].type in (PieceType.CONTROL, PieceType.USER_DEFINED):
            pieces[i] = replace(pieces[i], text=text)
    return from_sentencepiece(path, replace(vocabulary, pieces=tuple(pieces)))


def _from_pairs(files: TextFiles, path: Path) -> Source:
    """Convert `vocab.json` and `merges.txt` as GPT2Tokenizer and Qwen2Tokenizer do."""
    kind = files.tokenizer_class
    if kind not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise MistralcError(
            f"{path.parent} has vocab.json and merges.txt for the tokenizer class {kind}; expected "
            "GPT2Tokenizer or Qwen2Tokenizer, or a tokenizer.json. Make one with transformers: "
            "`AutoTokenizer.from_pretrained(OLD).save_pretrained(NEW)`."
        )
    try:
        vocabulary = json.loads(path.read_bytes())
        lines = (path.parent / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise MistralcError(
            f"{path} or merges.txt beside it cannot be read ({error}). Download both again."
        ) from error
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    qwen2 = kind == "Qwen2Tokenizer"
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": bool(files.settings.get("add_prefix_space")),
        "trim_offsets": True, "use_regex": not qwen2,
    }  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}, "behavior": "Isolated"}
    steps = [{**split, "invert": False}, byte_level] if qwen2 else [byte_level]
    end = "<|endoftext|>"
    made = document(
        vocabulary=vocabulary,
        merges=((left, right) for left, right in merges),
        added=[AddedToken(id=vocabulary[end], content=end)] if end in vocabulary else [],
        normalizer={"type": "NFC"} if qwen2 else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder={**byte_level, "add_prefix_space": True},
    )
    return Source(
        tokenizer_json=to_json(made), add_bos=False,
        bos=None if qwen2 else end, eos=end, unk_token=end, pad_token=end if qwen2 else None,
    )  # fmt: skip


def _require_same(files: TextFiles, own: Source, copy: Source) -> None:
    """Raise MistralcError if tekken.json and tokenizer.json disagree about a token's id."""
    mine, theirs = (
        {**found["model"]["vocab"], **{t["content"]: t["id"] for t in found["added_tokens"]}}
        for found in (json.loads(source.tokenizer_json) for source in (own, copy))
    )
    for text, i in theirs.items():
        if mine.get(text, i) != i:
            raise MistralcError(
                f"{files.tekken} gives the token {text!r:.60} the id {mine[text]}, and "
                f"tokenizer.json {i}; expected the same vocabulary in both. Remove the one that "
                "the model was not trained with."
            )


def _with_missing(own: dict[str, Any], copied: tuple[AddedToken, ...]) -> dict[str, Any]:
    """Return tekken's document with the added tokens that only tokenizer.json has.

    A token that tekken merely reserves (`<SPECIAL_20>`) takes the name that it has there.
    """
    listed = {token.id: token for token in read_entries(own["added_tokens"])}
    vocabulary = own["model"]["vocab"]
    for token in copied:
        reserved = listed.get(token.id)
        if reserved is not None and reserved.content.startswith("<SPECIAL_"):
            vocabulary.pop(reserved.content, None)
            vocabulary[token.content] = token.id
            listed[token.id] = token
        elif reserved is None and token.content not in vocabulary:
            listed[token.id] = token
    return with_tokens(own, tuple(listed[i] for i in sorted(listed)))


def _with_settings(source: Source, files: TextFiles) -> Source:
    """Add what the settings say about BOS, EOS, templates and generation."""
    settings, config, generation = files.settings, files.config, files.generation
    bos = None if "bos_token" in settings else config.get("bos_token_id")
    if bos is not None and not is_token_id(bos):
        raise MistralcError(
            f"The tokenizer {files.directory} has no token {bos!r:.60}, which config.json names as "
            "BOS. Download tokenizer and settings from the same source."
        )
    mistral = files.model_type is None or files.model_type in MISTRAL
    own_format = source.chat_template if mistral else None
    named = _first_given(text_of(settings.get("bos_token")), source.bos, bos)
    source = replace(
        source,
        bos=named,
        eos=_first_given(text_of(settings.get("eos_token")), source.eos),
        unk_token=_first_given(text_of(settings.get("unk_token")), source.unk_token),
        pad_token=_first_given(text_of(settings.get("pad_token")), source.pad_token),
        named_tokens=named_tokens(settings),
        add_bos=_first_given(settings.get("add_bos_token"), source.add_bos),
        chat_template=_first_given(files.chat_template, own_format),
        tool_chat_template=files.tool_chat_template,
        stop_ids=_stop_ids(
            _first_given(generation.get("eos_token_id"), config.get("eos_token_id")),
            files.directory,
        ),
        generation=generation,
    )
    if files.vocabularies[0].name == "tokenizer.json" and files.tekken is None:
        return _as_processed(source, files)
    return source


def _as_processed(source: Source, files: TextFiles) -> Source:
    """Take BOS from the post-processor of tokenizer.json, as transformers does.

    `add_bos_token` in tokenizer_config.json counts only where there is no tokenizer.json.
    """
    backend = parse_tokenizer(source.tokenizer_json, str(files.vocabularies[0]))
    whole = backend.encode("a")
    mask = "".join(map(str, whole.special_tokens_mask))
    before = whole.ids[: len(mask) - len(mask.lstrip("1"))]
    after = whole.ids[len(mask.rstrip("1")) :]
    if len(before) > 1:
        raise MistralcError(
            f"The tokenizer of {files.directory} puts {len(before)} tokens before every text "
            f"({before}); expected at most one, a BOS. Write them into the chat template and take "
            "them out of the post-processor of tokenizer.json."
        )
    notes = list(source.notes)
    wanted = files.settings.get("add_bos_token")
    if isinstance(wanted, bool) and wanted != bool(before):
        notes.append(
            f"`add_bos_token` of tokenizer_config.json is {json.dumps(wanted)}, but tokenizer.json "
            f"puts {'a' if before else 'no'} BOS before a text, and transformers follows the latter"
        )
    if after:
        notes.append(
            "tokenizer.json puts an end of text after every text, which a prompt must not have: "
            "it is left out"
        )
    if not before:
        return replace(source, add_bos=False, notes=tuple(notes))
    texts = source.bos if isinstance(source.bos, str) else None
    return replace(source, add_bos=True, bos=before[0], bos_token=texts, notes=tuple(notes))


def _first_given(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _stop_ids(eos: Any, directory: Path) -> tuple[int, ...]:
    """Read Hugging Face's `eos_token_id`: a number, a list of numbers, or nothing."""
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(map(is_token_id, ids)):
        raise MistralcError(
            f"The `eos_token_id` of {directory} is {eos!r:.60}; expected a token id or a list of "
            "them. Correct generation_config.json or config.json."
        )
    return tuple(ids)
