"""The version of fxzip that runs."""

from importlib.metadata import PackageNotFoundError, version


def installed() -> str:
    """As the package's metadata say."""
    try:
        return version("fxzip")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "(not installed)"
