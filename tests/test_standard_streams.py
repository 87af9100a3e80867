"""Output that cannot be written costs the output, never the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hg_scale.standard_streams import lossy_stream
from tests.shared import ROOT

PRINTS = """
import os, sys
from contextlib import suppress
from hg_scale.standard_streams import protect_standard_streams
protect_standard_streams()
file = open(sys.argv[1], "w")  # must not get the number of a closed standard stream
for number in range(20_000):
    print("line", number)
print("an error", file=sys.stderr)
with suppress(OSError):
    os.write(1, b"a library in C")
file.write("done")
"""


def test_a_stream_drops_what_cannot_be_written() -> None:
    reader, writer = os.pipe()
    stream = lossy_stream(writer)
    print("first", "line", file=stream)
    assert os.read(reader, 100) == b"first line\n"
    os.close(reader)
    print("second", file=stream)
    stream.close()
    os.fstat(writer)  # the descriptor stays open
    os.close(writer)
    with open("/dev/full", "wb", buffering=0) as full:
        stream = lossy_stream(full.fileno())
        assert stream.write("x" * 100_000) == 100_000
        stream.flush()
    assert lossy_stream(999).write("x\n") == 2  # not even open


@pytest.mark.parametrize("where", [">&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -n 1", ">/dev/full"])
def test_the_work_is_done_where_no_output_can_be_written(tmp_path: Path, where: str) -> None:
    script, result = tmp_path / "prints.py", tmp_path / "result"
    script.write_text(PRINTS)
    line = f"{sys.executable} {script} {result} {where}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert result.read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize(
    ("where", "code"), [("| true", 141), (">/dev/full", 1), (">&-", 0), ("2>&- | cat", 0)]
)
def test_a_command_whose_output_has_no_reader_ends_quietly(where: str, code: int) -> None:
    for verb, expected in (("--help", 0), (f"config {ROOT}/configs/hg_1b.json", code)):
        line = f"{sys.executable} -m hg_scale {verb} {where}"
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60,
            cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == expected, verb + done.stderr
        message = "stdout cannot be written: No space left on device\n" if expected == 1 else ""
        assert done.stderr.endswith(message) and done.stderr.count("\n") == bool(message)


def test_preparation_finishes_after_its_reader_has_left(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("a line of text\n" * 1000)
    script = ROOT / "data_prep" / "prepare_bytes.py"
    line = f"{sys.executable} {script} --input {text} --output {tmp_path}/corpus 2>&1 | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "corpus" / "index.json").exists()
