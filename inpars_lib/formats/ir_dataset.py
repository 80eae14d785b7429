"""Data sets of the package ir_datasets: collections, topics and qrels named `ir_datasets:NAME`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from inpars_lib.cli import InputError, shorten


def ir_dataset(path: str, part: str) -> Any:
    """Return the data set of `ir_datasets:NAME`, which is downloaded when its records are read.

    Raises:
        InputError: The package is not installed, does not know the data set, or the data set lacks this part.
    """
    try:
        import ir_datasets
    except ImportError:
        raise InputError(f"{path}: the package ir_datasets is not installed. Run pip install ir_datasets.") from None
    listed = "The names are listed at https://ir-datasets.com."
    try:
        dataset = ir_datasets.load(path.removeprefix("ir_datasets:"))
    except KeyError:
        raise InputError(f"{path}: ir_datasets knows no data set of this name. {listed}") from None
    if not getattr(dataset, f"has_{part}")():
        raise InputError(f"{path}: this data set has no {part}. Choose one that has. {listed}")
    return dataset


@contextmanager
def download_errors(path: str) -> Iterator[None]:
    """Turn errors of a download by ir_datasets into `InputError`."""
    try:
        yield
    except Exception as error:  # ir_datasets raises RuntimeError, OSError and requests' errors
        raise InputError(f"{path}: cannot be downloaded ({shorten(error)}). Check the network and try again.") from None
