"""The recipe's blocks as frozen, torch-free types. One class per stage kind; unknown keys and wrong types are refused.

The names are the field's: what TRL, DeepSpeed-Chat and the PPO papers call these numbers. `batch` is always the number
of sequences per optimizer step over all ranks; micro-batches and accumulation follow from it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Base(Block):
    """The base language model: a hub id or a folder (relative to the recipe file), and how its weights are held."""

    model: str
    revision: str | None = None
    dtype: Dtype = "bf16"
    quantization: Literal["nf4"] | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _nf4_needs_bf16(self) -> Base:
        if self.quantization and self.dtype != "bf16":
            raise ValueError(f"quantization nf4 computes in bf16, found dtype {self.dtype}; write `dtype: bf16`")
        return self


class Adapter(Block):
    """What is trained: `full` (every weight) or `lora` (Hu et al. 2021, arXiv 2106.09685; QLoRA when the base is nf4)."""

    method: Literal["full", "lora"] = "lora"
    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class DeepSpeed(Block):
    """Which DeepSpeed configuration, on how many devices; `config` is a shipped name (zero0 … zero3_offload) or a file."""

    config: str = "zero2"
    num_gpus: Positive = 1
    num_nodes: Positive = 1
    hostfile: str | None = None

    @property
    def ranks(self) -> int:
        """Processes in all: `num_gpus` on each of `num_nodes` hosts."""
        return self.num_gpus * self.num_nodes


class Wandb(Block):
    project: str = "relay"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class Tracking(Block):
    wandb: Wandb | None = None
    tensorboard: bool = False


class DataRules(Block):
    """`holdout`: the share of prompts, chosen by hash, that no stage trains on."""

    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02


class Source(Block):
    """One data file, folder, glob or hub id. `share` takes that part of its prompts, disjoint from other stages' shares."""

    path: str
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    take: Literal["chosen", "rejected"] = "chosen"
    limit: Positive | None = None


class Schedule(Block):
    """Learning-rate schedule over the stage's optimizer steps; `warmup` is a share of them below 1, else a number of steps."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: NonNegative = 0.03
    weight_decay: NonNegative = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: NonNegative = 1.0


class Stage(Block):
    """What every stage has. `base`, `adapter`, `deepspeed` and `seed` are inherited from the recipe unless given here."""

    kind: str
    base: Base
    adapter: Adapter = Adapter()
    deepspeed: DeepSpeed = DeepSpeed()
    seed: int = 0
    holdout: Fraction = 0.02


class Training(Schedule):
    """What every training stage has."""

    lr: Annotated[float, Field(gt=0.0)]
    gradient_checkpointing: bool = False
    eval_every: Positive | None = None
    eval_rows: Positive = 256
    early_stopping: Positive | None = None
    publish: Literal["best", "last"] = "last"
    save_every: Positive | None = None
    keep_checkpoints: Positive = 1

    @model_validator(mode="after")
    def _evaluation_is_on_where_needed(self) -> Training:
        if self.eval_every is None and (self.publish == "best" or self.early_stopping):
            raise ValueError(
                "publish: best and early_stopping compare evaluations; set eval_every to a number of steps"
            )
        return self


class Supervised(Stage, Training):
    """Common to stages that go through their data in epochs."""

    data: Annotated[list[Source], Field(min_length=1)]
    init: str = "base"
    epochs: Annotated[float, Field(gt=0.0)] = 1.0
    steps: Positive | None = None
    batch: Positive = 32
    micro_batch: Positive | None = None
    max_length: Positive = 512
    log_every: Positive = 10

    @model_validator(mode="after")
    def _best_is_saved_when_evaluated(self) -> Supervised:
        if self.publish == "best" and self.save_every is not None:
            raise ValueError("publish: best saves at every evaluation; leave out save_every")
        return self


class Sft(Supervised):
    """Supervised fine-tuning: next-token cross-entropy on the completion (or on all tokens when `loss_on: all`)."""

    kind: Literal["sft"]
    loss_on: Literal["completion", "all"] = "completion"


class Reward(Supervised):
    """Pairwise reward model (Bradley-Terry); `center` weighs the mean-zero penalty of Eisenstein et al. 2023."""

    kind: Literal["reward"]
    center: NonNegative | None = None


class Kl(Block):
    """The KL penalty. `target` switches on the adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593) with `horizon`."""

    coef: NonNegative = 0.05
    estimator: Literal["k1", "k3"] = "k1"
    target: Annotated[float, Field(gt=0.0)] | None = None
    horizon: Positive = 10000


class Sampling(Block):
    """How replies are sampled; `batch` prompts at a time on each rank, which bounds memory and changes no token."""

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_prompt_length: Positive = 256
    max_response_length: Positive = 256
    batch: Positive = 64


class Critic(Block):
    """The critic's own optimizer settings and what it starts from."""

    init: Literal["reward", "policy", "base"] = "reward"
    lr: Annotated[float, Field(gt=0.0)] | None = None
    weight_decay: NonNegative | None = None
    max_grad_norm: NonNegative | None = None


class Ppo(Stage, Training):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) with a KL penalty to the starting policy."""

    kind: Literal["ppo"]
    policy: str
    reward: str
    prompts: Annotated[list[Source], Field(min_length=1)]
    rollout_batch: Positive = 64
    minibatches: Positive = 1
    epochs: Positive = 1
    steps: Positive
    micro_batch: Positive | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    sampling: Sampling = Sampling()
    critic: Critic = Critic()
    kl: Kl = Kl()
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    clip: Annotated[float, Field(gt=0.0)] = 0.2
    value_clip: Annotated[float, Field(gt=0.0)] = 0.2
    whiten: bool = True
    score_clip: Annotated[float, Field(gt=0.0)] | None = None
    missing_eos_penalty: NonNegative = 0.0
    sample_every: Positive = 50


class Evaluate(Stage):
    """Replies of `model` beside those of `against` on held-out prompts, scored by reward stages and by Python functions."""

    kind: Literal["evaluate"]
    model: str
    against: str
    prompts: Annotated[list[Source], Field(min_length=1)]
    reward: list[str] = []
    judge: str | None = None
    rows: Positive = 256
    show: Positive = 3
    micro_batch: Positive | None = None
    sampling: Sampling = Sampling()

    @field_validator("judge")
    @classmethod
    def _judge_names_a_function(cls, value: str | None) -> str | None:
        if value is not None and value.count(":") != 1:
            raise ValueError("a judge is written `package.module:function`")
        return value


class Header(Block):
    """The recipe's top level, apart from its stages."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: Base
    adapter: Adapter = Adapter()
    deepspeed: DeepSpeed = DeepSpeed()
    data: DataRules = DataRules()
    tracking: Tracking = Tracking()
    seed: int = 0
