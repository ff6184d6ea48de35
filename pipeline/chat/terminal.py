"""A conversation in the terminal, or over a pipe: lines in, answers out as they come."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.chat.speakers import Asked, Full, Settings, Speaker, new_lines
from pipeline.data.row import Skip

HELP = """\
/reset  forget the conversation
/quit   leave, as do Ctrl-D and Ctrl-C twice; Ctrl-C once stops an answer
/help   this"""
AGAIN = "Ctrl-C again, Ctrl-D or /quit leaves"


@dataclass
class Conversation:
    """What was said so far to each speaker and by it. With `raw` there is no conversation: every line is a text to go on
    with, in which \\n stands for a new line."""

    speakers: list[Speaker]
    settings: Settings
    system: str | None = None
    raw: bool = False
    answered: int = 0
    turns: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        opening = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.turns = [list(opening) for _ in self.speakers]

    def asked(self, place: int, line: str) -> Asked:
        return new_lines(line) if self.raw else [*self.turns[place], {"role": "user", "content": line}]

    def answer(self, line: str, tell: Callable[[int, str], None]) -> None:
        """Every speaker's answer to `line`, one after the other; `tell` is given the speaker's number and a piece of text.

        A conversation goes on with what was said, also where KeyboardInterrupt cut it. Raises Full, and forgets the line, where
        one of them has no room left, and Skip where its chat template refuses the conversation.
        """
        questions = [self.asked(place, line) for place in range(len(self.speakers))]
        for speaker, asked in zip(self.speakers, questions, strict=True):
            speaker.ids(asked, 1)
        said = [""] * len(self.speakers)

        def hearing(place: int) -> Callable[[str], None]:
            def hear(piece: str) -> None:
                said[place] += piece
                tell(place, piece)

            return hear

        try:
            for place, speaker in enumerate(self.speakers):
                speaker.stream(questions[place], self.settings, self.answered, hearing(place))
        finally:
            self.answered += 1
            for place, asked in enumerate(questions):
                if said[place] and not self.raw:
                    self.turns[place] = [*asked, {"role": "assistant", "content": said[place].strip()}]


def talk(conversation: Conversation) -> None:
    """Read lines until the end of input, /quit or Ctrl-C twice, and answer each."""
    screen = Console(highlight=False, soft_wrap=True)
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        import readline  # noqa: F401 # gives `input` editing and history

        _say(f"{' and '.join(speaker.name for speaker in conversation.speakers)}; /help tells the commands\n")
    interrupted = False
    while True:
        try:
            line = _read("> " if shown else "")
            if line is None or line.strip() == "/quit":
                return
            interrupted = False
            _do(conversation, line, screen, shown)
        except KeyboardInterrupt:
            _say("\n")
            if interrupted:
                return
            interrupted = True
            _say(f"({AGAIN})\n")


def _read(prompt: str) -> str | None:
    """The next line; None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None


def _do(conversation: Conversation, line: str, screen: Console, shown: bool) -> None:
    command = line.strip()
    if not command:
        return
    if command == "/reset":
        conversation.reset()
        _say("(forgotten)\n")
    elif command == "/help":
        _say(HELP + "\n")
    elif command.startswith("/") and " " not in command and not conversation.raw:
        _say(f"(no command {plain(command)}; /help tells them)\n")
    else:
        try:
            if shown and len(conversation.speakers) > 1:
                _columns(conversation, line, screen)
            else:
                _lines(conversation, line)
        except Full as error:
            _say(f"(this conversation has {error}: /reset, or ask less)\n")
        except Skip as error:
            _say(f"({error})\n")


def _lines(conversation: Conversation, line: str) -> None:
    """One answer after the other, each headed by its speaker where there are several."""
    speaking: list[int] = []

    def tell(place: int, piece: str) -> None:
        if speaking[-1:] != [place]:
            _say("\n" * bool(speaking))
            if len(conversation.speakers) > 1:
                _say(f"{conversation.speakers[place].name}: ")
            speaking.append(place)
        _say(plain(piece))

    conversation.answer(line, tell)
    _say("\n")


def _columns(conversation: Conversation, line: str, screen: Console) -> None:
    """Both answers side by side as they come; what does not fit the screen is shown when they have ended."""
    said = [""] * len(conversation.speakers)

    def table() -> Table:
        found = Table(*(speaker.name for speaker in conversation.speakers), expand=True)
        found.add_row(*(Text(text.strip()) for text in said))
        return found

    try:
        with Live(table(), console=screen, transient=True, auto_refresh=False) as live:

            def tell(place: int, piece: str) -> None:
                said[place] += plain(piece)
                live.update(table(), refresh=True)

            conversation.answer(line, tell)
    finally:
        if any(said):
            screen.print(table())


def plain(text: str) -> str:
    """`text` without control characters but new lines and tabs: what a model says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
