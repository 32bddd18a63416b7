"""Puts the coverage table into the package, for `fxzip coverage`. Everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class Build(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file("docs/coverage.json", str(Path(self.build_lib) / "fxzip" / "coverage.json"))


setup(cmdclass={"build_py": Build})
