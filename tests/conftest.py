"""Options: --update-golden rewrites tests/golden (read the diff); --slow runs the heaviest networks too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pretend import device  # noqa: F401  (a fixture)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:index_reduce.* is in beta")
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: pass --slow to run it"))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and in it all that a user has: see workplace.py."""
    import torch
    from workplace import workplace

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    return workplace(tmp_path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder, and every case of file_nets.py: merged, saved there, loaded and run in one new process."""
    import torch
    from file_nets import saved_and_loaded

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("saved")
    return root, saved_and_loaded(root)
