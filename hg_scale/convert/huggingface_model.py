"""The plain model behind transformers' interface. Only ever run inside a bundle (`bundle.py`)."""

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
    """`model`: the section of that name, all keys given."""

    model_type = "hg_scale"

    def __init__(self, model: dict[str, Any] | None = None, **others: Any) -> None:
        self.model = model or {}
        super().__init__(**others)


class HourglassForCausalLM(PreTrainedModel, GenerationMixin):
    """Token ids in, logits of the next token out. No cache: `generate` runs the whole text again.

    Padding on the left is refused; on the right it changes nothing before it.
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
        """`Hourglass` has drawn them, or they come from the folder."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.get_submodule("embedding.table")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **others: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": others.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """input_ids (B, L) -> logits (B, L, vocab_size); labels as input_ids, -100 not scored."""
        if attention_mask is not None:
            gaps = attention_mask[:, 1:] > attention_mask[:, :-1]
            if bool(gaps.any()):
                raise ValueError("attention_mask: padding on the left is not supported")
        logits = self.model(input_ids)[..., : self.config.vocab_size]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
