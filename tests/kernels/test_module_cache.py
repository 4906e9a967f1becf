"""Generated modules on disk: many processes, damage, folders that cannot be written."""

from __future__ import annotations

import fcntl
import importlib.util
import inspect
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lychee_compile.kernels.gpu.common import module_cache
from lychee_compile.kernels.gpu.common.module_cache import KernelUnavailable, load, store

SOURCE = '''"""Twice a number."""


def twice(x: int) -> int:
    """2 × x."""
    return 2 * x
'''
processes = multiprocessing.get_context("spawn")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, and a process that knows nothing of it."""
    monkeypatch.setenv("LYCHEE_CACHE_DIR", str(tmp_path / "cache"))
    _forget(monkeypatch)
    return tmp_path / "cache"


def _forget(monkeypatch):
    """Be a process that neither stored nor loaded anything."""
    monkeypatch.setattr(module_cache, "_sources", {})
    monkeypatch.setattr(module_cache, "_modules", {})
    module_cache._say_once.cache_clear()


def _stored(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_stored_source_is_a_readable_file_and_a_module(folder):
    path = store(SOURCE, "decode_exact_f32")
    assert path.parent == folder
    assert path.name.startswith("decode_exact_f32_")
    assert path.read_text(encoding="utf-8").partition("\n")[2] == SOURCE
    module = load(path.stem)
    assert module.twice(21) == 42
    assert module.__file__ == str(path)
    assert inspect.getsource(module.twice) == SOURCE[SOURCE.index("def twice") :]
    assert load(path.stem) is module


def test_the_future_imports_of_the_cache_are_not_those_of_modules():
    path = store("def twice(x: int): ...\n", "decode")
    assert load(path.stem).twice.__annotations__ == {"x": int}


def test_same_source_same_file_and_another_source_another(folder):
    first = store(SOURCE, "decode")
    written = first.stat().st_mtime_ns, first.stat().st_ino
    assert store(SOURCE, "decode") == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == written
    changed = store(SOURCE.replace("2 *", "3 *"), "decode")
    assert _stored(folder) == sorted([first.name, changed.name])
    assert (load(first.stem).twice(1), load(changed.stem).twice(1)) == (2, 3)


def test_another_process_loads_what_this_one_stored():
    kernel = store(SOURCE, "decode").stem
    lines = "from lychee_compile.kernels.gpu.common.module_cache import load; import sys"
    lines += "; print(load(sys.argv[1]).twice(4))"
    done = subprocess.run(
        [sys.executable, "-c", lines, kernel], capture_output=True, text=True, check=True
    )
    assert done.stdout == "8\n"


def _store_and_load(start, numbers, results):
    """Store and load all sources, when all processes are there."""
    start.wait()
    try:
        values = [
            load(store(f"VALUE = {number}\n" * 5000, "decode").stem).VALUE for number in numbers
        ]
        results.put(values)
    except BaseException as error:
        results.put(repr(error))
        raise


def test_processes_at_the_same_time(folder):
    count, numbers = 4, list(range(8))
    start, results = processes.Barrier(count), processes.Queue()
    workers = [
        processes.Process(target=_store_and_load, args=(start, numbers, results))
        for _ in range(count)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [numbers] * count
    for worker in workers:
        worker.join(60)
    assert len(_stored(folder)) == len(numbers), "drafts are left"


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one byte changed": lambda content: content.replace(b"2 * x", b"3 * x"),
    "no text": lambda content: content[:-10] + b"\xff\xfe" * 5,
    "header changed": lambda content: b"#" + content[1:].replace(b"#", b" ", 1).upper(),
    "something appended": lambda content: content + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_noticed(damage, monkeypatch):
    path = store(SOURCE, "decode")
    content = path.read_bytes()
    damaged = damage(content)
    assert damaged != content
    path.write_bytes(damaged)
    assert load(path.stem).twice(1) == 2, "this process has the source"
    assert path.read_bytes() == content

    path.write_bytes(damaged)
    _forget(monkeypatch)
    with pytest.raises(KernelUnavailable, match=rf"{path.stem}.* is damaged. Compile the model"):
        load(path.stem)
    assert store(SOURCE, "decode") == path
    assert path.read_bytes() == content
    assert load(path.stem).twice(1) == 2


def test_a_deleted_file_is_written_anew_by_who_stored_it(monkeypatch):
    path = store(SOURCE, "decode")
    path.unlink()
    assert load(path.stem).twice(1) == 2
    assert path.exists()
    path.unlink()
    _forget(monkeypatch)
    with pytest.raises(KernelUnavailable, match="is missing"):
        load(path.stem)


def test_a_file_under_a_wrong_name_is_damaged(folder):
    path = store(SOURCE, "decode")
    path.rename(folder / "decode_0123456789ab.py")
    with pytest.raises(KernelUnavailable, match="is damaged"):
        load("decode_0123456789ab")


@pytest.mark.parametrize("kernel", ["../decode_0123456789ab", "decode.0123456789ab", ""])
def test_a_kernel_is_no_path(kernel):
    with pytest.raises(KernelUnavailable):
        load(kernel)
    with pytest.raises(ValueError, match="make a kernel's name"):
        store(SOURCE, kernel)


def test_a_module_that_fails_is_not_kept():
    path = store("raise ZeroDivisionError\n", "decode")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            load(path.stem)
    assert not any(path.stem in name for name in sys.modules)


def test_a_folder_that_cannot_be_written(folder, caplog, monkeypatch):
    folder.write_text("a file, where even an administrator makes no folder")
    with caplog.at_level(logging.WARNING):
        paths = [store(SOURCE, "decode"), store(SOURCE, "encode")]
    assert [load(path.stem).twice(2) for path in paths] == [4, 4]
    assert folder not in paths[0].parents
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text
    assert "LYCHEE_CACHE_DIR" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to an administrator")
def test_a_folder_of_somebody_else(folder):
    shared = store(SOURCE, "decode")
    folder.chmod(0o555)
    try:
        assert store(SOURCE, "decode") == shared, "what is there is used"
        assert store(SOURCE, "encode").parent != folder
    finally:
        folder.chmod(0o755)


def test_the_temporary_folder_goes_with_its_process(folder):
    folder.write_text("")
    lines = "from lychee_compile.kernels.gpu.common.module_cache import store\n"
    lines += "print(store('x = 1', 'decode'))"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(".py")
    assert not Path(done.stdout.strip()).parent.exists()


def _hold_lock(path, held):
    """Take the lock, leave half a file, and hang."""
    with Path(path).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (Path(path).parent / "decode_half.draft").write_text("half a f")
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(folder):
    """A process that holds the lock."""
    folder.mkdir()
    held = processes.Event()
    process = processes.Process(target=_hold_lock, args=(folder / ".lock", held), daemon=True)
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_a_dead_process_holds_no_lock(holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    begin = time.monotonic()
    assert load(store(SOURCE, "decode").stem).twice(1) == 2
    assert time.monotonic() - begin < module_cache.LOCK_SECONDS / 2


def test_a_hanging_process_is_not_waited_for(holder, folder, monkeypatch):
    monkeypatch.setattr(module_cache, "LOCK_SECONDS", 0.2)
    path = store(SOURCE, "decode")
    assert path.parent == folder
    assert load(path.stem).twice(1) == 2


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LYCHEE_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store(SOURCE, "decode").parent == tmp_path / ".cache/lychee_compile/kernels"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_finds_the_source():
    source = """import triton
import triton.language as tl


@triton.jit
def fill(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1)
"""
    fill = load(store(source, "decode").stem).fill
    assert "def fill(x, N: tl.constexpr)" in inspect.getsource(fill.fn)
