"""
A Hugging Face Hub that is a folder: Python imports this file by itself where its folder is on PYTHONPATH.

The folder ``FAKE_HUB`` holds one folder per repository, ``organization/name``. Only the calls that would use the network are
replaced; what calls them is the zoo's and huggingface_sb3's own code.
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

HUB = Path(os.environ["FAKE_HUB"])


def create_repo(api: Any, repo_id: str, **kwargs: Any) -> str:
    (HUB / repo_id).mkdir(parents=True, exist_ok=True)
    return f"fake://{repo_id}"


def snapshot_download(api: Any, repo_id: str, local_dir: Path) -> None:
    shutil.copytree(HUB / repo_id, local_dir, dirs_exist_ok=True)


def upload_folder(api: Any, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
    shutil.copytree(folder_path, HUB / repo_id, dirs_exist_ok=True)


def list_models(api: Any, author: str, **kwargs: Any) -> list[SimpleNamespace]:
    cards = {path.parent.name: huggingface_hub.ModelCard.load(path) for path in HUB.glob(f"{author}/*/README.md")}
    # a card's data as a dict: rl_zoo3 2.9 reads it as one, and skips every model where huggingface_hub gives it an object
    return [SimpleNamespace(id=f"{author}/{name}", card_data=card.data.to_dict()) for name, card in cards.items()]


def hf_hub_download(repo_id: str, filename: str, **kwargs: Any) -> str:
    path = HUB / repo_id / filename
    if not path.is_file():
        raise EntryNotFoundError(f"404: {path}")
    return str(path)


for function in (create_repo, snapshot_download, upload_folder, list_models):
    setattr(huggingface_hub.HfApi, function.__name__, function)
huggingface_hub.hf_hub_download = hf_hub_download
