"""Memory that does not suffice and compilers that fail: one line with what was tried and what to lower."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.process import Running
from training import run as story
from training.cli import parse_args
from training.distributed import exit_code_of
from training.errors import ConfigError, OutOfMemoryError, PeerError
from training.main import main
from training.shortage import Load, explained, remedies
from training.step import TrainStep

GIB = 2**30
CUDA_WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.50 GiB is "
    "free. Including non-PyTorch memory, this process has 77.60 GiB memory in use. Of the allocated memory 60.10 GiB "
    "is allocated by PyTorch, and {fragments} is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def load(*flags: str, world: int = 1, state: float = 1.0, device: float | None = 80.0) -> Load:
    """Sizes in GiB."""
    config = parse_args(["--dataset-type", "synthetic", "--train-num-samples", "8", *flags])
    return Load(config, world, (224, 224), 77, int(state * GIB), None if device is None else int(device * GIB))


def said(error: BaseException, *, in_training: bool = False, kind: type[Exception] = OutOfMemoryError) -> str:
    """The line that `error` becomes, as a `kind` of error."""
    with pytest.raises(kind) as caught, explained(load("--batch-size", "256"), in_training=in_training):
        raise error
    assert exit_code_of(caught.value) == {OutOfMemoryError: 1, ConfigError: 2}[kind]
    return str(caught.value)


def test_a_full_gpu_names_what_was_tried_and_what_to_lower() -> None:
    assert said(torch.OutOfMemoryError(CUDA_WORDS.format(fragments="100.00 MiB"))) == (
        "out of memory in the trial step (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
        "of 79.11 GiB of which 1.50 GiB is free) with --batch-size 256, images of 224 x 224, texts of 77 tokens, "
        "amp_bfloat16. Lower what it takes: --grad-checkpointing (computes a third more); or --batch-size 128 "
        "--accum-freq 2 (the same global batch)"
    )


def test_in_the_middle_of_a_training_the_last_checkpoint_is_named() -> None:
    line = said(torch.OutOfMemoryError(CUDA_WORDS.format(fragments="9.50 GiB")), in_training=True)
    assert "out of memory in training (" in line
    assert "The last checkpoint is intact: go on from it by --resume latest with --grad-checkpointing" in line
    assert line.endswith("expandable_segments:True exported (9.50 GiB lie in fragments)")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(CPU_WORDS),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_all_that_means_a_lack_of_memory_is_known(error: BaseException) -> None:
    assert said(error).startswith("out of memory in the trial step (")


def test_a_lack_of_memory_inside_of_a_compiler_is_one_of_memory() -> None:
    from torch._dynamo.exc import TorchRuntimeError

    error = TorchRuntimeError("in the backend")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
    assert said(error).startswith("out of memory in the trial step (CUDA out of memory)")


def test_a_compiler_that_fails_names_its_flag() -> None:
    from torch._dynamo.exc import Unsupported

    line = said(Unsupported("call_function something\nfrom user code"), kind=ConfigError)
    assert line.startswith(
        "--torchcompile: the compiler failed in the trial step: Unsupported: call_function something"
    )
    assert "Leave out --torchcompile" in line


def test_other_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes differ"), PeerError("rank 1: out of memory", 1), ConfigError("out of memory")):
        with pytest.raises(type(error)) as caught, explained(load()):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("case", "first", "absent"),
    [
        (load(), "--grad-checkpointing", "--fsdp"),
        (load("--grad-checkpointing"), "--batch-size 32 --accum-freq 2 (", "--grad-checkpointing"),
        (
            load("--grad-checkpointing", "--batch-size", "9", "--accum-freq", "2"),
            "--batch-size 3 --accum-freq 6",
            "cut",
        ),
        (
            load("--grad-checkpointing", "--ddp-static-graph"),
            "--batch-size 32 --accum-freq 2 --no-ddp-static",
            "--fsdp",
        ),
        (load("--grad-checkpointing", "--batch-size", "1", "--precision", "fp32"), "--precision amp_bf16", "--batch"),
        (load("--grad-checkpointing", "--batch-size", "1", world=8), "--fsdp (weights and optimiser over 8", "--batch"),
        (load(world=8, state=60.0), "--fsdp (weights and optimiser over 8 ranks)", "fp32"),
        (load(world=8, state=60.0, device=None), "--grad-checkpointing", "fp32"),
        (load("--fsdp", world=8, state=60.0), "--grad-checkpointing", "--fsdp"),
        (load("--grad-checkpointing", "--batch-size", "1"), "a smaller --model", "--fsdp"),
    ],
)
def test_what_helps_most_comes_first_and_what_is_set_is_not_advised(case: Load, first: str, absent: str) -> None:
    found = remedies(case)
    assert found[0].startswith(first)
    assert not any(absent in remedy for remedy in found)


FLAGS = [
    *("--model", "tiny-test", "--device", "cpu", "--precision", "fp32", "--dataset-type", "synthetic"),
    *("--train-num-samples", "65536", "--workers", "0", "--epochs", "1", "--warmup", "1", "--name", "run"),
]


def test_memory_that_ends_in_training_leaves_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TrainStep, "__call__", full)
    assert main([*FLAGS, "--batch-size", "8", "--logs", str(tmp_path)]) == 1
    told = [record.getMessage() for record in caplog.records if record.name == "training.main"]
    assert len(told) == 1 and told[0].startswith("error: out of memory in training (CUDA out of memory. Tried")
    assert "Traceback" in (tmp_path / "run" / "train.log").read_text()


def test_the_trial_comes_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(story, "open_feed", lambda *_: opened.append(1))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TrainStep, "rehearse", full)
    assert main([*FLAGS, "--batch-size", "8", "--logs", str(tmp_path), "--trial-step"]) == 1
    assert not opened


# Room for the program and the model, not for the step. What is mapped already belongs to libraries.
LIMITED = """
import resource, sys
from training.main import main
import training.run
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_batch_that_does_not_fit_into_real_memory_ends_with_1_and_the_cure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, *FLAGS, "--logs", str(tmp_path), "--batch-size", "32768", "--trial-step"]
    with Running(command) as running:
        done = running.finish().expect(1)
    assert "Traceback" not in done.output
    last = done.output.strip().splitlines()[-1]
    # Whether torch or NumPy is the first to be refused depends on what is mapped already.
    refused = r"DefaultCPUAllocator: can't allocate memory.*|MemoryError.*|Unable to allocate.*"
    assert re.match(rf"error: out of memory in the trial step \(({refused})\) with ", last)
    assert "with --batch-size 32768, images of 32 x 32, texts of 16 tokens, fp32. Lower what it takes: --grad" in last


@pytest.mark.slow
def test_a_compiler_that_is_missing_ends_with_2_and_the_cure(tmp_path: Path) -> None:
    env = {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "training.main", *FLAGS, "--logs", str(tmp_path), "--batch-size", "8"]
    with Running([*command, "--torchcompile", "--trial-step"], env) as running:
        done = running.finish().expect(2)
    assert "Traceback" not in done.output
    assert "error: --torchcompile: the compiler failed in the trial step: " in done.output
