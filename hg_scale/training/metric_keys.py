"""Every key of `metrics.jsonl`; `python -m hg_scale.training.metric_keys` writes docs/metrics.md.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DOCS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@dataclass(frozen=True)
class MetricKey:
    """A key of a record: its unit ("" for plain numbers and text) and its meaning."""

    name: str
    unit: str
    meaning: str


ALWAYS = (
    MetricKey("step", "steps", "The last optimizer step of the line, counted from 1."),
    MetricKey("time", "s", "When the line was written, in seconds since 1970."),
    MetricKey("start", "", "Number of this start of the run, from 1: a line of `starts.jsonl`."),
    MetricKey("job", "", "The Slurm job, as 7 or 7_2 of an array; null without one."),
)
STEP = (
    MetricKey("loss", "nats per token", "Mean loss of this step over the global batch."),
    MetricKey("bits_per_byte", "bits per byte", "The same per byte of the training text."),
    MetricKey("grad_norm", "", "Norm of all gradients of this step before clipping."),
    MetricKey("learning_rate", "", "Learning rate of the outermost level in this step."),
    MetricKey("tokens", "tokens", "Position in the data: tokens trained on since the first step."),
    MetricKey("epoch", "epochs", "Epochs of the source that is least far."),
    MetricKey("epochs", "epochs", "Epochs of each source, by its name."),
    MetricKey("step_seconds", "s per step", "Wall time, without validations and checkpoints."),
    MetricKey("data_seconds", "s per step", "Part of it in which rank 0 waits for data."),
    MetricKey("compute_seconds", "s per step", "Part of it in forward, backward and optimizer."),
    MetricKey("rest_seconds", "s per step", "The rest of it: logging and the loop itself."),
    MetricKey("tokens_per_second", "tokens per s", "Of all ranks together, over `step_seconds`."),
    MetricKey("data_wait_p50", "s", "Median wait of a step for data, on `data_wait_rank`."),
    MetricKey("data_wait_p99", "s", "99th percentile of that wait."),
    MetricKey("data_wait_rank", "rank", "The rank with the longest 99th percentile."),
    MetricKey("slowest_rank", "rank", "The rank with the largest `slowest_ratio`; not with one."),
    MetricKey("slowest_ratio", "x median", "Its own time over the median of its pipeline stage."),
    MetricKey("flops_per_second", "FLOP/s", "Model FLOPs of all ranks, without recomputation."),
    MetricKey("mfu", "fraction", "`flops_per_second` over the peak of all devices together."),
    MetricKey("skipped_steps", "steps", "Bad steps of the run so far, which were skipped."),
    MetricKey("skipped_windows", "sequences", "Sequences of the run that could not be read."),
    MetricKey("memory_gib", "GiB", "Memory of rank 0: allocated on its GPU, else resident."),
    MetricKey("peak_memory_gib", "GiB", "Its maximum since the start."),
)
GPU = (
    MetricKey("gpu_utilisation", "fraction", "Time in which kernels run, sampled by the driver."),
    MetricKey("gpu_power_watts", "W", "Power draw."),
    MetricKey("gpu_temperature", "degrees Celsius", "Temperature."),
)
NORMS = (
    MetricKey("weight_norm_by_level", "", "Norm of the fp32 weights after this step."),
    MetricKey("update_norm_by_level", "", "Norm of the change of the fp32 weights by this step."),
)
VALIDATION = (
    MetricKey("validation_loss", "nats per token", "Mean loss, every token scored once."),
    MetricKey("validation_bits_per_byte", "bits per byte", "The same per byte of the text."),
    MetricKey("validation_tokens", "tokens", "Tokens that were scored."),
    MetricKey("validation_loss_by_source", "nats per token", "By source, if there are several."),
    MetricKey("validation_seconds", "s", "Wall time of the validation."),
)
SKIPPED = (
    MetricKey("skipped", "", "Why the optimizer skipped this step."),
    MetricKey("skipped_loss", "nats per token", "Its loss; null where it is not finite."),
    MetricKey("skipped_steps", "steps", "Skipped steps of the run so far."),
)
SECTIONS = (
    ("Every line", "", ALWAYS),
    (
        "A logged step",
        "Every `logging.every` steps. Rates and seconds are means since the last logged step.",
        STEP,
    ),
    (
        "The GPU of rank 0",
        "In logged steps, where the package nvidia-ml-py finds the driver's library.",
        GPU,
    ),
    (
        "Norms",
        "In logged steps that are a multiple of `logging.norms_every`: a list by level, outermost "
        "first. Embedding, head, pooling and upsampling belong to the level they are listed in by "
        "`--dry-run`. The numbers are the same in every layout.",
        NORMS,
    ),
    ("A validation", "", VALIDATION),
    ("A skipped step", "See [bad_steps.md](bad_steps.md).", SKIPPED),
)
KNOWN_KEYS = frozenset(key.name for _, _, keys in SECTIONS for key in keys)

_HEADER = """# metrics.jsonl

`RUN/metrics.jsonl` has one JSON object per line: for each logged step, validation and skipped \
step. This page is generated from `hg_scale/training/metric_keys.py` by `make docs`.

```
{"step": 120, "loss": 1.4313, "bits_per_byte": 2.0649, ..., "job": "4711", "start": 2, \
"time": 1796082880.3}
```

- A logged step is a line with `loss`, a validation one with `validation_loss`, a skipped step one \
with `skipped`.
- Numbers that are not finite are null. Readers should ignore keys that they do not know.
- A start that resumes drops the lines after its checkpoint, so every step is there once. \
`starts.jsonl` keeps what was dropped: `step`, from which the start resumed, and `last_step` and \
`last_time` of the last line before it.
"""


def metrics_page() -> str:
    """Return `docs/metrics.md`."""
    parts = [_HEADER]
    for title, about, keys in SECTIONS:
        rows = [f"| `{key.name}` | {key.unit} | {key.meaning} |" for key in keys]
        head = [f"## {title}", "", *([about, ""] if about else [])]
        table = ["| key | unit | meaning |", "| - | - | - |", *rows]
        parts.append("\n".join(head + table) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    DOCS_PAGE.write_text(metrics_page(), encoding="utf-8")
