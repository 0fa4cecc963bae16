"""
The calls of NVIDIA's driver that loading and launching a kernel takes.

Its library is there wherever torch sees a GPU. A launch through it costs less than through any package on top of it.
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import NamedTuple

_INVALID_CONTEXT = 201
_MOST_SHARED_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_BOX_COLUMNS = 64
"""128 bytes, the widest that pieces of 16 bytes change places in."""
_ROW_INPUTS = 128
"""Codes that lie row by row, likewise: inputs of a box."""
_BOX_TILES = 4
"""Tiles of a weight that `cuda/warpgroup.cu` has copied together."""
_UINT8, _UINT64, _FLOAT16, _BFLOAT16 = 0, 4, 6, 9
"""CU_TENSOR_MAP_DATA_TYPE."""
_PLACES_AS_THEY_ARE, _PLACES_CHANGED = 0, 3
"""CU_TENSOR_MAP_SWIZZLE_NONE, _128B."""
_ONE_LINE, _TWO_LINES = 2, 3
"""
CU_TENSOR_MAP_L2_PROMOTION_L2_128B, _256B: what memory is asked for at once. Of rows that boxes take 128 bytes of, the
next are wanted soon; reading experts for few rows took 2 to 4 % less time on an H100.
"""
_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
_OVERLAP = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


class DriverError(RuntimeError):
    """A call of the driver failed."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("kind", ctypes.c_int), ("gap", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


_Parameters = ctypes.c_char_p * 1
_ALLOW_OVERLAP = (_Attribute * 1)(_Attribute(kind=_OVERLAP, value=1))


class Function(NamedTuple):
    """A kernel of a loaded module; the module stays loaded until the process ends."""

    handle: int
    device: int


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.cuModuleGetFunction.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p]
    library.cuCtxSetCurrent.argtypes = [ctypes.c_void_p]
    return library


def load(code: bytes, name: str, shared_bytes: int, device: int) -> Function:
    """
    Load machine code onto a device and return its kernel of that name.

    Args:
        code: what the compiler made.
        name: of the kernel.
        shared_bytes: the most shared memory that a launch will ask for.
        device: its index, whose context torch has made.
    """
    library, module, function = _library(), ctypes.c_void_p(), ctypes.c_void_p()
    _use_context(device)
    _check(library.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    _check(library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    _check(library.cuFuncSetAttribute(function, _MOST_SHARED_MEMORY, shared_bytes), "cuFuncSetAttribute")
    return Function(function.value or 0, device)


class Launch:
    """
    One way of launching a kernel: its grid and block, on one stream. Immutable, so that threads share it.

    Args:
        function: the kernel.
        grid: blocks in x, y and z.
        threads: per block.
        shared_bytes: of shared memory per block.
        stream: as the driver knows it.
        overlap: whether the kernel may start before the one ahead of it in the stream has finished; it then waits for
            that one itself.
    """

    __slots__ = ("_config", "_device", "_handle", "_launch")

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        *,
        overlap: bool,
    ) -> None:
        config = _Config((ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared_bytes, stream, None, 0)
        if overlap:
            config.attributes = ctypes.cast(_ALLOW_OVERLAP, ctypes.POINTER(_Attribute))
            config.attribute_count = 1
        # As the driver takes them, so that a call converts nothing; a reference keeps what it refers to.
        self._launch = _library().cuLaunchKernelEx
        self._config = ctypes.byref(config)
        self._handle = ctypes.c_void_p(function.handle)
        self._device = function.device

    def __call__(self, arguments: bytes) -> None:
        """Launch with the one argument that every kernel here takes: a structure, packed."""
        error = self._launch(self._config, self._handle, _Parameters(arguments), None)
        if error == _INVALID_CONTEXT:
            # A thread that has not used the device yet; torch makes its context current only when it calls the runtime.
            _use_context(self._device)
            error = self._launch(self._config, self._handle, _Parameters(arguments), None)
        if error:
            _check(error, "cuLaunchKernelEx")


@lru_cache(maxsize=4096)
def matrix_map(address: int, rows: int, columns: int, stride: int, box_rows: int, *, half: bool) -> bytes:
    """
    Return the tensor map of a matrix of 16-bit numbers, for boxes of some rows and 64 columns.

    Args:
        address: of the matrix, a multiple of 16.
        rows: of the matrix.
        columns: of the matrix; what a box reaches beyond either is read as zeros.
        stride: bytes from one row to the next, a multiple of 16.
        box_rows: at most 256.
        half: whether the numbers are float16; else they are bfloat16.
    """
    kind, sizes = _FLOAT16 if half else _BFLOAT16, (columns, rows)
    return _map(address, kind, sizes, stride, (_BOX_COLUMNS, box_rows), _PLACES_CHANGED)


@lru_cache(maxsize=4096)
def rows_map(address: int, rows: int, width: int, box_rows: int = 64) -> bytes:
    """
    Return the tensor map of codes that lie row by row, for boxes of some rows and 128 inputs.

    Args:
        address: of the codes, a multiple of 16.
        rows: of them.
        width: bytes of a row, a multiple of 16.
        box_rows: at most 256.
    """
    box = (_ROW_INPUTS, box_rows)
    return _map(address, _UINT8, (width, rows), width, box, _PLACES_CHANGED, lines=_TWO_LINES)


@lru_cache(maxsize=4096)
def weight_maps(
    codes: int, scales: int, zeros: int, tiles: int, held: tuple[int, int, int], boxes: tuple[int, int, int]
) -> bytes:
    """
    Return the tensor maps of a weight's codes, scales and zero points, for boxes of four tiles.

    Args:
        codes: address of the codes of the first tile, a multiple of 16.
        scales: the same of its scales.
        zeros: the same of its zero points.
        tiles: their number.
        held: bytes of each of the three that a tile has, one tile after the other; multiples of 16.
        boxes: those of them in a box, multiples of 16 up to 2048; 0 for no map, but as many zeros.
    """
    maps = [
        _map(address, _UINT64, (size // 8, tiles), size, (box // 8, _BOX_TILES), _PLACES_AS_THEY_ARE)
        if box
        else bytes(_MAP_BYTES)
        for address, size, box in zip((codes, scales, zeros), held, boxes, strict=True)
    ]
    return b"".join(maps)


def _map(
    address: int,
    kind: int,
    sizes: tuple[int, int],
    stride: int,
    box: tuple[int, int],
    places: int,
    *,
    lines: int = _ONE_LINE,
) -> bytes:
    memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
    place = -ctypes.addressof(memory) % _MAP_ALIGNMENT
    error = _library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(memory) + place),
        ctypes.c_int(kind),
        ctypes.c_uint(2),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(*sizes),
        (ctypes.c_uint64 * 1)(stride),
        (ctypes.c_uint32 * 2)(*box),
        (ctypes.c_uint32 * 2)(1, 1),
        ctypes.c_int(0),  # CU_TENSOR_MAP_INTERLEAVE_NONE
        ctypes.c_int(places),
        ctypes.c_int(lines),
        ctypes.c_int(0),  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE: zeros
    )
    _check(error, "cuTensorMapEncodeTiled")
    return memory.raw[place : place + _MAP_BYTES]


def _use_context(device: int) -> None:
    library, context = _library(), ctypes.c_void_p()
    _check(library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(library.cuCtxSetCurrent(context), "cuCtxSetCurrent")


def _check(error: int, what: str) -> None:
    if error:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(error, ctypes.byref(text))
        raise DriverError(f"{what}: {(text.value or b'unknown error').decode()} ({error})")
