"""Is a checkpoint intact? Compare every file, header and tensor with its checksum, and every layer with its description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from septet.checkpoint.description import check_layer, checksums_of, layers_of, quantization_of
from septet.checkpoint.directory import CONFIG_NAME, ModelDirectory, open_directory, read_json
from septet.checkpoint.integrity import HASHES_NAME, crc32_of_tensor, sha256_of_file
from septet.errors import CheckpointError, SeptetError

__all__ = ["VerifyReport", "verify"]


@dataclass
class VerifyReport:
    """What was checked, and everything that is wrong.

    Args:
        files: how many files were hashed.
        tensors: how many tensors had their CRC computed.
        layers: how many layers were compared with their description.
        problems: one error each; empty when the checkpoint is intact.
    """

    files: int = 0
    tensors: int = 0
    layers: int = 0
    problems: list[SeptetError] = field(default_factory=list)

    def run(self, check: Callable[[], object]) -> object:
        """Call a check and keep the error it raises; its result, or None."""
        try:
            return check()
        except SeptetError as error:
            self.problems.append(error)
            return None

    def add(self, requirement: str, got: object, hint: str) -> None:
        """Note a problem."""
        self.problems.append(CheckpointError(requirement, got, hint))


def verify(path: Path, progress: Callable[[str], None] = lambda name: None) -> VerifyReport:
    """Check everything that can be checked without running the model.

    Args:
        path: a septet checkpoint.
        progress: called with the name of each file and tensor before it is read.

    Returns:
        The report.

    Raises:
        CheckpointError: config.json cannot be read.
        SpecVersionError: the checkpoint follows another version of the format.
        UnsupportedModelError: septet has not quantized it.
    """
    quantization = quantization_of(read_json(path / CONFIG_NAME), str(path))
    report = VerifyReport()
    report.run(lambda: _check_files(path, report, progress))
    directory = report.run(lambda: open_directory(path))
    if directory is not None:
        report.run(lambda: _check_headers(directory))
        for name, entry in (report.run(lambda: layers_of(quantization)) or {}).items():
            report.run(lambda name=name, entry=entry: check_layer(directory, name, entry))
            report.layers += 1
        report.run(lambda: _check_tensors(directory, checksums_of(quantization), report, progress))
    return report


def _check_files(path: Path, report: VerifyReport, progress: Callable[[str], None]) -> None:
    """Compare every file with the hash in septet.json."""
    files = read_json(path / HASHES_NAME).get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{HASHES_NAME} must list files", type(files).__name__, "fetch the checkpoint again")
    for name, expected in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
            report.add(f"{HASHES_NAME} must list files of the checkpoint", repr(name), "do not trust this checkpoint")
            continue
        progress(name)
        found = report.run(lambda name=name: sha256_of_file(path / name))
        report.files += 1
        if found is not None and found != expected:
            report.add(f"{name} must have the SHA-256 {str(expected)[:12]}... of {HASHES_NAME}", f"{found[:12]}...", "fetch it again")


def _check_headers(directory: ModelDirectory) -> None:
    """Compare the hash of every header with septet.json."""
    expected = read_json(directory.path / HASHES_NAME).get("headers")
    found = {name: file.header_sha256 for name, file in directory.files.items()}
    if expected != found:
        wrong = sorted(name for name in found if not isinstance(expected, dict) or expected.get(name) != found[name])
        raise CheckpointError(
            f"headers must be those of {HASHES_NAME}", f"other ones in {', '.join(wrong) or 'missing shards'}", "fetch them again"
        )


def _check_tensors(directory: ModelDirectory, expected: dict[str, str], report: VerifyReport, progress: Callable[[str], None]) -> None:
    """Compare every tensor with its CRC; both lists must have the same keys."""
    for key in sorted(expected.keys() | directory.owners.keys()):
        if key not in directory.owners:
            report.add(f"the checkpoint must hold {key}", "no such tensor", "fetch the checkpoint again")
        elif key not in expected:
            report.add(f"config.json must list a crc32 of {key}", "none", "fetch config.json again")
        else:
            progress(key)
            found = report.run(lambda key=key: crc32_of_tensor(directory.file_of(key), key))
            report.tensors += 1
            if found not in (None, expected[key]):
                report.add(f"{key} must have the CRC {expected[key]} of config.json", found, f"fetch {directory.owners[key]} again")
