import json

import pytest

from ray_platform.data.causes import SampleError, is_filtered
from ray_platform.data.filters import Candidate, FilterConfig, check, json_fields, meanings

DEEP = b"[" * 100_000


def candidate(json_content: bytes | None = None, **fields) -> Candidate:
    content = json.dumps(fields).encode() if json_content is None else json_content
    return Candidate(members={"json": memoryview(content)})


def cause_of(sample: Candidate, config: FilterConfig, *, reads_image: bool = False) -> str:
    """The cause for which the sample is rejected; empty if it passes."""
    try:
        check(sample, config, reads_image=reads_image)
    except SampleError as error:
        return error.cause
    return ""


@pytest.mark.parametrize(
    ("limit", "name", "good", "bad", "cause"),
    [
        ({"min_similarity": 0.3}, "similarity", 0.3, 0.29, "filtered_similarity"),
        ({"min_similarity": 0.3}, "SIMILARITY", 0.31, -1, "filtered_similarity"),
        ({"min_similarity": 0.3}, "clip_similarity_vitb32", 1, 0, "filtered_similarity"),
        ({"max_unsafe": 0.5}, "punsafe", 0.5, 0.51, "filtered_unsafe"),
        ({"max_unsafe": 0.5}, "unsafe", 0, 1, "filtered_unsafe"),
        ({"max_unsafe": 0.4}, "NSFW", "UNLIKELY", "UNSURE", "filtered_unsafe"),
        ({"max_unsafe": 0.5}, "nsfw", "unsure", "NSFW", "filtered_unsafe"),
        ({"max_watermark": 0.8}, "pwatermark", "0.7", "0.9", "filtered_watermark"),
        ({"max_watermark": 0.8}, "watermark", 0.8, 0.81, "filtered_watermark"),
        ({"min_aesthetic": 5}, "AESTHETIC_SCORE", 5, 4.9, "filtered_aesthetic"),
        ({"min_aesthetic": 5}, "aesthetic_score", 6, 4, "filtered_aesthetic"),
        ({"min_aesthetic": 5}, "aesthetic", 6, 4, "filtered_aesthetic"),
        ({"min_aesthetic": 5}, "aesthetic_score_laion_v2", 6, 4, "filtered_aesthetic"),
    ],
)
def test_each_score_under_each_of_its_names(limit, name, good, bad, cause):
    config = FilterConfig(**limit)
    assert cause_of(candidate(**{name: good}), config) == ""
    assert cause_of(candidate(**{name: bad}), config) == cause
    assert is_filtered(cause)
    assert next(iter(limit)) in meanings()[cause]


def test_a_name_without_a_value_is_followed_by_the_next():
    assert cause_of(candidate(punsafe=None, NSFW="NSFW"), FilterConfig(max_unsafe=0.5)) == "filtered_unsafe"


@pytest.mark.parametrize(
    "content", [b"{}", b'{"punsafe": NaN}', b'{"punsafe": "?"}', b'{"punsafe": [1]}', b'{"punsafe": ' + b"9" * 400 + b"}"]
)
def test_a_score_that_a_filter_needs_must_exist(content):
    assert cause_of(candidate(content), FilterConfig(max_unsafe=0.5)) == "score_missing"


def test_a_sample_without_a_valid_json():
    assert cause_of(Candidate("x"), FilterConfig(min_aesthetic=5)) == "score_missing"
    assert cause_of(candidate(DEEP), FilterConfig(min_aesthetic=5)) == "json_invalid"
    assert json_fields({}) == {}


def test_without_score_filters_the_json_is_not_read():
    assert cause_of(candidate(DEEP), FilterConfig(min_size=100)) == ""
