"""One self-contained HTML file about a merge: `fxzip.html.write(zipped, "report.html")`."""

from .page import page, write

__all__ = ["page", "write"]
