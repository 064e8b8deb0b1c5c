"""The model card of an export: README.md, beside one folder for each target.

Reads a checkpoint's and its run's files; loads no weights. The parts are those of the cards of published models.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from models import ModelConfig, pair
from training.checkpoint_content import CONFIG_FILE, STATE_FILE
from training.cli import settings as known_settings
from training.config import from_flat
from training.metrics import FILE_NAME, read_records
from training.plots import plot_runs
from training.secrets import mask_text
from training.start import CHECKPOINTS

CARD_FILE, CURVES_FILE = "README.md", "curves.png"

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


def write_card(
    out: Path, config: ModelConfig, num_parameters: int, targets: Sequence[str], checkpoint: Path | None
) -> Path:
    """Writes `out/README.md`, and the curves beside it where the checkpoint's run has metrics.

    checkpoint: the checkpoint folder that the weights are from, if they are from one; what came after it is left out.
    """
    run = None if checkpoint is None else read_training(checkpoint)
    if run is not None and run.folder is not None and run.records:
        plot_runs([run.folder], out / CURVES_FILE)
    card = _CARD.substitute(
        name=config.name or "CLIP",
        details=_details(config, num_parameters),
        training="The weights came without the settings of their run." if run is None else _training(run),
        evaluation=_evaluation(run.records if run else []),
        code="\n\n".join(f"**{_CODE[target][0]}**\n\n```python\n{_CODE[target][1]}```" for target in targets),
    )
    path = out / CARD_FILE
    path.write_text(card, encoding="utf-8")
    return path


@dataclass(frozen=True)
class Training:
    """What a checkpoint folder tells of its training: flat settings, state, and the run's records up to it."""

    settings: dict[str, Any]
    state: dict[str, Any]
    folder: Path | None
    records: list[dict[str, Any]]


def read_training(checkpoint: Path) -> Training | None:
    """None for a folder that keeps no settings, as a soup's."""
    if not (checkpoint / CONFIG_FILE).is_file() or not (checkpoint / STATE_FILE).is_file():
        return None
    settings = yaml.safe_load((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    folder = checkpoint.resolve().parent.parent
    if checkpoint.resolve().parent.name != CHECKPOINTS or not (folder / FILE_NAME).is_file():
        return Training(settings, state, None, [])
    records = [record for record in read_records(folder) if record["step"] <= state["progress"]["step"]]
    return Training(settings, state, folder, records)


def command_of(values: Mapping[str, Any]) -> str:
    """The command line that gives these settings, without those that are the default, and without credentials."""
    lines = ["python -m training.main"]
    for name, setting in known_settings().items():
        value = values.get(name, setting.default)
        if value in (setting.default, None) or (isinstance(value, list) and tuple(value) == setting.default):
            continue
        if isinstance(value, bool):
            lines.append(setting.flag if value else f"--no-{setting.flag.removeprefix('--')}")
        else:
            words = value if isinstance(value, list | tuple) else [value]
            lines.append(" ".join([setting.flag, *(shlex.quote(str(word)) for word in words)]))
    return mask_text(" \\\n    ".join(lines))


def _details(config: ModelConfig, num_parameters: int) -> str:
    height, width = pair(config.preprocess.size)
    vision, text = config.vision_cfg, config.text_cfg
    native = f"{vision.layers} layers, width {vision.width}, patch {vision.patch_size}"
    rows = {
        "parameters": f"{num_parameters / 1e6:.1f} million",
        "image": f"{height} × {width} pixels, {config.preprocess.interpolation}, {config.preprocess.resize_mode}",
        "image tower": vision.timm_model_name or native,
        "text": f"{text.context_length} tokens of {text.vocab_size}",
        "text tower": text.hf_model_name or f"{text.layers} layers, width {text.width}, {text.heads} heads",
        "activation": "QuickGELU" if config.quick_gelu else "GELU",
        "features": str(config.embed_dim),
    }
    return _table(("property", "value"), rows)


def _training(run: Training) -> str:
    optim = from_flat(run.settings).optim
    world_size = run.state["world_size"]
    rows = {
        "data": str(run.settings.get("train_data") or "generated"),
        "samples seen": f"{run.state['progress']['samples_seen']:,}",
        "steps": f"{run.state['progress']['step']:,}",
        "global batch": f"{optim.batch_size * optim.accum_freq * world_size:,} on {world_size} GPUs",
        "peak learning rate": f"{optim.lr:g}, {optim.lr_scheduler}",
        "weight decay": f"{optim.wd:g}",
        "precision": str(run.settings.get("precision")),
    }
    masked = {key: mask_text(value) for key, value in rows.items()}
    return f"{_table(('setting', 'value'), masked)}\n\n```bash\n{command_of(run.settings)}\n```"


def _evaluation(records: Sequence[dict[str, Any]]) -> str:
    newest = {key: value for record in records for key, value in record.items() if key.startswith("val/")}
    rows = {key.removeprefix("val/"): f"{value:.4f}" for key, value in newest.items() if isinstance(value, int | float)}
    table = _table(("metric", "value"), rows) if rows else "Not evaluated during training."
    return f"{table}\n\n![Curves of the run]({CURVES_FILE})" if records else table


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines)
