"""The recipe's blocks as frozen, torch-free types. One class per stage kind; unknown keys and wrong types are refused.

The names are the field's: what TRL, DeepSpeed-Chat and the PPO papers call these numbers. `batch` is always the number
of sequences per optimizer step over all ranks; micro-batches and accumulation follow from it.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.adapter import Adapter
from pipeline.config.block import Block, Dtype, Fraction, NonNegative, Positive, Seconds
from pipeline.config.glue import task_name


class Base(Block):
    """The base language model: a hub id or a folder (relative to the recipe file), and how its weights are held.

    `chat_template` is `plain` (HH-RLHF's text), `chatml`, or a `.jinja` file; null is the tokenizer's own, else `plain`.
    `add_tokens` are special tokens that the tokenizer gets where it lacks them, beside those that the template needs; of the
    embeddings only their rows train, together with the adapter. See docs/chat_templates.md.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "bf16"
    quantization: Literal["nf4"] | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    chat_template: str | None = None
    add_tokens: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _nf4_needs_bf16(self) -> Base:
        if self.quantization and self.dtype != "bf16":
            raise ValueError(f"quantization nf4 computes in bf16, found dtype {self.dtype}; write `dtype: bf16`")
        return self


class DeepSpeed(Block):
    """Which DeepSpeed configuration, on how many devices; `config` is a shipped name (zero0 … zero3_offload) or a file.
    A rank that makes no progress for `timeout` seconds ends the job."""

    config: str = "zero2"
    num_gpus: Positive = 1
    num_nodes: Positive = 1
    hostfile: str | None = None
    timeout: Seconds = 1800.0

    @property
    def ranks(self) -> int:
        """Processes in all: `num_gpus` on each of `num_nodes` hosts."""
        return self.num_gpus * self.num_nodes


class Wandb(Block):
    """`artifacts`: whose files are uploaded; the others' artifacts refer to their folder and hold the manifest alone."""

    project: str = "relay"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    artifacts: Literal["adapters", "all", "none"] = "adapters"


class Tracking(Block):
    wandb: Wandb | None = None
    tensorboard: bool = False


class DataRules(Block):
    """`holdout`: the share of prompts, chosen by hash, that no stage trains on. `split` cuts the others between stages:
    `{sft: 2, reward: 4, ppo: 4}` gives each stage its part of every prompt there is, whichever file it lies in.

    A row that cannot be used is counted and written to `rejected.jsonl`; with `on_bad_row: stop` the first one stops the
    stage, and more than `max_bad` of a source's rows always do.

    With a `root` no data outside that folder is read, links followed: `--set data.root=FOLDER` for a recipe that one does not
    trust.
    """

    holdout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    split: dict[str, Annotated[float, Field(gt=0.0)]] = Field(default_factory=dict)
    on_bad_row: Literal["stop", "reject"] = "reject"
    max_bad: Fraction = 0.05
    root: str | None = None


class Source(Block):
    """Data: the `path` of a file, folder, glob or hub dataset (`revision`, `split` and `subset` are the hub's), or the
    rows that an earlier `stage` published.

    `share` takes that part of its prompts, disjoint from other stages' shares; `limit` at most so many rows; `weight`, which
    all of a stage's sources have or none, how often it is drawn beside the others (an epoch is as long as without; see Mix);
    `take` which reply of a preference is learned from.
    """

    path: str | None = None
    stage: str | None = None
    revision: str | None = None
    split: str = "train"
    subset: str | None = None
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    take: Literal["chosen", "rejected"] = "chosen"
    limit: Positive | None = None
    weight: Annotated[float, Field(gt=0.0)] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None) == (self.stage is None):
            raise ValueError("give `path`, or `stage` for what an earlier stage published, and not both")
        return self

    @property
    def name(self) -> str:
        """What counts, metrics and the manifest call it."""
        return self.path if self.path is not None else f"stage {self.stage}"


class Mix(Block):
    """How often rows of each source are drawn, when no source has a `weight`: as its number of rows to the power of 1 over
    `temperature` (Raffel et al. 2020, arXiv 1910.10683). 1 draws by size; the higher, the more alike.

    An epoch has as many draws as the sources have rows after their limits. A source drawn more often than it has rows is
    repeated as a whole, and the rest chosen by the seed.
    """

    temperature: Annotated[float, Field(gt=0.0)]


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


class DataStage(Stage):
    """A stage that has no model: it reads rows and hands rows on."""

    base: None = None  # type: ignore[assignment]
    adapter: None = None  # type: ignore[assignment]


class Frozen(Stage):
    """A stage whose models do not train: each rank holds them whole, and the recipe's adapter is not its own."""


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
    mix: Mix | None = None
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


LossOn = Literal["completion", "assistant", "all"]


class Sft(Supervised):
    """Supervised fine-tuning: next-token cross-entropy on the completion, on every turn of the assistant's when
    `loss_on: assistant`, or on all tokens when `loss_on: all`.

    `packing` puts several rows into one sequence of up to `max_length` tokens, each blind to the others. `batch`, `steps`,
    `epochs` and `save_every` then count such sequences.
    """

    kind: Literal["sft"]
    loss_on: LossOn = "completion"
    packing: bool = False


class Reward(Supervised):
    """Pairwise reward model (Bradley-Terry); `center` weighs the mean-zero penalty of Eisenstein et al. 2023."""

    kind: Literal["reward"]
    center: NonNegative | None = None


class Classify(Supervised):
    """A sequence classifier on a task of GLUE or SuperGLUE, or a regression for stsb, scored by the task's official metrics
    on its whole validation split. `data` is the folder of the official download; the hub's copy is read when it is left out.
    Texts above `max_length` tokens lose the end of their longest part. `eval_every` takes the loss on `eval_rows` of them."""

    kind: Literal["classify"]
    task: Annotated[str, AfterValidator(task_name)]
    data: str | None = None  # type: ignore[assignment]
    mix: None = None


def _function(value: str) -> str:
    if value.count(":") != 1:
        raise ValueError("a function is written `package.module:function`")
    return value


FunctionName = Annotated[str, AfterValidator(_function)]


class StageReward(Block):
    """The score of a reward stage, or of several: an ensemble, combined by their mean, minimum or mean less `k` standard
    deviations (Coste et al. 2024, arXiv 2310.02743)."""

    stage: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    k: NonNegative = 1.0
    weight: float = 1.0


class FunctionReward(Block):
    """A Python function `package.module:function(prompts, responses, rows) -> scores`; `rows` are the prompts' data rows."""

    function: FunctionName
    weight: float = 1.0


SECRET = re.compile(r"(key|token|secret|password|passwd|auth|authorization|sig|signature|credentials?)$", re.IGNORECASE)
"""Names of parameters of an address that hold what nobody else should see."""


def _address(url: str) -> str:
    if "@" in re.split(r"[/?#]", url.partition("://")[2])[0]:
        raise PydanticCustomError("secret", "the address has a user or a password in it")
    try:
        asked = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    except ValueError:
        return url  # `scoring.source.address` says what is wrong with it
    for name, _ in asked:
        if SECRET.search(name):
            raise PydanticCustomError("secret", "the address has a parameter `{name}` in it", {"name": name})
    return url


Url = Annotated[str, Field(pattern=r"^https?://"), AfterValidator(_address)]


class Endpoint(Block):
    """How an endpoint is asked: seconds, bytes. A request is tried `1 + retries` times, `backoff` seconds apart and twice as
    long each time. `key_env` names the environment variable with the bearer token that goes with each request."""

    timeout: Annotated[float, Field(gt=0.0)] = 30.0
    retries: Annotated[int, Field(ge=0)] = 3
    backoff: NonNegative = 1.0
    max_bytes: Positive = 16_000_000
    key_env: str | None = None


class HttpReward(Endpoint):
    """An endpoint that takes JSON {prompts, responses, rows} and answers {scores}; seconds, bytes, rows per request.

    A request is tried `1 + retries` times, `backoff` seconds apart and twice as long each time. When all fail the run stops,
    or, with `on_failure: skip`, the rollout batch is left out and counted. `key_env` names the environment variable with the
    bearer token that goes with each request.
    """

    http: Url
    batch: Positive = 64
    on_failure: Literal["stop", "skip"] = "stop"
    weight: float = 1.0


class VerifyReward(Block):
    """A check of the reply: `exact_answer` compares its final number with that of the row's `field` (as GSM8K writes it,
    after `####`), `format` asks whether the regular expression `pattern` matches the whole reply. 1 or 0."""

    verify: Literal["exact_answer", "format"]
    field: str = "answer"
    pattern: str | None = None
    weight: float = 1.0

    @model_validator(mode="after")
    def _format_has_a_pattern(self) -> VerifyReward:
        if (self.verify == "format") != (self.pattern is not None):
            raise ValueError("`pattern` belongs to `verify: format`, which needs it")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"`pattern` is not a regular expression: {error}") from None
        return self


REWARD_KEYS = ("stage", "function", "http", "verify")


def _reward_key(value: Any) -> str | None:
    found = [key for key in REWARD_KEYS if (key in value if isinstance(value, dict) else hasattr(value, key))]
    return found[0] if len(found) == 1 else None


RewardSource = Annotated[
    Annotated[StageReward, Tag("stage")]
    | Annotated[FunctionReward, Tag("function")]
    | Annotated[HttpReward, Tag("http")]
    | Annotated[VerifyReward, Tag("verify")],
    Discriminator(
        _reward_key,
        custom_error_type="reward_source",
        custom_error_message="one of the keys stage, function, http, verify",
    ),
]
RewardSources = Annotated[
    list[RewardSource],
    BeforeValidator(lambda v: [{"stage": v}] if isinstance(v, str) else v),
    Field(min_length=1),
]
"""One reward stage's name, or a list of sources whose scores are weighted and added."""


def reward_stages(*sources: RewardSource) -> list[str]:
    """The reward stages that `sources` name, each once, in order."""
    return list(dict.fromkeys(name for source in sources if isinstance(source, StageReward) for name in source.stage))


class Kl(Block):
    """The KL penalty. `target` switches on the adaptive controller of Ziegler et al. 2019 (arXiv 1909.08593) with `horizon`.

    `place` and `estimator` are the advantage estimator's own unless given: k1 in the reward, k3 in the loss.
    """

    coef: NonNegative = 0.05
    place: Literal["reward", "loss"] | None = None
    estimator: Literal["k1", "k3"] | None = None
    target: Annotated[float, Field(gt=0.0)] | None = None
    horizon: Positive = 10000


class Sampling(Block):
    """How replies are sampled; `batch` prompts at a time on each rank, which bounds memory and changes no token but with
    `deepspeed`.

    `engine: static` decodes `batch` slots in a preallocated cache and gives the slot of a finished response to the next
    prompt; `hf` is Hugging Face's `generate`; `deepspeed` is DeepSpeed's `HybridEngineRollout` without its kernels, which
    know no PEFT adapters: repeatable, but its tokens depend on `batch` and on the ranks, and every reply is decoded to
    `max_response_length`. An engine that cannot decode a model gives way to `hf`, in one line. `adapter` says how
    PPO applies the policy's adapter meanwhile: `unmerged`, or `merged` into a copy of the weights, which `auto` makes where the
    memory plan has room for it.
    """

    engine: Literal["static", "hf", "deepspeed"] = "static"
    adapter: Literal["auto", "merged", "unmerged"] = "auto"
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    max_prompt_length: Positive = 256
    max_response_length: Positive = 256
    batch: Positive = 64


class Critic(Block):
    """What the critic is, what it starts from, and its own optimizer settings; those not given are the policy's.

    `kind: adapter` is an adapter and a head of its own on a shared base; `head` a value head alone on the policy's hidden
    states, which saves a pass and sends no gradient into the policy; `model` a separate model, trained whole. Under full
    fine-tuning `adapter` means `model`. `init` is `reward` unless given, and `policy` for a head.
    """

    kind: Literal["adapter", "head", "model"] = "adapter"
    init: Literal["reward", "policy", "base"] | None = None
    lr: Annotated[float, Field(gt=0.0)] | None = None
    lr_schedule: Literal["constant", "linear", "cosine"] | None = None
    warmup: NonNegative | None = None
    weight_decay: NonNegative | None = None
    max_grad_norm: NonNegative | None = None

    @property
    def start(self) -> str:
        """What the critic's weights start as."""
        return self.init or ("policy" if self.kind == "head" else "reward")


class Overlong(Block):
    """Soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, equation 13): nothing up to max_response_length - buffer
    tokens, then linearly down to -penalty at max_response_length."""

    buffer: Positive
    penalty: NonNegative = 1.0


class Ptx(Block):
    """A supervised loss mixed into every update (PPO-ptx, Ouyang et al. 2022, arXiv 2203.02155, equation 2).

    Each minibatch learns from `batch` rows of `data` too, with weight `coef`, which moves linearly to `final_coef` over the
    stage's steps when that is given.
    """

    data: Annotated[list[Source], Field(min_length=1)]
    mix: Mix | None = None
    coef: NonNegative = 1.0
    final_coef: NonNegative | None = None
    batch: Positive = 32
    max_length: Positive = 512
    loss_on: LossOn = "completion"


SignalName = Literal[
    "over_optimisation",
    "length_drift",
    "kl_budget",
    "entropy_collapse",
    "clip_fraction",
    "explained_variance",
    "identical_responses",
    "truncated_responses",
]


class Signals(Block):
    """When to warn. A signal is raised once its condition has held for `patience` steps running (`evaluations`
    evaluations, for `over_optimisation`); a threshold of null is off. `stop_on` names the signals that end the training.

    - over_optimisation: the held-out gold score fell by more than this many of its standard deviations since it was best,
      while the held-out training score rose
    - length_drift: mean response length, as a factor more or less than in the first step
    - kl_budget: objective/kl, nats per response
    - entropy_collapse: policy entropy, as a share of the first step's
    - clip_fraction: policy/clipfrac_avg
    - explained_variance: val/explained_variance, below
    - identical_responses: share of responses that another prompt or sample of the batch also got
    - truncated_responses: share of responses without EOS
    """

    patience: Positive = 10
    evaluations: Positive = 2
    over_optimisation: NonNegative | None = 0.1
    length_drift: Annotated[float, Field(gt=1.0)] | None = 2.0
    kl_budget: Annotated[float, Field(gt=0.0)] | None = None
    entropy_collapse: Fraction | None = 0.1
    clip_fraction: Fraction | None = 0.5
    explained_variance: float | None = 0.0
    identical_responses: Fraction | None = 0.5
    truncated_responses: Fraction | None = 0.9
    stop_on: list[SignalName] = Field(default_factory=list)


class Ppo(Stage, Training):
    """Policy-gradient training against a reward (PPO: Schulman et al. 2017, arXiv 1707.06347) with a KL penalty to the
    starting policy. `rollout_batch` counts responses: `samples_per_prompt` for each prompt."""

    kind: Literal["ppo"]
    policy: str
    reward: RewardSources
    gold: RewardSources | None = None
    prompts: Annotated[list[Source], Field(min_length=1)]
    mix: Mix | None = None
    rollout_batch: Positive = 64
    samples_per_prompt: Positive = 1
    minibatches: Positive = 1
    epochs: Positive = 1
    steps: Positive
    micro_batch: Positive | None = None
    optimizer: Literal["adamw", "sgd"] = "adamw"
    publish: Literal["best", "last", "ema"] = "last"  # type: ignore[assignment]
    sampling: Sampling = Sampling()
    advantage_estimator: str = "gae"
    group_std: bool = True
    whiten: bool | None = None
    loss_aggregation: Literal["token", "sequence"] | None = None
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    critic: Critic = Critic()
    freezing_actor_steps: Annotated[int, Field(ge=0)] = 0
    kl: Kl = Kl()
    clip: Annotated[float, Field(gt=0.0)] = 0.2
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    value_clip: Annotated[float, Field(gt=0.0)] | None = 0.2
    target_kl: Annotated[float, Field(gt=0.0)] | None = None
    entropy_coef: NonNegative = 0.0
    ptx: Ptx | None = None
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    normalize_scores: bool = False
    score_clip: Annotated[float, Field(gt=0.0)] | None = None
    missing_eos_penalty: NonNegative = 0.0
    overlong: Overlong | None = None
    signals: Signals = Signals()
    sample_every: Positive = 50

    @model_validator(mode="after")
    def _average_is_kept_where_published(self) -> Ppo:
        if self.publish == "ema" and self.ema_decay is None:
            raise ValueError("publish: ema needs ema_decay, such as 0.992")
        return self

    @model_validator(mode="after")
    def _overlong_fits(self) -> Ppo:
        if self.overlong and self.overlong.buffer > self.sampling.max_response_length:
            raise ValueError("overlong.buffer is longer than sampling.max_response_length")
        return self


class Header(Block):
    """The recipe's top level, apart from its stages.

    `deterministic` asks GPUs for the same bits every time, which is slower; on CPUs it is always so. It is no part of the
    work: what is published under the other value stays up to date.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    base: Base
    adapter: Adapter = Adapter()
    deepspeed: DeepSpeed = DeepSpeed()
    data: DataRules = DataRules()
    tracking: Tracking = Tracking()
    seed: int = 0
    deterministic: bool = False
