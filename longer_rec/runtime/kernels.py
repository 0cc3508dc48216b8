"""By which environment variables the libraries choose their kernels. Imports none of them: they read these first."""

import os
import sys
from typing import Final

from longer_rec.errors import ConfigError

# By which MKL, oneDNN and FBGEMM are told to work as on another processor.
KERNEL_SETTINGS: Final = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
                          "FBGEMM_ENABLE_INSTRUCTIONS", "FBGEMM_NO_ASMJIT")
# With these the same kernels run on every processor that has AVX2 and FMA: level D2 of elastic training.
PORTABLE_KERNELS: Final = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2",
                           "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}


def choose_portable_kernels() -> None:
    """For what is imported from here on. ``ConfigError`` where that is too late, or the environment says otherwise."""
    wrong = {name: value for name, value in PORTABLE_KERNELS.items() if os.environ.get(name) != value}
    if wrong and ("torch" in sys.modules or any(name in os.environ for name in wrong)):
        raise wrong_kernels()
    os.environ.update(wrong)


def wrong_kernels() -> ConfigError:
    line = " ".join(f"{name}={value}" for name, value in PORTABLE_KERNELS.items())
    return ConfigError(f"elastic.level=D2 needs other kernels than the environment has chosen; start with `{line} …`")
