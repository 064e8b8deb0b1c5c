"""What models are measured on, and how: the same for every one of them. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.config import DataConfig, EvalConfig
from training.errors import ConfigError
from training.evaluation.specs import SetSpec, specs_of

_SETS = (
    "imagenet_val",
    "imagenet_v2",
    "zeroshot_data",
    "retrieval_data",
    "linear_probe_data",
    "eval_suite",
    "eval_root",
)


@dataclass(frozen=True, kw_only=True)
class Exam:
    """Sets and settings of a measurement. Without sets nothing is measured."""

    sets: EvalConfig = EvalConfig()
    data: DataConfig = DataConfig()
    batch_size: int = 64
    precision: str = "fp32"

    @property
    def specs(self) -> dict[str, SetSpec]:
        """The sets by label. Raises ConfigError."""
        return specs_of(self.sets, self.data)

    @property
    def metrics(self) -> list[str]:
        """Names of the figures that a choice can go by, the usual one first; none without sets."""
        return [figure for spec in self.specs.values() for figure in spec.figures]

    def check(self) -> None:
        """Raises ConfigError for an exam without sets."""
        if not self.specs:
            raise ConfigError(
                "nothing to evaluate: give --zeroshot-data, --imagenet-val, --retrieval-data, --linear-probe-data, "
                "--eval-suite or --val-data"
            )

    def described(self) -> dict[str, Any]:
        """The sets, for what is written of a measurement."""
        given = {name: getattr(self.sets, name) for name in _SETS} | {"val_data": self.data.val_data}
        return {name: value for name, value in given.items() if value}
