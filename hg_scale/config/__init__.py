"""The configuration: one schema of `configs/*.json` and its checks. Imports no torch."""

from hg_scale.config.errors import ConfigError, Problem
from hg_scale.config.load import load_config, parse_config
from hg_scale.config.schema import Config, ModelConfig

__all__ = ["Config", "ConfigError", "ModelConfig", "Problem", "load_config", "parse_config"]
