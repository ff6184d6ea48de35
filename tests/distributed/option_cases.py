"""What `test_ppo_options.py` asks warm ranks to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch

from tests.distributed.cases import _collected, _loop, _weights


def sevens(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward that needs no model: the share of the letter e, and what the row says."""
    assert all(prompt in row["prompt"] or row["prompt"] in prompt for prompt, row in zip(prompts, rows, strict=True))
    return [response.count("e") / (1 + len(response)) for response in responses]


def not_a_number(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    return [math.nan] * len(responses)


CALLS = [0]


def fails_later(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Fine three times, then inf. Each process counts its own calls."""
    CALLS[0] += 1
    return [math.inf if CALLS[0] > 3 else 1.0] * len(responses)


def update_facts(recipe: str, run_dir: str, overrides: list[str], steps: int = 1) -> dict[str, Any]:
    """Metrics of `steps` updates, how far each role's weights moved in all, and which roles and groups there are."""
    loop, batch = _collected(recipe, run_dir, overrides)
    before, rows = _weights(loop), []
    for step in range(steps):
        rows.append(loop.learn(batch, step))
    after = _weights(loop)
    moved = {
        role: max((float((after[n] - before[n]).abs().max()) for n in before if role in n), default=None)
        for role in (".policy.weight", "critic")
    }
    return {
        "metrics": rows,
        "policy": moved[".policy.weight"],
        "critic": moved["critic"],
        "roles": sorted(loop.engine.module.roles),
        "groups": [g["name"] for g in loop.engine.optimizer.param_groups],
    }


def averaged(recipe: str, run_dir: str, overrides: list[str]) -> dict[str, Any]:
    """Largest difference between the kept average and 0.25 w0 + 0.25 w1 + 0.5 w2 by hand, and how far w0 is from w2."""
    loop, batch = _collected(recipe, run_dir, overrides)
    seen = [_masters(loop)]
    for step in range(2):
        loop.learn(batch, step)
        seen.append(_masters(loop))
    if loop.rank != 0:
        return {"ranks": len(loop.ema.average)}
    expected = {n: 0.25 * seen[0][n] + 0.25 * seen[1][n] + 0.5 * seen[2][n] for n in seen[0]}
    assert expected.keys() == loop.ema.average.keys()
    return {
        "error": max(float((expected[n] - a).abs().max()) for n, a in loop.ema.average.items()),
        "moved": max(float((seen[2][n] - seen[0][n]).abs().max()) for n in expected),
        "dtypes": sorted({str(a.dtype) for a in loop.ema.average.values()}),
    }


def _masters(loop: Any) -> dict[str, torch.Tensor]:
    """The policy's float32 masters by the names that its trunk knows them by."""
    from tests.distributed.cases import _master

    weights, found = _weights(loop), {}
    for name, parameter in loop.engine.module.named_parameters():
        if name in weights and ".policy." in name.removeprefix("trunks.policy."):
            beside = hasattr(loop.engine.optimizer, "fp32_groups")
            value = _master(loop, parameter)[0] if beside else weights[name]
            found[name.removeprefix("trunks.policy.")] = value.float().cpu()
    return found


def trouble(recipe: str, run_dir: str, overrides: list[str], where: str) -> dict[str, Any]:
    """What a number that is not finite in `where` leads to: the message, the saved batch, whether any weight moved."""
    import stages.ppo.update as update
    from pipeline.errors import Trouble
    from stages.ppo.train import Clock

    loop = _loop(recipe, run_dir, overrides)
    before, original = _weights(loop), update.policy_loss
    message = ""
    try:
        if where == "weights":
            name, broken = next(
                (n, p) for n, p in loop.engine.module.named_parameters() if n.endswith("lora_B.reward.weight")
            )
            broken.data.fill_(math.nan)
            before = {n: w for n, w in before.items() if n != name}
        batch = loop.collect(0, Clock())
        if where == "gradient":
            update.policy_loss = lambda logprobs, *rest: (logprobs * math.inf, torch.zeros_like(logprobs))
        loop.learn(batch, 0)
    except Trouble as found:
        message = str(found)
    finally:
        update.policy_loss = original
    after = _weights(loop)
    file = Path(run_dir) / "ppo" / "trouble" / "step-1.pt"
    saved = sorted(torch.load(file, weights_only=True)) if file.exists() else []
    return {
        "message": message,
        "saved": saved,
        "moved": max(float((after[n] - before[n]).abs().max()) for n in before),
    }


def invariant_gradients(recipe: str, run_dir: str, overrides: list[str], examples: int) -> dict[str, Any]:
    """Worst relative distance of the gradient of one minibatch to itself under drawn row orders, cuts into micro-batches
    and extra padding; with the number of drawn examples and the size of the smallest gradient."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    loop, batch = _collected(recipe, run_dir, overrides)
    module, size = loop.engine.module, len(batch.lengths)
    loop.update.engine = module  # the roles alone: DeepSpeed wants every backward pass to be its own
    tokens = float(batch.mask.sum())
    names = [n for n, p in module.named_parameters() if p.requires_grad]

    def gradient(rows: list[int], cuts: list[int], padding: int) -> dict[str, torch.Tensor]:
        module.zero_grad()
        bounds = [0, *sorted(cuts), size]
        for low, high in itertools.pairwise(bounds):
            if high > low:
                part = batch.rows(torch.tensor(rows[low:high]))
                for loss, _ in loop.update.losses(_padded(part, padding), tokens, loop.kl.coef):
                    loss.backward()
        parameters = dict(module.named_parameters())
        return {n: parameters[n].grad.clone() for n in names}

    plain = gradient(list(range(size)), [], 0)
    worst, seen = [0.0], [0]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.permutations(range(size)),
        st.lists(st.integers(1, size - 1), max_size=3, unique=True),
        st.integers(0, 5),
    )
    def check(rows: list[int], cuts: list[int], padding: int) -> None:
        found = gradient(rows, cuts, padding)
        seen[0] += 1
        for role in (".policy.weight", "critic"):
            ours, theirs = (
                torch.cat([g[n].flatten() for n in names if role in n] or [torch.zeros(1)]) for g in (found, plain)
            )
            if float(theirs.norm()) > 0:
                worst[0] = max(worst[0], float((ours - theirs).norm() / theirs.norm()))

    check()
    sizes = {
        role: float(sum(plain[n].pow(2).sum() for n in names if role in n)) for role in (".policy.weight", "critic")
    }
    return {"worst": worst[0], "examples": seen[0], "sizes": sizes}


def _padded(part: Any, columns: int) -> Any:
    """The same rows with more columns on the right: padding whose content must not matter."""
    from dataclasses import replace

    if not columns:
        return part
    changed = {}
    for name, value in part.tensors().items():
        if value.dim() == 2:
            fill = 3 if name == "tokens" else 0.0 if name == "mask" else 0.7
            changed[name] = torch.nn.functional.pad(value, (0, columns), value=fill)
    return replace(part, **changed)


def stopped_and_resumed(recipe: str, run_dir: str, overrides: list[str]) -> list[str]:
    """Run PPO with a stop request in its folder, which stops it after one step, then to the end; how each run ended."""
    from pipeline.launch import STOP_FILE
    from pipeline.stage import Stopped
    from tests.support.stages import barrier, run

    folder, ends = Path(run_dir) / "ppo", []
    folder.mkdir(exist_ok=True)
    (folder / STOP_FILE).touch()
    barrier()
    for _ in range(2):
        try:
            run(recipe, "ppo", run_dir, overrides)
            ends.append("published")
        except Stopped:
            ends.append("stopped")
        barrier()
        (folder / STOP_FILE).unlink(missing_ok=True)
        barrier()
    return ends
