"""Which ways of running a step go together: the one table of what is refused, with the reasons. Pure, no torch.

What is not refused here is covered by a test on two ranks against a single process (tests/training).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from training.config import ModelConfig, TrainConfig

# OpenCLIP's values of --precision that keep the weights themselves in sixteen bits.
_WITHOUT_MASTERS = ("bf16", "fp16", "pure_bf16", "pure_fp16")

Rule = tuple[Callable[[TrainConfig], bool], str]


def uses_lora(model: ModelConfig) -> bool:
    """Whether any tower gets adapters."""
    return any(rank for rank in (model.lora_rank, model.lora_image_rank, model.lora_text_rank))


REFUSED: tuple[Rule, ...] = (
    (
        lambda c: not c.optim.gather_with_grad,
        "--no-gather-with-grad is refused: without the gradient through the gathered features the loss misses "
        "what other ranks' negatives say, and trains in a wrong direction",
    ),
    (
        lambda c: c.cluster.ddp_static_graph and c.optim.accum_freq > 1,
        "--ddp-static-graph with --accum-freq > 1 is refused: under a static graph DDP's no_sync silently stops "
        "synchronising gradients; leave out --ddp-static-graph",
    ),
    (
        lambda c: c.cluster.ddp_static_graph and c.cluster.fsdp,
        "--ddp-static-graph with --fsdp is refused: the static graph is an option of DDP, which --fsdp replaces; "
        "leave out one of the two",
    ),
    (
        lambda c: c.cluster.fsdp_no_reshard_after_forward and not c.cluster.fsdp,
        "--fsdp-no-reshard-after-forward needs --fsdp: without it no parameter is sharded",
    ),
    (
        lambda c: c.cluster.grad_reduce_dtype == "bf16" and c.cluster.fsdp and c.optim.accum_freq > 1,
        "--grad-reduce-dtype bf16 with --fsdp and --accum-freq > 1 is refused: FSDP adds the micro-batches up in "
        "the type that it reduces in, and bf16 loses the small ones; leave out --grad-reduce-dtype",
    ),
    (
        lambda c: c.cluster.channels_last and c.cluster.fsdp,
        "--channels-last with --fsdp is refused: FSDP shards contiguous parameters only; leave out one of the two",
    ),
    (
        lambda c: (c.model.distill_model is None) != (c.model.distill_pretrained is None),
        "--distill-model and --distill-pretrained go together: a teacher, and what it has learnt",
    ),
    (
        lambda c: c.optim.siglip and c.model.distill_model is not None,
        "--siglip with --distill-model is refused: what is distilled are softmaxes, which a sigmoid loss has not",
    ),
    (
        lambda c: uses_lora(c.model) and c.cluster.fsdp,
        "--lora-rank with --fsdp is refused: a checkpoint holds adapters and weights as one, for which each matrix "
        "must be whole where its adapter is; adapters have so few gradients and moments that DDP holds little else "
        "than the weights; leave out --fsdp",
    ),
    (
        lambda c: uses_lora(c.model) and c.optim.model_ema_samples is not None,
        "--lora-rank with --model-ema-samples is refused: the average of an adapter's two factors is not the factors "
        "of the average; leave out one of the two",
    ),
    (
        lambda c: uses_lora(c.model) and (c.model.lock_image or c.model.lock_text),
        "--lora-rank with --lock-image or --lock-text is refused: LoRA freezes both towers already; a tower without "
        "adapters is --lora-image-rank 0 or --lora-text-rank 0",
    ),
    (
        lambda c: c.model.precision in _WITHOUT_MASTERS,
        "--precision bf16, fp16, pure_bf16 and pure_fp16 are refused: their weights have no fp32 copy, and most of "
        "AdamW's small updates round to nothing; amp_bf16 computes in bf16 and keeps the weights in fp32",
    ),
)


def refusals(config: TrainConfig) -> Iterator[str]:
    """The reasons why `config` cannot run, in the order of the table."""
    return (reason for applies, reason in REFUSED if applies(config))
