"""Which metrics the charts show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChartSpec:
    """What a chart shows: the metric `key` of `metrics.jsonl` times `factor`, in `unit`.

    `dashed`: a second metric in the same unit. `validation`: the matching validation metric.
    `noisy` metrics are drawn faint, with their moving average on top.
    """

    key: str
    title: str
    unit: str
    about: str
    factor: float = 1.0
    from_zero: bool = True
    noisy: bool = True
    dashed: str | None = None
    about_dashed: str = ""
    validation: str | None = None


BITS = ChartSpec(
    "bits_per_byte", "Bits per byte", "less is better",
    "Training: every logged step faint, the moving average strong. Dots: validation.",
    from_zero=False, validation="validation_bits_per_byte",
)  # fmt: skip
LOSS = ChartSpec(
    "loss", "Loss", "nats per token",
    "Training: every logged step faint, the moving average strong. Dots: validation.",
    from_zero=False, validation="validation_loss",
)  # fmt: skip
OTHER_SPECS = (
    ChartSpec("tokens_per_second", "Throughput", "tokens per second",
              "All processes together, without validation and saving."),
    ChartSpec("mfu", "Model FLOPs utilisation", "% of peak",
              "The model's own FLOPs per second, without recomputation, over the devices' peak.",
              factor=100),
    ChartSpec("data_seconds", "Waiting for data", "ms per step",
              "Mean over the steps since the last logged one.", factor=1000,
              dashed="data_wait_p99", about_dashed="Dashed: the 99th percentile of a step."),
    ChartSpec("memory_gib", "Memory", "GiB",
              "Of rank 0: GPU memory, or on a CPU the memory of the process.", noisy=False,
              dashed="peak_memory_gib", about_dashed="Dashed: the peak so far."),
    ChartSpec("learning_rate", "Learning rate", "", "Of the outermost level.", noisy=False),
    ChartSpec("grad_norm", "Gradient norm", "",
              "Before clipping. Every logged step faint, the moving average strong."),
)  # fmt: skip
