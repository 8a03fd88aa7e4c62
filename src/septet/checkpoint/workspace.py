"""OUT.partial: a checkpoint in the making, and the journal that makes it safe to interrupt.

    OUT.partial/journal          line 1: what is being made; then one line per finished job, written after its data is on disk
    OUT.partial/*.safetensors    full size from the start, so that a full disk shows at once; filled job by job
    OUT                          appears by one rename when everything is done and the journal is gone

Every line of the journal begins with its CRC. After a crash torn lines are dropped, and finished jobs are believed only if their bytes
still have the recorded CRC. A lock on the journal keeps two runs apart. A run that fails before it has made anything leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from septet.checkpoint.directory import read_json
from septet.checkpoint.integrity import HASHES_NAME
from septet.checkpoint.layout import Shard
from septet.errors import CheckpointError

__all__ = ["Workspace", "writing"]

_JOURNAL_NAME = "journal"
_SCRATCH_NAME = "source"
_CALIBRATION_NAME = "calibration.tmp"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a message that says what to do; what has been written stays."""
    try:
        yield
    except OSError as error:
        hint = (
            "make room and run the same command with --resume" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a writable place"
        )
        raise CheckpointError(f"{path} must be writable", error.strerror or error, hint) from error


def _sync_folder(path: Path) -> None:
    """Make renames and new names in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Workspace:
    """The folder OUT.partial, held by one process.

    Args:
        out: where the checkpoint will appear.
        identity: what is being made, JSON values; a journal with another identity is not continued.
        resume: go on with what is there.

    Raises:
        CheckpointError: OUT.partial is in the way, belongs to something else, or cannot be written.
    """

    def __init__(self, out: Path, identity: dict, resume: bool) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".partial")
        #: A folder for a converted source; it does not become part of OUT.
        self.scratch = self.path / _SCRATCH_NAME
        #: A folder for what a calibration has found out; neither does it.
        self.calibration = self.path / _CALIBRATION_NAME
        self._journal_path = self.path / _JOURNAL_NAME
        #: Job name -> its record, of jobs that have been finished.
        self.records: dict[str, dict] = {}
        self._shards: list[Path] = []
        self._new_folders = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        #: Whether this run may remove the folder if nothing has been made in it; never before it holds the lock.
        self._is_ours = False
        self._only_rename_missing = False
        self._journal: BinaryIO | None = None
        with contextlib.ExitStack() as failure:
            failure.callback(self.close)
            with writing(self.path):
                self._open(identity, resume)
            failure.pop_all()

    def _open(self, identity: dict, resume: bool) -> None:
        """Take the folder, and read what an earlier run has left in it."""
        if self.path.exists() and not resume:
            raise CheckpointError(f"{self.path} must not exist", "an unfinished run", "go on with --resume, or delete it")
        self.path.mkdir(parents=True, exist_ok=True)
        hashed = (self.path / HASHES_NAME).exists()
        if not self._journal_path.exists() and not hashed and any(self.path.iterdir()):
            raise CheckpointError(f"{self.path} must come from an unfinished run", "other files", "move them away")
        self._journal = open(self._journal_path, "a+b")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{self.path} must be used by one run at a time", "another one at work", "wait for it") from None
        self._is_ours = self.path in self._new_folders
        self._read_journal(identity, hashed)

    def _read_journal(self, identity: dict, hashed: bool) -> None:
        self._journal.seek(0)
        content = self._journal.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, *others = [_record_of(line) for line in whole.split(b"\n")[:-1]] or [None]
        #: septet.json is written last, and the journal removed after that.
        self._only_rename_missing = hashed and not whole
        if first is not None:
            self._compare(first, identity)
        elif whole:
            hint = f"delete {self.path} and start again"
            raise CheckpointError(f"{self._journal_path} must begin with what is being made", "a damaged line", hint)
        self._is_ours = True
        self._journal.truncate(len(whole))
        if not whole and not hashed:
            self._append(identity)
        self.records = {record["job"]: record for record in others if record is not None}

    def _append(self, record: dict) -> None:
        self._journal.write(_line_of(record))
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def reserve(self, shards: list[Shard]) -> None:
        """Create the shards at their full size and write their headers; those of an earlier run keep their data."""
        self._shards = [self.path / shard.name for shard in shards]
        for shard in shards:
            with writing(self.path / shard.name):
                descriptor = os.open(self.path / shard.name, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    os.truncate(descriptor, shard.size_bytes)
                    os.posix_fallocate(descriptor, 0, shard.size_bytes)
                    os.pwrite(descriptor, shard.head, 0)
                finally:
                    os.close(descriptor)

    def write(self, name: str, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """Write pieces (first byte, data) into a shard, and wait until they are on disk."""
        with writing(self.path / name), open(self.path / name, "r+b") as file:
            for offset, data in pieces:
                file.seek(offset)
                file.write(memoryview(data).cast("B"))
            file.flush()
            os.fdatasync(file.fileno())

    def record(self, job: str, **details: object) -> None:
        """Note that all data of a job has been written."""
        with writing(self._journal_path):
            self.records[job] = {"job": job, **details}
            self._append(self.records[job])

    def write_file(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with writing(self.path / name):
            (self.path / name).parent.mkdir(exist_ok=True)
            with open(self.path / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def was_complete(self, made_from: dict) -> bool:
        """Whether an earlier run with the same source and options was cut off just before the rename.

        Raises:
            CheckpointError: it was, but with another source or other options.
        """
        if not self._only_rename_missing:
            return False
        hashes = read_json(self.path / HASHES_NAME)
        self._compare({key: hashes.get(key) for key in made_from}, made_from)
        return True

    def _compare(self, earlier: dict, now: dict) -> None:
        differing = sorted(key for key in now.keys() | earlier.keys() if now.get(key) != earlier.get(key))
        if differing:
            requirement = f"{self.path} must have been started with the same source and options"
            raise CheckpointError(requirement, f"other {', '.join(differing)}", "repeat the earlier command, or delete it")

    def finish(self) -> None:
        """Remove the journal and rename OUT.partial to OUT. septet.json must have been written, as the last file."""
        with writing(self.out):
            for folder in (self.scratch, self.calibration):
                if folder.exists():
                    shutil.rmtree(folder)
            _sync_folder(self.path)
            self._journal_path.unlink()
            if self.out.exists():
                raise CheckpointError(f"{self.out} must not exist", "something that appeared meanwhile", f"rename {self.path} by hand")
            self.path.rename(self.out)
            _sync_folder(self.out.parent)

    def close(self) -> None:
        """Let go of the journal and its lock; if nothing has been made yet, the folder goes away."""
        if self._is_ours and not self._has_work():
            for folder in (self.scratch.with_suffix(".unfinished"), self.calibration):
                shutil.rmtree(folder, ignore_errors=True)
            for file in (*self._shards, self._journal_path):
                with contextlib.suppress(OSError):
                    file.unlink()
            # A folder with files of somebody else stays.
            with contextlib.suppress(OSError):
                for folder in (self.path, *(folder for folder in self._new_folders if folder != self.path)):
                    folder.rmdir()
        if self._journal is not None:
            self._journal.close()

    def _has_work(self) -> bool:
        """Whether a later run could use anything of this one."""
        found = [file for file in self.calibration.glob("*") if ".unfinished" not in file.name]
        return bool(self.records or self._only_rename_missing or found or self.scratch.exists())


def _line_of(record: dict) -> bytes:
    """A line of the journal: the CRC-32 of a JSON text, and the text."""
    text = json.dumps(record).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _record_of(line: bytes) -> dict | None:
    """What a line of the journal says; None if it is damaged."""
    checksum, _, text = line.partition(b" ")
    return json.loads(text) if checksum == f"{zlib.crc32(text):08x}".encode() else None
