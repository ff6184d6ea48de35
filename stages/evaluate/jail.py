"""Run by `sandbox` in a process of its own: give up every right that a small program does not need, then run the program.

Standard library alone: it runs as a script, by an interpreter that sees no installed packages. Linux, x86_64 and aarch64.

- Capabilities are dropped, so that limits hold for root too.
- Limits (setrlimit): address space, CPU time, size of a file, open files, no core dumps.
- Landlock (kernel 5.13): files can be read below Python's library and the system's, and used in the working directory, and
  nowhere else; this process's parent is out of sight in /proc too.
- seccomp: no sockets, no new processes (threads can start), no other programs, no signals, no tracing, no shared memory that
  outlives the process, no changes of modes, owners and times, none of the kernel's rarer interfaces.

It does not defend against faults of the kernel, nor against a program that looks for the interpreter's own frames.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import sys
import sysconfig
from ctypes import POINTER, Structure, byref, c_int, c_int32, c_ubyte, c_uint32, c_uint64, c_ushort

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 24, 38, 22, 2
SIGKILL = 9

LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, PATH_BENEATH = 1, 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL = 1 << 14, 1 << 15
RIGHTS_BY_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many kinds of access each version of Landlock knows; from the fifth on one more."""

CAPSET = {"x86_64": 126, "aarch64": 91}
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
CLONE_THREAD = 0x00010000
EPERM, ENOSYS = 1, 38

DENIED = {  # name: (x86_64, aarch64), None where the machine has none
    # the network
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    # other processes and programs; clone is let through for threads alone
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that no limit counts, or that stays behind
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # what Landlock does not watch
    "truncate": (76, 45),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setxattrat": (463, 463),
    "removexattrat": (466, 466),
    "open_by_handle_at": (304, 265),
    # the kernel's rarer interfaces
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "personality": (135, 92),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
CLONE, CLONE3, PRLIMIT = (56, 220), (435, 435), (302, 261)

LIBC = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """This machine cannot hold a program in."""


class Instruction(Structure):
    _fields_ = (("code", c_ushort), ("jt", c_ubyte), ("jf", c_ubyte), ("k", c_uint32))


class Filter(Structure):
    _fields_ = (("len", c_ushort), ("filter", POINTER(Instruction)))


class Ruleset(Structure):
    _fields_ = (("handled_access_fs", c_uint64),)


class Rule(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed_access", c_uint64), ("parent_fd", c_int32))


def check(result: int, what: str) -> int:
    if result < 0:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def machine() -> str:
    name = platform.machine()
    if sys.platform != "linux" or name not in AUDIT_ARCH:
        raise Refused(f"no sandbox for {sys.platform} on {name}")
    return name


def landlock_version() -> int:
    """Raises Refused where the kernel has no Landlock, or it is switched off."""
    return check(LIBC.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION), "the kernel offers no Landlock")


def drop_capabilities() -> None:
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header, none = (c_uint32 * 2)(0x20080522, 0), (c_uint32 * 6)()
    check(LIBC.syscall(CAPSET[machine()], byref(header), byref(none)), "capabilities stay")


def limit(memory: int, cpu: int, file: int) -> None:
    """Bytes of address space, seconds, bytes."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: cpu,
        resource.RLIMIT_FSIZE: file,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for which, most in limits.items():
        resource.setrlimit(which, (most, most))


def readable() -> list[str]:
    """What a program may read outside its directory: the standard library and the shared libraries below it."""
    paths = sysconfig.get_paths()
    wanted = [paths["stdlib"], paths["platstdlib"], "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    wanted += [os.path.join(sys.base_prefix, "lib"), "/dev/urandom", "/dev/null"]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def restrict_files(directory: str) -> None:
    every = (1 << RIGHTS_BY_VERSION.get(landlock_version(), 16)) - 1
    ruleset = Ruleset(every)
    fd = check(LIBC.syscall(LANDLOCK_CREATE_RULESET, byref(ruleset), ctypes.sizeof(ruleset), 0), "Landlock")
    for path in [directory, *readable()]:
        rights = every if path == directory else READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = Rule(rights, opened)
        check(LIBC.syscall(LANDLOCK_ADD_RULE, fd, PATH_BENEATH, byref(rule), 0), f"Landlock for {path}")
        os.close(opened)
    check(LIBC.syscall(LANDLOCK_RESTRICT_SELF, fd, 0), "Landlock")
    os.close(fd)


def rules() -> list[tuple[int, int, int, int]]:
    """The seccomp filter: (code, jump if true, jump if false, constant)."""
    name = machine()
    column = ("x86_64", "aarch64").index(name)
    load, equal, above, both, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny = (give, 0, 0, 0x7FFF0000), (give, 0, 0, 0x00050000 | EPERM)
    found = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[name]), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    if name == "x86_64":
        found += [(above, 0, 1, X32), deny]
    # glibc asks for clone3 first and takes this answer for an older kernel; clone's flags can be looked at.
    found += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, 0x00050000 | ENOSYS)]
    found += [(equal, 0, 4, CLONE[column]), (load, 0, 0, 16), (both, 1, 0, CLONE_THREAD), deny, allow]
    found += [(equal, 0, 4, PRLIMIT[column]), (load, 0, 0, 16), (equal, 1, 0, 0), deny, allow]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            found += [(equal, 0, 1, number), deny]
    return [*found, allow]


def filter_calls() -> None:
    found = rules()
    program = Filter(len(found), (Instruction * len(found))(*(Instruction(*rule) for rule in found)))
    check(LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, byref(program), 0, 0), "seccomp")


def enter(memory: int, cpu: int, file: int) -> None:
    """Give the rights up, for good. Raises Refused where that cannot be done whole."""
    check(LIBC.prctl(PR_SET_PDEATHSIG, c_int(SIGKILL), 0, 0, 0), "death with the parent")
    drop_capabilities()
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    limit(memory, cpu, file)
    restrict_files(os.getcwd())
    filter_calls()


def main() -> None:
    """Read the program and its limits from standard input, run it, and say on the descriptor of `report` how it ended."""
    given = json.loads(sys.stdin.buffer.read())
    os.close(0)
    report, token = given["report"], given["token"]

    def tell(how: str) -> None:
        os.write(report, f"{token} {how}".encode("utf-8", "replace")[:2000])
        os._exit(0)

    try:
        enter(given["memory"], given["cpu"], given["file"])
    except (Refused, OSError, ValueError) as error:
        tell(f"refused {error}")
    program, reason = given.pop("program"), ""
    del given
    try:
        code = compile(program, "program", "exec")
        exec(code, {"__name__": "__main__"})  # nosec B102 # what the jail is for
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        tell(f"failed {reason}")
    tell("passed")


if __name__ == "__main__":
    main()
