"""A C file, compiled once on this machine, for loops that PyTorch has no quick kernel for.

Optional: where there is no compiler, or another processor than the file knows, the functions
return None, and their callers take another road.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int8, UInt8
from torch import Tensor

from minilm.assets import cache_directory

__all__ = ["int4_matmul", "int8_matmul", "library"]

FLAGS = ["-O3", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math"]  # all of -ffast-math would change other code
COMPILE_SECONDS = 60
BLOCK = 32  # the loops take so many weights at once


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile minilm/native.c into the user's cache, once, and open it.

    Returns:
        None without a compiler, or if it does not manage.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    source = (files("minilm") / "native.c").read_text(encoding="utf-8")
    key = hashlib.sha256("\n".join([source, compiler, *FLAGS]).encode()).hexdigest()[:16]
    target = cache_directory() / f"native-{key}.so"
    try:
        return _open(target)
    except OSError:  # not there yet, or damaged
        pass
    try:
        _compile(compiler, source, target)
        return _open(target)
    except (OSError, subprocess.SubprocessError):
        return None


def _open(path: Path) -> ctypes.CDLL:
    opened, address, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int
    opened.int8_matmul.argtypes = [address] * 4 + [number] * 5
    opened.int4_matmul.argtypes = [address] * 5 + [number] * 5
    return opened


def _compile(compiler: str, source: str, target: Path) -> None:
    """Under another name first: two processes may do it at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    command = [compiler, *FLAGS, "-x", "c", "-", "-o", str(part)]
    try:
        subprocess.run(
            command, input=source.encode(), capture_output=True, check=True, timeout=COMPILE_SECONDS
        )
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def int8_matmul(
    x: Float[Tensor, "*batch width"],
    codes: Int8[Tensor, "rows width"],
    scale: Float[Tensor, "scales 1"],
) -> Float[Tensor, "*batch rows"] | None:
    """x @ (scale · codes).T, computed in float32; None where that cannot be done here."""
    native, (rows, width) = library(), codes.shape
    if native is None or width % BLOCK:
        return None
    wide, codes, scale = x.float().contiguous(), codes.contiguous(), scale.contiguous()
    y = torch.empty((*x.shape[:-1], rows))
    places = wide.data_ptr(), codes.data_ptr(), scale.data_ptr(), y.data_ptr()
    sizes = x.numel() // width, rows, width, scale.numel() > 1
    done = native.int8_matmul(*places, *sizes, torch.get_num_threads())
    return y.to(x.dtype) if done else None


def int4_matmul(
    x: Float[Tensor, "*batch width"],
    codes: UInt8[Tensor, "rows half"],
    scale: Float16[Tensor, "rows groups"],
    least: Float16[Tensor, "rows groups"],
) -> Float[Tensor, "*batch rows"] | None:
    """x @ (scale · codes + least).T, computed in float32; None where that cannot be done here."""
    native, width, (rows, groups) = library(), x.shape[-1], scale.shape
    if native is None or width // groups % BLOCK:
        return None
    wide, least = x.float().contiguous(), least.contiguous()
    codes, scale = codes.contiguous(), scale.contiguous()
    y = torch.empty((*x.shape[:-1], rows))
    places = codes.data_ptr(), scale.data_ptr(), least.data_ptr(), y.data_ptr()
    sizes = x.numel() // width, rows, width, groups
    done = native.int4_matmul(wide.data_ptr(), *places, *sizes, torch.get_num_threads())
    return y.to(x.dtype) if done else None
