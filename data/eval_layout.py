"""Where an evaluation set keeps what: its text files, its numbered shards, its folders of pictures. Opens no picture.

CLIP_benchmark's layout is `classnames.txt`, `zeroshot_classification_templates.txt`, and for each split `nshards.txt`
beside `0.tar`, `1.tar`... An image folder has a folder for each class, below `test/` or not.

What cannot be reached or is not there is a DataError, for it may have gone while a run goes on; a content that makes no
sense is a DataConfigError.
"""

from __future__ import annotations

import os

from data.errors import DataConfigError, DataError, StorageError
from data.files import read_file
from data.samples import IMAGE_EXTENSIONS
from data.urls import expand_sources, is_local, is_pipe, local_path, mask_url

_SPLIT_FOLDERS = {"test": ("test", "val", "validation"), "train": ("train",)}
_HUB = "https://huggingface.co/datasets/"


def text_lines(root: str, name: str) -> list[str] | None:
    """The lines of a text file of the set without the spaces around them, or None when it is not there.

    Empty ones at the end are left out; others stay, as they count. Raises DataError when it cannot be had.
    """
    if is_pipe(root) or root.endswith(".tar"):
        return None
    url = join(root, name)
    try:
        # With a byte order mark or without: editors on Windows write one.
        text = read_file(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataConfigError(f"{mask_url(url)}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except StorageError as error:
        if error.kind == "missing":
            return None
        raise DataError(f"evaluation set: {error}") from error
    return [line.strip() for line in text.rstrip().splitlines()]


def shards_of(root: str, split: str) -> list[str]:
    """The numbered tars of `root`, else the tars of a local folder or of its `split` folder.

    Raises DataError where there are none, and at a URL without `nshards.txt`: nobody can list it.
    """
    if numbered := numbered_shards(root, split):
        return numbered
    if not is_local(root):
        raise DataError(
            f"evaluation set {mask_url(root)}: there is no {split}/nshards.txt, which says how many tars there are"
        )
    for folder in (root, join(root, split)) if split == "test" else (join(root, split),):
        if any(name.endswith(".tar") for name in _names_in(local_path(folder))):
            return list(expand_sources(folder)[0].urls)
    raise DataError(
        f"evaluation set {mask_url(root)}: found neither {split}/nshards.txt, nor .tar files, "
        "nor folders of images by class"
    )


def numbered_shards(root: str, split: str) -> list[str]:
    """The tars that `nshards.txt` says are there; none without that file.

    Raises DataConfigError for a file that holds no number, DataError where a local folder has fewer tars or more.
    """
    lines = text_lines(root, f"{split}/nshards.txt")
    if lines is None:
        return []
    content = " ".join(lines)
    if not is_number(content) or int(content) < 1:
        raise DataConfigError(f"{mask_url(root)}/{split}/nshards.txt: {content[:40]!r} is no number of shards")
    count = int(content)
    if is_local(root):
        _check_present(local_path(join(root, split)), count)
    return [join(root, f"{split}/{number}.tar") for number in range(count)]


def check_split(url: str, split: str) -> None:
    """Raises DataConfigError for a set that has only one split, which is the one to be tested on."""
    is_one = is_pipe(url) or not is_folder(url)
    if split != "test" and (is_one or (image_root(url, split) == url and class_folders(url))):
        raise DataConfigError(
            f"evaluation set {mask_url(url)} has no split {split!r}: {split}/nshards.txt with its tars, or a folder "
            f"{split}/ with a folder of images for each class"
        )


def is_folder(url: str) -> bool:
    """Whether a URL may be a set's folder: one without a pattern, a command, or the extension of a file."""
    plain = not is_pipe(url) and not any(mark in url for mark in "{*[?") and "::" not in url
    return plain and (os.path.isdir(local_path(url)) if is_local(url) else "." not in url.rpartition("/")[2])


def image_root(root: str, split: str) -> str:
    """The folder whose folders are classes: `root`, or that of a split below it."""
    for name in _SPLIT_FOLDERS.get(split, (split,)) if is_local(root) else ():
        folder = os.path.join(local_path(root), name)
        if os.path.isdir(folder) and not any(map(_is_picture, _names_in(folder))) and class_folders(folder):
            return folder
    return root


def class_folders(root: str) -> list[str]:
    """Names of a local folder's folders, sorted, numbers as numbers, if one of them holds a picture; else none."""
    path = local_path(root)
    if not is_local(root) or not os.path.isdir(path):
        return []
    # What programs leave behind (.git, .ipynb_checkpoints, __MACOSX) would be a class and shift all that follow.
    folders = sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] not in "._")
    if all(map(is_number, folders)):
        folders.sort(key=int)
    return folders if any(pictures_below(os.path.join(path, folder)) for folder in folders) else []


def pictures_below(folder: str) -> list[str]:
    """Paths of all pictures in a folder and its folders, in a fixed order."""
    found = []
    for parent, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [os.path.join(parent, name) for name in sorted(names) if _is_picture(name)]
    return found


def is_number(text: str) -> bool:
    """Whether a text is a whole number that is not negative."""
    return text.strip().isdecimal()


def join(root: str, name: str) -> str:
    """The URL of a file of the set."""
    if root.startswith(_HUB):  # the address of a page there, as CLIP_benchmark takes it, is not that of the files
        root = root.replace("/tree/", "/resolve/", 1)
    return f"{root.rstrip('/')}/{name}"


def _check_present(folder: str, count: int) -> None:
    names = set(_names_in(folder))
    missing = [number for number in range(count) if f"{number}.tar" not in names]
    surplus = sorted(int(stem) for name in names if name.endswith(".tar") and is_number(stem := name[:-4]))
    surplus = [number for number in surplus if number >= count]
    if missing or surplus:
        what = f"{len(missing)} of them missing, the first is" if missing else "but there is also"
        raise DataError(f"{folder}/nshards.txt: {count} shards, {what} {(missing or surplus)[0]}.tar")


def _names_in(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _is_picture(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
