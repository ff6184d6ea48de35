"""Bytes per rank, from config.json and the recipe alone: before any weight is read and without torch.

Counted: weights, gradients, float32 master weights and Adam moments, sharded as the ZeRO stage shards them (Rajbhandari
et al. 2020, arXiv 1910.02054, section 3), with roles sharing bases as they will. Not counted: activations, the KV
cache, communication buffers and the framework itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.kinds import estimators
from pipeline.config.recipe import BASE, Recipe, deepspeed_config
from pipeline.config.schema import Adapter, Base, Evaluate, Ppo, Reward, Stage, reward_stages
from pipeline.errors import UserError

SHIPPED = Path(__file__).resolve().parent.parent / "ds_configs"
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
NF4_BYTES = 0.516
"""Half a byte per weight, and about 0.016 for the double-quantised scales (Dettmers et al. 2023, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one name, which is what adapters target, and one shape."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers: its linear layers; the parameters of all the rest; the untied output head's part of the rest
    (0 when tied); the width of the states a score head reads."""

    linears: list[Linear]
    other: int
    head: int
    width: int

    @property
    def linear(self) -> int:
        """Weights in linear layers: what 4-bit quantisation packs."""
        return sum(layer.count * layer.inputs * layer.outputs for layer in self.linears)

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    def lora(self, adapter: Adapter) -> int:
        """Parameters of a LoRA adapter: r x (in + out) for each layer it targets."""
        return sum(
            layer.count * adapter.r * (layer.inputs + layer.outputs)
            for layer in self.linears
            if adapter.targets == "all-linear" or layer.name in adapter.targets
        )


@dataclass(frozen=True)
class Role:
    """One model a stage works with. Roles with equal `weights` and `quantization` share one copy of them.

    `model` is the base whose config.json gives the shape; a role that does not speak has a score head in place of the
    output head; `adapter` is None where the weights themselves are the role's.
    """

    weights: str
    model: str
    quantization: Literal["nf4"] | None
    speaks: bool
    adapter: Adapter | None
    trained: bool


@dataclass(frozen=True)
class Need:
    """Parameters held (shared bases once), parameters trained, and GiB per rank."""

    parameters: int
    trained: int
    gib: float


def shape(config: dict[str, Any], where: str) -> Shape:
    """The shape of a config.json of the Llama, Qwen2, Qwen3, Mistral, OPT, GPT-2 or GPT-NeoX family."""
    kind = config.get("model_type")
    vocabulary = config.get("vocab_size", 0)
    if kind in ("llama", "qwen2", "qwen3", "mistral"):
        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size, layers = config.get("head_dim") or hidden // heads, config["num_hidden_layers"]
        kv = (config.get("num_key_value_heads") or heads) * size
        linears = _linears(
            layers,
            q_proj=(hidden, heads * size),
            k_proj=(hidden, kv),
            v_proj=(hidden, kv),
            o_proj=(heads * size, hidden),
            gate_proj=(hidden, inner),
            up_proj=(hidden, inner),
            down_proj=(inner, hidden),
        )
        extra = {"qwen2": heads * size + 2 * kv, "qwen3": 2 * size}.get(kind, 0)  # biases of q, k, v; norms of q and k
        head = 0 if config.get("tie_word_embeddings") else vocabulary * hidden
        return Shape(linears, vocabulary * hidden + head + layers * (2 * hidden + extra) + hidden, head, hidden)
    if kind == "opt":
        hidden, inner, layers = config["hidden_size"], config["ffn_dim"], config["num_hidden_layers"]
        width, square = config.get("word_embed_proj_dim", hidden), (hidden, hidden)
        linears = _linears(
            layers,
            q_proj=square,
            k_proj=square,
            v_proj=square,
            out_proj=square,
            fc1=(hidden, inner),
            fc2=(inner, hidden),
        )
        if width != hidden:
            linears += _linears(1, project_in=(width, hidden), project_out=(hidden, width))
        normed = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm")
        other = (
            vocabulary * width
            + (config["max_position_embeddings"] + 2) * hidden
            + (2 * hidden if normed else 0)
            + layers * (4 * hidden + inner + hidden + 4 * hidden)
        )
        return Shape(linears, other, 0, width)
    if kind == "gpt2":
        hidden, layers = config["n_embd"], config["n_layer"]
        inner = config.get("n_inner") or 4 * hidden
        linears = [
            *_linears(layers, c_attn=(hidden, 3 * hidden), c_proj=(hidden, hidden), c_fc=(hidden, inner)),
            *_linears(layers, c_proj=(inner, hidden)),
        ]
        other = (
            (vocabulary + config["n_positions"]) * hidden
            + 2 * hidden
            + layers * (4 * hidden + 3 * hidden + 2 * hidden + inner)
        )
        return Shape(linears, other, 0, hidden)
    if kind == "gpt_neox":
        hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
        linears = _linears(
            layers,
            query_key_value=(hidden, 3 * hidden),
            dense=(hidden, hidden),
            dense_h_to_4h=(hidden, inner),
            dense_4h_to_h=(inner, hidden),
        )
        other = 2 * vocabulary * hidden + layers * (4 * hidden + 3 * hidden + 2 * hidden + inner) + 2 * hidden
        return Shape(linears, other, vocabulary * hidden, hidden)
    raise UserError(
        where,
        f"model_type {kind!r}",
        expected="llama, qwen2, qwen3, mistral, opt, gpt2 or gpt_neox",
        fix="the stage itself runs with other models; only the estimate does not know them",
    )


def _linears(count: int, **sizes: tuple[int, int]) -> list[Linear]:
    return [Linear(name, inputs, outputs, count) for name, (inputs, outputs) in sizes.items()]


def read(model: str, where: str, configs: Path | None) -> dict[str, Any]:
    """config.json of a folder or, for a hub id, of `configs/<org>__<name>/` or the hub's cache."""
    folder = Path(model)
    if configs is not None and not folder.is_dir():
        folder = configs / model.replace("/", "__")
    if not (folder / "config.json").is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(hf_hub_download(model, "config.json")).parent
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise UserError(
                where,
                f"no config.json of {model} here or on the hub",
                expected="a model folder or a hub id",
                fix="check base.model, or give --configs",
            ) from None
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def estimate(recipe: Recipe, stage: str, configs: Path | None = None) -> Need:
    """What a stage needs on each rank."""
    block, where = recipe.stages[stage], recipe.where("stages", stage, "base")
    size = BYTES[block.base.dtype]
    shared: dict[tuple[str, ...], list[Role]] = {}
    for number, role in enumerate(roles(recipe, stage)):
        own = f"role {number}" if role.trained and role.adapter is None else ""
        shared.setdefault((role.weights, role.quantization or "", own), []).append(role)

    parameters, trained, weights = 0, 0, 0.0
    for sharers in shared.values():
        form = shape(read(recipe.local(sharers[0].model), where, configs), where)
        other = form.other - (0 if any(role.speaks for role in sharers) else form.head)
        parameters += form.linear + other
        weights += form.linear * (NF4_BYTES if sharers[0].quantization else size) + other * size
        for role in sharers:
            head = 0 if role.speaks else form.width
            adapter = form.lora(role.adapter) if role.adapter else 0
            weights += (head + adapter) * size
            if role.trained:
                trained += head + (adapter or form.linear + other)

    level, states_off, weights_off = zero(recipe, stage)
    ranks = block.deepspeed.ranks
    held = 0.0 if weights_off else weights / (ranks if level >= 3 else 1)
    gradients = trained * size / (ranks if level >= 2 else 1)
    # The master copy: ZeRO-1 and 2 clone what they partition, float32 or not.
    master = 4.0 if block.base.dtype != "fp32" or level in (1, 2) else 0.0
    moments = 0.0 if isinstance(block, Ppo) and block.optimizer == "sgd" else 8.0
    states = 0.0 if states_off else trained * (master + moments) / (ranks if level >= 1 else 1)
    return Need(parameters, trained, (held + gradients + states) / 2**30)


def zero(recipe: Recipe, stage: str) -> tuple[int, bool, bool]:
    """(ZeRO stage, optimizer states on the CPU, weights on the CPU). In `evaluate` each rank holds its models whole."""
    block = recipe.stages[stage]
    if isinstance(block, Evaluate):
        return 0, False, False
    settings = deepspeed_config(recipe, stage).get("zero_optimization", {})
    off = [settings.get(key, {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")]
    return int(settings.get("stage", 0)), off[0], off[1]


def roles(recipe: Recipe, stage: str) -> list[Role]:
    """The models a stage works with, sharing weights as section 7 of the design says."""
    block = recipe.stages[stage]
    if isinstance(block, Evaluate):
        sides = [_published(recipe, name, block.base, speaks=True) for name in (block.model, block.against)]
        return sides + [_published(recipe, name, block.base, speaks=False) for name in block.reward]
    full = block.adapter.method == "full"
    adapter = None if full else block.adapter
    start = _start(block)
    policy = Role(
        _below(recipe, stage, start),
        _model(recipe, start, block.base),
        block.base.quantization,
        speaks=not isinstance(block, Reward),
        adapter=adapter,
        trained=True,
    )
    if not isinstance(block, Ppo):
        return [policy]
    continued = start != BASE and _continues(block.adapter, recipe.stages[start].adapter)
    reference = replace(policy, adapter=adapter if continued else None, trained=False)
    names = reward_stages(*block.reward, *(block.gold or []))
    rewards = [_published(recipe, name, block.base, speaks=False) for name in names]
    if not estimators()[block.advantage_estimator].critic:
        return [policy, reference, *rewards]
    if block.critic.start == "reward":
        critic = replace(
            rewards[0],
            weights=_below(recipe, stage, names[0]),
            quantization=policy.quantization if full else rewards[0].quantization,
        )
    else:
        critic = (
            policy
            if block.critic.start == "policy"
            else replace(policy, weights=block.base.model, model=block.base.model)
        )
    return [policy, reference, replace(critic, speaks=False, adapter=adapter, trained=True), *rewards]


def _published(recipe: Recipe, name: str, base: Base, *, speaks: bool) -> Role:
    """The frozen output of stage `name`, or the base itself. A reward model is quantised as it was when it trained."""
    if name == BASE:
        return Role(base.model, base.model, base.quantization, speaks, adapter=None, trained=False)
    block = recipe.stages[name]
    held = base if speaks else block.base
    adapter = None if block.adapter.method == "full" else block.adapter
    return Role(_standing(recipe, name), block.base.model, held.quantization, speaks, adapter, trained=False)


def _standing(recipe: Recipe, name: str) -> str:
    """Whose weights the output of stage `name` stands on: its own after full training, else those below its adapter."""
    block = recipe.stages[name]
    return f"output of {name}" if block.adapter.method == "full" else _below(recipe, name, _start(block))


def _below(recipe: Recipe, stage: str, parent: str) -> str:
    """Whose weights `stage` builds on when it starts from `parent`: an adapter of another shape is merged first."""
    block = recipe.stages[stage]
    if parent == BASE:
        return block.base.model
    adapter = recipe.stages[parent].adapter
    if adapter.method == "full" or _continues(block.adapter, adapter):
        return _standing(recipe, parent)
    return f"{parent} merged for {stage}"


def _continues(adapter: Adapter, parent: Adapter) -> bool:
    """Whether training goes on in a copy of the parent's adapter: LoRA of the same shape."""
    return adapter.method == parent.method == "lora" and (adapter.r, adapter.alpha, adapter.targets) == (
        parent.r,
        parent.alpha,
        parent.targets,
    )


def _start(block: Stage) -> str:
    return str(block.policy if isinstance(block, Ppo) else getattr(block, "init", BASE))


def _model(recipe: Recipe, name: str, base: Base) -> str:
    return base.model if name == BASE else recipe.stages[name].base.model
