"""One side of `scripts.benchmark_loader`: a process that loads so many samples when told to, and says what it cost.

`python -m scripts.benchmark_sides SIDE --shards BRACES ...` reads numbers of samples from stdin, one a line, and
answers each with a line of JSON. The side that runs OpenCLIP calls its functions and imports nothing of ours,
because its interpreter may hold other versions of everything.

Cost is CPU time of this process and its workers, from the moment when all of them sleep to the next such
moment: what is prefetched at the beginning has then been prefetched anew, and waiting costs nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_POLL_S = 0.05
_QUIET_POLLS = 8  # polls in a row without CPU time: all sleep
_ENOUGH = 1 << 40  # samples in an epoch that never ends

Batches = Iterator[tuple[int, dict[str, float]]]  # samples of a batch, and seconds of some of their stages


def main() -> None:
    """Answers until stdin ends."""
    args = _arguments()
    batches = SIDES[args.side](args)
    taken = _take(batches, 1)  # starts the workers: their imports are not what is measured
    _say({"versions": _versions(), "batch": taken["samples"]})
    for line in sys.stdin:
        workers = multiprocessing.active_children()
        _settle(workers)
        before, before_here = _cpu_of_all(workers), time.process_time()
        answer = _take(batches, int(line))
        here = time.process_time() - before_here  # without the waiting that follows
        _settle(workers)
        _say(answer | {"cpu_s": here + _cpu_of_all(workers) - before})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark_sides", description=__doc__)
    add = parser.add_argument
    add("side", choices=tuple(SIDES))
    add("--shards", required=True, help="braces")
    add("--size", type=int, default=224)
    add("--batch-size", type=int, default=64)
    add("--workers", type=int, default=1)
    add("--image-decode", default="exact")
    return parser.parse_args()


def _take(batches: Batches, samples: int) -> dict[str, float]:
    """Takes batches until there are `samples`; their number, and the seconds of each stage added up."""
    totals: dict[str, float] = {"samples": 0}
    while totals["samples"] < samples:
        count, stages = next(batches)
        totals["samples"] += count
        for name, seconds in stages.items():
            totals[name] = totals.get(name, 0.0) + seconds
    return totals


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def _cpu_of_all(processes: list[BaseProcess]) -> float:
    return sum(_cpu_of(process.pid) for process in processes)


def _cpu_of(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S  # utime and stime of all its threads, see proc(5)


def _settle(workers: list[BaseProcess]) -> None:
    """Waits until the workers have prefetched what they may, and sleep."""
    quiet, last = 0, -1.0
    while workers and quiet < _QUIET_POLLS:
        time.sleep(_POLL_S)
        now = _cpu_of_all(workers)
        quiet, last = (quiet + 1 if now == last else 0), now


def _versions() -> dict[str, str]:
    """Versions of what the side has imported."""
    names = ("torch", "simplejpeg", "PIL", "webdataset", "open_clip", "torchvision", "numpy")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}


def _clipyard(args: argparse.Namespace) -> Batches:
    """Our training loader; stages: "decode", "resize", "tokenize"."""
    import torch

    import data

    torch.set_num_threads(1)
    config = data.LoaderConfig(
        sources=data.expand_sources(args.shards),
        batch_size=args.batch_size,
        image_size=(args.size, args.size),
        resampled=True,
        workers=args.workers,
        num_samples=_ENOUGH,
        image_decode=args.image_decode,
    )
    with data.build_train_loader(config, TimedTokenizer(), 0, 1) as loader:
        for batch in loader:
            seconds = batch.tokens[:, -len(_STAGES) :].sum(0).tolist()
            yield len(batch), {name: value / 1e9 for name, value in zip(_STAGES, seconds, strict=True)}


_STAGES = ("decode", "resize", "tokenize")


class TimedTokenizer:
    """CLIP's tokenizer which, in the process where it arrives, times the stages of loading a sample.

    The nanoseconds since the call before travel as further columns of the tokens' first row: a loader has no
    other way from its workers to the benchmark, and should not have one for its sake.
    """

    def __init__(self) -> None:
        from models import get_tokenizer

        self._tokenizer = get_tokenizer("ViT-B-32")
        self._spent: dict[str, int] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.watch()

    def watch(self) -> None:
        """Times the functions of this process that decode a JPEG, and that cut a crop out and resize it."""
        import simplejpeg

        import data.prepare
        import data.scaled

        self._spent = dict.fromkeys(_STAGES, 0)
        simplejpeg.decode_jpeg = self._timed("decode", simplejpeg.decode_jpeg)
        data.prepare.resize_crop = self._timed("resize", data.prepare.resize_crop)
        data.scaled.resize_view = self._timed("resize", data.scaled.resize_view)

    def __call__(self, captions: list[str]) -> Any:
        """int64 [N, L + 3]."""
        import torch

        if not self._spent:
            self.watch()  # without workers nothing was sent here
        tokens = self._timed("tokenize", self._tokenizer)(captions)
        spent = torch.zeros(len(tokens), len(_STAGES), dtype=torch.int64)
        spent[0] = torch.tensor([self._spent[name] for name in _STAGES])
        self._spent.update(dict.fromkeys(_STAGES, 0))
        return torch.cat([tokens, spent], dim=1)

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self._spent[stage] += time.thread_time_ns() - start

        return timed


def _openclip(args: argparse.Namespace) -> Batches:
    """OpenCLIP's training loader with its default train transform and tokenizer."""
    import open_clip
    import torch
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    settings = SimpleNamespace(
        train_data=args.shards,
        train_num_samples=_ENOUGH,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=args.batch_size,
        workers=args.workers,
        world_size=1,
        seed=0,
    )
    transform = open_clip.image_transform(args.size, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for images, _ in get_wds_dataset(settings, transform, is_train=True, tokenizer=tokenizer).dataloader:
        yield len(images), {}


def _our_tar(args: argparse.Namespace) -> Batches:
    """Raw samples, read from the shards one after the other, for ever."""
    import data
    from data.readers import TarReader

    (source,) = data.expand_sources(args.shards)
    for url in itertools.cycle(source.urls):
        for _ in TarReader().read(url):
            yield 1, {}


def _webdataset_tar(args: argparse.Namespace) -> Batches:
    """The same, by webdataset."""
    import webdataset

    while True:
        for _ in webdataset.WebDataset(args.shards, shardshuffle=False):
            yield 1, {}


SIDES: dict[str, Callable[[argparse.Namespace], Batches]] = {
    "clipyard": _clipyard,
    "openclip": _openclip,
    "clipyard-tar": _our_tar,
    "webdataset-tar": _webdataset_tar,
}

if __name__ == "__main__":
    main()
