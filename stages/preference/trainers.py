"""TRL's DPO and KTO trainers over rows that are encoded and whose reference log-probabilities are known.

Their `__init__` is left out: it tokenises, copies the policy's adapter as a reference beside it (which for PiSSA changes the
base below both) and hashes all weights on every rank. What it sets is set here; losses, metrics and collators are TRL's.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from pipeline.config.preference import Dpo
from stages.preference.loss import Pairs, reference_free

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")
"""What TRL's fused output head computes of each token."""


def prepare(model: Any, arguments: Any) -> None:
    """Give `model` TRL's fused output head, and what its trainers do to a policy besides; once."""
    peft = isinstance(model, PeftModel)
    if peft and arguments.gradient_checkpointing:
        model.enable_input_require_grads()
    if arguments.disable_dropout:
        disable_dropout_in_model(model)
    add_fused_lm_head(model.get_base_model() if peft else model, outputs=OUTPUTS)


class PairTrainer(DPOTrainer):
    """DPO and its kin, on `Rows` with `ref_chosen_logps` and `ref_rejected_logps`."""

    def __init__(self, args: DPOConfig, **given: Any) -> None:
        super(DPOTrainer, self).__init__(args=args, **given)
        _as_trl(self)
        self.loss_types, self.loss_weights = args.loss_type, args.loss_weights or [1.0] * len(args.loss_type)
        self.label_smoothing, self.ld_alpha, self.use_weighting = args.label_smoothing, None, False
        self.f_divergence_type, self.f_alpha_divergence_coef = "reverse_kl", args.f_alpha_divergence_coef
        self.padding_free = False


class ReferenceFreeTrainer(PairTrainer):
    """The losses of `stages.preference.loss`, on `Rows` without a reference."""

    def __init__(self, args: DPOConfig, block: Dpo, **given: Any) -> None:
        super().__init__(args, **given)
        self.block = block

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"]
        said = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(mask == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        sums = said.log_probs[:, -(mask.shape[1] - 1) :].float().sum(1)
        pairs = Pairs(*sums.chunk(2), *mask.sum(1).chunk(2))
        judged = reference_free(self.block.loss, pairs, self.block)
        means = pairs.per_token()
        self._note(
            {
                "rewards/chosen": judged.chosen,
                "rewards/rejected": judged.rejected,
                "rewards/accuracies": (judged.chosen > judged.rejected).float(),
                "rewards/margins": judged.chosen - judged.rejected,
                "logps/chosen": pairs.chosen.detach(),
                "logps/rejected": pairs.rejected.detach(),
                "nll_loss": -means[0].detach(),
            },
            inputs["attention_mask"].sum(),
        )
        loss = judged.losses.mean()
        return (loss, said) if return_outputs else loss

    def _note(self, values: dict[str, Tensor], tokens: Tensor) -> None:
        """Keep the means over all ranks' pairs until the next log, under TRL's names."""
        mode = "train" if self.model.training else "eval"
        names, here = list(values), torch.stack([value.float().mean() for value in values.values()])
        everywhere = self.accelerator.gather(here.unsqueeze(0)).mean(0).tolist()
        for name, value in zip(names, everywhere, strict=True):
            self._metrics[mode][name].append(value)
        if mode == "train":
            self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


class ReplyTrainer(KTOTrainer):
    """KTO, on `Rows` with `KL_completion_ids`, `ref_logps` and `ref_KL_logps` (the first two for its KL term alone)."""

    def __init__(self, args: KTOConfig, **given: Any) -> None:
        super(KTOTrainer, self).__init__(args=args, **given)
        _as_trl(self)
        self.loss_type, self.calculate_KL = args.loss_type, args.loss_type != "apo_zero_unpaired"
        self.desirable_weight, self.undesirable_weight = args.desirable_weight, args.undesirable_weight


def _as_trl(trainer: Any) -> None:
    """What both of TRL's trainers set."""
    text, args = trainer.model.config.get_text_config(), trainer.args
    trainer._tokenizer, trainer._is_vlm, trainer._is_vision_dataset = trainer.processing_class, False, False
    trainer.beta, trainer.precompute_ref_logps, trainer.ref_model = args.beta, True, None
    trainer._precompute_engine = trainer._precompute_model_hash = None
    trainer.maybe_activation_offload_context = nullcontext()
    trainer.router_aux_loss_coef = getattr(text, "router_aux_loss_coef", 0.0)
    trainer.aux_loss_enabled = hasattr(text, "output_router_logits") and trainer.router_aux_loss_coef != 0.0
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
