"""One update without padded text: the same as with it, under accumulation, recomputation, ranks and compilation."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import models
from data import AugmentConfig, Batch, DeviceTransform
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig, ModelConfig, OptimConfig
from training.distributed import World, session
from training.losses import Contrastive
from training.optimizer import build_optimizer
from training.parallel import parallelize
from training.step import TrainStep

ROWS, CONTEXT, START, END = 8, 48, 49406, 49407
SINGLE = World()


def _step(
    world: World, *, cut: bool, accum: int = 1, checkpointing: bool = False, dropout: float = 0.0, **cluster: bool
) -> TrainStep:
    torch.manual_seed(7)
    config = models.config_with(models.load_model_config("tiny-test"), context_length=CONTEXT, patch_dropout=dropout)
    model = models.build_model(config)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), "vit", ())
    settings = ModelConfig(grad_checkpointing=checkpointing)
    wrapped = parallelize(model, settings, ClusterConfig(device="cpu", **cluster), world)
    transform = DeviceTransform((0.5,) * 3, (0.5,) * 3, AugmentConfig())
    return TrainStep(wrapped, optimizer, transform, world, 0, "fp32", accum, 1.0, Contrastive(), cut_padding=cut)


def _batch(step: int, rows: int = ROWS) -> Batch:
    """The global batch of a step. Lengths differ so much that steps and ranks have other numbers of groups."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, START, (rows, CONTEXT), generator=generator)
    longest = (3, CONTEXT, 12)[step % 3]
    for row, length in enumerate(torch.linspace(2, longest, rows).long().tolist()):
        tokens[row, 0], tokens[row, length - 1] = START, END
        tokens[row, length:] = 0
    images = torch.randint(0, 256, (rows, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Batch(images=images, tokens=tokens, draws={}, keys=[str(i) for i in range(rows)], shards=["s"] * rows)


def _gradients(step: TrainStep, batch: Batch) -> dict[str, Tensor]:
    step(batch, 0, 0.0)
    return {name: p.grad for name, p in step.model.named_parameters() if p.grad is not None}


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert float((got[name] - value).norm()) <= tolerance * (float(value.norm()) or 1.0), name


@pytest.mark.parametrize("accum", [1, 2, 4])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_gradients_without_padding_are_those_with_it(accum: int, checkpointing: bool) -> None:
    want = _gradients(_step(SINGLE, cut=False, accum=accum, dropout=0.5), _batch(1))
    got = _gradients(_step(SINGLE, cut=True, accum=accum, dropout=0.5, checkpointing=checkpointing), _batch(1))
    assert len(got) == len(list(_step(SINGLE, cut=True).model.parameters()))
    _assert_close(got, want, 1e-5)


def test_both_passes_over_a_micro_batch_use_the_same_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[models.TextPlan] = []
    step = _step(SINGLE, cut=True, accum=2)
    tower = step.model.text_tower
    features = tower.text_features
    monkeypatch.setattr(tower, "text_features", lambda tokens, plan: (plans.append(plan), features(tokens, plan))[1])
    step(_batch(1), 0, 0.0)
    assert len(plans) == 4
    for first, again in zip(plans[:2], plans[2:], strict=True):
        assert first.groups == again.groups
        assert torch.equal(first.index, again.index)


def test_the_plan_is_made_of_the_tokens_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on the device would have to be waited for."""
    batch = _batch(1)
    moved = dataclasses.replace(batch, tokens=batch.tokens.clone(), loaded_tokens=batch.tokens)
    step = _step(SINGLE, cut=True, accum=2)
    tower, seen = step.model.text_tower, []
    plan_text = tower.plan_text
    monkeypatch.setattr(tower, "plan_text", lambda tokens, *_: (seen.append(tokens.data_ptr()), plan_text(tokens))[1])
    step(moved, 0, 0.0)
    assert set(seen) == {part.data_ptr() for part in batch.tokens.chunk(2)}


Trained = tuple[dict[str, Tensor], list[float]]  # final weights, loss of each step


def _train(cut: bool, accum: int = 1, checkpointing: bool = False, static_graph: bool = False) -> Trained:
    with session(ClusterConfig(device="cpu")) as world:
        step = _step(world, cut=cut, accum=accum, checkpointing=checkpointing, ddp_static_graph=static_graph)
        parts = [_batch(i).split(world.size)[world.rank] for i in range(3)]
        losses = [float(step(part, i, 1e-3).loss) for i, part in enumerate(parts)]
        return {name: value.clone() for name, value in step.model.state_dict().items()}, losses


@pytest.mark.parametrize(
    ("accum", "checkpointing", "static_graph"),
    [
        pytest.param(1, True, True, id="static graph, recomputed"),
        pytest.param(2, False, False, id="accumulated"),
        pytest.param(1, False, False, id="plain", marks=pytest.mark.slow),
        pytest.param(1, False, True, id="static graph", marks=pytest.mark.slow),
        pytest.param(2, True, False, id="accumulated, recomputed", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_with_other_groups_each_train_as_one_with_padding(
    accum: int, checkpointing: bool, static_graph: bool
) -> None:
    alone, losses = _train(False)
    results = run_ranks(_train, 2, True, accum, checkpointing, static_graph)
    for state, rank_losses in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        # The key's bias has a gradient of zero (a softmax ignores it), of which Adam makes steps out of rounding.
        _assert_close({name.removeprefix("module."): value for name, value in state.items()}, alone, 5e-4)
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name


COMPILED_ROWS, COMPILED_STEPS = 32, 10


def _drawn(step: int) -> Batch:
    """Captions as they come: every length from 2 to the context, differently many of each in every step."""
    batch = _batch(step, COMPILED_ROWS)
    lengths = torch.randint(2, CONTEXT + 1, (COMPILED_ROWS,), generator=torch.Generator().manual_seed(step))
    batch.tokens.fill_(1)
    for row, length in enumerate(lengths.tolist()):
        batch.tokens[row, 0], batch.tokens[row, length - 1] = START, END
        batch.tokens[row, length:] = 0
    return batch


def _compiled() -> tuple[list[int], list[int], list[float]]:
    """After each step: graphs compiled so far. Of each step: tokens of its texts, and the loss."""
    from torch._dynamo.utils import counters

    with session(ClusterConfig(device="cpu")) as world:
        step = replace(_step(world, cut=True, torchcompile=True), static_shapes=True)
        graphs, tokens, losses = [], [], []
        for i in range(COMPILED_STEPS):
            batch = _drawn(i)
            tokens.append(len(step._text_plan(batch.tokens).index))
            losses.append(float(step(batch, i, 1e-3).loss))
            graphs.append(counters["stats"]["unique_graphs"])
        return graphs, tokens, losses


@pytest.mark.slow
def test_compiled_towers_meet_few_lengths_and_compile_each_once() -> None:
    [(graphs, tokens, losses)] = run_ranks(_compiled, 1, timeout_s=300.0)
    assert all(count % COMPILED_ROWS == 0 for count in tokens)
    assert len(set(tokens)) <= 6  # of 32 rows whose lengths are spread as widely as they can be
    for i in range(1, COMPILED_STEPS):
        is_known = tokens[i] in tokens[:i]
        assert (graphs[i] == graphs[i - 1]) is is_known
    step = _step(SINGLE, cut=False)
    want = [float(step(_drawn(i), i, 1e-3).loss) for i in range(COMPILED_STEPS)]
    assert losses == pytest.approx(want, rel=1e-3)
