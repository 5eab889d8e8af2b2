"""A real Slurm of one node, in one temporary folder and on loopback, without systemd: started in about a second.

apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge
python tests/minislurm.py COMMAND...        runs a command within one
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
STARTS_S, ENDS_S = 60.0, 30.0
GRACE_S = 40  # that a job of the partition `main` has when one of `urgent` takes its place
HELD_S = 4.0  # until a requeued task may be released


def missing() -> list[str]:
    """The parts of Slurm that the machine lacks."""
    return [name for name in COMMANDS if shutil.which(name, path=PATH) is None]


class MiniSlurm:
    """A context manager; `env` is what a command needs to reach it."""

    def __init__(self, cpus: int = 2, gpus: int = 0) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
        self.root.chmod(0o755)
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.over = threading.Event()
        for folder in ("state", "spool", "log"):
            (self.root / folder).mkdir()
        (self.root / "key").touch(0o600)
        (self.root / "key").write_bytes(os.urandom(128))
        for i in range(gpus):  # any file will do for a GPU that nobody computes on
            (self.root / f"gpu{i}").touch()
        devices = f"Name=gpu File={self.root}/gpu[0-{gpus - 1}]\n" if gpus else ""
        (self.root / "gres.conf").write_text(devices)
        (self.root / "slurm.conf").write_text(self._config(cpus, gpus))
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SUBMITIT_", "SQUEUE_"))}
        self.env = own | {"SLURM_CONF": f"{self.root}/slurm.conf", "PATH": PATH}

    def _config(self, cpus: int, gpus: int) -> str:
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        try:
            address = socket.gethostbyname(host)
        except OSError:
            address = ""
        # with these the daemons listen where the host's name leads to, which must then be loopback
        loopback = address.startswith("127.")
        ports = _free_ports(2)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
        lines = {
            "ClusterName": "mini", "SlurmctldHost": f"{host}({address if loopback else '127.0.0.1'})",
            "SlurmctldPort": ports[0], "SlurmdPort": ports[1], "SlurmUser": user, "SlurmdUser": user,
            "AuthInfo": f"socket={self.root}/munge.sock", "StateSaveLocation": f"{self.root}/state",
            "SlurmdSpoolDir": f"{self.root}/spool", "SlurmctldPidFile": f"{self.root}/slurmctld.pid",
            "SlurmdPidFile": f"{self.root}/slurmd.pid", "ProctrackType": "proctrack/linuxproc",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU_Memory",
            "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0", "DefMemPerCPU": 64,
            "MinJobAge": 86400, "KillWait": 5, "ReturnToService": 2, "InactiveLimit": 0,
            "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
        }  # fmt: skip
        if loopback:
            lines["CommunicationParameters"] = "NoCtldInAddrAny,NoInAddrAny"
        if gpus:
            lines["GresTypes"] = "gpu"
        node = f"NodeName={host} NodeAddr={address if loopback else '127.0.0.1'} CPUs={cpus} RealMemory={memory}"
        return "\n".join([
            *(f"{key}={value}" for key, value in lines.items()), node + (f" Gres=gpu:{gpus}" if gpus else ""),
            f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={GRACE_S}",
            f"PartitionName=urgent Nodes={host} MaxTime=INFINITE PriorityTier=10", "",
        ])  # fmt: skip

    def command(self, *words: str) -> str:
        """Output of one of Slurm's commands, whatever its exit status."""
        return subprocess.run(
            words, env=self.env, check=False, text=True, timeout=60, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """One of Slurm's commands, left running, its output thrown away."""
        return subprocess.Popen(words, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        root = self.root
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={root}/key", f"--socket={root}/munge.sock",
                        f"--pid-file={root}/munged.pid", f"--seed-file={root}/seed", "--origin=127.0.0.1")  # fmt: skip
            self._until((root / "munge.sock").exists)
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D")
            self._until(lambda: self.command("sinfo", "-h", "-o", "%t").strip() == "idle")
        except BaseException:  # also Ctrl-C: no daemon is left behind
            self.__exit__()
            raise
        threading.Thread(target=self._release, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if len(self.daemons) == 3 and self.daemons[1].poll() is None:  # jobs first: they outlive slurmd
            self.command("scancel", "-u", pwd.getpwuid(os.getuid()).pw_name)
            end = time.monotonic() + ENDS_S
            while self.command("squeue", "-h").strip() and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(ENDS_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _start(self, name: str, *arguments: str) -> None:
        with (self.root / "log" / name).open("ab") as log:
            self.daemons.append(subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", name, *arguments],  # gone also when the tests are killed
                env=self.env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            ))  # fmt: skip

    def _until(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + STARTS_S
        while not ready():
            if time.monotonic() > end or any(daemon.poll() is not None for daemon in self.daemons):
                logs = (self.root / "log").iterdir()
                raise RuntimeError("\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs))
            time.sleep(0.05)

    def _release(self) -> None:
        """Slurm holds what was requeued for two minutes; here for a few seconds, but until its old run is gone.

        The exit of that would else end the new one.
        """
        since: dict[str, float] = {}
        while not self.over.wait(1):
            for line in self.command("squeue", "--array", "-h", "-t", "PD", "-o", "%i %A %r").splitlines():
                job, number, reason = (*line.split(" ", 2), "", "")[:3]
                if reason != "BeginTime" or any((self.root / "spool").glob(f"*_{number}.*")):
                    continue
                if time.monotonic() - since.setdefault(job, time.monotonic()) > HELD_S:
                    self.command("scontrol", "update", f"JobId={job}", "StartTime=now")
                    del since[job]


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(one.getsockname()[1]) for one in held]
    finally:
        for one in held:
            one.close()


if __name__ == "__main__":
    with MiniSlurm(gpus=int(os.environ.get("GPUS", "0"))) as cluster:
        sys.exit(subprocess.call(sys.argv[1:] or ["sinfo"], env=cluster.env))
