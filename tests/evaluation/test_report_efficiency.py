"""Wall clock, goodput, restarts, slow ranks and evaluated checkpoints in a report."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hg_scale.commands import report
from hg_scale.commands.main import main
from hg_scale.evaluation.report.efficiency import efficiency_facts, wall_clock
from hg_scale.evaluation.report.evaluations import read_evaluations
from hg_scale.evaluation.report.run_folder import read_runs
from tests.run_folders import step_record, validation_record, write_run

BEGIN = 1e9  # the records of `write_run` are at BEGIN + step


def write_starts(run: Path, *starts: dict[str, Any]) -> None:
    lines = [{"start": n, "ranks": 2} | start for n, start in enumerate(starts, 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "starts.jsonl").write_text(text)


def write_metrics(run: Path, records: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_wall_clock_of_a_restarted_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    validation = validation_record(400) | {"validation_seconds": 20.0, "time": BEGIN + 500}
    write_metrics(run, [*map(step_record, range(1, 401)), validation])
    write_starts(
        run,
        {"time": BEGIN - 100, "step": 0},
        {"time": BEGIN + 260, "step": 200, "last_step": 230, "last_time": BEGIN + 230},
        {"time": BEGIN + 330, "step": 300, "last_step": 310, "last_time": BEGIN + 320},
    )
    (read,) = read_runs([run])
    clock = wall_clock(read)
    assert clock is not None
    assert (clock.seconds, clock.kept, clock.validating) == (600.0, 200.0, 20.0)
    assert (clock.between, clock.restarts, clock.repeated) == (40.0, 2, 40)
    assert clock.goodput == pytest.approx(1 / 3) and clock.lost == 380.0
    assert dict(efficiency_facts(read)) == {
        "wall clock": "0:10:00",
        "goodput": "33.3% of it in steps that were kept",
        "lost time": "0:06:20",
        "restarts": "2 (40 steps taken again, 0:00:40 between)",
    }


def test_a_run_without_starts_or_times(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (read,) = read_runs([run])
    clock = wall_clock(read)
    assert clock is not None and clock.seconds == 399.0 and clock.restarts == 0
    write_metrics(run, [step_record(n) | {"time": None} for n in range(1, 9)])
    assert wall_clock(read_runs([run])[0]) is None
    write_metrics(run, [])
    assert efficiency_facts(read_runs([run])[0]) == []


def test_slow_ranks_are_those_over_the_limit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    slow = {n: {"slowest_rank": n % 2, "slowest_ratio": 1.0 + n / 10} for n in range(1, 11)}
    write_metrics(run, [step_record(n) | slow[n] for n in slow])
    (line,) = [v for k, v in efficiency_facts(read_runs([run])[0]) if k == "slow ranks"]
    assert line == (
        "rank 0 in 40% of logged steps, up to 2.00 ×; rank 1 in 40% of logged steps, up to 1.90 ×"
    )


def result(step: int, **change: Any) -> dict[str, Any]:
    return {
        "step": step, "text": "enwik8/test", "window": 512, "stride": 512, "bits_per_byte": 1.25,
        "interval_95_half_width": 0.01,
    } | change  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [{"step": "1"}, {"text": None}, {"bits_per_byte": None}, {"bits_per_byte": "1"},
     {"interval_95_half_width": []}, {"window": True}],
)  # fmt: skip
def test_evaluations_are_read_in_order_and_others_left_out(
    tmp_path: Path, bad: dict[str, Any]
) -> None:
    content = [result(200), result(100) | bad, 7, result(100)]
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    one = result(100, text="b", interval_95_half_width=None)
    (tmp_path / "evaluation-7.json").write_text(json.dumps(one))
    (tmp_path / "evaluation-8.json").write_text('[{"step": 1')
    found = read_evaluations(tmp_path)
    assert [(e.text, e.step, e.half_width) for e in found] == [
        ("b", 100, None), ("enwik8/test", 100, 0.01), ("enwik8/test", 200, 0.01),
    ]  # fmt: skip


def test_the_page_shows_evaluations_and_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "a", logged=50)
    (run / "evaluation.json").write_text(json.dumps(result(100)))
    write_metrics(run, [step_record(n) | {"time": time.time()} for n in range(1, 51)])
    page = run / "report.html"
    pages = []

    def finish(seconds: float) -> None:
        assert seconds == 7
        pages.append(page.read_text())
        if len(pages) == 2:
            write_metrics(run, [step_record(n) for n in range(1, 401)])

    monkeypatch.setattr(report.time, "sleep", finish)
    arguments = ["report", str(run), "--sample", "0", "--no-compare"]
    assert main([*arguments, "--watch", "7"]) == 0
    assert capsys.readouterr().out.count("report: ") == 3
    refresh = '<meta http-equiv="refresh" content="7">'
    assert [refresh in text for text in (*pages, page.read_text())] == [True, True, False]
    assert "Evaluated checkpoints" in pages[0] and "1.2500 ± 0.0100" in pages[0]
    assert main([*arguments, "--watch", "0"]) == 2
