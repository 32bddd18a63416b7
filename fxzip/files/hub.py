"""Merged networks to and from the Hugging Face hub, or a folder that stands for it (the extra `hub`)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from .plan import CARD, PAGE, PLAN, PROGRAM, RECIPE, TENSORS, is_merge, read_plan, strangers
from .save import Files, sha256_of

FETCHED = (TENSORS, CARD, RECIPE, PROGRAM, PLAN)  # nothing else is; the plan last, as in save
SENT = (PAGE, *FETCHED)  # the page is for readers of the repository: one of a stranger would run in your browser


def push(
    dir: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = True,
    token: str | None = None,
    force: bool = False,
) -> str:
    """Upload the files of `fxzip.save` in `dir`, and its report.html if there is one; -> where they are. Makes the
    repository if there is none; of a merge that was there before nothing is left.

    repository: "user/name" on the hub; or a path that starts with "/", "./" or "../", or an existing folder: a local
    folder. On the hub, what is replaced stays in the history; a folder has none, so that there, files of other programs
    are only replaced with `force`. Raises InputError for such files, when `dir`'s are not whole, or without
    huggingface_hub.
    """
    folder = _whole(Path(dir), SENT)
    if _is_local(repository):
        _copy(folder, Path(repository).expanduser(), SENT, force)
        return repository
    hub = _hub()
    api = hub.HfApi(token=token)
    url = api.create_repo(repository, private=private, exist_ok=True)
    names = [n for n in SENT if (folder / n).is_file()]
    api.upload_folder(
        repo_id=repository, folder_path=str(folder), allow_patterns=names,
        delete_patterns=[n for n in SENT if n not in names], commit_message="Merged with fxzip",
    )  # fmt: skip
    return str(url)


def pull(
    repository: str,
    dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
) -> Path:
    """Fetch a merged network into the folder `dir`, which `fxzip.load` then reads; -> that folder.

    repository: as for `push`. The files are checked before any of `dir` is replaced; other files of the repository
    are not fetched, nor is its report.html, which would run scripts: `fxzip report dir` makes it from plan.json. What
    `dir` holds of an earlier merge goes; files of other programs are only replaced with `force`. Raises InputError for
    such files, when the fetched are not whole, or without huggingface_hub.
    """
    if _is_local(repository):
        return _copy(_whole(Path(repository).expanduser(), FETCHED), Path(dir), FETCHED, force)
    if not force and (found := strangers(Path(dir), FETCHED)):
        raise InputError(found[0])  # before anything is fetched
    hub = _hub()
    with tempfile.TemporaryDirectory() as scratch:
        hub.snapshot_download(
            repository, revision=revision, token=token, allow_patterns=list(FETCHED), local_dir=scratch
        )
        return _copy(_whole(Path(scratch), FETCHED), Path(dir), FETCHED, force)


def _whole(folder: Path, names: Sequence[str]) -> Path:
    """The folder, if its tensors are those of its plan, and these files no links out of it."""
    for name in names:
        if (folder / name).is_symlink():
            raise InputError(f"{str(folder / name)!r} is a link; a merged network's files are plain files")
    plan = read_plan(folder / PLAN)
    path = folder / TENSORS
    if not path.is_file() or sha256_of(path) != plan.sha256:
        raise InputError(f"{str(path)!r} is not the file that {PLAN} was written with: damaged, or of another save")
    return folder


def _copy(source: Path, target: Path, names: Sequence[str], force: bool) -> Path:
    """Those of the files that `source` has; of a merge in `target` nothing is left."""
    held = [n for n in names if (source / n).is_file()]
    if not force and (found := strangers(target, held)):
        raise InputError(found[0])
    target.mkdir(parents=True, exist_ok=True)
    ours = is_merge(target)
    with Files(target) as files:
        for name in held:
            files.write(name, lambda path, name=name: Path(shutil.copyfile(source / name, path)) and None)
        for name in SENT if ours else ():
            if name not in held:
                files.drop(name)
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
