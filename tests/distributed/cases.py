"""What warm ranks are asked to do. Each function runs on every rank and returns JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from tests.support.stages import barrier, run


def _loop(recipe: str, run_dir: str, overrides: list[str]) -> Any:
    """A prepared PPO loop of the recipe's `ppo` stage; its parents must be published."""
    from pipeline import stage
    from pipeline.config.schema import Ppo
    from stages.ppo.__main__ import prepare

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    held: list[Any] = []
    stage.execute(
        lambda context: held.append(prepare(context, cast(Ppo, context.block))),
        recipe,
        "ppo",
        Path(run_dir),
        [*overrides, f"deepspeed.num_gpus={world}"],
        rank,
        world,
    )
    return held[0].loop


def _collected(recipe: str, run_dir: str, overrides: list[str]) -> tuple[Any, Any]:
    """A prepared loop and its first rollout batch, judged."""
    from stages.ppo.train import Clock

    loop = _loop(recipe, run_dir, overrides)
    loop.kl.coef = 0.1
    return loop, loop.collect(0, Clock())


def _weights(loop: Any) -> dict[str, torch.Tensor]:
    """Whole trained parameters in float32 on every rank (from the float32 master weights where there are any)."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in loop.engine.module.named_parameters():
        if parameter.requires_grad:
            master = (
                safe_get_full_fp32_param(parameter)
                if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
                else None
            )
            found[name] = (parameter.detach() if master is None else master).float().cpu().clone()
    return found


def one_update(
    recipe: str, run_dir: str, overrides: list[str], target: str, chunk: int | None = None
) -> dict[str, Any]:
    """Roll out, judge and update once; rank 0 saves tokens and each parameter's change to `target`. `chunk` bounds the
    logits that the output head gives at a time."""
    from pipeline.model import likelihood

    whole, likelihood.CHUNK_ELEMENTS = likelihood.CHUNK_ELEMENTS, chunk or likelihood.CHUNK_ELEMENTS
    try:
        return _one_update(recipe, run_dir, overrides, target)
    finally:
        likelihood.CHUNK_ELEMENTS = whole


def _one_update(recipe: str, run_dir: str, overrides: list[str], target: str) -> dict[str, Any]:
    loop, batch = _collected(recipe, run_dir, overrides)
    before = _weights(loop)
    stats = loop.update(batch, 0, loop.kl.coef)
    after = _weights(loop)
    if dist.get_rank() == 0:
        change = {name: after[name] - before[name] for name in before}
        tokens = [
            batch.tokens[i, : int(batch.prompt_lengths[i] + batch.lengths[i])].tolist()
            for i in range(len(batch.lengths))
        ]
        torch.save({"tokens": tokens, "change": change, "advantages": batch.advantages, "after": after}, target)
    barrier()
    return stats


def _master(loop: Any, parameter: torch.nn.Parameter) -> tuple[torch.Tensor, dict[str, str]]:
    """The float32 master of a bf16 parameter and the dtypes of its Adam states, wherever the ZeRO stage keeps them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = loop.engine.optimizer
    if hasattr(optimizer, "fp32_groups"):  # ZeRO-0: whole masters beside the bf16 parameters
        for low, high in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for light, heavy in zip(low, high, strict=True):
                if light is parameter:
                    states = optimizer.optimizer.state[heavy]
                    return heavy.detach().clone(), {
                        k: str(states[k].dtype) for k in ("exp_avg", "exp_avg_sq") if k in states
                    }
    states = {k: safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")}
    return safe_get_full_fp32_param(parameter).clone(), {k: str(v.dtype) for k, v in states.items() if v is not None}


def master_weights(recipe: str, run_dir: str, overrides: list[str], updates: int) -> dict[str, Any]:
    """After `updates` rounds of tiny Adam steps in bf16: dtypes of masters and optimizer states, how far masters moved."""
    loop, batch = _collected(recipe, run_dir, overrides)
    parameter = next(p for n, p in loop.engine.module.named_parameters() if n.endswith("lora_A.policy.weight"))
    loop.update(batch, 0, 0.1)
    before, _ = _master(loop, parameter)
    for _ in range(updates):
        loop.update(batch, 0, 0.1)
    after, states = _master(loop, parameter)
    return {
        "weight": str(parameter.dtype),
        "master": str(after.dtype),
        "states": states,
        "moved": float((after - before).abs().max()),
        "size": float(before.abs().max()),
    }


def role_scaling(recipe: str, run_dir: str, overrides: list[str], factor: float) -> dict[str, Any]:
    """The policy's change after one update whose critic loss is multiplied by `factor`, as one norm and a checksum."""
    import stages.ppo.update as update

    loop, batch = _collected(recipe, run_dir, overrides)
    before = _weights(loop)
    original = update.value_loss
    try:
        update.value_loss = lambda *a: tuple(x * s for x, s in zip(original(*a), (factor, 1.0), strict=True))
        stats = loop.update(batch, 0, 0.1)
    finally:
        update.value_loss = original
    after = _weights(loop)
    policy = {n: (after[n] - before[n]).double() for n in before if n.endswith(".policy.weight")}
    return {
        "policy": [float(sum(c.pow(2).sum() for c in policy.values())), float(sum(c.sum() for c in policy.values()))],
        "norms": [stats["grad_norm/policy"], stats["grad_norm/critic"]],
    }


def run_stage(recipe: str, stage: str, run_dir: str, overrides: list[str] | None = None) -> str:
    return run(recipe, stage, run_dir, overrides)


def opens_plainly(recipe: str, run_dir: str, overrides: list[str] | None = None) -> dict[str, float]:
    """Largest difference between Relay's reading of each published stage and plain transformers and PEFT reading it.

    For policies the log-probabilities of a text's tokens among the base's own tokens, for the reward model its score.
    `pad_share` is the largest probability that plain transformers give an added pad token in what PPO published.
    """
    from pipeline import stage

    world = int(os.environ["WORLD_SIZE"])
    found: dict[str, float] = {}
    stage.execute(
        lambda context: found.update(_compare(context)),
        recipe,
        "ppo",
        Path(run_dir),
        [*(overrides or []), f"deepspeed.num_gpus={world}"],
        int(os.environ["RANK"]),
        world,
    )
    return found


def _compare(context: Any) -> dict[str, float]:
    from pipeline import engine, handoff
    from pipeline.model.assemble import assemble, scoring, speaking
    from pipeline.model.load import ADDED_PAD, tokenizer

    engine.start(0)
    batons = {name: handoff.open_baton(context.run_dir / name) for name in ("sft", "reward", "ppo")}
    tok = tokenizer(str(batons["sft"].path))
    text = tok("Anna visits the palace. What does she see?\nShe sees an old mirror.")["input_ids"] + [tok.eos_token_id]
    tokens, prompt, lengths = torch.tensor([text]), torch.tensor([10]), torch.tensor([len(text) - 10])
    parts = {
        "sft": speaking(context, batons["sft"]),
        "ppo": speaking(context, batons["ppo"]),
        "reward": scoring(batons["reward"], context.block.base),
    }
    roles = assemble(context, parts, tok, sharded=False).to(engine.get_accelerator().current_device_name())
    tokens, prompt, lengths = (column.to(roles.trunks["sft"].device) for column in (tokens, prompt, lengths))
    differences = {}
    with roles.evaluating():
        for name in ("sft", "ppo"):
            ours, _ = roles("log_probs", name, tokens, prompt, lengths, len(text) - 10, 1.0)
            logits = _plain(batons[name], context.block.base, "causal")(input_ids=tokens).logits[0, 9:-1].float()
            if tok.pad_token == ADDED_PAD:
                differences["pad_share"] = float(logits.softmax(-1)[:, tok.pad_token_id :].sum(-1).max())
                logits = logits[:, : tok.pad_token_id]
            theirs = logits.log_softmax(-1).gather(1, tokens[0, 10:, None])[:, 0]
            differences[name] = float((ours[0] - theirs).abs().max())
        score = roles("scores", "reward", tokens, torch.tensor([len(text)]))
        plain = _plain(batons["reward"], context.block.base, "classifier")(input_ids=tokens).logits.float()
        differences["reward"] = float((score - plain[0]).abs().max())
    return differences


def _plain(baton: Any, base: Any, kind: str) -> Any:
    """The published stage as somebody without Relay opens it: transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[base.dtype]
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    options: dict[str, Any] = {"dtype": dtype, **({"num_labels": 1} if kind == "classifier" else {})}
    if base.quantization and baton.is_adapter:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "score"],
        )
    if not baton.is_adapter:
        return auto.from_pretrained(baton.path, **options).eval()
    model, tok = auto.from_pretrained(baton.base, **options), AutoTokenizer.from_pretrained(baton.path)
    rows = json.loads((baton.path / "adapter_config.json").read_text()).get("trainable_token_indices")
    if rows and model.get_input_embeddings().num_embeddings < len(tok):
        model.resize_token_embeddings(len(tok))
    return PeftModel.from_pretrained(model, baton.path).eval()


def merged_like_adapter(recipe: str, run_dir: str) -> dict[str, float]:
    """Mean log-probability differences of the merged SFT parent: to its 4-bit adapter form, and to the original base."""
    from pipeline import stage

    found: dict[str, float] = {}

    def compare(context: Any) -> None:
        from peft import PeftModel

        from pipeline import engine
        from pipeline.model import begin, load

        engine.start(0)
        baton, base = context.batons["sft"], context.block.base
        tok = load.tokenizer(str(baton.path))
        text = tok("Anna visits the palace. What does she see?\nShe sees an old mirror.")["input_ids"]
        tokens = torch.tensor([text])
        below, adapter = begin.base_below(context, baton, "causal")
        assert adapter is None
        assert not context.block.adapter.continues(baton.adapter)

        def read(model: Any) -> torch.Tensor:
            with torch.no_grad():
                return model.eval()(input_ids=tokens).logits.float().log_softmax(-1)

        merged = read(load.causal(below.model_copy(update={"quantization": None}), tok, sharded=False))
        held = base.model_copy(update={"model": baton.base})
        four_bit = read(PeftModel.from_pretrained(load.causal(held, tok, sharded=False), baton.path))
        whole = held.model_copy(update={"quantization": None})
        original = read(PeftModel.from_pretrained(load.causal(whole, tok, sharded=False), baton.path))
        found.update(
            difference=float((merged - four_bit).abs().mean()), to_the_original=float((merged - original).abs().mean())
        )

    stage.execute(compare, recipe, "ppo", Path(run_dir), ["deepspeed.num_gpus=1"], 0, 1)
    return found


def shared_buffers(seed: int) -> list[str]:
    """Names of all-reduce buffers of this job in shared memory, after the ranks have started."""
    from pipeline import engine

    engine.start(seed)
    torch.distributed.barrier()
    return [path.name for path in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*")]
