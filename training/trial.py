"""The trial step: a whole step at the largest shapes before any data is read, which leaves no trace.

What does not fit or does not compile shows in the first minute, and not when the first long batch comes. All ranks
run the step that training runs, up to an update that is left out like that of a loss which is not finite: weights,
batch statistics, loss scale and random numbers are bitwise as before. The optimiser's state is there afterwards, as
empty as the first step would begin with. Knows no data and no files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

import data
import models
from data import Batch
from training.config import TrainConfig
from training.distributed import World
from training.footprint import bytes_of
from training.parallel import unwrap
from training.sharding import local
from training.shortage import Load
from training.step import TrainStep

log = logging.getLogger(__name__)

_DISTINCT_ROWS = 8


def wants_trial(choice: bool | None, device: torch.device) -> bool:
    """--trial-step; unless told, only on a GPU: on a CPU a step costs much and memory is seldom short."""
    return device.type == "cuda" if choice is None else choice


def run_trial(step: TrainStep, settings: data.LoaderConfig, model_config: models.ModelConfig) -> None:
    """One step on made-up pairs, and a line on its time and memory. Collective. Raises what the step raises."""
    device, started = step.world.device, time.perf_counter()
    made_up = largest_batch(settings, model_config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with unchanged(step):
        # In training the next batch is on the device too while a step runs.
        batch, following = made_up.to(device), made_up.to(device)
        step.rehearse(batch)
    height, width = settings.image_size
    log.info(
        "trial step: %d images of %d x %d and texts of %d tokens in %.1f s%s",
        len(following),
        height,
        width,
        made_up.tokens.shape[1],
        time.perf_counter() - started,
        _peak(step.world),
    )


def _peak(world: World) -> str:
    """The most memory of any rank. Host sync: the step is over when it is read."""
    if world.device.type != "cuda":
        return ""
    torch.cuda.synchronize(world.device)
    peak = world.max_int(torch.cuda.max_memory_allocated(world.device))  # Collective:
    total = torch.cuda.get_device_properties(world.device).total_memory
    return f", {peak / 2**30:.1f} of {total / 2**30:.1f} GiB at the peak of the fullest rank"


@contextmanager
def unchanged(step: TrainStep) -> Iterator[None]:
    """Puts back what a step changes even when its update is left out. After an error nothing is put back."""
    model, loss_scale, device = unwrap(step.model), step.loss_scale, step.world.device
    tensors = [*model.buffers(), model.logit_scale.detach()]  # batch statistics; the temperature is clamped
    saved = [tensor.clone() for tensor in tensors]
    scale = None if loss_scale is None else loss_scale.state_dict()
    keys = model.row_draws.keys
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    for tensor, value in zip(tensors, saved, strict=True):
        tensor.copy_(value)
    if loss_scale is not None and scale is not None:
        loss_scale.load_state_dict(scale)
    model.row_draws.keys = keys
    step.optimizer.zero_grad(set_to_none=True)


def largest_batch(settings: data.LoaderConfig, model_config: models.ModelConfig) -> Batch:
    """A rank's batch of generated pairs as the loader makes them, with every text as long as the context."""
    rows = min(settings.batch_size, _DISTINCT_ROWS)
    pairs = replace(settings, dataset_type="synthetic", resampled=False, workers=0, num_samples=rows, batch_size=rows)
    source, sizes = data.synthetic_shards(rows)
    pairs = replace(pairs, sources=(source,), sizes=sizes, where=None, captions=data.CaptionConfig())
    with data.build_train_loader(pairs, models.get_tokenizer(model_config), 0, 1) as loader:
        batch = _repeated(next(loader), settings.batch_size)
    batch.tokens.fill_(1)
    batch.tokens[:, -1] = model_config.text_cfg.vocab_size - 1  # the end-of-text id is the largest
    return batch


def _repeated(batch: Batch, rows: int) -> Batch:
    """Drawing pictures for thousands of rows would take longer than the step."""
    index = torch.arange(rows) % len(batch)
    return Batch(
        images=batch.images[index],
        tokens=batch.tokens[index],
        draws={name: draw[index] for name, draw in batch.draws.items()},
        keys=[batch.keys[i] for i in index.tolist()],
        shards=[batch.shards[i] for i in index.tolist()],
    )


def load_of(config: TrainConfig, model: models.CLIP, settings: data.LoaderConfig, world: World) -> Load:
    """What a step of `config` has to hold, for the words of an error."""
    trained = [local(p) for p in model.parameters() if p.requires_grad]
    on_gpu = world.device.type == "cuda"
    return Load(
        config,
        world.size,
        settings.image_size,
        model.config.text_cfg.context_length,
        state_bytes=4 * bytes_of(trained),  # weights, gradients and two moments
        device_bytes=torch.cuda.get_device_properties(world.device).total_memory if on_gpu else None,
    )
