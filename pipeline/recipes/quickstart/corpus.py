"""The quickstart's corpus: a small English grammar and the rule that says which of two replies is better.

A prompt sends somebody to a place and asks what is there; a reply answers in one or two short sentences::

    At noon, Anna walks to the garden. What does she see?
    Anna sees a golden fountain and an old bench in the garden.

The rule, in one sentence: a reply scores one point for each different vivid word in it (a fixed list; three points at
most; neighbouring vivid words count once), provided that it names the prompt's place and no other and consists of
complete sentences of 24 words at most altogether; otherwise it scores zero.

Everything is a pure function of its seed, and only the standard library is used.
``python -m pipeline.recipes.quickstart.corpus`` writes the data files beside this module.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

SEED = 0
ROWS = {"demonstrations": 1700, "preferences": 2350, "prompts": 1800}
TEXTS = {"tales": 200, "stories": 60}

MAX_SCORE = 3
MAX_WORDS = 24

VIVID = (
    "golden", "silver", "crimson", "emerald", "amber", "ivory", "ancient", "glowing", "shimmering", "sparkling",
    "gleaming", "dazzling", "radiant", "moonlit", "sunlit", "misty", "frosty", "mossy", "towering", "crooked",
)  # fmt: skip
PLAIN = (
    "old", "new", "small", "big", "long", "wide", "plain", "nice", "clean", "dark", "grey", "good", "round", "low",
)  # fmt: skip
# Each place with what can be found there. Every place reads well after "in the", every thing after "a" or "an".
PLACES = {
    "garden": ("fountain", "gate", "tree", "bench", "pond"),
    "forest": ("tree", "path", "stream", "fern", "owl"),
    "harbour": ("boat", "rope", "lantern", "gull", "mast"),
    "market": ("stall", "basket", "lantern", "apple", "bell"),
    "library": ("shelf", "lamp", "book", "desk", "ladder"),
    "kitchen": ("kettle", "stove", "table", "bowl", "lamp"),
    "castle": ("tower", "gate", "banner", "throne", "stair"),
    "village": ("well", "roof", "lane", "bell", "chimney"),
    "meadow": ("stream", "flower", "fence", "butterfly", "path"),
    "cave": ("crystal", "pool", "stone", "bat", "tunnel"),
    "valley": ("river", "hill", "mill", "bridge", "path"),
    "museum": ("statue", "painting", "vase", "crown", "clock"),
    "bakery": ("oven", "loaf", "tray", "window", "counter"),
    "station": ("train", "clock", "bench", "platform", "lamp"),
    "orchard": ("tree", "apple", "ladder", "basket", "fence"),
    "temple": ("statue", "bell", "candle", "pillar", "door"),
    "attic": ("trunk", "mirror", "window", "lamp", "chair"),
    "workshop": ("hammer", "bench", "wheel", "stove", "window"),
    "palace": ("throne", "mirror", "stair", "candle", "curtain"),
    "stable": ("horse", "saddle", "fence", "bucket", "door"),
}
WOMEN = ("Anna", "Clara", "Dora", "Emma", "Greta", "Ida", "Lucy", "Maria", "Nora", "Rosa", "Sara", "Vera")
MEN = ("Adam", "Ben", "Carl", "Felix", "Hugo", "Jack", "Leo", "Max", "Oscar", "Paul", "Tom", "Victor")
OPENERS = ("", "", "At noon, ", "At night, ", "In the morning, ", "After the rain, ", "On Sunday, ", "In winter, ")
TRAVELS = ("walks to", "comes to", "visits", "returns to", "arrives at", "goes to")
# What each question asks, and the verb a reply takes up from it.
QUESTIONS = {
    "What does {pronoun} see?": "sees",
    "What does {pronoun} find?": "finds",
    "What does {pronoun} notice?": "notices",
    "What is it like?": "is",
}
VERBS = frozenset(QUESTIONS.values()) | {travel.split()[0] for travel in TRAVELS} | {
    "has", "stands", "waits", "stops", "likes", "stays", "looks", "moves",
}  # fmt: skip

# A first sentence names the place; a second one adds to it. {thing} becomes a thing with its article and perhaps a word
# before it, {word} a bare word. Tails, and second sentences without a slot, keep length from saying much about quality.
ABOUT_SIGHT = (
    "{name} {verb} {thing} in the {place}{tail}.",
    "{name} {verb} {thing} and {thing} in the {place}{tail}.",
    "In the {place}, {pronoun} {verb} {thing}{tail}.",
    "In the {place}, {pronoun} {verb} {thing} and {thing}{tail}.",
    "The {place} has {thing} and {thing}{tail}.",
    "There is {thing} in the {place}{tail}.",
    "The {word} {place} has {thing}{tail}.",
)
ABOUT_LOOKS = (
    "The {place} is {word} and {word}{tail}.",
    "The {place} is {word}{tail}.",
    "The {place} is {word}, with {thing}{tail}.",
    "It is a nice {place} with {thing} and {thing}{tail}.",
    "The {place} has {thing}{tail}.",
)
SECOND = (
    "Next to it stands {thing}.",
    "Behind it is {thing}.",
    "{Pronoun} stops near {thing}.",
    "{Pronoun} looks at {thing} and {thing}.",
    "{Pronoun} looks at {thing} for a while.",
    "{Pronoun} waits there for a while.",
    "Nothing else moves there.",
    "{Pronoun} stays until the evening.",
)
TAILS = ("", "", "", " today", " at last", " this time", " near the entrance", " on the left side", " as always")
RAMBLES = (" and waits again", " and looks around", " and stays longer")
REMARKS = (
    "{name} {travel} the {place}.",
    "{name} likes the {place}.",
    "Today {name} stays in the {place} for a while.",
    "{name} waits near {thing}.",
    "There stands {thing} in the {place}.",
)

# How often a reply has 0, 1, 2 and 3 vivid words, and how often it is spoilt. Pretraining text is the poorest, so that
# fine-tuning has something to teach; demonstrations are middling, so that PPO has too.
PRETRAINING = ((0.45, 0.30, 0.15, 0.10), 0.30)
DEMONSTRATION = ((0.25, 0.40, 0.23, 0.12), 0.08)
TALE = (0.05, 0.15, 0.40, 0.40)
COMPARISON = ((0.25, 0.27, 0.25, 0.23), 0.25)
FAULTS = ("elsewhere", "elsewhere", "nowhere", "unfinished", "repeats", "rambles")

_SENTENCE = re.compile(r"[A-Z][a-z]*(?:,? [A-Za-z]+)*")
_WORD = re.compile(r"[A-Za-z]+")
_SLOT = re.compile(r"\{(thing|word)\}")


def rule_score(prompt: str, completion: str) -> float:
    """Score a reply from 0 to 3: how many different vivid words it uses, if it is a proper answer to the prompt.

    It is one when all of this holds, and scores zero otherwise:

    - it names the place the prompt names, and no other place;
    - it consists of complete sentences: each starts with a capital, has three words or more, one of them a verb of the
      grammar, and ends with a full stop, the last one included; nothing but words, commas and full stops;
    - it has at most ``MAX_WORDS`` words.

    A vivid word counts once however often it comes, and not at all directly after another vivid word: neither
    repetition nor a bare list pays. A prompt that names no known place has no right answer: zero.
    """
    subject = next((word for word in _words(prompt) if word in PLACES), None)
    words = _words(completion)
    text = completion.strip()
    if subject is None or len(words) > MAX_WORDS or {word for word in words if word in PLACES} != {subject}:
        return 0.0
    if not text.endswith(".") or not all(_is_sentence(sentence) for sentence in text[:-1].split(". ")):
        return 0.0
    counted = {word for before, word in pairwise(["", *words]) if word in VIVID and before not in VIVID}
    return float(min(len(counted), MAX_SCORE))


def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Score each response against the prompt at the same position. The rows tell nothing that the prompts do not."""
    return [rule_score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def pretraining_text(seed: int, n: int) -> list[str]:
    """Return ``n`` documents to train the base on: prompts with replies of every quality, and plain stories."""
    rng = Random(f"pretraining:{seed}")
    documents = []
    for _ in range(n):
        scene = _Scene(rng)
        if rng.random() < 0.7:
            documents.append(scene.prompt + scene.reply(*PRETRAINING))
        else:
            documents.append(scene.story())
    return documents


def demonstrations(seed: int, n: int) -> list[dict[str, str]]:
    """Return ``n`` rows with a prompt of their own and a reply of mixed quality: ``{"prompt", "completion"}``."""
    rng = Random(f"demonstrations:{seed}")
    return [{"prompt": scene.prompt, "completion": scene.reply(*DEMONSTRATION)} for scene in _scenes(rng, n)]


def preferences(seed: int, n: int) -> list[dict[str, str]]:
    """Return ``n`` rows with a prompt of their own and two replies: ``{"prompt", "chosen", "rejected"}``.

    Chosen scores strictly higher. Whether it is the longer one, in words and in characters alike, is a coin toss
    decided before the replies are drawn: length alone predicts nothing.
    """
    rng = Random(f"preferences:{seed}")
    rows = []
    for scene in _scenes(rng, n):
        longer = rng.random() < 0.5
        while True:
            chosen, rejected = scene.reply(*COMPARISON), scene.reply(*COMPARISON)
            if rule_score(scene.prompt, chosen) <= rule_score(scene.prompt, rejected):
                continue
            by_words = len(_words(chosen)) - len(_words(rejected))
            by_characters = len(chosen) - len(rejected)
            if by_words * by_characters > 0 and (by_words > 0) == longer:
                break
        rows.append({"prompt": scene.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def prompts(seed: int, n: int) -> list[dict[str, str]]:
    """Return ``n`` different prompts: ``{"prompt"}``."""
    return [{"prompt": scene.prompt} for scene in _scenes(Random(f"prompts:{seed}"), n)]


def tales(seed: int, n: int) -> list[dict[str, str]]:
    """Return ``n`` documents of one to eight well-formed replies, rich in vivid words and without a question: ``{"text"}``."""
    rng = Random(f"tales:{seed}")
    rows = []
    for _ in range(n):
        scene = _Scene(rng)
        rows.append({"text": " ".join(scene.reply(TALE, 0.0) for _ in range(rng.randint(1, 8)))})
    return rows


def stories(seed: int, n: int) -> list[dict[str, str]]:
    """Return ``n`` plain documents of the kind that the base was trained on: ``{"text"}``."""
    rng = Random(f"stories:{seed}")
    return [{"text": _Scene(rng).story()} for _ in range(n)]


def files() -> dict[str, str]:
    """Return the name and the content of each data file that ships with the recipe."""
    rows = {
        "demonstrations": demonstrations(SEED, ROWS["demonstrations"]),
        "preferences": preferences(SEED, ROWS["preferences"]),
        "prompts": prompts(SEED, ROWS["prompts"]),
    }
    return {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[name]) for name in rows}


def texts() -> dict[str, str]:
    """Return the name and the content of each text file of the recipe ``domain``: what it adapts to, and what it may forget."""
    rows = {"tales": tales(SEED, TEXTS["tales"]), "stories": stories(SEED, TEXTS["stories"])}
    return {f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[name]) for name in rows}


def main() -> None:
    """Write the data files beside this module, and the texts beside the recipe that reads them."""
    here = Path(__file__).parent
    for folder, made in ((here, files()), (here.parent / "domain", texts())):
        for name, content in made.items():
            (folder / name).write_bytes(content.encode())


class _Scene:
    """Who goes where and what is asked: all that a prompt fixes about its replies."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        people = rng.choice((WOMEN, MEN))
        self.name = rng.choice(people)
        self.pronoun = "she" if people is WOMEN else "he"
        self.place = rng.choice(tuple(PLACES))
        question = rng.choice(tuple(QUESTIONS))
        self.verb = QUESTIONS[question]
        travel = f"{rng.choice(OPENERS)}{self.name} {rng.choice(TRAVELS)} the {self.place}."
        self.prompt = f"{travel} {question.format(pronoun=self.pronoun)}\n"

    def reply(self, vivid: Sequence[float], faulty: float) -> str:
        """Draw a reply; ``vivid`` weighs 0, 1, 2 and 3 vivid words, ``faulty`` is how often a fault spoils it."""
        rng = self.rng
        count = rng.choices(range(len(vivid)), vivid)[0]
        fault = rng.choice(FAULTS) if rng.random() < faulty else ""
        if fault == "nowhere":
            place = "place"
        elif fault == "elsewhere":
            place = rng.choice([other for other in PLACES if other != self.place])
        else:
            place = self.place
        pool = rng.sample(VIVID, count)
        if fault == "repeats":
            pool = [pool[0]] * count if pool else []
        text = self._sentences(place, pool)
        if fault == "unfinished":
            words = text.split(" ")
            text = " ".join(words[: -rng.choice((1, 2, 3))]).rstrip(".,")
        while fault == "rambles" and len(_words(text)) <= MAX_WORDS:
            text = f"{text[:-1]}{rng.choice(RAMBLES)}."
        return text

    def story(self) -> str:
        """Draw a few plain sentences about the place, with no question."""
        rng = self.rng
        sentences = []
        for _ in range(rng.choice((2, 3, 4))):
            template = rng.choice(REMARKS + ABOUT_LOOKS)
            room = len(_SLOT.findall(template))
            sentences.append(self._fill(template, self.place, rng.sample(VIVID, rng.choice((0, 1)) if room else 0)))
        return " ".join(sentences)

    def _sentences(self, place: str, pool: Sequence[str]) -> str:
        """Draw one or two sentences with room for every word of the pool."""
        while True:
            template = self.rng.choice(ABOUT_LOOKS if self.verb == "is" else ABOUT_SIGHT)
            if self.rng.random() < 0.5:
                template += " " + self.rng.choice(SECOND)
            if len(_SLOT.findall(template)) >= len(pool):
                return self._fill(template, place, pool)

    def _fill(self, template: str, place: str, pool: Sequence[str]) -> str:
        """Fill a template: the pool's words in slots drawn at random, plain words or nothing in the others."""
        rng = self.rng
        slots = _SLOT.findall(template)
        vivid = dict(zip(rng.sample(range(len(slots)), len(pool)), pool, strict=True))
        plain = rng.sample(PLAIN, len(slots))
        things = rng.sample(PLACES[self.place], len(slots))
        fillings = []
        for position, slot in enumerate(slots):
            if slot == "word":
                fillings.append(vivid.get(position, plain[position]))
            else:
                word = vivid.get(position) or (plain[position] if rng.random() < 0.5 else "")
                phrase = f"{word} {things[position]}".strip()
                fillings.append(f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}")
        order = iter(fillings)
        return _SLOT.sub(lambda _: next(order), template).format(
            name=self.name,
            pronoun=self.pronoun,
            Pronoun=self.pronoun.capitalize(),
            place=place,
            verb=self.verb,
            travel=rng.choice(TRAVELS),
            tail=rng.choice(TAILS),
        )


def _scenes(rng: Random, n: int) -> Iterator[_Scene]:
    """Draw ``n`` scenes whose prompts all differ."""
    seen: set[str] = set()
    while len(seen) < n:
        scene = _Scene(rng)
        if scene.prompt not in seen:
            seen.add(scene.prompt)
            yield scene


def _is_sentence(text: str) -> bool:
    """Say whether a text without its full stop is one sentence of the grammar's kind."""
    words = _words(text)
    return _SENTENCE.fullmatch(text) is not None and len(words) >= 3 and not VERBS.isdisjoint(words)


def _words(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return [word.lower() for word in _WORD.findall(text)]


if __name__ == "__main__":
    main()
