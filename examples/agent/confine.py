"""Confines this process to a folder, without network, then becomes the program to run.

    python confine.py WRITABLE[:WRITABLE…] READABLE[:READABLE…] PROGRAM [ARGUMENT…]

Landlock (Linux 5.13 or newer) lets it write in the writable folders alone, and read in those, in the readable ones and
in the system's; a seccomp filter refuses new sockets, and new sessions and process groups, so that killing the program's group
kills all that it started. Nothing of it needs privileges. What must stay true: if any of it cannot be set up, the
program does not run, and the exit status is 125 with the reason on standard error.
"""

import ctypes
import os
import platform
import resource
import struct
import sys

REFUSED = 125
MAX_SECONDS = 30
MAX_MEMORY_BYTES = 1 << 30
MAX_FILE_BYTES = 1 << 20

SYSTEM_FOLDERS = ["/usr", "/lib", "/lib64", "/bin", "/proc"]
SYSTEM_FILES = ["/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/mime.types", "/dev/urandom"]

# linux/landlock.h; the last right of each ABI version.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
READ = EXECUTE | READ_FILE | READ_DIR
FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | 1 << 15

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
IO_URING_SETUP = 425
# Machine to its audit number and the numbers of socket, setpgid and setsid.
SYSCALLS = {"x86_64": (0xC000003E, (41, 109, 112)), "aarch64": (0xC00000B7, (198, 154, 157))}

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources():
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, MAX_FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def confine_to_folders(writable, readable):
    abi = check(libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1), "no Landlock in this kernel")
    rights = RIGHTS_OF_ABI[min(abi, max(RIGHTS_OF_ABI))]
    attribute = struct.pack("=Q", rights)
    ruleset = check(libc.syscall(LANDLOCK_CREATE_RULESET, attribute, len(attribute), 0), "Landlock rules")
    allowed = [(path, READ) for path in [*SYSTEM_FOLDERS, *SYSTEM_FILES, *readable]]
    allowed += [(path, rights) for path in writable]
    allowed.append(("/dev/null", READ_FILE | WRITE_FILE))
    for path, access in allowed:
        if not os.path.exists(path):
            continue
        access &= rights if os.path.isdir(path) else rights & FILE_RIGHTS
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", access, handle)
        check(libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0), f"Landlock rule of {path}")
        os.close(handle)
    check(libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def refuse_system_calls():
    machine = platform.machine()
    if machine not in SYSCALLS:
        raise OSError(f"no system call numbers are known for {machine}")
    architecture, refused = SYSCALLS[machine]
    refused = (*refused, IO_URING_SETUP)
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050000 | 13
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Numbers of another calling convention (x32), then the list. A jump skips what is left of it, and `allow`.
    program.append((at_least, len(refused) + 1, 0, 0x40000000))
    program += [(equal, len(refused) - at, 0, number) for at, number in enumerate(refused)]
    program += [(give, 0, 0, allow), (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filters = struct.pack("@HP", len(program), ctypes.addressof(code))
    check(libc.prctl(PR_SET_SECCOMP, 2, filters, 0, 0), "seccomp")


def main():
    writable, readable, program = sys.argv[1].split(":"), sys.argv[2].split(":"), sys.argv[3:]
    try:
        limit_resources()
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        confine_to_folders(writable, readable)
        refuse_system_calls()
    except OSError as wrong:
        print(wrong.strerror or wrong, file=sys.stderr)
        sys.exit(REFUSED)
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
