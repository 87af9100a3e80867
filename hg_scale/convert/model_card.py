"""The model card (README.md) of an export."""

from __future__ import annotations

from typing import Any

from hg_scale.convert.source import WeightSource

_PLAIN = """\
```python
import json, torch
from pathlib import Path
from safetensors.torch import load_file

folder = Path(".")
index = folder / "model.safetensors.index.json"
files = {{"model.safetensors"}}
if index.exists():
    files = set(json.loads(index.read_text())["weight_map"].values())
weights = {{name: tensor for file in files for name, tensor in load_file(folder / file).items()}}
print(weights["{example}"].shape)
```
"""

_PACKAGE = """\
```python
from pathlib import Path
from hg_scale.convert.export import load_export

model = load_export(Path("."))  # logits = model(ids)
```
"""

_TRANSFORMERS = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
```

`modeling_hg_scale.py` is the plain model of hg_scale in one file. It needs torch and transformers only. There is no KV cache, and no padding on the left: an `attention_mask` that begins with zeros is refused.
"""  # noqa: E501

_NAMES = """\
| name | contents |
| --- | --- |
| `embedding.table.weight` | (vocabulary, d) |
| `pre.I.*`, `post.I.*`, `level*.stack.I.*` and so on | block I of a stack; the hierarchy in `config.json` determines which exist |
| `*.attention.qkv.weight` | queries, keys and values, rows ordered (head, q k v, d_head); `kv` is (head, k v, d_head) |
| `*.attention.pos.weight`, `*.position_bias.u`, `.v` | Transformer-XL's relative positions |
| `*.ff.up.weight` | with SwiGLU, gate and up alternate: (gcd(d_ff, 64) chunks, gate up, rows) |
| `levelN.shorten.*`, `levelN.upsample.*` | the layers between level N and the next inner level |
| `head.linear.weight` | (vocabulary, d) |

Linear weights are (out, in).
"""  # noqa: E501


def model_card(title: str, config: dict[str, Any], source: WeightSource, transformers: bool) -> str:
    """Return the card as Markdown.

    config: the export's config.json; transformers: whether it is a Hugging Face folder.
    """
    model = source.model
    tokenizer = config["tokenizer"]
    rows = {
        "hierarchy": f"`{model.hierarchy}`",
        "parameters": f"{source.parameters:,}",
        "trained for": f"{source.step:,} steps",
        "sequence length in training": f"{model.sequence_length:,} tokens",
        "vocabulary": f"{model.vocab_size:,} ids",
        "tokenizer": "unknown" if tokenizer is None else _tokenizer(tokenizer),
        "precision of the weights": config["precision"],
        "made from": f"{config['source']['kind']} `{config['source']['name']}`",
    }
    prefix = "model." if transformers else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    parts = [
        f"---\nlibrary_name: {'transformers' if transformers else 'hg_scale'}\n"
        "pipeline_tag: text-generation\n---\n",
        f"# {title}\n",
        "A hierarchical (Hourglass) Transformer language model, trained with hg_scale.\n",
        f"| | |\n| --- | --- |\n{table}\n",
    ]
    if model.padded_vocab > model.vocab_size:
        parts.append(
            f"Embedding and head have {model.padded_vocab:,} rows, of which those after the first "
            f"{model.vocab_size:,} are padding: no such id occurs, and their logits are masked.\n"
        )
    parts.append(
        "The logits at position t predict the token after input t. A document begins with "
        + ("id 0" if not tokenizer or tokenizer["eod"] is None else f"id {tokenizer['eod']}")
        + ".\n"
    )
    if transformers:
        parts += ["## With transformers\n", _TRANSFORMERS]
    parts += [
        "## With hg_scale\n",
        _PACKAGE,
        "## With torch and safetensors alone\n",
        _PLAIN.format(example=f"{prefix}embedding.table.weight"),
        "## Names\n",
        _NAMES if not prefix else _NAMES + "\nAll names begin with `model.`.\n",
    ]
    return "\n".join(parts)


def _tokenizer(identity: dict[str, Any]) -> str:
    checksum = f", sha256 `{identity['sha256'][:12]}`" if identity.get("sha256") else ""
    end = "" if identity["eod"] is None else f", id {identity['eod']} ends a document"
    return f"{identity['name']}{end}{checksum}"
