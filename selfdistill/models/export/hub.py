"""Uploads an export to the Hugging Face hub."""

import json
from pathlib import Path

from selfdistill.models.export import ExportError
from selfdistill.models.export.verify import VERIFICATION


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload an export; returns its address.

    The token is the one that `hf auth login` has stored, or HF_TOKEN; it is never written anywhere. What an
    interrupted upload has brought there is not sent again. Files of an earlier export that this one lacks are removed.

    Args:
        repository: OWNER/NAME; made where it is not there, an existing one keeps its visibility.

    Raises:
        ExportError: the export is not verified, or the hub refuses it.
    """
    try:
        verdict = json.loads((folder / VERIFICATION).read_text())["verdict"]
    except (OSError, ValueError, KeyError):
        verdict = "missing"
    if verdict != "equal":
        raise ExportError(f"{folder} is not uploaded: its verification is {verdict!r}. Export it again first.")
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=[".*"],
            delete_patterns=["*.safetensors", "*.gguf", "*.json", "*.jinja", "Modelfile"],
            commit_message="Export with selfdistill",
        )
    # A RuntimeError is what the client makes of a large file that doesn't arrive.
    except (
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        RuntimeError,
        httpx.HTTPError,
        OSError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(
            f"the upload to {repository} failed: {reason} The export itself is whole, in {folder}. Log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write, and export again."
        ) from error
    return f"{hub.endpoint}/{repository}"
