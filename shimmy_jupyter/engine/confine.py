"""Takes away from this process what reading a model's file does not need.

A boundary against accidents, and against code that a hostile file gets to run in this process. With
"seccomp" that can write no file, start no program and no process, open no connection, and send no
signal to another process; with "limits" it has no more memory and processor time than it was given;
with "landlock" it reads nothing but the files that it is for, Python and system libraries. Without
Landlock it reads all that the user can. Without seccomp (elsewhere than on Linux on x86_64 and
aarch64) there is no boundary: what the user may do, it may.

It is none against a flaw in the kernel: no namespace, no virtual machine. It does not hide who
guesses a path whether there is a file, how large and how old. It does not count threads. And what
the process says through the descriptors that it keeps can be any lie: first of all, that all is well.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import signal
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 1, 4, 38
_SPARE_ADDRESSES = 4 << 30
"""Addresses beside memory: malloc's arenas and threads' stacks reserve some, for later."""
_WITHOUT_PROC = 256 << 20
_MARGIN = 512 << 20
"""So much more than there may be must not be had."""
_SPARE_FILES = 64
_GRACE_SECONDS = 5
"""Of processor time between the signal that can be ignored and the one that cannot."""


def die_with_parent(parent: int) -> None:
    """This process is killed when the thread that started it ends; at once where process `parent`
    has ended already. Nothing but Linux can do so.
    """
    if _LINUX:
        _libc().prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def confine(files: Sequence[Path], *, memory_bytes: int, cpu_seconds: int) -> tuple[str, ...]:
    """Confine this process for good to reading `files`, with so much memory beyond what it has now.
    Raises OSError where one of them is not there.

    Returns what is in force, each tried out: "limits" (memory, processor time, size and number of
    files), "landlock N" (N says what for: from 4 on TCP, from 6 on signals and abstract sockets too),
    "seccomp". On macOS only "cpu limit". What the system lacks is left out, and so is Landlock
    where another thread was there before.
    """
    held = [_limit(files, memory_bytes, cpu_seconds)]
    if _LINUX:
        libc, machine = _libc(), os.uname().machine
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            with contextlib.suppress(OSError):
                held.append(_landlock(files))
            if machine in _MACHINES and struct.calcsize("P") == 8:
                with contextlib.suppress(OSError):
                    held.append(_seccomp(machine))
    return tuple(name for name in held if name)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return libc


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call by its number. Raises OSError."""
    typed = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in arguments]
    found = int(_libc().syscall(ctypes.c_long(number), *typed))
    if found < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return found


# Limits


def _limit(files: Sequence[Path], memory_bytes: int, cpu_seconds: int) -> str:
    import resource

    def lower(kind: int, soft: int, hard: int) -> None:
        most = resource.getrlimit(kind)[1]
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        resource.setrlimit(kind, (soft, hard))

    lower(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + _GRACE_SECONDS)
    lower(resource.RLIMIT_CORE, 0, 0)
    lower(resource.RLIMIT_FSIZE, 0, 0)
    count = _SPARE_FILES + 2 * len(files)
    lower(resource.RLIMIT_NOFILE, count, count)
    if not _LINUX:
        return "cpu limit"
    size, data = _used()
    mapped = sum(path.stat().st_size for path in files)
    # DATA is memory proper, but for some that only the filter forbids; that is in AS, with much else.
    most = min(data + memory_bytes, 1 << 60)
    lower(resource.RLIMIT_DATA, most, most)
    most = min(size + memory_bytes + mapped + _SPARE_ADDRESSES, 1 << 61)
    lower(resource.RLIMIT_AS, most, most)
    return "limits" if _without_privileges() and _memory_ends(memory_bytes) else ""


def _used() -> tuple[int, int]:
    """Bytes of all addresses, and of those that are this process's own to write."""
    try:
        fields = Path("/proc/self/statm").read_text().split()
    except OSError:  # no /proc is mounted: about what it is
        return _WITHOUT_PROC, _WITHOUT_PROC
    return int(fields[0]) * mmap.PAGESIZE, int(fields[5]) * mmap.PAGESIZE


def _memory_ends(memory_bytes: int) -> bool:
    """Some sandboxes take limits, and do not keep them."""
    try:
        mmap.mmap(-1, memory_bytes + _MARGIN, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError):
        return True
    return False


def _without_privileges() -> bool:
    """Give up root's privileges, which could raise limits again, but reading any file."""
    libc, kept = _libc(), 1 << 2  # CAP_DAC_READ_SEARCH
    header = struct.pack("=Ii", 0x20080522, 0)
    sets = ctypes.create_string_buffer(24)
    if libc.capget(header, sets):
        return False
    permitted = struct.unpack("=6I", sets.raw)[1] & kept
    return bool(libc.capset(header, struct.pack("=6I", permitted, permitted, 0, 0, 0, 0)) == 0)


# Landlock

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FS_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
"""By the version that they came with, as later rights are unknown to earlier kernels."""
_TCP = _SCOPES = 3
_KNOWN = 6
_LIBS = ("lib", "lib64")


def _landlock(files: Sequence[Path]) -> str:
    """Raises OSError where it is not there, or cannot let the files be read."""
    version = min(_KNOWN, _call(_CREATE_RULESET, None, 0, 1))
    handled = sum(rights for since, rights in _FS_RIGHTS.items() if since <= version)
    fields = [handled, *([_TCP] if version >= 4 else []), *([_SCOPES] if version >= 6 else [])]
    asked = struct.pack(f"={len(fields)}Q", *fields)
    rules = _call(_CREATE_RULESET, asked, len(asked), 0)
    try:
        for path in files:
            _allow(rules, path)
        for path in _libraries():
            with contextlib.suppress(OSError):
                _allow(rules, path)
        alone = sum(1 for _ in Path("/proc/self/task").iterdir()) == 1
        _call(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)
    # The restriction is that of a thread, and those that it starts.
    return f"landlock {version}" if alone and _refused("/") else ""


def _allow(rules: int, path: Path) -> None:
    at = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rights = _READ_FILE | (_READ_DIR if path.is_dir() else 0)
        _call(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, at), 0)
    finally:
        os.close(at)


def _refused(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY))
    except PermissionError:
        return True
    return False


def _libraries() -> Iterator[Path]:
    """What Python and native libraries may open later on. No folder that people keep things in: of
    the module search path only the parts that are for installed packages.
    """
    found = [str(Path(os.__file__).parent)]
    found += [f"{prefix}/{lib}" for prefix in (sys.base_prefix, sys.prefix) for lib in _LIBS]
    found += [entry for entry in sys.path if Path(entry).name in {"site-packages", "dist-packages"}]
    for name, module in list(sys.modules.items()):
        if "." not in name:
            found += getattr(module, "__path__", ())
    found += (
        "/lib /lib64 /usr/lib /usr/lib64 /usr/local/lib /etc/ld.so.cache /etc/localtime "
        "/usr/share/zoneinfo /usr/share/locale /proc/self /proc/meminfo /proc/cpuinfo /proc/stat "
        "/sys/devices/system/cpu /sys/devices/system/node /dev/null /dev/urandom"
    ).split()
    return (Path(entry) for entry in dict.fromkeys(found) if entry != "/")


# seccomp

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""The column of its system calls' numbers below, and what the kernel calls it."""
_NEWEST = 462
"""Calls with higher numbers are not there, as on a kernel of 2024: nobody has looked at them."""
_DENIED = """
socket:41:198 socketpair:53:199 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242
execve:59:221 execveat:322:281 fork:57:- vfork:58:- setsid:112:157 setpgid:109:154 unshare:272:97
setns:308:268 ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 kcmp:312:272
process_madvise:440:440 process_mrelease:448:448 pidfd_open:434:434 pidfd_getfd:438:438
pidfd_send_signal:424:424 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240 setpriority:141:140
ioprio_set:251:30 sched_setparam:142:118 sched_setscheduler:144:119 sched_setattr:314:274
migrate_pages:256:238 move_pages:279:239 chroot:161:51 pivot_root:155:41 mount:165:40 umount2:166:39
swapon:167:224 swapoff:168:225 open_tree:428:428 move_mount:429:429 fsopen:430:430 fsconfig:431:431
fsmount:432:432 fspick:433:433 mount_setattr:442:442 bpf:321:280 perf_event_open:298:241
userfaultfd:323:282 keyctl:250:219 add_key:248:217 request_key:249:218 open_by_handle_at:304:265
name_to_handle_at:303:264 io_uring_setup:425:425 io_uring_enter:426:426 io_uring_register:427:427
io_setup:206:0 io_submit:209:2 init_module:175:105 finit_module:313:273 delete_module:176:106
kexec_load:246:104 kexec_file_load:320:294 reboot:169:142 iopl:172:- ioperm:173:- modify_ldt:154:-
personality:135:92 settimeofday:164:170 clock_settime:227:112 adjtimex:159:171 clock_adjtime:305:266
sethostname:170:161 setdomainname:171:162 acct:163:89 syslog:103:116 quotactl:179:60
quotactl_fd:443:443 vhangup:153:58 sync:162:81 syncfs:306:267 lsm_set_self_attr:460:460
setuid:105:146 setgid:106:144 setreuid:113:145 setregid:114:143 setresuid:117:147 setresgid:119:149
setgroups:116:159 setfsuid:122:151 setfsgid:123:152 capset:126:91 memfd_create:319:279
memfd_secret:447:447 shmget:29:194 shmat:30:196 shmctl:31:195 semget:64:190 semop:65:193
semctl:66:191 semtimedop:220:192 msgget:68:186 msgsnd:69:189 msgrcv:70:188 msgctl:71:187
mq_open:240:180 mq_unlink:241:181 mq_timedsend:242:182 mq_timedreceive:243:183 mq_notify:244:184
mq_getsetattr:245:185 splice:275:76 vmsplice:278:75 tee:276:77 fanotify_init:300:262
inotify_init:253:- inotify_init1:294:26 creat:85:- truncate:76:45 ftruncate:77:46 fallocate:285:47
rename:82:- renameat:264:38 renameat2:316:276 link:86:- linkat:265:37 symlink:88:- symlinkat:266:36
unlink:87:- unlinkat:263:35 rmdir:84:- mkdir:83:- mkdirat:258:34 mknod:133:- mknodat:259:33
chmod:90:- fchmod:91:52 fchmodat:268:53 fchmodat2:452:452 chown:92:- lchown:94:- fchown:93:55
fchownat:260:54 utime:132:- utimes:235:- futimesat:261:- utimensat:280:88 setxattr:188:5
lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16
flock:73:32 uselib:134:- lookup_dcookie:212:18 nfsservctl:180:42
"""
"""System calls with their numbers on x86_64 and aarch64."""
_ABSENT = "clone3:435:435 openat2:437:437"
"""Their arguments cannot be seen from a filter; libraries do without where they are not there."""

_OWN = -1
"""Stands for this process's number."""
_CLONES = 0x10000 | 0x20000 | 0x7E000000  # CLONE_THREAD, and all kinds of namespaces
_CHECKED: dict[str, tuple[int, int, tuple[int, ...]]] = {
    # A thread of this process.
    "clone:56:220": (0, _CLONES, (0x10000,)),
    # To read: O_ACCMODE, O_CREAT and O_TRUNC are all 0.
    "open:2:-": (1, 0o1103, (0,)),
    "openat:257:56": (2, 0o1103, (0,)),
    # Terminals' settings and size, FIONREAD, FIONBIO, FIOCLEX and FIONCLEX.
    "ioctl:16:29": (
        1, 0xFFFFFFFF, (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5451, 0x5450),
    ),
    # The name, dumps, vectors' length, tagged addresses and names of memory; no filter taken off.
    "prctl:157:167": (
        0, 0xFFFFFFFF, (3, 15, 16, 21, 23, 38, 39, 50, 51, 55, 56, 0x53564D41),
    ),
    # No memory that does not count as data: shared without a file, or a stack that grows.
    "mmap:9:222": (3, 0x121, (0, 0x01, 0x20)),
    # Duplicates and flags; no signal to whom it likes when there is something to read.
    "fcntl:72:25": (1, 0xFFFFFFFF, (0, 1, 2, 3, 4, 1030, 1032)),
    "kill:62:129": (0, 0xFFFFFFFF, (_OWN,)),
    "tkill:200:130": (0, 0xFFFFFFFF, (_OWN,)),
    "tgkill:234:131": (0, 0xFFFFFFFF, (_OWN,)),
    "prlimit64:302:261": (0, 0xFFFFFFFF, (0,)),
    "sched_setaffinity:203:122": (0, 0xFFFFFFFF, (0,)),
}  # fmt: skip
"""Calls that depend on an argument: its index, the bits that count, and what these may be."""

_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _AND, _EQUAL, _GREATER, _RETURN = 0x20, 0x54, 0x15, 0x25, 0x06
_Code = tuple[int, int, int, int]


def program(machine: str, pid: int) -> tuple[_Code, ...]:
    """The filter for process `pid`: BPF instructions (code, jump if true, jump if false, operand)."""
    column, architecture = _MACHINES[machine]

    def numbers(calls: Iterable[str]) -> Iterator[tuple[str, int]]:
        for call in calls:
            number = call.split(":")[1 + column]
            if number != "-":
                yield call, int(number)

    denied, absent = _ERROR | errno.EPERM, _ERROR | errno.ENOSYS
    code: list[_Code] = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0), (_GREATER, 0, 1, _NEWEST), (_RETURN, 0, 0, absent),
    ]  # fmt: skip
    for calls, answer in ((_DENIED, denied), (_ABSENT, absent)):
        for _, number in numbers(calls.split()):
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, answer)]
    for call, number in numbers(_CHECKED):
        argument, mask, allowed = _CHECKED[call]
        rule: list[_Code] = [(_LOAD, 0, 0, 16 + 8 * argument), (_AND, 0, 0, mask)]
        for value in allowed:
            wanted = pid if value == _OWN else value
            rule += [(_EQUAL, 0, 1, wanted), (_RETURN, 0, 0, _ALLOW)]
        rule.append((_RETURN, 0, 0, denied))
        code += [(_EQUAL, 0, len(rule), number), *rule]
    return (*code, (_RETURN, 0, 0, _ALLOW))


def _seccomp(machine: str) -> str:
    """For all threads. Raises OSError where it is not there."""
    code = program(machine, os.getpid())
    body = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in code))
    filter = struct.pack("=H6xQ", len(code), ctypes.addressof(body))
    every_thread, set_filter = 1, 1
    # Answers with the number of a thread that cannot have it.
    if _call({"x86_64": 317, "aarch64": 277}[machine], set_filter, every_thread, filter) != 0:
        return ""
    at = int(_libc().socket(1, 1, 0))
    if at < 0:
        return "seccomp" if ctypes.get_errno() == errno.EPERM else ""
    os.close(at)
    return ""
