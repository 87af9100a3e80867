"""Train hierarchical (Hourglass) Transformer language models, from a laptop to a cluster.

The public API (docs/api.md) is imported on first use, so that `import hg_scale` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hg_scale.config import ModelConfig, load_config
    from hg_scale.evaluation.loaded_model import load
    from hg_scale.model.hourglass import Hourglass

__version__ = "0.2.0"

__all__ = ["Hourglass", "ModelConfig", "__version__", "load", "load_config"]

_MODULES = {
    "Hourglass": "hg_scale.model.hourglass",
    "ModelConfig": "hg_scale.config",
    "load": "hg_scale.evaluation.loaded_model",
    "load_config": "hg_scale.config",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562) and keep it in this module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
