"""What ImageNet's classes are called. Names and templates come from installed packages; none are kept here."""

from __future__ import annotations

import re
from collections import Counter

from training.errors import ConfigError

_WNID = re.compile(r"n\d{8}")
_NUM_CLASSES = 1000


def wnids_of(names: list[str]) -> list[str] | None:
    """The WordNet ids that names of folders stand for: ids, or ImageNet-V2's numbers 0 to 999; None for other names."""
    if names and all(_WNID.fullmatch(name) for name in names):
        return names
    return _all_wnids() if names == [str(number) for number in range(_NUM_CLASSES)] else None


def readable_names(wnids: list[str]) -> list[str]:
    """A name for each id by timm: the first of its synonyms, all of them where classes share the first.

    Raises ConfigError for an id that is none of the 1000 classes.
    """
    from timm.data import ImageNetInfo

    _indices(wnids)
    info = ImageNetInfo("imagenet-1k")
    synonyms = {wnid: info.label_name_to_description(wnid) for wnid in info.label_names()}
    shared = Counter(text.split(",")[0] for text in synonyms.values())
    return [synonyms[w] if shared[synonyms[w].split(",")[0]] > 1 else synonyms[w].split(",")[0] for w in wnids]


def openclip_prompts(wnids: list[str]) -> tuple[list[str], list[str]]:
    """Class names and templates as OpenCLIP's package has them: those of the published figures.

    Raises ConfigError when the package is not there, or as `readable_names`.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            "--imagenet-prompts openclip takes them from OpenCLIP's package: pip install open_clip_torch"
        ) from error
    names = [open_clip.IMAGENET_CLASSNAMES[index] for index in _indices(wnids)]
    return names, [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def _indices(wnids: list[str]) -> list[int]:
    known = {wnid: index for index, wnid in enumerate(_all_wnids())}
    for wnid in wnids:
        if wnid not in known:
            raise ConfigError(f"{wnid} is none of the 1000 classes; give the names in classnames.txt")
    return [known[wnid] for wnid in wnids]


def _all_wnids() -> list[str]:
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())
