"""Which sets a run or a script measures on, read off its settings. Opens nothing: see `tasks` and `sets` for that."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from training.config import DataConfig, EvalConfig
from training.errors import ConfigError, DataConfigError

PAIRS = "val"
ZEROSHOT, RETRIEVAL, LINEAR_PROBE = KINDS = ("zeroshot", "retrieval", "linear_probe")
RECALLS = (1, 5, 10)
_CLASSIFIED = ("top1", "top5", "mean_per_class_recall")
_WAYS = ("image_to_text", "text_to_image")
FIGURES = {
    ZEROSHOT: _CLASSIFIED,
    LINEAR_PROBE: _CLASSIFIED,
    RETRIEVAL: (
        *(f"{way}_{figure}" for way in _WAYS for figure in (*(f"R@{k}" for k in RECALLS), "mean_rank", "median_rank")),
        "clip_val_loss",
    ),
}
# What a table shows of a set that does not say so itself.
MAIN_FIGURES = {
    ZEROSHOT: ("top1",),
    LINEAR_PROBE: ("top1",),
    RETRIEVAL: ("image_to_text_R@1", "text_to_image_R@1"),
}


@dataclass(frozen=True)
class Manifest:
    """How large a set is said to be: None is not said. Another size found is an error, not another score."""

    num_samples: int | None = None
    num_classes: int | None = None
    num_captions: int | None = None
    flag: str | None = None  # that said `num_samples`

    def check(self, where: str, **found: float) -> None:
        """Raises DataConfigError when a number that was found is not the one that was said."""
        for name, number in found.items():
            said = getattr(self, name)
            if said is not None and number != said:
                what = name.removeprefix("num_")
                raise DataConfigError(
                    f"{where}: {number:,.0f} {what}, but {self.flag or name} is {said:,}: find out what is missing or "
                    "doubled, or correct the number"
                )


@dataclass(frozen=True)
class SetSpec:
    """One measurement that is asked for. `where` names its origin in messages; figures are `val/<stem><figure>`.

    classnames, templates: files that are used instead of those in the set's folder; openclip_prompts: OpenCLIP's names
    and templates of ImageNet are.
    main: the figures that a table shows.
    """

    name: str
    kind: str
    url: str
    where: str = field(compare=False)
    stem: str
    manifest: Manifest = Manifest()
    main: tuple[str, ...] = ()
    classnames: str | None = None
    templates: str | None = None
    openclip_prompts: bool = False
    suite: str | None = field(default=None, compare=False)

    @property
    def label(self) -> str:
        """What the set is called where several are listed."""
        return f"{self.name}-linear_probe" if self.kind == LINEAR_PROBE else self.name

    @property
    def figures(self) -> list[str]:
        """Names of its figures in `metrics.jsonl`, the usual one first."""
        return [f"val/{self.stem}{figure}" for figure in FIGURES[self.kind]]

    @property
    def main_figures(self) -> list[str]:
        """Names of those that a table shows."""
        return [f"val/{self.stem}{figure}" for figure in self.main or MAIN_FIGURES[self.kind]]


def stem_of(name: str, kind: str) -> str:
    """What stands before the figure's own name."""
    return {ZEROSHOT: f"{name}-zeroshot-", LINEAR_PROBE: f"{name}-linear_probe-", RETRIEVAL: f"{name}-"}[kind]


def specs_of(config: EvalConfig, data: DataConfig) -> dict[str, SetSpec]:
    """All sets of the settings by label, those of `--val-data` last.

    A set that two suites name alike is one. Raises ConfigError for two different sets under one label, and for
    suites that cannot be read.
    """
    specs: dict[str, SetSpec] = {}
    for spec in _all(config, data):
        known = specs.setdefault(spec.label, spec)
        if known is not spec and (known != spec or None in (known.suite, spec.suite)):
            raise ConfigError(f"{spec.where}: the name {spec.label!r} is taken by {known.where}; choose another")
    return specs


def _all(config: EvalConfig, data: DataConfig) -> Iterator[SetSpec]:
    from training.evaluation.suites import load_suite  # reads files, which most callers have none of

    for flag, url, name in (
        ("--imagenet-val", config.imagenet_val, "imagenet"),
        ("--imagenet-v2", config.imagenet_v2, "imagenetv2"),
    ):
        if url:
            yield SetSpec(
                *(name, ZEROSHOT, url, f"{flag} {url}", f"{name}-zeroshot-val-"),
                openclip_prompts=config.imagenet_prompts == "openclip",
            )
    for flag, kind, given in (
        ("--zeroshot-data", ZEROSHOT, config.zeroshot_data),
        ("--retrieval-data", RETRIEVAL, config.retrieval_data),
        ("--linear-probe-data", LINEAR_PROBE, config.linear_probe_data),
    ):
        yield from (_from_flag(flag, kind, entry) for entry in given)
    for suite in config.eval_suite:
        yield from load_suite(suite, config.eval_root).specs
    if data.val_data:
        manifest = Manifest(num_samples=data.val_num_samples, flag="--val-num-samples")
        yield SetSpec(PAIRS, RETRIEVAL, data.val_data, f"--val-data {data.val_data}", "", manifest)


def _from_flag(flag: str, kind: str, entry: str) -> SetSpec:
    name, url = split_name(entry, flag)
    if name == PAIRS:
        raise ConfigError(f"{flag} {entry}: the name {PAIRS!r} is that of --val-data; write another name=folder")
    return SetSpec(name, kind, url, f"{flag} {entry}", stem_of(name, kind))


def split_name(spec: str, flag: str) -> tuple[str, str]:
    """'name=folder' to both; the folder's own name where none is given. Raises ConfigError."""
    name, separator, url = spec.partition("=")
    # A URL may hold an equals sign of its own: what stands before it is a name only without a slash.
    if not separator or "/" in name:
        url = spec
        name = os.path.basename(spec.rstrip("/"))
        if name.endswith((".csv", ".tsv", ".tar", ".parquet")):
            name = name.rpartition(".")[0]
    if not url or not is_metric_name(name):
        raise ConfigError(f"{flag} {spec}: write name=folder, the name in letters, digits, '_', '-' and '.'")
    return name, url


def is_metric_name(name: str) -> bool:
    """Whether a name can be part of a figure's name."""
    return bool(re.fullmatch(r"[A-Za-z0-9_.-]+", name))
