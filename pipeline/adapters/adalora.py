"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) under DeepSpeed: W + P diag(E) Q, ranks moved to where they matter.

PEFT has the layers, the budget's schedule and the masking, and calls them from a training loop that has whole gradients and
whole weights. Here both are fetched from and written to wherever a ZeRO stage keeps them, once per optimizer step, which is
also when the orthogonality term is added: to gradients, not to a loss, so that it counts once however the batch is cut.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline import gradients
from pipeline.config.fitting import check_room, pruning
from pipeline.config.schema import Adapter

MATRICES = ("lora_A", "lora_E", "lora_B")
"""Right singular vectors [r, in], singular values [r, 1], left singular vectors [out, r] of an adapted layer."""


def config(adapter: Adapter, total_steps: int, targets: list[str], task: str) -> AdaLoraConfig:
    """PEFT's configuration for a training of `total_steps` optimizer steps; `task` is CAUSAL_LM or SEQ_CLS.

    Raises UserError when there is no room between `tinit` and `tfinal`.
    """
    first, last = pruning(adapter, total_steps)
    check_room("adapter.tinit", first, last, total_steps)
    return AdaLoraConfig(
        init_r=adapter.init_r,
        target_r=adapter.target_r,
        tinit=first,
        tfinal=last,
        deltaT=adapter.deltaT,
        total_step=total_steps,
        beta1=adapter.beta1,
        beta2=adapter.beta2,
        orth_reg_weight=adapter.orth_reg_weight,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        task_type=task,
        target_modules=targets,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def orthogonality(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(||P P^T - I||_F, its gradient by P) for P [r, n] in float32: how far its rows are from orthonormal."""
    excess = rows @ rows.T - torch.eye(len(rows), device=rows.device)
    norm = torch.linalg.matrix_norm(excess)
    return norm, 2.0 * excess @ rows / norm.clamp_min(torch.finfo(torch.float32).tiny)


def leave_out_empty(model: PeftModel, name: str) -> None:
    """Take a pruned adapter off the layers where nothing is left of it: ZeRO-3 cannot gather a parameter without elements."""
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_E and layer.lora_E[name].numel() == 0:
            for kind in (*layer.adapter_layer_names, *layer.other_param_names):
                if name in getattr(layer, kind):
                    del getattr(layer, kind)[name]


class Allocation:
    """Decides the ranks of one trained adapter of a model. Every rank holds the same statistics.

    Around each optimizer step call `before_step` and `after_step` with the step's number, from 0 (`follow` does, where a
    trainer makes the steps). Numbers may be left out; before `first` the adapter does not train, and its schedule is that much
    shorter. Must be made before DeepSpeed shards the model. Like PEFT and the authors' code it multiplies a gradient by the
    weight after the step; the gradients are those before clipping.
    """

    def __init__(self, model: PeftModel, name: str = "default", first: int = 0) -> None:
        self.model, self.name, self.first = model, name, first
        ends = tuple(f".{matrix}.{name}" for matrix in MATRICES)
        inner = dict(model.base_model.model.named_parameters())
        self.parameters = {n: p for n, p in inner.items() if n.endswith(ends)}
        for path, parameter in inner.items():
            if path.endswith(f".ranknum.{name}"):  # a number, which PEFT lets train once it is not float32
                parameter.requires_grad_(False)
        settings = model.peft_config[name]
        settings.total_step -= first
        check_room("adapter.tinit", settings.tinit, settings.tfinal, settings.total_step)
        self.budget = _Budget(self.parameters, settings, name)
        self.pattern: dict[str, list[bool]] | None = None
        self.exact = False  # whether the weights are now as the last mask left them
        self.fixed = False  # whether the ranks are final
        self.penalty = 0.0
        # PEFT would add its term to a loss that TRL's trainers do not read, gathering every matrix for it under ZeRO-3.
        model.base_model.forward = types.MethodType(BaseTuner.forward, model.base_model)

    def follow(self, engine: Any, number: Callable[[], int]) -> None:
        """Act around every step of `engine` that updates weights; `number` tells which step it is."""
        step = engine.step

        def followed(*args: Any, **kwargs: Any) -> Any:
            if not engine.is_gradient_accumulation_boundary():
                return step(*args, **kwargs)
            current = number()
            self.before_step(engine, current)
            result = step(*args, **kwargs)
            self.after_step(engine, current)
            return result

        engine.step = followed

    @torch.no_grad()
    def before_step(self, engine: Any, number: int) -> None:
        """Add the orthogonality term to the gradients, and keep these for the statistics. Collective."""
        if number < self.first:
            return
        scale, weight = gradients.loss_scale(engine), self.budget.peft_config.orth_reg_weight
        factors = {n: p for n, p in self.parameters.items() if f".lora_E.{self.name}" not in n}
        total = torch.zeros((), device=next(iter(factors.values())).device)
        with _available(factors.values()):
            for name, parameter in factors.items():
                left = f".lora_B.{self.name}" in name
                norm, slope = orthogonality(parameter.float().T if left else parameter.float())
                total += norm
                if weight:
                    gradients.add(parameter, (slope.T if left else slope) * (weight * scale / len(factors)))
        self.penalty = weight * float(total) / len(factors)
        if self._watches(number):
            self.budget.gradients = {n: gradients.whole(p) / scale for n, p in self.parameters.items()}

    @torch.no_grad()
    def after_step(self, engine: Any, number: int) -> None:
        """Update the statistics, and mask singular values when the schedule says so. Collective under ZeRO-3."""
        if number < self.first:
            return
        watches = self._watches(number) and engine.was_step_applied()
        with _available([p for n, p in self.parameters.items() if watches or f".lora_E.{self.name}" in n]):
            if watches:
                self.budget.update_ipt(self.budget.named)
            self.budget.gradients = {}
            self._mask(number - self.first)
        if self.exact:
            assert self.pattern is not None
            gradients.drop(engine, {self.parameters[n]: self._dropped(n) for n in self.pattern})

    def _dropped(self, name: str) -> Tensor:
        """Which of a layer's singular values are masked: bool [r, 1]."""
        assert self.pattern is not None
        return ~torch.tensor(self.pattern[name], device=self.parameters[name].device).unsqueeze(1)

    def _watches(self, number: int) -> bool:
        """Whether the step's gradients belong to the statistics: until the ranks are final."""
        settings = self.budget.peft_config
        return not self.fixed and (
            number - self.first < settings.total_step - settings.tfinal or not self.budget.exp_avg_ipt
        )

    def _mask(self, step: int) -> None:
        """What `AdaLoraModel.update_and_allocate` does with the singular values after step `step`, from 0."""
        settings, budget = self.budget.peft_config, self.budget
        if self.fixed:
            budget.mask_using_rank_pattern(budget.named, self.pattern)
            self.exact = True
            return
        size, due = budget.budget_schedule(step)
        final = step >= settings.total_step - settings.tfinal
        self.exact = bool(budget.exp_avg_ipt) and (due or final)
        if self.exact:
            self.pattern = budget.mask_to_budget(budget.named, budget.target_bgt if final else size)
        if self.exact and final:
            self.fixed = True
            budget.reset_ipt()

    def metrics(self) -> dict[str, float]:
        """The orthogonality term as it stood at the last step, and the mean rank of an adapted layer."""
        layers = len(self.parameters) // len(MATRICES)
        kept = self.budget.init_bgt if self.pattern is None else sum(map(sum, self.pattern.values()))
        return {"orthogonality": self.penalty, "mean_rank": kept / layers}

    def publish(self) -> None:
        """Let PEFT write the ranks that are left; all of them where weights have moved since the last mask, which happens
        only before the ranks are final."""
        self.model.peft_config[self.name].rank_pattern = self.pattern if self.exact else None

    def save(self, folder: Path) -> None:
        """Write the statistics and the ranks into a checkpoint."""
        found = {f"{kind}/{n}": value for kind in ("ipt", "unc") for n, value in self._averages(kind).items()}
        save_file({n: value.contiguous() for n, value in found.items()}, folder / f"adalora-{self.name}.safetensors")
        state = {"pattern": self.pattern, "exact": self.exact, "fixed": self.fixed, "penalty": self.penalty}
        (folder / f"adalora-{self.name}.json").write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path) -> None:
        state = json.loads((folder / f"adalora-{self.name}.json").read_text(encoding="utf-8"))
        self.pattern, self.exact, self.fixed = state["pattern"], state["exact"], state["fixed"]
        self.penalty = state["penalty"]
        self.budget.reset_ipt()
        for key, value in load_file(folder / f"adalora-{self.name}.safetensors").items():
            kind, _, name = key.partition("/")
            self._averages(kind)[name] = value.to(self.parameters[name].device)

    def _averages(self, kind: str) -> dict[str, Tensor]:
        """PEFT's running means of sensitivity (`ipt`) and of its uncertainty (`unc`), by parameter."""
        return self.budget.exp_avg_ipt if kind == "ipt" else self.budget.exp_avg_unc


class _Budget(RankAllocator):
    """PEFT's allocator, over one adapter's parameters, with statistics in float32 from gradients that it is handed."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: AdaLoraConfig, name: str) -> None:
        self.named = types.SimpleNamespace(named_parameters=parameters.items)  # all that PEFT asks of a model
        self.gradients: dict[str, Tensor] = {}
        super().__init__(self.named, settings, name)

    def update_ipt(self, model: Any) -> None:
        """Section 3.2: sensitivity |w dL/dw|, its running mean, and the running mean of its distance to that mean."""
        for name, parameter in model.named_parameters():
            sensitivity = (parameter.float() * self.gradients[name]).abs()
            mean = self.exp_avg_ipt.get(name, torch.zeros_like(sensitivity))
            unsure = self.exp_avg_unc.get(name, torch.zeros_like(sensitivity))
            mean = self.beta1 * mean + (1.0 - self.beta1) * sensitivity
            self.exp_avg_ipt[name] = mean
            self.exp_avg_unc[name] = self.beta2 * unsure + (1.0 - self.beta2) * (sensitivity - mean).abs()


@contextmanager
def _available(parameters: Any) -> Iterator[None]:
    """The parameters whole, where ZeRO-3 shards them; what is written to them meanwhile is lost there."""
    sharded = [p for p in parameters if p.shape != gradients.shape(p)]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield
