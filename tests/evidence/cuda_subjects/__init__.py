"""The ops with kernels in CUDA C++: the file of an op holds its `SUBJECT`; a launcher without one is an error."""

from importlib import import_module

from cuda_device import SOURCES

from .subject import CudaSubject

SUBJECTS: dict[str, CudaSubject] = {
    source.stem: import_module(f"{__name__}.{source.stem}").SUBJECT for source in SOURCES
}

__all__ = ["SUBJECTS", "CudaSubject"]
