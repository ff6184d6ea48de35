"""Write docs/recipe.md, the reference of a recipe's keys, from the schema itself; docs/methods.md, the fine-tuning methods,
from their records; and docs/stages.md, the kinds of stages, from theirs and the programs themselves.

python scripts/recipe_reference.py
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from pipeline.config import distill, evaluate, merge, schema, selection
from pipeline.config.kinds import DATA, KINDS, POLICIES, REWARDS, Kind
from pipeline.config.methods import METHODS, Method
from pipeline.config.prepare import STEPS
from pipeline.config.recipe import INHERITED
from pipeline.config.schema import Block
from stages.ppo.advantage import ESTIMATORS

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEAD = """# The recipe

One YAML file is the whole experiment. This page is written by `python scripts/recipe_reference.py` from the schema.
Unknown keys and wrong types are refused with the key and a fix. Any stage may give its own `base`, `adapter`, `deepspeed`
and `seed`; keys it leaves out are the recipe's. Paths are relative to the recipe file, and `$NAME` is expanded.
"""


def table(block: type[Block], skip: tuple[str, ...] = ()) -> str:
    lines = ["| key | type | default |", "|---|---|---|"]
    if set(block.model_fields) <= set(skip):
        return "No options."
    for name, field in block.model_fields.items():
        if name in skip:
            continue
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, Block):
            shown = f"see {type(default).__name__}"
        else:
            shown = f"`{default}`"
        lines.append(f"| `{name}` | {kind(field.annotation)} | {shown} |")
    return "\n".join(lines)


def kind(annotation: Any) -> str:
    """A type as a reader writes it."""
    if "RewardSource" in str(annotation) or "StageReward" in str(annotation):
        return "a reward stage's name, or a list of sources: StageReward, FunctionReward, HttpReward, VerifyReward"
    if "Decontaminate" in str(annotation):
        return "a list of steps, each a name or `{name: options}`: " + ", ".join(f"`{name}`" for name in STEPS)
    text = (
        annotation.__name__
        if inspect.isclass(annotation) and not getattr(annotation, "__args__", ())
        else str(annotation)
    )
    for old, new in (
        ("typing.", ""),
        ("pipeline.config.schema.", ""),
        ("pipeline.config.selection.", ""),
        ("pipeline.config.distill.", ""),
        ("pipeline.config.evaluate.", ""),
        ("pipeline.config.merge.", ""),
        ("NoneType", "none"),
        ("Literal", "one of "),
    ):
        text = text.replace(old, new)
    text = re.sub(r", (After|Before)Validator\(.*", "", text)
    if "Annotated[" in text:
        inner = text.split("Annotated[")[-1].split(", FieldInfo")[0]
        text = f"list[{inner}]" if text.startswith("list[") else inner
    return "`" + text.replace("|", "or") + "`"


def section(title: str, block: type[Block], skip: tuple[str, ...] = ()) -> str:
    return f"## {title}\n\n{inspect.cleandoc(block.__doc__ or '')}\n\n{table(block, skip)}\n"


def estimators() -> str:
    """The advantage estimators as their declarations say."""
    lines = [
        "## Advantage estimators",
        "",
        "What `advantage_estimator` may be, what each needs, and what it does unless `kl.place`, `loss_aggregation` or",
        "`whiten` say otherwise. The functions and their papers are in `stages/ppo/advantage.py`, where one is added.",
        "",
        "| name | critic | samples per prompt | greedy response too | KL penalty in the | mean over | whitened |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, e in ESTIMATORS.items():
        words = ["yes" if flag else "no" for flag in (e.critic, e.greedy, e.whiten)]
        lines.append(
            f"| `{name}` | {words[0]} | at least {e.samples} | {words[1]} | {e.kl} | {e.aggregation}s | {words[2]} |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    parts = [HEAD, section("Top level", schema.Header)]
    for name in ("Base", "Adapter", "DeepSpeed", "DataRules", "Tracking", "Wandb", "Source", "Mix"):
        parts.append(section(name, getattr(schema, name)))
    for name, stage in KINDS.items():
        parts.append(section(f"kind: {name}", stage.schema, (*INHERITED, "kind", "seed", "holdout")))
    parts += [section(f"step: {name}", step, ("step",)) for name, step in STEPS.items()]
    sources = ("StageReward", "FunctionReward", "HttpReward", "VerifyReward")
    for name in ("Sampling", "Critic", "Kl", *sources, "Overlong", "Ptx", "Signals"):
        parts.append(section(name, getattr(schema, name)))
    of_selection = (selection.Scorer, selection.Quality, selection.Necessity, selection.Coverage)
    suites = (evaluate.Perplexity, evaluate.Continuation, evaluate.Translation, evaluate.Code, evaluate.TruthfulQa)
    of_evaluate = (
        evaluate.Policy,
        evaluate.ChatJudge,
        evaluate.RewardTest,
        evaluate.Forgetting,
        *suites,
        evaluate.Gsm8k,
        evaluate.Task,
    )
    for block in (distill.Teacher, merge.Part, *of_evaluate, *of_selection):
        parts.append(section(block.__name__, block))
    parts.append(estimators())
    return "\n".join(parts)


METHODS_HEAD = """# Fine-tuning methods

`adapter: {method: NAME}` in a recipe, at the top or in a stage. This page is written by `python scripts/recipe_reference.py`
from the records in `pipeline/config/methods.py`, which the recipe check reads too: what a method cannot do is refused, with
the reason and a method that can, before a weight is read. `--set adapter.method=NAME` switches a recipe over; keys of another
kind of adapter are left out then. Measured side by side: [results/methods.md](results/methods.md).

Options have PEFT's names or the papers'. LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is `lr_ratio` of any LoRA: the learning
rate of its second factor over that of the first. Ranks by layer are `rank_pattern` and `alpha_pattern`. In the formulas d is
the model's width, k the width of its keys (or values).
"""

METHODS_TAIL = """## Opening a published adapter

Adapters are PEFT directories. PEFT itself opens those of LoRA and its kin, AdaLoRA, VeRA, IA3, OFT and LN-tuning. The others'
methods are Relay's: `import pipeline.adapters` before `PeftModel.from_pretrained`; PEFT has no way to find them by itself, so
that each such directory has a README.md that says so. `relay export RUN --stage STAGE --lora` writes the LoRA that
equals a LoRA, AdaLoRA or VeRA adapter ([export.md](export.md)); a PiSSA adapter is published as one.

## Where Relay departs from the papers

- **Prefixes** stand in attention alone, not in the key-value cache: positions, padding and recomputed activations are as
  without them. A reparametrised prefix keeps its network when published, so that the next stage can go on training it.
- **Prompt tuning and P-tuning**: virtual tokens have ids of their own past the vocabulary, which the input embedding knows.
  PEFT's own forms lose position ids (left padding changes the answer), do not resume, and break a classifier's pooling.
- **UniPELT's gates** are computed for each token, not from the mean over the text, which would let a token see what comes.
- **LoReFT and DiReFT** act on all positions, not on the prompt's first and last tokens alone.
- **Pfeiffer's adapter** sits after the feed-forward's last layer, before the residual sum.
- **AdaLoRA** measures importance from gradients before clipping, of all ranks together; its orthogonality term is part of
  every stage's loss, PPO's too.
- **PiSSA** is published as a LoRA of rank 2r, B A less what was taken out of the base, on the base as it was: exact to the
  precision in which the base is held.
- **BitFit** gives linear layers without a bias one that starts at zero: Llama has no other. Merged, it needs an architecture
  with a place for all of them: Llama, GPT-2, GPT-NeoX, and OPT whose embeddings are not projected.
"""


def _written(value: Any) -> str:
    """A default as a recipe would have it."""
    return "null" if value is None else str(value)


def methods() -> str:
    """docs/methods.md."""
    columns = {
        "identity": "starts as identity",
        "mergeable": "merges",
        "additive": "rollout copy",
        "mixed": "mixed batches",
        "zero3": "ZeRO-3",
        "four_bit": "4-bit",
        "four_bit_zero3": "4-bit and ZeRO-3",
        "conv1d": "GPT-2",
        "shared": "PPO",
        "continued": "continued",
        "packs": "packing",
        "combines": "merge stage",
        "rows": "added tokens",
    }
    about = ["| method | paper | what trains | trained parameters | choose it |", "|---|---|---|---|---|"]
    caps = ["| method | " + " | ".join(columns.values()) + " | PEFT's name | where it cannot |"]
    caps.append("|---" * (len(columns) + 3) + "|")
    keys = ["| method | keys and defaults |", "|---|---|"]
    for name, method in METHODS.items():
        about.append(f"| `{name}` | {method.paper} | {method.trains} | {method.parameters} | {method.choose} |")
        both = method.four_bit and method.zero3 and method.four_bit_zero3
        flags = [both if key == "four_bit_zero3" else getattr(method, key) for key in columns]
        able = " | ".join("yes" if flag else "no" for flag in flags)
        why = f"{method.why}; try `{method.instead}`" if method.why else ""
        caps.append(f"| `{name}` | {able} | {method.peft} | {why} |")
        keys.append(f"| `{name}` | " + ", ".join(f"`{k}: {_written(v)}`" for k, v in method.options.items()) + " |")
    record = (
        inspect.cleandoc(Method.__doc__ or "").partition("Then what it can do:")[2].partition("`instead`")[0].strip()
    )
    parts = [
        METHODS_HEAD,
        "\n".join(about),
        "## What they can do",
        record,
        "\n".join(caps),
        "## Their keys",
        "\n".join(keys),
    ]
    return "\n\n".join([*(part.strip("\n") for part in parts), METHODS_TAIL])


STAGES_HEAD = """# The stages

A recipe's stages are of these kinds; each is one program, `deepspeed --module stages.NAME`, that opens with what it trains and
reads top to bottom. This page is written by `python scripts/recipe_reference.py` from `pipeline/config/kinds.py` and the
programs themselves. Keys and defaults are in [recipe.md](recipe.md); how a kind is added is in
[adding_a_stage.md](adding_a_stage.md).

Under *starts from* and *data* are keys of the stage's block. A key that names a stage takes any that hands on what is said
here, `base` too where it says so; data are files, hub data sets, or a stage that hands on rows.
"""

STAGES_TAIL = """Which stages run after which is what their keys say. Two stages that name one above them share it: it runs
once, and a second run finds it up to date. Shipped chains: `relay run quickstart` (sft, reward, ppo, evaluate), `domain`
(pretrain, sft, reward, ppo), `mods` (prepare, reward, selection, sft), `dpo` (sft, dpo, evaluate) and `distill` (sft, reward,
ppo, distill, export), on data that ships with them; `rlvr` (sft, ppo by GRPO) on GSM8K.

## Continued pre-training

A `pretrain` stage reads plain text: rows with a column `text`, or `.txt` files, each one document. A document ends with EOS.
One above `max_length` tokens is cut into pieces of which each begins with the last token of the one before, so that every
token but a document's first is predicted once; pieces are then packed as in [mixtures.md](mixtures.md), best fit decreasing,
and none sees another. Where rows of a sequence would see each other (OPT, prompt tuning, other attention), pieces train one
by one.

Before the first step and after the last the stage measures perplexity per token, over documents cut in the same way, on at
most `eval_rows` pieces of each text:

| metric | text |
|---|---|
| `held_out/domain/perplexity` | documents of `data` that `data.holdout` keeps from every stage |
| `held_out/general/perplexity` | all of `general`, which no stage of the recipe may learn from |
| `held_out/domain/<source>/perplexity` | each source of `data`, where there are several |

with `before/` in front for those before. `pieces` and `sequences` are what the training documents became. The first numbers
lie beside the checkpoints: a stage that was killed goes on and publishes the same bytes.

## Merging adapters

```yaml
merge: {kind: merge, of: [sft_a, sft_b], combination: ties, density: 0.5, weights: [1.0, 0.5]}
```

PEFT's `add_weighted_adapter` combines LoRA, QLoRA and rsLoRA adapters on one base (checked by content); other methods are
refused. `linear`, `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` work on the factors A and B apart, as PEFT has it:
the change is then not the sum of the changes. `cat` is, at the sum of the ranks. What comes out has the stage's own rank and
scale, so that a next stage can go on training it. A stage of another run is named by that run's folder, `{run: runs/other,
stage: sft}`: its baton is verified, stands in the lineage, and makes the merge stale when it changes.
"""


def _handed_on(name: str) -> str:
    for kinds, what in ((POLICIES, "policy"), (REWARDS, "reward model"), (DATA, "rows")):
        if name in kinds:
            return what
    return {"evaluate": "measurements", "classify": "classifier"}.get(name, "")


def _named(kind: Kind, key: str) -> str:
    wanted = sorted({_handed_on(name) for name in kind.inputs[key]})
    return f"`{key}`: {' or '.join(wanted)}" + (", `base`" if key in kind.base_ok else "")


def _program(kind: Kind) -> Path:
    place = DOCS.parent / kind.module.replace(".", "/")
    return place / "__main__.py" if place.is_dir() else place.with_suffix(".py")


def _trainer(kind: Kind) -> str:
    """What trains: the trainers that the program's files import, or nothing."""
    program = _program(kind)
    files = sorted(program.parent.glob("*.py")) if program.name == "__main__.py" else [program]
    imported = [
        name.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module in ("trl", "transformers")
        for name in node.names
        if name.name.endswith("Trainer")
    ]
    if imported:
        return ", ".join(f"`{name}`" for name in imported)
    return "Relay's own loop" if issubclass(kind.schema, schema.Training) else "nothing"


def stages() -> str:
    """docs/stages.md."""
    lines = ["| kind | what it does | starts from | data | hands on | trained by |", "|---|---|---|---|---|---|"]
    for name, kind in KINDS.items():
        about = (ast.get_docstring(ast.parse(_program(kind).read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        about = " ".join(about.split()).rstrip(".")
        starts = "; ".join(_named(kind, key) for key in kind.inputs)
        data = ", ".join(f"`{key}`" + (" (measured only)" if key in kind.measured else "") for key in kind.sources)
        lines.append(f"| `{name}` | {about} | {starts} | {data} | {_handed_on(name)} | {_trainer(kind)} |")
    return "\n".join([STAGES_HEAD, *lines, "", STAGES_TAIL])


if __name__ == "__main__":
    (DOCS / "stages.md").write_text(stages(), encoding="utf-8")
    (DOCS / "recipe.md").write_text(page(), encoding="utf-8")
    (DOCS / "methods.md").write_text(methods(), encoding="utf-8")
