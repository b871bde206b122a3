"""Leases: one holder at a time, whatever dies, however slow, by whichever clock."""

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from acmil.preprocessing.leases import Leases
from acmil.preprocessing.process_name import has_ended, process_name

BEAT_SECONDS = 0.02
ELSEWHERE = b"0123456789ab-77-5-ffff 3\n"  # a holder on another machine: nobody here can tell whether it lives


def leases(folder) -> Leases:
    return Leases(folder, beat_seconds=BEAT_SECONDS)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_slide_has_one_holder_until_it_is_let_go(tmp_path):
    with leases(tmp_path) as one, leases(tmp_path) as two:
        assert one.acquire("a").generation == 0
        assert one.holds("a")
        assert two.acquire("a") is None
        assert not two.holds("a")
        assert two.acquire("a.1").generation == 0  # its name begins like the other's
        time.sleep(10 * BEAT_SECONDS)  # longer than six beats: the first one gives signs of life
        assert two.acquire("a") is None
        one.release("a")
        assert two.acquire("a").generation == 0
    assert names(tmp_path) == []


def test_a_holder_that_gives_no_sign_is_followed_after_six_beats_whatever_the_file_says_of_time(tmp_path):
    stale = tmp_path / "a.4.lease"
    stale.write_bytes(ELSEWHERE)
    os.utime(stale, (time.time() + 1e6, time.time() + 1e6))
    with leases(tmp_path) as two:
        begun = time.monotonic()
        while (lease := two.acquire("a")) is None:
            time.sleep(BEAT_SECONDS / 4)
        assert time.monotonic() - begun >= 6 * BEAT_SECONDS
        assert lease.generation == 5
        assert names(tmp_path) == ["a.5.lease"]


def test_a_holder_that_was_slow_loses_the_slide_and_leaves_its_follower_alone(tmp_path):
    slow = leases(tmp_path)  # never entered: it does not beat
    assert slow.acquire("a").generation == 0
    with leases(tmp_path) as fast:
        while fast.acquire("a") is None:
            time.sleep(BEAT_SECONDS)
        assert not slow.holds("a")
        slow.release("a")
        assert fast.holds("a")
        assert names(tmp_path) == ["a.1.lease"]


def test_a_lower_generation_made_late_does_not_count(tmp_path, monkeypatch):
    with leases(tmp_path) as holder:
        (tmp_path / "a.6.lease").write_bytes(ELSEWHERE)
        while holder.acquire("a") is None:
            time.sleep(BEAT_SECONDS)
        late = leases(tmp_path)
        found, looks = late._generations, []

        def outdated(slide_id):
            looks.append(slide_id)
            return [2] if len(looks) == 1 else found(slide_id)  # what it saw long ago

        monkeypatch.setattr(late, "_generations", outdated)
        monkeypatch.setattr(late, "_is_dead", lambda path: True)
        assert late.acquire("a") is None
        assert names(tmp_path) == ["a.7.lease"]


def test_of_many_takers_one_wins(tmp_path):
    for round_ in range(20):
        slide_id = f"s{round_}"
        (tmp_path / f"{slide_id}.0.lease").write_bytes(ELSEWHERE)
        takers = [leases(tmp_path) for _ in range(6)]
        for taker in takers:
            taker.acquire(slide_id)  # a first look
        time.sleep(7 * BEAT_SECONDS)
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(Leases.acquire, takers, [slide_id] * 6))
        assert sum(lease is not None for lease in won) == 1
        for taker in takers:
            taker.release(slide_id)


def _hold_and_wait(folder, held):
    leases(folder).acquire("a")
    held.set()
    time.sleep(60)


def test_the_slides_of_a_process_killed_on_this_machine_are_free_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold_and_wait, args=(tmp_path, held))
    process.start()
    assert held.wait(30)
    slow = Leases(tmp_path, beat_seconds=1000.0)
    assert slow.acquire("a") is None
    assert slow.others()
    process.kill()
    process.join()
    assert not slow.others()
    assert slow.acquire("a").generation == 1
    slow.release("a")


def test_processes_have_names_of_their_own_that_tell_when_they_end():
    code = "from acmil.preprocessing.process_name import process_name; print(process_name())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other != process_name()
    assert has_ended(other) == sys.platform.startswith("linux")
    assert not has_ended(process_name())
    assert not has_ended(ELSEWHERE.decode().split()[0])
    assert not has_ended("")
    assert not has_ended("12345")
