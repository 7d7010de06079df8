"""Publishing a folder on the Hugging Face hub: nothing is sent but by `push`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModel

from opencloc.model import loading
from opencloc.model.cloc import ClocModel
from opencloc.model.processor import ClocProcessor

NO_TOKEN = "there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may write"
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """A folder as a repository of models on the hub, in one commit.

    The repository is made where there is none, public unless --private is given, as `hf upload` does.
    """

    model: str
    """Folder of a CLOC checkpoint or of an export."""
    repo: str
    """Hub id: ORGANISATION/NAME or USER/NAME."""
    private: bool = False
    """Make a private repository.  One that is there already must be private too."""


def push(config: PushConfig) -> str:
    """The address of the repository, which then holds the files of the folder byte for byte.

    Files there that the folder lacks stay, but for weights, which would be mixed with the new ones.

    Raises ValueError, before anything is sent, where there is no token, and for a folder that does not load: weights
    missing, not finite or not in safetensors, no processor, no README.md, or the optimizer's state beside the model.
    """
    folder = Path(config.model)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", config.repo):
        raise ValueError(f"a repository on the hub is called ORGANISATION/NAME, not {config.repo!r}")
    _check_folder(folder)
    if (token := get_token()) is None:
        raise ValueError(NO_TOKEN)
    api = HfApi(token=token)
    try:
        private = api.repo_info(config.repo).private
    except RepositoryNotFoundError:
        private = None
    if config.private and private is False:
        raise ValueError(f"{config.repo} is there already and is public; --private cannot change that")
    try:
        if private is None:
            api.create_repo(config.repo, private=True if config.private else None)
        api.upload_folder(
            repo_id=config.repo,
            folder_path=folder,
            commit_message="Upload a model with opencloc",
            delete_patterns=_WEIGHTS,
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"{config.repo}: the hub does not let this token write there: {error}") from error
        raise
    return f"{api.endpoint}/{config.repo}"


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if (folder / "optimizer.safetensors").exists():
        raise ValueError(f"{folder} is a checkpoint in the middle of a run: push the run's model folder")
    if not (folder / "README.md").is_file():
        raise ValueError(f"{folder}: there is no README.md; `opencloc card` writes one")
    is_cloc = loading.load_config(folder).model_type == "cloc"
    loading.load_model(ClocModel if is_cloc else AutoModel, folder)
    if is_cloc:
        ClocProcessor.from_pretrained(folder)
    else:
        ClocProcessor.from_clip(folder)
