"""Large buffers stay with the process once it has asked to keep them."""

import platform
import subprocess
import sys

import pytest

# Page faults of ten buffers of 48 MiB (12,288 pages of 4 KiB), one after the other, before and after the call. In a
# process of its own: the setting stays for the life of a process.
PROGRAM = """
import resource
from acmil.preprocessing.allocator import keep_large_buffers

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(48 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
assert keep_large_buffers() is True
bytearray(48 * 2**20)
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc, whose malloc is set")
def test_buffers_are_reused_after_the_call():
    printed = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout
    before, after = map(int, printed.split())
    assert after < 50
    assert before > 10 * after  # huge pages, where a machine has them, make `before` small too


def test_other_allocators_are_left_alone(monkeypatch):
    from acmil.preprocessing import allocator

    monkeypatch.setattr(allocator.platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_large_buffers() is False
