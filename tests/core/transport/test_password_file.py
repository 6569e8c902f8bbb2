"""A password file that holds no password is refused by name."""

from pathlib import Path

import pytest

from streamlstm.config.model import Security
from streamlstm.errors import ConfigError
from streamlstm.transport.kafka.settings import password


@pytest.mark.parametrize(("held", "said"), [(b"", "is empty"), (b"\n", "is empty"), (b"p\xe4ss", "is not UTF-8")])
def test_a_password_file_without_a_password_is_refused_by_name(tmp_path: Path, held: bytes, said: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(held)
    security = Security.model_validate({
        "protocol": "SASL_SSL",
        "sasl_mechanism": "PLAIN",
        "username": "somebody",
        "password_file": str(path),
    })  # fmt: skip
    with pytest.raises(ConfigError, match=f"password_file: {path} {said}"):
        password(security)
