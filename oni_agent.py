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

from __future__ import annotations

import sys

if sys.version_info < (3, 8):  # what follows compiles from Python 3.6 on, and runs from 3.8 on
    sys.stderr.write(
        f"oni_agent: Python 3.8 or newer is needed, and {sys.executable} is Python"
        f" {sys.version_info[0]}.{sys.version_info[1]}; install a newer one beside it, and start"
        " the agent with that.\n"
    )
    sys.exit(2)  # as for settings that cannot work: systemd need not try again

import argparse
import ast
import base64
import codecs
import contextlib
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
import os
import pwd
import queue
import re
import resource
import select
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
from concurrent import futures
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    TypeVar,
    Union,
)
from xml.parsers.expat import ExpatError, ParserCreate


def stderr_is_journal() -> bool:
    """Tell whether JOURNAL_STREAM (systemd.exec(5)) names the device and inode of stderr."""
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
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError as missing:
    complain(
        f"paramiko is needed, and {sys.executable} cannot import it ({missing}): install"
        " python3-paramiko (Debian, Ubuntu; RHEL-like systems: from EPEL), or:"
        " python3 -m pip install paramiko"
    )
    sys.exit(2)  # as for settings that cannot work: systemd need not try again

VERSION = "1.1.0"
log = logging.getLogger("oni_agent")

# ---------------------------------------------------------------- limits

MAX_CONNECTIONS = 640  # beyond it the connection that has been idle longest makes room
MAX_SESSIONS = 256  # commands at work, in all
MAX_CHANNELS = 10  # open at once on one connection, as OpenSSH's MaxSessions
MAX_PACKET = 256 * 1024  # bytes of one SSH packet, as OpenSSH takes them
MAX_COMMAND = 16 * 1024  # bytes of a command line
MAX_PAYLOAD = 32 * 1024 * 1024  # bytes on standard input
MAX_MARC_MEMORY = 256 * 1024 * 1024  # bytes, for the process that reads MARC XML
MAX_INSTRUCTIONS = 1024 * 1024  # bytes on standard input of a batch-patch
MAX_ATTEMPTS = 3  # starts of a job that never ended
IDLE_SECONDS = 30  # without a command at work; NCA never closes a connection itself
STALL_SECONDS = 60  # without a byte to or from a client that is to send or to read
STOP_SECONDS = 1.5  # for answers under way when the agent is told to stop
ANSWER_SECONDS = 10  # for Open ONI, or the batches' file system, to answer a command
PATIENT_SECONDS = 60  # the same, when a job at work asks
SOLR_SECONDS = 4  # for Solr to answer a question about one batch
CHECK_SECONDS = 3600  # for reading every file of a batch
LIST_SECONDS = 0.7  # for list-batches to count what is not remembered
TERM_SECONDS = 10  # between SIGTERM and SIGKILL for a cancelled manage.py
HOOK_SECONDS = 60  # for ON_FINISH
SHELL_SECONDS = 600  # without a question, after which the manage.py that answers them ends
PROGRESS_SECONDS = 5  # between two questions about how far a load is
KEEP_DAYS = 90  # how long finished jobs are kept
KEEP_JOBS = 100  # how many of the newest are kept in any case
TICK = 0.005  # seconds between two looks at what manage.py has printed
CHUNK = 32 * 1024  # bytes read at once, of an input or a job's log; a longer line comes in parts

# ---------------------------------------------------------------- problems

Result = TypeVar("Result")


class Problem(Exception):
    """Something that an administrator can mend; the text is a sentence that says what is wrong."""


class Scarce(OSError):
    """The machine lacks something for now (disk, threads, descriptors): to be tried again."""


class CouldNotStart(Problem):
    """manage.py cannot be run at all."""


class Cancelled(BaseException):
    """The job at work is to end. As for a SystemExit, nobody takes it for a fault on its way."""


class Stopping(BaseException):
    """The agent is stopping: what has just ended was maybe ended by that, and does not count.

    As for a SystemExit, nobody takes it for a fault on its way through the worker.
    """


def shortened(text: str, most: int = 2000) -> str:
    """Return a text, or `most` bytes of its start and end with a sign for what is left out."""
    data = text.encode("utf-8", "replace")
    if len(data) <= most:
        return text
    left_out = len(data) - most
    start = data[: most * 3 // 4].decode("utf-8", "ignore")
    end = data[-most // 4 :].decode("utf-8", "ignore")
    return f"{start} […{left_out} bytes are left out here…] {end}"


SCARCE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
# What an operating system refuses for good, until somebody changes a setting, a mode or a mount.
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
    """Tell whether the machine lacks something for now, and what it refused may be tried again."""
    return isinstance(error, Scarce) or error.errno in SCARCE


def is_refused_for_good(error: BaseException) -> bool:
    """Tell whether an error, or the OSError that it was raised from, is there the next time, too.

    A folder on a read-only disk is an example; an address in use, or a full disk, is none.
    """
    cause: Optional[BaseException] = error
    while cause:
        if isinstance(cause, OSError):
            return cause.errno in REFUSED_FOR_GOOD
        cause = cause.__cause__
    return False


def patiently(action: Callable[[], Result]) -> Result:
    """Call `action` until it raises no OSError, once a second, and return its result."""
    warned = False
    while True:
        try:
            return action()
        except OSError as error:
            if not warned:
                log.error("%s; trying again every second", error)
            warned = True
            time.sleep(1)


FILES = futures.ThreadPoolExecutor(16)  # for what may wait for a hung file system
CHECKS = futures.ThreadPoolExecutor(2)  # the same, for reading whole batches


def do_nothing() -> None:
    """Stand for a function that has nothing to do."""


def in_time(
    look: Callable[[], Result],
    within: float = ANSWER_SECONDS,
    pool: futures.ThreadPoolExecutor = FILES,
    meanwhile: Callable[[], object] = do_nothing,
    who: str = "the file system of the batches",
) -> Result:
    """Return what the function `look` returns, which asks `who`.

    Raises Problem when that refuses, or does not answer within so many seconds: only a thread of
    the pool then hangs. `meanwhile` is called every second and may raise. Then, or when it is too
    late, what is still to begin never does.
    """
    until = time.monotonic() + within
    late = Problem(f"{who} did not answer within {within:g} s")
    try:
        future = pool.submit(look)
    except RuntimeError as error:
        raise Scarce(str(error)) from error  # no thread to be had
    try:
        while not futures.wait([future], min(1, until - time.monotonic())).done:
            meanwhile()
            if time.monotonic() >= until:
                raise late
        return future.result()
    except socket.timeout:
        raise late
    except OSError as error:
        if is_scarce(error):
            raise
        raise Problem(str(error)) from error
    finally:
        future.cancel()


# ---------------------------------------------------------------- settings

# Readers of one setting each. What they raise says what is wrong with its value.


def absolute(value: str) -> Path:
    """Return a path as an absolute one, through links and with ~ resolved."""
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
        f" install -d -m 700 -o {user} {LIBRARY}"
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
    """Tell whether a folder is an agent's state folder, or may become one since it is empty."""
    return (folder / "agent.lock").exists() or not any(folder.iterdir())


def nearest_folder(path: Path) -> Path:
    """Return `path`, or the folder that is there and in which it could be made."""
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
    """Tell that a variable is set whose value is not needed, and secret."""
    return True


# To add a setting, enter it here with its reader, in DEFAULTS (as text) if it has one, in Settings,
# and in this file's docstring. It is then settings.its_name, and `build` hands it to what needs it.
# Neither manage.py nor ON_FINISH gets to see it.
OWN_VARIABLES: Dict[str, Callable[[str], Any]] = {  # and their readers
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
LIBRARY = "/var/lib/oni-agent"  # where an agent that root has started keeps its state
STATES = os.environ.get("XDG_STATE_HOME") or ("~/.local/state" if os.geteuid() else "/var/lib")
DEFAULTS = {
    "BA_BIND": "127.0.0.1:2222",
    "STATE_DIRECTORY": f"{STATES}/oni-agent",
    "LOG_LEVEL": "info",
}
OWN_PREFIXES = ("ALLOW_", "BA_", "BATCH_", "HOST_", "ON_")  # of nobody's variables but the agent's


def misspelt(environ: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each variable's name that was surely meant for the agent, and is wrong.

    Such a name is otherwise silently without effect: a misspelt ALLOW_FROM lets everybody in.
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
    """What an administrator tells the agent in `environ`: `.ba_bind` for BA_BIND, and so on.

    Raises Problem with one sentence for each thing that is wrong, all of them at once.
    """

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
        problems = list(misspelt(environ))
        for name, read in OWN_VARIABLES.items():
            value = environ.get(name) or DEFAULTS.get(name)
            try:
                setattr(self, name.lower(), read(value) if value else None)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no home for ~
                problems.append(f"{name} is {value!r}; {error}")
            if name in REQUIRED and not value:
                problems.append(f"{name} is not set; --help says which folder it names")
        if problems:
            raise Problem(*problems)
        self.host_key_file = self.host_key_file or self.state_directory / "host_key"

    @property
    def admits_everybody(self) -> bool:
        """Whether whoever reaches the agent's port may give it commands."""
        return not (self.allow_from or self.authorized_keys)


def user_name(uid: int) -> str:
    """Return a user's name, or the number of one that has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


# ---------------------------------------------------------------- Open ONI

# What runs inside a manage.py shell, with ONI's models: questions (see ask), tasks of a job (see
# start_task), and their helpers. It keeps to what Python 3.6 and Django 2.2 know, since ONI's may
# be old ones. This is no raw string: a backslash is written twice.
INSIDE_ONI = '''
import io, json, logging, re, resource, signal, socket, time, urllib.request
from django.conf import settings
from django.core.management import call_command
from django.db import close_old_connections
from django.db.models import Count, Q
from core import solr_index
from core.models import Awardee, Batch, Country, Issue, Language, LoadBatchEvent, Page, Title

class Problem(Exception):
    """Why there is no answer, in a sentence for whoever has asked."""

def answer_questions(channel):
    """Answers each JSON line [question, word, ...] on a socket by a JSON line."""
    logging.getLogger("pysolr").setLevel(logging.WARNING)  # ONI has a log file a process
    channel = socket.socket(fileno=channel)
    signal.alarm(SHELL_SECONDS)
    for line in channel.makefile(encoding="utf-8"):  # one file for both ways would lose lines
        signal.alarm(SHELL_SECONDS)
        question, *words = json.loads(line)
        try:
            close_old_connections()
            reply = {"answer": globals()[question](*words)}
        except Problem as problem:
            reply = {"problem": str(problem)}
        except Exception as error:
            reply = {"problem": "Open ONI cannot answer: %s: %s" % (type(error).__name__, error)}
        channel.sendall(json.dumps(reply, default=str).encode() + b"\\n")

def is_ready():
    """It is, if it answers this."""
    return True

def check():
    """The last line of what `manage.py check` prints."""
    printed = io.StringIO()
    call_command("check", stdout=printed, stderr=printed)
    return printed.getvalue().strip().rpartition("\\n")[2]

def lccns(path):
    """The LCCNs of the MARC records in a file as load_titles finds them. Raises Problem.

    The file may be hostile: this is for a process of its own, which is ended after its answer.
    """
    import pymarc, xml.sax
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MARC_MEMORY, MAX_MARC_MEMORY))
    found = []
    problem = ""  # which is raised when the memory that the file has taken is free again

    def enter(record):
        if record and record.get_fields():  # an answer of OCLC's has other records around them
            try:
                found.append(re.sub(r"\\s", "", record["010"]["a"] or "").rstrip("/:,"))
            except (KeyError, TypeError):
                found.append("")

    with open(path, "rb") as file:
        if b"<!DOCTYPE" in file.read().replace(b"\\0", b""):  # of entities that grow, or point away
            raise Problem("a DOCTYPE is not allowed")
        file.seek(0)
        try:
            pymarc.map_xml(enter, file)
        except xml.sax.SAXParseException as error:
            problem = "%s: line %d" % (error.getMessage(), error.getLineNumber())
        except Exception as error:  # MemoryError, too
            problem = "it cannot be read as MARC XML: %s %s" % (type(error).__name__, error)
    if problem:
        raise Problem(problem)
    if not found:
        raise Problem("there is no MARC record in it")
    if not all(found):
        raise Problem("there is a MARC record without an LCCN (010 $a) in it, which Open ONI would"
                      " not store")
    return found

def batch(name, with_index):
    """What database and, if asked for, index hold of one batch, in the words of BatchState."""
    row = Batch.objects.filter(name=name).first()
    events = LoadBatchEvent.objects.filter(batch_name=name).order_by("-pk")[:5]
    held = {
        "name": row.name if row else name,
        "row": row is not None,
        "loaded": row.created.isoformat() if row else "",
        "issues": Issue.objects.filter(batch_id=name).count(),
        "events": [[event.created.isoformat(), event.message or ""] for event in events][::-1],
        "storage": settings.BATCH_STORAGE,
    }
    held.update(pages_held(name))
    if with_index:
        held.update(index(name, held["indexed"]))
    return held

def index(name, wanted):
    """How many documents Solr has of a batch.

    If that is not what is wanted: how many pages are lost or replaced, and how many documents
    stray, as in BatchState.
    """
    try:
        documents = patient_solr().search('batch:"%s"' % name, rows=0).hits
        lost = replaced = stray = 0
        if wanted and documents != wanted:
            for page, holder in pages_with_holders(name):
                lost += holder is None
                replaced += holder not in (None, name)
            stray = documents - (wanted - lost - replaced)
        return {"pages_in_solr": documents, "lost": lost, "replaced": replaced, "stray": stray}
    except Exception as error:
        return {"index_problem": first_line(error)}

def patient_solr():
    """ONI's connection to Solr, which else would wait for a minute."""
    solr = solr_index.conn()
    solr.timeout = SOLR_SECONDS
    return solr

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]

def pages_with_holders(name):
    """Each page of a batch that has OCR, and the batch whose document Solr has at its URL."""
    solr = patient_solr()
    keys = list(Page.objects.filter(issue__batch_id=name, indexed=True)
                .order_by("issue__date_issued", "issue", "sequence").values_list("pk", flat=True))
    for start in range(0, len(keys), 100):
        pages = list(Page.objects.filter(pk__in=keys[start:start + 100])
                     .select_related("issue__title", "issue__batch"))
        found = solr.search("{!terms f=id}" + ",".join(page.url for page in pages),
                            fl="id,batch", rows=len(pages))
        holders = {document["id"]: document.get("batch", "") for document in found}
        for page in pages:
            yield page, holders.get(page.url)

def overview(on_disk):
    """What is quickly told of these batches and of all that ONI holds, as BatchState names it."""
    issues = dict(Issue.objects.order_by().values_list("batch_id").annotate(Count("pk")))
    newest = {}
    for name, key, message in (LoadBatchEvent.objects.order_by("pk")
                               .values_list("batch_name", "pk", "message")):
        newest[name] = [[key, message or ""]]
    held = {name: {"name": name, "pages": 0} for name in on_disk}
    for row in Batch.objects.all():
        held[row.name] = {
            "name": row.name,
            "row": True,
            "loaded": row.created.isoformat(),
            "issues": issues.get(row.name, 0),
            "events": newest.get(row.name, []),
            "storage": settings.BATCH_STORAGE,
        }
    try:
        found = patient_solr().search("type:page", rows=0, facet="true",
                                      **{"facet.field": "batch", "facet.limit": -1})
        facets = found.facets["facet_fields"]["batch"]
        documents = dict(zip(facets[::2], facets[1::2]))
        for name in held:
            # Whether they are those of its pages, batch-status says.
            held[name].update(pages_in_solr=documents.get(name, 0), lost=None)
    except Exception:
        pass
    return [held[name] for name in sorted(held)]

def pages_held(name):
    pages = Page.objects.filter(issue__batch_id=name)
    return pages.aggregate(pages=Count("pk"), indexed=Count("pk", filter=Q(indexed=True)))

def place(name):
    """The folder for a link to a batch's files. Raises Problem if ONI lacks its awardee."""
    code = name.split("_")[1]
    if not Awardee.objects.filter(org_code=code).exists():
        raise Problem('Open ONI has no awardee "%s"; to make it: ensure-awardee %s "NAME"'
                      % (code, code))
    return settings.BATCH_STORAGE

def batch_count():
    return Batch.objects.count()

def names():
    return list(Batch.objects.values_list("name", flat=True))

def lacking(lccns):
    """Those of which ONI has no title."""
    there = set()
    for start in range(0, len(lccns), 500):
        rows = Title.objects.filter(lccn__in=lccns[start:start + 500])
        there.update(rows.values_list("lccn", flat=True))
    return [lccn for lccn in lccns if lccn not in there]

def titles_to_fetch(issues):
    """For each LCCN that ONI lacks: the URL where load_batch would look, and what is wrong."""
    fetch = {}
    for lccn in sorted(set(lccn for lccn, _, _ in issues if lccn)):
        if Title.objects.filter(lccn=lccn).exists():
            continue
        url, wrong = settings.MARC_RETRIEVAL_URLFORMAT % lccn, ""
        try:
            with urllib.request.urlopen(url, timeout=SOLR_SECONDS) as reply:
                if lccn not in re.sub(r"\\s", "", reply.read(2**22).decode("utf-8", "replace")):
                    wrong = "it answers with another record"
        except Exception as error:
            wrong = first_line(error)
        fetch[lccn] = [url, wrong]
    return fetch

def other_holders(name, issues):
    """Which of these issues, [lccn, date, edition] each, are in other batches that ONI holds."""
    wanted = set(tuple(issue) for issue in issues if None not in issue)
    if not wanted:
        return []
    dates = sorted(date for _, date, _ in wanted)
    rows = Issue.objects.exclude(batch_id=name).filter(
        title_id__in={lccn for lccn, _, _ in wanted}, date_issued__range=(dates[0], dates[-1]))
    rows = rows.values_list("title_id", "date_issued", "edition", "batch_id")
    return [[lccn, date.isoformat(), edition, batch] for lccn, date, edition, batch in rows
            if (lccn, date.isoformat(), edition) in wanted]

def awardee(code, name):
    """Makes an awardee that ONI does not have; whether it is new. Raises Problem."""
    if not 0 < len(code) <= 50 or len(name) > 100 or "\\0" in code + name:
        raise Problem("an awardee code has 1 to 50 characters, a name at most 100, none of them"
                      " NUL")
    row, new = Awardee.objects.filter(org_code=code).first(), False
    if name and not row:
        row, new = Awardee.objects.get_or_create(org_code=code, defaults={"name": name})
    if not row:
        raise Problem("awardee name must be given to auto-create awardees")
    if row.org_code != code:
        raise Problem('Open ONI has the awardee "%s", and its database takes the two codes for one'
                      % row.org_code)
    return new

def folders():
    """Where loads write: of each place, by its name, the folder, and whether the website reads
    there, as its own user.
    """
    found = {
        "log/": [settings.LOG_LOCATION if hasattr(settings, "LOG_LOCATION") else "log", False],
        "batch storage": [settings.BATCH_STORAGE, False],
    }
    if getattr(settings, "COORD_STORAGE", ""):
        found["word coordinates"] = [settings.COORD_STORAGE, True]
    for cache in getattr(settings, "CACHES", {}).values():
        if "filebased" in cache["BACKEND"].lower():
            found["cache %s" % cache["LOCATION"]] = [cache["LOCATION"], True]
    return found

def look_up_tables():
    """How many rows there are in each table that ONI's own fixtures fill, and loads look up."""
    return {
        "languages": Language.objects.count(),
        "countries": Country.objects.count(),
        "awardees": Awardee.objects.count(),
    }

def documents():
    return patient_solr().search("type:page", rows=0).hits

def mend_index(name):
    """A task: makes the index hold each page of a batch, and nothing else under its name."""
    solr = solr_index.conn()
    own = set()
    for page, holder in pages_with_holders(name):
        own.add(page.url)
        if holder is None:
            print("indexing", page.url, flush=True)
            solr.add([page.solr_doc])
    for document in solr.search('batch:"%s"' % name, fl="id", rows=2**20):
        if document["id"] not in own:
            print("deleting", document["id"], flush=True)
            solr.delete(id=document["id"])
    solr.commit()
    print("the index is mended", flush=True)

def forget_documents(name):
    """A task: deletes from the index what a failed purge has left of a batch."""
    solr = solr_index.conn()
    solr.delete(q='batch:"%s"' % name)
    solr.commit()
    print("deleted the documents of", name, flush=True)
'''


class OpenONI:
    """How ONI's manage.py is called, and how ONI's database and index are asked through it."""

    def __init__(self, location, environ):
        self.location = location
        self.environment = dict(
            environ,
            VIRTUAL_ENV=f"{location}/ENV",
            PATH=f"{location}/ENV/bin:{environ.get('PATH', os.defpath)}",
            PYTHONUNBUFFERED="1",  # else it prints in lumps of 8 KB
        )
        for name in (*OWN_VARIABLES, "PYTHONHOME", "NOTIFY_SOCKET"):
            self.environment.pop(name, None)
        self._asking = futures.ThreadPoolExecutor(1)
        self._shell = None  # the manage.py that answers

    def start(self, *words, **options):
        """manage.py with `words`, in a session of its own, so that it outlives the agent.

        Raises CouldNotStart, and Scarce where it can be tried again.
        """
        manage = self.location / "manage.py"
        program = [manage, *words]
        if not os.access(manage, os.X_OK):
            program.insert(0, self.location / "ENV/bin/python3")
        try:
            manage.stat()
            return subprocess.Popen(
                program,
                cwd=self.location,
                start_new_session=True,
                **{"stdin": subprocess.DEVNULL, "env": self.environment, **options},
            )
        except OSError as error:
            kind = Scarce if is_scarce(error) else CouldNotStart
            raise kind(f"couldn't run {manage}: {error}") from error

    def start_task(self, task, *words, **options):
        """A manage.py shell that runs one function of INSIDE_ONI."""
        program = (
            f"SHELL_SECONDS = {SHELL_SECONDS}\n"
            f"SOLR_SECONDS = {SOLR_SECONDS}\n"
            f"MAX_MARC_MEMORY = {MAX_MARC_MEMORY}\n"
            f"{INSIDE_ONI}\n{task}(*{words!r})"
        )
        code = "import os; exec(os.environ.pop('INSIDE_ONI'), {})"  # short, for ps
        environment = {**self.environment, "INSIDE_ONI": program}
        return self.start("shell", "-c", code, env=environment, **options)

    def ask(self, question, *words, within=ANSWER_SECONDS):
        """What a function of INSIDE_ONI answers. Raises Problem, after `within` seconds at most.

        A manage.py shell is kept warm for it: its first answer takes half a second, later ones
        milliseconds. It ends at a question that takes too long, and after SHELL_SECONDS idle.
        """
        until = time.monotonic() + within
        reply = in_time(
            lambda: self._reply([question, *words], until), within, self._asking, who="Open ONI"
        )
        if "problem" in reply:
            raise Problem(reply["problem"])
        return reply["answer"]

    def _reply(self, question, until):
        if self._shell:
            with contextlib.suppress(ConnectionError):  # it has ended since its last answer
                return self._shell.reply(question, until)
        self._shell = Shell(self)
        return self._shell.reply(question, until)

    def close(self):
        """Ends the warm shell; the next question starts another."""
        if self._shell:
            self._shell.end()


class Shell:
    """A manage.py that answers questions; where it does not start, raises as reply does."""

    def __init__(self, oni):
        self._stderr = open(os.memfd_create("stderr"), "a+b", buffering=0)
        # In a socket pair nothing that site code prints gets between question and answer.
        self._channel, theirs = socket.socketpair()
        self._replies = self._channel.makefile("rb")
        with theirs:
            self._process = oni.start_task(
                "answer_questions",
                theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
            )
        self.reply(["is_ready"], time.monotonic() + PATIENT_SECONDS)

    def reply(self, question, until):
        """What it replies to a question. One that it does not reply to in time has no effect.

        Raises socket.timeout at a moment `until`, ConnectionError if manage.py has ended.
        """
        left = until - time.monotonic()
        if left <= 0:  # the start may have taken that long
            raise socket.timeout
        try:
            self._channel.settimeout(left)
            self._channel.sendall(json.dumps(question).encode() + b"\n")
            reply = json.loads(self._replies.readline())
        except socket.timeout:
            self.end()
            raise
        except (ConnectionError, ValueError):  # ValueError: there is no line, or a part of one
            self.end()
            self._stderr.seek(0)
            printed = self._stderr.read().decode("utf-8", "replace").strip("\0 \n")
            said = printed.rpartition("\n")[2] or "manage.py shell ended"
            raise ConnectionError(f"Open ONI cannot be asked: {said}")
        self._stderr.truncate(0)  # its last words are to be about a later question
        return reply

    def end(self):
        """Ends it at once: it is never amid a change."""
        if self._process.returncode is None:  # its number cannot be another's yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._channel.shutdown(socket.SHUT_RDWR)
        # A hung file system may hold it for ever.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)


# ---------------------------------------------------------------- batch files

BATCH_NAME = re.compile(r"batch_\w+_\w+_ver\d\d")  # what load_batch takes
BATCH_FILES = (  # load_batch reads the first that is there
    "batch_1.xml",
    "BATCH_1.xml",
    "batchfile_1.xml",
    "batch_2.xml",
    "BATCH_2.xml",
    "batch.xml",
)
LISTING = "data/batch.xml"  # of a patched batch, which has no validated one
NDNP = "{http://www.loc.gov/ndnp}"
METS = "{http://www.loc.gov/METS/}"
MODS = "{http://www.loc.gov/mods/v3}"
MIX = "{http://www.loc.gov/mix/}"
SPATIAL_METRICS = (
    f"{METS}mdWrap/{METS}xmlData/{MIX}mix/{MIX}ImagingPerformanceAssessment/{MIX}SpatialMetrics"
)
IMAGES = (
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"II",
    b"MM",
    b"GIF8",
    b"BM",
)
MISSING = {  # by the USE of a file that ONI does without
    "derivative": "there is no such PDF",
    "service": "there is no such image: the page will have no picture",
}
HREF = "{http://www.w3.org/1999/xlink}href"
NOTHING = ET.Element("nothing")  # stands for an element that is not there


def read_regular(path, size=-1):
    """The first bytes of a regular file, or all. Raises Problem, in the Go agent's words."""
    without_waiting = lambda name, flags: os.open(name, flags | os.O_NONBLOCK)  # it may be a FIFO
    try:
        with open(path, "rb", opener=without_waiting) as file:
            if not os.path.isfile(file.fileno()):
                raise Problem(f"reading file: {path} is not a regular file")
            return file.read(size)
    except OSError as error:
        if is_scarce(error):
            raise
        raise Problem(f"reading file: open {path}: {error.strerror.lower()}") from error


def parse_xml(path, builder=None):
    """The root of an XML file. Raises Problem."""
    content = read_regular(path)
    declared = re.match(rb"""<\?xml[^>]*\sencoding=["']([\w.-]+)["']""", content)
    try:
        if declared:  # Python knows encodings that its XML parser does not, as ONI's parser does
            content = content.decode(declared[1].decode())
        return ET.fromstring(content, ET.XMLParser(target=builder or ET.TreeBuilder()))
    except (ET.ParseError, LookupError, ValueError) as error:  # LookupError: the encoding
        raise Problem(f"reading file: {path}: {error}")


def batch_file(folder):
    """The file of a batch that names its issues: the first that load_batch could read, or none."""
    for name in BATCH_FILES:
        path = folder / "data" / name
        if os.access(path, os.R_OK) and not path.is_dir():
            break
    return path


def issue_files(folder):
    """The METS files that a batch's file names, as load_batch takes them. Raises Problem."""
    path = batch_file(folder)
    root = parse_xml(path)
    if root.findall(f"{NDNP}reel") != root.findall(f"{NDNP}reel[@reelNumber]"):
        raise Problem(f"{path} names a reel without a reelNumber")
    found = []
    for issue in root.findall(f"{NDNP}issue"):  # children of the root only
        written = beside(path, issue.text)
        unquoted = Path(urllib.parse.unquote(str(written)))
        found.append(next(filter(os.path.exists, [written, unquoted]), written))
    if not found:
        raise Problem(f"{path} names no issue, so ONI would load nothing")
    return found


def beside(path, href):
    """The file that a reference in the XML file `path` points to, as ONI's urljoin takes it."""
    target = re.sub(r"[\n\r\t]", "", href or "").lstrip()
    target = re.sub("^file:(//)?(?=/)", "", target)
    return Path(os.path.normpath(path.parent / target)) if target else path


def check_listed(folder, path):
    """Raises Problem unless a METS file that a batch names is there, and inside its folder."""
    if not os.path.realpath(path).startswith(f"{os.path.realpath(folder)}/"):
        raise Problem(
            f"reading file: {path}, which {batch_file(folder).name} names, lies outside the"
            " batch's folder"
        )
    read_regular(path, 0)


def check_listing(folder):
    """The quick look at a batch: its file, and that the METS files it names are there.

    Raises Problem.
    """
    for path in issue_files(folder):
        check_listed(folder, path)


class IssueFile:
    """An issue's METS file, read as ONI's BatchLoader reads it. Raises Problem if it cannot be."""

    def __init__(self, path):
        self.path = path
        root = parse_xml(path)
        files = by_id(root, f"{METS}file")
        descriptions = by_id(root, f"{METS}dmdSec", f".//{MODS}mods")
        self._metrics = by_id(root, f"{METS}techMD", SPATIAL_METRICS)
        division = root.find(f".//{METS}div[@TYPE='np:issue']")
        if division is None:
            raise Problem(f"{path} has no np:issue, and ONI cannot load it")
        mods = descriptions.get(division.get("DMDID"))
        if mods is None:
            raise Problem(f"np:issue has no description (DMDID) in {path}")
        self._edition = mods.findtext(f".//{MODS}detail[@type='edition']/{MODS}number", "")
        self._date = mods.findtext(f".//{MODS}dateIssued", "")
        lccn = mods.findtext(f".//{MODS}identifier[@type='lccn']", "").strip()
        self.key = [lccn, date_in(self._date), number_in(self._edition)]
        self.pages = []  # of each its description, and its files by their USE; None: not described
        for page in division.findall(f".//{METS}div[@TYPE='np:page']"):
            by_use = {}
            for pointer in page.findall(f"{METS}fptr"):
                file = files.get(pointer.get("FILEID"), NOTHING)
                by_use[file.get("USE")] = file
            self.pages.append((descriptions.get(page.get("DMDID")), by_use))

    def findings(self):
        """What is wrong with the issue: "fault" or "warning", sentence and file each."""
        for fault in self._faults():
            yield "fault", fault, self.path
        folder = self.path.parent.name
        edition = self.key[2]
        if re.fullmatch(r"\d{10}", folder) and edition not in (None, int(folder[8:])):
            yield "warning", f"the folder {folder} names another edition than {edition}", self.path
        for _, files in self.pages:
            for use, file in files.items():
                yield from self._file_findings(use, file)

    def _faults(self):
        """What in the METS file makes ONI refuse the batch, or drop something without a word.

        A ValueError skips the issue, a BatchLoaderException the page, anything else ends the load.
        """
        lccn, date, edition = self.key
        if not lccn:
            yield "there is no LCCN: ONI could not tell which title this is"
        if date is None:
            yield f"the dateIssued is {self._date!r}: ONI would leave this issue out"
        if edition is None:
            yield f"the edition is {self._edition!r}: ONI would leave this issue out"
        for number, (mods, files) in enumerate(self.pages, 1):
            if None in files:
                yield f"a page of {self.path} points to a file that is not described"
            if not self._has_dimensions(files.get("service", NOTHING).get("ADMID")):
                yield f"page {number} has no dimensions of its image: ONI would drop it"
            if mods is None:
                yield f"np:page has no description (DMDID) in {self.path}"
                continue
            sequence = mods.findtext(f".//{MODS}extent/{MODS}start", "")
            if number_in(sequence) is None:
                yield f"page {number} has the sequence {sequence!r}: ONI would leave it out"

    def _has_dimensions(self, admid):
        """Whether ONI finds an image's dimensions, as numbers, in the MIX that its ADMID refers to.

        Without an ADMID it opens the image.
        """
        if admid is None:
            return True
        for identifier in admid.split(" "):
            metrics = self._metrics.get(identifier, NOTHING)
            length = metrics.findtext(f"{MIX}ImageLength")
            width = metrics.findtext(f"{MIX}ImageWidth")
            if length and width:
                return all(number_in(text, -(2**31)) is not None for text in (length, width))
        return False

    def _file_findings(self, use, file):
        """What is wrong with a file of a page, as findings tells it."""
        href = next(file.iter(f"{METS}FLocat"), NOTHING).get(HREF, "")
        if use == "ocr":  # opened as a URL; the others by their names
            href = urllib.parse.unquote(href.partition("#")[0].strip())
        path = beside(self.path, href)
        unmeasured = use == "service" and file.get("ADMID") is None  # so ONI opens the image
        if use == "ocr":
            try:
                check_ocr(path)
            except Problem as problem:
                yield "fault", f"{problem}: ONI could not index this page", path
        elif unmeasured and not path.is_file():
            yield "fault", "there is no such image, and the METS file has no dimensions", path
        elif unmeasured and not read_regular(path, 16).startswith(IMAGES):
            yield "fault", "this is no image, and the METS file has no dimensions", path
        elif use in MISSING and not path.is_file():
            yield "warning", MISSING[use], path


def by_id(root, tag, part="."):
    """What is at a path in the elements with a tag, by their ID; of several with one, the first."""
    found = {}
    for element in root.iterfind(f".//{tag}[@ID]"):
        inside = element.find(part)
        if inside is not None:
            found.setdefault(element.get("ID"), inside)
    return found


def number_in(text, least=0):
    """The number in a text if ONI's database, and its addresses, can hold it; else None."""
    with contextlib.suppress(ValueError):
        if least <= int(text) < 2**31:
            return int(text)
    return None


def date_in(text):
    """A date as text, if ONI can read it, else None."""
    with contextlib.suppress(ValueError):
        return datetime.strptime(text, "%Y-%m-%d").date().isoformat()
    return None


def check_ocr(path):
    """Raises Problem if ONI's OCRHandler would fail on an ALTO file."""
    measured = False  # whether a Page with a size has begun: ONI asserts that none has

    def start(tag, attributes):
        nonlocal measured
        if tag == "String" and "CONTENT" not in attributes:
            raise Problem(f"line {parser.CurrentLineNumber}: a String without CONTENT")
        if tag == "TextBlock" and len(attributes.get("language", "eng")) < 2:
            raise Problem(f"line {parser.CurrentLineNumber}: a language of less than two letters")
        if tag == "Page":
            if measured:
                raise Problem(f"line {parser.CurrentLineNumber}: a second Page")
            measured = "WIDTH" in attributes or "HEIGHT" in attributes

    parser = ParserCreate()
    parser.StartElementHandler = start
    try:
        parser.Parse(read_regular(path), True)
    except (ExpatError, LookupError, ValueError) as error:  # LookupError: unknown encoding
        raise Problem(f"not well-formed: {error}")


def count_files(folder):
    """What ONI should hold by the files of a batch, as BatchState names it.

    Where a METS file cannot be read, that is a problem, and its pages are not known. Raises Problem
    where the file that names the issues cannot be read.
    """
    paths = issue_files(folder)
    counts = {"issues_in_batch_xml": len(paths)}
    try:
        with_ocr = ["ocr" in files for path in paths for _, files in IssueFile(path).pages]
        counts["pages_in_mets"] = len(with_ocr)
        counts["pages_with_ocr"] = sum(with_ocr)
    except Problem as problem:
        counts["problem"] = str(problem)
    return counts


class Findings:
    """What a look at every file of a batch finds that ONI would read.

    Tells `progress` of each issue, which may raise.
    """

    def __init__(self, folder, progress):
        self.faults = []  # dicts, as answers show them
        self.warnings = []
        self.issues = []  # LCCN, date, edition
        self.titles = {}  # to be fetched, by LCCN: URL, and what is wrong there
        self._folder = folder
        self._listing = batch_file(folder)
        paths = []
        try:
            paths = issue_files(folder)
        except Problem as problem:
            self.add("fault", problem)
        for done, path in enumerate(paths, 1):
            try:
                check_listed(folder, path)
                issue = IssueFile(path)
                self.issues.append(issue.key)
                for finding in issue.findings():
                    self.add(*finding)
            except Problem as problem:
                self.add("fault", problem, path)
            progress(done, len(paths))

    def add(self, kind, text, path=None):
        """Enters a "fault" or a "warning" of a file, or of the whole: a sentence, or a Problem."""
        path = path or self._listing
        text = str(text).replace(f"reading file: open {path}: ", "")
        entries = self.faults if kind == "fault" else self.warnings
        entries.append({"file": os.path.relpath(path, self._folder), kind: text})


COPY_ATTEMPTS = 5  # a second apart: network storage may fail for a moment


class Patch:
    """A new batch, which is the batch in `old` without some issues.

    `removals` has the keys of the issues that are to go, and the words that asked for each. Raises
    Problem if a key names no issue of the batch, or more than one.
    """

    def __init__(self, old: Path, removals: Dict[str, str]) -> None:
        self.old = old
        listing = old / LISTING
        root = parse_xml(listing, ET.TreeBuilder(insert_comments=True, insert_pis=True))
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
        gone.update(validated_twin(path) for path in staying + reels if path.exists())
        gone.update(listing.with_name(name) for name in BATCH_FILES)
        self._gone = gone  # the paths that are left out
        ET.register_namespace("", NDNP.strip("{}"))
        self.listing: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)

    def _check_named(self, named: List[str], removals: Dict[str, str]) -> None:
        """Raise Problem unless each key names one issue; `named` has each as often as it does."""
        for key, words in removals.items():
            if key not in named:
                raise Problem(f"{words} names no issue of {self.old.name}; write LCCN/YYYYMMDDEE")
            if named.count(key) > 1:
                raise Problem(
                    f"{words} may mean any of {named.count(key)} issues, since folders and editions"
                    " disagree; mend batch.xml or the folders first"
                )

    def is_made(self, new: Path) -> bool:
        """Tell whether `new` is there, and so is whole. Raises Problem if it is another batch."""
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
        check: Callable[[Path], None] = check_listing,
    ) -> None:
        """Make the batch `new`, which has its name only when it is whole and on disk.

        `tell` is told how far it is, `go_on` is called before each file and may raise, and `check`
        raises Problem if what was made, in the folder that it is given, is no batch that ONI could
        load. Raises Problem, OSError.
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
            shutil.rmtree(str(unready), ignore_errors=True)  # unless it is the new batch by now

    def _copy(
        self, unready: Path, tell: Callable[[str], None], go_on: Callable[[], None]
    ) -> None:
        """Copy all but the listing, if there is room for it; tell of each tenth of the bytes."""
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
        """Return the paths of what is copied of the old batch, and the bytes of each of them."""
        return {
            str(path): path.lstat().st_size
            for path in self.old.rglob("*")
            if self._gone.isdisjoint([path, *path.parents])
            and not path.name.lower().endswith((".tif", ".tiff"))
        }


def validated_twin(path: Path) -> Path:
    """Return where the validated copy of a METS file is, if there is one: `x_1.xml` for `x.xml`."""
    return path.with_name(f"{path.stem}_1{path.suffix}")


def copy_patiently(
    source: str, target: str, tell: Callable[[str], None], go_on: Callable[[], None]
) -> None:
    """Copy a file, safely to disk, in at most COPY_ATTEMPTS attempts, a second apart.

    `tell` is told of each that fails, but for the last; `go_on` is called before each, and may
    raise. Raises Problem if all fail, which, unlike an OSError, keeps copytree from going on to the
    next file.
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
    """Read a file of instructions, a line `RemoveIssue LCCN/YYYYMMDDEE` each, blank ones apart.

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
    """Return the keys that may name an issue in batch.xml: by its edition, or its folder."""
    lccn, date, edition = (issue.get(name, "") for name in ("lccn", "issueDate", "editionOrder"))
    return {plain_key(f"{lccn}/{date}{edition:0>2}"), plain_key(f"{lccn}/{path.parent.name}")}


def plain_key(key: str) -> str:
    """Return an issue's key without the dashes and underscores that do not count."""
    return re.sub("[-_]", "", key)


def remove_issues(words: List[str]) -> int:
    """Make a batch from another without some issues, without ONI; return the exit status.

    `words` are the old batch's folder, the new one's, and the keys of the issues that are to go.
    """
    if len(words) < 3:
        complain("--remove-issues needs FOLDER NEWFOLDER LCCN/YYYYMMDDEE…")
        return 2
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
    """Put a file, or what has been made or renamed in a folder, safely on disk."""
    descriptor = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- the batch


class Glance:
    """Makes an answer in the background, every PROGRESS_SECONDS at most, however many ask."""

    def __init__(self, make):
        self._make = make  # a function that returns a dict
        self._pool = futures.ThreadPoolExecutor(1)
        self._answers = {}  # the newest one, by the words that it is about
        self._due = 0.0  # when they are to be made anew

    def __call__(self, *words):
        """What `make` has last answered, after a second at the most; {} if it has not yet."""
        with contextlib.suppress(Problem, OSError):
            in_time(lambda: self._look(words), 1, self._pool)
        return self._answers.get(words, {})

    def _look(self, words):
        """Asks, if that is due, in the pool's one thread; an answer may come after its time."""
        if words not in self._answers or time.monotonic() >= self._due:
            self._answers.setdefault(words, {})  # it is asked, whether it will answer or not
            self._due = time.monotonic() + PROGRESS_SECONDS
            self._answers = {words: self._make(*words)}


class RememberedCounts:
    """Dicts of counts that are slow to make, each kept with a key that changes when they may have.

    In counts.json, so that a restart does not lose them; they may be lost at any time.
    """

    def __init__(self, path):
        self._path = path
        self._lock = threading.Lock()
        self._kept = {}
        with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
            self._kept = json.loads(path.read_text())[VERSION]

    def recall(self, what, key, *_):
        """The counts that were kept last, if under this key; else {}. Makes none."""
        kept, counts = self._kept.get(what, (None, {}))
        return counts if kept == key else {}

    def count(self, what, key, make, *about):
        """The counts that `make` makes anew, kept for `recall` unless they have a problem."""
        counts = make(*about)
        if key and "problem" not in counts and self.recall(what, key) != counts:
            with self._lock, contextlib.suppress(OSError):
                self._kept[what] = [key, counts]
                self._path.write_text(json.dumps({VERSION: self._kept}))
        return counts


def agree(held, wanted):
    """Whether two counts are the same; None if one of them is not known."""
    return None if None in (held, wanted) else held == wanted


@dataclass
class BatchState:
    """What ONI's database and index hold of a batch, beside what the batch's files say they should.

    It is complete when all of these agree (no one of them alone is proof): the row, the issues, the
    pages and those indexed, the newest event, and the documents in Solr, unless that cannot be
    asked, as it then says. None is what was not looked at, or could not be.
    """

    name: str
    on_disk: bool = False  # whether it lies in BATCH_SOURCE
    row: bool = False
    loaded: str = ""  # when the row was made
    issues: int = 0
    pages: int | None = None
    indexed: int | None = None  # pages whose text went to Solr
    events: list = field(default_factory=list)  # the newest ones, [time or number, message]
    issues_in_batch_xml: int | None = None
    pages_in_mets: int | None = None
    pages_with_ocr: int | None = None  # in METS files, too
    problem: str = ""  # why it is not known what the files say
    pages_in_solr: int | None = None  # documents there
    lost: int | None = 0  # pages of which Solr has no document at all
    replaced: int = 0  # pages whose document is another batch's page of the same URL
    stray: int = 0  # documents in Solr that are no page's
    index_problem: str = ""  # why Solr could not be asked
    storage: str = ""  # where ONI has links to the batches that it has loaded

    @property
    def ended_well(self):
        """As the newest event says. Without any it was loaded long ago, and they were pruned."""
        return not self.events or self.events[-1][1].startswith("processed")

    def _agreements(self):
        """Whether database and files agree on each thing; None if that is not known."""
        held = [self.issues, self.pages, self.indexed]
        wanted = [self.issues_in_batch_xml, self.pages_in_mets, self.pages_with_ocr]
        return [self.ended_well, *map(agree, held, wanted)]

    @property
    def rows_whole(self):
        """Whether the database is known to hold all that the files name."""
        return all(self._agreements())

    @property
    def state(self):
        """absent, partial, complete or unknown."""
        index = self.pages_in_solr == self.indexed or agree(self.lost, 0)
        found = [*self._agreements(), index, not self.stray]
        if not self.row:
            return "absent"
        if False in found:
            return "partial"
        return "unknown" if None in found else "complete"

    def __str__(self):
        whole = self.rows_whole
        facts = {
            self._of_database(): True,
            f"Solr cannot be asked ({self.index_problem})": self.index_problem,
            f"Solr still has {self.pages_in_solr} of its pages, which lead nowhere": (
                self.pages_in_solr and not self.row
            ),
            f"Solr lacks {self.lost} of {self.indexed} pages": self.lost and whole,
            f"Solr has documents under its name that are none of its pages ({self.stray})": (
                self.stray and whole
            ),
            f"{self.replaced} pages are found under another batch, which has the same pages": (
                self.replaced
            ),
        }
        return "; ".join(fact for fact, holds in facts.items() if holds)

    def _of_database(self):
        if not self.row:
            return "ONI holds nothing of the batch"
        held = f"ONI holds {self.issues} of the {self.issues_in_batch_xml} issues"
        held += f" and {self.pages} of the {self.pages_in_mets} pages"
        if self.problem:
            held = f"ONI holds {self.issues} issues and {self.pages} pages, and what it should hold"
            held += f" is not known: {self.problem}"
        if self.state == "complete":
            return f"the batch is complete: {held}"
        if self.pages == self.pages_in_mets and self.indexed != self.pages_with_ocr:
            held += f", {self.indexed} of {self.pages_with_ocr} with their text"
        if not self.ended_well:
            held += f', and its last event is "{self.events[-1][1]}"'
        return held


class Site:
    """An Open ONI and its batches: answers what ONI holds of one, from all three places."""

    def __init__(self, settings, oni):
        self.source = settings.batch_source
        self.oni = oni
        self._marc_reader = OpenONI(oni.location, oni.environment)
        self._remembered = RememberedCounts(settings.state_directory / "counts.json")
        self._counting = futures.ThreadPoolExecutor(1)
        self.progress = Glance(self._ask_progress)  # of a batch, as a job loads it
        self.health = Glance(self._ask_health)  # whether ONI answers

    def folder(self, name):
        """Where the batch `name` lies, or would. Raises Problem unless it is a batch's name."""
        if not BATCH_NAME.fullmatch(name):
            raise Problem(f'"{name}" is not a batch name: Open ONI takes batch_AWARDEE_NAME_verNN')
        return self.source / name

    def lccns(self, path):
        """The LCCNs of the MARC records in a file. Raises Problem where ONI could not store one."""
        try:
            return self._marc_reader.ask("lccns", str(path), within=PATIENT_SECONDS)
        finally:
            self._marc_reader.close()  # it has maybe taken all the memory that it may

    def batch(self, name, within=ANSWER_SECONDS):
        """What ONI holds of a batch now. Raises Problem if the database cannot be asked."""
        state = BatchState(**self.oni.ask("batch", name, True, within=within))
        if state.name != name:
            raise Problem(
                f'Open ONI has the batch "{state.name}", and its database takes the two names'
                " for one"
            )
        try:
            in_time(lambda: self._fill(state, self._remembered.count), within)
        except Problem as problem:
            state = BatchState(**vars(state))  # the thread may go on with the other one
            state.problem = str(problem)
        return state

    def _fill(self, state, way):
        """Adds what is not known yet of a batch's pages, and of what its files say.

        `way` is a method of RememberedCounts. Raises Problem, OSError.
        """
        name = state.name
        if state.pages is None:
            # They change without these only while the batch is loaded or purged.
            key = [state.loaded, state.issues, state.events] if state.ended_well else None
            vars(state).update(way(f"{name} in ONI", key, self.oni.ask, "pages_held", name))
        if state.pages_in_mets is None:
            folder = self.source / name
            state.on_disk = folder.is_dir()
            if not state.on_disk:  # but ONI has a link to where it has loaded it from
                folder = Path(state.storage) / name
            vars(state).update(way(f"{name} in files", listing_key(folder), count_files, folder))

    def batches(self):
        """What is quickly told of every batch, in BATCH_SOURCE or ONI; the rest is None.

        What cannot be counted in LIST_SECONDS is there the next time. Raises Problem.
        """
        listed = [BatchState(**held) for held in self.oni.ask("overview", self._on_disk())]

        def fill_all(way):
            for state in listed:
                with contextlib.suppress(Problem, OSError):
                    self._fill(state, way)

        in_time(lambda: fill_all(self._remembered.recall))
        with contextlib.suppress(Problem):  # it goes on, and is remembered
            in_time(lambda: fill_all(self._remembered.count), LIST_SECONDS, self._counting)
        return listed

    def _on_disk(self):
        """The names of the batches in BATCH_SOURCE. Raises Problem."""
        return in_time(lambda: list(filter(BATCH_NAME.fullmatch, os.listdir(self.source))))

    def _ask_health(self):
        try:
            health = {"answers": True, "batches": self.oni.ask("batch_count")}
        except Problem as problem:
            return {"answers": False, "problem": str(problem)}
        try:
            self.oni.ask("documents")
        except Problem as problem:
            health["problem"] = f"Solr is down: {problem}"
        return health

    def _ask_progress(self, name, _job_id):
        """How far a job is; an answer about an earlier job on the batch is none about this one."""
        state = BatchState(**self.oni.ask("batch", name, False, within=PATIENT_SECONDS))
        self._fill(state, self._remembered.recall)
        self._fill(state, self._remembered.count)
        return {
            "issues_loaded": state.issues,
            "issues": state.issues_in_batch_xml,
            "pages_loaded": state.pages,
            "pages": state.pages_in_mets,
        }

    def check(self, name, progress, go_on):
        """What would go wrong with a load of a batch, as Findings. Raises Problem.

        ONI is only asked. `progress` is told of issues done and issues in all; it may raise, to end
        the check, and so may `go_on`, which is called each second.
        """
        folder = self.folder(name)
        found = in_time(lambda: Findings(folder, progress), CHECK_SECONDS, CHECKS, go_on)
        try:
            self.check_place(name)
        except Problem as problem:
            found.add("fault", problem)
        found.titles = self.oni.ask("titles_to_fetch", found.issues, within=PATIENT_SECONDS)
        for lccn, (url, wrong) in found.titles.items():
            if wrong:
                found.add("fault", f"ONI does not have the title {lccn}, nor has {url}: {wrong}")
        others = self.oni.ask("other_holders", name, found.issues, within=PATIENT_SECONDS)
        for lccn, date, edition, other in others:
            found.add("warning", f"{other} holds {lccn} {date} edition {edition}, too")
        return found

    def check_place(self, name):
        """Raises Problem unless ONI has the awardee of a batch, and a place for its link."""
        link = Path(self.oni.ask("place", name)) / name
        here = link.resolve() == self.folder(name)  # BATCH_SOURCE is ONI's own storage
        if link.exists() and not link.is_symlink() and not here:
            raise Problem(
                f"{link} is a real folder or file, not a link, and load_batch cannot replace it:"
                " move it away"
            )

    def must_be_there(self, name):
        """Raises Problem unless the batch is in BATCH_SOURCE."""
        if not in_time(self.folder(name).exists):
            raise Problem(
                f"there is no such batch, in BATCH_SOURCE or in Open ONI{self.similar(name)}"
            )

    def similar(self, name):
        """A question that suggests the batch which a wrong name may be meant to be."""
        there = self._on_disk()
        with contextlib.suppress(Problem):
            there += self.oni.ask("names")
        return nearly(name, there)


def listing_key(folder):
    """What changes when the file that names a batch's issues does; None: there is none."""
    path = batch_file(folder)
    with contextlib.suppress(OSError):
        found = path.stat()
        return f"{path} of {found.st_size} bytes, changed at {found.st_mtime_ns}"
    return None


def nearly(word, words, likeness=0.85):
    """A question that suggests what a wrong word may mean: one that is so like it, if any.

    Names of batches begin and end alike, and so must be more alike than other words.
    """
    closest = difflib.get_close_matches(word, words, 1, likeness)
    return f'; did you mean "{closest[0]}"?' if closest and closest[0] != word else ""


# ---------------------------------------------------------------- jobs and their store

PENDING = "pending"
STARTED = "started"
COULD_NOT_START = "couldn't start"
SUCCESSFUL = "successful"
FAILED = "failed"
STATUS_MESSAGES = {  # NCA knows no others
    PENDING: "Pending: this job is in the queue but hasn't been started yet.",
    STARTED: "Started: this job is currently running.",
    COULD_NOT_START: "Invalid: this job was not able to start.",
    SUCCESSFUL: "Success: this job is complete.",
    FAILED: "Failed: this job started but returned a non-zero exit code.",
}
NO_OP = "No-op: job is redundant or already completed"  # in place of a new job


@dataclass
class Job:
    """One request that was accepted, and what became of it. Times are nanoseconds since 1970."""

    id: int
    words: list[str]
    queued: int
    status: str = PENDING
    started: int | None = None
    ended: int | None = None
    error: str = ""
    attempts: int = 0  # how often it was begun; more than one: an interruption lies between
    cancelled: int = 0  # whether somebody has asked for its end

    @property
    def finished(self):
        return self.status not in (PENDING, STARTED)


class JobStore:
    """The jobs on disk: `jobs.db`, `logs/` and `inputs/` in the state folder, one agent's alone.

    Its methods raise Problem, or an OSError; `add` and `update` return when all is safely on disk.
    No two threads may be in `add`, `update` or `remove` at once.
    """

    APPLICATION = 0x4F4E4941  # SQLite's application_id: "ONIA"
    VERSION = 1  # SQLite's user_version
    SCHEMA = f"""
        BEGIN;
        CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, words TEXT NOT NULL,
            payload BLOB, queued INTEGER NOT NULL, status TEXT NOT NULL, started INTEGER,
            ended INTEGER, error TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0,
            cancelled INTEGER NOT NULL DEFAULT 0);
        PRAGMA application_id = {APPLICATION};
        PRAGMA user_version = {VERSION};
        COMMIT;
    """
    # In the order of Job's fields.
    COLUMNS = "id, words, queued, status, started, ended, error, attempts, cancelled"

    def __init__(self, folder):
        self.folder = folder
        self._path = folder / "jobs.db"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_an_agents(folder):
                folder.chmod(0o700)
            self._keep_others_out()
            (folder / "inputs").mkdir(mode=0o700, exist_ok=True)
            for unready in folder.glob("inputs/unready-*"):
                unready.unlink()
            is_new = not self._path.exists() or self._is_empty()
            # Without an isolation level each statement commits.
            self._database = sqlite3.connect(
                self._path, check_same_thread=False, isolation_level=None
            )
            # What is answered is on disk.
            self._database.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL")
            if is_new:
                self._database.executescript(self.SCHEMA)
            self._newest = self._newest_id()
            self._take_out_payloads()
        except (OSError, sqlite3.Error) as error:
            raise Problem(f"{self._path} cannot be used ({error}); nothing was changed") from error

    def _keep_others_out(self):
        # A killed agent's last child may hold the lock until it has become manage.py.
        for _ in range(100):
            with contextlib.suppress(BlockingIOError):
                self._agent_lock = locked(self.folder / "agent.lock")
                return
            time.sleep(TICK)
        raise Problem(
            f"another ONI Agent is at work on {self.folder}; give this one a STATE_DIRECTORY of"
            " its own"
        )

    def _is_empty(self):
        """Whether a database has no tables yet. Raises Problem if it is not to be used.

        It is opened for reading alone: else even its closing would change it.
        """
        opened = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)
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

    def _newest_id(self):
        """The highest id given so far: jobs.db may be new, or an older copy, but logs remain."""
        names = " ".join(path.name for path in self.folder.glob("logs/*"))
        ids = map(int, re.findall(r"\b([0-9]{1,18})\.log\b", names))
        [[newest]] = self._execute("SELECT ifnull(max(seq), 0) FROM sqlite_sequence")
        return max([newest, *ids])

    def _take_out_payloads(self):
        """Writes what release 1.0 kept of standard input in the database where it is kept now."""
        for id, payload in self._execute("SELECT id, payload FROM jobs WHERE payload IS NOT NULL"):
            with self.new_input() as given:
                Path(given.name).write_bytes(payload)
                self._keep_input(self.folder / "inputs" / str(id), given.name)
            self._execute("UPDATE jobs SET payload = NULL WHERE id = ?", id)

    def _execute(self, statement, *values):
        """The rows that a statement gives, once it is done and on disk. Raises Scarce."""
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise Scarce(f"{self._path} cannot be used: {error}") from error

    def jobs(self):
        """Every job, oldest first."""
        rows = self._execute(f"SELECT {self.COLUMNS} FROM jobs ORDER BY id")
        try:
            return [Job(id, json.loads(words), *others) for id, words, *others in rows]
        except ValueError as error:
            raise Problem(f"{self._path} is damaged: {error}") from error

    def new_input(self):
        """A file for what comes on standard input, gone when it is closed."""
        return tempfile.NamedTemporaryFile(
            prefix="unready-", dir=self.folder / "inputs", buffering=0
        )

    def add(self, words, given):
        """A new pending job, and another name, its own, for the file of what was `given`."""
        job = Job(self._newest + 1, words, time.time_ns())
        if given:
            self._keep_input(self.input(job).parent, given)
        self.update(job)
        self._newest = job.id
        return job

    def _keep_input(self, folder, given):
        sync(given)
        # A crash before this id was given may have left something.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        os.link(given, folder / "input.xml")
        sync(folder)
        sync(folder.parent)

    def input(self, job):
        """The file of what came on standard input with a request; its folder holds nothing else."""
        return self.folder / "inputs" / str(job.id) / "input.xml"

    def update(self, job, **changes):
        """Changes a job, on disk before all else."""
        columns = {**vars(job), "words": json.dumps(job.words), **changes}
        self._execute(
            f"REPLACE INTO jobs ({self.COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *columns.values(),
        )
        vars(job).update(changes)

    def log(self, job):
        """Where a job's log is, for JobLog."""
        return self.folder / "logs" / f"{job.id}.log"

    def remove(self, job):
        """Forgets a job: its files first, so that a crash in between leaves none without a job."""
        for path in self.folder.glob(f"logs/{job.id}.*"):
            path.unlink()
        shutil.rmtree(self.input(job).parent, ignore_errors=True)
        self._execute("DELETE FROM jobs WHERE id = ?", job.id)


def locked(path):
    """A file whose lock is held until it is closed. Raises BlockingIOError if another holds it."""
    file = open(path, "a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


STDOUT = "O"  # of manage.py; in logs of release 1.0 they are the kinds of their lines, too
STDERR = "E"
NOTE = "A"
# An entry of a job's log: its second and nanosecond; then the sizes of both outputs, and a command
# if one begins there; or else a kind and a text.
ENTRY = re.compile(
    r"(?m)^\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z\]"
    r" (?:[=$] (\d{1,18}) (\d{1,18}) ?|([AEO]) )(.*)$"
)


def timestamp(nanoseconds):
    """A moment in UTC with nine digits: fixed width, because NCA sorts log lines as strings."""
    second, nanosecond = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{nanosecond:09d}Z"


class JobLog:
    """The files of what manage.py has printed for a job, and of what the agent has to say of it.

    manage.py itself writes its output to ID.out and ID.err. Beside them ID.log has one line for
    each moment: `[2026-11-22T11:07:19.061730250Z] K text`, K being A (a note of the agent's),
    = (text: how many bytes the two files have by now) or $ (the same, and the command that begins
    with the next byte). Work writes it; from it LogReader makes the stamped lines of the protocol.
    """

    def __init__(self, path):
        self.path = path
        self.outputs = {STDOUT: path.with_suffix(".out"), STDERR: path.with_suffix(".err")}

    def entries(self, start=0):
        """Each entry from a byte on: an end, in bytes, and the groups of ENTRY. Raises OSError."""
        for end, text in pieces(self.path, start, most=3 * CHUNK):  # release 1.0's had 64 KiB
            for groups in ENTRY.findall(text):
                yield end, *groups


def open_to_append(path):
    """A file that is made if missing, as its folder is.

    What the disk refuses of it is kept, and written with what comes next.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return open(path, "a", 1 << 20, "utf-8", "replace")


def pieces(path, start, stop=sys.maxsize, over=False, most=CHUNK):
    """The whole lines between two bytes of a file; an unfinished one too if what has printed it is
    `over`. A line of more than `most` bytes comes in parts.

    Yields some lines at a time: where they end, in bytes, and their text. Raises OSError.
    """
    while start < stop:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(min(most + 1, stop - start))
        is_long = len(data) > most
        end = data.rfind(b"\n") + 1
        if not end and (over or is_long):
            end = most
        # No part ends amid a character. It is kept as text alone: a slow reader may take long.
        data, size = codecs.utf_8_decode(data[:end], "replace", not is_long)
        if not size:
            return
        start += size
        yield start, data


class LogReader(JobLog):
    """Reads a job's log, as stamped lines, in order. Can be read again for what has come since.

    Only lines of these kinds, or of all, are given out, without the first `skip` of all; each
    has the same stamp whichever are wanted.
    """

    def __init__(self, path, *kinds, skip=0):
        super().__init__(path)
        self._kinds = kinds or (STDOUT, STDERR, NOTE)
        self._skip = skip
        self._index = 0  # bytes of the log that have been read
        self._at = {STDOUT: 0, STDERR: 0}  # bytes of the outputs, each to the end of a line
        # Of the next line at the earliest: stamps increase, clocks may not.
        self._stamp = ("1970-01-01T00:00:00", 0)

    def read(self, over):
        """Some lines at a time, `[stamp] text` each; if the job is `over`, unfinished ones too.

        A list of none stands for some that are not wanted, so that a reader can look up meanwhile.
        """
        with contextlib.suppress(OSError):  # there is none yet, say
            for entry in self.entries(self._index):
                self._index, second, nanosecond, out, err, kind, text = entry
                self._stamp = max(self._stamp, (second, int(nanosecond)))
                if kind:  # a note; or a line in a log of release 1.0
                    yield self._stamped(kind, text)
                else:  # where a command begins, those before it have ended
                    yield from self._printed([int(out), int(err)], over=bool(text))
        if over:
            # The log may not know of all that was printed.
            yield from self._printed([sys.maxsize] * 2, over)

    def _printed(self, sizes, over):
        """The lines of both outputs within these sizes."""
        for output, size in zip(self._at, sizes):
            with contextlib.suppress(OSError):  # somebody has removed it
                for end, text in pieces(self.outputs[output], self._at[output], size, over):
                    self._at[output] = end
                    yield self._stamped(output, text)

    def _stamped(self, kind, text):
        """The lines of a text that are wanted, with stamps of one second."""
        text = text.removesuffix("\n")
        count = text.count("\n") + 1
        second, first = self._stamp
        if first + count > 10**9:
            second = (datetime.fromisoformat(second) + timedelta(seconds=1)).isoformat()
            first = 0
        self._stamp = (second, first + count)
        skip = self._skip
        self._skip = max(0, skip - count)
        if kind not in self._kinds or skip >= count:
            return []
        numbered = enumerate(text.split("\n")[skip:], first + skip)
        return [f"[{second}.{number:09d}Z] {line}" for number, line in numbered]


# ---------------------------------------------------------------- manage.py at work


def signal_name(number):
    """SIGKILL for 9; real-time signals have none."""
    return next((each.name for each in signal.Signals if each == number), "of no name")


class Work(JobLog):
    """One job at work: keeps its log, and runs one manage.py after another, each to its end.

    manage.py runs in a session of its own, prints to files and inherits a locked file, so that it
    outlives this agent, and the next one can tell that it is still at work, and wait for its end.
    """

    def __init__(self, job, store, oni, stopping):
        """Makes the log ready to go on, after whatever an earlier agent left. Raises OSError."""
        super().__init__(store.log(job))
        self.job = job
        self.input = store.input(job)
        self.commands = []  # all that have begun
        self.undoing = False  # a cancelled job is tidied up, which is not to be cancelled
        self._oni = oni
        self._lock = store.folder / "run.lock"
        self._stopping = stopping
        self._sizes = [0, 0]  # bytes of the outputs, as last written down
        self._begun = 0  # bytes of stderr when the newest command began
        self._file = open_to_append(self.path)
        whole = 0
        for end, *_, begun, kind, command in self.entries():
            whole = end
            if command and not kind:
                self._begun = int(begun)
                self.commands.append(command)
        self._file.truncate(whole)  # a crash may have cut the last entry short

    def close(self):
        """Puts the log safely on disk."""
        with contextlib.suppress(OSError):
            self._file.close()
            sync(self.path)

    def note(self, text, kind=NOTE):
        """Enters what the agent does, or what an entry of another kind says."""
        entry = f"[{timestamp(time.time_ns())}] {kind} {text}".replace("\n", " ")
        try:
            print(entry, file=self._file, flush=True)
        except OSError as error:
            log.error("%s cannot be written for now: %s", self.path, error)

    def _look(self):
        """Enters how much has been printed by now, if that has changed."""
        with contextlib.suppress(OSError):  # nothing has, or somebody has removed it
            sizes = [path.stat().st_size for path in self.outputs.values()]
            if sizes != self._sizes:
                self._sizes = sizes
                self.note(f"{sizes[0]} {sizes[1]}", "=")

    def _enter(self, command):
        """Enters that what follows after the last look is a command's output."""
        out, self._begun = self._sizes
        self.commands.append(command)
        self.note(f"{out} {self._begun} {command}", "$")

    def complaints(self):
        """The lines that the newest manage.py has printed on stderr, but for empty ones."""
        with contextlib.suppress(OSError):
            for _, text in pieces(self.outputs[STDERR], self._begun, over=True):
                yield from re.findall(r"(?m)^.*\S", text)

    def complaint(self):
        """The first line that the newest manage.py has logged as an error, else its last."""
        last = "nothing"
        for last in self.complaints():
            error = re.match(r"\[ERROR\] |ERROR:[\w.]+:", last)  # ONI 1.1 and 1.0
            if error:
                return last[error.end() :]
        return last

    @property
    def cancelled(self):
        """Whether the job is to end."""
        return self.job.cancelled and not self.undoing

    def go_on(self):
        """Raises Cancelled if the job is to end, or has ended before it began."""
        if self.cancelled or self.job.finished:
            raise Cancelled

    def step(self, action):
        """Takes a step, a function of this work, anew while the machine lacks something for it.

        Raises Problem, also for any other OSError; Cancelled, Stopping.
        """

        def take():
            self.go_on()
            try:
                action(self)
            except OSError as error:
                if is_scarce(error):
                    raise
                raise Problem(str(error)) from error

        patiently(take)

    def manage(self, *words):
        """Runs manage.py with `words`. Raises Problem, Cancelled, Stopping.

        The text of a Problem says how manage.py ended, and of what it has complained.
        """
        self._run("manage.py", self._oni.start, *words)

    def task(self, name, *words):
        """Runs a function of INSIDE_ONI in a manage.py of its own. Raises as manage does."""
        self._run("manage.py shell:", self._oni.start_task, name, *words)

    def _run(self, program, start, *words):
        def begin():
            self.go_on()
            out, err = map(open_to_append, self.outputs.values())
            with out, err, locked(self._lock) as lock:
                self._look()
                return start(*words, stdout=out, stderr=err, pass_fds=[lock.fileno()])

        process = patiently(begin)
        self._enter(f"{program} {shlex.join(words)}")
        self._follow()
        status = process.wait()
        self.go_on()
        if status < 0:
            if self._stopping.wait(1):  # the signal may have come to the agent as well
                raise Stopping
            raise Problem(f"killed by signal {-status} ({signal_name(-status)})")
        if status:
            raise Problem(f"exit status {status}: {self.complaint()}")

    def take_over(self):
        """Waits for the end of what an earlier agent, or a cancelled step, has begun, if anything.

        From then on there is nothing to end, and a cancelled job is undone.
        """
        if patiently(self._is_at_work):
            log.warning("job=%d adopted=yes: its manage.py is at work", self.job.id)
            if not self.commands:  # the log was deleted, or the agent killed before it said so
                self._enter("manage.py, begun by an earlier agent")
        self._follow()
        self.undoing = self.job.cancelled

    def _is_at_work(self):
        """Whether manage.py, or what it has left behind, holds the lock. Raises OSError."""
        try:
            locked(self._lock).close()
        except BlockingIOError:
            return True
        return False

    def _follow(self):
        """Waits until manage.py, and all that it left behind, have ended; ends it if cancelled."""
        full = False
        number = signal.SIGTERM
        next_signal = 0.0
        while patiently(self._is_at_work):
            time.sleep(TICK)
            self._look()
            with contextlib.suppress(OSError):  # somebody has removed the folder
                full = full or not shutil.disk_usage(self.path.parent).free
            if self.cancelled and time.monotonic() > next_signal:
                self._signal(number)
                number = signal.SIGKILL
                next_signal = time.monotonic() + TERM_SECONDS
        self._look()
        if full:
            self.note(
                "the state folder was full meanwhile: lines that manage.py printed may be missing"
            )

    def _signal(self, number):
        """Sends a signal to the process groups, but the agent's own, that have the lock open."""
        groups = set()
        with contextlib.suppress(OSError):  # nobody can tell just now: the next time, then
            for entry in Path("/proc").glob("[0-9]*/fd/*"):
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    if entry.readlink() == self._lock:
                        groups.add(os.getpgid(int(entry.parts[2])))
        for group in groups - {os.getpgrp()}:
            self.note(f"cancelled: {number.name} to process group {group}")
            with contextlib.suppress(OSError):  # it has ended meanwhile
                os.killpg(group, number)


# ---------------------------------------------------------------- kinds of job


@dataclass
class Kind:
    """What one kind of job is to reach: its words after the command's name are the fields here.

    To add one: subclass this (its fields after `site`, if any, as a dataclass), enter it in KINDS,
    and write a command of the same name, under "commands", that returns `request.submit()`, or
    `request.submit_with_input(LIMIT)` if it `takes_input`.

    A request is answered by `check`, then `reached`. When its turn has come the worker calls
    `bring`, then `verify`. A job that an earlier agent had begun is asked for `verify` first, and
    is begun again if that fails; one that was cancelled after it began is given to `undo`. An
    unsuccessful one is asked for `remains`. So `bring` can be begun again from its first line at
    any time, and ends in the same place; and `verify` tells a job that was cut short from one that
    is done.

    `work` is a Work: it runs manage.py, takes notes for the job's log, and knows the file of what
    came on standard input. An OSError is a Problem, too, but if it is scarce: then the same method
    is called anew.
    """

    site: Site

    title = "No-op job"  # as answers name it; this one is that of job -1, see Request.job
    takes_input = False  # on standard input; else a job's words say all that is asked for

    def check(self, given):
        """Raises Problem unless it may be asked for, and all is there that it needs.

        `given` is the path of what came on standard input, None for a kind that takes none.
        """

    def reached(self):
        """Whether there is nothing to do. Raises Problem if that is not known in time."""
        return False

    def bring(self, work):
        """Brings about what is to be reached. Raises Problem, Cancelled, Stopping."""

    def verify(self, work):
        """Raises Problem, which says what there is instead, unless it is reached now."""

    def undo(self, work):
        """After a cancel: takes back what was half done. Raises Problem, Stopping."""

    def remains(self, work):
        """What there is now, in words, for the error of a job that was unsuccessful; or ""."""
        return ""


@dataclass
class BatchKind(Kind):
    """What loads and purges of a batch share. Raises Problem where its name cannot be one."""

    name: str

    def __post_init__(self):
        self.folder = self.site.folder(self.name)

    def is_goal(self, held):
        """Whether it is what the job is to reach."""

    def held(self, within=PATIENT_SECONDS):
        return self.site.batch(self.name, within)

    def reached(self):
        return self.is_goal(self.held(ANSWER_SECONDS))

    def verify(self, work):
        held = self.held()
        if not self.is_goal(held):
            said = f"; manage.py said: {work.complaint()}" if work.commands else ""
            raise Problem(f"{held}{said}")
        if not work.commands:
            work.note(f"nothing to do: {held}")
        elif held.index_problem:
            work.note(str(held))

    def remains(self, work):
        if not work.commands and not work.undoing:
            return ""  # nothing has changed, and the error says what was in the way
        try:
            return str(self.held())
        except (Problem, OSError) as problem:
            return f"what ONI holds of the batch now is not known: {problem}"


class LoadBatch(BatchKind):
    """ONI holds the whole batch, in its database and in its search index."""

    title = "Load batch"

    def check(self, given):
        try:
            in_time(lambda: check_listing(self.folder))
        except Problem as problem:
            raise Problem(f"{problem}{self.site.similar(self.name)}")
        self.site.check_place(self.name)

    def is_goal(self, held):
        return held.state == "complete"

    def bring(self, work):
        held = self.held()
        if not held.rows_whole:
            self._check_files(work)
            self._make_room(work, held)
            work.manage("load_batch", str(self.folder))
            held = self.held()
        if held.lost or held.stray:
            work.note(f"{held}; mending the index")
            work.task("mend_index", self.name)

    def _check_files(self, work):
        """Finds what would go wrong before hours of loading, and fetches titles that ONI lacks."""

        def progress(done, issues):
            work.go_on()
            if done % 100 == 0:
                work.note(f"checked the files of {done} of {issues} issues")

        self.check(None)
        found = self.site.check(self.name, progress, work.go_on)
        for warning in found.warnings:
            work.note(f"warning: {warning['file']}: {warning['warning']}")
        for fault in found.faults:
            work.note(f"fault: {fault['file']}: {fault['fault']}")
        if found.faults:
            raise Problem(f"{summary(found)}; ONI was left as it is")
        for lccn, (url, _) in found.titles.items():
            work.note(f"ONI lacks the title {lccn}; fetching it")
            work.manage("load_titles", url)
            if self.site.oni.ask("lacking", [lccn], within=PATIENT_SECONDS):
                raise Problem(f"{url} did not give ONI the title {lccn}: {work.complaint()}")

    def _make_room(self, work, held):
        """Takes away what would keep load_batch from loading the whole of this very folder."""
        if held.state == "unknown":  # it may be complete
            raise Problem(str(held))
        if held.row or held.pages_in_solr:  # load_batch would leave a part of a batch as it is
            PurgeBatch(self.site, self.name).bring(work)
        link = Path(held.storage) / self.name
        # One that a killed load of another copy has left would make ONI load that copy again.
        if link.is_symlink() and link.resolve() != self.folder.resolve():
            work.note(f"removing {link}, a leftover link to {os.readlink(link)}")
            link.unlink()

    def undo(self, work):
        # As _run and take_over write them down; the others leave the rows as they are.
        changing = ("manage.py load_batch", "manage.py purge_batch", "manage.py, begun")
        if any(command.startswith(changing) for command in work.commands):
            PurgeBatch(self.site, self.name).bring(work)


def summary(found):
    """The first faults of a batch in a sentence."""
    first = "; ".join(f"{fault['file']}: {fault['fault']}" for fault in found.faults[:3])
    more = f"; and {len(found.faults) - 3} more" if len(found.faults) > 3 else ""
    return f"{faults_in(found)} in the batch's files: {first}{more}"


def faults_in(found):
    """`1 fault` or `2 faults`."""
    return f"{len(found.faults)} fault{'' if len(found.faults) == 1 else 's'}"


class PurgeBatch(BatchKind):
    """ONI holds nothing of the batch, neither in its database nor in its search index."""

    title = "Purge batch"

    def is_goal(self, held):
        return not held.row and held.pages_in_solr == 0  # None, if Solr cannot be asked

    def bring(self, work):
        held = self.held()
        failure = None
        if held.row:
            work.note(f"{held}; purging that")
            try:
                work.manage("purge_batch", self.name)
            except Problem as problem:
                failure = problem
            held = self.held()
        if held.pages_in_solr and not held.row:
            work.note(f"{held}; deleting those")
            work.task("forget_documents", self.name)
        elif failure:
            raise failure


class LoadTitle(Kind):
    """ONI holds the titles of a MARC file as the file has them. Where that fails, it is kept."""

    title = "load title"
    takes_input = True

    def check(self, given):
        self.site.lccns(given)

    def bring(self, work):
        work.manage("load_titles", str(work.input.parent))

    def verify(self, work):
        lccns = self.site.lccns(work.input)
        missing = self.site.oni.ask("lacking", lccns, within=PATIENT_SECONDS)
        why = f"load_titles said: {work.complaint()}"
        if missing:
            raise Problem(f"ONI has no title {', '.join(missing)}; {why}")
        said = "\n".join(work.complaints())
        if not re.search("(?m)ERRORS: 0$", said):
            raise Problem(f"ONI has not stored every record; {why}")
        counts = re.findall(r"TITLES (?:CREATED|UPDATED): (\d+)", said)
        left = len(lccns) - sum(map(int, counts))
        if left:
            work.note(
                f"{left} of {len(lccns)} records changed nothing: ONI has that version already,"
                " or a newer one"
            )

    def remains(self, work):
        return f"the MARC record is kept in {work.input.parent}"


@dataclass
class BatchPatch(Kind):
    """The batch NEW in BATCH_SOURCE is the batch OLD without the issues that the input names."""

    old: str
    new: str

    title = "batch patch"
    takes_input = True

    def __post_init__(self):
        self.source = self.site.folder(self.old)
        self.target = self.site.folder(self.new)

    def check(self, given):
        if in_time(lambda: os.path.lexists(self.target)):
            raise Problem(f'"{self.new}" is in BATCH_SOURCE already')
        if self.site.oni.ask("batch", self.new, False)["row"]:
            raise Problem(f'Open ONI holds a "{self.new}" already; purge that first')
        self._possible_patch(given)

    def _possible_patch(self, given):
        """The patch, if ONI holds the old batch and its files are there. Raises Problem."""
        if not self.site.oni.ask("batch", self.old, False)["row"]:
            raise Problem("batch does not exist")
        in_time(lambda: check_listing(self.source))
        return in_time(lambda: Patch(self.source, read_instructions(given)))

    def bring(self, work):
        patch = self._possible_patch(work.input)
        if patch.is_made(self.target):
            work.note(
                f"nothing to do: {self.target} is there already, and is what this patch makes"
            )
        else:
            patch.make(self.target, work.note, work.go_on)
            work.note(f"{self.target} is whole")

    def verify(self, work):
        if not Patch(self.source, read_instructions(work.input)).is_made(self.target):
            raise Problem(f"{self.target} is not there")

    def remains(self, work):
        return f"{self.target} is there" if os.path.lexists(self.target) else ""


# To add a kind of job, write a class above, enter it here, and give it a command of the same name.
KINDS = {
    "load-batch": LoadBatch,
    "purge-batch": PurgeBatch,
    "load-title": LoadTitle,
    "batch-patch": BatchPatch,
}

# ---------------------------------------------------------------- the queue


class JobQueue:
    """The jobs in order, and the one thread that works on them."""

    def __init__(self, store, site, on_end):
        self._store = store
        self._site = site
        self._on_end = on_end
        self._changed = threading.Condition()  # guards the jobs, and the store; re-entrant
        self.stopping = threading.Event()  # once set: no end is recorded that it may have caused
        self._closed = False
        self._jobs = {job.id: job for job in store.jobs()}
        self._waiting = queue.Queue()
        for job in self._jobs.values():
            if not job.finished:
                self._waiting.put(job)

    def start(self):
        self._announce()
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def close(self):
        """From now on no job is accepted, since its answer might not be sent any more."""
        with self._changed:
            self._closed = True

    def jobs(self):
        """Every job, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def ended(self):
        """Every job that has ended, the last one to do so first; of several at once, the newest."""
        finished = [job for job in self.jobs() if job.finished]
        return sorted(finished, key=lambda job: job.ended)[::-1]

    def get(self, id):
        return self._jobs.get(id)

    def kind(self, words):
        """What a job of these words is to reach. Raises Problem if one cannot be a batch's name."""
        return KINDS[words[0]](self._site, *words[1:])

    def wait(self, job):
        """Waits for a job's end, for a moment at most; whether it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: job.finished, 0.2)

    def add(self, words, given=None):
        """A job's id, on disk when this returns, and a sentence; -1: nothing is to be done.

        `given` is the file of what came on standard input. A batch's last unfinished job is
        taken if it is the same, else the new one comes after it. Raises Problem.
        """
        kind = self.kind(words)
        kind.check(given)
        reached = not self._last_on(words) and kind.reached()
        with self._changed:
            last = self._last_on(words)  # which may have come while Open ONI was asked
            if reached and not last:
                return -1, NO_OP
            if self._closed:
                raise Problem("the agent is stopping; ask again in a moment")
            if last and last.words == words and not (last.cancelled or given):
                return last.id, "Job already in queue"
            job = self._store.add(words, given)
            self._jobs[job.id] = job
            self._waiting.put(job)
            self._announce()
            return job.id, "Job added to queue"

    def _last_on(self, words):
        """The newest unfinished job with the same words after the command's name, or None."""
        for job in reversed(self.jobs()):
            if not job.finished and job.words[1:] == words[1:]:
                return job
        return None

    def cancel(self, job):
        """Sees to it that a job ends unsuccessful; False if it has ended already. Raises Scarce."""
        with self._changed:
            if job.finished:
                return False
            if job.status == PENDING:
                self._end(job, FAILED, "cancelled before it started")
            else:
                self._change(job, cancelled=1)
            return True

    def _run(self):
        """The worker thread. The agent ends with it: else it would only seem to be at work."""
        try:
            while True:
                self._forget_old()
                job = self._waiting.get()
                if not job.finished:
                    self._perform(job)
        except Stopping:
            log.debug("the next agent takes up what manage.py had begun")
        except BaseException:
            log.critical("the worker cannot go on, and the agent ends", exc_info=True)
            os._exit(70)

    def _perform(self, job):
        """Brings a job to its end, whatever happens, but for the agent's own end.

        Wherever a cancel stops it, it is taken up anew from there, and then undone.
        """
        work = patiently(lambda: Work(job, self._store, self._site.oni, self.stopping))
        with contextlib.closing(work):
            while not job.finished:
                with contextlib.suppress(Cancelled):
                    outcome = self._outcome(work)
                    patiently(lambda: self._record(work, *outcome))

    def _outcome(self, work):
        """The status that a job is to get, and its error, which says what there is now, too.

        Raises Cancelled, Stopping, and nothing else: a fault of the agent's is the job's end.
        """
        try:
            work.take_over()
            kind = self.kind(work.job.words)
            try:
                self._reach(work, kind)
                return SUCCESSFUL, ""
            except Problem as problem:
                error = str(problem)
                never_ran = isinstance(problem, CouldNotStart) and not work.commands
            remains = kind.remains(work)
            if remains not in error:
                error = f"{error}; {remains}"
            return COULD_NOT_START if never_ran else FAILED, error
        except Exception as fault:
            log.exception("job=%d stumbled over a fault of the agent", work.job.id)
            return FAILED, f"a fault of the agent, see its log: {fault!r}"

    def _reach(self, work, kind):
        """Reaches what a job is to reach, from where the job is now, or undoes it.

        Raises Problem (in any case for a cancelled job), Cancelled, Stopping.
        """
        if work.undoing:
            try:
                work.step(kind.undo)
            except Problem as problem:
                raise Problem(f"cancelled; {problem}") from problem
            raise Problem("cancelled")
        if work.job.status == STARTED:
            try:
                work.step(kind.verify)
                return
            except Problem as problem:
                log.warning("job=%d was interrupted: %s", work.job.id, problem)
                work.note(f"interrupted: the agent went before the job's end; {problem}")
        for step in (self._begin, kind.bring, kind.verify):
            work.step(step)

    def _begin(self, work):
        """Enters that a job has begun. Raises Scarce; Problem if it has too often; Cancelled."""
        job = work.job
        if job.attempts >= MAX_ATTEMPTS:
            raise Problem(f"given up: {MAX_ATTEMPTS} times the agent was gone before its end")
        with self._changed:
            work.go_on()
            started = job.started or time.time_ns()
            self._change(job, status=STARTED, started=started, attempts=job.attempts + 1)
        log.info("job=%d command=%r begins", job.id, shlex.join(job.words))

    def _record(self, work, status, error):
        """Records the end of the job at work. Raises Scarce, Stopping; Cancelled to undo it."""
        with self._changed:
            if self.stopping.is_set() and status != SUCCESSFUL:
                raise Stopping
            work.go_on()
            self._end(work.job, status, error)

    def _end(self, job, status, error):
        """Records a job's end, and tells of it. Raises Scarce."""
        error = error.encode("utf-8", "replace").decode()  # a file's name in it may be no text
        # The agent's log, below, has it whole.
        self._change(job, status=status, error=shortened(error), ended=time.time_ns())
        level = logging.INFO if status == SUCCESSFUL else logging.WARNING
        words = shlex.join(job.words)
        log.log(level, "job=%d command=%r status=%r error=%r", job.id, words, status, error)
        self._on_end(job)

    def _change(self, job, **changes):
        """Changes a job on disk, then for all to see. Raises Scarce."""
        self._store.update(job, **changes)
        self._changed.notify_all()
        self._announce()

    def _announce(self):
        jobs = self._jobs.values()
        waiting = sum(job.status == PENDING for job in jobs)
        at_work = [
            f"{shlex.join(job.words)} (job {job.id})" for job in jobs if job.status == STARTED
        ]
        tell_systemd(f"STATUS=at work: {', '.join(at_work) or 'nothing'}; waiting: {waiting}")

    def _forget_old(self):
        horizon = time.time_ns() - KEEP_DAYS * 86400 * 10**9
        for job in self.ended()[KEEP_JOBS:]:
            if job.ended < horizon:
                with self._changed, contextlib.suppress(OSError):
                    self._store.remove(job)  # else the next time
                    del self._jobs[job.id]


# ---------------------------------------------------------------- commands

# To add a command, write a function cmd_… below and enter it with @command. It takes a Request and
# the words after the command's name; how many there may be follows from its parameters. It returns
# an Answer or raises Refused. A Problem or an OSError that it lets through becomes a refusal, too.
# A program gets the answer's keys as JSON; a person gets `key: value` for each, unless SHOWN, under
# "presentation", has a function for that key.


class Refused(Exception):
    """An error as the answer to a request: its message, and the answer's other keys."""

    def __init__(self, message: str, **others: Any) -> None:
        super().__init__(message)
        self.keys: Dict[str, Any] = {"status": "error", "message": message, **others}


class ClientGone(BaseException):
    """The client has gone away: there is nobody to answer, and nothing more to do for it.

    It is no Exception, so that no command takes it for a fault of its own.
    """


@dataclass
class Agent:
    """What commands work on."""

    settings: Settings
    site: Site
    store: JobStore
    queue: JobQueue


@dataclass
class Answer:
    """What a command answers: an object, the lines of a log, or both."""

    keys: Dict[str, Any] = field(default_factory=dict)  # none: only the lines are sent
    # Lists of lines, as they come. A person is shown them after the object.
    lines: Iterable[List[str]] = ()
    # 0 even for an error, since NCA needs that; job-wait, job-follow and batch-check may set 1.
    # job-follow sets it when the last of its lines has been read.
    exit_status: int = 0


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
            return Job(-1, ["no-op"], time.time_ns(), SUCCESSFUL)
        job = self.agent.queue.get(id)
        if not job:
            raise Refused("Job not found", job={"id": id})
        return job

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
        guess = nearly(name, COMMANDS, 0.7)
        raise Refused(f'"{name}" is not a valid command name', error=f"see help{guess}")
    return COMMANDS[name]


def answer(line: bytes, client: "Session") -> Answer:
    """Return the answer to a command line, whatever goes wrong. Raises ClientGone alone."""
    try:
        return perform(Request(client.agent, client, split_words(line)))
    except Refused as refusal:
        return Answer(refusal.keys)
    except Exception as fault:
        log.exception("a command stumbled over a fault of the agent")
        error = shortened(repr(fault))
        return Answer(Refused("A fault of the agent; its log says more", error=error).keys)


def perform(request: Request) -> Answer:
    """Return what the function of a request's command answers. Raises Refused, ClientGone."""
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
        reply = found.run(request, *arguments)
    except (Problem, OSError) as problem:
        raise Refused(found.failure.format(*arguments), error=shortened(str(problem)))
    if reply.keys:
        reply.keys = {"status": "success", **reply.keys}
    return reply


def one_by_one(command: Command, arguments: List[str]) -> str:
    """Return how a shell gives a command that takes one word several, one after the other."""
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
    if job.ended:
        shown["ended"] = timestamp(job.ended)
    return shown


def job_with_place(agent: Agent, job: Job) -> Dict[str, Any]:
    """Return a job as answers show it, with its place in the queue, or how far it is."""
    shown = job_object(job)
    if job.status == PENDING:
        shown["place"] = sum(each.id <= job.id and not each.finished for each in agent.queue.jobs())
    elif job.status == STARTED and job.words[0] == "load-batch":
        shown.update(agent.site.progress(job.words[1], job.id))
        pages, pages_loaded = shown.get("pages"), shown.get("pages_loaded")
        if pages and pages_loaded and pages_loaded < pages:
            shown["seconds_left"] = int(shown["seconds"] * (pages - pages_loaded) / pages_loaded)
    return shown


NEVER_STARTED = "Failed: this job never started."  # which NCA does not know


def job_message(job: Job) -> str:
    """Return what a job's status means, as a sentence that is true of this job."""
    if job.status == FAILED and not job.started:
        return NEVER_STARTED
    return STATUS_MESSAGES[job.status]


def job_answer(agent: Agent, job: Job) -> Dict[str, Any]:
    """Return the keys of an answer that says what has become of a job."""
    return {"message": STATUS_MESSAGES[job.status], "job": job_with_place(agent, job)}


BATCH_KEYS = (  # of a BatchState, for all to see
    "name",
    "on_disk",
    "state",
    "issues",
    "pages",
    "issues_in_batch_xml",
    "pages_in_mets",
    "pages_in_solr",
    "loaded",
)


def batch_object(held: BatchState) -> Dict[str, Any]:
    """Return a batch as answers show it; None is what was not looked at, or could not be."""
    return {key: getattr(held, key) for key in BATCH_KEYS}


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


class Trouble(NamedTuple):
    """Something that can go wrong, and whose own message does not say what to do."""

    seen: str
    meaning: str
    remedy: str


TROUBLES = (
    Trouble(
        'ONI holds 131 of the 400 issues …, and its last event is "starting load"',
        "If no job is at work on it, a load was killed; ONI itself would leave it so for ever",
        "load-batch again: the agent purges, then loads",
    ),
    Trouble(
        "2 faults in the batch's files: …; ONI was left as it is",
        "ONI would abort, or drop something without a word",
        "Mend the files named there (batch-check lists all faults), then load-batch again",
    ),
    Trouble(
        'Open ONI has no awardee "zzz"',
        "The second part of the batch's name is no awardee of ONI's",
        "ensure-awardee zzz \"'Its name'\", then load-batch again",
    ),
    Trouble(
        "ONI does not have the title sn…, nor has http…",
        "ONI cannot fetch the title's MARC record",
        "load-title < MARC.xml, then load-batch again",
    ),
    Trouble(
        "Solr lacks 12 of 400 pages",
        "The index was emptied or restored, or lost a commit",
        "load-batch again: only those pages are indexed",
    ),
    Trouble(
        "Solr has documents under its name that are none of its pages",
        "The index was restored from an older day",
        "load-batch again: they are deleted",
    ),
    Trouble(
        "Solr still has 400 of its pages, which lead nowhere",
        "Solr was down during a purge",
        "purge-batch again",
    ),
    Trouble(
        "… pages are found under another batch",
        "Two batches have the same pages; the one that was indexed last is found",
        "Purge the batch that should not have them",
    ),
    Trouble(
        "Failed to connect to server at …solr…, Solr cannot be asked",
        "Solr is down",
        "Start it, then job-retry",
    ),
    Trouble(
        "Open ONI cannot answer: OperationalError: …",
        "The database is down, or ONI's settings for it do not reach the agent",
        "Sites that configure ONI by environment put ONI_DB_… into the agent's, too",
    ),
    Trouble(
        "Open ONI did not answer within 10 s",
        "Database or host are overloaded, or a lock is held",
        "Ask again; jobs wait longer by themselves",
    ),
    Trouble(
        "the file system of the batches did not answer",
        "The mount of BATCH_SOURCE hangs",
        "Look at the file server; all else goes on",
    ),
    Trouble(
        "exit status 1: … Permission denied …; the batch is complete",
        "ONI could not write its cache, since the agent does not run as the site's user",
        "Run it as that user; the batch needs no new load",
    ),
    Trouble(
        "what ONI holds of the batch now is not known",
        "The database went away during the job",
        "When it is back: batch-status, or just load-batch again",
    ),
    Trouble(
        "given up: 3 times the agent was gone before its end",
        "Host or agent went down in each attempt, or the job brings them down",
        "Look at memory and the kernel's log, then job-retry",
    ),
    Trouble(
        "killed by signal 9 (SIGKILL)",
        "Often it was the kernel, for want of memory: journalctl -k -g oom",
        "Give the host more memory, then load-batch again",
    ),
    Trouble(
        "removing …, a leftover link to …",
        "A killed load of another copy left a link that ONI would follow",
        "Nothing is to be done",
    ),
)


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
        return Answer({"troubles": [trouble._asdict() for trouble in TROUBLES]})
    if name:
        found = find_command(name)
        return Answer({"commands": [command_object(found)]}, [found.example.splitlines()])
    return Answer(
        {
            "commands": [command_object(each) for each in COMMANDS.values()],
            "hint": "`help COMMAND` shows a command at work, `help problems` says what can go"
            " wrong. `ssh oni` stands for `ssh -t -p 2222 nobody@HOST`.",
        }
    )


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
    help="Loads or updates titles from MARC XML on standard input, as a job.",
    misuse='"load-title" takes no arguments; the MARC XML comes on standard input',
    failure="Invalid data",
    example="""
    $ ssh oni load-title < herald.xml
    {"status":"success","message":"Job added to queue","job":{"id":3},"session":{"id":5}}
    """,
)
def cmd_load_title(request: Request) -> Answer:
    return request.submit_with_input(["load-title"], MAX_PAYLOAD)


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
        is_new = request.agent.site.oni.ask("awardee", code, name)
    except Problem as problem:
        error = shortened(str(problem))
        raise Refused("Unable to create awardee", error=error, org_code=code, name=name)
    return Answer({"message": "Awardee created" if is_new else "Awardee already exists"})


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


NEWEST_JOBS = 50  # that a person is shown who says no number


@command(
    usage="list-jobs [BATCH] [STATUS...] [LIMIT]",
    help="Lists jobs, oldest first: those on a batch, those that are pending, started,"
    " successful, failed, the newest LIMIT.",
    example="""
    $ ssh oni list-jobs failed
    Jobs: 1
       6  failed 1 s         load-batch batch_oru_hole_ver01  0 s ago, 15:30 UTC
           1 fault in the batch's files:
           data/sn99990001/print/1920010201/1920010201.xml: the edition is '': ONI
           would leave this issue out; ONI was left as it is
    $ ssh oni list-jobs batch_oru_small_ver01 successful 2
    Jobs: 2
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
       5  successful 2 s     batch-patch batch_oru_small_ver01 batch_oru_small_ver02
           0 s ago, 15:30 UTC
    These are the newest of 4 jobs; a larger number shows more.
    """,
)
def cmd_list_jobs(request: Request, *words: str) -> Answer:
    batches: List[str] = []
    statuses: List[str] = []
    limit = NEWEST_JOBS if request.client.width else None  # None: programs get all
    for word in words:
        if word in STATUS_MESSAGES:
            statuses.append(word)
        elif BATCH_NAME.fullmatch(batch_name(word)):
            batches.append(batch_name(word))
        elif re.fullmatch("[1-9][0-9]{0,8}", word):
            limit = int(word)
        else:
            known = ", ".join(STATUS_MESSAGES)
            error = f"write the name of a batch, a status ({known}), or a number of jobs"
            raise Refused(f'"{word}" is not a job status', error=error)
    jobs = jobs_that_match(request.agent.queue.jobs(), batches, statuses)
    newest = jobs if limit is None else jobs[-limit:]
    keys: Dict[str, Any] = {"jobs": [job_object(job) for job in newest]}
    if len(newest) < len(jobs):
        keys["jobs_in_all"] = len(jobs)
        keys["hint"] = f"These are the newest of {len(jobs)} jobs; a larger number shows more."
    return Answer(keys)


def jobs_that_match(jobs: List[Job], batches: List[str], statuses: List[str]) -> List[Job]:
    """Return the jobs on one of these batches and of one of these statuses; none of them: all."""
    if batches:
        jobs = [job for job in jobs if not set(batches).isdisjoint(job.words)]
    if statuses:
        jobs = [job for job in jobs if job.status in statuses]
    return jobs


NO_JOB_ID = "You must supply a job ID"


@command(
    usage="job-status ID",
    help="Says what has become of a job: its place in the queue, or how far a running load is.",
    misuse='"job-status" takes one job ID',
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-status 6
    Failed: this job started but returned a non-zero exit code.
       6  failed 1 s         load-batch batch_oru_hole_ver01  0 s ago, 15:30 UTC
           1 fault in the batch's files:
           data/sn99990001/print/1920010201/1920010201.xml: the edition is '': ONI
           would leave this issue out; ONI was left as it is
    """,
)
def cmd_job_status(request: Request, id: str) -> Answer:
    return Answer(job_answer(request.agent, request.job(id)))


@command(
    usage="job-wait ID...",
    help="Answers as job-status when all these jobs have ended; the exit status is 1 if one was"
    " unsuccessful.",
    missing=NO_JOB_ID,
    example="""
    $ ssh oni job-wait 4 6
    Failed: 1 of these 2 jobs did not succeed.
    Jobs: 2
       4  successful 2 s     load-batch batch_oru_small_ver01  0 s ago, 15:30 UTC
       6  failed 1 s         load-batch batch_oru_hole_ver01  0 s ago, 15:30 UTC
           1 fault in the batch's files:
           data/sn99990001/print/1920010201/1920010201.xml: the edition is '': ONI
           would leave this issue out; ONI was left as it is
    """,
)
def cmd_job_wait(request: Request, id: str, *more_ids: str) -> Answer:
    jobs = [request.job(each) for each in (id, *more_ids)]
    for job in jobs:
        wait_for_end(request, job)
    return ends_answer(request.agent, jobs)


def wait_for_end(request: Request, job: Job) -> None:
    """Wait until a job has ended, and show a person how far it is. Raises ClientGone."""
    while not request.agent.queue.wait(job):
        request.client.hear()
        if request.client.colour:
            show_progress(job_with_place(request.agent, job), request.client)


def ends_answer(agent: Agent, jobs: List[Job]) -> Answer:
    """Return the answer about the ends of jobs, with exit status 1 if one was unsuccessful."""
    unsuccessful = sum(job.status != SUCCESSFUL for job in jobs)
    exit_status = int(unsuccessful > 0)
    if len(jobs) == 1:
        return Answer(job_answer(agent, jobs[0]), exit_status=exit_status)
    if unsuccessful:
        message = f"Failed: {unsuccessful} of these {len(jobs)} jobs did not succeed."
    else:
        message = f"Success: these {len(jobs)} jobs are complete."
    keys = {"message": message, "jobs": [job_object(job) for job in jobs]}
    return Answer(keys, exit_status=exit_status)


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
    skip = lines_to_skip(request, job, count)
    reader = LogReader(request.agent.store.log(job), skip=skip)
    followed = Answer()

    def lines() -> Iterator[List[str]]:
        while not request.agent.queue.wait(job):
            request.client.hear()
            yield from reader.read(False)
        yield from reader.read(True)
        followed.exit_status = int(job.status != SUCCESSFUL)

    followed.lines = lines()
    return followed


def lines_to_skip(request: Request, job: Job, count: str) -> int:
    """Return how many lines of a job's log come before the last `count`; "" is for all.

    Raises Refused if `count` is no number.
    """
    if not count:
        return 0
    if not re.fullmatch("[0-9]{1,9}", count):
        raise Refused(f'"{count}" is not a number of lines')
    reader = LogReader(request.agent.store.log(job))
    in_all = 0
    for lines in reader.read(job.finished):
        in_all += len(lines)
    return max(0, in_all - int(count))


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
    path = request.agent.store.log(job)
    skip = lines_to_skip(request, job, count)

    def read(*kinds: str) -> Iterator[List[str]]:
        lines: Iterator[List[str]] = LogReader(path, *kinds, skip=skip).read(job.finished)
        return lines

    shown = {**job_object(job), "stdout": read(STDOUT, NOTE), "stderr": read(STDERR)}
    return Answer({"job": shown}, read())


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
        raise Refused("The job has ended already", error=job_message(job), job=job_object(job))
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
        raise Refused(
            "Only a failed job can be retried", error=job_message(job), job=job_object(job)
        )
    given = request.agent.store.input(job) if kind.takes_input else None
    retried = request.submit(job.words, given)
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
    return Answer({"batches": [batch_object(state) for state in request.agent.site.batches()]})


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
    site.folder(name)
    state = site.batch(name)
    if not state.row and not state.pages_in_solr:
        site.must_be_there(name)
    message = str(state)
    jobs = jobs_that_match(request.agent.queue.jobs(), [name], [])
    for job in jobs:
        if job.status == STARTED:
            message = f"job {job.id} is at work on it; {message}"
    return Answer(
        {
            "message": message,
            "batch": batch_object(state),
            "events": state.events,
            "jobs": [job_object(job) for job in jobs[-10:]],
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
    Faults: 2
    fault: data/sn99990001/print/1930010201/1930010201.xml: page 2 has the sequence
           '': ONI would leave it out
    fault: data/sn99990001/print/1930010301/0002.xml: no such file or directory: ONI
           could not index this page
    Warnings: 0
    """,
)
def cmd_batch_check(request: Request, word: str) -> Answer:
    name = batch_name(word)
    site = request.agent.site
    site.must_be_there(name)

    def go_on(*_progress: Any) -> None:
        request.client.hear()

    found = site.check(name, go_on, go_on)
    what = faults_in(found) if found.faults else "Nothing"
    return Answer(
        {
            "message": f"{what} would keep Open ONI from loading all of this batch",
            "batch": {"name": name},
            "faults": [with_short_text(each, "fault") for each in found.faults],
            "warnings": [with_short_text(each, "warning") for each in found.warnings],
        },
        exit_status=int(bool(found.faults)),
    )


def with_short_text(finding: Dict[str, str], key: str) -> Dict[str, str]:
    """Return a finding of a check, its text under `key` shortened."""
    return {**finding, key: shortened(finding[key])}


BEGAN = time.monotonic()


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
    jobs = agent.queue.jobs()
    return Answer(
        {
            "version": VERSION,
            "uptime": int(time.monotonic() - BEGAN),
            "oni": {"location": str(agent.site.oni.location), **agent.site.health()},
            "at_work": [job_with_place(agent, job) for job in jobs if job.status == STARTED],
            "waiting": [job_object(job) for job in jobs if job.status == PENDING],
            "ended": [job_object(job) for job in agent.queue.ended()[:50]],
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

# DEL, C1, the line separators, and what changes the direction of text. JSON need not escape them,
# but a terminal is often at the other end of a pipe.
HAZARDS = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def safe_json(text: str) -> str:
    """Return JSON with everything escaped that would do something to a terminal."""
    if text.isascii():  # nearly all is, and then this takes no time
        return text.replace("\x7f", "\\u007f")
    return HAZARDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def plain(text: str) -> str:
    """Return a text with its tabs as blanks, and visible escapes for all that cannot be printed."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else escaped(each) for each in text.replace("\t", "    ")
    )


def escaped(character: str) -> str:
    """Return a character as Python's literals name it."""
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# What moves a terminal's cursor, changes its colours, or turns the order of what is shown.
CONTROLS = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)


def harmless(line: str) -> str:
    """Return a line of a log with its control characters written out, but for the tabs."""
    return CONTROLS.sub(lambda found: escaped(found[0]), line)


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
    """Return a length of time in words."""
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


def look_row(look: Dict[str, Any]) -> Row:
    return Row(f"{'✓' if look['well'] else '✗'} {look['name']}: {look['found']}")


def trouble_row(trouble: Dict[str, str]) -> Row:
    return Row(trouble["seen"], f"{trouble['meaning']}. {trouble['remedy']}.")


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
    if id < 0:
        return Row("")
    if "words" not in job:
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
    "retry_of": retry_row,
    "events": event_row,
    "faults": fault_row,
    "warnings": warning_row,
    "looks": look_row,
    "batches": batch_row,
    "job": job_row,
    "jobs": job_row,
    "at_work": job_row,
    "waiting": job_row,
    "ended": job_row,
}
UNCOUNTED = ("commands", "troubles")  # nobody wants to know how many there are
HIDDEN = ("status", "batch", "jobs_in_all")  # the message or the hint says it


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


def as_told_a_person(keys: Dict[str, Any]) -> Dict[str, Any]:
    """Return an answer's keys without a message that NCA needs and that would mislead a person."""
    job = keys.get("job", {})
    if keys.get("message") == STATUS_MESSAGES[FAILED] and "started" not in job:
        return {**keys, "message": NEVER_STARTED}
    return keys


def answer_lines(keys: Dict[str, Any], width: int, most: Optional[int] = None) -> List[str]:
    """Return an answer's object as lines of at most `width` characters."""
    rows = answer_rows(as_told_a_person(keys), most)
    return [line for row in rows for line in laid_out(row, width)]


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


# The board and the bar: what needs keys and a clock.


def show_progress(job: Dict[str, Any], terminal: "Session") -> None:
    """Show how far a job is on one line, which the next time, or the answer, overwrites."""
    terminal.send(f"\x1b[K{progress_line(job, terminal.width)}\r")


def show_board(terminal: "Session") -> Answer:
    """Draw the board anew each second, until q or Ctrl-C, and return its newest answer."""
    terminal.send("\x1b[?1049h\x1b[?25l")  # another screen, and no cursor
    with_keys = False
    with contextlib.suppress(ClientGone):  # by Ctrl-C, maybe
        while True:
            reply = answer(b"board", terminal)
            lines = board_lines(reply.keys, terminal.width, terminal.height, with_keys)
            text = "".join(f"\x1b[K{coloured(line)}\r\n" for line in lines)
            footer = BOARD_FOOTER[: terminal.width]
            terminal.send(f"\x1b[H{text}\x1b[J\x1b[{terminal.height}H{footer}")
            typed = terminal.hear(1)
            if b"q" in typed or b"\x04" in typed:
                break
            if b"?" in typed:
                with_keys = not with_keys
    terminal.send("\x1b[?25h\x1b[?1049l")
    return reply


# ---------------------------------------------------------------- SSH server

# To be used, where paramiko has them, in the client's order. Every client of today has one of each.
ALGORITHMS = {
    "mlkem768x25519-sha256",
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
}
TRAILER = b"\n\nEND\n"  # ends what comes on standard input; so does its end
GONE = (ClientGone, OSError, EOFError, paramiko.SSHException)  # what is raised when a client left
SESSION_NUMBERS = itertools.count(1)


def load_host_key(path):
    """The ed25519, ECDSA or RSA key in a file; None if there is no file. Raises Problem."""
    if not os.path.lexists(path):
        return None
    try:
        read_regular(path)
    except Problem as problem:
        raise Problem(f"HOST_KEY_FILE is {path}, which cannot be used: {problem}") from problem
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        with contextlib.suppress(Exception):  # paramiko tells a foreign file in many ways
            return kind(filename=path)
    raise Problem(
        f"HOST_KEY_FILE is {path}, which holds no ed25519, ECDSA or RSA key without a passphrase;"
        " it was left as it is"
    )


def make_host_key(path):
    """A new ed25519 key, written to a file, and its public half beside it. Raises Problem."""
    private = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, buffering=0) as file:  # mode 0600
            file.write(private)
            sync(file.name)
            key = paramiko.Ed25519Key(filename=file.name)
            public = f"{key.get_name()} {key.get_base64()} oni-agent\n"
            Path(f"{path}.pub").write_text(public)
            os.link(file.name, path)  # under its name only when whole
            return key
    except OSError as error:
        raise Problem(f"the HOST_KEY_FILE {path} cannot be made: {error.strerror}") from error


# Stands for the lines of a log while the rest of an answer is encoded.
LINES_HERE = f"lines {os.urandom(16).hex()}"


def encoded(keys):
    """An answer as JSON, in pieces. The lines of a log, maybe many, are encoded when read."""
    logs = []

    def later(lines):
        logs.append(lines)
        return [LINES_HERE]

    compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=later)
    before, *parts = f"{safe_json(compact.encode(keys))}\n".split(f'"{LINES_HERE}"')
    yield before
    for lines, after in zip(logs, parts):
        comma = ""
        for some in lines:
            yield ""  # so that it is noticed if the client has gone
            if some:
                yield comma + safe_json(compact.encode(some)[1:-1])
                comma = ","
        yield after


class ClientSocket(socket.socket):
    """An accepted socket as paramiko uses it.

    paramiko asks for more only when it has dealt with, and answered, the last message: the moment
    to begin a command, whose answer must not overtake the reply to its request.
    """

    requested = None  # the session whose request paramiko is about to answer

    def recv(self, size):
        """Receives, and acknowledges at once: OpenSSH's next packet waits for that (Nagle)."""
        if self.requested:
            self.requested.start()
            self.requested = None
        if size > MAX_PACKET:  # paramiko would believe, and hold, any length
            raise EOFError
        data = super().recv(size)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


class Connection(paramiko.ServerInterface, paramiko.Transport):
    """One client's connection: paramiko's thread for it, which asks itself what is allowed."""

    def __init__(self, agent, host_key, accepted, address):
        super().__init__(
            ClientSocket(fileno=accepted.detach()),
            disabled_algorithms={"keys": ["ssh-rsa"], "pubkeys": ["ssh-rsa"]},  # SHA-1
        )
        self.agent = agent
        self.address = show_address(address)
        self.admitted = "ALLOW_FROM" if agent.settings.allow_from else "anyone"
        self.idle_since = time.monotonic()
        self._sessions = []
        self._host = host_of(address)
        # paramiko would have a timer thread for each, which goes on when the client has gone.
        self.packetizer.start_handshake = lambda timeout: None
        self.local_version = f"SSH-2.0-ONI_Agent_{VERSION}"
        self.add_server_key(host_key)
        options = self.get_security_options()
        for kind in ("kex", "ciphers", "digests"):
            setattr(options, kind, sorted(ALGORITHMS.intersection(getattr(options, kind))))
        self.start_server(event=threading.Event(), server=self)

    # What paramiko asks and tells, on the connection's thread: no work here.

    def get_allowed_auths(self, username):
        return "publickey"  # whatever key that is, where there are no AUTHORIZED_KEYS

    def check_auth_publickey(self, username, key=None):
        keys_file = self.agent.settings.authorized_keys
        if not keys_file:
            return paramiko.AUTH_SUCCESSFUL
        if key:
            self.admitted = fingerprint(key)
            if key_is_authorized(keys_file, key, self._host):
                return paramiko.AUTH_SUCCESSFUL
            log.warning(
                "connection from=%s user=%r refused key=%s", self.address, username, self.admitted
            )
        return paramiko.AUTH_FAILED

    check_auth_none = check_auth_publickey  # without a key

    def check_channel_request(self, kind, chanid):
        if kind != "session":
            return paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        self._sessions = [
            each for each in self._sessions if each.is_alive() or not each.channel.closed
        ]
        if len(self._sessions) >= MAX_CHANNELS:
            return paramiko.OPEN_FAILED_RESOURCE_SHORTAGE
        return paramiko.OPEN_SUCCEEDED

    def _queue_incoming_channel(self, channel):
        """A channel is open. paramiko itself would keep each for ever, for accept()."""
        channel.session = Session(channel)
        self._sessions.append(channel.session)

    def check_channel_pty_request(self, channel, term, width, height, *_):
        channel.session.colour = term not in (b"", b"dumb")
        return self.check_channel_window_change_request(channel, width, height)

    def check_channel_window_change_request(self, channel, width, height, *_):
        # 0 is said by a client whose own input is no terminal.
        channel.session.width = max(20, min(width or 80, 500))
        channel.session.height = min(height or 24, 500)
        return True

    def check_channel_exec_request(self, channel, command=b""):
        session = channel.session
        if session.line is not None or len(alive(Session)) >= MAX_SESSIONS:
            return False  # RFC 4254, 6.5: one to a channel
        session.line = command
        self.sock.requested = session
        return True

    check_channel_shell_request = check_channel_exec_request  # no shell, but an answer


class Session(threading.Thread):
    """A channel, and the one command on it, from its words to the last byte of its answer.

    As the presentation uses it, it is the terminal at the channel's other end.
    """

    line = None  # bytes; until there is a command
    width = 0  # of a person's terminal, if there is one; then it has a height, too
    colour = False

    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.agent = channel.transport.agent

    def run(self):
        """Answers, and closes the channel in the order that loses nothing."""
        connection = self.channel.transport
        number = next(SESSION_NUMBERS)
        begun = time.monotonic()
        status = "client went away"
        try:
            with contextlib.suppress(*GONE), self.channel:
                reply = self._answer(number)
                status = reply.keys.get("status", "followed")
                self.channel.send_exit_status(reply.exit_status)
        except Exception:
            log.exception("a session stumbled over a fault of the agent")
        connection.idle_since = time.monotonic()
        log.info(
            "session=%d from=%s user=%r admitted=%s command=%r status=%r ms=%d",
            number,
            connection.address,
            connection.auth_handler.get_username(),
            connection.admitted,
            self.line[:200].decode("utf-8", "replace"),
            status,
            (time.monotonic() - begun) * 1000,
        )

    def _answer(self, number):
        """Sends a person or a program the answer, and gives the Answer.

        Nothing else holds it, so the logs that it was read from are let go of with it.
        """
        line = self.line
        if self.width and line.strip() in (b"", b"board"):
            if self.colour:
                return show_board(self)
            line = b"board"  # once: a terminal without escapes cannot draw it anew
        reply = answer(line, self)
        if self.width:
            texts = answer_text(reply, self.width, self.colour)
        elif reply.keys:
            texts = encoded({**reply.keys, "session": {"id": number}})
        else:
            texts = ("".join(f"{harmless(line)}\n" for line in lines) for lines in reply.lines)
        for text in texts:
            self.send(text)
        return reply

    def send(self, text):
        """Sends text to the client. Raises ClientGone, OSError, EOFError, SSHException."""
        if self.channel.closed:
            raise ClientGone
        self.channel.settimeout(STALL_SECONDS)
        # A view: paramiko copies what is left to send each time it has sent some.
        self.channel.sendall(memoryview(text.encode("utf-8", "replace")))

    def hear(self, seconds=0):
        """What comes on standard input in so many seconds; Ctrl-D when it has ended.

        Raises ClientGone if the client has closed its channel, or a person typed Ctrl-C.
        """
        self.channel.settimeout(seconds)
        try:
            typed = self.channel.recv(1024)
        except socket.timeout:
            return b""
        if self.channel.closed or (self.width and b"\x03" in typed):
            raise ClientGone
        return typed or b"\x04"

    def read_input(self, into, limit):
        """Copies standard input to its trailer or its end. Raises ClientGone, Problem."""
        if self.width:
            raise Problem("this command reads a file: give it < FILE, and leave out -t")
        try:
            copy_input(self.channel, into, limit)
        except socket.timeout:
            raise Problem(
                "standard input gave nothing for too long and has not ended: close it, or send"
                " an empty line and END"
            )
        except EOFError:  # paramiko could not ask for more
            raise ClientGone
        except OSError as error:
            raise Problem(f"{into.name} cannot be written: {error}") from error


def copy_input(channel, into, limit):
    """Copies what a client sends, to its trailer or its end, into a file that has no buffer.

    Raises ClientGone, Problem, socket.timeout, and OSError for the file.
    """
    channel.settimeout(STALL_SECONDS)
    tail = b""  # of what has come, which may be the trailer
    while piece := channel.recv(CHUNK):
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


def serve(agent, host_key, listener, stop):
    """Serves until `stop` can be read, then lets answers under way end, for a moment."""
    while stop not in (ready := select.select([listener, stop], [], [], 1)[0]):
        if ready:
            accept(agent, host_key, listener)
        drop_idle(len(alive(Connection)) - MAX_CONNECTIONS)
    log.info("stopping on %s", signal_name(stop.recv(1)[0]))
    agent.queue.stopping.set()
    listener.close()
    wait_for_answers(STOP_SECONDS)
    agent.queue.close()
    wait_for_answers(0.5)  # to the last requests that were accepted


def accept(agent, host_key, listener):
    """Takes a connection, if its client may connect."""
    try:
        accepted, address = listener.accept()
    except OSError as error:
        log.error("a connection could not be taken: %s", error)
        drop_idle(1)
        time.sleep(0.1)  # out of descriptors, say: the loop must not spin
        return
    host = host_of(address)
    allowed = agent.settings.allow_from
    # It may be gone already, or there is no thread to be had.
    with accepted, contextlib.suppress(RuntimeError, *GONE):
        if not allowed or any(host in network for network in allowed):
            Connection(agent, host_key, accepted, address)
        else:
            log.warning("connection from=%s refused='not in ALLOW_FROM'", host)


def alive(kind):
    """The threads of a kind: Connections that are open, or Sessions that are at work."""
    return {each for each in threading.enumerate() if isinstance(each, kind)}


def at_work():
    """The connections on which a command is at work, or about to begin."""
    about_to = {each for each in alive(Connection) if each.sock.requested}
    return about_to | {session.channel.transport for session in alive(Session)}


def drop_idle(surplus):
    """Ends connections that have been without a command for too long, and the `surplus` that have
    been so longest, however long that is.
    """
    if surplus > 0:
        log.warning("too many connections: %d that have been idle longest are ended", surplus)
    idle = sorted(alive(Connection) - at_work(), key=lambda each: each.idle_since)
    for number, connection in enumerate(idle):
        if number < surplus or time.monotonic() - connection.idle_since > IDLE_SECONDS:
            connection.packetizer.close()  # its thread sees that, and ends


def wait_for_answers(seconds):
    """Waits until the clients of all commands at work have left with their answers."""
    until = time.monotonic() + seconds
    for connection in at_work():
        connection.join(max(0, until - time.monotonic()))


def listen(host, port):
    """A listening socket; on every address, IPv6 too, if `host` is empty. Raises Problem."""
    everywhere = host in ("", "::") and socket.has_dualstack_ipv6()
    name = "::" if everywhere else host or "0.0.0.0"
    try:
        family = socket.getaddrinfo(name, port)[0][0]
        listener = socket.create_server(
            (name, port), family=family, backlog=512, dualstack_ipv6=everywhere
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a host's name
        # Its first argument may be a number, its last one is in words.
        raise Problem(f"BA_BIND: nothing can listen on {host}:{port}: {error.args[-1]}") from error
    # Accepted sockets inherit these.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # paramiko would wait for ever for a client that has vanished.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALL_SECONDS * 1000)
    return listener


def host_of(address):
    """The IP address in a socket's address; an IPv4 one as such, though it came over IPv6."""
    host = ipaddress.ip_address(address[0])
    return getattr(host, "ipv4_mapped", None) or host


def show_address(address):
    """A socket's address as people write it."""
    host = host_of(address)
    return f"[{host}]:{address[1]}" if host.version == 6 else f"{host}:{address[1]}"


def fingerprint(key):
    """A public key as ssh-keygen -l shows it."""
    digest = base64.b64encode(hashlib.sha256(key.asbytes()).digest())
    return "SHA256:" + digest.decode().rstrip("=")


def key_is_authorized(path, key, host):
    """Whether an authorized_keys file (sshd(8)) admits a key from an address.

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
    """A user as whom the agent may run; one without an entry in passwd has its number as name."""

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
    """Return the user that the ONI site in `location` runs as; None if root is to stay who it is.

    That is also the answer for whoever is not root. The site's user owns the word coordinates, or
    the cache, which the web server writes, too: the website breaks if those become root's.
    """
    if os.geteuid():
        return None
    storage = Path(os.environ.get("ONI_STORAGE_PATH") or location / "data")
    coordinates = storage / "word_coordinates"
    owner = owner_among([coordinates])
    if owner:
        return owner
    tree = [storage, location / "log", location]
    somebody = owner_among(tree)
    if coordinates.exists() and not somebody:
        return None  # all is root's
    return owner_among(shared_folders(location, somebody)) or owner_among(tree[:2])


def shared_folders(location: Path, account: Optional[Account]) -> List[Path]:
    """Return the folders that the website writes, as ONI's settings say; [] if ONI does not answer.

    ONI is asked as `account`, by a process of its own: what ONI writes meanwhile, such as a log, is
    not root's then.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):  # then there is no answer
            if account:
                become(account)
            oni = OpenONI(location, os.environ)
            folders = oni.ask("folders", within=PATIENT_SECONDS)
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
    """Turn this process, which is root's, into one of another user's, for good.

    manage.py and ON_FINISH then get that user's HOME and USER. Raises Problem.
    """
    try:
        if account.name.isdigit():
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
    """Give a state folder that is not `account`'s to it, and all that it holds. Raises Problem.

    Links are not followed: what is in the folder may be somebody else's work.
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


class Look(NamedTuple):
    """What came of a look at one thing: whether it is well, and a sentence about it."""

    name: str
    well: bool
    found: str

    def __str__(self) -> str:
        return f"{self.name}: {self.found}"


def look_at(name: str, advice: str, look: Callable[..., object], *about: Any) -> Look:
    """Call the function `look` with `about`, and return what it finds as a Look.

    If it raises, whatever that is, the thing is not well, and `advice` says what to do.
    """
    try:
        return Look(name, True, str(look(*about)))
    except Exception as problem:
        return Look(name, False, f"{problem}; {advice}")


def looks_at_oni(oni: OpenONI, within: float) -> Iterator[Look]:
    """Look at Open ONI: whether it answers, each question in so many seconds; where loads write."""
    advice = "run it by hand, as the agent's user"
    yield look_at("manage.py check", advice, lambda: oni.ask("check", within=within))
    try:
        batches = oni.ask("batch_count", within=within)
        folders = oni.ask("folders", within=within)
    except (Problem, OSError) as problem:
        yield Look("database", False, f"{problem}; see ONI's database settings")
        return
    yield Look("database", True, f"{batches} batches")
    advice = "see ONI's SOLR_BASE_URL; loads and purges will fail"
    yield look_at("Solr", advice, lambda: f"{oni.ask('documents', within=within)} pages")
    advice = "load Open ONI's own fixtures (manage.py loaddata languages countries awardees)"
    tables = lambda: filled(oni.ask("look_up_tables", within=within))
    yield look_at("look-up tables", advice, tables)
    for name, (folder, is_shared) in folders.items():
        yield look_at(
            f"ONI's {name}", "loads will fail", writable, oni.location / folder, is_shared
        )


def filled(tables: Dict[str, int]) -> str:
    """Say how many rows each table has. Raises Problem if one is empty."""
    empty = [name for name, rows in tables.items() if not rows]
    if empty:
        raise Problem(f"there are no {' and no '.join(empty)}, and loads will fail")
    return ", ".join(f"{rows} {name}" for name, rows in tables.items())


def writable(folder: Path, is_shared: bool = False) -> str:
    """Try to write to a folder, through links, and say where that is, whose, and its free space.

    One that is shared with the website may be yet to be made, and must not be another user's.
    Raises Problem.
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


def look_at_visitors(settings: Settings) -> Look:
    """Look at who may connect."""
    name = "who may connect"
    keys = f"who has a key of {settings.authorized_keys}" if settings.authorized_keys else ""
    hosts = f"from {', '.join(map(str, settings.allow_from))}" if settings.allow_from else ""
    if not settings.admits_everybody:
        return Look(name, True, " ".join(filter(None, [keys, hosts])))
    host, port = settings.ba_bind
    if is_own_address(host):
        return Look(name, True, "whoever is on this host")
    found = f"whoever reaches port {port} of this host may load and purge"
    advice = "set ALLOW_FROM or AUTHORIZED_KEYS (in an EnvironmentFile= without `export`)"
    return Look(name, False, f"{found}; {advice}")


def is_own_address(host: str) -> bool:
    """Tell whether only this host itself can reach what listens on an address of its."""
    try:
        found = socket.getaddrinfo(host, None) if host else []
    except OSError:
        return False
    return bool(found) and all(host_of(address[4]).is_loopback for address in found)


def look_at_source(settings: Settings) -> Look:
    """Look at the folder of the batches."""
    count = lambda: f"{len(in_time(lambda: os.listdir(str(settings.batch_source))))} entries"
    return look_at("batch source", f"let {user_name(os.geteuid())} read it", count)


def look_at_algorithms() -> Look:
    """Look at what can be offered to SSH clients, of each kind of algorithm."""

    def offered() -> str:
        kinds = {
            "key exchange": paramiko.Transport._preferred_kex,
            "ciphers": paramiko.Transport._preferred_ciphers,
            "MACs": paramiko.Transport._preferred_macs,
        }
        for kind, names in kinds.items():
            if not ALGORITHMS.intersection(names):
                raise Problem(f"this host's cryptography leaves no {kind} to offer")
        return ", ".join(sorted(ALGORITHMS.intersection(kinds["key exchange"])))

    return look_at("algorithms", "no client could connect; see the host's FIPS settings", offered)


def look_at_user() -> Look:
    """Say as whom the agent runs, and how it is confined, as the kernel tells it."""
    groups = ", ".join(str(group) for group in sorted({os.getegid(), *os.getgroups()}))
    found = f"{user_name(os.geteuid())} (groups {groups})"
    try:
        status = Path("/proc/self/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    except OSError:
        return Look("user and sandbox", True, found)
    if fields.get("NoNewPrivs") == "1":
        found += ", no new privileges"
    if fields.get("Seccomp") == "2":
        found += ", system calls filtered"
    if not int(fields.get("CapEff", "1"), 16):
        found += ", no capabilities"
    if os.statvfs("/").f_flag & os.ST_RDONLY:
        found += ", read-only root"
    return Look("user and sandbox", True, found)


def look_at_last_job(agent: Agent) -> Look:
    """Say what became of the job that ended last; it may have failed, and all be well here."""
    ended = agent.queue.ended()
    if not ended:
        return Look("last job", True, "none has ended")
    job = ended[0]
    when = timestamp(job.ended)[:19] + "Z"
    return Look("last job", True, f"{job.id}, {shlex.join(job.words)}: {job.status} at {when}")


def looks_inside(agent: Agent) -> Iterator[Look]:
    """Look at all that a running agent needs, as its own user and from inside its sandbox."""
    yield look_at_user()
    yield look_at_visitors(agent.settings)
    yield look_at_algorithms()
    yield look_at("state folder", "", writable, agent.settings.state_directory)
    yield look_at_source(agent.settings)
    yield from looks_at_oni(agent.site.oni, ANSWER_SECONDS)
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
    looks = list(looks_inside(request.agent))
    wrong = [look.name for look in looks if not look.well]
    message = f"not well: {', '.join(wrong)}" if wrong else "All is well"
    return Answer(
        {"message": message, "looks": [look._asdict() for look in looks]},
        exit_status=int(bool(wrong)),
    )


def looks_from_outside(settings: Settings, account: Optional[Account]) -> Iterator[Look]:
    """Look at all that an agent needs, before one runs; as `account`, if this is root."""

    def state() -> str:
        if (settings.state_directory / "jobs.db").exists():
            return f"{len(JobStore(settings.state_directory).jobs())} jobs"
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

    yield look_at("state folder", "if an agent is at work there, ask that instead", state)
    yield look_at("host key", "see HOST_KEY_FILE", host_key)
    yield look_at("address", "set BA_BIND to a free port", address)
    yield look_at_visitors(settings)
    yield look_at_algorithms()
    if account:
        become(account)
    yield look_at_user()
    yield look_at_source(settings)
    oni = OpenONI(settings.oni_location, os.environ)
    yield from looks_at_oni(oni, PATIENT_SECONDS)
    oni.close()


def look_once(oni: OpenONI) -> None:
    """Say in the log how Open ONI is; one that does not answer is no reason not to serve."""
    for look in looks_at_oni(oni, PATIENT_SECONDS):
        tell = log.info if look.well else log.warning
        tell("Open ONI in %s: %s", oni.location, look)


def check_all() -> int:
    """Print how all is that the agent needs, a line each; return 1 if something is not well."""
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
    for look in looks_from_outside(settings, site_account(settings.oni_location)):
        print("✓" if look.well else "✗", look)
        if not look.well:
            exit_status = 1
    return exit_status


# ---------------------------------------------------------------- main


class JournalFormatter(logging.Formatter):
    """A log line as the journal takes it (sd-daemon(3)): a priority in front, and no time."""

    def format(self, record: logging.LogRecord) -> str:
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
        return re.sub("(?m)^", f"<{priority}>", super().format(record))


def set_up_logging(level: str) -> None:
    """Send the log to stderr, with priorities where that is systemd's journal."""
    others = "DEBUG" if level == "DEBUG" else "CRITICAL"  # paramiko, that is
    logging.basicConfig(level=others, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(level)
    if stderr_is_journal():
        logging.root.handlers[0].setFormatter(JournalFormatter())


def tell_systemd(state: str) -> None:
    """Say how the service is (sd_notify(3)), where systemd wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), re.sub("^@", "\0", address))


ASIDE = futures.ThreadPoolExecutor(8)  # for what nobody waits for
MAX_VARIABLE = 2048  # bytes of the error that ON_FINISH is told: the kernel bounds an environment


def run_on_finish(program: Path, job: Job, log_path: Path, environ: Mapping[str, str]) -> None:
    """Run ON_FINISH for a job that has ended; what becomes of it is only logged.

    After HOOK_SECONDS it is killed with what it has started, but for what has made a session of its
    own (setsid), which goes on.
    """
    error = job.error.replace("\0", "").encode()[:MAX_VARIABLE].decode("utf-8", "ignore")
    environment = {
        **environ,
        "ONI_JOB_ID": str(job.id),
        "ONI_JOB_COMMAND": shlex.join(job.words),
        "ONI_JOB_STATUS": job.status,
        "ONI_JOB_ERROR": error,
        "ONI_JOB_LOG": str(log_path),
    }
    try:
        status = subprocess.run(
            # timeout(1) ends it even if the agent goes.
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
    """Return a socket that can be read once SIGTERM or SIGINT has come; a second one is the end."""
    reader, writer = socket.socketpair()

    def stop(number: int, _frame: Any) -> None:
        on_stop(signal.SIG_DFL)  # such an end is a clean one for systemd
        # No more than that: the signal may have come amid a line of the log.
        writer.send(bytes([number]))

    on_stop(stop)
    return reader


def be_init() -> bool:
    """As PID 1 of a container, go on as a child, for which this process buries the orphans.

    Return whether it is so: then the agent's end is the end of all that is in the container.
    """
    if os.getpid() != 1:
        return False
    agent = os.fork()
    if not agent:
        return True
    on_stop(lambda number, _frame: os.kill(agent, number))
    ended = None
    while ended != agent:
        ended, status = os.wait()
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def raise_limits() -> None:
    """Let the agent open as many files as it may: each connection and command needs some."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # as which Python tells of EPERM
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
    is_containers = be_init()
    try:
        return run(is_containers)
    except Problem as problem:
        complain(*problem.args)
        return 2 if is_refused_for_good(problem) else 1
    except OSError as error:  # Scarce, too
        complain(error)
        return 2 if is_refused_for_good(error) else 1


def run(is_containers: bool) -> int:
    """Run the agent until it is told to stop; return its exit status.

    `is_containers` says whether a container ends with it. Raises Problem, OSError, if it cannot
    start.
    """
    try:
        settings = Settings(os.environ)
        host_key = load_host_key(settings.host_key_file)
    except Problem as problem:
        complain(*problem.args)
        return 2  # systemd need not try again: somebody has to change something
    set_up_logging(settings.log_level)
    stop = stop_on_signals()
    raise_limits()
    account = site_account(settings.oni_location)
    # What may be root's alone is taken before it becomes the site's user.
    listener = listen(*settings.ba_bind)
    settings.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if account:
        if not host_key and settings.host_key_file.parent != settings.state_directory:
            host_key = make_host_key(settings.host_key_file)
        settings = as_site_user(settings, account)
    agent = build(settings)
    host_key = host_key or make_host_key(settings.host_key_file)
    gc.freeze()  # what is there by now stays, and need not be looked at
    tell_where(settings, listener.getsockname())
    agent.queue.start()
    ASIDE.submit(look_once, agent.site.oni)
    tell_systemd("READY=1")
    serve(agent, host_key, listener, stop)
    tell_systemd("STOPPING=1\nSTATUS=")
    tell_what_goes_on(agent, is_containers)
    return 0


def as_site_user(settings: Settings, account: Account) -> Settings:
    """Give the state folder to the site's user, become that, and return its settings.

    Raises Problem where that user cannot reach what they name.
    """
    hand_over(settings.state_directory, account)
    become(account)
    log.info("started as root; goes on as %s, as whom the site runs", account.name)
    # The key has been read: it may be where only root may look.
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
                    run_on_finish, settings.on_finish, job, store.log(job), oni.environment
                )

    return Agent(settings, site, store, JobQueue(store, site, ended))


def tell_where(settings: Settings, address: Any) -> None:
    """Say in the log where the agent listens, and what an administrator should know of that."""
    shown = show_address(address)
    log.info("listening on %s version=%s state=%s", shown, VERSION, settings.state_directory)
    if settings.db_connection:
        log.info("DB_CONNECTION is set and not needed: Open ONI's own settings are used")
    if settings.admits_everybody and not host_of(address).is_loopback:
        log.warning(
            "anyone who reaches %s may load and purge: set ALLOW_FROM or AUTHORIZED_KEYS", shown
        )
    earlier = Path(os.path.expanduser("~/.local/state/oni-agent"))
    if str(settings.state_directory) == LIBRARY and (earlier / "jobs.db").exists():
        log.warning("the jobs of an earlier agent are in %s, and this one has its own", earlier)


def tell_what_goes_on(agent: Agent, is_containers: bool) -> None:
    """Say in the log what becomes of the manage.py at work, if there is one, as the agent stops.

    systemd's signal reaches it, too, unless the unit has KillMode=process: so it is given a moment
    to end, and is then looked at.
    """
    for job in agent.queue.jobs():
        if job.status != STARTED:
            continue
        if is_containers:
            log.warning("job=%d ends with the container; the next agent begins it anew", job.id)
        elif goes_on(agent.store.folder / "run.lock"):
            log.info("job=%d its manage.py goes on, and the next agent takes it over", job.id)
        else:
            log.warning(
                "job=%d its manage.py has ended, too, and the next agent begins the job anew; with"
                " KillMode=process in the unit it would go on",
                job.id,
            )


def goes_on(lock: Path) -> bool:
    """Tell whether manage.py holds its lock, also after a moment if systemd has ended the agent."""
    until = time.monotonic()
    if "INVOCATION_ID" in os.environ:
        until += STOP_SECONDS / 2
    while True:
        try:
            locked(lock).close()
        except BlockingIOError:
            if time.monotonic() >= until:
                return True
        except OSError:
            return False
        else:
            return False
        time.sleep(TICK)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads: they may be cut off at any instant
