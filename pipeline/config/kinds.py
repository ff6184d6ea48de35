"""What a stage kind is: its schema, the module to launch, and the keys that name upstream stages."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config.schema import Evaluate, Ppo, Reward, Sft, Stage

POLICIES = frozenset({"sft", "ppo"})
REWARDS = frozenset({"reward"})


@dataclass(frozen=True)
class Kind:
    """`inputs` maps a key of the stage's block to the kinds it may name; `base_ok` keys also accept the word `base`."""

    schema: type[Stage]
    module: str
    inputs: dict[str, frozenset[str]]
    base_ok: frozenset[str] = frozenset()
    sources: str = "data"


KINDS: dict[str, Kind] = {
    "sft": Kind(Sft, "stages.sft", {"init": POLICIES}, base_ok=frozenset({"init"})),
    "reward": Kind(Reward, "stages.reward", {"init": POLICIES | REWARDS}, base_ok=frozenset({"init"})),
    "ppo": Kind(
        Ppo, "stages.ppo", {"policy": POLICIES, "reward": REWARDS}, base_ok=frozenset({"policy"}), sources="prompts"
    ),
    "evaluate": Kind(
        Evaluate,
        "stages.evaluate",
        {"model": POLICIES, "against": POLICIES, "reward": REWARDS},
        base_ok=frozenset({"model", "against"}),
        sources="prompts",
    ),
}
