"""Zero-shot classifiers of a text tower that stands still, kept from one evaluation to the next. Knows no sets.

A tower stands still when nothing in it can be trained, and holds the same bits as when its classifiers were built.
The first is what makes keeping pay, the second is looked at each time: a rollback, or averaged weights in the place
of the model's, need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from training.distributed import World
from training.parallel import unwrap
from training.sharding import local, reshard

Prompts = tuple[tuple[str, ...], tuple[str, ...]]  # class names, templates
Fingerprint = tuple[tuple[str, torch.dtype, torch.Size, int], ...]

# Of a CLIP, all that text features cannot depend on; whatever else there is counts as the text tower's.
_NOT_TEXT = ("visual.", "text_decoder.", "logit_scale", "logit_bias")
_MAX_BYTES = 512 << 20
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ClassifierCache:
    """Classifiers [E, C] by their prompts, on the host; those of one state of the tower at a time."""

    def __init__(self, max_bytes: int = _MAX_BYTES):
        self._max_bytes = max_bytes
        self._tower: Fingerprint = ()
        self._kept: dict[Prompts, Tensor] = {}

    def get(self, model: nn.Module, prompts: Prompts, build: Callable[[], Tensor], world: World) -> Tensor:
        """The classifier of `prompts`, kept or else built, on the rank's device. Collective, as `build` is."""
        if not stands_still(model):
            return build()
        tower = fingerprint(model)
        # Collective: of a sharded tower each rank sees its own rows only, and all must build or none.
        if world.any(tower != self._tower):
            self._kept.clear()
        self._tower = tower
        if prompts in self._kept:
            return self._kept[prompts].to(world.device)
        classifier = build()
        self._keep(prompts, classifier)
        return classifier

    def _keep(self, prompts: Prompts, classifier: Tensor) -> None:
        """What is too much stays out: the sets are few and come in the same order, so none is better than another."""
        if sum(kept.nbytes for kept in self._kept.values()) + classifier.nbytes <= self._max_bytes:
            self._kept[prompts] = classifier.cpu()


def stands_still(model: nn.Module) -> bool:
    """True when no parameter that text features depend on is trained."""
    return not any(tensor.requires_grad for _, tensor in _text_tensors(model))


def fingerprint(model: nn.Module) -> Fingerprint:
    """Name, type, shape and the sum of all bits, word by word, of the text tower's tensors; of a sharded one, of this
    rank's rows. A pass over them on their device, which takes as long as reading them; not collective."""
    reshard(model)
    named = [(name, local(tensor.detach())) for name, tensor in _text_tensors(model)]
    sums = torch.stack([_sum_of_words(tensor) for _, tensor in named]).tolist()  # Host sync: one for all.
    return tuple((name, tensor.dtype, tensor.shape, total) for (name, tensor), total in zip(named, sums, strict=True))


def _text_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    plain = unwrap(model)
    for name, tensor in chain(plain.named_parameters(), plain.named_buffers()):
        if not name.startswith(_NOT_TEXT):
            yield name, tensor


def _sum_of_words(tensor: Tensor) -> Tensor:
    return tensor.view(_WORDS[tensor.element_size()]).sum(dtype=torch.int64)
