"""Object stores for tests, one server each."""

from collections.abc import Iterator

import pytest
from object_servers import CREDENTIALS, Server, gcs_server, s3_server


@pytest.fixture(scope="session", autouse=True)
def credentials() -> Iterator[None]:
    """Where the SDK looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def s3(credentials: None) -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def gcs() -> Iterator[Server]:
    with gcs_server() as running:
        yield running
