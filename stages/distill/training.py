"""TRL's trainer with another loss, replies of the student's own, and a held-out part that is measured token by token."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from pipeline.data.encode import prompt_length
from pipeline.generation.rollout import Rollout, keys
from stages.distill.pair import MEASURES, Pair, through

Batch = dict[str, Tensor]


class Distillation(SFTTrainer):
    """Minimises the mean divergence per target token of the whole batch, over all micro-batches and ranks.

    TRL's own DistillationTrainer always trains on the student's replies, which it makes from text, and takes the teacher for a
    model of its own.
    """

    def __init__(self, *args: Any, pair: Pair, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pair = pair
        self.loss_is_scaled_for_ga = True  # by the tokens of the batch

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], Tensor]:
        """The micro-batches of an optimizer step, replied to by the student where its turn has come, and the number of
        targets in them on all ranks."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        block, step = self.pair.block, self.state.global_step
        own = on_policy(block.seed, step, block.lmbda)
        if own and batches:
            batches = self.replied(batches, step)
        self._metrics["train"]["on_policy"].append(float(own))
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches) + torch.zeros((), device=device)
        dist.all_reduce(targets)
        return batches, targets

    def replied(self, batches: list[Batch], step: int) -> list[Batch]:
        """The same prompts with the student's replies of now. A reply depends on the weights, the seed, the step and the
        prompt's place in the batch, not on how that is cut into micro-batches and ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        size = len(batches[0]["input_ids"])
        prompts = [prompt for batch in batches for prompt in prompts_of(batch)]
        places = torch.arange(len(batches)).unsqueeze(1) * world + rank
        numbers = (places * size + torch.arange(size)).flatten()
        rollout = self.reply(prompts, keys(self.pair.block.seed, step, numbers, torch.zeros_like(numbers)))
        index = torch.arange(len(prompts), device=rollout.tokens.device)
        return [answered(rollout, part) for part in index.split(size)]

    def reply(self, prompts: list[list[int]], noise: Tensor) -> Rollout:
        """The student's replies, dropout off; ranks call it together. A step puts the model into training mode itself."""
        self.model.eval()
        noise = noise.to(self.args.device)
        found: Rollout = through(self.model_wrapped, self.model, lambda: self.pair.replies(prompts, noise))
        return found

    def compute_loss(self, model: Any, inputs: Batch, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        tokens, labels = inputs["input_ids"], inputs["labels"]
        each: Tensor = through(model, self.model, lambda: self.pair.divergences(tokens, labels))
        self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        # DeepSpeed averages gradients over ranks.
        return each.sum() * self.accelerator.num_processes / num_items_in_batch

    def evaluation_loop(self, dataloader: Any, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> EvalLoopOutput:
        """Means over the held-out targets: the divergence that is trained on as the loss, the forward KL and, where the data
        has replies, the student's loss on them. Without, the replies are the student's own, drawn with the same noise every
        time."""
        rows = dataloader.dataset
        sums, own = self.measured(rows)
        means = dict(zip(MEASURES, (sums[:-1] / sums[-1]).tolist(), strict=True))
        metrics = {"loss": means["divergence"], "forward_kl": means["forward_kl"]}
        metrics |= {} if own else {"nll": means["nll"]}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=named, num_samples=len(rows))

    @torch.no_grad()
    def measured(self, rows: Dataset) -> tuple[Tensor, bool]:
        """(sums of MEASURES over all targets, and their number, float64 [4], the same on every rank; whether the replies are
        the student's own). Collective: every rank takes its part, in as many passes as the others."""
        rank, world, batch = dist.get_rank(), dist.get_world_size(), self.args.per_device_eval_batch_size
        own = any(set(labels) == {-100} for labels in rows["labels"])
        share = -(-len(rows) // world)
        found = torch.zeros(len(MEASURES) + 1, dtype=torch.float64)
        self.model.eval()
        for start in range(0, share, batch):
            places = torch.arange(start, min(start + batch, share)) + rank * share
            picked = places.clamp(max=len(rows) - 1)
            given = self._prepare_inputs(self.data_collator([rows[place] for place in picked.tolist()]))
            if own:
                noise = keys(self.pair.block.seed + 1, 0, picked, torch.zeros_like(picked))
                rollout = self.reply(prompts_of(given), noise)
                given = answered(rollout, torch.arange(len(picked), device=rollout.tokens.device))
            labels = given["labels"].masked_fill((places >= len(rows)).to(self.args.device).unsqueeze(1), -100)
            call = partial(self.pair.measured, given["input_ids"], labels)
            each: Tensor = through(self.model_wrapped, self.model, call).double()
            found[:-1] += each.sum(0).cpu()
            found[-1] += len(each)
        found = found.to(self.args.device)
        dist.all_reduce(found)
        return found.cpu(), own


def on_policy(seed: int, step: int, share: float) -> bool:
    """Whether the replies of an optimizer step are the student's own: with probability `share`, and the same on every rank
    and in every run of the seed."""
    return random.Random(f"replies {seed} {step}").random() < share


def prompts_of(batch: Batch) -> list[list[int]]:
    """The prompt of each row: what stands before its reply, or all of it."""
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [ids[: min(prompt_length(labels), length)] for ids, labels, length in rows]


def answered(rollout: Rollout, index: Tensor) -> Batch:
    """Some rows of a rollout as a micro-batch, with the reply, EOS included, as its targets."""
    tokens, prompts, lengths = rollout.rows(index)
    places, first, end = torch.arange(tokens.shape[1], device=tokens.device), prompts[:, None], lengths[:, None]
    replied = (places >= first) & (places < first + end)
    mask = (places < first + end).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(~replied, -100)}
