"""Flags as words: grouped, merged into a template's, written down without credentials."""

from __future__ import annotations

import subprocess

import pytest

from training.errors import ConfigError
from training.submission.flags import Flag, expand, group, is_secret, merge, put, words_of, written


def test_words_are_grouped_by_setting_and_the_last_one_wins_in_the_first_place() -> None:
    words = ["--lr=1", "--aug-cfg", "a=1", "b=2", "--grad-clip-norm", "5", "--no-fsdp", "--lr", "2"]
    assert group(words) == [
        Flag("lr", ("--lr", "2")),
        Flag("aug_cfg", ("--aug-cfg", "a=1", "b=2")),
        Flag("clip_grad_norm", ("--grad-clip-norm", "5")),
        Flag("fsdp", ("--no-fsdp",)),
    ]
    assert [flag.values for flag in group(words)] == [("2",), ("a=1", "b=2"), ("5",), ()]
    assert Flag("lr", ("--lr=1",)).values == ("1",)


def test_a_users_flag_takes_the_templates_place_or_comes_behind() -> None:
    lines = ['--train-data="${TRAIN_DATA:?must}"', "--lr 1 --wd 2", "--ddp-static-graph"]
    given = group(["--wd", "3", "--train-data", "a {b}", "--no-ddp-static-graph"])
    assert merge(lines, given) == ["--train-data 'a {b}'", "--lr 1 --wd 2", "--no-ddp-static-graph", "--wd 3"]
    assert merge(lines, [], without={"train_data", "lr"}) == ["--lr 1 --wd 2", "--ddp-static-graph"]


def test_bash_expands_what_a_template_says_with_the_users_variables() -> None:
    lines = ['--name "$NAME"', '--pretrained "${OTHER:-a b}"', "--aug-cfg scale='(0.5, 1.0)'", "${NO:+--no-fsdp}"]
    assert expand(['NAME="${NAME:-x}"'], lines, {"NAME": "run"}) == (
        ["--name", "run", "--pretrained", "a b", "--aug-cfg", "scale=(0.5, 1.0)"]
    )
    assert expand(['NAME="${NAME:-x}"'], lines, {})[1] == "x"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^TRAIN_DATA: must name the shards \(export it, or give its flag behind --\)"
    ):
        expand([], ['--train-data "${TRAIN_DATA:?must name the shards}"'], {})


def test_a_value_is_put_in_the_place_of_the_old_one() -> None:
    flags = group(["--lr=1", "--seed", "2"])
    assert words_of(put(put(flags, "lr", "3"), "logs", "/l")) == ["--lr", "3", "--seed", "2", "--logs", "/l"]


@pytest.mark.parametrize(
    "words",
    [
        ("--train-data=https://user:geheim@host/x.tar::$HOME 'quoted'",),
        ("--train-data", "https://host/x.tar?X-Amz-Signature=geheim"),
        ("--zeroshot-data", "a=/plain", "b=https://user:geheim@host/b", "c=https://me:geheim@host/c"),
    ],
)
def test_a_credential_reaches_the_job_by_its_environment_only(words: tuple[str, ...]) -> None:
    text, variables = written(group(words)[0])
    assert "geheim" not in text
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {text}"], env=variables, capture_output=True, text=True)
    assert tuple(shown.stdout.split("\0")[:-1]) == words
    missing = subprocess.run(["bash", "-c", f"echo {text}"], env={}, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "export it" in missing.stderr


def test_plain_values_are_written_as_they_are() -> None:
    assert written(Flag("aug_cfg", ("--aug-cfg", "use_timm=True", "scale=(0.5, 1.0)"))) == (
        "--aug-cfg use_timm=True 'scale=(0.5, 1.0)'",
        {},
    )
    assert written(Flag("train_data", ("--train-data=a {b}",)))[0] == "--train-data='a {b}'"
    assert not is_secret("pipe:aws s3 cp s3://bucket/{00..99}.tar -")
