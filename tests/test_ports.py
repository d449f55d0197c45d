"""Test sessions beside each other never meet at a port: their processes would join each other's."""

import subprocess
import sys
from pathlib import Path


def test_another_session_takes_ports_of_its_own(free_ports):
    mine = free_ports()
    code = "import conftest; print(conftest.free_port(), conftest.free_port())"
    command, folder = [sys.executable, "-c", code], Path(__file__).parent
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    first, second = map(int, run.stdout.split())
    assert first != second
    assert first // 500 == second // 500 != mine // 500
