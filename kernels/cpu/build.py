"""Delivery of the C++ kernels: built at first use, kept in a per-user cache, loaded with ctypes.

Each instruction-set level has a library of its own. Its file name holds a hash of the sources and flags and a hash of
the compiler, so a directory shared by different machines holds one library for each of them, and a new release never
meets the library of an old one.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, get_args

from decoquant_compile._compat import amx_granted

log = logging.getLogger(__name__)

Level = Literal["amx", "avx512", "avx2", "portable"]
LEVELS: tuple[Level, ...] = get_args(Level)  # best first


class Target(NamedTuple):
    """What a level compiles for.

    Attributes:
        options: compiler options.
        needs: features of the CPU, as /proc/cpuinfo names them.
    """

    options: tuple[str, ...]
    needs: frozenset[str]

    def with_(self, options: Sequence[str], needs: frozenset[str]) -> "Target":
        """This and more."""
        return Target((*self.options, *options), self.needs | needs)


_AVX2: Final = Target(("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"}))
_AVX512: Final = _AVX2.with_(
    ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512vbmi"),
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512vbmi"}),
)

# Never -march=native: the cache may be shared by CPUs that differ. Those with AMX are Intel's, where the order of
# instructions that GCC takes for an unknown CPU costs a twentieth of the speed of attention.
FLAGS: dict[Level, Target] = {
    "amx": _AVX512.with_(("-mamx-tile", "-mamx-int8", "-mtune=icelake-server"), frozenset({"amx_tile", "amx_int8"})),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": Target((), frozenset()),
}

SOURCES = pathlib.Path(__file__).parent
TIMEOUT = 300.0  # seconds that a build may take

_OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC")
# The C interface alone is visible: libraries of several levels in one process must not share templates or statics.
_EXPORTS = "{ global: decoquant_*; local: *; };\n"
_LINK_OPTIONS = ("-shared", "-Wl,--version-script=exports")
# Ends every finished library: opening one whose end is missing (full disk, crash) would kill the process by SIGBUS.
_COMPLETE = b"decoquant: complete"
_WORK = ".decoquant-build-"  # prefix of the directories of builds under way
_ABANDONED = 3600.0  # seconds after which one is nobody's
_OUT_OF_SPACE = ("No space left on device", "Disk quota exceeded")

_FORBIDDEN = "the system does not let this process use the tile registers of AMX"
_CPUINFO = pathlib.Path("/proc/cpuinfo")
_COMPILERS = ("g++", "c++", "clang++")
_INSTALL = "install g++ (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or set CXX to a C++17 compiler"


class BuildError(RuntimeError):
    """The kernels cannot be built or loaded on this machine; the message says why and what to do."""


# ------------------------------------------------------------------------------------------------------------- levels


def _cpu_features() -> frozenset[str]:
    """Features of the CPU as Linux names them; none where they are unknown or of another architecture."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        with _CPUINFO.open(encoding="ascii", errors="replace") as lines:
            listed = next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(listed.partition(":")[2].split())


def usable() -> list[Level]:
    """The levels that this CPU and its system let this process run, best first."""
    features = _cpu_features()
    return [level for level in LEVELS if FLAGS[level].needs <= features and (level != "amx" or amx_granted())]


@functools.lru_cache(maxsize=1)
def detect() -> Level:
    """The best level of this CPU, or the one that the environment variable DECOQUANT_CPU names.

    Raises:
        ValueError: DECOQUANT_CPU is no level, or one that this CPU lacks.
    """
    levels = usable()
    forced = os.environ.get("DECOQUANT_CPU")
    if not forced:
        return levels[0]
    for level in LEVELS:
        if level == forced:
            if level in levels:
                return level
            lacking = " ".join(sorted(FLAGS[level].needs - _cpu_features()))
            reason = f"this CPU lacks {lacking}" if lacking else _FORBIDDEN
            raise ValueError(f"DECOQUANT_CPU={forced!r}: {reason}; set it to {' or '.join(levels)}, or unset it")
    raise ValueError(f"DECOQUANT_CPU={forced!r}: expected {', '.join(LEVELS)}; correct it, or unset it")


# ----------------------------------------------------------------------------------------------------------- compiler


_Identity = tuple[int, int]


def _identity(path: pathlib.Path) -> _Identity | None:
    """Size and time of a file: they change when it is replaced, and are the same on each machine that installs it."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _compiler() -> tuple[str, ...]:
    """The command of the compiler: CXX, which may hold arguments, or the first one found that Inductor would take."""
    if chosen := os.environ.get("CXX", "").strip():
        try:
            command, *arguments = shlex.split(chosen)
        except ValueError as error:
            raise BuildError(f"CXX={chosen!r}: {error}; {_INSTALL}") from None
        if found := shutil.which(command):
            return (os.path.abspath(found), *arguments)  # noqa: PTH100 - links stay: ccache acts by its name
        raise BuildError(f"CXX={chosen!r}: no such program; {_INSTALL}")
    for name in _COMPILERS:
        if found := shutil.which(name):
            return (os.path.abspath(found),)  # noqa: PTH100
    raise BuildError(f"no C++ compiler found ({', '.join(_COMPILERS)}): {_INSTALL}")


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:20]


def _compiler_digest(compiler: tuple[str, ...]) -> str:
    """Tells compilers apart without running them: an update changes the file, through any links."""
    programs = [pathlib.Path(found).resolve() for word in compiler if (found := shutil.which(word))]
    return _digest(compiler, [(str(program), _identity(program)) for program in programs])


# -------------------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class _Recipe:
    """What a library is made of, as read at one time: what is hashed is what is compiled."""

    level: Level
    extra: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...]

    @classmethod
    def read(cls, level: Level, extra: Sequence[str], sources: pathlib.Path) -> "_Recipe":
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}, expected {', '.join(LEVELS)}")
        paths = sorted(sources.glob("*.[ch]pp"))
        if not any(path.suffix == ".cpp" for path in paths):
            raise BuildError(f"no C++ sources in {sources}: reinstall decoquant-compile")
        return cls(level, tuple(extra), tuple((path.name, path.read_bytes()) for path in paths))

    @property
    def compile_options(self) -> tuple[str, ...]:
        return (*_OPTIONS, *FLAGS[self.level].options, *self.extra)

    @property
    def link_options(self) -> tuple[str, ...]:
        return (*self.extra, *_LINK_OPTIONS)

    @property
    def stem(self) -> str:
        """File name of the library up to the compiler."""
        files = [(name, hashlib.sha256(content).digest()) for name, content in self.files]
        options = (self.compile_options, self.link_options, _EXPORTS, platform.machine())
        return f"{self.level}-{_digest(options, files)}-"


def _directories() -> Iterator[pathlib.Path]:
    """Where libraries are kept, best first: the user's cache, then a private directory for read-only homes."""
    with contextlib.suppress(RuntimeError, OSError):  # no home directory is known
        if chosen := os.environ.get("DECOQUANT_CACHE_DIR"):
            yield pathlib.Path(chosen).expanduser().resolve()
        else:
            base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
            base = base if base.is_absolute() else pathlib.Path.home() / ".cache"
            yield (base / "decoquant_compile" / "cpu").resolve()
    with contextlib.suppress(OSError):  # no temporary directory can be written
        yield pathlib.Path(tempfile.gettempdir()).resolve() / f"decoquant_compile-{os.getuid()}"


def _check_private(path: pathlib.Path) -> None:
    """Refuses what another user could have written (root may have): it would run with this user's rights.

    Raises:
        PermissionError: the path is a link, another user's, or writable by others.
        FileNotFoundError: it does not exist.
    """
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
        raise PermissionError(
            f"{path} is not used: another user could have written it; remove it, `chmod go-w` it, "
            "or set DECOQUANT_CACHE_DIR to a directory that you own"
        )


def _is_usable(path: pathlib.Path, broken: set[_Identity]) -> bool:
    """Whether the library exists, is whole, and is none of those that did not load."""
    try:
        _check_private(path)
        with path.open("rb") as file:
            file.seek(-len(_COMPLETE), os.SEEK_END)
            whole = file.read() == _COMPLETE
    except OSError:  # missing, shorter than its mark, or not to be read
        return False
    return whole and _identity(path) not in broken


@contextlib.contextmanager
def _lock(path: pathlib.Path, ready: Callable[[], bool]) -> Iterator[None]:
    """Lets one process build while others wait until `ready`.

    It only saves work: without it (file systems that lack locks, a holder that hangs) several build the same library,
    and the last one to finish replaces it. The file can therefore go as soon as one is done.
    """
    with path.open("ab") as file:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline and not ready():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
            else:
                break
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _provide(recipe: _Recipe, broken: set[_Identity]) -> pathlib.Path:
    """Path of a library that is whole and not in `broken`, built where there is none."""
    compiler: tuple[str, ...] | None = None
    missing: BuildError | None = None
    try:
        compiler = _compiler()
        name = f"{recipe.stem}{_compiler_digest(compiler)}.so"
    except BuildError as error:  # a library built before, say in an earlier stage of a container, serves all the same
        missing = error
        name = f"{recipe.stem}*.so"
    problems = []
    for directory in _directories():
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(directory)
            for path in sorted(directory.glob(name)):
                if _is_usable(path, broken):
                    return path
            if compiler is None:
                continue
            path = directory / name
            usable = functools.partial(_is_usable, path, broken)
            with _lock(path.with_suffix(".lock"), usable):
                if not usable():
                    _build(recipe, compiler, path)
        except OSError as error:  # read-only, full, or another user's: the next one may do
            asked_for = bool(os.environ.get("DECOQUANT_CACHE_DIR"))
            log.log(
                logging.WARNING if asked_for else logging.INFO, "CPU kernels are not kept in %s: %s", directory, error
            )
            problems.append(error)
        else:
            return path
    if missing:
        raise missing
    reasons = "; ".join(map(str, problems))
    raise BuildError(f"no directory can hold the CPU kernels ({reasons}): set DECOQUANT_CACHE_DIR to one that can")


# -------------------------------------------------------------------------------------------------------------- build


class _Step:
    """A compiler at work in a session of its own: the driver and its children end together."""

    def __init__(self, command: Sequence[str], work: pathlib.Path) -> None:
        self.command = command
        self.errors = work / f"{command[-1]}.errors"
        environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(work)}  # English messages; temporary files go too
        with self.errors.open("wb") as errors:
            try:
                self.process = subprocess.Popen(  # noqa: S603 - the user's compiler
                    command,
                    cwd=work,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    start_new_session=True,
                )
            except OSError as error:
                raise BuildError(f"the C++ compiler does not start: {error}; {_INSTALL}") from error

    def finish(self, deadline: float) -> None:
        """Waits for success.

        Raises:
            BuildError: the compiler fails or takes too long.
            OSError: the disk is full.
        """
        try:
            code = self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise BuildError(
                f"building the CPU kernels took more than {TIMEOUT:g} s: {shlex.join(self.command)}; "
                "try again when the machine is less busy, or set CXX to another compiler"
            ) from None
        if code == 0:
            return
        output = self.errors.read_text(errors="replace").strip()
        if any(sign in output for sign in _OUT_OF_SPACE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.errors.parent))
        if len(output) > 4000:
            output = f"{output[:4000]}\n... ({len(output) - 4000} more characters)"
        raise BuildError(
            f"the C++ compiler fails ({code}): {shlex.join(self.command)}\n{output or '(no output)'}\n{_INSTALL}"
        )

    def stop(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _run(commands: Sequence[Sequence[str]], work: pathlib.Path, deadline: float) -> None:
    """Runs commands side by side; none outlives the call."""
    with contextlib.ExitStack() as stack:
        steps = []
        for command in commands:
            steps.append(step := _Step(command, work))
            stack.callback(step.stop)
        for step in steps:
            step.finish(deadline)


def _build(recipe: _Recipe, compiler: tuple[str, ...], path: pathlib.Path) -> None:
    """Compiles and links in a directory of its own beside `path`, then moves the finished library there."""
    _remove_abandoned(path.parent)
    log.info("building the CPU kernels: %s", path)
    deadline = time.monotonic() + TIMEOUT
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=path.parent, ignore_cleanup_errors=True) as name:
        work = pathlib.Path(name)
        for file, content in (*recipe.files, ("exports", _EXPORTS.encode())):
            (work / file).write_bytes(content)
        units = {file: f"{file}.o" for file, _ in recipe.files if file.endswith(".cpp")}
        compiles = [(*compiler, *recipe.compile_options, "-c", unit, "-o", out) for unit, out in units.items()]
        _run(compiles, work, deadline)
        _run([(*compiler, *units.values(), *recipe.link_options, "-o", path.name)], work, deadline)
        built = work / path.name
        with built.open("ab") as library:
            library.write(_COMPLETE)
            library.flush()
            os.fsync(library.fileno())  # before the new name: a crash must not leave the name with half the bytes
        built.chmod(0o755)
        built.replace(path)


def _remove_abandoned(directory: pathlib.Path) -> None:
    """Removes what builds that died left behind."""
    for work in directory.glob(f"{_WORK}*"):
        with contextlib.suppress(OSError):
            if time.time() - work.stat().st_mtime > _ABANDONED:
                shutil.rmtree(work, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- public


def library(level: Level, *, extra: Sequence[str] = (), sources: pathlib.Path = SOURCES) -> pathlib.Path:
    """Path of the shared library of a level, built first where the cache has none.

    The cache is the directory that the environment variable DECOQUANT_CACHE_DIR names, else decoquant_compile/cpu in
    the user's cache; a private one under the temporary directory where that cannot be written. Functions that the
    library offers are ``extern "C"`` and named ``decoquant_*``.

    Args:
        level: instruction set; see `detect`.
        extra: further options for compiling and linking, such as -fsanitize=address.
        sources: directory of the .cpp files and of the .hpp files that they include.

    Raises:
        BuildError: no compiler, a failing one, or no directory that can be written.
    """
    return _provide(_Recipe.read(level, extra, sources), set())


_loaded: dict[tuple[Level, tuple[str, ...], pathlib.Path], ctypes.CDLL] = {}


def load(level: Level, *, extra: Sequence[str] = (), sources: pathlib.Path = SOURCES) -> ctypes.CDLL:
    """The library of a level, loaded once in a process; see `library`.

    A library that does not load (another machine's C library, a damaged file) is built anew once.

    Raises:
        BuildError: it cannot be built, does not load, or could not run.
    """
    key = (level, tuple(extra), sources)
    if key in _loaded:
        return _loaded[key]
    if level == "amx" and not amx_granted():
        raise BuildError(_FORBIDDEN)
    recipe = _Recipe.read(level, extra, sources)
    broken: set[_Identity] = set()
    failure: OSError | None = None
    for _ in range(2):
        path = _provide(recipe, broken)
        identity = _identity(path)
        try:
            # Threads that meet here load the same file, which the loader does once.
            return _loaded.setdefault(key, ctypes.CDLL(str(path)))
        except OSError as error:
            log.info("the CPU kernels do not load: %s", error)
            failure = error
            if identity:
                broken.add(identity)
    raise BuildError(
        f"the CPU kernels do not load: {failure}; if their directory forbids executing files, "
        "set DECOQUANT_CACHE_DIR to another one"
    ) from failure
