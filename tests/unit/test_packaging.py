"""Version sets agree with each other, and the documents with what is there."""

import configparser
import re
from pathlib import Path

import pytest

from longer_rec.cli import app

ROOT = Path(__file__).parents[2]
SETS = sorted((ROOT / "packaging").glob("constraints-*.txt"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def pins(path):
    return dict(re.findall(r"(?m)^([\w-]+)==(\S+)$", path.read_text(encoding="utf-8")))


def minor(version):
    return int(version.split(".")[1])


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_fbgemm_and_torch_of_a_set_were_built_for_each_other(path):
    pinned = pins(path)
    # FBGEMM 1.6, 1.7, 1.8 load with torch 2.11, 2.12, 2.13 and no other.
    assert minor(pinned["torch"]) == minor(pinned["fbgemm-gpu"]) + 5
    assert pinned["torchmetrics"] == "1.0.3"


def test_the_default_set_and_the_older_one_exist_for_cpu_and_gpu():
    default = re.search(r"(?m)^TORCHREC \?= (\S+)$", MAKEFILE)[1]
    torchrec = {path.stem: pins(path)["torchrec"] for path in SETS}
    assert torchrec == {f"constraints-{device}{suffix}": version for device in ("cpu", "gpu")
                        for suffix, version in (("", default), ("-torchrec-1.6.1", "1.6.1"))}


def test_the_stand_in_is_what_the_cpu_sets_ask_for():
    stand_in = configparser.ConfigParser()
    stand_in.read(ROOT / "packaging" / "fbgemm-gpu-cpu" / "setup.cfg")
    for path in SETS:
        if "-cpu" in path.stem:
            pinned = pins(path)
            assert stand_in["metadata"]["version"] == pinned["fbgemm-gpu"]
            assert stand_in["options"]["install_requires"].strip() == f"fbgemm-gpu-cpu=={pinned['fbgemm-gpu-cpu']}"


def test_the_readme_tells_the_versions_of_the_sets():
    rows = re.findall(r"(?m)^\| (CPU|GPU)\b.*?\| (\S+) \| \S+ (\S+) \| (\S+) \|$", README)
    assert len(rows) == len(SETS)
    told = {(device.lower(), torchrec): (torch, fbgemm) for device, torch, fbgemm, torchrec in rows}
    for path in SETS:
        pinned = pins(path)
        fbgemm = pinned["fbgemm-gpu"].removesuffix("+cpu")
        assert told[path.stem.split("-")[1], pinned["torchrec"]] == (pinned["torch"], fbgemm)


def test_every_command_of_the_readme_exists():
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    named = set(re.findall(r"`longer-rec (\w+)", README))
    assert named
    assert named <= commands
    targets = set(re.findall(r"(?m)^([a-z]+):", MAKEFILE))
    made = set(re.findall(r"(?m)(?:`|^)make ([a-z]+)", README))
    assert made >= {"train", "test", "venv", "doctor"}
    assert made <= targets


def test_links_inside_the_documents_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8"))
        assert links
        for link in links:
            assert (ROOT / link).exists(), f"{name} links {link}"
