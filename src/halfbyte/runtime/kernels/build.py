"""A .cu file of this folder -> machine code for one GPU, by NVRTC (it comes with torch), kept on disk.

A compilation takes about a second, so its result is kept in the user's cache folder under a name that is the hash of all
it depends on: source, options, architecture, NVRTC's version. Machine code is for one architecture exactly, so the driver
compiles nothing and its version does not matter.

The catch: a cache file is code that will run. It begins with the hash of the rest, so a file cut short is compiled anew, and it
lies in a folder that only the user can write to.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError

MACHINE = "machine.cuh"
OPTIONS = ("--std=c++17",)


class NoCompiler(HalfbyteError):
    """NVRTC is not there, or refuses."""


def source_of(name: str, machine: str | None = None) -> str:
    """The text of NAME.cu with the headers of this folder put in place; `machine` stands for machine.cuh if given."""
    folder = Path(__file__).parent

    def header(include: re.Match[str]) -> str:
        if include[1] == MACHINE and machine is not None:
            return machine
        return (folder / include[1]).read_text(encoding="utf-8")

    return re.sub(r'^#include "(\w+\.cuh)"$', header, (folder / f"{name}.cu").read_text(encoding="utf-8"), flags=re.M)


def cache_folder() -> Path:
    """Where compiled kernels lie: $HALFBYTE_CACHE, else $XDG_CACHE_HOME/halfbyte, else ~/.cache/halfbyte."""
    if chosen := os.environ.get("HALFBYTE_CACHE"):
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte" / "kernels"


def cubin(name: str, arch: str, defines: tuple[str, ...] = (), folder: Path | None = None) -> bytes:
    """Machine code of NAME.cu for `arch` (sm_90a, ...), from the cache or compiled now.

    defines  options such as -DWARPS=16
    folder   the cache; `cache_folder()` if None
    raises   NoCompiler
    """
    nvrtc = _nvrtc()
    options = (f"--gpu-architecture={arch}", *OPTIONS, *defines)
    source = source_of(name)
    version = ".".join(str(number) for number in _checked(nvrtc.nvrtcVersion(), nvrtc))
    key = hashlib.sha256("\0".join((source, version, *options)).encode()).hexdigest()
    folder = folder or cache_folder()
    file = folder / f"{name}-{arch}-{key[:32]}.cubin"
    kept = read_kept(file)
    if kept is None:
        kept = compile_source(name, source, options)
        write_kept(file, kept)
    return kept


def compile_source(name: str, source: str, options: tuple[str, ...]) -> bytes:
    """Source -> machine code. raises NoCompiler with NVRTC's own words"""
    nvrtc = _nvrtc()
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []), nvrtc)
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), nvrtc)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NoCompiler(f"{name}.cu does not compile: {log.decode(errors='replace').strip()[:2000]}")
    code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), nvrtc)
    _checked(nvrtc.nvrtcGetCUBIN(program, code), nvrtc)
    nvrtc.nvrtcDestroyProgram(program)
    return code


def read_kept(file: Path) -> bytes | None:
    """A cached kernel, or None if it is not there or not whole."""
    try:
        digest, _, code = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    return code if code and hashlib.sha256(code).hexdigest().encode() == digest else None


def write_kept(file: Path, code: bytes) -> None:
    """Write all or nothing; a cache that cannot be written is no error."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(handle, "wb") as out:
            out.write(hashlib.sha256(code).hexdigest().encode() + b"\n" + code)
        os.replace(name, file)
    except OSError:
        return


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise NoCompiler(
            f"NVRTC cannot be loaded ({error})", where="cuda.bindings", todo="install a torch for CUDA 13"
        ) from None
    return nvrtc


def _checked(answer: tuple[Any, ...], nvrtc: Any) -> Any:
    """What a call returned beside its status: nothing, one value, or a tuple."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise NoCompiler(f"NVRTC says {status}")
    return values[0] if len(values) == 1 else tuple(values)
