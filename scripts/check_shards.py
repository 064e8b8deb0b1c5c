"""`python -m scripts.check_shards SHARDS`: what a run would find in its training data, before it starts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data import DataError, LoaderConfig, open_catalog, run_preflight
from models import ConfigError, get_tokenizer, load_model_config


def main(argv: Sequence[str] | None = None) -> int:
    """Reads a few samples of a few shards and prints what they are. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.check_shards", description=__doc__)
    parser.add_argument("shards", help="as --train-data: braces {000..123}, several joined by ::, s3://, pipe:, CSV")
    parser.add_argument("--model", default="ViT-B-32", help="whose context length and image size count")
    parser.add_argument("--dataset-type", default="auto", choices=("auto", "webdataset", "csv"))
    parser.add_argument("--caption-key", default="txt", help="txt, or json:FIELD")
    args = parser.parse_args(argv)
    try:
        size = load_model_config(args.model).preprocess.size
        catalog = open_catalog(args.shards, dataset_type=args.dataset_type, count=False)
        config = LoaderConfig(
            sources=catalog.sources,
            dataset_type=catalog.dataset_type,
            batch_size=1,
            image_size=(size, size) if isinstance(size, int) else size,
            caption_key=args.caption_key,
        )
        print(run_preflight(config, get_tokenizer(args.model)))
    except (DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
