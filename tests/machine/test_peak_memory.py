"""The peak is the card's, even if it was high only between two steps."""

import time

from lora_grpo.machine.process import PeakMemory


def test_a_peak_between_two_looks_of_the_run_is_seen() -> None:
    free = [10_000]
    peak = PeakMemory(lambda: free[0], free_before=10_000)
    assert peak.bytes() is None, "nothing was held yet, which is no peak of 0.00 GB"
    free[0] = 4_000
    time.sleep(0.3)
    free[0] = 9_000
    assert peak.bytes() == 6_000


def test_without_a_gpu_it_is_the_resident_peak() -> None:
    before = PeakMemory(None).bytes()
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert PeakMemory(None).bytes() >= max(before, 300_000_000)
