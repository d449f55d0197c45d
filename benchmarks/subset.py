"""Peak memory and time of a small seeded subset of a Parquet file that is far larger.

    python benchmarks/subset.py --tokenizer FOLDER [--rows 4000000] [--subset 20000]

Writes the file into a temporary folder (the columns of OpenOrca), draws the subset in a process of
its own, and prints that process's peak resident memory: the libraries, the reader, the tokenizer
and everything that was memory-mapped.
"""

import argparse
import multiprocessing
import os
import random
import resource
import tempfile
import time
from pathlib import Path

GROUP = 100_000


def write_rows(path: Path, total: int) -> None:
    """Write `total` rows in row groups of 100,000."""
    import pyarrow as pa
    from pyarrow import parquet

    draw = random.Random(0)
    words = [f"word{number}" for number in range(500)]
    names = ("id", "system_prompt", "question", "response")
    schema = pa.schema([(name, pa.string()) for name in names])
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, total, GROUP):
            texts = [" ".join(draw.choices(words, k=30)) for _ in range(1000)]
            numbers = range(first, min(first + GROUP, total))
            columns = (
                [f"row.{n}" for n in numbers],
                [""] * len(numbers),
                [f"{texts[n % 1000]} {n}" for n in numbers],
                [texts[n * 7 % 1000] for n in numbers],
            )
            writer.write_table(pa.table(dict(zip(names, columns, strict=True)), schema=schema))


def draw_subset(path: Path, tokenizer: str, subset: int, cache: str) -> None:
    """Prepare the subset; print time and peak memory."""
    os.environ["RSLIGHTNING_CACHE"] = cache
    from rslightning.data import OpenOrca

    start = time.perf_counter()
    data = OpenOrca(str(path), tokenizer, num_examples=subset)
    data.setup("fit")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{subset:,} rows drawn, encoded and packed in {seconds:.1f} s, peak {peak:.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=4_000_000)
    parser.add_argument("--subset", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        write_rows(path, options.rows)
        print(f"{options.rows:,} rows, {path.stat().st_size / 2**30:.2f} GiB on disk")
        arguments = (path, options.tokenizer, options.subset, f"{folder}/cache")
        process = multiprocessing.get_context("spawn").Process(target=draw_subset, args=arguments)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
