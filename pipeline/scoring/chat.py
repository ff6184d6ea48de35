"""A language model behind an OpenAI-compatible endpoint that says which of two replies is better (MT-Bench's pairwise judge:
Zheng et al. 2023, arXiv 2306.05685)."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pipeline.config.evaluate import ChatJudge
from pipeline.errors import UserError
from pipeline.scoring import http
from pipeline.scoring.errors import SourceError
from pipeline.scoring.source import address

Answer = Literal["A", "B", "C", ""]
"""The first reply, the second, neither; nothing that can be read."""

QUESTION = """Two assistants have answered the same request. Say which answer is better: more helpful, more correct, and more \
fitting to what was asked. Do not mind which one comes first, and do not prefer the longer one for its length.

<request>
{prompt}
</request>

<answer_a>
{a}
</answer_a>

<answer_b>
{b}
</answer_b>

Give your reasons in a sentence or two. Then write on a line of its own [[A]] if answer A is better, [[B]] if answer B is \
better, or [[C]] if they are equally good."""

PLACES = ("{prompt}", "{a}", "{b}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")


class Chat:
    """Asks the model that `block` describes; errors name `where`."""

    def __init__(self, block: ChatJudge, where: str, file: Path | None = None) -> None:
        """`file` holds another question. Raises UserError where it has no place for a text, and where there is no key."""
        self.block, self.url = block, block.chat.rstrip("/") + "/chat/completions"
        self.name = f"chat:{address(self.url, where)}"
        self.question = QUESTION if file is None else _question(file, where)
        self.headers = http.authorization(block, where)
        self.opener = http.opener_for(self.url)

    def __call__(self, prompts: list[str], ours: list[str], theirs: list[str]) -> list[tuple[Answer, Answer]]:
        """For each prompt: the answer with our reply as A and theirs as B, and with the places swapped. Raises SourceError, and
        SourceUnavailable when an endpoint goes on failing."""
        asked = [self._fill(*row) for row in zip(prompts, ours, theirs, strict=True)]
        asked += [self._fill(*row) for row in zip(prompts, theirs, ours, strict=True)]
        with ThreadPoolExecutor(self.block.together) as pool:
            answers = list(pool.map(self._ask, asked))
        return list(zip(answers[: len(prompts)], answers[len(prompts) :], strict=True))

    def _fill(self, prompt: str, a: str, b: str) -> str:
        texts = dict(zip(PLACES, (prompt, a, b), strict=True))
        return re.sub("|".join(map(re.escape, PLACES)), lambda found: texts[found[0]], self.question)

    def _ask(self, question: str) -> Answer:
        asked = {
            "model": self.block.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": self.block.max_tokens,
        }
        body = json.dumps(asked, allow_nan=False).encode()
        return verdict(self._text(http.ask(self.opener, self.block, self.url, self.name, body, self.headers)))

    def _text(self, reply: bytes) -> str:
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise SourceError(self.name, None, f"its reply has no message: {http.beginning(reply)}") from None
        return content if isinstance(content, str) else ""


def verdict(text: str) -> Answer:
    """The last verdict of an answer."""
    found = VERDICT.findall(text)
    return found[-1] if found else ""


def score(answers: tuple[Answer, Answer]) -> float:
    """1 where our reply is preferred in both orders, 0 where theirs is, else one half."""
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get(answers, 0.5)


def _question(file: Path, where: str) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(where, f"{file} cannot be read: {error}", expected="a text file in UTF-8") from None
    missing = [place for place in PLACES if place not in text]
    if missing:
        raise UserError(where, f"{file} has no place for {missing[0]}", expected=" and ".join(PLACES))
    return text
