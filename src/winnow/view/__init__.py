"""Pictures of what a method kept, curves of what that cost, and reports made from result rows.

Winnow's own.
"""

from winnow.view.curves import save
from winnow.view.overlay import draw, figure, kept, merged, picture
from winnow.view.report import Sheet, html, markdown, table

__all__ = ["Sheet", "draw", "figure", "html", "kept", "markdown", "merged", "picture", "save", "table"]
