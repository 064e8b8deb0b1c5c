from __future__ import annotations

from pathlib import Path

import pytest

from data import urls
from data.errors import DataConfigError
from data.urls import dataset_type_of, expand_sources, mask_url


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def test_braces_expand_inside_a_pipe() -> None:
    (source,) = expand_sources("pipe:aws s3 cp s3://mybucket/path/laion{00000..00003}.tar -")
    assert source.urls == tuple(f"pipe:aws s3 cp s3://mybucket/path/laion0000{i}.tar -" for i in range(4))
    assert source.name == "laion"
    assert source.factor == 1.0


def test_shell_variables_in_a_pipe_stay() -> None:
    (source,) = expand_sources("pipe:cat ${FOLDER}/{0..1}.tar")
    assert source.urls == ("pipe:cat ${FOLDER}/0.tar", "pipe:cat ${FOLDER}/1.tar")


def test_double_colons_separate_sources_each_with_its_factor() -> None:
    first, second = expand_sources("s3://b/laion/{0..2}.tar::s3://b/cc12m/{00..11}.tar", "1::2.5")
    assert (first.name, len(first.urls), first.factor) == ("laion", 3, 1.0)
    assert (second.name, len(second.urls), second.factor) == ("cc12m", 12, 2.5)


def test_sources_of_one_name_are_told_apart() -> None:
    names = [source.name for source in expand_sources("s3://a/x{0..1}.tar::s3://b/x{0..1}.tar::s3://c/x{0..1}.tar")]
    assert names == ["x", "x-2", "x-3"]


@pytest.mark.parametrize(
    ("factors", "message"), [("1", "1 factors for 2 sources"), ("1::x", "'x'"), ("1::-1", "'-1'"), ("1::nan", "'nan'")]
)
def test_wrong_factors_are_refused(factors: str, message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        expand_sources("s3://a/x.tar::s3://b/y.tar", factors)


def test_local_files_directories_and_patterns_become_sorted_paths(tmp_path: Path) -> None:
    touch(tmp_path / "d", "b.tar", "a.tar", "notes.txt")
    expected = (str(tmp_path / "d/a.tar"), str(tmp_path / "d/b.tar"))
    for pattern in (
        f"{tmp_path}/d",
        f"{tmp_path}/d/*.tar",
        f"{tmp_path}/d/{{a,b}}.tar",
        f"file://{tmp_path}/d/{{a,b}}.tar",
    ):
        assert expand_sources(pattern)[0].urls == expected


def test_missing_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "d", "0.tar")
    with pytest.raises(DataConfigError, match=r"expands to 4 shards.*3 of 4 files missing.*d/1\.tar"):
        expand_sources(f"{tmp_path}/d/{{0..3}}.tar")
    with pytest.raises(DataConfigError, match=r"1 of 1 files missing.*nothere\.tar"):
        expand_sources(f"{tmp_path}/nothere.tar")


def test_of_a_very_long_list_some_files_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_CHECK_ALL_BELOW", 100)
    monkeypatch.setattr(urls, "_NUM_PROBES", 10)
    with pytest.raises(DataConfigError, match=r"10 of 10 files looked at missing.*/000\.tar"):
        expand_sources(f"{tmp_path}/{{000..499}}.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("{tmp}/none*.tar", "matches no file"), ("{tmp}", r"holds no \*\.tar"), ("", "empty source")],
)
def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataConfigError, match=message):
        expand_sources(pattern.replace("{tmp}", str(tmp_path)))


@pytest.mark.parametrize("pattern", ["s3://b/{0..3.tar", "s3://b/*.tar", "s3://b/a.tar::"])
def test_what_cannot_be_expanded_is_refused(pattern: str) -> None:
    with pytest.raises(DataConfigError):
        expand_sources(pattern)


@pytest.mark.parametrize(
    ("train_data", "kind"),
    [
        ("pipe:aws s3 cp s3://b/{0..3}.tar -", "webdataset"),
        ("s3://b/{0..3}.tar::pipe:cat x.tar", "webdataset"),
        ("https://host/a.tar?signature=x", "webdataset"),
        ("/data/*.tar", "webdataset"),
        ("/data/pairs.csv", "csv"),
        ("s3://b/pairs.TSV", "csv"),
        ("/data/pairs.parquet::s3://b/{0..3}.PARQUET", "csv"),
    ],
)
def test_the_type_follows_from_the_name(train_data: str, kind: str) -> None:
    assert dataset_type_of(train_data) == kind


def test_a_directory_is_a_set_of_shards(tmp_path: Path) -> None:
    assert dataset_type_of(str(tmp_path)) == "webdataset"


@pytest.mark.parametrize("train_data", ["/data/pairs.feather", "s3://b/prefix/", "/a.tar::/b.csv"])
def test_a_type_that_cannot_be_told_is_asked_for(train_data: str) -> None:
    with pytest.raises(DataConfigError, match=r"--dataset-type|one kind"):
        dataset_type_of(train_data)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:SECRET@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=SECRET&Expires=SECRET",
        "pipe:curl -H 'Authorization: Bearer SECRET' https://host/a.tar",
        "pipe:AWS_SECRET_ACCESS_KEY=SECRET aws s3 cp s3://b/a.tar -",
        "pipe:fetch --token SECRET s3://b/a.tar",
    ],
)
def test_secrets_do_not_reach_a_log(url: str) -> None:
    assert "SECRET" not in mask_url(url).replace("AWS_SECRET_ACCESS_KEY", "")
    assert "a.tar" in mask_url(url)


def test_a_url_without_secrets_is_logged_as_it_is() -> None:
    for url in ("s3://b/path/{0..3}.tar", "pipe:aws s3 cp s3://b/a.tar -", "/data/a.tar"):
        assert mask_url(url) == url
