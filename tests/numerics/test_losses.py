"""Streamed losses and all their gradients against fp64 definitions, on one process and on 2, 4 and 8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.gloo import gloo_group, run_ranks
from tests.numerics.exact import (
    BIAS,
    LOSSES,
    TOLERANCE,
    Case,
    errors,
    errors_on_rank,
    features,
    relative_error,
    sigmoid_definition,
    softmax_definition,
)
from training import gather
from training.losses import (
    Contrastive,
    Features,
    blocks,
    contrastive_loss,
    dense_distillation_loss,
    dense_loss,
    dense_sigmoid_loss,
    sigmoid_loss,
)
from training.losses.distill import Similarities

KINDS = ("random", "aligned", "opposed", "shuffled", "rounded", "far")
# Of 6 rows on a rank: one column, blocks that begin and end inside the diagonal, a last one that is narrower.
BLOCKS = (1, 6 * 4, 6 * 5, 6 * 7)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_a_loss_and_its_gradients_equal_the_fp64_definition(name: str, kind: str, scale: float) -> None:
    # Distilled at a low scale, images that are nearly the same have gradients that nearly cancel.
    tolerance = 3 * TOLERANCE if (name, kind, scale) == ("distill", "far", 1.0) else TOLERANCE
    for block in (None, 64, 64 * 9):
        assert max(errors(name, Case(kind, scale, rows=64, block=block))) < tolerance


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_an_embedding_of_usual_size_is_as_exact(name: str, scale: float) -> None:
    for kind in KINDS:
        assert max(errors(name, Case(kind, scale, rows=192, embed=512, block=192 * 50))) < TOLERANCE


CASES = [
    *(Case(block=block, scale=scale) for block in BLOCKS for scale in (1.0, 100.0)),
    *(Case(kind, scale=100.0, block=6 * 5) for kind in KINDS),
    Case(rows=1, block=2),
    Case(local_loss=False),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_global_loss_and_gradients(name: str, world: int) -> None:
    for on_rank in run_ranks(errors_on_rank, world, name, CASES):
        for case, found in zip(CASES, on_rank, strict=True):
            assert max(found) < TOLERANCE, case


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_process_takes_any_block(name: str) -> None:
    for case in CASES:
        if case.rows > 1:  # alone, a pair has no negative: the softmax losses are zero
            assert max(errors(name, case)) < TOLERANCE, case


class _Largest(TorchDispatchMode):
    """Remembers the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_larger_than_a_block_and_no_logits_are_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 128 * 10)
    image, text = (t.requires_grad_() for t in features("random", 128, 8))
    shared = (torch.tensor(10.0), *([torch.tensor(BIAS)] if name == "sigmoid" else []))
    with _Largest() as largest:
        value = LOSSES[name][0](image, text, *shared, True)
        kept = sum(t.numel() for t in value.grad_fn.saved_tensors if t is not None)
        value.backward()
    assert largest.numel == 128 * 10  # of 128 x 128 logits
    assert kept <= 2 * 128 * 8 + 2  # the gradients


def test_one_pair_alone_has_no_loss_and_no_gradient() -> None:
    image = F.normalize(torch.ones(1, 4), dim=1).requires_grad_()
    value = contrastive_loss(image, image.detach(), torch.tensor(100.0))
    value.backward()
    assert not value and not image.grad.any()


def test_a_loss_of_almost_nothing_keeps_its_relative_precision() -> None:
    """All pairs found with certainty: 1 - p would be zero in fp32, and its gradient noise."""
    image, text = features("aligned", 64, 128)
    assert float(softmax_definition(image.double(), text.double(), torch.tensor(100.0).double())) < 1e-25
    assert max(errors("softmax", Case("aligned", 100.0, rows=64, embed=128))) < TOLERANCE


def test_opposite_features_at_the_largest_scale_stay_finite() -> None:
    image = F.normalize(torch.ones(4, 16), dim=1).requires_grad_()
    value = contrastive_loss(image, -image.detach(), torch.tensor(100.0))
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(image.grad).all()


def test_a_column_of_logits_near_minus_scale_does_not_underflow() -> None:
    """exp(-200) is what the shift leaves of it, in fp64; lengths above 1 make it less."""
    text = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    image = F.normalize(-text[:1] + 1e-3 * text, dim=1) * 1.01
    assert float((image @ text[0]).max()) < -1
    exact = [image.double().requires_grad_(), text.double()]
    definition = softmax_definition(*exact, torch.tensor(100.0).double())
    definition.backward()
    image = image.requires_grad_()
    value = contrastive_loss(image, text, torch.tensor(100.0))
    value.backward()
    assert relative_error(value.detach(), definition.detach()) < TOLERANCE
    assert relative_error(image.grad, exact[0].grad) < TOLERANCE


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_around_the_loss_does_not_reach_its_arithmetic(name: str) -> None:
    image, text = features("random", 32, 16)
    inputs = (image, text, torch.tensor(100.0), *([torch.tensor(BIAS)] if name == "sigmoid" else []))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = LOSSES[name][0](*inputs, True)
    assert torch.equal(inside, LOSSES[name][0](*inputs, True))


def test_dense_losses_are_the_definitions() -> None:
    image, text = (t.double() for t in features("random", 16, 16))
    scale, bias = torch.tensor(14.3).double(), torch.tensor(BIAS).double()
    logits, labels = scale * image @ text.T, torch.arange(16)
    entropies = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(dense_loss(image, text, scale), entropies)
    torch.testing.assert_close(softmax_definition(image, text, scale), entropies)
    torch.testing.assert_close(
        dense_sigmoid_loss(image, text, scale, bias), sigmoid_definition(image, text, scale, bias)
    )
    student = Similarities(image, text, scale)
    value = dense_distillation_loss(student, Similarities(text, image, scale))
    swapped = text @ image.T * scale
    want = (F.cross_entropy(logits, swapped.softmax(1)) + F.cross_entropy(logits.T, swapped.softmax(0).T)) / 2
    torch.testing.assert_close(value, want)


def test_a_softmax_gives_a_bias_the_gradient_zero_and_not_none() -> None:
    image, text = features("random", 8, 16)
    bias = torch.tensor(BIAS, requires_grad=True)
    sum(Contrastive()(Features(image, text, torch.tensor(10.0), bias)).values()).backward()
    assert float(bias.grad) == 0


def _moved_on_rank() -> dict[str, dict[str, int]]:
    """Bytes that this rank sends, by loss and collective, in ring algorithms: n - 1 of n parts of what is gathered
    or reduced, and twice that for an all-reduce, which is a reduce-scatter and a gather."""
    with gloo_group() as (rank, world), pytest.MonkeyPatch.context() as patch:
        moved: dict[str, int] = {}

        def count(name: str, factor: int, which: int) -> None:
            owner, attribute = (gather, name) if hasattr(gather, name) else (dist, name)
            original = getattr(owner, attribute)

            def counting(*tensors: Tensor) -> object:
                whole = tensors[which]
                part = whole.numel() * whole.element_size() // world
                moved[name] = moved.get(name, 0) + factor * (world - 1) * part
                return original(*tensors)

            patch.setattr(owner, attribute, counting)

        count("_all_gather", 1, 0)
        count("_reduce_scatter", 1, 1)
        count("all_reduce", 2, 0)
        image, text = (t[rank * 8 : rank * 8 + 8].clone().requires_grad_() for t in features("random", 8 * world, 512))
        scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(BIAS, requires_grad=True)
        found = {}
        for name, loss in {
            "streamed": lambda: contrastive_loss(image, text, scale),
            "sigmoid": lambda: sigmoid_loss(image, text, scale, bias),
            "both towers": lambda: contrastive_loss(image, text, scale, local_loss=False),
        }.items():
            moved.clear()
            loss().backward()
            found[name] = dict(moved)
        return found


def test_a_streamed_loss_moves_half_the_bytes_of_gathering_both_towers() -> None:
    world, tower = 2, 16 * 512 * 4 // 2  # sent by a rank to gather one tower, and to reduce its gradient
    for moved in run_ranks(_moved_on_rank, world):
        assert moved["both towers"] == {"_all_gather": 2 * tower, "_reduce_scatter": 2 * tower}
        assert moved["sigmoid"] == {"_all_gather": tower, "_reduce_scatter": tower}
        sums = moved["streamed"].pop("all_reduce")
        assert moved["streamed"] == moved["sigmoid"]
        assert sums == 2 * 16 * 2 * 8 // 2  # two fp64 numbers a column, there and back
        assert sums + 2 * tower < 0.51 * 4 * tower
