"""What a reward source raises when it gives no usable scores."""

from __future__ import annotations

from pipeline.errors import Trouble

SHOWN = 200
"""Characters of a prompt or a response that a message shows."""


class SourceError(Trouble):
    """A reward source raised, or answered with something that is not one finite number for each response.

    `source` is its name, `row` the index within the batch where one row is at fault, `prompt` and `response` that row's texts.
    The caller of a source sees to it that every rank raises; `moved` counts the row among those of all ranks.
    """

    def __init__(
        self, source: str, row: int | None, reason: str, prompt: str | None = None, response: str | None = None
    ) -> None:
        # All arguments are `args`, so that the error survives pickling from one rank to another.
        super().__init__(source, row, reason, prompt, response)
        self.source, self.row, self.reason, self.prompt, self.response = source, row, reason, prompt, response

    def moved(self, first: int) -> SourceError:
        """The same of a row `first` rows further on."""
        row = None if self.row is None else self.row + first
        return type(self)(self.source, row, self.reason, self.prompt, self.response)

    def __str__(self) -> str:
        place = "" if self.row is None else f", row {self.row}"
        lines = [f"reward source {self.source}{place}: {self.reason}"]
        for name, text in (("prompt", self.prompt), ("response", self.response)):
            if text is not None:
                lines.append(f"  {name}: {text[:SHOWN]!r}{'…' if len(text) > SHOWN else ''}")
        return "\n".join(lines)


class SourceUnavailable(SourceError):
    """An endpoint still failed at its last attempt, with an error that may pass."""
