"""Delivery of the kernels: cache, concurrency, read-only homes, damaged libraries, missing compilers, levels."""

import logging
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest

from decoquant_compile.kernels.cpu import build
from decoquant_compile.kernels.cpu.build import BuildError

ANSWER = '#include "answer.hpp"\nextern "C" int decoquant_answer() { return decoquant::answer(); }\n'
HEADER = "namespace decoquant { inline int answer() { return 42; } }\n"
TWICE = 'extern "C" int decoquant_twice(int x) { return 2 * x; }\n'

GCC = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(GCC is None, reason="needs a C++ compiler")


@pytest.fixture
def sources(tmp_path):
    """Two tiny sources and a header."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.cpp").write_text(ANSWER)
    (folder / "answer.hpp").write_text(HEADER)
    (folder / "twice.cpp").write_text(TWICE)
    return folder


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """A cache and a temporary directory of our own, no memory of earlier libraries; gives the cache."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("DECOQUANT_CACHE_DIR", str(cache))
    monkeypatch.setattr(build.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.delenv("DECOQUANT_CPU", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    build.detect.cache_clear()
    yield cache
    build.detect.cache_clear()


def private(tmp_path):
    return tmp_path / "temporary" / f"decoquant_compile-{os.getuid()}"


class Compiler:
    """A compiler that counts its calls; `script` runs before the real one."""

    def __init__(self, folder, script="", name="counting-g++"):
        self.path, self.log = folder / name, folder / f"{name}.log"
        self.path.write_text(f'#!/bin/sh\necho "$*" >> {self.log}\n{script}\nexec {GCC} "$@"\n')
        self.path.chmod(0o755)

    @property
    def calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    def make(script="", name="counting-g++"):
        made = Compiler(tmp_path, script, name)
        monkeypatch.setenv("CXX", str(made.path))
        return made

    return make


# ---------------------------------------------------------------------------------------------------------------- cache


def test_builds_once_and_loads(sources, compiler, fresh):
    counting = compiler()
    loaded = build.load("portable", sources=sources)
    assert loaded.decoquant_answer() == 42
    assert loaded.decoquant_twice(21) == 42
    assert sum(" -c " in f" {call} " for call in counting.calls) == 2
    assert len(counting.calls) == 3  # and the link
    path = build.library("portable", sources=sources)
    assert build.load("portable", sources=sources) is loaded
    assert len(counting.calls) == 3
    assert list(fresh.iterdir()) == [path]  # neither locks nor directories are left
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert not path.stat().st_mode & 0o022


def test_a_warm_start_is_fast(sources, compiler):
    counting = compiler()
    build.library("portable", sources=sources)
    calls = len(counting.calls)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        build.library("portable", sources=sources)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
    assert len(counting.calls) == calls


def test_what_the_key_covers(sources, compiler, fresh):
    compiler()
    paths = [build.library("portable", sources=sources)]
    paths.append(build.library("portable", sources=sources, extra=("-DEXTRA",)))
    paths.append(build.library("avx2", sources=sources) if "avx2" in build.usable() else fresh)
    (sources / "answer.hpp").write_text(HEADER.replace("42", "43"))
    paths.append(build.library("portable", sources=sources))
    assert build.load("portable", sources=sources).decoquant_answer() == 43
    (sources / "twice.cpp").rename(sources / "double.cpp")
    paths.append(build.library("portable", sources=sources))
    compiler("# another version")
    paths.append(build.library("portable", sources=sources))
    compiler(name="other-g++")
    paths.append(build.library("portable", sources=sources))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("level", build.LEVELS)
def test_flags_of_a_level_reach_the_compiler(level, sources, compiler):
    if level not in build.usable():
        pytest.skip(f"this machine compiles no {level}")
    (sources / "answer.hpp").write_text(
        "namespace decoquant { inline int answer() {\n"
        "#if defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__AVX512VBMI__)\nreturn 1024;\n"
        "#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && "
        "defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__F16C__) && defined(__FMA__)\n"
        "return 512;\n"
        "#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)\nreturn 2;\n"
        "#elif defined(__AVX__)\nreturn -1;\n#else\nreturn 0;\n#endif\n} }\n"
    )
    counting = compiler()
    expected = {"amx": 1024, "avx512": 512, "avx2": 2, "portable": 0}[level]
    assert build.load(level, sources=sources).decoquant_answer() == expected
    assert not any("-march" in call or "-ffast-math" in call for call in counting.calls)


def test_libraries_in_one_process_share_nothing(sources):
    """A static in a template would be one object for the whole process (STB_GNU_UNIQUE) were it visible."""
    (sources / "answer.hpp").write_text(
        "namespace decoquant { template <class T> T& counter() { static T count = 0; return count; }\n"
        "inline int answer() { return ++counter<int>(); } }\n"
    )
    first = build.load("portable", sources=sources)
    second = build.load("portable", sources=sources, extra=("-DOTHER",))
    assert [first.decoquant_answer(), first.decoquant_answer(), second.decoquant_answer()] == [1, 2, 1]
    assert not hasattr(first, "_ZN9decoquant7counterIiEERT_v")


def test_extra_options_reach_compiler_and_linker(sources, compiler):
    counting = compiler()
    build.library("portable", sources=sources, extra=("-g",))
    assert all("-g" in call.split() for call in counting.calls)


def test_the_users_cache_is_the_default(sources, monkeypatch, tmp_path):
    monkeypatch.delenv("DECOQUANT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.library("portable", sources=sources).parent == tmp_path / "xdg" / "decoquant_compile" / "cpu"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not allowed by its specification
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = build.library("portable", sources=sources)
    assert path.parent == tmp_path / "home" / ".cache" / "decoquant_compile" / "cpu"


def test_abandoned_builds_are_removed(sources, fresh):
    fresh.mkdir(mode=0o700)
    ours, running, other = fresh / f"{build._WORK}dead", fresh / f"{build._WORK}alive", fresh / "build-of-the-user"
    for folder in (ours, running, other):
        folder.mkdir()
        (folder / "file").touch()
    for folder in (ours, other):
        os.utime(folder, (0, 0))
    build.library("portable", sources=sources)
    assert not ours.exists()
    assert running.exists()
    assert other.exists()


# ---------------------------------------------------------------------------------------------------------- concurrency

WORKER = """
import pathlib, sys
from decoquant_compile.kernels.cpu import build
print("ready", flush=True)
sys.stdin.readline()
print(build.load("portable", sources=pathlib.Path(sys.argv[1])).decoquant_answer())
"""


def test_processes_at_once_build_once(sources, compiler, fresh):
    counting = compiler("sleep 0.5")
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, sources], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    assert [worker.communicate(timeout=120)[0] for worker in workers] == ["42\n"] * 4
    assert len(counting.calls) == 3
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def in_threads(count, function):
    results = []

    def call():
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - shown by the assertion
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_at_once_build_once(sources, compiler):
    counting = compiler("sleep 0.2")
    results = in_threads(4, lambda: build.load("portable", sources=sources))
    assert [loaded.decoquant_answer() for loaded in results] == [42] * 4
    assert len(set(map(id, results))) == 1
    assert len(counting.calls) == 3


def test_without_locks_all_still_load(sources, compiler, monkeypatch, fresh):
    def unsupported(file, operation):
        raise OSError(build.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(build.fcntl, "flock", unsupported)
    counting = compiler("sleep 0.2")
    results = in_threads(3, lambda: build.load("portable", sources=sources))
    assert [loaded.decoquant_answer() for loaded in results] == [42] * 3
    assert len(counting.calls) > 3
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


def test_a_holder_of_the_lock_that_hangs_does_not_stop_others(sources, monkeypatch, fresh):
    path = build.library("portable", sources=sources)
    path.unlink()
    monkeypatch.setattr(build, "TIMEOUT", 2.0)
    with path.with_suffix(".lock").open("ab") as held:
        build.fcntl.flock(held, build.fcntl.LOCK_EX)
        assert build.load("portable", sources=sources).decoquant_answer() == 42


# ----------------------------------------------------------------------------- directories that cannot or may not serve


def test_a_library_in_a_read_only_cache_is_used(sources, compiler, monkeypatch):
    counting = compiler()
    path = build.library("portable", sources=sources)
    calls = len(counting.calls)

    def read_only(*args, **kwargs):
        raise OSError(build.errno.EROFS, "Read-only file system")

    monkeypatch.setattr(build, "_lock", read_only)
    monkeypatch.setattr(build, "_build", read_only)
    assert build.library("portable", sources=sources) == path
    assert len(counting.calls) == calls


def test_a_read_only_cache_without_one_falls_back(sources, monkeypatch, fresh, tmp_path, caplog):
    fresh.mkdir(mode=0o700)
    lock = build._lock

    def read_only(path, ready):  # rights do not bind root: the file system says so instead
        if path.parent == fresh:
            raise OSError(build.errno.EROFS, "Read-only file system")
        return lock(path, ready)

    monkeypatch.setattr(build, "_lock", read_only)
    path = build.library("portable", sources=sources)
    assert path.parent == private(tmp_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [(record.levelno, str(fresh) in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)  # the user asked for that directory
    ]


def test_a_cache_that_cannot_be_made_falls_back(sources, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECOQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    first = build.library("portable", sources=sources)
    assert first.parent == private(tmp_path)
    assert build.library("portable", sources=sources) == first


def test_a_full_disk_falls_back(sources, compiler, fresh, tmp_path):
    compiler(f'case "$PWD" in {fresh}*) echo "cc1plus: No space left on device" >&2; exit 1;; esac')
    assert build.library("portable", sources=sources).parent == private(tmp_path)
    assert list(fresh.iterdir()) == []


def test_no_directory_at_all(sources, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECOQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(BuildError, match=r"no directory can hold .*Not a directory.*DECOQUANT_CACHE_DIR"):
        build.library("portable", sources=sources)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_directory_that_others_may_write_is_refused(mode, sources, fresh, tmp_path):
    path = build.library("portable", sources=sources)
    fresh.chmod(mode)
    fallback = build.library("portable", sources=sources)
    assert path.exists()
    assert fallback.parent == private(tmp_path)
    private(tmp_path).chmod(mode)
    with pytest.raises(BuildError, match="another user could have written it"):
        build.library("portable", sources=sources)


def test_a_link_in_the_temporary_directory_is_refused(sources, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECOQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    private(tmp_path).symlink_to(target)
    with pytest.raises(BuildError, match="another user could have written it"):
        build.library("portable", sources=sources)
    assert list(target.iterdir()) == []


def test_what_another_user_owns_is_refused(sources, monkeypatch, tmp_path):
    path = build.library("portable", sources=sources)
    status = path.lstat()
    monkeypatch.setattr(build.os, "getuid", lambda: status.st_uid + 1)
    if status.st_uid == 0:  # root is trusted: it could do anything anyway
        build._check_private(path)
    else:
        with pytest.raises(PermissionError, match="another user"):
            build._check_private(path)
    values = list(status)
    values[stat.ST_UID] = 4321
    monkeypatch.setattr(pathlib.Path, "lstat", lambda self: os.stat_result(values))
    with pytest.raises(PermissionError, match="another user"):
        build._check_private(path)


def test_a_library_that_others_may_write_is_built_anew(sources, compiler):
    counting = compiler()
    path = build.library("portable", sources=sources)
    path.chmod(0o777)
    before = os.umask(0)  # a careless umask must not leave it so again, which would build at every start
    try:
        assert build.library("portable", sources=sources) == path
    finally:
        os.umask(before)
    assert len(counting.calls) == 6
    assert not path.stat().st_mode & 0o022


# --------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_library_is_built_anew(kept, sources, compiler):
    """The loader would die of it: by SIGBUS, not by an error."""
    counting = compiler()
    path = build.library("portable", sources=sources)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert build.load("portable", sources=sources).decoquant_answer() == 42
    assert len(counting.calls) == 6


def test_a_library_that_does_not_load_is_built_anew_once(sources, compiler):
    counting = compiler()
    path = build.library("portable", sources=sources)
    path.write_bytes(b"of another machine" + build._COMPLETE)
    assert build.load("portable", sources=sources).decoquant_answer() == 42
    assert len(counting.calls) == 6


def test_a_library_that_never_loads(sources, compiler, fresh):
    counting = compiler()
    (sources / "twice.cpp").write_text(
        'extern "C" int elsewhere(); extern "C" int decoquant_twice() { return elsewhere(); }'
    )
    with pytest.raises(BuildError, match=r"do not load: .*undefined symbol: elsewhere.*DECOQUANT_CACHE_DIR"):
        build.load("portable", sources=sources)
    assert len(counting.calls) == 6
    (sources / "twice.cpp").write_text(TWICE)
    assert build.load("portable", sources=sources).decoquant_twice(2) == 4


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", ["/nonexistent/g++", "no-such-compiler --version", "'"])
def test_missing_compiler(value, sources, monkeypatch):
    monkeypatch.setenv("CXX", value)
    with pytest.raises(BuildError) as caught:
        build.library("portable", sources=sources)
    message = str(caught.value)
    assert f"CXX={value!r}" in message
    assert "apt install g++" in message
    assert "dnf install gcc-c++" in message
    assert "set CXX" in message


def test_no_compiler_on_the_path(sources, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"no C\+\+ compiler found \(g\+\+, c\+\+, clang\+\+\): install g\+\+"):
        build.library("portable", sources=sources)


def test_a_library_built_before_serves_without_a_compiler(sources, monkeypatch, tmp_path):
    path = build.library("portable", sources=sources)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.library("portable", sources=sources) == path
    assert build.load("portable", sources=sources).decoquant_answer() == 42
    with pytest.raises(BuildError, match="no C"):
        build.library("portable", sources=sources, extra=("-DOTHER",))


def test_cxx_may_hold_arguments(sources, monkeypatch, compiler):
    counting = compiler()
    monkeypatch.setenv("CXX", f"{counting.path} -DARGUMENT")
    build.library("portable", sources=sources)
    assert len(counting.calls) == 3
    assert all(call.startswith("-DARGUMENT ") for call in counting.calls)


def test_a_compiler_named_relative_to_the_working_directory(sources, monkeypatch, compiler):
    counting = compiler()
    monkeypatch.chdir(counting.path.parent)
    monkeypatch.setenv("CXX", f"./{counting.path.name}")
    assert build.load("portable", sources=sources).decoquant_answer() == 42


def test_failing_compiler(sources, compiler, fresh):
    counting = compiler()
    (sources / "answer.cpp").write_text("#error this cannot be compiled\n")
    with pytest.raises(BuildError) as caught:
        build.library("portable", sources=sources)
    message = str(caught.value)
    assert str(counting.path) in message
    assert "-std=c++17 -O3 -ffp-contract=off" in message
    assert "answer.cpp:1:2: error: " in message
    assert "this cannot be compiled" in message
    assert "apt install g++" in message
    assert list(fresh.iterdir()) == []


def test_long_output_is_trimmed(sources, compiler):
    compiler("yes error | head -c 100000 >&2; exit 3")
    with pytest.raises(BuildError, match=r"fails \(3\)(.|\n)*\(\d+ more characters\)") as caught:
        build.library("portable", sources=sources)
    assert len(str(caught.value)) < 6000


def test_failing_linker(sources, compiler, fresh):
    compiler('case "$*" in *-shared*) echo "no linker" >&2; exit 1;; esac')
    with pytest.raises(BuildError, match=r"-shared .*\nno linker"):
        build.library("portable", sources=sources)
    assert list(fresh.iterdir()) == []


def test_a_compiler_that_cannot_run(sources, compiler):
    counting = compiler()
    counting.path.write_bytes(b"\x7fELF no program")
    with pytest.raises(BuildError, match=r"does not start: .*Exec format error.*install g\+\+"):
        build.library("portable", sources=sources)


def test_a_compiler_that_hangs_is_ended_with_its_children(sources, compiler, monkeypatch, tmp_path, fresh):
    monkeypatch.setattr(build, "TIMEOUT", 0.5)
    compiler(f"sh -c 'echo $$ >> {tmp_path}/children; sleep 60'")
    start = time.monotonic()
    with pytest.raises(BuildError, match=r"took more than 0\.5 s"):
        build.library("portable", sources=sources)
    assert time.monotonic() - start < 20
    children = (tmp_path / "children").read_text().split()
    assert len(children) == 2
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert list(fresh.iterdir()) == []


def is_running(pid):
    try:
        return "(zombie)" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_no_sources(tmp_path):
    with pytest.raises(BuildError, match=r"no C\+\+ sources in .*reinstall"):
        build.library("portable", sources=tmp_path / "nowhere")


def test_unknown_level(sources):
    with pytest.raises(ValueError, match="level is 'sse', expected amx, avx512, avx2, portable"):
        build.library("sse", sources=sources)


# --------------------------------------------------------------------------------------------------------------- levels

ICE_LAKE = "fpu sse2 avx avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512cd avx512vbmi avx512_vbmi2 avx512_vnni"
ZEN_4 = f"{ICE_LAKE} avx512_bf16 avx512ifma avx512_bitalg avx512_vpopcntdq"
SAPPHIRE_RAPIDS = f"{ICE_LAKE} avx512_bf16 amx_bf16 amx_tile amx_int8"
CASCADE_LAKE = "fpu sse2 avx avx2 fma f16c avx512f avx512dq avx512bw avx512vl avx512cd avx512_vnni"
HASWELL = "fpu sse2 avx avx2 fma f16c"
NEHALEM = "fpu sse2 sse4_2 popcnt"


def cpu(monkeypatch, tmp_path, features, machine="x86_64"):
    listing = tmp_path / "cpuinfo"
    listing.write_text(
        f"processor\t: 0\nflags\t\t: {features}\nvmx flags\t: vnmi\nprocessor\t: 1\nflags\t\t: {features}\n"
    )
    monkeypatch.setattr(build, "_CPUINFO", listing)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "amx_granted", lambda: True)


@pytest.mark.parametrize(
    ("features", "machine", "expected"),
    [
        (SAPPHIRE_RAPIDS, "x86_64", "amx"),
        (ICE_LAKE, "x86_64", "avx512"),
        (ZEN_4, "x86_64", "avx512"),
        (ZEN_4, "AMD64", "avx512"),
        (CASCADE_LAKE, "x86_64", "avx2"),  # no VBMI
        (HASWELL, "x86_64", "avx2"),
        (HASWELL.replace(" f16c", ""), "x86_64", "portable"),
        (NEHALEM, "x86_64", "portable"),
        ("", "x86_64", "portable"),
        (ZEN_4, "aarch64", "portable"),
    ],
)
def test_detect(features, machine, expected, monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, features, machine)
    assert build.detect() == expected


def test_detect_on_arm(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, "", "aarch64")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd aes avx2 fma f16c\nCPU part\t: 0xd0c\n")
    assert build.detect() == "portable"


def test_detect_without_cpuinfo(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, ZEN_4)
    (tmp_path / "cpuinfo").unlink()
    assert build.detect() == "portable"


@pytest.mark.parametrize("level", ["avx512", "avx2", "portable"])
def test_a_level_can_be_forced(level, monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, ZEN_4)
    monkeypatch.setenv("DECOQUANT_CPU", level)
    assert build.detect() == level


def test_amx_needs_the_permission_of_the_system(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, SAPPHIRE_RAPIDS)
    monkeypatch.setattr(build, "amx_granted", lambda: False)
    assert build.detect() == "avx512"
    build.detect.cache_clear()
    monkeypatch.setenv("DECOQUANT_CPU", "amx")
    with pytest.raises(ValueError, match=r"'amx': the system does not let this process .*; set it to avx512 or avx2"):
        build.detect()


def test_an_unknown_level_is_refused(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, ZEN_4)
    monkeypatch.setenv("DECOQUANT_CPU", "AVX2")
    with pytest.raises(ValueError, match=r"DECOQUANT_CPU='AVX2': expected amx, avx512, avx2, portable; .*unset it"):
        build.detect()


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, CASCADE_LAKE)
    monkeypatch.setenv("DECOQUANT_CPU", "avx512")
    with pytest.raises(
        ValueError, match=r"'avx512': this CPU lacks avx512vbmi; set it to avx2 or portable, or unset it"
    ):
        build.detect()


def test_an_empty_setting_is_none(monkeypatch, tmp_path):
    cpu(monkeypatch, tmp_path, HASWELL)
    monkeypatch.setenv("DECOQUANT_CPU", "")
    assert build.detect() == "avx2"
