"""The key that servers demand: its file, the server's configuration, and that it is on no command line."""

import stat
from pathlib import Path

import pytest
import yaml

from megatron_rlvr.engines.sglang.api_key import read_api_key, write_server_config
from megatron_rlvr.engines.sglang.launcher.process import ServerProgram
from megatron_rlvr.errors import InputError

KEY = "0123456789abcdef-._~+/="


def test_a_key_is_read_without_the_end_of_its_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY + "\n")
    assert read_api_key(tmp_path / "key", "rollout.api_key_file") == KEY


@pytest.mark.parametrize(
    "content", [b"", b"short", b"two words here", b"two\nlines-here", b"-begins-with-a-dash", b"\xff" * 20, b"a" * 5000]
)
def test_a_file_without_a_key_is_one_line_that_does_not_show_it(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match=r"rollout\.api_key_file=.*key") as error:
        read_api_key(tmp_path / "key", "rollout.api_key_file")
    assert not content or content.decode("latin-1") not in str(error.value)


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--api-key-file=.*none: does not exist"):
        read_api_key(tmp_path / "none", "--api-key-file")


def test_the_server_gets_the_key_in_a_file_that_only_its_user_can_read(tmp_path: Path) -> None:
    path = tmp_path / "servers" / "api_key.yaml"
    for _ in range(2):  # a server that was started here before has left its file
        write_server_config(path, KEY)
        path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o044)
    write_server_config(path, KEY)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert yaml.safe_load(path.read_text()) == {"api-key": KEY}
    program = ServerProgram(Path("python"), Path("model"), 30000, tmp_path / "log", config=path, flags=["--x"])
    assert program.command[-3:] == ["--config", str(path), "--x"]
    assert KEY not in " ".join([*program.command, *program.environment.values()])
