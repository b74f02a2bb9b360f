import json

import pytest

from ray_platform.data.captions import caption, clean
from ray_platform.data.causes import SampleError
from ray_platform.data.config import DataConfig

PLAIN = DataConfig()
BY_FIELD = DataConfig(caption_field="alt")
DEEP = b"[" * 100_000


def members(**contents) -> dict[str, memoryview]:
    return {suffix: memoryview(content) for suffix, content in contents.items()}


def of_json(**fields) -> dict[str, memoryview]:
    return members(json=json.dumps(fields).encode())


def cause_of(call, *args) -> str:
    with pytest.raises(SampleError) as raised:
        call(*args)
    return raised.value.cause


@pytest.mark.parametrize(
    ("sample", "config", "text"),
    [
        (members(txt="größe ✓\n".encode()), PLAIN, "größe ✓"),
        (members(txt=b"\xef\xbb\xbfa byte order mark"), PLAIN, "a byte order mark"),
        (members(txt=b"from txt", json=b'{"caption": "from json"}'), PLAIN, "from txt"),
        (members(txt=b"from txt", json=b"broken"), PLAIN, "from txt"),
        (of_json(caption="from json", alt="no"), PLAIN, "from json"),
        (members(json=b'\xef\xbb\xbf{"caption": "marked"}'), PLAIN, "marked"),
        (members(txt=b"from txt", json=b'{"alt": " from a field "}'), BY_FIELD, "from a field"),
        (members(txt=b"a  &amp; b"), PLAIN, "a  &amp; b"),
        (members(txt=b"a  &amp; b"), DataConfig(clean_captions=True), "a & b"),
    ],
)
def test_the_caption_of_a_sample(sample, config, text):
    assert caption(sample, config) == text


@pytest.mark.parametrize(
    ("sample", "config", "cause"),
    [
        (members(jpg=b"x"), PLAIN, "caption_missing"),
        (of_json(url="x"), PLAIN, "caption_missing"),
        (of_json(caption=None), PLAIN, "caption_missing"),
        (members(txt=b"not asked"), BY_FIELD, "caption_missing"),
        (members(txt=b"not asked", json=b'{"caption": "nor this"}'), BY_FIELD, "caption_missing"),
        (members(txt=b""), PLAIN, "caption_empty"),
        (members(txt=b" \n\t", json=b'{"caption": "not asked"}'), PLAIN, "caption_empty"),
        (members(txt=b"\xef\xbb\xbf"), PLAIN, "caption_empty"),
        (of_json(caption=""), PLAIN, "caption_empty"),
        (members(txt=b"<br>&nbsp;"), DataConfig(clean_captions=True), "caption_empty"),
        (members(txt="größe".encode("latin-1")), PLAIN, "caption_not_utf8"),
        (members(txt="größe".encode("utf-16")), PLAIN, "caption_not_utf8"),
        (members(txt=b"\xed\xa0\x80"), PLAIN, "caption_not_utf8"),
        (members(json=b'{"caption": "\xff"}'), PLAIN, "caption_not_utf8"),
        (members(json=b'{"caption": "\\ud800"}'), PLAIN, "caption_not_utf8"),
        (members(json=b"{"), PLAIN, "json_invalid"),
        (members(json=b""), PLAIN, "json_invalid"),
        (members(json=DEEP), PLAIN, "json_invalid"),
        (members(json=b'["a caption"]'), PLAIN, "json_invalid"),
        (members(json=b"9" * 5000), PLAIN, "json_invalid"),
        (of_json(caption=3), PLAIN, "json_invalid"),
        (of_json(alt=["a"]), BY_FIELD, "json_invalid"),
    ],
)
def test_captions_that_cannot_be_used(sample, config, cause):
    assert cause_of(caption, sample, config) == cause


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain text stays", "plain text stays"),
        ("  a\n\tb\u00a0c\u2003d ", "a b c d"),
        ("Tom &amp;amp; Jerry &quot;&#233;&quot;", 'Tom & Jerry "é"'),
        ("a<br/>b <b class='x'>bold</b> <!-- note -->", "a b bold"),
        ("1 < 2 and 3 > 2, <3", "1 < 2 and 3 > 2, <3"),
        ("a\x00b\x07c\x9fd", "a b c d"),
        ("cafe\u0301", "café"),
        ("un\u00adsicht\u200bbar\ufeff", "unsichtbar"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
    ],
)
def test_cleaning(text, cleaned):
    assert clean(text) == cleaned
    assert clean(cleaned) == cleaned
