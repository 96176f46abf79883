"""The Hugging Face hub, through its own client."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from sparse_tx.errors import UserError
from sparse_tx.export.folder import CARD, CONFIG, TENSORS

PREFIX = "hub:"
_NAME = r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?"


def download(name: str) -> Path:
    """The folder of "hub:USER/NAME" or "hub:USER/NAME@REVISION", in the hub's own cache. Nothing else is fetched."""
    found = re.fullmatch(PREFIX + _NAME, name, re.ASCII)
    if found is None:
        raise UserError(f"checkpoint={name} is no name on the hub: give hub:USER/NAME or hub:USER/NAME@REVISION")
    client = _client(name)
    try:
        folder = client.snapshot_download(
            found["repo"], revision=found["revision"], allow_patterns=[CONFIG, TENSORS, CARD]
        )
    except _errors() as error:
        raise UserError(f"{name} cannot be fetched from the hub: {_short(error)}") from None
    return Path(folder)


def check_access(repo: str) -> None:
    """UserError, before any long work, if the client is missing or nobody is logged in."""
    client = _client("to=hub")
    try:
        client.HfApi().whoami()
    except _errors() as error:
        raise UserError(
            f"to=hub repo={repo}: the hub does not know who you are ({_short(error)}): run `hf auth login`, or set "
            "HF_TOKEN"
        ) from None


def upload(folder: Path, repo: str, *, private: bool) -> str:
    """Makes the repository if it is not there, private or public, and uploads the folder. Returns its address."""
    api = _client("to=hub").HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Upload a model exported by sparse-tx")
    except _errors() as error:
        raise UserError(
            f"repo={repo} could not be written: {_short(error)}. Nothing is lost: the export lies in {folder}; repeat "
            f"the command, or upload that folder by `hf upload {repo} {folder}`"
        ) from None
    return str(url)


def _client(why: str) -> Any:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{why} needs the package huggingface_hub: pip install 'sparse-tx[hub]'")
    import huggingface_hub

    return huggingface_hub


def _errors() -> tuple[type[Exception], ...]:
    """What the client raises for a name, an account or a network that is not there."""
    from httpx import HTTPError
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    return HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, HTTPError, OSError


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
