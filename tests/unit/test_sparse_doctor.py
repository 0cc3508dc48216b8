"""The doctor's judgement, on machines that are not there."""

import pytest

from longer_rec.sparse import doctor
from longer_rec.sparse.doctor import Check, check_machine, check_versions, install_line, judge_trials, run_doctor

GOOD = {"torch": "2.13.0+cpu", "fbgemm-gpu": "1.8.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "torchrec": "1.8.0",
        "torchmetrics": "1.0.3"}


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_sets_that_were_run_are_in_order() -> None:
    for installed, cuda in ((GOOD, False), ({**GOOD, "torchrec": "1.6.1"}, False),
                            ({"torch": "2.11.0", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1", "torchmetrics": "1.0.3"},
                             True)):
        assert {check.status for check in check_versions(installed, cuda)} == {"ok"}


@pytest.mark.parametrize(("change", "cuda", "name", "status", "detail"), [
    ({"torch": "2.12.0"}, False, "torch + fbgemm", "fail", "torch 2.12 needs fbgemm 1.7"),
    ({"torch": "2.14.0"}, False, "torch + fbgemm", "warn", "known pairs"),
    ({"fbgemm-gpu": "1.8.0"}, False, "torch + fbgemm", "fail", "both installed, in the same directory"),
    ({"fbgemm-gpu-cpu": None}, False, "torch + fbgemm", "fail", "no fbgemm"),
    ({}, True, "torch + fbgemm", "fail", "one is the CUDA build"),
    ({"torchrec": None}, False, "torchrec", "fail", "not installed"),
    ({"torchrec": "2.0.0"}, False, "torchrec", "warn", "tested are"),
    ({"torchmetrics": "1.4.0"}, False, "torchmetrics", "warn", "pins 1.0.3"),
])
def test_a_wrong_set_is_found_with_a_line_to_type(change: dict[str, str | None], cuda: bool, name: str, status: str,
                                                  detail: str) -> None:
    installed = {package: version for package, version in {**GOOD, **change}.items() if version is not None}
    check = by_name(check_versions(installed, cuda))[name]
    assert check.status == status
    assert detail in check.detail
    assert "pip install" in check.remedy


def test_install_line_never_lets_pip_choose_another_build() -> None:
    cpu = install_line("2.13.0+cpu", cuda=False)
    assert "torch==2.13.0" in cpu
    assert "fbgemm-gpu-cpu==1.8.0" in cpu
    assert "--no-deps torchrec==1.8.0" in cpu
    assert install_line("2.11.0", cuda=True).startswith("pip install torch==2.11.0 fbgemm-gpu==1.6.0 torchrec==1.6.1")


def test_small_machines_are_told_what_to_do() -> None:
    small = {"cores": 1, "memory_bytes": 2 << 30, "shared_memory_bytes": 64 << 20, "open_files_limit": 256,
             "omp_num_threads": "8", "gpus": []}
    checks = check_machine(small)
    assert {check.status for check in checks} == {"warn"}
    assert by_name(checks)["open files"].remedy == "ulimit -n 65536"
    assert by_name(checks)["OMP_NUM_THREADS"].remedy == "export OMP_NUM_THREADS=1"
    large = {"cores": 8, "memory_bytes": 64 << 30, "shared_memory_bytes": 8 << 30, "open_files_limit": 65536,
             "omp_num_threads": None, "gpus": []}
    assert {check.status for check in check_machine(large)} == {"ok"}


def trial(pooled: bool, sharding_type: str, kernel: str, outcome: str) -> dict[str, object]:
    return {"pooled": pooled, "sharding_type": sharding_type, "kernel": kernel, "outcome": outcome}


def test_a_kernel_that_is_offered_must_work_and_one_that_is_not_may_crash() -> None:
    checks = by_name(judge_trials([
        trial(False, "row_wise", "fused", "crashes (SIGSEGV)"), trial(False, "row_wise", "fused_uvm", "works"),
        trial(True, "row_wise", "fused", "works"), trial(True, "row_wise", "fused_uvm", "hangs for 15 s"),
        trial(False, "data_parallel", "dense", "crashes (SIGABRT)"), trial(True, "table_wise", "fused", "works")],
        "cpu", 2))
    assert checks["sequence row_wise"].status == "fail"
    assert "fused crashes (SIGSEGV)" in checks["sequence row_wise"].detail
    assert checks["pooled row_wise"].status == "warn"
    assert checks["pooled row_wise"].remedy == "sparse.kernel=fused"
    assert checks["sequence data_parallel"].status == "ok"
    assert "not offered: dense crashes" in checks["sequence data_parallel"].detail
    assert checks["pooled table_wise"].status == "ok"


def test_broken_imports_skip_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_LOAD", "raise ImportError('libfbgemm.so: undefined symbol')")
    checks = by_name(run_doctor())
    assert checks["imports"].status == "fail"
    assert "undefined symbol" in checks["imports"].detail
    assert "pip install" in checks["imports"].remedy
    assert not any(name.startswith("sequence") for name in checks)


def test_doctor_of_this_machine_finds_nothing_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of it, kernels included."""
    monkeypatch.setenv("PYTHONPATH", ":".join(doctor.sys.path))
    checks = by_name(run_doctor())
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["sequence row_wise"].detail.startswith("fused, fused_uvm, fused_uvm_caching on")
    assert checks["pooled data_parallel"].status == "ok"
    assert "GB/s" in checks["all-to-all"].detail
