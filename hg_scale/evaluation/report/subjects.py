"""What the charts are about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ChartSubject:
    """What a chart shows: a figure of `metrics.jsonl` times `factor`, in `unit`.

    `dashed`: a second figure of the same unit. `validation`: the figure of validations beside it.
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


BITS = ChartSubject(
    "bits_per_byte", "Bits per byte", "less is better",
    "Training: every logged step faint, their moving average strong. Dots: validation.",
    from_zero=False, validation="validation_bits_per_byte",
)  # fmt: skip
LOSS = ChartSubject(
    "loss", "Loss", "nats a token",
    "Training: every logged step faint, their moving average strong. Dots: validation.",
    from_zero=False, validation="validation_loss",
)  # fmt: skip
REST = (
    ChartSubject("tokens_per_second", "Throughput", "tokens a second",
            "All processes together, without validation and saving."),
    ChartSubject("mfu", "Model FLOPs utilisation", "% of the peak",
            "The model's own FLOPs a second, recomputation not counted, over the devices' peak.",
            factor=100),
    ChartSubject("data_seconds", "Waiting for data", "ms a step",
            "The mean over the steps since the last logged one.", factor=1000,
            dashed="data_wait_p99", about_dashed="Dashed: the 99th percentile of a step."),
    ChartSubject("memory_gib", "Memory", "GiB",
            "Of the first process: GPU memory, or all of it on a CPU.", noisy=False,
            dashed="peak_memory_gib", about_dashed="Dashed: the peak so far."),
    ChartSubject("learning_rate", "Learning rate", "", "Of the outermost level.", noisy=False),
    ChartSubject("grad_norm", "Gradient norm", "",
            "Before clipping. Every logged step faint, the moving average strong."),
)  # fmt: skip
