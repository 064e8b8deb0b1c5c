"""Settings that cannot work together, refused before any work with the reason. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data.captions import CaptionConfig
from data.errors import DataConfigError
from data.where import Where
from models.errors import ConfigError
from training.combinations import refusals, uses_lora
from training.config import ModelConfig, TrainConfig


def check_config(config: TrainConfig) -> None:
    """Raise ConfigError for the first rule that the settings break; a dry run is told all of them at once."""
    problems = list(_problems(config))
    if problems:
        raise ConfigError("; and ".join(problems) if config.run.dry_run else problems[0])


def _problems(config: TrainConfig) -> Iterator[str]:
    yield from _numbers(config)
    yield from _timeouts(config)
    yield from refusals(config)
    yield from _data(config)
    yield from _schedule(config)
    yield from _fine_tuning(config)
    if config.run.resume == "latest" and config.run.name is None:
        yield "--resume latest needs --name: a name made from the date is another one at every start"


def _numbers(config: TrainConfig) -> Iterator[str]:
    positive = {
        "batch_size": config.optim.batch_size,
        "accum_freq": config.optim.accum_freq,
        "epochs": config.optim.epochs,
        "lr": config.optim.lr,
        "log_every_n_steps": config.log.log_every_n_steps,
        "shuffle_budget_mib": config.data.shuffle_budget_mib,
        "save_frequency": config.run.save_frequency,
        "train_num_samples": config.data.train_num_samples,
        "model_ema_samples": config.optim.model_ema_samples,
        "model_ema_rampup": config.optim.model_ema_rampup,
        "clip_grad_norm": config.optim.clip_grad_norm,
        "save_every_n_steps": config.run.save_every_n_steps,
        "zeroshot_every_n_steps": config.eval.zeroshot_every_n_steps,
        "zeroshot_every_n_samples": config.eval.zeroshot_every_n_samples,
        "val_every_n_steps": config.eval.val_every_n_steps,
        "val_every_n_samples": config.eval.val_every_n_samples,
        "dry_run_world_size": config.run.dry_run_world_size,
        "save_every_n_minutes": config.run.save_every_n_minutes,
        "remote_sync_frequency": config.run.remote_sync_frequency,
        "dist_timeout_s": config.cluster.dist_timeout_s,
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            yield f"--{name.replace('_', '-')} must be positive, got {value}"
    not_negative = {
        "workers": config.data.workers,
        "warmup": config.optim.warmup,
        "warmup_samples": config.optim.warmup_samples,
        "wd": config.optim.wd,
        "max_nonfinite": config.optim.max_nonfinite,
        "max_rollbacks": config.optim.max_rollbacks,
        "preempt_margin_s": config.run.preempt_margin_s,
        "stall_timeout": config.cluster.stall_timeout,
    }
    for name, number in not_negative.items():
        if number is not None and number < 0:
            yield f"--{name.replace('_', '-')} must not be negative, got {number}"
    if not 0 <= config.data.max_skip_fraction <= 1:
        yield f"--max-skip-fraction is a share between 0 and 1, got {config.data.max_skip_fraction}"


def _timeouts(config: TrainConfig) -> Iterator[str]:
    cluster = config.cluster
    startup, running, stall = cluster.dist_startup_timeout_s, cluster.dist_timeout_s, cluster.stall_timeout
    if startup is not None and startup < running:
        yield f"--dist-startup-timeout-s {startup:g} must not be less than --dist-timeout-s {running:g}"
    if stall is not None and stall >= running:
        yield f"--stall-timeout {stall:g} must be less than --dist-timeout-s {running:g}: the run ends before a report"


def _data(config: TrainConfig) -> Iterator[str]:
    data = config.data
    if config.run.dry_run:
        if data.train_data is None and data.train_num_samples is None:
            yield "--dry-run needs --train-data, or --train-num-samples to plan without data"
    elif data.train_data is None and data.dataset_type != "synthetic":
        yield "--train-data is missing: shards such as 's3://bucket/{00000..00099}.tar', or --dataset-type synthetic"
    if data.train_data_upsampling_factors and not data.dataset_resampled:
        yield "--train-data-upsampling-factors needs --dataset-resampled: factors are frequencies of drawing"
    if data.dataset_type == "synthetic" and data.train_num_samples is None:
        yield "--dataset-type synthetic needs --train-num-samples"
    yield from _refused(lambda: CaptionConfig(data.caption_key, data.caption_probs))
    if (where := data.where) is not None:
        yield from _refused(lambda: Where.parse(where))
    if len(config.model.force_image_size) > 2:
        yield "--force-image-size takes one side, or height and width"
    for name, values in (("image-mean", config.image.image_mean), ("image-std", config.image.image_std)):
        if values and len(values) != 3:
            yield f"--{name} takes three numbers"


def _refused(build: Callable[[], object]) -> Iterator[str]:
    """What `data` has to say against a setting that it understands better."""
    try:
        build()
    except DataConfigError as error:
        yield str(error)


def _lora(model: ModelConfig) -> Iterator[str]:
    ranks = {
        "lora-rank": model.lora_rank,
        "lora-image-rank": model.lora_image_rank,
        "lora-text-rank": model.lora_text_rank,
    }
    for name, rank in ranks.items():
        if rank is not None and rank < (name == "lora-rank"):
            yield f"--{name} must {'be positive' if name == 'lora-rank' else 'not be negative'}, got {rank}"
    if model.lora_alpha is not None and model.lora_alpha <= 0:
        yield f"--lora-alpha must be positive, got {model.lora_alpha:g}"
    companions = {
        "--lora-alpha": model.lora_alpha is not None,
        "--lora-target": bool(model.lora_target),
        "--lora-train-projections": model.lora_train_projections,
    }
    for flag, is_given in companions.items():
        if is_given and not uses_lora(model):
            yield f"{flag} needs --lora-rank, --lora-image-rank or --lora-text-rank"


def _fine_tuning(config: TrainConfig) -> Iterator[str]:
    model, optim = config.model, config.optim
    for name, count in (
        ("lock-image-unlocked-groups", model.lock_image_unlocked_groups),
        ("lock-text-unlocked-layers", model.lock_text_unlocked_layers),
    ):
        if count < 0:
            yield f"--{name} must not be negative, got {count}"
    companions = (
        (model.lock_image, model.lock_image_unlocked_groups, "--lock-image-unlocked-groups", "--lock-image"),
        (model.lock_image, model.lock_image_freeze_bn_stats, "--lock-image-freeze-bn-stats", "--lock-image"),
        (model.lock_text, model.lock_text_unlocked_layers, "--lock-text-unlocked-layers", "--lock-text"),
        (model.lock_text, not model.lock_text_freeze_layer_norm, "--no-lock-text-freeze-layer-norm", "--lock-text"),
    )
    for is_locked, is_given, flag, lock in companions:
        if is_given and not is_locked:
            yield f"{flag} needs {lock}"
    if optim.model_ema_rampup is not None and optim.model_ema_samples is None:
        yield "--model-ema-rampup needs --model-ema-samples: it shortens what that says"
    yield from _lora(model)
    for name, decay in (("image", optim.image_layer_decay), ("text", optim.text_layer_decay)):
        if decay is not None and not 0 < decay <= 1:
            yield f"--{name}-layer-decay is a factor above 0 and at most 1, got {decay:g}"


def _schedule(config: TrainConfig) -> Iterator[str]:
    optim = config.optim
    if optim.warmup is not None and optim.warmup_samples is not None:
        yield "--warmup (in steps) and --warmup-samples say the same thing twice: give one of them"
    if optim.lr_scheduler == "const-cooldown" and optim.epochs_cooldown is None:
        yield "--lr-scheduler const-cooldown needs --epochs-cooldown"
    if optim.epochs_cooldown is not None and not 0 < optim.epochs_cooldown <= optim.epochs:
        yield f"--epochs-cooldown lies between 1 and --epochs {optim.epochs}, got {optim.epochs_cooldown}"
