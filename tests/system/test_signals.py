"""Signals to a process of its own: what is put off, what acts at once, what is ignored."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence

import pytest

NET_S = 60
STEPS = """
    with defer() as stop:
        for step in range(6000):
            time.sleep(0.01)
            say("step")
            if stop:
                say("saved")
                break
"""


def told(body: str, *signals: signal.Signals, at: Sequence[str] = ("step",)) -> tuple[list[str], int]:
    """Output and exit status of a process with the given body; each signal is sent after one of its lines of output."""
    script = (
        "import signal, sys, time\n"
        "from steer_heal.system.signals import stop_requested, block, install_handlers, defer\n"
        "def say(word): print(word, flush=True)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may be run by nohup\n"
        "install_handlers()\n"
        "try:\n"
        f"{textwrap.indent(textwrap.dedent(body).strip(), '    ')}\n"
        "except BaseException as error:\n"
        '    say(f\'{type(error).__name__} {getattr(error, "code", "")}\'.strip())\n'
        "    time.sleep(0.3)\n"
        "    say('closed')\n"
        "    raise\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    said, waiting = [], list(zip(signals, [*at, *([at[-1]] * len(signals))], strict=False))
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.strip())
        if waiting and said[-1] == waiting[0][1]:
            process.send_signal(waiting.pop(0)[0])
    return [word for word in said if word != "step"], process.wait(NET_S)


def test_work_that_looks_for_it_ends_its_step_first() -> None:
    assert told(STEPS, signal.SIGINT) == (["saved", "KeyboardInterrupt", "closed"], -signal.SIGINT)
    assert told(STEPS, signal.SIGTERM) == (["saved", "SystemExit 143", "closed"], 143)


def test_other_work_ends_at_once() -> None:
    body = """
        say("step")
        time.sleep(60)
    """
    assert told(body, signal.SIGINT) == (["KeyboardInterrupt", "closed"], -signal.SIGINT)
    assert told(body, signal.SIGTERM) == (["SystemExit 143", "closed"], 143)


def test_a_second_ctrl_c_ends_it_at_once() -> None:
    """While files are being closed, and within a step that never ends."""
    body = """
        say("step")
        time.sleep(60)
    """
    said, code = told(body, signal.SIGINT, signal.SIGINT, at=("step", "KeyboardInterrupt"))
    assert (said, code) == (["KeyboardInterrupt"], -signal.SIGINT)
    stuck = """
        with defer() as stop:
            say("step")
            while not stop: time.sleep(0.01)
            say("asked")
            time.sleep(60)
    """
    said, code = told(stuck, signal.SIGINT, signal.SIGINT, at=("step", "asked"))
    assert (said, code) == (["asked", "KeyboardInterrupt", "closed"], -signal.SIGINT)


def test_in_a_step_further_signals_are_put_off_too() -> None:
    """Schedulers send several: the step ends and is saved, and SIGUSR2, which says more, is what is obeyed."""
    slow = """
        def requeue(number, frame):
            say("requeued")
            sys.exit(255)
        signal.signal(signal.SIGUSR2, requeue)
        install_handlers()
        with defer() as stop:
            say("step")
            while not stop: time.sleep(0.01)
            say("asked")
            time.sleep(0.5)
            say("saved")
    """
    first, second = ("step", "asked"), ["asked", "saved"]
    assert told(slow, signal.SIGTERM, signal.SIGTERM, at=first) == ([*second, "SystemExit 143", "closed"], 143)
    for pair in ((signal.SIGTERM, signal.SIGUSR2), (signal.SIGUSR2, signal.SIGTERM)):
        said = told(slow, *pair, at=first)
        assert said == ([*second, "requeued", "SystemExit 255", "closed"], 255), pair


def test_an_import_is_not_broken_into() -> None:
    body = """
        with block():
            say("step")
            time.sleep(0.5)
            say("imported")
        time.sleep(60)
    """
    assert told(body, signal.SIGTERM) == (["imported", "SystemExit 143", "closed"], 143)


def test_a_second_sigterm_is_ignored() -> None:
    """Schedulers send several, and the first one's good order stands."""
    said, code = told(STEPS, signal.SIGTERM, signal.SIGTERM, at=("step", "SystemExit 143"))
    assert (said, code) == (["saved", "SystemExit 143", "closed"], 143)


def test_another_handler_is_put_off_too_and_sigterm_after_it_is_ignored() -> None:
    """A handler like submitit's, which requeues and leaves."""
    body = (
        """
    def requeue(number, frame):
        say("requeued")
        sys.exit(255)
    signal.signal(signal.SIGUSR2, requeue)
    install_handlers()
    install_handlers()
    """
        + STEPS
    )
    said, code = told(body, signal.SIGUSR2, signal.SIGTERM, at=("step", "requeued"))
    assert (said, code) == (["saved", "requeued", "SystemExit 255", "closed"], 255)


def test_an_error_of_the_work_does_not_swallow_a_signal() -> None:
    body = """
        with defer() as stop:
            say("step")
            while not stop: time.sleep(0.01)
            raise ValueError
    """
    assert told(body, signal.SIGTERM) == (["SystemExit 143", "closed"], 143)


def test_handlers_are_as_they_were_afterwards() -> None:
    body = """
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with defer(): pass
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert not stop_requested()
        say("same")
    """
    assert told(body) == (["same"], 0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP], ids=lambda number: number.name)
def test_other_signals_are_left_alone(number: signal.Signals) -> None:
    said, code = told(STEPS, number)
    assert (said, code) == ([], -number)


def test_in_another_thread_nothing_is_put_off() -> None:
    body = """
        import threading
        def work():
            with defer() as stop: say(str(bool(stop)))
        one = threading.Thread(target=work)
        one.start()
        one.join()
    """
    assert told(body) == (["False"], 0)


def test_a_signal_that_comes_while_a_line_is_logged() -> None:
    """loguru cannot be called within itself: it would print a traceback, and the handler's own line would be lost."""
    script = """
        import os, signal
        from loguru import logger
        from steer_heal.system.signals import install_handlers

        def sink(message):
            os.write(1, f"{message.record['message']}\\n".encode())
            if message.record["message"] == "a line":
                signal.raise_signal(signal.SIGINT)

        logger.remove()
        logger.add(sink)
        install_handlers()
        try:
            logger.info("a line")
        except KeyboardInterrupt:
            os.write(1, b"interrupted\\n")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=NET_S, check=False
    )
    assert done.stderr == ""
    assert sorted(done.stdout.split("\n")) == [
        "",
        "a line",
        "interrupted",
        "stopping; press Ctrl-C again to exit at once",
    ]


def test_a_signal_that_another_thread_takes_is_held_back_too() -> None:
    """A bare `except` stands for those of libraries while they are imported."""
    said, code = told("""
        import threading
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        with block():
            say("here")
            try:
                end = time.monotonic() + 1
                while time.monotonic() < end:
                    time.sleep(0.01)
            except BaseException:
                say("lost")
            say("imported")
        say("not stopped")
        """, signal.SIGINT, at=["here"])  # fmt: skip
    assert said == ["here", "imported", "KeyboardInterrupt", "closed"]
    assert code != 0
