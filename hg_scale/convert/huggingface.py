"""Hugging Face folders: an export with the plain model as `trust_remote_code` modelling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hg_scale import __version__
from hg_scale.checkpoint.jobs import ProgressReporter
from hg_scale.convert.bundle import bundle
from hg_scale.convert.export import SHARD_BYTES, ExportStyle, export
from hg_scale.convert.source import WeightSource
from hg_scale.data.tokenizer import Tokenizer

MODULE = "modeling_hg_scale"
_TORCH_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def to_huggingface(
    source: WeightSource,
    out: Path,
    *,
    dtype: str = "fp32",
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Tokenizer | None = None,
    report: ProgressReporter,
) -> float:
    """Write the new folder `out`; arguments, result and errors as of `export`."""
    identity = tokenizer.identity.model_dump() if tokenizer else source.tokenizer
    end = identity["eod"] if identity else None
    config: dict[str, Any] = {
        "architectures": ["HourglassForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.HourglassConfig",
            "AutoModelForCausalLM": f"{MODULE}.HourglassForCausalLM",
        },
        "model_type": "hg_scale",
        "vocab_size": source.model.vocab_size,
        "bos_token_id": end,  # a document starts after the end of another
        "eos_token_id": end,
        "dtype": _TORCH_DTYPES[dtype],
        "torch_dtype": _TORCH_DTYPES[dtype],  # its name before transformers 4.56
        "use_cache": False,
    }
    return export(
        source,
        out,
        dtype=dtype,
        workers=workers,
        shard_bytes=shard_bytes,
        tokenizer=tokenizer,
        style=ExportStyle("model.", config, {f"{MODULE}.py": bundle(__version__)}),
        report=report,
    )
