"""What one policy says of texts: how likely continuations are, and how it goes on itself. Each answer is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.recipe import digest
from pipeline.config.schema import Sampling
from pipeline.generation.rollout import keys
from pipeline.model.assemble import plain
from pipeline.model.likelihood import CHUNK_ELEMENTS
from pipeline.model.load import eos_ids
from pipeline.model.roles import Roles
from pipeline.stage import Context
from stages.evaluate import kept

Ids = list[int]


class Reader:
    """One of the `roles` as it reads and writes. `identity` is a hash of what it is."""

    def __init__(self, context: Context, roles: Roles, role: str, identity: str, tok: Any, size: int) -> None:
        self.context, self.roles, self.role, self.identity, self.size = context, roles, role, identity, size
        self.tokenizer, self.model = tok, plain(roles.trunks[roles.roles[role].trunk])
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.context_length = (positions or 2048) - len(roles.virtual(role))
        self.opening: Ids = [i for i in (tok.bos_token_id, tok.eos_token_id) if i is not None][:1]

    def ids(self, text: str) -> Ids:
        """A text as it stands, with the tokenizer's opening tokens and without a closing EOS."""
        found = list(self.tokenizer(text)["input_ids"])
        return found[:-1] if found and found[-1] == self.tokenizer.eos_token_id else found

    def apart(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Both as token ids. The two are tokenised together, as the model would read them; spaces between them belong to the
        continuation, where tokenizers put them."""
        stem = context.rstrip()
        continuation = context[len(stem) :] + continuation
        before = self.ids(stem)
        return before or self.opening, self.ids(stem + continuation)[len(before) :]

    def likelihoods(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        """(log-probability of each continuation after its context, in nats; whether it is the greedy one). Collective.

        A context has one token or more; what does not fit the model loses its beginning. An empty continuation is certain.
        """
        rows = [self._fitting(*pair) for pair in pairs]
        key = {"of": self.identity, "likelihoods": digest(rows)}
        lengths = [len(before) + len(after) for before, after in rows]
        found = kept.measure(
            self.context, key, lengths, self.size, lambda picked: self._read([rows[i] for i in picked])
        )
        return [(float(value), bool(greedy)) for value, greedy in found]

    def replies(self, prompts: Sequence[Ids], sampling: Sampling, *, samples: int = 0, seed: int = 0) -> list[str]:
        """How the policy goes on after each prompt; with `samples`, so many of each in turn, drawn as `sampling` says, else the
        greedy one. Collective. A prompt that does not fit the model loses its beginning."""
        room = self.context_length - sampling.max_response_length
        rows = [list(prompt[-room:]) for prompt in prompts for _ in range(max(1, samples))]
        settings = {"sampling": sampling.model_dump(), "samples": samples, "seed": seed}
        key = {"of": self.identity, "replies": digest(rows), **settings}

        def write(picked: list[int]) -> list[str]:
            numbers = torch.tensor(picked, device=self.model.device)
            noise = keys(seed, 0, numbers // samples, numbers % samples) if samples else None
            with self.roles.evaluating():
                rollout = self.roles(
                    "rollout",
                    self.role,
                    [rows[i] for i in picked],
                    noise,
                    sampling,
                    pad=self.tokenizer.pad_token_id,
                    eos=eos_ids(self.model),
                    synced=False,
                )
            said = [rollout.response(row) for row in range(len(picked))]
            return [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]

        return [str(text) for text in kept.measure(self.context, key, [len(row) for row in rows], self.size, write)]

    def _fitting(self, before: Ids, after: Ids) -> tuple[Ids, Ids]:
        """Both as far as the model reads them; it need not read the last token."""
        after = after[-self.context_length :]
        return list(before[-(self.context_length + 1 - len(after)) :]), list(after)

    def _read(self, rows: list[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
        width = max(len(before) + len(after) for before, after in rows)
        padded = [
            before + after + [self.tokenizer.pad_token_id] * (width - len(before + after)) for before, after in rows
        ]
        tokens = torch.tensor(padded, device=self.model.device)
        row = torch.tensor([n for n, (_, after) in enumerate(rows) for _ in after], dtype=torch.long)
        column = torch.tensor(
            [len(before) + step for before, after in rows for step in range(len(after))], dtype=torch.long
        )
        with self.roles.evaluating():
            hidden, head = self.roles("states", self.role, tokens[:, :-1])
            chosen, greedy = _chosen(hidden[row, column - 1], head, tokens[row, column])
        sums = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, row, chosen.double().cpu())
        misses = torch.zeros(len(rows)).index_add_(0, row, (~greedy).float().cpu())
        return [(float(value), not missed) for value, missed in zip(sums, misses, strict=True)]


def _chosen(states: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, float32 [N]; whether it is the likeliest token, bool [N]) from what the head reads,
    [N, H]; logits exist for a chunk of tokens at a time."""
    size = max(1, CHUNK_ELEMENTS // int(getattr(head, "out_features", states.shape[-1])))
    values, greedy = [states.new_zeros(0, dtype=torch.float32)], [targets.new_zeros(0, dtype=torch.bool)]
    for part, wanted in zip(states.split(size), targets.split(size), strict=True):
        logits = head(part).float()
        values.append(logits.gather(-1, wanted.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(values), torch.cat(greedy)
