"""The collection of the demo, from folders that look like installed packages."""

from pathlib import Path
from unittest.mock import patch

from conftest import ok, run

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
