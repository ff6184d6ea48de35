"""A reward model from outside the chain: any Hugging Face sequence classifier with one label, with its own tokenizer."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoTokenizer

from pipeline.config.recipe import Recipe
from pipeline.config.schema import Base
from pipeline.config.selection import Scorer
from pipeline.data.encode import Encoder
from pipeline.data.shape import Text
from pipeline.data.templates import is_default
from pipeline.errors import UserError
from pipeline.model import load

UNBOUNDED = 10**9
"""Tokenizers that know no longest text say a number beyond this."""


class Classifier:
    """Scores replies as the model's authors have it read them: through its chat template; without one as a pair of texts,
    where its tokenizer separates such; else as prompt, reply and EOS."""

    def __init__(self, base: Base, where: str, device: torch.device) -> None:
        """Raises UserError at `where` for a model that has no tokenizer or not one label."""
        try:
            config = AutoConfig.from_pretrained(
                base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
            )
            self.tokenizer = AutoTokenizer.from_pretrained(
                base.model, revision=base.revision, trust_remote_code=base.trust_remote_code
            )
        except (OSError, ValueError) as error:
            load.check_code(base.model, error)
            found = f"{base.model} cannot be read: {str(error).splitlines()[0]}"
            raise UserError(where, found, fix="give a hub id or a folder of `save_pretrained`") from None
        if config.num_labels != 1:
            raise UserError(
                where, f"{base.model} has {config.num_labels} labels", expected="one label: the score of a reward model"
            )
        if self.tokenizer.pad_token_id is None or self.tokenizer.pad_token_id == self.tokenizer.eos_token_id:
            self.tokenizer = load.tokenizer(base.model, base.revision, trust=base.trust_remote_code)
        self.tokenizer.padding_side, self.tokenizer.truncation_side = "right", "left"
        self.model = load.classifier(base, self.tokenizer, sharded=False).to(device).eval()
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        known = [size for size in (positions, self.tokenizer.model_max_length) if size and size < UNBOUNDED]
        self.context = min(known, default=None)

    @torch.no_grad()
    def __call__(self, prompts: list[Text], replies: list[Text]) -> list[float]:
        """The score of each reply, read from its logit in float32. A text that is longer than the model's context loses its
        beginning."""
        rows = [self._ids(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
        batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
        return [float(score) for score in self.model(**batch).logits.float().squeeze(-1)]

    def _ids(self, prompt: Text, reply: Text) -> dict[str, list[int]]:
        """What one text is to the model: token ids, mask, and token types where it has them."""
        cut = {"truncation": self.context is not None, "max_length": self.context}
        if not is_default(self.tokenizer):
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            said = [{"role": "assistant", "content": reply}] if isinstance(reply, str) else reply
            text = self.tokenizer.apply_chat_template([*asked, *said], tokenize=False)
            return dict(self.tokenizer(text, add_special_tokens=False, **cut))
        first, second = _text(prompt), _text(reply)
        if self.tokenizer.sep_token_id is not None:
            return dict(self.tokenizer(first, second, **cut))
        encoder = Encoder(self.tokenizer)
        ids = [*encoder.prompt(first), *encoder.reply(second)]
        ids = ids[-self.context :] if self.context is not None else ids
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}


def from_outside(recipe: Recipe, scorer: Scorer, where: str, device: torch.device) -> Classifier:
    """The reward model that a recipe's block names by `model`. Raises UserError at `where` for one that is none."""
    assert scorer.model is not None
    given = scorer.model_dump(exclude={"stage", "model"})
    return Classifier(Base(model=recipe.local(scorer.model), **given), where, device)


def _text(text: Text) -> str:
    """Messages as plain text, for a model that knows no roles."""
    return text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)
