"""An exported folder to the Hugging Face hub, or to the one that HF_ENDPOINT names. The token is huggingface_hub's affair."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError


def check(repo: str) -> None:
    """Raise UserError for a name the hub cannot have, and where nobody is logged in: before a model is merged."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}", str(error).splitlines()[0], expected="OWNER/NAME") from None
    if get_token() is None:
        raise UserError(f"--push-to-hub {repo}", "no token", fix="hf auth login, or set HF_TOKEN")


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Make the repository if it is not there, upload the folder in one commit, and return the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi()
    where = f"--push-to-hub {repo}"
    later = f"the export is whole, in {folder}; once that is mended: hf upload {repo} {folder} ."
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(where, "it is there already and public", expected="a private repository", fix=later)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Exported by Relay"))
    except UserError:
        raise
    except Exception as error:  # the library raises what its parts raise: its own, OSError, those of its HTTP client
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(where, f"the hub did not take it: {' '.join(reason[:3])}", fix=later) from None
