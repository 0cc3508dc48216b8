"""What libraries may say: their errors, and nothing that every run would repeat on every rank."""

import logging
import warnings


def quiet_libraries() -> None:
    """Silence advice that TorchRec and torch give to their own maintainers; errors still come through."""
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torch", "torchrec", "fbgemm_gpu"):
        warnings.filterwarnings("ignore", module=module)
    # Raised where our code touches a sharded table: TorchRec's state is made of them.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
