"""OpenCLIP's form: open_clip_config.json and weights under the names that they have here. Reads with open_clip."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from models.clip import CLIP
from models.config import ModelConfig
from models.errors import ConfigError
from models.export.target import Encoders

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"


@dataclass(frozen=True)
class OpenClip:
    """Holds every model of this package, whose schema is OpenCLIP's."""

    name: str = "openclip"
    tolerance: float = 1e-5

    def refusal(self, config: ModelConfig) -> str | None:
        return None

    def write(self, model: CLIP, folder: Path) -> None:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(schema(model.config), indent=2) + "\n")

    def read(self, folder: Path, model: CLIP) -> Encoders:
        try:
            import open_clip
        except ImportError:
            raise ConfigError("--to openclip: reading it back needs open_clip: pip install open_clip_torch") from None
        theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        theirs.eval()

        def caption(text: str) -> Tensor:
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
            return theirs.encode_text(tokenizer([text]), normalize=True)

        return Encoders(
            image=lambda pixels: theirs.encode_image(pixels, normalize=True),
            text=lambda tokens: theirs.encode_text(tokens, normalize=True),
            prepare=lambda picture: preprocess(picture)[None],
            # A tokenizer of the hub would be asked for over the network.
            caption=None if model.config.text_cfg.hf_tokenizer_name else caption,
        )


def schema(config: ModelConfig) -> dict[str, Any]:
    """The content of `open_clip_config.json`."""
    settings = config.to_dict()
    preprocess, _ = settings.pop("preprocess_cfg"), settings.pop("name")
    if config.multimodal_cfg is not None:
        # What a decoder needs of the towers, their classes have to be told.
        for section in ("vision_cfg", "text_cfg"):
            settings[section]["output_tokens"] = True
    return {"model_cfg": settings, "preprocess_cfg": preprocess}


TARGET = OpenClip()
