"""Tiny encoders and tokenizers of Hugging Face's libraries, made here: folders as a download would leave them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models import ModelConfig

KINDS = ("roberta", "xlm-roberta", "bert", "mt5", "m2m_100")
WIDTH, VOCABULARY = 32, 320
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "roberta": _ENCODER,
    "xlm-roberta": _ENCODER,
    "bert": _ENCODER,
    "mt5": {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2},
    "m2m_100": {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
}
CAPTIONS = ["a red square on a blue table", "two dogs, one cat", "it's a photo of the sea", "the sky over a town"] * 8


def save_encoder(folder: Path, kind: str, weights: bool = False, **settings: Any) -> Path:
    """A folder with `config.json`, and random weights if wanted."""
    transformers = pytest.importorskip("transformers", reason="the extra hf")
    config = transformers.AutoConfig.for_model(kind, **_SETTINGS[kind] | settings)
    config.architectures = None
    config.save_pretrained(folder)
    if weights:
        torch.manual_seed(3)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def save_wordpieces(folder: Path) -> Path:
    """A tokenizer of BERT's manner: lower case, [CLS] and [SEP], pad 0."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra hf")
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(
        _letters(), trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    return _save(folder, backend, **names)


def save_unigram(folder: Path, pad_first: bool = True, **names: str) -> Path:
    """A tokenizer of SentencePiece's manner, as SigLIP's and T5's: spaces are characters, one end token."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra hf")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "</s>", "<unk>", "<s>"] if pad_first else ["<s>", "<pad>", "</s>", "<unk>"]
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(_letters(), trainer)
    end = ("</s>", special.index("</s>"))
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    return _save(folder, backend, pad="<pad>", eos="</s>", unk="<unk>", bos="<s>", **names)


def hf_model(folder: Path, tokenizer: Path | None = None, **text: Any) -> ModelConfig:
    """A tiny CLIP whose text tower is the encoder in `folder`, from random weights."""
    return ModelConfig.from_dict(
        {
            "embed_dim": 24,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
            "text_cfg": {
                "context_length": 16,
                "hf_model_name": str(folder),
                "hf_tokenizer_name": str(tokenizer or folder),
                "hf_model_pretrained": False,
                **text,
            },
        }
    )


def _letters() -> Iterator[Sequence[str]]:
    yield CAPTIONS
    yield [chr(code) for code in range(0x21, 0x7F)] + ["é", "日", "本", "ß"]


def _save(folder: Path, backend: Any, **names: str) -> Path:
    transformers = pytest.importorskip("transformers", reason="the extra hf")
    tokens = {f"{name}_token": token for name, token in names.items()}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens).save_pretrained(folder)
    return folder
