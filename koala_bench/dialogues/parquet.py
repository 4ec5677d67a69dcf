"""Rows of Parquet files, which data sets on the hub come in; read with pyarrow where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from koala_bench.errors import KoalaBenchError


def parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file as Python values, columns without a value left out, with a name for each. Raises KoalaBenchError
    where pyarrow is not installed, or the file is missing or damaged."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise KoalaBenchError(
            f"{path} is a Parquet file, and pyarrow is not installed.",
            "Run `pip install pyarrow`, or give the rows as JSON lines.",
        ) from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path.name}[{number}]", {key: value for key, value in row.items() if value is not None}
                    number += 1
    except (ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise KoalaBenchError(
            f"Cannot read {path}: {reason}.", "Check --set data.source, or fetch it again."
        ) from error
