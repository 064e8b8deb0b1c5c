"""What a run is: frozen, typed sections, one field a flag. Knows no torch, no files, no environment.

Every field becomes a flag of the same name (`clip_grad_norm` -> `--clip-grad-norm`) and a key of the
YAML file; names are unique over all sections. Names and defaults follow OpenCLIP 3.3.0 where it has
the feature. Nothing writes to a config: derived numbers live in `training.plan`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str, *, choices: tuple[str, ...] = (), aliases: tuple[str, ...] = ()) -> Any:
    """A config field with its help line; `choices` limits the value, `aliases` are further flag names."""
    metadata = {"help": help, "choices": choices, "aliases": aliases}
    if isinstance(default, list):
        raise TypeError("use a tuple as default: configs are immutable")
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become tensors."""

    train_data: str | None = option(
        None,
        "shards: braces {000..123}, several joined by ::, s3://, https://, pipe:; a directory of shards or pictures; "
        "a CSV, TSV or Parquet list; or a mixture.yaml: a list of name, shards, proportion (by samples)",
    )
    train_data_upsampling_factors: str | None = option(
        None, "one factor per :: source, e.g. 1::2; needs --dataset-resampled"
    )
    train_num_samples: int | None = option(None, "samples in an epoch; needed where shard sizes are not known")
    val_data: str | None = option(None, "image-text pairs for retrieval and loss, same forms as --train-data")
    val_num_samples: int | None = option(None, "number of pairs in --val-data; another count found is an error")
    dataset_type: str = option(
        "auto", "how to read the data", choices=("auto", "webdataset", "csv", "folder", "synthetic")
    )
    dataset_resampled: bool = option(False, "draw shards with replacement")
    csv_separator: str = option("\t", "column separator of a CSV list")
    csv_img_key: str = option("filepath", "column of image paths or URLs; in Parquet also of their bytes")
    csv_caption_key: str = option("title", "column of captions, read as txt")
    caption_key: tuple[str, ...] = option(
        ("txt",),
        "where captions are: txt, or a field of the sample's json as json:FIELD; of several one is drawn, and "
        "evaluation takes the first",
    )
    caption_probs: tuple[float, ...] = option((), "how often each key of --caption-key is drawn; equally if absent")
    where: str | None = option(
        None, "keep samples by fields of their json, e.g. \"NSFW in ['UNLIKELY'] and similarity > 0.3\""
    )
    workers: int = option(4, "loader processes per rank; 0 loads in the training process")
    shuffle_budget_mib: int = option(256, "raw bytes each worker may hold for shuffling")
    max_skip_fraction: float = option(0.1, "stop when a larger share of samples, or of shards, cannot be used")
    max_image_pixels: int = option(100_000_000, "skip images whose header announces more pixels")
    image_decode: str = option(
        "exact",
        "fast: large JPEGs are decoded at a fraction of their size, within 2 grey levels in the mean of exact",
        choices=("exact", "fast"),
    )
    preflight: bool = option(True, "read a few samples of a few shards before training and stop if none is valid")


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Preprocessing and augmentation. Unset values come from the model's own configuration."""

    aug_cfg: tuple[str, ...] = option(
        (),
        "key=value pairs: scale, ratio, color_jitter, color_jitter_prob, gray_scale_prob, re_prob, re_count, use_timm",
    )
    image_mean: tuple[float, ...] = option((), "three channel means")
    image_std: tuple[float, ...] = option((), "three channel standard deviations")
    image_interpolation: str | None = option(None, "resize filter", choices=("bicubic", "bilinear"))
    image_resize_mode: str | None = option(None, "evaluation resize", choices=("shortest", "longest", "squash"))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers, from which weights, in which precision."""

    model: str = option(
        "ViT-B-32", "a name of models.list_models(), or a path to a JSON or YAML file in OpenCLIP's schema"
    )
    pretrained: str | None = option(
        None,
        "weights to start from: checkpoint folder, .safetensors, OpenCLIP .pt, or transformers' folder; path or URL",
    )
    tokenizer: str | None = option(
        None, "folder of a Hugging Face tokenizer, or a name in the hub's cache, instead of the model's own"
    )
    precision: str = option(
        "amp_bfloat16",
        "arithmetic of the towers: bf16, fp16 with a loss scale (amp), or fp32; parameters, normalisation, logits "
        "and loss are always fp32, so OpenCLIP's bf16, fp16, pure_bf16 and pure_fp16 are refused",
        choices=("amp_bfloat16", "amp_bf16", "amp", "fp32", "bf16", "fp16", "pure_bf16", "pure_fp16"),
    )
    force_image_size: tuple[int, ...] = option((), "one side or two (height width), instead of the model's own")
    force_context_length: int | None = option(None, "text positions, instead of the model's own")
    force_quick_gelu: bool = option(False, "QuickGELU in the native towers, as OpenAI's weights need")
    text_padding: str = option(
        "auto",
        "cut leaves out what follows a text's end, exactly; full computes it; auto cuts where the tower allows it",
        choices=("auto", "cut", "full"),
    )
    force_patch_dropout: float | None = option(None, "share of image tokens dropped in training")
    force_drop_path: float | None = option(
        None,
        "stochastic depth in a timm image tower: share of rows that skip its last block, linear from 0 at the first",
    )
    force_head_dropout: float | None = option(None, "dropout in the head of a timm image tower")
    grad_checkpointing: bool = option(
        False, "recompute blocks in the backward pass instead of keeping their activations"
    )
    lock_image: bool = option(False, "leave the image tower's weights as they are")
    lock_image_unlocked_groups: int = option(
        0, "with --lock-image, train its last groups of layers all the same, the projection first"
    )
    lock_image_freeze_bn_stats: bool = option(
        False, "with --lock-image, keep the running statistics of its batch norms too, and normalise by them"
    )
    lock_text: bool = option(False, "leave the text tower's weights as they are")
    lock_text_unlocked_layers: int = option(
        0, "with --lock-text, train its last layers all the same, the projection first"
    )
    lock_text_freeze_layer_norm: bool = option(
        True, "--lock-text locks layer norms too; --no-lock-text-freeze-layer-norm trains all of the text tower's"
    )
    lora_rank: int | None = option(
        None,
        "train low-rank adapters of both towers' blocks only (LoRA, extra 'lora'); saved weights have them merged in",
    )
    lora_image_rank: int | None = option(None, "the rank in the image tower, instead of --lora-rank; 0 freezes it")
    lora_text_rank: int | None = option(None, "the rank in the text tower, instead of --lora-rank; 0 freezes it")
    lora_alpha: float | None = option(None, "adapters are scaled by this over their rank; by 1 if absent")
    lora_target: tuple[str, ...] = option(
        (), "layers to adapt, by patterns for ends of names (in_proj, 'mlp.*', qkv); all linear ones of the blocks"
    )
    lora_train_projections: bool = option(False, "with LoRA, also train the towers' projections, whole")
    distill_model: str | None = option(None, "teacher whose similarities are distilled, as --model names it")
    distill_pretrained: str | None = option(None, "the teacher's weights, in the forms of --pretrained")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Batch, optimiser, schedule and loss."""

    batch_size: int = option(64, "samples of a rank in one forward pass (micro-batch)")
    accum_freq: int = option(1, "micro-batches accumulated, exactly, into one optimiser step")
    epochs: int = option(32, "passes of --train-num-samples")
    lr: float = option(5e-4, "peak learning rate")
    beta1: float | None = option(None, "AdamW beta1 (0.9)")
    beta2: float | None = option(None, "AdamW beta2 (0.98 for ViT, else 0.999)")
    eps: float | None = option(None, "AdamW epsilon (1e-6 for ViT, else 1e-8)")
    wd: float = option(0.2, "weight decay of matrices and convolutions")
    image_layer_decay: float | None = option(
        None, "factor of the learning rate for each group of layers further from the image tower's output, e.g. 0.8"
    )
    text_layer_decay: float | None = option(None, "the same in the text tower")
    warmup: int | None = option(None, "steps of linear warm-up (10000, unless --warmup-samples is given)")
    warmup_samples: int | None = option(
        None, "length of the warm-up in samples instead, so that it stays the same at another global batch"
    )
    lr_scheduler: str = option("cosine", "after the warm-up", choices=("cosine", "const", "const-cooldown"))
    epochs_cooldown: int | None = option(None, "last epochs in which const-cooldown falls")
    lr_cooldown_end: float = option(0.0, "learning rate at the end of the cooldown")
    lr_cooldown_power: float = option(1.0, "power of the cooldown's polynomial")
    skip_scheduler: bool = option(False, "keep --lr throughout")
    clip_grad_norm: float | None = option(None, "clip the global gradient norm to this", aliases=("--grad-clip-norm",))
    local_loss: bool = option(True, "stream this rank's rows over all columns; --no-local-loss is the dense reference")
    gather_with_grad: bool = option(True, "gradients flow through the gather; the loss is exact only so")
    model_ema_samples: int | None = option(
        None,
        "keep a moving average of the weights, in which the share of older ones halves in so many samples; it is "
        "evaluated and saved (ema.safetensors) beside the weights",
    )
    model_ema_rampup: float | None = option(
        None, "with --model-ema-samples, shorten that to this share of the samples seen so far (e.g. 0.05)"
    )
    siglip: bool = option(
        False, "SigLIP's sigmoid loss; the temperature starts at ln 10 and a bias of the logits at -10"
    )
    coca_caption_loss_weight: float = option(2.0, "weight of the caption loss of a CoCa model")
    coca_contrastive_loss_weight: float = option(1.0, "weight of the contrastive loss of a CoCa model")
    loss_dist_impl: str | None = option(
        None,
        "no effect: the same loss by other exchanges between ranks",
        choices=("bidir", "shift", "reduce", "gather"),
    )
    on_nonfinite: str = option(
        "skip",
        "a loss or gradient that is not finite: leave out its update and end the run after too many in a row, or then "
        "go back to the last checkpoint and on with later samples, or end the run at once",
        choices=("skip", "rollback", "stop"),
    )
    max_nonfinite: int = option(10, "updates left out in a row that --on-nonfinite skip and rollback tolerate")
    max_rollbacks: int = option(3, "times that --on-nonfinite rollback goes back before the run ends")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, folder, seed, saving and resuming."""

    name: str | None = option(None, "run name; the folder is <logs>/<name>; made from model and date if absent")
    logs: str = option(
        "./logs",
        "where run folders are (under torchrun use --logs-dir: torchrun takes --logs for one of its own)",
        aliases=("--logs-dir",),
    )
    seed: int = option(0, "initial weights, sample order and random draws follow from it alone")
    resume: str | None = option(
        None,
        "'latest': the newest checkpoint that verifies, here or at the remote; or a checkpoint folder, path or URL",
    )
    save_frequency: int = option(1, "keep a checkpoint every so many epochs; the last one always")
    save_every_n_steps: int | None = option(None, "a checkpoint between epochs, by steps")
    save_every_n_minutes: float | None = option(None, "a checkpoint between epochs, by time")
    keep_last: int = option(2, "step checkpoints kept; those of epochs all stay")
    delete_previous_checkpoint: bool = option(False, "keep only the newest checkpoint of an epoch")
    save_most_recent: bool = option(
        False, "save every epoch to resume from; those that --save-frequency does not keep rotate as --keep-last says"
    )
    remote_sync: str | None = option(
        None, "path or URL (s3://, gs://, ...) under which a second copy of the run is kept, behind the training"
    )
    remote_sync_frequency: float = option(
        300.0,
        "seconds after which --remote-sync tries again what failed; checkpoints go there as soon as they are saved",
    )
    remote_sync_protocol: str | None = option(
        None, "no effect: the protocol is in the URL of --remote-sync", choices=("s3", "fsspec")
    )
    preempt_margin_s: float = option(
        180.0,
        "seconds before the job's end (CLIPYARD_END_TIME, SLURM_JOB_END_TIME or what squeue says) at which the run "
        "saves and stops; twice the time of the last save, and of its upload, comes on top",
    )
    dry_run: bool = option(
        False,
        "build everything, make one step at the largest text length, print plan, memory and what would be refused, "
        "write nothing",
    )
    dry_run_world_size: int = option(1, "ranks of the run that --dry-run pretends to be rank 0 of, on this one process")
    trial_step: bool | None = option(
        None,
        "before the data, try a step at the largest shapes that changes nothing, for memory and compilation; on CUDA "
        "unless told otherwise",
    )
    stop_after_steps: int | None = option(None, "save and end after this step of the run, as a preemption would")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, where and how often."""

    report_to: str = option("", "any of wandb, tensorboard (comma-separated), or all; the JSONL is always written")
    log_every_n_steps: int = option(100, "steps between metric lines")
    wandb_project_name: str = option("clipyard", "W&B project")
    wandb_notes: str = option("", "W&B notes")
    progress: str = option("auto", "console: a bar on a terminal, lines elsewhere", choices=("auto", "bar", "lines"))


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How the ranks find each other and share the model."""

    device: str = option("auto", "auto takes CUDA when there is one", choices=("auto", "cuda", "cpu"))
    dist_backend: str | None = option(None, "nccl on CUDA, gloo on the CPU", choices=("nccl", "gloo"))
    dist_url: str | None = option(None, "rendezvous as tcp://host:port instead of the environment's")
    dist_timeout_s: float = option(600.0, "seconds that ranks may wait for each other once a step is done")
    dist_startup_timeout_s: float | None = option(
        None, "the same before that, and around saving and evaluation (1800, or --dist-timeout-s if that is longer)"
    )
    stall_timeout: float | None = option(
        None,
        "seconds without progress until a report says which rank is late, where and at which shard (120, or a third of "
        "--dist-timeout-s if that is less); 0 is never",
    )
    rendezvous_timeout_s: float = option(120.0, "seconds in which all ranks must have come")
    ddp_static_graph: bool = option(False, "tell DDP that the graph never changes")
    fsdp: bool = option(False, "shard parameters, gradients and optimiser over the ranks (FSDP2), block by block")
    fsdp_no_reshard_after_forward: bool = option(
        False, "with --fsdp, keep whole parameters until the backward pass: fewer gathers, more memory"
    )
    grad_reduce_dtype: str = option(
        "fp32", "type in which ranks exchange gradients; bf16 halves the bytes", choices=("fp32", "bf16")
    )
    channels_last: bool = option(
        False, "image tower's convolutions in channels-last memory: may pay for ResNets, slows ConvNeXts down"
    )
    torchcompile: bool = option(False, "compile the repeated blocks of both towers")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured while training."""

    imagenet_val: str | None = option(None, "ImageNet validation set: one folder per WordNet id")
    zeroshot_data: tuple[str, ...] = option(
        (),
        "name=folder or URL in CLIP_benchmark's layout: shards, classnames.txt, zeroshot_classification_templates.txt",
    )
    imagenet_v2: str | None = option(None, "ImageNet-V2: one folder per number of a class")
    imagenet_prompts: str = option(
        "own",
        "of both: own is class names by timm and the set's or our templates; openclip is what published figures use, "
        "from the package open_clip_torch",
        choices=("own", "openclip"),
    )
    retrieval_data: tuple[str, ...] = option(
        (),
        "name=folder, URL or list of images with captions, several to an image by lines: CLIP_benchmark's layout too",
    )
    linear_probe_data: tuple[str, ...] = option(
        (), "name=folder or URL, as --zeroshot-data, with a train/ split on which a linear classifier is fitted"
    )
    eval_suite: tuple[str, ...] = option((), "lists of sets: names in configs/eval, or YAML files")
    eval_root: str | None = option(None, "where the sets of --eval-suite are, with {name} for a set's name")
    zeroshot_frequency: int = option(2, "epochs between zero-shot evaluations; the last epoch always; 0 is never")
    val_frequency: int = option(1, "epochs between passes over --val-data; the last epoch always; 0 is never")
    zeroshot_every_n_steps: int | None = option(None, "zero-shot evaluations between the ends of epochs too, by steps")
    zeroshot_every_n_samples: int | None = option(
        None, "the same by samples seen on all ranks: at the first step behind each multiple of it"
    )
    val_every_n_steps: int | None = option(None, "passes over --val-data between the ends of epochs too, by steps")
    val_every_n_samples: int | None = option(None, "the same by samples seen on all ranks")
    evaluate_first: bool = option(
        False, "evaluate before the first step, as what fine-tuning starts from; a run that resumes has done so"
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The whole of a run's settings, by section."""

    data: DataConfig = DataConfig()
    image: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    log: LogConfig = LogConfig()
    cluster: ClusterConfig = ClusterConfig()
    eval: EvalConfig = EvalConfig()


def sections() -> dict[str, type]:
    """Section name -> its dataclass, in the order of `TrainConfig`."""
    return {f.name: type(f.default) for f in dataclasses.fields(TrainConfig)}


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """Every setting under its flag's name, sections dissolved; the content of a run's `config.yaml`."""
    flat: dict[str, Any] = {}
    for name in sections():
        flat |= dataclasses.asdict(getattr(config, name))
    return flat


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """What must be the same on all ranks: all but where run folders are, which may be a disk of each node."""
    return {name: value for name, value in to_flat(config).items() if name != "logs"}


def from_flat(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `to_flat`; absent names keep their defaults. Values must have their final types."""
    parts = {}
    for name, section in sections().items():
        known = {f.name for f in dataclasses.fields(section)}
        parts[name] = section(**{key: value for key, value in values.items() if key in known})
    return TrainConfig(**parts)
