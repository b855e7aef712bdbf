"""Python literals, as numpy writes them into headers, read by a parser that runs nothing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from ckptflip.checkpoints.listing import DamagedError

_DEEPEST = 16
_TOKEN = re.compile(
    r"""\s*(?:
    [uUbB]?(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|
    (?P<word>True|False|None)\b|
    (?P<number>-?\d{1,19})L?|
    (?P<mark>[][{}():,]))""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
_BRACKETS = {("mark", "("): ")", ("mark", "["): "]", ("mark", "{"): "}"}
_WORDS = {"True": True, "False": False, "None": None}


def literal(text: str) -> Any:
    """The value of a literal: dicts, lists, tuples, strings, integers, booleans, None.

    Args:
        text: as ``repr`` gives it. Its length is for the caller to bound.

    Raises:
        DamagedError: it is no such literal.

    Example:
        >>> literal("{'descr': [('x', '<f4')], 'shape': (3,), 'fortran_order': False, }")
        {'descr': [('x', '<f4')], 'shape': (3,), 'fortran_order': False}
    """
    tokens = _tokens(text)
    value = _value(next(tokens), tokens, 0)
    if next(tokens) != ("end", ""):
        raise DamagedError("its header goes on after its end")
    return value


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    text = text.rstrip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise DamagedError(f"its header is no literal at {text[at : at + 20]!r}")
        at = found.end()
        yield found.lastgroup or "", found[found.lastgroup or 0]
    while True:
        yield "end", ""


def _value(token: tuple[str, str], tokens: Iterator[tuple[str, str]], depth: int) -> Any:
    kind, text = token
    if kind == "text":
        return _ESCAPE.sub(_unescaped, text[1:-1])
    if kind == "word":
        return _WORDS[text]
    if kind == "number":
        return int(text)
    if token not in _BRACKETS or depth == _DEEPEST:
        raise DamagedError(f"its header is no literal at {text!r}")
    close = ("mark", _BRACKETS[token])
    items: list[Any] = []
    comma = True
    token = next(tokens)
    while token != close:
        if not comma:
            raise DamagedError(f"its header lacks a comma before {token[1]!r}")
        items.append(_value(token, tokens, depth + 1))
        token = next(tokens)
        if close[1] == "}":
            if token != ("mark", ":"):
                raise DamagedError(f"its header lacks a colon before {token[1]!r}")
            items[-1] = (items[-1], _value(next(tokens), tokens, depth + 1))
            token = next(tokens)
        comma = token == ("mark", ",")
        if comma:
            token = next(tokens)
    if close[1] == "}":
        return _dict(items)
    return items if close[1] == "]" else tuple(items) if comma or len(items) != 1 else items[0]


def _dict(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if not isinstance(key, str) or key in found:
            raise DamagedError(f"its header has the key {key!r} twice, or it is none")
        found[key] = value
    return found


def _unescaped(found: re.Match[str]) -> str:
    digits = found[1] or found[2] or found[3]
    if not digits:
        return _ESCAPED.get(found[4], found[4])
    code = int(digits, 16)
    if code > sys.maxunicode:
        raise DamagedError(f"its header has the character {found[0]}")
    return chr(code)
