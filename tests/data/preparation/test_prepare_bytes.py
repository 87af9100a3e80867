"""The command line of data_prep/prepare_bytes.py."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hg_scale.data.evaluation import split_text
from hg_scale.data.index import read_index
from tests.data.conftest import TEXT, make_folder

SCRIPT = Path(__file__).resolve().parents[3] / "data_prep" / "prepare_bytes.py"


def run(*arguments, cwd, as_they_are=True):
    """Run the script; most sources here are random bytes."""
    option = ["--bytes-as-they-are"] if as_they_are else []
    command = [sys.executable, str(SCRIPT), *option, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_finished_output_is_reported(text_file, tmp_path):
    first = run("--input", text_file, "--output", "out", "--split", "90000,5000,5003", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    assert "train               90,000 tokens" in first.stdout
    second = run(
        "--input", text_file, "--output", "out", "--split", "90000,5000,5003", cwd=tmp_path
    )
    assert second.returncode == 0 and "already prepared" in second.stdout
    assert sum(split.tokens for split in read_index(tmp_path / "out").splits.values()) == len(TEXT)


def test_text_after_a_split_in_bytes_is_reported(text_file, tmp_path):
    result = run("--input", text_file, "--output", "out", "--split", "90000,5000,1", cwd=tmp_path)
    assert result.returncode == 0 and "5,002 bytes after these are in no split" in result.stdout


def test_an_unwritable_output_is_reported(text_file, tmp_path):
    result = run("--input", text_file, "--output", "/proc/absent", cwd=tmp_path)
    assert result.returncode == 2 and "choose another --output, and start" in result.stderr
    assert "free some space" not in result.stderr and "Traceback" not in result.stderr


def test_patterns_select_files_of_a_folder(tmp_path):
    make_folder(tmp_path / "in")
    result = run(
        "--input", "in", "--include", "a/*", "--include", "b/*", "--exclude", "*1.txt",
        "--split", "0.8,0.1,0.1", "--output", "out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0 and "documents" in result.stdout
    assert read_index(tmp_path / "out").source["files"] == 72


def test_binary_and_side_files_of_a_folder(tmp_path):
    """Hidden files are left out with a line; a binary file is refused, or taken as it is."""
    for name in ("a.txt", "b.md", ".hidden", "a.txt.md5"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(f"the text {name}")
    options = ("--input", "in", "--split", "1,0,0", "--output")
    done = run(*options, "out", cwd=tmp_path, as_they_are=False)
    assert done.returncode == 0 and read_index(tmp_path / "out").splits["train"].documents == 2
    assert "read 2 files, 27 bytes: plain text\n" in done.stdout
    assert "left out 1: hidden (name begins with a dot) (.hidden)\n" in done.stdout
    assert "left out 1: side file of another program (a.txt.md5)\n" in done.stdout
    assert read_index(tmp_path / "out").source["left out"] == {
        "hidden (name begins with a dot)": 1, "side file of another program": 1,
    }  # fmt: skip
    packed = gzip.compress(b"text", mtime=0)
    (tmp_path / "in" / "c.zip").write_bytes(b"PK\3\4" + bytes(40) + packed)
    refused = run(*options, "no", cwd=tmp_path, as_they_are=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "in/c.zip: is .zip data, not text" in refused.stderr and not (tmp_path / "no").exists()
    (tmp_path / "in" / "d.gz").write_bytes(packed)
    done = run(*options, "raw", cwd=tmp_path)
    index = read_index(tmp_path / "raw")
    assert done.returncode == 0 and index.splits["train"].documents == 4
    assert split_text(index, "train").endswith(packed)


def test_an_empty_split_is_reported(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_text("the only document")
    for split, lines in [("0.9,0.05,0.05", 2), ("1,0,0", 0)]:
        result = run("--input", "in", "--output", f"out-{lines}", "--split", split, cwd=tmp_path)
        assert result.returncode == 0 and result.stdout.count(" is empty: increase") == lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "absent", "--output", "out"], "--input absent: no such file"),
        (["--input", "text", "--output", "out", "--split", "0.5,0.5"], "three fractions"),
        (["--input", "text", "--output", "out", "--split", "0.5,0.4,0.2"], "add up to 1"),
        (["--input", "text", "--output", "out", "--split", "9,-1,2"], "negative"),
        (["--input", "text", "--output", "out", "--chunk-tokens", "0"], "above 0"),
    ],
)
def test_user_errors_exit_with_2_and_one_line(tmp_path, arguments, message):
    (tmp_path / "text").write_bytes(TEXT[:1000])
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_progress_bar_on_a_terminal(text_file, tmp_path):
    if not hasattr(os, "openpty"):
        pytest.skip("no pseudo-terminals here")
    leader, follower = os.openpty()
    command = [sys.executable, str(SCRIPT), "--input", str(text_file), "--output", "out"]
    command.append("--bytes-as-they-are")
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=follower
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while block := os.read(leader, 4096):
                shown += block
        except OSError:  # Linux: the other side is closed
            pass
        finally:
            os.close(leader)
    assert process.returncode == 0
    assert b"writing shards" in shown and b"/s" in shown
