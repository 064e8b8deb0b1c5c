"""Takes credentials out of what is logged or sent to trackers. Knows patterns, not where texts go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MASK = "***"

_USER_IN_URL = re.compile(r"(?P<keep>\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@'\"]+(?=@)")
_SECRET_PARAMETER = re.compile(
    r"(?P<keep>\b(?:X-Amz-(?:Credential|Signature|Security-Token)|AWSAccessKeyId|Signature|sig|GoogleAccessId"
    r"|X-Goog-(?:Credential|Signature)|access_?token|auth_?token|token|api_?key|secret|password)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(
    r"(?P<keep>\b(?:AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|WANDB_API_KEY|HF_TOKEN)\s*[=:]\s*)[^\s&'\"]+"
)
_SECRET_HEADER = re.compile(
    r"(?P<keep>\bAuthorization:\s*(?:(?:Bearer|Basic|AWS4-HMAC-SHA256)\s+)?)[^'\"\n]+", re.IGNORECASE
)
_ACCESS_KEY = re.compile(r"(?P<keep>)\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
_PATTERNS = (_USER_IN_URL, _SECRET_HEADER, _SECRET_VARIABLE, _SECRET_PARAMETER, _ACCESS_KEY)
_SECRET_NAME = re.compile(
    r"(^|_)(password|passwd|secret|api_key|access_key|access_token|auth_token)(_|$)", re.IGNORECASE
)


def mask_text(text: str) -> str:
    """The text with credentials in URLs, signed queries, headers and shell assignments replaced by `***`."""
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\g<keep>{MASK}", text)
    return text


def mask_secrets(value: Any) -> Any:
    """The same structure with `mask_text` on every string, and strings under secret-sounding names masked whole."""
    if isinstance(value, str):
        return mask_text(value)
    if isinstance(value, Mapping):
        return {key: _mask_named(key, entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mask_secrets(entry) for entry in value)
    return value


def _mask_named(name: Any, value: Any) -> Any:
    if isinstance(value, str) and isinstance(name, str) and _SECRET_NAME.search(name):
        return MASK
    return mask_secrets(value)
