"""Recipe blocks of the stages that learn from preferences without a reward model: `dpo` from pairs, `kto` from labels.

The names of losses and numbers are TRL's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.block import NonNegative
from pipeline.config.schema import Supervised
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.recipe import Recipe

REFERENCE_FREE = ("simpo", "cpo", "orpo")
"""Losses of pairs that know no reference policy."""
SMOOTHED = ("sigmoid", "robust")

OWN = {"cpo_alpha": ("cpo",), "simpo_gamma": ("simpo",), "label_smoothing": SMOOTHED}
"""Keys that mean something to some losses alone."""


class Dpo(Supervised):
    """Preference optimisation on pairs (DPO: Rafailov et al. 2023, arXiv 2305.18290). The reference is the policy that the
    stage starts from.

    - sigmoid: DPO; with `label_smoothing`, the chance that a pair is the wrong way round, conservative DPO
    - robust: unbiased under that chance (Chowdhury et al. 2024, arXiv 2403.00409)
    - hinge: SLiC (Zhao et al. 2023, arXiv 2305.10425); ipo: Azar et al. 2023, arXiv 2310.12036, per token
    - sigmoid_norm: DPO with log-ratios per token
    - simpo, cpo, orpo: without a reference. SimPO (Meng et al. 2024, arXiv 2405.14734) with the margin `simpo_gamma`; CPO (Xu
      et al. 2024, arXiv 2401.08417) with `cpo_alpha` times the chosen reply's loss; ORPO (Hong et al. 2024, arXiv 2403.07691),
      whose lambda is `beta`
    """

    kind: Literal["dpo"]
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "simpo", "cpo", "orpo"] = "sigmoid"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    simpo_gamma: NonNegative = 0.5
    cpo_alpha: NonNegative = 1.0

    @model_validator(mode="after")
    def _keys_of_other_losses(self) -> Dpo:
        for key, losses in OWN.items():
            given = key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default
            if given and self.loss not in losses:
                raise ValueError(f"{key} belongs to loss {' or '.join(losses)}, found loss {self.loss}; leave it out")
        return self


class Kto(Supervised):
    """Preference optimisation on single replies labelled good or bad (KTO: Ethayarajh et al. 2024, arXiv 2402.01306). The
    reference is the policy that the stage starts from.

    The KL term is estimated from replies of other rows of a micro-batch, which therefore has at least two; rows are shuffled
    once, by the seed. `apo_zero_unpaired` (D'Oosterlinck et al. 2024, arXiv 2408.06266) needs none.
    """

    kind: Literal["kto"]
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0


def check_preference(recipe: Recipe, stage: str, micro: int) -> None:
    """Raise UserError for a KTO stage with micro-batches of one row; `micro` is what they have."""
    block = recipe.stages[stage]
    if isinstance(block, Kto) and block.loss == "kto" and micro < 2:
        raise UserError(
            recipe.where("stages", stage, "micro_batch"),
            "kto estimates its KL term from the other rows of a micro-batch, and there is one",
            expected="at least 2 rows",
            fix="raise `micro_batch` or `batch`, or write `loss: apo_zero_unpaired`",
        )
