"""Class names and templates to the zero-shot classifier: one text feature a class. Knows no images.

Radford et al. 2021, section 3.1.4: the mean of the normalised features of a class's prompts, normalised again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import World
from training.errors import ConfigError
from training.evaluation.features import Tokenize, encode_texts, evaluating, in_shared_blocks
from training.evaluation.feed import ShouldStop

PLACEHOLDERS = ("{c}", "{}")
# Our own wording, for sets that come without templates.
DEFAULT_TEMPLATES = (
    "a photo of a {c}.",
    "a picture that shows a {c}.",
    "a close view of a {c}.",
    "a {c} seen from afar.",
    "a drawing of a {c}.",
    "{c}.",
)
_PROMPTS_A_BLOCK = 512


def check_prompts(where: str, classnames: Sequence[str], templates: Sequence[str]) -> None:
    """Raises ConfigError for missing or empty class names and for templates without a place for the name."""
    if not classnames:
        raise ConfigError(f"{where}: no class names; classnames.txt holds one name a line, in the order of the labels")
    for number, name in enumerate(classnames, 1):
        if not name.strip():
            raise ConfigError(f"{where}: class name {number} of {len(classnames)} is empty")
    if not templates:
        raise ConfigError(f"{where}: no templates; 'a photo of a {{c}}.' is one, one a line")
    for template in templates:
        if not any(place in template for place in PLACEHOLDERS):
            raise ConfigError(f"{where}: template {template!r} has no place for the class name: write {{c}} there")


def fill(template: str, name: str) -> str:
    """The prompt for one class. Other braces stay as they are."""
    for place in PLACEHOLDERS:
        template = template.replace(place, name)
    return template


def build_classifier(
    model: nn.Module,
    tokenizer: Tokenize,
    classnames: Sequence[str],
    templates: Sequence[str],
    precision: str = "fp32",
    world: World | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """float32 [E, C] on the rank's device: for each class the direction of its prompts.

    Collective: ranks share the classes. The result is the same for any number of ranks. Raises Stopped when one of
    them is asked to stop.
    """
    world = world or World()

    def encode(names: Sequence[str]) -> Tensor:
        prompts = [fill(template, name) for name in names for template in templates]
        features = encode_texts(model, tokenizer(prompts), precision, world)
        return F.normalize(features.view(len(names), len(templates), -1).mean(dim=1), dim=-1)

    with evaluating(model, world):
        rows = in_shared_blocks(classnames, max(1, _PROMPTS_A_BLOCK // len(templates)), encode, world, should_stop)
    return rows.T.contiguous().to(world.device)
