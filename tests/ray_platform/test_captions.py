"""Captions, and filters on a sample's other fields."""

import json

import pytest

from ray_platform.contracts import ConfigError
from ray_platform.data.captions import caption, clean
from ray_platform.data.causes import SampleError, is_filtered
from ray_platform.data.config import DataConfig
from ray_platform.data.filters import Candidate, FilterConfig, check, meanings
from tests.support.messages import check_message

PLAIN, CLEAN, BY_FIELD = DataConfig(), DataConfig(clean_captions=True), DataConfig(caption_field="alt")
DEEP = b"[" * 100_000


def members(**contents) -> dict[str, memoryview]:
    return {suffix: memoryview(content) for suffix, content in contents.items()}


def of_json(**fields) -> dict[str, memoryview]:
    return members(json=json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("sample", "config", "text"),
    [
        (members(txt="größe ✓\n".encode()), PLAIN, "größe ✓"),
        (members(txt=b"\xef\xbb\xbfa byte order mark"), PLAIN, "a byte order mark"),
        (members(txt=b"from txt", json=b'{"caption": "from json"}'), PLAIN, "from txt"),
        (members(txt=b"from txt", json=b"broken"), PLAIN, "from txt"),
        (of_json(caption="from json", text="no"), PLAIN, "from json"),
        (of_json(text="from COYO", caption=None), PLAIN, "from COYO"),
        (of_json(TEXT="from LAION"), PLAIN, "from LAION"),
        (members(json=b'\xef\xbb\xbf{"caption": "marked"}'), PLAIN, "marked"),
        (members(txt=b"from txt", json=b'{"alt": " from a field "}'), BY_FIELD, "from a field"),
        (members(txt=b"a  &amp; b"), PLAIN, "a  &amp; b"),
        (members(txt=b"a  &amp; b"), CLEAN, "a & b"),
    ],
)
def test_the_caption_of_a_sample(sample, config, text):
    assert caption(sample, config) == text


@pytest.mark.parametrize(
    ("cause", "sample", "config"),
    [
        ("caption_missing", members(jpg=b"x"), PLAIN),
        ("caption_missing", of_json(url="x"), PLAIN),
        ("caption_missing", of_json(caption=None), PLAIN),
        ("caption_missing", members(txt=b"not used"), BY_FIELD),
        ("caption_missing", members(txt=b"not used", json=b'{"caption": "nor this"}'), BY_FIELD),
        ("caption_empty", members(txt=b""), PLAIN),
        ("caption_empty", members(txt=b" \n\t", json=b'{"caption": "not used"}'), PLAIN),
        ("caption_empty", members(txt=b"\xef\xbb\xbf"), PLAIN),
        ("caption_empty", of_json(caption=""), PLAIN),
        ("caption_empty", members(txt=b"<br>&nbsp;"), CLEAN),
        ("caption_not_utf8", members(txt="größe".encode("latin-1")), PLAIN),
        ("caption_not_utf8", members(txt="größe".encode("utf-16")), PLAIN),
        ("caption_not_utf8", members(txt=b"\xed\xa0\x80"), PLAIN),
        ("caption_not_utf8", members(json=b'{"caption": "\xff"}'), PLAIN),
        ("caption_not_utf8", members(json=b'{"caption": "\\ud800"}'), PLAIN),
        *(("json_invalid", members(json=content), PLAIN) for content in (b"{", b"", DEEP, b'["a caption"]', b"9" * 5000)),
        ("json_invalid", of_json(caption=3), PLAIN),
        ("json_invalid", of_json(alt=["a"]), BY_FIELD),
    ],
)
def test_captions_that_cannot_be_used(cause, sample, config):
    with pytest.raises(SampleError, match=f"^{cause}$"):
        caption(sample, config)


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


def filter_cause_of(sample: dict[str, memoryview], **limits) -> str:
    """Return the cause for which a sample is rejected, or an empty string if it passes."""
    try:
        check(Candidate(members=sample), FilterConfig(**limits), reads_image=False)
    except SampleError as error:
        return error.cause
    return ""


@pytest.mark.parametrize(
    ("limit", "value", "name", "good", "bad"),
    [
        ("min_similarity", 0.3, "similarity", 0.3, 0.29),
        ("min_similarity", 0.3, "SIMILARITY", 0.31, -1),
        ("min_similarity", 0.3, "clip_similarity_vitb32", 1, 0),
        ("max_unsafe", 0.5, "punsafe", 0.5, 0.51),
        ("max_unsafe", 0.5, "unsafe", 0, 1),
        ("max_unsafe", 0.4, "NSFW", "UNLIKELY", "UNSURE"),
        ("max_unsafe", 0.5, "nsfw", "unsure", "NSFW"),
        ("max_watermark", 0.8, "pwatermark", "0.7", "0.9"),
        ("max_watermark", 0.8, "watermark_score", 0.7, 0.9),
        ("max_unsafe", 0.5, "nsfw_score_opennsfw2", 0.1, 0.9),
        ("min_similarity", 0.2, "clip_b32_similarity_score", 0.3, 0.1),
        ("max_watermark", 0.8, "watermark", 0.8, 0.81),
        ("min_aesthetic", 5, "AESTHETIC_SCORE", 5, 4.9),
        ("min_aesthetic", 5, "aesthetic_score", 6, 4),
        ("min_aesthetic", 5, "aesthetic", 6, 4),
        ("min_aesthetic", 5, "aesthetic_score_laion_v2", 6, 4),
    ],
)
def test_each_score_under_each_of_its_names(limit, value, name, good, bad):
    cause = f"filtered_{limit[4:]}"
    assert filter_cause_of(of_json(**{name: good}), **{limit: value}) == ""
    assert filter_cause_of(of_json(**{name: bad}), **{limit: value}) == cause
    assert is_filtered(cause)
    assert limit in meanings(FilterConfig)[cause]


def test_a_score_that_a_filter_needs_must_exist():
    for content in (b"{}", b'{"punsafe": NaN}', b'{"punsafe": "?"}', b'{"punsafe": [1]}', b'{"punsafe": ' + b"9" * 400 + b"}"):
        assert filter_cause_of(members(json=content), max_unsafe=0.5) == "score_missing"
    assert filter_cause_of({}, max_unsafe=0.5) == "score_missing"
    assert filter_cause_of(members(json=DEEP), max_unsafe=0.5) == "json_invalid"
    assert filter_cause_of(of_json(punsafe=None, NSFW="NSFW"), max_unsafe=0.5) == "filtered_unsafe"  # null is skipped
    assert filter_cause_of(members(json=DEEP), min_size=100) == ""  # the JSON is not parsed without a filter on a score


COYO = of_json(text="a", num_faces=2, word_count=7, clip_similarity_vitl14=0.25, nsfw_score_gantman=0.1, watermark_score=0.2)


@pytest.mark.parametrize(
    ("ranges", "cause"),
    [
        ({"num_faces": (0, 2), "word_count": (7, None)}, ""),
        ({"word_count": (None, 6)}, "filtered_word_count"),
        ({"num_faces": (3, None)}, "filtered_num_faces"),
    ],
)
def test_a_range_of_any_number_in_the_json(ranges, cause):
    assert filter_cause_of(COYO, ranges=ranges, min_similarity=0.2, max_unsafe=0.5, max_watermark=0.5) == cause
    assert {f"filtered_{name}" for name in ranges} <= meanings(FilterConfig(ranges=ranges)).keys()


def test_a_range_of_a_field_that_does_not_exist_names_those_that_do():
    with pytest.raises(SampleError) as raised:
        check(Candidate(members=COYO), FilterConfig(ranges={"faces": (0, 2)}), reads_image=False)
    assert raised.value.cause == "score_missing"
    check_message("a filter on a field that the .json lacks, in the log", raised.value.detail)
    with pytest.raises(ConfigError, match=r"data\.filters\.ranges: faces: .*3 is above 2"):
        FilterConfig(ranges={"faces": (3, 2)})
