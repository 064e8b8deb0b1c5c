"""What goes into a checkpoint, and when ranks meet for it. Files are `training.checkpoint`'s business."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from data import Position
from models import TokenizerIdentity
from models.lora import adapter_state, is_adapted, merged_weights
from training.checkpoint import Checkpointer
from training.checkpoint_content import EMA_FILE, LORA_FILE, Progress, epoch_name, step_name
from training.config import RunConfig, TrainConfig, to_flat
from training.distributed import World
from training.ema import Ema
from training.feed import Feed
from training.optimizer import parameter_names
from training.optimizer_state import optimizer_to_tensors
from training.parallel import unwrap
from training.plan import Plan
from training.precision import LossScale
from training.sharding import gathering


def keeps_epoch(run: RunConfig, epoch: int, plan: Plan) -> bool:
    """True when the checkpoint at the end of `epoch` is one to keep."""
    return epoch % run.save_frequency == 0 or epoch == plan.epochs


class Saver:
    """Collects the state of a run and hands it to the checkpointer; called by all ranks together."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        plan: Plan,
        world: World,
        extra: dict[str, Any],
        loss_scale: LossScale | None = None,
        start_step: int = -1,
        ema: Ema | None = None,
        tokenizer: TokenizerIdentity | None = None,
    ):
        """start_step: its state is not saved again. The same command finds it, or makes it anew.

        tokenizer: which one the model is trained with; it is stored with the model's configuration.
        """
        self._checkpointer = checkpointer
        self._model = unwrap(model)
        self._optimizer = optimizer
        # Now: later, forward passes without a backward pass may put whole parameters in the place of shards.
        self._names = parameter_names(self._model)
        self._config = config
        self._plan = plan
        self._world = world
        self._extra = extra
        self._loss_scale = loss_scale
        self._ema = ema
        self._last_step = start_step
        self._tokenizer = {} if tokenizer is None else {"tokenizer": tokenizer.to_dict()}

    def save(self, done: int, feed: Feed) -> None:
        """Write the state after `done` steps, once. Raises CheckpointWriteError on all ranks alike."""
        if done == self._last_step:
            return
        self._world.pulse.enter("save")
        with self._world.patient:
            self._save(done, feed)
        self._last_step = done

    def _save(self, done: int, feed: Feed) -> None:
        positions, counts = feed.positions(), feed.counts()  # Collective:
        self.finish()
        further = self._further()
        with (
            self._world.collectively("saving a checkpoint"),
            gathering(merged_weights(self._model), self._optimizer_state(), *further.values()) as whole,  # Collective:
        ):
            if self._world.is_main:
                weights, moments, *others = whole
                files = dict(zip(further, others, strict=True))
                self._write(done, weights, moments, files, Position.merge(positions).to_json(), counts)

    def save_again(self, done: int, feed: Feed, facts: dict[str, Any]) -> None:
        """Write the state after `done` steps in place of an earlier one; all later states hold `facts` too."""
        self._extra = self._extra | facts
        self._last_step = -1
        self.save(done, feed)

    def reserve(self) -> None:
        """Take the host memory of a snapshot in the background, once the optimiser's state exists."""
        if self._world.is_main:
            self._checkpointer.reserve(merged_weights(self._model), self._optimizer_state(), self._further())

    def check(self) -> None:
        """Raise CheckpointWriteError on all ranks alike when a write behind the training has failed."""
        with self._world.collectively("saving a checkpoint"):
            self._checkpointer.check()

    def _optimizer_state(self) -> dict[str, torch.Tensor]:
        return optimizer_to_tensors(self._optimizer, self._names)

    def _further(self) -> dict[str, Mapping[str, Tensor]]:
        """File name -> its tensors, beside weights and optimiser."""
        files: dict[str, Mapping[str, Tensor]] = {}
        if self._ema is not None:
            files[EMA_FILE] = self._ema.state()
        if is_adapted(self._model):
            files[LORA_FILE] = adapter_state(self._model)
        return files

    def _loss_scale_state(self) -> dict[str, Any]:
        return {} if self._loss_scale is None else {"loss_scale": self._loss_scale.state_dict()}

    def _write(
        self,
        done: int,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        further: Mapping[str, Mapping[str, Tensor]],
        position: Any,
        counts: dict[str, int],
    ) -> None:
        epoch = self._plan.epoch_of(done)
        self._checkpointer.save(
            self._name(done, epoch),
            progress=Progress(step=done, epoch=epoch, samples_seen=done * self._plan.global_batch),
            model_state=weights,
            optimizer_state=moments,
            data_position=position,
            config=to_flat(self._config),
            model_config=self._model.config.to_dict() | self._tokenizer,
            extra=self._extra | {"counts": counts} | self._loss_scale_state(),
            further=further,
        )

    def _name(self, done: int, epoch: int) -> str:
        run = self._config.run
        # --save-most-recent saves epochs that are not to be kept: under a step's name they rotate.
        is_passing = run.save_most_recent and not keeps_epoch(run, epoch, self._plan)
        return epoch_name(epoch) if self._plan.ends_epoch(done) and not is_passing else step_name(done)

    def finish(self) -> None:
        """Wait until the last checkpoint is on disk. Raises CheckpointWriteError on all ranks alike."""
        self._world.pulse.enter("save")
        # Collective: a disk that stands still for long must cost rank 0's time, not the others' patience.
        self._world.wait_for(self._checkpointer.is_idle)
        self.check()
