"""Tokenizers of Hugging Face's libraries give OpenCLIP's ids, and are checked against the tower."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from models import ConfigError, HFTokenizer, ModelConfig, get_tokenizer, hf_tokenizer, load_model_config
from models.hf_tokenizer import CLEANERS, hf_options
from tests.helpers.hf import hf_model, save_encoder, save_unigram, save_wordpieces
from tests.models.test_tokenizer import HARD

CLEANED: list[dict[str, Any]] = [{}, {"clean": "canonicalize"}, {"clean": "lower"}, {"clean": "whitespace"}]
CASES = [(kind, kwargs) for kind in ("wordpieces", "unigram") for kwargs in CLEANED]


@pytest.fixture(scope="module")
def wordpieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wordpieces(tmp_path_factory.mktemp("wordpieces"))


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unigram(tmp_path_factory.mktemp("unigram"))


def _native(folder: Path, **text: Any) -> ModelConfig:
    """The tiny model with the tokenizer in `folder`, pooled where its texts end."""
    raw = load_model_config("tiny-test").to_dict()
    hf = {"hf_tokenizer_name": str(folder), "pool_type": "last", "no_causal_mask": True}
    return ModelConfig.from_dict({**raw, "text_cfg": {**raw["text_cfg"], **hf, **text}})


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "kwargs"), [*CASES, ("wordpieces", {"strip_sep_token": True})], ids=str)
def test_hard_text_gets_openclips_ids(kind: str, kwargs: dict[str, Any], request: pytest.FixtureRequest) -> None:
    theirs = pytest.importorskip("open_clip.tokenizer", reason="compares with open_clip_torch")
    folder = request.getfixturevalue(kind)
    for length in (4, 16, 64):
        ours = HFTokenizer(str(folder), length, hf_options(kwargs, None))
        assert torch.equal(ours(HARD), theirs.HFTokenizer(str(folder), length, **kwargs)(HARD))


@pytest.mark.parity
def test_rows_of_the_mode_clips_equal_openclips(tmp_path: Path) -> None:
    theirs = pytest.importorskip("open_clip.tokenizer", reason="compares with open_clip_torch")
    folder = save_unigram(tmp_path, cls="<s>")
    ours = HFTokenizer(str(folder), 16, hf_options(None, "clips"))
    assert torch.equal(ours(HARD), theirs.HFTokenizer(str(folder), 16, tokenizer_mode="clips")(HARD))


@pytest.mark.parity
@pytest.mark.parametrize("kind", CLEANERS)
def test_text_is_cleaned_as_openclip_does(kind: str) -> None:
    theirs = pytest.importorskip("open_clip.tokenizer", reason="compares with open_clip_torch")
    clean = theirs.get_clean_fn(kind)
    assert [CLEANERS[kind](text) for text in HARD] == [clean(text) for text in HARD]


def test_rows_are_cut_before_their_end_and_padded_to_one_length(wordpieces: Path) -> None:
    tokenizer = HFTokenizer(str(wordpieces), 8)
    tokens = tokenizer(["a cat", "two dogs, one cat and a photo of the sea over a town"])
    assert (tokens.dtype, tokens.shape) == (torch.int64, (2, 8))
    assert tokens[0, 0] == tokens[1, 0] == 2
    assert tokens[0, -1] == tokenizer.pad_id == 0
    assert tokens[1, -1] == 3
    assert tokenizer("a cat", context_length=5).shape == (1, 5)


def test_whole_texts_can_be_counted_without_being_cut(wordpieces: Path) -> None:
    assert len(HFTokenizer(str(wordpieces), 8).encode("a cat " * 50)) == 100


def test_it_is_pickled_small_and_gives_the_same_ids(unigram: Path) -> None:
    tokenizer = HFTokenizer(str(unigram), 16, hf_options({"clean": "canonicalize"}, None))
    expected = tokenizer(["A cat, on a mat!"])
    packed = pickle.dumps(tokenizer)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)(["A cat, on a mat!"]), expected)


def test_it_uses_no_threads_of_its_own_that_a_fork_would_lose(unigram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    hf_tokenizer._read.cache_clear()
    HFTokenizer(str(unigram), 16)(["a cat", "a dog"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_fingerprint_tells_vocabularies_and_rules_apart(unigram: Path, wordpieces: Path, tmp_path: Path) -> None:
    tokenizers = [
        HFTokenizer(str(unigram), 16),
        HFTokenizer(str(unigram), 16, hf_options({"clean": "canonicalize"}, None)),
        HFTokenizer(str(wordpieces), 16),
        HFTokenizer(str(wordpieces), 16, hf_options({"strip_sep_token": True}, None)),
    ]
    prints = [tokenizer.fingerprint for tokenizer in tokenizers]
    assert len(set(prints)) == 4
    elsewhere = HFTokenizer(shutil.copytree(unigram, str(tmp_path / "copy")), 77)
    elsewhere(["a cat"])
    assert elsewhere.fingerprint == prints[0], "neither the place, nor the length, nor use change what it is"


def test_a_model_names_its_tokenizer(unigram: Path) -> None:
    tokenizer = get_tokenizer(_native(unigram, tokenizer_kwargs={"clean": "canonicalize"}))
    assert isinstance(tokenizer, HFTokenizer)
    assert torch.equal(tokenizer("A cat!"), tokenizer("a cat"))


def test_one_that_is_not_on_this_machine_says_what_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"hf_tokenizer_name: timm/x is not on this machine.*`hf download timm/x`"):
        get_tokenizer(_native(Path("timm/x")))


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no tokenizer can be read from {tmp_path}"):
        get_tokenizer(_native(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 100 is smaller than the tokenizer's"),
        ({"pool_type": "eos", "eos_id": 2}, "eos_id 2: the tokenizer .* ends texts with 1"),
        ({"pool_type": "argmax"}, "argmax pools the largest id, which is not the end of a text"),
        ({"tokenizer_kwargs": {"clean": "scrub"}}, "clean: 'scrub' is none of whitespace, lower, canonicalize"),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "has no sep_token"),
        ({"tokenizer_kwargs": {"language": "eng_Latn"}}, "knows no languages"),
        ({"tokenizer_mode": "paragraphs"}, "tokenizer_mode: 'paragraphs' is not supported"),
        ({"tokenizer_mode": "clips"}, "has no cls_token"),
    ],
)
def test_what_does_not_fit_the_tower_is_refused(unigram: Path, text: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_tokenizer(_native(unigram, **text))


def test_padding_that_an_encoder_would_read_as_text_is_refused(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "roberta", "roberta")
    get_tokenizer(hf_model(encoder, save_unigram(tmp_path / "fits", pad_first=False)))
    with pytest.raises(ConfigError, match="pads with 0, but the text tower masks 1"):
        get_tokenizer(hf_model(encoder, save_unigram(tmp_path / "other")))


def test_more_ids_than_an_encoder_has_rows_are_refused(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "mt5", "mt5", vocab_size=50)
    with pytest.raises(ConfigError, match="vocab_size 50 is smaller than the tokenizer's"):
        get_tokenizer(hf_model(encoder, save_unigram(tmp_path / "unigram")))
