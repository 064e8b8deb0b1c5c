"""Relative paths keep their meaning where the job runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from training.cli import parse_args
from training.config import TrainConfig
from training.errors import ConfigError
from training.submission.paths import absolute_settings, local_folders


def _config(*flags: str) -> TrainConfig:
    data = () if "--train-data" in flags else ("--train-data", "s3://bucket/{0..9}.tar")
    return parse_args([*data, *flags])


def _changed(cwd: Path, *flags: str) -> dict[str, tuple[str, ...]]:
    return dict(absolute_settings(_config("--logs", "/logs", *flags), cwd))


@pytest.mark.parametrize(
    ("flags", "setting", "values"),
    [
        (("--logs", "runs"), "logs", ("/here/runs",)),
        (("--train-data", "a/{0..9}.tar::s3://b/{0..9}.tar"), "train_data", ("/here/a/{0..9}.tar::s3://b/{0..9}.tar",)),
        (("--val-data", "../val.csv"), "val_data", ("/here/../val.csv",)),
        (("--pretrained", "epoch_1"), "pretrained", ("/here/epoch_1",)),
        (("--model", "my/model.json"), "model", ("/here/my/model.json",)),
        (("--zeroshot-data", "a=sets/a", "b=/b"), "zeroshot_data", ("a=/here/sets/a", "b=/b")),
        (("--imagenet-val", "val"), "imagenet_val", ("/here/val",)),
        (("--logs", "~/runs"), "logs", (str(Path.home() / "runs"),)),
    ],
)
def test_a_relative_path_counts_from_where_the_user_is(
    flags: tuple[str, ...], setting: str, values: tuple[str, ...]
) -> None:
    assert _changed(Path("/here"), *flags) == {setting: values}


def test_what_is_no_relative_path_stays() -> None:
    data = "pipe:aws s3 cp s3://b/{0..9}.tar -::https://x/{0..9}.tar"
    assert _changed(Path("/"), "--train-data", data, "--model", "ViT-B-32", "--pretrained", "s3://b/e.pt") == {}


def test_a_command_with_a_relative_path_runs_where_the_user_is(tmp_path: Path) -> None:
    (tmp_path / "my shards").mkdir()
    (tmp_path / "my shards" / "0.tar").write_text("content")
    here = tmp_path / "my shards"
    (here / "sub").mkdir()
    (here / "sub" / "0.tar").write_text("deep")
    for command, content in (("pipe:cat ./0.tar", "content"), ("pipe:cat sub/0.tar", "deep")):
        (changed,) = _changed(here, "--train-data", command)["train_data"]
        shown = subprocess.run(["bash", "-c", changed.removeprefix("pipe:")], cwd="/", capture_output=True, text=True)
        assert shown.stdout == content, changed


def test_a_mixture_on_the_command_line_is_rewritten_and_in_a_file_refused(tmp_path: Path) -> None:
    entry = "{name: a, shards: 'a/{0..9}.tar', proportion: 1}"
    (changed,) = _changed(tmp_path, "--train-data", f"[{entry}]")["train_data"]
    assert f"{tmp_path}/a/{{0..9}}.tar" in changed
    (tmp_path / "mixture.yaml").write_text(f"- {entry}\n")
    with pytest.raises(ConfigError, match=r"mixture.yaml: 'a/\{0..9\}.tar' is a relative path"):
        _changed(tmp_path, "--train-data", "mixture.yaml")
    with pytest.raises(ConfigError, match=r"--train-data .*absent.yaml: No such file"):
        _changed(tmp_path, "--train-data", "absent.yaml")


def test_a_container_sees_the_folders_that_the_settings_name(tmp_path: Path) -> None:
    for name in ("shards/a", "sets", "weights"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "weights" / "e.pt").touch()
    flags = ("--train-data", f"{tmp_path}/shards/{{a,b}}/0.tar::s3://b/0.tar", "--zeroshot-data", f"x={tmp_path}/sets")
    config = _config(*flags, "--pretrained", f"{tmp_path}/weights/e.pt", "--imagenet-val", "/not/there")
    assert set(local_folders(config)) == {f"{tmp_path}/shards", f"{tmp_path}/sets", f"{tmp_path}/weights"}
