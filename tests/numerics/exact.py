"""Losses against their definitions in fp64: features that are hard on them, and relative errors on any ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.gloo import gloo_group
from training.losses import blocks, contrastive_loss, distillation_loss, sigmoid_loss
from training.losses.distill import Similarities

TOLERANCE = 1e-5  # relative, of the loss and of each gradient
BIAS = -10.0


@dataclass(frozen=True)
class Case:
    """Features and a scale; `block` is how many logits a block may have, none is the default."""

    kind: str = "random"
    scale: float = 14.3
    rows: int = 6  # of a rank
    embed: int = 16
    block: int | None = None
    local_loss: bool = True


def features(kind: str, rows: int, embed: int, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Images and texts [rows, embed] of one kind."""
    generator = torch.Generator().manual_seed(seed)
    image, noise = torch.randn(2, rows, embed, generator=generator)
    if kind == "random":
        return F.normalize(image, dim=1), F.normalize(0.7 * image + noise, dim=1)
    image = F.normalize(image, dim=1)
    if kind == "aligned":  # nothing is left to learn but the last bits
        return image, F.normalize(image + 0.01 * F.normalize(noise, dim=1), dim=1)
    if kind == "opposed":  # every positive is as wrong as can be
        return image, F.normalize(0.01 * F.normalize(noise, dim=1) - image, dim=1)
    if kind == "shuffled":  # every text fits another image best
        return image, F.normalize(image.roll(1, 0) + 0.3 * F.normalize(noise, dim=1), dim=1)
    if kind == "rounded":  # lengths are 1 up to bf16's precision only
        return image.bfloat16().float(), F.normalize(image + noise / 8, dim=1).bfloat16().float()
    if kind == "far":  # one text, all images on its other side: logits of its column near -scale
        text = F.normalize(noise, dim=1)
        return F.normalize(0.01 * image - text[:1], dim=1), text
    raise ValueError(kind)


Loss = Callable[..., Tensor]


def softmax(image: Tensor, text: Tensor, scale: Tensor, local_loss: bool) -> Tensor:
    """The loss under test, and below it its definition; both of them take the global or the local batch."""
    return contrastive_loss(image, text, scale, local_loss=local_loss)


def softmax_definition(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3, by the odds against the positives: log_softmax loses a loss below 1e-10."""
    logits = scale * image @ text.T
    odds = (logits - logits.diagonal()[:, None]).fill_diagonal_(-torch.inf).logsumexp(1)
    column_odds = (logits - logits.diagonal()).fill_diagonal_(-torch.inf).logsumexp(0)
    return (F.softplus(odds).mean() + F.softplus(column_odds).mean()) / 2


def sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, local_loss: bool) -> Tensor:
    """As `softmax`."""
    return sigmoid_loss(image, text, scale, bias, local_loss=local_loss)


def sigmoid_definition(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Zhai et al. 2023, algorithm 1."""
    logits = scale * image @ text.T + bias
    return -F.logsigmoid((2 * torch.eye(len(logits)) - 1) * logits).sum() / len(logits)


def _teacher(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Another embedding size and temperature; a function of the student's rows alone, so that ranks agree."""
    mix = torch.randn(image.shape[1], 7, generator=torch.Generator().manual_seed(5)).to(image.dtype)
    with torch.autocast("cpu", enabled=False):
        return F.normalize(image @ mix, dim=1), F.normalize((image**2) @ mix, dim=1), torch.tensor(20.0)


def distill(image: Tensor, text: Tensor, scale: Tensor, local_loss: bool) -> Tensor:
    """As `softmax`, towards a teacher made up from the images."""
    teacher = Similarities(*_teacher(image.detach()))
    return distillation_loss(Similarities(image, text, scale), teacher, local_loss=local_loss)


def distill_definition(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies."""
    teacher_image, teacher_text, teacher_scale = _teacher(image.detach().float())
    target = teacher_scale.double() * teacher_image.double() @ teacher_text.double().T
    logits = scale * image @ text.T
    rows = -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return (rows - (target.softmax(0) * logits.log_softmax(0)).sum(0).mean()) / 2


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "softmax": (softmax, softmax_definition),
    "sigmoid": (sigmoid, sigmoid_definition),
    "distill": (distill, distill_definition),
}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want).norm() / want.norm())


def errors(name: str, case: Case, rank: int = 0, world: int = 1) -> list[float]:
    """Relative errors of loss, image, text, scale (and bias) gradients, averaged over ranks as DDP averages."""
    loss, definition = LOSSES[name]
    image, text = features(case.kind, case.rows * world, case.embed)
    numbers = [case.scale, BIAS] if name == "sigmoid" else [case.scale]
    exact = [t.double().requires_grad_() for t in (image, text, *(torch.tensor(number) for number in numbers))]
    value = definition(*exact)
    value.backward()
    own = slice(rank * case.rows, (rank + 1) * case.rows)
    leaves = [t.clone().requires_grad_() for t in (image[own], text[own], *(torch.tensor(n) for n in numbers))]
    with mock.patch.object(blocks, "BLOCK_ELEMENTS", case.block or blocks.BLOCK_ELEMENTS):
        got = loss(*leaves, case.local_loss)
        got.backward()
    shared = torch.stack([got.detach(), *(leaf.grad for leaf in leaves[2:])])
    if world > 1:
        dist.all_reduce(shared)
    pairs = [(shared[0] / world, value.detach())]
    pairs += [(leaf.grad / world, want.grad[own]) for leaf, want in zip(leaves[:2], exact[:2], strict=True)]
    pairs += [(mean / world, want.grad) for mean, want in zip(shared[1:], exact[2:], strict=True)]
    return [relative_error(a, b) for a, b in pairs]


def errors_on_rank(name: str, cases: list[Case]) -> list[list[float]]:
    """For `run_ranks`: `errors` of each case on this rank."""
    with gloo_group() as (rank, world):
        return [errors(name, case, rank, world) for case in cases]
