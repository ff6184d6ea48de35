"""Numbers computed by DeepSpeed-Chat's own functions, to compare Relay's with."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def golden(read_golden: Callable[[str], dict[str, Any]]) -> SimpleNamespace:
    """DeepSpeed-Chat's inputs and outputs on the response part, float32 [3, 6]: step t emits response token t.

    There `pad == eos`, and the EOS of a reply counts as padding: `lengths` [3] (its n) leaves EOS out, `mask` is 1 on
    those n tokens, and the score is added one step past them, at most on the last step. `emitted` [3] counts EOS, as
    Relay does.
    """
    raw = read_golden("dschat_ppo")
    start, pad = raw["P"] - 1, 2

    def response(name: str) -> Tensor:
        return torch.tensor(raw[name])[:, start:]

    mask = (torch.tensor(raw["seq"])[:, raw["P"] :] != pad).float()
    lengths = mask.sum(1).long()
    scores = torch.tensor(raw["reward"])
    return SimpleNamespace(
        raw=raw,
        scores=scores,
        clipped_scores=scores.clamp(-raw["clip_reward"], raw["clip_reward"]),
        logprobs=response("logprobs"),
        reference=response("ref_logprobs"),
        values=response("values"),
        new_logprobs=response("new_logprobs"),
        new_values=response("new_values"),
        lengths=lengths,
        emitted=torch.clamp(lengths + 1, max=mask.shape[1]),
        mask=mask,
        rewards=torch.tensor(raw["out"]["rewards"])[:, start:],
        advantages=torch.tensor(raw["out"]["advantages"]),
        returns=torch.tensor(raw["out"]["returns"]),
    )
