"""The demo: its collection, from folders that look like installed packages, and errors of its server."""

import socket
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import error_line, ok, run, run_process

REST = "It reads every number of the array once, and it returns the first one that is larger than all others."


def test_modules_of_some_wheels_only_are_skipped(tmp_path: Path) -> None:
    """The wheels of one version differ: numpy.distutils is in that for Python 3.11 only, __config__ in each."""
    names = ["lib", "__config__", "_version", "version", "distutils/core", "tests/test_lib", "testing/tools"]
    for name in names:
        path = tmp_path / f"numpy/{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Find the largest number of {name}. {REST} {name}."""\n')
    with patch("sysconfig.get_paths", return_value={"purelib": str(tmp_path)}):
        ok(run("demo.build_collection", "--output_dir", tmp_path))
    lines = (tmp_path / "collection.tsv").read_text().splitlines()
    assert lines == [f"numpy.lib\t{REST} lib."]
    assert (tmp_path / "qrels.txt").read_text() == "q1 0 numpy.lib 1\n"


def test_a_port_that_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        said = error_line(run_process("demo/serve_llm.py", "--port", port))
    assert f"error: port {port} cannot be used (Address already in use). Use another --port" in said


@pytest.mark.parametrize(
    "flags", [["--port", 65_536], ["--port", 65_535, "--servers", 2], ["--port", -1], ["--servers", 0]]
)
def test_ports_that_do_not_exist(flags: list[object]) -> None:
    assert "must be from 1 to 65535" in error_line(run_process("demo/serve_llm.py", *flags), 2)
