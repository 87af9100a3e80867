"""Cost of preparing very short and very long documents.

    python benchmarks/short_and_long_documents.py [--megabytes 50]

Measures prepare_text.py from start to end, in one run: CPU seconds and peak memory.

1. Words of 7 bytes, each a document, in several formats, beside documents of 4,000 bytes.
2. One line with all of the text, beside the same bytes in 64 lines.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet

SCRIPT = Path(__file__).resolve().parents[1] / "data_prep" / "prepare_text.py"
WORD = 7  # bytes


def words(count: int) -> list[bytes]:
    """Return different words of 7 bytes, as documents without equals among them."""
    return [b"%07d" % (number * 7919 % 10_000_019) for number in range(count)]


def write_short(folder: Path, size: int) -> dict[str, list[str]]:
    """Write the documents of the first part. Returns the options by name of a file."""
    short = words(size // WORD)
    long = b"\n".join(b" ".join(short[i : i + 500]) for i in range(0, len(short), 500))
    (folder / "plain.txt").write_bytes(b" ".join(short))
    (folder / "packed.txt.gz").write_bytes(gzip.compress(b" ".join(short), 1))
    (folder / "long.txt").write_bytes(long)
    with (folder / "lines.jsonl").open("wb") as file:
        for word in short:
            file.write(b'{"text": "%s"}\n' % word)
    parquet.write_table(pyarrow.table({"text": pyarrow.array(short).cast("string")}),
                        folder / "column.parquet")  # fmt: skip
    space, newline = ["--document-separator", " "], ["--document-separator", r"\n"]
    return {
        "long.txt": newline, "plain.txt": space, "packed.txt.gz": space, "lines.jsonl": [],
        "column.parquet": [],
    }  # fmt: skip


def write_long(folder: Path, size: int) -> dict[str, list[str]]:
    """Write the lines of the second part."""
    part = b"abcdefghi " * (size // 640)
    newline = ["--document-separator", r"\n"]
    kinds: dict[str, tuple[Callable[[bytes], bytes], list[str]]] = {
        "jsonl": (lambda text: json.dumps({"text": text.decode()}).encode(), []),
        "txt": (lambda text: text, newline),
    }
    options = {}
    for suffix, (line, option) in kinds.items():
        (folder / f"64 lines.{suffix}").write_bytes((line(part) + b"\n") * 64)
        (folder / f"1 line.{suffix}").write_bytes(line(part * 64) + b"\n")
        options |= {f"64 lines.{suffix}": option, f"1 line.{suffix}": option}
    return options


def measure(path: Path, options: list[str]) -> tuple[float, int]:
    """Prepare a file. Returns CPU seconds and the peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPT), "--input", str(path), "--output", f"{folder}/out"]
        process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit("prepare_text.py failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss // 1024


def write_in_process(writer: str, folder: str, size: int) -> dict[str, list[str]]:
    """Write the files in another process: a child's peak memory includes its parent's before."""
    code = f"import json, {Path(__file__).stem} as b; from pathlib import Path; "
    code += f"print(json.dumps(b.{writer}(Path({folder!r}), {size})))"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent)
    return json.loads(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=50, help="of text in each file")
    size = parser.parse_args().megabytes * 1_000_000
    for writer in (write_short, write_long):
        reference = 0.0
        with tempfile.TemporaryDirectory() as folder:
            for file, options in write_in_process(writer.__name__, folder, size).items():
                seconds, peak = measure(Path(folder, file), options)
                if not reference or file.startswith("64"):
                    reference = seconds
                print(
                    f"{file:>15}: {seconds:5.1f} CPU s, {size / seconds / 1e6:5.2f} MB of text per "
                    f"CPU s, {seconds / reference:5.2f} times, peak {peak} MB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
