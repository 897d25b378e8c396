"""Archives of models, whole or with something else in them: for the tests of reading files."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from typing import Any

from sb3_ppo_from_scratch import ScratchPPO
from sb3_ppo_from_scratch.safe_files.archive import read_archive

Files = dict[str, bytes]


def files_of_a_model(**arguments: Any) -> Files:
    """The files in the archive of a model that has been trained."""
    stream = io.BytesIO()
    ScratchPPO("MlpPolicy", "CartPole-v1", seed=1, **arguments).learn(16).save(stream)
    return read_archive(stream)


def archive(files: Files, **more: bytes) -> io.BytesIO:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in {**files, **more}.items():
            target.writestr(name, content)
    return stream


def with_fields(files: Files, **fields: Any) -> io.BytesIO:
    """The model with some of its fields replaced; bytes are taken for a pickle."""
    data = json.loads(files["data"])
    for name, value in fields.items():
        data[name] = {":serialized:": base64.b64encode(value).decode()} if isinstance(value, bytes) else value
    return archive(files, data=json.dumps(data).encode())
