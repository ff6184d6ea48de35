"""What a PPO stage's estimator, reward sources, critic, KL penalty and signals ask of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.block import closest
from pipeline.config.kinds import estimators
from pipeline.config.schema import Ppo, reward_stages
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe


def check_ppo(recipe: Recipe, stage: str, block: Ppo) -> None:
    """What the estimator, the reward sources, the critic, the KL penalty and the signals ask of each other."""

    def refuse(key: str, found: str, expected: str = "", fix: str = "") -> None:
        raise UserError(recipe.where("stages", stage, *key.split(".")), found, expected=expected, fix=fix)

    known = estimators()
    if block.advantage_estimator not in known:
        refuse(
            "advantage_estimator",
            f"found {block.advantage_estimator!r}",
            "one of: " + ", ".join(known),
            closest(block.advantage_estimator, known),
        )
    estimator = known[block.advantage_estimator]
    if block.samples_per_prompt < estimator.samples:
        refuse(
            "samples_per_prompt",
            f"{block.advantage_estimator} compares the responses to one prompt, found {block.samples_per_prompt}",
            f"at least {estimator.samples}",
            "write `samples_per_prompt: 4`",
        )
    if (block.kl.place or estimator.kl) == "loss" and block.kl.estimator == "k1":
        refuse(
            "kl.estimator", "k1 in the loss has a gradient of mean zero: it would hold nothing", "k3", "leave it out"
        )
    if block.critic.kind == "head" and block.critic.start != "policy":
        refuse("critic.init", "a head on the policy's states starts fresh", "policy", "leave it out")
    if estimator.critic and block.critic.start == "reward":
        if not reward_stages(*block.reward):
            refuse("critic.init", "no reward stage to start the critic from", "policy or base", "write `init: policy`")
        if block.normalize_scores:
            refuse(
                "normalize_scores",
                "a critic that starts as the reward model predicts scores that are not normalised",
                fix="write `critic: {init: policy}`, or leave out normalize_scores",
            )
    if block.ptx and block.ptx.batch % block.deepspeed.ranks:
        ranks = block.deepspeed.ranks
        refuse(
            "ptx.batch", f"{block.ptx.batch} rows do not divide over {ranks} ranks", fix=f"write a multiple of {ranks}"
        )
    if block.freezing_actor_steps and not estimator.critic:
        refuse("freezing_actor_steps", f"{block.advantage_estimator} has no critic to wait for", fix="leave it out")
    if block.freezing_actor_steps >= block.steps:
        refuse(
            "freezing_actor_steps", f"the actor would wait for all {block.steps} steps", f"at most {block.steps - 1}"
        )
    if block.kl.target is not None and block.kl.coef == 0:
        refuse("kl.coef", "an adaptive coefficient that starts at 0 stays there", "above 0", "write `coef: 0.05`")
    if block.kl.target is not None and block.kl.horizon <= 0.2 * block.rollout_batch:
        refuse(
            "kl.horizon",
            f"one step could take all of the coefficient away at {block.kl.horizon}",
            "above rollout_batch / 5",
        )
    if "explained_variance" in block.signals.stop_on and not estimator.critic:
        refuse("signals.stop_on", f"explained_variance is a critic's, and {block.advantage_estimator} has none")
    if "over_optimisation" in block.signals.stop_on and not (block.gold and block.eval_every):
        refuse("signals.stop_on", "over_optimisation compares held-out scores with a gold score", "gold and eval_every")
    for name in block.signals.stop_on:
        if getattr(block.signals, name) is None:
            refuse("signals.stop_on", f"{name} has no threshold", fix=f"set signals.{name}")
