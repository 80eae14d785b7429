"""Paths of a command, atomic writes, locks."""

import os
from pathlib import Path

import pytest

from inpars_lib import files
from inpars_lib.cli import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Create two files, two links to the first, a dangling link and a folder with a file."""
    (tmp_path / "a").write_text("a\n")
    (tmp_path / "b").write_text("b\n")
    (tmp_path / "soft").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "new").symlink_to("created")
    (tmp_path / "index").mkdir()
    (tmp_path / "index/segments_1").write_text("s")
    return tmp_path


# ------------------------------------------------------------------------------------------------ paths of a command


@pytest.mark.parametrize(
    ("used", "output", "same"),
    [
        ("a", "a", True),
        ("a", "index/../a", True),
        ("a", "soft", True),
        ("soft", "a", True),
        ("a", "hard", True),
        ("soft", "hard", True),
        ("created", "new", True),
        ("missing", "missing", True),
        ("index", "index/segments_1", True),
        ("index", "index", True),
        ("a", "b", False),
        ("index", "a", False),
        ("a", "missing", False),
    ],
)
def test_an_output_is_no_input(folder: Path, used: str, output: str, same: bool) -> None:
    for inputs in ({"--input": str(folder / used)}, {"--run": None, "--input": ["-", str(folder / used)]}):
        if not same:
            files.check_paths(inputs, {"--plot": None, "--output": str(folder / output)})
            continue
        with pytest.raises(InputError, match=r"--output and --input \(.*\) are one file. Name another --output."):
            files.check_paths(inputs, {"--plot": None, "--output": str(folder / output)})


def test_an_output_is_no_folder_and_not_inside_another(folder: Path) -> None:
    (folder / "old").mkdir()
    with pytest.raises(InputError, match=r"new/: --plot is a file, and this is a folder. Name another --plot"):
        files.check_paths({}, {"--plot": f"{folder}/new/"})
    with pytest.raises(InputError, match=r"old: --plot is a file, and this is a folder. Name another --plot"):
        files.check_paths({}, {"--plot": str(folder / "old")})
    files.check_paths({}, {"--index": str(folder / "old")})
    inside = str(folder / "new" / "values.csv")
    with pytest.raises(InputError, match=r"values.csv: --per_query is inside --output, which is a file"):
        files.check_paths({}, {"--output": str(folder / "new"), "--per_query": inside})


def test_an_output_is_no_other_output(folder: Path) -> None:
    for name in ("a", "soft", "hard"):
        with pytest.raises(InputError, match=r"--plot and --output"):
            files.check_paths({}, {"--output": str(folder / "a"), "--plot": str(folder / name)})
    files.check_paths({}, {"--output": str(folder / "a"), "--plot": str(folder / "b")})


def test_standard_output_and_devices_are_no_files(folder: Path) -> None:
    for output in ("-", "/dev/stdout", "/dev/fd/1", "/dev/null"):
        files.check_paths({"--input": output}, {"--output": output, "--plot": output})


def test_the_name_of_an_output_is_that_of_the_data(folder: Path) -> None:
    assert files.resolve_output(str(folder / "soft")) == str(folder / "a")
    assert files.resolve_output(str(folder / "new")) == str(folder / "created")
    for name in ("a", "hard", "missing"):
        assert files.resolve_output(str(folder / name)) == str(folder / name)
    (folder / "null").symlink_to("/dev/null")
    assert files.resolve_output(str(folder / "null")) == str(folder / "null")
    for name in files.STANDARD_OUTPUT:
        assert files.resolve_output(name) == "-"


# ---------------------------------------------------------------------------------------------------- atomic writes


def test_permissions_and_links_stay(folder: Path) -> None:
    (folder / "a").chmod(0o600)
    with files.atomic_write(str(folder / "soft")) as file:
        file.write("new\n")
        assert (folder / "a").read_text() == "a\n"
    assert (folder / "soft").is_symlink()
    assert (folder / "a").read_text() == "new\n"
    assert (folder / "a").stat().st_mode & 0o777 == 0o600


def test_a_planted_link_is_not_followed(folder: Path) -> None:
    output = folder / "out"
    Path(files.unfinished_name(str(output))).symlink_to(folder / "b")
    with files.atomic_write(str(output)) as file:
        file.write("new\n")
    assert output.read_text() == "new\n"
    assert not output.is_symlink()
    assert (folder / "b").read_text() == "b\n"


def test_files_of_one_result_appear_together(folder: Path) -> None:
    first, second = (str(folder / "a"), "w"), (str(folder / "new"), "wb")
    with pytest.raises(RuntimeError), files.write_together(first, second, stale=[str(folder / "b")]) as [file, _]:
        file.write("half")
        raise RuntimeError
    assert {path.name: path.read_text() for path in folder.iterdir() if path.is_file()} == {
        "a": "a\n",
        "soft": "a\n",
        "hard": "a\n",
        "b": "b\n",
    }
    with files.write_together(first, second, stale=[str(folder / "b")]) as [text, binary]:
        text.write("text")
        binary.write(b"bytes")
    assert (folder / "a").read_text() == "text"
    assert (folder / "created").read_text() == "bytes"
    assert not (folder / "b").exists()
    assert (folder / "hard").read_text() == "a\n"


# ------------------------------------------------------------------------------------------------------------ locks


def test_a_second_process_is_refused(folder: Path) -> None:
    path = str(folder / "out")
    with files.exclusive(path):
        with pytest.raises(InputError, match="out: another process is writing to this file"), files.exclusive(path):
            raise AssertionError("the lock was given twice")
        assert os.path.exists(f"{path}.lock")
    assert not os.path.exists(f"{path}.lock")
    with files.exclusive(path), files.exclusive(f"{path}2"):
        pass


def test_a_pipe_needs_no_lock_and_standard_output_has_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with files.exclusive(str(tmp_path / "pipe")), files.exclusive(str(tmp_path / "pipe")):
        assert os.listdir(tmp_path) == ["pipe"]
    with pytest.raises(InputError, match="Name a file"), files.exclusive("-"):
        pass
