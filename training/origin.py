"""What the weights that a run starts from say about images and texts, and what follows for the run.

Numbers of preprocessing come with the weights: flags win over them, and they win over the model's configuration.
A tokenizer must be the one that the weights were trained with. Knows no data and no step.
"""

from __future__ import annotations

import logging

import models
from training.checkpoint_content import MODEL_CONFIG_FILE, LoadedCheckpoint
from training.distributed import World
from training.errors import ConfigError
from training.start import Pretrained, StartState

log = logging.getLogger(__name__)


def read_origin(start: StartState, loaded: LoadedCheckpoint | None, world: World) -> models.Provenance | None:
    """What is known of the start's weights, the same on all ranks; None for fresh ones. Collective."""
    if loaded is not None:
        return models.parse_provenance(loaded.model_config, str(loaded.folder / MODEL_CONFIG_FILE))
    if not isinstance(start, Pretrained):
        return None
    source = start.source
    return world.on_main(lambda: models.read_provenance(source), "--pretrained")


def tell_preprocess(chosen: models.ModelConfig, usual: models.ModelConfig, origin: models.Provenance | None) -> None:
    """Says which numbers of the weights are not the usual ones of their model, and which of them flags have changed."""
    if origin is None:
        return
    for key, value in origin.preprocess.items():
        own, now = getattr(usual.preprocess, key), getattr(chosen.preprocess, key)
        if now != value:
            log.warning("images: %s is %s by its flag; the weights were trained with %s", key, now, value)
        elif now != own:
            log.info("images: %s is %s, as %s says; the model's own is %s", key, now, origin.file, own)


def open_tokenizer(
    config: models.ModelConfig, origin: models.Provenance | None, world: World, must_equal: bool = False
) -> models.Tokenizer:
    """The tokenizer of the model, compared with the one that the weights were trained with. Collective.

    Another vocabulary, padding or end of text is a ConfigError. Other ids for some texts are one if `must_equal`,
    and otherwise a warning.
    """
    with world.collectively("the tokenizer"):
        tokenizer = models.get_tokenizer(config)
        own = models.TokenizerIdentity.of(tokenizer)
        difference = own.check(origin.tokenizer) if origin and origin.tokenizer else None
        if difference and must_equal:
            raise ConfigError(f"--resume: {difference}. --tokenizer says where the right one is")
    if difference:
        log.warning("%s", difference)
    return tokenizer
