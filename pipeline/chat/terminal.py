"""A conversation in the terminal, or over a pipe: lines in, answers out as they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    def answer(self, line: str, tell: Callable[[int, str], None], stopped: Callable[[], bool]) -> None:
        """Every speaker's answer to `line`, one after the other; `tell` is given the speaker's number and a piece of text.

        A conversation goes on with what was said, also where `stopped` cut it. Raises Full, and forgets the line, where one of
        them has no room left, and Skip where its chat template refuses the conversation.
        """
        questions = [self.asked(place, line) for place in range(len(self.speakers))]
        for speaker, asked in zip(self.speakers, questions, strict=True):
            speaker.ids(asked, 1)
        for place, (speaker, asked) in enumerate(zip(self.speakers, questions, strict=True)):
            pieces: list[str] = []

            def hear(piece: str, place: int = place, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                tell(place, piece)

            speaker.stream(asked, self.settings, self.answered, hear, stopped)
            said = "".join(pieces).strip()
            if said and not isinstance(asked, str):
                self.turns[place] = [*asked, {"role": "assistant", "content": said}]
            if stopped():
                break
        self.answered += 1


def talk(conversation: Conversation) -> None:
    """Read lines until the end of input, /quit or Ctrl-C twice, and answer each."""
    screen = Console(highlight=False, soft_wrap=True)
    shown = sys.stdin.isatty() and sys.stdout.isatty()
    if shown:
        import readline  # noqa: F401 # gives `input` editing and history

        _say(f"{' and '.join(speaker.name for speaker in conversation.speakers)}; /help tells the commands\n")
    pressed = 0  # Ctrl-C, since the last line that was typed
    while pressed < 2:
        try:
            if pressed:
                _say(f"({AGAIN})\n")
            line = _read("> " if shown else "")
            if line is None or line.strip() == "/quit":
                return
            pressed = 0
            with _noted() as presses:
                _do(conversation, line, lambda: bool(presses), screen, shown)
            pressed = len(presses)
        except KeyboardInterrupt:
            _say("\n")
            pressed += 1


@contextmanager
def _noted() -> Iterator[list[int]]:
    """Meanwhile Ctrl-C is noted in the list and raises nothing: an answer ends between two tokens, and a screen that is being
    drawn is drawn."""
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


def _read(prompt: str) -> str | None:
    """The next line; None at the end of input."""
    try:
        return input(prompt)
    except EOFError:
        return None


def _do(conversation: Conversation, line: str, stopped: Callable[[], bool], screen: Console, shown: bool) -> None:
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
                _columns(conversation, line, stopped, screen)
            else:
                _lines(conversation, line, stopped)
        except Full as error:
            _say(f"(this conversation has {error}: /reset, or ask less)\n")
        except Skip as error:
            _say(f"({error})\n")


def _lines(conversation: Conversation, line: str, stopped: Callable[[], bool]) -> None:
    """One answer after the other, each headed by its speaker where there are several."""
    speaking: list[int] = []

    def tell(place: int, piece: str) -> None:
        if speaking[-1:] != [place]:
            _say("\n" * bool(speaking))
            if len(conversation.speakers) > 1:
                _say(f"{conversation.speakers[place].name}: ")
            speaking.append(place)
        _say(plain(piece))

    conversation.answer(line, tell, stopped)
    _say("\n")


def _columns(conversation: Conversation, line: str, stopped: Callable[[], bool], screen: Console) -> None:
    """Both answers side by side as they come; what does not fit the screen is shown when they have ended."""
    said = [""] * len(conversation.speakers)

    def table() -> Table:
        found = Table(*(speaker.name for speaker in conversation.speakers), expand=True)
        found.add_row(*(Text(text.strip()) for text in said))
        return found

    with Live(table(), console=screen, transient=True, auto_refresh=False) as live:

        def tell(place: int, piece: str) -> None:
            said[place] += plain(piece)
            live.update(table(), refresh=True)

        conversation.answer(line, tell, stopped)
    screen.print(table())


def plain(text: str) -> str:
    """`text` without control characters but new lines and tabs: what a model says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
