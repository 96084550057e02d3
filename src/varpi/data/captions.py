"""Captions: which field of a record holds one, and how they are cleaned before a T5 encoder reads them."""

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import unescape
from typing import Any
from urllib.parse import unquote_plus

from varpi.errors import VarpiError

CAPTION_FIELDS = (
    "caption",
    "text",
    "TEXT",
    "alt",
    "meta.caption",
    "meta.text",
    "metadata.caption",
    "metadata.text",
    "sentences.0.raw",
    "sentences.0.caption",
    "sentences.0.text",
)
"""Where a caption is looked for in the JSON beside an image, in this order, as VA-π's loader of LAION-COCO does."""


def pick_caption(record: Mapping[str, Any], fields: Sequence[str]) -> str | None:
    """The first of `fields` that holds a non-blank string, unchanged; None when there is none.

    A field is a name, or a dotted path that reaches into mappings by key and into lists by number
    ("sentences.0.raw"). A list of strings (LlamaGen's `"text": [...]`) stands for its first non-blank one.
    """
    for field in fields:
        value = _reach(record, field)
        for candidate in value if isinstance(value, list | tuple) else [value]:
            if isinstance(candidate, str) and candidate.strip():
                return candidate
    return None


def _reach(value: Any, path: str) -> Any:
    if isinstance(value, Mapping) and path in value:  # also a column whose own name has dots in it
        return value[path]
    head, dot, rest = path.partition(".")
    if isinstance(value, Mapping):
        inner = value.get(head)
    elif isinstance(value, list | tuple) and head.isdecimal() and int(head) < len(value):
        inner = value[int(head)]
    else:
        return None
    return _reach(inner, rest) if dot else inner


def clean_caption(text: str) -> str:
    """One pass of the cleaner in front of the T5 encoders of DeepFloyd IF and LlamaGen, which apply it twice.

    The text becomes lower case; URL escapes, HTML, links, @names, CJK ideographs, file names, IP addresses, numbers
    and codes that name an article, phrases of advertisement, sizes such as 12x30, and most punctuation go; dashes,
    quotes and whitespace take one form each; ftfy mends broken encodings. What is left may be empty. A second pass
    seldom finds anything; where it does, the first one had just laid it bare.

    The rules here take time linear in the length of the text; only the HTML parser may take longer over broken tags.

    Raises:
        VarpiError: not a string, or ftfy or beautifulsoup4 is not installed.
    """
    if not isinstance(text, str):
        raise VarpiError(f"a caption is of type {type(text).__name__}; it must be a string")
    try:
        import ftfy
        from bs4 import BeautifulSoup
        from bs4.builder import ParserRejectedMarkup
    except ImportError as error:
        raise VarpiError(f"cleaning captions needs {error.name}: pip install 'varpi[text]'") from error

    text = unquote_plus(text).strip().lower()
    # CC12M's word for a name it withholds, which would vanish as a tag
    text = _LINK.sub(r"\1", text.replace("<person>", "person"))
    if "<" in text or "&" in text:
        # Beautiful Soup warns of what looks like XML or a file's name, and raises at some things that are no HTML
        with warnings.catch_warnings(), suppress(ParserRejectedMarkup, ValueError):
            warnings.simplefilter("ignore")
            text = BeautifulSoup(text, "html.parser").text
    for pattern, replacement in _BEFORE_MENDING:
        text = pattern.sub(replacement, text)
    if len(_JOINT.findall(text)) > 3:
        text = _JOINT.sub(" ", text)
    text = unescape(unescape(ftfy.fix_text(text)))
    for pattern, replacement in _AFTER_MENDING:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if len(text) > 2 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1]
    for pattern in _EDGES:
        text = pattern.sub("", text)
    return text.strip()


def _rules(*rules: tuple[str, str]) -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_FILE_SUFFIX = "(?:png|jpe?g|bmp|webp|eps|pdf|apk|mp4)"
# A scheme with the slashes behind it, or a host with the path behind it. A run of characters that ends up as neither is
# taken whole and put back (group 1), or it would be searched again from each word in it.
_LINK = re.compile(
    r"\b(?:"
    r"(?:https?|www):(?:/{1,3}|[a-z0-9%])"
    r"|[a-z0-9.-]+\.(?:com?|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
    r"|((?:(?!\b(?:https?|www):)[a-z0-9.-])++)"
    r")"
)
# Unicode's category Pd
_DASHES = (
    r"\-\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    r"\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_BEFORE_MENDING = _rules(
    (r"@\w+\b", ""),
    (r"[\u31c0-\u9fff]+", ""),  # CJK strokes to unified ideographs; kana and hangul stay
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?|&amp", ""),
    (r"\d{1,3}(?:\.\d{1,3}){3}", " "),
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"(?<!\S)\S+\.{_FILE_SUFFIX}", ""),
    (r"[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[][(){}|/\\*#&@~®©™•·º½¾¿¡§]+", " "),
    (r"(?<!\s)\s+\.\s+", " "),
)
_JOINT = re.compile(r"[-_]")
_AFTER_MENDING = _rules(
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(?:worldwide\s+)?(?:free\s+)?shipping", ""),
    (r"(?:free\s)?download(?:\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILE_SUFFIX}(?:\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", ""),
    (r"\b\d+(?:\.\d*)?[xх×]\d+(?:\.\d*)?\b", ""),  # the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
)
_QUOTES = "\"'"
_EDGES = tuple(re.compile(pattern) for pattern in (r"^['_,\-:;]", r"['_,\-:+]$", r"^\.\S+$"))
