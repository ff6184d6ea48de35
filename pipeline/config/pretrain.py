"""The block of a pre-training stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.schema import Source, Supervised


class Pretrain(Supervised):
    """Continued pre-training on plain text (domain adaptation: Gururangan et al. 2020, arXiv 2004.10964): next-token
    cross-entropy on every token of every document.

    Documents end with EOS; those above `max_length` tokens are cut into pieces, and nothing is dropped. Pieces are packed into
    sequences of `max_length` where the base and the method can keep them apart; `batch`, `steps` and `epochs` count such
    sequences, `eval_rows` held-out pieces. `general` is a text that no stage of the recipe learns from: its perplexity before
    and after says what was forgotten.
    """

    kind: Literal["pretrain"]
    general: list[Source] = Field(default_factory=list)
