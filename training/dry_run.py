"""`--dry-run`: rank 0 of a world of any size on one process, for one step. Writes nothing.

The other ranks are PyTorch's fake process group: collectives return at once with whatever the buffers held, so
shapes, memory and bytes are right, and the loss is not a number to read.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

import data
import models
from data.order import lanes_per_rank
from training.config import TrainConfig
from training.console import logging_to
from training.distributed import World, pick_device
from training.errors import EXIT_DONE
from training.evaluation.schedule import check_cadences
from training.footprint import Footprint, bytes_of
from training.launch import Launch
from training.learner import Learner, build_learner
from training.losses.blocks import block_bytes
from training.optimizer import describe_optimizer, parameter_names
from training.optimizer_state import optimizer_to_tensors
from training.origin import open_tokenizer, read_origin, tell_preprocess
from training.plan import Plan, make_plan
from training.schedule import describe_schedule, learning_rate
from training.setup import Samples, build_step, cuts_padding, describe_model, find_samples, loader_config, resolve_model
from training.sinks import parse_report_to
from training.start import Fresh, Pretrained
from training.teacher import resolve_teacher
from training.trial import largest_batch

log = logging.getLogger(__name__)

_GPUS_PER_NODE = 8
_CURSOR_BYTES = 48  # of one stream in data.json, by measurement


@dataclass(frozen=True)
class Measured:
    """What a step took when the optimiser's state was there already."""

    seconds: float
    peak_bytes: int  # beyond weights, gradients and optimiser
    collectives: dict[str, tuple[int, int]]  # calls and bytes by name


def dry_run(config: TrainConfig) -> int:
    """Build, step once, tell. Returns the exit code; raises ConfigError or DataError for what would be refused."""
    with logging_to(None), pretended_world(config) as world:
        parse_report_to(config.log.report_to)
        source = config.model.pretrained
        origin = read_origin(Pretrained(source, "dry run") if source else Fresh("dry run"), None, world)
        model_config = resolve_model(config, origin)
        tell_preprocess(model_config, models.load_model_config(config.model.model), origin)
        open_tokenizer(model_config, origin, world)
        samples = _samples(config, world)
        plan = make_plan(config.optim, samples.per_epoch, world.size)
        check_cadences(config.eval, plan)
        settings = loader_config(config, samples, plan, model_config)
        log.info("world: rank 0 of %d pretended ranks on %s", world.size, world.device)
        log.info("plan: %s, %d samples an epoch", plan, samples.per_epoch)
        log.info("learning rate: %s", describe_schedule(config.optim, plan))
        log.info("data: %s; %s", _describe_data(config, settings), _describe_lanes(settings, plan))
        learner = build_learner(config, model_config, Fresh("dry run"), None, world)
        log.info("model: %s", describe_model(learner.model, config))
        log.info("optimiser: %s", describe_optimizer(learner.optimizer))
        measured = measure_step(config, learner, settings, model_config, plan, world)
        for line in _report(learner, measured, plan, settings):
            log.info("%s", line)
        log.info("nothing refused, nothing written")
    return EXIT_DONE


@contextlib.contextmanager
def pretended_world(config: TrainConfig) -> Iterator[World]:
    """Rank 0 of `--dry-run-world-size` ranks, of which no other exists."""
    size = config.run.dry_run_world_size
    launch = Launch(0, size, 0, min(size, _GPUS_PER_NODE), "127.0.0.1", 0, "dry run")
    device = pick_device(config.cluster, launch)
    if size == 1:
        yield World(device=device)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield World(0, size, 0, launch.local_size, device, "fake", launch.launcher, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _samples(config: TrainConfig, world: World) -> Samples:
    """The catalog as a run would open it; without --train-data its length alone."""
    if config.data.train_data is not None or config.data.dataset_type == "synthetic":
        return find_samples(config, world)
    synthetic = replace(config, data=replace(config.data, dataset_type="synthetic"))
    return find_samples(synthetic, world)


def measure_step(
    config: TrainConfig,
    learner: Learner,
    settings: data.LoaderConfig,
    model_config: models.ModelConfig,
    plan: Plan,
    world: World,
) -> Measured:
    """Two whole steps, of which the second counts, on made-up pairs whose texts fill the context."""
    teacher = resolve_teacher(config.model, model_config)
    cut_padding = cuts_padding(config.model.text_padding, model_config)
    step = build_step(config, learner, settings, model_config, teacher, cut_padding, world)
    batch = largest_batch(settings, model_config).to(world.device)
    step(batch, 0, learning_rate(config.optim, plan, 0))
    started = time.perf_counter()
    with Footprint() as footprint:
        step(batch, 1, learning_rate(config.optim, plan, 1))
    if world.device.type == "cuda":
        torch.cuda.synchronize()  # Host sync: the step is over when its time is read.
    calls, sizes = footprint.collective_calls, footprint.collective_bytes
    collectives = {name: (calls[name], sizes[name]) for name in calls}
    # DDP keeps the memory of the gradients from one step to the next; without it they are made anew in each.
    gradients = 0 if world.size > 1 else bytes_of(p.grad for p in learner.model.parameters() if p.grad is not None)
    peak = max(0, footprint.peak_bytes - gradients)
    return Measured(time.perf_counter() - started, peak, collectives)


def _describe_data(config: TrainConfig, settings: data.LoaderConfig) -> str:
    if config.data.train_data is None and config.data.dataset_type != "synthetic":
        return "none named, so none looked at"
    return f"{settings.dataset_type}, {len(settings.urls)} shards"


def _describe_lanes(settings: data.LoaderConfig, plan: Plan) -> str:
    lanes, streams = lanes_per_rank(settings.batch_size), settings.streams_per_lane
    return (
        f"{lanes} lanes a rank, {lanes * plan.world_size} in all, up to {lanes * streams} shards open on a rank; up to "
        f"{settings.shuffle_budget_mib} MiB for shuffling in each of {min(settings.workers, lanes)} workers"
    )


def _report(learner: Learner, measured: Measured, plan: Plan, settings: data.LoaderConfig) -> Iterator[str]:
    """Memory by part, traffic, checkpoint."""
    weights = bytes_of(learner.model.state_dict().values())
    gradients = bytes_of(p for p in learner.model.parameters() if p.requires_grad)
    state = optimizer_to_tensors(learner.optimizer, parameter_names(learner.model))
    optimizer = bytes_of(state.values())
    embed_dim = learner.model.config.embed_dim
    average = 0 if learner.ema is None else learner.ema.num_bytes
    averaged = f"averaged weights {_mib(average)}, " if average else ""
    total = weights + gradients + optimizer + average + measured.peak_bytes
    yield (
        f"memory: {_mib(total)} in all: weights {_mib(weights)}, gradients {_mib(gradients)}, optimiser "
        f"{_mib(optimizer)}, {averaged}activations and what lives for a moment {_mib(measured.peak_bytes)}, of "
        f"which the loss may take {_mib(loss_bytes(plan, embed_dim))}"
    )
    moved = ", ".join(f"{name} {calls} x, {_mib(size)}" for name, (calls, size) in measured.collectives.items())
    yield f"collectives of a step on a rank: {moved or 'none'}"
    streams = lanes_per_rank(settings.batch_size) * settings.streams_per_lane * plan.world_size
    position = streams * _CURSOR_BYTES
    saved = weights + optimizer + (0 if learner.ema is None else bytes_of(learner.ema.state().values()))
    yield (
        f"checkpoint: {_mib(saved + position)} on disk ({_mib(position)} of it the data position of "
        f"{streams} streams), {_mib(saved)} of host memory on rank 0"
    )
    yield f"the step took {measured.seconds:.1f} s here, which says nothing about another machine"


def loss_bytes(plan: Plan, embed_dim: int) -> int:
    """Of the streamed loss: gathered texts and their gradient [G, E] and a block of logits with its softmax."""
    return 2 * plan.global_batch * embed_dim * 4 + 2 * block_bytes(plan.rank_batch, plan.global_batch)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
