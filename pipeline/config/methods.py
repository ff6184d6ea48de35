"""The fine-tuning methods: what each trains, its options, and what it can do. Data that recipe checks, the memory plan, the
stages and docs/methods.md read; free of torch.

A method is added here and, where PEFT lacks it, beside the other tuners in `pipeline.adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

LORA: Mapping[str, Any] = MappingProxyType(
    {
        "r": 16,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": "all-linear",
        "rank_pattern": {},
        "alpha_pattern": {},
        "lr_ratio": None,
    }
)


@dataclass(frozen=True)
class Method:
    """A fine-tuning method.

    `peft` is PEFT's name of its adapters; PEFT puts adapters of one name alone on one model. `options` are the keys of the
    recipe's adapter block that it has, with their defaults. `parameters` is a formula per adapted layer or block, with d the
    model's width and L its layers. Then what it can do:

    - identity: a fresh adapter leaves the model as it is, so that PPO's reference is the base with the adapter off
    - mergeable: its weights can become part of the base's, so that a stage of another method can build on it
    - additive: merging adds a matrix to each adapted weight, so that rollouts may use a merged copy
    - mixed: roles on one base read one batch together, each row with its adapter
    - zero3, four_bit, four_bit_zero3: works on weights that ZeRO-3 shards, on nf4 weights, and on nf4 weights under ZeRO-3
    - conv1d: works on GPT-2's layers, which are transposed
    - shared: several roles can have such an adapter on one copy of the base
    - continued: the next stage can go on training a copy of the adapter
    - combines: adapters of several stages can be added up to one
    - rows: rows of the embeddings for tokens that the recipe adds train beside it
    - prefixed: virtual tokens stand before the text and take part of the model's context
    - packs: several rows can be packed into one sequence

    All of them save, resume, decode in a key-value cache as in a full forward, and recompute activations. `instead` names a
    method that works where this one does not, and `why` says why it does not.
    """

    paper: str
    trains: str
    parameters: str
    choose: str
    peft: str
    options: Mapping[str, Any] = field(default_factory=dict)
    identity: bool = True
    mergeable: bool = True
    additive: bool = False
    mixed: bool = False
    zero3: bool = True
    four_bit: bool = True
    four_bit_zero3: bool = True
    conv1d: bool = True
    shared: bool = True
    continued: bool = True
    combines: bool = False
    rows: bool = False
    prefixed: bool = False
    packs: bool = True
    instead: str = "lora"
    why: str = ""


METHODS: dict[str, Method] = {
    "full": Method(
        "",
        "every weight",
        "all",
        "when memory allows and the data is plenty",
        "",
        four_bit=False,
        why="packed weights do not train",
        instead="qlora",
        rows=True,
    ),
    "lora": Method(
        "Hu et al. 2021, arXiv 2106.09685",
        "two factors of a rank-r change of each target",
        "r (in + out) per target",
        "first; everything works with it",
        "LORA",
        LORA,
        combines=True,
        additive=True,
        mixed=True,
        rows=True,
    ),
    "qlora": Method(
        "Dettmers et al. 2023, arXiv 2305.14314",
        "LoRA on a base in 4 bits (nf4, double quantisation)",
        "r (in + out) per target",
        "when the base in 16 bits does not fit",
        "LORA",
        LORA,
        combines=True,
        additive=True,
        mixed=True,
        rows=True,
    ),
    "rslora": Method(
        "Kalajdzievski 2023, arXiv 2312.03732",
        "LoRA scaled by alpha / sqrt(r)",
        "r (in + out) per target",
        "for ranks of 64 and more, at which LoRA's own scale slows learning",
        "LORA",
        LORA,
        combines=True,
        additive=True,
        mixed=True,
        rows=True,
    ),
    "dora": Method(
        "Liu et al. 2024, arXiv 2402.09353",
        "LoRA for a weight's direction, and the length of each of its columns",
        "r (in + out) + out per target",
        "for small ranks, where LoRA falls short of full fine-tuning; slower",
        "LORA",
        LORA,
        four_bit_zero3=False,
        why="it reads the packed weights itself, which ZeRO-3 does not expect",
        rows=True,
    ),
    "pissa": Method(
        "Meng et al. 2024, arXiv 2404.02948",
        "the r principal components of each target, taken out of the base",
        "r (in + out) per target",
        "for supervised stages that should converge faster; published as a LoRA of rank 2r on the base as it was",
        "LORA",
        {**LORA, "alpha": 16.0},
        four_bit=False,
        shared=False,
        continued=False,
        why="it takes components out of the base's weights",
        rows=True,
    ),
    "adalora": Method(
        "Zhang et al. 2023, arXiv 2303.10512",
        "a singular value decomposition of each target's change; a budget of singular values moves to where they matter",
        "init_r (in + out + 1) per target",
        "when ranks should differ between layers and nobody knows how",
        "ADALORA",
        {
            "init_r": 12,
            "target_r": 8,
            "alpha": 32.0,
            "dropout": 0.0,
            "targets": "all-linear",
            "tinit": 0.1,
            "tfinal": 0.2,
            "deltaT": 1,
            "beta1": 0.85,
            "beta2": 0.85,
            "orth_reg_weight": 0.5,
        },
        additive=True,
        continued=False,
    ),
    "vera": Method(
        "Kopiczko et al. 2024, arXiv 2310.11454",
        "two vectors per target that scale frozen random factors all targets share",
        "r + out per target",
        "when adapters must be tiny on disk",
        "VERA",
        {"r": 256, "d_initial": 0.1, "dropout": 0.0, "targets": "all-linear"},
        additive=True,
    ),
    "ia3": Method(
        "Liu et al. 2022, arXiv 2205.05638",
        "a factor for each key, each value and each feed-forward unit",
        "keys + values + inner per block",
        "for few examples; the smallest that merges",
        "IA3",
        {"modules": {}},
        four_bit=False,
        why="PEFT's 4-bit layer for it answers in float32, which attention does not take beside bf16",
    ),
    "oft": Method(
        "Qiu et al. 2023, arXiv 2306.07280",
        "a block-diagonal rotation of each target's inputs",
        "in (b - 1) / 2 per target, b the block size",
        "when angles between neurons should stay as they were",
        "OFT",
        {"oft_block_size": 32, "dropout": 0.0, "targets": "all-linear"},
        conv1d=False,
        why="PEFT has it for linear layers alone",
    ),
    "ln_tuning": Method(
        "Zhao et al. 2024, arXiv 2312.11420",
        "the norms' weights and biases",
        "2 d per block, 4 d with biases",
        "as a cheap baseline",
        "LN_TUNING",
        {"modules": {}},
        zero3=False,
        why="PEFT copies the norms, and a shard has nothing to copy",
        instead="bitfit",
    ),
    "bitfit": Method(
        "Ben Zaken et al. 2022, arXiv 2106.10199",
        "every bias; a linear layer without one gets one",
        "out per linear layer, d per norm with a bias",
        "as a cheap baseline, on models with biases",
        "BITFIT",
    ),
    "adapter_houlsby": Method(
        "Houlsby et al. 2019, arXiv 1902.00751",
        "a bottleneck after attention and one after the feed-forward",
        "2 (2 d b + b + d) per block, b the bottleneck",
        "when capacity matters more than speed",
        "HYBRID",
        {"bottleneck_dim": 64, "non_linearity": "gelu", "dropout": 0.0, "modules": {}},
        identity=False,
        mergeable=False,
        why="a bottleneck has a non-linearity",
    ),
    "adapter_pfeiffer": Method(
        "Pfeiffer et al. 2021, arXiv 2005.00247",
        "a bottleneck after the feed-forward",
        "2 d b + b + d per block",
        "as Houlsby's at half the cost",
        "HYBRID",
        {"bottleneck_dim": 64, "non_linearity": "relu", "dropout": 0.0, "modules": {}},
        mergeable=False,
        why="a bottleneck has a non-linearity",
    ),
    "adapter_parallel": Method(
        "He et al. 2022, arXiv 2110.04366",
        "a scaled bottleneck beside the feed-forward",
        "2 d b + b + d per block",
        "the best of the bottlenecks in that paper",
        "HYBRID",
        {"bottleneck_dim": 64, "non_linearity": "relu", "scaling": 4.0, "dropout": 0.0, "modules": {}},
        mergeable=False,
        why="a bottleneck has a non-linearity",
    ),
    "prefix_tuning": Method(
        "Li and Liang 2021, arXiv 2101.00190",
        "n keys and values before the text in every block, through a two-layer network",
        "n d + (d + 1) e + (e + 1) 2 k per block, e the encoder's width, k the keys'",
        "for generation tasks with few examples",
        "HYBRID",
        {"num_virtual_tokens": 20, "encoder_hidden_size": 128, "modules": {}},
        identity=False,
        mergeable=False,
        why="a prefix is not a change of a weight",
    ),
    "p_tuning_v2": Method(
        "Liu et al. 2022, arXiv 2110.07602",
        "n keys and values before the text in every block",
        "2 n k per block, k the keys' width",
        "as prefix tuning without its network: fewer parameters, slower to train",
        "HYBRID",
        {"num_virtual_tokens": 20, "modules": {}},
        identity=False,
        mergeable=False,
        why="a prefix is not a change of a weight",
    ),
    "prompt_tuning": Method(
        "Lester et al. 2021, arXiv 2104.08691",
        "n virtual tokens before the text",
        "n d",
        "for very large models and many tasks on one copy",
        "SOFT_PROMPT",
        {"num_virtual_tokens": 20},
        identity=False,
        mergeable=False,
        prefixed=True,
        packs=False,
        why="virtual tokens are not a change of a weight",
    ),
    "p_tuning": Method(
        "Liu et al. 2021, arXiv 2103.10385",
        "n virtual tokens before the text, through a three-layer network",
        "n d + (d + 1) e + (e + 1) e + (e + 1) d, e the encoder's width",
        "as prompt tuning, easier to train",
        "SOFT_PROMPT",
        {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
        identity=False,
        mergeable=False,
        prefixed=True,
        packs=False,
        why="virtual tokens are not a change of a weight",
    ),
    "mam": Method(
        "He et al. 2022, arXiv 2110.04366",
        "a prefix in attention and a scaled parallel bottleneck",
        "those of prefix_tuning and adapter_parallel",
        "that paper's best mix at a few per cent of the weights",
        "HYBRID",
        {
            "num_virtual_tokens": 30,
            "encoder_hidden_size": 128,
            "bottleneck_dim": 64,
            "non_linearity": "relu",
            "scaling": 4.0,
            "dropout": 0.0,
            "modules": {},
        },
        identity=False,
        mergeable=False,
        why="a prefix is not a change of a weight",
    ),
    "unipelt": Method(
        "Mao et al. 2022, arXiv 2110.07577",
        "LoRA on queries and values, a prefix and a bottleneck, each behind a learned gate",
        "those of lora, p_tuning_v2 and adapter_pfeiffer, and d + 1 per gate",
        "when it is not known which of the three suits the task",
        "HYBRID",
        {
            "num_virtual_tokens": 10,
            "r": 8,
            "alpha": 16.0,
            "bottleneck_dim": 48,
            "non_linearity": "relu",
            "dropout": 0.0,
            "modules": {},
        },
        identity=False,
        mergeable=False,
        why="a prefix is not a change of a weight",
    ),
    "loreft": Method(
        "Wu et al. 2024, arXiv 2404.03592",
        "a change of each block's output inside r orthonormal directions",
        "2 r d + r per block",
        "for very few parameters",
        "REFT",
        {"r": 4, "modules": {}},
        mergeable=False,
        why="it changes what blocks say, not their weights",
    ),
    "direft": Method(
        "Wu et al. 2024, arXiv 2404.03592",
        "a change of each block's output along r directions",
        "2 r d + r per block",
        "as LoReFT without the orthonormality: faster",
        "REFT",
        {"r": 4, "modules": {}},
        mergeable=False,
        why="it changes what blocks say, not their weights",
    ),
}


def continues(method: str, options: Mapping[str, Any], parent: str, parent_options: Mapping[str, Any]) -> bool:
    """Whether a stage goes on training a copy of its parent's adapter: the same method and shape.

    LoRA and QLoRA adapters are of one kind; what only training heeds (dropout, learning rates) may differ.
    """
    ours, theirs = METHODS[method], METHODS[parent]
    same = method == parent or {method, parent} == {"lora", "qlora"}
    shape = [key for key in ours.options if key not in ("dropout", "lr_ratio")]
    return (
        same and ours.continued and bool(theirs.peft) and all(options[key] == parent_options.get(key) for key in shape)
    )
