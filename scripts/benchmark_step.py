"""`python -m scripts.benchmark_step`: one training step beside OpenCLIP's, same model, weights, batch and captions.

Ours begins with uint8 pixels and OpenCLIP's with normalised floats, as each loader hands them over, and both end
with updated weights. The two take turns, so that what else the machine does falls on both. Needs open_clip_torch.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models
from data import AugmentConfig, Batch, DeviceTransform
from models import why_padding_counts
from training.config import ClusterConfig, ModelConfig, OptimConfig
from training.distributed import World
from training.losses import Contrastive
from training.optimizer import build_optimizer
from training.parallel import parallelize
from training.precision import autocast
from training.step import TrainStep
from training.transfer import Transfer

Step = Callable[[], Tensor]  # one update; returns its loss without waiting for it

SIDES = ("clipyard", "open_clip")
# Dense bf16 of the data sheets, in TFLOP/s.
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0}
# Shortest and longest caption drawn, in tokens with both ends: alt-texts average about 17.
CAPTION_LENGTHS = (8, 27)
_COUNTED_TEXTS = 64
RATE = 5e-4


def draw_batch(config: models.ModelConfig, rows: int) -> Batch:
    """Noise and captions of alt-text length, in pinned memory where there is a GPU."""
    generator = torch.Generator().manual_seed(0)
    size, text = models.InferenceTransform(config.preprocess).size, config.text_cfg
    images = torch.randint(0, 256, (rows, 3, *size), generator=generator, dtype=torch.uint8)
    tokens = torch.randint(1, text.vocab_size - 2, (rows, text.context_length), generator=generator)
    lengths = torch.randint(CAPTION_LENGTHS[0], CAPTION_LENGTHS[1] + 1, (rows, 1), generator=generator)
    lengths = lengths.clamp(max=text.context_length)
    places = torch.arange(text.context_length)
    tokens = torch.where(places < lengths - 1, tokens, 0)
    tokens = torch.where(places == lengths - 1, text.vocab_size - 1, tokens)
    tokens[:, 0] = text.vocab_size - 2
    if torch.cuda.is_available():
        images, tokens = images.pin_memory(), tokens.pin_memory()
    return Batch(images, tokens, {}, [str(row) for row in range(rows)], ["none"] * rows)


def build_ours(args: argparse.Namespace, config: models.ModelConfig, batch: Batch, device: torch.device) -> Step:
    """`TrainStep` behind the transfer to the device, with our defaults."""
    torch.manual_seed(0)
    model = models.build_model(config).to(device)
    optimizer = build_optimizer(model, OptimConfig(lr=RATE), args.model, model.no_weight_decay())
    world = World(device=device)
    settings = ModelConfig(precision=args.precision, grad_checkpointing=args.grad_checkpointing)
    wrapped = parallelize(model, settings, ClusterConfig(torchcompile=args.torchcompile), world)
    transform = DeviceTransform(config.preprocess.mean, config.preprocess.std, AugmentConfig()).to(device)
    step = TrainStep(
        model=wrapped,
        optimizer=optimizer,
        transform=transform,
        world=world,
        seed=0,
        precision=args.precision,
        accum_steps=1,
        clip_grad_norm=None,
        objective=Contrastive(),
        cut_padding=why_padding_counts(config.text_cfg) is None,
        static_shapes=args.torchcompile,
    )
    transfer = Transfer(device)
    return lambda: step(transfer(batch), 0, RATE).loss


def build_theirs(args: argparse.Namespace, config: models.ModelConfig, batch: Batch, device: torch.device) -> Step:
    """OpenCLIP's model and loss, and AdamW as its trainer makes it: two groups, no further settings."""
    import open_clip
    from open_clip.loss import ClipLoss

    torch.manual_seed(0)
    weights = models.build_model(config).state_dict()
    model = open_clip.create_model(args.model, precision="fp32", device=device)
    model.load_state_dict(weights)
    model.set_grad_checkpointing(args.grad_checkpointing)
    model.train()
    loss_of = ClipLoss(local_loss=True, gather_with_grad=True)
    named = list(model.named_parameters())
    marks = ("bn", "ln", "bias", "logit_scale")
    plain = [p for name, p in named if p.ndim < 2 or any(mark in name for mark in marks)]
    decayed = [p for name, p in named if not (p.ndim < 2 or any(mark in name for mark in marks))]
    betas, eps = ((0.9, 0.98), 1e-6) if "vit" in args.model.lower() else ((0.9, 0.999), 1e-8)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=eps)
    normalise = DeviceTransform(config.preprocess.mean, config.preprocess.std)
    images = normalise(batch.images)
    images = images.pin_memory() if device.type == "cuda" else images
    called = torch.compile(model) if args.torchcompile else model

    def step() -> Tensor:
        image, text = images.to(device, non_blocking=True), batch.tokens.to(device, non_blocking=True)
        optimizer.zero_grad()
        with autocast(args.precision, device):
            features = called(image, text)
            loss = loss_of(*features[:3])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.detach()

    return step


BUILDERS = dict(zip(SIDES, (build_ours, build_theirs), strict=True))


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each round by side, taking turns; and each side's first loss, which must agree."""
    config = models.load_model_config(args.model)
    batch = draw_batch(config, args.batch_size)
    steps = {side: build(args, config, batch, device) for side, build in BUILDERS.items()}
    first = {side: float(step()) for side, step in steps.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(args.warm_up + args.rounds):
        for side in SIDES if turn % 2 else reversed(SIDES):
            elapsed = timed(steps[side], device)
            if turn >= args.warm_up:
                seconds[side].append(elapsed)
    return seconds, first


def timed(step: Step, device: torch.device) -> float:
    """Seconds from the batch on the host to updated weights."""
    synchronise(device)
    started = time.perf_counter()
    step()
    synchronise(device)
    return time.perf_counter() - started


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # Host sync: this is what is measured.


def peak_mib(side: str, args: argparse.Namespace, device: torch.device) -> float:
    """Most memory that two steps hold: allocated on the GPU, or resident in the process on the CPU."""
    config = models.load_model_config(args.model)
    step = BUILDERS[side](args, config, draw_batch(config, args.batch_size), device)
    for _ in range(2):
        step()
    synchronise(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(float(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 2**10


def peak_alone(side: str, args: argparse.Namespace, device: torch.device) -> float:
    """The same in a process of its own, where nothing of the other side is resident."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_mib, (side, args, device))


def useful_flops(config: models.ModelConfig) -> float:
    """Floating-point operations of one sample's step; padding that cannot reach a feature and recomputation are not.

    Three times the forward pass: the backward pass has two products for each of its one (Chowdhery et al. 2022,
    PaLM, appendix B). Attention is counted by its plain formula whatever kernel runs it; a text is the mean of many.
    """
    model = models.build_model(config)
    batch = draw_batch(config, _COUNTED_TEXTS)
    plan = model.text_tower.plan_text(batch.tokens) if model.text_tower.ignores_padding else None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as image:
            model(batch.images[:1].float())
        with FlopCounterMode(display=False) as texts:
            model(text=batch.tokens, text_plan=plan)
    return 3.0 * (image.get_total_flops() + texts.get_total_flops() / _COUNTED_TEXTS)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """What the machine could do in a second, and where the figure is from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tera in PEAKS.items():
            if known in name and precision != "fp32":
                return tera * 1e12, f"data sheet of {known}, dense bf16"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    side = 4096 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device, dtype=dtype)
    best = min(timed(lambda: left @ left, device) for _ in range(10))
    return 2 * side**3 / best, f"fastest of ten {side} x {side} products, {dtype}"


def report(args: argparse.Namespace, device: torch.device) -> str:
    """The whole measurement as Markdown."""
    seconds, first = measure(args, device)
    flops, (peak, source) = useful_flops(models.load_model_config(args.model)), peak_flops(device, args.precision)
    lines = [
        f"`{' '.join(['python -m scripts.benchmark_step', *args.given])}`, {date.today()}: {environment(device)}.",
        "",
        f"Batch {args.batch_size}, {args.precision}, {args.rounds} rounds in turn after {args.warm_up}; "
        f"{flops / 1e9:.1f} useful GFLOP a sample; MFU against {peak / 1e12:.2f} TFLOP/s ({source}). First losses: "
        + ", ".join(f"{side} {loss:.5f}" for side, loss in first.items())
        + ".",
        "",
        "| | s a step, median | fastest to slowest | samples/s | MFU | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for side, times in seconds.items():
        median = statistics.median(times)
        rate = args.batch_size / median
        lines.append(
            f"| {side} | {median:.3f} | {min(times):.3f} to {max(times):.3f} | {rate:.2f} "
            f"| {100 * rate * flops / peak:.1f} % | {peak_alone(side, args, device):.0f} |"
        )
    ours, theirs = (seconds[side] for side in SIDES)
    ratios = [slow / fast for slow, fast in zip(theirs, ours, strict=True)]
    lines += [
        "",
        f"OpenCLIP's time to ours: {min(theirs) / min(ours):.2f} by the fastest round of each, which other work on the "
        f"machine disturbed least; median of the rounds {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}.",
    ]
    return "\n".join(lines) + "\n"


def environment(device: torch.device) -> str:
    """What the figures depend on."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "timm", "open_clip_torch"))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{where}, {platform.machine()}, Python {platform.python_version()}, {versions}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_step", description=__doc__)
    add = parser.add_argument
    add("--model", default="ViT-B-32", help="a name that both packages know")
    add("--batch-size", type=int, default=512 if on_gpu else 16)
    add("--precision", default="amp_bf16" if on_gpu else "fp32", choices=("amp_bf16", "fp32"))
    add("--rounds", type=int, default=20 if on_gpu else 7)
    add("--warm-up", type=int, default=5 if on_gpu else 1, help="rounds that do not count")
    add("--torchcompile", action="store_true", help="our blocks, OpenCLIP's whole model, as each trainer does")
    add("--grad-checkpointing", action="store_true")
    add("--out", type=Path, help="write the Markdown here too")
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints. Returns the exit code."""
    args = parse(argv)
    text = report(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
