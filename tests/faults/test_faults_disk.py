"""Disks that are full, read-only or corrupt files: the cell reports it, no partial result counts, and it resumes.

The disks are small ones in memory, mounted in a mount namespace of their own, which takes root or user namespaces.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import command
from helpers.faults import Children, Ended, assert_same_figures, children, frozen, held, published

from steer_heal.store import damage
from steer_heal.sweep.status import Status, read

pytestmark = [pytest.mark.slow(60), pytest.mark.long]

CELL = ("heal.steps=12", "generate.max_new_tokens=4")
NAMESPACES = (("unshare", "-m"), ("unshare", "-Urm"))  # root's; anybody's, where the kernel allows that
ROOMY = "64m"
MOUNT = 'mount -t tmpfs -o size="$0" none "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Disk:
    """A small disk, visible to the process that forks and to commands run beside it."""

    fork: Children
    there: Path  # where it is for those
    seen: Path  # the same from here
    enter: tuple[str, ...]

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.enter, *words], capture_output=True, text=True, check=False, timeout=300)

    def mount(self, options: str, below: str = "") -> None:
        said = self.command("mount", "-o", f"remount,{options}", str(self.there / below))
        assert said.returncode == 0, said.stderr

    def steer_heal(self, *words: str) -> tuple[int, list[str]]:
        """Run `python -m steer_heal.<words>` on it; return its exit status and its lines of output."""
        code = self.fork.end(self.fork.begin(self.there, *words))
        return code, self.fork.output.read_text().splitlines()

    def put(self, cells: Path, n: int) -> tuple[Path, Path]:
        """Put a frozen cell on it, with much room; the folder there, and as seen from here."""
        self.mount(f"size={ROOMY}")
        shutil.copytree(cells / str(n), self.seen / str(n))
        return self.there / str(n), self.seen / str(n)


def namespace() -> tuple[str, ...]:
    """Command prefix that gives a mount namespace; tests that need one are skipped without it."""
    for way in NAMESPACES:
        if shutil.which(way[0]) and subprocess.run([*way, "mount", "-t", "tmpfs", "none", "/mnt"],
                                                   capture_output=True, check=False).returncode == 0:  # fmt: skip
            return way
    pytest.skip("neither root nor a user namespace may mount a disk here")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    way, root = namespace(), tmp_path_factory.mktemp("disk")
    there = root / "disk"
    there.mkdir()
    with children(root, [*way, "sh", "-c", MOUNT, ROOMY, str(there)]) as fork:
        pid, user = str(fork.process.pid), ("-U", "--preserve-credentials") if "-Urm" in way else ()
        fork.ready()
        yield Disk(fork, there, Path(f"/proc/{pid}/root{there}"), ("nsenter", "-t", pid, "-m", *user))


@pytest.fixture(scope="module")
def cells(disk: Disk) -> Path:
    """Saved cells, as they will be on the disk; the first was run there undisturbed."""
    frozen([CELL] * 8, disk.there)  # written below the mount point, where nobody in the namespace sees it
    folder, _ = disk.put(disk.there, 0)
    ended = disk.fork.run(folder)
    assert ended.code == 0, f"undisturbed it ended with {ended.code}; it said {ended.log[-2000:]}"
    return disk.there


def failed(folder: Path, ended: Ended, number: int, what: str) -> Status:
    """Assert that a cell says why it failed."""
    reason, status = os.strerror(number), read(folder)
    assert ended.code == 1, f"{what}: it ended with {ended.code}; it said {ended.log[-1000:]}"
    assert status.state == "failed", f"{what}: {status}"
    assert reason in status.message, f"{what}: {status.message!r}"
    assert "\n" not in status.message, f"{what}: more than a line"
    assert "Traceback" in status.traceback or status.traceback == "see log.txt", f"{what}: {status.traceback!r}"
    return status


def assert_whole(store: Path, before: dict[str, int], ended: Ended, what: str) -> dict[str, int]:
    """Assert that all results are complete, and that earlier ones are untouched."""
    now = published(store)
    spoilt = {path: wrong for path in now if (wrong := damage(store / path)) != ""}
    assert not spoilt, f"{what}: half-written, and taken for results: {spoilt}"
    again = [path for path in before if path in ended.begun or now.get(path) != before[path]]
    assert not again, f"{what}: computed again: {again}"
    return now


def used(*folders: Path) -> int:
    """kB that folders take on a disk; a file with two names takes them once."""
    found = [path.lstat() for folder in folders for path in folder.rglob("*")]
    return sum({stat.st_ino: stat.st_blocks for stat in found}.values()) // 2


def test_a_full_disk_fails_the_cell_and_it_goes_on_once_there_is_room(disk: Disk, cells: Path) -> None:
    """Full earlier and later in the cell. Reference: the undisturbed one."""
    folder, seen = disk.put(cells, 1)
    store, there, counts = disk.seen / "store-1", dict[str, int](), []
    whole, base = used(disk.seen / "0", disk.seen / "store-0"), used(disk.seen)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        disk.mount(f"size={base + round(share * whole)}k")
        ended = disk.fork.run(folder)
        failed(seen, ended, errno.ENOSPC, f"room for {share:.0%}")
        there = assert_whole(store, there, ended, f"room for {share:.0%}")
        assert not held(store), f"room for {share:.0%}: leases were left: {held(store)}"
        counts.append(len(there))
    for part in (cells / "1/.hydra").iterdir():
        assert (seen / ".hydra" / part.name).read_bytes() == part.read_bytes(), f"what says what to run: {part.name}"
    assert len(set(counts)) >= 4, f"it got no farther with more room: {counts} results"
    disk.mount(f"size={ROOMY}")
    ended = disk.fork.run(folder)
    assert ended.code == 0, ended.log[-2000:]
    assert_whole(store, there, ended, "with room again")
    assert_same_figures(seen, disk.seen / "0", "after a full disk")
    print(f"\nfull disks: {counts} results at the end of each attempt, {len(published(store))} at last")


def test_a_sweep_on_a_full_disk_tells_which_cells_failed_and_resubmit_finishes_it(disk: Disk, cells: Path) -> None:
    """The command as users type it, with room for the first cell only."""
    room = used(disk.seen) + used(disk.seen / "0", disk.seen / "store-0") + 210
    disk.mount(f"size={room}k")
    given = ("experiment=tiny", *CELL, "reg=nll,kl_rev", "hydra.sweep.dir=sweep", "runtime.store=store")
    code, said = disk.steer_heal("main", "-m", *given)
    assert code == 1, said[-30:]
    (at,) = (i for i, line in enumerate(said) if line.startswith("1 of 2 cells has no result"))
    assert said[at + 1].split()[:3] == ["reg=kl_rev", "(1-kl_rev)", "failed"], said[at:]
    assert os.strerror(errno.ENOSPC) in said[at + 1], said[at:]
    assert said[at + 3].strip() == "python -m steer_heal.sweep resubmit sweep", said[at:]
    assert not list(disk.seen.glob("sweep/1-kl_rev/result.json")), "a failed cell has a result"
    there = published(disk.seen / "store")
    code, said = disk.steer_heal("sweep", "resubmit", "sweep")
    assert code in (1, 2), f"with no room it ended with {code}"
    assert "Traceback" not in "\n".join(said).rpartition("--- End of logging error ---")[2], said[-30:]
    disk.mount(f"size={ROOMY}")
    code, said = disk.steer_heal("sweep", "resubmit", "sweep")
    assert code == 0, said[-30:]
    assert_same_figures(disk.seen / "sweep/1-kl_rev", disk.seen / "0", "after a full disk")
    now = published(disk.seen / "store")
    assert [path for path in there if now[path] != there[path]] == [], "what was there was computed again"
    assert read(disk.seen / "sweep/0-nll").attempt == 1, "a finished cell was run again"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Children, list[Path]]]:
    """Saved cells on an ordinary disk; the first was run undisturbed."""
    root = tmp_path_factory.mktemp("plain")
    folders = frozen([CELL] * 3, root)
    with children(root) as fork:
        ended = fork.run(folders[0])
        assert ended.code == 0, f"undisturbed it ended with {ended.code}; it said {ended.log[-2000:]}"
        yield fork, folders


def test_a_limit_on_the_size_of_files_fails_the_cell_in_the_same_way(plain: tuple[Children, list[Path]]) -> None:
    """Reference: a cell without the limit."""
    fork, folders = plain
    store, there = folders[0].with_name("store-1"), dict[str, int]()
    for most in (6_000, 30_000, 60_000):
        ended = fork.run(folders[1], most=most)
        failed(folders[1], ended, errno.EFBIG, f"{most} bytes")
        there = assert_whole(store, there, ended, f"{most} bytes")
    ended = fork.run(folders[1])
    assert ended.code == 0, ended.log[-2000:]
    assert there, "nothing was ever stored under a limit: this test shows little"
    assert_same_figures(folders[1], folders[0], "after a limit on files")


def test_a_read_only_folder_is_refused_before_anything_starts(disk: Disk) -> None:
    disk.mount("ro")
    try:
        for kind in ((), ("-m",)):
            code, said = disk.steer_heal("main", *kind, "experiment=tiny")
            assert code == 2, said
            assert len(said) == 1, said
            assert said[0].endswith(f"cannot be written: {os.strerror(errno.EROFS)}"), said
    finally:
        disk.mount("rw")


def test_a_store_that_becomes_read_only_fails_the_cell(disk: Disk, cells: Path) -> None:
    """A disk that fails in the middle of a heal, which resumes once it is writable again, though a lease was left."""
    folder, seen = disk.put(cells, 2)
    store, place = disk.seen / "store-2", disk.there / "store-2"
    store.mkdir()
    assert disk.command("mount", "-t", "tmpfs", "none", str(place)).returncode == 0
    marks = [line for line in (disk.seen / "0/log.txt").read_text().splitlines() if " healing with " in line]
    line = marks[0].partition(" INFO ")[2]
    ended = disk.fork.run(folder, line, 0.02, ("mount", "-o", "remount,ro", str(place)))
    status = failed(seen, ended, errno.EROFS, "read-only since the heal")
    assert "heal.heal" in status.message, f"it does not say where: {status.message}"
    there = assert_whole(store, {}, ended, "read-only since the heal")
    disk.mount("rw", "store-2")
    ended = disk.fork.run(folder)
    assert ended.code == 0, ended.log[-2000:]
    assert "is gone; taking over its work" in ended.log, "no lease was left: this test shows nothing about that"
    assert_whole(store, there, ended, "writable again")
    assert_same_figures(seen, disk.seen / "0", "after a read-only store")


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(bytes(data))


def test_spoilt_results_are_named_and_made_again(plain: tuple[Children, list[Path]]) -> None:
    """Half of a file, or one flipped bit. Reference: the cell with intact files."""
    fork, folders = plain
    spoils: Sequence[tuple[str, str]] = (("generate.generate", "truncated"), ("heal.heal", "flipped"),
                                         ("eval.evaluate", "flipped"), ("heal.drift.drift", "truncated"))  # fmt: skip
    store = shutil.copytree(folders[0].with_name("store-0"), folders[0].with_name("store-2"))
    before, damaged = published(store), []
    for stage, how in spoils:
        files = [path for path in store.glob(f"{stage}/*/*") if path.name != "manifest.json"]
        damaged.append(max(files, key=lambda path: path.stat().st_size))
        {"truncated": truncated, "flipped": flipped}[how](damaged[-1])
    ended = fork.run(folders[2])
    assert ended.code == 0, ended.log[-2000:]
    for path in damaged:
        line = f"WARNING {path.parent}: {path.name} does not match its checksum; computing again"
        assert line in ended.log, f"{path} is not named"
    assert sorted(ended.begun) == sorted("/".join(path.parts[-3:-1]) for path in damaged), "what was computed again"
    now = published(store)
    assert now.keys() == before.keys()
    assert not [path for path in now if damage(store / path) != ""], "it is still spoilt"
    assert_same_figures(folders[2], folders[0], "after spoilt results")
    assert command.result(folders[2])["answers"] == command.result(folders[0])["answers"]
