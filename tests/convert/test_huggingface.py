"""Hugging Face folders: transformers loads them without hg_scale and computes equal logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hg_scale.config.load import parse_config
from hg_scale.convert.bundle import bundle
from hg_scale.convert.huggingface import to_huggingface
from hg_scale.convert.open import open_source
from hg_scale.convert.to_checkpoint import to_checkpoint
from hg_scale.data.progress import ProgressBar
from hg_scale.model.hourglass import Hourglass
from tests.convert.test_export import assert_bit_equal, full_tensors
from tests.convert.trained import TrainedCheckpoint
from tests.training.models import random_batch

Get = Callable[[str], TrainedCheckpoint]

CODE = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, output_loading_info=True)
batch = torch.load(sys.argv[2])
with torch.no_grad():
    out = model(batch, labels=batch)
    written = model.generate(batch[:, :5], max_new_tokens=3, do_sample=False)
    refused = ""
    try:
        mask = torch.ones_like(batch); mask[0, 0] = 0
        model(batch, attention_mask=mask)
    except ValueError as error:
        refused = str(error)
model.save_pretrained(sys.argv[3])
fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
drawn = float(fresh.get_input_embeddings().weight.abs().max()) > 0
missing = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
torch.save((out.logits, float(out.loss), written, missing, refused, drawn,
            sorted(m for m in sys.modules if m.split(".")[0] in ("hg_scale", "pydantic_core"))),
           sys.argv[4])
"""


def test_bundle_imports_neither_hg_scale_nor_pydantic() -> None:
    text = bundle("1.2.3")
    assert "hg_scale 1.2.3" in text
    assert "import hg_scale" not in text and "from hg_scale" not in text
    assert "pydantic" not in text
    compile(text, "modeling_hg_scale.py", "exec")


@pytest.mark.parametrize("kind", ["tp2pp2", "zero3"])
def test_transformers_computes_equal_logits(trained: Get, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers")
    folder, saved, batch = tmp_path / "hf", tmp_path / "saved", tmp_path / "batch.pt"
    source = open_source(trained(kind).path)
    assert to_huggingface(source, folder, shard_bytes=150_000, report=ProgressBar()) == 0
    config = parse_config(trained(kind).tree)
    ids = random_batch(config, 7)[:, :-1]
    torch.save(ids, batch)
    # Isolated and outside the repository: the folder must suffice.
    done = subprocess.run(
        [sys.executable, "-I", "-c", CODE, *map(str, (folder, batch, saved, tmp_path / "out.pt"))],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits, loss, generated, missing, refused, drawn, imported = torch.load(tmp_path / "out.pt")
    assert (missing, imported) == ([], [])
    assert drawn  # a model from the configuration alone has initial weights
    model = Hourglass(config.model, seed=None).eval()
    model.load_state_dict(full_tensors(trained(kind).path))
    with torch.no_grad():
        expected = model(ids)[..., : config.model.vocab_size]
        text = ids[:, :5]
        for _ in range(3):
            text = torch.cat([text, model(text)[:, -1].argmax(-1, keepdim=True)], 1)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5
    losses = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss == pytest.approx(float(losses), rel=1e-5)
    assert torch.equal(generated, text)
    assert "padding on the left is not supported" in refused
    for path in (folder, saved):  # what `save_pretrained` wrote can be imported as well
        back = tmp_path / f"back-{path.name}"
        to_checkpoint(open_source(path), back, report=ProgressBar())
        assert_bit_equal(full_tensors(back), full_tensors(trained(kind).path))


def test_config_has_the_keys_of_transformers(trained: Get, tmp_path: Path) -> None:
    source = open_source(trained("zero3").path)
    to_huggingface(source, tmp_path / "hf", dtype="bf16", report=ProgressBar())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 61
    assert config["dtype"] == "bfloat16"
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_hg_scale.HourglassForCausalLM"
    assert "AutoModelForCausalLM" in (tmp_path / "hf" / "README.md").read_text()
