"""Reads the same shards from an S3 server on this machine in several ways, side by side, and prints a table.

    python -m scripts.benchmark_storage [--shards 8] [--mib 64] [--rounds 5] [--latency-ms 0] [--ways ours,pipe]

Each way runs in a process of its own, so that its CPU time (its commands' included, the server's not) is
known; the ways take turns within a round. The server is a small one of this script: it sends files by
sendfile and asks for no signature, so that the clients are what is measured.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

READ_BYTES = 8 << 20
BUCKET = "shards"
PACKAGES = ("botocore", "urllib3", "s3fs", "awscli", "obstore", "s3torchconnector")


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8, help="files to read, one after the other")
    parser.add_argument("--mib", type=int, default=64, help="size of each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--latency-ms", type=float, default=0, help="the server waits before each answer")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.shards)))
        return 0
    ways = [way for way in args.ways.split(",") if is_possible(way)]
    with tempfile.TemporaryDirectory() as folder, serve(write(Path(folder), args), args.latency_ms / 1000) as endpoint:
        results = rounds(ways, args, endpoint)
    print(report(ways, results, args))
    return 0


def write(folder: Path, args: argparse.Namespace) -> Path:
    """The shards, of bytes that no transport could compress."""
    (folder / BUCKET).mkdir()
    for number in range(args.shards):
        (folder / BUCKET / f"{number}.tar").write_bytes(os.urandom(args.mib << 20))
    return folder


def rounds(ways: list[str], args: argparse.Namespace, endpoint: str) -> dict[str, list[dict[str, float]]]:
    """For each way what each round measured; an uncounted round first."""
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    env = os.environ | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    for number in range(args.rounds + 1):
        for way in ways:
            command = [sys.executable, "-m", "scripts.benchmark_storage", "--way", way, "--shards", str(args.shards)]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            if number:
                results[way].append(json.loads(done.stdout))
            print(".", end="", flush=True, file=sys.stderr)
    return results


def measure(way: str, num_shards: int) -> dict[str, float]:
    """Rate and CPU time of one pass over the shards, in this process; imports do not count."""
    read = WAYS[way]
    for _ in read(f"s3://{BUCKET}/0.tar"):
        break  # clients are made
    cpu, began, num_bytes = _cpu_s(), time.monotonic(), 0
    for number in range(num_shards):
        for part in read(f"s3://{BUCKET}/{number}.tar"):
            num_bytes += len(part)
    wall = time.monotonic() - began
    return {"mib_s": num_bytes / wall / (1 << 20), "cpu_s_gib": (_cpu_s() - cpu) / num_bytes * (1 << 30)}


def _cpu_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def read_ours(url: str) -> Iterator[bytes]:
    """data.storage, as the loader uses it."""
    from data.storage import open_stream

    with open_stream(url) as stream:
        while part := stream.read(READ_BYTES):
            yield part


def read_pipe(url: str) -> Iterator[bytes]:
    """`pipe:aws s3 cp`, through the same contract."""
    return read_ours(f"pipe:aws s3 cp {url} -")


def read_s3fs(url: str, **options: str) -> Iterator[bytes]:
    """fsspec's S3 file system in its default manner."""
    import fsspec

    system, path = fsspec.core.url_to_fs(url)
    with system.open(path, **options) as file:
        while part := file.read(READ_BYTES):
            yield part


def read_s3fs_uncached(url: str) -> Iterator[bytes]:
    """The same without its cache of blocks."""
    return read_s3fs(url, cache_type="none")


def read_obstore(url: str) -> Iterator[bytes]:
    """obstore's stream of one GET (Rust)."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(BUCKET, endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
    yield from obstore.get(store, url.rpartition("/")[2]).stream(min_chunk_size=READ_BYTES)


def read_s3torchconnector(url: str) -> Iterator[bytes]:
    """The sequential reader of Amazon's connector for PyTorch (C++ and Rust)."""
    from s3torchconnector import S3ReaderConstructor
    from s3torchconnector._s3client import S3Client, S3ClientConfig

    config = S3ClientConfig(force_path_style=True)
    client = S3Client("us-east-1", endpoint=os.environ["AWS_ENDPOINT_URL"], s3client_config=config)
    key = url.rpartition("/")[2]
    with client.get_object(BUCKET, key, reader_constructor=S3ReaderConstructor.sequential()) as reader:
        while part := reader.read(READ_BYTES):
            yield part


WAYS: dict[str, Callable[[str], Iterator[bytes]]] = {
    "ours": read_ours,
    "pipe": read_pipe,
    "s3fs": read_s3fs,
    "s3fs-uncached": read_s3fs_uncached,
    "obstore": read_obstore,
    "s3torchconnector": read_s3torchconnector,
}


def is_possible(way: str) -> bool:
    """Whether the package behind a way is installed."""
    return way not in ("obstore", "s3torchconnector") or importlib.util.find_spec(way) is not None


def report(ways: list[str], results: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> str:
    """A table in Markdown with what it was measured on."""
    lines = [
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
        f"{args.shards} x {args.mib} MiB, {args.rounds} rounds, {args.latency_ms:g} ms before each answer",
        "",
        "| way | MiB/s | lowest to highest | ours to it | CPU-seconds a GiB | lowest to highest |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        rates, costs = ([one[name] for one in results[way]] for name in ("mib_s", "cpu_s_gib"))
        ratios = [a["mib_s"] / b["mib_s"] for a, b in zip(results[ways[0]], results[way], strict=True)]
        lines.append(
            f"| {way} | {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} "
            f"| {statistics.median(ratios):.2f} "
            f"| {statistics.median(costs):.2f} | {min(costs):.2f} to {max(costs):.2f} |"
        )
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def serve(folder: Path, latency_s: float) -> Iterator[str]:
    """A server of the files under `folder`, in a process of its own; yields its address."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, latency_s, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def _serve(folder: Path, latency_s: float, pipe: Connection) -> None:
    handler = type("BoundHandler", (Handler,), {"folder": folder, "latency_s": latency_s})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients leave early
    pipe.send(server.server_address[1])
    server.serve_forever()


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of whole objects and of one range, in S3's path style."""

    protocol_version = "HTTP/1.1"
    folder: Path
    latency_s: float

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        time.sleep(self.latency_s)
        path = self.folder / self.path.split("?")[0].lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop, size = self._range(path.stat().st_size)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{path.name}-{size}"')
        self.send_header("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if send:
            self.wfile.flush()
            with open(path, "rb") as file:
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

    def _range(self, size: int) -> tuple[int, int, int]:
        """Sends the first lines of the answer; first byte, the one after the last, size of the object."""
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self.send_response(200)
            return 0, size, size
        start, stop = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        return start, stop, size


if __name__ == "__main__":
    raise SystemExit(main())
