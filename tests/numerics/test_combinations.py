"""The table of combinations: what it refuses says why, and what it allows trains two ranks as one process.

A cell is one way of running the step. All cells of a test share one pair of ranks. The reference is the plain
model in one process, without checkpointing, compilation or accumulation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import models
from data import AugmentConfig, Batch, DeviceTransform
from models.errors import ConfigError
from tests.helpers.gloo import run_ranks
from training.combinations import refusals
from training.config import ClusterConfig, DataConfig, ModelConfig, OptimConfig, TrainConfig
from training.distributed import World, session
from training.learner import lock_as_told
from training.losses.objective import build_objective
from training.main import main
from training.optimizer import build_optimizer
from training.parallel import parallelize
from training.precision import LossScale, build_loss_scale
from training.rules import check_config
from training.setup import SIGLIP_BIAS, SIGLIP_LOG_SCALE
from training.sharding import gathering
from training.step import TrainStep
from training.witness import Witness, average, average_in_bf16

ROWS, STEPS = 8, 3
# Of a tensor's norm, in fp32. In sixteen bits: of the way that the tensor has gone in training.
TOLERANCE, LOW_TOLERANCE = 3e-5, 0.25
# AdamW divides by the gradient's size: where that is rounding alone (a key's bias), so is the direction.
EPS = 1e-3

WRAPPERS = {
    "ddp": ClusterConfig(device="cpu"),
    "static": ClusterConfig(device="cpu", ddp_static_graph=True),
    "fsdp": ClusterConfig(device="cpu", fsdp=True),
    "fsdp-keep": ClusterConfig(device="cpu", fsdp=True, fsdp_no_reshard_after_forward=True),
    "fsdp-static": ClusterConfig(device="cpu", fsdp=True, ddp_static_graph=True),
    "ddp-nhwc": ClusterConfig(device="cpu", channels_last=True),
    "fsdp-nhwc": ClusterConfig(device="cpu", fsdp=True, channels_last=True),
    "ddp-keep": ClusterConfig(device="cpu", fsdp_no_reshard_after_forward=True),
}
TRUNKS = {"native": None, "convnext": "test_convnext", "vit": "test_vit"}
# ConvNeXt's begin at 1e-6: gradients behind them are so small that a norm's weight, which begins at 1, moves by its
# last bit or, rounded otherwise, not at all.
LAYER_SCALE = 0.5


@dataclass(frozen=True)
class Cell:
    """One way of running the step."""

    trunk: str = "native"
    wrapper: str = "ddp"
    checkpointing: bool = False
    compiled: bool = False
    accum: int = 1
    loss: str = "clip"  # or dense, siglip, distill
    cut_padding: bool = True
    precision: str = "fp32"
    reduce: str = "fp32"
    clip: float | None = 1.0
    lock: str = ""  # or image, text

    @property
    def config(self) -> TrainConfig:
        """What a user would have to write for it."""
        cluster = dataclasses.replace(WRAPPERS[self.wrapper], torchcompile=self.compiled, grad_reduce_dtype=self.reduce)
        return TrainConfig(
            data=DataConfig(dataset_type="synthetic", train_num_samples=64),
            model=ModelConfig(
                grad_checkpointing=self.checkpointing,
                precision=self.precision,
                lock_image=self.lock == "image",
                lock_text=self.lock == "text",
                lock_text_unlocked_layers=2 if self.lock == "text" else 0,
                distill_model="a-teacher" if self.has_teacher else None,
                distill_pretrained="its-weights" if self.has_teacher else None,
            ),
            optim=OptimConfig(
                accum_freq=self.accum, local_loss=self.loss != "dense", siglip=self.loss == "siglip", eps=EPS, lr=1e-2
            ),
            cluster=cluster,
        )

    @property
    def has_teacher(self) -> bool:
        return self.loss == "distill"

    @property
    def plain(self) -> Cell:
        """The same training by the plain model, texts with their padding."""
        loss = "clip" if self.loss == "dense" else self.loss
        return Cell(trunk=self.trunk, loss=loss, cut_padding=False, lock=self.lock)

    @property
    def is_low(self) -> bool:
        return (self.precision, self.reduce) != ("fp32", "fp32")

    @property
    def is_refused(self) -> bool:
        return any(True for _ in refusals(self.config))


def product(**axes: tuple) -> list[Cell]:
    """Every cell of the axes given, the others at their defaults."""
    return [Cell(**dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


FULL = [
    cell
    for cell in product(
        trunk=tuple(TRUNKS),
        wrapper=tuple(WRAPPERS),
        checkpointing=(False, True),
        compiled=(False, True),
        accum=(1, 2),
        loss=("clip", "dense", "siglip", "distill"),
    )
    # The loss is outside of the compiled blocks and of the trunks, and where weights lie in memory outside of it.
    if cell.loss == "clip" or not (cell.compiled or cell.wrapper == "ddp-nhwc" or cell.trunk != "native")
]
LOCKED = [
    *product(wrapper=("ddp", "static", "fsdp"), checkpointing=(False, True), accum=(1, 2), lock=("image", "text")),
    *product(trunk=("vit",), wrapper=("ddp", "fsdp"), compiled=(False, True), lock=("image",)),
]
# A decoder's logits are not accumulated.
COCA = product(
    trunk=("coca",),
    wrapper=("ddp", "static", "fsdp"),
    checkpointing=(False, True),
    compiled=(False, True),
    loss=("clip", "siglip"),
    cut_padding=(False,),
)
LOW_PRECISION = product(
    trunk=("native", "convnext"),
    wrapper=("ddp", "fsdp"),
    checkpointing=(False, True),
    accum=(1, 2),
    precision=("amp_bf16", "amp"),
    reduce=("fp32", "bf16"),
)


def pairwise(cells: list[Cell]) -> list[Cell]:
    """A few of the cells in which every pair of settings that occurs in one of them occurs, chosen greedily."""
    pairs = {cell: set(itertools.combinations(dataclasses.asdict(cell).items(), 2)) for cell in cells}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs[cell] & missing)))
        missing -= pairs[chosen[-1]]
    return chosen


QUICK = [
    Cell(),
    Cell(wrapper="fsdp"),
    Cell(wrapper="fsdp", checkpointing=True, accum=2),
    Cell(wrapper="fsdp-keep", accum=2, loss="dense"),
    Cell(wrapper="fsdp", accum=2, loss="siglip"),
    Cell(wrapper="static", loss="distill", cut_padding=False),
    Cell(trunk="convnext", wrapper="fsdp", checkpointing=True),
    Cell(wrapper="static", checkpointing=True),
    Cell(trunk="convnext", wrapper="ddp-nhwc"),
    Cell(wrapper="fsdp", accum=2, lock="image"),
    Cell(wrapper="static", checkpointing=True, lock="text"),
    Cell(trunk="coca", wrapper="fsdp", checkpointing=True, cut_padding=False),
    Cell(trunk="coca", wrapper="ddp", cut_padding=False),
]
QUICK_LOW = [
    Cell(wrapper="fsdp", precision="amp", accum=2),
    Cell(wrapper="ddp", precision="amp_bf16", reduce="bf16"),
    Cell(wrapper="fsdp", precision="amp_bf16", reduce="bf16", checkpointing=True),
]


def build(trunk: str, loss: str = "clip", seed: int = 7) -> models.CLIP:
    """A model without random draws of its own, so that it does not matter which rank sees which row."""
    config = models.load_model_config({"resnet": "tiny-test-rn", "coca": "tiny-test-coca"}.get(trunk, "tiny-test"))
    if TRUNKS.get(trunk):
        timm = dataclasses.replace(models.load_model_config("tiny-test-timm").vision_cfg, timm_drop_path=None)
        pool = "token" if trunk == "vit" else ""
        timm = dataclasses.replace(timm, timm_model_name=TRUNKS[trunk], timm_pool=pool, timm_proj="linear")
        config = dataclasses.replace(models.load_model_config("tiny-test-timm"), vision_cfg=timm)
    if loss == "siglip":
        config = models.config_with(config, init_logit_scale=SIGLIP_LOG_SCALE, init_logit_bias=SIGLIP_BIAS)
    torch.manual_seed(seed)
    model = models.build_model(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            nn.init.constant_(parameter, LAYER_SCALE)
    return model


def batch_of(step: int, side: int) -> Batch:
    """The global batch of one step, the same for every world size."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 49405, (ROWS, 16), generator=generator)
    for row, length in enumerate(torch.linspace(3, 16, ROWS).long().tolist()):
        tokens[row, length - 1] = 49407
        tokens[row, length:] = 0
    images = torch.randint(0, 256, (ROWS, 3, side, side), generator=generator, dtype=torch.uint8)
    return Batch(images=images, tokens=tokens, draws={}, keys=[str(i) for i in range(ROWS)], shards=["s"] * ROWS)


def train(cell: Cell, world: World, steps: int = STEPS) -> dict[str, Tensor]:
    """The whole weights after a few steps of `cell`, on every rank."""
    config, model = cell.config, build(cell.trunk, cell.loss)
    lock_as_told(model, config.model)
    wrapped = parallelize(model, config.model, config.cluster, world)
    step = TrainStep(
        model=wrapped,
        optimizer=build_optimizer(model, config.optim, "vit", ()),
        transform=DeviceTransform((0.5,) * 3, (0.5,) * 3, AugmentConfig()),
        world=world,
        seed=0,
        precision=cell.precision,
        accum_steps=cell.accum,
        clip_grad_norm=cell.clip,
        objective=build_objective(
            config.optim, has_teacher=cell.has_teacher, caption_pad_id=0 if cell.trunk == "coca" else None
        ),
        teacher=build(cell.trunk, seed=8).eval().requires_grad_(False) if cell.has_teacher else None,
        cut_padding=cell.cut_padding,
        static_shapes=cell.compiled,
        loss_scale=settled_loss_scale(cell.precision, world),
        witness=Witness(wrapped, average_in_bf16 if cell.reduce == "bf16" else average),
    )
    for index in range(steps):
        result = step(batch_of(index, model.visual.image_size[0]).split(world.size)[world.rank], index, 1e-2)
        assert not bool(result.skipped)
    with gathering(model.state_dict()) as (whole,):
        return {name: value.clone() for name, value in whole.items()}


def settled_loss_scale(precision: str, world: World) -> LossScale | None:
    """One that has found its value: the search leaves updates out."""
    loss_scale = build_loss_scale(precision, world.device)
    if loss_scale is not None:
        loss_scale.load_state_dict({"scale": 256.0, "calm_steps": 0.0})
    return loss_scale


@functools.cache
def reference(plain: Cell) -> dict[str, Tensor]:
    """What one process makes of the same batches, in fp32."""
    return train(plain, World())


def on_rank(cells: list[Cell], references: dict[Cell, dict[str, Tensor]], backend: str) -> list[tuple[Cell, float]]:
    """Each cell with its largest deviation from the reference on this rank."""
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend=backend)
    with session(ClusterConfig(device="cpu")) as world:
        return [(cell, deviation(cell, train(cell, world), references[cell.plain])) for cell in cells]


def deviation(cell: Cell, got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest over all tensors, as a share of what `TOLERANCE` or `LOW_TOLERANCE` is a share of."""
    assert got.keys() == want.keys()
    start = build(cell.trunk, cell.loss).state_dict()
    scales = {name: float((value - start[name] if cell.is_low else value).norm()) for name, value in want.items()}
    return max(float((got[name] - value).norm()) / (scales[name] or 1.0) for name, value in want.items())


def failures(cells: list[Cell], backend: str = "aot_eager", timeout_s: float = 200) -> list[str]:
    """The cells that deviate by more than they may on a rank, with the figure."""
    references = {plain: reference(plain) for plain in {cell.plain for cell in cells}}
    results = run_ranks(on_rank, 2, cells, references, backend, timeout_s=timeout_s)
    allowed = {cell: LOW_TOLERANCE if cell.is_low else TOLERANCE for cell in cells}
    return [f"{found:.2g}: {cell}" for rank in results for cell, found in rank if not found < allowed[cell]]


def moved(trunk: str) -> dict[str, float]:
    """How far each tensor goes in one process, as a share of what it has become."""
    start, end = build(trunk).state_dict(), reference(Cell(trunk=trunk).plain)
    return {name: float((value - start[name]).norm() / value.norm()) for name, value in end.items()}


def resnet_on_rank(wrappers: list[str], steps: int) -> list[dict[str, Tensor]]:
    torch.set_num_threads(1)
    with session(ClusterConfig(device="cpu")) as world:
        cells = [Cell(trunk="resnet", wrapper=wrapper, accum=2, clip=None) for wrapper in wrappers]
        return [train(cell, world, steps) for cell in cells]


@pytest.mark.parametrize("trunk", sorted({cell.trunk for cell in LOW_PRECISION}))
def test_every_tensor_goes_further_than_its_last_bits(trunk: str) -> None:
    """Otherwise shares of the way that it has gone would say nothing."""
    bits = torch.finfo(torch.float32).eps
    assert not {name: way for name, way in moved(trunk).items() if way < 1000 * bits}


def test_two_ranks_train_as_one_process_however_the_step_is_run() -> None:
    assert not failures([*QUICK, *QUICK_LOW])


@pytest.mark.slow
def test_a_model_with_batch_norms_is_trained_by_fsdp_as_by_ddp() -> None:
    """Norms see the rows of one rank only, so there is no single process to compare with.

    Not clipped: the two add up the norm in another order. The first step is the same bit for bit. In the second
    AdamW's kernel rounds the elements behind the last full vector of a tensor, or shard, otherwise; from there on
    norms over two rows blow that last bit up, which says nothing of either wrapper.
    """
    ddp, fsdp = run_ranks(resnet_on_rank, 2, ["ddp", "fsdp"], 1)[0]
    assert all(torch.equal(fsdp[name], value) for name, value in ddp.items())
    ddp, fsdp = run_ranks(resnet_on_rank, 2, ["ddp", "fsdp"], 2)[0]
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["FULL", "COCA", "LOCKED", "LOW_PRECISION"])
def test_every_pair_of_settings_trains_two_ranks_as_one_process(table: str) -> None:
    """`make parity` runs the whole tables."""
    cells = [cell for cell in globals()[table] if not cell.is_refused]
    few = pairwise(cells)
    assert len(few) < len(cells)
    assert not failures(few, timeout_s=400)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("trunk", list(TRUNKS))
def test_every_allowed_cell_trains_two_ranks_as_one_process(trunk: str) -> None:
    cells = [cell for cell in FULL if cell.trunk == trunk and not cell.is_refused]
    assert not failures(cells, timeout_s=400)


@pytest.mark.slow
@pytest.mark.parity
def test_a_model_that_writes_captions_trains_on_two_ranks_as_in_one_process() -> None:
    assert not failures(COCA, timeout_s=400)


@pytest.mark.slow
@pytest.mark.parity
def test_locked_towers_train_on_two_ranks_as_in_one_process() -> None:
    assert not failures([cell for cell in LOCKED if not cell.is_refused], timeout_s=400)


@pytest.mark.parametrize("side", ["image", "text"])
def test_what_is_locked_stays_bit_for_bit(side: str) -> None:
    start, end = build("native").state_dict(), reference(Cell(lock=side).plain)
    model = build("native")
    lock_as_told(model, Cell(lock=side).config.model)
    locked = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert locked
    assert {name for name, value in end.items() if torch.equal(value, start[name])} == locked


@pytest.mark.slow
@pytest.mark.parity
def test_every_allowed_low_precision_cell_goes_the_same_way_as_fp32() -> None:
    assert not failures([cell for cell in LOW_PRECISION if not cell.is_refused], timeout_s=400)


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_train_as_eager_ones() -> None:
    cells = [Cell(wrapper=wrapper, compiled=True, checkpointing=True) for wrapper in ("ddp", "fsdp")]
    assert not failures(cells, backend="inductor", timeout_s=400)


def refused_cells() -> Iterator[Cell]:
    return (cell for cell in [*FULL, *LOW_PRECISION] if cell.is_refused)


def test_every_refused_cell_is_refused_by_the_rules_with_a_reason() -> None:
    for cell in refused_cells():
        with pytest.raises(ConfigError, match=r"--\S+ .*(refused|needs).*: "):
            check_config(cell.config)


def test_the_table_refuses_what_it_must_and_no_more() -> None:
    refused = {(cell.wrapper, cell.accum > 1) for cell in FULL if cell.is_refused}
    never = ("fsdp-static", "fsdp-nhwc", "ddp-keep")
    assert refused == {("static", True)} | {(wrapper, accum) for wrapper in never for accum in (False, True)}
    low = {(cell.wrapper, cell.reduce, cell.accum > 1) for cell in LOW_PRECISION if cell.is_refused}
    assert low == {("fsdp", "bf16", True)}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_weights_in_sixteen_bits_are_refused(precision: str) -> None:
    with pytest.raises(ConfigError, match="no fp32 copy"):
        check_config(Cell(precision=precision).config)


def test_a_refused_combination_ends_the_program_before_any_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = ["--dataset-type", "synthetic", "--train-num-samples", "64", "--logs", str(tmp_path)]
    assert main([*data, "--fsdp", "--ddp-static-graph"]) == 2
    assert "--ddp-static-graph with --fsdp is refused" in caplog.text
    assert not list(tmp_path.iterdir())
