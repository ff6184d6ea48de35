"""The recipe's adapter block: which method, and its own keys."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from pipeline.config.architectures import SLOTS
from pipeline.config.block import Block, NonNegative, Positive, misplaced
from pipeline.config.methods import METHODS, continues


class Adapter(Block):
    """What is trained. The methods, their papers and which of these keys each has are in docs/methods.md; a key that is not
    given is the method's own default, and a key that the method does not have is refused.

    - r, alpha, dropout, targets: rank, scale and input dropout of the LoRA family, and the linear layers it adapts
    - rank_pattern, alpha_pattern: rank and alpha of layers whose names match a key (a regular expression, as PEFT has it)
    - lr_ratio: learning rate of LoRA's second factor over that of the first (LoRA+, Hayou et al. 2024, arXiv 2402.12354)
    - init_r, target_r, tinit, tfinal, deltaT, beta1, beta2, orth_reg_weight: AdaLoRA's; tinit and tfinal are shares of the
      stage's optimizer steps below 1, else numbers of steps
    - d_initial: what VeRA's vectors start as; oft_block_size: OFT's
    - bottleneck_dim, non_linearity, scaling: a bottleneck's width, its activation, and the factor of what it adds
    - num_virtual_tokens, encoder_hidden_size: length of a prefix or prompt, and the width of the network behind it
    - modules: names of a block's modules, for models that Relay does not know; see pipeline/config/architectures.py
    """

    method: str = "lora"
    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    lr_ratio: Annotated[float, Field(gt=0)] | None = None
    init_r: Positive = 12
    target_r: Positive = 8
    tinit: NonNegative = 0.1
    tfinal: NonNegative = 0.2
    deltaT: Positive = 1  # noqa: N815 - PEFT's name
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    orth_reg_weight: NonNegative = 0.5
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    oft_block_size: Positive = 32
    bottleneck_dim: Positive = 64
    non_linearity: Literal["relu", "gelu", "gelu_new", "silu", "tanh"] = "relu"
    scaling: Annotated[float, Field(gt=0)] = 1.0
    num_virtual_tokens: Positive = 20
    encoder_hidden_size: Positive = 128
    modules: dict[str, list[str]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _own_keys_and_defaults(cls, given: Any) -> Any:
        """Refuse keys of other methods, and fill in the method's defaults."""
        if not isinstance(given, dict):
            return given
        name = given.get("method", "lora")
        if name not in METHODS:
            raise misplaced("method", f"found {name!r}", METHODS)
        options = METHODS[name].options
        for key in given:
            if key in cls.model_fields and key not in ("method", *options):
                raise misplaced(key, f"{name} has no such key", options)
        return {**{key: copy.copy(value) for key, value in options.items()}, **given}

    @model_validator(mode="after")
    def _slots_exist(self) -> Adapter:
        if unknown := sorted(set(self.modules) - set(SLOTS)):
            raise misplaced("modules", f"no place is called {unknown[0]}", SLOTS)
        return self

    @model_validator(mode="after")
    def _ranks_are_allocated(self) -> Adapter:
        if self.method == "adalora" and self.target_r >= self.init_r:
            raise ValueError(f"adalora lowers ranks from init_r to target_r, found {self.init_r} and {self.target_r}")
        if self.method == "adalora" and self.tinit < 1 and self.tfinal < 1 and self.tinit + self.tfinal >= 1:
            raise ValueError(
                "adalora allocates ranks between tinit and tfinal; as shares they must add up to less than 1"
            )
        return self

    @model_serializer
    def _own_keys(self) -> dict[str, Any]:
        """The method and its own keys: what decides whether a stage must run again."""
        return {"method": self.method, **self.options}

    @property
    def options(self) -> dict[str, Any]:
        """The method's keys and their values."""
        return {key: getattr(self, key) for key in METHODS[self.method].options}

    @property
    def is_full(self) -> bool:
        """Whether every weight trains."""
        return self.method == "full"

    def continues(self, parent: Adapter) -> bool:
        """Whether a stage with this block goes on training a copy of its parent's adapter."""
        return continues(self.method, self.options, parent.method, parent.options)
