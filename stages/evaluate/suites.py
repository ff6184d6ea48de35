"""What a policy can do, measured: perplexity, continuations, translations. Code is in `human_eval`; lm_eval has the rest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipeline.config.evaluate import Code, Continuation, Perplexity, Translation
from pipeline.config.schema import Sampling
from pipeline.data import encoded
from pipeline.data.documents import spans
from pipeline.data.split import Counts
from pipeline.errors import UserError
from pipeline.stage import Context
from stages.evaluate import human_eval
from stages.evaluate.measure import Floats, Measure, mean
from stages.evaluate.reader import Ids, Reader


def texts_of(documents: encoded.Encoded) -> Iterator[Ids]:
    """The documents that no stage learns from, one by one."""
    return (row["input_ids"] for row in documents.held_out)


class PerplexitySuite:
    """Loss per token on plain text; who guesses gives every token of the vocabulary the same probability."""

    def __init__(self, context: Context, block: Perplexity, tok: Any) -> None:
        documents = encoded.documents(context, tok, "forgetting.perplexity.data")
        self.counts: Counts = documents.counts
        cut = (ids[start:end] for ids in texts_of(documents) for start, end in spans(len(ids), block.max_length))
        self.rows: list[Ids] = list(islice(cut, block.rows))
        self.guess = math.log(len(tok))

    def measure(self, reader: Reader) -> list[Measure]:
        said = reader.likelihoods([(row[:1], row[1:]) for row in self.rows])
        losses, tokens = np.array([-value for value, _ in said]), np.array([len(row) - 1.0 for row in self.rows])
        chance = np.stack([self.guess * tokens, tokens], 1)
        return [Measure("perplexity/loss", np.stack([losses, tokens], 1), higher_is_better=False, chance=chance)]


class ContinuationSuite:
    """Each text's own continuation among the others', all of equal length, after the same context."""

    def __init__(self, context: Context, block: Continuation, tok: Any) -> None:
        documents = encoded.documents(context, tok, "forgetting.continuation.data")
        whole = block.context + block.length
        self.counts: Counts = documents.counts
        self.choices = block.choices
        texts = list(islice((ids for ids in texts_of(documents) if len(ids) >= whole), block.rows))
        if len(texts) < block.choices:
            raise UserError(
                context.recipe.where("stages", context.stage, "forgetting", "continuation"),
                f"{len(texts)} texts of {whole} tokens or more",
                expected=f"at least {block.choices}",
                fix="lower context or length, or give more texts",
            )
        self.before = [text[: block.context] for text in texts]
        self.after = [text[block.context : whole] for text in texts]

    def measure(self, reader: Reader) -> list[Measure]:
        rows, choices = len(self.before), range(self.choices)
        pairs = [(self.before[row], self.after[(row + step) % rows]) for row in range(rows) for step in choices]
        said = np.array([value for value, _ in reader.likelihoods(pairs)]).reshape(rows, self.choices)
        right = [float(likelihoods[0] > likelihoods[1:].max()) for likelihoods in said]
        return [mean("continuation/accuracy", right, [1.0 / self.choices] * rows)]


@dataclass(frozen=True)
class Pair:
    source: str
    target: str


class TranslationSuite:
    """Greedy translations against the references; who guesses gives another sentence's translation."""

    def __init__(self, context: Context, block: Translation) -> None:
        where = context.recipe.where("stages", context.stage, "forgetting", "translation")
        self.block = block
        pairs = sentence_pairs(context.recipe.data(block.path), where)
        if len(pairs) < block.shots + 2:
            raise UserError(where, f"{len(pairs)} sentence pairs", expected="two and the shots", fix="lower shots")
        chosen = spread(pairs, min(block.rows + block.shots, len(pairs)))
        self.shots = spread(chosen, block.shots)
        self.pairs = [pair for pair in chosen if pair not in self.shots]

    def prompt(self, pair: Pair) -> str:
        """The shots and the sentence, a language before each."""
        shots = [self._lines(shot, shot.target) for shot in self.shots]
        return "\n\n".join([*shots, self._lines(pair, "").rstrip()])

    def _lines(self, pair: Pair, target: str) -> str:
        return f"{self.block.source}: {pair.source}\n{self.block.target}: {target}"

    def measure(self, reader: Reader) -> list[Measure]:
        sampling = Sampling(max_response_length=self.block.max_response_length, batch=reader.size)
        replies = reader.replies([reader.ids(self.prompt(pair)) for pair in self.pairs], sampling)
        said = [reply.strip().split("\n")[0] for reply in replies]
        return corpus_measures(said, [[pair.target for pair in self.pairs]], self.block.tokenize)


def sentence_pairs(path: str, where: str) -> list[Pair]:
    """The first two columns of a tab-separated file, each source sentence once. Raises UserError for a file that cannot be
    read and for a line without two."""
    found: dict[str, Pair] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(where, f"{path} cannot be read: {error}", expected="a text file in UTF-8") from None
    for number, line in enumerate(text.rstrip("\n").split("\n"), 1):
        columns = line.rstrip("\r").split("\t")
        if len(columns) < 2:
            raise UserError(
                where, f"line {number} of {path} has {len(columns)} column", expected="two, a tab between them"
            )
        found.setdefault(columns[0], Pair(columns[0], columns[1]))
    return list(found.values())


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items at equal distances: files of sentences are often sorted by length."""
    return [items[place * len(items) // count] for place in range(count)]


def corpus_measures(said: list[str], references: list[list[str]], tokenize: str) -> list[Measure]:
    """BLEU and chrF of a corpus as sacreBLEU computes them (Post 2018; Popović 2015), 0 to 100, from each sentence's counts,
    so that any sample of the rows has its score too. `references` are lists as long as `said`."""
    guesses = said[1:] + said[:1]
    found = []
    for name, metric in (("translation/bleu", BLEU(tokenize=tokenize)), ("translation/chrf", CHRF())):
        rows, chance = (_counts(metric, texts, references) for texts in (said, guesses))

        def score(sums: Floats, metric: Any = metric) -> Floats:
            flat = sums.reshape(-1, sums.shape[-1])
            scores = [metric._compute_score_from_stats(list(row.astype(int))).score for row in flat]
            return np.array(scores).reshape(sums.shape[:-1])

        found.append(Measure(name, rows, score, chance=chance))
    return found


def _counts(metric: Any, said: list[str], references: list[list[str]]) -> Floats:
    """What sacreBLEU counts in each sentence, float64 [rows, counts]; a corpus has their sum."""
    return np.array(metric._extract_corpus_statistics(said, references), dtype=np.float64)


class CodeSuite:
    """Programs that pass a problem's own tests; who guesses passes none."""

    def __init__(self, context: Context, block: Code) -> None:
        self.block, self.seed = block, context.block.seed
        where = context.recipe.where("stages", context.stage, "forgetting", "code")
        self.problems = human_eval.problems(context.recipe.data(block.path), where)[: block.rows]

    def measure(self, reader: Reader) -> list[Measure]:
        block = self.block
        sampling = Sampling(
            max_response_length=block.max_response_length,
            batch=reader.size,
            temperature=block.temperature,
            top_p=block.top_p,
        )
        prompts = [reader.ids(problem.prompt) for problem in self.problems]
        drawn = block.samples if block.samples > 1 else 0
        replies = reader.replies(prompts, sampling, samples=drawn, seed=self.seed)
        passed = human_eval.passed(self.problems, replies, block.timeout)
        return [
            mean(f"code/pass@{k}", [human_eval.pass_at_k(block.samples, c, k) for c in passed], [0.0] * len(passed))
            for k in block.k
        ]
