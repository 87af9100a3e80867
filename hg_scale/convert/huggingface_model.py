"""The plain model with transformers' interface; runs only as part of a bundle (`bundle.py`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hg_scale.config.schema import ModelConfig
from hg_scale.model.hourglass import Hourglass


class HourglassConfig(PretrainedConfig):
    """`model`: the model section of hg_scale's configuration, with all keys."""

    model_type = "hg_scale"

    def __init__(self, model: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.model = model or {}
        super().__init__(**kwargs)


class HourglassForCausalLM(PreTrainedModel, GenerationMixin):
    """The Hourglass as a causal language model: token ids to logits of the next token.

    There is no KV cache: `generate` runs the complete text for each token. Padding on the left is
    refused; padding on the right does not affect earlier positions.
    """

    config_class = HourglassConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__(config)
        # Draws initial weights, but not under `from_pretrained`, which builds on the meta device.
        self.model = Hourglass(ModelConfig(**config.model))
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: the model draws its initial weights itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_submodule("embedding.table")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Map input_ids (B, L) to logits (B, L, vocab_size), and labels to the mean loss.

        labels (B, L): the input_ids themselves (they are shifted here); -100 is ignored.
        """
        if attention_mask is not None:
            padded_left = attention_mask[:, 1:] > attention_mask[:, :-1]
            if bool(padded_left.any()):
                raise ValueError("attention_mask: padding on the left is not supported")
        logits = self.model(input_ids)[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
