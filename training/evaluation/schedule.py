"""When which evaluation is due, by completed steps of a run. Pure: knows no sets, no figures and no clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from models.errors import ConfigError
from training.config import EvalConfig
from training.plan import Plan

_SETS = "a set to evaluate, e.g. by --zeroshot-data, --imagenet-val or --eval-suite"


@dataclass(frozen=True)
class Every:
    """At the ends of every so many epochs (0: of none) and of the run; besides, every so many steps or samples.

    Samples are those of the whole run on all ranks, so the points stay where they are when the global batch changes.
    """

    epochs: int
    steps: int | None = None
    samples: int | None = None

    def is_due(self, plan: Plan, step: int) -> bool:
        """After `step` steps, from 1 on."""
        return self._by_epochs(plan, step) or self._by_steps(step) or self._by_samples(plan, step)

    @property
    def is_ever_due(self) -> bool:
        """False when nothing asks for it."""
        return self.epochs > 0 or self.steps is not None or self.samples is not None

    def _by_epochs(self, plan: Plan, step: int) -> bool:
        if self.epochs <= 0 or not plan.ends_epoch(step):
            return False
        return plan.epoch_of(step) % self.epochs == 0 or step >= plan.total_steps

    def _by_steps(self, step: int) -> bool:
        return self.steps is not None and step % self.steps == 0

    def _by_samples(self, plan: Plan, step: int) -> bool:
        """The first step that has seen another multiple of `samples`."""
        if self.samples is None:
            return False
        return step * plan.global_batch // self.samples > (step - 1) * plan.global_batch // self.samples

    def __str__(self) -> str:
        parts = [
            f"{count:,} {unit}" if count > 1 else unit.removesuffix("s")
            for count, unit in ((self.epochs, "epochs"), (self.steps or 0, "steps"), (self.samples or 0, "samples"))
            if count > 0
        ]
        return f"every {' and every '.join(parts)}" if parts else "never"


class Due(NamedTuple):
    """The two cadences: of --val-data, and of all other sets, whatever is measured on them."""

    zeroshot: bool
    val: bool


def due_after(config: EvalConfig, plan: Plan, step: int) -> Due:
    """What is due after `step` steps; before the first one, what is ever due, if --evaluate-first asks for it."""
    zeroshot, val = cadences(config)
    if step == 0:
        return Due(config.evaluate_first and zeroshot.is_ever_due, config.evaluate_first and val.is_ever_due)
    return Due(zeroshot.is_due(plan, step), val.is_due(plan, step))


def cadences(config: EvalConfig) -> tuple[Every, Every]:
    """Of the zero-shot evaluations, and of the passes over --val-data."""
    return (
        Every(config.zeroshot_frequency, config.zeroshot_every_n_steps, config.zeroshot_every_n_samples),
        Every(config.val_frequency, config.val_every_n_steps, config.val_every_n_samples),
    )


def check_cadences(config: EvalConfig, plan: Plan) -> None:
    """Raises ConfigError for fewer samples than one step sees: the evaluation would be due after every step."""
    for problem in _too_few(config, plan):
        raise ConfigError(problem)


def _too_few(config: EvalConfig, plan: Plan) -> Iterator[str]:
    for kind, every in zip(("zeroshot", "val"), cadences(config), strict=True):
        if every.samples is not None and every.samples < plan.global_batch:
            yield (
                f"--{kind}-every-n-samples {every.samples} is less than the {plan.global_batch} samples of one step; "
                f"to evaluate after every step, say --{kind}-every-n-steps 1"
            )


def check_sets(config: EvalConfig, has_zeroshot: bool, has_val: bool) -> None:
    """Raises ConfigError where a flag asks for an evaluation of which there is no set."""
    zeroshot, val = cadences(config)
    if not has_zeroshot and (zeroshot.steps or zeroshot.samples):
        raise ConfigError(f"--zeroshot-every-n-{'steps' if zeroshot.steps else 'samples'} needs {_SETS}")
    if not has_val and (val.steps or val.samples):
        raise ConfigError(f"--val-every-n-{'steps' if val.steps else 'samples'} needs --val-data")
    if config.evaluate_first and not (has_zeroshot or has_val):
        raise ConfigError(f"--evaluate-first needs {_SETS}, or --val-data")


def describe_cadences(config: EvalConfig) -> str:
    """For the console."""
    zeroshot, val = cadences(config)
    first = "before the first step, then " if config.evaluate_first else ""
    return f"{first}zero-shot {zeroshot}, --val-data {val}"
