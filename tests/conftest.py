"""One thread everywhere: the number of threads changes the last bits of sums, and the laws compare bits."""

import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported anywhere

LONG = ("drills", "end_to_end")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of minutes go first, so that the files that are handed out last are short ones."""
    items.sort(key=lambda item: item.path.parent.name not in LONG)
