"""Confinement of the process that runs a solution, enforced by the kernel.

    limits         CPU seconds, memory, no bytes written to files, no core dump, few open files
    Landlock       no file is created, changed or deleted, and only Python's own and the system's libraries are read
    seccomp        no socket, no process, no other program, no signal to another process, no change of the limits, nor
                   of the modes, owners and times of files
    namespace      no network, where there is no seccomp

Only the limits exist everywhere. Landlock needs Linux 5.13, the filter of system calls x86-64 or AArch64. What a kernel
or a container refuses is left out, and `confine` says what is in force. Nothing needs privileges. Imports nothing but
the standard library, as it runs in the process of the solution.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Sequence

LANDLOCK, SECCOMP, NAMESPACE = "landlock", "seccomp", "namespace"

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CLONE_THREAD, _CLONE_NEWUSER, _CLONE_NEWNET = 0x10000, 0x10000000, 0x40000000
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x50000, 0x80000000
_EPERM, _ENOSYS = 1, 38
_MAX_OPEN_FILES = 64

# Names as in the kernel's tables; numbers of x86-64 and AArch64 (None: it does not exist there).
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "sendto": (44, 206), "bind": (49, 200),
    "listen": (50, 201), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setrlimit": (160, 164),
    "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122),
    "setsid": (112, 157), "setns": (308, 268), "unshare": (272, 97), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "personality": (135, 92), "memfd_create": (319, 279),
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104), "reboot": (169, 142),
    "swapon": (167, 224), "sched_setattr": (314, 274), "sched_setparam": (142, 118), "ioprio_set": (251, 30),
    "truncate": (76, 45), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}  # fmt: skip
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CLONE, _CLONE3, _PRLIMIT64, _TGKILL, _FCNTL = (56, 220), (435, 435), (302, 261), (234, 131), (72, 25)
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15
_X32_BIT = 0x40000000

# Landlock: rights of files by the version that has brought them; numbers of its system calls are the same everywhere.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
_NEWEST_RIGHTS = 16


def confine(seconds: float, memory_bytes: int) -> list[str]:
    """Confine this process for good; return what is in force besides the limits.

    Args:
        seconds: CPU time, rounded up to full seconds.
        memory_bytes: Address space.
    """
    _limit(resource.RLIMIT_CPU, int(seconds) + 1)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, _MAX_OPEN_FILES)
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return []
    found = [LANDLOCK] if _restrict_files(libc, _readable()) else []
    if _filter_calls(libc):
        return [*found, SECCOMP]
    _limit(resource.RLIMIT_NPROC, 0)  # the superuser is exempt from it
    if not libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) or not libc.unshare(_CLONE_NEWNET):
        found.append(NAMESPACE)
    return found


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def _readable() -> list[str]:
    """Folders and devices that a solution may read: what Python and its libraries consist of."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(os.path.isdir, sys.path)}
    return [*sorted(own), "/usr", "/lib", "/lib64", "/etc", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]


def _restrict_files(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Allow this process to read ``readable`` and nothing else; return whether the kernel does that."""
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = struct.pack("Q", 2 ** _RIGHTS_OF_VERSION.get(version, _NEWEST_RIGHTS) - 1)
    ruleset = libc.syscall(_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            rights = _EXECUTE | _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE | _WRITE_FILE
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            rule = struct.pack("=Qi", rights, descriptor)
            libc.syscall(_ADD_RULE, ruleset, 1, rule, 0)
            os.close(descriptor)
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("if_true", ctypes.c_ubyte),
        ("if_false", ctypes.c_ubyte),
        ("value", ctypes.c_uint),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def _filter_calls(libc: ctypes.CDLL) -> bool:
    """Have the kernel refuse the system calls of `_REFUSED`; return whether it does that."""
    if platform.machine() not in _MACHINES:
        return False
    column, architecture = _MACHINES[platform.machine()]
    program = call_filter(column, architecture, os.getpid())
    array = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    whole = _Program(len(program), array)
    return bool(libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(whole), 0, 0) == 0)


def call_filter(column: int, architecture: int, process: int) -> list[tuple[int, int, int, int]]:
    """Return a program of the kernel's packet filter over (call number, architecture, arguments).

    Args:
        column: Column of the tables of call numbers.
        architecture: AUDIT_ARCH of the machine; a call of another one ends the process.
        process: This process, which may send itself signals.
    """
    load, equal, masked, ret, at_least = 0x20, 0x15, 0x45, 0x06, 0x35
    number, arch, argument_0, argument_1, argument_2 = (
        0,
        4,
        16,
        24,
        32,
    )  # offsets in struct seccomp_data; arguments have 8 bytes
    refuse = (ret, 0, 0, _ERRNO | _EPERM)
    allow = (ret, 0, 0, _ALLOW)
    program = [
        (load, 0, 0, arch),
        (equal, 1, 0, architecture),
        (ret, 0, 0, _KILL),
        (load, 0, 0, number),
        (at_least, 0, 1, _X32_BIT),
        (ret, 0, 0, _KILL),
    ]
    for numbers in _REFUSED.values():
        if (refused := numbers[column]) is not None:
            program += [(equal, 0, 1, refused), refuse]
    # A new thread, which clone makes with a flag, is no process. clone3 hides its flags in memory; libraries fall back.
    program += [(equal, 0, 1, _CLONE3[column]), (ret, 0, 0, _ERRNO | _ENOSYS)]
    program += [(equal, 0, 4, _CLONE[column]), (load, 0, 0, argument_0), (masked, 0, 1, _CLONE_THREAD), allow, refuse]
    # A process may read its limits, and send itself a signal, as abort() does.
    program += [(equal, 0, 6, _PRLIMIT64[column])]
    program += [
        (load, 0, 0, argument_2),
        (equal, 0, 3, 0),
        (load, 0, 0, argument_2 + 4),
        (equal, 0, 1, 0),
        allow,
        refuse,
    ]
    program += [(equal, 0, 4, _TGKILL[column]), (load, 0, 0, argument_0), (equal, 0, 1, process), allow, refuse]
    # A file may have the kernel signal another process when it becomes readable.
    program += [(equal, 0, 6, _FCNTL[column]), (load, 0, 0, argument_1), (equal, 2, 0, _F_SETOWN)]
    program += [(equal, 1, 0, _F_SETSIG), (equal, 0, 1, _F_SETOWN_EX), refuse, allow]
    return [*program, allow]
