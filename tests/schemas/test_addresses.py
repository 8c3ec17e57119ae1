"""Credentials in addresses are refused, or shown and saved nowhere."""

import pytest

from headrace.schemas.addresses import check_address, recorded
from headrace.schemas.errors import DataError, redact
from headrace.schemas.prepare.source_config import SourceConfig
from headrace.schemas.train.data_config import DatasetConfig


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://h/a.jsonl?X-Amz-Signature=S&X-Amz-Date=D", "https://h/a.jsonl?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://h/a?sig=S&se=2030", "https://h/a?sig=***&se=***"),
        ("https://h/a?unknown=a-long-secret", "https://h/a?unknown=***"),
        ("http://user:pass@h/a", "http://***@h/a"),
        ("s3://KEY:SEC/RET@bucket/a", "s3://***@bucket/a"),
        ("s3://bucket/a?region=eu-west-1", "s3://bucket/a?region=eu-west-1"),
        ("s3://bucket/a?.jsonl", "s3://bucket/a?.jsonl"),
        ("gs://anonymous@bucket/a", "gs://anonymous@bucket/a"),
        ("abfs://container@account/a", "abfs://container@account/a"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("no address: a?b=c", "no address: a?b=c"),
    ],
)  # fmt: skip
def test_what_is_shown_of_an_address(address, shown):
    assert redact(address) == shown
    assert str(DataError(f"{address}: not found; correct it")) == f"{shown}: not found; correct it"


def test_what_is_saved_tells_files_apart_and_not_signatures():
    first, again = (recorded(f"https://h/a?id=number-7&token={t}") for t in "ab")
    other = recorded("https://h/a?id=number-8&token=a")
    assert first == again
    assert first != other
    assert "number" not in first
    assert recorded("corpus/a?b=c.txt") == "corpus/a?b=c.txt"


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("s3://KEY:HIDE@bucket/a", "set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/a?secret_key=HIDE", "set AWS_ACCESS_KEY_ID"),
        ("http://user:HIDE@h/a", "use a signed address"),
    ],
)
def test_credentials_that_belong_elsewhere_are_refused_without_showing_them(address, remedy):
    with pytest.raises(ValueError, match=remedy) as refused:
        check_address(address)
    assert "HIDE" not in str(refused.value)
    for config, more in ((DatasetConfig, {}), (SourceConfig, {"name": "a", "type": "documents"})):
        with pytest.raises(ValueError, match=remedy):
            config(path=address, **more)
