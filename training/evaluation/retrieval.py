"""Retrieval between images and captions, and the contrastive loss on them. Several captions an image are allowed.

Features of all ranks are gathered in the order of the set; the score matrix exists only as blocks of rows.
Scores are float64: no setting for faster matrix products may decide who comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import EvalBatch
from training.distributed import World
from training.errors import DataConfigError
from training.evaluation.features import Tokenize, encode_images, encode_texts, evaluating, in_shared_blocks
from training.evaluation.feed import ShouldStop, filled, in_step
from training.evaluation.specs import RECALLS
from training.parallel import unwrap

# Pairs that compete in one term of the loss. Fixed, so that the loss of a set depends on nothing but the model.
LOSS_BLOCK = 256
_TEXTS_A_BLOCK = 256
_SCORES_A_BLOCK = 8_000_000  # 64 MB in float64


@dataclass(frozen=True)
class PairFeatures:
    """A set in its own order: images [N, E], texts [M, E], and for each text the index of its image [M]."""

    images: Tensor
    texts: Tensor
    owner: Tensor


def retrieval(
    model: nn.Module,
    tokenizer: Tokenize,
    batches: Iterator[EvalBatch],
    batch_size: int,
    image_size: tuple[int, int],
    precision: str = "fp32",
    world: World | None = None,
    should_stop: ShouldStop | None = None,
) -> dict[str, float]:
    """{image_to_text,text_to_image}_{R@1,R@5,R@10,mean_rank,median_rank}, clip_val_loss, num_samples and
    num_captions of a set.

    Ranks count from 1. Each line of a sample's text is a caption of its image. An image is found when any of its
    captions is among the nearest k; equal scores rank by their place in the set. batches: this rank's pairs, of up
    to `batch_size` rows. Collective. Raises DataConfigError for an empty set, Stopped when asked to stop.
    """
    world = world or World()
    with evaluating(model, world):
        pairs = _gather_features(model, tokenizer, batches, batch_size, image_size, precision, world, should_stop)
        scale, bias = _temperature(model)
        figures = {"clip_val_loss": blockwise_loss(pairs, scale, bias), "num_samples": float(len(pairs.images))}
        figures["num_captions"] = float(len(pairs.texts))
        index = torch.arange(len(pairs.images), device=world.device)
        figures |= _recalls("image_to_text", pairs.images, pairs.texts, index, pairs.owner, world)
        return figures | _recalls("text_to_image", pairs.texts, pairs.images, pairs.owner, index, world)


def _recalls(
    name: str, queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor, world: World
) -> dict[str, float]:
    positions = _shared_positions(queries, keys, query_group, key_group, world).double()
    figures = {f"{name}_R@{k}": float((positions < k).double().mean()) for k in RECALLS}
    figures[f"{name}_mean_rank"] = float(positions.mean()) + 1
    figures[f"{name}_median_rank"] = float(positions.quantile(0.5).floor()) + 1
    return figures


def _gather_features(
    model: nn.Module,
    tokenizer: Tokenize,
    batches: Iterator[EvalBatch],
    batch_size: int,
    image_size: tuple[int, int],
    precision: str,
    world: World,
    should_stop: ShouldStop | None,
) -> PairFeatures:
    """Features of the whole set on every rank, in the order of the set. Collective."""
    own: list[tuple[Tensor, Tensor, list[str]]] = []
    for batch in in_step(batches, world, should_stop):
        images = filled(None if batch is None else batch.images, batch_size, image_size)
        features = encode_images(model, images, precision, world).cpu()
        if batch is not None:
            assert batch.captions is not None
            # A copy: a view would keep, and send, the rows that only fill up.
            own.append((batch.indices, features[: len(batch.images)].clone(), batch.captions))
    every = [part for parts in world.all_gather_object(own) for part in parts]
    if not every:
        raise DataConfigError("the set is empty: no image with a caption was found in it")
    order = torch.cat([indices for indices, _, _ in every]).argsort()
    texts = [text for _, _, captions in every for text in captions]
    groups = [_lines(texts[i]) for i in order.tolist()]
    images = torch.cat([features for _, features, _ in every])[order]
    owner = torch.tensor([index for index, group in enumerate(groups) for _ in group])

    def encode(captions: Sequence[str]) -> Tensor:
        return encode_texts(model, tokenizer(list(captions)), precision, world)

    lines = [line for group in groups for line in group]
    text_features = in_shared_blocks(lines, _TEXTS_A_BLOCK, encode, world, should_stop)
    return PairFeatures(images.to(world.device), text_features.to(world.device), owner.to(world.device))


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()] or [text]


def _shared_positions(queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor, world: World) -> Tensor:
    """`first_positions` of all queries [N] on every rank's host; ranks share the blocks of rows. Collective."""
    step = max(1, _SCORES_A_BLOCK // len(keys))
    own = {
        first: first_positions(queries[first : first + step], keys, query_group[first : first + step], key_group).cpu()
        for first in range(world.rank * step, len(queries), world.size * step)
    }
    every = {first: rows for part in world.all_gather_object(own) for first, rows in part.items()}
    return torch.cat([every[first] for first in sorted(every)])


def first_positions(queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor) -> Tensor:
    """For each query, how many keys come before the best one of its own group: int64 [N], 0 is the best.

    queries [N, E], keys [M, E]; a key belongs to a query when their groups are equal. Ties go to the lower index.
    """
    scores = queries.double() @ keys.double().T
    own = query_group[:, None] == key_group[None, :]
    best = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
    index = torch.arange(len(keys), device=keys.device)
    best_index = torch.where(own & (scores == best), index, len(keys)).amin(dim=1, keepdim=True)
    ahead = (scores > best) | ((scores == best) & (index < best_index))
    return (ahead & ~own).sum(dim=1)


def blockwise_loss(pairs: PairFeatures, scale: float, bias: float | None = None) -> float:
    """Mean contrastive loss over consecutive, equal blocks of about LOSS_BLOCK images with their first captions.

    Unlike a loss over batches, it is the same for any batch size and number of ranks. With a bias it is the
    sigmoid loss (Zhai et al. 2023, equation 1), else the softmax loss (Radford et al. 2021, figure 3).
    """
    first = torch.searchsorted(pairs.owner, torch.arange(len(pairs.images), device=pairs.owner.device))
    num_blocks = max(1, round(len(pairs.images) / LOSS_BLOCK))
    blocks = zip(pairs.images.tensor_split(num_blocks), pairs.texts[first].tensor_split(num_blocks), strict=True)
    total = sum(len(image) * float(_loss(scale * image.double() @ text.double().T, bias)) for image, text in blocks)
    return total / len(pairs.images)


def _loss(logits: Tensor, bias: float | None) -> Tensor:
    if bias is not None:
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
        return -F.logsigmoid(signs * (logits + bias)).sum() / len(logits)
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _temperature(model: nn.Module) -> tuple[float, float | None]:
    """Scale and bias of the model's logits."""
    plain = unwrap(model)
    bias = getattr(plain, "logit_bias", None)
    return float(plain.logit_scale.exp()), None if bias is None else float(bias)
