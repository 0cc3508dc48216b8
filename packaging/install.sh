#!/usr/bin/env bash
# usage: packaging/install.sh VENV cpu|gpu TORCHREC EXTRAS STAMP
#
# Makes the virtual environment VENV with one of the version sets beside this file, and writes STAMP when all of it
# succeeded. One pip command under one constraints file: pip has no occasion to choose another torch.
# PYTHON names the interpreter to use; pip's own PIP_* variables (index, cache, proxy) are honoured.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1 device=$2 torchrec=$3 extras=$4 stamp=$5
fail() { echo "error: $*" >&2; exit 2; }

default_torchrec=$(sed -n 's/^torchrec==//p' "packaging/constraints-$device.txt")
constraints=packaging/constraints-$device-torchrec-$torchrec.txt
[ "$torchrec" = "$default_torchrec" ] && constraints=packaging/constraints-$device.txt
if [ ! -f "$constraints" ]; then
    known=$(sed -n 's/^torchrec==//p' packaging/constraints-"$device"*.txt | tr '\n' ' ')
    fail "TORCHREC=$torchrec has no $device version set; known are: $known"
fi

runs() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; }
makes_venvs() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

find_python() {
    local python without_venv=
    for python in ${PYTHON:-python3 python3.12 python3.11 python}; do
        runs "$python" || continue
        makes_venvs "$python" && { echo "$python"; return; }
        without_venv=$python
    done
    [ -n "$without_venv" ] && fail "$without_venv has no venv module; install it (Debian, Ubuntu: python3-venv)"
    fail "no Python 3.11 or 3.12 among: ${PYTHON:-python3 python3.12 python3.11 python}; install one," \
         "or name it: make PYTHON=/path/to/python3.12"
}

# Without a stamp of this device, whatever lies there is unfinished or another set. CPU and GPU builds share package
# directories, so one is never installed over the other.
if ! compgen -G "$venv/.complete-$device*" >/dev/null || ! runs "$venv/bin/python"; then
    python=$(find_python)
    echo "Making $venv ($("$python" -V), $device set, torchrec $torchrec); this takes a minute or two, once."
    "$python" -m venv --clear "$venv"
else
    echo "Bringing $venv up to date."
fi

targets=(-e ".[$extras]")
if [ "$device" = cpu ]; then
    targets+=(./packaging/fbgemm-gpu-cpu)
fi
# --no-compile: Python compiles what it imports; compiling every file of torch is half of pip's processor time.
"$venv/bin/python" -m pip install -qq --no-compile --disable-pip-version-check --no-input -c "$constraints" "${targets[@]}"
"$venv/bin/python" -m pip check --disable-pip-version-check
touch "$stamp"
