"""The zip file of an archive: its records, before any is read.

Two readers of one zip file may see different things in it (a name twice, in capitals, beside the
folder, data before the first record). Refusing all of these leaves one reading.
"""

from __future__ import annotations

import re
import zipfile
from typing import IO

from ranger_nn.cli.archive.words import Forbidden

# PyTorch stores without compression. Who compressed an archive afterwards gains less than this with real weights.
_MOST_INFLATED = 20
_ALWAYS_ALLOWED = 64 << 20  # bytes that any machine has
_MOST_JSON = 512 << 20  # of one model; a network of 100,000 nodes takes some 200 MB
_NAME = r"[\w.\-]+"
_RECORDS = re.compile(
    rf"archive_format|archive_version|byteorder|\.format_version|\.storage_alignment|\.data/(version|serialization_id)"
    rf"|models/{_NAME}\.json|data/weights/(weight_\d+|{_NAME}_weights_config\.json|{_NAME}\.pt)"
    rf"|data/constants/(tensor_\d+|{_NAME}_constants_config\.json|{_NAME}\.pt)|data/sample_inputs/{_NAME}\.pt|extra/.+"
)
_LOCAL_HEADER = 30  # bytes of a record's header before its name


def check_container(file: IO[bytes]) -> set[str]:
    """Hold the directory of the zip file to its rules; give the names of its records.

    Raises:
        Forbidden: one is broken.
    """
    size = file.seek(0, 2)
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            names = _names(records)
            for record in records:
                archive.open(record).close()  # the record's own header must agree with the directory
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, UnicodeDecodeError) as error:
        raise Forbidden(f"must be a sound zip file ({error})") from error
    _check_kind(names)
    _check_places(records, size)
    for name in names:
        if not _RECORDS.fullmatch(name):
            raise Forbidden(f"must hold models, weights and constants only; it has {name[:120]!r}")
    return set(names)


def _names(records: list[zipfile.ZipInfo]) -> list[str]:
    """Names inside the one folder that all records share."""
    seen: set[str] = set()
    for record in records:
        name = record.filename
        parts = name.split("/")
        if name != record.orig_filename or not name.isprintable() or "\\" in name or ".." in parts or "" in parts:
            raise Forbidden(f"must have records with plain relative names; it has {record.orig_filename[:120]!r}")
        if name.casefold() in seen:
            raise Forbidden(
                f"must have each record once; {name[:120]!r} is there twice, small and capital letters alike"
            )
        seen.add(name.casefold())
    folders = {record.filename.partition("/")[0] for record in records}
    inside = [record.filename.partition("/")[2] for record in records]
    if "version" in folders and "serialized_exported_program.json" in folders:
        raise Forbidden("must be of PyTorch 2.8 or newer; load it with the PyTorch that wrote it and save it again")
    if len(folders) != 1 or not all(inside):
        raise Forbidden("must keep its records in one folder" if records else "must hold records; it is empty")
    return inside


def _check_kind(names: list[str]) -> None:
    """What else PyTorch keeps in zip files, named."""
    if "data.pkl" in names and any(name.startswith("code/") for name in names):
        raise Forbidden("must be of torch.export; this one is a TorchScript archive (torch.jit.save)")
    if "data.pkl" in names:
        raise Forbidden("must be of torch.export; this one is a file of torch.save, such as a state_dict")
    if any(name.startswith("data/aotinductor/") for name in names):
        raise Forbidden("must hold no compiled code (data/aotinductor)")
    if not any(name.startswith("models/") for name in names):
        raise Forbidden("must hold a model (models/model.json)")


def _check_places(records: list[zipfile.ZipInfo], size: int) -> None:
    """Records one after the other from the file's first byte on, and of sizes that make sense."""
    end = 0
    for record in sorted(records, key=lambda r: r.header_offset):
        if (record.header_offset > 0) != (end > 0) or record.header_offset < end:
            raise Forbidden("must be one zip file from its first byte on, without records that overlap")
        if record.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or record.flag_bits & 1:
            raise Forbidden(f"must be stored or deflated, not encrypted; {record.filename[:120]!r} is not")
        end = record.header_offset + _LOCAL_HEADER + record.compress_size
        if record.filename.endswith(".json") and record.file_size > _MOST_JSON:
            raise Forbidden(f"must have JSON of at most {_MOST_JSON} bytes; {record.filename[:120]!r} has more")
    inflated = sum(record.file_size for record in records)
    if inflated > max(_ALWAYS_ALLOWED, _MOST_INFLATED * size):
        raise Forbidden(f"must not unpack to {inflated} bytes from {size}")
