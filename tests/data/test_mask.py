"""Masking of addresses, numbers and keys. Keys are made up; numbers are reserved for fiction or belong to a library's tests."""

import pytest

from pipeline.data.mask import mask

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+news@mail.example.co.uk.", "write to [EMAIL]."),
        ("<a@b.de>, c_d@e-f.org;", "<[EMAIL]>, [EMAIL];"),
        ("user@localhost, @handle, 5 @ 3.50", "user@localhost, @handle, 5 @ 3.50"),
        ("key AKIAIOSFODNN7EXAMPLE.", "key [KEY]."),  # the example of Amazon's documentation
        ("token=ghp_" + "a1B2" * 9, "token=[KEY]"),
        ("export HF_TOKEN=hf_" + "abcDEF123" * 4, "export HF_TOKEN=[KEY]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "[KEY]"),
        ("task sk-learn and hf_hub", "task sk-learn and hf_hub"),
        ("call +44 20 7946 0958 now", "call [PHONE] now"),
        ("born 1999-12-31, order 12345678, pi 3.14159265", "born 1999-12-31, order 12345678, pi 3.14159265"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert mask(text) == masked


def test_a_number_without_country_code_needs_a_region() -> None:
    text = "ring (650) 253-0000"
    assert mask(text) == text
    assert mask(text, region="US") == "ring [PHONE]"


def test_each_kind_can_be_left_out() -> None:
    text = "a@b.org +44 20 7946 0958 AKIAIOSFODNN7EXAMPLE"
    assert mask(text, email=False) == "a@b.org [PHONE] [KEY]"
    assert mask(text, phone=False) == "[EMAIL] +44 20 7946 0958 [KEY]"
    assert mask(text, keys=False) == "[EMAIL] [PHONE] AKIAIOSFODNN7EXAMPLE"
