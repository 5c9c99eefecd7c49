"""The ranks of this folder's tests: started once, with the first test that needs them."""

from collections.abc import Iterator

import pytest
from launcher import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.stop()
