"""Builds the C++ kernels as one shared library on PyTorch's stable ABI: any torch from 2.10 on, any Python."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

CPU = Path("csrc/cpu")

setup(
    ext_modules=[
        CppExtension(
            "r2_kernels._C",
            sources=sorted(str(source) for source in CPU.glob("*.cpp")),
            depends=[str(header) for header in [*CPU.glob("*.h"), *Path("csrc").glob("*.h")]],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",  # Python's own flags ask for debugging information, seven times the size of the code
                "-fvisibility=hidden",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wall",
            ],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
