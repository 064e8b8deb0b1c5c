"""The model card of an export: README.md, beside one folder per target. Reads a run's files; loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from models import ModelConfig, pair
from training.metrics import FILE_NAME, read_metrics
from training.plots import plot_runs
from training.secrets import mask_secrets

CARD_FILE, CURVES_FILE, CONFIG_FILE = "README.md", "curves.png", "config.yaml"

_OPENCLIP = """\
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:openclip")
tokenizer = open_clip.get_tokenizer("local-dir:openclip")
model.eval()
image = preprocess(Image.new("RGB", (640, 480), "orange")).unsqueeze(0)  # your picture here
with torch.inference_mode():
    image_features = model.encode_image(image, normalize=True)
    text_features = model.encode_text(tokenizer(["an orange square", "a cat"]), normalize=True)
print((model.logit_scale.exp() * image_features @ text_features.T).softmax(dim=-1))
"""
_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("./transformers").eval()
processor = AutoProcessor.from_pretrained("./transformers")
image = Image.new("RGB", (640, 480), "orange")  # your picture here
inputs = processor(text=["an orange square", "a cat"], images=image, return_tensors="pt", padding=True)
with torch.inference_mode():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
"""
_TIMM = """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:timm", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = transform(Image.new("RGB", (640, 480), "orange")).unsqueeze(0)  # your picture here
with torch.inference_mode():
    print(torch.nn.functional.normalize(model(image), dim=-1).shape)
"""
_ONNX = """\
import numpy
import onnxruntime

session = onnxruntime.InferenceSession("onnx/image_encoder.onnx", providers=["CPUExecutionProvider"])
(pixels,) = session.get_inputs()  # normalised as onnx/open_clip_config.json says
image = numpy.zeros((1, *pixels.shape[1:]), dtype=numpy.float32)  # your picture here
print(session.run(None, {pixels.name: image})[0].shape)
"""
_CODE = {
    "openclip": ("OpenCLIP", _OPENCLIP),
    "transformers": ("transformers", _TRANSFORMERS),
    "timm": ("timm", _TIMM),
    "onnx": ("onnxruntime", _ONNX),
}

_CARD = Template("""\
# $name

## Model details

$details

## Uses

Zero-shot classification, retrieval between images and texts, and as a start for fine-tuning. Evaluate it on your own
task before anything depends on it; its training data decides what it knows and what it gets wrong.

## Training details

$training

## Evaluation

$evaluation

## Licence

To be filled in by whoever publishes these weights.

## Acknowledgements

Trained with Clipyard, in the model family of OpenCLIP.

## Citation

```bibtex
@inproceedings{radford2021clip,
  title = {Learning Transferable Visual Models From Natural Language Supervision},
  author = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and others},
  booktitle = {ICML},
  year = {2021}
}
```

## How to get started

In this folder:

$code
""")


def write_card(out: Path, config: ModelConfig, num_parameters: int, targets: Sequence[str], run: Path | None) -> Path:
    """Writes `out/README.md`, and the curves beside it where `run`, the run's folder, has metrics."""
    records = list(read_metrics(run / FILE_NAME)) if run and (run / FILE_NAME).is_file() else []
    if run and records:
        plot_runs([run], out / CURVES_FILE)
    card = _CARD.substitute(
        name=config.name or "CLIP",
        details=_details(config, num_parameters),
        training=_training(run, records),
        evaluation=_evaluation(records),
        code="\n\n".join(f"**{_CODE[target][0]}**\n\n```python\n{_CODE[target][1]}```" for target in targets),
    )
    path = out / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return path


def _details(config: ModelConfig, num_parameters: int) -> str:
    height, width = pair(config.preprocess.size)
    rows = {
        "parameters": f"{num_parameters / 1e6:.1f} million",
        "image": f"{height} × {width} pixels, {config.preprocess.interpolation}, {config.preprocess.resize_mode}",
        "image tower": config.vision_cfg.timm_model_name or f"width {config.vision_cfg.width}",
        "text": f"{config.text_cfg.context_length} tokens, width {config.text_cfg.width}",
        "features": str(config.embed_dim),
    }
    return _table(("property", "value"), rows)


def _training(run: Path | None, records: Sequence[dict[str, Any]]) -> str:
    if run is None or not (run / CONFIG_FILE).is_file():
        return "The weights came without the settings of their run."
    settings = mask_secrets(yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8")))
    seen = f"Samples seen: {max(record['samples_seen'] for record in records)}.\n\n" if records else ""
    command = "```\npython -m training.main --config config.yaml\n```"
    listing = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"{seen}{command}\n\nwith data and hyper-parameters in `config.yaml`:\n\n```yaml\n{listing}```"


def _evaluation(records: Sequence[dict[str, Any]]) -> str:
    newest = {key: value for record in records for key, value in record.items() if key.startswith("val/")}
    if not newest:
        return "Not evaluated during training."
    rows = {key.removeprefix("val/"): f"{value:.4f}" for key, value in newest.items()}
    return f"{_table(('metric', 'value'), rows)}\n\n![Curves of the run]({CURVES_FILE})"


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)
