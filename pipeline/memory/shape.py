"""A decoder's numbers from its config.json: what it holds, and what a block keeps for its backward pass."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.schema import Adapter
from pipeline.errors import UserError
from pipeline.memory import adapters


@dataclass(frozen=True)
class Linear:
    """`count` linear layers of one name, which is what adapters target, and one shape."""

    name: str
    inputs: int
    outputs: int
    count: int


@dataclass(frozen=True)
class Shape:
    """A decoder's numbers: its linear layers; the parameters of all the rest; the untied output head's part of the rest
    (0 when tied); the width of the states a score head reads.

    Then the sizes of a block: `hidden` is the residual stream's width, `queries` and `keys` those of attention's queries
    and of its keys (or values), `inner` the feed-forward's; `rms` for RMSNorm (else LayerNorm), `head_norms` where queries and
    keys have one too; `feed` for how the feed-forward works; `stored` is the dtype in which the file holds the weights;
    `final_norm` where a norm follows the last block.
    """

    linears: list[Linear]
    other: int
    head: int
    width: int
    vocabulary: int
    layers: int
    hidden: int
    queries: int
    keys: int
    inner: int
    heads: int
    rms: bool
    head_norms: bool
    feed: Literal["gated", "relu", "gelu", "gelu_new"]
    stored: str
    final_norm: bool = True

    @property
    def linear(self) -> int:
        """Weights in linear layers: what 4-bit quantisation packs."""
        return sum(layer.count * layer.inputs * layer.outputs for layer in self.linears)

    @property
    def parameters(self) -> int:
        return self.linear + self.other

    @property
    def largest(self) -> int:
        """Parameters of the largest tensor."""
        return max(self.vocabulary * self.width, *(layer.inputs * layer.outputs for layer in self.linears))

    def kept(self, size: int, adapter: Adapter | None, *, masked: bool) -> int:
        """Bytes that all blocks keep of one token for the backward pass in a dtype of `size` bytes.

        With an `adapter` the weights are frozen, and a linear layer's input is kept only where an adapter reads it; with
        None everything trains. `masked` is attention with a mask, for which transformers repeats grouped keys and values.
        Attention's probabilities are not kept (flash attention and its CPU sibling), apart from one number per head.
        """
        repeated = self.queries if masked else self.keys
        attention = (2 * self.queries + 2 * repeated) * size + 4 * self.heads  # queries, output; keys, values
        # Gate, its activation and the other half; ReLU keeps its output, GELU its input; its tanh form is four steps.
        feed = {"gated": 3, "relu": 1, "gelu": 1, "gelu_new": 4}[self.feed] * self.inner * size
        # RMSNorm computes in float32: its input there, which in a float32 model is the residual stream itself.
        normed = 2 * self.hidden + (self.queries + self.keys if self.head_norms else 0)
        norms = normed * (4 if self.rms else size)
        if adapter is None:
            # Inputs of the projections, of the last one (which ReLU keeps already), and, for RMSNorm's weight, what it scales.
            inputs = 2 * self.hidden + (0 if self.feed == "relu" else self.inner)
            return self.layers * (attention + feed + norms + (inputs + (normed if self.rms else 0)) * size)
        return self.layers * (attention + feed + norms) + adapters.kept(adapter, self) * size

    def passing(self, size: int, *, adapted: bool) -> int:
        """Bytes of one token in a block without gradients, where it is widest: the feed-forward's tensors and two of the
        residual stream; an adapter's product is one tensor more."""
        return (2 * self.hidden + ((3 if self.feed == "gated" else 2) + adapted) * self.inner) * size

    def cached(self, size: int) -> int:
        """Bytes of one token's keys and values in all blocks."""
        return self.layers * 2 * self.keys * size


class Unknown(UserError):
    """A model whose shape is not known here."""


def shape(config: dict[str, Any], where: str) -> Shape:
    """The shape of a config.json of the Llama, Qwen2, Qwen3, Mistral, OPT, GPT-2 or GPT-NeoX family."""
    kind = config.get("model_type")
    families = {"llama": _llama, "qwen2": _llama, "qwen3": _llama, "mistral": _llama}
    families |= {"opt": _opt, "gpt2": _gpt2, "gpt_neox": _gpt_neox}
    if kind not in families:
        raise Unknown(
            where,
            f"model_type {kind!r}",
            expected="llama, qwen2, qwen3, mistral, opt, gpt2 or gpt_neox",
            fix="the stage itself runs with other models; only the estimate does not know them",
        )
    return families[kind](config)


def _stored(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def _llama(config: dict[str, Any]) -> Shape:
    vocabulary, hidden, inner = config.get("vocab_size", 0), config["hidden_size"], config["intermediate_size"]
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, (config.get("num_key_value_heads") or heads) * size
    linears = _linears(
        layers,
        q_proj=(hidden, queries),
        k_proj=(hidden, keys),
        v_proj=(hidden, keys),
        o_proj=(queries, hidden),
        gate_proj=(hidden, inner),
        up_proj=(hidden, inner),
        down_proj=(inner, hidden),
    )
    extra = {"qwen2": queries + 2 * keys, "qwen3": 2 * size}.get(config["model_type"], 0)  # biases; norms of q and k
    head = 0 if config.get("tie_word_embeddings") else vocabulary * hidden
    other = vocabulary * hidden + head + layers * (2 * hidden + extra) + hidden
    return Shape(
        linears=linears,
        other=other,
        head=head,
        width=hidden,
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        queries=queries,
        keys=keys,
        inner=inner,
        heads=heads,
        rms=True,
        head_norms=config["model_type"] == "qwen3",
        feed="gated",
        stored=_stored(config),
    )


def _opt(config: dict[str, Any]) -> Shape:
    vocabulary, hidden, inner = config.get("vocab_size", 0), config["hidden_size"], config["ffn_dim"]
    layers, heads = config["num_hidden_layers"], config.get("num_attention_heads", 1)
    width, square = config.get("word_embed_proj_dim", hidden), (hidden, hidden)
    linears = _linears(
        layers, q_proj=square, k_proj=square, v_proj=square, out_proj=square, fc1=(hidden, inner), fc2=(inner, hidden)
    )
    if width != hidden:
        linears += _linears(1, project_in=(width, hidden), project_out=(hidden, width))
    normed = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm")
    other = (
        vocabulary * width
        + (config["max_position_embeddings"] + 2) * hidden
        + (2 * hidden if normed else 0)
        + layers * (4 * hidden + inner + hidden + 4 * hidden)
    )
    return Shape(
        linears=linears,
        other=other,
        head=0,
        width=width,
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        queries=hidden,
        keys=hidden,
        inner=inner,
        heads=heads,
        rms=False,
        head_norms=False,
        feed="relu" if config.get("activation_function", "relu") == "relu" else "gelu",
        stored=_stored(config),
        final_norm=bool(normed),
    )


def _gpt2(config: dict[str, Any]) -> Shape:
    vocabulary, hidden, layers = config.get("vocab_size", 0), config["n_embd"], config["n_layer"]
    inner, heads = config.get("n_inner") or 4 * hidden, config.get("n_head", 1)
    linears = [
        *_linears(layers, c_attn=(hidden, 3 * hidden), c_proj=(hidden, hidden), c_fc=(hidden, inner)),
        *_linears(layers, c_proj=(inner, hidden)),
    ]
    biases = 3 * hidden + 2 * hidden + inner
    other = (vocabulary + config["n_positions"]) * hidden + 2 * hidden + layers * (4 * hidden + biases)
    return Shape(
        linears=linears,
        other=other,
        head=0,
        width=hidden,
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        queries=hidden,
        keys=hidden,
        inner=inner,
        heads=heads,
        rms=False,
        head_norms=False,
        feed="gelu_new" if config.get("activation_function", "gelu_new") == "gelu_new" else "gelu",
        stored=_stored(config),
    )


def _gpt_neox(config: dict[str, Any]) -> Shape:
    vocabulary, hidden, inner = config.get("vocab_size", 0), config["hidden_size"], config["intermediate_size"]
    layers, heads = config["num_hidden_layers"], config.get("num_attention_heads", 1)
    linears = _linears(
        layers,
        query_key_value=(hidden, 3 * hidden),
        dense=(hidden, hidden),
        dense_h_to_4h=(hidden, inner),
        dense_4h_to_h=(inner, hidden),
    )
    head = vocabulary * hidden
    other = 2 * head + layers * (4 * hidden + 3 * hidden + 2 * hidden + inner) + 2 * hidden
    return Shape(
        linears=linears,
        other=other,
        head=head,
        width=hidden,
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        queries=hidden,
        keys=hidden,
        inner=inner,
        heads=heads,
        rms=False,
        head_norms=False,
        feed="gelu",
        stored=_stored(config),
    )


def _linears(count: int, **sizes: tuple[int, int]) -> list[Linear]:
    return [Linear(name, inputs, outputs, count) for name, (inputs, outputs) in sizes.items()]


def read(model: str, where: str, configs: Path | None) -> dict[str, Any]:
    """config.json of a folder (of an adapter's, that of what it stands on) or, for a hub id, of `configs/<org>__<name>/` or
    the hub's cache."""
    folder = Path(model)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return read(adapter["base_model_name_or_path"], where, configs)
    if configs is not None and not folder.is_dir():
        folder = configs / model.replace("/", "__")
    if not (folder / "config.json").is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            file = hf_hub_download(model, "config.json")  # nosec B615 # numbers alone are read
            folder = Path(file).parent
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
            raise Unknown(
                where,
                f"no config.json of {model} here or on the hub",
                expected="a model folder or a hub id",
                fix="check base.model, or give --configs",
            ) from None
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
