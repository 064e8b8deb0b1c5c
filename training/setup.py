"""From settings to the objects of a run, one function each. Composes `models` and `data`; owns no loop and no files."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch

import data
import models
from training.checkpoint_content import LoadedCheckpoint, Progress, load_checkpoint
from training.config import TrainConfig, from_flat
from training.distributed import World
from training.errors import ConfigError
from training.learner import Learner
from training.losses.objective import build_objective
from training.plan import Plan, make_plan
from training.schedule import describe_change
from training.start import Resume, StartState
from training.step import TrainStep
from training.teacher import build_teacher
from training.witness import Witness, average, average_in_bf16

log = logging.getLogger(__name__)

# Zhai et al. 2023, "Sigmoid loss for language image pre-training", section 3.2: most pairs are negatives, and the
# loss starts near what they deserve. Weights that are loaded bring their own.
SIGLIP_LOG_SCALE = math.log(10)
SIGLIP_BIAS = -10.0


@dataclass(frozen=True)
class Samples:
    """What is known of the training data before any sample is read."""

    catalog: data.Catalog
    per_epoch: int


def resolve_model(config: TrainConfig, origin: models.Provenance | None = None) -> models.ModelConfig:
    """The model's configuration, prepared as the weights of `origin` were, with every override of the command line.

    Raises ConfigError.
    """
    section, image = config.model, config.image
    resolved = models.config_with(
        models.with_preprocess_of(models.load_model_config(section.model), origin),
        tokenizer=section.tokenizer,
        image_size=section.force_image_size,
        context_length=section.force_context_length,
        quick_gelu=True if section.force_quick_gelu else None,
        patch_dropout=section.force_patch_dropout,
        drop_path=section.force_drop_path,
        head_dropout=section.force_head_dropout,
        image_mean=image.image_mean,
        image_std=image.image_std,
        image_interpolation=image.image_interpolation,
        image_resize_mode=image.image_resize_mode,
        init_logit_scale=SIGLIP_LOG_SCALE if config.optim.siglip else None,
        init_logit_bias=SIGLIP_BIAS if config.optim.siglip else None,
    )
    if resolved.multimodal_cfg is not None:
        _check_captioning(config)
    return resolved


def _check_captioning(config: TrainConfig) -> None:
    if config.optim.accum_freq > 1:
        raise ConfigError(
            f"--accum-freq with {config.model.model} is refused: accumulation keeps the outputs of all micro-batches, "
            "and a decoder's logits are as wide as the vocabulary; use --grad-checkpointing or --fsdp to save memory"
        )
    if config.model.distill_model is not None:
        raise ConfigError(f"--distill-model with {config.model.model} is refused: a teacher has no captions")


def cuts_padding(choice: str, model_config: models.ModelConfig) -> bool:
    """Whether texts run without their padding, by --text-padding. Raises ConfigError where that would not be exact."""
    reason = models.why_padding_counts(model_config.text_cfg)
    if choice == "cut" and reason:
        raise ConfigError(f"--text-padding cut: the text tower of {model_config.name} needs all positions: {reason}")
    if choice == "auto" and reason:
        log.info("text: padding is computed too, for the tower needs it: %s", reason)
    return choice != "full" and not reason


def load_start(start: StartState, world: World) -> LoadedCheckpoint | None:
    """The checkpoint to go on from, if any. Its tensors are mapped, not read."""
    if not isinstance(start, Resume):
        return None
    with world.collectively(f"--resume {start.folder}"):
        return load_checkpoint(start.folder)


def start_progress(loaded: LoadedCheckpoint | None, plan: Plan) -> Progress:
    """Where the run goes on. The step follows from the samples seen, so that another global batch keeps its place."""
    if loaded is None:
        return Progress(step=0, epoch=0, samples_seen=0)
    step = loaded.progress.samples_seen // plan.global_batch
    return Progress(step=step, epoch=plan.epoch_of(step), samples_seen=loaded.progress.samples_seen)


def describe_resume(loaded: LoadedCheckpoint, config: TrainConfig, plan: Plan) -> str:
    """What the settings of now make different from those that the checkpoint was written with; empty if nothing."""
    old = from_flat(loaded.config)
    samples = old.data.train_num_samples or plan.samples_per_epoch
    old_plan = make_plan(old.optim, samples, loaded.state["world_size"])
    return describe_change((old.optim, old_plan), (config.optim, plan), loaded.progress.samples_seen)


def find_samples(config: TrainConfig, world: World) -> Samples:
    """List and count the training data, on rank 0 for all. Raises DataConfigError or ConfigError."""
    return world.on_main(lambda: _find_samples(config), "--train-data")


def _find_samples(config: TrainConfig) -> Samples:
    section = config.data
    if section.preflight and section.train_data and section.dataset_type != "synthetic":
        data.check_storage(
            data.sources_of(section.train_data, section.train_data_upsampling_factors, section.dataset_type)
        )
    catalog = data.open_catalog(
        section.train_data,
        section.train_data_upsampling_factors,
        section.dataset_type,
        section.train_num_samples,
        data.CsvConfig(section.csv_separator, section.csv_img_key, section.csv_caption_key),
        # Drawing with replacement needs no counts, and walking thousands of tars takes minutes.
        count=not (section.dataset_resampled and section.train_num_samples),
    )
    if section.train_num_samples is None and catalog.num_samples is None:
        raise ConfigError(f"--train-num-samples is needed: {_UNCOUNTED}")
    if not section.dataset_resampled and catalog.sizes is None:
        raise ConfigError(
            f"without --dataset-resampled every sample comes once an epoch, but {_UNCOUNTED}; "
            "or add --dataset-resampled"
        )
    return Samples(catalog, section.train_num_samples or catalog.num_samples or 0)


_UNCOUNTED = (
    "the samples of each shard are not known: no sizes.json or *_stats.json beside them "
    "(python -m scripts.index_shards writes one)"
)


def loader_config(
    config: TrainConfig, samples: Samples, plan: Plan, model_config: models.ModelConfig
) -> data.LoaderConfig:
    """The data side of the settings, with the numbers that the plan and the model decide."""
    section, preprocess = config.data, model_config.preprocess
    height, width = (preprocess.size, preprocess.size) if isinstance(preprocess.size, int) else preprocess.size
    return data.LoaderConfig(
        sources=samples.catalog.sources,
        sizes=samples.catalog.sizes,
        dataset_type=samples.catalog.dataset_type,
        resampled=section.dataset_resampled,
        num_samples=samples.per_epoch,
        batch_size=plan.rank_batch,
        workers=section.workers,
        seed=config.run.seed,
        image_size=(height, width),
        interpolation=preprocess.interpolation,
        aug=data.parse_aug_cfg(config.image.aug_cfg),
        captions=data.CaptionConfig(section.caption_key, section.caption_probs),
        where=section.where,
        shuffle_budget_mib=section.shuffle_budget_mib,
        max_image_pixels=section.max_image_pixels,
        image_decode=section.image_decode,
        max_skip_fraction=section.max_skip_fraction,
        csv_separator=section.csv_separator,
        csv_img_key=section.csv_img_key,
        csv_caption_key=section.csv_caption_key,
    )


def build_transform(loader: data.LoaderConfig, model_config: models.ModelConfig, world: World) -> torch.nn.Module:
    """uint8 pixels to what the model expects, on the device."""
    preprocess = model_config.preprocess
    return data.DeviceTransform(preprocess.mean, preprocess.std, loader.aug).to(world.device)


def build_step(
    config: TrainConfig,
    learner: Learner,
    loader: data.LoaderConfig,
    model_config: models.ModelConfig,
    teacher: models.ModelConfig | None,
    cut_padding: bool,
    world: World,
) -> TrainStep:
    """The update, with what it needs of the settings. Collective where there is a teacher."""
    return TrainStep(
        model=learner.wrapped,
        optimizer=learner.optimizer,
        transform=build_transform(loader, model_config, world),
        world=world,
        seed=config.run.seed,
        precision=config.model.precision,
        accum_steps=config.optim.accum_freq,
        clip_grad_norm=config.optim.clip_grad_norm,
        objective=build_objective(
            config.optim,
            has_teacher=teacher is not None,
            caption_pad_id=None if model_config.multimodal_cfg is None else model_config.text_cfg.pad_id,
        ),
        teacher=build_teacher(config.model, teacher, world),
        cut_padding=cut_padding,
        static_shapes=config.cluster.torchcompile,
        loss_scale=learner.loss_scale,
        ema=learner.ema,
        witness=Witness(learner.wrapped, average_in_bf16 if config.cluster.grad_reduce_dtype == "bf16" else average),
    )


def describe_model(model: models.CLIP, config: TrainConfig) -> str:
    """One line for the console: name, parameters in all and by tower, arithmetic."""
    total = sum(p.numel() for p in model.parameters())
    visual = sum(p.numel() for p in model.visual.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    locked = "" if trained == total else f", of which {trained / 1e6:.2f} M are trained"
    return (
        f"{config.model.model}, {total / 1e6:.2f} M parameters ({visual / 1e6:.2f} M image, "
        f"{(total - visual) / 1e6:.2f} M text){locked}, {config.model.precision}"
    )
