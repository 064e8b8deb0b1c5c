from __future__ import annotations

import pytest

from training.secrets import mask_secrets, mask_text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pa%40ss@host/a.tar", "https://***@host/a.tar"),
        ("s3://bucket/laion{00000..00003}.tar", "s3://bucket/laion{00000..00003}.tar"),
        (
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Date=2&X-Amz-Credential=AK%2F1&X-Amz-Signature=abc&x=1",
            "https://b.s3.amazonaws.com/x.tar?X-Amz-Date=2&X-Amz-Credential=***&X-Amz-Signature=***&x=1",
        ),
        (
            "https://b/x.tar?AWSAccessKeyId=AK&Signature=q%3D&Expires=17",
            "https://b/x.tar?AWSAccessKeyId=***&Signature=***&Expires=17",
        ),
        ("https://account.blob/x?sv=1&sig=zzz", "https://account.blob/x?sv=1&sig=***"),
        ("pipe:aws s3 cp s3://mybucket/path/a.tar -", "pipe:aws s3 cp s3://mybucket/path/a.tar -"),
        (
            "pipe:curl -s -H 'Authorization: Bearer abc.def' https://host/x.tar",
            "pipe:curl -s -H 'Authorization: Bearer ***' https://host/x.tar",
        ),
        (
            "pipe:AWS_SECRET_ACCESS_KEY=wJal/rX AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE aws s3 cp s3://b/x -",
            "pipe:AWS_SECRET_ACCESS_KEY=*** AWS_ACCESS_KEY_ID=*** aws s3 cp s3://b/x -",
        ),
        ("key AKIAIOSFODNN7EXAMPLE was refused", "key *** was refused"),
        ("s3://me:key@bucket/a::s3://you:key2@bucket/b", "s3://***@bucket/a::s3://***@bucket/b"),
        ("mail someone@example.org", "mail someone@example.org"),
    ],
)
def test_credentials_are_masked_and_the_rest_stays(text: str, masked: str) -> None:
    assert mask_text(text) == masked
    assert mask_text(masked) == masked


def test_structures_are_masked_inside_and_keep_their_types() -> None:
    config = {
        "train_data": "https://u:p@h/a.tar",
        "caption_key": "json:caption",
        "aug_cfg": ("scale=(0.5, 1.0)", "s3://u:p@b"),
        "api_key": "abc",
        "nested": {"urls": ["https://u:p@h"], "aws_secret_access_key": "xyz", "lr": 5e-4, "resume": None},
    }
    assert mask_secrets(config) == {
        "train_data": "https://***@h/a.tar",
        "caption_key": "json:caption",
        "aug_cfg": ("scale=(0.5, 1.0)", "s3://***@b"),
        "api_key": "***",
        "nested": {"urls": ["https://***@h"], "aws_secret_access_key": "***", "lr": 5e-4, "resume": None},
    }
    assert config["api_key"] == "abc"
