"""Files of Hugging Face's hub that are on this machine: a folder, or the hub's cache. Downloads nothing.

What is used is found here first and then opened as a folder, so that no library asks the hub for anything: a node
without a network, or a thousand ranks at once, are no different. Knows no tower and no tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from models.errors import ConfigError


def transformers() -> ModuleType:
    """The library, imported on first use. Raises ConfigError where it is not installed."""
    try:
        import transformers as library
    except ImportError:
        raise ConfigError("this model needs the library transformers: pip install 'clipyard[hf]'") from None
    return library


def local_folder(name: str, setting: str) -> Path:
    """Where the files of `name` are: a folder itself, or a repository of the hub with a copy in its cache.

    setting: whose value `name` is. Raises ConfigError that says what to download, and where else it may be.
    """
    transformers()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except HFValidationError:
        raise ConfigError(f"{setting}: {name!r} is neither a folder nor a name on Hugging Face's hub") from None
    except LocalEntryNotFoundError:
        raise ConfigError(
            f"{setting}: {name} is not on this machine, and nothing is downloaded during a run. Where there is a "
            f"network: `hf download {name}`, with HF_HOME on a disk that the run sees; or name a folder with its files"
        ) from None
