"""One update: k micro-batches equal one batch, two ranks equal one, non-finite steps change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import models
from data import AugmentConfig, Batch, DeviceTransform
from tests.helpers.gloo import run_ranks
from training.config import ClusterConfig, ModelConfig, OptimConfig
from training.distributed import World, session
from training.footprint import Footprint
from training.losses import Contrastive, Distillation
from training.losses.objective import joined
from training.optimizer import build_optimizer
from training.parallel import parallelize
from training.setup import SIGLIP_LOG_SCALE
from training.sharding import local
from training.step import TrainStep
from training.witness import Witness

ROWS = 8


def _model(name: str = "tiny-test", patch_dropout: float = 0.0) -> models.CLIP:
    torch.manual_seed(7)
    return models.build_model(models.config_with(models.load_model_config(name), patch_dropout=patch_dropout))


def _batch(step: int, side: int = 32, context: int = 16) -> Batch:
    """The global batch of one step, the same for every world size."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 49405, (ROWS, context), generator=generator)
    tokens[:, -1] = 49407
    images = torch.randint(0, 256, (ROWS, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(images=images, tokens=tokens, draws={}, keys=[str(i) for i in range(ROWS)], shards=["s"] * ROWS)


def _rows(batch: Batch, rank: int, size: int) -> Batch:
    return batch.split(size)[rank]


def _step(model: nn.Module, world: World, *, accum: int = 1, precision: str = "fp32", **cluster: bool) -> TrainStep:
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3), "vit", ())
    wrapped = parallelize(model, ModelConfig(precision=precision), ClusterConfig(device="cpu", **cluster), world)
    transform = DeviceTransform((0.5,) * 3, (0.5,) * 3, AugmentConfig())
    return TrainStep(
        wrapped, optimizer, transform, world, 0, precision, accum, 1.0, Contrastive(), witness=Witness(wrapped)
    )


def _gradients(accum: int, name: str, patch_dropout: float = 0.0) -> dict[str, Tensor]:
    model = _model(name, patch_dropout)
    step = _step(model, World(), accum=accum)
    step(_batch(0, side=model.visual.image_size[0]), 0, 0.0)
    return {key: p.grad.clone() for key, p in model.named_parameters()}


def _assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, noise: float = 0.0) -> None:
    for name, value in want.items():
        scale = float(value.norm()) or 1.0
        assert float((got[name] - value).norm()) < tolerance * scale + noise, name


# The bias of attention keys has no gradient but rounding errors, which Adam divides by its epsilon.
ADAM_NOISE = 1e-5


@pytest.mark.parametrize("accum", [2, 4, 8])
def test_accumulated_gradients_equal_those_of_the_whole_batch_temperature_included(accum: int) -> None:
    _assert_close(_gradients(accum, "tiny-test"), _gradients(1, "tiny-test"), 2e-5)


def _random_model(kind: str) -> models.CLIP:
    """Towers that draw: patch dropout; dropout and stochastic depth; and batch statistics."""
    torch.manual_seed(7)
    config = models.load_model_config(
        {"patches": "tiny-test", "depth": "tiny-test-timm", "norms": "tiny-test-rn"}[kind]
    )
    if kind == "norms":
        return models.build_model(config)
    options = {"patch_dropout": 0.5} if kind == "patches" else {"timm_drop": 0.3, "timm_drop_path": 0.4}
    if kind == "depth":
        options["timm_proj"] = "linear"
    return models.build_model(replace(config, vision_cfg=replace(config.vision_cfg, **options)))


def _with_erasing(batch: Batch) -> Batch:
    side = batch.images.shape[-1]
    box = torch.tensor([side // 4, side // 4, side // 2, side // 2])
    return replace(batch, draws={"erase": box.expand(len(batch), 1, 4)})


_CASES = [(accum, kind) for kind in ("patches", "depth", "norms") for accum in (1, 2, 4, 8)]
_CASES.remove((8, "norms"))  # a batch norm needs more than one row


@pytest.mark.parametrize(("accum", "kind"), _CASES)
def test_accumulation_gives_the_gradient_of_one_loss_under_the_draws_of_each_micro_batch(accum: int, kind: str) -> None:
    """Against autograd through all micro-batches at once, which the replay must give without holding them at once."""
    model, reference = _random_model(kind), _random_model(kind)
    batch = _with_erasing(_batch(0, side=model.visual.image_size[0]))
    step, whole = _step(model, World(), accum=accum), _step(reference, World())
    reference.train()
    outputs = [whole._forward(part, 0, i) for i, part in enumerate(batch.split(accum))]
    whole._backward(replace(joined(outputs), scale=reference.logit_scale.exp()))
    norm = nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    result = step(batch, 0, 0.0)
    torch.testing.assert_close(result.grad_norm, norm, rtol=1e-5, atol=0)
    want = {name: p.grad for name, p in reference.named_parameters()}
    assert "logit_scale" in want
    _assert_close({name: p.grad for name, p in model.named_parameters()}, want, 5e-5)


@pytest.mark.parametrize("kind", ["patches", "depth"])
def test_with_dropping_on_gradients_are_the_same_for_any_number_of_micro_batches(kind: str) -> None:
    """Masks belong to rows: dropout, patch dropout and stochastic depth drop the same however the batch is cut."""
    found = {}
    for accum in (1, 2, 4, 8):
        model = _random_model(kind)
        _step(model, World(), accum=accum)(_batch(0, side=model.visual.image_size[0]), 0, 0.0)
        found[accum] = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert "logit_scale" in found[1]
    for accum in (2, 4, 8):
        _assert_close(found[accum], found[1], 2e-5)


@pytest.mark.parametrize("kind", ["patches", "depth"])
def test_the_draws_of_a_micro_batch_are_really_random_and_really_repeated(kind: str) -> None:
    """Else the test above would pass on towers that draw nothing."""
    model = _random_model(kind).train()
    step = _step(model, World())
    part = _with_erasing(_batch(0, side=model.visual.image_size[0]))
    with torch.no_grad():
        first, again, other = (step._forward(part, 0, micro).image for micro in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, atol=1e-3)


def test_batch_statistics_are_updated_once_by_an_accumulated_step() -> None:
    model = _model("tiny-test-rn")
    _step(model, World(), accum=2)(_batch(0, side=model.visual.image_size[0]), 0, 0.0)
    counts = {int(m.num_batches_tracked) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == {2}  # once for each of the two micro-batches


Trained = tuple[dict[str, Tensor], list[float]]  # final weights, loss of each step


def _train(steps: int, accum: int = 1, precision: str = "fp32", name: str = "tiny-test", **cluster: bool) -> Trained:
    with session(ClusterConfig(device="cpu")) as world:
        model = _model(name)
        step = _step(model, world, accum=accum, precision=precision, **cluster)
        side = model.visual.image_size[0]
        losses = [float(step(_rows(_batch(i, side), world.rank, world.size), i, 1e-3).loss) for i in range(steps)]
        return {key: value.clone() for key, value in model.state_dict().items()}, losses


def _train_static_graph() -> Trained:
    return _train(3, ddp_static_graph=True)


@pytest.mark.parametrize("static_graph", [False, True])
def test_two_ranks_train_as_one(static_graph: bool) -> None:
    alone, losses = _train(3)
    results = run_ranks(_train_static_graph, 2) if static_graph else run_ranks(_train, 2, 3)
    for state, rank_losses in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        _assert_close(state, alone, 1e-4, ADAM_NOISE)


def test_two_ranks_with_accumulation_train_as_one_and_stay_equal() -> None:
    alone, losses = _train(3)
    results = run_ranks(_train, 2, 3, 2)
    for state, rank_losses in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        _assert_close(state, alone, 1e-4, ADAM_NOISE)
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name


def _siglip(name: str = "tiny-test") -> models.CLIP:
    torch.manual_seed(7)
    config = models.config_with(
        models.load_model_config(name), init_logit_scale=SIGLIP_LOG_SCALE, init_logit_bias=-10.0
    )
    return models.build_model(config)


def _teacher() -> models.CLIP:
    torch.manual_seed(8)
    return models.build_model(models.load_model_config("tiny-test")).eval().requires_grad_(False)


def _objective_step(kind: str, world: World, accum: int) -> tuple[models.CLIP, TrainStep]:
    model = _siglip() if kind in ("siglip", "softmax with a bias") else _model()
    objective = Distillation() if kind == "distill" else Contrastive(sigmoid=kind == "siglip")
    teacher = _teacher() if kind == "distill" else None
    return model, replace(_step(model, world, accum=accum), objective=objective, teacher=teacher)


KINDS = ("siglip", "softmax with a bias", "distill")


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_accumulates_exactly_bias_and_temperature_once(kind: str) -> None:
    found = []
    for accum in (1, 4):
        model, step = _objective_step(kind, World(), accum)
        result = step(_batch(0), 0, 0.0)
        found.append(({key: p.grad.clone() for key, p in model.named_parameters()}, result))
    _assert_close(found[1][0], found[0][0], 2e-5)
    for name, loss in found[0][1].losses.items():
        torch.testing.assert_close(found[1][1].losses[name], loss, rtol=1e-5, atol=0)


def _train_objective(kind: str, accum: int) -> tuple[Trained, list[dict[str, float]]]:
    with session(ClusterConfig(device="cpu")) as world:
        model, step = _objective_step(kind, world, accum)
        results = [step(_rows(_batch(i), world.rank, world.size), i, 1e-3) for i in range(2)]
        parts = [{name: float(value) for name, value in result.losses.items()} for result in results]
        state = {key: value.clone() for key, value in model.state_dict().items()}
        return (state, [float(result.loss) for result in results]), parts


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_every_objective_trains_on_two_ranks_as_on_one(kind: str) -> None:
    (alone, losses), parts = _train_objective(kind, 1)
    for (state, rank_losses), rank_parts in run_ranks(_train_objective, 2, kind, 2):
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        assert rank_parts == [pytest.approx(each, rel=1e-5) for each in parts]
        _assert_close(state, alone, 1e-4, ADAM_NOISE)


def test_the_loss_is_the_sum_of_its_named_parts() -> None:
    _, step = _objective_step("distill", World(), 1)
    result = step(_batch(0), 0, 0.0)
    assert result.losses.keys() == {"contrastive_loss", "distill_loss"}
    torch.testing.assert_close(result.loss, sum(result.losses.values()))


def test_a_teacher_is_run_once_a_step_without_graph_and_keeps_its_weights() -> None:
    _, step = _objective_step("distill", World(), 4)
    before = {key: value.clone() for key, value in step.teacher.state_dict().items()}
    seen = []
    step.teacher.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].requires_grad))
    step(_batch(0), 0, 1e-3)
    assert seen == [False] * 4 and not step.teacher.training
    assert all(torch.equal(value, before[key]) for key, value in step.teacher.state_dict().items())


def _synchronisations() -> list[dict[str, tuple[int, int]]]:
    """For 1, 2, 4, 8 micro-batches: calls and bytes of each kind of collective in one step, after a first one."""
    found = []
    with session(ClusterConfig(device="cpu")) as world:
        for accum in (1, 2, 4, 8):
            step = _step(_model(), world, accum=accum)
            rows = replace(_batch(0), draws={})
            step(rows, 0, 0.0)
            with Footprint() as footprint:
                step(rows, 1, 0.0)
            calls, sizes = footprint.collective_calls, footprint.collective_bytes
            found.append({name: (calls[name], sizes[name]) for name in calls})
    return found


@pytest.mark.slow
def test_gradients_are_synchronised_once_a_step_whatever_the_accumulation() -> None:
    (found, other) = run_ranks(_synchronisations, 2)
    assert found == other
    assert found[1:] == found[:1] * 3
    gradients = sum(p.numel() * 4 for p in _model().parameters())
    _, num_bytes = found[0]["allreduce"]
    # The gradients once; beside them two sums (fp64) for each column of the loss, and the mean loss.
    assert num_bytes == gradients + 2 * (2 * ROWS) * 8 + 4
    assert found[0]["allgather_base"][0] == found[0]["reduce_scatter_base"][0] == 1


def _poisoned(fsdp: bool) -> tuple[float, bool, float, list[bool]]:
    with session(ClusterConfig(device="cpu")) as world:
        model = _model()
        step = _step(model, world, fsdp=fsdp)
        before = {key: local(value).clone() for key, value in model.state_dict().items()}
        if world.rank == 1:
            step.transform.offset.fill_(float("nan"))
        result = step(_rows(_batch(0), world.rank, world.size), 0, 1e-3)
        same = all(torch.equal(local(value), before[key]) for key, value in model.state_dict().items())
        num_updates = float(sum(s["step"] for s in step.optimizer.state.values()))
        return float(result.skipped), same, num_updates, result.own.bad_rows.tolist()


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_value_that_is_not_finite_on_one_rank_leaves_all_ranks_unchanged(fsdp: bool) -> None:
    rows = ROWS // 2
    assert run_ranks(_poisoned, 2, fsdp) == [(1.0, True, 0.0, [False] * rows), (1.0, True, 0.0, [True] * rows)]


def _own_norms() -> float:
    with session(ClusterConfig(device="cpu")) as world:
        step = _step(_model(), world, accum=2)
        result = step(_rows(_batch(0), world.rank, world.size), 0, 1e-3)
        assert result.own.grad_norm is not None
        return float(result.own.grad_norm)


def test_each_rank_sees_the_norm_of_its_own_gradient_before_it_is_averaged() -> None:
    first, second = run_ranks(_own_norms, 2)
    assert 0 < first != second > 0


def test_gradients_are_clipped_once_to_the_global_norm() -> None:
    model = _model()
    step = replace(_step(model, World()), clip_grad_norm=1e-3)
    result = step(_batch(0), 0, 0.0)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    assert float(result.grad_norm) > 1e-3
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_the_temperature_stays_within_its_bounds() -> None:
    model = _model()
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    result = _step(model, World())(_batch(0), 0, 1e-3)
    assert float(result.scale) == pytest.approx(100.0, rel=1e-5)


def test_autocast_keeps_parameters_gradients_and_loss_in_fp32() -> None:
    model = _model()
    step = _step(model, World(), precision="amp_bfloat16")
    result = step(_batch(0), 0, 1e-3)
    assert result.loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} | {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, again = _model("tiny-test-timm"), _model("tiny-test-timm")
    again.set_grad_checkpointing(True)
    side = plain.visual.image_size[0]
    for model in (plain, again):
        _step(model, World())(_batch(0, side), 0, 0.0)
    want = {name: p.grad for name, p in plain.named_parameters()}
    _assert_close({name: p.grad for name, p in again.named_parameters()}, want, 1e-6)
