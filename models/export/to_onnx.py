"""ONNX: one graph for each tower, with any batch size. Reads with onnxruntime."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.clip import CLIP
from models.config import ModelConfig
from models.errors import ConfigError
from models.export.target import Encoders
from models.export.to_openclip import schema

OPSET = 18
IMAGE, TEXT, CONFIG = "image_encoder.onnx", "text_encoder.onnx", "open_clip_config.json"


@dataclass(frozen=True)
class Onnx:
    """Holds every model. Other kernels add up in other orders, so that features agree less far than elsewhere."""

    name: str = "onnx"
    tolerance: float = 1e-4

    def refusal(self, config: ModelConfig) -> str | None:
        return None

    def write(self, model: CLIP, folder: Path) -> None:
        _library()
        height, width = model.visual.image_size
        length = model.config.text_cfg.context_length
        _write(_Image(model), torch.zeros(2, 3, height, width), "pixels", folder / IMAGE)
        tokens = torch.full((2, length), model.config.text_cfg.vocab_size - 1)
        _write(_Text(model), tokens, "tokens", folder / TEXT)
        (folder / CONFIG).write_text(json.dumps(schema(model.config), indent=2) + "\n")

    def read(self, folder: Path, model: CLIP) -> Encoders:
        onnxruntime = _library()

        def encoder(name: str) -> Any:
            session = onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])
            (given,) = session.get_inputs()
            return lambda values: torch.from_numpy(session.run(None, {given.name: values.numpy()})[0])

        return Encoders(image=encoder(IMAGE), text=encoder(TEXT))


class _Image(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels, normalize=True)


class _Text(nn.Module):
    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)


def _write(encoder: nn.Module, example: Tensor, name: str, path: Path) -> None:
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        # The exporter's dependencies deprecate parts of each other; what matters is compared afterwards.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            encoder.eval(),
            (example,),
            str(path),
            input_names=[name],
            output_names=["features"],
            dynamic_shapes=({0: batch},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )


def _library() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--to onnx needs {error.name}: pip install 'clipyard[onnx]'") from None
    return onnxruntime


TARGET = Onnx()
