"""The command line and the YAML file: names, types, and what a mistake says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from models.errors import ConfigError
from training.cli import parse_args, settings
from training.config import from_flat, sections, to_flat

PUBLISHED = [
    "--save-frequency",
    "1",
    "--name",
    "convnext_large_320",
    "--pretrained",
    "/runs/convnext_large_256/epoch_128.pt",
    "--resume",
    "latest",
    "--train-data=pipe:aws s3 cp s3://mybucket/path/laion{00000..00003}.tar -",
    "--train-num-samples",
    "203666042",
    "--dataset-type",
    "webdataset",
    "--precision",
    "amp_bfloat16",
    "--beta2",
    "0.98",
    "--warmup",
    "2000",
    "--batch-size=256",
    "--epochs=12",
    "--dataset-resampled",
    "--aug-cfg",
    "use_timm=True",
    "scale=(0.5, 1.0)",
    "re_prob=0.4",
    "--clip-grad-norm",
    "5.0",
    "--lr",
    "5e-5",
    "--workers=6",
    "--model",
    "convnext_large_d_320",
    "--seed",
    "0",
    "--ddp-static-graph",
    "--local-loss",
    "--gather-with-grad",
    "--grad-checkpointing",
]


def test_the_published_fine_tune_command_parses_flag_for_flag() -> None:
    config = parse_args(PUBLISHED)
    assert config.data.train_data == "pipe:aws s3 cp s3://mybucket/path/laion{00000..00003}.tar -"
    assert config.image.aug_cfg == ("use_timm=True", "scale=(0.5, 1.0)", "re_prob=0.4")
    assert (config.optim.lr, config.optim.beta2, config.optim.clip_grad_norm) == (5e-5, 0.98, 5.0)
    assert (config.run.resume, config.run.save_frequency) == ("latest", 1)
    assert config.cluster.ddp_static_graph and config.model.grad_checkpointing


def test_openclips_name_for_clipping_is_an_alias() -> None:
    assert parse_args(["--train-data", "a.tar", "--grad-clip-norm", "1"]).optim.clip_grad_norm == 1.0


def test_setting_names_are_unique_over_all_sections() -> None:
    names = Counter(f.name for section in sections().values() for f in dataclasses.fields(section))
    assert [name for name, count in names.items() if count > 1] == []
    assert set(names) == set(settings())


def test_flat_and_nested_forms_are_inverse() -> None:
    config = parse_args(PUBLISHED)
    assert from_flat(to_flat(config)) == config


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3e-4\nbatch-size: 32\ntrain_data: x.tar\naug_cfg: ['scale=(0.4, 1.0)']\n")
    config = parse_args(["--config", str(path), "--batch-size", "8"])
    assert config.optim.lr == 3e-4  # YAML reads this as text
    assert config.optim.batch_size == 8
    assert config.image.aug_cfg == ("scale=(0.4, 1.0)",)


def test_captions_have_one_key_or_several(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train_data: x.tar\ncaption_key: json:alt\n")
    assert parse_args(["--config", str(path)]).data.caption_key == ("json:alt",)
    path.write_text("train_data: x.tar\ncaption_key: [txt, 'json:alt']\ncaption_probs: [0.25, 0.75]\n")
    config = parse_args(["--config", str(path)])
    assert (config.data.caption_key, config.data.caption_probs) == (("txt", "json:alt"), (0.25, 0.75))
    config = parse_args(["--train-data", "x.tar", "--caption-key", "txt", "json:a", "--caption-probs", "1", "3"])
    assert (config.data.caption_key, config.data.caption_probs) == (("txt", "json:a"), (1.0, 3.0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batchsize: 3", r"unknown key 'batchsize'; did you mean batch_size\?"),
        ("name: no", "name: expected text, got False; quote it"),
        ("lr: fast", "lr: expected a number, got 'fast'"),
        ("epochs: 1.5", "epochs: expected a whole number, got 1.5"),
        ("local_loss: 1", "local_loss: expected true or false, got 1"),
        ("- a", "expected a mapping"),
        ("a: [", "run.yaml"),
    ],
)
def test_a_mistake_in_the_file_names_file_key_and_cure(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", str(path)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batchsize", "3"], r"unknown flag --batchsize; did you mean --batch-size\?"),
        (["--precision", "fp8"], "'fp8' is not one of amp_bfloat16"),
        (["--batch-size", "0", "--train-data", "a.tar"], "--batch-size must be positive"),
        ([], "--train-data is missing"),
        (["--train-data", "a.tar", "--no-gather-with-grad"], "--no-gather-with-grad is refused"),
        (["--train-data", "a.tar", "--accum-freq", "2", "--ddp-static-graph"], "no_sync silently stops"),
        (["--train-data", "a.tar", "--resume", "latest"], "--resume latest needs --name"),
        (["--train-data", "a.tar", "--train-data-upsampling-factors", "1"], "needs --dataset-resampled"),
        (["--train-data", "a.tar", "--lr-scheduler", "const-cooldown"], "needs --epochs-cooldown"),
        (
            ["--train-data", "a.tar", "--caption-key", "txt", "json:a", "--caption-probs", "1"],
            "1 values for the 2",
        ),
        (["--train-data", "a.tar", "--caption-key", "txt", "txt"], "--caption-key names 'txt' twice"),
        (["--train-data", "a.tar", "--where", "similarity > 0.3 and f(x)"], r"--where .* character 22: 'f\(x\)'"),
        (["--train-data", "a.tar", "--warmup", "1", "--warmup-samples", "8"], "give one of them"),
        (["--train-data", "a.tar", "--max-rollbacks", "-1"], "--max-rollbacks must not be negative"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from training.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--grad-checkpointing" in done.stdout
