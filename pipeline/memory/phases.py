"""Bytes per rank in every phase of a stage, from config.json and the recipe alone: before any weight is read, without torch.

The peak of a stage is that of its greediest phase, not the sum of everything. Sequences are taken to be as long as the
recipe allows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from pipeline.config.distill import Distill
from pipeline.config.evaluate import Evaluate
from pipeline.config.export import Export
from pipeline.config.merge import Merge
from pipeline.config.methods import METHODS
from pipeline.config.preference import Dpo, Kto
from pipeline.config.pretrain import Pretrain
from pipeline.config.recipe import Recipe
from pipeline.config.recipe import split as split_batch
from pipeline.config.schema import Ppo, Reward, Sampling, Sft, Stage, Supervised
from pipeline.config.selection import Selection
from pipeline.memory import adapters
from pipeline.memory.roles import Role, roles, trunks
from pipeline.memory.shape import Shape, read, shape
from pipeline.memory.zero import Engine

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STORED = {"float32": 4, "bfloat16": 2, "float16": 2}
NF4_BYTES = 0.516
"""Half a byte per weight, and about 0.016 for the double-quantised scales (Dettmers et al. 2023, arXiv 2305.14314)."""
CHUNK_ELEMENTS = 2**24
"""Logits that `pipeline.model.likelihood` computes at a time."""
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""The largest piece of logits that TRL's fused output head computes at a time."""
REUSE = 1_000_000_000
"""Parameters within which ZeRO-3 keeps a gathered weight for its next use, where it knows the order of modules."""
FRAMEWORK = {"cpu": 591 * 2**20, "cuda": 512 * 2**20}
"""Python, torch, DeepSpeed, transformers, PEFT and TRL as they stand in a rank, and 36 MiB of SciPy, which transformers
imports where it is installed. Measured on CPUs; on GPUs the context, kernels and NCCL's buffers, by assumption."""

Kind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Parts:
    """Bytes per rank by what takes them. `copy` is the policy with its adapter merged, for rollouts."""

    weights: float = 0.0
    adapters: float = 0.0
    copy: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    logits: float = 0.0
    framework: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def plus(self, **more: float) -> Parts:
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class Need:
    """Parameters held (shared bases once), parameters trained, and what each phase takes of a rank's memory."""

    parameters: int
    trained: int
    phases: dict[str, Parts]

    @property
    def peak(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def bytes(self) -> float:
        return self.phases[self.peak].total

    @property
    def gib(self) -> float:
        return self.bytes / 2**30


TASK_PROMPT = 1024
"""Tokens of the longest prompt that is counted for suites whose prompts are in files: problems with their examples."""


@dataclass(frozen=True)
class Held:
    """A stage's models as they lie on a rank."""

    shapes: list[tuple[Role, Shape]]
    parameters: int
    groups: list[int]
    weights: float
    adapters: float
    policy: int
    file: float

    @property
    def trained(self) -> int:
        return sum(self.groups)

    @property
    def largest(self) -> int:
        return max(form.largest for _, form in self.shapes)


def estimate(
    recipe: Recipe, stage: str, configs: Path | None = None, kind: Kind = "cuda", *, merged: bool = False
) -> Need:
    """What a stage needs on each rank of a GPU or CPU machine.

    `merged` counts the copy of the policy's weights that rollouts with a merged adapter take; `sampling.adapter: merged`
    counts it in any case.
    """
    block = _with_virtual_tokens(recipe.stages[stage])
    engine = Engine.of(recipe, stage, BYTES[block.base.dtype], _accumulation(block), cpu=kind == "cpu")
    held = _held(recipe, stage, engine, configs)
    base = Parts(weights=held.weights, adapters=held.adapters, framework=FRAMEWORK[kind])
    phases = {"loading": base.plus(weights=held.file)} if engine.cpu else {}
    if isinstance(block, Evaluate):
        rows = block.micro_batch
        if block.prompts:
            phases["rollout"] = _rollout(base, block, block.sampling, rows, 1, held, engine)
            phases["scoring"] = _scoring(base, block, block.sampling, rows, held, engine)
        if (reads := block.longest_read()) is not None:
            read = Sampling(max_prompt_length=reads, max_response_length=1)
            phases["reading"] = _scoring(base, block, read, rows, held, engine)
        if (writes := block.longest_reply()) is not None:
            write = Sampling(max_prompt_length=TASK_PROMPT, max_response_length=writes, batch=rows)
            phases["writing"] = _rollout(base, block, write, rows, 1, held, engine)
        return Need(held.parameters, 0, phases)

    if isinstance(block, Merge):
        return Need(held.parameters, 0, {"combining": base})
    if isinstance(block, Export):  # merged in float32, and a copy in the dtype that is written
        return Need(held.parameters, 0, {"merging": base.plus(copy=4.0 * held.parameters)})
    if isinstance(block, Selection):
        read = Sampling(max_prompt_length=block.max_length, max_response_length=1)
        if block.necessity is not None:
            phases["rollout"] = _rollout(base, block, block.sampling, block.micro_batch, 1, held, engine)
        phases["scoring"] = _scoring(base, block, read, block.micro_batch, held, engine)
        return Need(held.parameters, 0, phases)

    groups, trained = held.groups, held.trained
    average = 4.0 * held.policy if engine.cpu and isinstance(block, Ppo) and block.ema_decay else 0.0
    phases["setting up"] = base.plus(optimizer=engine.setting_up(groups))
    # AdaLoRA's two running means of every weight's importance, in float32 and whole on every rank.
    statistics = 8.0 * trained if block.adapter.method == "adalora" else 0.0
    base = base.plus(gradients=engine.held(trained), optimizer=engine.resident(trained) + average + statistics)
    if isinstance(block, Distill) and block.lmbda:
        phases["rollout"] = _rollout(base, block, block.sampling, block.batch // block.deepspeed.ranks, 1, held, engine)
    if isinstance(block, Ppo):
        slots, micro = block.rollout_batch // block.deepspeed.ranks, _micro(block)
        copied = base.plus(copy=_copy(block, held, engine)) if merged or block.sampling.adapter == "merged" else base
        phases["rollout"] = _rollout(copied, block, block.sampling, slots, block.samples_per_prompt, held, engine)
        phases["scoring"] = _scoring(base, block, block.sampling, micro, held, engine)
    waits = _supervised(block, held, engine) if isinstance(block, Supervised) else _ppo(block, held, engine)
    phases["backward"] = base.plus(
        gradients=engine.accumulated(trained) + engine.buckets(trained),
        activations=waits.kept + waits.whole,
        logits=waits.logits,
    )
    phases["reduction"] = base.plus(
        gradients=engine.reducing(trained), activations=(waits.kept + waits.whole) * engine.left(trained)
    )
    waiting, temporary = engine.stepping(groups, held.largest)
    phases["step"] = base.plus(gradients=waiting, optimizer=temporary)
    if engine.cpu:
        phases["publishing"] = base.plus(weights=held.policy * engine.size)  # gathered whole on the first rank
    return Need(held.parameters, trained, phases)


def _with_virtual_tokens(block: Stage) -> Stage:
    """`block` with texts as much longer as its adapter puts tokens before them."""
    if not METHODS[block.adapter.method].prefixed:
        return block
    more = block.adapter.num_virtual_tokens
    if isinstance(block, Supervised) and not isinstance(block, Distill):
        return block.model_copy(update={"max_length": block.max_length + more})
    if isinstance(block, Selection | Distill):
        block = block.model_copy(update={"max_length": block.max_length + more})
    assert isinstance(block, Ppo | Evaluate | Selection | Distill)
    longer = {"max_prompt_length": block.sampling.max_prompt_length + more}
    return block.model_copy(update={"sampling": block.sampling.model_copy(update=longer)})


def _held(recipe: Recipe, stage: str, engine: Engine, configs: Path | None) -> Held:
    """Every distinct base once, adapters and heads per role; sharded under ZeRO-3."""
    where, size, ranks = recipe.where("stages", stage, "base"), engine.size, engine.share(3)
    shapes = [(r, shape(read(recipe.local(r.model), where, configs), where)) for r in roles(recipe, stage)]
    shared: dict[tuple[str, ...], list[tuple[Role, Shape]]] = {}
    for (role, form), trunk in zip(shapes, trunks([role for role, _ in shapes]), strict=True):
        if not role.head_only:
            shared.setdefault(trunk, []).append((role, form))

    parameters, weights, beside, file = 0, 0.0, 0.0, 0.0
    whole: dict[str, int] = {}  # parameters of the trunk that a role trains whole
    for sharers in shared.values():
        first, form = sharers[0]
        packed = first.quantization is not None
        other = form.other - (0 if any(role.speaks for role, _ in sharers) else form.head)
        parameters += form.linear + other
        whole |= {role.name: form.linear + other for role, _ in sharers if role.trained}
        linear = form.linear * (NF4_BYTES if packed else size)
        if all(role.unsharded for role, _ in sharers):
            beside += linear + other * size
            continue
        # Packed weights are sharded as the 16-bit numbers they are stored as on GPUs; on CPUs they are bytes, and whole.
        weights += linear / (1 if packed and engine.cpu else ranks)
        weights += other * size / ranks
        if packed or engine.level == 3 or STORED.get(form.stored, 2) != size:
            # Converted or sharded while the file is mapped; else its pages are the weights.
            file = max(file, float((form.linear + form.other) * STORED.get(form.stored, 2)))

    attached, groups = 0.0, []
    for role, form in shapes:
        head = 0 if role.speaks else form.width * role.outputs
        attached += head * size + _adapter(role, form, engine)
        if role.trained and role.head_only:
            groups.append(head)
        elif role.trained:
            groups.append(head + (adapters.trained(role.adapter, form) if role.adapter else whole[role.name]))
    if engine.offload_weights:
        weights = 0.0
    return Held(shapes, parameters, groups, weights + beside, attached, groups[0] if groups else 0, file)


def _adapter(role: Role, form: Shape, engine: Engine) -> float:
    """A role's adapter. ZeRO-3 keeps small tensors whole beside their shards."""
    if role.adapter is None or role.head_only:
        return 0.0
    total = 0.0
    for tensor in adapters.tensors(role.adapter, form):
        copies = 1.0 if engine.level < 3 else 1 / engine.ranks + (tensor.elements <= engine.persistent)
        total += tensor.count * tensor.elements * engine.size * copies
    return total + adapters.frozen(role.adapter, form) * engine.size


def _copy(block: Ppo, held: Held, engine: Engine) -> float:
    """The policy that rollouts are sampled from: its adapted layers once more, or all of it where it is sharded."""
    form = held.shapes[0][1]
    if engine.level == 3:
        return float(form.parameters * engine.size)
    adapted = [] if block.adapter.is_full else adapters.targeted(block.adapter, form)
    return float(sum(layer.count * layer.inputs * layer.outputs for layer in adapted) * engine.size)


def _accumulation(block: Stage) -> int:
    if isinstance(block, Supervised):
        return split_batch("", block.batch, block.deepspeed.ranks, block.micro_batch)[1]
    if isinstance(block, Ppo):
        return 2  # at least: how many micro-batches a minibatch is cut into depends on its lengths
    return 1


def _micro(block: Supervised | Ppo) -> int:
    if isinstance(block, Ppo):  # in tokens of so many rows of full length
        return min(block.micro_batch or 16, block.rollout_batch // block.minibatches // block.deepspeed.ranks)
    return split_batch("", block.batch, block.deepspeed.ranks, block.micro_batch)[0]


def _rollout(
    base: Parts, block: Stage, sampling: Sampling, rows: int, samples: int, held: Held, engine: Engine
) -> Parts:
    """The cache of all slots, the prefill of their prompts, and a decoding step's logits."""
    role, form = held.shapes[0]
    slots = min(sampling.batch, rows)
    columns = _round_up(sampling.max_prompt_length + sampling.max_response_length - 1, 16)
    cache = slots * columns * form.cached(engine.size)
    # Without CUDA graphs the last responses go on in a smaller batch: keys of 3/4 of the slots beside all of them.
    shrinking = 3 / 8 if engine.cpu or engine.level == 3 else 0.0
    together = samples if sampling.engine == "static" else 1  # samples of a prompt that share its prefill
    prefill = -(-slots // together) * (sampling.max_prompt_length - 1)
    return base.plus(
        cache=cache * (1 + shrinking),
        activations=_passing(block, role, form, prefill, sampling.max_prompt_length, held, engine),
        # Log-probabilities and probabilities in float32, and their sum so far in float64.
        logits=slots * form.vocabulary * (engine.size + 4 + 4 + 8),
    )


def _scoring(base: Parts, block: Stage, sampling: Sampling, rows: int, held: Held, engine: Engine) -> Parts:
    """A forward pass without gradients on the base that takes most, in PPO by all roles with an adapter on it together, and
    one chunk of logits."""
    length = sampling.max_prompt_length + sampling.max_response_length
    places = trunks([role for role, _ in held.shapes])
    together = Counter(
        trunk for (role, _), trunk in zip(held.shapes, places, strict=True) if role.mixes and not role.head_only
    )
    passing, logits = 0.0, 0.0
    for (role, form), trunk in zip(held.shapes, places, strict=True):
        times = max(1, together[trunk]) if isinstance(block, Ppo) else 1
        passing = max(passing, _passing(block, role, form, times * rows * length, length, held, engine))
        if role.speaks:
            elements = min(rows * sampling.max_response_length, _chunk(form)) * form.vocabulary
            logits = max(logits, elements * (engine.size + 12))  # scaled, their softmax, and the product of both
    return base.plus(activations=passing, logits=logits)


def _passing(block: Stage, role: Role, form: Shape, tokens: int, length: int, held: Held, engine: Engine) -> float:
    """A forward pass without gradients: one block's tensors, and what of the weights is unpacked or gathered for it."""
    found = tokens * form.passing(engine.size, adapted=role.adapter is not None)
    eager = tokens * length * _probabilities(block, form, engine.size)
    return found + eager + _whole(role, form, engine)


def _probabilities(block: Stage, form: Shape, size: int) -> int:
    """Bytes of attention's probabilities per token and column: float32 and the model's dtype, where they are kept."""
    return form.heads * (4 + (size if size < 4 else 0)) if block.base.attn_implementation == "eager" else 0


def _sharded(role: Role, form: Shape, engine: Engine) -> float:
    """Numbers of a weight's size that ZeRO-3 shards of a base: not those packed in 4 bits on CPUs, which are bytes there."""
    if role.quantization is None:
        return form.parameters
    return form.other + (0 if engine.cpu else form.linear * NF4_BYTES / engine.size)


def _whole(role: Role, form: Shape, engine: Engine) -> float:
    """Weights as they are multiplied with: what ZeRO-3 has gathered, and one 4-bit layer unpacked."""
    unpacked = max(layer.inputs * layer.outputs for layer in form.linears) * engine.size if role.quantization else 0
    return unpacked + engine.gathered(_sharded(role, form, engine), form.largest)


@dataclass(frozen=True)
class Waiting:
    """What lies between a micro-batch's forward and backward pass: `kept` by the blocks, `whole` weights that ZeRO-3 has
    gathered or that are unpacked from 4 bits, `logits`."""

    kept: float
    whole: float
    logits: float


def _supervised(block: Supervised, held: Held, engine: Engine) -> Waiting:
    (policy, form), *_ = held.shapes
    length = block.longest(block.max_length) if isinstance(block, Distill) else block.max_length
    tokens = _micro(block) * length * (2 if isinstance(block, Reward | Dpo) else 1)
    kept = _saved(block, policy, form, tokens, length, engine, masked=not isinstance(block, Distill))
    whole = _whole(policy, form, engine)
    if (
        engine.level == 3
    ):  # one order of modules, step for step: what is used again soon stays, beside what is prefetched
        sharded = _sharded(policy, form, engine)
        whole = max(whole, (min(sharded, REUSE) + min(sharded, engine.prefetch)) * engine.size)
    logits = _fused_head(policy, form, tokens, engine) if isinstance(block, Sft | Pretrain | Dpo | Kto) else 0.0
    if isinstance(block, Distill):
        logits = _two_heads(block, policy, form, tokens, engine)
        teacher, other = held.shapes[1]  # its pass is over before the student's begins
        kept = max(kept, _passing(block, teacher, other, tokens, length, held, engine) - whole)
    return Waiting(kept, whole, logits)


def _ppo(block: Stage, held: Held, engine: Engine) -> Waiting:
    """Policy and critic keep their activations; then the critic's backward pass goes first. A head that does not train has
    computed its gradient in the forward pass, before the critic's. Else the scaled logits wait until the policy's turn, unless
    they are computed again; then the critic's activations are gone and the logits' gradients are made."""
    assert isinstance(block, Ppo)
    (policy, form), *_ = held.shapes
    sampling, micro = block.sampling, _micro(block)
    length = sampling.max_prompt_length + sampling.max_response_length
    mixed = (
        block.ptx.max_length if block.ptx else 0
    )  # one row of the supervised loss, where that is more than a micro-batch
    kept = {
        role.name: _saved(
            block, role, own, max(micro * length, mixed if role.name == "policy" else 0), length, engine, masked=False
        )
        for role, own in held.shapes
        if role.trained and not role.head_only
    }
    rows = micro * sampling.max_response_length
    elements = min(rows, _chunk(form)) * form.vocabulary
    if policy.adapter is not None and not block.entropy_coef and engine.level < 3:
        # Logits, log-probabilities and probabilities, the latter in the head's dtype too.
        waiting, turning = 0, elements * (engine.size + 8 + (engine.size if engine.size < 4 else 0))
    else:
        waiting, turning = 4 * elements if rows <= _chunk(form) else 0, elements * (engine.size + 16)
    whole = _whole(policy, form, engine)
    if turning > waiting + (kept.get("critic", 0.0) if engine.level else 0.0):
        return Waiting(kept["policy"], whole, float(turning))
    # Without ZeRO the policy's backward pass is over before the critic's forward pass begins.
    return Waiting(max(kept.values()) if engine.level == 0 else sum(kept.values()), whole, float(waiting))


def _saved(block: Stage, role: Role, form: Shape, tokens: int, length: int, engine: Engine, *, masked: bool) -> float:
    """What the blocks keep of `tokens` tokens; with checkpointing the input of every block, and all of one of them."""
    each = form.kept(engine.size, role.adapter, masked=masked) * tokens
    each += form.layers * tokens * length * _probabilities(block, form, engine.size)
    if getattr(block, "gradient_checkpointing", False):
        return form.layers * form.hidden * engine.size * tokens + each / form.layers
    return float(each)


def _two_heads(block: Distill, role: Role, form: Shape, tokens: int, engine: Engine) -> float:
    """One chunk of both models' logits and of what a divergence keeps of them in float32: two log-probabilities, their
    probabilities and differences, for the generalised JSD the mixture and its terms; and two gradients. All targets at once
    where ZeRO-3 shards a head that trains. Counted from the formula."""
    together = engine.level == 3 and role.adapter is None
    elements = (tokens if together else min(tokens, _chunk(form))) * form.vocabulary
    kept = 4 if block.beta in (0.0, 1.0) else 9
    return float(elements * (2 * engine.size + 4 * (kept + 2)))


def _fused_head(role: Role, form: Shape, tokens: int, engine: Engine) -> float:
    """TRL's output head: one piece of logits, turned into its gradient in place by a kernel or, on CPUs, by seven float32
    tensors and a mask; the head's float32 gradient where it trains."""
    piece = min(tokens, TILE_TOKENS) * min(form.vocabulary, TILE_VOCABULARY)
    head = 4 * form.vocabulary * form.width if role.adapter is None else 0
    return piece * (engine.size + (29 if engine.cpu else 0)) + head


def _chunk(form: Shape) -> int:
    """Tokens whose logits are computed at a time."""
    return max(1, CHUNK_ELEMENTS // max(1, form.vocabulary))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
