"""The zero-shot classifier: means of prompts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import models
from training.errors import ConfigError
from training.evaluation import Stopped, build_classifier
from training.evaluation.classifier import check_prompts, fill


def test_a_class_is_the_normalised_mean_of_its_normalised_prompts(model: models.CLIP) -> None:
    tokenizer = models.get_tokenizer("tiny-test")
    names, templates = ["dog", "red car", "cat"], ["a {c}", "one {c} here", "{}!"]
    classifier = build_classifier(model, tokenizer, names, templates)
    model.eval()
    with torch.no_grad():
        for index, name in enumerate(names):
            prompts = [f"a {name}", f"one {name} here", f"{name}!"]
            expected = F.normalize(model.encode_text(tokenizer(prompts), normalize=True).mean(dim=0), dim=0)
            torch.testing.assert_close(classifier[:, index], expected)


def test_the_model_keeps_its_mode_and_gets_no_gradient(model: models.CLIP) -> None:
    model.train()
    classifier = build_classifier(model, models.get_tokenizer("tiny-test"), ["dog"], ["a {c}"])
    assert model.training
    assert not classifier.requires_grad


def test_more_prompts_than_one_block_keep_their_order(model: models.CLIP) -> None:
    tokenizer = models.get_tokenizer("tiny-test")
    names = [f"thing {number}" for number in range(700)]
    classifier = build_classifier(model, tokenizer, names, ["{c}"])
    last = build_classifier(model, tokenizer, names[-1:], ["{c}"])
    torch.testing.assert_close(classifier[:, -1:], last)


def test_only_the_place_for_the_name_is_replaced() -> None:
    assert fill("a {c} in {braces}", "cat") == "a cat in {braces}"


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["a {c}"], "no class names; classnames.txt holds one name a line"),
        (["dog", " "], ["a {c}"], "class name 2 of 2 is empty"),
        (["dog"], [], "no templates"),
        (["dog"], ["a photo"], r"'a photo' has no place for the class name: write \{c\}"),
    ],
)
def test_prompts_that_cannot_work_are_named(names: list[str], templates: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^set: .*{message}"):
        check_prompts("set", names, templates)


def test_a_stop_is_asked_for_between_blocks_of_prompts(model: models.CLIP) -> None:
    answers = iter([False, True])
    with pytest.raises(Stopped):
        build_classifier(
            *(model, models.get_tokenizer("tiny-test"), [f"thing {number}" for number in range(700)], ["{c}"]),
            should_stop=lambda: next(answers),
        )
    assert next(answers, None) is None
