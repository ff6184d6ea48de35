"""Answers to a file of prompts."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pipeline.chat.speakers import Asked, Full, Settings, Speaker, new_lines
from pipeline.data.read import Bad, rows
from pipeline.data.row import Skip
from pipeline.errors import UserError


def prompts(file: Path, raw: bool) -> list[str | list[Any]]:
    """The prompts of a text file, one a line, or of any data file: the rows' `prompt` (a text or messages) or `messages`. In a
    line that goes `raw` to the model, \\n stands for a new line.

    Raises UserError for a row that has neither.
    """
    if not file.is_file():
        raise UserError(f"--batch {file}", "no such file")
    if file.suffix in (".txt", ""):
        lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        found: list[Any] = [new_lines(line) if raw else line for line in lines]
    else:
        found = []
        for row in rows(str(file)):
            if isinstance(row, Bad):
                raise UserError(row.where, f"{row.reason} {row.detail}".strip(), fix="mend that row")
            found.append(row.fields.get("prompt") or row.fields.get("messages"))
            if not isinstance(found[-1], str | list):
                raise UserError(row.where, "no `prompt` and no `messages`", expected="a text, or a list of messages")
    if not found:
        raise UserError(f"--batch {file}", "no prompt in it")
    return found


def answer(
    speakers: list[Speaker], file: Path, to: Path | None, settings: Settings, system: str | None, raw: bool
) -> None:
    """Write a JSON line for each prompt, `{"prompt": …, "replies": {stage: …}}`, to the new file `to` or standard output, a
    batch at a time."""
    given = prompts(file, raw)
    asked = [_asked(prompt, system, raw) for prompt in given]
    room, size = settings.sampling.max_response_length, settings.sampling.batch
    for number, one in enumerate(asked, 1):
        for speaker in speakers:
            try:
                speaker.ids(one, room)
            except Full as error:
                raise UserError(
                    f"--batch {file}: prompt {number}",
                    f"{error}: no room for {room} more",
                    fix=f"--max-new-tokens {left}"
                    if (left := error.limit - error.tokens) > 0
                    else "shorten the prompt",
                ) from None
            except Skip as error:
                raise UserError(f"--batch {file}: prompt {number}", str(error)) from None
    try:
        with to.open("x", encoding="utf-8") if to else nullcontext(sys.stdout) as stream:
            for start in range(0, len(asked), size):
                part = slice(start, start + size)
                said = {speaker.name: speaker.answers(asked[part], settings, start) for speaker in speakers}
                for place, prompt in enumerate(given[part]):
                    row = {"prompt": prompt, "replies": {name: texts[place] for name, texts in said.items()}}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
    except FileExistsError:
        raise UserError(f"--to {to}", "it is there already", expected="a new file") from None


def _asked(prompt: str | list[Any], system: str | None, raw: bool) -> Asked:
    if isinstance(prompt, list):
        return prompt
    if raw:
        return prompt
    opening = [{"role": "system", "content": system}] if system is not None else []
    return [*opening, {"role": "user", "content": prompt}]
