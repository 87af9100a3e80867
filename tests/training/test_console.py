"""Console output: plain lines, the live line of a real terminal, redirected library output."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hg_scale.training.console import Console, step_figures, validation_line
from hg_scale.training.monitoring.status import read_status

RECORD = {
    "step": 120,
    "loss": 1.43127,
    "bits_per_byte": 2.06489,
    "grad_norm": 0.8127,
    "learning_rate": 3.98e-4,
    "tokens_per_second": 31_234.5,
    "mfu": 0.4123,
}


FIGURES = "loss 1.4313  bpb 2.0649  grad 0.813  lr 3.98e-04  31.2k tok/s  mfu 41.2%"


def test_a_logged_step_is_one_line():
    assert step_figures(RECORD, eta=192.4) == FIGURES + "  eta 0:03:12"


def test_missing_and_null_figures_are_left_out():
    assert step_figures({"step": 1, "loss": float("nan"), "mfu": None}, None) == "loss nan"


@pytest.mark.parametrize(
    ("rate", "shown"),
    [(812.4, "812"), (999.6, "1k"), (31_234, "31.2k"), (4.05e6, "4.05M"), (2e13, "20T")],
)
def test_rates_have_three_digits(rate, shown):
    assert step_figures({"tokens_per_second": rate}, None) == f"{shown} tok/s"


def test_a_validation_is_one_line():
    record = {"step": 50, "validation_loss": 1.25, "validation_bits_per_byte": 1.80337}
    assert validation_line(record) == "validation at step 50  loss 1.2500  bpb 1.8034"


def test_the_eta_leaves_out_the_first_logged_step():
    stream = io.StringIO()
    console = Console(100_000, stream=stream)
    for step, seconds in ((10, 900.0), (20, 1.0), (50, 100.0), (60, 1.0)):
        console.step({"step": step, "step_seconds": seconds})
    first, second, _, fourth = stream.getvalue().splitlines()
    assert "eta" not in first
    assert second.endswith("eta 1d 03:46")  # 99,980 steps of 1 s
    assert fourth.endswith("eta 1d 03:45")  # the median of 1, 100 and 1 s


@pytest.mark.parametrize("count", [2, 7, 20, 45])
def test_eta_and_time_left_of_status_agree(tmp_path, count):
    stream = io.StringIO()
    console = Console(5000, stream=stream)
    (tmp_path / "config.json").write_text('{"training": {"steps": 5000}}')
    earlier = [{"step": n, "loss": 1.0, "step_seconds": 999.0, "start": 1} for n in range(1, 9)]
    steps = [
        {"step": 8 + n, "loss": 1.0, "step_seconds": 90.0 / n + n % 3, "start": 2}
        for n in range(1, count + 1)
    ]
    for record in steps:
        console.step(record)
    lines = [json.dumps(r | {"bits_per_byte": 1.0, "time": 0.0}) for r in (*earlier, *steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    left = read_status(tmp_path).lines["time left"]
    assert stream.getvalue().splitlines()[-1].endswith(f"eta {left}")


def test_without_a_terminal_all_output_is_plain_lines():
    stream = io.StringIO()
    with Console(1000, stream=stream) as console:
        console.print("[bold] stays as it is")
        console.advance(119)
        console.step(RECORD)
        console.validation({"step": 120, "validation_loss": 1.0})
    assert stream.getvalue().splitlines() == [
        "[bold] stays as it is",
        f"step  120/1000  {FIGURES}",
        "validation at step 120  loss 1.0000",
    ]


def test_other_ranks_only_warn():
    stream = io.StringIO()
    with Console(1000, rank=3, tty=True, stream=stream) as console:
        console.print("hello")
        console.advance(1)
        console.step(RECORD)
        console.validation({"step": 120})
        console.warn("shard 7 is broken")
    assert stream.getvalue() == "warning (rank 3): shard 7 is broken\n"


def in_terminal(code: str, columns: int) -> str:
    """Run `code` with a terminal of `columns` columns as stdout; return its output."""
    controller, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            block = os.read(controller, 65536)
        except OSError:  # the other end is closed
            break
        output += block
        if not block:
            break
    os.close(controller)
    assert process.wait() == 0, output.decode()
    return output.decode()


def without_escapes(output: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)


def test_a_terminal_has_one_live_line():
    output = in_terminal(
        "import time; from hg_scale.training.console import Console\n"
        "with Console(40) as console:\n"
        "    for step in range(1, 41):\n"
        "        console.step({'step': step, 'loss': 1.5, 'grad_norm': 0.25})\n"
        "        if step == 20: console.validation({'step': step, 'validation_loss': 1.0})\n",
        columns=100,
    )
    assert "\x1b[2K" in output  # erases the line before it is drawn again
    plain = without_escapes(output)
    lines = [line.rstrip("\r").split("\r")[-1].strip() for line in plain.split("\n")]
    assert "validation at step 20  loss 1.0000" in lines
    assert sum("step 40/40" in line for line in lines) == 1  # in the final state of the screen
    assert "loss 1.5000  grad 0.250" in plain


@pytest.mark.parametrize("columns", [50, 160])
def test_the_live_line_fits_the_width_of_the_terminal(tmp_path, columns):
    output = in_terminal(
        "from pathlib import Path; from hg_scale.training.console import Console, quiet_libraries\n"
        f"with quiet_libraries(Path({str(tmp_path)!r}, 'log')) as stream:\n"
        f"    with Console(1000, stream=stream) as console: console.step({RECORD})",
        columns,
    )
    plain = without_escapes(output)
    assert all(len(line.rstrip()) <= columns for line in re.split(r"[\r\n]+", plain))
    assert ("mfu 41.2%" in plain) == (columns == 160)


def test_print_unlocked_works_while_a_thread_holds_the_lock_of_the_live_line(tmp_path):
    log = tmp_path / "log"
    line = "step 120 takes 312 s: rank 5 (n3) is still reading data"
    output = in_terminal(
        "import os, threading; from pathlib import Path\n"
        "from hg_scale.training.console import Console, quiet_libraries\n"
        f"with quiet_libraries(Path({str(log)!r})) as stream:\n"
        f"    with Console(1000, stream=stream) as console:\n"
        f"        console.step({RECORD})\n"
        "        def end(): console.print_unlocked(%r); os._exit(0)\n"
        % line
        + "        with console._live._lock:\n"
        "            threading.Thread(target=end).start(); threading.Event().wait()\n",
        columns=100,
    )
    plain = without_escapes(output)
    assert line in [text.split("\r")[-1] for text in plain.replace("\r\n", "\n").split("\n")]
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # the cursor is shown again
    assert line in log.read_text()


QUIET = """
import logging, os, sys, warnings
from pathlib import Path
from hg_scale.training.console import Console, quiet_libraries
print("before")
with quiet_libraries(Path(sys.argv[1])) as stream, Console(10, stream=stream) as console:
    print("noise: print"); os.write(1, b"noise: C stdout\\n"); os.write(2, b"noise: C stderr\\n")
    warnings.warn("noise: warning"); logging.getLogger("DeepSpeed").warning("noise: log")
    os.system("echo noise: child")
    console.step({"step": 1, "loss": 2.0})
    %s
print("after")
"""


def run_quietly(log: Path, last: str = "pass") -> subprocess.CompletedProcess[str]:
    """Run a process that prints in all ways and ends with the statement `last`."""
    command = [sys.executable, "-c", QUIET % last, str(log)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_library_output_goes_to_the_log_and_the_console_to_the_terminal(tmp_path):
    log = tmp_path / "logs" / "rank-0.log"
    done = run_quietly(log)
    assert done.stdout == "before\nstep  1/10  loss 2.0000\nafter\n"
    assert done.stderr == ""
    written = log.read_text()
    for kind in ("print", "C stdout", "C stderr", "warning", "log", "child"):
        assert f"noise: {kind}" in written
    assert "before" not in written and "after" not in written


def test_an_error_is_printed_to_the_terminal_and_the_log(tmp_path):
    log = tmp_path / "rank-0.log"
    done = run_quietly(log, "raise RuntimeError('shapes differ')")
    assert done.returncode == 1
    assert "RuntimeError: shapes differ" in done.stderr and str(log) in done.stderr
    assert "noise" not in done.stdout + done.stderr
    assert "RuntimeError: shapes differ" in log.read_text()


def test_a_plain_exit_prints_nothing(tmp_path):
    done = run_quietly(tmp_path / "rank-0.log", "sys.exit(3)")
    assert done.returncode == 3 and done.stderr == ""


def test_a_crash_in_c_prints_its_stack_to_the_terminal(tmp_path):
    done = run_quietly(tmp_path / "rank-0.log", "os.abort()")
    assert done.returncode == -6
    assert "Fatal Python error: Aborted" in done.stderr


def test_the_log_of_a_killed_run_is_complete(tmp_path):
    log = tmp_path / "rank-0.log"
    assert run_quietly(log, "os.kill(os.getpid(), 9)").returncode == -9
    assert "noise: print" in log.read_text()


def test_a_restart_appends_to_the_log(tmp_path):
    log = tmp_path / "rank-0.log"
    run_quietly(log), run_quietly(log)
    assert log.read_text().count("noise: print") == 2


def test_a_terminal_of_width_0_has_plain_lines() -> None:
    """mpirun gives its ranks such a terminal if its own output goes to a file."""
    code = (
        "from hg_scale.training.console import Console\n"
        "with Console(40) as console: console.step({'step': 20, 'loss': 1.5})\n"
    )
    assert in_terminal(code, columns=0) == "step 20/40  loss 1.5000\r\n"
