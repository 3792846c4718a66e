"""Request bodies for fuzzing the server: valid ones, odd field values, damaged JSON."""

import copy
from typing import Any

from hypothesis import strategies as st

from tests.reliability.harness.damage import DEEP, NUMBERS, Draw, Raw, damaged_json, write

NUMBER_NAMES = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                "frequency_penalty")  # fmt: skip
TEXTS = ("", "a", "The ring", "\0", "\ud800", "\udc00\ud800", "\U0001f300" * 20, "e\u0301" * 9,
         "\u202e\u2066", "</s><s>[INST]", "\r\n\t ", "\ufeff", "\uffff", "x" * 5000, "a" * 94,
         "a" * 95, "a" * 96, "{{ 7 * 7 }}", "data: [DONE]\n\n")  # fmt: skip
PATTERNS = (
    "a", "(yes|no)", "", "(", "[", "a**", "\\", "(a*)*b", "(a|a)*b", ".*", "[^\\s\\S]",
    "\\p{L}{2,}", "a{1000}", "((a{1000}){1000}){1000}", "(?=a)b", "(?<x>a)\\k<x>", "^$",
    "\\b", "(?i)ß", "\U0001f300+", "\ud800", "(" * DEEP + "a" + ")" * DEEP,
    "[a-\U0010ffff]{0,99999}", "(.*a.{20}b.*c)*", "\\u{d800}", "(?s-u:\\xff)", "a?" * 2000,
    "a?" * 8000,
)  # fmt: skip


def _chain(links: int) -> str:
    """A grammar whose rules form a chain of references; makes a recursive reader recurse."""
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(links))
    return f'start: r0\n{rules}r{links}: "a"'


def _chain_of_schemas(links: int) -> dict[str, Any]:
    """A JSON schema whose definitions form a chain of references."""
    rules: dict[str, Any] = {f"r{i}": {"$ref": f"#/$defs/r{i + 1}"} for i in range(links)}
    return {"$ref": "#/$defs/r0", "$defs": rules | {f"r{links}": {"type": "null"}}}


GRAMMARS = (
    'start: "a" b\nb: /[0-9]+/', 'start: start', "start:", "", 'start: "a" start | ', "start: x",
    'start: a a a\na: "x" | a a |', 'start: "a"{1,1000000000}', "start: /(/", "%%%", "start: <s>",
    'start: %json {"type": "object"}', "start: %json {", 'start: %json {"$ref": "#"}',
    'start: "' + "x" * 9000 + '"', "start: " + "(" * DEEP + '"a"' + ")" * DEEP,
    'start: T\nT: /.*a.{20}/ & ~/b.*/', _chain(400), _chain(1200), _chain(3000),
    '%import common.INT\nstart: INT', 'start[max_tokens=0]: "a"', 'start[temperature=1e9]: /a*/',
    'start: <[0-99999999]>', 'start: <[2]>', 'start: "\ud800"', 'start: x\nx[lazy]: /a*?/',
)  # fmt: skip
KEYWORDS: dict[str, tuple[Any, ...]] = {
    "type": ("object", "array", "string", "integer", "number", "boolean", "null", "x", [],
             ["string", "null"]),
    "minItems": NUMBERS, "maxItems": NUMBERS, "minLength": NUMBERS, "maxLength": NUMBERS,
    "minimum": (*NUMBERS, 0.5, 1e300), "maximum": (*NUMBERS, -0.5, -1e300),
    "exclusiveMinimum": (0, True), "multipleOf": (0, 3, -1, 0.1, 1e-300, 999_999_937),
    "pattern": PATTERNS, "format": ("date", "uuid", "email", "x", 5),
    "enum": ([], [1], ["a", "a"], [None, {}], [[]] * 99, ["\ud800"], "x"),
    "const": (None, 1, "a", {"b": [1]}, "\ud800", 1e300),
    "required": ([], ["a"], ["nothing"], ["a"] * 9, [1], "a"),
    "additionalProperties": (True, False, {}), "uniqueItems": (True,),
    "$ref": ("#", "#/$defs/a", "#/$defs/none", "http://127.0.0.1:1/x", "file:///etc/passwd", 5, ""),
    "$schema": ("http://json-schema.org/draft-04/schema#", "x"), "$id": ("http://x/", 5),
    "x-guidance": ({"whitespace_flexible": True}, {"item_separator": "("}, 5),
}  # fmt: skip


def _schemas() -> st.SearchStrategy[Any]:
    """JSON schemas of all kinds, many of them meaningless or unsatisfiable."""
    leaf = st.sampled_from(sorted(KEYWORDS)).flatmap(
        lambda name: st.sampled_from(KEYWORDS[name]).map(lambda value: {name: value})
    )
    flat = st.lists(leaf, min_size=1, max_size=3).map(_merged)

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        some = st.lists(inner, max_size=3)
        named = st.dictionaries(st.sampled_from(("a", "b", "", "é", "\ud800", "$ref")), inner)
        return st.one_of(
            *(some.map(lambda it, name=name: {name: it})
              for name in ("anyOf", "allOf", "oneOf", "prefixItems")),
            *(inner.map(lambda it, name=name: {name: it})
              for name in ("items", "not", "additionalProperties", "contains")),
            *(named.map(lambda it, name=name: {name: it})
              for name in ("properties", "$defs", "patternProperties")),
            st.lists(inner, min_size=2, max_size=3).map(_merged),
        )  # fmt: skip

    return st.recursive(flat, nested, max_leaves=6)


def _merged(parts: list[Any]) -> dict[str, Any]:
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def _deep_schema(levels: int) -> Raw:
    return Raw('{"items":' * levels + '{"type":"null"}' + "}" * levels)


def _formats() -> st.SearchStrategy[Any]:
    schemas = _schemas() | st.sampled_from((
        {}, _deep_schema(50), _deep_schema(900), _chain_of_schemas(50), _chain_of_schemas(3000),
        *({"patternProperties": {f"^a{i}$": {} for i in range(many)}} for many in (50, 400)),
    ))  # fmt: skip
    structured = schemas.map(
        lambda it: {"type": "json_schema", "json_schema": {"name": "x", "schema": it}}
    )
    return structured | structured | st.sampled_from((
        {"type": "text"}, {"type": "json_object"}, {"type": "x"}, {}, {"type": "json_schema"},
        {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "json_object",
    ))  # fmt: skip


def _odd(name: str) -> st.SearchStrategy[Any]:
    """A value for one field: valid, at a limit, or of the wrong type."""
    texts, some = st.sampled_from(TEXTS), st.lists(st.sampled_from(TEXTS), max_size=3)
    ids = st.lists(st.sampled_from((0, 1, 2, 5, 319, 320, -1, *NUMBERS)), max_size=4)
    match name:
        case "prompt":
            lengths = st.sampled_from((94, 95, 96, 97, 20_000)).map(lambda n: [5] * n)
            return texts | some | ids | lengths | st.lists(ids, max_size=3) | st.just(["a"] * 17)
        case "messages":
            return st.lists(_messages(), max_size=4)
        case "stop":
            return texts | some | st.sampled_from((["a"] * 16, ["a"] * 17, "\ufffd", ["", "a"]))
        case "logit_bias":
            keys = ("0", "2", "5", "319", "320", "-1", "999999999", "1" * 99, "1.0", " 1", "٣", "")
            values = (-100, 100, 0.5, -101, 1e300, Raw("NaN"), None, "1")
            every = {str(i): -100 for i in range(320)}
            return st.just(every) | st.dictionaries(
                st.sampled_from(keys), st.sampled_from(values), max_size=4
            )
        case "response_format":
            return _formats()
        case "regex":
            return st.sampled_from(PATTERNS) | st.text("ab()[]{}|*+?\\^$.,0123-", max_size=12)
        case "grammar":
            return st.sampled_from(GRAMMARS) | st.text('start:|"ab/[]{}()%\n ', max_size=20).map(
                lambda it: f"start: {it}"
            )
        case "stream":
            return st.sampled_from((True, False, None, 1, "true"))
        case "stream_options":
            return st.sampled_from(({}, {"include_usage": True}, {"include_usage": 1}, {"x": 1}))
        case _ if name in NUMBER_NAMES:
            return st.sampled_from((0, 1, 2, -2, 5e-324, 0.01, 1e-9, 1 + 1e-9, 2.1, 100, -0.0, True,
                                    "1", Raw("NaN"), Raw("1e400"), *NUMBERS))  # fmt: skip
        case _:
            return st.sampled_from((0, 1, 2, 5, 16, 17, 20, 21, True, 1.0, "1", None, *NUMBERS))


def _messages() -> st.SearchStrategy[Any]:
    texts = st.sampled_from(TEXTS)
    parts = st.lists(texts.map(lambda it: {"type": "text", "text": it}), max_size=3)
    roles = ("system", "developer", "user", "user", "assistant", "tool", "", "x y", None)
    return st.fixed_dictionaries(
        {"role": st.sampled_from(roles), "content": texts | parts | st.none()},
        optional={"refusal": st.none() | texts, "tool_calls": st.sampled_from(([], None, [1]))},
    )


# Parameters of valid bodies besides the prompt. Few tokens, to keep cases fast.
COMMON: dict[str, Any] = {
    "model": "tiny", "max_tokens": 4, "temperature": 0.8, "top_p": 0.9, "top_k": 9, "min_p": 0.01,
    "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5,
    "logit_bias": {"5": -3.5, "2": -100}, "seed": 7, "stop": ["zz", "é"], "n": 2, "user": "u",
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
          "additionalProperties": False}  # fmt: skip
STRUCTURED = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def seeds(path: str) -> list[dict[str, Any]]:
    """Valid bodies; together they set every parameter."""
    if path == "/v1/completions":
        own: dict[str, Any] = {"prompt": "The ring é", "logprobs": 2}
        others: list[dict[str, Any]] = [{"prompt": ["a", "b"]}, {"prompt": [[1, 5], [7]]}]
    else:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello é"}]},
        ]
        own = {"messages": messages, "logprobs": True, "top_logprobs": 2}
        others = [{"max_tokens": None, "max_completion_tokens": 5}]
    plain = {"model": "tiny", "n": 1, "max_tokens": 16, **own}
    return [
        COMMON | own,
        COMMON | own | STREAMED,
        plain | {"response_format": STRUCTURED},
        plain | STREAMED | {"response_format": {"type": "json_object"}},
        plain | {"regex": "(yes|no)+"},
        plain | {"grammar": 'start: "a" b\nb: /[0-9]+/'},
        *(COMMON | own | other for other in others),
    ]


def bodies(path: str) -> st.SearchStrategy[bytes]:
    """Bodies edited as trees, with odd values for some fields, or both."""
    good = seeds(path)
    names = sorted({name for seed in good for name in seed} | {"regex", "grammar", "best_of"})

    @st.composite
    def odd(draw: Draw) -> dict[str, Any]:
        body = copy.deepcopy(draw(st.sampled_from(good)))
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
            body[name] = draw(_odd(name))
        return body

    def written(body: dict[str, Any]) -> bytes:
        return write(body).encode("utf-8", errors="surrogatepass")

    edited = st.sampled_from(good).flatmap(damaged_json)
    return edited | odd().map(written) | odd().map(written) | odd().flatmap(damaged_json)


CONTENT_TYPES = (
    None, "", "application/json", "text/plain", "application/json; charset=utf-16",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data",
    "application/vnd.api+json", "application/octet-stream", "x", "/", ";;;", "\xff", "a" * 5000,
)  # fmt: skip
