"""TRL's SFT trainer for sequences that several rows share."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer


class PackedTrainer(SFTTrainer):
    """Counts tokens: without an attention mask TRL takes the width of a micro-batch for their number."""

    _total_train_tokens: int

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        before, tokens = self._total_train_tokens, inputs["input_ids"] != self.processing_class.pad_token_id
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self._total_train_tokens = before + int(self.accelerator.gather(tokens.sum()).sum())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss
