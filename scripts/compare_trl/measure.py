"""Reward and KL of policies, by one piece of code for both sides: Hugging Face sampling on held-out prompts.

python measure.py SETTINGS.json PLAN.json OUT.json

The plan lists what to measure: `name`, `folder` (a PEFT adapter or a Relay training checkpoint; null for the base), `scale`
of the adapter, `samples` per prompt and, where another folder must hold the same weights, `same`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROWS = 256
"""Replies sampled at once."""


def main(settings: dict[str, Any], plan: list[dict[str, Any]], out: Path) -> None:
    """Measure what the plan lists and `out` does not hold yet."""
    found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    policy = Policy.load(settings)
    for item in plan:
        adapter = weights(Path(item["folder"])) if item["folder"] else None
        if "same" in item and not equal(adapter or {}, weights(Path(item["same"]))):
            raise RuntimeError(f"{item['folder']} and {item['same']} do not hold the same adapter")
        if item["name"] not in found:
            policy.put(adapter or {}, item["scale"])
            found[item["name"]] = result = policy.measure(item["samples"])
            out.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{item['name']}  reward {result['reward']:.3f}  kl {result['kl']:.2f}", flush=True)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def weights(folder: Path) -> dict[str, Tensor]:
    """A policy's adapter, under PEFT's names: of a PEFT folder, or of the policy in a Relay training checkpoint."""
    if (folder / "adapter_model.safetensors").exists():
        return load_file(folder / "adapter_model.safetensors")
    state = torch.load(folder / "engine" / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    named = {name[name.index("base_model.") :]: value for name, value in state["module"].items() if "lora_" in name}
    return {name.replace(".policy.", "."): value for name, value in named.items() if ".policy." in name}


@dataclass
class Policy:
    """The base with one adapter slot, and the prompts and rule by which it is measured."""

    settings: dict[str, Any]
    model: Any
    tokenizer: Any
    rule: Any
    prompts: list[str]

    @classmethod
    def load(cls, settings: dict[str, Any]) -> Policy:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(settings["base"], padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(settings["base"], dtype=torch.float32)
        config = LoraConfig(
            r=settings["r"], lora_alpha=settings["alpha"], target_modules=settings["targets"], task_type="CAUSAL_LM"
        )
        module, _, name = settings["reward"].partition(":")
        rule = getattr(import_module(module), name)
        lines = Path(settings["held_out"]).read_text(encoding="utf-8").splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        return cls(settings, get_peft_model(model, config).eval(), tokenizer, rule, prompts)

    def put(self, adapter: dict[str, Tensor], scale: float) -> None:
        """Give the policy `scale` times the difference that the adapter makes; an empty adapter makes none."""
        own = {name: value for name, value in self.model.state_dict().items() if "lora_" in name}
        if adapter and len(adapter) != len(own):
            raise RuntimeError(f"{len(adapter)} weights for the {len(own)} of the adapter")
        adapter = adapter or {name.replace(".default.", "."): value * 0 for name, value in own.items()}
        scaled = {name: value * scale if "lora_B" in name else value for name, value in adapter.items()}
        if set_peft_model_state_dict(self.model, scaled).unexpected_keys:
            raise RuntimeError(f"these are not the adapter's weights: {sorted(adapter)[:2]}")

    @torch.no_grad()
    def measure(self, samples: int) -> dict[str, float]:
        """Mean rule reward, its standard deviation over replies, and the mean KL of a reply to the base, in nats.

        `kl` sums over a reply's tokens the KL of the whole next-token distribution; `kl_sampled` sums the differences of
        the sampled tokens' log-probabilities. Both estimate the same number; the first has less noise.
        The noise starts from the same seed each time.
        """
        texts = [prompt for prompt in self.prompts for _ in range(samples)]
        torch.manual_seed(20240817)
        scores, exact, sampled, words = [], [], [], []
        for start in range(0, len(texts), ROWS):
            batch = texts[start : start + ROWS]
            tokens, mask, width = self._sample(batch)
            ours = self._log_probs(tokens, mask, width)
            with self.model.disable_adapter():
                base = self._log_probs(tokens, mask, width)
            kept = mask[:, width:].float()
            reply = tokens[:, width:]
            exact.append((((ours.exp() * (ours - base)).sum(-1)) * kept).sum(1))
            difference = (ours - base).gather(-1, reply.unsqueeze(-1)).squeeze(-1)
            sampled.append((difference * kept).sum(1))
            spoken = [row[: int(kept[i].sum())] for i, row in enumerate(reply)]
            replies = self.tokenizer.batch_decode(spoken, skip_special_tokens=True)
            words += replies
            scores += self.rule(batch, replies, [{} for _ in batch])
        reward = torch.tensor(scores, dtype=torch.float64)
        return {
            "reward": float(reward.mean()),
            "reward_sd": float(reward.std()),
            "kl": float(torch.cat(exact).double().mean()),
            "kl_sampled": float(torch.cat(sampled).double().mean()),
            "different": len(set(words)) / len(words),
            "example": words[0],
        }

    def _sample(self, texts: list[str]) -> tuple[Tensor, Tensor, int]:
        """(tokens, mask, prompt width): prompts padded on the left; a reply's mask ends with its EOS."""
        encoded = self.tokenizer(texts, return_tensors="pt", padding=True)
        width = encoded["input_ids"].shape[1]
        how = GenerationConfig(
            max_new_tokens=self.settings["response_tokens"],
            do_sample=True,
            temperature=self.settings["temperature"],
            top_k=0,
            top_p=1.0,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        tokens = self.model.generate(
            input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], generation_config=how
        )
        ends = (tokens[:, width:] == self.tokenizer.eos_token_id).long()
        alive = (ends.cumsum(1) - ends) == 0
        return tokens, torch.cat([encoded["attention_mask"], alive.long()], 1), width

    def _log_probs(self, tokens: Tensor, mask: Tensor, width: int) -> Tensor:
        """log p of every next token at the replies' positions, [B, T, vocabulary], at the sampling temperature."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False)
        return (output.logits[:, width - 1 : -1] / self.settings["temperature"]).log_softmax(-1)


if __name__ == "__main__":
    given, planned = (json.loads(Path(path).read_text(encoding="utf-8")) for path in sys.argv[1:3])
    main(given, planned, Path(sys.argv[3]))
