"""Soft prompts: learned input vectors before the text, as tokens of their own.

Virtual token i of a model with V embedding rows has the id V + i, and the layer around the input embedding gives it its
vector. Whoever puts these ids before a text has done all there is to do: positions, cache, padding, rollout engines and the
pooling of classifiers need not know. PEFT's own prompt tuning splices vectors in behind the model's back instead; it drops
position ids, cannot resume, and pools at the wrong token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils import PeftType
from torch import Tensor, nn

from pipeline.adapters.prefix import Rows
from pipeline.adapters.tuner import Component, MethodConfig, Tuner, TunerLayer, base_modules, register, tuner_layers
from pipeline.errors import UserError


@dataclass
class SoftPromptConfig(MethodConfig):
    """`num_virtual_tokens` n learned vectors of the embedding's width D before every text.

    `encoder_hidden_size` 0: prompt tuning, Lester et al. 2104.08691. The vectors train, n D numbers; they start as rows of
    the base's embedding, drawn from torch's generator (the paper draws among the 5,000 commonest tokens).
    e > 0: P-tuning, Liu et al. 2103.10385. A table [n, D] goes through Linear, ReLU, Linear, ReLU, Linear of hidden width e:
    n D + D e + e + e e + e + e D + D numbers. (The paper's LSTM before the MLP is left out, as PEFT does by default.)

    `PeftModel.forward` and `.generate` put the virtual tokens before the text, if the config has a task type; below them
    the model takes ids as they are, see `virtual_ids`.
    """

    num_virtual_tokens: int = 20
    encoder_hidden_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SOFT_PROMPT")
        if self.num_virtual_tokens < 1 or self.encoder_hidden_size < 0:
            raise ValueError("num_virtual_tokens must be at least 1 and encoder_hidden_size at least 0")


class SoftPrompt(Component):
    """The vectors of one adapter, [n, width]."""

    def __init__(self, start: Tensor, encoder: int) -> None:
        super().__init__()
        n, width = start.shape
        mlp = None
        if encoder:
            mlp = nn.Sequential(
                nn.Linear(width, encoder), nn.ReLU(), nn.Linear(encoder, encoder), nn.ReLU(), nn.Linear(encoder, width)
            )
        self.length, self.rows = n, Rows(torch.randn(n, width) if encoder else start, mlp)

    def forward(self) -> Tensor:  # type: ignore[override]
        return self.rows()


class SoftPromptLayer(TunerLayer):
    """The input embedding, which knows the ids of virtual tokens too."""

    @property
    def first(self) -> int:
        """The id of the first virtual token: the number of embedding rows."""
        return int(self.get_base_layer().num_embeddings)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings [..., D] of ids int64 [...]. The prompt is computed for any ids: ranks must call equal modules."""
        prompts = self.active()
        if not prompts:
            return self.base_layer(*args, **kwargs)
        ids = args[0] if args else kwargs["input"]
        vectors = torch.cat([prompt() for prompt in prompts])
        virtual = ids >= self.first
        text = self.base_layer(ids.masked_fill(virtual, 0))
        chosen = (ids - self.first).clamp(0, len(vectors) - 1)
        return torch.where(virtual.unsqueeze(-1), vectors.to(text.dtype)[chosen], text)


class SoftPromptModel(Tuner):
    """The tuner of `SoftPromptConfig`."""

    prefix = "soft_prompt_"
    tuner_layer_cls = SoftPromptLayer

    def targets(self, config: SoftPromptConfig) -> list[str]:
        embedding = self.model.get_input_embeddings()
        if isinstance(embedding, TunerLayer):
            embedding = embedding.get_base_layer()
        name = next((n for n, module in base_modules(self.model).items() if module is embedding), None)
        if name is None or not hasattr(embedding, "num_embeddings"):
            raise UserError("soft prompt", f"{type(self.model).__name__} has no input embedding that takes ids")
        return [name]

    def component(self, config: SoftPromptConfig, adapter: str, name: str, module: nn.Module) -> SoftPrompt:
        return SoftPrompt(some_rows(module, config.num_virtual_tokens), config.encoder_hidden_size)

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """Leave out PEFT's warning that an adapted embedding may be tied to the output head, for which it has no adapter: the
        table both read is left alone, and no logit is asked of a virtual token."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward on the text alone; outputs are cut to it. Positional arguments: ids, attention mask."""
        names = ("input_ids", "attention_mask")[: len(args)]
        if len(args) > len(names):
            raise ValueError("with a soft prompt, pass arguments after the attention mask by name")
        kwargs |= dict(zip(names, args, strict=True))
        prompt = self._prompt()
        if not prompt:
            return self.model(**kwargs)
        if kwargs.get("input_ids") is None:
            raise ValueError("a soft prompt goes before token ids: pass input_ids, not inputs_embeds")
        width = kwargs["input_ids"].shape[1]
        classifies = type(self.model).__name__.endswith("ForSequenceClassification")
        return _cut(self.model(**extend(kwargs, prompt, token_labels=not classifies)), width)

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's generate after the prompt; the virtual tokens are cut off the sequences it returns."""
        ids = inputs if inputs is not None else kwargs.pop("input_ids")
        prompt = self._prompt()
        settings = kwargs.get("generation_config") or self.model.generation_config
        penalty = kwargs.get("repetition_penalty") or settings.repetition_penalty
        if prompt and penalty not in (None, 1.0):
            raise ValueError(
                "repetition_penalty looks up every token before in the vocabulary; a soft prompt has none there"
            )
        given = {"input_ids": ids, "attention_mask": kwargs.pop("attention_mask", None)}
        if prompt:
            for limit in ("max_length", "min_length"):
                if kwargs.get(limit) is not None:
                    kwargs[limit] += len(prompt)
            given = extend(given, prompt)
            del given["position_ids"]  # generate counts them by the mask, step by step
        if given["attention_mask"] is None:
            del given["attention_mask"]
        output = self.model.generate(**given, **kwargs)
        if isinstance(output, Tensor):
            return output[:, len(prompt) :]
        output.sequences = output.sequences[:, len(prompt) :]
        return output

    def _prompt(self) -> list[int]:
        layer: Any = tuner_layers(self.model)[0]
        length = sum(component.length for component in layer.active())
        return list(range(layer.first, layer.first + length))


def virtual_ids(model: nn.Module, adapter: str | None) -> list[int]:
    """The ids to put before a text for `adapter` of `model`, a PeftModel or the model inside; none if it is no soft prompt."""
    for layer in tuner_layers(model):
        if isinstance(layer, SoftPromptLayer) and adapter is not None and adapter in layer.ext:
            length: Any = layer.ext[adapter].length
            return list(range(layer.first, layer.first + length))
    return []


def extend(kwargs: dict[str, Any], prompt: list[int], *, token_labels: bool = True) -> dict[str, Any]:
    """Arguments of a forward on texts, [B, T], with the prompt before each row: ids, mask, positions and labels (-100).

    A row padded on the left becomes [prompt, padding, text]; the positions of its text follow the prompt's. If
    `past_key_values` holds tokens, the prompt is there already, and only the mask and positions are brought in line.
    """
    ids, mask, positions = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids")
    rows, n = ids.shape[0], len(prompt)
    past = kwargs.get("past_key_values")
    cached = past is not None and past.get_seq_length() > 0
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            "a mask of every query's own has no place for a soft prompt; put virtual_ids() before the text"
        )
    if mask is None and positions is not None and bool((positions[:, 1:] < positions[:, :-1]).any()):
        raise ValueError("texts packed into one row would share one soft prompt; switch packing and padding_free off")
    changed = dict(kwargs)
    if mask is not None:
        changed["attention_mask"] = torch.cat([mask.new_ones(rows, n), mask], dim=1)
    if cached:
        if positions is not None:
            changed["position_ids"] = positions + n
        elif mask is not None:
            changed["position_ids"] = _counted(changed["attention_mask"])[:, -ids.shape[1] :]
        return changed

    virtual = torch.tensor(prompt, device=ids.device)
    changed["input_ids"] = torch.cat([virtual.expand(rows, n), ids], dim=1)
    if positions is None:
        seen = changed["attention_mask"] if mask is not None else torch.ones_like(changed["input_ids"])
        changed["position_ids"] = _counted(seen)
    else:
        start = torch.arange(n, device=ids.device).expand(positions.shape[0], n)
        changed["position_ids"] = torch.cat([start, positions + n], dim=1)
    labels, kept = kwargs.get("labels"), kwargs.get("logits_to_keep")
    if labels is not None and token_labels and labels.shape == ids.shape:
        changed["labels"] = torch.cat([labels.new_full((rows, n), -100), labels], dim=1)
    if isinstance(kept, Tensor):
        changed["logits_to_keep"] = kept + n
    if kwargs.get("token_type_ids") is not None:
        types = kwargs["token_type_ids"]
        changed["token_type_ids"] = torch.cat([types.new_zeros(rows, n), types], dim=1)
    return changed


def _counted(mask: Tensor) -> Tensor:
    """Positions by a mask: of each token, how many the mask shows before it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def _cut(output: Any, width: int) -> Any:
    """The output without the prompt's columns: what has one for each token keeps the last `width`."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(item) for item in value)
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] > width:
            return value[:, -width:]
        return value

    if isinstance(output, tuple):
        return cut(output)
    for name in ("logits", "last_hidden_state", "hidden_states"):
        if output.get(name) is not None:
            output[name] = cut(output[name])
    return output


def some_rows(embedding: Any, n: int) -> Tensor:
    """`n` random rows [n, width] as the embedding gives them out, some of which are scaled; gathered under ZeRO-3."""
    ids = torch.randint(embedding.num_embeddings, (n,))
    weight = embedding.weight
    with torch.no_grad(), _gathered(weight):
        return embedding(ids.to(weight.device)).float().cpu()


@contextmanager
def _gathered(weight: nn.Parameter) -> Iterator[None]:
    if not hasattr(weight, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield


register("soft_prompt", SoftPromptConfig, SoftPromptModel)
