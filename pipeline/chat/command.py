"""`relay chat`: talk to a published policy, or to two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.config.kinds import POLICIES
from pipeline.config.schema import Sampling
from pipeline.errors import UserError
from pipeline.export.command import Run, RunDir, Stage, tell_of_code
from pipeline.published import open_model, run_folder


def chat(
    run: Run,
    stage: Stage = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="STAGE", help="beside it another stage's answers, or `base`'s")
    ] = None,
    batch: Annotated[
        Path | None, typer.Option("--batch", metavar="FILE", help="answer a file of prompts: one a line, or JSON lines")
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="a new file for the answers to --batch")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="what is typed is the prompt, without the chat template")] = False,
    system: Annotated[str | None, typer.Option("--system", help="the system message of the conversation")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the likeliest token; as --temperature 0")] = False,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="1 is off")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off")] = 0,
    longest: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="default 256, or half of a context below 512")
    ] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answers to the same questions")] = 0,
    run_dir: RunDir = None,
) -> None:
    """Talk to a policy in the terminal, or have it answer a file.

    --compare shows two side by side, --batch answers a file.
    """
    if to is not None and (batch is None or to.exists()):
        found = "there is no --batch" if batch is None else "it is there already"
        raise UserError(f"--to {to}", found, expected="a new file for the answers to --batch")
    if top_p == 0.0:
        raise UserError(
            "--top-p 0", "it leaves no token", expected="above 0; 1 is off", fix="--greedy for the likeliest"
        )
    folder = run_folder(run, run_dir)
    baton = open_model(folder, stage, POLICIES)
    if compare == baton.manifest["stage"]:
        raise UserError(f"--compare {compare}", "it is the model itself", expected="another stage, or base")
    tell_of_code(baton)

    from pipeline.chat import batch as batches
    from pipeline.chat.speakers import Settings, speakers
    from pipeline.chat.terminal import Conversation, talk

    speaking = speakers(folder, baton, compare, POLICIES)
    if longest is None:
        longest = min([256, *(one.limit // 2 for one in speaking if one.limit is not None)])
    greedy = greedy or temperature == 0.0
    sampling = Sampling(
        temperature=1.0 if greedy else temperature, top_p=top_p, top_k=top_k, max_response_length=longest, batch=16
    )
    settings = Settings(sampling, seed, greedy)
    if batch is not None:
        batches.answer(speaking, batch, to, settings, system, raw)
    else:
        talk(Conversation(speaking, settings, system, raw))
