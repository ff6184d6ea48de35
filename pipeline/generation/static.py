"""Relay's own rollout engine: a fixed number of slots decode together in a preallocated key-value cache, and a slot whose
response has ended takes the next prompt.

Same contract and same tokens as the reference engine, `pipeline.generation.hf`. A prompt's last token is not prefilled but
decoded: every response token, the first one included, then comes out of one step whose shapes never change.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from pipeline.adapters.prefix import ATTENTION as PREFIX
from pipeline.config.schema import Sampling
from pipeline.generation.hf import pack
from pipeline.generation.rollout import Rollout, at_position, pick
from pipeline.watchdog import progress

log = logging.getLogger(__name__)


def supported(model: Any) -> str | None:
    """None if this engine can decode `model`, else why not, in one line."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    taken = set(inspect.signature(type(model).forward).parameters)
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model"
    if missing := {"position_ids", "past_key_values", "logits_to_keep"} - taken:
        return f"{name}.forward does not take {', '.join(sorted(missing))}"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} computes attention in its own way, not through transformers' attention interface"
    if config._attn_implementation not in ("sdpa", "eager", PREFIX):
        return f"attention implementation {config._attn_implementation} takes no mask of each row's own; use sdpa"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return f"{name} has attention that is not causal"
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    if other := sorted(layer.__name__ for layer in layers - {DynamicLayer}):
        return f"{name} keeps {', '.join(other)} caches (sliding window, linear or shared attention)"
    kinds = {kind for module in model.modules() for kind in _rope_types(module)}
    if moving := sorted(kind for kind in kinds if "dynamic" in kind or kind == "longrope"):
        return f"{name}'s {', '.join(moving)} RoPE depends on the longest row of the batch"
    return None


def _rope_types(module: Any) -> list[str]:
    """The kinds of RoPE a module computes, one for each type of layer where they differ."""
    kind = getattr(module, "rope_type", None)
    return [kind] if isinstance(kind, str) else list(kind.values()) if isinstance(kind, dict) else []


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    keys: Tensor | None,
    sampling: Sampling,
    *,
    pad: int,
    eos: list[int],
    synced: bool = False,
    slots: int,
) -> Rollout:
    """Sample one response per prompt, at most `slots` at a time; the other arguments are those of `hf.sample`.

    The cache holds `slots` times (longest prompt + `max_response_length`) tokens, however many prompts there are.
    """
    _check(model, prompts, sampling, slots)
    run = _Run(model, prompts, keys, sampling, eos, min(slots, len(prompts)), synced)
    while run.waiting or run.live:
        run.admit()
        run.step()
        progress()
    while synced and _any_rank(False, model.device):
        run.idle()
        progress()
    rollout = pack(prompts, run.tokens[:-1], run.logprobs[:-1], eos, pad)
    return replace(rollout, logprobs=rollout.logprobs[:, : int(rollout.lengths.max())])


def _check(model: Any, prompts: list[list[int]], sampling: Sampling, slots: int) -> None:
    if not prompts or slots < 1:
        raise ValueError(f"nothing to sample: {len(prompts)} prompts, {slots} slots")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no tokens")
        if limit is not None and len(prompt) + sampling.max_response_length > limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens: with a response of up to {sampling.max_response_length} it does "
                f"not fit the model's context of {limit}"
            )


class SlotCache(Cache):
    """Keys and values of `slots` rows; column c of a row holds its token at position c.

    keys, values: for each layer [slots, heads, columns, head size], in the model's dtype, keys after RoPE. Columns past a
    row's position hold what padding or an earlier occupant left there; the attention mask hides them.
    """

    def __init__(self, slots: int, columns: int) -> None:
        super().__init__(layers=[])
        self.slots, self.columns = slots, columns
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._targets: tuple[Tensor, Tensor] | None = None
        self._position, self._width = torch.zeros(slots, dtype=torch.int64), columns

    def fill(self, slots: Tensor, rows: Tensor) -> None:
        """The next forward is a prefill: row `rows[i]` of its batch goes to slot `slots[i]`; int64 [n] each."""
        self._targets = (slots, rows)

    def extend(self, position: Tensor, width: int) -> None:
        """The next forward is a step: it writes column `position` (int64 [slots]) and reads the first `width` columns."""
        self._targets, self._position, self._width = None, position, width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by each attention layer with its [rows, heads, tokens, head size]; returns what it attends to."""
        if layer_idx == len(self.keys):
            # Zeros and not `empty`: a hidden column counts zero times its value, and zero times NaN is NaN.
            for buffers, new in ((self.keys, key_states), (self.values, value_states)):
                buffers.append(new.new_zeros(self.slots, new.shape[1], self.columns, new.shape[3]))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        if self._targets is not None:
            slots, rows = self._targets
            keys[slots, :, : key_states.shape[2]] = key_states[rows]
            values[slots, :, : value_states.shape[2]] = value_states[rows]
            return key_states, value_states
        slots = torch.arange(len(keys), device=keys.device)
        keys[slots, :, self._position] = key_states[:, :, 0]
        values[slots, :, self._position] = value_states[:, :, 0]
        return keys[:, :, : self._width], values[:, :, : self._width]

    def keep(self, slots: Tensor) -> None:
        """Drop all slots but these."""
        self.keys = [layer[slots] for layer in self.keys]
        self.values = [layer[slots] for layer in self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing precedes a prefill; in a step, position ids and mask say what does."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


class _Run:
    """One call of `sample`: N prompts, S slots, responses of up to T tokens.

    state      int64 [4, S]        token to feed, its position, response tokens so far, prompt (N: the slot is idle)
    tokens     int64 [N + 1, T]    sampled tokens; idle slots write to the last row
    logprobs   float32 [N + 1, T]  of the sampled tokens
    """

    def __init__(
        self,
        model: Any,
        prompts: list[list[int]],
        keys: Tensor | None,
        sampling: Sampling,
        eos: list[int],
        slots: int,
        synced: bool,
    ) -> None:
        device, count, width = model.device, len(prompts), sampling.max_response_length
        self.model, self.prompts, self.sampling, self.synced = model, prompts, sampling, synced
        # Prompts of one length together waste no padding in a prefill; equal prompts together share its rows.
        self.waiting = deque(sorted(range(count), key=lambda row: (-len(prompts[row]), prompts[row])))
        # Slot -> its position minus the clock: how wide a step is, without asking the device.
        self.live: dict[int, int] = {}
        self.clock = 0
        self.none = count
        self.state = torch.zeros(4, slots, dtype=torch.int64, device=device)
        self.state[3] = self.none
        self.tokens = torch.zeros(count + 1, width, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(count + 1, width, device=device)
        self.keys = None if keys is None else torch.cat([keys, keys.new_zeros(1)]).to(device)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self.cache = SlotCache(slots, _round_up(max(map(len, prompts)) + width - 1, 16))
        self.columns = torch.arange(self.cache.columns, device=device)
        self.graphs = _Graphs() if device.type == "cuda" and not synced else None

    def admit(self) -> None:
        """Give waiting prompts to idle slots, once there are enough of those for one prefill to be worth it."""
        slots = self.state.shape[1]
        idle = [slot for slot in range(slots) if slot not in self.live][: len(self.waiting)]
        if len(idle) < max(1, min(-(-slots // 4), len(self.waiting))):
            return
        device = self.state.device
        chosen = [(slot, self.waiting.popleft()) for slot in idle]
        fresh = [[self.prompts[row][-1], len(self.prompts[row]) - 1, 0, row] for _, row in chosen]
        self.state[:, torch.tensor(idle, device=device)] = torch.tensor(fresh, device=device).T
        self.live |= {slot: len(self.prompts[row]) - 1 - self.clock for slot, row in chosen}

        texts = [(slot, tuple(self.prompts[row][:-1])) for slot, row in chosen if len(self.prompts[row]) > 1]
        if texts:
            number = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in texts))}
            width = max(map(len, number))
            # Padded on the right, where causal attention needs no mask; by any token but `pad`, at which models warn.
            ids = torch.tensor([[*text, *[text[-1]] * (width - len(text))] for text in number], device=device)
            self.cache.fill(*torch.tensor([(slot, number[text]) for slot, text in texts], device=device).T)
            self._forward(ids, torch.arange(width, device=device).expand_as(ids), None)

    def step(self) -> None:
        """Sample one token in every live slot and free the slots whose response ended."""
        width = self.clock + max(self.live.values()) + 1
        ended = self.graphs.decode(self, width) if self.graphs else self.decode(_round_up(width, 16))
        self.clock += 1
        for slot in ended.nonzero().flatten().tolist():
            del self.live[slot]
        if not self.waiting and not self.graphs and 0 < 4 * len(self.live) <= 3 * self.state.shape[1]:
            self._shrink()

    def decode(self, width: int) -> Tensor:
        """One step over the first `width` columns, without the host; returns which slots ended, bool [S]."""
        token, position, step, prompt = self.state
        hidden = (self.columns[:width] > position.unsqueeze(1))[:, None, None]
        dtype = self.cache.keys[0].dtype if self.cache.keys else self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
        self.cache.extend(position, width)
        logits = self._forward(token.unsqueeze(1), position.unsqueeze(1), mask)

        logprobs = torch.log_softmax(logits.float() / self.sampling.temperature, dim=-1)
        keys = None if self.keys is None else at_position(self.keys[prompt], step)
        chosen = pick(logprobs, keys, self.sampling)
        self.tokens[prompt, step] = chosen
        self.logprobs[prompt, step] = logprobs.gather(1, chosen.unsqueeze(1)).squeeze(1)

        over = (chosen.unsqueeze(1) == self.eos).any(1) | (step == self.sampling.max_response_length - 1)
        ended = over & (prompt < self.none)
        token.copy_(chosen)
        prompt.masked_fill_(ended, self.none)
        self.state[1:3] += prompt < self.none  # idle slots stay where they are, inside the cache
        return ended

    def idle(self) -> None:
        """Take part in a forward of other ranks, on one token."""
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=self.state.device)
        self.model(input_ids=nothing, position_ids=nothing, use_cache=False, logits_to_keep=1)

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [rows, V] of the last column."""
        if self.synced:
            _any_rank(True, ids.device)
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    def _shrink(self) -> None:
        """Let the last responses run in a smaller batch."""
        slots = sorted(self.live)
        index = torch.tensor(slots, device=self.state.device)
        self.state = self.state[:, index]
        self.cache.keep(index)
        self.live = {new: self.live[old] for new, old in enumerate(slots)}


class _Graphs:
    """CUDA graphs of the step, one for each of at most nine widths. Not measured: written without a GPU at hand."""

    def __init__(self) -> None:
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor] | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def decode(self, run: _Run, width: int) -> Tensor:
        """`run.decode` over at least `width` columns; the first time at a width without a graph, as kernels load then."""
        width = min(_round_up(width, _round_up(run.cache.columns // 8, 64)), run.cache.columns)
        if width not in self.captured:
            self.captured[width] = None
            return run.decode(width)
        found = self.captured[width]
        if found is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    ended = run.decode(width)
            except RuntimeError as error:
                log.warning("rollouts run without CUDA graphs: %s", str(error).splitlines()[0])
                run.graphs = None
                return run.decode(width)
            found = self.captured[width] = (graph, ended)
        found[0].replay()
        return found[1]


def _any_rank(unfinished: bool, device: torch.device) -> bool:
    """Whether any rank still samples. Every rank asks before each forward, so that all run equally many."""
    flag = torch.tensor(int(unfinished), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
