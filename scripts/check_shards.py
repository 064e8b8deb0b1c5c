"""`python -m scripts.check_shards SHARDS`: what a run would find in its training data, before it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data import CaptionConfig, DataError, LoaderConfig, Where, open_catalog, run_preflight
from models import ConfigError, get_tokenizer, load_model_config
from scripts.arguments import positive


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a few samples of a few shards and prints what they are. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.check_shards", description=__doc__)
    parser.add_argument(
        "shards", help="as --train-data: braces {000..123}, several joined by ::, s3://, pipe:, a directory, a list"
    )
    parser.add_argument("--model", default="ViT-B-32", help="whose context length and image size count")
    parser.add_argument("--dataset-type", default="auto", choices=("auto", "webdataset", "csv", "folder"))
    parser.add_argument("--caption-key", nargs="+", default=["txt"], help="txt, or json:FIELD; several are drawn from")
    parser.add_argument("--caption-probs", nargs="+", type=float, default=[], help="how often each key is drawn")
    parser.add_argument("--where", help="as for a run, e.g. \"NSFW in ['UNLIKELY'] and similarity > 0.3\"")
    parser.add_argument("--num-shards", type=positive, default=3, help="shards looked at (default: %(default)s)")
    parser.add_argument("--num-samples", type=positive, default=8, help="samples of each (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if args.where is not None:
            Where.parse(args.where)
        size = load_model_config(args.model).preprocess.size
        catalog = open_catalog(args.shards, dataset_type=args.dataset_type, count=False)
        config = LoaderConfig(
            sources=catalog.sources,
            dataset_type=catalog.dataset_type,
            batch_size=1,
            image_size=(size, size) if isinstance(size, int) else size,
            captions=CaptionConfig(tuple(args.caption_key), tuple(args.caption_probs)),
            where=args.where,
        )
        print(run_preflight(config, get_tokenizer(args.model), args.num_samples, args.num_shards))
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
