from collections.abc import Iterator

import pytest

from tests.teachers.server.served import OPEN


@pytest.fixture(autouse=True)
def _close_teachers() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()
