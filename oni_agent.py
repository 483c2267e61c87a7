#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["paramiko>=2.12"]
# ///
"""ONI Agent: loads and purges the batches of an Open ONI site on request, over SSH.

Run it on the Open ONI host, as the user that the site runs as, or as root: then it becomes that
user. It listens for SSH, takes commands such as

    ssh -p 2222 nobody@localhost load-batch batch_oru_alpha_ver01

puts them in one queue, runs them one at a time with ONI's own manage.py, and answers each with one
JSON object. `ssh -p 2222 nobody@localhost help` lists the commands; with a terminal (`ssh -t`, or
no command at all) the answers are text. Settings come from the environment:

  ONI_LOCATION     Open ONI's folder, which holds manage.py and ENV/ (required)
  BATCH_SOURCE     the folder whose subfolders are batches (required)
  BA_BIND          where to listen: host:port, [v6]:port, or :port for every address
                   (default 127.0.0.1:2222)
  STATE_DIRECTORY  where jobs, their logs and the host key are kept
                   (default $XDG_STATE_HOME/oni-agent or ~/.local/state/oni-agent, and for an
                   agent that root has started /var/lib/oni-agent)
  HOST_KEY_FILE    the SSH host key, made if missing (default host_key in the state folder)
  ALLOW_FROM       addresses and networks that may connect, separated by commas or blanks
                   (default: all)
  AUTHORIZED_KEYS  an authorized_keys file; with it, only who has one of its keys is admitted
                   (default: anyone)
  ON_FINISH        a program to run after each job, told of it by ONI_JOB_… variables; it is
                   killed after 60 seconds, but not what it has started by setsid (default: none)
  LOG_LEVEL        debug, info, warning or error (default info); the log is on stderr
  DB_CONNECTION    accepted for old units, not needed: ONI's own settings are used

Its callers are administrators and NCA, the Newspaper Curation App, a Go program that loads batches
unattended. An agent written in Go speaks the same protocol: words that look odd here are its words.
"""


import sys

if sys.version_info < (3, 8):  # what follows compiles from Python 3.6 on, and runs from 3.8 on
    sys.stderr.write(
        f"oni_agent: Python 3.8 or newer is needed, and {sys.executable} is Python"
        f" {sys.version_info[0]}.{sys.version_info[1]}; install a newer one beside it, and start"
        " the agent with that.\n"
    )
    sys.exit(2)  # EXIT_HOPELESS

import argparse
import ast
import base64
import collections
import contextlib
import copy
import ctypes
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import inspect
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import pwd
import queue
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import textwrap
import threading
import time
import urllib.parse
import warnings
import xml.etree.ElementTree as ET
import zlib
from collections import OrderedDict
from concurrent import futures
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    BinaryIO,
    Callable,
    Deque,
    Dict,
    Final,
    Generator,
    Iterable,
    Iterator,
    List,
    Literal,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    TextIO,
    Tuple,
    Type,
    TypeVar,
    Union,
)


def stderr_is_journal() -> bool:
    """Return whether JOURNAL_STREAM (systemd.exec(5)) names the device and inode of stderr."""
    try:
        found = os.fstat(2)
    except OSError:  # it is closed
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def complain(*problems: object) -> None:
    """Say why the agent cannot start, a sentence each; to the journal, as errors."""
    priority = "<3>" if stderr_is_journal() else ""
    for problem in problems:
        print(f"{priority}oni_agent: {problem}.", file=sys.stderr, flush=True)


# Old releases of paramiko warn of ciphers that are switched off below.
warnings.filterwarnings("ignore", module="paramiko")
try:
    import paramiko
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
    from paramiko.buffered_pipe import BufferedPipe
    from paramiko.common import (
        AUTH_FAILED,
        AUTH_SUCCESSFUL,
        MSG_CHANNEL_DATA,
        MSG_CHANNEL_EXTENDED_DATA,
        OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED,
        OPEN_FAILED_RESOURCE_SHORTAGE,
        OPEN_SUCCEEDED,
    )
except ImportError as missing:
    complain(
        f"paramiko is needed, and {sys.executable} cannot import it ({missing}): install"
        " python3-paramiko (Debian, Ubuntu; RHEL-like systems: from EPEL), or:"
        " python3 -m pip install paramiko"
    )
    sys.exit(2)  # EXIT_HOPELESS

VERSION = "1.1.0"
log = logging.getLogger("oni_agent")

# ---------------------------------------------------------------- limits

# Of each of these four, one address may hold at most half of what the others leave: see Share.
MAX_VISITORS = 256  # clients that wait to shake hands, or have not said their version line
MAX_HANDSHAKES = 8  # under way at once
MAX_CONNECTIONS = 640  # beyond it the connection that has been idle longest makes room
MAX_SESSIONS = 256  # commands at work; one that waits (job-wait, the board) does not count
MAX_CHANNELS = 10  # open at once on one connection, as OpenSSH's MaxSessions
MAX_VERSION_LINE = 255  # bytes (RFC 4253, 4.2)
MAX_SAID = 4096  # bytes that are taken from a client before it has a connection
MAX_PACKET = 35000  # bytes of one SSH packet (RFC 4253, 6.1)
MAX_LONG_PACKET = 256 * 1024  # bytes of a packet with a very long command line, as in OpenSSH
MAX_LONG_PACKETS = 8  # long packets under way at once
SMALL_WINDOW = 2048  # bytes that a client may send before a command reads them
READ_WINDOW = 128 * 1024  # bytes that it may send ahead of a command that reads
MAX_WARNINGS = 1000  # addresses whose last warning is remembered: see ClientWarnings
MAX_COMMAND = 16 * 1024  # bytes of a command line
MAX_PAYLOAD = 32 * 1024 * 1024  # bytes on standard input
MAX_INSTRUCTIONS = 1024 * 1024  # bytes on standard input of a batch-patch
MAX_ATTEMPTS = 3  # starts of a job that never ended
IDLE_SECONDS = 30  # without a command at work; NCA never closes a connection itself
STALL_SECONDS = 60  # without a byte to or from a client that is to send or to read
STALLED_SECONDS = 1  # without a byte, after which it makes room for others of its address
TURN_SECONDS = 0.01  # between two looks whether a waiting client may shake hands
SLOW_SECONDS = 0.3  # after which a handshake keeps no other one waiting
WARNING_SECONDS = 60  # between two lines in the log about clients of one address
WATCH_SECONDS = 0.2  # between two looks at the sessions that wait
TRIM_SECONDS = 5  # between two times that memory is given back to the system
TRIM_AFTER = 50  # connections that have ended; after fewer it is not worth it
STOP_SECONDS = 1.5  # for answers under way when the agent is told to stop
ANSWER_SECONDS = 10  # for Open ONI, or the batches' file system, to answer a command
PATIENT_SECONDS = 60  # the same, when a job at work asks
SOLR_SECONDS = 4  # for Solr to answer a question
CHECK_SECONDS = 3600  # for reading every file of a batch
RECORDS_SECONDS = 0.5  # for a look at a client's MARC records, before their job is accepted
LIST_SECONDS = 1.5  # for list-batches to count what is not remembered
LIST_PATIENCE = 60  # for Open ONI to tell of all batches at once
MAX_PARTS = 4  # processes in which a batch is checked at once, each on a core of its own
LIST_OF_PART = 1000  # bytes of a list of issues (some eight) that are worth one more process
TERM_SECONDS = 10  # between SIGTERM and SIGKILL for a cancelled manage.py
HOOK_SECONDS = 60  # for ON_FINISH
SHELL_SECONDS = 600  # without a question, after which the manage.py that answers them ends
MAX_QUESTIONS = 8  # of clients, asked of Open ONI at once
ZYGOTE_SECONDS = 3600  # after which the manage.py that answers is started anew
DOUBTFUL_SECONDS = 10  # the same, after ONI's code has failed at a question
KEPT_WORKERS = 2  # idle workers that are kept for the next question
MAX_REPLY = 64 * 1024 * 1024  # bytes of a worker's reply
PROGRESS_SECONDS = 5  # between two questions about how far a load is
KEEP_DAYS = 90  # how long finished jobs are kept
KEEP_JOBS = 100  # how many of the newest are kept in any case
JOBS_IN_MEMORY = 1000  # the newest; what ended before is read from the disk
TITLES_AT_ONCE = 500  # in one manage.py, which gets their LCCNs in a variable of 128 KiB
MAX_ERROR = 2000  # bytes of why a job failed; its log has the rest
LOCK_SECONDS = 5  # to wait for a lock on jobs.db before a change is refused
READ_SECONDS = 1  # to wait for a lock on jobs.db before a read is refused
STATE_SECONDS = 5  # between two looks at whether the state folder is in place
MOST_ENDED = 50  # jobs that have ended, of which the board tells
SWEEP_SECONDS = 3600  # between two looks for jobs that are to be forgotten
FORGET_AT_ONCE = 1000  # jobs, in one transaction
LAST_CHILD_SECONDS = 0.5  # to wait for agent.lock, which a killed agent's last child may hold
CHUNK = 32 * 1024  # bytes of an input that are read at once, or of an answer that are sent
PIECE = 8 * 1024  # bytes of a log that are read and sent at once: many clients may not read them
BLOCK = 64 * 1024  # bytes of a job's log; a line that is longer than two of them comes in parts
LOOK_SECONDS = 0.1  # between two looks at how much manage.py has printed
ENTRY_SECONDS = 0.25  # between two entries of how much manage.py has printed
NOTE_LENGTH = 8000  # characters of a note in the log
NEWEST_JOBS = 50  # that a person is shown who says no number
COMPLAINT_BYTES = 512 * 1024  # of stderr, from its start and from its end, for a job's error
MAX_COMPLAINT = 1024  # bytes of what manage.py said, in a job's error

# Tests shorten the limits. This stands before all that takes one as a default argument; Settings
# refuses the variable where an agent listens as none of a test does.
LIMITS_OF_TESTS = "ONI_AGENT_LIMITS"  # an environment variable: JSON, limits by their names


def limits_of_a_test() -> Dict[str, float]:
    """Return what a test has its agent take in place of the limits above, by their names."""
    limits: Dict[str, float] = json.loads(os.environ.get(LIMITS_OF_TESTS, "{}"))
    return limits


globals().update(limits_of_a_test())

DAY = 86400 * 10**9  # nanoseconds

# Exit statuses. systemd starts the agent again after each but 0 and EXIT_HOPELESS.
EXIT_LATER = 1  # what kept the agent from starting may pass by itself
EXIT_HOPELESS = 2  # somebody has to mend something
EXIT_AGAIN = 70  # the agent had to end, and the next one can go on

# ---------------------------------------------------------------- problems

Result = TypeVar("Result")


class Problem(Exception):
    """Something that an administrator can mend; its arguments are sentences that say what."""


class Scarce(OSError):
    """A lack of something for now (disk, threads, descriptors): to be tried again."""


class CouldNotStart(Problem):
    """A manage.py that cannot be run at all."""


class Disturbed(Problem):
    """A failure of manage.py whose reason may pass by itself, such as a lost connection."""


class Interrupted(Exception):
    """The end of an attempt at a job that was cancelled, or whose agent stops."""


def shortened(text: str, most: int = MAX_ERROR) -> str:
    """Return a text of at most `most` bytes whole, else its start and end with a sign between."""
    data = text.encode("utf-8", "replace")  # the name of a file in it may be no text
    if len(data) <= most:
        return data.decode()
    left_out = len(data) - most
    start = data[: most * 3 // 4].decode("utf-8", "ignore")
    end = data[-most // 4 :].decode("utf-8", "ignore")
    return f"{start} […{left_out} bytes are left out here…] {end}"


SCARCE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EMFILE,
    errno.ENFILE,
    errno.EAGAIN,
    errno.ENOMEM,
    errno.ENOBUFS,
    errno.ETOOMANYREFS,  # too many descriptors are under way between processes (unix(7))
)
# What the system refuses with these it refuses until somebody changes a setting, mode or mount.
REFUSED_FOR_GOOD = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


def is_scarce(error: OSError) -> bool:
    """Return whether an error says that the machine lacks something for now."""
    return isinstance(error, Scarce) or error.errno in SCARCE


def may_work_later(error: BaseException) -> bool:
    """Return whether what failed with an error may work later, without anybody's help.

    It may where a disk is full, or a port in use: what the error was raised from decides. It will
    not where a setting, a mode or a damaged file is the reason.
    """
    while error.__cause__:
        error = error.__cause__
    if isinstance(error, OSError):
        return error.errno not in REFUSED_FOR_GOOD
    return isinstance(error, sqlite3.OperationalError)  # the others tell of a damaged file


def do_nothing(*_: object) -> None:
    """Stand for a callback where nothing is to be done."""


def patiently(action: Callable[[], Result], go_on: Callable[[], None] = do_nothing) -> Result:
    """Call `action` until the machine lacks nothing for it, once a second; return its result.

    `go_on` is called before each further try, and may raise. Raises other errors of `action`.
    """
    warned = False
    while True:
        try:
            return action()
        except OSError as error:
            if not is_scarce(error):
                raise
            if not warned:
                log.error("%s; trying again every second", error)
            warned = True
        time.sleep(1)
        go_on()


def end_agent(reason: str, status: int) -> NoReturn:
    """Log a reason, and end the agent on the spot, as kill -9 would: manage.py goes on."""
    log.critical("%s; the agent ends", reason)
    os._exit(status)


FILES = futures.ThreadPoolExecutor(16)  # for what may wait for a hung file system
COUNTS = futures.ThreadPoolExecutor(4)  # for what counts batches, maybe for minutes


def submitted(
    pool: futures.ThreadPoolExecutor, action: Callable[..., Result], *words: Any
) -> "futures.Future[Result]":
    """Have a thread of `pool` call `action` with `words`. Raises Scarce if none is to be had."""
    try:
        return pool.submit(action, *words)
    except RuntimeError as error:
        raise Scarce(str(error)) from error


def in_time(
    action: Callable[[], Result],
    within: float = ANSWER_SECONDS,
    pool: futures.ThreadPoolExecutor = FILES,
    meanwhile: Callable[[], object] = do_nothing,
    place: object = "the batches",
) -> Result:
    """Call `action`, which may hang, in a thread of `pool`, and return its result.

    Calls `meanwhile`, which may raise, every second. Raises Scarce, and Problem if `action` fails,
    or takes more than `within` seconds: its thread then goes on alone, unless it has not begun yet.
    `place` is what lies on the file system that is asked.
    """
    until = time.monotonic() + within
    late = Problem(f"the file system of {place} did not answer within {within:g} s")
    future = submitted(pool, action)
    try:
        while not futures.wait([future], min(1, until - time.monotonic())).done:
            meanwhile()
            if time.monotonic() >= until:
                raise late
        return future.result()
    except OSError as error:
        if is_scarce(error):
            raise
        raise Problem(str(error)) from error
    finally:
        future.cancel()


# ---------------------------------------------------------------- settings

# Readers of one setting each. They return what a text stands for, and raise ValueError, OSError or
# RuntimeError (no home for ~) with what is wrong with it.


def absolute(value: str) -> Path:
    """Return an absolute path, with ~ and links resolved."""
    return Path(value).expanduser().resolve()


def oni_folder(value: str) -> Path:
    """Read ONI_LOCATION."""
    path = absolute(value)
    if not (path / "manage.py").is_file():
        raise ValueError("that folder holds no manage.py")
    return path


def folder_there(value: str) -> Path:
    """Read the path of a folder that is there."""
    path = absolute(value)
    if not path.is_dir():
        raise ValueError("that is not a folder")
    return path


def key_path(value: str) -> Path:
    """Read the path of a key that is there, or yet to be made."""
    path = absolute(value)
    if not path.parent.is_dir():
        raise ValueError("that is in a folder that does not exist")
    return path


def readable_file(value: str) -> Path:
    """Read the path of a file that the agent's user can read."""
    path = absolute(value)
    if not (path.is_file() and os.access(path, os.R_OK)):
        raise ValueError(f"that is not a file that {user_name(os.geteuid())} can read")
    return path


def program(value: str) -> Path:
    """Read the path of a program."""
    path = absolute(value)
    if not shutil.which(str(path)):
        raise ValueError("that is not a file that can be executed")
    return path


def state_folder(value: str) -> Path:
    """Read the path of a folder that the agent can write to, or make."""
    user = user_name(os.geteuid())
    advice = (
        f"set STATE_DIRECTORY to a folder that {user} can write to, such as one that root makes by"
        f" install -d -m 700 -o {user} {STATE_OF_ROOTS_AGENT}"
    )
    try:
        path = absolute(value.split(":")[0])  # systemd may name several
    except RuntimeError as error:
        raise ValueError(f"{user} has no home: {advice}") from error
    place = nearest_folder(path)
    if not os.access(str(place), os.W_OK | os.X_OK):
        raise ValueError(f"{user} cannot write to {place}: {advice}")
    if path == place and path.stat().st_mode & 0o002 and not is_an_agents(path):
        raise ValueError("others use that folder: name one of the agent's own")
    return path


def is_an_agents(folder: Path) -> bool:
    """Return whether a folder is an agent's state folder, or empty, so that it may become one."""
    return (folder / "agent.lock").exists() or not any(folder.iterdir())


def nearest_folder(path: Path) -> Path:
    """Return `path` if it is there, else the folder above it that is. Raises ValueError."""
    place = next(each for each in (path, *path.parents) if os.path.lexists(str(each)))
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder")
    return place


def bind_address(value: str) -> Tuple[str, int]:
    """Read `host:port`, `[v6 address]:port` or `:port` as a pair; host "" means every address."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):([0-9]{1,5})", value)
    if not match or int(match[3]) > 65535:
        raise ValueError("write host:port, [IPv6 address]:port or :port")
    return match[1] or match[2], int(match[3])


Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def networks(value: str) -> List[Network]:
    """Read addresses and networks that are separated by commas or blanks."""
    found = [ipaddress.ip_network(word) for word in value.replace(",", " ").split()]
    mapped = any(getattr(each.network_address, "ipv4_mapped", None) for each in found)
    if mapped or not found:
        raise ValueError("write addresses and networks as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
    return found


def log_level(value: str) -> str:
    """Read a level, and return it as logging writes it."""
    if not re.fullmatch("(?ai)debug|info|warning|error", value):
        raise ValueError("write debug, info, warning or error")
    return value.upper()


def is_set(value: str) -> bool:
    """Return that a variable is set; its value is secret, and not needed."""
    return True


# To add a setting: enter it here with its reader, in DEFAULTS (as text) if it has a default, in
# Settings, and in this file's docstring. `build` hands settings.its_name to what needs it. Neither
# manage.py nor ON_FINISH gets to see it.
OWN_VARIABLES: Dict[str, Callable[[str], Any]] = {
    "ONI_LOCATION": oni_folder,
    "BATCH_SOURCE": folder_there,
    "BA_BIND": bind_address,
    "STATE_DIRECTORY": state_folder,
    "HOST_KEY_FILE": key_path,
    "ALLOW_FROM": networks,
    "AUTHORIZED_KEYS": readable_file,
    "ON_FINISH": program,
    "LOG_LEVEL": log_level,
    "DB_CONNECTION": is_set,
}
REQUIRED = ("ONI_LOCATION", "BATCH_SOURCE")
STATE_OF_ROOTS_AGENT = "/var/lib/oni-agent"  # where one that root has started keeps its state
STATE_HOME = os.environ.get("XDG_STATE_HOME") or ("~/.local/state" if os.geteuid() else "/var/lib")
DEFAULTS = {
    "BA_BIND": "127.0.0.1:2222",
    "STATE_DIRECTORY": f"{STATE_HOME}/oni-agent",
    "LOG_LEVEL": "info",
}
OWN_PREFIXES = ("ALLOW_", "BA_", "HOST_KEY", "ON_")  # only the agent's variables have them


def misspelt(environ: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each name of a variable that is a misspelt setting.

    It would have no effect otherwise, and a misspelt ALLOW_FROM lets everybody in.
    """
    for name in environ:
        plain = name.replace("export ", "").strip()
        if name in OWN_VARIABLES or plain.startswith("ONI_"):  # ONI_… are Open ONI's own
            continue
        near = difflib.get_close_matches(plain.upper(), OWN_VARIABLES, 1, 0.85)
        if near:
            yield f"{name!r} is not a setting (did you mean {near[0]}?)"
        elif plain.startswith(OWN_PREFIXES):
            likely = difflib.get_close_matches(plain, OWN_VARIABLES, 1, 0)
            yield f"{name!r} is not a setting (did you mean {likely[0]}?); --help lists all"


class Settings:
    """The settings in the environment, each as an attribute: `ba_bind` is BA_BIND's value."""

    oni_location: Path
    batch_source: Path
    ba_bind: Tuple[str, int]
    state_directory: Path
    host_key_file: Path
    allow_from: Optional[List[Network]]
    authorized_keys: Optional[Path]
    on_finish: Optional[Path]
    log_level: str
    db_connection: Optional[bool]

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Read all settings. Raises Problem with a sentence for each thing that is wrong."""
        problems = list(misspelt(environ))
        for name, read in OWN_VARIABLES.items():
            value = environ.get(name) or DEFAULTS.get(name)
            try:
                setattr(self, name.lower(), read(value) if value else None)
            except (ValueError, OSError, RuntimeError) as error:
                problems.append(f"{name} is {value!r}; {error}")
            if name in REQUIRED and not value:
                problems.append(f"{name} is not set; --help says which folder it names")
        if LIMITS_OF_TESTS in environ and self.ba_bind != ("127.0.0.1", 0):
            problems.append(f"{LIMITS_OF_TESTS} is for tests alone; take it out")
        if problems:
            raise Problem(*problems)
        self.host_key_file = self.host_key_file or self.state_directory / "host_key"

    @property
    def admits_everybody(self) -> bool:
        """Return whether everybody who reaches the agent's port may give it commands."""
        return not (self.allow_from or self.authorized_keys)


def user_name(uid: int) -> str:
    """Return a user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# ---------------------------------------------------------------- inside Open ONI

# What stands between this banner and the next one runs in manage.py processes alone, beside ONI's
# own models, loader and index; OpenONI cuts it out of this file and carries it there. It therefore
# uses nothing of the rest of this file, and keeps to Python 3.6 and Django 2.2.
#
# Three kinds of function can be asked for, by name: answer_… (a quick question; the process is kept
# for the next one), study_… (reads files, MARC records or the network; its process ends with the
# answer) and task_… (changes something; a step of a job, in a manage.py of its own).

INSIDE = __name__ == "inside Open ONI"
if INSIDE or TYPE_CHECKING:
    import base64
    import contextlib
    import io
    import itertools
    import json
    import logging
    import mimetypes
    import os
    import re
    import resource
    import select
    import signal
    import socket
    import stat
    import sys
    import threading
    import time
    import traceback
    import urllib.parse
    import urllib.request
    import zlib
    from datetime import date, datetime
    from hashlib import blake2b
    from types import SimpleNamespace
    from typing import (
        Any,
        Callable,
        Dict,
        Iterable,
        Iterator,
        List,
        Mapping,
        Optional,
        Sequence,
        Set,
        Tuple,
    )
    from urllib.request import HTTPRedirectHandler
    from xml.parsers import expat

    from core import batch_loader, models, solr_index, title_loader
    from core.batch_loader import BatchLoader, BatchLoaderException
    from core.ocr_extractor import ocr_extractor
    from core.title_loader import TitleLoader
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connection, transaction
    from django.db import models as fields
    from django.db.backends.signals import connection_created
    from django.db.models import Count, Q
    from django.db.utils import DatabaseError, DataError, IntegrityError, InterfaceError
    from lxml import etree
    from PIL import Image
else:
    # The agent itself makes none of the classes below.
    BatchLoader = TitleLoader = HTTPRedirectHandler = object

WORKER_MEMORY = 1 << 30  # bytes that a worker may take
WORKER_IDLE_SECONDS = 60  # without a question, after which a worker ends
TITLE_SECONDS = 20  # for the MARC site to give one record
MAX_RECORD = 32 << 20  # bytes of one record of the MARC site
MAX_ADDRESSES = 200000  # pages of one issue that are told of
TRANSIENT = (1040, 1053, 1205, 1213, 1927, 2002, 2003, 2006, 2013)  # MariaDB's: it may pass

Tell = Callable[..., None]  # sends news (keywords) to whoever has asked, before the answer


class CannotAnswer(Exception):
    """A reason why there is no answer, in a sentence for whoever has asked."""

    transient = False  # whether there may be one a moment later


# Workers


def serve_workers(control_number: int, idle_seconds: int) -> None:
    """Fork a worker for each socket that arrives over `control_number`, a socket's descriptor.

    This process is the zygote: it has all of ONI in memory and never connects to the database, so
    that a fork of it can begin at once. A message is "fork", with a socket for the worker; or "kill
    PID": only the zygote kills, since it alone knows that the PID is still its child's; or
    "retire", upon which it ends with its last worker. It also ends with the agent, or after
    `idle_seconds` without a message and a worker.
    """
    control = socket.socket(fileno=control_number)
    warm_up()
    control.send(b"ready")
    children: Set[int] = set()
    is_retired = False
    quiet_since = time.monotonic()
    while children or not (is_retired or time.monotonic() - quiet_since >= idle_seconds):
        readable = select.select([control], [], [], 1)[0]
        children.difference_update(ended_children())
        if not readable:
            continue
        quiet_since = time.monotonic()
        try:
            message, ancillary = control.recvmsg(100, socket.CMSG_SPACE(4))[:2]
        except OSError:  # the machine lacks something for now
            traceback.print_exc()
            time.sleep(0.1)
            continue
        if not message:
            return
        word, _, number = message.decode().partition(" ")
        if word == "kill" and int(number) in children:
            os.kill(int(number), signal.SIGKILL)
        if word == "retire":
            is_retired = True
        if word == "fork" and ancillary:  # it has none where no descriptor was to be had
            number_of_channel = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
            with socket.socket(fileno=number_of_channel) as channel:
                children.update(forked(control, channel))


def forked(control: socket.socket, channel: socket.socket) -> List[int]:
    """Fork a worker that answers over `channel`; return its PID, or none if that cannot be."""
    try:
        child = os.fork()
    except OSError:  # the agent tells this, as the last words, to who asks; other workers go on
        traceback.print_exc()
        return []
    if not child:
        control.close()
        be_worker(channel)
    return [child]


def ended_children() -> Iterator[int]:
    """Bury the children that have ended, and yield their PIDs, which may now be used again."""
    while True:
        try:
            child, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not child:
            return
        yield child


def warm_up() -> None:
    """Have in memory, before the first fork, what nearly every question needs."""
    # ONI has a log file for each process, and pysolr would tell it of every question.
    logging.getLogger("pysolr").setLevel(logging.WARNING)
    evaluate(connection.vendor)  # imports the database's driver, and connects to nothing
    title = models.Title(lccn="sn00000000")
    issue = models.Issue(title=title, date_issued=date(1900, 1, 1), edition=1)
    evaluate(models.Page(issue=issue, sequence=1).url)  # reads the site's URL patterns
    evaluate(datetime.strptime("1900-01-01", "%Y-%m-%d"))  # imports more, as the loader would
    mimetypes.init()  # reads the files that urllib asks for each URL
    pages = models.Page.objects.filter(issue__batch_id="").select_related("issue__title")
    evaluate(str(pages.order_by("sequence").query))  # fills Django's caches


def evaluate(*_: Any) -> None:
    """Do nothing with values that are computed for what computing them does, or raises."""


def be_worker(channel: socket.socket) -> None:
    """Answer the questions that come over `channel`, a JSON line each; never return.

    A question is [name, words, seconds]. When the seconds are over, SIGALRM, which nothing here
    handles, ends this process, whatever it hangs in.
    """
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (WORKER_MEMORY, WORKER_MEMORY))
        send(channel, pid=os.getpid())
        signal.alarm(WORKER_IDLE_SECONDS)
        for line in channel.makefile(encoding="utf-8"):
            name, words, seconds = json.loads(line)
            signal.alarm(int(seconds) + 1)
            send(channel, **reply_to(name, words, channel))
            if name.startswith("study_"):
                break
            signal.alarm(WORKER_IDLE_SECONDS)
    except BrokenPipeError:
        pass  # the agent has gone, or waits for the answer no more
    except Exception:
        traceback.print_exc()  # its last line is told by the agent
    finally:
        os._exit(0)  # without the exit handlers of the process that this is a fork of


def send(channel: socket.socket, **message: Any) -> None:
    """Send `message` to the agent as one JSON line.

    That is `pid` at first; then the `news` before an answer; and `answer`, or `problem`.
    """
    channel.sendall(json.dumps(message, default=str).encode() + b"\n")


def reply_to(name: str, words: List[Any], channel: socket.socket) -> Dict[str, Any]:
    """Return the answer to a question; or the problem, whether that may pass by itself, and whether
    it is a failure of ONI's code, or of this process, rather than an answer.
    """
    if not name.startswith(("answer_", "study_")):
        return {"problem": f"{name} is no question"}
    arguments = list(words)
    if name.startswith("study_"):
        arguments.insert(0, lambda **news: send(channel, news=news))
    try:
        try:
            return {"answer": globals()[name](*arguments)}
        except (DatabaseError, InterfaceError):
            if connection.connection is None or connection.is_usable():
                raise
            # The server, or a firewall, has cut a connection that was idle for long.
            connection.close()
            return {"answer": globals()[name](*arguments)}
    except CannotAnswer as problem:
        return {"problem": str(problem), "transient": problem.transient}
    except MemoryError:
        told = f"reading it takes more than {WORKER_MEMORY >> 20} MiB"
        return {"problem": told, "is_failure": True}
    except Exception as error:
        told = f"Open ONI cannot answer: {type(error).__name__}: {first_line(error)}"
        return {"problem": told, "transient": is_transient(error), "is_failure": True}


def is_transient(error: Exception) -> bool:
    """Return whether `error` is one of the database's that may be gone a moment later."""
    if isinstance(error, InterfaceError):
        return True
    if not isinstance(error, DatabaseError):
        return False
    return bool(error.args) and (error.args[0] in TRANSIENT or "locked" in str(error))


def first_line(error: Any) -> str:
    """Return the first line of a text, or of what an exception says, cut after 200 characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else line[:199] + "…"


# Quick questions


def answer_health() -> Dict[str, Any]:
    """Return how many batches ONI holds, and how many pages Solr finds, or why it cannot say."""
    health: Dict[str, Any] = {"batches": models.Batch.objects.count()}
    try:
        health["documents"] = patient_solr(4).search("type:page", rows=0).hits
    except Exception as error:
        health["solr_problem"] = first_line(error)
    return health


def answer_batch(name: str, solr_seconds: float) -> Dict[str, Any]:
    """Return what database and index hold of the batch `name`, as fields of BatchState.

    Solr has `solr_seconds` for each of its answers.
    """
    held = answer_counts(name)
    row = models.Batch.objects.filter(name=name).first()
    events = models.LoadBatchEvent.objects.filter(batch_name=name).order_by("-pk")[:5]
    pages = pages_of(name)
    with_text = {address for address, indexed in pages if indexed}
    held.update(
        name=row.name if row else name,
        row=row is not None,
        loaded=row.created.isoformat() if row else "",
        events=[[event.created.isoformat(), event.message or ""] for event in events][::-1],
        storage=str(settings.BATCH_STORAGE),
        rows_digest=digest_of(address for address, _ in pages),
        text_digest=digest_of(with_text),
    )
    try:
        held.update(compare_index(name, with_text, solr_seconds))
    except Exception as error:
        held["index_problem"] = first_line(error)
    return held


def answer_counts(name: str) -> Dict[str, Any]:
    """Return how many issues and pages of the batch `name` are rows of ONI's."""
    pages = models.Page.objects.filter(issue__batch_id=name)
    return {
        "issues": models.Issue.objects.filter(batch_id=name).count(),
        "pages": pages.count(),
        "indexed": pages.filter(indexed=True).count(),
    }


def pages_of(name: str) -> List[Tuple[str, bool]]:
    """Return the address of each page of the batch `name`, and whether its text went to Solr."""
    rows = models.Page.objects.filter(issue__batch_id=name).select_related("issue__title")
    rows = rows.only("sequence", "indexed", "issue__date_issued", "issue__edition",
                     "issue__title__lccn")  # fmt: skip
    return [(address_of(page), page.indexed) for page in rows]


def address_of(page: Any) -> str:
    """Return a page's address, which is also the id of its document in Solr.

    A title whose LCCN has other characters than ONI's URL patterns allow has no addresses. What
    stands for one then is equal to no document's id.
    """
    try:
        return str(page.url)
    except Exception as error:
        return f"page {page.pk} has no address: {first_line(error)}"


def digest_of(addresses: Iterable[str]) -> str:
    """Return a text that two sets of addresses share only if they are equal."""
    together = 0
    for address in set(addresses):
        together += int.from_bytes(blake2b(address.encode(), digest_size=16).digest(), "big")
    return "%x" % (together % (1 << 128))


def patient_solr(seconds: float) -> Any:
    """Return ONI's connection to Solr, which here waits for `seconds`, and not for a minute."""
    solr = solr_index.conn()
    solr.timeout = seconds
    return solr


def compare_index(name: str, wanted: Set[str], seconds: float) -> Dict[str, Any]:
    """Compare the documents under a batch's name with the addresses `wanted`, of its pages.

    Counts addresses: `lost` have no document, `replaced` have one under another batch. Counts
    documents: `stray` have an address that is not wanted.
    """
    solr = patient_solr(seconds)
    documents = documents_of(solr, name)
    missing = sorted(wanted - documents)
    others: Set[str] = set()
    replaced = 0
    for start in range(0, len(missing), 100):
        some = missing[start : start + 100]
        found = solr.search("{!terms f=id}" + ",".join(some), fl="id,batch", rows=len(some))
        replaced += len(found.docs)
        others.update(str(document.get("batch", "")) for document in found)
    return {
        "pages_in_solr": len(documents),
        "lost": len(missing) - replaced,
        "replaced": replaced,
        "other_batches": sorted(others)[:3],
        "stray": len(documents - wanted),
    }


def documents_of(solr: Any, name: str) -> Set[str]:
    """Return the ids of the documents that Solr has under the name of a batch."""
    query = f'batch:"{name}"'
    found = solr.search(query, fl="id", rows=1000)
    if found.hits > 1000:
        found = solr.search(query, fl="id", rows=found.hits)
    return {document["id"] for document in found}


def answer_load(name: str, folder: str, solr_seconds: float) -> Dict[str, Any]:
    """Return what answer_batch says of the batch in `folder`, if it may be loaded.

    Raises CannotAnswer if not: its list of issues cannot be read, say, or ONI lacks its awardee.
    """
    look_at_listing(folder)
    look_at_place(name, folder)
    return answer_batch(name, solr_seconds)


def look_at_listing(folder: str) -> None:
    """Raise CannotAnswer unless the file that lists a batch's issues, and these, can be read.

    The sentences are the Go agent's, since people search for them.
    """
    data = os.path.join(folder, "data", "")
    refuse_what_blocks(data)
    batch = SimpleNamespace(storage_url="file://" + data, path=data)
    try:
        listing = data + BatchLoader(process_ocr=False)._find_batch_file(batch)
    except BatchLoaderException:
        listing = data + "batch.xml"
    look_at_file(listing)
    try:
        root = batch_loader.etree.parse("file://" + listing)
    except Exception as error:
        raise CannotAnswer(f"reading file: {listing}: {first_line(error)}")
    issues = root.xpath("ndnp:issue", namespaces=batch_loader.ns)
    if not issues:
        raise CannotAnswer(f"{listing} names no issue, so ONI would load nothing")
    for issue in issues:
        path = local_path(urllib.parse.urljoin("file://" + data, issue.text or ""))
        # lxml opens a name with its percent escapes as they are, or decoded.
        if path is not None and not os.path.exists(path):
            path = urllib.parse.unquote(path)
        if path is not None:
            look_at_listed_file(folder, path)


def refuse_what_blocks(data: str) -> None:
    """Raise CannotAnswer if a name in the folder `data` is a FIFO, say, on which ONI would wait."""
    try:
        names = os.listdir(data)
    except OSError:
        return
    for name in names:
        path = os.path.join(data, name)
        if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
            raise CannotAnswer(f"reading file: {path} is not a regular file")


def look_at_listed_file(folder: str, path: str) -> None:
    """Raise CannotAnswer unless `path`, which the list of a batch's issues names, is a file.

    Of files elsewhere on this host nothing is told but that they lie elsewhere.
    """
    try:
        look_at_file(path)
    except CannotAnswer:
        if not is_within(path, folder):
            told = "reading file: %s, which batch.xml names, lies outside the batch's folder"
            raise CannotAnswer(told % path)
        raise


def is_within(path: str, folder: str) -> bool:
    """Return whether a file really lies in a batch's folder, its data or ONI's storage."""
    real = os.path.realpath(path)
    places = (folder, os.path.join(folder, "data"), str(settings.STORAGE))
    return any(real.startswith(os.path.realpath(place) + "/") for place in places)


def look_at_file(path: str) -> None:
    """Raise CannotAnswer, in the Go agent's words, unless `path` is a regular file."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise CannotAnswer(f"reading file: {path} is not a regular file")
        os.close(os.open(path, os.O_RDONLY))
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        raise CannotAnswer(f"reading file: open {path}: {reason}")


def local_path(url: str) -> Optional[str]:
    """Return the path that a file: URL names, or None if `url` is of another kind."""
    if not url.lower().startswith("file:"):
        return None
    path = url[len("file:") :]
    return path[2:] if path.startswith("///") else path


def look_at_place(name: str, folder: str) -> None:
    """Raise CannotAnswer unless ONI has the batch's awardee, and a place for its link."""
    code = name.split("_")[1]
    if not models.Awardee.objects.filter(org_code=code).exists():
        raise CannotAnswer(no_awardee(code))
    in_the_way = what_is_in_the_way(os.path.join(str(settings.BATCH_STORAGE), name), folder)
    if in_the_way:
        raise CannotAnswer(in_the_way)


def what_is_in_the_way(link: str, folder: str) -> str:
    """Return why load_batch cannot make `link` to a batch's folder, or ""."""
    is_the_batch = os.path.realpath(link) == os.path.realpath(folder)
    if not os.path.exists(link) or os.path.islink(link) or is_the_batch:
        return ""
    told = "is a real folder or file, not a link, and load_batch cannot replace it: move it away"
    return f"{link} {told}"


def no_awardee(code: str) -> str:
    """Return the sentence that says that ONI lacks an awardee, and what to type."""
    return f'Open ONI has no awardee "{code}"; to make it: ensure-awardee {code} "NAME"'


def answer_listing(folder: str) -> bool:
    """Return true if the batch in `folder` has a list of issues, and all that it lists.

    Raises CannotAnswer if not.
    """
    look_at_listing(folder)
    return True


def answer_holds(name: str) -> bool:
    """Return whether ONI has a row for the batch `name`."""
    return bool(models.Batch.objects.filter(name=name).exists())


def answer_names() -> List[str]:
    """Return the names of all batches that ONI holds."""
    return list(models.Batch.objects.values_list("name", flat=True))


def answer_awardee(code: str, name: str) -> Dict[str, Any]:
    """Make an awardee, if ONI lacks it; return whether it is `new`, and its code in `spelling`."""
    if not 0 < len(code) <= 50 or len(name) > 100 or "\0" in code + name:
        raise CannotAnswer(
            "an awardee code has 1 to 50 characters, a name at most 100, none of them NUL"
        )
    row = models.Awardee.objects.filter(org_code=code).first()
    if row is not None:
        return {"new": False, "spelling": row.org_code}
    if not name:
        raise CannotAnswer("awardee name must be given to auto-create awardees")
    row, new = models.Awardee.objects.get_or_create(org_code=code, defaults={"name": name})
    return {"new": new, "spelling": row.org_code}


def answer_titles(lccns: List[str], solr_seconds: float) -> Dict[str, Any]:
    """Return, for each LCCN, the version of its row in seconds since 1970, and whether Solr has
    its document; for one that is no title of ONI's, nothing.
    """
    solr = patient_solr(solr_seconds)
    found = {}
    for title in models.Title.objects.filter(lccn__in=lccns):
        try:
            hits = solr.search("{!terms f=id}" + title.url, rows=0).hits
        except Exception as error:
            raise SolrGone(error)
        found[title.lccn] = [title.version.timestamp(), hits > 0]
    return found


def answer_folders() -> Dict[str, List[Any]]:
    """Return where loads write: of each place, by its name, the folder, and whether the website
    reads there, as its own user.
    """
    folders: Dict[str, List[Any]] = {
        "log/": [str(getattr(settings, "LOG_LOCATION", "log")), False],
        "batch storage": [str(settings.BATCH_STORAGE), False],
    }
    if getattr(settings, "COORD_STORAGE", ""):
        folders["word coordinates"] = [str(settings.COORD_STORAGE), True]
    for cache in getattr(settings, "CACHES", {}).values():
        if "filebased" in cache["BACKEND"].lower():
            folders[f"cache {cache['LOCATION']}"] = [str(cache["LOCATION"]), True]
    return folders


def answer_tables() -> Dict[str, int]:
    """Return how many rows there are in the tables that ONI's fixtures fill, and loads look up."""
    return {
        "languages": models.Language.objects.count(),
        "countries": models.Country.objects.count(),
        "awardees": models.Awardee.objects.count(),
    }


def answer_check() -> str:
    """Return the last line of what `manage.py check` prints."""
    printed = io.StringIO()
    call_command("check", stdout=printed, stderr=printed)
    return printed.getvalue().strip().rpartition("\n")[2]


# The list of all batches


def study_overview(tell: Tell, wanted: List[List[Any]], solr_seconds: float) -> Dict[str, Any]:
    """Return what is quickly told of every batch that is in BATCH_SOURCE or in ONI.

    `wanted` is [name, folder, watched] of each batch that the agent knows of: the folder is "" if
    it is not in BATCH_SOURCE, `watched` is "" if its files were never counted. The answer has the
    numbers of answer_batch, and whether the watched files are `unchanged`.
    """
    batches: Dict[str, Dict[str, Any]] = {}
    elsewhere = {}  # what was watched of batches that are not in BATCH_SOURCE
    for name, folder, watched in wanted:
        if folder:
            batches[name] = {"name": name, "unchanged": answer_unchanged(folder, watched)}
        else:
            elsewhere[name] = watched
    issues = counts_by_batch(models.Issue.objects.order_by(), "batch_id")
    pages = counts_by_batch(models.Page.objects.order_by(), "issue__batch_id")
    indexed = counts_by_batch(models.Page.objects.order_by().filter(indexed=True),
                              "issue__batch_id")  # fmt: skip
    newest = {}
    events = models.LoadBatchEvent.objects.order_by("pk")
    for name, key, message in events.values_list("batch_name", "pk", "message"):
        newest[name] = [[key, message or ""]]
    for row in models.Batch.objects.all():
        if row.name not in batches:
            folder = os.path.join(str(settings.BATCH_STORAGE), row.name)
            unchanged = answer_unchanged(folder, elsewhere.get(row.name, ""))
            batches[row.name] = {"name": row.name, "unchanged": unchanged}
        batches[row.name].update(
            row=True,
            loaded=row.created.isoformat(),
            issues=issues.get(row.name, 0),
            pages=pages.get(row.name, 0),
            indexed=indexed.get(row.name, 0),
            events=newest.get(row.name, []),
        )
    answer: Dict[str, Any] = {"batches": batches, "storage": str(settings.BATCH_STORAGE)}
    try:
        answer["index_version"], documents = index_overview(solr_seconds)
        for name, held in batches.items():
            held["pages_in_solr"] = documents.get(name, 0)
    except Exception as error:
        answer["index_problem"] = first_line(error)
    return answer


def counts_by_batch(rows: Any, batch: str) -> Dict[str, int]:
    """Return how many `rows` there are for each batch, which is their field `batch`."""
    return dict(rows.values_list(batch).annotate(Count("pk")))


def index_overview(seconds: float) -> Tuple[str, Dict[str, int]]:
    """Return a text that changes when Solr's index does, and the number of documents by batch.

    The text is "" where Solr does not tell (Solr Reference Guide, Luke Request Handler).
    """
    solr = patient_solr(seconds)
    found = solr.search("type:page", rows=0, facet="true",
                        **{"facet.field": "batch", "facet.limit": -1})  # fmt: skip
    facets = found.facets["facet_fields"]["batch"]
    documents = dict(zip(facets[::2], facets[1::2]))
    version = ""
    try:
        url = f"{settings.SOLR}/admin/luke?numTerms=0&wt=json"
        with urllib.request.urlopen(url, timeout=seconds) as reply:
            index = json.loads(reply.read().decode())["index"]
        version = f"{index['version']} {index['lastModified']}"
    except (OSError, ValueError, LookupError):
        pass
    return version, documents


def study_index(tell: Tell) -> Dict[str, List[Any]]:
    """Return, for each batch in Solr, how many documents it has, and their digest."""
    solr = patient_solr(60)
    sums: Dict[str, List[int]] = {}
    mark = "*"
    while True:
        found = solr.search("type:page", fl="id,batch", rows=5000, sort="id asc", cursorMark=mark)
        for document in found:
            total = sums.setdefault(str(document.get("batch", "")), [0, 0])
            total[0] += 1
            total[1] += int(digest_of([document["id"]]), 16)
        if found.nextCursorMark in (mark, None):
            break
        mark = found.nextCursorMark
    return {name: [count, "%x" % (total % (1 << 128))] for name, (count, total) in sums.items()}


def study_rows(tell: Tell, names: List[str]) -> None:
    """Tell, for each batch, the digests of its pages and of those with text."""
    for name in names:
        pages = pages_of(name)
        with_text = (address for address, indexed in pages if indexed)
        tell(name=name, rows_digest=digest_of(address for address, _ in pages),
             text_digest=digest_of(with_text))  # fmt: skip


def study_files(tell: Tell, batches: List[List[str]]) -> None:
    """Tell what the files of each batch, [name, folder], name, as `rehearse` does."""
    for name, folder in batches:
        loader = Rehearsal(counting=True)
        try:
            tell(name=name, **files_of([rehearse(name, folder, loader)]))
        except CannotAnswer as problem:
            if problem.transient:
                raise
            tell(name=name, problem=str(problem), watched=loader.watched_in(folder))


def study_part(tell: Tell, name: str, folder: str, part: int, parts: int) -> Dict[str, Any]:
    """Return what `rehearse` says of every `parts`-th issue, without a look at images and OCR."""
    return rehearse(name, folder, Rehearsal(None, part, parts, counting=True))


def files_of(parts: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Return what a batch's files name, as Files has it, from what `rehearse` says of each part.

    A fault counts as one more address: so the digests of a batch that has one are never those of
    what ONI holds, whose numbers may be equal.
    """
    problem = ""
    issues = pages = 0
    addresses: List[str] = []
    with_text: List[str] = []
    watched: Dict[str, Any] = {}
    for part in parts:
        issues += part["issues"]
        watched.update(unpacked(part["watched"]))
        for fault in part["faults"]:
            told = f"{fault['file']}: {fault['fault']}"
            addresses.append(told)
            if fault["ends_load"]:
                problem = problem or told
        for issue in part["found"]:
            pages += len(issue["pages"]) + issue["lost"]
            addresses += [address for address, _ in issue["pages"]]
            with_text += [address for address, has_text in issue["pages"] if has_text]
    return {
        "problem": problem,
        "issues": issues,
        "pages": pages,
        "with_text": len(with_text),
        "rows_digest": digest_of(addresses),
        "text_digest": digest_of(with_text),
        "watched": packed(watched),
    }


def sizes_and_times(folder: str, paths: Iterable[str]) -> Dict[str, Any]:
    """Return, for each of `paths` in `folder`, its size and when it was changed; None: not there.

    A text of them, as `packed` makes it, is what Files calls `watched`.
    """
    seen: Dict[str, Any] = {}
    for path in paths:
        try:
            found = os.stat(os.path.join(folder, path))
            seen[path] = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        except (OSError, ValueError):
            seen[path] = None
    return seen


def packed(facts: Any) -> str:
    """Return what JSON can hold as a short text."""
    return base64.b64encode(zlib.compress(json.dumps(facts).encode())).decode()


def unpacked(text: str) -> Any:
    """Return what `packed` has made a text of."""
    return json.loads(zlib.decompress(base64.b64decode(text)).decode())


def answer_unchanged(folder: str, watched: str) -> bool:
    """Return whether the files in `folder` of which `watched` tells are as they were then."""
    if not watched:
        return False
    seen = unpacked(watched)
    return bool(sizes_and_times(folder, seen) == seen)


# The rehearsal: ONI's own loader loads a batch, and nothing is written


def study_rehearsal(tell: Tell, name: str, folder: str, part: int, parts: int) -> Dict[str, Any]:
    """Rehearse every `parts`-th issue of the batch `name` in `folder`, from the `part`-th on.

    Returns what `rehearse` does. Tells `done` and `of`, the numbers of issues.
    """
    with contextlib.suppress(OSError):  # the unit's SystemCallFilter= refuses this
        os.nice(10)
    return rehearse(name, folder, Rehearsal(tell, part, parts))


def rehearse(name: str, folder: str, loader: "Rehearsal") -> Dict[str, Any]:
    """Let ONI's loader load the batch `name` in `folder`; return what would come of it.

    The answer has `issues` (how many were looked at), `faults` and `warnings` (`file`, and a
    sentence under `fault` or `warning`), `found` (of each issue the pages, and how many more are
    lost), `titles` (records that ONI lacks, by LCCN) and `watched`. load_batch runs from its first
    line to its last; what it does to the world is taken away in `pretend`. Raises DatabaseGone.
    """
    try:
        os.chdir(folder)
    except OSError as error:
        raise CannotAnswer(f"reading file: open {folder}: {os.strerror(error.errno or 0)}")
    pretend(name, loader)
    # One transaction for all: `notes.set` would begin one for each page otherwise.
    with transaction.atomic(), connection.execute_wrapper(send_only_select):
        try:
            loader.look_at_link(folder)
            # load_batch makes no link to a batch that is called by its link.
            loader.load_batch(Links.link)
            loader.load_postponed()
            loader.look_for_unlisted_issues()
        except Exception as error:
            loader.enter_end_of_load(error)
        finally:
            transaction.set_rollback(True)
    return loader.result()


class SolrGone(CannotAnswer):
    """A Solr that does not say whether it has what was asked for."""

    transient = True

    def __init__(self, error: Any) -> None:
        super().__init__(f"Solr cannot be asked ({first_line(error)})")


class DatabaseGone(CannotAnswer):
    """A loss of the database during a rehearsal, which is no fault of the batch."""

    transient = True

    def __init__(self, error: Any) -> None:
        super().__init__(f"Open ONI cannot answer: the database is gone: {first_line(error)}")


class Links:
    """The link to the batch in BATCH_STORAGE, which load_batch would make, and which is not made.

    The batch's folder is this process's working directory, and /proc/self/cwd is a link to it that
    is always there. So all that ONI opens below `link` is opened below HERE, while the names that
    ONI computes, and the words of its errors, are those of a real load.
    """

    HERE = "/proc/self/cwd/"
    link = ""

    @classmethod
    def opened(cls, name: str) -> str:
        """Return the path or URL that is opened for `name`, a path or URL as ONI has it."""
        for scheme in ("", "file:", "file://"):
            for link in (cls.link, cls.quoted()):
                if name.startswith(scheme + link + "/"):
                    return scheme + cls.HERE + name[len(scheme + link) + 1 :]
        return name

    @classmethod
    def quoted(cls) -> str:
        """Return the link as libxml2 writes it in the URL of a document that it has parsed."""
        return urllib.parse.quote(cls.link)

    @classmethod
    def within_batch(cls, text: str) -> str:
        """Return a text in which the batch's files are named relative to its folder."""
        for folder in (cls.link + "/", cls.quoted() + "/", os.getcwd() + "/", cls.HERE):
            for scheme in ("file://", "file:", ""):
                text = text.replace(scheme + folder, "")
        return text


NO_MEMORY = 2  # XML_ERR_NO_MEMORY of libxml2, the code of an XMLSyntaxError


class Endless(Exception):
    """A file that is no regular one (a FIFO, a device); `args` has its path as ONI has it."""


def refuse_endless(name: str) -> None:
    """Raise Endless if `name`, a path or a file: URL, is what one might read for ever."""
    path = local_path(name) or name
    for each in (path, urllib.parse.unquote(path)):
        if os.path.exists(each) and not (os.path.isfile(each) or os.path.isdir(each)):
            raise Endless(each)


class PretendedXML:
    """A stand-in for lxml.etree in ONI's loader, which parses below the pretended link."""

    def __init__(self, loader: "Rehearsal") -> None:
        self._loader = loader

    def parse(self, url: str) -> Any:
        """Parse as ONI's loader does, and have the document say that it came from `url`."""
        refuse_endless(Links.opened(url))
        self._loader.watch(url)
        document = etree.parse(Links.opened(url))
        came_from = document.docinfo.URL or ""
        if came_from.startswith("file://" + Links.HERE):
            came_from = f"file://{Links.quoted()}/{came_from[len('file://' + Links.HERE) :]}"
            document.docinfo.URL = came_from
        self._loader.see_document(document)
        return document


def pretend(name: str, loader: "Rehearsal") -> None:
    """Put stand-ins in the place of all that ONI's loader writes to; they report to `loader`."""
    Links.link = os.path.join(str(settings.BATCH_STORAGE), name)
    if fields.Model.save is not look_at_values:
        keep_from_writing()
    batch_loader.etree = PretendedXML(loader)
    batch_loader.Title = batch_loader.management = loader.titles
    batch_loader.Image = loader.images
    batch_loader.ocr_extractor = loader.extract
    batch_loader.Awardee = PretendedAwardees(loader)
    models.Reel.objects = PretendedReels()


def keep_from_writing() -> None:
    """Take from this process, for good, whatever would let ONI's code write; make it faster, too.

    Two safeties stand behind the single replacements: no statement but SELECT is sent, and the
    database's session is read-only. So this must only happen in a worker of its own.
    """
    fields.Model.save = look_at_values
    batch_loader.Batch = PretendedBatches()
    batch_loader.set_fulltext_range = lambda: None  # it would write to ONI's cache
    remember_title_documents()
    models.OCR.language_texts = property(
        lambda ocr: ocr.__dict__.setdefault("_pretended_texts", PretendedTexts(ocr))
    )
    listen_to_errors()
    open_urls_below_link()
    connection.close()
    connection_created.connect(make_read_only)
    learn_columns()


def open_urls_below_link() -> None:
    """Have urllib, by which ONI's OCR reader opens files, open them below the pretended link."""
    socket.setdefaulttimeout(30)
    open_url = urllib.request.OpenerDirector.open

    def open_linked(opener: Any, url: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(url, str):
            url = Links.opened(url)
            refuse_endless(url)
        return open_url(opener, url, *rest, **options)

    urllib.request.OpenerDirector.open = open_linked  # type: ignore


class LastWords(logging.Handler):
    """A log handler that keeps the last error of ONI's code, which may say more than it raises."""

    said = ""

    def emit(self, record: Any) -> None:
        LastWords.said = first_line(record.getMessage())


def listen_to_errors() -> None:
    """Have what is logged go nowhere, but that the last error is remembered."""
    logging.disable(logging.WARNING)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
        logger.disabled = False
    logging.root.handlers = [LastWords()]


def make_read_only(connection: Any, **_: Any) -> None:
    """Have the database itself refuse to write; each new connection must be told anew."""
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION TRANSACTION READ ONLY")
        if connection.vendor == "sqlite":
            cursor.execute("PRAGMA query_only = ON")


def send_only_select(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
    """Send a statement to the database only if it reads, or sets up the connection.

    TitleLoader deletes, clears and creates rows in bulk, past Model.save.
    """
    if re.match(r"\s*\(?\s*(SELECT|SET|PRAGMA)\b", sql, re.I):
        return execute(sql, params, many, context)
    return None


def remember_title_documents() -> None:
    """Have Title.solr_doc, nine queries a page otherwise, asked once for each title."""
    real = models.Title.solr_doc.fget
    documents: Dict[Any, Dict[str, Any]] = {}

    def solr_doc(title: Any) -> Dict[str, Any]:
        if title.pk not in documents:
            documents[title.pk] = real(title)
        return dict(documents[title.pk])  # a copy, since Page.solr_doc takes keys away

    models.Title.solr_doc = property(solr_doc)


# What the database's columns take, by table and column: most characters, and whether none of them
# may lie beyond U+FFFF (MariaDB's utf8mb3).
COLUMNS: Dict[Tuple[str, str], Tuple[int, bool]] = {}
PACKET = {"bytes": sys.maxsize}  # the longest statement that the database takes
MADE_UP_KEYS = itertools.count(-1, -1)  # none is a row's


def learn_columns() -> None:
    """Fill COLUMNS with what the database says of itself; it may differ from ONI's models."""
    narrow_connection = False
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SELECT @@character_set_client, @@sql_mode, @@max_allowed_packet")
            charset, mode, PACKET["bytes"] = cursor.fetchone()
            if "STRICT" not in mode and "TRADITIONAL" not in mode:
                return  # it cuts off, without an error, what does not fit
            narrow_connection = charset in ("utf8", "utf8mb3")
        try:
            cursor.execute(
                "SELECT table_name, column_name, character_maximum_length, character_set_name"
                " FROM information_schema.columns WHERE table_schema = %s"
                " AND character_maximum_length IS NOT NULL",
                [connection.settings_dict["NAME"]],
            )
        except DatabaseError:
            return  # this kind of database has no such table
        for table, column, most, charset in cursor.fetchall():
            narrow = narrow_connection or charset in ("utf8", "utf8mb3")
            COLUMNS[table, column] = (most, narrow)


def look_at_values(row: Any, *_: Any, **__: Any) -> None:
    """Stand for Model.save: raise what a strict database, or Django before it, would raise.

    Issue.save, which saves its title too, still runs, and so do `create` and `notes.set`: they all
    end here. A key that the database would give is made up.
    """
    prepared = []  # all of them, before one goes to the database, as Django does
    for column in row._meta.concrete_fields:
        value = column.pre_save(row, row._state.adding)
        if column.primary_key and value is None:
            setattr(row, column.attname, next(MADE_UP_KEYS))
        else:
            prepared.append((column, column.get_db_prep_save(value, connection)))
    for column, value in prepared:
        look_at_value(row, column, value)
    row._state.adding = False
    row._state.db = connection.alias
    if isinstance(row, models.Url):
        # TitleLoader asks for a title's URLs again, to tell whether it is an electronic record.
        kept = row.title.__dict__.setdefault("_prefetched_objects_cache", {})
        kept.setdefault("urls", []).append(row)


def look_at_value(row: Any, field: Any, value: Any) -> None:
    """Raise DataError or IntegrityError where the column of `field` cannot hold `value`."""
    column = field.column
    if value is None:
        if not field.null:
            raise IntegrityError(f"Column '{column}' cannot be null")
    elif isinstance(value, str):
        limit = field.max_length or 0
        most, narrow = COLUMNS.get((row._meta.db_table, column), (limit, False))
        if most and len(value) > most:
            told = "Data too long for column '%s': %d characters, and it holds %d"
            raise DataError(told % (column, len(value), most))
        # A character takes four bytes at most, and 1000 is more than the statement around it has.
        if len(value) * 4 > PACKET["bytes"] and len_in_sql(value) + 1000 > PACKET["bytes"]:
            raise DataError("Got a packet bigger than 'max_allowed_packet' bytes")
        if narrow and value and max(value) > "\uffff":
            told = "Incorrect string value for column '%s': it cannot hold U+%X"
            raise DataError(told % (column, ord(max(value))))
    elif isinstance(field, fields.IntegerField):
        low, high = connection.ops.integer_field_range(field.get_internal_type())
        if low is not None and not low <= value <= high:
            raise DataError(f"Out of range value for column '{column}': {value}")


def len_in_sql(value: str) -> int:
    """Return how many bytes a text takes in a statement, where some characters are escaped."""
    return len(value.encode()) + sum(value.count(each) for each in "\0\n\r\x1a\"'\\")


class PretendedBatches:
    """A stand-in for Batch in ONI's loader: no batch of any name is there yet."""

    def __init__(self) -> None:
        self.objects = self
        self.DoesNotExist = models.Batch.DoesNotExist

    def __call__(self) -> Any:
        return models.Batch()

    def get(self, **_: Any) -> Any:
        raise self.DoesNotExist

    def filter(self, **_: Any) -> Any:
        return models.Batch.objects.none()


class PretendedAwardees:
    """A stand-in for Awardee in ONI's loader: one that ONI lacks is a fault, and is made up.

    So the issues of its batch are looked at, too.
    """

    def __init__(self, loader: "Rehearsal") -> None:
        self._loader = loader
        self.objects = self
        self.DoesNotExist = models.Awardee.DoesNotExist

    def get(self, org_code: str) -> Any:
        """Return the awardee that ONI's loader asks for."""
        try:
            return models.Awardee.objects.get(org_code=org_code)
        except self.DoesNotExist:
            self._loader.enter_lack_of_awardee(org_code)
            return models.Awardee(org_code=org_code)


class PretendedReels:
    """A stand-in for Reel.objects: a reel is missing once, and the loader makes it then."""

    def __init__(self) -> None:
        self._reels: Dict[Tuple[int, str], Any] = {}

    def get(self, number: str, batch: Any) -> Any:
        key = (id(batch), number)
        if key not in self._reels:
            self._reels[key] = models.Reel(number=number, batch=batch)
            self._reels[key].save()  # here, since the loader may ask twice before it does
            raise models.Reel.DoesNotExist
        return self._reels[key]


class PretendedImages:
    """A stand-in for PIL.Image where only addresses are wanted, and no file is to be opened."""

    size = (1, 1)

    def open(self, path: str) -> "PretendedImages":
        return self


class LinkedImages:
    """A stand-in for PIL.Image in ONI's loader: opens below the pretended link."""

    def open(self, path: str) -> Any:
        """Open an image as PIL does."""
        refuse_endless(Links.opened(path))
        return Image.open(Links.opened(path))


class TitleNeeded(Exception):
    """A title that ONI lacks and whose record is yet to be fetched; its issue comes up again."""


class NoTitle(Exception):
    """A title that ONI lacks and cannot have; the text says why."""

    def __init__(self, lccn: str, why: str) -> None:
        super().__init__(why)
        self.lccn = lccn


class Titles(TitleLoader):  # type: ignore[misc]
    """A stand-in for Title and `management` in ONI's loader, and loads records as ONI does.

    A title that ONI lacks is first noted in `needed`; `fetch` gets all of these from the MARC site
    at once, and ONI's own TitleLoader makes titles of them. `outcomes` has, for each record that
    was loaded, its LCCN and what came of it.
    """

    def __init__(self, counting: bool = False) -> None:
        super().__init__()
        self.objects = self
        self.DoesNotExist = models.Title.DoesNotExist
        self.needed: Dict[str, str] = {}  # LCCNs, by key_of(LCCN), as `_known` and the two after it
        self.records: Dict[str, bytes] = {}  # by the LCCN as ONI's loader spells it
        self.outcomes: List[Dict[str, Any]] = []
        self._known: Dict[str, Any] = {}
        self._missing: Dict[str, str] = {}  # why ONI cannot have it
        self._poisoned: Dict[str, str] = {}  # the URL of its record
        self._asked = ""
        self._counting = counting

    def get(self, lccn: str) -> Any:
        """Return the title that ONI's loader asks for. Raises Title.DoesNotExist."""
        self._asked = lccn
        key = key_of(lccn)
        if key not in self._known:
            try:
                self._known[key] = models.Title.objects.get(lccn=lccn)
            except self.DoesNotExist:
                if not self._counting:
                    raise
                self._known[key] = unstored_title(lccn)
        return self._known[key]

    def call_command(self, name: str, url: str) -> None:
        """Stand for `load_titles URL`, which ONI's loader calls for a title that it lacks.

        Raises UnicodeEncodeError, as that does, where `url` is none.
        """
        url.encode("ascii")
        if not connection.is_usable():
            raise DatabaseGone("its connection is closed")
        key = key_of(self._asked)
        if key in self._missing:
            raise NoTitle(self._asked, self._missing[key])
        self.needed.setdefault(key, self._asked)
        raise TitleNeeded(self._asked)

    def fetch(self) -> None:
        """Fetch the records of all titles that are needed, side by side, and load them."""
        for lccn, url, record, wrong in fetched_records(sorted(self.needed.values())):
            if not wrong:
                wrong = self._load(lccn, record)
            if wrong:
                shown = lccn or 'of the LCCN "", which the METS file names'
                told = f"ONI does not have the title {shown}, nor has {url}: {wrong}"
                self._missing[key_of(lccn)] = told
            else:
                self.records[lccn] = record
                self._note_poison(lccn, url)
        self.needed.clear()

    def _note_poison(self, lccn: str, url: str) -> None:
        """Remember where a title comes from that ONI would store, and not get along with."""
        for outcome in self.outcomes:
            is_it = key_of(outcome["lccn"]) == key_of(lccn)
            if is_it and outcome["outcome"] == "stored" and outcome["problem"]:
                self._poisoned[key_of(lccn)] = url

    def poison(self) -> Tuple[str, str]:
        """Return the LCCN that was asked for last, and its URL, if it is poisoned; or "", ""."""
        url = self._poisoned.get(key_of(self._asked))
        return (self._asked, url) if url else ("", "")

    def _load(self, lccn: str, record: bytes) -> str:
        """Have ONI load a record; return why it then lacks the title, or ""."""
        self.outcomes.clear()
        try:
            self.load_record_file(io.BytesIO(record))
        except CannotAnswer:
            raise
        except Exception as error:
            self._known.pop(key_of(lccn), None)
            return f"that is no MARC XML: {first_line(error)}"
        key = key_of(lccn)
        last = self._last_outcome_of(key)
        if last and last["problem"] and last["outcome"] != "stored":
            self._known.pop(key, None)
            return str(last["problem"])
        if key in self._known:
            return ""
        problems = [each["problem"] for each in self.outcomes if each["problem"]]
        return problems[0] if problems else "it answers with another record"

    def _last_outcome_of(self, key: str) -> Optional[Dict[str, Any]]:
        """Return what came of the last record of a title, if there was one."""
        mine = []
        for outcome in self.outcomes:
            if key_of(outcome["lccn"]) == key and outcome["outcome"] != "ignored":
                mine.append(outcome)
        # ONI stumbles over a record, and has the title all the same, if it took an earlier one.
        taken = [outcome for outcome in mine if not outcome["wrong"]]
        if not mine:
            return None
        return taken[-1] if taken else mine[-1]

    def load_record_file(self, file: Any, seconds: float = sys.maxsize) -> None:
        """Load the records of an open file as load_titles does; fill `outcomes`.

        After so many seconds all but the first are only parsed. Raises what the XML parser raises.
        """
        map_xml = title_loader.map_xml
        until = time.monotonic() + seconds

        def map_each(load: Callable[[Any], None], opened: Any) -> None:
            map_xml(lambda record: self._load_one(load, record, until), opened)

        title_loader.map_xml = map_each
        title_loader.urllib = SimpleNamespace(
            parse=urllib.parse, request=SimpleNamespace(urlopen=lambda _: file)
        )
        try:
            self.load_file("the record")
        finally:
            title_loader.map_xml = map_xml
            title_loader.urllib = urllib

    def _load_one(self, load: Callable[[Any], None], record: Any, until: float) -> None:
        """Have ONI's `load` take a record, and enter what came of it.

        After the monotonic time `until` only the first record is taken.
        """
        if self.outcomes and time.monotonic() > until:
            return
        is_one = record and record.get_fields()  # else it is OCLC's element around the records
        self._expect()
        load(record)
        if self._gone:
            raise DatabaseGone(self._gone)
        if is_one:
            self._conclude(record)

    def _expect(self) -> None:
        """Forget what came of the record before."""
        self._made: Any = None
        self._gone: Optional[Exception] = None  # what ONI's loader stumbled over: no database
        self._wrong = ""
        self._outcome = "ignored"

    def load_bib(self, record: Any) -> Any:
        """Load a record as ONI does, and remember what came of it."""
        self._outcome = "unchanged"
        LastWords.said = ""
        try:
            title = super().load_bib(record)
        except Exception as error:
            self._gone = None if connection.is_usable() else error
            words = LastWords.said or f"{type(error).__name__}: {words_of(error)}"
            self._wrong = f"ONI cannot store the title {lccn_of(record)}: {words}"
            raise
        if title is not None:
            self._outcome = "stored" if title.pk else "deleted again"
            self._made = title
            if title.pk:
                self._known[key_of(title.lccn)] = title
        return title

    def delete_bib(self, record: Any) -> None:
        """Only remember that ONI would delete this title."""
        self._outcome = "deleted"
        self._known.pop(key_of(lccn_of(record)), None)

    def _conclude(self, record: Any) -> None:
        """Enter what came of one record in `outcomes`."""
        lccn = lccn_of(record)
        problem = self._wrong
        if not lccn and self._outcome in ("unchanged", "stored"):
            problem = problem or NO_LCCN
        elif self._outcome == "ignored":
            problem = f"leader/06 is {record.leader[6:7]}: ONI would ignore the title {lccn}"
        elif self._outcome == "deleted":
            problem = f"leader/05 is d: ONI would delete the title {lccn}"
        elif self._outcome == "deleted again":
            problem = f"ONI would take {lccn} for its own electronic record, and delete it"
        elif self._outcome == "stored":
            problem = poison_in(self._made)
        version = None
        if self._made and record.get_fields("005"):
            version = self._made.version.timestamp()
        self.outcomes.append(
            {
                "lccn": lccn,
                "outcome": self._outcome,
                "problem": problem,
                "wrong": bool(self._wrong),  # ONI's title loader has stumbled over it, and goes on
                "version": version,
            }
        )


def words_of(error: Exception) -> str:
    """Return what an exception says; of one that says nothing, the line of ONI's that raised it."""
    if str(error).strip("'\" "):
        return first_line(error)
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)
             if os.sep + "core" + os.sep in frame.filename]  # fmt: skip
    return f"in ONI's line `{lines[-1]}`" if lines else "no reason"


def key_of(lccn: str) -> str:
    """Return the same for all spellings of an LCCN that ONI's database takes for one."""
    return lccn.lower()


def unstored_title(lccn: str) -> Any:
    """Return what stands, where files are counted, for a title that ONI lacks."""
    title = models.Title(lccn=lccn)
    title.save = lambda *_, **__: None  # Issue.save would save its title, too
    return title


def lccn_of(record: Any) -> str:
    """Return the LCCN of a MARC record as ONI's title loader reads it, or ""."""
    try:
        return title_loader._normal_lccn(title_loader._extract(record, "010", "a")) or ""
    except Exception:
        return ""


def poison_in(title: Any) -> str:
    """Return why no batch of a title that ONI stores could be loaded, or ""."""
    try:
        evaluate(models.Issue(title=title, date_issued=date(1900, 1, 1), edition=1).url)
        evaluate(title.solr_doc)
    except Exception as error:
        if not connection.is_usable():
            raise DatabaseGone(error)
        told = "ONI would store the title %r, but no batch of it could be loaded: %s: %s"
        return told % (title.lccn, type(error).__name__, first_line(error))
    return ""


NO_LCCN = "there is a MARC record without an LCCN (010 $a) in it, which Open ONI would not store"


class SameHost(HTTPRedirectHandler):
    """A redirect handler that does not leave the host."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any,
                         url: str) -> Any:  # fmt: skip
        if urllib.parse.urlsplit(url).hostname != urllib.parse.urlsplit(request.full_url).hostname:
            raise OSError(f"it points to another host, {url[:100]}")
        return super().redirect_request(request, file, code, message, headers, url)


def fetched_records(lccns: List[str]) -> List[Tuple[str, str, bytes, str]]:
    """Fetch records from the MARC site, side by side; return LCCN, URL, record, problem of each."""
    found: Dict[str, Tuple[str, str, bytes, str]] = {}

    def fetch_some(some: List[str]) -> None:
        for lccn in some:
            url = settings.MARC_RETRIEVAL_URLFORMAT % urllib.parse.quote(lccn, safe="")
            try:
                found[lccn] = (lccn, url, fetched(url), "")
            except Exception as error:
                found[lccn] = (lccn, url, b"", first_line(error))

    threads = [
        threading.Thread(target=fetch_some, args=(lccns[start::16],), daemon=True)
        for start in range(min(16, len(lccns)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[lccn] for lccn in lccns]


def fetched(url: str) -> bytes:
    """Return what a URL gives within TITLE_SECONDS. Raises OSError."""
    until = time.monotonic() + TITLE_SECONDS
    data = b""  # what has come
    with urllib.request.build_opener(SameHost).open(url, timeout=TITLE_SECONDS / 2) as reply:
        while True:
            piece: bytes = reply.read1(1 << 16)
            data += piece
            if not piece:
                return data
            if len(data) > MAX_RECORD:
                raise OSError(f"it sends more than {MAX_RECORD >> 20} MiB")
            if time.monotonic() > until:
                raise OSError(f"it did not answer within {TITLE_SECONDS} s")


def study_records(tell: Tell, path: str, seconds: float) -> List[Dict[str, Any]]:
    """Return what ONI would make of the records in a file of MARC XML, as Titles has it.

    After so many `seconds` ONI's loader is given no more of them, and the answer lacks those.
    Raises CannotAnswer where ONI could not make a title of one, or the file is no XML.
    """
    look_at_xml(path)
    with open(path, "rb") as file:
        loader = Titles()
        pretend("", Rehearsal())
        with transaction.atomic(), connection.execute_wrapper(send_only_select):
            try:
                loader.load_record_file(file, seconds)
            except CannotAnswer:
                raise
            except Exception as error:
                raise CannotAnswer(what_sax_says(error))
            finally:
                transaction.set_rollback(True)
    for outcome in loader.outcomes:
        if outcome["problem"]:
            raise CannotAnswer(outcome["problem"])
    if not loader.outcomes:
        raise CannotAnswer("there is no MARC record in it")
    return loader.outcomes


def look_at_xml(path: str) -> None:
    """Raise CannotAnswer if a file is no XML or has a DOCTYPE: quickly, without the database."""
    with open(path, "rb") as file:
        data = file.read()
    if b"<!DOCTYPE" in data.replace(b"\0", b""):  # without NUL, UTF-16 reads as ASCII does
        # Entities can grow without bounds, in load_titles too, which has no limits.
        raise CannotAnswer("a DOCTYPE is not allowed")
    try:
        expat.ParserCreate().Parse(data, True)
    except expat.ExpatError as error:
        raise CannotAnswer(f"{expat.ErrorString(error.code)}: line {error.lineno}")
    except (LookupError, ValueError):
        pass  # it is of an odd encoding, of which ONI's own reader will tell


def what_sax_says(error: Exception) -> str:
    """Return what is wrong with an XML file, with the line if the parser tells it."""
    line = getattr(error, "getLineNumber", None)
    if line:
        return f"{error.getMessage()}: line {line()}"  # type: ignore[attr-defined]
    return f"it cannot be read as MARC XML: {type(error).__name__}: {first_line(error)}"


class Rehearsal(BatchLoader):  # type: ignore[misc]
    """ONI's own BatchLoader, whose errors are entered as faults, and end one issue at the most.

    With `counting`, only addresses matter: no image, OCR file or title is looked at. Of all issues
    every `parts`-th is looked at, from the `part`-th on.
    """

    def __init__(self, tell: Optional[Tell] = None, part: int = 0, parts: int = 1,
                 counting: bool = False) -> None:  # fmt: skip
        self.PROCESS_OCR = not counting
        self.PROCESS_COORDINATES = False  # they would be files
        self.solr = SimpleNamespace(add=self._see_indexed, commit=lambda: None)
        self.titles = Titles(counting)
        self.images = PretendedImages() if counting else LinkedImages()
        self._tell = tell
        self._part = part
        self._parts = parts
        self._counting = counting
        self._languages: Set[str] = set()
        self.faults: List[Dict[str, Any]] = []
        self.warnings: List[Dict[str, Any]] = []
        self.found: List[Dict[str, Any]] = []
        self._seen = 0  # issues that the loader has asked for
        self._number = 0  # of the issue at hand, from 1 on
        self._of = 0  # issues that it will ask for
        self._postponed: List[Tuple[int, str]] = []
        self._told_titles: Set[str] = set()
        self._watched: List[str] = ["", "data"]  # paths in the batch's folder, and itself
        self._document: Any = None
        self._draws_in_others = False
        self._is_outside = False
        self._held = 0  # characters of text in the OCR file at hand; -1: it is no ALTO file
        self._mets = ""
        self._path = ""

    def purge_batch(self, name: str) -> None:
        """Do nothing, where ONI's loader would purge what it has loaded before a fault."""

    def result(self) -> Dict[str, Any]:
        """Return what `rehearse` answers."""
        if self._part:  # what is wrong with the whole, the first part tells
            self.faults = [fault for fault in self.faults if fault["order"]]
        self.faults.sort(key=lambda fault: fault["order"])
        records = self.titles.records.items()
        return {
            "issues": len(self.found),
            "of": self._of,
            "faults": self.faults,
            "warnings": self.warnings,
            "found": self.found,
            "titles": {lccn: base64.b64encode(record).decode() for lccn, record in records},
            "watched": self.watched_in("."),
        }

    def watched_in(self, folder: str) -> str:
        """Return, as Files calls it, `watched` of the batch, whose folder is `folder`."""
        return packed(sizes_and_times(folder, self._watched))

    def enter_fault(self, path: str, what: str, error: Any = None, ends_load: bool = False,
                    order: Optional[int] = None, title: str = "") -> None:  # fmt: skip
        """Enter what ONI would do (`what`) with a file, and what it says (`error`) if anything.

        `order` is the issue's number, from 1 on; 0 stands for the whole batch. `title` is the LCCN
        of a title that ONI lacks, of which one fault tells for all issues.
        """
        poisoned = ""
        if order is None and not title:
            title, poisoned = self.titles.poison()
        if title in self._told_titles:
            return
        if title:
            self._told_titles.add(title)
        why = self._why(error, path)
        if poisoned:
            why = f"the title {title}, as {poisoned} has it: {why}"
        text = f"{what}: {why}" if why else what
        text = "".join(each if each <= "\uffff" else f"\\U{ord(each):08x}" for each in text)
        self.faults.append(
            {
                "file": path,
                "fault": text,
                "ends_load": ends_load,
                "order": self._number if order is None else order,
                "title": title,
            }
        )

    def _why(self, error: Any, path: str) -> str:
        """Return what ONI says of the file `path`, as far as a client may see it, or ""."""
        if self._is_outside:
            return "it lies outside the batch, and cannot be taken"
        if self._draws_in_others:
            return "its words are not shown, since the file draws in others"
        if error is None:
            return ""
        words = Links.within_batch(str(error) or type(error).__name__)
        words = first_line(words.replace("unable to load batch: ", ""))
        return without_path(words, path) if path else words

    def enter_lack_of_awardee(self, code: str) -> None:
        """Enter that ONI lacks the batch's awardee, which is no fault of the batch's files."""
        if not self._counting:
            fault = no_awardee(code)
            self.enter_fault("data/batch.xml", fault, ends_load=True, order=0)

    def enter_warning(self, path: str, text: str) -> None:
        """Enter what a person should know of a file, though ONI loads the batch all the same."""
        self.warnings.append({"file": path, "warning": text, "order": self._number})

    def look_at_link(self, folder: str) -> None:
        """Enter what keeps ONI from making its link to the batch's folder."""
        in_the_way = what_is_in_the_way(Links.link, folder)
        if in_the_way and not self._part and not self._counting:
            self.enter_fault("data/batch.xml", in_the_way, ends_load=True, order=0)

    def watch(self, url: str) -> None:
        """Take note of a document that ONI's loader is about to parse."""
        path = local_path(Links.opened(url))
        if path is not None:
            self._watched.append(path.replace(Links.HERE, ""))

    def see_document(self, document: Any) -> None:
        """Take note of a document that ONI's loader has just parsed."""
        self._document = document
        dtd = document.docinfo.internalDTD
        entities = dtd.iterentities() if dtd is not None else ()
        self._draws_in_others = any(getattr(each, "system_url", None) for each in entities)
        if not self._seen:
            self._of = len(document.xpath("ndnp:issue", namespaces=batch_loader.ns))

    def _load_issue(self, url: str) -> None:
        """Load an issue as ONI's loader does; what that raises goes no further."""
        number = self._seen
        self._seen += 1
        if number % self._parts == self._part:
            self._rehearse_issue(number, url)
            if self._tell is not None:
                self._tell(done=len(self.found) + len(self._postponed), of=self._of)

    def load_postponed(self) -> None:
        """Fetch the titles that ONI lacks, and load the issues that need them."""
        if self._postponed:
            self.titles.fetch()
        postponed, self._postponed = self._postponed, []
        for number, url in postponed:
            self._rehearse_issue(number, url)

    def _rehearse_issue(self, number: int, url: str) -> None:
        """Load one issue as ONI's loader does, and enter what is wrong with it."""
        path = Links.within_batch(url)
        self._number = number + 1
        self._mets = url
        self._begin_file(url)
        self._document = None
        self._issue: Dict[str, Any] = {"file": path, "order": self._number, "pages": []}
        self._pages: List[Tuple[Any, Any]] = []
        self._lost_pages = 0
        self._at_page = 0
        try:
            super()._load_issue(url)
        except TitleNeeded:
            self._postponed.append((number, url))
            return
        except NoTitle as error:
            self.enter_fault(path, "ONI would break off the load", error, ends_load=True,
                             title=error.lccn)  # fmt: skip
        except ValueError as error:
            self._enter_loss(error)
        except Endless as error:
            self.enter_endless(error)
        except Exception as error:
            self._enter_break(path, error)
        else:
            self._look_for_leftovers(path)
            self._look_for_twins(path)
        finally:
            # An error inside `notes.set` marks the transaction as one to be rolled back.
            if connection.in_atomic_block:
                transaction.set_rollback(False)
        self._issue["lost"] = len(self._left_divisions())
        self.found.append(self._issue)
        self._is_outside = False
        self._draws_in_others = False

    def _enter_break(self, path: str, error: Exception) -> None:
        """Enter that ONI would break off the load at the issue with the METS file `path`.

        Raises DatabaseGone, CannotAnswer where that is no fault of a file.
        """
        self._refuse_own_trouble(error)
        text_is_elsewhere = "://" in self._path and self._path != path
        if text_is_elsewhere:  # what can be mended is the METS file that names the page's text
            why = f"{self._path}, which it names: {error}"
            if self._is_outside:
                there = local_path(self._path)
                why = f"{there}, which it names, lies outside the batch, and cannot be taken"
            error = OSError(why)
            self._path, self._is_outside = path, False
        what = "ONI would break off the load"
        if self._at_page and self._path == path:
            what = f"page {self._at_page}: {what}"
        self.enter_fault(self._path, what, error, ends_load=True)

    def _begin_file(self, url: str) -> None:
        """Remember which file is being read: an error from now on is taken for its fault."""
        self._path = Links.within_batch(url)
        self._is_outside = not is_within_reach(url)

    def _enter_loss(self, error: ValueError) -> None:
        """Enter that ONI would leave out an issue, or, in the middle of it, what is left of it."""
        if self._at_page:
            what = f"ONI would leave out the rest of the issue, from page {self._at_page} on"
        else:
            what = "ONI would leave this issue out"
        self.enter_fault(self._path, what, error)

    def enter_endless(self, error: Endless) -> None:
        """Enter that a file is no regular one."""
        what = "this is not a regular file, and ONI might read it for ever"
        self.enter_fault(Links.within_batch(str(error)), what, ends_load=True)

    def enter_end_of_load(self, error: Exception) -> None:
        """Enter that ONI's loader has given up the whole batch.

        Raises DatabaseGone, and CannotAnswer where that is no fault of the batch.
        """
        reason = error.__context__ if isinstance(error, BatchLoaderException) else error
        if isinstance(reason, Endless):
            self.enter_endless(reason)
            return
        if isinstance(reason, Exception):
            self._refuse_own_trouble(reason)
        path = "data/batch.xml"
        if not self._seen and os.path.dirname(self._watched[-1]) == "data":
            path = self._watched[-1]  # another list of issues, which ONI would read in its place
        self.enter_fault(path, "ONI would break off the load", error, ends_load=True, order=0)

    def _refuse_own_trouble(self, error: Exception) -> None:
        """Raise DatabaseGone or CannotAnswer where `error` is no fault of a file."""
        if isinstance(error, CannotAnswer):
            raise error
        has_no_memory = getattr(error, "code", None) == NO_MEMORY and "huge" not in str(error)
        if isinstance(error, MemoryError) or has_no_memory:
            read = self._path or "batch.xml"
            raise CannotAnswer(f"reading {read} takes more than {WORKER_MEMORY >> 20} MiB")
        if not connection.is_usable():
            raise DatabaseGone(error)

    def _load_page(self, document: Any, division: Any, issue: Any) -> Any:
        """Load a page as ONI's loader does, and look at what that makes of it."""
        self._document = document
        self._at_page += 1
        try:
            page = super()._load_page(document, division, issue)
        except BatchLoaderException as error:
            self._lost_pages += 1
            what = f"page {self._at_page}: ONI would leave it out"
            self.enter_fault(self._path, what, error)
            raise
        self._pages.append((division, page))
        self._issue["pages"].append([page.url, bool(page.ocr_filename)])
        if self._reads_mets_as_text(page):
            what = "ONI would read this file in the place of a text, whose name is missing"
            self.enter_fault(self._path, f"page {self._at_page}: {what}")
        if len(self._issue["pages"]) > MAX_ADDRESSES:
            raise CannotAnswer(f"{self._path} has more than {MAX_ADDRESSES} pages")
        if not self._counting:
            for kind, name in (("image", page.jp2_filename), ("PDF", page.pdf_filename)):
                if name and "://" in name:
                    self._warn_of_addresses(name)
                elif name:
                    self._look_at_served_file(kind, name)
        return page

    def _reads_mets_as_text(self, page: Any) -> bool:
        """Return whether the OCR file of a page is the METS file itself, as by an empty href."""
        if not page.ocr_filename:
            return False
        url = urllib.parse.urljoin(self.current_batch.storage_url, page.ocr_filename)
        return local_path(url) == local_path(self._mets)

    def _warn_of_addresses(self, name: str) -> None:
        """Warn, once in an issue, of files that ONI would not store relative to the batch."""
        told = "the website cannot show an image or PDF of it: ONI would store the whole address,"
        told += f" {name}"
        if not self.warnings or self.warnings[-1]["file"] != self._path:
            self.enter_warning(self._path, told)

    def _look_at_served_file(self, kind: str, name: str) -> None:
        """Warn of a file that the website would serve, and cannot."""
        path = Links.opened(os.path.join(self.current_batch.path, name))
        shown = Links.within_batch(path)
        if not os.path.isfile(path):
            self.enter_warning(shown, f"there is no such {kind}")
        elif not os.path.getsize(path):
            self.enter_warning(shown, f"this {kind} is empty")
        elif not os.access(path, os.R_OK):
            self.enter_warning(shown, f"this {kind} cannot be read")

    def _left_divisions(self) -> List[Any]:
        """Return all elements of the METS file at hand that mean a page which was not made.

        Another structMap may have the same pages once more, by the same DMDID or files.
        """
        if self._document is None:
            return []
        made = {division for division, _ in self._pages}
        maps = {structure_of(division) for division in made}  # the structMaps that ONI reads
        described = {division.get("DMDID") for division in made}
        taken = {each.get("FILEID") for division in made for each in division.iter("{*}fptr")}
        left = []
        for each in self._document.iter("{*}div"):
            kind = each.get("TYPE", "").strip().lower()
            files = {pointer.get("FILEID") for pointer in each.iterchildren("{*}fptr")}
            if each in made:
                continue
            # Where ONI reads, each page division should have become a page. Elsewhere it may be a
            # page that was made already: its DMDID tells, or, where it has none, its files.
            if not made or structure_of(each) in maps:
                is_page = kind in ("np:page", "page")
            elif each.get("DMDID"):
                is_page = kind == "np:page" and each.get("DMDID") not in described
            else:
                is_page = kind == "np:page" and bool(files - taken)
            if is_page:
                left.append(each)
        return left

    def _look_for_leftovers(self, path: str) -> None:
        """Enter what a METS file holds, and no page that the loader has made."""
        document = self._document
        left = len(self._left_divisions()) - self._lost_pages
        if left > 0:
            what = "ONI would leave out %d of %d pages without a word"
            self.enter_fault(path, what % (left, left + self._lost_pages + len(self._pages)))
        elif not self._lost_pages:
            self._look_for_divisions_of_files(path, document)
        if not self._lost_pages:
            self._look_for_unread_text(path, document)
            self._look_for_pages_gone(path, document)

    def _look_for_pages_gone(self, path: str, document: Any) -> None:
        """Warn of an issue that has files, and no page. One without both may be meant so."""
        if not self._pages and next(document.iter("{*}file"), None) is not None:
            told = "ONI would load the issue without a page, though it has files"
            self.enter_warning(path, told)

    def _look_for_divisions_of_files(self, path: str, document: Any) -> None:
        """Enter divisions that have an image, or a text, as pages have, and that are no page's."""
        fptr = f"{{{batch_loader.ns['mets']}}}fptr"
        taken = {pointer.get("FILEID") for division, _ in self._pages
                 for pointer in division.iter("{*}fptr")}  # fmt: skip
        uses = {file.get("ID"): file.get("USE") for file in document.iter("{*}file")}
        left = {pointer.getparent() for pointer in document.iter(fptr)
                if pointer.get("FILEID") not in taken
                and uses.get(pointer.get("FILEID")) in ("service", "ocr")}  # fmt: skip
        if left:
            what = "ONI would leave out the files of %d divisions that are no pages to it"
            self.enter_fault(path, what % len(left))

    def _look_for_unread_text(self, path: str, document: Any) -> None:
        """Enter the OCR files that a METS file describes, and that no page has taken."""
        files = [MetsFile(each) for each in document.iter("{*}file")]
        texts = {file.id for file in files if file.is_xml and file.use == "ocr"}
        taken: Set[str] = set()
        named_in_vain: Set[str] = set()  # by pages without a text
        lacks_text = False  # whether a page that has files does
        for number, (division, page) in enumerate(self._pages, 1):
            ids = {pointer.get("FILEID") for pointer in division.iterchildren("{*}fptr")}
            if page.ocr_filename:
                taken.update(ids)
            else:
                named_in_vain.update(ids)
                lacks_text = lacks_text or len(division) > 0  # a page without files may lack one
            if len(ids & texts) > 1:
                what = f"ONI would read one alone of its {len(ids & texts)} OCR files"
                self.enter_fault(path, f"page {number}: {what}")
        for file in files:
            is_text = file.use in ("ocr", "alto")
            if file.is_xml and (not file.use or file.id in named_in_vain):
                is_text = True
            if not is_text or file.id in taken:
                continue
            if lacks_text:
                self.enter_fault(path, f"ONI would leave out the OCR file {file.id}")
            else:
                self.enter_warning(path, f"the OCR file {file.id or '(no ID)'} belongs to no page")

    def _look_for_twins(self, path: str) -> None:
        """Warn of another batch that holds the issue just loaded."""
        if self._counting or not self._pages:
            return
        issue = self._pages[0][1].issue
        twins = models.Issue.objects.filter(
            title_id=issue.title_id, date_issued=issue.date_issued, edition=issue.edition
        ).exclude(batch_id=self.current_batch.name)
        for other in twins.values_list("batch_id", flat=True)[:3]:
            day = str(issue.date_issued)[:10]
            told = "%s holds %s %s edition %s, too"
            self.enter_warning(path, told % (other, issue.title_id, day, issue.edition))

    def look_for_unlisted_issues(self) -> None:
        """Enter the issues that the file which lists them has, and that the loader has not met."""
        if self._part:
            return  # the first part has told of them
        listing = "data/" + self.current_batch.validated_batch_file
        document = batch_loader.etree.parse(f"file://{Links.link}/{listing}")
        count = len(issues_in(document))
        self._look_for_stale_list(listing, document)
        if not self._seen:
            self.enter_fault(listing, "it names no issue, so ONI would load nothing", order=0)
        elif count > self._seen:
            what = "ONI would leave out %d of its %d issues without a word"
            self.enter_fault(listing, what % (count - self._seen, count), order=0)

    def _look_for_stale_list(self, listing: str, document: Any) -> None:
        """Enter that batch.xml names issues which the list (`document`) that ONI reads does not."""
        plain = "data/batch.xml"
        if listing == plain or not os.path.exists(plain):
            return
        try:
            named = names_in(etree.parse(plain))
        except (OSError, etree.XMLSyntaxError):
            return
        left = named - names_in(document)
        if left:
            what = "it names %d issues that %s beside it, which ONI would read, does not"
            self.enter_fault(plain, what % (len(left), listing), order=0)

    def process_ocr(self, page: Any, index: bool = True) -> None:
        """Index a page as ONI's loader does.

        In most cases it is plain that ONI's reader takes the OCR file; in all others that reader
        reads it.
        """
        url = urllib.parse.urljoin(self.current_batch.storage_url, page.ocr_filename)
        if plainly_fine(Links.opened(url), self._languages):
            evaluate(page.url, page.issue.title.solr_doc)  # what Page.solr_doc can fail on
        else:
            self._begin_file(url)
            with contextlib.suppress(NotPretended):  # then it is not known what ONI would index
                super().process_ocr(page, index)
            self._begin_file(self._mets)

    def extract(self, url: str) -> Any:
        """Stand for ONI's ocr_extractor: have that read, and see how much text there is."""
        texts, coordinates = ocr_extractor(url)
        self._held = letters_of(Links.opened(url))
        if not self._held:
            self.enter_warning(Links.within_batch(url), "this OCR file has no text")
        return texts, coordinates

    def _see_indexed(self, document: Dict[str, Any]) -> None:
        """Enter that the document of a page, as ONI would index it, lacks some of its text."""
        texts = [text for field, text in document.items() if field.startswith("ocr_")]
        kept = sum(len("".join(text.split())) for text in texts)
        if self._held < 0:
            what = "it is no ALTO file, and ONI would index nothing of it"
            if not kept:
                self.enter_fault(self._path, f"page {self._at_page}: {what}")
        elif kept < self._held:
            what = f"ONI would index {kept} of the {self._held} characters of its text"
            self.enter_fault(self._path, f"page {self._at_page}: {what}")


def without_path(words: str, path: str) -> str:
    """Return an error's words without the path of the file that they are about."""
    either = f"(?:{re.escape(repr(path))}|{re.escape(path)})"
    # So an XML parser begins: the file, line and column.
    words = re.sub(re.escape(path) + ":([0-9]+):([0-9]+): ", r"line \1, column \2: ", words)
    words = re.sub(r" \([^()]*, line [0-9]+\)$", "", words)  # lxml's own, which repeats that
    unreadable = f"^Error reading file '?{re.escape(path)}'?: failed to load.*"  # lxml's words
    words = re.sub(unreadable, "it is missing, or cannot be read", words)
    words = re.sub(f": {either}(?=>?$)", "", words)
    return words.replace(f"{path}: ", "").replace(repr(path), "it").replace(path, "it")


class MetsFile:
    """A file that a METS file describes."""

    def __init__(self, element: Any) -> None:
        href = f"{{{batch_loader.ns['xlink']}}}href"
        self.id = element.get("ID")
        self.use = (element.get("USE") or element.getparent().get("USE") or "").strip().lower()
        self.is_xml = any(each.get(href, "").lower().endswith(".xml")
                          for each in element.iterchildren("{*}FLocat"))  # fmt: skip


def structure_of(division: Any) -> Any:
    """Return the structMap of a METS file that a division is in."""
    return next(division.iterancestors("{*}structMap"), None)


def issues_in(document: Any) -> List[Any]:
    """Return all elements of a list of issues that may be meant as one."""
    elements = document.iter("{*}*")
    return [each for each in elements if etree.QName(each).localname.lower() == "issue"]


def names_in(document: Any) -> Set[str]:
    """Return the METS files that a list of issues names; a validated one counts as the other."""
    names = (os.path.normpath((each.text or "").strip()) for each in issues_in(document))
    return {re.sub(r"_1(\.[A-Za-z]+)$", r"\1", name) for name in names}


def is_within_reach(url: str) -> bool:
    """Return whether what `url` names lies in the batch, in ONI's storage, or on the network.

    Of other files of this host nothing but their being elsewhere is told.
    """
    path = local_path(Links.opened(url))
    if path is None:
        return not url.startswith("/")
    return is_within(path, os.getcwd())


MAX_PLAIN = 1 << 20  # bytes of an OCR file that no database finds too long
BEYOND = bytes(range(0xF0, 0x100)) + b"\0"  # in UTF-8 these begin the characters beyond U+FFFF


def plainly_fine(url: str, languages: Set[str]) -> bool:
    """Return whether ONI's OCR reader surely takes the file at `url`, which has a text.

    False says nothing. `languages` has the codes that ONI's table is known to take, and grows.
    """
    seen: Set[str] = set()
    counts = {"Page": 0, "String": 0}

    def start(tag: str, attributes: List[str]) -> None:
        # The attributes are a list of name, value, name, value: half the time of a dict.
        if tag == "String":
            # An odd position is that of a value that reads CONTENT; without any, `index` raises.
            if attributes.index("CONTENT") % 2:
                raise ValueError("only a value has this name")
            counts["String"] += 1
        elif tag == "Page":
            counts["Page"] += 1
        elif tag == "TextBlock":
            code = "eng"
            if "language" in attributes:
                code = attributes[attributes.index("language") + 1]
            seen.add(code)

    try:
        with urllib.request.urlopen(url) as file:
            data = file.read()
        if len(data.translate(None, BEYOND)) < len(data) or b"&#" in data or b"<!DOCTYPE" in data:
            return False  # it may have characters beyond U+FFFF, UTF-16, entities
        if len(data) > MAX_PLAIN or data.rfind(b"<TextLine") > data.find(b"</Page>"):
            return False  # it may be too long for the database, or have lines outside its page
        if data.rfind(b"<String") > data.rfind(b"</TextLine>"):
            return False  # ONI takes a text where its line ends
        parser = expat.ParserCreate()
        parser.ordered_attributes = True
        parser.StartElementHandler = start
        parser.Parse(data, True)
        if len(seen) > 1:
            return False  # the texts of two languages may go to the same field of the index
        for code in seen - languages:
            if not language_is_known(code):
                return False
            languages.add(code)
    except Exception:
        return False
    return counts["Page"] < 2 and counts["String"] > 0


def letters_of(url: str) -> int:
    """Return how many characters of text, without spaces, an OCR file holds; -1: it is no ALTO.

    The CONTENT of a String is text, however both are spelt, and with any prefix. That of a hyphen
    (HYP), a Glyph or a Variant is not: it says once more what is in a String, or how a line ends.
    """
    held = 0
    depth = 0

    def start(tag: str, attributes: List[str]) -> None:
        nonlocal held, depth
        if not depth and tag.rpartition(":")[2].lower() != "alto":
            held = -1
        depth += 1
        if held >= 0 and tag.rpartition(":")[2].lower() == "string":
            for name, value in zip(attributes[::2], attributes[1::2]):
                if name.rpartition(":")[2].lower() == "content":
                    held += len("".join(value.split()))

    parser = expat.ParserCreate()
    parser.ordered_attributes = True
    parser.StartElementHandler = start
    try:
        with urllib.request.urlopen(url) as file:
            # ParseFile reads 2 KB at a time, and expat begins a long token anew with each.
            for piece in iter(lambda: file.read(1 << 20), b""):
                parser.Parse(piece)
            parser.Parse(b"", True)
    except expat.ExpatError:
        return 0  # ONI's own reader says what is wrong
    return held


class NotPretended(Exception):
    """ONI's code has asked for something that has no stand-in here: it is of another release."""


class PretendedTexts:
    """A stand-in for OCR.language_texts: keeps what ONI's loader makes, for ONI's Page.solr_doc."""

    def __init__(self, ocr: Any) -> None:
        self._ocr = ocr
        self._rows: List[Dict[str, str]] = []

    def create(self, language: Any, text: str) -> None:
        """Make a row, which goes nowhere."""
        if isinstance(text, list):
            text = str(text)  # as Django would store it
        models.LanguageText(ocr=self._ocr, language=language, text=text).save()
        self._rows.append({"language__code": language.code, "text": text})

    def select_related(self) -> "PretendedTexts":
        return self

    def values(self, *_: str) -> List[Dict[str, str]]:
        return self._rows

    def __getattr__(self, name: str) -> Any:
        raise NotPretended(name)


def language_is_known(code: str) -> bool:
    """Return whether ONI's loader finds one row for a language code (BatchLoader.process_ocr)."""
    rows = models.Language.objects.filter(Q(code=code) | Q(lingvoj__iendswith=code))
    return bool(rows.count() == 1)


# Tasks


def task_mend_index(name: str) -> None:
    """Make the index hold each page of a batch, and nothing else under its name.

    A page whose document is another batch's is left alone: to take it would only move the fault.
    """
    solr = solr_index.conn()
    pages = dict(pages_with_text(name))
    documents = documents_of(solr, name)
    missing = sorted(set(pages) - documents)
    for start in range(0, len(missing), 100):
        some = missing[start : start + 100]
        found = solr.search("{!terms f=id}" + ",".join(some), fl="id", rows=len(some))
        elsewhere = {document["id"] for document in found}
        for address in some:
            if address not in elsewhere:
                print("indexing", address, flush=True)
                solr.add([models.Page.objects.get(pk=pages[address]).solr_doc])
    for address in sorted(documents - set(pages)):
        print("deleting", address, flush=True)
        solr.delete(id=address)
    solr.commit()
    print("the index is mended", flush=True)


def pages_with_text(name: str) -> Iterator[Tuple[str, int]]:
    """Yield the address and key of each page of a batch whose text went to Solr."""
    rows = models.Page.objects.filter(issue__batch_id=name, indexed=True)
    for page in rows.select_related("issue__title").iterator():
        yield address_of(page), page.pk


def task_forget_documents(name: str) -> None:
    """Delete from the index what a failed purge has left of a batch."""
    solr = solr_index.conn()
    solr.delete(q=f'batch:"{name}"')
    solr.commit()
    print("deleted the documents of", name, flush=True)


def task_index_titles(*lccns: str) -> None:
    """Put the documents of titles into the index, which load_titles does for new titles alone."""
    solr = solr_index.conn()
    for title in models.Title.objects.filter(lccn__in=lccns):
        print("indexing title", title.lccn, flush=True)
        solr.add([title.solr_doc])
    solr.commit()


# ---------------------------------------------------------------- Open ONI


def section_inside_oni() -> str:
    """Return the section "inside Open ONI" of this file, after as many empty lines as precede it.

    So a traceback has this file's line numbers. It is read once, when the agent starts: an upgrade
    may replace the file later.
    """
    lines = Path(__file__).read_text("utf-8").split("\n")
    first, end = (
        number for number, line in enumerate(lines) if re.search(r"^# -+ (inside )?Open ONI$", line)
    )
    return "\n" * first + "\n".join(lines[first:end])


class TransientProblem(Problem):
    """A problem that may be gone in a moment: a job asks again, until its deadline."""


class WorkerEnded(Exception):
    """A worker has ended without an answer; the text has its last words."""


class Deadline:
    """A moment that is `within` seconds away when it is made, until which ONI may answer."""

    def __init__(self, within: float) -> None:
        self._until = time.monotonic() + within
        self._within = within

    def left(self) -> float:
        """Return the seconds until then; none are less than 0."""
        return max(0, self._until - time.monotonic())

    def missed(self) -> TransientProblem:
        """Return the problem that there was no answer until then."""
        return TransientProblem(f"Open ONI did not answer within {self._within:g} s")


class OpenONI:
    """The way to Open ONI: its manage.py, and through it its database, index and loader.

    Questions are functions of the room above. A zygote, a manage.py shell that has all of ONI in
    memory, forks a worker for each; a few that have only asked the database wait for the next one.
    """

    def __init__(self, location: Path, environ: Mapping[str, str]) -> None:
        self.location = location
        self.environment = dict(
            environ,
            VIRTUAL_ENV=f"{location}/ENV",
            PATH=f"{location}/ENV/bin:{environ.get('PATH', os.defpath)}",
            PYTHONUNBUFFERED="1",  # else it prints in lumps of 8 KB
        )
        for name in (*OWN_VARIABLES, LIMITS_OF_TESTS, "PYTHONHOME", "NOTIFY_SOCKET"):
            self.environment.pop(name, None)
        self._section = section_inside_oni()
        self._zygote: Optional[Zygote] = None
        self._starting = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_QUESTIONS)
        self._idle: List[Worker] = []  # list's append and pop need no lock
        self._is_doubtful = False  # whether ONI's code has failed at a question since it started

    def start(self, *words: Any, **options: Any) -> "subprocess.Popen[bytes]":
        """Start manage.py with `words`, in a session of its own, so that it outlives the agent.

        `options` are subprocess.Popen's. Raises CouldNotStart, or Scarce where it is to be tried
        again.
        """
        manage = self.location / "manage.py"
        program = [str(manage), *map(str, words)]
        if not os.access(manage, os.X_OK):
            program.insert(0, f"{self.location}/ENV/bin/python3")
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("env", self.environment)
        try:
            manage.stat()
            return subprocess.Popen(
                program, cwd=str(self.location), start_new_session=True, **options
            )
        except OSError as error:
            kind = Scarce if is_scarce(error) else CouldNotStart
            raise kind(f"couldn't run {manage}: {error}") from error

    def start_task(self, task: str, *words: Any, **options: Any) -> "subprocess.Popen[bytes]":
        """Start a manage.py shell that calls one function of that section with `words`."""
        source = f"{self._section}\n{task}(*{words!r})\n"
        # The source is no argument, so that ps shows a short line; as a variable it may have 128
        # KiB (MAX_ARG_STRLEN of Linux). It is compiled under this file's name, to which tracebacks
        # then lead.
        code = (
            f"import os; exec(compile(os.environ.pop('INSIDE_ONI'), {__file__!r}, 'exec'),"
            " {'__name__': 'inside Open ONI'})"
        )
        environment = {**self.environment, "INSIDE_ONI": source}
        return self.start("shell", "-c", code, env=environment, **options)

    def ask(self, question: str, *words: Any, within: float = ANSWER_SECONDS) -> Any:
        """Return the answer to a client's question, after `within` seconds at the most.

        One that may pass by itself is asked once more. Raises Problem.
        """
        deadline = Deadline(within)
        if not self._slots.acquire(timeout=within):
            raise TransientProblem(f"Open ONI did not answer within {within:g} s: too many ask it")
        try:
            try:
                return self._answer(question, words, deadline)
            except TransientProblem:
                if deadline.left() < 0.5:
                    raise
                time.sleep(0.2)
                return self._answer(question, words, deadline)
        finally:
            self._slots.release()

    def insist(self, question: str, *words: Any, within: float = PATIENT_SECONDS) -> Any:
        """Return the answer to a job's question, which is asked anew for `within` seconds while
        what is wrong may pass by itself. Raises Problem.
        """
        deadline = Deadline(within)
        while True:
            try:
                return self._answer(question, words, deadline)
            except TransientProblem:
                if deadline.left() < 1:
                    raise
                time.sleep(1)

    def study(
        self,
        questions: Sequence[Sequence[Any]],
        within: float,
        on_news: Callable[[int, Dict[str, Any]], None],
        go_on: Callable[[], None],
        patience: float = PATIENT_SECONDS,
    ) -> List[Any]:
        """Return the answers to several questions, [name, words…], each asked of a new worker.

        `on_news` gets the number of a question, and the news that comes before its answer. `go_on`
        is called about each second; what it raises ends all of them. Both are called from several
        threads at once. A question is asked anew for `patience` seconds while what is wrong may
        pass by itself. Raises Problem, Scarce.
        """
        deadline = Deadline(within)
        is_given_up = threading.Event()

        def go_on_with_all() -> None:
            if is_given_up.is_set():
                raise Scarce("there is no thread for another question")
            go_on()

        def study_one(number: int) -> Any:
            tell = functools.partial(on_news, number)
            patient_until: Optional[Deadline] = None  # from the first failure on
            while True:
                try:
                    return self._study(questions[number], deadline, tell, go_on_with_all)
                except TransientProblem:
                    if patient_until is None:
                        patient_until = Deadline(min(patience, deadline.left()))
                    if patient_until.left() < 1:
                        raise
                go_on_with_all()
                time.sleep(1)

        with futures.ThreadPoolExecutor(len(questions)) as pool:
            try:
                begun = [submitted(pool, study_one, number) for number in range(len(questions))]
            except Scarce:
                is_given_up.set()
                raise
            return [future.result() for future in begun]

    def _study(
        self,
        question: Sequence[Any],
        deadline: Deadline,
        on_news: Callable[[Dict[str, Any]], None],
        go_on: Callable[[], None],
    ) -> Any:
        name, *words = question
        try:
            worker = self._new_worker(deadline)
            reply = worker.reply(name, words, deadline, on_news, go_on)
        except WorkerEnded as error:
            raise TransientProblem(str(error)) from error
        worker.end()
        return answer_in(reply)

    def _answer(self, question: str, words: Sequence[Any], deadline: Deadline) -> Any:
        worker = self._idle_worker()
        if worker:
            try:
                return self._answer_of(worker, question, words, deadline)
            except WorkerEnded:  # it had been idle for too long
                pass
        return self._answer_of_new(question, words, deadline)

    def _idle_worker(self) -> Optional["Worker"]:
        """Return a worker that waits for a question, if there is one whose ONI is up to date."""
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return None
            if self._is_up_to_date(worker.zygote):
                return worker
            worker.end()

    def _is_up_to_date(self, zygote: "Zygote") -> bool:
        """Return whether what a zygote has imported, settings above all, can be relied on."""
        most = DOUBTFUL_SECONDS if self._is_doubtful else ZYGOTE_SECONDS
        return zygote is self._zygote and zygote.age() <= most

    def _answer_of_new(self, question: str, words: Sequence[Any], deadline: Deadline) -> Any:
        try:
            return self._answer_of(self._new_worker(deadline), question, words, deadline)
        except WorkerEnded as error:
            raise TransientProblem(str(error)) from error

    def _answer_of(
        self, worker: "Worker", question: str, words: Sequence[Any], deadline: Deadline
    ) -> Any:
        reply = worker.reply(question, words, deadline)
        is_kept = question.startswith("answer_") and len(self._idle) < KEPT_WORKERS
        if reply.get("transient") or reply.get("is_failure"):
            self._is_doubtful = True
            is_kept = False
        if is_kept:
            self._idle.append(worker)
        else:
            worker.end()
        return answer_in(reply)

    def _new_worker(self, deadline: Deadline) -> "Worker":
        """Return a new worker. Raises Problem, Scarce, WorkerEnded."""
        zygote = self._living_zygote(deadline)
        try:
            return zygote.fork(deadline)
        except OSError as error:
            if is_scarce(error):
                raise
            zygote.end()  # it was about to end, having nothing to do
            return self._living_zygote(deadline).fork(deadline)

    def _living_zygote(self, deadline: Deadline) -> "Zygote":
        """Return the zygote, which is started if there is none. Raises Problem."""
        if not self._starting.acquire(timeout=deadline.left()):
            raise deadline.missed()
        try:
            zygote = self._zygote
            if zygote and not self._is_up_to_date(zygote):
                zygote.retire()
                zygote = None
            if zygote is None or zygote.has_ended():
                zygote = self._zygote = Zygote(self, deadline)
                self._is_doubtful = False
            return zygote
        finally:
            self._starting.release()

    def close(self) -> None:
        """End the zygote and its workers; the next question starts another."""
        if self._zygote:
            self._zygote.end()


def answer_in(reply: Dict[str, Any]) -> Any:
    """Return the answer in a worker's reply. Raises Problem, and TransientProblem."""
    if "problem" in reply:
        raise (TransientProblem if reply.get("transient") else Problem)(reply["problem"])
    return reply["answer"]


class Zygote:
    """A manage.py shell that forks workers. Raises Problem where it does not start in time."""

    def __init__(self, oni: OpenONI, deadline: Deadline) -> None:
        self._begun = time.monotonic()
        # Messages have bounds here, so that no two threads' can get mixed up.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._stderr = open(os.memfd_create("stderr"), "a+b", buffering=0)
        with theirs:
            self._process = oni.start_task(
                "serve_workers",
                theirs.fileno(),
                SHELL_SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
            )
        self._control.settimeout(max(0.1, deadline.left()))
        try:
            ready = self._control.recv(100)
        except socket.timeout:
            self.end()
            raise deadline.missed()
        if not ready:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # if `end` killed it first, its own status would be lost
            self.end()
            # Nothing in it raises a signal: one came from outside, as when memory is short.
            kind = TransientProblem if (self._process.returncode or 0) < 0 else Problem
            raise kind(f"Open ONI cannot be asked: {self.last_words()}")
        self._control.settimeout(1)

    def fork(self, deadline: Deadline) -> "Worker":
        """Return a new worker. Raises OSError if the zygote has ended, WorkerEnded."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno().to_bytes(4, sys.byteorder)
            self._control.sendmsg([b"fork"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, number)])
        return Worker(self, ours, deadline)

    def kill(self, pid: int) -> None:
        """Have a worker killed, if it is still there."""
        with contextlib.suppress(OSError):  # without its zygote, it ends by its own alarm
            self._control.send(b"kill %d" % pid)

    def last_words(self) -> str:
        """Return the last line that this process, or one of its workers, has printed on stderr."""
        size = os.fstat(self._stderr.fileno()).st_size
        printed = os.pread(self._stderr.fileno(), 4096, max(0, size - 4096))
        last = printed.decode("utf-8", "replace").strip("\0 \n").rpartition("\n")[2]
        return last[:300] or "manage.py shell ended"

    def age(self) -> float:
        """Return the seconds since it was started."""
        return time.monotonic() - self._begun

    def retire(self) -> None:
        """Let it end when its workers have answered; it forks no more of them."""
        with contextlib.suppress(OSError):  # it has ended already
            self._control.send(b"retire")

    def has_ended(self) -> bool:
        """Return whether there is no such process any more."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Kill it, with its workers: the one change that these make, an awardee, is one INSERT."""
        if self._process.returncode is None:  # its number cannot be another's yet
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._control.close()
        # A hung file system may hold it for ever.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)


class Worker:
    """A fork of the zygote, which answers one question at a time. Raises WorkerEnded, Problem."""

    def __init__(self, zygote: Zygote, channel: socket.socket, deadline: Deadline) -> None:
        self.zygote = zygote
        self._channel = channel
        self._received = b""
        self._pid = int(self._message(deadline)["pid"])

    def reply(
        self,
        question: str,
        words: Sequence[Any],
        deadline: Deadline,
        on_news: Callable[[Dict[str, Any]], None] = do_nothing,
        go_on: Callable[[], None] = do_nothing,
    ) -> Dict[str, Any]:
        """Return the reply to a question. `on_news` and `go_on` are as for OpenONI.study.

        Raises Problem if there is none at the deadline, WorkerEnded if the worker
        ends, and what `go_on` raises; in all these cases the worker is no more.
        """
        is_answered = False
        try:
            seconds = max(1, deadline.left())
            self._channel.settimeout(seconds)
            self._channel.sendall(json.dumps([question, words, seconds]).encode() + b"\n")
            while True:
                message = self._message(deadline, go_on)
                if "news" not in message:
                    is_answered = True
                    return message
                on_news(message["news"])
        except OSError as error:
            raise WorkerEnded(f"Open ONI cannot be asked: {error}") from error
        finally:
            if not is_answered:
                self.end()

    def _message(
        self, deadline: Deadline, go_on: Callable[[], None] = do_nothing
    ) -> Dict[str, Any]:
        """Return the next message; see `reply`."""
        parts = [self._received]
        size = 0
        while b"\n" not in parts[-1]:
            if not deadline.left():
                raise deadline.missed()
            go_on()
            self._channel.settimeout(max(0.01, min(1, deadline.left())))
            with contextlib.suppress(socket.timeout):
                parts.append(self._channel.recv(1 << 16))
                size += len(parts[-1])
                if not parts[-1]:
                    raise WorkerEnded(f"Open ONI cannot be asked: {self.zygote.last_words()}")
            if size > MAX_REPLY:
                raise Problem(f"Open ONI's answer has more than {MAX_REPLY >> 20} MiB")
        line, _, self._received = b"".join(parts).partition(b"\n")
        message: Dict[str, Any] = json.loads(line)
        return message

    def end(self) -> None:
        """End this worker at once, whatever it is doing."""
        self.zygote.kill(self._pid)
        self._channel.close()


# ---------------------------------------------------------------- batch files

# What load_batch takes, but for what could not stand in its URLs.
BATCH_NAME = re.compile(r"batch_\w+_\w+_ver\d\d[\w.-]*")
BATCH_FILES = (  # load_batch reads the first that is there
    "batch_1.xml",
    "BATCH_1.xml",
    "batchfile_1.xml",
    "batch_2.xml",
    "BATCH_2.xml",
    "batch.xml",
)
COPY_ATTEMPTS = 5  # a second apart: network storage may fail for a moment
LISTING = "data/batch.xml"  # the list of a batch's issues, which a patch reads and writes
NDNP = "{http://www.loc.gov/ndnp}"


def read_regular(path: Path) -> bytes:
    """Return what is in a regular file. Raises Problem, in the Go agent's words."""
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_NONBLOCK)  # it may be a FIFO
        try:
            file = open(descriptor, "rb")
        except OSError:  # it is a folder
            os.close(descriptor)
            raise
        with file:
            if not os.path.isfile(descriptor):
                raise Problem(f"reading file: {path} is not a regular file")
            return file.read()
    except OSError as error:
        if is_scarce(error):
            raise
        reason = (error.strerror or str(error)).lower()
        raise Problem(f"reading file: open {path}: {reason}") from error


def parse_with_comments(path: Path) -> ET.Element:
    """Return the root of an XML file, with the comments of the file in it. Raises Problem."""
    builder = ET.TreeBuilder(insert_comments=True, insert_pis=True)
    try:
        return ET.fromstring(read_regular(path), ET.XMLParser(target=builder))
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: the encoding
        raise Problem(f"reading file: {path}: {error}")


def beside(path: Path, href: Optional[str]) -> Path:
    """Return the file that `href` in the XML file `path` names, as ONI's urljoin reads it."""
    target = re.sub(r"[\n\r\t]", "", href or "").lstrip()
    target = re.sub("^file:(//)?(?=/)", "", target)
    return Path(os.path.normpath(path.parent / target)) if target else path


class Patch:
    """A new batch that is to be made of an old one, without some of its issues."""

    def __init__(self, old: Path, removals: Dict[str, str]) -> None:
        """Read the batch in the folder `old`.

        `removals` maps the keys of the issues that are to go to the words that asked for each.
        Raises Problem if a key names no issue of the batch, or more than one.
        """
        self.old = old
        listing = old / LISTING
        root = parse_with_comments(listing)
        going: List[Path] = []  # METS files
        staying: List[Path] = []
        named: List[str] = []  # the keys of those that go
        for issue in root.findall(f"{NDNP}issue"):
            path = beside(listing, issue.text)
            keys = issue_keys(issue, path) & removals.keys()
            if keys:
                named.extend(keys)
                going.append(path)
                root.remove(issue)
            else:
                staying.append(path)
        self._check_named(named, removals)
        if not staying:
            raise Problem(f"no issue of {old.name} would be left")
        gone = {path.parent for path in going}
        for path in staying:
            if gone.intersection(path.parents):
                raise Problem(f"{path}, which is to stay, lies in the folder of one that is to go")
        reels = [beside(listing, reel.text) for reel in root.findall(f"{NDNP}reel") if reel.text]
        # The new batch.xml names METS files without _1. load_batch prefers lists with _1, which
        # name what goes, too; so no such list goes along, nor the files that only it would name.
        gone.update(validated_twin(path) for path in staying + reels if path.exists())
        gone.update(listing.with_name(name) for name in BATCH_FILES)
        self._gone = gone  # the paths that are left out
        ET.register_namespace("", NDNP.strip("{}"))
        self.listing: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)

    def _check_named(self, named: List[str], removals: Dict[str, str]) -> None:
        """Raise Problem unless each key of `removals` is once in `named`."""
        for key, words in removals.items():
            if key not in named:
                raise Problem(f"{words} names no issue of {self.old.name}; write LCCN/YYYYMMDDEE")
            if named.count(key) > 1:
                raise Problem(
                    f"{words} may mean any of {named.count(key)} issues, since folders and editions"
                    " disagree; mend batch.xml or the folders first"
                )

    def is_made(self, new: Path) -> bool:
        """Return whether `new` is there already. Raises Problem if it is another batch."""
        if not os.path.lexists(str(new)):
            return False
        if read_regular(new / LISTING) != self.listing:
            raise Problem(f"{new} is there already, and is not what this patch makes; move it away")
        return True

    def make(
        self,
        new: Path,
        tell: Callable[[str], None],
        go_on: Callable[[], None] = do_nothing,
        check: Callable[[Path], None] = lambda made: None,
    ) -> None:
        """Make the batch `new`, which gets its name only when it is whole and on disk.

        Calls `tell` with sentences about how far it is, `go_on`, which may raise, before each file,
        and `check` with the folder of what was made, which raises Problem if ONI could not load
        that. Raises Problem, OSError.
        """
        unready = new.with_name(f"WIP-UNREADY-{new.name}")
        if unready.exists():
            tell(f"removing {unready}, which an interrupted patch has left")
            shutil.rmtree(str(unready))
        try:
            self._copy(unready, tell, go_on)
            (unready / LISTING).write_bytes(self.listing)
            sync(unready / LISTING)
            check(unready)
            for folder, _, _ in os.walk(str(unready)):
                sync(folder)
            unready.rename(new)
            sync(new.parent)
        finally:
            shutil.rmtree(str(unready), ignore_errors=True)  # gone, once it is renamed

    def _copy(
        self, unready: Path, tell: Callable[[str], None], go_on: Callable[[], None]
    ) -> None:
        """Copy what stays, without the listing; tell of each tenth of the bytes.

        Raises Problem, as where there is too little room.
        """
        sizes = self._sizes()
        need = len(self.listing) + sum(sizes.values())
        free = shutil.disk_usage(str(unready.parent)).free
        if need > free:
            raise Problem(
                f"the patch needs {need:,} bytes in {unready.parent}, where {free:,} are free"
            )
        done = 0

        def left_out(folder: str, names: List[str]) -> List[str]:
            return [name for name in names if os.path.join(folder, name) not in sizes]

        def copy(source: str, target: str) -> None:
            nonlocal done
            copy_patiently(source, target, tell, go_on)
            if os.path.getsize(target) != sizes[source]:
                raise Problem(f"{source} has changed since the patch began")
            before = done * 10 // need
            done += sizes[source]
            if done * 10 // need > before:
                tell(f"{done * 100 // need} % of {need:,} bytes")

        shutil.copytree(
            str(self.old), str(unready), symlinks=True, ignore=left_out, copy_function=copy
        )

    def _sizes(self) -> Dict[str, int]:
        """Return the paths of what is to be copied, with the bytes of each."""
        return {
            str(path): path.lstat().st_size
            for path in self.old.rglob("*")
            if self._gone.isdisjoint([path, *path.parents])
            and not path.name.lower().endswith((".tif", ".tiff"))
        }


def validated_twin(path: Path) -> Path:
    """Return where the validated copy of a METS file would be: `x_1.xml` for `x.xml`."""
    return path.with_name(f"{path.stem}_1{path.suffix}")


def copy_patiently(
    source: str, target: str, tell: Callable[[str], None], go_on: Callable[[], None]
) -> None:
    """Copy a file, safely to disk, in at most COPY_ATTEMPTS attempts, a second apart.

    Calls `tell` with each failure but the last, and `go_on`, which may raise, before each attempt.
    Raises Problem if all fail: after an OSError copytree would go on to the next file.
    """
    for attempt in range(1, COPY_ATTEMPTS + 1):
        go_on()
        try:
            shutil.copy2(source, target)
            sync(target)
            return
        except OSError as error:
            failure = f"{source} cannot be copied: {error.strerror or error}"
            if attempt == COPY_ATTEMPTS:
                raise Problem(failure) from error
        tell(f"{failure}; trying again")
        time.sleep(1)


def read_instructions(path: Path) -> Dict[str, str]:
    """Read instructions, a line `RemoveIssue LCCN/YYYYMMDDEE` each; blank lines are skipped.

    Return the keys of the issues that are to go, each with the line that says so, for messages.
    Raises Problem, OSError.
    """
    removals = {}
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), 1):
        word, _, key = " ".join(line.split()).partition(" ")
        if word == "RemoveIssue":
            removals[plain_key(key)] = f"line {number}: {line.strip()!r}"
        elif word:
            raise Problem(
                f"line {number}: {word!r} is not an instruction; RemoveIssue is the only one"
            )
    if not removals:
        raise Problem("there is no instruction to remove an issue")
    return removals


def issue_keys(issue: ET.Element, path: Path) -> Set[str]:
    """Return the keys that may name an issue: with its edition by batch.xml, and by its folder."""
    lccn, date, edition = (issue.get(name, "") for name in ("lccn", "issueDate", "editionOrder"))
    return {plain_key(f"{lccn}/{date}{edition:0>2}"), plain_key(f"{lccn}/{path.parent.name}")}


def plain_key(key: str) -> str:
    """Return an issue's key without dashes and underscores, which do not count."""
    return re.sub("[-_]", "", key)


def remove_issues(words: List[str]) -> int:
    """Make a batch from another without some issues, without ONI; return the exit status.

    `words` are the old batch's folder, the new one's, and the keys of the issues that are to go.
    """
    if len(words) < 3:
        complain("--remove-issues needs FOLDER NEWFOLDER LCCN/YYYYMMDDEE…")
        return 2  # as argparse does for wrong arguments
    old, new = (Path(os.path.abspath(word)) for word in words[:2])
    try:
        if new == old or old in new.parents:
            raise Problem(f"{new} lies in {old}; name a folder outside of it")
        patch = Patch(old, {plain_key(key): repr(key) for key in words[2:]})
        if patch.is_made(new):
            print(f"nothing to do: {new} is there already, and is what this makes")
            return 0
        patch.make(new, print)
    except (Problem, OSError) as problem:
        complain(problem)
        return 1
    print(f"{new} is whole")
    return 0


def sync(path: Union[str, Path]) -> None:
    """Put a file safely on disk, or what was made or renamed in a folder."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- the batch


class Glance:
    """A background answer, made anew every PROGRESS_SECONDS at most, however many ask."""

    def __init__(self, make: Callable[..., Dict[str, Any]]) -> None:
        self._make = make
        self._pool = futures.ThreadPoolExecutor(1)
        self._answers: Dict[Tuple[Any, ...], Dict[str, Any]] = {}  # by the words it is about
        self._due = 0.0  # the monotonic time when they are to be made anew

    def __call__(self, *words: Any) -> Dict[str, Any]:
        """Return what `make` has last answered, after a second at the most; {} if nothing yet."""
        with contextlib.suppress(Problem, OSError):
            in_time(lambda: self._make_anew(words), 1, self._pool)
        return self._answers.get(words, {})

    def _make_anew(self, words: Tuple[Any, ...]) -> None:
        """Ask, if that is due, in the pool's one thread; an answer may come after its time."""
        if words not in self._answers or time.monotonic() >= self._due:
            self._answers.setdefault(words, {})  # it is asked, whether it will answer or not
            self._due = time.monotonic() + PROGRESS_SECONDS
            self._answers = {words: self._make(*words)}


class Memory:
    """Facts that are slow to find out, in a table of jobs.db; they may be lost at any time.

    The worst that an error of the database can do here is that something is counted again.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(
            str(path), timeout=1, check_same_thread=False, isolation_level=None
        )
        with contextlib.suppress(sqlite3.Error):
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS remembered (what TEXT PRIMARY KEY, facts TEXT NOT NULL)"
            )

    def recall(self, what: str) -> Dict[str, Any]:
        """Return the facts that were kept last under `what`, or {}."""
        return self.recall_all(what).get(what, {})

    def recall_all(self, pattern: str) -> Dict[str, Dict[str, Any]]:
        """Return all facts whose names match an SQL GLOB pattern, by their names."""
        try:
            with self._lock:
                rows = self._database.execute(
                    "SELECT what, facts FROM remembered WHERE what GLOB ?", [pattern]
                ).fetchall()
        except sqlite3.Error:
            return {}
        return {what: json.loads(facts) for what, facts in rows}

    def keep(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep facts, by their names, in the place of earlier ones."""
        rows = [(what, json.dumps(each)) for what, each in facts.items()]
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany("REPLACE INTO remembered VALUES (?, ?)", rows)
            finally:
                self._database.execute("COMMIT")


@dataclass
class Files:
    """What the files of a batch name, as ONI's own loader reads them (see files_of)."""

    issues: int = 0
    pages: int = 0
    with_text: int = 0  # pages that have an OCR file
    rows_digest: str = ""  # the digest of all pages' addresses
    text_digest: str = ""  # the same, of the pages with an OCR file
    watched: str = ""  # see sizes_and_times
    problem: str = ""  # why ONI cannot read them; then nothing else is known


@dataclass
class BatchState:
    """A batch as three sets of page addresses: of its files, in ONI's database, in Solr.

    It is complete when these are equal, and the newest event says that the load has ended; partial
    when they are known to differ; unknown when one of them could not be had. None is what is not
    known. Numbers are for people: equal numbers prove nothing.
    """

    name: str
    on_disk: bool = False  # whether it lies in BATCH_SOURCE
    row: bool = False
    loaded: str = ""  # when the row was made
    issues: int = 0
    pages: int = 0
    indexed: int = 0  # pages whose text went to Solr
    rows_digest: Optional[str] = None  # the digest of all pages' addresses
    text_digest: Optional[str] = None  # the same, of those whose text went to Solr
    # The newest events, [time, message]; in list-batches the newest alone, as [its key, message].
    events: List[List[Any]] = field(default_factory=list)
    files: Optional[Files] = None
    files_problem: str = ""  # why it is not known what the files name
    pages_in_solr: Optional[int] = None  # documents under its name
    index_is_right: Optional[bool] = None  # whether they are those of its pages
    lost: int = 0  # pages of which Solr has no document at all
    replaced: int = 0  # pages whose document is another batch's
    other_batches: List[str] = field(default_factory=list)  # whose documents these are
    stray: int = 0  # documents that are none of its pages'
    index_problem: str = ""  # why Solr could not be asked
    storage: str = ""  # ONI's folder of links to batches

    @property
    def issues_in_batch_xml(self) -> Optional[int]:
        """How many issues the batch's files name."""
        return self.files.issues if self.files else None

    @property
    def pages_in_mets(self) -> Optional[int]:
        """How many pages the batch's files name."""
        return self.files.pages if self.files else None

    @property
    def ended_well(self) -> bool:
        """Whether the newest event is a load's end. Without any, they were pruned long ago."""
        return not self.events or self.events[-1][1].startswith("processed")

    @property
    def rows_are_right(self) -> Optional[bool]:
        """Whether the database holds what the files name, or None if that is not known."""
        if not self.ended_well:
            return False
        if self.files is None:
            return None
        held = (self.issues, self.rows_digest, self.text_digest)
        if held == (self.files.issues, self.files.rows_digest, self.files.text_digest):
            return True
        if self.rows_digest is None and self.pages == self.files.pages:
            return None
        return False

    @property
    def state(self) -> str:
        """The word for it: absent, partial, complete or unknown."""
        if not self.row:
            return "absent"
        sides = (self.rows_are_right, self.index_is_right)
        if False in sides:
            return "partial"
        return "unknown" if None in sides else "complete"

    def __str__(self) -> str:
        """Return the state in sentences, without a stop."""
        facts = [self._of_database()]
        if self.index_problem:
            facts.append(f"Solr cannot be asked ({self.index_problem})")
        elif self.pages_in_solr and not self.row:
            facts.append(f"Solr still has {self.pages_in_solr} of its pages, which lead nowhere")
        elif self.rows_are_right is not False:
            facts += self._of_index()
        return "; ".join(facts)

    def _of_database(self) -> str:
        if not self.row:
            return "ONI holds nothing of the batch"
        if self.files is None:
            held = f"ONI holds {self.issues} issues and {self.pages} pages, and what it should hold"
            return f"{held} is not known: {self.files_problem or 'it is yet to be counted'}"
        held = f"ONI holds {self.issues} of the {self.files.issues} issues"
        held += f" and {self.pages} of the {self.files.pages} pages"
        if self.state == "complete":
            return f"the batch is complete: {held}"
        if self.indexed != self.files.with_text and self.pages == self.files.pages:
            held += f", {self.indexed} of {self.files.with_text} with their text"
        elif self.rows_are_right is False and self.pages == self.files.pages and self.ended_well:
            held += ", but not the same ones: the files have changed since, or have faults, which"
            held += " batch-check tells"
        if not self.ended_well:
            held += f', and its last event is "{self.events[-1][1]}"'
        return held

    def _of_index(self) -> Iterator[str]:
        """Yield how the index differs from the database."""
        if self.lost:
            yield f"Solr lacks {self.lost} of {self.indexed} pages"
        if self.stray:
            yield f"Solr has documents under its name that are none of its pages ({self.stray})"
        if self.replaced:
            others = ", ".join(self.other_batches)
            yield (
                f"{self.replaced} pages are found under another batch, which has the same pages"
                f" ({others}): purge the one that should not have them"
            )


class Check:
    """What a rehearsal has found: what would go wrong with a load of a batch."""

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Put together what several workers have found, each in its part of the issues."""
        self.faults: List[Dict[str, str]] = []
        self.warnings: List[Dict[str, str]] = []
        self.titles: Dict[str, bytes] = {}  # the records of titles that ONI lacks, by LCCN
        self.files = Files(**files_of(parts))
        self._places: Dict[str, List[str]] = {}  # the METS files that have a page, by its address
        told_titles: Set[str] = set()  # that ONI lacks; each part of the check tells of its own
        for fault in in_order_of_issues(parts, "faults"):
            if not fault["title"] or fault["title"] not in told_titles:
                self.faults.append({"file": fault["file"], "fault": fault["fault"]})
            told_titles.add(fault["title"])
        for warning in in_order_of_issues(parts, "warnings"):
            self.warnings.append({"file": warning["file"], "warning": warning["warning"]})
        for issue in in_order_of_issues(parts, "found"):
            for address, _ in issue["pages"]:
                self._places.setdefault(address, []).append(issue["file"])
        for part in parts:
            for lccn, record in part["titles"].items():
                self.titles[lccn] = base64.b64decode(record)
        self.pages = sum(len(places) for places in self._places.values())
        self._warn_of_twins()

    def _warn_of_twins(self) -> None:
        for address, places in self._places.items():
            if len(places) > 1:
                where = " and in ".join(dict.fromkeys(places))
                told = f"{len(places)} pages have the address {address}: in {where}"
                self.warnings.append({"file": places[0], "warning": told})

    @property
    def summary(self) -> str:
        """The first faults, in a sentence."""
        shown = [f"{fault['file']}: {fault['fault']}" for fault in self.faults[:3]]
        if len(self.faults) > 3:
            shown.append(f"and {len(self.faults) - 3} more")
        return f"{self.faults_counted} in the batch's files: {'; '.join(shown)}"

    @property
    def faults_counted(self) -> str:
        """The number of faults, in words: `1 fault`, `2 faults`."""
        return f"{len(self.faults)} fault{'' if len(self.faults) == 1 else 's'}"


def in_order_of_issues(parts: Sequence[Mapping[str, Any]], what: str) -> List[Dict[str, Any]]:
    """Return what the parts of a check have found under one name, as the issues are listed."""
    found = [each for part in parts for each in part[what]]
    return sorted(found, key=lambda each: int(each["order"]))


def may_be_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether an entry of BATCH_SOURCE is a folder, or leads to where nobody can look.

    One bad link must not hide all other batches. Raises OSError that is scarce.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if is_scarce(error):
            raise
        return error.errno != errno.ELOOP  # which is no folder to batch-status, either


class SharedCheck:
    """A check that several clients wait for, and that ends when none of them is left."""

    def __init__(self) -> None:
        self.clients = 0  # the first one begins it
        self.done = threading.Event()
        self.found: Optional[Check] = None
        self.problem = "a fault of the agent, see its log"


class Site:
    """An Open ONI and its batches: answers what ONI holds of one, from all three places."""

    def __init__(self, settings: Settings, oni: OpenONI) -> None:
        self.source = settings.batch_source
        self.oni = oni
        self.memory = Memory(settings.state_directory / "jobs.db")
        self.progress = Glance(self._ask_progress)  # of a batch, as a job loads it
        self.health = Glance(self._ask_health)  # whether ONI answers
        self.batch_list = BatchList(self)
        self.checked: Dict[str, Tuple[int, int]] = {}  # issues that a job's check has done, of all
        self._counts: Dict[str, "futures.Future[Dict[str, Any]]"] = {}  # by a batch's name
        self._counting = threading.Lock()  # guards _counts
        self._checks: Dict[str, SharedCheck] = {}
        self._checking = threading.Lock()  # guards _checks and the clients in them
        self._client_checks = threading.BoundedSemaphore(1)  # each takes all cores
        self._client_titles = threading.BoundedSemaphore(MAX_QUESTIONS // 2)

    def folder(self, name: str) -> Path:
        """Return where the batch `name` lies, or would. Raises Problem if it is no batch's name."""
        if not BATCH_NAME.fullmatch(name):
            raise Problem(f'"{name}" is not a batch name: Open ONI takes batch_AWARDEE_NAME_verNN')
        return self.source / name

    def records(self, path: Path, go_on: Callable[[], None]) -> List[Dict[str, Any]]:
        """Return what ONI would make of the MARC records in a file, as study_records has it.

        A job asks this; what `go_on`, which is called each second, raises ends that. Raises Problem
        where ONI could not make a title of one.
        """
        question = ["study_records", str(path), CHECK_SECONDS]
        [records] = self.oni.study([question], CHECK_SECONDS, do_nothing, go_on)
        return list(records)

    def look_at_records(self, path: Path) -> None:
        """Raise Problem where ONI could not make a title of a MARC record in a client's file.

        Only RECORDS_SECONDS of a long file are looked at: ONI's loader takes milliseconds a record,
        and the job looks at all of them before ONI loads one. Half of the places for questions stay
        free for other questions, so a client may wait here for its turn.
        """
        if not self._client_titles.acquire(timeout=PATIENT_SECONDS):
            raise TransientProblem(f"too many titles for {PATIENT_SECONDS} s; ask again")
        try:
            self.oni.ask("study_records", str(path), RECORDS_SECONDS, within=PATIENT_SECONDS)
        finally:
            self._client_titles.release()

    def batch(self, name: str) -> BatchState:
        """Return what there is of a batch now, for a client. Raises Problem."""
        until = time.monotonic() + ANSWER_SECONDS
        state = self.state(name, self.oni.ask("answer_batch", name, SOLR_SECONDS))
        self.add_files(state, until)
        return state

    def patient_batch(
        self, name: str, go_on: Callable[[], None], patience: float = PATIENT_SECONDS
    ) -> BatchState:
        """Return what there is of a batch now, for a job, which has time.

        Asks database and Solr anew for `patience` seconds, and has the files of a batch that ONI
        holds counted for up to CHECK_SECONDS. What is not known then is None.

        What `go_on`, which is called each second, raises ends that. Raises Problem.
        """
        until = time.monotonic() + patience
        while True:
            left = max(1.0, until - time.monotonic())
            # Solr gets less time than the question; else nobody would say that Solr is what hangs.
            held = self.oni.insist("answer_batch", name, left * 0.8, within=left)
            state = self.state(name, held)
            go_on()
            if not state.index_problem or time.monotonic() + 1 > until:
                break
            time.sleep(1)
        if state.row:  # else its files would not change the word for it
            self.add_files(state, time.monotonic() + CHECK_SECONDS, go_on)
        return state

    def state(self, name: str, held: Mapping[str, Any]) -> BatchState:
        """Return a batch's state from what answer_batch has said, without a word of its files.

        Raises Problem if the row is another batch's.
        """
        if held["name"] != name:
            raise Problem(
                f'Open ONI has the batch "{held["name"]}", and its database takes the two names'
                " for one"
            )
        state = BatchState(**held)
        if state.pages_in_solr is not None:
            state.index_is_right = not (state.lost or state.replaced or state.stray)
        self._forget_other_rows(state)
        return state

    def _forget_other_rows(self, state: BatchState) -> None:
        """Have list-batches count the rows of a batch anew if they are not those it remembers.

        Its key for them, row_key, does not change when rows are replaced by as many others.
        """
        remembered = self.memory.recall(f"rows {state.name}")
        if remembered and remembered["rows_digest"] != state.rows_digest:
            self.memory.keep({f"rows {state.name}": {**remembered, "key": ""}})

    def add_files(
        self, state: BatchState, until: float, go_on: Callable[[], None] = do_nothing
    ) -> None:
        """Add what a batch's files name, if that is known before the monotonic time `until`."""
        try:
            self._add_files(state, until, go_on)
        except Problem as problem:
            state.files_problem = str(problem)

    def _add_files(self, state: BatchState, until: float, go_on: Callable[[], None]) -> None:
        folder = self.source / state.name
        left = min(PATIENT_SECONDS, max(0.5, until - time.monotonic()))
        state.on_disk = in_time(folder.is_dir, left)
        if not state.on_disk:  # but ONI has a link to where it has loaded it from
            folder = Path(state.storage) / state.name
            if not state.row:
                return
        facts = self.memory.recall(f"files {state.name}")
        watched = facts.get("watched", "")
        if not self.oni.insist("answer_unchanged", str(folder), watched, within=left):
            facts = self._counted(state.name, str(folder), until, go_on)
        if facts["problem"]:
            raise Problem(facts["problem"])
        state.files = Files(**facts)

    def _counted(
        self, name: str, folder: str, until: float, go_on: Callable[[], None]
    ) -> Dict[str, Any]:
        """Return what a batch's files name, counted now, once for all who ask for it meanwhile.

        Raises Scarce, and Problem at the monotonic time `until`; the counting goes on, to be
        remembered.
        """
        with self._counting:
            future = self._counts.get(name)
            if future is None:
                future = self._counts[name] = submitted(COUNTS, self._count, name, folder)
        while not futures.wait([future], min(1, max(0.1, until - time.monotonic()))).done:
            go_on()
            if time.monotonic() >= until:
                raise Problem("its files are still being counted; ask again")
        return future.result()

    def _count(self, name: str, folder: str) -> Dict[str, Any]:
        try:
            return self._count_files(name, folder)
        finally:
            with self._counting:
                # It is not there if a thread was to be had only after `submitted` had given up.
                self._counts.pop(name, None)

    def _count_files(self, name: str, folder: str) -> Dict[str, Any]:
        parts = in_time(lambda: parts_of(folder), PATIENT_SECONDS)
        questions = [["study_part", name, folder, part, parts] for part in range(parts)]
        found = self.oni.study(questions, CHECK_SECONDS, do_nothing, do_nothing)
        facts = files_of(found)
        self.keep_files({name: Files(**facts)})
        return facts

    def keep_files(self, files: Mapping[str, Files]) -> None:
        """Remember what the files of batches name, as long as these files do not change."""
        self.memory.keep({f"files {name}": vars(each) for name, each in files.items()})

    def on_disk(self) -> List[str]:
        """Return the names of the batches in BATCH_SOURCE. Raises Problem."""
        return in_time(self._folders)

    def _folders(self) -> List[str]:
        with os.scandir(self.source) as entries:
            return [each.name for each in entries if BATCH_NAME.fullmatch(each.name)
                    and may_be_folder(each)]  # fmt: skip

    def _ask_health(self) -> Dict[str, Any]:
        try:
            health = {"answers": True, **self.oni.ask("answer_health")}
        except Problem as problem:
            return {"answers": False, "problem": str(problem)}
        if "solr_problem" in health:
            health["problem"] = f"Solr is down: {health['solr_problem']}"
        return health

    def _ask_progress(self, name: str, _job_id: int) -> Dict[str, Any]:
        """Return how far a job is with loading a batch.

        The job's id is not used here; with it, Glance gives no answer about an earlier job.
        """
        if name in self.checked:
            done, of = self.checked[name]
            return {"checked": done, "to_check": of}
        counts = self.oni.insist("answer_counts", name)
        files = self.memory.recall(f"files {name}")
        return {
            "issues_loaded": counts["issues"],
            "issues": files.get("issues"),
            "pages_loaded": counts["pages"],
            "pages": files.get("pages"),
        }

    def check(
        self,
        name: str,
        progress: Callable[[int, int], None],
        go_on: Callable[[], None],
        folder: str = "",
        patience: float = PATIENT_SECONDS,
    ) -> Check:
        """Return what would go wrong with a load of a batch. Raises Problem, Scarce.

        `folder` is where its files are for now, if not under its name in BATCH_SOURCE. `patience`
        is how long ONI is asked anew if it cannot answer, in seconds. `progress` is told of issues
        done and issues in all; what `go_on`, which is called each second, raises, ends the check.
        """
        folder = folder or str(self.folder(name))
        parts = in_time(lambda: parts_of(folder), PATIENT_SECONDS, meanwhile=go_on)
        done = [0] * parts

        def on_news(part: int, news: Dict[str, Any]) -> None:
            done[part] = news["done"]
            progress(sum(done), news["of"])

        questions = [["study_rehearsal", name, folder, part, parts] for part in range(parts)]
        found = Check(self.oni.study(questions, CHECK_SECONDS, on_news, go_on, patience))
        if not found.faults:
            self.keep_files({name: found.files})
        return found

    def client_check(self, name: str, go_on: Callable[[], object]) -> Check:
        """Return what would go wrong with a load of a batch, to a client.

        Clients that ask for the same batch meanwhile share one check. Raises Problem, and what
        `go_on` raises when the client has gone.
        """
        with self._checking:
            shared = self._checks.get(name)
            is_new = shared is None
            if shared is None:
                shared = self._checks[name] = SharedCheck()
            shared.clients += 1  # before the check begins, which ends when nobody waits for it
            if is_new:
                self._begin_check(name, shared)
        try:
            while not shared.done.wait(0.2):
                go_on()
        finally:
            with self._checking:
                shared.clients -= 1
        if shared.found is None:
            raise Problem(shared.problem)
        return shared.found

    def _begin_check(self, name: str, shared: SharedCheck) -> None:
        """Start a thread that makes a check; _checking is held. Raises Scarce."""
        thread = threading.Thread(
            target=self._run_check, args=(name, shared), name="check", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # no thread to be had
            self._forget_check(name, shared)
            raise Scarce(str(error)) from error

    def _run_check(self, name: str, shared: SharedCheck) -> None:
        """Make a check that clients share, when it is its turn."""

        def go_on() -> None:
            with self._checking:
                if not shared.clients:
                    self._forget_check(name, shared)  # who asks from now on begins another
                    raise Problem("nobody waits for this check any more")

        try:
            while not self._client_checks.acquire(timeout=0.2):
                go_on()
            try:
                shared.found = self.check(name, do_nothing, go_on, patience=ANSWER_SECONDS)
            finally:
                self._client_checks.release()
        except (Problem, OSError) as problem:
            shared.problem = str(problem)
        finally:
            with self._checking:
                self._forget_check(name, shared)
                shared.done.set()

    def _forget_check(self, name: str, shared: SharedCheck) -> None:
        """See to it that no client shares a check from now on; _checking is held."""
        if self._checks.get(name) is shared:
            del self._checks[name]

    def must_be_there(self, name: str) -> None:
        """Raise Problem unless the batch is in BATCH_SOURCE."""
        folder = self.folder(name)
        if in_time(folder.exists):
            return
        self.on_disk()  # which raises Problem if BATCH_SOURCE itself has gone
        if self.oni.ask("answer_holds", name):
            raise Problem(f"Open ONI holds it, but its files are not there: {folder} is missing")
        raise Problem(f"there is no such batch, in BATCH_SOURCE or in Open ONI{self.similar(name)}")

    def similar(self, name: str) -> str:
        """Return `; did you mean "X"?` with a batch whose name is like `name`, or ""."""
        there: List[str] = []
        with contextlib.suppress(Problem, OSError):  # a guess must not hide what is wrong
            there += self.on_disk()
            there += self.oni.ask("answer_names")
        return did_you_mean(name, there)


class BatchList:
    """The states of all batches, looked at anew whenever somebody asks for them.

    What is slow to find out is remembered: the digests of files (with the sizes and times of the
    files), of rows (with the numbers and the newest event of the batch) and of the index (with
    Solr's own version of it). What is not known is counted in the background, for the next time.
    """

    def __init__(self, site: "Site") -> None:
        self._site = site
        self._lock = threading.Lock()
        self._counter: Optional[threading.Thread] = None

    def get(self) -> List[BatchState]:
        """Return the states now. Raises Problem.

        What cannot be counted within LIST_SECONDS is None in them.
        """
        listed = ListedBatches(self._site)
        if listed.is_known():
            return listed.in_order()
        with self._lock:
            if self._counter is None or not self._counter.is_alive():
                counter = threading.Thread(target=self._count, name="counter", daemon=True)
                try:
                    counter.start()
                except RuntimeError:  # no thread to be had: the next who asks has it counted
                    return listed.in_order()
                self._counter = counter
            counter = self._counter
        counter.join(LIST_SECONDS)
        listed.recall()
        return listed.in_order()

    def _count(self) -> None:
        """Count, for the memory, all that is not known by a look of its own."""
        try:
            listed = ListedBatches(self._site)
            listed.count_index()
            listed.count_rows()
            listed.count_files()
        except (Problem, OSError) as problem:
            log.warning("the batches could not be counted: %s", problem)


class ListedBatches:
    """One look at all batches. Raises Problem."""

    def __init__(self, site: "Site") -> None:
        self._site = site
        names = set(site.on_disk())
        wanted = []
        self._watched: Dict[str, str] = {}  # by a batch's name, what was known before this look
        for what, facts in site.memory.recall_all("files *").items():
            self._watched[what[len("files ") :]] = facts["watched"]
        for name in sorted(names.union(self._watched)):
            folder = str(site.source / name) if name in names else ""
            wanted.append([name, folder, self._watched.get(name, "")])
        seen = site.oni.ask("study_overview", wanted, SOLR_SECONDS, within=LIST_PATIENCE)
        self._storage = seen["storage"]
        self._index_version = seen.get("index_version", "")
        self._unchanged: Set[str] = set()  # the batches whose files are as they were
        self.states: Dict[str, BatchState] = {}
        for name, held in seen["batches"].items():
            if held.pop("unchanged"):
                self._unchanged.add(name)
            state = BatchState(**held, on_disk=name in names)
            state.index_problem = seen.get("index_problem", "")
            self.states[name] = state
        self.recall()

    def recall(self) -> None:
        """Fill in what is remembered, where it still holds by this look."""
        files = self._site.memory.recall_all("files *")
        rows = self._site.memory.recall_all("rows *")
        index = self._site.memory.recall("index")
        for name, state in self.states.items():
            self._recall_files(state, files.get(f"files {name}", {}))
            known = rows.get(f"rows {name}", {})
            if known.get("key") == row_key(state):
                state.rows_digest = known["rows_digest"]
                state.text_digest = known["text_digest"]
            digest = None
            if self._index_version and index.get("version") == self._index_version:
                digest = index["batches"].get(name, [0, ""])[1]
            self._compare_index(state, digest)

    def _recall_files(self, state: BatchState, facts: Mapping[str, Any]) -> None:
        """Fill in what a batch's files name, if it was counted from the files as they are now.

        Facts whose `watched` is not the one that this look compared were counted after it.
        """
        if not facts:
            return
        counted_since = facts["watched"] != self._watched.get(state.name)
        if not counted_since and state.name not in self._unchanged:
            return
        state.files_problem = facts["problem"]
        if not facts["problem"]:
            state.files = Files(**facts)

    def _compare_index(self, state: BatchState, digest: Optional[str]) -> None:
        """Say whether the documents under a batch's name are its pages', as far as that is known.

        `digest` is that of the documents, None if not known. Fewer documents than pages prove
        nothing: pages that have the same address share one.
        """
        if state.pages_in_solr is None:
            return
        if not state.pages_in_solr or not state.indexed:
            state.index_is_right = state.pages_in_solr == state.indexed
        elif state.pages_in_solr > state.indexed:
            state.index_is_right = False
        elif digest is not None and state.text_digest is not None:
            state.index_is_right = digest == state.text_digest

    def in_order(self) -> List[BatchState]:
        """Return the states by the names of the batches."""
        return [self.states[name] for name in sorted(self.states)]

    def is_known(self) -> bool:
        """Return whether there is nothing to count."""
        for state in self.states.values():
            if self._lacks_files(state):
                return False
            if state.row and (state.rows_digest is None or state.index_is_right is None):
                return False
        return True

    def _lacks_files(self, state: BatchState) -> bool:
        return state.files is None and not state.files_problem

    def count_index(self) -> None:
        """Read the addresses in the whole index, if it may have changed since the last time."""
        if not self._index_version:
            return  # this Solr does not say when its index has changed: nothing can be remembered
        if self._index_version == self._site.memory.recall("index").get("version"):
            return
        batches = self._site.oni.insist("study_index", within=CHECK_SECONDS)
        self._site.memory.keep({"index": {"version": self._index_version, "batches": batches}})

    def count_rows(self) -> None:
        """Read the addresses of the batches whose rows may have changed."""
        unknown = [each for each in self.states.values() if each.row and each.rows_digest is None]
        for some in in_chunks(unknown, 200):
            facts = {}
            for news in self._told(["study_rows", [state.name for state in some]]):
                name = news.pop("name")
                facts[f"rows {name}"] = {"key": row_key(self.states[name]), **news}
            self._site.memory.keep(facts)

    def count_files(self) -> None:
        """Read the files of the batches that may have changed, on all cores."""
        unknown = [each for each in self.states.values() if self._lacks_files(each)]
        with futures.ThreadPoolExecutor(cores()) as pool:
            list(pool.map(self._count_some_files, in_chunks(unknown, 50)))

    def _count_some_files(self, some: Sequence[BatchState]) -> None:
        batches = [[state.name, self._folder(state)] for state in some]
        counted = {}
        for news in self._told(["study_files", batches]):
            name = news.pop("name")
            counted[name] = Files(**news)
        self._site.keep_files(counted)

    def _folder(self, state: BatchState) -> str:
        """Return the folder of a batch's files: BATCH_SOURCE's, or what ONI has a link to."""
        folder = self._site.source if state.on_disk else Path(self._storage)
        return str(folder / state.name)

    def _told(self, question: Sequence[Any]) -> List[Dict[str, Any]]:
        """Return the news that come before the answer to a question. Raises Problem."""
        told: List[Dict[str, Any]] = []
        self._site.oni.study(
            [question], CHECK_SECONDS, lambda _, news: told.append(news), do_nothing
        )
        return told


def cores() -> int:
    """Return how many cores this process may use, MAX_PARTS at the most."""
    return min(len(os.sched_getaffinity(0)), MAX_PARTS)


def parts_of(folder: str) -> int:
    """Return in how many processes to look at the batch in `folder`: in one, if it is small."""
    listings = (os.path.join(folder, "data", name) for name in BATCH_FILES)
    size = max(os.path.getsize(path) if os.path.isfile(path) else 0 for path in listings)
    return min(cores(), 1 + size // LIST_OF_PART)


def row_key(state: BatchState) -> str:
    """Return a text that changes when rows of a batch come or go."""
    return json.dumps([state.loaded, state.issues, state.pages, state.indexed, state.events])


def in_chunks(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield `things` in sequences of `size` each, the last one maybe shorter."""
    for start in range(0, len(things), size):
        yield things[start : start + size]


def did_you_mean(word: str, words: Iterable[str], likeness: float = 0.85) -> str:
    """Return `; did you mean "X"?`, X being the one of `words` most like a wrong one, or "".

    Names of batches begin and end alike, so these must be more alike than other words.
    """
    closest = difflib.get_close_matches(word, list(words), 1, likeness)
    return f'; did you mean "{closest[0]}"?' if closest and closest[0] != word else ""


# ---------------------------------------------------------------- jobs and their store

PENDING: Final = "pending"
STARTED: Final = "started"
COULD_NOT_START: Final = "couldn't start"
SUCCESSFUL: Final = "successful"
FAILED: Final = "failed"
FinalStatus = Literal["couldn't start", "successful", "failed"]
Status = Literal["pending", "started", "couldn't start", "successful", "failed"]
STATUS_MESSAGES: Dict[Status, str] = {  # NCA knows no other statuses
    PENDING: "Pending: this job is in the queue but hasn't been started yet.",
    STARTED: "Started: this job is currently running.",
    COULD_NOT_START: "Invalid: this job was not able to start.",
    SUCCESSFUL: "Success: this job is complete.",
    FAILED: "Failed: this job started but returned a non-zero exit code.",
}
NO_OP = "No-op: job is redundant or already completed"  # in place of a new job


class Outcome(NamedTuple):
    """What came of an attempt: a status, and why it was not successful ("" if it was)."""

    status: FinalStatus
    error: str


class End(NamedTuple):
    """The end of a job: its last attempt's outcome, and when, in nanoseconds since 1970."""

    status: FinalStatus
    error: str
    when: int


@dataclass
class Job:
    """A request that was accepted, and what became of it. Times are nanoseconds since 1970."""

    id: int
    words: List[str]
    queued: int
    started: Optional[int] = None  # when its first attempt began; None: none has
    end: Optional[End] = None  # None: it has not ended
    attempts: int = 0  # but for those that an agent's stop has cut short
    cancelled: bool = False  # somebody has asked for its end after it began

    @property
    def status(self) -> Status:
        """Return the status, as answers give it."""
        if self.end:
            return self.end.status
        return PENDING if self.started is None else STARTED

    @property
    def finished(self) -> bool:
        """Return whether the job has ended."""
        return self.end is not None

    @property
    def error(self) -> str:
        """Return why the job was not successful; "" if it was, or has not ended."""
        return self.end.error if self.end else ""

    @property
    def ended(self) -> Optional[int]:
        """Return when the job ended; None if it has not."""
        return self.end.when if self.end else None


def message_for_person(job: Job) -> str:
    """Return a sentence about a job's status for a person. NCA gets STATUS_MESSAGES."""
    if job.status == FAILED and job.started is None:
        return "Failed: this job never started."
    return STATUS_MESSAGES[job.status]


class JobStore:
    """The jobs on disk: `jobs.db`, `logs/` and `inputs/` in the state folder of one agent.

    Its methods raise Problem or OSError. Those that change a job return when the change is safely
    on disk; no two threads may be in one of them at once. They end the agent if it cannot be known
    whether a change is on disk: it would have to guess what to answer.
    """

    APPLICATION = 0x4F4E4941  # SQLite's application_id: "ONIA"
    VERSION = 1  # SQLite's user_version
    SCHEMA = f"""
        BEGIN;
        CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, words TEXT NOT NULL,
            queued INTEGER NOT NULL, status TEXT NOT NULL, started INTEGER,
            ended INTEGER, error TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0,
            cancelled INTEGER NOT NULL DEFAULT 0);
        PRAGMA application_id = {APPLICATION};
        PRAGMA user_version = {VERSION};
        COMMIT;
    """
    COLUMNS = "id, words, queued, status, started, ended, error, attempts, cancelled"
    # What must stay where it is while an agent is at work.
    PARTS = ("", "jobs.db", "agent.lock", "run.lock", "logs", "inputs")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "jobs.db"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_an_agents(folder):
                folder.chmod(0o700)
            self._agent_lock = self._keep_others_out()
            for name in "logs", "inputs":
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            if not (folder / "run.lock").exists():
                (folder / "run.lock").touch(mode=0o600)
            self._database = self._open()
            self.newest_id = self._highest_id()
            self._tidy_inputs()
            self._parts = {part: identity(folder / part) for part in self.PARTS}
        except (OSError, sqlite3.Error) as error:
            raise Problem(f"{self._path} cannot be used ({error}); nothing was changed") from error

    def _keep_others_out(self) -> IO[str]:
        """Return a locked file, by which other agents know of this one. Raises Problem."""
        until = time.monotonic() + LAST_CHILD_SECONDS
        while True:
            try:
                return locked(self.folder / "agent.lock")
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise Problem(
                        f"another ONI Agent is at work on {self.folder}; give this one a"
                        " STATE_DIRECTORY of its own"
                    ) from error
            time.sleep(0.005)

    def _open(self) -> sqlite3.Connection:
        """Return the connection that writes; make the table of jobs if there is none yet."""
        is_new = not self._path.exists() or self._is_empty()
        # isolation_level=None: sqlite3 begins no transactions of its own accord.
        database = sqlite3.connect(
            str(self._path), LOCK_SECONDS, check_same_thread=False, isolation_level=None
        )
        # FULL: a commit is on disk when it returns. The checkpoint is for the agent after
        # _give_up: what that one wrote last may be in the kernel's cache alone.
        database.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_checkpoint(TRUNCATE)"
        )
        if is_new:
            database.executescript(self.SCHEMA)
        return database

    def _is_empty(self) -> bool:
        """Return whether the database has no tables yet. Raises Problem if it cannot be used."""
        # A database that is not the agent's must not be changed, and SQLite may change one when it
        # closes it. But it has to take back the journal that a crash at the first start has left.
        mode = "rw" if self._path.with_name("jobs.db-journal").exists() else "ro"
        opened = sqlite3.connect(f"{self._path.as_uri()}?mode={mode}", uri=True)
        with contextlib.closing(opened) as database:
            tables, application, version, state = database.execute(
                "SELECT (SELECT count(*) FROM sqlite_master), application_id, user_version,"
                " quick_check FROM pragma_application_id, pragma_user_version, pragma_quick_check"
            ).fetchone()
        if tables and application != self.APPLICATION:
            raise Problem(f"{self._path} is not an ONI Agent's; nothing was changed")
        if version > self.VERSION:
            raise Problem(f"{self._path} was written by a newer ONI Agent; nothing was changed")
        if state != "ok":
            raise Problem(
                f"{self._path} is damaged; put a copy from a backup in its place, or move it away"
            )
        return not tables

    def _highest_id(self) -> int:
        """Return the highest id that was given. Logs count, as jobs.db may be an older copy."""
        [[highest]] = self._read("SELECT ifnull(max(seq), 0) FROM sqlite_sequence")
        with os.scandir(self.folder / "logs") as logs:
            for log_file in logs:
                stem, _, suffix = log_file.name.partition(".")
                if suffix == "log" and re.fullmatch("[0-9]{1,18}", stem):
                    highest = max(highest, int(stem))
        return int(highest)

    def _tidy_inputs(self) -> None:
        """Remove the inputs of requests that a killed agent had not accepted yet."""
        for entry in (self.folder / "inputs").iterdir():
            is_accepted = entry.name.isdigit() and int(entry.name) <= self.newest_id
            if entry.is_dir() and not is_accepted:
                shutil.rmtree(entry)
            elif entry.name.startswith("unready-"):
                entry.unlink()

    def check_in_place(self) -> None:
        """End the agent if a part of the state folder was removed or replaced. Raises OSError.

        What it would still write would be lost, and ids would be given twice.
        """
        for part in self.PARTS:
            if self._is_missing(part):
                end_agent(
                    f"{self.folder / part} was removed or replaced while the agent was at work:"
                    " put it back, or start the agent anew with what is there now",
                    EXIT_HOPELESS,
                )

    def _is_missing(self, part: str) -> bool:
        """Return whether a part is gone, or another one is in its place. Raises OSError."""
        try:
            return identity(self.folder / part) != self._parts[part]
        except (FileNotFoundError, NotADirectoryError):
            return True

    def mark_stop(self) -> None:
        """Leave word for the next agent that this one was stopped on purpose."""
        (self.folder / "stopped").touch(mode=0o600)

    def take_stop_mark(self) -> bool:
        """Return whether the last agent was stopped on purpose, and forget that."""
        try:
            (self.folder / "stopped").unlink()
        except FileNotFoundError:
            return False
        return True

    # -- reading

    def _read(self, statement: str, *values: object) -> List[Any]:
        """Return the rows of a query. Raises Scarce.

        The query has a connection of its own, so it waits neither for this agent's changes nor for
        a backup.
        """
        try:
            opened = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", READ_SECONDS, uri=True)
            with contextlib.closing(opened) as database:
                return database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise Scarce(f"{self._path} cannot be used: {error}") from error

    def _jobs(self, condition: str, *values: object) -> List[Job]:
        """Return the jobs for which an SQL condition holds, oldest first."""
        rows = self._read(f"SELECT {self.COLUMNS} FROM jobs WHERE {condition}", *values)
        rows.sort()
        try:
            # Read in one go, thousands take a fifth of the time.
            words = json.loads(f"[{','.join(row[1] for row in rows)}]")
        except ValueError as error:
            raise Problem(f"{self._path} is damaged: {error}") from error
        return [job_of_row(row, its_words) for row, its_words in zip(rows, words)]

    def unfinished(self) -> List[Job]:
        """Return every job that has not ended, oldest first."""
        return self._jobs("status IN (?, ?)", PENDING, STARTED)

    def find(self, id: int) -> Optional[Job]:
        """Return the job of an id, or None."""
        return next(iter(self._jobs("id = ?", id)), None)

    def select(
        self, before: int, statuses: Sequence[Status] = (), word: str = "", limit: int = -1
    ) -> List[Job]:
        """Return the newest `limit` jobs with ids below `before`, or all (-1), oldest first.

        If `statuses` are given, only jobs with one of them count; if `word` is, only jobs one of
        whose words it is.
        """
        conditions = ["id < ?"]
        values: List[object] = [before]
        if statuses:
            conditions.append(f"status IN ({', '.join('?' * len(statuses))})")
            values += statuses
        if word:
            conditions.append("instr(words, ?)")  # a JSON list: in quotes it is a whole word
            values.append(json.dumps(word))
        condition = " AND ".join(conditions)
        return self._jobs(f"{condition} ORDER BY id DESC LIMIT ?", *values, limit)

    def count(self) -> int:
        """Return how many jobs there are."""
        [[count]] = self._read("SELECT count(*) FROM jobs")
        return int(count)

    def newest_moment(self) -> int:
        """Return when the newest job was asked for, or ended; 0 if there is none."""
        rows = self._read(
            "SELECT max(queued, ifnull(ended, 0)) FROM jobs ORDER BY id DESC LIMIT 1"
        )
        return int(rows[0][0]) if rows else 0

    def expired(self, now: int) -> List[int]:
        """Return the ids of jobs that ended more than KEEP_DAYS before `now`, oldest first.

        The KEEP_JOBS newest are none of them. Nor is a job with a higher id than one that was asked
        for in these days: its old times are from a day when the clock was wrong.
        """
        horizon = now - KEEP_DAYS * DAY
        rows = self._read(
            "SELECT id FROM jobs WHERE ended < ?"
            " AND id <= (SELECT id FROM jobs WHERE ended NOT NULL"
            "  ORDER BY id DESC LIMIT 1 OFFSET ?)"
            " AND id < (SELECT ifnull(min(id), ?) FROM jobs WHERE queued BETWEEN ? AND ?)"
            " ORDER BY id",
            horizon,
            KEEP_JOBS,
            self.newest_id + 1,
            horizon,
            now,
        )
        return [id for [id] in rows]

    # -- changing

    def _commit(self, statement: str, *rows: Sequence[object]) -> None:
        """Execute a statement for each row of values, all or none, and put that on disk.

        Raises Scarce if nothing was changed. Ends the agent if that cannot be known.
        """
        try:
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(statement, rows)
        except sqlite3.Error as error:
            self._take_back()
            raise Scarce(f"{self._path} cannot be used: {error}") from error
        try:
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            # On a full disk the commit is not whole, and SQLite will ignore what was written of it.
            if str(error) != "database or disk is full":
                self._give_up(error)
            self._take_back()
            raise Scarce(f"{self._path} cannot be used: {error}") from error

    def _take_back(self) -> None:
        """Roll back the transaction that was not committed, if there is one."""
        if self._database.in_transaction:
            try:
                self._database.execute("ROLLBACK")
            except sqlite3.Error as error:
                self._give_up(error)

    def _give_up(self, error: sqlite3.Error) -> NoReturn:
        """End the agent, so that the next one reads from disk what has become of a change.

        SQLite would roll it back in this process; but what was written counts for whoever opens the
        database next, even if fsync has failed.
        """
        end_agent(
            f"{self._path}: {error}, and it is not known whether the last change is on the disk",
            EXIT_AGAIN,
        )

    @contextlib.contextmanager
    def new_input(self) -> Iterator[IO[bytes]]:
        """Give a file for what comes on standard input: gone afterwards, unless `add` took it."""
        folder = Path(tempfile.mkdtemp(prefix="unready-", dir=str(self.folder / "inputs")))
        try:
            with open(folder / "input.xml", "wb", buffering=0) as file:
                yield file
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(self, words: List[str], given: Optional[Path] = None) -> Job:
        """Return a new pending job, whose input, if any, is the file `given` of new_input."""
        job = Job(self.newest_id + 1, words, time.time_ns())
        place = self.input_path(job).parent
        if given:
            # An agent that was killed before it gave this id may have left something.
            shutil.rmtree(place, ignore_errors=True)
            given.parent.rename(place)
        try:
            if given:
                sync(place.parent)
            self._commit(
                "INSERT INTO jobs (id, words, queued, status) VALUES (?, ?, ?, ?)",
                (job.id, json.dumps(words), job.queued, PENDING),
            )
        except OSError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        self.newest_id = job.id
        return job

    def input_path(self, job: Job) -> Path:
        """Return where a job's input is: what came on standard input, alone in a folder."""
        return self.folder / "inputs" / str(job.id) / "input.xml"

    def begin(self, job: Job, when: int, attempts: int) -> None:
        """Enter that an attempt, the `attempts`-th, begins at `when` (nanoseconds since 1970)."""
        started = when if job.started is None else job.started
        self._commit(
            "UPDATE jobs SET status = ?, started = ?, attempts = ? WHERE id = ?",
            (STARTED, started, attempts, job.id),
        )
        job.attempts = attempts
        job.started = started

    def cancel(self, job: Job) -> None:
        """Enter that a job that has begun is to end."""
        self._commit("UPDATE jobs SET cancelled = 1 WHERE id = ?", (job.id,))
        job.cancelled = True

    def end(self, job: Job, end: End) -> None:
        """Enter how a job ended."""
        self._commit(
            "UPDATE jobs SET status = ?, error = ?, ended = ? WHERE id = ?",
            (end.status, end.error, end.when, job.id),
        )
        job.end = end

    def index_path(self, job: Job) -> Path:
        """Return where the index of a job's log is (see LogReader)."""
        return self.folder / "logs" / f"{job.id}.log"

    def remove_files(self, id: int) -> None:
        """Remove a job's log and input. Raises OSError.

        This comes before `forget`, so that a crash in between leaves no files without a job.
        """
        for suffix in "log", "out", "err":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.folder / "logs" / f"{id}.{suffix}")
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder / "inputs" / str(id))

    def forget(self, ids: Iterable[int]) -> None:
        """Forget jobs whose files have been removed."""
        self._commit("DELETE FROM jobs WHERE id = ?", *[(id,) for id in ids])


def job_of_row(row: Tuple[Any, ...], words: List[str]) -> Job:
    """Return the job in a row of JobStore.COLUMNS; `words` are its words, read from JSON."""
    id, _, queued, status, started, ended, error, attempts, cancelled = row
    end = None if status in (PENDING, STARTED) else End(status, error, ended)
    return Job(id, words, queued, started, end, attempts, bool(cancelled))


def identity(path: Path) -> Tuple[int, int]:
    """Return the device and inode of a file or folder. Raises OSError."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


class Clock:
    """The time of day by which jobs are forgotten, as long as it can be believed.

    A clock that is set years ahead by mistake would have the whole history forgotten. So a jump of
    more than KEEP_DAYS, from the newest job's time or from what the clock said before, is doubted
    for a day of the monotonic clock, which nobody can set; if it still stands, it is believed.

    `newest` is the newest job's time, or 0; `wall` and `steady` return nanoseconds.
    """

    def __init__(
        self,
        newest: int,
        wall: Callable[[], int] = time.time_ns,
        steady: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._seen_at = steady()
        self._seen = newest or wall()
        self._doubted_at: Optional[int] = None

    def believed(self) -> Optional[int]:
        """Return the time of day, or None as long as it is doubted."""
        now = self._wall()
        steady_now = self._steady()
        expected = self._seen + steady_now - self._seen_at
        if now - expected > KEEP_DAYS * DAY:
            if self._doubted_at is None:
                self._doubted_at = steady_now
                log.warning(
                    "the clock says %s, long after the newest job: nothing is forgotten for a day",
                    timestamp(now),
                )
            if steady_now - self._doubted_at < DAY:
                return None
        self._doubted_at = None
        self._seen = max(now, expected)  # a clock that was set back is right again some day
        self._seen_at = steady_now
        return now


def locked(path: Path) -> TextIO:
    """Lock a file until what is returned is closed.

    Raises BlockingIOError if somebody else has locked it, OSError if that cannot be tried.
    """
    file = open(path, "a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# ---------------------------------------------------------------- logs

# The log of job 7 lies in three files. manage.py itself writes 7.out and 7.err, so that it needs no
# agent; LogWriter writes the index, 7.log: the agent's notes, and how much had been printed when.
# LogReader puts the three together, as lines with stamps.
#
# NCA sorts lines by their stamps, so no two may be equal, and a line has to have the same stamp
# each time it is read. Say that these are two neighbouring entries of the index with sizes:
#
#     [2026-11-22T11:07:19.000000000Z] = 500 0
#     [2026-11-22T11:07:19.250000000Z] = 510 4
#
# Then 10 bytes came on standard output in between, such as "abc\ndefgh\n". A line is stamped with
# the later entry's moment, and a nanosecond more for each byte before its newline: here …250000003
# and …250000009. Standard error comes after all of that, from …250000011 on. LogWriter gives the
# next entry a moment that is later than all these stamps.
#
# A very long line comes in parts. A part ends where a block of the file ends that has no newline.
# Blocks are BLOCK bytes long, and the first one begins where the file does.

# Where a line of a log comes from:
STDOUT = "O"  # manage.py has printed it on standard output
STDERR = "E"  # manage.py has printed it on standard error
NOTE = "A"  # the agent has written it
ALL_SOURCES = (STDOUT, STDERR, NOTE)


def timestamp(nanoseconds: int) -> str:
    """Return a moment in UTC, always with nine digits: NCA sorts lines as strings."""
    second, nanosecond = divmod(nanoseconds, 10**9)
    return f"{second_in_utc(second)}.{nanosecond:09d}Z"


@functools.lru_cache(maxsize=1000)  # most of the moments that are shown together share a second
def second_in_utc(second: int) -> str:
    """Return a second since 1970 as text, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class Child(NamedTuple):
    """A process that an agent has started. Its birth tells it from later ones of its number."""

    pid: int
    birth: str  # the boot's id, a slash, clock ticks since the boot; or "-" if /proc is hidden


class Entry(NamedTuple):
    """A line of an index, in one of three forms:

    [2026-11-22T11:07:19.061730250Z] A checked the files of 100 of 400 issues
    [2026-11-22T11:07:19.061730250Z] = 1024 4096
    [2026-11-22T11:07:19.061730250Z] $ 1024 4096 4711 6d1f…/40586 manage.py load_batch /batches/x

    The first is a note of the agent's. The second says how many bytes of standard output and
    standard error there were by then. The third says the same, and that a command begins there,
    with its process (a Child) if that is known.
    """

    start: int  # where it begins, in bytes of the index
    end: int  # where the next one begins
    second: str  # of its moment
    nanosecond: int
    sizes: Optional[Tuple[int, int]]  # of the outputs; None: it is a note
    child: Optional[Child]  # None: no command begins, or its process is not known
    text: str  # the note, or the command that begins, or ""


ENTRY = re.compile(
    rb"(?m)^\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z\]"
    rb" (?:A (.*)|[=$] (\d{1,18}) (\d{1,18})(?: (\d{1,9}) (\S+))?(?: (.*))?)\n"
)


def entries_in(data: bytes, start: int) -> Iterator[Entry]:
    """Yield the entries in whole lines of an index, which begin at its byte `start`."""
    for found in ENTRY.finditer(data):
        second, nanosecond, note, out, err, pid, birth, command = found.groups()
        yield Entry(
            start + found.start(),
            start + found.end(),
            second.decode(),
            int(nanosecond),
            None if out is None else (int(out), int(err)),
            Child(int(pid), birth.decode()) if pid else None,
            (command or note or b"").decode("utf-8", "replace"),
        )


def entries_from(file: BinaryIO, start: int) -> Iterator[Entry]:
    """Yield the entries of an index from a byte on, oldest first. Raises OSError."""
    size = BLOCK
    while True:
        file.seek(start)
        data = file.read(size)
        end = data.rfind(b"\n") + 1
        if end:
            yield from entries_in(data[:end], start)
            start += end
        elif len(data) < size:
            return
        else:
            size *= 2  # for a command of very many words


def entries_before(file: BinaryIO, stop: int) -> Iterator[Entry]:
    """Yield the entries of an index before a byte, newest first. Raises OSError."""
    size = BLOCK
    while stop:
        start = max(0, stop - size)
        file.seek(start)
        data = file.read(stop - start)
        first = data.find(b"\n") + 1 if start else 0
        if start and first in (0, len(data)):
            size *= 2  # for a command of very many words
        else:
            yield from reversed(list(entries_in(data[first:], start + first)))
            stop = start + first


def nanoseconds_for(before: Tuple[int, int], after: Tuple[int, int]) -> int:
    """Return how many nanoseconds the lines take that were printed between two pairs of sizes."""
    return max(0, after[0] - before[0]) + max(0, after[1] - before[1]) + 2


def lines_between(
    file: BinaryIO, start: int, stop: int, is_over: bool
) -> Iterator[Tuple[int, bytes]]:
    """Yield pairs of the byte where some lines end, and the bytes of these lines.

    The lines, or parts, are those from byte `start`, where one begins, to byte `stop`; a part comes
    alone. An unfinished line at `stop` is left out, unless the file `is_over`. Raises OSError.
    """
    while start < stop:
        whole_block = (start + BLOCK - 1) // BLOCK * BLOCK  # the first that begins at or after it
        limit = whole_block + BLOCK  # no line or part that begins at `start` ends later
        file.seek(start)
        data = file.read(min(stop, limit, start + PIECE) - start)
        end = data.rfind(b"\n") + 1
        if not end:  # a long line
            data += file.read(min(stop, limit) - start - len(data))
            end = data.rfind(b"\n") + 1
        if not end and (is_over or start + len(data) == limit):
            end = len(data)
        if not end:
            return
        start += end
        yield start, data[:end]


def line_start(file: BinaryIO, position: int) -> int:
    """Return where the line or part begins in which the byte `position` is. Raises OSError."""
    block = position // BLOCK * BLOCK
    for low, high in ((block, position), (block - BLOCK, block)):
        if low >= 0:
            file.seek(low)
            newline = file.read(high - low).rfind(b"\n")
            if newline >= 0:
                return low + newline + 1
    return block


def last_lines(
    file: BinaryIO, low: int, high: int, count: int, is_over: bool
) -> Tuple[int, int]:
    """Find the last `count` lines and parts that end between the bytes `low` and `high` of a file.

    Return how many there are, and where the first of them begins. An unfinished line at `high` is
    one of them if the file `is_over`. Raises OSError.
    """
    found = 0
    if is_over and line_start(file, high) < high:
        if not count:
            return 0, high
        found = 1
    while high > low:
        block = (high - 1) // BLOCK * BLOCK
        file.seek(block)
        data = file.read(high - block)
        is_part = len(data) == BLOCK and b"\n" not in data
        ends = 1 if is_part else data.count(b"\n", max(0, low - block))
        if found + ends > count:
            end = len(data)
            if not is_part:
                for _ in range(count - found + 1):
                    end = data.rfind(b"\n", 0, end)
                end += 1
            return count, block + end
        found += ends
        high = block
    return found, line_start(file, low)


def opened(path: Path) -> Optional[BinaryIO]:
    """Open a file for reading; return None if there is none. Raises OSError.

    It tries for a second while the machine lacks something for that.
    """
    tries_left = 10
    while True:
        tries_left -= 1
        try:
            return open(path, "rb")
        except FileNotFoundError:
            return None
        except OSError as error:
            if not is_scarce(error) or not tries_left:
                raise
        time.sleep(0.1)


class Position(NamedTuple):
    """A position in a log, between two entries."""

    entry: int = 0  # where the next entry begins, in bytes of the index
    sizes: Tuple[int, int] = (0, 0)  # of the outputs, as the entries before say
    at: Tuple[int, int] = (0, 0)  # where the next line of each output begins
    second: str = "1970-01-01T00:00:00"  # the earliest moment of what comes
    nanosecond: int = 0


class LogReader:
    """The log of a job, as stamped lines in order: `[2026-11-22T11:07:19.061730250Z] text`.

    A file that is not there is taken for an empty one. Its methods raise OSError.
    """

    def __init__(self, path: Path, is_over: bool = False) -> None:
        """Open the log whose index is `path`.

        The unfinished line at its end is read only if the job `is_over`.
        """
        self._paths = (path, path.with_suffix(".out"), path.with_suffix(".err"))
        self._files: List[Optional[BinaryIO]] = [None, None, None]
        self._sources: Tuple[str, ...] = ALL_SOURCES
        self._position = Position()
        self._tail: Optional[Tuple[int, int]] = None  # the outputs' sizes, once the job is over
        self._open(is_over)

    def _open(self, is_over: bool) -> None:
        """Open the files that were not there before; if the job is over, see how long they are."""
        for number, path in enumerate(self._paths):
            self._files[number] = self._files[number] or opened(path)
        if is_over:
            self._tail = (self._size(1), self._size(2))

    def _size(self, number: int) -> int:
        """Return the size of one of the files in bytes."""
        file = self._files[number]
        return os.fstat(file.fileno()).st_size if file else 0

    def new_lines(self, is_over: bool) -> Iterator[List[str]]:
        """Yield the lines that have come since the last call, some at a time."""
        self._open(is_over)
        for lines in self._read():
            if lines:
                yield lines

    def lines(self, *sources: str) -> Iterator[List[str]]:
        """Return all lines from these sources, or from all, some at a time.

        An empty list comes where there are only lines from others, so that a caller who goes
        through millions can do something else meanwhile. Other calls are not disturbed.
        """
        reader = copy.copy(self)
        reader._sources = sources or ALL_SOURCES
        return reader._read()

    def skip_to_last(self, count: int) -> None:
        """Leave out all lines but the last `count`, reading no more of the log than these.

        Goes backwards: over what was printed since the newest entry, then entry by entry.
        """
        index = self._files[0]
        entries = entries_before(index, self._size(0)) if index else iter(())
        steps = with_sizes_before(entries)
        nothing: Tuple[Optional[Entry], Tuple[int, int]] = (None, (0, 0))
        newest, before = next(steps, nothing)
        self._position = self._position_after(newest, before)
        if self._tail:
            count, at = self._last_printed(self._position.sizes, self._tail, count, True)
            self._position = self._position._replace(at=at)
        if newest is None:
            return
        for entry, sizes in itertools.chain([(newest, before)], steps):
            if not count:
                return
            if entry.sizes is None:
                count -= 1
                at = self._line_starts(sizes)
            else:
                count, at = self._last_printed(sizes, entry.sizes, count, False)
            self._position = Position(entry.start, sizes, at)

    def _position_after(self, newest: Optional[Entry], before: Tuple[int, int]) -> Position:
        """Return the position after the newest entry, before which the outputs had these sizes."""
        if newest is None:
            return Position()
        sizes = newest.sizes or before
        later = newest.nanosecond + nanoseconds_for(before, sizes)
        return Position(newest.end, sizes, self._line_starts(sizes), newest.second, later)

    def _line_starts(self, sizes: Tuple[int, int]) -> Tuple[int, int]:
        """Return where the lines begin that are unfinished where the outputs have these sizes."""
        _, out, err = self._files
        return line_start(out, sizes[0]) if out else 0, line_start(err, sizes[1]) if err else 0

    def _last_printed(
        self, before: Tuple[int, int], after: Tuple[int, int], count: int, is_over: bool
    ) -> Tuple[int, Tuple[int, int]]:
        """Find the last `count` lines of those printed between two pairs of sizes.

        Return how many are missing, and where the first one of each output begins.
        """
        starts = list(self._line_starts(before))
        for number in (1, 0):
            file = self._files[number + 1]
            if file:
                found, starts[number] = last_lines(
                    file, before[number], after[number], count, is_over
                )
                count -= found
        return count, (starts[0], starts[1])

    def _read(self) -> Iterator[List[str]]:
        """Yield the lines of the wanted kinds from the position on, some at a time."""
        some: List[str] = []
        weight = 0  # bytes that have been read for them
        for entry in self._entries():
            for size, lines in self._lines_of(entry):
                some += lines
                weight += size
                if weight >= PIECE:
                    yield some
                    some = []
                    weight = 0
        yield some

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries from the position on, and one for the tail if the job is over."""
        index = self._files[0]
        if index:
            yield from entries_from(index, self._position.entry)
        if self._tail:
            end, _, _, second, nanosecond = self._position
            yield Entry(end, end, second, nanosecond, self._tail, None, "")

    def _lines_of(self, entry: Entry) -> Iterator[Tuple[int, List[str]]]:
        """Yield the wanted lines of an entry, with the bytes read for them, and step past it."""
        before = self._position.sizes
        sizes = entry.sizes or before
        at = list(self._position.at)
        moment = entry.nanosecond  # the earliest stamp of the lines to come
        is_tail = entry.end == entry.start  # no line of the index is empty: see _entries
        # It counts as read even if no line is wanted: see `lines` on empty lists.
        yield entry.end - entry.start, []
        if entry.sizes is None and NOTE in self._sources:
            yield len(entry.text), stamped(entry.second, [moment], moment, [entry.text])
        for number, source in enumerate((STDOUT, STDERR)):
            low, high = before[number], sizes[number]
            file = self._files[number + 1]
            if file and source in self._sources and (high > low or is_tail):
                for end, data in lines_between(file, at[number], high, is_tail):
                    yield len(data), printed_lines(entry.second, moment - low, end, data)
                    at[number] = end
            moment += max(0, high - low) + 1
        self._position = Position(entry.end, sizes, (at[0], at[1]), entry.second, moment)


def printed_lines(second: str, zero: int, end: int, data: bytes) -> List[str]:
    """Return the lines, or the part of one, in `data`, with stamps.

    `data` lies before byte `end` of its file; `zero` is the nanosecond of that file's first byte.
    """
    text = data.decode("utf-8", "replace")
    if data.endswith(b"\n"):
        # A line is stamped with the place of its newline.
        lengths = itertools.accumulate(map(len, data[:-1].split(b"\n")))
        moments = map(operator.add, lengths, itertools.count(zero + end - len(data)))
        return stamped(second, moments, zero + end, text[:-1].split("\n"))
    moment = zero + end - 1  # its newline may be the very next byte, and is later
    return stamped(second, [moment], moment, [text])


def stamped(second: str, moments: Iterable[int], most: int, texts: List[str]) -> List[str]:
    """Return texts with stamps: a second, and the nanosecond of each text after it.

    No nanosecond is more than `most`; but that may be more than a second has.
    """
    if most < 10**9:
        return [f"[{second}.{moment:09d}Z] {text}" for moment, text in zip(moments, texts)]
    first = int(datetime.fromisoformat(f"{second}+00:00").timestamp()) * 10**9
    return [f"[{timestamp(first + moment)}] {text}" for moment, text in zip(moments, texts)]


def with_sizes_before(entries: Iterable[Entry]) -> Iterator[Tuple[Entry, Tuple[int, int]]]:
    """Yield entries that come newest first, each with the sizes of the outputs before it."""
    waiting: List[Entry] = []
    for entry in entries:
        if entry.sizes is not None:
            for each in waiting:
                yield each, entry.sizes
            waiting = []
        waiting.append(entry)
    for each in waiting:
        yield each, (0, 0)


def open_to_append(path: Path) -> TextIO:
    """Open a file for appending; make it, and its folder, if missing. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # The buffer, larger than any entry, keeps what a full disk refuses, until the next flush.
    return open(path, "a", 1 << 20, "utf-8", "replace")


def end_line(path: Path) -> None:
    """Append a newline to a file that does not end with one, unless it is empty. Raises OSError."""
    with open(path, "a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


class LogWriter:
    """The writer of a job's index.

    The first output after a silence is entered when it is seen; while manage.py goes on printing,
    there is an entry every ENTRY_SECONDS.
    """

    def __init__(self, path: Path) -> None:
        """Go on with the log whose index is `path`, or begin it. Raises OSError."""
        self.path = path
        self.out = path.with_suffix(".out")
        self.err = path.with_suffix(".err")
        self.commands: List[str] = []  # all that have begun
        self.child: Optional[Child] = None  # the newest one's process, if it is known
        self.stderr_before = 0  # bytes of standard error when the newest command began
        self._sizes = (0, 0)  # bytes of the outputs, as last entered
        self._earliest = 0  # the moment of the next entry, at the earliest
        self._entered = -ENTRY_SECONDS  # when output was last entered, by the monotonic clock
        self._file = open_to_append(path)
        self._read_on()

    def _read_on(self) -> None:
        """Read what an earlier agent has written, and cut off a line that it did not finish."""
        newest: Optional[Entry] = None
        before = (0, 0)
        with open(self.path, "rb") as file:
            for entry in entries_from(file, 0):
                newest = entry
                before = self._sizes
                if entry.sizes is not None:
                    self._sizes = entry.sizes
                    if entry.text:
                        self._remember(entry.text, entry.child)
        if newest is None:
            self._file.truncate(0)
            return
        self._file.truncate(newest.end)
        second = datetime.fromisoformat(f"{newest.second}+00:00").timestamp()
        self._earliest = int(second) * 10**9 + newest.nanosecond
        self._earliest += nanoseconds_for(before, self._sizes)

    def _remember(self, command: str, child: Optional[Child]) -> None:
        """Remember a command as the newest one."""
        self.commands.append(command)
        self.child = child
        self.stderr_before = self._sizes[1]

    def close(self) -> None:
        """Put the log safely on disk."""
        with contextlib.suppress(OSError):
            self._file.close()
            sync(self.path)

    def note(self, text: str) -> None:
        """Enter a note; a long text as several."""
        text = text.replace("\n", " ")
        for start in range(0, max(1, len(text)), NOTE_LENGTH):
            self._enter(f"A {text[start : start + NOTE_LENGTH]}", time.time_ns(), 1)

    def begin(self, command: str, child: Optional[Child]) -> None:
        """Enter that a command begins, with its process if that is known."""
        command = command.replace("\n", " ")
        self._remember(command, child)
        process = f"{child.pid} {child.birth} " if child else ""
        out, err = self._sizes
        self._enter(f"$ {out} {err} {process}{command}", time.time_ns(), 2)

    def enter_sizes(self, is_end: bool = False) -> None:
        """Enter how much has been printed by now, if that has changed.

        Does nothing within ENTRY_SECONDS of the last such entry, unless this is a command's end.
        """
        if not is_end and time.monotonic() < self._entered + ENTRY_SECONDS:
            return
        try:
            out, err = self.out.stat(), self.err.stat()
        except OSError:  # nothing has been printed, or somebody has removed the files
            return
        sizes = (out.st_size, err.st_size)
        if sizes != self._sizes:
            printed = max(out.st_mtime_ns, err.st_mtime_ns)
            needed = nanoseconds_for(self._sizes, sizes)
            self._sizes = sizes
            self._entered = time.monotonic()
            self._enter(f"= {sizes[0]} {sizes[1]}", min(printed, time.time_ns()), needed)

    def _enter(self, text: str, moment: int, needed: int) -> None:
        """Write an entry of a moment, or a later one if that is taken.

        The next entry is at least `needed` nanoseconds after it.
        """
        moment = max(moment, self._earliest)
        self._earliest = moment + needed
        try:
            print(f"[{timestamp(moment)}] {text}", file=self._file, flush=True)
        except OSError as error:
            log.error("%s cannot be written for now: %s", self.path, error)

    def complaints(self) -> List[str]:
        """Return the lines that the newest command has printed on stderr, without empty ones.

        Looks only at the first and the last COMPLAINT_BYTES of them.
        """
        try:
            with open(self.err, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self.stderr_before)
                data = file.read(min(COMPLAINT_BYTES, max(0, size - self.stderr_before)))
                rest = max(self.stderr_before + len(data), size - COMPLAINT_BYTES)
                if rest > self.stderr_before + len(data):
                    data += b"\n"
                file.seek(rest)
                data += file.read(COMPLAINT_BYTES)
        except OSError:  # there is none, or it cannot be read
            return []
        return re.findall(r"(?m)^.*\S", data.decode("utf-8", "replace"))

    def complaint(self) -> str:
        """Return the likely reason why the newest command failed, at most MAX_COMPLAINT bytes.

        That is the first of its `complaints` that ONI has logged as an error, else the last one.
        """
        lines = self.complaints()
        for line in lines:
            error = re.match(r"\[ERROR\] |ERROR:[\w.]+:", line)  # ONI 1.1 and 1.0
            if error:
                return shortened(line[error.end() :], MAX_COMPLAINT)
        return shortened(lines[-1], MAX_COMPLAINT) if lines else "nothing"


# ---------------------------------------------------------------- running manage.py


def signal_name(number: int) -> str:
    """Return the name of a signal, SIGKILL for 9; "of no name" for most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return "of no name"


def stat_of(pid: int) -> Optional[List[str]]:
    """Return the fields of /proc/PID/stat from the third one on (see proc(5)).

    Return None if there is no such process, or no /proc. Raises OSError, as without descriptors.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # another user's is not ours
        return None


def boot_id() -> str:
    """Return the id of this boot of the machine, or "" if /proc is hidden."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def as_child(pid: int) -> Child:
    """Describe a process that has just been started, so that the next agent knows it again."""
    fields = None
    with contextlib.suppress(OSError):  # run.lock tells of it, too
        fields = stat_of(pid)
    return Child(pid, f"{boot_id()}/{fields[19]}" if fields else "-")


def is_at_work(child: Child) -> Optional[bool]:
    """Return whether a process has not ended yet; None if that cannot be known. Raises OSError."""
    fields = stat_of(child.pid)
    if child.birth == "-" or not (fields or os.path.exists("/proc/self/stat")):
        try:
            os.kill(child.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's has that number now
            return False
        return None
    if not fields:
        return False
    boot, _, ticks = child.birth.partition("/")
    boot_now = boot_id()
    if boot and boot_now and boot != boot_now:  # either is "" where the boot's id is hidden
        return False
    is_zombie = fields[0] in "ZX"  # it has ended, and nobody has waited for it yet
    return fields[19] == ticks and not is_zombie


class Running(NamedTuple):
    """A manage.py that this agent or an earlier one has started, and whose end is waited for."""

    child: Optional[Child]  # None: an earlier agent was killed before it could say
    has_ended: Callable[[], bool]  # may raise OSError


# What manage.py says if the database (by MariaDB's numbers) or Solr was away or busy for a moment.
DISTURBANCES = (
    r"\((1040|1053|1205|1213|1927|2002|2003|2006|2013)\b|database is locked"
    r"|Failed to connect to server|Connection refused|timed out|HTTP 50[234]"
)


class Runner:
    """What runs one manage.py after another for one job, and keeps the job's log.

    manage.py runs in a session of its own and prints to files, so that it outlives this agent. It
    leaves two traces, by which the next agent finds it:

    - The job's log names its process.
    - run.lock is locked by it, since it has inherited the open file. In the file stand the job's
      id, the number of the command among the job's, and the command. This is the only trace if
      the agent is killed between the start of manage.py and the line in the log.

    manage.py has ended when its process has. Something that it has left behind may keep run.lock
    locked even then. The next manage.py cannot lock it, and the log alone names that one.
    """

    def __init__(
        self, job: Job, store: JobStore, oni: OpenONI, stopping: threading.Event
    ) -> None:
        """Go on with the job's log, or begin it. Raises OSError."""
        self.job = job
        self.input_path = store.input_path(job)
        self.log = LogWriter(store.index_path(job))
        self.undoing = False  # the job was cancelled, and what is done now is to undo it
        self._oni = oni
        self._lock = store.folder / "run.lock"
        self._is_left_locked = False  # run.lock is, by what an earlier command has left behind
        self._stopping = stopping

    def close(self) -> None:
        """Put the log safely on disk."""
        self.log.close()

    @property
    def commands(self) -> List[str]:
        """Return all commands of the job that have begun."""
        return self.log.commands

    def note(self, text: str) -> None:
        """Enter in the log what the agent does."""
        self.log.note(text)

    def complaints(self) -> List[str]:
        """Return what the newest manage.py has printed on stderr (see LogWriter.complaints)."""
        return self.log.complaints()

    def complaint(self) -> str:
        """Return the likely reason why the newest manage.py failed (see LogWriter.complaint)."""
        return self.log.complaint()

    @property
    def cancelled(self) -> bool:
        """Return whether what is done for the job now is to end."""
        return self.job.cancelled and not self.undoing

    def go_on(self) -> None:
        """Raise Interrupted if the job has ended, or was cancelled and is not yet being undone."""
        if self.cancelled or self.job.finished:
            raise Interrupted

    def step(self, action: Callable[["Runner"], None]) -> None:
        """Call `action` with this runner, and again while the machine lacks something for it.

        Raises Problem, also in place of other OSErrors, and Interrupted.
        """

        def take() -> None:
            self.go_on()
            try:
                action(self)
            except OSError as error:
                if is_scarce(error):
                    raise
                raise Problem(str(error)) from error

        patiently(take)

    def manage(self, *words: str) -> None:
        """Run manage.py with `words`, to its end.

        Raises Problem, which says how it ended and what it complained of, and Interrupted.
        """
        self._run("manage.py", self._oni.start, *words)

    def task(self, name: str, *words: str) -> None:
        """Run the function `name` of the section "inside Open ONI" in a manage.py shell of its own.

        Raises as `manage` does.
        """
        self._run("manage.py shell:", self._oni.start_task, name, *words)

    def _run(
        self, program: str, start: Callable[..., "subprocess.Popen[bytes]"], *words: str
    ) -> None:
        """Run a manage.py that `start` starts, to its end. Raises as manage does."""
        command = f"{program} {shlex.join(words)}"
        process = patiently(lambda: self._begin(command, start, *words))
        self._follow(Running(self.log.child, lambda: process.poll() is not None))
        status = process.wait()
        self.go_on()
        if status < 0:
            if self._stopping.wait(1):  # the same signal stops the agent
                raise Interrupted
            raise Problem(f"killed by signal {-status} ({signal_name(-status)})")
        if status:
            said = self.complaint()
            kind = Disturbed if re.search(DISTURBANCES, said) else Problem
            raise kind(f"exit status {status}: {said}")

    def _begin(
        self, command: str, start: Callable[..., "subprocess.Popen[bytes]"], *words: str
    ) -> "subprocess.Popen[bytes]":
        """Start a manage.py, and enter it in the log. Raises OSError, Problem, Interrupted."""
        self.go_on()
        with contextlib.ExitStack() as files:
            out = files.enter_context(open_to_append(self.log.out))
            err = files.enter_context(open_to_append(self.log.err))
            # What an earlier command left unfinished is to be a line of its own.
            end_line(self.log.out)
            end_line(self.log.err)
            self.log.enter_sizes(is_end=True)
            lock = files.enter_context(self._open_lock())
            lock.truncate(0)
            lock.write(f"{self.job.id} {len(self.commands) + 1} {command}")
            lock.flush()
            try:
                process = start(*words, stdout=out, stderr=err, pass_fds=[lock.fileno()])
            except BaseException:
                lock.truncate(0)  # else it might be taken for one that was started
                raise
            self.log.begin(command, as_child(process.pid))
        return process

    def adopt(self) -> None:
        """Adopt the manage.py of an earlier agent that is still at work, and wait for its end.

        From then on there is nothing left to end, and a cancelled job is being undone.
        """
        try:
            running = patiently(self._left_at_work)
            if running:
                log.warning("job=%d adopted=yes: its manage.py is at work", self.job.id)
                self._follow(running)
            else:
                self.log.enter_sizes(is_end=True)
                self._name_what_is_left()
        finally:
            self.undoing = self.job.cancelled

    def _left_at_work(self) -> Optional[Running]:
        """Return the manage.py of an earlier agent that is still at work, or None.

        Raises OSError.
        """
        child = self.log.child
        at_work = is_at_work(child) if child else None
        if child and at_work:
            return Running(child, lambda: not is_at_work(child))
        if self._lock_is_free():
            return None
        # Who holds run.lock? Either a manage.py that the log cannot name, or what one left behind.
        if self._enter_command_of_lock():
            return Running(None, self._lock_is_free)
        if child and at_work is None:  # without /proc a process of that number may be another one
            return Running(child, lambda: is_at_work(child) is False or self._lock_is_free())
        if self.commands and not child:  # it was entered like that by an agent before this one
            return Running(None, self._lock_is_free)
        return None  # what manage.py has left behind holds it

    def _open_lock(self) -> TextIO:
        """Open run.lock for a manage.py to inherit, locked unless somebody has left it locked.

        Raises OSError.
        """
        self._is_left_locked = not self._lock_is_free()
        return open(self._lock, "a") if self._is_left_locked else locked(self._lock)

    def _lock_is_free(self) -> bool:
        """Return whether run.lock is not locked. Raises OSError."""
        try:
            locked(self._lock).close()
        except BlockingIOError:
            return False
        return True

    def _enter_command_of_lock(self) -> bool:
        """Enter the command that run.lock names in the log, if it is this job's and not there yet.

        Return whether it was entered. It is not there yet if the agent was killed between the start
        and the entry, or if somebody has deleted the log. Raises OSError.
        """
        id, _, rest = self._lock.read_text().partition(" ")
        number, _, command = rest.partition(" ")
        if id == str(self.job.id) and int(number or 0) > len(self.commands):
            self.log.begin(command, None)
            return True
        return False

    def _follow(self, running: Running) -> None:
        """Wait until manage.py has ended; end it if the job is cancelled."""
        begun = time.monotonic()
        full = False
        # What is not known gets none, which is noted once.
        signals = [signal.SIGTERM, signal.SIGKILL] if running.child else [signal.SIGTERM]
        next_signal = 0.0
        while self._is_at_work(running):
            self.log.enter_sizes()
            full = full or self._disk_is_full()
            now = time.monotonic()
            if self.cancelled and signals and now > next_signal:
                self._signal(running.child, signals.pop(0))
                next_signal = now + TERM_SECONDS
            # The first looks come quickly, so that a short run is not made longer by waiting.
            time.sleep(min(LOOK_SECONDS, 0.001 + (now - begun) / 20))
        self.log.enter_sizes(is_end=True)
        if full:
            self.note(
                "the state folder was full meanwhile: lines that manage.py printed may be missing"
            )
        self._name_what_is_left()

    def _is_at_work(self, running: Running) -> bool:
        """Return whether a manage.py has not ended, or that cannot be told for now."""
        try:
            return not running.has_ended()
        except OSError:
            return True

    def _disk_is_full(self) -> bool:
        """Return whether the state folder has no byte left."""
        try:
            return not shutil.disk_usage(self._lock.parent).free
        except OSError:  # somebody has removed the folder
            return False

    def _signal(self, child: Optional[Child], number: signal.Signals) -> None:
        """Send a signal to the process group that a manage.py leads."""
        if not child:
            self.note(
                "cancelled: what an earlier agent has begun is not known, and is waited for: fuser"
                f" {self._lock} names it"
            )
            return
        self.note(f"cancelled: {number.name} to process group {child.pid}")
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.killpg(child.pid, number)

    def _name_what_is_left(self) -> None:
        """Note once what manage.py has left behind, if that keeps run.lock locked."""
        if self._is_left_locked or not self.commands:
            return
        for _ in range(5):  # it may be about to end
            with contextlib.suppress(OSError):
                if self._lock_is_free():
                    return
            time.sleep(0.02)
        self._is_left_locked = True
        child = self.log.child
        left = session_members(child.pid) if child else []
        self.note(
            f"manage.py has ended, and has left behind {', '.join(left) or 'a process'}, which is"
            f" still at work: fuser {self._lock} names it"
        )


def session_members(leader: int) -> List[str]:
    """Return the processes of a session, as `process 4712 (sleep)`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = stat_of(int(folder.name))
            if fields and fields[3] == str(leader) and fields[0] not in "ZX":
                name = (folder / "comm").read_text().strip()
                found.append(f"process {folder.name} ({name})")
    return found


# ---------------------------------------------------------------- kinds of job


@dataclass
class Kind:
    """A kind of job: a goal, and the way there. Its fields are the job's words after the first.

    To add one: subclass this (its fields after `site`, if any, as a dataclass), enter it in KINDS,
    and write a command of the same name, under "commands", that returns `request.submit()`, or
    `request.submit_with_input(LIMIT)` if it `takes_input`.

    Its methods are called like this:

        a client asks for the job:               check, then reached
        the job's turn comes:                    bring, then verify
        an earlier agent had begun it:           verify; only if that fails: bring, then verify
        it was cancelled after it had begun:     undo
        it was not successful, or was undone:    remains

    So `bring` has to reach the goal from wherever an earlier attempt was cut short.

    `work` is a Runner: it runs manage.py, takes notes for the job's log, and knows the file of what
    came on standard input. A method may raise OSError: if that is scarce (see is_scarce), the
    method is called again, else it counts as a Problem.
    """

    site: Site

    title = "No-op job"  # the name in answers; this one is of job -1 (see Request.job)
    takes_input = False  # whether it needs something on standard input

    def check(self, given: Optional[Path]) -> None:
        """Raise Problem unless the job may be asked for, and all that it needs is there.

        `given` is the file of what came on standard input, None for a kind that takes none.
        """

    def reached(self) -> bool:
        """Return whether the goal is known to be reached already. Raises Problem."""
        return False

    def bring(self, work: Runner) -> None:
        """Reach the goal. Raises Problem, Interrupted."""

    def verify(self, work: Runner) -> None:
        """Raise Problem, which says what is the case instead, unless the goal is reached."""

    def undo(self, work: Runner) -> None:
        """Undo, after a cancel, what was done by half. Raises Problem, Interrupted."""

    def remains(self, work: Runner) -> str:
        """Return what is the case now, for the error of a job that was not successful; or ""."""
        return ""


@dataclass
class BatchKind(Kind):
    """A load or a purge of a batch. Raises Problem if no batch can have its name."""

    name: str

    def __post_init__(self) -> None:
        self.folder = self.site.folder(self.name)

    def is_goal(self, held: BatchState) -> bool:
        """Return whether `held` is known to be the goal."""
        raise NotImplementedError

    def known_state(self, work: Runner) -> BatchState:
        """Return the batch's state. Raises Problem if Solr is down: ONI would do half the work."""
        held = self.site.patient_batch(self.name, work.go_on)
        if held.index_problem:
            raise Problem(str(held))
        return held

    def verify(self, work: Runner) -> None:
        held = self.site.patient_batch(self.name, work.go_on)
        if not self.is_goal(held):
            said = f"; manage.py said: {work.complaint()}" if work.commands else ""
            raise Problem(f"{held}{said}")
        if not work.commands:
            work.note(f"nothing to do: {held}")

    def remains(self, work: Runner) -> str:
        if not work.commands and not work.undoing:
            return ""  # nothing has changed, and the error says what was in the way
        try:
            return str(self.site.patient_batch(self.name, work.go_on, ANSWER_SECONDS))
        except (Problem, OSError) as problem:
            return f"what ONI holds of the batch now is not known: {problem}"


class LoadBatch(BatchKind):
    """A load, whose goal is that ONI holds the whole batch, in database and search index."""

    title = "Load batch"

    def check(self, given: Optional[Path]) -> None:
        self._held = self._ask_whether_it_may(self.site.oni.ask)

    def _ask_whether_it_may(self, ask: Callable[..., Any]) -> Any:
        """Return the answer of answer_load. Raises Problem if the batch may not be loaded."""
        try:
            return ask("answer_load", self.name, str(self.folder), SOLR_SECONDS)
        except TransientProblem:
            raise
        except Problem as problem:
            raise Problem(f"{problem}{self.site.similar(self.name)}") from problem

    def reached(self) -> bool:
        held = self.site.state(self.name, self._held)
        if held.row:
            self.site.add_files(held, time.monotonic() + ANSWER_SECONDS)
        return self.is_goal(held)

    def is_goal(self, held: BatchState) -> bool:
        return held.state == "complete"

    def bring(self, work: Runner) -> None:
        held = self.known_state(work)
        if held.row and held.rows_are_right is None:
            raise Problem(str(held))  # it may be complete
        if not held.row or not held.rows_are_right:
            self._ask_whether_it_may(self.site.oni.insist)
            self._check_files(work)
            self._make_room(work, held)
            work.manage("load_batch", str(self.folder))
            held = self.site.patient_batch(self.name, work.go_on)
        if held.rows_are_right and (held.lost or held.stray):
            work.note(f"{held}; mending the index")
            work.task("task_mend_index", self.name)

    def _check_files(self, work: Runner) -> None:
        """Check all files, so that no load fails after hours; load titles that ONI lacks."""
        noted = 0

        def progress(done: int, of: int) -> None:
            nonlocal noted
            self.site.checked[self.name] = (done, of)
            if done >= noted + 100:
                noted = done - done % 100
                work.note(f"checked the files of {noted} of {of} issues")

        try:
            found = self.site.check(self.name, progress, work.go_on)
        finally:
            self.site.checked.pop(self.name, None)
        for warning in found.warnings:
            work.note(f"warning: {warning['file']}: {warning['warning']}")
        for fault in found.faults:
            work.note(f"fault: {fault['file']}: {fault['fault']}")
        if found.faults:
            raise Problem(f"{found.summary}; ONI was left as it is")
        self._load_titles(work, found.titles)

    def _load_titles(self, work: Runner, records: Mapping[str, bytes]) -> None:
        """Have ONI load records of titles that it lacks, which the check has fetched."""
        if not records:
            return
        folder = work.input_path.parent / "titles"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, mode=0o700)
        for lccn, record in records.items():
            work.note(f"ONI lacks the title {lccn}, which was fetched")
            (folder / f"{hashlib.sha256(lccn.encode()).hexdigest()}.xml").write_bytes(record)
        work.manage("load_titles", str(folder))
        loaded = self.site.oni.insist("answer_titles", list(records), PATIENT_SECONDS)
        for lccn in records:
            if lccn not in loaded:
                raise Problem(f"ONI did not store the title {lccn}: {work.complaint()}")
        shutil.rmtree(folder, ignore_errors=True)

    def _make_room(self, work: Runner, held: BatchState) -> None:
        """Remove what would keep load_batch from loading the whole batch from this folder."""
        if held.row or held.pages_in_solr:  # load_batch leaves what is there as it is
            PurgeBatch(self.site, self.name).bring(work)
        link = Path(held.storage) / self.name
        # A link that a killed load of another copy has left would make ONI load that copy.
        if link.is_symlink() and link.resolve() != self.folder.resolve():
            work.note(f"removing {link}, a leftover link to {os.readlink(link)}")
            link.unlink()

    def undo(self, work: Runner) -> None:
        # load_titles and the tasks change no row of the batch: there is nothing to undo.
        changing = ("manage.py load_batch", "manage.py purge_batch")
        if any(command.startswith(changing) for command in work.commands):
            PurgeBatch(self.site, self.name).bring(work)


class PurgeBatch(BatchKind):
    """A purge, whose goal is that ONI holds nothing of the batch, in database and search index."""

    title = "Purge batch"

    def is_goal(self, held: BatchState) -> bool:
        return not held.row and held.pages_in_solr == 0  # None, if Solr cannot be asked

    def reached(self) -> bool:
        held = self.site.oni.ask("answer_batch", self.name, SOLR_SECONDS)
        return self.is_goal(self.site.state(self.name, held))

    def bring(self, work: Runner) -> None:
        held = self.known_state(work)
        failure = None
        if held.row:
            work.note(f"{held}; purging that")
            try:
                work.manage("purge_batch", self.name)
            except Problem as problem:
                failure = problem
            held = self.site.patient_batch(self.name, work.go_on)
        if held.pages_in_solr and not held.row:
            work.note(f"{held}; deleting those")
            work.task("task_forget_documents", self.name)
        elif failure:
            raise failure


class LoadTitle(Kind):
    """A load of titles, whose goal is that ONI has them as a MARC file has them.

    The file stays as long as the job is remembered, so that it can be looked at, or retried.
    """

    title = "load title"
    takes_input = True

    def check(self, given: Optional[Path]) -> None:
        assert given is not None
        self.site.look_at_records(given)

    def bring(self, work: Runner) -> None:
        self._records = self.site.records(work.input_path, work.go_on)
        for record in self._records:
            if record["outcome"] == "unchanged":
                work.note(
                    f"the record of {record['lccn']} changes nothing: ONI has that version"
                    " already, or a newer one"
                )
        work.manage("load_titles", str(work.input_path.parent))
        stored = self._stored()
        lacking = [lccn for lccn, (_, is_indexed) in stored.items() if not is_indexed]
        # ONI's load_titles indexes new titles alone.
        for some in in_chunks(lacking, TITLES_AT_ONCE):
            work.task("task_index_titles", *some)

    def _stored(self) -> Dict[str, List[Any]]:
        """Return by LCCN the version of each title that ONI has, and whether Solr finds it."""
        lccns = [record["lccn"] for record in self._records]
        return dict(self.site.oni.insist("answer_titles", lccns, PATIENT_SECONDS))

    def verify(self, work: Runner) -> None:
        self._records = self.site.records(work.input_path, work.go_on)
        stored = self._stored()
        said = f"; load_titles said: {work.complaint()}" if work.commands else ""
        for record in self._records:
            lccn = record["lccn"]
            if lccn not in stored:
                raise Problem(f"ONI has no title {lccn}{said}")
            version, is_indexed = stored[lccn]
            # ONI takes a record without a date (MARC 005) for a newer one each time, and gives it
            # the time of the load: so it was stored if that is not before this job (1 s of slack).
            is_dated = record["version"] is not None
            begun = (work.job.started or 0) / 10**9 - 1
            is_stored = record["outcome"] == "unchanged" or (not is_dated and version >= begun)
            if not is_stored:
                raise Problem(f"ONI has not stored the title {lccn} as the record has it{said}")
            if not is_indexed:
                raise Problem(f"ONI has the title {lccn}, but Solr does not find it{said}")

    def remains(self, work: Runner) -> str:
        return f"the MARC record is kept in {work.input_path.parent}"


@dataclass
class BatchPatch(Kind):
    """A patch, whose goal is a batch `new`: `old` without the issues that the input names."""

    old: str
    new: str

    title = "batch patch"
    takes_input = True

    def __post_init__(self) -> None:
        self.source = self.site.folder(self.old)
        self.target = self.site.folder(self.new)

    def check(self, given: Optional[Path]) -> None:
        assert given is not None
        if in_time(lambda: os.path.lexists(self.target)):
            raise Problem(f'"{self.new}" is in BATCH_SOURCE already')
        if self.site.oni.ask("answer_holds", self.new):
            raise Problem(f'Open ONI holds a "{self.new}" already; purge that first')
        self._possible_patch(given, self.site.oni.ask, ANSWER_SECONDS)

    def _possible_patch(self, given: Path, ask: Callable[..., Any], within: float) -> Patch:
        """Return the patch, if ONI holds the old batch and its files are there. Raises Problem.

        `ask` is a method of OpenONI, and `within` the seconds that the file system has.
        """
        if not ask("answer_holds", self.old):
            raise Problem("batch does not exist")
        ask("answer_listing", str(self.source))
        return in_time(lambda: Patch(self.source, read_instructions(given)), within)

    def bring(self, work: Runner) -> None:
        patch = self._possible_patch(work.input_path, self.site.oni.insist, PATIENT_SECONDS)
        if patch.is_made(self.target):
            work.note(
                f"nothing to do: {self.target} is there already, and is what this patch makes"
            )
        else:
            patch.make(self.target, work.note, work.go_on, lambda made: self._rehearse(made, work))
            work.note(f"{self.target} is whole")

    def _rehearse(self, made: Path, work: Runner) -> None:
        """Raise Problem unless ONI could load the new batch, which is in the folder `made`."""
        found = self.site.check(self.new, do_nothing, work.go_on, str(made))
        if found.faults:
            raise Problem(f"{self.new} was not made, since it has {found.summary}")

    def verify(self, work: Runner) -> None:
        if not Patch(self.source, read_instructions(work.input_path)).is_made(self.target):
            raise Problem(f"{self.target} is not there")

    def remains(self, work: Runner) -> str:
        return f"{self.target} is there" if os.path.lexists(self.target) else ""


KINDS: Dict[str, Type[Kind]] = {
    "load-batch": LoadBatch,
    "purge-batch": PurgeBatch,
    "load-title": LoadTitle,
    "batch-patch": BatchPatch,
}

# ---------------------------------------------------------------- the queue


class JobQueue:
    """The jobs in order, a thread that works on one after another, and one that keeps house.

    Whoever changes jobs holds `_turn` meanwhile, and changes them on disk, then in memory. So ids
    are given in the order of acceptance, and a batch's last job is known to who adds another. Who
    only reads holds `_lock`, under which nobody waits for a disk, for ONI or for a client.

    In memory are the unfinished jobs and the newest others; older ones are read from the disk.
    """

    def __init__(
        self,
        store: JobStore,
        site: Site,
        on_end: Callable[[Job], None],
        announce: Callable[[str], None],
    ) -> None:
        """Read the jobs of an earlier agent from `store`. Raises Problem, Scarce.

        `on_end` is called with each job that has ended, `announce` with a sentence whenever what is
        at work or waits has changed; neither may take long, nor raise.
        """
        self._store = store
        self._site = site
        self._on_end = on_end
        self._announce = announce
        self.stopping = threading.Event()  # once set, no job fails any more: the stop may be why
        self._closed = False  # no job is accepted any more
        self._follows_a_stop = False  # the last agent was stopped on purpose
        self._turn = threading.Lock()
        self._lock = threading.Lock()  # guards the five that follow
        self._jobs: Dict[int, Job] = {}  # those in memory, oldest first
        self._all_since = 0  # the id from which on all jobs are in memory
        self._unfinished: Dict[int, Job] = {}  # oldest first
        self._ended: Deque[Job] = collections.deque(maxlen=MOST_ENDED)  # in the order of their ends
        self._callbacks: Dict[int, List[Callable[[Job], None]]] = {}  # by a job's id
        self._waiting: "queue.SimpleQueue[Job]" = queue.SimpleQueue()  # for the worker
        self._clock = Clock(store.newest_moment())
        newest = store.select(store.newest_id + 1, limit=JOBS_IN_MEMORY)
        if len(newest) == JOBS_IN_MEMORY:
            self._all_since = newest[0].id
        known = {job.id: job for job in newest + store.unfinished()}
        for id in sorted(known):
            self._enter(known[id])

    def _enter(self, job: Job) -> None:
        """Take a job into memory, and let it wait for the worker if it has not ended."""
        with self._lock:
            self._jobs[job.id] = job
            if job.finished:
                self._ended.append(job)
            else:
                self._unfinished[job.id] = job
                self._waiting.put(job)
            while len(self._jobs) > JOBS_IN_MEMORY:
                oldest = next(iter(self._jobs.values()))
                if not oldest.finished:
                    break  # those behind it are let go of when it has ended
                # In this order: `get`, which takes no lock, looks on the disk for what is not here.
                self._all_since = max(self._all_since, oldest.id + 1)
                del self._jobs[oldest.id]

    def start(self) -> None:
        """Begin to work on the jobs, and to keep house. Raises OSError."""
        self._follows_a_stop = self._store.take_stop_mark()
        self._announce(self._state())
        for name, duty in (("worker", self._work), ("housekeeper", self._keep_house)):
            threading.Thread(target=self._run, args=[duty], name=name, daemon=True).start()

    def close(self) -> None:
        """Accept no job from now on, since the agent stops and might not answer any more."""
        with self._turn:
            self._closed = True
        with contextlib.suppress(OSError):  # then an attempt too many is counted
            self._store.mark_stop()

    # -- what there is

    def jobs(
        self, statuses: Sequence[Status] = (), word: str = "", limit: Optional[int] = None
    ) -> List[Job]:
        """Return the newest `limit` jobs, or all (None), oldest first.

        `statuses` and `word` are as in JobStore.select. The disk is read only for what is not in
        memory. Raises Problem, Scarce.
        """
        if statuses and all(status in (PENDING, STARTED) for status in statuses):
            found = self.unfinished()
            before = 0
        else:
            with self._lock:
                before = self._all_since
                found = [job for job in self._jobs.values() if job.id >= before]
        if statuses:
            found = [job for job in found if job.status in statuses]
        if word:
            found = [job for job in found if word in job.words]
        if limit is None:
            limit = sys.maxsize
        if before and len(found) < limit:
            older = self._store.select(before, statuses, word, limit - len(found))
            found = [self._jobs.get(job.id, job) for job in older] + found
        return found[max(0, len(found) - limit) :]

    def unfinished(self) -> List[Job]:
        """Return the jobs that have not ended, oldest first."""
        with self._lock:
            return list(self._unfinished.values())

    def at_work(self) -> Optional[Job]:
        """Return the job that the worker has begun, or None."""
        with self._lock:
            first = next(iter(self._unfinished.values()), None)
        return first if first and first.status == STARTED else None

    def place(self, job: Job) -> int:
        """Return the place of an unfinished job in the queue, from 1 on."""
        return sum(each.id <= job.id for each in self.unfinished())

    def ended(self) -> List[Job]:
        """Return the last MOST_ENDED jobs that have ended, the last one first.

        Those that ended before the agent started are in the order of their ids.
        """
        with self._lock:
            return list(reversed(self._ended))

    def get(self, id: int) -> Optional[Job]:
        """Return the job of an id, or None. Raises Problem, Scarce if it cannot be read."""
        job = self._jobs.get(id)
        if job is None and 0 < id < self._all_since:
            job = self._store.find(id)
        return job

    def kind(self, words: List[str]) -> Kind:
        """Return the kind, and so the goal, of a job of these words.

        Raises Problem if no batch can have the name in them.
        """
        return KINDS[words[0]](self._site, *words[1:])

    # -- waiting for ends

    def when_ended(self, job: Job, callback: Callable[[Job], None]) -> Callable[[], None]:
        """Have `callback` called with a job when it has ended, at once if it has already.

        It must not take long, nor raise. Return a function that withdraws it.
        """
        with self._lock:
            is_registered = not job.finished
            if is_registered:
                self._callbacks.setdefault(job.id, []).append(callback)

        def withdraw() -> None:
            with self._lock:
                callbacks = self._callbacks.get(job.id, [])
                if callback in callbacks:
                    callbacks.remove(callback)
                if not callbacks:
                    self._callbacks.pop(job.id, None)

        if not is_registered:
            callback(job)
        return withdraw

    # -- what clients ask for

    def add(self, words: List[str], given: Optional[Path] = None) -> Tuple[int, str]:
        """Accept a job, and return its id and a sentence; the job is on disk by then.

        If its goal is reached already, the id is -1. If the newest unfinished job on the same batch
        has the same words, it is that job's. `given` is the file of new_input with what came on
        standard input; such a job is always a new one. Raises Problem, OSError.
        """
        kind = self.kind(words)
        kind.check(given)
        reached = not self._last_on(words) and kind.reached()
        if given:
            sync(given)
            sync(given.parent)
        with self._turn:
            last = self._last_on(words)  # which may have come while Open ONI was asked
            if reached and not last:
                return -1, NO_OP
            if self._closed:
                raise Problem("the agent is stopping; ask again in a moment")
            if last and last.words == words and not (last.cancelled or given):
                return last.id, "Job already in queue"
            self._store.check_in_place()
            job = self._store.add(words, given)
            self._store.check_in_place()  # else the job is in a database that nobody reads again
            self._enter(job)
            self._announce(self._state())
        return job.id, "Job added to queue"

    def _last_on(self, words: List[str]) -> Optional[Job]:
        """Return the newest unfinished job with the same words after the command's name."""
        with self._lock:
            for job in reversed(self._unfinished.values()):
                if job.words[1:] == words[1:]:
                    return job
        return None

    def cancel(self, job: Job) -> bool:
        """Cancel a job; return False if it has ended already. Raises Scarce."""
        with self._turn:
            if job.finished:
                return False
            if job.status == STARTED:
                self._store.cancel(job)
                return True
            self._end(job, Outcome(FAILED, "cancelled before it started"))
        self._tell_end(job)
        return True

    # -- the worker

    def _run(self, duty: Callable[[], None]) -> None:
        """Do a thread's duty for as long as the agent is at work, and end the agent if it fails."""
        try:
            duty()
        except BaseException:
            log.exception("the agent cannot go on")
            end_agent("a thread that the agent needs has ended", EXIT_AGAIN)

    def _work(self) -> None:
        """Work on one job after another until the agent stops."""
        while not self.stopping.is_set():
            job = self._waiting.get()
            if not job.finished:
                self._perform(job)

    def _perform(self, job: Job) -> None:
        """Bring a job to its end: attempt it, undo that if it was cancelled, record the outcome.

        If the agent stops meanwhile, the job is left as it is: the next agent recovers it.
        """
        try:
            make = functools.partial(Runner, job, self._store, self._site.oni, self.stopping)
            work = patiently(make, functools.partial(self._must_go_on, job))
        except Interrupted:
            return
        except OSError as error:
            failure = Outcome(FAILED, f"its log cannot be opened: {error}")
            patiently(functools.partial(self._record, job, failure, is_undone=True))
            return
        with contextlib.closing(work):
            while not (job.finished or self.stopping.is_set()):
                outcome = self._attempt(work)
                if outcome:
                    patiently(functools.partial(self._record, job, outcome, work.undoing))

    def _must_go_on(self, job: Job) -> None:
        """Raise Interrupted if a job has ended, as by a cancel, or the agent stops."""
        if job.finished or self.stopping.is_set():
            raise Interrupted

    def _attempt(self, work: Runner) -> Optional[Outcome]:
        """Make a job reach its goal, or undo it if it was cancelled; return what came of that.

        Return None if it was interrupted. A fault of the agent's own is the end of this job alone.
        """
        job = work.job
        try:
            work.adopt()
            kind = self.kind(job.words)
            try:
                if not work.undoing:
                    self._reach(work, kind)
                    return Outcome(SUCCESSFUL, "")
                work.step(kind.undo)
                outcome = Outcome(FAILED, "cancelled")
            except Problem as problem:
                outcome = self._failure(work, problem)
            remains = kind.remains(work)
        except Interrupted:
            return None
        except OSError as error:
            return Outcome(FAILED, str(error))
        except Exception as fault:
            log.exception("job=%d stumbled over a fault of the agent", job.id)
            return Outcome(FAILED, f"a fault of the agent, see its log: {fault!r}")
        if remains and remains not in outcome.error:  # the problem may have said it already
            outcome = outcome._replace(error=f"{outcome.error}; {remains}")
        if shortened(outcome.error) != outcome.error:
            work.note(outcome.error)
        return outcome

    def _failure(self, work: Runner, problem: Problem) -> Outcome:
        """Return the outcome of an attempt, or an undo, that a problem has ended."""
        if work.undoing:
            return Outcome(FAILED, f"cancelled; {problem}")
        never_ran = isinstance(problem, CouldNotStart) and not work.commands
        return Outcome(COULD_NOT_START if never_ran else FAILED, str(problem))

    def _reach(self, work: Runner, kind: Kind) -> None:
        """Reach a job's goal, from wherever an earlier attempt has left it.

        Raises Problem, Interrupted.
        """
        if work.job.status == STARTED and self._was_reached(work, kind):
            return
        work.step(self._begin)
        self._bring(work, kind)
        work.step(kind.verify)

    def _bring(self, work: Runner, kind: Kind) -> None:
        """Call `bring`, for PATIENT_SECONDS again and again if manage.py is disturbed.

        Raises Problem, Interrupted.
        """
        until = 0.0
        while True:
            try:
                return work.step(kind.bring)
            except Disturbed as problem:
                until = until or time.monotonic() + PATIENT_SECONDS
                if time.monotonic() > until or self.stopping.wait(1):
                    raise
                work.note(f"{problem}; beginning again")

    def _was_reached(self, work: Runner, kind: Kind) -> bool:
        """Return whether a job that an earlier agent had begun has reached its goal by now.

        Raises Interrupted.
        """
        try:
            work.step(kind.verify)
            return True
        except Problem as problem:
            log.warning("job=%d was interrupted: %s", work.job.id, problem)
            work.note(f"interrupted: the agent went before the job's end; {problem}")
            return False

    def _begin(self, work: Runner) -> None:
        """Enter that an attempt begins. Raises Problem after too many; Scarce, Interrupted."""
        job = work.job
        attempts = job.attempts + 1
        if job.attempts and self._follows_a_stop:
            attempts = job.attempts  # that the agent was stopped is no fault of the job's
        if attempts > MAX_ATTEMPTS:
            raise Problem(f"given up: {MAX_ATTEMPTS} times the agent was gone before its end")
        with self._turn:
            work.go_on()
            self._store.begin(job, time.time_ns(), attempts)
            self._announce(self._state())
        log.info("job=%d command=%r begins", job.id, shlex.join(job.words))

    def _record(self, job: Job, outcome: Outcome, is_undone: bool = False) -> None:
        """Record an outcome as a job's end, unless the job is to be taken up again. Raises Scarce.

        It is, by this agent, if a cancel has come meanwhile and is yet to be undone; and by the
        next agent, if this one stops: the same signal may have ended manage.py.
        """
        with self._turn:
            is_to_be_undone = job.cancelled and not is_undone
            is_cut_short = self.stopping.is_set() and outcome.status != SUCCESSFUL
            if job.finished or is_to_be_undone or is_cut_short:
                return
            self._end(job, outcome)
        self._tell_end(job)

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Enter a job's end; the caller holds `_turn`. Raises Scarce."""
        self._store.end(job, End(outcome.status, shortened(outcome.error), time.time_ns()))
        with self._lock:
            del self._unfinished[job.id]
            self._ended.append(job)
        self._announce(self._state())

    def _tell_end(self, job: Job) -> None:
        """Tell everybody who waits for a job that it has ended."""
        status, error = job.status, job.error
        level = logging.INFO if status == SUCCESSFUL else logging.WARNING
        words = shlex.join(job.words)
        log.log(level, "job=%d command=%r status=%r error=%r", job.id, words, status, error)
        self._on_end(job)
        with self._lock:
            callbacks = self._callbacks.pop(job.id, [])
        for callback in callbacks:
            callback(job)

    def _state(self) -> str:
        """Return what is at work, and how much waits, in a sentence."""
        job = self.at_work()
        with self._lock:
            waiting = len(self._unfinished) - bool(job)
        at_work = f"{shlex.join(job.words)} (job {job.id})" if job else "nothing"
        return f"at work: {at_work}; waiting: {waiting}"

    # -- keeping house

    def _keep_house(self) -> None:
        """Watch the state folder, and forget old jobs, until the agent stops."""
        next_sweep = time.monotonic()
        while not self.stopping.is_set():
            with contextlib.suppress(OSError):  # whoever needs the folder says so
                self._store.check_in_place()
            if time.monotonic() >= next_sweep:
                next_sweep = time.monotonic() + SWEEP_SECONDS
                try:
                    self._forget_old()
                except (OSError, Problem) as error:
                    log.error("old jobs are not forgotten for now: %s", error)
            self.stopping.wait(STATE_SECONDS)

    def _forget_old(self) -> None:
        """Forget jobs that ended long ago, if the clock can be believed. Raises OSError."""
        now = self._clock.believed()
        if now is None:
            return
        expired = self._store.expired(now)
        for start in range(0, len(expired), FORGET_AT_ONCE):
            self._forget(expired[start : start + FORGET_AT_ONCE])

    def _forget(self, ids: List[int]) -> None:
        """Forget jobs, except those whose files cannot be removed. Raises Scarce."""
        gone = []
        for id in ids:
            try:
                self._store.remove_files(id)
                gone.append(id)
            except OSError as error:
                log.warning("job=%d is not forgotten: %s", id, error)
        with self._turn:
            self._store.forget(gone)
        with self._lock:
            for id in gone:
                self._jobs.pop(id, None)


# ---------------------------------------------------------------- commands

# To add a command, write a function cmd_… below and enter it with @command. It takes a Request and
# the words after the command's name, and returns an Answer, or raises Refused, Problem or OSError.
# A program gets the answer's keys as JSON; a person gets `key: value` for each, unless SHOWN, under
# "presentation", has a function for that key.


class Refused(Exception):
    """An error as the answer to a request: its message, and the answer's other keys."""

    def __init__(self, message: str, **others: Any) -> None:
        super().__init__(message)
        self.keys: Dict[str, Any] = {"status": "error", "message": message, **others}


class ClientGone(BaseException):
    """The client has gone away. It is no Exception, so that no command takes it for a fault."""


@dataclass
class Agent:
    """What commands work on."""

    settings: Settings
    site: Site
    store: JobStore
    queue: JobQueue


IsDue = Callable[[], bool]  # asked a few times a second, so it must be quick and raise nothing


@dataclass
class Rest:
    """What is to come of an answer that is not whole yet. Waiting for it takes no thread."""

    is_due: IsDue
    get: Callable[[], "Answer"]
    job: Optional[Job] = None  # whose end it waits for; a person is shown how far that is


@dataclass
class Answer:
    """What a command answers: an object, the lines of a log, or both."""

    keys: Dict[str, Any] = field(default_factory=dict)  # none: only the lines are sent
    lines: Iterable[List[str]] = ()  # some at a time; a person is shown them after the object
    exit_status: int = 0  # NCA needs 0 even for an error
    rest: Optional[Rest] = None  # until the answer is whole


@dataclass
class Request:
    """One command line of a client."""

    agent: Agent
    client: "Session"  # reads the input, knows whether the client is there, and is its terminal
    words: List[str]

    def job(self, word: str) -> Job:
        """Return the job whose id `word` is. Raises Refused if there is none."""
        if not re.fullmatch("[+-]?0*[1-9][0-9]{0,18}", word):
            raise Refused(f'"{word}" is not a valid job id')
        id = int(word)
        if id == -1:
            now = time.time_ns()
            return Job(-1, ["no-op"], now, end=End(SUCCESSFUL, "", now))
        job = self.agent.queue.get(id)
        if not job:
            raise Refused("Job not found", job={"id": id})
        return job

    def job_answer(self, job: Job, exit_status: int = 0) -> Answer:
        """Return the answer that says what has become of a job."""
        message = message_for_person(job) if self.client.width else STATUS_MESSAGES[job.status]
        shown = job_with_progress(self.agent, job)
        return Answer({"message": message, "job": shown}, exit_status=exit_status)

    def submit(self, words: List[str], given: Optional[Path] = None) -> Answer:
        """Queue a job of `words`; `given` is the file of what came on standard input.

        Raises Problem if it may not be asked for.
        """
        id, message = self.agent.queue.add(words, given)
        return Answer({"message": message, "job": {"id": id}})

    def submit_with_input(self, words: List[str], limit: int) -> Answer:
        """Queue a job of `words` and of the client's standard input, at most `limit` bytes.

        Raises Problem if it may not be asked for, or the input cannot be read.
        """
        with self.agent.store.new_input() as given:
            self.client.read_input(given, limit)
            return self.submit(words, Path(given.name))


@dataclass(frozen=True)
class Command:
    """A command's function, its texts, and how many words it takes after its name."""

    run: Callable[..., Answer]
    usage: str
    help: str  # one line
    example: str  # an exchange: what one types, and what comes back
    misuse: str  # the message for a wrong number of words
    missing: str  # the message for too few, where it is another
    failure: str  # the message for a Problem, {} being the words after the name
    least: int
    most: float


COMMANDS: Dict[str, Command] = {}  # in the order of `help`


def command(
    usage: str,
    help: str,
    misuse: str = "",
    failure: str = "The agent cannot do this just now",
    missing: str = "",
    example: str = "",
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Return a decorator that enters a function in COMMANDS; see Command for the texts.

    The first word of `usage` is the command's name.
    """

    def enter(function: Callable[..., Answer]) -> Callable[..., Answer]:
        _request, *parameters = inspect.signature(function).parameters.values()
        takes_any_number = any(each.kind is each.VAR_POSITIONAL for each in parameters)
        COMMANDS[usage.split()[0]] = Command(
            run=function,
            usage=usage,
            help=help,
            example=inspect.cleandoc(example),
            misuse=misuse,
            missing=missing or misuse,
            failure=failure,
            least=sum(
                each.default is each.empty and each.kind is not each.VAR_POSITIONAL
                for each in parameters
            ),
            most=math.inf if takes_any_number else len(parameters),
        )
        return function

    return enter


def find_command(name: str) -> Command:
    """Return the command of that name. Raises Refused, with a guess of what was meant."""
    if name not in COMMANDS:
        guess = did_you_mean(name, COMMANDS, 0.7)
        raise Refused(f'"{name}" is not a valid command name', error=f"see help{guess}")
    return COMMANDS[name]


def answer(line: bytes, client: "Session") -> Answer:
    """Return the answer to a command line, whatever goes wrong. Raises ClientGone alone."""
    return answer_of(functools.partial(perform, line, client))


def answer_of(get: Callable[[], Answer]) -> Answer:
    """Return what `get` returns, or an answer that says what went wrong. Raises ClientGone."""
    try:
        reply = get()
        if reply.keys:
            reply.keys = {"status": "success", **reply.keys}
        return reply
    except Refused as refusal:
        return Answer(refusal.keys)
    except Exception as fault:
        log.exception("a command stumbled over a fault of the agent")
        error = shortened(repr(fault))
        return Answer(Refused("A fault of the agent; its log says more", error=error).keys)


def perform(line: bytes, client: "Session") -> Answer:
    """Return what the function of a command answers. Raises Refused, ClientGone."""
    request = Request(client.agent, client, split_words(line))
    if not request.words:
        raise Refused("no command specified")
    name, *arguments = request.words
    found = find_command(name)
    if len(arguments) < found.least:
        raise Refused(found.missing, error=f"usage: {found.usage}")
    if len(arguments) > found.most:
        error = f"usage: {found.usage}{one_by_one(found, arguments)}"
        raise Refused(found.misuse, error=error)
    try:
        return found.run(request, *arguments)
    except (Problem, OSError) as problem:
        raise Refused(found.failure.format(*arguments), error=shortened(str(problem)))


def one_by_one(command: Command, arguments: List[str]) -> str:
    """Return advice for who gave several words to a command that takes one: a loop in the shell.

    Return "" for other commands.
    """
    if command.most != 1:
        return ""
    words = " ".join(map(shlex.quote, arguments))
    name = command.usage.split()[0]
    return f"; for several: for each in {words}; do ssh oni {name} $each; done"


def batch_name(word: str) -> str:
    """Return a batch's name without the slash that a shell adds when it completes a folder's."""
    return word[:-1] if word.endswith("/") else word


GO_WORD = (
    r'"(?:[^"\\\x00-\x1f\x7f]'
    r'|\\(?:[abfnrtv\\"]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4}))*"'
)


def split_words(line: bytes) -> List[str]:
    """Return the words of a command line. Raises Refused if it cannot be split.

    A line all of whose words are in double quotes is Go's (NCA quotes with %q, whose escapes are
    those of Python's literals); any other is split as a POSIX shell does.
    """
    if len(line) > MAX_COMMAND:
        raise Refused(f"the command line has more than {MAX_COMMAND} bytes")
    try:
        text = line.decode()
        if re.fullmatch(rf"[ \t]*(?:{GO_WORD}[ \t]+)*", f"{text} "):
            words = [ast.literal_eval(word) for word in re.findall(GO_WORD, text)]
        else:
            words = shlex.split(text)
        # Lone surrogates are no text, and no answer could hold them.
        "".join(words).encode()
    except ValueError as error:
        raise Refused("the command line cannot be read", error=str(error))
    return words


def job_object(job: Job) -> Dict[str, Any]:
    """Return a job as answers show it."""
    shown: Dict[str, Any] = {
        "id": job.id,
        "name": KINDS.get(job.words[0], Kind).title,
        "queued": timestamp(job.queued),
        "status": job.status,
    }
    if job.error:
        shown["error"] = shortened(job.error)
    if job.id > 0:
        shown["words"] = job.words
        shown["attempts"] = job.attempts
    if job.started:
        shown["started"] = timestamp(job.started)
        shown["seconds"] = max(0, (job.ended or time.time_ns()) - job.started) // 10**6 / 1000
    if job.ended and job.id > 0:
        shown["ended"] = timestamp(job.ended)
    return shown


def job_objects(jobs: Iterable[Job]) -> List[Dict[str, Any]]:
    """Return jobs as answers show them."""
    return [job_object(job) for job in jobs]


def job_with_progress(agent: Agent, job: Job) -> Dict[str, Any]:
    """Return a job as answers show it, with its place in the queue, or how far its load is."""
    shown = job_object(job)
    if job.status == PENDING:
        shown["place"] = agent.queue.place(job)
    elif job.status == STARTED and job.words[0] == "load-batch":
        shown.update(agent.site.progress(job.words[1], job.id))
        pages, pages_loaded = shown.get("pages"), shown.get("pages_loaded")
        if pages and pages_loaded and pages_loaded < pages:
            shown["seconds_left"] = int(shown["seconds"] * (pages - pages_loaded) / pages_loaded)
    return shown


def batch_object(state: BatchState) -> Dict[str, Any]:
    """Return a batch as answers show it; None is what was not looked at, or could not be."""
    return {
        "name": state.name,
        "on_disk": state.on_disk,
        "state": state.state,
        "issues": state.issues,
        "pages": state.pages,
        "issues_in_batch_xml": state.issues_in_batch_xml,
        "pages_in_mets": state.pages_in_mets,
        "pages_in_solr": state.pages_in_solr,
        "loaded": state.loaded,
    }


@command(
    usage="version",
    help="Says which version of the agent is running.",
    misuse='"version" takes no arguments',
    example=f"""
    $ ssh oni version
    ONI Agent {VERSION}
    """,
)
def cmd_version(request: Request) -> Answer:
    return Answer({"version": VERSION})


# Messages that do not themselves say what to do, each with what it means and what to do.
TROUBLES = {
    'ONI holds 131 of the 400 issues …, and its last event is "starting load"':
        "If no job is at work on it, a load was killed, and ONI itself would leave it so for ever:"
        " load-batch again. The agent purges, then loads.",
    "2 faults in the batch's files: …; ONI was left as it is":
        "ONI would break off, or drop something without a word. Mend the files that are named"
        " (batch-check lists all faults), then load-batch again.",
    'Open ONI has no awardee "zzz"':
        "The second part of the batch's name is the code of no awardee of ONI's. Type"
        " ensure-awardee zzz \"'Its name'\", then load-batch again.",
    "ONI does not have the title sn…, nor has http…":
        "ONI cannot fetch the title's MARC record: load-title < MARC.xml, then load-batch again.",
    "Solr lacks 12 of 400 pages":
        "The index was emptied or restored, or lost a commit: load-batch again. Only those pages"
        " are indexed.",
    "Solr has documents under its name that are none of its pages":
        "The index was restored from an older day: load-batch again. They are deleted.",
    "Solr still has 400 of its pages, which lead nowhere":
        "Solr was down during a purge: purge-batch again.",
    "… pages are found under another batch":
        "Two batches have the same pages, and the one that was indexed last is found. Purge the"
        " one that should not have them.",
    "Failed to connect to server at …solr…, Solr cannot be asked":
        "Solr is down: start it, then job-retry.",
    "Open ONI cannot answer: OperationalError: …":
        "The database is down, or ONI's settings for it do not reach the agent. Sites that"
        " configure ONI by environment put ONI_DB_… into the agent's, too.",
    "Open ONI did not answer within 10 s":
        "The database or the host is overloaded, or a lock is held: ask again. Jobs wait longer by"
        " themselves.",
    "the file system of the batches did not answer":
        "The mount of BATCH_SOURCE hangs: look at the file server. All else goes on.",
    "exit status 1: … Permission denied …; the batch is complete":
        "ONI could not write its cache, since the agent does not run as the site's user: run it as"
        " that user. The batch needs no new load.",
    "what ONI holds of the batch now is not known":
        "The database went away during the job. When it is back, type batch-status, or just"
        " load-batch again.",
    "given up: 3 times the agent was gone before its end":
        "The host or the agent went down in each attempt; maybe the job brings them down. Look at"
        " memory and the kernel's log, then job-retry.",
    "jobs.db cannot be used …; trying again every second":
        "The disk of the state folder is full: free some. The agent goes on by itself.",
    "ON_FINISH failed: exit status 1, where it calls sudo or mail":
        "The unit lets it gain no privileges. The end of oni-agent.service shows how a .path unit"
        " does it.",
    "killed by signal 9 (SIGKILL)":
        "Often the kernel did that, for want of memory: see journalctl -k -g oom, give the host"
        " more memory, then load-batch again.",
    "removing …, a leftover link to …":
        "A killed load of another copy left a link that ONI would follow. Nothing is to be done.",
}


@command(
    usage="help [COMMAND]",
    help="Lists the commands, or shows one at work; help problems: what can go wrong.",
    misuse='"help" takes at most one command',
    example="""
    $ ssh oni help                lists the commands
    $ ssh oni help job-wait       shows one at work
    $ ssh oni help problems       what can go wrong, and what to do
    """,
)
def cmd_help(request: Request, name: str = "") -> Answer:
    if name == "problems":
        troubles = [{"seen": seen, "advice": advice} for seen, advice in TROUBLES.items()]
        return Answer({"troubles": troubles})
    if name:
        found = find_command(name)
        return Answer({"commands": [command_object(found)]}, [found.example.splitlines()])
    hint = (
        "`help COMMAND` shows a command at work, `help problems` says what can go wrong."
        " `ssh oni` stands for `ssh -t -p 2222 nobody@HOST`."
    )
    return Answer({"commands": [command_object(each) for each in COMMANDS.values()], "hint": hint})


def command_object(command: Command) -> Dict[str, str]:
    """Return a command as `help` shows it."""
    return {"usage": command.usage, "help": command.help, "example": command.example}


@command(
    usage="load-batch BATCH",
    help="Loads a batch from BATCH_SOURCE into Open ONI, as a job.",
    misuse='"load-batch" requires exactly one batch name',
    failure='"{}" cannot be loaded',
    example="""
    $ ssh oni load-batch batch_oru_small_ver01
    Job added to queue
    It is job 1: job-wait 1 waits for its end, job-follow 1 shows its log.
    $ ssh oni job-wait 1
    Success: this job is complete.
       1  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
    $ ssh oni load-batch batch_oru_small_ver01
    No-op: job is redundant or already completed
    """,
)
def cmd_load_batch(request: Request, name: str) -> Answer:
    return request.submit(["load-batch", batch_name(name)])


@command(
    usage="purge-batch BATCH",
    help="Removes a batch from Open ONI, as a job; its files stay.",
    misuse='"purge-batch" requires exactly one batch name',
    failure='"{}" cannot be purged',
    example="""
    $ ssh oni purge-batch batch_oru_small_ver01
    Job added to queue
    It is job 2: job-wait 2 waits for its end, job-follow 2 shows its log.
    """,
)
def cmd_purge_batch(request: Request, name: str) -> Answer:
    name = batch_name(name)
    try:
        request.agent.site.folder(name)
    except Problem as problem:  # Open ONI can hold no such batch, so nothing is to be done
        return Answer({"message": NO_OP, "job": {"id": -1}, "hint": str(problem)})
    return request.submit(["purge-batch", name])


@command(
    usage="load-title < MARC.xml",
    help="Loads or updates titles from MARC XML on standard input, as a job, which looks at all"
    " records first.",
    misuse='"load-title" takes no arguments; the MARC XML comes on standard input',
    failure="Invalid data",
    example="""
    $ ssh oni load-title < herald.xml
    {"status":"success","message":"Job added to queue","job":{"id":3},"session":{"id":5}}
    """,
)
def cmd_load_title(request: Request) -> Answer:
    try:
        return request.submit_with_input(["load-title"], MAX_PAYLOAD)
    except (TransientProblem, OSError) as problem:  # the record may be a good one
        raise Refused("The title cannot be taken just now", error=shortened(str(problem)))


@command(
    usage="ensure-awardee CODE [NAME]",
    help="Makes sure that Open ONI has an awardee, at once and without a job.",
    misuse='"ensure-awardee" requires one or two arguments: an awardee code and, to create it, a'
    " name",
    example="""
    $ ssh oni ensure-awardee zzz
    error: Unable to create awardee
           awardee name must be given to auto-create awardees
    $ ssh oni ensure-awardee zzz "'University of Zzz'"
    Awardee created
    """,
)
def cmd_ensure_awardee(request: Request, code: str, name: str = "") -> Answer:
    try:
        made = request.agent.site.oni.ask("answer_awardee", code, name)
    except Problem as problem:
        error = shortened(str(problem))
        raise Refused("Unable to create awardee", error=error, org_code=code, name=name)
    if made["spelling"] != code:
        log.warning("ensure-awardee: ONI has %r for %r", made["spelling"], code)
    return Answer({"message": "Awardee created" if made["new"] else "Awardee already exists"})


@command(
    usage="batch-patch OLD NEW < INSTRUCTIONS",
    help="Makes a batch NEW from OLD, without the issues of the lines"
    " `RemoveIssue LCCN/YYYYMMDDEE`.",
    misuse='"batch-patch" requires exactly two batch names',
    failure='"{}" cannot be modified',
    example="""
    $ cat instructions.txt
    RemoveIssue sn99990001/1900010101
    $ ssh oni batch-patch batch_oru_small_ver01 batch_oru_small_ver02 < instructions.txt
    {"status":"success","message":"Job added to queue","job":{"id":5},"session":{"id":10}}
    """,
)
def cmd_batch_patch(request: Request, old: str, new: str) -> Answer:
    words = ["batch-patch", batch_name(old), batch_name(new)]
    return request.submit_with_input(words, MAX_INSTRUCTIONS)


@command(
    usage="list-jobs [BATCH] [STATUS...] [LIMIT]",
    help="Lists jobs, oldest first: those on a batch, those that are pending, started,"
    " successful, failed, the newest LIMIT.",
    example="""
    $ ssh oni list-jobs failed
    Jobs: 1
       6  failed 1 s         load-batch batch_oru_hole_ver01  0 s ago, 15:30 UTC
           1 fault in the batch's files:
           data/sn99990001/print/1920010201/1920010201.xml: ONI would leave this
           issue out: invalid literal for int() with base 10: ''; ONI was left as it is
    $ ssh oni list-jobs batch_oru_small_ver01 successful 2
    Jobs: 2
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
       5  successful 2 s     batch-patch batch_oru_small_ver01 batch_oru_small_ver02
           0 s ago, 15:30 UTC
    These are the newest 2 jobs; a larger number shows more.
    """,
)
def cmd_list_jobs(request: Request, *words: str) -> Answer:
    batch = ""
    statuses: List[Status] = []
    limit = NEWEST_JOBS if request.client.width else None  # None: programs get all
    for word in words:
        if word in STATUS_MESSAGES:
            statuses.append(word)
        elif BATCH_NAME.fullmatch(batch_name(word)):
            batch = batch_name(word)
        elif re.fullmatch("[1-9][0-9]{0,8}", word):
            limit = int(word)
        else:
            known = ", ".join(STATUS_MESSAGES)
            error = f"write the name of a batch, a status ({known}), or a number of jobs"
            raise Refused(f'"{word}" is not a job status', error=error)
    queue = request.agent.queue
    if limit is None:
        return Answer({"jobs": job_objects(queue.jobs(statuses, batch))})
    jobs = queue.jobs(statuses, batch, limit + 1)  # one more tells whether there are more
    keys: Dict[str, Any] = {"jobs": job_objects(jobs[-limit:])}
    if len(jobs) > limit:
        keys["hint"] = f"These are the newest {limit} jobs; a larger number shows more."
    return Answer(keys)


NO_JOB_ID = "You must supply a job ID"


@command(
    usage="job-status ID",
    help="Says what has become of a job: its place in the queue, or how far a running load is.",
    misuse='"job-status" takes one job ID',
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-status 5
    Success: this job is complete.
       5  successful 2 s     batch-patch batch_oru_small_ver01 batch_oru_small_ver02
           0 s ago, 15:30 UTC
    """,
)
def cmd_job_status(request: Request, id: str) -> Answer:
    return request.job_answer(request.job(id))


@command(
    usage="job-wait ID...",
    help="Answers as job-status when all these jobs have ended; the exit status is 1 if one was"
    " unsuccessful.",
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-wait 2 4
    Success: these 2 jobs are complete.
    Jobs: 2
       2  successful 2 s     purge-batch batch_oru_small_ver01  2 s ago, 15:30 UTC
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
    """,
)
def cmd_job_wait(request: Request, id: str, *more_ids: str) -> Answer:
    return answer_at_end(request, [request.job(each) for each in (id, *more_ids)])


def answer_at_end(request: Request, jobs: List[Job]) -> Answer:
    """Return the answer to job-wait, which is to come until all these jobs have ended."""
    unfinished = [job for job in jobs if not job.finished]
    if unfinished:
        first = unfinished[0]
        get_rest = functools.partial(answer_at_end, request, jobs)
        return Answer(rest=Rest(lambda: first.finished, get_rest, first))
    unsuccessful = sum(job.status != SUCCESSFUL for job in jobs)
    exit_status = int(unsuccessful > 0)
    if len(jobs) == 1:
        return request.job_answer(jobs[0], exit_status)
    if unsuccessful:
        message = f"Failed: {unsuccessful} of these {len(jobs)} jobs did not succeed."
    else:
        message = f"Success: these {len(jobs)} jobs are complete."
    return Answer({"message": message, "jobs": job_objects(jobs)}, exit_status=exit_status)


@command(
    usage="job-follow ID [LINES]",
    help="Shows a job's log, or the last LINES of it and what comes, until the job ends; then the"
    " exit status is as job-wait's.",
    misuse='"job-follow" takes a job ID and a number of lines',
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-follow 4 1
    [2026-12-01 15:30:58 UTC] [INFO] processed 4 pages
    """,
)
def cmd_job_follow(request: Request, id: str, count: str = "") -> Answer:
    job = request.job(id)
    path = request.agent.store.index_path(job)
    reader = LogReader(path)
    if count:
        reader.skip_to_last(number_of_lines(count))
    return Following(job, path, reader).new_lines()


@dataclass
class Following:
    """A client's way through a job's log, to its end; its files are closed when nobody has it."""

    job: Job
    path: Path
    reader: LogReader
    seen: int = 0  # bytes of the log's index

    def new_lines(self) -> Answer:
        """Return the lines that have come since the last call, and how to get those that follow."""
        is_over = self.job.finished  # asked first: what comes before the end is read, too
        self.seen = size_of(self.path)
        lines = self.reader.new_lines(is_over)
        if is_over:
            return Answer(lines=lines, exit_status=int(self.job.status != SUCCESSFUL))
        return Answer(lines=lines, rest=Rest(self.has_news, self.new_lines))

    def has_news(self) -> bool:
        """Return whether there may be new lines, or an end."""
        return self.job.finished or size_of(self.path) != self.seen


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 if it is not there."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def number_of_lines(word: str) -> int:
    """Return the number of lines that a word says. Raises Refused."""
    if not re.fullmatch("[0-9]{1,9}", word):
        raise Refused(f'"{word}" is not a number of lines')
    return int(word)


@command(
    usage="job-logs ID [LINES]",
    help="Shows what a job has printed so far, or the last LINES of it, each line with its time.",
    misuse='"job-logs" takes a job ID and a number of lines',
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-logs 4 1
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
    [2026-12-01 15:30:58 UTC] [INFO] processed 4 pages
    """,
)
def cmd_job_logs(request: Request, id: str, count: str = "") -> Answer:
    job = request.job(id)
    shown = job_object(job)  # first, so that the log of a job that is shown to be over is whole
    reader = LogReader(request.agent.store.index_path(job), job.finished)
    if count:
        reader.skip_to_last(number_of_lines(count))
    shown["stdout"] = reader.lines(STDOUT, NOTE)
    shown["stderr"] = reader.lines(STDERR)
    return Answer({"job": shown}, reader.lines())


@command(
    usage="job-cancel ID",
    help="Ends a job: a pending one never starts, one at work is terminated, and its load purged.",
    misuse='"job-cancel" takes one job ID',
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-cancel 8
    Job cancelled
       8  failed             load-batch batch_oru_faults_ver01  0 s ago, 15:30 UTC
           cancelled before it started
    """,
)
def cmd_job_cancel(request: Request, id: str) -> Answer:
    job = request.job(id)
    if not request.agent.queue.cancel(job):
        error = message_for_person(job)
        raise Refused("The job has ended already", error=error, job=job_object(job))
    message = "Job cancelled" if job.finished else "Job is being cancelled"
    return Answer({"message": message, "job": job_object(job)})


@command(
    usage="job-retry ID",
    help="Queues a job that was not successful again, as a new job.",
    misuse='"job-retry" takes one job ID',
    missing=NO_JOB_ID,
    failure="The job cannot be retried",
    example="""
    $ ssh oni job-retry 6
    Job added to queue
    It is job 9: job-wait 9 waits for its end, job-follow 9 shows its log.
    It does job 6 again.
    """,
)
def cmd_job_retry(request: Request, id: str) -> Answer:
    job = request.job(id)
    kind = KINDS.get(job.words[0])
    if job.status not in (FAILED, COULD_NOT_START) or not kind:
        error = message_for_person(job)
        raise Refused("Only a failed job can be retried", error=error, job=job_object(job))
    if kind.takes_input:
        store = request.agent.store
        with store.new_input() as given:
            shutil.copyfile(store.input_path(job), given.name)
            retried = request.submit(job.words, Path(given.name))
    else:
        retried = request.submit(job.words)
    retried.keys["retry_of"] = job.id
    return retried


@command(
    usage="list-batches",
    help="Lists every batch in BATCH_SOURCE or Open ONI: absent, partial, complete, or unknown.",
    misuse='"list-batches" takes no arguments',
    failure="The batches cannot be listed",
    example="""
    $ ssh oni list-batches
    Batches: 5
    absent       0 of 3    issues      0 of 6      pages  batch_oru_faults_ver01
    absent       0 of 4    issues      0 of 4      pages  batch_oru_hole_ver01
    absent       0 of 60   issues      0 of 300    pages  batch_oru_slow_ver01
    complete     2 of 2    issues      4 of 4      pages  batch_oru_small_ver01
    absent       0 of 1    issues      0 of 2      pages  batch_oru_small_ver02
    """,
)
def cmd_list_batches(request: Request) -> Answer:
    states = request.agent.site.batch_list.get()
    return Answer({"batches": [batch_object(state) for state in states]})


@command(
    usage="batch-status BATCH",
    help="Says what Open ONI holds of a batch, and its newest events and jobs.",
    misuse='"batch-status" requires exactly one batch name',
    failure='"{}" cannot be looked up',
    example="""
    $ ssh oni batch-status batch_oru_small_ver01
    the batch is complete: ONI holds 2 of the 2 issues and 4 of the 4 pages
    Events: 5
      3 s ago, 15:30 UTC  processed 4 pages
      2 s ago, 15:30 UTC  starting purge
      2 s ago, 15:30 UTC  purged
      1 s ago, 15:30 UTC  starting load
      0 s ago, 15:30 UTC  processed 4 pages
    Jobs: 4
       1  successful 2 s     load-batch batch_oru_small_ver01  2 s ago, 15:30 UTC
       2  successful 2 s     purge-batch batch_oru_small_ver01  2 s ago, 15:30 UTC
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
       5  successful 2 s     batch-patch batch_oru_small_ver01 batch_oru_small_ver02
           0 s ago, 15:30 UTC
    """,
)
def cmd_batch_status(request: Request, word: str) -> Answer:
    name = batch_name(word)
    site = request.agent.site
    site.folder(name)  # raises Problem for what is no batch's name
    state = site.batch(name)
    if not state.row and not state.pages_in_solr:
        site.must_be_there(name)
    message = str(state)
    at_work = request.agent.queue.at_work()
    if at_work and name in at_work.words:
        message = f"job {at_work.id} is at work on it; {message}"
    return Answer(
        {
            "message": message,
            "batch": batch_object(state),
            "events": state.events,
            "jobs": job_objects(request.agent.queue.jobs(word=name, limit=10)),
        }
    )


@command(
    usage="batch-check BATCH",
    help="Reads all files of a batch and says what would go wrong with a load; ONI is left as it"
    " is.",
    misuse='"batch-check" requires exactly one batch name',
    failure='"{}" cannot be checked',
    example="""
    $ ssh oni batch-check batch_oru_faults_ver01
    2 faults would keep Open ONI from loading all of this batch
    pages: 4
    Faults: 2
    fault: data/sn99990001/print/1930010201/1930010201.xml: page 2: ONI would leave
           it out: could not determine sequence number for page from ''
    fault: data/sn99990001/print/1930010301/0002.xml: ONI would break off the load:
           <urlopen error [Errno 2] No such file or directory>
    Warnings: 0
    """,
)
def cmd_batch_check(request: Request, word: str) -> Answer:
    name = batch_name(word)
    site = request.agent.site
    site.must_be_there(name)
    found = site.client_check(name, request.client.poll)  # which raises if the client has gone
    what = found.faults_counted if found.faults else "Nothing in its files"
    keys = {
        "message": f"{what} would keep Open ONI from loading all of this batch",
        "batch": {"name": name},
        "pages": found.pages,
        "faults": [{**each, "fault": shortened(each["fault"])} for each in found.faults],
        "warnings": [{**each, "warning": shortened(each["warning"])} for each in found.warnings],
    }
    return Answer(keys, exit_status=int(bool(found.faults)))


BEGAN = time.monotonic()  # when this agent started


@command(
    usage="board",
    help="Shows what is at work, what waits and what has ended; on a terminal, anew each second.",
    misuse='"board" takes no arguments',
    example="""
    $ ssh oni                          draws the board anew each second, until q; ? shows its keys
    $ ssh -T oni board | jq .at_work   once, for a program
    """,
)
def cmd_board(request: Request) -> Answer:
    agent = request.agent
    jobs = agent.queue.unfinished()
    return Answer(
        {
            "version": VERSION,
            "uptime": int(time.monotonic() - BEGAN),
            "oni": {"location": str(agent.site.oni.location), **agent.site.health()},
            "at_work": [job_with_progress(agent, job) for job in jobs if job.status == STARTED],
            "waiting": job_objects(job for job in jobs if job.status == PENDING),
            "ended": job_objects(agent.queue.ended()),
        }
    )


# ---------------------------------------------------------------- presentation

# Answers become lines for a person: text in, text out. Nothing here knows of channels or keys.

COLOURS = {
    "failed": 31,
    "couldn't start": 31,
    "partial": 31,
    "error": 31,
    "fault": 31,
    "ERROR": 31,
    "successful": 32,
    "complete": 32,
    "unknown": 33,
    "warning": 33,
    "WARNING": 33,
    "started": 36,
}
# A line has the colour of such a word, maybe with a time, before two blanks, a colon or a bracket.
COLOURED = re.compile(rf"\b({'|'.join(COLOURS)})(?: \d+ \w+)?(?:  |[:\]])")
INDENT = " " * 7  # of what belongs to the line above
STAMP = re.compile(r"\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.\d{9}Z\] ")  # of a line of a log

# What moves a terminal's cursor, changes its colours, or turns the order of what is shown. Programs
# are spared it, too: a terminal is often at the other end of a pipe.
CONTROLS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def safe_json(text: str) -> str:
    """Return JSON with everything escaped that would do something to a terminal."""
    if text.isascii():  # nearly all is, and then this takes no time
        return text.replace("\x7f", "\\u007f")
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def harmless(line: str) -> str:
    """Return a line of a log with its control characters written out, but for the tabs."""
    return CONTROLS.sub(lambda found: escaped(found[0]), line)


def plain(text: str) -> str:
    """Return a text with its tabs as blanks, and visible escapes for all that cannot be printed."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else escaped(each) for each in text.replace("\t", "    ")
    )


def escaped(character: str) -> str:
    """Return a character as Python's literals name it."""
    return character.encode("unicode_escape").decode()


def wrapped(text: str, width: int, indent: str = "") -> List[str]:
    """Return a text as lines, none of more than `width` characters, the first one indented.

    A word, or a path, that is longer than a line is broken: nothing is cut off.
    """
    return textwrap.wrap(
        plain(text),
        width,
        initial_indent=indent,
        subsequent_indent=INDENT,
        break_on_hyphens=False,
    )


def coloured(line: str) -> str:
    """Return a line in the colour that one of its words gives it."""
    found = COLOURED.search(line)
    return f"\x1b[{COLOURS[found[1]]}m{line}\x1b[0m" if found else line


def counted(number: Any, one: str, many: str) -> str:
    """Return a number, or a sign for one, with its noun: `1 batch`, `2 batches`."""
    return f"{number} {one if number == 1 else many}"


def span(seconds: float) -> str:
    """Return a length of time for a person: `47 s`, `12 min`, `3 days`."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {name}"
    return f"{int(max(0, seconds))} s"  # a clock may have been set back


def local(stamp: str) -> datetime:
    """Return the host's time, with its zone, of a stamp in UTC."""
    return datetime.fromisoformat(stamp[:19] + "+00:00").astimezone()


def ago(stamp: str) -> str:
    """Return how long ago a stamp in UTC was, and when: `12 min ago, 14:05 CET`."""
    then = local(stamp)
    seconds = time.time() - then.timestamp()
    form = "%H:%M %Z" if seconds < 43200 else "%Y-%m-%d %H:%M %Z"
    return f"{span(seconds)} ago, {then.strftime(form)}"


@functools.lru_cache(maxsize=100)
def clock_time(stamp: str) -> str:
    """Return a stamp in UTC as the host's time, with the name of its zone."""
    return local(stamp).strftime("%Y-%m-%d %H:%M:%S %Z")


def log_line(line: str) -> str:
    """Return a line of a log for a person: in the host's time, without parts of a second."""
    found = STAMP.match(line)
    return f"[{clock_time(found[1])}] {plain(line[found.end() :])}" if found else plain(line)


class Row(NamedTuple):
    """A line of an answer. Its detail stands beside it if both fit on a line, else below."""

    text: str
    detail: str = ""


def laid_out(row: Row, width: int) -> List[str]:
    """Return a row as lines of at most `width` characters."""
    if row.detail and len(plain(f"{row.text}  {row.detail}")) <= width:
        return [plain(f"{row.text}  {row.detail}")]
    return wrapped(row.text, width) + wrapped(row.detail, width, INDENT)


def version_row(version: str) -> Row:
    return Row(f"ONI Agent {version}")


def uptime_row(seconds: int) -> Row:
    return Row(f"up {span(seconds)}")


def oni_row(oni: Dict[str, Any]) -> Row:
    batches = counted(oni.get("batches", "?"), "batch", "batches")
    return Row(f"Open ONI in {oni['location']}: {batches}", oni.get("problem", ""))


def text_row(text: str) -> Row:
    return Row(text)


def command_row(command: Dict[str, str]) -> Row:
    return Row(f"{command['usage']:<36}", command["help"])


def retry_row(id: int) -> Row:
    return Row(f"It does job {id} again.")


def trouble_row(trouble: Dict[str, str]) -> Row:
    return Row(trouble["seen"], trouble["advice"])


def finding_row(finding: Dict[str, Any]) -> Row:
    return Row(f"{'✓' if finding['well'] else '✗'} {finding['name']}: {finding['found']}")


def event_row(event: List[str]) -> Row:
    return Row(f"  {ago(event[0])}  {event[1]}")


def fault_row(fault: Dict[str, str]) -> Row:
    return Row(f"fault: {fault['file']}: {fault['fault']}")


def warning_row(warning: Dict[str, str]) -> Row:
    return Row(f"warning: {warning['file']}: {warning['warning']}")


def batch_row(batch: Dict[str, Any]) -> Row:
    """Return a batch of a table, with question marks for what was not counted."""
    row = {key: "?" if value is None else value for key, value in batch.items()}
    return Row(
        f"{row['state']:<10}{row['issues']:>4} of {row['issues_in_batch_xml']:<4} issues"
        f"{row['pages']:>7} of {row['pages_in_mets']:<6} pages  {row['name']}"
    )


def job_row(job: Dict[str, Any]) -> Row:
    """Return a job of a table; its detail is how far it is, or why it failed."""
    id = job["id"]
    if id < 0:  # nothing was to be done: the message has said all
        return Row("")
    if "words" not in job:  # it was just accepted: the answer has its id alone (Request.submit)
        return Row(
            f"It is job {id}: job-wait {id} waits for its end, job-follow {id} shows its log."
        )
    state = job["status"]
    if "seconds" in job:
        state += f" {span(job['seconds'])}"
    when = ago(job.get("ended", job.get("started", job["queued"])))
    row = f"{id:>4}  {state:<17}  {' '.join(job['words']):<31}  {when}"
    return Row(row, job_progress(job) or job.get("error", ""))


def job_progress(job: Dict[str, Any]) -> str:
    """Return a job's place in the queue, or a bar of its check or its load; "" if none is known."""
    if "place" in job:
        return f"It is number {job['place']} in the queue."
    if job.get("to_check"):
        checked = f"{job['checked']} of {counted(job['to_check'], 'issue', 'issues')} checked"
        return f"{bar(job['checked'], job['to_check'])} {checked}"
    if not job.get("pages"):
        return ""
    issues = f"{job['issues_loaded']} of {counted(job['issues'], 'issue', 'issues')}"
    text = f"{bar(job['pages_loaded'], job['pages'])} {issues}"
    if "seconds_left" in job:
        rate = job["pages_loaded"] / max(1, job["seconds"])
        text += f", {rate:.1f} pages a second, {span(job['seconds_left'])} left"
    return text


def bar(done: int, wanted: int) -> str:
    """Return a bar, full when as much is done as is wanted."""
    return f"[{'#' * (20 * min(done, wanted) // wanted):.<20}]"


SHOWN: Dict[str, Callable[[Any], Row]] = {  # what stands for the value of a key, or each of a list
    "message": text_row,
    "hint": text_row,
    "version": version_row,
    "uptime": uptime_row,
    "oni": oni_row,
    "commands": command_row,
    "troubles": trouble_row,
    "looks": finding_row,
    "retry_of": retry_row,
    "events": event_row,
    "faults": fault_row,
    "warnings": warning_row,
    "batches": batch_row,
    "job": job_row,
    "jobs": job_row,
    "at_work": job_row,
    "waiting": job_row,
    "ended": job_row,
}
UNCOUNTED = ("commands", "troubles", "looks")  # nobody wants to know how many there are
HIDDEN = ("status", "batch")  # the message or the hint says it


def answer_rows(keys: Dict[str, Any], most: Optional[int] = None) -> Iterator[Row]:
    """Yield the rows of any answer, key by key; of a list so many things at most."""
    if keys.get("status") == "error":
        yield Row(f"error: {keys['message']}")
        yield Row(f"{INDENT}{keys.get('error', '')}")
        return
    for key, value in keys.items():
        if key in HIDDEN:
            continue
        things = value[:most] if isinstance(value, list) else [value]
        if isinstance(value, list) and key not in UNCOUNTED:
            yield Row(f"{key.replace('_', ' ').capitalize()}: {len(value)}")
        for each in things:
            yield SHOWN[key](each) if key in SHOWN else Row(f"{key}: {each}")


def answer_lines(keys: Dict[str, Any], width: int, most: Optional[int] = None) -> List[str]:
    """Return an answer's object as lines of at most `width` characters."""
    return [line for row in answer_rows(keys, most) for line in laid_out(row, width)]


def terminal_text(lines: Iterable[str], colour: bool) -> str:
    """Return lines as a terminal takes them, in colours if it has some."""
    return "".join(f"{coloured(line) if colour else line}\r\n" for line in lines)


def answer_text(reply: Answer, width: int, colour: bool) -> Iterator[str]:
    """Yield what a person is shown of an answer, piece by piece.

    The lines of a log are not wrapped, so that they can be copied whole from a terminal.
    """
    yield terminal_text(answer_lines(reply.keys, width), colour)
    for lines in reply.lines:
        yield terminal_text(map(log_line, lines), colour)


def progress_line(job: Dict[str, Any], width: int) -> str:
    """Return how far a job is on one line of at most `width` characters."""
    return wrapped(job_progress(job) or STATUS_MESSAGES[job["status"]], width)[0]


BOARD_FOOTER = "q leaves; jobs go on; ? shows keys"
BOARD_KEYS = (
    "q, Ctrl-C, Ctrl-D  leave the board; jobs go on",
    "?                  show or hide these lines",
    "",
    "In another terminal: `ssh oni help` lists what you can ask for.",
    "",
)
BOARD_EMPTY = (
    "",
    "Nothing has been asked for yet. In another terminal:",
    "ssh oni list-batches        which batches are there?",
    "ssh oni load-batch BATCH    load one",
    "ssh oni help                what else?",
)


def board_lines(keys: Dict[str, Any], width: int, height: int, with_keys: bool) -> List[str]:
    """Return the board for a screen of so many columns and lines, but for its last line.

    `keys` is the answer to `board`; `with_keys` puts an explanation of the board's keys on top.
    """
    lines = answer_lines(keys, width, height // 2)
    if with_keys:
        lines = [line[:width] for line in BOARD_KEYS] + lines
    has_jobs = any(keys.get(key) for key in ("at_work", "waiting", "ended"))
    if keys["status"] == "success" and not has_jobs:
        lines += [line[:width] for line in BOARD_EMPTY]
    return lines[: height - 1]


# ---------------------------------------------------------------- SSH server

# A client is a Visitor first, without a thread, until it has said its version line and there is
# room to shake hands with it. Then it is a Connection, with a thread of paramiko's. Each command on
# it is a Session: on a thread while it works, and in the Watcher's hands while it waits.

# What is offered to clients, where paramiko has it. Every client of today has one of each.
CURVES = ("curve25519-sha256", "curve25519-sha256@libssh.org", "mlkem768x25519-sha256")
NIST_CURVES = ("ecdh-sha2-nistp256", "ecdh-sha2-nistp384")  # only where those are missing
CIPHERS = (
    "aes128-ctr",
    "aes128-gcm@openssh.com",
    "aes192-ctr",
    "aes256-ctr",
    "aes256-gcm@openssh.com",
)
DIGESTS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")

GREETING = f"SSH-2.0-ONI_Agent_{VERSION}"
TRAILER = b"\n\nEND\n"  # ends what comes on standard input; so does its end
GONE = (ClientGone, OSError, EOFError, paramiko.SSHException)  # what is raised when a client left
SESSION_NUMBERS = itertools.count(1)

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
Holder = Union[IPAddress, ipaddress.IPv6Network]


@dataclass(frozen=True)
class Offer:
    """The names of the algorithms that clients are offered, in the order of their alphabet."""

    kex: List[str]
    ciphers: List[str]
    digests: List[str]

    def __str__(self) -> str:
        return ", ".join(self.kex + self.ciphers + self.digests)


def algorithms_to_offer() -> Offer:
    """Return what clients are offered on this host. Raises Problem if nobody could connect."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = paramiko.Transport(ours).get_security_options()
    wanted = CURVES if has_curve25519() else NIST_CURVES
    offer = Offer(
        sorted(set(wanted).intersection(options.kex)),
        sorted(set(CIPHERS).intersection(options.ciphers)),
        sorted(set(DIGESTS).intersection(options.digests)),
    )
    if not (offer.kex and offer.ciphers and offer.digests):
        raise Problem(
            f"paramiko {paramiko.__version__} with cryptography has too few of the algorithms that"
            f" the agent would offer ({str(offer) or 'none at all'}), so nobody could connect:"
            " install others of their releases"
        )
    return offer


def has_curve25519() -> bool:
    """Return whether this host's cryptography has curve25519; in FIPS mode it has not."""
    try:
        X25519PrivateKey.generate()
        Ed25519PrivateKey.generate()
    except Exception:  # which one depends on the release, and on OpenSSL
        return False
    return True


# -- the host key


def load_host_key(path: Path) -> Optional[paramiko.PKey]:
    """Return the ed25519, ECDSA or RSA key in a file; None if there is no file. Raises Problem."""
    if not os.path.lexists(path):
        return None
    try:
        read_regular(path)
    except Problem as problem:
        advice = ""
        if isinstance(problem.__cause__, PermissionError):
            advice = f"; root can make it the agent's: chown {user_name(os.geteuid())} {path}"
        raise Problem(
            f"HOST_KEY_FILE is {path}, which cannot be used: {problem}{advice}"
        ) from problem
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        with contextlib.suppress(Exception):  # paramiko tells a foreign file in many ways
            return kind(filename=str(path))
    raise Problem(
        f"HOST_KEY_FILE is {path}, which holds no ed25519, ECDSA or RSA key without a passphrase;"
        " it was left as it is"
    )


def make_host_key(path: Path) -> paramiko.PKey:
    """Write a new key to the file `path`, and its public half beside it; return the key.

    It is of ed25519, or of P-256 where that is missing. A key that has come to be there meanwhile
    is returned instead. Raises Problem.
    """
    private: Union[Ed25519PrivateKey, ec.EllipticCurvePrivateKey]
    if has_curve25519():
        private = Ed25519PrivateKey.generate()
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    text = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            file = Path(folder) / "key"
            file.touch(mode=0o600)
            file.write_bytes(text)
            sync(file)
            if not os.path.lexists(path):
                file.rename(path)  # it gets its name when it is whole
        sync(path.parent)
        key = load_host_key(path)
        if key is None:
            raise Problem(f"the HOST_KEY_FILE {path} has vanished as it was made")
        Path(f"{path}.pub").write_text(f"{key.get_name()} {key.get_base64()} oni-agent\n")
        return key
    except OSError as error:
        raise Problem(f"the HOST_KEY_FILE {path} cannot be made: {error.strerror}") from error


# -- JSON

COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def json_of(value: object) -> str:
    """Return a value as JSON without blanks."""
    return safe_json(COMPACT_JSON.encode(value))


def json_pieces(keys: Dict[str, Any]) -> Iterator[str]:
    """Yield an object as JSON; an iterator in it, of the lines of a log, is read meanwhile."""
    yield "{"
    comma = ""
    for key, value in keys.items():
        yield f"{comma}{json_of(key)}:"
        comma = ","
        if isinstance(value, dict):
            yield from json_pieces(value)
        elif isinstance(value, Iterator):
            yield from json_pieces_of_lines(value)
        else:
            yield json_of(value)
    yield "}"


def json_pieces_of_lines(log_lines: Iterator[List[str]]) -> Iterator[str]:
    """Yield a list as JSON, of lines that come some at a time; "" for none that have come."""
    yield "["
    comma = ""
    for lines in log_lines:
        if lines:
            yield comma + json_of(lines)[1:-1]
            comma = ","
        else:
            yield ""
    yield "]"


def encoded(keys: Dict[str, Any]) -> Iterator[str]:
    """Yield an answer as a line of JSON, in pieces that are worth a packet.

    There may be empty ones among them, so that whoever sends them notices a client that has gone.
    """
    text = ""
    for piece in json_pieces(keys):
        text += piece
        if len(text) >= PIECE or not piece:
            yield text
            text = ""
    yield f"{text}\n"


# -- shares


class Share:
    """A number of places, of which no address may hold more than half of what the others leave.

    Of 256 the first address may hold 128, the next one 64, then 32; so whoever comes later still
    finds a place, unless very many come. Every address may hold one, if there is one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: Dict[Holder, int] = {}
        self._total = 0

    def take(self, holder: Holder) -> bool:
        """Let an address have one more; return False if it may not."""
        with self._lock:
            held = self._held.get(holder, 0)
            others = self._total - held
            if self._total >= self._most or held >= max(1, (self._most - others) // 2):
                return False
            self._held[holder] = held + 1
            self._total += 1
            return True

    def give_back(self, holder: Holder) -> None:
        """Note that an address has one less."""
        with self._lock:
            self._total -= 1
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]


class ClientWarnings:
    """Lines of the log about clients, at most one a minute for each address."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: "OrderedDict[Holder, float]" = OrderedDict()  # when, the oldest first

    def tell(self, host: IPAddress, why: str) -> None:
        """Log that a client at an address was refused, or has failed, unless one just was."""
        holder = holder_of(host)
        now = time.monotonic()
        with self._lock:
            if now - self._told.get(holder, -math.inf) < WARNING_SECONDS:
                return
            self._told[holder] = now
            self._told.move_to_end(holder)
            if len(self._told) > MAX_WARNINGS:
                self._told.popitem(last=False)
        log.warning("connection from=%s refused=%r", host, why)


def holder_of(host: IPAddress) -> Holder:
    """Return what shares are counted by: an address, or of IPv6 the network that one host has."""
    if isinstance(host, ipaddress.IPv6Address):
        return ipaddress.IPv6Network((host, 64), strict=False)
    return host


# -- connections


LONG_PACKETS = threading.BoundedSemaphore(MAX_LONG_PACKETS)


class ClientSocket(socket.socket):
    """An accepted socket, as paramiko uses it, which also begins commands.

    A command's answer must not overtake paramiko's reply to the request for the command, and
    paramiko has no callback for "the reply is sent". But it calls `recv` only when it has answered
    all that came before: so `recv` begins the command.
    """

    def __init__(self, accepted: socket.socket, said: bytes) -> None:
        super().__init__(fileno=accepted.detach())
        self.requested: Optional["Session"] = None  # whose request paramiko is about to answer
        self.may_be_long = False  # whether a packet may: the client is authenticated
        self._long_rest = 0  # bytes of a long packet that are yet to come
        self._said = said  # by the client, to the Door
        self._was_greeted = False

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive, and acknowledge at once: OpenSSH's next packet waits for that (Nagle)."""
        if self.requested:
            self.requested.begin()
            self.requested = None
        if size > MAX_PACKET and not self._long_rest:
            self._begin_long_packet(size)
        if self._said:
            data, self._said = self._said[:size], self._said[size:]
            return data
        data = super().recv(size, flags)
        if self._long_rest:
            self._long_rest -= len(data)
            if not self._long_rest:
                LONG_PACKETS.release()
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data

    def _begin_long_packet(self, size: int) -> None:
        """Let a packet be long, of which `size` bytes are yet to come.

        Raises EOFError if it may not: paramiko would believe, and hold, any length.
        """
        if size > MAX_LONG_PACKET or not self.may_be_long or not LONG_PACKETS.acquire(False):
            raise EOFError
        self._long_rest = size

    def close(self) -> None:
        """Close, and make room for another's long packet."""
        super().close()
        if self._long_rest:
            self._long_rest = 0
            LONG_PACKETS.release()

    def send(self, data: Any, flags: int = 0) -> int:
        """Send, but for the greeting, which paramiko sends first and the Door has sent before."""
        if not self._was_greeted:
            self._was_greeted = True
            return len(data)
        return super().send(data, flags)


def take_data(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Keep what a client has sent for a command. Raises SSHException if it is past the window."""
    keep(channel, channel.in_buffer, message.get_binary())


def take_extended_data(channel: paramiko.Channel, message: paramiko.Message) -> None:
    """Keep a client's extended data, which no command reads, and which fills the window, too.

    Raises SSHException if it is past the window.
    """
    message.get_int()  # its kind
    keep(channel, channel.in_stderr_buffer, message.get_binary())


def keep(channel: paramiko.Channel, buffer: "BufferedPipe[Any]", data: bytes) -> None:
    """Add data to a channel's buffer. Raises SSHException if the client may not send that much."""
    used = len(channel.in_buffer) + len(channel.in_stderr_buffer) + channel.in_window_sofar
    if used + len(data) > channel.in_window_size:
        raise paramiko.SSHException("it sent more than the window lets it")
    if not channel.closed:
        buffer.feed(data)


class Connection(paramiko.ServerInterface, paramiko.Transport):  # type: ignore[misc]
    """One client's connection: paramiko's thread for it, which asks itself what is allowed.

    The types disagree about get_banner, which both of its bases have, and no server calls.
    """

    # This works around paramiko's trust in windows: its own Channel._feed and _feed_extended would
    # keep whatever a client sends, past any window.
    _channel_handler_table = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_DATA: take_data,
        MSG_CHANNEL_EXTENDED_DATA: take_extended_data,
    }

    def __init__(self, server: "Server", visitor: "Visitor") -> None:
        self._socket = ClientSocket(visitor.socket, visitor.said)
        super().__init__(
            self._socket,
            default_window_size=SMALL_WINDOW,
            disabled_algorithms={"keys": ["ssh-rsa"], "pubkeys": ["ssh-rsa"]},  # SHA-1
        )
        self.server = server
        self.agent = server.agent
        self.host = visitor.host
        self.holder = visitor.holder
        self.address = visitor.address
        self.admitted = "ALLOW_FROM" if self.agent.settings.allow_from else "anyone"
        self.user = ""
        self.idle_since = time.monotonic()
        self.is_shaking_hands = True  # until it is authenticated, or takes too long
        self.busy = 0  # sessions that have begun and not ended
        self.ended_for = ""  # why the agent has ended it
        self._sessions: List[Session] = []
        self._refused_keys: List[str] = []
        self._unproved_key = ""  # one that is admitted, and whose signature is yet to be looked at
        # paramiko would wake each idle connection ten times a second, to see whether it was closed.
        # `end` wakes it; the rest is for paramiko's rekeying alone.
        self._socket.settimeout(10)
        # paramiko would have a timer thread for each, which goes on when the client has gone.
        self.packetizer.start_handshake = lambda timeout: None  # type: ignore[method-assign]
        self.local_version = GREETING
        self.add_server_key(server.host_key)
        options = self.get_security_options()
        options.kex = server.offer.kex
        options.ciphers = server.offer.ciphers
        options.digests = server.offer.digests

    def begin(self) -> None:
        """Start the connection's thread. Raises RuntimeError if there is none to be had."""
        self.start_server(event=threading.Event(), server=self)

    def end(self, why: str) -> None:
        """Make the connection's thread end, soon."""
        self.ended_for = why
        with contextlib.suppress(OSError):  # the client may have gone by itself
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Serve the client until it leaves; then tell the server, and the log if it failed."""
        try:
            super().run()
        finally:
            if self._socket.requested:  # and the client has gone before it could begin
                self.server.session_ended(self._socket.requested)
            self.server.connection_ended(self)
            why = self._what_failed()
            if why:
                self.server.warnings.tell(self.host, why)
            self._break_cycles()

    def _break_cycles(self) -> None:
        """Break the reference cycles of this connection, so that its memory is freed at once.

        Otherwise the garbage collector would have to find it, and each of its full runs stops all
        threads for as long as 100 ms.
        """
        self._sessions.clear()
        self.server_object = None
        # This works around paramiko's table of its own methods in each transport (from 3.4 on).
        self._handler_table: Dict[int, Any] = {}

    def _what_failed(self) -> str:
        """Return why the client got no further than it did; "" if it left by itself."""
        error = self.get_exception()
        if self.ended_for:
            return "" if self.authenticated else self.ended_for
        if error and not isinstance(error, (EOFError, OSError)):
            return str(error)
        if self.authenticated:
            return ""
        if self._unproved_key:
            return f"it has not proved to have {self._unproved_key}"
        if self._refused_keys:
            return f"no key of AUTHORIZED_KEYS, but {', '.join(self._refused_keys)}"
        if self.user:
            return "it has no key, and AUTHORIZED_KEYS asks for one"
        return "it left before it was authenticated"

    # What paramiko asks and tells, on the connection's thread: no work here.

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"  # whatever key that is, where there are no AUTHORIZED_KEYS

    def check_auth_none(self, username: str) -> int:
        self.user = username
        if self.agent.settings.authorized_keys:
            return AUTH_FAILED
        return AUTH_SUCCESSFUL

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        keys_file = self.agent.settings.authorized_keys
        if not keys_file:
            return self.check_auth_none(username)
        self.user = username
        self.admitted = fingerprint(key)
        if key_is_authorized(keys_file, key, self.host):
            self._unproved_key = self.admitted
            return AUTH_SUCCESSFUL  # if it proves to have it, which paramiko asks for afterwards
        if len(self._refused_keys) < 10 and self.admitted not in self._refused_keys:
            self._refused_keys.append(self.admitted)
        return AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        # Only a client that is authenticated comes as far as this.
        self.server.handshake_over(self)
        self._socket.may_be_long = True
        if kind != "session":
            return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        self._sessions = [each for each in self._sessions if not each.is_done_with()]
        if len(self._sessions) >= MAX_CHANNELS:
            return OPEN_FAILED_RESOURCE_SHORTAGE
        return OPEN_SUCCEEDED

    def _queue_incoming_channel(self, channel: paramiko.Channel) -> None:
        """Take a channel that is open.

        This works around paramiko's queue for accept(), which would keep each channel for ever.
        """
        self._sessions.append(Session(channel, self))

    def _session_on(self, channel: paramiko.Channel) -> "Session":
        """Return the session on a channel. Raises SSHException for one that has ended."""
        for session in self._sessions:
            if session.channel is channel:
                return session
        raise paramiko.SSHException("it asked for something on a channel that was closed")

    def check_channel_pty_request(
        self, channel: paramiko.Channel, term: bytes, width: int, height: int, *_others: Any
    ) -> bool:
        self._session_on(channel).colour = term not in (b"", b"dumb")
        return self.check_channel_window_change_request(channel, width, height)

    def check_channel_window_change_request(
        self, channel: paramiko.Channel, width: int, height: int, *_others: Any
    ) -> bool:
        session = self._session_on(channel)
        # 0 is said by a client whose own input is no terminal.
        session.width = max(20, min(width or 80, 500))
        session.height = min(height or 24, 500)
        return True

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes = b"") -> bool:
        session = self._session_on(channel)
        if session.line is not None or not self.server.may_begin(session):
            return False  # RFC 4254, 6.5: one to a channel
        session.line = command
        self._socket.requested = session
        return True

    check_channel_shell_request = check_channel_exec_request  # no shell, but an answer


# -- sessions


class Session:
    """A channel, and the one command on it, from its words to the last byte of its answer.

    All its work is one generator, `_steps`. A thread runs that until it yields an IsDue: there is
    nothing to do but wait, and the thread ends. The Watcher asks the IsDue a few times a second;
    when it is True, `begin` gives the generator a new thread, on which it goes on. So a thousand
    clients can wait for a job without a thousand threads.

    For `show_board` and `show_progress` it is the terminal at the channel's other end.
    """

    def __init__(self, channel: paramiko.Channel, connection: Connection) -> None:
        self.channel = channel
        self.connection = connection
        self.agent = connection.agent
        self.line: Optional[bytes] = None  # until there is a command
        self.width = 0  # of a person's terminal, if there is one; then it has a height, too
        self.height = 0
        self.colour = False
        self.is_over = False
        self.stalled_since = math.inf  # while the client is to send or to read, and does not
        self._steps = self._work()

    def is_done_with(self) -> bool:
        """Return whether the channel is closed, and no command on it goes on."""
        return self.channel.closed and (self.is_over or self.line is None)

    def begin(self) -> None:
        """Work on a thread, until the end or until there is nothing to do but wait.

        Raises RuntimeError if there is no thread to be had.
        """
        threading.Thread(target=self._go_on, daemon=True).start()

    def _go_on(self) -> None:
        """Work to the next step at which to wait, or to the end."""
        is_due = next(self._steps, None)
        if is_due:
            self.connection.server.session_waits(self, is_due)
        else:
            self.connection.server.session_ended(self)

    def _work(self) -> Iterator[IsDue]:
        """Answer, send the exit status, close the channel, log; yield where there is but to wait.

        The exit status comes before the close: a client gets nothing after that.
        """
        number = next(SESSION_NUMBERS)
        begun = time.monotonic()
        status = "client went away"
        try:
            with contextlib.suppress(*GONE), self.channel:
                reply = yield from self._answer(number)
                status = reply.keys.get("status", "followed")
                self.channel.send_exit_status(reply.exit_status)
        except Exception:
            log.exception("a session stumbled over a fault of the agent")
        log.info(
            "session=%d from=%s user=%r admitted=%s command=%r status=%r ms=%d",
            number,
            self.connection.address,
            self.connection.user,
            self.connection.admitted,
            (self.line or b"")[:200].decode("utf-8", "replace"),
            status,
            (time.monotonic() - begun) * 1000,
        )

    def _answer(self, number: int) -> Generator[IsDue, None, Answer]:
        """Send a person or a program the answer, and return it.

        Nothing else refers to the answer, so the log files that it reads are closed with it.
        """
        line = self.line or b""
        if self.width and line.strip() in (b"", b"board"):
            if self.colour:
                return (yield from show_board(self))
            line = b"board"  # once: a terminal without escapes cannot draw it anew
        reply = answer(line, self)
        self._send_answer(reply, number)
        while reply.rest:
            yield from self._wait_for(reply.rest)
            reply = answer_of(reply.rest.get)
            self._send_answer(reply, number)
        return reply

    def _send_answer(self, reply: Answer, number: int) -> None:
        """Send what there is of an answer. Raises what GONE lists if the client has gone."""
        if self.width:
            texts = answer_text(reply, self.width, self.colour)
        elif reply.keys:
            texts = encoded({**reply.keys, "session": {"id": number}})
        else:
            texts = ("".join(f"{harmless(line)}\n" for line in lines) for lines in reply.lines)
        for text in texts:
            self.send(text)

    def _wait_for(self, rest: Rest) -> Iterator[IsDue]:
        """Wait until there is more of the answer; a person is shown how far its job is."""
        withdraw: Callable[[], None] = do_nothing
        if rest.job:
            watcher = self.connection.server.watcher
            withdraw = self.agent.queue.when_ended(rest.job, lambda job: watcher.wake())
        try:
            while not rest.is_due():
                if rest.job and self.colour:
                    show_progress(job_with_progress(self.agent, rest.job), self)
                yield from self.pause(1 if self.colour else STALL_SECONDS, rest.is_due)
                self.poll()
        finally:
            withdraw()

    def pause(self, seconds: float, is_due: IsDue) -> Iterator[IsDue]:
        """Wait without a thread until `is_due`, a person types, the client leaves, or `seconds`."""
        until = time.monotonic() + seconds

        def may_go_on() -> bool:
            has_typed = bool(self.width) and self.channel.recv_ready()
            is_late = time.monotonic() >= until
            return self.channel.closed or has_typed or is_late or is_due()

        yield may_go_on

    def send(self, text: str) -> None:
        """Send text to the client. Raises ClientGone, OSError, EOFError, SSHException."""
        data = text.encode("utf-8", "replace")
        sent = 0
        self.channel.settimeout(STALL_SECONDS)
        while sent < len(data) and not self.channel.closed:
            self.stalled_since = time.monotonic()
            sent += self.channel.send(data[sent : sent + CHUNK])
        self.stalled_since = math.inf
        if self.channel.closed:
            raise ClientGone

    def poll(self) -> bytes:
        """Return what a person has typed since the last call; Ctrl-D if no more can come.

        Raises ClientGone if the client has closed its channel, or a person typed Ctrl-C: who waits
        calls it for that, too.
        """
        self.channel.settimeout(0)
        try:
            typed = self.channel.recv(1024)
        except socket.timeout:
            return b""
        if self.channel.closed or (self.width and b"\x03" in typed):
            raise ClientGone
        return typed or b"\x04"

    def read_input(self, into: IO[bytes], limit: int) -> None:
        """Copy standard input to its trailer or its end. Raises ClientGone, Problem, Scarce."""
        if self.width:
            raise Problem("this command reads a file: give it < FILE, and leave out -t")
        widen_window(self.channel)
        try:
            copy_input(self, into, limit)
        except socket.timeout:
            raise Problem(
                "standard input gave nothing for too long and has not ended: close it, or send"
                " an empty line and END"
            )
        except EOFError:  # paramiko could not ask for more
            raise ClientGone
        except OSError as error:
            raise Scarce(f"{into.name} cannot be written: {error}") from error

    def receive(self) -> bytes:
        """Return some of what a client sends; none when it has ended. Raises socket.timeout."""
        self.channel.settimeout(STALL_SECONDS)
        self.stalled_since = time.monotonic()
        try:
            return self.channel.recv(CHUNK)
        finally:
            self.stalled_since = math.inf


def widen_window(channel: paramiko.Channel) -> None:
    """Let the client send READ_WINDOW bytes ahead of the command that reads them from now on.

    This works around paramiko's fixed windows: in_window_sofar is what the command has read and the
    client does not know of yet. What is added there is granted to the client at the next recv.
    """
    channel.in_window_threshold = READ_WINDOW // 10
    channel.in_window_size += READ_WINDOW - SMALL_WINDOW
    channel.in_window_sofar += READ_WINDOW - SMALL_WINDOW


def copy_input(session: Session, into: IO[bytes], limit: int) -> None:
    """Copy what a client sends, to its trailer or its end, into a file that has no buffer.

    Raises ClientGone, Problem, socket.timeout, and OSError for the file.
    """
    channel = session.channel
    tail = b""  # of what has come, which may be the trailer
    while True:
        piece = session.receive()
        if not piece:
            break
        tail = (tail + piece)[-len(TRAILER) :]
        while piece:  # a disk that fills up takes a part, and only then refuses
            piece = piece[into.write(piece) :]
        length = into.tell() - len(TRAILER)  # of what is before it
        if length > limit:
            raise Problem(f"there are more than {limit >> 20} MiB on standard input")
        if tail == TRAILER and not channel.recv_ready():
            into.truncate(length)
            return
    if not channel.eof_received:
        raise ClientGone  # half an input must not pass for a whole one


class Watcher(threading.Thread):
    """The one thread that looks, a few times a second, which of the sessions that wait are due."""

    def __init__(self, go_on: Callable[[Session], bool]) -> None:
        """Make a watcher; `go_on` lets a session work, and returns whether there was room."""
        super().__init__(name="watcher", daemon=True)
        self._go_on = go_on
        self._lock = threading.Lock()
        self._waiting: Dict[Session, IsDue] = {}
        self._awake = threading.Event()

    def add(self, session: Session, is_due: IsDue) -> None:
        """Have a session work again as soon as `is_due` returns True."""
        with self._lock:
            self._waiting[session] = is_due
            is_first = len(self._waiting) == 1
        if is_first:
            self._awake.set()

    def wake(self) -> None:
        """Look at once: a job has ended."""
        self._awake.set()

    def run(self) -> None:
        """Look again and again, as long as the agent runs."""
        while True:
            self._awake.wait(WATCH_SECONDS if self._waiting else None)
            self._awake.clear()
            self._wake_due()

    def _wake_due(self) -> None:
        """Let each session work that is due; afterwards nothing here holds one that has ended."""
        with self._lock:
            waiting = list(self._waiting.items())
        for session, is_due in waiting:
            if is_due():
                self._let_work(session, is_due)

    def _let_work(self, session: Session, is_due: IsDue) -> None:
        """Let a session work. If there is no room, or no thread, it is looked at the next time."""
        with self._lock:
            del self._waiting[session]
        if not self._go_on(session):
            with self._lock:
                self._waiting[session] = is_due


# -- a person's terminal


def show_progress(job: Dict[str, Any], terminal: Session) -> None:
    """Show how far a job is on one line, which the next time, or the answer, overwrites."""
    terminal.send(f"\x1b[K{progress_line(job, terminal.width)}\r")


def show_board(terminal: Session) -> Generator[IsDue, None, Answer]:
    """Draw the board anew each second, until q or Ctrl-C, and return its newest answer."""
    terminal.send("\x1b[?1049h\x1b[?25l")  # another screen, and no cursor
    reply = Answer()
    with_keys = False
    with contextlib.suppress(ClientGone):  # by Ctrl-C, maybe
        while True:
            reply = answer(b"board", terminal)
            lines = board_lines(reply.keys, terminal.width, terminal.height, with_keys)
            text = "".join(f"\x1b[K{coloured(line)}\r\n" for line in lines)
            footer = BOARD_FOOTER[: terminal.width]
            terminal.send(f"\x1b[H{text}\x1b[J\x1b[{terminal.height}H{footer}")
            yield from terminal.pause(1, lambda: False)
            typed = terminal.poll()
            if b"q" in typed or b"\x04" in typed:
                break
            if b"?" in typed:
                with_keys = not with_keys
    terminal.send("\x1b[?25h\x1b[?1049l")
    return reply


# -- the door


class Visitor:
    """A client that has connected, until there is a Connection for it."""

    def __init__(self, accepted: socket.socket, address: Tuple[Any, ...]) -> None:
        self.socket = accepted
        self.host = host_of(address)
        self.holder = holder_of(self.host)
        self.address = show_address(address)
        self.since = time.monotonic()
        self.said = b""

    def receive(self) -> None:
        """Receive what the client says.

        Raises EOFError if it has left, Problem if it does not speak SSH, OSError.
        """
        said = self.socket.recv(MAX_SAID)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)  # see ClientSocket
        if not said:
            raise EOFError
        self.said += said
        line = self.said.partition(b"\n")[0]
        if len(line) > MAX_VERSION_LINE or not line.startswith(b"SSH-"[: len(line)]):
            raise Problem("its first line is no version of SSH")

    @property
    def has_said_its_version(self) -> bool:
        """Whether its version line is whole."""
        return b"\n" in self.said

    @property
    def has_begun_to_shake_hands(self) -> bool:
        """Return whether it has sent something after its version line."""
        return bool(self.said.partition(b"\n")[2])

    @property
    def is_overdue(self) -> bool:
        """Return whether it should have said its version by now."""
        return not self.has_said_its_version and time.monotonic() - self.since > IDLE_SECONDS


class Door:
    """Where clients come in: it greets them, hears their version lines, and hands them over.

    It does so with the main thread alone. How many may shake hands at once is limited, since that
    is what costs most; the others wait here.
    """

    def __init__(self, server: "Server", listener: socket.socket, stop: socket.socket) -> None:
        """The door is open until `stop` can be read."""
        self._server = server
        self._listener = listener
        self._visitors: Dict[Visitor, None] = {}  # those that came first are first
        self._connection_places = Share(MAX_VISITORS)
        self._shaking: Deque[Tuple[float, Connection]] = collections.deque()  # since when
        self.is_open = True
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(stop, selectors.EVENT_READ, self._stop)

    def serve(self) -> None:
        """Deal with whoever comes or says something, for a second at most."""
        someone_waits = any(visitor.has_said_its_version for visitor in self._visitors)
        for key, _events in self._selector.select(TURN_SECONDS if someone_waits else 1):
            key.data()
        self._hand_over()
        for visitor in [each for each in self._visitors if each.is_overdue]:
            if visitor.said:
                self._warn(visitor, f"its version line had no end within {IDLE_SECONDS:g} s")
            self._send_away(visitor)

    def close(self) -> None:
        """Take no more clients."""
        self._listener.close()

    def _stop(self) -> None:
        self.is_open = False

    def _accept(self) -> None:
        """Take the connections that have come, but not too many, since others wait, too."""
        for _ in range(32):
            try:
                accepted, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                log.error("a connection could not be taken: %s", error)
                self._server.end_idle(IDLE_SECONDS / 2)
                time.sleep(0.1)  # out of descriptors, say: the loop must not spin
                return
            with contextlib.suppress(OSError):  # it may be gone already
                self._greet(accepted, address)

    def _greet(self, accepted: socket.socket, address: Tuple[Any, ...]) -> None:
        """Greet a client, if it may connect. Raises OSError if it has gone."""
        accepted.setblocking(False)
        visitor = Visitor(accepted, address)
        allowed = self._server.agent.settings.allow_from
        if allowed and not any(visitor.host in network for network in allowed):
            self._warn(visitor, "not in ALLOW_FROM")
            accepted.close()
        elif not self._make_room(visitor.holder):
            self._warn(visitor, "too many connections at once from there")
            accepted.close()
        else:
            self._visitors[visitor] = None
            receive = functools.partial(self._receive, visitor)
            self._selector.register(accepted, selectors.EVENT_READ, receive)
            accepted.send(f"{GREETING}\r\n".encode())

    def _make_room(self, holder: Holder) -> bool:
        """Take a place for one more visitor from an address; return False if there is none.

        At need those from there are sent away that have said least.
        """
        if self._connection_places.take(holder):
            return True
        own = [each for each in self._visitors if each.holder == holder]
        for other in sorted(own, key=lambda each: len(each.said)):
            if not other.has_begun_to_shake_hands:
                self._send_away(other)
            if self._connection_places.take(holder):
                return True
        return False

    def _receive(self, visitor: Visitor) -> None:
        """Take what a visitor says; send it away if it has left, or does not speak SSH."""
        if visitor not in self._visitors:
            return  # it was sent away a moment ago
        try:
            visitor.receive()
            if len(visitor.said) >= MAX_SAID:  # the rest can wait
                self._selector.unregister(visitor.socket)
        except BlockingIOError:
            return
        except Problem as problem:
            self._warn(visitor, str(problem))
            self._send_away(visitor)
        except (OSError, EOFError):
            self._send_away(visitor)

    def _warn(self, visitor: Visitor, why: str) -> None:
        self._server.warnings.tell(visitor.host, why)

    def _send_away(self, visitor: Visitor) -> None:
        self._forget(visitor)
        visitor.socket.close()

    def _forget(self, visitor: Visitor) -> None:
        """Let a visitor go, who leaves or gets a Connection."""
        del self._visitors[visitor]
        self._connection_places.give_back(visitor.holder)
        with contextlib.suppress(KeyError):  # it has said much
            self._selector.unregister(visitor.socket)

    def _hand_over(self) -> None:
        """Let those shake hands for whom there is room; first those that have begun to."""
        while self._shaking and self._shaking[0][0] < time.monotonic() - SLOW_SECONDS:
            self._server.handshake_over(self._shaking.popleft()[1])
        waiting = [each for each in self._visitors if each.has_said_its_version]
        waiting.sort(key=lambda each: not each.has_begun_to_shake_hands)
        for visitor in waiting:
            if self._server.handshakes.take(visitor.holder):
                self._let_in(visitor)

    def _let_in(self, visitor: Visitor) -> None:
        """Make a visitor a Connection, if its address may have one more."""
        self._forget(visitor)
        try:
            connection = self._server.let_in(visitor)
            self._shaking.append((time.monotonic(), connection))
            return
        except Problem as problem:
            self._warn(visitor, str(problem))
        except OSError:  # it may be gone already
            pass
        self._server.handshakes.give_back(visitor.holder)
        visitor.socket.close()


class Server:
    """Who is served: connections and sessions, what each address may have of them."""

    def __init__(self, agent: Agent, host_key: paramiko.PKey, offer: Offer) -> None:
        self.agent = agent
        self.host_key = host_key
        self.offer = offer
        self.warnings = ClientWarnings()
        self.handshakes = Share(MAX_HANDSHAKES)
        self.watcher = Watcher(self._let_work)
        self._lock = threading.RLock()  # guards what follows, and each connection's `busy`
        self._connections: "OrderedDict[Connection, None]" = OrderedDict()  # idle longest first
        self._at_work: Set[Session] = set()
        self._connection_places = Share(MAX_CONNECTIONS)
        self._session_places = Share(MAX_SESSIONS)
        self._ended_connections = 0  # since memory was last given back to the system
        self._trimmed_at = 0.0  # when that was, by the monotonic clock
        self.watcher.start()

    # -- connections

    def let_in(self, visitor: Visitor) -> Connection:
        """Begin a connection for a visitor. Raises Problem if there is no room, OSError."""
        if not self._make_room(visitor.holder):
            raise Problem("too many connections from there, and on all of them something goes on")
        try:
            connection = Connection(self, visitor)
        except OSError:
            self._connection_places.give_back(visitor.holder)
            raise
        with self._lock:
            self._connections[connection] = None
        try:
            connection.begin()
        except RuntimeError:
            self.warnings.tell(visitor.host, "there was no thread to be had for it")
            self.connection_ended(connection)
            connection.sock.close()
        return connection

    def _make_room(self, holder: Holder) -> bool:
        """Take a place for one more connection of an address; return False if there is none.

        At need its connection that has been idle longest ends; else one on which commands wait. It
        takes more than one where its share has become smaller, since others have come.
        """
        if self._connection_places.take(holder):
            return True
        with self._lock:
            own = [each for each in self._connections if each.holder == holder]
            for is_free in (self._is_idle, self._only_waits):
                for connection in own:
                    if is_free(connection):
                        self._end(connection, "others came, and it was idle")
                        if self._connection_places.take(holder):
                            return True
        return False

    def _is_idle(self, connection: Connection) -> bool:
        return not connection.busy

    def _only_waits(self, connection: Connection) -> bool:
        return all(session.connection is not connection for session in self._at_work)

    def _end(self, connection: Connection, why: str) -> None:
        connection.end(why)
        self.connection_ended(connection)

    def end_idle(self, seconds: float) -> None:
        """End the connections that have been without a command for so long."""
        now = time.monotonic()
        with self._lock:
            for connection in list(self._connections):
                if connection.busy:
                    continue
                if now - connection.idle_since <= seconds:
                    break
                self._end(connection, f"it was not authenticated within {seconds:g} s")

    def handshake_over(self, connection: Connection) -> None:
        """Note that a connection is authenticated, has ended, or is slow: others may begin."""
        with self._lock:
            if not connection.is_shaking_hands:
                return
            connection.is_shaking_hands = False
        self.handshakes.give_back(connection.holder)

    def connection_ended(self, connection: Connection) -> None:
        """Forget a connection, if that was not done before."""
        self.handshake_over(connection)
        with self._lock:
            if connection not in self._connections:
                return
            del self._connections[connection]
            self._ended_connections += 1
        self._connection_places.give_back(connection.holder)

    # -- sessions

    def may_begin(self, session: Session) -> bool:
        """Note that a session is at work; return False if its address has too many of them.

        At need the connection ends whose client has kept a command waiting longest.
        """
        with self._lock:
            has_place = self._take_place(session)
            if not has_place and self._end_stalled(session):
                has_place = self._take_place(session)
            if not has_place:
                return False
            session.connection.busy += 1
            return True

    def _take_place(self, session: Session) -> bool:
        if not self._session_places.take(session.connection.holder):
            return False
        self._at_work.add(session)
        return True

    def _give_place_back(self, session: Session) -> None:
        if session in self._at_work:
            self._at_work.remove(session)
            self._session_places.give_back(session.connection.holder)

    def _end_stalled(self, session: Session) -> bool:
        """End the connection, of a session's address, whose client has kept others waiting."""
        holder = session.connection.holder
        others = [each for each in self._at_work if each.connection.holder == holder]
        slowest = min(others, key=lambda each: each.stalled_since, default=None)
        if not slowest or time.monotonic() - slowest.stalled_since < STALLED_SECONDS:
            return False
        for each in others:
            if each.connection is slowest.connection:
                self._give_place_back(each)
        self._end(slowest.connection, "it kept others waiting")
        return True

    def session_waits(self, session: Session, is_due: IsDue) -> None:
        """Note that a session does nothing until it is due."""
        with self._lock:
            self._give_place_back(session)
        self.watcher.add(session, is_due)

    def _let_work(self, session: Session) -> bool:
        """Let a session work that has waited; return False if there is no room for that now."""
        with self._lock:
            if not self._take_place(session):
                return False
        try:
            session.begin()
        except RuntimeError:  # no thread to be had
            with self._lock:
                self._give_place_back(session)
            return False
        return True

    def session_ended(self, session: Session) -> None:
        """Note that a session is over, and its connection maybe idle."""
        session.is_over = True
        connection = session.connection
        with self._lock:
            self._give_place_back(session)
            connection.busy -= 1
            connection.idle_since = time.monotonic()
            if connection in self._connections:
                self._connections.move_to_end(connection)

    def wait_for_answers(self, seconds: float) -> None:
        """Wait until the clients of all commands at work have left with their answers."""
        until = time.monotonic() + seconds
        with self._lock:
            connections = {session.connection for session in self._at_work}
        for connection in connections:
            connection.join(max(0, until - time.monotonic()))

    def tidy(self) -> None:
        """Do what is to be done each second: end idle connections, give memory back."""
        self.end_idle(IDLE_SECONDS)
        now = time.monotonic()
        if self._ended_connections >= TRIM_AFTER and now - self._trimmed_at > TRIM_SECONDS:
            self._ended_connections = 0
            self._trimmed_at = now
            # libc would keep what connections have left behind; not every libc has this.
            with contextlib.suppress(AttributeError, OSError):
                ctypes.CDLL(None).malloc_trim(0)


def serve(server: Server, listener: socket.socket, stop: socket.socket) -> None:
    """Serve until `stop` can be read, then let answers under way end, for a moment."""
    door = Door(server, listener, stop)
    tidied = time.monotonic()
    while door.is_open:
        door.serve()
        if time.monotonic() - tidied >= 1:
            tidied = time.monotonic()
            server.tidy()
    log.info("stopping on %s", signal_name(stop.recv(1)[0]))
    server.agent.queue.stopping.set()
    door.close()
    server.wait_for_answers(STOP_SECONDS)
    server.agent.queue.close()
    server.wait_for_answers(0.5)  # to the last requests that were accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; on every address, IPv6 too, if `host` is empty. Raises Problem."""
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    name = "::" if everywhere else host or "0.0.0.0"
    try:
        family = socket.getaddrinfo(name, port)[0][0]
        listener = socket.create_server(
            (name, port), family=family, backlog=512, dualstack_ipv6=everywhere
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a host's name
        # Its first argument may be a number, its last one is in words.
        reason = error.args[-1]
        if isinstance(error, PermissionError):
            reason += "; for a port below 1024 the unit needs CAP_NET_BIND_SERVICE"
        raise Problem(f"BA_BIND: nothing can listen on {host}:{port}: {reason}") from error
    # Accepted sockets inherit these.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # paramiko would wait for ever for a client that has vanished.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
    return listener


def host_of(address: Tuple[Any, ...]) -> IPAddress:
    """Return the IP address in a socket's address; an IPv4 one as such, though over IPv6."""
    host = ipaddress.ip_address(address[0])
    if isinstance(host, ipaddress.IPv6Address) and host.ipv4_mapped:
        return host.ipv4_mapped
    return host


def show_address(address: Tuple[Any, ...]) -> str:
    """Return a socket's address as people write it."""
    host = host_of(address)
    return f"[{host}]:{address[1]}" if host.version == 6 else f"{host}:{address[1]}"


def fingerprint(key: paramiko.PKey) -> str:
    """Return a public key's fingerprint as ssh-keygen -l shows it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest())
    return "SHA256:" + digest.decode().rstrip("=")


def key_is_authorized(path: Path, key: paramiko.PKey, host: IPAddress) -> bool:
    """Return whether an authorized_keys file (sshd(8)) admits a key from an address.

    Of the options before a key, from="…" with addresses and networks is honoured; a key with any
    other is refused. A file that cannot be read admits nobody.
    """
    try:
        text = path.read_text("utf-8-sig", "replace")
    except OSError as error:
        log.error("AUTHORIZED_KEYS: it cannot be read, so nobody is admitted: %s", error)
        return False
    blob = re.escape(key.get_base64())
    form = rf'(?m)^[ \t]*(?:from="([^"\n]+)"[ \t]+)?{key.get_name()}[ \t]+{blob}(?:[ \t].*)?$'
    for sources in re.findall(form, text):
        with contextlib.suppress(ValueError):
            if not sources or any(host in network for network in networks(sources)):
                return True
    return False


# ---------------------------------------------------------------- as the site's user


class Account(NamedTuple):
    """A user as whom the agent may run; without an entry in passwd the name is the number."""

    name: str
    uid: int
    gid: int
    home: str


def account_of(folder: Path) -> Account:
    """Return the account of a folder's owner. Raises OSError."""
    status = folder.stat()
    try:
        entry = pwd.getpwuid(status.st_uid)
    except KeyError:
        return Account(str(status.st_uid), status.st_uid, status.st_gid, "/")
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def owner_among(folders: Iterable[Path]) -> Optional[Account]:
    """Return the account of the first folder that is there and not root's; None if none is."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not there, or behind a dangling link
            account = account_of(folder)
            if account.uid:
                return account
    return None


def site_account(location: Path) -> Optional[Account]:
    """Return the user that the ONI site in `location` runs as; None if that is this process's.

    The site's user owns the word coordinates and the cache, which the web server writes, too: the
    website breaks if root owns what is in them. Who is not root cannot become anybody else.
    """
    if os.geteuid():
        return None
    storage = Path(os.environ.get("ONI_STORAGE_PATH") or location / "data")
    coordinates = storage / "word_coordinates"
    owner = owner_among([coordinates])
    if owner:
        return owner
    # A new site has no coordinates yet. Others keep them, and the cache, where ONI's settings say.
    places = [storage, location / "log"]
    likely = owner_among([*places, location])
    if coordinates.exists() and not likely:
        return None  # the whole site is root's
    return owner_among(shared_folders(location, likely)) or owner_among(places)


def shared_folders(location: Path, account: Optional[Account]) -> List[Path]:
    """Return the folders that the website writes, by ONI's settings; [] if ONI does not answer.

    A process of its own asks ONI, as `account`: so root owns nothing that ONI writes meanwhile,
    such as a log.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):  # whatever it is, there is no answer then
            if account:
                become(account)
            oni = OpenONI(location, os.environ)
            folders = oni.ask("answer_folders", within=PATIENT_SECONDS)
            shared = [str(location / folder) for folder, is_shared in folders.values() if is_shared]
            os.write(writer, json.dumps(shared).encode())
            oni.close()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return [Path(folder) for folder in json.loads(said or "[]")]


def become(account: Account) -> None:
    """Make this process, which is root's, another user's for good, with HOME and USER.

    Raises Problem.
    """
    try:
        if account.name.isdigit():  # it has no entry in passwd, and so no groups
            os.setgroups([])
        else:
            os.initgroups(account.name, account.gid)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    except OSError as error:
        raise Problem(
            f"the agent was started as root, and cannot become {account.name}, as whom the site"
            f" runs ({error.strerror}): start it as {account.name}"
        ) from error
    os.environ.update(HOME=account.home, USER=account.name, LOGNAME=account.name)


def hand_over(folder: Path, account: Account) -> None:
    """Make `account` the owner of a state folder and of all in it. Raises Problem.

    Links are not followed: somebody else may have made them.
    """
    if folder.stat().st_uid == account.uid:
        return
    if not is_an_agents(folder):
        raise Problem(
            f"STATE_DIRECTORY is {folder}, which holds other things than an agent's: name a folder"
            " of the agent's own"
        )
    for _, _, files, descriptor in os.fwalk(str(folder)):
        for name in files:
            os.chown(name, account.uid, account.gid, dir_fd=descriptor, follow_symlinks=False)
        os.chown(descriptor, account.uid, account.gid)


# ---------------------------------------------------------------- is all well?

LITTLE_DISK = 100 * 2**20  # bytes; a folder whose disk has less is not well


class Finding(NamedTuple):
    """What came of looking at one thing: whether it is well, and a sentence about it."""

    name: str
    well: bool
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}"


def look_at(name: str, advice: str, examine: Callable[..., object], *about: Any) -> Finding:
    """Call `examine` with `about`, and return a Finding with what it says.

    If it raises, the thing is not well: the Finding has what it raised, and `advice`.
    """
    try:
        return Finding(name, True, str(examine(*about)))
    except Exception as problem:
        return Finding(name, False, f"{problem}; {advice}")


def look_at_oni(oni: OpenONI, within: float) -> Iterator[Finding]:
    """Look at Open ONI, and where its loads write. Each question has `within` seconds."""
    advice = "run it by hand, as the agent's user"
    yield look_at("manage.py check", advice, lambda: oni.ask("answer_check", within=within))
    try:
        health = oni.ask("answer_health", within=within)
        folders = oni.ask("answer_folders", within=within)
    except (Problem, OSError) as problem:
        yield Finding("database", False, f"{problem}; see ONI's database settings")
        return
    yield Finding("database", True, f"{health['batches']} batches")
    if "documents" in health:
        yield Finding("Solr", True, f"{health['documents']} pages")
    else:
        advice = "see ONI's SOLR_BASE_URL; loads and purges will fail"
        yield Finding("Solr", False, f"{health['solr_problem']}; {advice}")
    advice = "load Open ONI's own fixtures (manage.py loaddata languages countries awardees)"
    tables = lambda: filled(oni.ask("answer_tables", within=within))
    yield look_at("look-up tables", advice, tables)
    for name, (folder, is_shared) in folders.items():
        place = oni.location / folder
        write = functools.partial(writable, place, is_shared)
        answer = functools.partial(in_time, write, within, place=place)
        yield look_at(f"ONI's {name}", "loads will fail", answer)


def filled(tables: Dict[str, int]) -> str:
    """Say how many rows each table has. Raises Problem if one is empty."""
    empty = [name for name, rows in tables.items() if not rows]
    if empty:
        raise Problem(f"there are no {' and no '.join(empty)}, and loads will fail")
    return ", ".join(f"{rows} {name}" for name, rows in tables.items())


def writable(folder: Path, is_shared: bool = False) -> str:
    """Try to write to a folder; say where it is behind links, whose it is, and what is free there.

    A folder that `is_shared` with the website need not be there yet, and must not be another
    user's. Raises Problem.
    """
    place = folder.resolve()
    if is_shared:
        if place.exists() and place.stat().st_uid != os.geteuid():
            raise Problem(
                f"{place} belongs to user {user_name(place.stat().st_uid)}, as whom the agent does"
                " not run: what it writes there the website could not use; run the agent as that"
                " user"
            )
        place = nearest_folder(place)
    try:
        tempfile.TemporaryFile(dir=str(place)).close()
        status = place.stat()
    except OSError as error:
        raise Problem(f"{place}: {error.strerror or error}{what_to_open(error, place)}") from error
    free = shutil.disk_usage(str(place)).free
    if free < LITTLE_DISK:
        raise Problem(f"{place} has {free >> 20} MiB free; make room")
    return f"{place} can be written, {user_name(status.st_uid)}'s, {free / 2**30:.1f} GiB free"


def what_to_open(error: OSError, place: Path) -> str:
    """Say what an administrator can do about a folder that could not be written to."""
    if error.errno == errno.EROFS:
        return " (under systemd, name it in ReadWritePaths=)"
    if error.errno == errno.EACCES:
        with contextlib.suppress(OSError):
            owner = user_name(place.stat().st_uid)
            return f" ({place} is {owner}'s, and the agent runs as {user_name(os.geteuid())})"
    return ""


def look_at_visitors(settings: Settings) -> Finding:
    """Look at who may connect."""
    name = "who may connect"
    keys = f"who has a key of {settings.authorized_keys}" if settings.authorized_keys else ""
    hosts = f"from {', '.join(map(str, settings.allow_from))}" if settings.allow_from else ""
    if not settings.admits_everybody:
        return Finding(name, True, " ".join(filter(None, [keys, hosts])))
    host, port = settings.ba_bind
    if is_own_address(host):
        return Finding(name, True, "whoever is on this host")
    found = f"whoever reaches port {port} of this host may load and purge"
    advice = "set ALLOW_FROM or AUTHORIZED_KEYS (in an EnvironmentFile= without `export`)"
    return Finding(name, False, f"{found}; {advice}")


def is_own_address(host: str) -> bool:
    """Return whether only this host itself can reach who listens on `host`."""
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except OSError:
        return False
    return bool(found) and all(host_of(address[4]).is_loopback for address in found)


def look_at_source(settings: Settings) -> Finding:
    """Look at the folder of the batches."""
    count = lambda: f"{len(in_time(lambda: os.listdir(str(settings.batch_source))))} entries"
    return look_at("batch source", f"let {user_name(os.geteuid())} read it", count)


def look_at_algorithms() -> Finding:
    """Look at what can be offered to SSH clients."""
    advice = "no client could connect; see the host's FIPS settings"
    return look_at("algorithms", advice, lambda: ", ".join(algorithms_to_offer().kex))


def look_at_user() -> Finding:
    """Say as whom the agent runs, and how it is confined, as the kernel tells it."""
    groups = ", ".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
    found = f"{user_name(os.geteuid())} (groups {groups})"
    try:
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    except OSError:
        return Finding("user and sandbox", True, found)
    if fields.get("NoNewPrivs") == "1":
        found += ", no new privileges"
    if fields.get("Seccomp") == "2":
        found += ", system calls filtered"
    if not int(fields.get("CapEff", "1"), 16):
        found += ", no capabilities"
    if os.statvfs("/").f_flag & os.ST_RDONLY:
        found += ", read-only root"
    return Finding("user and sandbox", True, found)


def look_at_last_job(agent: Agent) -> Finding:
    """Say how the last job ended. A failed one is no sign that something is not well here."""
    ended = agent.queue.ended()
    if not ended:
        return Finding("last job", True, "none has ended")
    job = ended[0]
    when = timestamp(job.ended or 0)[:19] + "Z"
    return Finding("last job", True, f"{job.id}, {shlex.join(job.words)}: {job.status} at {when}")


def look_from_inside(agent: Agent) -> Iterator[Finding]:
    """Look at all that a running agent needs, as it sees it from inside its sandbox."""
    yield look_at_user()
    yield look_at_visitors(agent.settings)
    yield look_at_algorithms()
    advice = "without it no job is accepted"
    yield look_at("state folder", advice, writable, agent.settings.state_directory)
    yield look_at_source(agent.settings)
    yield from look_at_oni(agent.site.oni, ANSWER_SECONDS)
    yield look_at_last_job(agent)


@command(
    usage="check",
    help="Looks at all that the agent needs; the exit status is 1 if something is not well.",
    misuse='"check" takes no arguments',
    example="""
    $ ssh oni check | head -n 1
    All is well
    """,
)
def cmd_check(request: Request) -> Answer:
    findings = list(look_from_inside(request.agent))
    wrong = [finding.name for finding in findings if not finding.well]
    message = f"not well: {', '.join(wrong)}" if wrong else "All is well"
    return Answer(
        {"message": message, "looks": [finding._asdict() for finding in findings]},
        exit_status=int(bool(wrong)),
    )


def look_from_outside(settings: Settings, account: Optional[Account]) -> Iterator[Finding]:
    """Look at all that an agent needs, before one runs; as `account`, unless that is None."""

    def state() -> str:
        if (settings.state_directory / "jobs.db").exists():
            return f"{JobStore(settings.state_directory).count()} jobs"
        return writable(nearest_folder(settings.state_directory))

    def host_key() -> str:
        key = load_host_key(settings.host_key_file)
        if key:
            return fingerprint(key)
        if settings.host_key_file.parent == settings.state_directory:
            return "will be made"
        return writable(settings.host_key_file.parent)

    def address() -> str:
        with listen(*settings.ba_bind) as listener:
            return show_address(listener.getsockname())

    place = settings.state_directory
    look_at_state = functools.partial(in_time, state, place=place)
    yield look_at("state folder", "if an agent is at work there, ask that instead", look_at_state)
    look_at_key = functools.partial(in_time, host_key, place=settings.host_key_file)
    yield look_at("host key", "see HOST_KEY_FILE", look_at_key)
    yield look_at("address", "set BA_BIND to a free port", address)
    yield look_at_visitors(settings)
    yield look_at_algorithms()
    if account:
        try:
            become(account)
        except Problem as problem:
            yield Finding("the site's user", False, str(problem))
            return
    yield look_at_user()
    yield look_at_source(settings)
    oni = OpenONI(settings.oni_location, os.environ)
    yield from look_at_oni(oni, PATIENT_SECONDS)
    oni.close()


def log_look_at_oni(oni: OpenONI) -> None:
    """Log how Open ONI is. The agent serves even if ONI does not answer."""
    for finding in look_at_oni(oni, PATIENT_SECONDS):
        tell = log.info if finding.well else log.warning
        tell("Open ONI in %s: %s", oni.location, finding)


def check_all() -> int:
    """Print a line for all that the agent needs; return 1 if something is not well, else 0."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a check mark
    try:
        settings = Settings(os.environ)
    except Problem as problem:
        for text in problem.args:
            print("✗", text)
        return 1
    print("✓ settings")
    exit_status = 0
    for finding in look_from_outside(settings, site_account(settings.oni_location)):
        print("✓" if finding.well else "✗", finding)
        if not finding.well:
            exit_status = 1
    return exit_status


# ---------------------------------------------------------------- main


class JournalFormatter(logging.Formatter):
    """A formatter for the journal (sd-daemon(3)): lines have a priority in front, and no time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
        return re.sub("(?m)^", f"<{priority}>", super().format(record))


def set_up_logging(level: str) -> None:
    """Send the log to stderr, in the journal's form where that is systemd's."""
    # paramiko logs whatever a client does wrong as an error: the agent has lines of its own for it.
    level_of_others = "DEBUG" if level == "DEBUG" else "CRITICAL"
    logging.basicConfig(level=level_of_others, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(level)
    if stderr_is_journal():
        logging.root.handlers[0].setFormatter(JournalFormatter())


def tell_systemd(state: str) -> None:
    """Tell systemd the state of the service (sd_notify(3)), where it wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), re.sub("^@", "\0", address))


ASIDE = futures.ThreadPoolExecutor(8)  # for what nobody waits for


def run_on_finish(program: Path, job: Job, log_path: Path, environ: Mapping[str, str]) -> None:
    """Run ON_FINISH for a job that has ended; log its failure.

    After HOOK_SECONDS it is killed, with what it has started, except for processes that have made a
    session of their own (setsid).
    """
    environment = {
        **environ,
        "ONI_JOB_ID": str(job.id),
        "ONI_JOB_COMMAND": shlex.join(job.words),
        "ONI_JOB_STATUS": job.status,
        "ONI_JOB_ERROR": job.error.replace("\0", ""),
        "ONI_JOB_LOG": str(log_path),
    }
    try:
        status = subprocess.run(
            # timeout(1) ends it even if the agent has gone.
            ["timeout", "-s", "KILL", str(HOOK_SECONDS), str(program)],
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ).returncode
    except OSError as failure:
        log.error("job=%d ON_FINISH failed: %s", job.id, failure)
        return
    if status == -signal.SIGKILL:
        log.error("job=%d ON_FINISH was killed after %d s", job.id, HOOK_SECONDS)
    elif status:
        log.error("job=%d ON_FINISH failed: exit status %d", job.id, status)


Handler = Union[Callable[[int, Any], Any], int, None]


def on_stop(handler: Handler) -> None:
    """Set what is done on SIGTERM and SIGINT, as signal.signal does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def stop_on_signals() -> socket.socket:
    """Return a socket that can be read once SIGTERM or SIGINT has come.

    A second signal ends the agent at once.
    """
    reader, writer = socket.socketpair()

    def stop(number: int, _frame: Any) -> None:
        on_stop(signal.SIG_DFL)  # such an end is a clean one for systemd
        # Nothing is logged here: the signal may have come amid a line of the log.
        writer.send(bytes([number]))

    on_stop(stop)
    return reader


def be_init() -> None:
    """Fork if this process is PID 1, as in a container, and return in the child alone.

    PID 1 has to reap orphans, which the agent would not. It passes signals on to the child, and
    ends as that ends.
    """
    if os.getpid() != 1:
        return
    agent = os.fork()
    if not agent:
        return
    on_stop(lambda number, _frame: os.kill(agent, number))
    while True:
        ended, status = os.wait()
        if ended == agent:
            os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def raise_limits() -> None:
    """Let the agent open as many files as it may: each connection and command needs some."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # ValueError is what Python makes of EPERM
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def main() -> int:
    """Do what the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ONI Agent {VERSION}")
    parser.add_argument("--check", action="store_true", help="look at all that the agent needs")
    parser.add_argument(
        "--remove-issues",
        nargs="+",
        metavar="WORD",
        help="FOLDER NEWFOLDER LCCN/YYYYMMDDEE…: make a batch of another one, without these issues;"
        " no ONI is needed",
    )
    options = parser.parse_args()
    if options.remove_issues:
        return remove_issues(options.remove_issues)
    if options.check:
        return check_all()
    be_init()
    try:
        return run()
    except (Problem, OSError) as problem:
        complain(*(problem.args if isinstance(problem, Problem) else [problem]))
        return EXIT_LATER if may_work_later(problem) else EXIT_HOPELESS


def run() -> int:
    """Run the agent until it is told to stop; return its exit status.

    Raises Problem, OSError if it cannot start.
    """
    settings = Settings(os.environ)
    host_key = load_host_key(settings.host_key_file)
    offer = algorithms_to_offer()
    set_up_logging(settings.log_level)
    stop = stop_on_signals()
    raise_limits()
    account = site_account(settings.oni_location)
    # What only root may have, the key and the port, it takes before it becomes the site's user.
    listener = listen(*settings.ba_bind)
    settings.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account:
        if not host_key and settings.host_key_file.parent != settings.state_directory:
            host_key = make_host_key(settings.host_key_file)
        settings = as_site_user(settings, account)
    agent = build(settings)
    host_key = host_key or make_host_key(settings.host_key_file)
    # A full collection stops everybody for as long as 100 ms, and finds little, since connections
    # break their cycles: so they are rare, and do not look at what is there by now, which stays.
    gc.freeze()
    gc.set_threshold(10_000, 20, 100)
    tell_where(settings, listener.getsockname())
    agent.queue.start()
    ASIDE.submit(log_look_at_oni, agent.site.oni)
    tell_systemd("READY=1")
    serve(Server(agent, host_key, offer), listener, stop)
    tell_systemd("STOPPING=1\nSTATUS=")
    tell_what_goes_on(agent)
    return 0


def as_site_user(settings: Settings, account: Account) -> Settings:
    """Give the state folder to `account`, become that user, and return its settings.

    Raises Problem if that user cannot use what they name.
    """
    hand_over(settings.state_directory, account)
    become(account)
    log.info("started as root; goes on as %s, as whom the site runs", account.name)
    # HOST_KEY_FILE is left out: it has been read, maybe where this user cannot look.
    return Settings(
        {**os.environ, "STATE_DIRECTORY": str(settings.state_directory), "HOST_KEY_FILE": ""}
    )


def build(settings: Settings) -> Agent:
    """Wire together what commands work on. Raises Problem, OSError."""
    store = JobStore(settings.state_directory)
    oni = OpenONI(settings.oni_location, os.environ)
    site = Site(settings, oni)

    def ended(job: Job) -> None:
        if settings.on_finish:
            with contextlib.suppress(RuntimeError):  # no thread to be had
                ASIDE.submit(
                    run_on_finish, settings.on_finish, job, store.index_path(job), oni.environment
                )

    def announce(sentence: str) -> None:
        tell_systemd(f"STATUS={sentence}")

    return Agent(settings, site, store, JobQueue(store, site, ended, announce))


def tell_where(settings: Settings, address: Any) -> None:
    """Log where the agent listens, and what an administrator should know of its settings."""
    shown = show_address(address)
    log.info("listening on %s version=%s state=%s", shown, VERSION, settings.state_directory)
    if settings.db_connection:
        log.info("DB_CONNECTION is set and not needed: Open ONI's own settings are used")
    if settings.admits_everybody and not host_of(address).is_loopback:
        log.warning(
            "anyone who reaches %s may load and purge: set ALLOW_FROM or AUTHORIZED_KEYS", shown
        )
    earlier = Path(os.path.expanduser("~/.local/state/oni-agent"))
    if str(settings.state_directory) == STATE_OF_ROOTS_AGENT and (earlier / "jobs.db").exists():
        log.warning("the jobs of an earlier agent are in %s, and this one has its own", earlier)


def tell_what_goes_on(agent: Agent) -> None:
    """Log what becomes of the manage.py at work, if there is one, when the agent has stopped."""
    job = agent.queue.at_work()
    if job:
        log.info(
            "job=%d its manage.py goes on, and the next agent adopts it; where the agent's end is"
            " that of manage.py, too (in a container, or a unit without KillMode=process), the next"
            " agent begins the job anew",
            job.id,
        )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # it waits for no thread: each of them may be cut off at any moment
