"""What the settings make of a model, before anything is built."""

from __future__ import annotations

import pytest

import models
from training.errors import ConfigError
from training.setup import cuts_padding


def _model(**text: object) -> models.ModelConfig:
    raw = models.load_model_config("tiny-test").to_dict()
    return models.ModelConfig.from_dict({**raw, "text_cfg": {**raw["text_cfg"], **text}})


def test_padding_is_cut_where_the_tower_allows_it_unless_told_otherwise() -> None:
    assert cuts_padding("auto", _model())
    assert cuts_padding("cut", _model())
    assert not cuts_padding("full", _model())


@pytest.mark.parametrize(
    ("text", "reason"), [({"no_causal_mask": True}, "no causal mask"), ({"pool_type": "last"}, "pools the last")]
)
def test_where_padding_counts_it_stays_and_the_log_says_why(
    text: dict[str, object], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert not cuts_padding("auto", _model(**text))
    assert reason in caplog.text
    assert not cuts_padding("full", _model(**text))
    with pytest.raises(ConfigError, match=f"--text-padding cut: the text tower of tiny-test .*{reason}"):
        cuts_padding("cut", _model(**text))
