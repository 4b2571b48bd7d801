"""The weights of blocks in one file: a record for each block, checked by hashes.

    page 0...    magic, length and hash of the header, header: the records as JSON
    then         the records, each from a page on: tensors one after the other, 64-byte aligned

The file is written under another name and renamed when it is whole, and its own name has a hash of
what it holds. So a file that is there already under that name is taken as it is.
"""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from graphopt.errors import GraphoptError

PAGE = 4096
_ALIGNED = 64  # as torch's allocator does: kernels may round otherwise on other addresses
_MAGIC = b"graphopt layers 1\n"
_DIGEST = 16  # bytes of a hash


@dataclass(frozen=True)
class Part:
    """One tensor of a record: `dtype` as in "torch.float32", sizes in elements, `offset` in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, record: Tensor) -> Tensor:
        """The tensor in the bytes of a record, uint8[nbytes]; a view."""
        dtype = getattr(torch, self.dtype.removeprefix("torch."))
        count = 1
        for size in self.shape:
            count *= size
        flat = record[self.offset : self.offset + count * dtype.itemsize].view(dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Record:
    """The tensors of one block; `nbytes` is a multiple of the page, `digest` the hash of all bytes."""

    parts: tuple[Part, ...]
    nbytes: int
    digest: str = ""


def record_of(tensors: Mapping[str, Tensor]) -> Record:
    """How the tensors of a block are laid out; strides stay those of tensors without gaps."""
    parts, offset = [], 0
    for name, tensor in tensors.items():
        stride = torch.empty_like(tensor, device="meta").stride()  # which has no gaps
        parts.append(Part(name, str(tensor.dtype), tuple(tensor.shape), tuple(stride), offset))
        offset += _up(tensor.numel() * tensor.element_size(), _ALIGNED)
    return Record(tuple(parts), max(PAGE, _up(offset, PAGE)))


def pack(tensors: Mapping[str, Tensor], record: Record, into: Tensor) -> None:
    """Copies the tensors of a block into the bytes of its record, uint8[nbytes]."""
    into[: record.nbytes].zero_()
    for part in record.parts:
        part.of(into).copy_(tensors[part.name])


def digest_of(record: Tensor) -> str:
    """The hash of the bytes of a record, uint8[nbytes]."""
    return hashlib.blake2b(record.numpy().data, digest_size=_DIGEST).hexdigest()


class LayerFile:
    """An open file of records; reads are for one thread at a time."""

    def __init__(self, path: Path, is_temporary: bool) -> None:
        self.path, self.is_temporary = path, is_temporary
        try:
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115 # closed by close()
            self.records, self._starts = _read_header(self._file, path)
        except OSError as error:
            raise GraphoptError(f"the layers cannot be read: {error}") from error

    def read(self, index: int, begin: int, into: memoryview) -> None:
        """Bytes of record `index` from byte `begin` on, as many as `into` has."""
        self._file.seek(self._starts[index] + begin)
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                raise GraphoptError(f"{self.path} ends within layer {index}: it was cut")
            done += count

    def check(self, index: int, record: Tensor) -> None:
        """GraphoptError unless these bytes are those that were written."""
        if digest_of(record) != self.records[index].digest:
            raise GraphoptError(
                f"{self.path}: record {index} is not what was written; delete the file and apply the "
                "pass again"
            )

    def forget(self) -> None:
        """Let the system drop what it keeps of the file in memory, where it can be told so."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Closes it, and removes one that is temporary, with its folder."""
        self._file.close()
        if self.is_temporary:
            with contextlib.suppress(OSError):
                self.path.unlink()
                self.path.parent.rmdir()


def write_layers(folder: Path, blocks: Sequence[Mapping[str, Tensor]], is_temporary: bool) -> LayerFile:
    """The file with the tensors of `blocks` in `folder`; GraphoptError where it cannot be written.

    Holds the bytes of one block beside them. All of them are read once to name the file, and again to
    write it where it is not there.
    """
    layouts = [record_of(tensors) for tensors in blocks]
    buffer = torch.empty(max(layout.nbytes for layout in layouts), dtype=torch.uint8)
    records = []
    for tensors, layout in zip(blocks, layouts, strict=True):
        pack(tensors, layout, buffer)
        digest = digest_of(buffer[: layout.nbytes])
        records.append(Record(layout.parts, layout.nbytes, digest))
    header = _header(records)
    name = hashlib.blake2b(header, digest_size=8).hexdigest()
    path = folder / f"{name}.layers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_whole(path, header, records):
            _write(path, header, blocks, records, buffer)
    except OSError as error:
        raise GraphoptError(f"the layers cannot be written to {folder}: {error}") from error
    return LayerFile(path, is_temporary)


def _write(
    path: Path,
    header: bytes,
    blocks: Sequence[Mapping[str, Tensor]],
    records: Sequence[Record],
    buffer: Tensor,
) -> None:
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with open(own, "wb") as file:
            file.write(header)
            for tensors, record in zip(blocks, records, strict=True):
                pack(tensors, record, buffer)
                file.write(buffer[: record.nbytes].numpy().data)
            file.flush()
            os.fsync(file.fileno())
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _header(records: Sequence[Record]) -> bytes:
    text = json.dumps([asdict(record) for record in records]).encode()
    digest = hashlib.blake2b(text, digest_size=_DIGEST).digest()
    found = _MAGIC + len(text).to_bytes(8, "little") + digest + text
    return found.ljust(_up(len(found), PAGE), b"\0")


def _is_whole(path: Path, header: bytes, records: Sequence[Record]) -> bool:
    if not path.is_file() or path.stat().st_size != len(header) + sum(r.nbytes for r in records):
        return False
    with open(path, "rb") as file:
        return file.read(len(header)) == header


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[Record, ...], tuple[int, ...]]:
    """The records and where each begins."""
    fixed = file.read(len(_MAGIC) + 8 + _DIGEST)
    length = int.from_bytes(fixed[len(_MAGIC) : len(_MAGIC) + 8], "little")
    text = file.read(length) if fixed.startswith(_MAGIC) else b""
    if len(text) != length or hashlib.blake2b(text, digest_size=_DIGEST).digest() != fixed[-_DIGEST:]:
        raise GraphoptError(f"{path} is no file of layers, or its header is damaged")
    records = tuple(
        Record(tuple(_part(p) for p in r["parts"]), r["nbytes"], r["digest"]) for r in json.loads(text)
    )
    starts, begin = [], _up(len(fixed) + length, PAGE)
    for record in records:
        starts.append(begin)
        begin += record.nbytes
    if (size := os.fstat(file.fileno()).st_size) != begin:
        raise GraphoptError(f"{path} has {size} bytes; its header says {begin}")
    return records, tuple(starts)


def _part(data: dict[str, object]) -> Part:
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in data.items()}
    return Part(**fields)  # type: ignore[arg-type]


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
