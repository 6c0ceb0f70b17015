"""Finished calls on the disk: features and counts only, never text."""

from ._database import MIGRATIONS, migrate
from ._rows import COLUMNS, Predicted, StoredCall
from ._store import Store
from ._view import StoreView

__all__ = [
    "COLUMNS",
    "MIGRATIONS",
    "Predicted",
    "Store",
    "StoreView",
    "StoredCall",
    "migrate",
]
