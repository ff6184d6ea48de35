"""What lies outside this machine: the model hub, W&B, other hosts."""

from __future__ import annotations

import netrc
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from pipeline import hosts
from pipeline.config.recipe import Recipe, outside, sources
from pipeline.doctor.finding import Case, Finding, ok, warn

PATIENCE = 5.0
"""Seconds that a server may take to answer."""

TRUE = ("1", "on", "true", "yes")


def hub(case: Case) -> list[Finding]:
    wanted = from_hub(case.recipe) if case.recipe else []
    if case.recipe and not wanted:
        return [ok("model hub", "the recipe needs nothing from it")]
    if any(os.environ.get(name, "").lower() in TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return [ok("model hub", "offline by HF_HUB_OFFLINE: models and data come from the cache or from folders")]
    place = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    login = "logged in" if _hub_login() else "not logged in: gated models are out of reach"
    try:
        with urllib.request.urlopen(f"{place}/api/models?limit=1", timeout=PATIENCE):  # nosec B310 # the user's endpoint
            return [ok("model hub", f"{place} answers; {login}")]
    except urllib.error.HTTPError as error:
        said = f"answers {error.code}"
    except (OSError, ValueError) as error:
        said = f"cannot be reached: {getattr(error, 'reason', error)}"
    names = f" ({', '.join(wanted[:3])}{', …' if len(wanted) > 3 else ''} may be wanted from it)" if wanted else ""
    return [
        warn(
            "model hub",
            f"{place} {said}{names}",
            "set HTTPS_PROXY for a proxy, HF_ENDPOINT for a mirror; or name folders in recipes and set HF_HUB_OFFLINE=1",
        )
    ]


def from_hub(recipe: Recipe) -> list[str]:
    """Models and data that a recipe names and that are no files here."""
    named: list[str] = []
    for block in recipe.stages.values():
        named += [recipe.local(block.base.model)] if getattr(block, "base", None) else []
        named += [recipe.local(item.model) for _, item in outside(block)]
        named += [recipe.data(source.path) for source in sources(block) if source.path is not None]
    return sorted({name for name in named if not Path(name).exists() and not any(sign in name for sign in "*?[")})


def _hub_login() -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH", home / "token")).expanduser()
    return bool(os.environ.get("HF_TOKEN")) or (file.is_file() and file.stat().st_size > 0)


def wandb(case: Case) -> list[Finding]:
    """Whether W&B has a key for its server. The key itself is never shown."""
    wanted = case.recipe.header.tracking.wandb if case.recipe else None
    if case.recipe and (wanted is None or wanted.mode != "online"):
        return [
            ok("W&B", "the recipe does not log to it" if wanted is None else f"mode {wanted.mode}: no login needed")
        ]
    if (mode := os.environ.get("WANDB_MODE", "online")) != "online":
        return [ok("W&B", f"WANDB_MODE is {mode}: no login needed")]
    place = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if source := _wandb_login(urlsplit(place).hostname or place):
        return [ok("W&B", f"a login for {place}, from {source}")]
    found = f"no login for {place}; only recipes with tracking.wandb need one"
    return [
        (warn if case.recipe else ok)("W&B", found, *(["wandb login, or WANDB_MODE=offline"] if case.recipe else []))
    ]


def _wandb_login(host: str) -> str | None:
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(str(file)).authenticators(host):
                return str(file)
        except (OSError, netrc.NetrcParseError):
            continue
    return None


def hostfiles(case: Case) -> list[Finding]:
    """The recipe's hostfiles, as `relay run` reads them; that the hosts can be reached is shown by `ranks`."""
    if case.recipe is None:
        return []
    found: dict[str, Finding] = {}
    for stage in case.recipe.stages:
        names = hosts.read(case.recipe, stage)
        if names:
            file = str(case.recipe.stages[stage].deepspeed.hostfile)
            found[file] = ok("hosts", f"{file}: {', '.join(names)}")
    return list(found.values())
