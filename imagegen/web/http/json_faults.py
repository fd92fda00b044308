"""Texts about bodies that are no JSON: the fault, its place and the right form, without a quote of the body."""

from __future__ import annotations

import re
from typing import NamedTuple

import orjson

from imagegen.errors import InvalidJson


class Reason(NamedTuple):
    """Reason why a body is refused, in Chinese and in English."""

    zh: str
    en: str


class JsonFault(InvalidJson):
    """`invalid_json` with its reason in both languages. at: line and column, from 1."""

    def __init__(self, reason: Reason, at: tuple[int, int] | None = None) -> None:
        self._reason, self._at = reason, at
        super().__init__()

    def message(self, language: str) -> str:
        is_zh = language == "zh"
        text = self._reason.zh if is_zh else self._reason.en
        if self._at is not None:
            line, column = self._at
            text += f"（第{line}行第{column}列）" if is_zh else f", at line {line}, column {column}"
        return (self.zh if is_zh else self.en).format(reason=text)


UNREADABLE = Reason("语法错误", "it can't be parsed")
BOM = Reason("不允许BOM", "it starts with a byte order mark: send it without one")
NUMBER = Reason("数字过大或过长", "a number is too large or too long")
_UTF8 = Reason("不是有效的UTF-8，请以UTF-8编码发送", "it is not valid UTF-8: send it encoded as UTF-8")
_EMPTY = Reason("请求体为空", 'it is empty: send an object such as {"prompt": "a cat"}')
_FORM = Reason("这是表单而不是JSON", "it is a form, name=value: send an object in its place")
_CUT = Reason("内容不完整", "it can't be parsed: it ends too early")
_MORE = Reason("对象之后还有其他内容", "it can't be parsed: something follows after the object")
_COMMA = Reason("右括号前多了逗号", "it can't be parsed: there is a comma before a closing bracket")
_QUOTES = Reason("请使用双引号", "it can't be parsed: texts and names need double quotes")
_STRAIGHT = Reason("请使用英文直双引号", "it can't be parsed: use straight double quotes")
_NAME = Reason("字段名需要双引号", "it can't be parsed: names of fields need double quotes")
_NAN = Reason("JSON中没有NaN和Infinity", "it can't be parsed: JSON has no NaN and no Infinity")
_LITERAL = Reason("请写true、false或null", "it can't be parsed: write true, false or null")
_COMMENT = Reason("JSON中不能有注释", "it can't be parsed: JSON has no comments")
_CONTROL = Reason(
    "字符串中有未转义的控制字符，换行请写\\n",
    "it can't be parsed: a control character in a text is not escaped; write \\n for a line break",
)
_ESCAPE = Reason("转义无效，反斜杠请写\\\\", "it can't be parsed: this escape is unknown; write \\\\ for a backslash")
_SURROGATE = Reason("代理字符不成对", "it can't be parsed: half of a surrogate pair is missing")
_DIGITS = Reason("数字格式错误", "it can't be parsed: a number has another form, such as 7, -7 or 0.7")

_BETWEEN = Reason("缺少逗号或右括号", "it can't be parsed: a comma or a closing bracket is missing")
_COLON = Reason("缺少冒号", "it can't be parsed: a colon is missing")

_BY_MESSAGE = (
    ("unexpected end", _CUT),
    ("unexpected content", _MORE),
    ("trailing comma", _COMMA),
    ("unexpected control", _CONTROL),
    ("invalid escaped", _ESCAPE),
    ("no low surrogate", _SURROGATE),
    ("invalid high surrogate", _SURROGATE),
    ("invalid low surrogate", _SURROGATE),
    ("number with leading zero", _DIGITS),
    ("no digit", _DIGITS),
    ("number is infinity", NUMBER),
)
"""Reasons by the beginning of orjson's message."""

_BY_TEXT = (
    (re.compile(r"[-+]?(nan|inf(inity)?)\b", re.IGNORECASE), _NAN),
    (re.compile(r"(true|false|none|null|nil|undefined)\b", re.IGNORECASE), _LITERAL),
    (re.compile(r"//|/\*|#"), _COMMENT),
    (re.compile("[\u2018-\u201f\u300c\u300d\uff02\uff07]"), _STRAIGHT),
    (re.compile(r"['`]"), _QUOTES),
    (re.compile(r"[\w$-]+\s*:"), _NAME),
)
"""Reasons by the text that is not understood."""

_MISSING = (("expected ','", _BETWEEN), ("expected ':'", _COLON))
"""Reasons by what orjson expects in place of a text that gives no reason itself."""

_FORM_TEXT = re.compile(r"[\w.%+\[\]-]{1,100}=")


def json_fault(body: bytes, error: orjson.JSONDecodeError) -> JsonFault:
    """Return the refusal of a body that orjson does not parse."""
    if body.startswith(b"\xef\xbb\xbf"):
        return JsonFault(BOM, (1, 1))
    if body.startswith((b"\xff\xfe", b"\xfe\xff")) or body[:2].find(b"\0") >= 0:
        return JsonFault(_UTF8, (1, 1))
    try:
        text = body.decode()
    except UnicodeDecodeError as fault:
        return JsonFault(_UTF8, _place(body[: fault.start].decode(), fault.start))
    return _fault_in(text, error)


def _fault_in(text: str, error: orjson.JSONDecodeError) -> JsonFault:
    if not text.strip():
        return JsonFault(_EMPTY, (1, 1))
    if _FORM_TEXT.match(text):
        return JsonFault(_FORM, (1, 1))
    at = _start_of(text, error)
    for beginning, reason in _BY_MESSAGE:
        if error.msg.startswith(beginning) and not (reason is _DIGITS and _NAN_AT.match(text, at)):
            return JsonFault(reason, _place(text, at))
    reasons = [reason for pattern, reason in _BY_TEXT if pattern.match(text, at)]
    reasons += [reason for expected, reason in _MISSING if expected in error.msg]
    return JsonFault(reasons[0] if reasons else UNREADABLE, _place(text, at))


_NAN_AT = _BY_TEXT[0][0]


def _start_of(text: str, error: orjson.JSONDecodeError) -> int:
    """Return where the fault begins: at the comma too many, and at the sign of an infinity."""
    at = error.pos
    if error.msg.startswith("trailing comma"):
        return max(0, text.rfind(",", 0, at + 1))
    if error.msg.startswith("no digit") and at > 0 and text[at - 1] in "+-":
        return at - 1
    return at


def _place(text: str, at: int) -> tuple[int, int]:
    """Return line and column, from 1."""
    return text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
