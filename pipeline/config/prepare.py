"""The blocks of a `prepare` stage: its data and an ordered list of steps, each a name or a name with its options, such as

steps: [unicode, {length: {min: 20, max: 20000}}, {near_duplicates: {threshold: 0.8}}]
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, model_validator

from pipeline.config.block import Block, Fraction, Positive, misplaced
from pipeline.config.schema import DataStage, Source


class Unicode(Block):
    """Repairs wrongly decoded text (ftfy) and composes it to `form`; typographic quotes stay unless `straight_quotes`."""

    step: Literal["unicode"] = "unicode"
    form: Literal["NFC", "NFKC"] = "NFC"
    straight_quotes: bool = False


class Control(Block):
    """Takes out control and zero-width characters, but the joiners of emoji and of the Arabic and Indic scripts."""

    step: Literal["control"] = "control"


class Html(Block):
    """Turns HTML into text where there is any; code between back-ticks and unknown tags stay."""

    step: Literal["html"] = "html"


class Whitespace(Block):
    """Plain spaces, none at a line's end, at most one blank line in a row. `collapse` makes one of several spaces within a
    line; `strip` cuts both ends of every text, where a prompt and its reply join."""

    step: Literal["whitespace"] = "whitespace"
    collapse: bool = False
    strip: bool = False


class Length(Block):
    """Keeps rows whose texts have `min` to `max` `unit` together."""

    step: Literal["length"] = "length"
    min: Annotated[int, Field(ge=0)] = 0
    max: Positive | None = None
    unit: Literal["characters", "words"] = "characters"

    @model_validator(mode="after")
    def _some_length_fits(self) -> Length:
        if self.max is not None and self.max < self.min:
            raise misplaced("max", f"{self.max} is less than min, {self.min}", [])
        return self


def _codes(value: list[str]) -> list[str]:
    for code in value:
        if not re.fullmatch("[a-z]{2,3}", code):
            raise ValueError(f"codes of ISO 639, such as en, not {code}")
    return value


class Language(Block):
    """Keeps rows whose language (ISO 639) is one of `keep` with at least `min_confidence`. Rows of fewer than 20 letters have
    no language that can be told: they are `unknown`, and kept or dropped as that says."""

    step: Literal["language"] = "language"
    keep: Annotated[list[str], Field(min_length=1), AfterValidator(_codes)]
    min_confidence: Fraction = 0.5
    unknown: Literal["keep", "drop"] = "keep"


class ExactDuplicates(Block):
    """Keeps the first of the rows that say the same, white space apart."""

    step: Literal["exact_duplicates"] = "exact_duplicates"


class NearDuplicates(Block):
    """Keeps the first of the rows whose `ngram`s of words have a Jaccard similarity of at least `threshold`, as estimated from
    `num_perm` MinHash values (LSH; Broder 1997)."""

    step: Literal["near_duplicates"] = "near_duplicates"
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    num_perm: Annotated[int, Field(ge=16, le=1024)] = 128
    ngram: Positive = 5


class Decontaminate(Block):
    """Removes rows that have an `ngram` of words in common with the evaluation files `against` (13: Brown et al. 2020,
    arXiv 2005.14165); with `min_overlap`, only those of whose n-grams at least that share is in them."""

    step: Literal["decontaminate"] = "decontaminate"
    against: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v), Field(min_length=1)]
    ngram: Positive = 13
    min_overlap: Fraction = 0.0


class Mask(Block):
    """Puts [EMAIL], [PHONE] and [KEY] in the place of e-mail addresses, valid phone numbers and the keys of services. Phone
    numbers are known by their country code, or as written in `region` (ISO 3166, such as US)."""

    step: Literal["mask"] = "mask"
    email: bool = True
    phone: bool = True
    keys: bool = True
    region: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] | None = None


STEPS: dict[str, type[Block]] = {
    schema.model_fields["step"].default: schema
    for schema in (
        Unicode,
        Control,
        Html,
        Whitespace,
        Length,
        Language,
        ExactDuplicates,
        NearDuplicates,
        Decontaminate,
        Mask,
    )
}


def _spelled_out(value: Any) -> Any:
    """`unicode` and `{length: {min: 1}}`, as a recipe has them, with the step's name among its options."""
    name: Any = value
    options: Any = {}
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
    if not isinstance(name, str):
        raise ValueError("one step: its name, or its name with options, such as `length: {min: 20}`")
    if name not in STEPS:
        raise misplaced("step", f"no step is called {name}", STEPS)
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise misplaced(name, f"found {options!r}", [key for key in STEPS[name].model_fields if key != "step"])
    known = [key for key in STEPS[name].model_fields if key != "step"]
    for key in options:
        if key not in known:
            raise misplaced(f"{name}.{key}", f"unknown key {key}", known)
    return {"step": name, **options}


Step = Annotated[
    Unicode | Control | Html | Whitespace | Length | Language | ExactDuplicates | NearDuplicates | Decontaminate | Mask,
    Discriminator("step"),
]


class Prepare(DataStage):
    """Cleans and filters data before anything is trained on it: `steps` are done in the order they stand in, each row passing
    through all of them; what is left is handed on as Parquet. `workers` processes share the work, by default one for each
    core; the result does not depend on them. A source's `limit` counts the rows read."""

    kind: Literal["prepare"]
    data: Annotated[list[Source], Field(min_length=1)]
    steps: list[Annotated[Step, BeforeValidator(_spelled_out)]] = Field(default_factory=list)
    workers: Positive | None = None

    @model_validator(mode="after")
    def _sources_are_read_whole(self) -> Prepare:
        for source in self.data:
            for key in ("share", "take", "weight"):
                if key in source.model_fields_set:
                    raise misplaced("data", f"a prepare stage does not split or mix its data, found {key}", [])
        return self

    @property
    def evaluation_files(self) -> list[str]:
        """The files, folders, globs or hub ids that data is decontaminated against, each once."""
        return list(dict.fromkeys(p for step in self.steps if isinstance(step, Decontaminate) for p in step.against))
