"""The block of an evaluate stage: what is tested, beside what, on which data and by which judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.block import Block, Positive, misplaced
from pipeline.config.schema import Endpoint, Frozen, FunctionName, Sampling, Source, Url
from pipeline.config.selection import Scorer


class Policy(Block):
    """A policy to test: an earlier `stage` (or `base`), or the `model` of a hub id or a folder, be it a full model or a PEFT
    adapter."""

    stage: str | None = None
    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _one_of_them(self) -> Policy:
        if (self.stage is None) == (self.model is None):
            raise ValueError("give the name of an earlier stage, or `model` for another policy, and not both")
        return self

    @property
    def name(self) -> str:
        """What metrics call it: the stage, or the last part of the model's id or folder."""
        return self.stage or str(self.model).rstrip("/").rpartition("/")[2]


def by_stage(value: Any) -> Any:
    """A name alone is a stage's."""
    return {"stage": value} if isinstance(value, str) else value


Tested = Annotated[Policy, BeforeValidator(by_stage)]
Judging = Annotated[Scorer, BeforeValidator(by_stage)]


class Perplexity(Block):
    """Loss in nats per token, and perplexity, on the first `rows` pieces of up to `max_length` tokens of a text that no stage
    of the recipe learns from."""

    data: Annotated[list[Source], Field(min_length=1)]
    rows: Positive = 512
    max_length: Positive = 512


class Continuation(Block):
    """How often a text's own continuation is likelier than those of `choices` - 1 other texts, after its first `context`
    tokens; a continuation has `length` tokens. Texts are ones that no stage of the recipe learns from."""

    data: Annotated[list[Source], Field(min_length=1)]
    rows: Positive = 256
    choices: Annotated[int, Field(ge=2)] = 4
    context: Positive = 64
    length: Positive = 32


class Translation(Block):
    """sacreBLEU (by `tokenize`) and chrF of greedy translations of `rows` sentences from a tab-separated file of sentence
    pairs, such as Tatoeba's. `shots` other pairs of the file stand before each as examples."""

    path: str
    source: str = "English"
    target: str = "Chinese"
    tokenize: Literal["zh", "13a", "char", "intl", "ja-mecab", "ko-mecab"] = "zh"
    rows: Positive = 200
    shots: Annotated[int, Field(ge=0)] = 4
    max_response_length: Positive = 64


class Code(Block):
    """pass@k on problems in HumanEval's format (Chen et al. 2021, arXiv 2107.03374): of `samples` programs a problem, run in
    a sandbox without network, that end within `timeout` seconds. One sample is greedy; several are drawn at `temperature`."""

    path: str
    rows: Positive | None = None
    samples: Positive = 1
    k: list[Positive] = Field(default_factory=lambda: [1], min_length=1)
    temperature: Annotated[float, Field(gt=0.0)] = 0.8
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    max_response_length: Positive = 256
    timeout: Annotated[float, Field(gt=0.0)] = 10.0

    @model_validator(mode="after")
    def _enough_samples(self) -> Code:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs as many samples; write `samples: {max(self.k)}` or more")
        return self


class TruthfulQa(Block):
    """MC1 and MC2 of TruthfulQA (Lin et al. 2022, arXiv 2109.07958) on its own CSV file, as lm_eval's tasks have them."""

    path: str
    rows: Positive | None = None


class Gsm8k(Block):
    """Exact match of the final number on problems in GSM8K's format (Cobbe et al. 2021, arXiv 2110.14168), as lm_eval's task
    has it. `shots` problems of the file `train` stand before each."""

    path: str
    train: str | None = None
    shots: Annotated[int, Field(ge=0)] = 0
    rows: Positive | None = 200
    max_response_length: Positive = 256

    @model_validator(mode="after")
    def _shots_have_a_file(self) -> Gsm8k:
        if self.shots and self.train is None:
            raise ValueError("shots are taken from `train`: give its path, or `shots: 0`")
        return self


class Task(Block):
    """A task of lm_eval, EleutherAI's harness: the `name` of one of its own, or the `path` of a task file in its format."""

    name: str | None = None
    path: str | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    rows: Positive | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Task:
        if (self.name is None) == (self.path is None):
            raise ValueError("give the name of a task, or `path` for a task file, and not both")
        return self


SUITES = ("perplexity", "continuation", "translation", "code", "truthfulqa", "gsm8k")


class Forgetting(Block):
    """What the policies `of` can do, in the order they were trained: the first is the one before. Every other one has the
    change of each measure since the first and since the one before it, with its paired bootstrap interval and a verdict.

    `max_loss` is the most that a measure may get worse since the first, in its own units (`{perplexity/loss: 0.1}`); more
    fails the run.
    """

    of: Annotated[list[Tested], Field(min_length=1)]
    perplexity: Perplexity | None = None
    continuation: Continuation | None = None
    translation: Translation | None = None
    code: Code | None = None
    truthfulqa: TruthfulQa | None = None
    gsm8k: Gsm8k | None = None
    tasks: list[Annotated[Task, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]] = Field(
        default_factory=list
    )
    max_loss: dict[str, Annotated[float, Field(ge=0.0)]] = Field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """The files that suites read and no list of data names."""
        blocks = [getattr(self, name) for name in SUITES[2:]]
        named = [path for block in blocks if block for path in (block.path, getattr(block, "train", None)) if path]
        return [*named, *(task.path for task in self.tasks if task.path)]

    def measures(self) -> list[str]:
        """The names of the suites' measures, without those of `tasks`, which their files say."""
        of_code = [f"code/pass@{k}" for k in self.code.k] if self.code else []
        known = {
            "perplexity": ["perplexity/loss"],
            "continuation": ["continuation/accuracy"],
            "translation": ["translation/bleu", "translation/chrf"],
            "truthfulqa": ["truthfulqa/mc1", "truthfulqa/mc2"],
            "gsm8k": ["gsm8k/exact_match"],
        }
        return [*(name for suite in known if getattr(self, suite) for name in known[suite]), *of_code]

    @model_validator(mode="after")
    def _measures_something(self) -> Forgetting:
        names = [policy.name for policy in self.of]
        if len(set(names)) < len(names):
            raise misplaced("of", f"two policies called {max(names, key=names.count)}", [])
        if not self.tasks and not any(getattr(self, name) for name in SUITES):
            raise ValueError("there is nothing to measure: give at least one of " + ", ".join([*SUITES, "tasks"]))
        for name in self.max_loss:
            if name not in self.measures() and not (self.tasks and name.startswith("tasks/")):
                raise misplaced("max_loss", f"no measure {name}", self.measures())
        return self


class ChatJudge(Endpoint):
    """A language model that says which of two replies is better, behind an OpenAI-compatible endpoint: `chat` is its address
    up to `/chat/completions`, `model` the name it is asked for.

    Each pair is asked about twice, the replies' places swapped; a reply wins that is preferred in both, else it is a tie.
    `prompt` is a file with the question, in which {prompt}, {a} and {b} are filled in and whose answer ends in [[A]], [[B]] or,
    for a tie, [[C]]; `key_env` names the environment variable that holds the key; `together` requests are under way at a time.
    """

    chat: Url
    model: str
    prompt: str | None = None
    max_tokens: Positive = 512
    together: Positive = 8


ENSEMBLE = "ensemble"
"""What metrics call several reward models together."""


class RewardTest(Block):
    """How well the reward models `of` tell the better reply of a pair, several also together, as an ensemble: on the held-out
    pairs of `data`, and on all pairs of `ood`, which no stage of the recipe learns from. At most `rows` pairs of each; a pair
    with a text above `max_length` tokens is left out."""

    of: Annotated[list[Judging], Field(min_length=1)]
    data: Annotated[list[Source], Field(min_length=1)]
    ood: list[Source] = Field(default_factory=list)
    rows: Positive = 2000
    max_length: Positive = 512

    @model_validator(mode="after")
    def _different_names(self) -> RewardTest:
        names = [scorer.name for scorer in self.of]
        if len(set(names)) < len(names):
            raise misplaced("of", f"two reward models called {max(names, key=names.count)}", [])
        if len(names) > 1 and ENSEMBLE in names:
            raise misplaced("of", f"a reward model called {ENSEMBLE}, as metrics call all of them together", [])
        return self


class Evaluate(Frozen):
    """Tests what the run made.

    With `prompts`, replies of `model` stand beside those of `against` on the held-out ones, scored by the reward models
    `reward` and by the Python function `judge`, compared by the language model `chat_judge`. `reward_model` says how good
    reward models are, `forgetting` what policies can do, one after the other.
    """

    kind: Literal["evaluate"]
    model: Tested | None = None
    against: Tested | None = None
    prompts: list[Source] = Field(default_factory=list)
    reward: list[Judging] = Field(default_factory=list)
    judge: FunctionName | None = None
    chat_judge: ChatJudge | None = None
    rows: Positive = 256
    show: Positive = 3
    micro_batch: Positive = 32
    sampling: Sampling = Sampling()
    reward_model: RewardTest | None = None
    forgetting: Forgetting | None = None

    def longest_read(self) -> int | None:
        """Tokens of the longest text whose likelihood or score is read, beside replies; None where none is."""
        found = [self.reward_model.max_length] if self.reward_model else []
        if self.forgetting and (block := self.forgetting.perplexity):
            found.append(block.max_length)
        if self.forgetting and (texts := self.forgetting.continuation):
            found.append(texts.context + texts.length)
        return max(found, default=None)

    def longest_reply(self) -> int | None:
        """Tokens of the longest reply to a suite's problem; None where none is written."""
        asked = self.forgetting
        written = [asked.translation, asked.code, asked.gsm8k] if asked else []
        return max((block.max_response_length for block in written if block), default=None)

    @model_validator(mode="after")
    def _whole_comparison(self) -> Evaluate:
        given = {"model": self.model, "against": self.against, "prompts": self.prompts or None}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given) and self.forgetting is None and self.reward_model is None:
            parts = "`model`, `against` and `prompts`, or `reward_model`, or `forgetting`"
            raise ValueError(f"there is nothing to test: give {parts}")
        if missing and (len(missing) < len(given) or self.reward or self.judge or self.chat_judge):
            raise ValueError(f"a comparison needs `model`, `against` and `prompts`; {missing[0]} is missing")
        return self
