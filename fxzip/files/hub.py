"""Merged networks to and from the Hugging Face hub, or a folder that stands for it (the extra `hub`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError
from .plan import CARD, PLAN, PROGRAM, TENSORS, read_plan
from .save import Files, sha256_of

RECIPE = "recipe.yaml"
FILES = (TENSORS, CARD, RECIPE, PROGRAM, PLAN)  # nothing else is sent or fetched; the plan last, as in save


def push(dir: str | os.PathLike[str], repository: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload the files of `fxzip.save` in `dir`; -> where they are. Makes the repository if there is none.

    repository: "user/name" on the hub; or a path that starts with "/", "./" or "../", or an existing folder: a local
    folder. Raises InputError when the files are not whole, or without huggingface_hub.
    """
    folder = _whole(Path(dir))
    names = [n for n in FILES if (folder / n).is_file()]
    if _is_local(repository):
        _copy(folder, Path(repository), names)
        return repository
    hub = _hub()
    api = hub.HfApi(token=token)
    url = api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repository, folder_path=str(folder), allow_patterns=names, commit_message="Merged with fxzip"
    )
    return str(url)


def pull(
    repository: str, dir: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """Fetch a merged network into the folder `dir`, which `fxzip.load` then reads; -> that folder.

    repository: as for `push`. The files are checked before any of `dir` is replaced; other files of the repository
    are not fetched. Raises InputError when they are not whole, or without huggingface_hub.
    """
    if _is_local(repository):
        folder = _whole(Path(repository))
        return _copy(folder, Path(dir), [n for n in FILES if (folder / n).is_file()])
    hub = _hub()
    with tempfile.TemporaryDirectory() as scratch:
        hub.snapshot_download(
            repository, revision=revision, token=token, allow_patterns=list(FILES), local_dir=scratch
        )
        folder = _whole(Path(scratch))
        return _copy(folder, Path(dir), [n for n in FILES if (folder / n).is_file()])


def _whole(folder: Path) -> Path:
    """The folder, if its tensors are those of its plan, and its files no links out of it."""
    for name in FILES:
        if (folder / name).is_symlink():
            raise InputError(f"{str(folder / name)!r} is a link; a merged network's files are plain files")
    plan = read_plan(folder / PLAN)
    path = folder / TENSORS
    if not path.is_file() or sha256_of(path) != plan.sha256:
        raise InputError(f"{str(path)!r} is not the file that {PLAN} was written with: damaged, or of another save")
    return folder


def _copy(source: Path, target: Path, names: list[str]) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    with Files(target) as files:
        for name in names:
            files.write(name, lambda path, name=name: Path(shutil.copyfile(source / name, path)) and None)
        files.publish()
    return target


def _is_local(repository: str) -> bool:
    return repository.startswith(("/", "./", "../", "~")) or Path(repository).is_dir()


def _hub() -> Any:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError('the hub needs huggingface_hub: pip install "fxzip[hub]"') from error
    return huggingface_hub
