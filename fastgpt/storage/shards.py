"""A folder of torch.distributed.checkpoint; info.pt in it: what is no tensor, and checksums.

PyTorch reads a folder's .metadata as a pickle, which could run anything. So the files are compared
with the checksums in info.pt, and the pickle is read by names that are allowed, before PyTorch is
let near. What is stored are tensors, and only tensors are read.
"""

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.storage.manifest import file_sha256

INFO = "info.pt"
_METADATA = (
    *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
    *("TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
)
_ALLOWED = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
    *(("torch.distributed.checkpoint.filesystem", n) for n in ("_StorageInfo", "_StoragePrefix")),
    *(("torch", "Size"), ("torch.serialization", "_get_layout")),
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        if is_dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it wants to import {module}.{name}")


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Called by all processes of the group together."""
    import torch.distributed.checkpoint as dcp  # a second to import, only when sharded

    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))


def checksums(folder: Path) -> dict[str, str]:
    return {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.name != INFO}


def check(folder: Path, expected: Mapping[str, Any]) -> None:
    """ValueError unless the files are those that were written, and hold tensors only."""
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise ValueError(f"{folder} is damaged: {name} is missing")
        if file_sha256(path) != digest:
            raise ValueError(f"{path} is damaged: its content does not match its checksum")
    if extra := sorted({p.name for p in folder.iterdir()} - set(expected) - {INFO}):
        raise ValueError(f"{folder} holds {extra[0]!r}, which was not written with it")
    sizes(folder)


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name -> shape and dtype of every tensor in it."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        items = dict(metadata.state_dict_metadata)
        return {name: (item.size, item.properties.dtype) for name, item in items.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{path} is no list of tensors: {error}") from None


def read(tensors: dict[str, Tensor], folder: Path, alone: bool) -> None:
    """Fill `tensors`, or parts of them, in place; `alone` without a group of processes."""
    import torch.distributed.checkpoint as dcp

    stored_sizes = sizes(folder)
    for name, t in tensors.items():
        if name not in stored_sizes or stored_sizes[name][0] != t.shape:
            shape = tuple(stored_sizes[name][0]) if name in stored_sizes else "missing"
            raise ValueError(f"{folder}: {name} is {shape}, the model's is {tuple(t.shape)}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)
