"""The HTML report: every kind of run gives a page, with the values that were measured."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hg_scale.checkpoint.find import find_latest
from hg_scale.checkpoint.manifest import seal
from hg_scale.commands.main import main
from hg_scale.config import load_config
from hg_scale.data.evaluation import split_text
from hg_scale.data.index import read_index
from hg_scale.data.preparation.images import ImageCorpus
from hg_scale.data.preparation.shuffled import Job, prepare
from hg_scale.data.progress import ProgressBar
from hg_scale.evaluation.report.axes import tick_labels, ticks
from hg_scale.evaluation.report.baselines import find_baselines
from hg_scale.evaluation.report.charts import make_charts, path
from hg_scale.evaluation.report.curves import (
    POINTS,
    extremes,
    means,
    smooth,
    validation_x_values,
    x_values,
)
from hg_scale.evaluation.report.drawing import draw_hierarchy
from hg_scale.evaluation.report.run_folder import read_runs, short_names
from hg_scale.evaluation.report.tables import config_differences, score_bars
from hg_scale.model.costs import forward_flops, layer_costs
from hg_scale.model.layer_table import layer_table
from tests.run_folders import STEPS, step_record, validation_record, write_checkpoint, write_run
from tests.runs import train_in
from tests.shared import ROOT
from tests.world import Worlds

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Page(HTMLParser):
    """A parsed page; unbalanced elements are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str, role: str = "") -> list[dict[str, str]]:
        """Attributes of the elements with a tag and, optionally, a class."""
        found = [attributes for name, attributes in self.elements if name == tag]
        return [a for a in found if not role or role in a.get("class", "").split()]

    @property
    def charts(self) -> set[str]:
        return {plot["data-chart"] for plot in self.of("svg", "plot")}


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., Page]:
    """`report(run, ...)`: the parsed page of runs."""

    def report(*options: Any) -> Page:
        output = tmp_path / "page.html"
        arguments = [str(option) for option in options]
        if "--sample" not in arguments:
            arguments += ["--sample", "0"]
        assert main(["report", *arguments, "--output", str(output)]) == 0
        return Page(output.read_text())

    return report


def rewrite(run: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Replace every record of a run by `change(record)`; None drops it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(record) for line in lines if (record := change(line)) is not None]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in kept))


def test_page_of_a_complete_run(report: Callable[..., Page], tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "alpha"))
    assert page.charts == {
        "bits_per_byte", "tokens_per_second", "mfu", "data_seconds", "memory_gib",
        "learning_rate", "grad_norm",
    }  # fmt: skip
    assert {plot["data-axis"] for plot in page.of("svg", "plot")} == {
        "tokens", "steps", "compute", "hours",
    }  # fmt: skip
    for fact in ("400 of 400", "finished", "51.2k", "256 tokens/s", "40.0%", "0.60 GiB"):
        assert fact in page.text
    last = validation_record(STEPS)["validation_bits_per_byte"]
    assert f"{last:.3f}" in page.text
    assert len(page.of("circle", "run0")) == 4 * 4  # validations, on four axes
    assert "No compressors: text: nowhere/text" in page.text
    assert page.text.count("tensor 1 × pipeline 1 × data 2, ZeRO 1") == 4
    assert "level0.shorten" in page.text


def test_page_is_self_contained(report: Callable[..., Page], tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "alpha"), write_run(tmp_path / "beta"))
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "http" not in policy
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.elements}
    assert not [a for _, a in page.elements if "src" in a or "href" in a]
    style = (ROOT / "hg_scale/evaluation/report/templates/page.css").read_text()
    assert "url(" not in style and "@import" not in style
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_pictures_have_titles_and_descriptions(report: Callable[..., Page], tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "alpha"))
    names = {a["id"] for tag, a in page.elements if tag in ("title", "desc") and "id" in a}
    pictures = [a for a in page.of("svg") if a.get("role") == "img"]
    assert len(pictures) == 7 * 4 + 1
    for picture in pictures:
        assert set(picture["aria-labelledby"].split()) <= names
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_comparison_of_two_runs(report: Callable[..., Page], tmp_path: Path) -> None:
    flat = {"model": {"hierarchy": "4@1"}, "optimizer": {"learning_rate": 0.5}}
    a = write_run(tmp_path / "alpha")
    b = write_run(tmp_path / "beta", change=flat, offset=0.25)
    runs = read_runs([a, b])
    assert dict(config_differences(runs)) == {
        "model.hierarchy": ["1@1 1@2 1@1", "4@1"],
        "optimizer.learning_rate": ["0.0004", "0.5"],
    }
    (bars,) = score_bars(runs, []).values()
    assert [bar.label for bar in bars] == ["alpha", "beta"]
    assert bars[1].value - bars[0].value == pytest.approx(0.25)
    page = report(b, a)
    assert "Differences" in page.text and "4@1" in page.text
    figures = page_figures(tmp_path / "page.html")
    assert figures["names"] == ["beta", "alpha"]
    assert page.of("path", "run0") and page.of("path", "run1")


def page_figures(page: Path) -> Any:
    match = re.search(r'id="figures">(.*?)</script>', page.read_text(), re.DOTALL)
    assert match
    return json.loads(match[1])


def test_removed_key_is_a_difference_and_new_key_at_its_default_is_not(tmp_path: Path) -> None:
    old, new = write_run(tmp_path / "old"), write_run(tmp_path / "new")
    tree = json.loads((old / "config.json").read_text())
    del tree["data"]["workers"]
    tree["data"]["prefetch_batches"] = 4
    (old / "config.json").write_text(json.dumps(tree))
    assert config_differences(read_runs([old, new])) == [("data.prefetch_batches", ["4", "–"])]


def without_validation(run: Path) -> str:
    rewrite(run, lambda record: record if "loss" in record else None)
    return "no validation"


def running(run: Path, since: float = 0.0) -> str:
    now = time.time() - since
    rewrite(run, lambda r: r | {"time": now} if r["step"] <= 250 else None)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 251, "loss": 1.')
    for step in (300, 400):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08}")
    return "running"


def killed(run: Path) -> str:
    running(run, since=3600)
    return "stopped"


def resumed(run: Path) -> str:
    write_checkpoint(run, 300, {"tensor": 2, "pipeline": 1, "data": 1, "zero_stage": 1})
    return "resumed from step 200 as tensor 2 × pipeline 1 × data 1, ZeRO 1"


def with_nulls(run: Path) -> str:
    rewrite(run, lambda r: {k: v if r["step"] % 3 or k == "step" else None for k, v in r.items()})
    return "the loss of 133 logged steps was not finite"


def all_nulls(run: Path) -> str:
    rewrite(run, lambda r: {k: v if k == "step" else None for k, v in r.items()})
    return "the loss of 400 logged steps was not finite"


def with_invalid_records(run: Path) -> str:
    (run / "metrics.jsonl").write_text('[1]\n"x"\n{"loss": 2}\n{"step": "a", "loss": 1}\n\xff\n')
    return "no logged step"


def one_step(run: Path) -> str:
    rewrite(run, lambda r: r if r["step"] == 1 else None)
    return "no validation"


def not_started(run: Path) -> str:
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "checkpoints")
    return "not started"


def with_incomplete_checkpoint(run: Path) -> str:
    (run / "checkpoints" / "step-00000400" / "rank-00000.safetensors").write_bytes(b"")
    return "incomplete checkpoints: step-00000400"


def of_another_version(run: Path) -> str:
    (run / "config.json").write_text('{"model": {"kind": "other"}, "data": 3, "training": []}')
    return "the model section is from another version"


def with_markup(run: Path) -> str:
    tree = json.loads((run / "config.json").read_text())
    tree["notes"] = "</script><b>&amp;"
    (run / "config.json").write_text(json.dumps(tree))
    return "</script><b>&amp;"


@pytest.mark.parametrize(
    "alter",
    [without_validation, running, killed, resumed, with_nulls, all_nulls, with_invalid_records,
     one_step, not_started, with_incomplete_checkpoint, of_another_version, with_markup],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_every_run_gives_a_page(
    report: Callable[..., Page], tmp_path: Path, alter: Callable[[Path], str]
) -> None:
    run = write_run(tmp_path / "altered")
    expected = alter(run)
    assert expected in report(run).text
    assert expected in report(write_run(tmp_path / "plain"), run).text


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda run: None, "is not a run folder: it has no config.json"),
        (lambda run: run.mkdir(), "is not a run folder: it has no config.json"),
        (lambda run: write_run(run) and (run / "config.json").write_text("{"), "not JSON at line"),
    ],
)
def test_folder_that_is_not_a_run_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], prepare: Callable[[Path], Any], message: str
) -> None:
    run = tmp_path / "nothing"
    prepare(run)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(run) in error and error.count("\n") == 1


def test_unwritable_output_is_reported_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hg_scale.evaluation.report import page

    run = write_run(tmp_path / "alpha")
    arguments = [
        "report",
        str(run),
        "--sample",
        "0",
        "--output",
        str(tmp_path / "no" / "page.html"),
    ]
    monkeypatch.setattr(page, "render", lambda report: pytest.fail("rendered first"))
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_trained_run_has_baselines_and_a_sample(
    worlds: Worlds, config: Path, corpus: Path, report: Callable[..., Page], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train_in(worlds, 1, tmp_path, "--config", str(config), "--run", str(run)).code == 0
    page = report(run, "--sample", "40")
    text = split_text(read_index(str(corpus)), "validation", 8 * 32)  # 8 windows are scored
    assert f"gzip -9 {8 * len(gzip.compress(text, 9)) / len(text):.3f}" in page.text
    assert "40 tokens without a prompt" in page.text
    assert "6 of 6" in page.text and "no sample" not in page.text
    # Without its corpus it still generates: the manifest names a tokenizer that needs no file.
    checkpoint = find_latest(run / "checkpoints")
    assert checkpoint
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["config"]["data"]["path"] = str(tmp_path / "gone")
    (checkpoint / "manifest.json").write_text(json.dumps(seal(manifest)))
    assert "40 tokens without a prompt" in report(run, "--sample", "40").text


def test_export_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "is an export, not a run folder" in error and error.count("\n") == 1


def scored_on(run: Path, tokens: int) -> None:
    """Set the number of tokens that the validations scored."""
    known = "validation_tokens"
    rewrite(run, lambda record: record | ({known: tokens} if known in record else {}))


def test_compressors_get_the_text_that_a_run_was_scored_on(
    report: Callable[..., Page], corpus: Path, tmp_path: Path
) -> None:
    """Runs that were scored on different amounts of the split are ranked separately."""
    index = read_index(str(corpus))
    all_tokens = index.split("validation").tokens
    paths = [write_run(tmp_path / name, change={"data": {"path": str(corpus)}}) for name in "abc"]
    for path_, tokens in zip(paths, (300, all_tokens, 300), strict=True):
        scored_on(path_, tokens)
    runs = read_runs(paths)
    baselines, reasons = find_baselines(runs, lambda step: None)
    assert not reasons and len(baselines) == 6
    bars = score_bars(runs, baselines)
    assert [sorted(b.label for b in part if b.run is not None) for part in bars.values()] == [
        ["a", "c"], ["b"],
    ]  # fmt: skip
    for part, tokens in zip(bars.values(), (300, all_tokens), strict=True):
        (bar,) = (bar for bar in part if bar.label == "gzip -9")
        text = split_text(index, "validation", tokens)
        assert bar.value == 8 * len(gzip.compress(text, 9)) / len(text)
        assert bar.scored == f"{len(text):,} bytes"
    page = report(*paths)
    assert "shards, 300 tokens" in page.text and f"shards, {all_tokens:,} tokens" in page.text


def test_mean_over_sources_has_no_compressors(
    report: Callable[..., Page], corpus: Path, tmp_path: Path
) -> None:
    sources = [{"path": str(corpus)}, {"path": str(corpus), "name": "again"}]
    page = report(write_run(tmp_path / "run", change={"data": {"path": None, "sources": sources}}))
    assert "the validation is a mean over several sources" in page.text


def test_run_on_images_has_baselines(report: Callable[..., Page], tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 4, (60, 8, 2), np.uint8)
    source, shards = tmp_path / "images.npy", tmp_path / "shards"
    np.save(source, images)
    pictures = ImageCorpus((source,), fractions=(0.5, 0.5, 0.0))
    prepare(Job(pictures, (source,), shards, chunk_tokens=300, shard_tokens=900), ProgressBar())
    run = write_run(tmp_path / "run", change={"data": {"path": str(shards)}})
    scored_on(run, 240)
    page = report(run)
    assert "gzip -9" in page.text and "No compressors" not in page.text


def test_x_values_on_every_axis(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "alpha")])
    x = x_values(run)
    assert x["tokens"][-1] == 128 * STEPS and x["steps"][-1] == STEPS
    assert x["hours"][-1] == pytest.approx(STEPS * 0.5 / 3600)
    assert x["compute"][-1] == pytest.approx(128 * STEPS * run.flops_per_token)
    validations = validation_x_values(run)
    assert validations["tokens"].tolist() == [12_800, 25_600, 38_400, 51_200]
    assert run.column("bits_per_byte")[7] == step_record(8)["bits_per_byte"]


def test_hours_of_a_branch_start_at_its_first_interval(tmp_path: Path) -> None:
    run = write_run(tmp_path / "branch")
    rewrite(run, lambda r: r if r["step"] > 200 and r["step"] % 10 == 0 else None)
    (read,) = read_runs([run])
    assert x_values(read)["hours"][-1] == pytest.approx(200 * 0.5 / 3600)


def test_smoothing_keeps_constants_gaps_and_the_first_value() -> None:
    values = np.array([5.0, *[2.0] * 30])
    values[10] = np.nan
    smoothed = smooth(values, 6)
    assert smoothed[0] == 5 and np.isnan(smoothed[10])
    assert smoothed[4:10].tolist() == [2.0] * 6 and smoothed[-1] == 2
    assert smooth(np.arange(9.0), 4).tolist()[2:7] == [2, 3, 4, 5, 6]


def test_thinning_keeps_spikes_gaps_and_means() -> None:
    x = np.arange(10_000.0)
    y = np.sin(x / 500)
    y[1234], y[5000:5200] = 40, np.nan
    thin_x, thin_y = extremes(x, y)
    assert len(thin_x) <= 3 * POINTS and thin_y[thin_x.tolist().index(1234)] == 40
    assert np.isnan(thin_y).any() and (np.diff(thin_x) > 0).all()
    mean_x, mean_y = means(x, np.ones_like(x))
    assert len(mean_x) == POINTS and (mean_y == 1).all() and mean_x[-1] == 9999
    assert extremes(x[:200], y[:200])[0].tolist() == x[:200].tolist()


def test_path_connects_the_points_and_breaks_at_gaps() -> None:
    x, y = np.array([0, 0.5, 0.6, 1]), np.array([1, 0.25, np.nan, 0])
    assert path(x, y) == "M0 1000h0l500 -750M1000 0h0"
    assert path(np.array([np.nan]), np.array([1.0])) == ""


def test_y_axis_cuts_off_the_steep_start_only(tmp_path: Path) -> None:
    run = write_run(tmp_path / "alpha")
    chart = make_charts(read_runs([run]), [])[0]
    top = max(float(label) for _, label in chart.plots[0].y_ticks)
    assert top < step_record(1)["bits_per_byte"] / 2
    rewrite(run, lambda r: r | {"loss": 9.0, "bits_per_byte": 9.0} if r["step"] > 350 else r)
    chart = make_charts(read_runs([run]), [])[0]
    assert max(float(label) for _, label in chart.plots[0].y_ticks) >= 8


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12).filter(lambda w: w > 0), st.integers(2, 10))
def test_ticks_are_few_evenly_spaced_and_in_range(low: float, wide: float, count: int) -> None:
    high = low + wide
    if not high > low or wide < 1e-9 * abs(low):
        return
    found = ticks(low, high, count)
    slack = 1e-6 * wide
    assert len(found) <= count + 2
    assert all(low - slack <= tick <= high + slack for tick in found)
    if len(found) > 2:
        spacing = np.diff(found)
        assert np.allclose(spacing, spacing[0], rtol=1e-3)


@given(st.floats(1e-6, 1e18), st.integers(3, 8))
def test_tick_labels_are_distinct(high: float, count: int) -> None:
    labels = tick_labels(ticks(0, high, count))
    assert len(set(labels)) == len(labels)


def test_tick_label_units() -> None:
    assert tick_labels([0, 5e5, 1e6]) == ["0", "0.5M", "1.0M"]
    assert tick_labels([0, 0.001, 0.002]) == ["0", "1e-3", "2e-3"]


def test_short_names_are_the_shortest_distinct_suffixes() -> None:
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/z")]
    assert short_names(paths) == ["x/run", "y/run", "z"]


@pytest.mark.parametrize(
    "preset", ["hg_1b", "hg_7b_bytes", "quickstart", "paper/table1_2x1_1x2_4x4_1x2_2x1"]
)
def test_drawing_and_table_add_up_to_the_model(preset: str) -> None:
    model = load_config(ROOT / "configs" / f"{preset}.json").model
    rows, drawing = layer_table(model), draw_hierarchy(model)
    assert sum(row.flops for row in rows) == forward_flops(model)
    assert sum(row.parameters for row in rows) == sum(c.parameters for c in layer_costs(model))
    assert sum(len(stack.bars) for stack in drawing.stacks) == model.parsed.blocks
    assert len(drawing.skips) == len(model.parsed.shortenings) == len(drawing.funnels) // 2
    tallest = max(stack.height for stack in drawing.stacks)
    for stack in drawing.stacks:
        share = int(stack.positions.replace(",", "")) / model.sequence_length
        assert stack.height == pytest.approx(max(5, tallest * share), abs=0.01)
    lefts = [bar.x for stack in drawing.stacks for bar in stack.bars]
    assert lefts == sorted(lefts) and drawing.width < 480
