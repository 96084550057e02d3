import json
import sys
import warnings

import pytest
from golden import GOLDEN

from varpi.data.captions import CAPTION_FIELDS, clean_caption, pick_caption
from varpi.errors import VarpiError


def test_golden_captions() -> None:
    cases = json.loads((GOLDEN / "captions.json").read_text(encoding="utf-8"))
    assert len(cases) == 30
    assert [clean_caption(case["raw"]) for case in cases] == [case["clean"] for case in cases]
    # A second pass, as LlamaGen makes it, finds nothing more in any of them
    assert [clean_caption(case["clean"]) for case in cases] == [case["clean"] for case in cases]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("<person> in a <b>red</b> hat", "person in a red hat"),
        ("see https://a.org/b/c-d or mail me@site.com now", "see or mail me now"),
        ("visit my-shop.co/sale/ today", "visit today"),
        ("ver. 2.5 of file", "ver. 2.5 of file"),
        ("3.141.59.26 and 1.2.3", "and 1.2.3"),
        ("#12 #1234 #12345", "1234"),  # four digits are a year, perhaps
        ("call 12345 or 123456", "call 12345 or"),
        ("a‒b—c ﹣d", "a-b-c -d"),
        ("one-two-three-four", "one-two-three-four"),  # three hyphens are a word's, four a file name's
        ("one-two_three-four_five", "one two three four five"),
        ("a ‘single’ and a «double» quote", "a 'single' and a \"double\" quote"),
        ("\"it's 'so'", "it's 'so"),
        ("漢字 and ひらがな", "and ひらがな"),
        ("not clean.com.photo.jpg.zip", "not zip"),
        (".hidden", ""),
        ("schön", "schön"),
        ("ﬁne ｆｕｌｌ", "fine full"),
        ("cafÃ\u00a9".lower(), "cafã"),  # lower case comes first, so that this is past mending; © is punctuation
        ("&lt;i&gt;slanted", "slanted"),  # the tag shows only after the first of two passes
        ("free download, cats on page 12, click on here", "cats on"),
        ("size 1.5×2 3x4 5х6", "size"),
        ("jc6640 jc6640vc 6640vc231 mp4 images 4k", "4k"),
        ("colon : spaced,joined", "colon: spaced, joined"),
        ("'quoted", "quoted"),
        ("nul\0l by\0tes", "null bytes"),
        ("\ud800 lone", "� lone"),
        ("   ", ""),
        ("<![x of y", "<! x of y"),  # what Beautiful Soup rejects is no HTML
        ("\\n", ""),
    ],
)
def test_two_passes(raw: str, clean: str) -> None:
    assert clean_caption(clean_caption(raw)) == clean


def test_one_pass_unquotes_once() -> None:
    assert clean_caption("a%2520b") == "a%20b"
    assert clean_caption("a%20b") == "a b"


@pytest.mark.parametrize("caption", ["a photo of a cat.", "woman's dress", "café, 3d model", "x: y", "half-timbered"])
def test_a_clean_caption_stays(caption: str) -> None:
    assert clean_caption(caption) == caption


def test_ten_thousand_characters() -> None:
    assert clean_caption("A photo of a cat!  " * 526) == " ".join(["a photo of a cat!"] * 526)


@pytest.mark.parametrize("text", ["vintage.png", "http://a.b/c?&amp;", '<?xml version="1.0"?><a>', "&#" + "1" * 5000])
def test_neither_warns_nor_raises(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "<" not in clean_caption(text)


@pytest.mark.parametrize("value", [None, 3.5, ["a"], b"a"])
def test_only_strings(value: object) -> None:
    with pytest.raises(VarpiError, match=rf"a caption is of type {type(value).__name__}; it must be a string"):
        clean_caption(value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("package", ["ftfy", "bs4"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VarpiError, match=rf"cleaning captions needs {package}: pip install 'varpi\[text\]'"):
        clean_caption("a cat")


@pytest.mark.parametrize("first", range(len(CAPTION_FIELDS)))
def test_caption_fields_in_order(first: int) -> None:
    record: dict = {"meta": {}, "metadata": {}, "sentences": [{}]}
    for field in CAPTION_FIELDS[first:]:
        *inside, name = field.split(".")
        place = record[inside[0]] if inside else record
        (place[0] if isinstance(place, list) else place)[name] = f"the caption in {field}"
    assert pick_caption(record, CAPTION_FIELDS) == f"the caption in {CAPTION_FIELDS[first]}"


@pytest.mark.parametrize(
    ("record", "fields", "caption"),
    [
        ({"text": ["", "llava", "first"]}, ["text"], "llava"),
        ({"text": ["blip", "llava"]}, ["text.1"], "llava"),
        ({"text": ["blip"]}, ["text.1", "text.0"], "blip"),
        ({"a": {"b": [{"c": "deep"}]}}, ["a.b.0.c"], "deep"),
        ({"meta.caption": "flat", "meta": {"caption": "nested"}}, ["meta.caption"], "flat"),
        ({"caption": "nan"}, ["caption"], "nan"),
        ({"caption": "None"}, ["caption"], "None"),
        ({"caption": "  kept as it is "}, ["caption"], "  kept as it is "),
        ({"caption": None, "text": 3, "alt": {"caption": "x"}}, ["caption", "text", "alt"], None),
        ({"text": "abc"}, ["text.0"], None),  # a letter is no caption
        ({"text": []}, ["text", "text.0", "text.-1", "text.x"], None),
        ({}, CAPTION_FIELDS, None),
    ],
)
def test_pick_caption(record: dict, fields: list[str], caption: str | None) -> None:
    assert pick_caption(record, fields) == caption
