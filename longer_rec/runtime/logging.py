"""What is said beside the program's own output: our warnings, and of libraries their errors alone."""

import logging
import warnings


def quiet_libraries() -> None:
    """Our warnings look like our errors; advice that TorchRec and torch give to their maintainers is silenced."""
    own = logging.getLogger("longer_rec")
    own.propagate = False
    if not own.handlers:
        own.addHandler(logging.StreamHandler())
        own.handlers[0].setFormatter(logging.Formatter("longer-rec: %(message)s"))
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torch", "torchrec", "fbgemm_gpu"):
        warnings.filterwarnings("ignore", module=module)
    # Raised where our code touches a sharded table: TorchRec's state is made of them.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
