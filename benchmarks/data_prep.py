"""Throughput of text preparation: against sentencepiece alone, and two processes against one.

    python benchmarks/data_prep.py [--text enwik8.xz] [--megabytes 64] [--copies 1] [--rounds 3]

Splits a text (default: the sources of Python's standard library) into documents of about 4 kB,
writes them as JSON lines (.zst) and parquet, trains a sentencepiece model of 32,000 pieces on them,
and measures, in one run:

1. MB/s of text that our tokenizer encodes against sentencepiece alone, in one process;
2. MB/s of prepare_text.py from start to end with one process and with two: per second of wall-clock
   time, and per second of CPU time, which depends less on the load of the machine. Two independent
   preparations of all the text at the same time show what a second process could gain at most. The
   shards of all runs are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pyarrow
import sentencepiece
from pyarrow import parquet

from hg_scale.data.preparation.folders import find_files
from hg_scale.data.preparation.sources import read_blocks
from hg_scale.data.tokenizer import SentencePieceTokenizer

SCRIPTS = Path(__file__).resolve().parents[1] / "data_prep"
FILES = 16  # of each format


def read_documents(source: Path | None, size: int, each: int = 4000) -> list[str]:
    """Return about `size` bytes of text in documents of about `each`, split at ends of lines."""
    if source is None:
        library = Path(sysconfig.get_path("stdlib"))
        paths = [library / name for name in find_files(library, ("*.py",), ("site-packages/*",))]
    else:
        paths = [source]
    text, held = [], 0
    for path in paths:
        for block in read_blocks(path):
            text.append(block)
            held += len(block)
            if held >= size:
                break
        if held >= size:
            break
    joined = b"".join(text)[:size].decode(errors="ignore")
    documents, start = [], 0
    while start < len(joined):
        stop = joined.find("\n", start + each) + 1 or len(joined)
        documents.append(joined[start:stop])
        start = stop
    return documents


def write_corpora(documents: list[str], folder: Path) -> None:
    """Write the same documents as compressed JSON lines and as parquet."""
    for name in ("jsonl.zst", "parquet"):
        (folder / name).mkdir()
    for number in range(FILES):
        part = documents[number::FILES]
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        with pyarrow.CompressedOutputStream(
            str(folder / "jsonl.zst" / f"{number:02}.jsonl.zst"), "zstd"
        ) as file:
            file.write(lines.encode())
        table = pyarrow.table({"text": part})
        path = folder / "parquet" / f"{number:02}.parquet"
        parquet.write_table(table, path, compression="snappy", row_group_size=1000)


def tokenization(documents: list[str], model: Path, rounds: int) -> None:
    """Encode them with sentencepiece alone and with our tokenizer, alternating every hundred.

    The best time of each hundred counts, so that the load of the machine affects all equally.
    """
    ours = SentencePieceTokenizer.read(model, documents=True)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    stored = [text.encode() for text in documents]  # as it comes off the disk
    runs: dict[str, Callable[[slice], object]] = {
        "sentencepiece, lists": lambda part: list(map(processor.encode, documents[part])),
        "sentencepiece, a batch": lambda part: processor.encode(documents[part], num_threads=1),
        "sentencepiece, arrays": lambda part: [
            processor.encode(text, return_type="numpy") for text in documents[part]
        ],
        "our tokenizer": lambda part: list(map(ours.encode, stored[part])),
    }
    seconds = dict.fromkeys(runs, 0.0)
    for begin in range(0, len(documents), 100):
        part = slice(begin, begin + 100)
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(rounds):
            for name, encode in runs.items():
                start = time.process_time()
                encode(part)
                best[name] = min(best[name], time.process_time() - start)
        for name in runs:
            seconds[name] += best[name]
    size, tokens = sum(map(len, stored)), sum(len(ours.encode(text)) for text in stored)
    alone = min(time for name, time in seconds.items() if name.startswith("sentencepiece"))
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {size / tokens:.2f} bytes per token")
    for name, time_used in seconds.items():
        rate = size / time_used / 1e6
        print(f"{name:>22}: {rate:6.2f} MB per CPU second ({alone / time_used:.2f})", flush=True)


class Run(NamedTuple):
    """Throughput in MB of text."""

    clock: float  # per second
    processor: float  # per second of CPU time of all processes


def prepare(size: int, source: Path, outputs: list[Path], tokenizer: str) -> Run:
    """Run prepare_text.py with a process per entry of `outputs`, as `srun` starts them.

    Where the entries are the same folder, the processes work together.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    together = len(outputs) if len(set(outputs)) == 1 else 1
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "prepare_text.py"), "--input", str(source),
             "--output", str(output), "--tokenizer", tokenizer],
            env=os.environ | {
                "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank % together),
                "SLURM_STEP_NUM_TASKS": str(together),
            },
            stdout=subprocess.DEVNULL,
        )
        for rank, output in enumerate(outputs)
    ]  # fmt: skip
    if any([process.wait() for process in started]):
        sys.exit("prepare_text.py failed")
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size *= len(set(outputs))
    return Run(size / clock / 1e6, size / used / 1e6)


def digest(folder: Path) -> str:
    """Return the sha256 of all files in the folder."""
    sha256 = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        sha256.update(path.name.encode() + path.read_bytes())
    return sha256.hexdigest()


def preparation(size: int, folder: Path, model: Path, rounds: int) -> None:
    """Run one process, two together and two apart, alternating; the best of each counts."""
    out, other = folder / "out", folder / "other"
    ways = {"one": [out], "two": [out, out], "apart": [out, other]}
    for tokenizer in (str(model), "bytes"):
        for kind in ("parquet", "jsonl.zst"):
            best: dict[str, Run] = {}
            digests = set()
            for _ in range(rounds):
                for way, outputs in ways.items():
                    rates = prepare(size, folder / kind, outputs, tokenizer)
                    best[way] = Run(*map(max, rates, best.get(way, rates)))
                    for output in set(outputs):
                        digests.add(digest(output))
                        shutil.rmtree(output)
            one, two, apart = best["one"], best["two"], best["apart"]
            name = "bytes" if tokenizer == "bytes" else "sentencepiece"
            print(
                f"{kind:>9} to {name:<13}: one process {one.clock:6.2f} MB/s, two {two.clock:6.2f}"
                f" ({two.clock / one.clock:.2f} times; two apart {apart.clock / one.clock:.2f}"
                f" times); {one.processor:6.2f} and {two.processor:6.2f} MB per CPU second; shards"
                f" {'equal' if len(digests) == 1 else 'DIFFER'}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--text", type=Path, help="a file, also compressed (default: Python's standard library)")
    add("--megabytes", type=float, default=64.0, help="maximum size of the text")
    add(
        "--copies",
        type=int,
        default=1,
        help="copies of the text, which reduce the cost of starting",
    )
    add("--pieces", type=int, default=32_000, help="size of the sentencepiece model")
    add("--rounds", type=int, default=3, help="rounds of all measurements; the best counts")
    options = parser.parse_args()
    documents = read_documents(options.text, int(options.megabytes * 1e6))
    size = sum(len(text.encode()) for text in documents) * options.copies
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpora(documents * options.copies, folder)
        model = folder / "tok.model"
        command = [sys.executable, str(SCRIPTS / "train_tokenizer.py"), "--input",
                   str(folder / "parquet"), "--vocab-size", str(options.pieces), "--sample-bytes",
                   "8000000", "--output", str(model)]  # fmt: skip
        subprocess.run(command, check=True)
        tokenization(documents[: len(documents) // 5], model, options.rounds)
        preparation(size, folder, model, options.rounds)


if __name__ == "__main__":
    main()
