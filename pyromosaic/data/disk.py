"""Rows of a matrix in a file: neighbours are read at once, and the cells of the next minibatches are held in memory."""

import os
from typing import Any

import numpy as np
from scipy import sparse

GAP = 16  # rows that are read and dropped between two wanted ones, rather than beginning another read
SIGNATURE = b"\x89HDF\r\n\x1a\n"
ENDS = {0: (13, 24), 1: (13, 28), 2: (9, 12), 3: (9, 12)}  # places of the width of an address, and of the first address


def check_whole(path: str | os.PathLike[str]) -> None:
    """Refuse an HDF5 file that is shorter than its header says, before the HDF5 library reads what is not there.

    Files of other kinds, and files that are not there, are left to whatever reads them.

    Raises
    ------
    OSError
        If the file is cut off.

    References
    ----------
    The superblock in the HDF5 file format specification: its third address is that of the end of the file.
    """
    try:
        file = open(path, "rb")
    except OSError:
        return
    with file:
        size, start = file.seek(0, os.SEEK_END), 0
        while start < size:  # the header is at 0, or at 512 bytes times a power of 2
            file.seek(start)
            header = file.read(64)
            if header.startswith(SIGNATURE):
                end = start + 64
                if len(header) == 64 and header[8] in ENDS:
                    width, first = header[ENDS[header[8]][0]], ENDS[header[8]][1]
                    end = int.from_bytes(header[first + 2 * width : first + 3 * width], "little")
                if size < end:
                    raise OSError(f"only {size:,} of its {end:,} bytes are left")
                return
            start = max(512, 2 * start)


class Disk:
    """A matrix in an HDF5 file or a zarr store, read by rows.

    Parameters
    ----------
    source
        The `X` of a backed `anndata.AnnData` or another matrix of `anndata.io.sparse_dataset`; a dense array of h5py or
        zarr; or whatever returns rows for an increasing array of their numbers.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.shape = source, source.shape
        self.is_csr = getattr(source, "format", None) == "csr" and hasattr(source, "group")
        if self.is_csr:  # looked up once, which takes longer than to read some rows
            self.pointers = np.asarray(source.group["indptr"][...], dtype=np.int64)
            self.entries = source.group["data"], source.group["indices"]
        self.held: tuple[np.ndarray, Any] = np.empty(0, dtype=np.int64), None

    def __getitem__(self, rows: np.ndarray) -> Any:
        """Rows in the given order: a CSR matrix if the file has a sparse one, or else a NumPy array."""
        (known, block), rows = self.held, np.asarray(rows)
        if len(known) and np.array_equal(known[np.searchsorted(known, rows).clip(max=len(known) - 1)], rows):
            return block[np.searchsorted(known, rows)]
        known = _increasing(rows)
        block = self._read(known)
        return block if np.array_equal(known, rows) else block[np.searchsorted(known, rows)]

    def hold(self, rows: np.ndarray) -> None:
        """Keep these rows in memory, instead of those kept before, until others are asked for."""
        known = _increasing(rows)
        if not np.array_equal(known, self.held[0]):
            self.held = np.empty(0, dtype=np.int64), None  # free before others are read
            self.held = known, self._read(known)

    def _read(self, rows: np.ndarray) -> Any:
        """Increasing rows, each once."""
        if not (self.is_csr or hasattr(self.source, "chunks")):
            block = self.source[rows]
            return sparse.csr_matrix(block) if hasattr(self.source, "format") else np.asarray(block)
        begins = np.flatnonzero(np.diff(rows, prepend=-np.inf) > GAP)
        ends = np.append(begins, len(rows))[1:]
        spans = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in zip(begins, ends, strict=True)]
        every = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(*span) for span in spans)])
        block = self._sparse(spans, every) if self.is_csr else self._dense(spans)
        return block if len(every) == len(rows) else block[np.searchsorted(every, rows)]

    def _dense(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """All rows of some spans, each from its first to before its end."""
        return np.concatenate([np.asarray(self.source[first:end]) for first, end in spans or [(0, 0)]])

    def _sparse(self, spans: list[tuple[int, int]], every: np.ndarray) -> sparse.csr_matrix:
        """The same, given the numbers of these rows."""
        pointers = self.pointers
        pieces = [slice(int(pointers[first]), int(pointers[end])) for first, end in spans or [(0, 0)]]
        data, indices = (np.concatenate([np.asarray(entries[piece]) for piece in pieces]) for entries in self.entries)
        begins = np.append(0, np.cumsum(pointers[every + 1] - pointers[every]))
        return sparse.csr_matrix((data, indices, begins), shape=(len(every), self.shape[1]))


def _increasing(rows: np.ndarray) -> np.ndarray:
    """Rows in increasing order, each once; faster than `numpy.unique` for rows that are in order."""
    ordered = np.sort(rows)
    return ordered[np.diff(ordered, prepend=-1) > 0]
