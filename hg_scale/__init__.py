"""Train hierarchical (Hourglass) Transformer language models, from a laptop to a cluster."""

__version__ = "0.2.0"
