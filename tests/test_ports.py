"""Test sessions beside each other never meet at a port: their processes would join each other's."""

import subprocess
import sys
from pathlib import Path


def test_another_session_takes_ports_of_its_own(free_ports):
    code = "import conftest; print(conftest.free_port(), conftest.free_port())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = map(int, run.stdout.split())
    assert second == first + 1
    assert first // 500 != free_ports() // 500
