"""Policy, reference, critic and reward: roles that share one copy of a base's weights wherever their bases are equal.

A trunk is one loaded model. A role is a trunk, the adapter that is active for it (or none) and, for critic and reward, a
scalar head. All calls go through `Roles.forward`, so that under DeepSpeed one engine holds every role and its ZeRO-3
hooks see every module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.adapters import build
from pipeline.adapters.new_rows import Rows
from pipeline.adapters.soft_prompt import virtual_ids
from pipeline.config.schema import Sampling
from pipeline.generation import engines
from pipeline.generation.rollout import Rollout
from pipeline.generation.whole import Whole
from pipeline.model.likelihood import of_logits, plain_head, token_log_probs


@dataclass(frozen=True)
class Role:
    """Where a role's weights are: trunk, adapter active in it (None: base weights alone), and whether they train.

    A role that `reads` another one's hidden states has a head of its own and nothing else.
    """

    trunk: str
    adapter: str | None
    trained: bool
    reads: str | None = None


class Roles(nn.Module):
    """The roles of PPO. `trunks` are causal language models or sequence classifiers, plain or with adapters."""

    trunks: Any  # ModuleDicts of transformers and PEFT models, and of linear layers
    heads: Any

    def __init__(self, trunks: dict[str, Any], heads: dict[str, nn.Linear], roles: dict[str, Role]) -> None:
        super().__init__()
        self._engines: dict[tuple[str, str], str] = {}
        self._whole: dict[str, Whole] = {}
        self.sharded = False  # set under ZeRO-3, where ranks must call the same modules equally often
        self.trunks, self.heads, self.roles = nn.ModuleDict(trunks), nn.ModuleDict(heads), roles
        self._tuners = {
            name: [m for m in trunk.modules() if isinstance(m, BaseTunerLayer)] for name, trunk in trunks.items()
        }
        for trunk in trunks.values():
            trunk.requires_grad_(False)
        for name in heads:
            heads[name].requires_grad_(roles[name].trained)
        self._virtual = {name: virtual_ids(trunks[role.trunk], role.adapter) for name, role in roles.items()}
        for name, role in roles.items():
            if role.trained:
                for parameter in self._trunk_parameters(role):
                    parameter.requires_grad_(True)
            self.use(name)

    def forward(self, call: str, *args: Any, **kwargs: Any) -> Any:
        """Run one of the methods below through the module's (and so the engine's) hooks."""
        return getattr(self, call)(*args, **kwargs)

    def trainable(self, role: str) -> list[nn.Parameter]:
        """The parameters that training `role` changes: its adapter or whole trunk, and its head."""
        head = list(self.heads[role].parameters()) if role in self.heads else []
        return [*self._trunk_parameters(self.roles[role]), *head]

    def named_trainable(self, role: str) -> list[tuple[str, nn.Parameter]]:
        """`trainable` with full names."""
        wanted = {id(parameter) for parameter in self.trainable(role)}
        return [(name, parameter) for name, parameter in self.named_parameters() if id(parameter) in wanted]

    def _trunk_parameters(self, role: Role) -> list[nn.Parameter]:
        if role.reads is not None:
            return []
        trunk = self.trunks[role.trunk]
        return list(trunk.parameters()) if role.adapter is None else build.trained(trunk, role.adapter)

    def virtual(self, role: str) -> list[int]:
        """The virtual tokens that stand before every text the role reads; nearly always none."""
        return self._virtual[role]

    def use(self, role: str) -> None:
        """Make the role's adapter the active one in its trunk, without touching what requires gradients."""
        where = self.roles[role]
        for layer in self._tuners[where.trunk]:
            layer._disable_adapters = where.adapter is None
            if where.adapter is not None:
                layer._active_adapter = [where.adapter]

    def causal_lm(self, role: str) -> Any:
        """The role's language model, its adapter active."""
        self.use(role)
        trunk = self.trunks[self.roles[role].trunk]
        return trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk

    def rollout(
        self,
        role: str,
        prompts: list[list[int]],
        noise: Tensor | None,
        sampling: Sampling,
        *,
        pad: int,
        eos: list[int],
        synced: bool,
    ) -> Rollout:
        """Sample the role's replies with the recipe's engine; see `pipeline.generation.hf.sample`.

        All `prompts` are sampled, `sampling.batch` at a time.
        """
        if role in self._whole:
            with self._whole[role].of(self.roles[role].adapter, sharded=self.sharded) as model:
                engine = self._engine(role, model, sampling.engine)
                return engines.sample(engine, model, prompts, noise, sampling, pad=pad, eos=eos)
        model, before = self.causal_lm(role), self._virtual[role]
        engine = self._engine(role, model, sampling.engine)
        asked = [before + prompt for prompt in prompts]
        rollout = engines.sample(engine, model, asked, noise, sampling, pad=pad, eos=eos, synced=synced)
        return rollout.without_first(len(before))

    def sample_whole(self, role: str) -> None:
        """From now on roll `role` out by a copy with its adapter merged in, whole on every rank; before DeepSpeed starts."""
        self._whole[role] = Whole(self.causal_lm(role))

    def samples_whole(self, role: str) -> bool:
        return role in self._whole

    def _engine(self, role: str, model: Any, wanted: str) -> str:
        """The engine that samples `role`: the wanted one, or `hf` where that cannot; a fallback is told once."""
        if (role, wanted) not in self._engines:
            reason = engines.unsupported(wanted, model)
            self._engines[role, wanted] = "hf" if reason else wanted
            if reason:
                print(f"rollouts of {role} use Hugging Face's generate: {reason}", flush=True)
        return self._engines[role, wanted]

    def read(
        self, roles: list[str], tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor, width: int, temperature: float
    ) -> dict[str, Tensor]:
        """What each role says of responses, without gradients: log-probabilities of one that speaks and values of the critic,
        float32 [B, width]; scores of a reward model, float32 [B]. Layout as in `log_probs`.

        Roles on one trunk go through it together where their adapters can, each row with its role's; else one by one.
        """
        found: dict[str, Tensor] = {}
        hidden = self._hidden_of(roles, tokens)
        for role in roles:
            if role == "critic":
                found[role] = self._values(role, hidden[role], prompt_lengths, width)
            elif role in self.heads:
                ends = prompt_lengths + lengths - 1
                found[role] = self._head(role, hidden[role][torch.arange(len(tokens), device=tokens.device), ends])
            else:
                asked = (hidden[role], tokens, prompt_lengths, lengths, width, temperature, False)
                found[role] = self._log_probs(role, *asked)[0]
        return found

    def _hidden_of(self, roles: list[str], tokens: Tensor) -> dict[str, Tensor]:
        """Each role's last hidden states [B, L, H]."""
        found: dict[str, Tensor] = {}
        for trunk in dict.fromkeys(self.roles[role].trunk for role in roles):
            sharers = [role for role in roles if self.roles[role].trunk == trunk]
            adapters = list(dict.fromkeys(self.roles[role].adapter for role in sharers))
            if len(adapters) == 1 or not all(_mixes(layer, self.sharded) for layer in self._tuners[trunk]):
                speaker = {self.roles[role].adapter: role for role in reversed(sharers)}
                states = {adapter: self._hidden(speaker[adapter], tokens) for adapter in adapters}
            else:
                with self._side_by_side(trunk, adapters):
                    together = self._forward(sharers[0], tokens.repeat(len(adapters), 1))
                states = dict(zip(adapters, together.chunk(len(adapters)), strict=True))
            found |= {role: states[self.roles[role].adapter] for role in sharers}
        return found

    @contextmanager
    def _side_by_side(self, trunk: str, adapters: list[str | None]) -> Iterator[None]:
        """Apply each LoRA adapter to an equal part of the next batch, the first to the first. PEFT can too, but in the order
        of a set, which differs between ranks: under ZeRO-3 they would wait for each other.

        A part is a share of a layer's first dimension, which need not count rows: OPT's feed-forward layers are given
        [B L, H].
        """

        def add(layer: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
            parts = zip(adapters, args[0].chunk(len(adapters)), result.chunk(len(adapters)), strict=True)
            for adapter, given, part in parts:
                if isinstance(layer, Rows):
                    if adapter is not None and adapter in layer.trainable_tokens_delta:
                        part.copy_(layer.put(adapter, given, part))
                elif adapter in layer.lora_A:
                    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
                    part += up(down(given.to(down.weight.dtype))) * layer.scaling[adapter]

        hooks = [layer.register_forward_hook(add) for layer in self._tuners[trunk]]
        for layer in self._tuners[trunk]:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def log_probs(
        self,
        role: str,
        tokens: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
        width: int,
        temperature: float,
        *,
        learn_entropy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(log-probability of each response token, entropy at each), float32 [B, width], 0 past each response.

        `tokens` int64 [B, L] hold prompt and response without a gap, padded on the right; the response of row b starts at
        `prompt_lengths[b]` and has `lengths[b]` tokens, at most `width`. Only those go through the output head. The entropy
        has gradients only if `learn_entropy`.
        """
        hidden = self._hidden(role, tokens) if plain_head(self.causal_lm(role)) else None
        return self._log_probs(role, hidden, tokens, prompt_lengths, lengths, width, temperature, learn_entropy)

    def log_probs_and_values(
        self,
        role: str,
        critic: str,
        tokens: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
        width: int,
        temperature: float,
        *,
        learn_entropy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`log_probs` of `role` and `values` of a `critic` that reads its hidden states, in one pass. The values have
        gradients for the critic's head alone."""
        hidden = self._hidden(role, tokens)
        asked = (role, hidden, tokens, prompt_lengths, lengths, width, temperature, learn_entropy)
        return *self._log_probs(*asked), self._values(critic, hidden, prompt_lengths, width)

    def values(self, role: str, tokens: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
        """Value before each response token, float32 [B, width]; layout as in `log_probs`."""
        return self._values(role, self._hidden(role, tokens), prompt_lengths, width)

    def _log_probs(
        self,
        role: str,
        hidden: Tensor | None,
        tokens: Tensor,
        prompt_lengths: Tensor,
        lengths: Tensor,
        width: int,
        temperature: float,
        learn_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        model = self.causal_lm(role)
        steps = torch.arange(width, device=tokens.device)
        row, step = (steps < lengths.unsqueeze(1)).nonzero(as_tuple=True)
        column = prompt_lengths[row] + step
        targets = tokens[row, column]
        if hidden is not None and plain_head(model):
            chosen, entropy = token_log_probs(
                model.get_output_embeddings(),
                hidden[row, column - 1],
                targets,
                temperature,
                learn_entropy=learn_entropy,
                recompute=self._recompute(self._tuners[self.roles[role].trunk], self.sharded),
                together=self.sharded,
            )
        else:
            first = int(prompt_lengths.min()) - 1
            kept, whole = tokens.shape[1] - first, self._prefixed(role, tokens)
            logits = model(input_ids=whole, position_ids=_positions(whole), use_cache=False, logits_to_keep=kept).logits
            picked = logits[row, column - 1 - first]
            chosen, entropy = of_logits(picked, targets, temperature, learn_entropy=learn_entropy)
        empty = chosen.new_zeros(len(tokens), width)
        return empty.index_put((row, step), chosen), empty.index_put((row, step), entropy)

    def _values(self, role: str, hidden: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
        if self.roles[role].reads is not None:
            hidden = hidden.detach()  # the critic's loss leaves the policy alone
        index = _response_index(prompt_lengths, width, hidden.shape[1]) - 1
        rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
        return self._head(role, hidden[rows, index])

    def scores(self, role: str, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Score of each text, float32 [B], read at its last token; `lengths` [B] counts prompt and response tokens."""
        hidden = self._hidden(role, tokens)
        return self._head(role, hidden[torch.arange(tokens.shape[0], device=tokens.device), lengths - 1])

    def embeddings(self, role: str, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The mean of each text's last hidden states, float32 [B, H]; layout as in `scores`."""
        hidden = self._hidden(role, tokens).float()
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
        return (hidden * inside.unsqueeze(2)).sum(1) / lengths.unsqueeze(1)

    def states(self, role: str, tokens: Tensor) -> tuple[Tensor, nn.Module]:
        """(what the output head of a role reads at each token, [B, L, H]; that head). Where the model changes its logits
        after the head, the logits themselves and an identity. Layout as in `log_probs`."""
        model = self.causal_lm(role)
        if plain_head(model):
            return self._hidden(role, tokens), model.get_output_embeddings()
        whole = self._prefixed(role, tokens)
        logits = model(input_ids=whole, position_ids=_positions(whole), use_cache=False).logits
        return logits[:, whole.shape[1] - tokens.shape[1] :], nn.Identity()

    def _hidden(self, role: str, tokens: Tensor) -> Tensor:
        self.use(role)
        return self._forward(role, tokens)

    def _forward(self, role: str, tokens: Tensor) -> Tensor:
        """Last hidden states of the role's trunk as it is set, [B, L, H]: none for virtual tokens."""
        trunk, whole = self.trunks[self.roles[role].trunk], self._prefixed(role, tokens)
        backbone = (trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk).base_model
        found = backbone(input_ids=whole, position_ids=_positions(whole), use_cache=False).last_hidden_state
        return found[:, whole.shape[1] - tokens.shape[1] :]

    def _prefixed(self, role: str, tokens: Tensor) -> Tensor:
        """`tokens` with the role's virtual ones before them."""
        before = self._virtual[role]
        return torch.cat([tokens.new_tensor(before).expand(len(tokens), -1), tokens], 1) if before else tokens

    def _head(self, role: str, hidden: Tensor) -> Tensor:
        head = self.heads[role]
        return head(hidden.to(head.weight.dtype)).float().squeeze(-1)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients, as for rollouts and scoring."""
        was = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, each block under the adapter that was active in its forward pass.

        With the stock function a switch of adapters between forward and backward gives zero gradients without an error.
        """
        for name, trunk in self.trunks.items():
            trained = [r for r in self.roles.values() if r.trunk == name and r.trained]
            if not trained:
                continue
            model = trunk.get_base_model() if hasattr(trunk, "get_base_model") else trunk
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": self.sharded})
            model.enable_input_require_grads()
            for module in model.modules():
                if hasattr(module, "_gradient_checkpointing_func"):
                    module._gradient_checkpointing_func = self._recompute(self._tuners[name], self.sharded)

    @staticmethod
    def _recompute(layers: list[BaseTunerLayer], reentrant: bool) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            active = layers[0]._active_adapter if layers else None

            def under_same_adapter(*inner: Any) -> Any:
                found = layers[0]._active_adapter if layers else None
                for layer in layers:
                    layer._active_adapter = active
                try:
                    return function(*inner)
                finally:
                    for layer in layers:
                        layer._active_adapter = found

            return checkpoint(under_same_adapter, *args, use_reentrant=reentrant)

        return run


def _mixes(layer: BaseTunerLayer, sharded: bool) -> bool:
    """Whether a layer's adapters are plain LoRA or rows of embeddings, which a mixed batch can apply row by row. ZeRO-3 lets
    go of such rows as soon as the layer has run."""
    if isinstance(layer, Rows):
        return not sharded
    plain = isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer)
    return plain and not any(layer.use_dora.values())


def _positions(tokens: Tensor) -> Tensor:
    """Position ids [B, L] of right-padded rows. Causal attention needs no mask there: no token sees what follows it."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def _response_index(prompt_lengths: Tensor, width: int, limit: int) -> Tensor:
    """Column of each response token [B, width], kept inside the row where a response is shorter than `width`."""
    steps = torch.arange(width, device=prompt_lengths.device)
    return torch.clamp(prompt_lengths.unsqueeze(1) + steps, max=limit - 1)
