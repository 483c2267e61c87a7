#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["paramiko>=2.12"]
# ///
"""ONI Agent: loads and purges the batches of an Open ONI site on request, over SSH.

Run it on the Open ONI host, as a user who may run ONI's manage.py. It listens for SSH, takes commands such as

    ssh -p 2222 nobody@localhost load-batch batch_oru_alpha_ver01

puts them in one queue, runs them one at a time with ONI's own manage.py, and answers with one JSON object.
`ssh -p 2222 nobody@localhost help` lists the commands. Settings come from the environment:

  ONI_LOCATION     Open ONI's folder, which holds manage.py and ENV/ (required)
  BATCH_SOURCE     the folder whose subfolders are batches (required)
  BA_BIND          where to listen: host:port, [v6]:port, or :port for every address (default 127.0.0.1:2222)
  STATE_DIRECTORY  where jobs, their logs and the host key are kept
                   (default $XDG_STATE_HOME/oni-agent or ~/.local/state/oni-agent)
  HOST_KEY_FILE    the SSH host key, made if missing (default host_key in the state folder)
  ALLOW_FROM       addresses and networks that may connect, separated by commas or blanks (default: all)
  AUTHORIZED_KEYS  an authorized_keys file; with it, only who has one of its keys is admitted (default: anyone)
  ON_FINISH        a program to run after each job, told of it by ONI_JOB_… variables (default: none)
  LOG_LEVEL        debug, info, warning or error (default info); the log is on stderr
  DB_CONNECTION    accepted for old units, not needed: ONI's own settings are used
"""
from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import inspect
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import xml.etree.ElementTree as ET
import xml.parsers.expat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

warnings.filterwarnings("ignore", module="paramiko")  # old releases warn of ciphers that are switched off below
try:
    import paramiko
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError as missing:
    sys.exit(f"oni_agent needs paramiko, which {sys.executable} cannot import ({missing}). Install the package"
             " python3-paramiko (Debian, Ubuntu; on RHEL-like systems from EPEL), or: python3 -m pip install paramiko")

VERSION = "1.0.0"
log = logging.getLogger("oni_agent")

# ---------------------------------------------------------------- limits

MAX_CONNECTIONS = 640  # in all; beyond it the connection that has been idle longest makes room
MAX_FROM_ONE_ADDRESS = 500  # of them
MAX_HALF_OPEN = 200  # of them not admitted yet
MAX_CHANNELS = 10  # open at once on one connection, as OpenSSH's MaxSessions
MAX_PACKET = 256 * 1024  # bytes of one SSH packet, as OpenSSH takes them
MAX_COMMAND = 16 * 1024  # bytes of a command line
MAX_PAYLOAD = 32 * 1024 * 1024  # bytes on standard input
HANDSHAKE_SECONDS = 15  # from connecting to being admitted
IDLE_SECONDS = 30  # without a command at work; NCA never closes a connection itself
STDIN_SECONDS = 30  # without a byte of a payload that has not ended
PAYLOAD_SECONDS = 600  # for a payload in all
SESSION_SECONDS = 86400  # for a session in all; somebody may follow a long load
STALL_SECONDS = 60  # without the client's taking any of its answer
STOP_SECONDS = 1.5  # for answers under way when the agent is told to stop
ANSWER_SECONDS = 10  # for Open ONI to answer a question
PATIENT_SECONDS = 60  # the same, when a job at work asks
TERM_SECONDS = 10  # between SIGTERM and SIGKILL for a cancelled manage.py
REST_SECONDS = 600  # without a question, after which the manage.py that answers them ends
MAX_LINE = 64 * 1024  # bytes of one line in a job's log; a longer line is cut into pieces
MAX_ATTEMPTS = 3  # starts of a job that never ended
KEEP_DAYS, KEEP_JOBS = 90, 100  # how long finished jobs are kept, and how many of the newest in any case
TICK = 0.02  # seconds between two looks at what manage.py has printed
CHUNK = 256 * 1024  # bytes of a log or an answer handled at once

# ---------------------------------------------------------------- settings


class SettingsError(Exception):
    """The environment does not describe an agent; each argument is a sentence that says what to mend."""


OWN_VARIABLES = ("ONI_LOCATION", "BATCH_SOURCE", "BA_BIND", "STATE_DIRECTORY", "HOST_KEY_FILE", "ALLOW_FROM",
                 "AUTHORIZED_KEYS", "ON_FINISH", "LOG_LEVEL", "DB_CONNECTION")


class Settings:
    """What an administrator tells the agent in `environ`, checked. Raises SettingsError with every problem at once."""

    def __init__(self, environ: dict[str, str]):
        problems = []

        def read(name: str, reader: Callable, default: str = ""):
            try:
                return reader(environ.get(name) or default)
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no home for a ~, links in a circle
                problems.append(f"{name} {'' if isinstance(error, ValueError) else 'cannot be used: '}{error}")

        home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "~", ".local", "state")
        self.oni_location: Path = read("ONI_LOCATION", lambda value: existing_folder(value, holding="manage.py"))
        self.batch_source: Path = read("BATCH_SOURCE", existing_folder)
        self.ba_bind: tuple[str, int] = read("BA_BIND", bind_address, "127.0.0.1:2222")
        self.state_directory: Path = read("STATE_DIRECTORY", private_folder, os.path.join(home, "oni-agent"))
        state = self.state_directory or Path()
        self.host_key_file: Path = read("HOST_KEY_FILE", lambda value: host_key_path(value, state), f"{state}/host_key")
        self.allow_from: tuple = read("ALLOW_FROM", networks)
        self.authorized_keys: Path | None = read("AUTHORIZED_KEYS", lambda value: file_for(os.R_OK, value))
        self.on_finish: Path | None = read("ON_FINISH", lambda value: file_for(os.X_OK, value))
        self.log_level: str = read("LOG_LEVEL", known_log_level, "info")
        self.db_connection = bool(environ.get("DB_CONNECTION"))
        if problems:
            raise SettingsError(*problems)


# Readers of one setting each; they raise ValueError, or an OSError.


def existing_folder(value: str, holding: str = "") -> Path:
    """`value` as the absolute path of a folder, which holds a file named `holding`."""
    if not value:
        raise ValueError(f"is not set; it names the folder {'of ' + holding if holding else 'that holds the batches'}")
    path = Path(value).resolve()
    if not path.is_dir():
        raise ValueError(f"is {value!r}, which is not a folder")
    if holding and not (path / holding).is_file():
        raise ValueError(f"is {value!r}, a folder without {holding}")
    return path


def private_folder(value: str) -> Path:
    """`value` as the path of a folder that is there and the agent's alone, or that can be made."""
    path = Path(value.split(":")[0]).expanduser().resolve()  # systemd separates several by colons
    place = nearest_folder(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"is {value!r}, and the agent's user cannot write to {place}")
    shared = (Path("/"), Path("/tmp"), Path("/var/tmp"), Path.home())
    if path == place and (path.stat().st_uid != os.geteuid() or path in shared):
        raise ValueError(f"is {value!r}, a folder that others use; name one that is the agent's alone")
    return path


def nearest_folder(path: Path) -> Path:
    """`path`, or the folder that is there and in which it could be made."""
    place = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not place.is_dir():
        raise ValueError(f"is {str(path)!r}, but {place} is not a folder")
    return place


def bind_address(value: str) -> tuple[str, int]:
    """`host:port`, `[v6 address]:port` or `:port` as a pair; host "" means every address."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):(\d{1,5})", value, re.ASCII)
    if not match or int(match[3]) > 65535:
        raise ValueError(f"is {value!r}; write host:port, [IPv6 address]:port or :port")
    return match[1] or match[2], int(match[3])


def networks(value: str) -> tuple:
    """The addresses and networks, separated by commas or blanks, in `value`."""
    try:
        found = tuple(map(ipaddress.ip_network, value.replace(",", " ").split()))
    except ValueError as error:
        raise ValueError(f"is {value!r}: {error}") from error
    if value and (not found or any(getattr(each.network_address, "ipv4_mapped", None) for each in found)):
        raise ValueError(f"is {value!r}; write addresses and networks as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
    return found


def file_for(access: int, value: str) -> Path | None:
    """The absolute path of a file, if it is set, that allows os.R_OK or os.X_OK."""
    path = Path(value).resolve()
    if value and not (path.is_file() and os.access(path, access)):
        raise ValueError(f"is {value!r}, not a file that can be {'read' if access == os.R_OK else 'executed'}")
    return path if value else None


def host_key_path(value: str, state: Path) -> Path:
    """`value` as a path; a file that is there holds a usable key, else its folder is there or will be, as `state`."""
    path = Path(value).expanduser().resolve()
    if os.path.lexists(path):
        load_host_key(path)
    elif path.parent != state and not path.parent.is_dir():
        raise ValueError(f"is {value!r}, in a folder that does not exist")
    return path


def known_log_level(value: str) -> str:
    """`value` as logging writes it."""
    if value.lower() not in ("debug", "info", "warning", "error"):
        raise ValueError(f"is {value!r}; write debug, info, warning or error")
    return value.upper()


# ---------------------------------------------------------------- Open ONI


class ONIError(Exception):
    """Open ONI could not do or say something; the text is a sentence for an administrator."""


class ONINotRun(ONIError):
    """manage.py could not even be started."""


QUESTIONS = """
import json, sys
from django.conf import settings
from django.db import close_old_connections
from django.db.models import Count
from core.models import Awardee, Batch, Issue, LoadBatchEvent, Page, Title

def batches(*names):
    def rows(model, field):
        return (model.objects.filter(**{field + "__in": names}) if names else model.objects.all()).order_by()
    held = {row.name: {"loaded": row.created.isoformat(), "issues": 0, "pages": 0, "events": []}
            for row in rows(Batch, "name")}
    for model, field, shown in (Issue, "batch", "issues"), (Page, "issue__batch", "pages"):
        for name, count in rows(model, field).values_list(field).annotate(Count("pk")):
            held[name][shown] = count
    for event in rows(LoadBatchEvent, "batch_name").order_by("created", "pk"):
        if event.batch_name in held:
            held[event.batch_name]["events"].append([event.created.isoformat(), event.message or ""])
    return {"storage": str(settings.BATCH_STORAGE), "batches": held}

def title(lccn):
    return lccn in Title.objects.filter(lccn=lccn).values_list("lccn", flat=True)

def awardee(code, name):
    row, new = Awardee.objects.filter(org_code=code).first(), False
    if name and not row:
        row, new = Awardee.objects.get_or_create(org_code=code, defaults={"name": name})
    return row and [row.org_code, new]

for line in sys.stdin:
    question, *words = json.loads(line)
    try:
        close_old_connections()
        reply = {"answer": {"batches": batches, "title": title, "awardee": awardee}[question](*words)}
    except Exception as error:
        reply = {"error": type(error).__name__ + ": " + str(error)}
    print("\\n" + MARK + json.dumps(reply), flush=True)
"""


class OpenONI:
    """How ONI's manage.py is called, and how ONI's database is asked through it."""

    MARK = "ONI Agent's answer: "  # in front of an answer, since site code may print too

    def __init__(self, location: Path, environ: dict[str, str]):
        self.location = location
        self.environment = {name: value for name, value in environ.items()
                            if name not in (*OWN_VARIABLES, "PYTHONHOME", "NOTIFY_SOCKET")}
        self.environment.update(VIRTUAL_ENV=str(location / "ENV"), PYTHONUNBUFFERED="1",  # else it prints lumps of 8 KB
                                PATH=f"{location / 'ENV' / 'bin'}:{environ.get('PATH', os.defpath)}")
        self._asking = threading.Lock()
        self._child: subprocess.Popen | None = None  # a manage.py shell that answers QUESTIONS
        self._rest = threading.Timer(0, self.rest)

    def start(self, *words: str, **options) -> subprocess.Popen:
        """manage.py with `words`, in a session of its own, so that it outlives the agent. Raises ONINotRun."""
        manage = self.location / "manage.py"
        program = [manage] if os.access(manage, os.X_OK) else [self.location / "ENV" / "bin" / "python3", manage]
        try:
            manage.stat()
            return subprocess.Popen([*map(str, program), *words], cwd=self.location, env=self.environment,
                                    start_new_session=True, **{"stdin": subprocess.DEVNULL, **options})
        except OSError as error:
            raise ONINotRun(f"couldn't run {manage}: {error}") from error

    def check(self) -> str:
        """What `manage.py check` says of ONI's settings; it asks neither database nor Solr. Raises ONIError."""
        with self.start("check", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            try:
                last = process.communicate(timeout=60)[0].decode("utf-8", "replace").strip().rpartition("\n")[2]
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise ONIError("manage.py check did not end within 60 s") from None
        if process.returncode:
            raise ONIError(f"manage.py check ended with exit status {process.returncode}: {last}")
        return last

    def ask(self, *question: str, within: float = ANSWER_SECONDS) -> object:
        """What ONI's own models say to one of QUESTIONS. Raises ONIError, after `within` seconds at most.

        A `manage.py shell` is kept warm for it: its first answer takes half a second, later ones milliseconds.
        """
        until, late = time.monotonic() + within, ONIError(f"Open ONI did not answer within {within:g} s")
        if not self._asking.acquire(timeout=within):
            raise late
        try:
            self._rest.cancel()
            reply = self._child and self._exchange(question, until)
            if not reply:  # there is no child, or it has died since its last answer
                self._begin_child()
                reply = self._exchange(question, until)
            if not reply:
                self._complaints.seek(0)
                said = self._complaints.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
                raise ONIError(f"Open ONI cannot be asked: {said or 'manage.py shell ended'}")
        except TimeoutError:
            self._end_child()
            raise late from None
        finally:
            self._asking.release()
            with contextlib.suppress(RuntimeError):  # no thread to be had: then the child rests later
                self._rest = threading.Timer(REST_SECONDS, self.rest)
                self._rest.daemon = True
                self._rest.start()
        if "error" in reply:
            raise ONIError(f"Open ONI cannot answer: {reply['error']}")
        return reply["answer"]

    def _begin_child(self) -> None:
        self._end_child()
        self._complaints = tempfile.TemporaryFile()  # its stderr
        self._child = self.start("shell", "-c", f"exec({QUESTIONS!r}, {{'MARK': {self.MARK!r}}})",
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints)

    def _exchange(self, question: tuple, until: float) -> dict | None:
        """The reply to a question; None if the child ends instead. Raises TimeoutError."""
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(json.dumps(question).encode() + b"\n")
            self._child.stdin.flush()
        said, poll = b"", select.poll()
        poll.register(self._child.stdout, select.POLLIN)
        while not (match := re.search(re.escape(self.MARK.encode()) + rb"(.*)\n", said)):
            if not poll.poll(max(0, until - time.monotonic()) * 1000):
                raise TimeoutError
            data = os.read(self._child.stdout.fileno(), CHUNK)
            if not data:
                return None
            said += data
        return json.loads(match[1])

    def rest(self) -> None:
        """Ends the warm child; the next question starts another."""
        with self._asking:
            self._end_child()

    def _end_child(self) -> None:
        if self._child:
            os.killpg(self._child.pid, signal.SIGKILL)  # it is never in the middle of a change worth keeping
            with contextlib.suppress(BrokenPipeError):
                self._child.communicate()
        self._child = None


# ---------------------------------------------------------------- batch files

BATCH_NAME = re.compile(r"batch_\w+_\w+_ver\d\d")  # what load_batch takes


class BatchError(Exception):
    """Something is wrong with a batch's files; the text is a sentence."""


class PlainXML(ET.TreeBuilder):
    """Builds a tree of XML without a DOCTYPE, and so without entities that grow or point elsewhere."""

    def doctype(self, *_):
        raise ValueError("a DOCTYPE is not allowed")


def parse_xml(data: bytes) -> ET.Element:
    """The root of the XML in `data`. Raises ValueError, which says what is wrong and where."""
    try:
        return ET.fromstring(data, ET.XMLParser(target=PlainXML()))
    except (ET.ParseError, LookupError) as error:
        raise ValueError(str(error)) from error


def read_regular(path: Path) -> bytes:
    """The content of a regular file. Raises BatchError, in the Go agent's words."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # maybe a FIFO
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BatchError(f"reading file: {path} is not a regular file")
            return file.read()
    except OSError as error:
        raise BatchError(f"reading file: open {path}: {error.strerror.lower()}") from error


def batch_issues(folder: Path) -> list[ET.Element]:
    """The `issue` elements of a batch's data/batch.xml. Raises BatchError."""
    path = folder / "data" / "batch.xml"
    try:
        return parse_xml(read_regular(path)).findall(".//{*}issue")
    except ValueError as error:
        raise BatchError(f"reading file: {path}: {error}") from error


def check_batch(folder: Path) -> None:
    """Raises BatchError unless the files that data/batch.xml names are there, inside the batch's folder."""
    root = os.path.join(os.path.realpath(folder), "")
    for issue in batch_issues(folder):
        path = folder / "data" / (issue.text or "").strip()
        if not os.path.realpath(path).startswith(root):
            raise BatchError(f"reading file: {path}, which batch.xml names, lies outside the batch's folder")
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BatchError(f"reading file: {path} is not a regular file")
        except OSError as error:
            raise BatchError(f"reading file: open {path}: {error.strerror.lower()}") from error


@dataclass(frozen=True)
class BatchState:
    """What ONI's database holds of a batch, beside what the batch's files say it should.

    Silent holes leave a good last event, a load killed in its last issue all the issues: it takes both to be complete.
    """

    row: bool
    expected: int | None  # issues in batch.xml; None: there is none to be read
    link: Path  # where ONI's storage has, or would have, its link to the batch
    issues: int = 0
    pages: int = 0
    loaded: str = ""  # when the row was made
    events: tuple = ()  # [time, message], oldest first; none if the site has pruned its history

    @property
    def word(self) -> str:
        """absent, partial, complete; or unknown where there are no files to compare with."""
        if not self.row or self.expected is None:
            return "unknown" if self.row else "absent"
        return "complete" if self.issues == self.expected and self._processed else "partial"

    @property
    def complete(self) -> bool:
        return self.word == "complete"

    @property
    def _processed(self) -> bool:
        return not self.events or self.events[-1][1].startswith("processed")

    def __str__(self) -> str:
        if not self.row:
            return "ONI holds nothing of the batch"
        if self.expected is None:
            return f"ONI holds {self.issues} issues, and there is no batch.xml to tell whether that is all"
        held = f"ONI holds {self.issues} of the {self.expected} issues in batch.xml"
        if self.complete:
            return f"the batch is complete: {held}"
        return held if self._processed else f'{held}, and its last event is "{self.events[-1][1]}"'


def batch_states(oni: OpenONI, source: Path, *names: str, within: float = ANSWER_SECONDS) -> dict[str, BatchState]:
    """The state of each of the batches `names`, or of each that ONI has. Raises ONIError."""
    reply = oni.ask("batches", *names, within=within)
    states = {}
    for name in names or reply["batches"]:
        link, held = Path(reply["storage"]) / name, reply["batches"].get(name)
        expected = issue_count(source / name if os.path.isdir(source / name) else link)
        states[name] = BatchState(bool(held), expected, link, **(held or {}))
    return states


def issue_count(folder: Path) -> int | None:
    """How many issues a batch's batch.xml names; None if there is none that can be read."""
    with contextlib.suppress(BatchError):
        return len(batch_issues(folder))


def marc_lccns(data: bytes) -> list[str]:
    """The LCCNs (010 $a, blanks removed) of the MARC records anywhere in an XML document, as ONI finds them.

    Raises ValueError.
    """
    lccns = []
    for record in parse_xml(data).iter():
        if str(record.tag).rpartition("}")[2] == "record" and record.find("{*}datafield") is not None:
            key = record.findtext("{*}datafield[@tag='010']/{*}subfield[@code='a']") or ""
            lccns.append(re.sub(r"\s", "", key))
    if not lccns or not all(lccns):
        raise ValueError("there is a MARC record without an LCCN (010 $a) in it, which Open ONI would not store"
                         if lccns else "there is no MARC record in it")
    return lccns


def read_patch(old: Path, instructions: bytes) -> tuple[set[str], bytes]:
    """What a patch does to a batch: the folders in data/ of the issues it removes, and its new batch.xml.

    Raises BatchError where an instruction is not `RemoveIssue LCCN/YYYYMMDDEE` or the batch has no such issue.
    """
    plain = functools.partial(re.sub, "[-_]", "")
    keys, folders, removed = {}, [], set()
    for number, issue in enumerate(batch_issues(old)):
        folders.append(os.path.dirname(os.path.normpath((issue.text or "").strip())))
        edition = issue.get("issueDate", "") + issue.get("editionOrder", "").zfill(2)
        for name in (edition, os.path.basename(folders[number])):
            keys[plain(f"{issue.get('lccn')}/{name}")] = number
    for number, line in enumerate(instructions.decode("utf-8", "replace").splitlines(), 1):
        word, *operands = line.split()[:2] or [""]
        if word and word != "RemoveIssue":
            raise BatchError(f"line {number}: {word!r} is not an instruction; RemoveIssue is the only one")
        if word and (len(line.split()) != 2 or plain(operands[0]) not in keys):
            raise BatchError(f"line {number}: {line.strip()!r} names no issue of {old.name}; write LCCN/YYYYMMDDEE")
        removed.update(keys[plain(key)] for key in operands)
    if not removed:
        raise BatchError("there is no instruction to remove an issue")
    return {folders[number] for number in removed}, without_issues(read_regular(old / "data" / "batch.xml"), removed)


def without_issues(data: bytes, removed: set[int]) -> bytes:
    """A batch.xml without the issue elements of these numbers, counted from 0; all else stays to the byte."""
    parser = xml.parsers.expat.ParserCreate(namespace_separator=" ")
    marks: list[tuple[int, str]] = []  # where in the data something begins, and what

    def mark(what: str) -> Callable:
        return lambda name="", *_: marks.append(
            (parser.CurrentByteIndex, what if name.rpartition(" ")[2] == "issue" else ""))

    parser.StartElementHandler, parser.EndElementHandler = mark("issue"), mark("end")
    parser.DefaultHandler = mark("")
    parser.Parse(data, True)
    numbers, keep, kept = itertools.count(), True, [data[:marks[0][0]]]
    for (start, what), (end, _) in zip(marks, [*marks[1:], (len(data), "")]):
        if what == "issue":
            keep = next(numbers) not in removed
        if keep:
            kept.append(data[start:end])
        if what == "end":
            keep = True
    return b"".join(kept)


def patch_batch_files(old: Path, new: Path, instructions: bytes) -> Iterator[str]:
    """Makes the batch `new` of the batch `old`: without removed issues, TIFFs and validated XML.

    Yields after each file what there is to say, often nothing. May be begun again at any time: `new` has its name only
    when whole, and one that is there already must be what it would become. Raises BatchError, OSError.
    """
    gone, batch_xml = read_patch(old, instructions)
    unready, listing = new.with_name(f"WIP-UNREADY-{new.name}"), os.path.join("data", "batch.xml")
    sizes = {**dict(copied_files(old, gone)), listing: len(batch_xml)}
    if os.path.lexists(new):
        if read_regular(new / listing) != batch_xml or dict(copied_files(new, set())) != sizes:
            raise BatchError(f"{new} is there already, and is not what this patch makes; move it away")
        yield f"nothing to do: {new} is there already, and is what this patch makes"
        return
    if unready.exists():
        yield f"removing {unready}, which an interrupted patch has left"
        shutil.rmtree(unready)
    need, free, done = sum(sizes.values()), shutil.disk_usage(new.parent).free, 0
    if need > free:
        raise BatchError(f"the patch needs {need:,} bytes in {new.parent}, where {free:,} are free")
    try:
        for name, size in sizes.items():
            target = unready / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name == listing:
                target.write_bytes(batch_xml)
            else:
                shutil.copy2(old / name, target, follow_symlinks=False)
            if target.lstat().st_size != size:
                raise BatchError(f"{target} is not as long as {old / name} was: it changed, or the copy failed")
            done += size
            yield f"{done * 100 // need} % of {need:,} bytes" if done * 10 // need > (done - size) * 10 // need else ""
        check_batch(unready)
        kept = {issue.text for issue in batch_issues(unready)}
        for name in {issue.text for issue in batch_issues(old)} - kept:
            if (unready / "data" / (name or "").strip()).exists():
                raise BatchError(f"{name}, which is to go, does not lie in a folder of its own in {old}")
    except BaseException:  # cancelled, too
        shutil.rmtree(unready, ignore_errors=True)
        raise
    os.sync()  # whole on disk before it is seen
    unready.rename(new)


def copied_files(batch: Path, gone: set[str]) -> Iterator[tuple[str, int]]:
    """The files of a batch that a patch copies, and their sizes in bytes; `gone`: folders in data/ that it does not."""
    for folder, folders, files in os.walk(batch):
        inside = os.path.relpath(folder, batch / "data")
        folders[:] = [name for name in folders if os.path.normpath(os.path.join(inside, name)) not in gone]
        for path in (Path(folder, name) for name in [*files, *folders]):
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) or re.search(r"(\.tiff?|_1\.xml)$", path.name, re.IGNORECASE):
                continue
            if not stat.S_ISREG(found.st_mode) and not stat.S_ISLNK(found.st_mode):
                raise BatchError(f"{path} is neither a file nor a link and cannot be copied")
            yield os.path.relpath(path, batch), found.st_size


# ---------------------------------------------------------------- jobs and their store

PENDING, STARTED, COULD_NOT_START, SUCCESSFUL, FAILED = (
    "pending", "started", "couldn't start", "successful", "failed")  # NCA knows no others
STATUS_MESSAGES = {
    PENDING: "Pending: this job is in the queue but hasn't been started yet.",
    STARTED: "Started: this job is currently running.",
    COULD_NOT_START: "Invalid: this job was not able to start.",
    SUCCESSFUL: "Success: this job is complete.",
    FAILED: "Failed: this job started but returned a non-zero exit code.",
}
JOB_NAMES = {"load-batch": "Load batch", "purge-batch": "Purge batch", "load-title": "load title",
             "batch-patch": "batch patch", "no-op": "No-op job"}
STDOUT, STDERR, NOTE, COMMAND = b"O", b"E", b"A", b"$"  # whose line it is, in a job's log


class StoreError(Exception):
    """The state folder cannot be used or written; the text is a sentence."""


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
    cancelled: int = 0  # whether it is to end, or has ended, because somebody asked for that

    @property
    def finished(self) -> bool:
        return self.status not in (PENDING, STARTED)


class JobStore:
    """The jobs on disk: `jobs.db`, `logs/` and `titles/` in the state folder, which is one agent's alone.

    Its methods raise StoreError; `add` and `update` return when all is safely on disk.
    """

    APPLICATION, VERSION = 0x4F4E4941, 1  # SQLite's application_id ("ONIA") and user_version
    SCHEMA = """CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, words TEXT NOT NULL, payload BLOB,
                queued INTEGER NOT NULL, status TEXT NOT NULL, started INTEGER, ended INTEGER,
                error TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0,
                cancelled INTEGER NOT NULL DEFAULT 0)"""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_lock = folder / "run.lock"  # held by the manage.py at work
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (folder / "agent.lock").exists() or not any(folder.iterdir()):  # nobody else's
                folder.chmod(0o700)
            self._agent_lock = self._keep_others_out()
            for name in ("logs", "titles"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            self._database = self._open(folder / "jobs.db")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{folder / 'jobs.db'} cannot be used ({error}); nothing was changed") from error

    def _keep_others_out(self) -> object:
        lock = open(self.folder / "agent.lock", "a")
        for _ in range(20):  # a killed agent's last child may hold the lock until it has become manage.py
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            time.sleep(0.05)
        raise StoreError(f"another ONI Agent is at work on {self.folder}; give this one a STATE_DIRECTORY of its own")

    def _open(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)  # each statement commits
        application, version, tables, health = (database.execute(question).fetchone()[0] for question in (
            "PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master", "PRAGMA quick_check"))
        if tables and application != self.APPLICATION:
            raise StoreError(f"{path} is not an ONI Agent's; nothing was changed")
        if version > self.VERSION:
            raise StoreError(f"{path} was written by a newer ONI Agent; nothing was changed")
        if health != "ok":
            raise StoreError(f"{path} is damaged; put a copy from a backup in its place, or move it away")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # what is answered is on disk
        if not tables:
            database.executescript(f"BEGIN; {self.SCHEMA}; PRAGMA application_id = {self.APPLICATION};"
                                   f" PRAGMA user_version = {self.VERSION}; COMMIT;")
        return database

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        with self._lock:
            try:
                return self._database.execute(statement, values)
            except sqlite3.Error as error:
                raise StoreError(f"{self.folder / 'jobs.db'} cannot be used: {error}") from error

    def jobs(self) -> list[Job]:
        """Every job, oldest first."""
        columns = ", ".join(each.name for each in dataclasses.fields(Job))
        try:
            return [Job(id, json.loads(words), *rest)
                    for id, words, *rest in self._execute(f"SELECT {columns} FROM jobs ORDER BY id").fetchall()]
        except ValueError as error:
            raise StoreError(f"{self.folder / 'jobs.db'} is damaged: {error}") from error

    def add(self, words: list[str], payload: bytes | None) -> Job:
        """A new pending job."""
        queued = time.time_ns()
        return Job(self._execute("INSERT INTO jobs (words, payload, queued, status) VALUES (?, ?, ?, ?)",
                                 (json.dumps(words), payload, queued, PENDING)).lastrowid, words, queued)

    def update(self, job: Job, **changes) -> None:
        """Changes columns of a job."""
        self._execute(f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in changes)} WHERE id = ?",
                      (*changes.values(), job.id))

    def payload(self, job: Job) -> bytes:
        """What came on standard input with the request."""
        return self._execute("SELECT payload FROM jobs WHERE id = ?", (job.id,)).fetchone()[0] or b""

    def job_folder(self, job: Job) -> Path:
        """A private folder for a job's files, not made yet."""
        return self.folder / "titles" / str(job.id)

    def log(self, job: Job) -> JobLog:
        return JobLog(self.folder / "logs" / f"{job.id}.log")

    def remove(self, job: Job) -> None:
        """Forgets a job: its files first, so that a crash in between leaves none without a job."""
        self.log(job).path.unlink(missing_ok=True)
        shutil.rmtree(self.job_folder(job), ignore_errors=True)
        self._execute("DELETE FROM jobs WHERE id = ?", (job.id,))


def timestamp(nanoseconds: int) -> str:
    """A moment in UTC with nine digits: fixed width, because NCA sorts log lines as strings."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


class JobLog:
    """What a job printed and what the agent did for it, in a text file that `tail -f` can show.

    Each line is `[2026-11-22T11:07:19.061730250Z] K text`, K being O (manage.py's stdout), E (its stderr), A (the
    agent's own note) or $ (the command that the lines after it belong to). Stamps increase strictly, whatever the
    clock does.
    """

    KIND = len("[2026-11-22T11:07:19.061730250Z] ")  # where a line's K stands

    def __init__(self, path: Path):
        self.path = path
        self._size, self._stamp = 0, 0  # in bytes; the newest line's, in nanoseconds

    def open(self) -> dict[bytes, int]:
        """Makes the log ready to go on; returns how many O and E lines its newest command has, if it has one.

        A line that a crash cut short goes: what it was copied from is still there.
        """
        self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        counts, newest = {}, b""
        for lines, end in self._lines():
            self._size, newest = end, lines[-1]
            for kind in (line[self.KIND:self.KIND + 1] for line in lines):
                if kind == COMMAND:
                    counts = {STDOUT: 0, STDERR: 0}
                elif kind in counts:
                    counts[kind] += 1
        with contextlib.suppress(ValueError):  # a damaged line tells no time
            second = datetime.fromisoformat(newest[1:20].decode() + "+00:00")
            self._stamp = int(second.timestamp()) * 10**9 + int(newest[21:30])
        self._file.truncate(self._size)
        self._file.seek(self._size)
        return counts

    def close(self) -> None:
        """Puts the log safely on disk."""
        with contextlib.suppress(OSError), self._file:
            os.fsync(self._file.fileno())

    def write(self, kind: bytes, lines: list[bytes]) -> None:
        """Appends `lines`, stamped. While the disk refuses, waits, and then says that lines may be missing."""
        trouble = None
        while True:
            try:
                if trouble:
                    self._append(NOTE, [f"the state folder could not be written ({trouble.strerror}):"
                                        " lines that manage.py printed meanwhile may be missing".encode()])
                return self._append(kind, lines)
            except OSError as error:
                if not trouble:
                    log.error("%s cannot be written: %s; trying again every second", self.path, error)
                trouble = error
                time.sleep(1)

    def _append(self, kind: bytes, lines: list[bytes]) -> None:
        stamp = max(time.time_ns(), self._stamp + 1)
        if stamp % 10**9 + len(lines) > 10**9:  # one second, one prefix
            stamp += 10**9 - stamp % 10**9
        second, first = divmod(stamp, 10**9)
        form = time.strftime("[%Y-%m-%dT%H:%M:%S.%%09dZ] ", time.gmtime(second)).encode() + kind + b" %b\n"
        data = (form * len(lines)) % tuple(itertools.chain.from_iterable(enumerate(lines, first)))
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size, self._stamp = self._size + len(data), stamp + len(lines) - 1

    def _lines(self, start: int = 0) -> Iterator[tuple[list[bytes], int]]:
        """The log's lines from a byte on, as many at once as fit in a chunk, and where they end."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb", buffering=0) as file:
            rest, left, end = b"", os.fstat(file.fileno()).st_size - start, start  # not what is appended meanwhile
            file.seek(start)
            while left > 0 and (data := file.read(min(CHUNK, left))):
                left -= len(data)
                *lines, rest = (rest + data).split(b"\n")
                end += sum(map(len, lines)) + len(lines)
                if lines:
                    yield lines, end

    def read(self, *kinds: bytes, start: int = 0) -> Iterator[tuple[list[str], int]]:
        """The lines of these kinds as the protocol shows them, `[stamp] text`, and where in the file they end."""
        at = self.KIND
        for lines, end in self._lines(start):
            wanted = b"\n".join([line[:at] + line[at + 2:] for line in lines if line[at:at + 1] in kinds])
            yield wanted.decode("utf-8", "replace").split("\n") if wanted else [], end


# ---------------------------------------------------------------- recipes


class JobFailed(Exception):
    """A job ended without doing what it was to do; the text says why, and what ONI holds now."""


class Cancelled(Exception):
    """The job at work is to end."""


class Tail:
    """The lines that a running command appends to a file, but for the first `skip`, which are in the log already.

    A line longer than MAX_LINE comes in pieces, always cut at the same places, so that lines can be counted.
    """

    PIECE = re.compile(rb"(?s).{%d,%d}(?![\x80-\xbf])|.{1,%d}"  # not cut within a character
                       % (MAX_LINE - 3, MAX_LINE, MAX_LINE))

    def __init__(self, path: Path, skip: int):
        self._file = open(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600), "rb", buffering=0)
        self._rest, self._skip, self.dry = b"", skip, False

    def read(self, over: bool) -> list[bytes]:
        """The next lines, none if there are none yet; when the command is `over`, an unfinished one too."""
        data = self._file.read(CHUNK)
        self.dry = not data
        lines = (self._rest + data).split(b"\n")
        if max(map(len, lines)) > MAX_LINE:
            lines = [piece for line in lines for piece in self.PIECE.findall(line) or [b""]]
        self._rest = lines.pop()
        if over and not data and self._rest:
            lines, self._rest = [self._rest], b""
        skipped, self._skip = self._skip, max(0, self._skip - len(lines))
        return lines[skipped:]


def start_thread(target: Callable[[], None]) -> None:
    """Starts a thread, as soon as there is one to be had."""
    while True:
        with contextlib.suppress(RuntimeError):
            return threading.Thread(target=target, daemon=True).start()
        time.sleep(1)


def signal_name(number: int) -> str:
    """SIGKILL for 9; real-time signals have none."""
    return next((each.name for each in signal.Signals if each == number), "of no name")


def holders(path: Path) -> set[int]:
    """The process groups, the agent's own apart, of the processes that have a file open."""
    groups = set()
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # the process may end meanwhile, or be another user's
            if os.readlink(entry) == str(path):
                groups.add(os.getpgid(int(entry.parts[2])))
    return groups - {os.getpgrp()}


class Work:
    """One job at work: what a recipe can do and say."""

    def __init__(self, job: Job, settings: Settings, oni: OpenONI, store: JobStore):
        self.job, self.oni, self.source = job, oni, settings.batch_source
        self.payload, self.folder = functools.partial(store.payload, job), store.job_folder(job)
        self.cancelled = threading.Event()
        self._lock, self._log = store.run_lock, store.log(job)
        self._outputs = {STDOUT: store.folder / "run.out", STDERR: store.folder / "run.err"}

    def __enter__(self) -> Work:
        self._copied = self._log.open()
        return self

    def __exit__(self, *_) -> None:
        self._log.close()

    @property
    def ran(self) -> bool:
        """Whether a manage.py of this job may have changed something."""
        return bool(self._copied)

    def note(self, text: str) -> None:
        """Says in the job's log what the agent does."""
        self._log.write(NOTE, [text.replace("\n", " ").encode("utf-8", "replace")])

    def state(self, name: str) -> BatchState:
        """What ONI holds of a batch now. Raises ONIError."""
        return batch_states(self.oni, self.source, name, within=PATIENT_SECONDS)[name]

    def held(self, name: str) -> str:
        """What ONI holds of a batch now, in words; or that nobody knows."""
        try:
            return str(self.state(name))
        except ONIError as error:
            return f"what ONI holds of the batch now is not known: {error}"

    def stderr(self) -> Iterator[str]:
        """The lines that the last manage.py has printed on stderr, but for empty ones."""
        with open(self._outputs[STDERR], encoding="utf-8", errors="replace", newline="\n") as file:
            yield from filter(None, map(str.rstrip, iter(functools.partial(file.readline, MAX_LINE), "")))

    @property
    def first_error(self) -> str:
        """The first [ERROR] line of the last manage.py, if there is one."""
        return next((line[8:] for line in self.stderr() if line.startswith("[ERROR] ")), "")

    @property
    def complaint(self) -> str:
        """Its first [ERROR] line, else its last line on stderr."""
        return self.first_error or (deque(self.stderr(), 1) or ["nothing"])[-1]

    def manage(self, *words: str, batch: str = "") -> None:
        """Runs manage.py with `words` to a good end, its output going to the job's log.

        Its output goes to files and it inherits a locked file, so that it outlives this agent, and the next one can
        tell and read on. Raises Cancelled, ONINotRun, or JobFailed, which says why and what ONI holds of `batch` now.
        """
        with open(self._lock, "a") as lock, contextlib.ExitStack() as files:
            fcntl.flock(lock, fcntl.LOCK_EX)
            out, err = (files.enter_context(open(path, "wb")) for path in self._outputs.values())
            self._log.write(COMMAND, [shlex.join(["manage.py", *words]).encode()])
            self.go_on()
            process = self.oni.start(*words, stdout=out, stderr=err, pass_fds=[lock.fileno()])
        self._copied = dict.fromkeys(self._outputs, 0)
        self._follow(process)
        self.go_on()
        status = process.returncode
        if status:
            reason = (f"exit status {status}: {self.complaint}" if status > 0 else
                      f"killed by signal {-status} ({signal_name(-status)})")
            raise JobFailed(f"{reason}; {self.held(batch)}" if batch else reason)

    def go_on(self) -> None:
        """Raises Cancelled if the job is to end."""
        if self.cancelled.is_set():
            raise Cancelled

    def resume(self) -> bool:
        """Copies the rest of what an earlier agent's manage.py prints, until it ends; whether it was still at work."""
        survivors = holders(self._lock)
        if survivors:
            log.warning("job=%d adopted=%s: its manage.py is still at work", self.job.id, survivors)
        if survivors and not self.ran:  # somebody has deleted the log
            self._log.write(COMMAND, [b"manage.py, begun by an earlier agent"])
            self._copied = dict.fromkeys(self._outputs, 0)
        if self.ran:
            self._follow()
        return bool(survivors)

    def _follow(self, process: subprocess.Popen | None = None) -> None:
        """Copies what manage.py prints, until it and all that it left behind have ended; ends it if cancelled."""
        tails = {kind: Tail(path, self._copied[kind]) for kind, path in self._outputs.items()}
        signals, next_signal = itertools.chain([signal.SIGTERM], itertools.repeat(signal.SIGKILL)), 0.0
        ended, lock = threading.Event(), open(self._lock, "a")

        def wait() -> None:
            if process:
                process.wait()
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
            ended.set()

        start_thread(wait)
        copied = over = full = False
        while not over or not all(tail.dry for tail in tails.values()):
            over = ended.wait(0 if copied else TICK)
            full = full or not os.statvfs(self._log.path.parent).f_bavail
            copied = False
            for kind, tail in tails.items():
                if lines := tail.read(over):
                    self._log.write(kind, lines)
                    copied = True
            if self.cancelled.is_set() and not over and time.monotonic() > next_signal:
                next_signal = time.monotonic() + TERM_SECONDS
                self._kill(next(signals))
        if full:
            self.note("the state folder was full meanwhile: lines that manage.py printed may be missing")

    def _kill(self, number: signal.Signals) -> None:
        for group in holders(self._lock):
            self.note(f"cancelled: {number.name} to process group {group}")
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)


def load_batch(work: Work, name: str) -> None:
    """ONI holds the whole batch. A part of it is purged first: load_batch would leave it as it is."""
    state = work.state(name)
    if state.complete:
        return work.note(f"nothing to do: {state}")
    check_batch(work.source / name)  # it may have gone since; then what ONI holds had better stay
    if state.row:
        work.note(f"{state}; purging that before the load")
        work.manage("purge_batch", name, batch=name)
    remove_leftover_link(work, state.link, work.source / name)
    work.manage("load_batch", str(work.source / name), batch=name)
    state = work.state(name)
    if not state.complete:
        raise JobFailed(f"{state}; load_batch ended with exit status 0, but said: {work.complaint}")
    if work.first_error:  # the only trace of a page that was skipped
        raise JobFailed(f"ONI holds all {state.issues} issues in batch.xml, with {state.pages} pages, but load_batch"
                        f" said: {work.first_error}; pages may be missing")


def remove_leftover_link(work: Work, link: Path, folder: Path) -> None:
    """A link that a killed load of another copy has left would make load_batch load that copy again."""
    if link.is_symlink() and os.path.realpath(link) != os.path.realpath(folder):
        work.note(f"removing {link}, a leftover link to {os.readlink(link)}")
        link.unlink()
    elif link.exists() and not link.is_symlink():
        raise JobFailed(f"{link} is a real folder or file, not a link, and load_batch cannot replace it: move it away")


def purge_batch(work: Work, name: str) -> None:
    """ONI's database holds nothing of the batch."""
    if not work.state(name).row:
        return work.note("nothing to do: ONI holds nothing of the batch")
    work.manage("purge_batch", name, batch=name)
    state = work.state(name)
    if state.row:
        raise JobFailed(f"{state}; purge_batch ended with exit status 0, but said: {work.complaint}")


def load_title(work: Work) -> None:
    """ONI holds the titles of a MARC file as the file has them. Where that fails, the file is kept."""
    payload = work.payload()
    work.folder.mkdir(mode=0o700, exist_ok=True)
    (work.folder / "marc.xml").write_bytes(payload)
    try:
        work.manage("load_titles", str(work.folder))
        missing = [lccn for lccn in marc_lccns(payload) if not work.oni.ask("title", lccn, within=PATIENT_SECONDS)]
        if missing or not any(line.endswith("ERRORS: 0") for line in work.stderr()):
            held = f"ONI has no title {', '.join(missing)}" if missing else "ONI has not stored every record"
            raise JobFailed(f"{held}; load_titles ended with exit status 0, but said: {work.complaint}")
    except (JobFailed, ONIError) as failure:
        raise type(failure)(f"{failure}; the MARC record is kept in {work.folder}") from failure
    shutil.rmtree(work.folder)


def batch_patch(work: Work, old: str, new: str) -> None:
    """The batch `new` is the batch `old` without the issues that the payload names."""
    if not work.state(old).row:
        raise JobFailed("batch does not exist")
    for progress in patch_batch_files(work.source / old, work.source / new, work.payload()):
        work.go_on()
        if progress:
            work.note(progress)
    work.note(f"{work.source / new} is whole")


def undo(work: Work) -> str:
    """What is left of a cancelled job goes, as far as ONI can tell; says what is there now."""
    kind, *names = work.job.words
    if kind not in ("load-batch", "purge-batch"):
        return f"; the MARC record is kept in {work.folder}" if work.folder.exists() else ""
    work.cancelled.clear()
    try:
        if kind == "load-batch" and work.ran and work.state(*names).row:
            work.note("cancelled: purging what was loaded")
            work.manage("purge_batch", *names, batch=names[0])
    except (JobFailed, ONIError, OSError) as error:
        return f"; {error}"
    return f"; {work.held(*names)}"


RECIPES: dict[str, Callable] = {"load-batch": load_batch, "purge-batch": purge_batch, "load-title": load_title,
                                "batch-patch": batch_patch}


# ---------------------------------------------------------------- the queue


class JobQueue:
    """The jobs in order, and the one thread that works on them."""

    def __init__(self, store: JobStore, settings: Settings, oni: OpenONI, on_end: Callable[[Job], None],
                 tell: Callable[[str], None]):
        self._store, self._on_end, self._tell = store, on_end, tell
        self._work_on = functools.partial(Work, settings=settings, oni=oni, store=store)
        self._changed = threading.Condition()  # guards the jobs; re-entrant
        self._jobs = {job.id: job for job in store.jobs()}
        self._waiting: queue.Queue[int] = queue.Queue()
        self._work: Work | None = None  # on the job at work
        for job in self._jobs.values():
            if not job.finished:
                self._waiting.put(job.id)

    def start(self) -> None:
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def stop(self) -> None:
        """Takes note that the agent is stopped on purpose, which is no interruption that counts."""
        if self._work and self._work.job.status == STARTED:
            with contextlib.suppress(StoreError):
                self._store.update(self._work.job, attempts=max(0, self._work.job.attempts - 1))

    def jobs(self) -> list[Job]:
        """Every job, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def get(self, id: int) -> Job | None:
        return self._jobs.get(id)

    def wait(self, job: Job, seconds: float) -> bool:
        """Waits for a job's end, so long at most; whether it has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: job.finished, seconds)

    def add(self, words: list[str], payload: bytes | None = None) -> Job:
        """Accepts a job: it is on disk when this returns. Raises StoreError."""
        with self._changed:
            job = self._store.add(words, payload)
            self._jobs[job.id] = job
            self._waiting.put(job.id)
            self._show(job, {})
            return job

    def add_once(self, words: list[str], redundant: Callable[[], bool]) -> tuple[Job | None, bool]:
        """A job on a batch, and whether it is new; None where it is `redundant()` and none on the batch is unfinished.

        The batch's last unfinished job is returned if it is the same, else the new one comes after it.
        """
        if not self._last_on(words[1]) and redundant() and not self._last_on(words[1]):
            return None, False
        with self._changed:
            last = self._last_on(words[1])
            same = last and last.words == words and not last.cancelled
            return (last, False) if same else (self.add(words), True)

    def _last_on(self, batch: str) -> Job | None:
        return next((job for job in reversed(self.jobs()) if not job.finished
                     and job.words[0] in ("load-batch", "purge-batch") and job.words[1] == batch), None)

    def cancel(self, job: Job) -> bool:
        """Sees to it that a job ends unsuccessful; False if it has ended already. Raises StoreError."""
        with self._changed:
            if job.finished or job.cancelled:
                return not job.finished
            at_work = self._work and self._work.job is job
            never = {} if at_work or job.status == STARTED else {
                "error": "cancelled before it started", "ended": time.time_ns(), "status": FAILED}
            self._store.update(job, cancelled=1, **never)
            self._show(job, {"cancelled": 1, **never})
            if at_work:
                self._work.cancelled.set()
        if never:
            self._tell_of_end(job)
        return True

    def _run(self) -> None:
        forgotten = 0.0
        while True:
            if time.monotonic() - forgotten > 3600:
                forgotten = time.monotonic()
                self._forget_old()
            with contextlib.suppress(queue.Empty):
                job = self._jobs[self._waiting.get(timeout=3600)]
                with self._changed:
                    self._work = None if job.finished else self._work_on(job)
                if self._work:
                    try:
                        self._insist(job, functools.partial(self._perform, job, self._work))
                    except Exception as fault:  # the queue goes on
                        log.exception("job=%d could not be brought to its end", job.id)
                        self._record(job, error=f"a fault of the agent: {fault!a}", ended=time.time_ns(), status=FAILED)

    def _perform(self, job: Job, work: Work) -> None:
        """Brings a job to its end, whatever happens."""
        with work:
            if job.cancelled:
                work.cancelled.set()
            self._begin(job, work)
            status, error = FAILED, ""
            try:
                if job.attempts > MAX_ATTEMPTS:
                    raise JobFailed(f"given up: {MAX_ATTEMPTS} times the agent and manage.py were gone before its end")
                work.go_on()
                RECIPES[job.words[0]](work, *job.words[1:])
                work.go_on()
                status = SUCCESSFUL
            except Cancelled:
                error = f"cancelled{undo(work)}"
            except ONIError as problem:
                status = COULD_NOT_START if isinstance(problem, ONINotRun) and not work.ran else FAILED
                error = f"{problem}; {work.held(job.words[1])}" if work.ran and job.words[1:] else str(problem)
            except (JobFailed, BatchError, StoreError, OSError) as problem:
                error = str(problem)
            except Exception as problem:
                log.exception("job=%d stumbled over a fault of the agent", job.id)
                error = f"a fault of the agent, see its log: {problem!r}"
        error = error.encode("utf-8", "replace").decode()  # it may tell of a file whose name is no text
        self._record(job, error=error, ended=time.time_ns(), status=status)  # status last: it is what others look at
        self._tell_of_end(job)

    def _tell_of_end(self, job: Job) -> None:
        log.log(logging.INFO if job.status == SUCCESSFUL else logging.WARNING, "job=%d command=%r status=%r error=%r",
                job.id, shlex.join(job.words), job.status, job.error)
        self._on_end(job)

    def _begin(self, job: Job, work: Work) -> None:
        """Marks a job as started; one that an earlier agent left started is carried on, or begun again."""
        if job.status == STARTED:
            if work.resume():
                return self._record(job, attempts=max(1, job.attempts))  # a stop on purpose has taken it back
            log.warning("job=%d was interrupted; it begins again", job.id)
            work.note("interrupted: the agent went, and manage.py is no longer at work; it begins again")
            self._record(job, status=PENDING)
        log.info("job=%d command=%r begins", job.id, shlex.join(job.words))
        self._record(job, status=STARTED, started=job.started or time.time_ns(), attempts=job.attempts + 1)

    def _record(self, job: Job, **changes) -> None:
        """Changes a job on disk, then for all to see; waits for a disk that refuses."""
        self._insist(job, functools.partial(self._store.update, job, **changes))
        self._show(job, changes)

    @staticmethod
    def _insist(job: Job, action: Callable[[], None]) -> None:
        """Does what a full disk may refuse, until it does not; a job can be begun again at any point."""
        for attempt in itertools.count():
            try:
                return action()
            except (StoreError, OSError) as error:
                if not attempt:
                    log.error("job=%d cannot go on: %s; trying again every second", job.id, error)
                time.sleep(1)

    def _show(self, job: Job, changes: dict) -> None:
        with self._changed:
            for name, value in changes.items():
                setattr(job, name, value)
            self._changed.notify_all()
            waiting = sum(each.status == PENDING for each in self._jobs.values())
            at_work = next((f"{shlex.join(each.words)} (job {each.id})" for each in self._jobs.values()
                            if each.status == STARTED), "nothing")
        self._tell(f"at work: {at_work}; waiting: {waiting}")

    def _forget_old(self) -> None:
        horizon = time.time_ns() - KEEP_DAYS * 86400 * 10**9
        finished = sorted((job for job in self.jobs() if job.finished), key=lambda job: job.ended)
        for job in (job for job in finished[:-KEEP_JOBS] if job.ended < horizon):
            with contextlib.suppress(StoreError, OSError):  # the next time, then
                self._store.remove(job)
                with self._changed:
                    del self._jobs[job.id]


# ---------------------------------------------------------------- commands


class Refused(Exception):
    """A request is answered with an error: its message, and the answer's other keys."""

    def __init__(self, message: str, **keys):
        super().__init__(message)
        self.keys = {"status": "error", "message": message, **keys}


class ClientGone(Exception):
    """The client went away before its request was whole: there is nobody to answer and nothing to do."""


@dataclass
class Answer:
    """What a request is answered: one JSON object or, where a person watches, text as it comes."""

    keys: dict
    text: Iterator[str] | None = None
    job: Job | None = None  # whose success the exit status tells; else it is 0, error or not, as NCA needs it


@dataclass
class Agent:
    """What commands work on; in a request's own copy also its words and the way to its standard input."""

    settings: Settings
    oni: OpenONI
    store: JobStore
    queue: JobQueue
    words: list[str] = field(default_factory=list)
    payload: Callable[[], bytes] = bytes
    present: Callable[[], None] = lambda: None  # raises ClientGone if it is

    def state(self, name: str) -> BatchState:
        """What ONI holds of a batch now. Raises ONIError."""
        return batch_states(self.oni, self.settings.batch_source, name)[name]

    def folder(self, name: str) -> Path:
        """Where the batch `name` lies, or would. Raises BatchError unless it is a batch's name."""
        if not BATCH_NAME.fullmatch(name):
            raise BatchError(f'"{name}" is not a batch name: Open ONI takes batch_AWARDEE_NAME_verNN')
        return self.settings.batch_source / name

    def job(self, id: str) -> Job:
        """The job that a command names. Raises Refused."""
        if not re.fullmatch(r"[+-]?\d{1,19}", id, re.ASCII) or not 0 < abs(int(id)) < 2**63:
            raise Refused(f'"{id}" is not a valid job id')
        job = Job(-1, ["no-op"], time.time_ns(), SUCCESSFUL) if int(id) == -1 else self.queue.get(int(id))
        if not job:
            raise Refused("Job not found", job={"id": int(id)})
        return job


COMMANDS: dict[str, Callable] = {}


def command(arguments: str = "", wrong: str = "") -> Callable:
    """Enters a function cmd_… in COMMANDS; `wrong` is the answer to a wrong number of arguments."""
    def enter(function: Callable) -> Callable:
        name = function.__name__[4:].replace("_", "-")
        function.usage, function.wrong = f"{name} {arguments}".rstrip(), wrong or f'"{name}" takes no arguments'
        COMMANDS[name] = function
        return function
    return enter


def answer(agent: Agent, line: bytes) -> Answer:
    """Answers one command line. Raises ClientGone and nothing else."""
    try:
        words = split_words(line)
        if not words:
            raise Refused("no command specified")
        if words[0] not in COMMANDS:
            raise Refused(f'"{words[0]}" is not a valid command name', error=f"see help{nearly(words[0], COMMANDS)}")
        function = COMMANDS[words[0]]
        try:
            inspect.signature(function).bind(agent, *words[1:])
        except TypeError:
            raise Refused(function.wrong, error=f"usage: {function.usage}") from None
        reply = function(dataclasses.replace(agent, words=words), *words[1:])
        return reply if isinstance(reply, Answer) else Answer({"status": "success", **reply})
    except Refused as refusal:
        return Answer(refusal.keys)
    except StoreError as error:
        return Answer(Refused("The agent cannot use its state folder", error=str(error)).keys)
    except ClientGone:
        raise
    except Exception as error:
        log.exception("a command stumbled over a fault of the agent")
        return Answer(Refused("A fault of the agent; its log says more", error=repr(error)).keys)


GO_WORD = r'"(?:[^"\\\x00-\x1f\x7f]|\\(?:[abfnrtv\\"]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4}))*"'
GO_LINE = re.compile(rf"\s*{GO_WORD}(?:\s+{GO_WORD})*\s*", re.ASCII)


def split_words(line: bytes) -> list[str]:
    """The words of a command line. Raises Refused.

    A line all of whose words are in double quotes is Go's (NCA quotes with %q, whose escapes are those of Python's
    literals); any other is split as a POSIX shell does.
    """
    if len(line) > MAX_COMMAND:
        raise Refused("the command line is too long", error=f"it has {len(line)} bytes; {MAX_COMMAND} are allowed")
    try:
        text = line.decode()
        words = ([ast.literal_eval(word) for word in re.findall(GO_WORD, text)] if GO_LINE.fullmatch(text)
                 else shlex.split(text))
        "".join(words).encode()  # lone surrogates are no text, and no answer could hold them
        return words
    except UnicodeError:
        raise Refused("the command line is not valid UTF-8") from None
    except ValueError as error:
        raise Refused("the quotes in the command line are unbalanced", error=str(error)) from None


@contextlib.contextmanager
def refused(message: str, **keys) -> Iterator[None]:
    """What is wrong with a request, or with Open ONI just now, becomes an error answer."""
    try:
        yield
    except (BatchError, ONIError, ValueError, OSError) as error:
        raise Refused(message, error=str(error), **keys) from error


def nearly(name: str, names: Iterable[str]) -> str:
    """A question that suggests what a wrong name may be meant to be."""
    meant = difflib.get_close_matches(name, list(names), 1)
    return f'; did you mean "{meant[0]}"?' if meant else ""


def accepted(job: Job | None, new: bool = True, **keys) -> dict:
    """The answer to a request that has become a job, was one already, or needs none."""
    if not job:
        return {"message": "No-op: job is redundant or already completed", "job": {"id": -1}}
    return {"message": "Job added to queue" if new else "Job already in queue", "job": {"id": job.id}, **keys}


def job_object(job: Job) -> dict:
    """A job as answers show it."""
    shown = {"id": job.id, "name": JOB_NAMES[job.words[0]], "queued": timestamp(job.queued), "status": job.status}
    if job.error:
        shown["error"] = job.error
    if job.id > 0:
        shown.update(words=job.words, attempts=job.attempts)
    if job.started:
        took = (job.ended or time.time_ns()) - job.started
        shown.update(started=timestamp(job.started), seconds=took // 10**6 / 1000)
    return {**shown, "ended": timestamp(job.ended)} if job.ended else shown


def batch_object(state: BatchState, folder: Path) -> dict:
    """A batch as answers show it."""
    return {"name": folder.name, "on_disk": os.path.isdir(folder), "state": state.word, "issues": state.issues,
            "pages": state.pages, "issues_in_batch_xml": state.expected, "loaded": state.loaded}


@command()
def cmd_version(agent: Agent) -> dict:
    """Says which version of the agent is running."""
    return {"version": VERSION}


@command()
def cmd_help(agent: Agent) -> dict:
    """Lists the commands."""
    return {"commands": [{"usage": function.usage, "help": inspect.getdoc(function)} for function in COMMANDS.values()]}


@command("BATCH", '"load-batch" requires exactly one batch name')
def cmd_load_batch(agent: Agent, name: str) -> dict:
    """Loads a batch from BATCH_SOURCE into Open ONI, as a job."""
    with refused(f'"{name}" cannot be loaded'):
        folder = agent.folder(name)
        try:
            check_batch(folder)
        except BatchError as error:
            there = [] if folder.exists() else filter(BATCH_NAME.fullmatch, os.listdir(agent.settings.batch_source))
            raise BatchError(f"{error}{nearly(name, there)}") from error
        return accepted(*agent.queue.add_once(agent.words, lambda: agent.state(name).complete))


@command("BATCH", '"purge-batch" requires exactly one batch name')
def cmd_purge_batch(agent: Agent, name: str) -> dict:
    """Removes a batch from Open ONI, as a job; its files stay."""
    with refused(f'"{name}" cannot be purged'):
        agent.folder(name)
        return accepted(*agent.queue.add_once(agent.words, lambda: not agent.state(name).row))


@command("< MARC.xml", '"load-title" takes no arguments; the MARC XML comes on standard input')
def cmd_load_title(agent: Agent) -> dict:
    """Loads or updates titles from MARC XML on standard input, as a job."""
    with refused("Invalid data"):
        payload = agent.payload()
        marc_lccns(payload)
    return accepted(agent.queue.add(agent.words, payload))


@command("CODE [NAME]", '"ensure-awardee" requires one or two arguments: an awardee code and, to create it, a name')
def cmd_ensure_awardee(agent: Agent, code: str, name: str = "") -> dict:
    """Makes sure that Open ONI has an awardee, at once and without a job."""
    with refused("Unable to create awardee", org_code=code, name=name):
        if not 0 < len(code) <= 50 or len(name) > 100:
            raise ValueError("an awardee code has 1 to 50 characters, a name at most 100")
        row = agent.oni.ask("awardee", code, name)
        if not row:
            raise ValueError("awardee name must be given to auto-create awardees")
        if row[0] != code:
            raise ValueError(f'Open ONI has the awardee "{row[0]}", and its database takes the two codes for one')
    return {"message": "Awardee created" if row[1] else "Awardee already exists"}


@command("OLD NEW < INSTRUCTIONS", '"batch-patch" requires exactly two batch names')
def cmd_batch_patch(agent: Agent, old: str, new: str) -> dict:
    """Makes a batch NEW from OLD, without the issues of the lines `RemoveIssue LCCN/YYYYMMDDEE`, as a job."""
    with refused(f'"{old}" cannot be modified'):
        payload = agent.payload()  # before any refusal: a program that cannot send it all may not read the answer
        if os.path.lexists(agent.folder(new)):
            raise BatchError(f'"{new}" is in BATCH_SOURCE already')
        agent.folder(old)
        if not agent.state(old).row:
            raise BatchError("batch does not exist")
        check_batch(agent.folder(old))
        read_patch(agent.folder(old), payload)
    return accepted(agent.queue.add(agent.words, payload))


@command("[STATUS]", '"list-jobs" takes at most one argument, a status')
def cmd_list_jobs(agent: Agent, status: str = "") -> dict:
    """Lists all jobs, oldest first; or those that are pending, started, "couldn't start", successful or failed."""
    if status and status not in STATUS_MESSAGES:
        raise Refused(f'"{status}" is not a job status', error=f"there are {', '.join(STATUS_MESSAGES)}")
    return {"jobs": [job_object(job) for job in agent.queue.jobs() if status in ("", job.status)]}


@functools.lru_cache(maxsize=1)
def load_progress(oni: OpenONI, source: Path, name: str, moment: int) -> dict:
    """How many issues of a batch ONI holds, asked once for each `moment`; nothing if ONI does not say."""
    with contextlib.suppress(ONIError):
        state = batch_states(oni, source, name, within=2)[name]
        return {"issues_loaded": state.issues, "issues": state.expected}
    return {}


@command("ID", "You must supply a job ID")
def cmd_job_status(agent: Agent, id: str) -> dict:
    """Says what has become of a job: for a pending one its place in the queue, for a running load how far it is."""
    job, more = agent.job(id), {}
    if job.status == PENDING:
        more = {"place": sum(not each.finished and each.id <= job.id for each in agent.queue.jobs())}
    elif job.status == STARTED and job.words[0] == "load-batch":
        more = load_progress(agent.oni, agent.settings.batch_source, job.words[1], int(time.monotonic() / 5))
    return {"message": STATUS_MESSAGES[job.status], "job": {**job_object(job), **more}}


@command("ID", "You must supply a job ID")
def cmd_job_wait(agent: Agent, id: str) -> Answer:
    """Answers as job-status when the job has ended; the exit status is 1 if it was not successful."""
    job = agent.job(id)
    while not job.finished:
        agent.queue.wait(job, 1)
        agent.present()
    return Answer({"status": "success", **cmd_job_status(agent, id)}, job=job)


@command("ID", "You must supply a job ID")
def cmd_job_follow(agent: Agent, id: str) -> Answer:
    """Shows a job's log as plain text as it comes, until the job ends; then the exit status is as job-wait's."""
    job = agent.job(id)

    def text() -> Iterator[str]:
        end, over = 0, False
        while not over:
            over = agent.queue.wait(job, 0.2)
            agent.present()
            for lines, read in agent.store.log(job).read(STDOUT, STDERR, NOTE, start=end):
                yield "".join(f"{line}\n" for line in lines)
                end = read

    return Answer({}, text=text(), job=job)


@command("ID [LINES]", "You must supply a job ID")
def cmd_job_logs(agent: Agent, id: str, count: str | None = None) -> dict:
    """Shows what a job has printed so far, or the last LINES of it, each line with its time in UTC."""
    job = agent.job(id)
    job_log = agent.store.log(job)
    if count is None:
        return {"job": {**job_object(job), "stdout": job_log.read(STDOUT, NOTE), "stderr": job_log.read(STDERR)}}
    if not re.fullmatch(r"\d{1,9}", count, re.ASCII):
        raise Refused(f'"{count}" is not a number of lines')
    last = deque((line for lines, _ in job_log.read(STDOUT, STDERR, NOTE) for line in lines), int(count))
    since = last[0] if last else "~"  # stamps increase, and sort as text
    return {"job": {**job_object(job), **{
        name: [line for lines, _ in job_log.read(*kinds) for line in lines if line >= since]
        for name, kinds in (("stdout", (STDOUT, NOTE)), ("stderr", (STDERR,)))}}}


@command("ID", "You must supply a job ID")
def cmd_job_cancel(agent: Agent, id: str) -> dict:
    """Ends a job: a pending one never starts, a running one is terminated, and what a load has loaded is purged."""
    job = agent.job(id)
    if not agent.queue.cancel(job):
        raise Refused("The job has ended already", error=STATUS_MESSAGES[job.status], job=job_object(job))
    return {"message": "Job cancelled" if job.finished else "Job is being cancelled", "job": job_object(job)}


@command("ID", "You must supply a job ID")
def cmd_job_retry(agent: Agent, id: str) -> dict:
    """Queues a job that was not successful again, as a new job."""
    job = agent.job(id)
    if job.status not in (FAILED, COULD_NOT_START):
        raise Refused("Only a failed job can be retried", error=STATUS_MESSAGES[job.status], job=job_object(job))
    if job.words[0] in ("load-batch", "purge-batch"):
        return accepted(*agent.queue.add_once(job.words, bool), retry_of=job.id)
    return accepted(agent.queue.add(job.words, agent.store.payload(job)), retry_of=job.id)


@command()
def cmd_list_batches(agent: Agent) -> dict:
    """Lists every batch that is in BATCH_SOURCE or in Open ONI, and whether it is absent, partial or complete."""
    source = agent.settings.batch_source
    with refused("The batches cannot be listed"):
        states = batch_states(agent.oni, source)
        for name in filter(BATCH_NAME.fullmatch, os.listdir(source)):
            states.setdefault(name, BatchState(False, issue_count(source / name), source))
    return {"batches": [batch_object(states[name], source / name) for name in sorted(states)]}


@command("BATCH", '"batch-status" requires exactly one batch name')
def cmd_batch_status(agent: Agent, name: str) -> dict:
    """Says what Open ONI holds of a batch, its newest events, and the jobs that the agent had for it."""
    with refused(f'"{name}" cannot be looked up'):
        folder, state = agent.folder(name), agent.state(name)
        if not state.row and not folder.exists():
            there = filter(BATCH_NAME.fullmatch, [*os.listdir(folder.parent), *agent.oni.ask("batches")["batches"]])
            raise BatchError(f"there is no such batch, in BATCH_SOURCE or in Open ONI{nearly(name, there)}")
    return {"message": str(state), "batch": batch_object(state, folder), "events": list(state.events[-5:]),
            "jobs": [job_object(job) for job in agent.queue.jobs() if name in job.words]}


# ---------------------------------------------------------------- SSH

KEX = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org")  # every client of today has one
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
TRAILER = b"\n\nEND\n"  # ends a payload; so does the end of standard input


def load_host_key(path: Path) -> paramiko.PKey:
    """The ed25519, ECDSA or RSA key in a file. Raises ValueError."""
    try:
        read_regular(path)
    except BatchError as error:
        raise ValueError(f"is {str(path)!r}, which cannot be used: {error}") from error
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        with contextlib.suppress(Exception):  # paramiko tells a foreign file in many ways
            return kind(filename=str(path))
    raise ValueError(f"is {str(path)!r}, which holds no ed25519, ECDSA or RSA key without a passphrase; it was left"
                     " as it is")


def make_host_key(path: Path) -> None:
    """Writes a new ed25519 key, and its public half beside it. Raises StoreError."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    unready = path.with_name(path.name + ".unready")  # under its name only when whole
    try:
        unready.unlink(missing_ok=True)
        with open(os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
            file.flush()
            os.fsync(file.fileno())
        path.with_name(path.name + ".pub").write_bytes(public + b" oni-agent\n")
        unready.rename(path)
    except OSError as error:
        raise StoreError(f"the HOST_KEY_FILE {path} cannot be made: {error.strerror}") from error


LOG_HERE = f"\0{os.urandom(8).hex()}"  # stands for a log while the rest of a reply is encoded


def encoded(reply: dict, indent: int | None) -> Iterator[str]:
    """A reply as JSON, in pieces. The lines of a log, which may be many, are encoded as they are read."""
    logs: list[Iterator] = []
    text = json.dumps(reply, ensure_ascii=False, indent=indent, separators=None if indent else (",", ":"),
                      default=lambda lines: logs.append(lines) or LOG_HERE)
    first, *rest = text.split(json.dumps(LOG_HERE))
    yield first
    for lines, after in zip(logs, rest):
        opening = "["
        for some, _ in lines:
            if some:
                yield opening + json.dumps(some, ensure_ascii=False, separators=(",\n" if indent else ",", ""))[1:-1]
                opening = ","
        yield ("[]" if opening == "[" else "]") + after
    yield "\n"


class ClientSocket(socket.socket):
    """An accepted socket as paramiko uses it.

    paramiko asks for more only when it has dealt with, and answered, the last message: the moment to begin a command,
    whose answer must not overtake the reply to its request.
    """

    before_read: Callable[[], None]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receives, and acknowledges at once: OpenSSH's next packet waits for that (40 ms, Nagle)."""
        self.before_read()
        if size > MAX_PACKET:  # paramiko would believe, and hold, any length
            raise EOFError
        data = super().recv(size, flags)
        if hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):
                self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


class Connection(paramiko.ServerInterface):
    """One client's connection: whom paramiko asks what is allowed, and the sessions that come of it."""

    def __init__(self, server: SSHServer, accepted: socket.socket, address: tuple):
        self.server, self.address, self.host = server, show_address(address), plain_host(address)
        self.user, self.admitted = "", "ALLOW_FROM" if server.agent.settings.allow_from else "anyone"
        self.born = self.idle_since = time.monotonic()
        self.sessions: set[Session] = set()
        self.cut_off = False
        self._begun: list[Session] = []  # sessions whose request paramiko is about to answer
        self._channels: list[paramiko.Channel] = []
        self._ttys: set[paramiko.Channel] = set()
        self._socket = ClientSocket(fileno=accepted.detach())
        self._socket.before_read = self._start_sessions
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.transport = paramiko.Transport(self._socket, disabled_algorithms={"pubkeys": ["ssh-rsa"]})  # SHA-1
        self.transport.packetizer.start_handshake = lambda timeout: None  # a timer thread each
        self.transport.local_version = f"SSH-2.0-ONI_Agent_{VERSION}"
        self.transport.add_server_key(server.host_key)
        options = self.transport.get_security_options()
        options.kex = [name for name in KEX if name in options.kex]
        options.key_types = [name for name in options.key_types if name != "ssh-rsa"]  # SHA-1, too
        options.ciphers = [name for name in CIPHERS if name in options.ciphers]
        options.digests = [name for name in MACS if name in options.digests]
        self.transport.start_server(event=threading.Event(), server=self)

    # What paramiko asks, on the transport's thread: no work here.

    def get_allowed_auths(self, username):
        return "publickey" if self.server.agent.settings.authorized_keys else "none"

    def check_auth_none(self, username):
        self.user = username
        return paramiko.AUTH_FAILED if self.server.agent.settings.authorized_keys else paramiko.AUTH_SUCCESSFUL

    def check_auth_publickey(self, username, key):
        self.user, allowed = username, self.server.agent.settings.allow_from
        if not self.server.agent.settings.authorized_keys:
            return paramiko.AUTH_FAILED  # its client tries "none" next
        if not key_is_authorized(self.server.agent.settings.authorized_keys, key, self.host):
            log.warning("connection from=%s user=%r refused key=%s", self.address, username, fingerprint(key))
            return paramiko.AUTH_FAILED
        self.admitted = ("ALLOW_FROM+" if allowed else "") + fingerprint(key)
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind, chanid):
        while channel := self.transport.accept(0):  # else paramiko keeps each for ever
            self._channels.append(channel)
        self._channels = [channel for channel in self._channels if not channel.closed]
        full = max(len(self._channels), len(self.sessions)) >= MAX_CHANNELS  # a session may outlive its channel
        if kind != "session":
            return paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        return paramiko.OPEN_FAILED_RESOURCE_SHORTAGE if full else paramiko.OPEN_SUCCEEDED

    def check_channel_pty_request(self, channel, *_):
        self._ttys.add(channel)
        return True

    def check_channel_shell_request(self, channel):
        return self.check_channel_exec_request(channel, b"")  # no shell, but an answer that says so

    def check_channel_exec_request(self, channel, command):
        if any(session.channel is channel for session in self.sessions):
            return False  # RFC 4254, 6.5: one to a channel
        session = Session(self, channel, command, channel in self._ttys)
        self.sessions.add(session)
        self._begun.append(session)
        return True

    def _start_sessions(self) -> None:
        while self._begun:
            self._begun.pop(0).start()

    def ended(self, session: Session) -> None:
        """A session is over."""
        self.idle_since = time.monotonic()
        self._ttys.discard(session.channel)
        self.sessions.discard(session)

    @property
    def half_open(self) -> bool:
        """Whether its client has not been admitted yet."""
        return not self.transport.is_authenticated()

    def overdue(self, now: float) -> str:
        """Why the connection must go by now; empty if it may stay."""
        if self.half_open and now - self.born > HANDSHAKE_SECONDS:
            return "no handshake in time"
        if not self.sessions and now - self.idle_since > IDLE_SECONDS:
            return "idle"
        return next(filter(None, (session.overdue(now) for session in list(self.sessions))), "")

    def cut(self, why: str) -> None:
        """Ends the connection at once; its threads see that and end by themselves."""
        log.debug("connection from=%s cut=%r", self.address, why)
        self.cut_off = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left; a session not begun before its client went never will be."""
        return not self.transport.is_alive() and not any(session.is_alive() for session in list(self.sessions))


class Session(threading.Thread):
    """One command on one channel, from its words to the last byte of its answer."""

    def __init__(self, connection: Connection, channel: paramiko.Channel, line: bytes, tty: bool):
        self.number = next(connection.server.numbers)
        super().__init__(name=f"session {self.number}", daemon=True)
        self.connection, self.channel, self._line, self._tty = connection, channel, line, tty
        self.begun = time.monotonic()
        self._sending_since: float | None = None  # since when the client has taken nothing

    def run(self) -> None:
        """Answers, and closes the channel in the order that loses nothing."""
        status = "client went away"
        try:
            agent = dataclasses.replace(self.connection.server.agent, payload=self._read_payload, present=self._present)
            reply = answer(agent, self._line)
            self._send(reply.text or encoded({**reply.keys, "session": {"id": self.number}}, 2 if self._tty else None))
            self._sending_since = time.monotonic()
            self.channel.send_exit_status(int(reply.job is not None and reply.job.status != SUCCESSFUL))
            status = reply.keys.get("status", "followed")
        except (ClientGone, OSError, EOFError, paramiko.SSHException):
            pass
        finally:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self.channel.close()
            self.connection.ended(self)
            log.info("session=%d from=%s user=%r admitted=%s command=%r status=%r ms=%d", self.number,
                     self.connection.address, self.connection.user, self.connection.admitted,
                     self._line[:200].decode("utf-8", "replace"), status, (time.monotonic() - self.begun) * 1000)

    def _send(self, pieces: Iterator[str]) -> None:
        self.channel.settimeout(STALL_SECONDS)
        for piece in pieces:
            data = memoryview((piece.replace("\n", "\r\n") if self._tty else piece).encode("utf-8", "replace"))
            while data:
                self._sending_since = time.monotonic()
                sent = self.channel.send(data[:CHUNK])
                if not sent:
                    raise ClientGone
                data = data[sent:]
            self._sending_since = None

    def overdue(self, now: float) -> str:
        """Why the session must end by now; paramiko itself waits for ever for a client that TCP holds back."""
        since = self._sending_since
        if since is not None and now - since > STALL_SECONDS + 5:
            return "its client does not read"
        return "a session too long" if now - self.begun > SESSION_SECONDS else ""

    def _present(self) -> None:
        """Raises ClientGone if it is; Ctrl-C on a terminal comes as a byte."""
        if self._tty and self.channel.recv_ready() and b"\x03" in self.channel.recv(1024):
            raise ClientGone
        if self.channel.closed or not self.connection.transport.is_active():
            raise ClientGone

    def _read_payload(self) -> bytes:
        """Standard input to its trailer or its end. Raises ClientGone, and ValueError, which says what is wrong."""
        self.channel.settimeout(STDIN_SECONDS)
        data = bytearray()
        while True:
            try:
                piece = self.channel.recv(65536)
                if time.monotonic() - self.begun > PAYLOAD_SECONDS:
                    raise socket.timeout
            except socket.timeout:
                raise ValueError("standard input gave nothing for too long and has not ended: close it, or send an"
                                 " empty line and END") from None
            data += piece
            ended = data.endswith(TRAILER) and not self.channel.recv_ready()
            if len(data) - (len(TRAILER) if ended else 0) > MAX_PAYLOAD + (0 if ended or not piece else len(TRAILER)):
                raise ValueError(f"there are more than {MAX_PAYLOAD >> 20} MiB on standard input")
            if ended or (not piece and self.channel.eof_received):
                return bytes(data.removesuffix(TRAILER))
            if not piece:
                raise ClientGone  # half a payload must not pass for a whole one


class SSHServer:
    """Takes connections, and sees to it that each goes when its time is up."""

    def __init__(self, agent: Agent, host_key: paramiko.PKey):
        self.agent, self.host_key = agent, host_key
        self.numbers = itertools.count(1)
        self._connections: set[Connection] = set()
        self._refused: dict[str, float] = {}  # when an address was last logged as refused
        self._listener = listen(*agent.settings.ba_bind)
        self.address = show_address(self._listener.getsockname())
        self.loopback = ipaddress.ip_address(plain_host(self._listener.getsockname())).is_loopback

    def serve(self, stop: socket.socket) -> None:
        """Serves until `stop` can be read, then lets answers under way end, for a moment."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            selector.register(stop, selectors.EVENT_READ)
            swept = 0.0
            while True:
                for key, _ in selector.select(timeout=1):
                    if not key.data:
                        name = signal.Signals(stop.recv(1)[0]).name
                        log.info("stopping on %s; what manage.py does goes on", name)
                        return self._finish()
                    key.data()
                if time.monotonic() - swept >= 1:
                    swept = time.monotonic()
                    self._sweep(swept)

    def _accept(self) -> None:
        try:
            accepted, address = self._listener.accept()
        except OSError as error:
            log.error("a connection could not be taken: %s", error)
            self._make_room(self._connections)
            return time.sleep(0.1)  # out of descriptors, say: the loop must not spin
        why = self._refusal(plain_host(address))
        if not why:
            with contextlib.suppress(OSError, RuntimeError, EOFError, paramiko.SSHException):  # gone already; no thread
                return self._connections.add(Connection(self, accepted, address))
        accepted.close()

    def _refusal(self, host: str) -> str:
        """Why a client at this address may not connect; empty if it may, for which another's connection may go."""
        allowed = self.agent.settings.allow_from
        if allowed and not any(ipaddress.ip_address(host) in network for network in allowed):
            why = "not in ALLOW_FROM"
        else:
            if len(self._connections) >= MAX_CONNECTIONS:
                self._sweep(time.monotonic())
            live = [each for each in self._connections if not each.cut_off]
            crowds = ((live, MAX_CONNECTIONS), ([each for each in live if each.host == host], MAX_FROM_ONE_ADDRESS),
                      ([each for each in live if each.half_open], MAX_HALF_OPEN))
            if all(len(crowd) < limit or self._make_room(crowd) for crowd, limit in crowds):
                return ""
            why = "too many connections, all at work"
        now = time.monotonic()
        if now - self._refused.get(host, -60) >= 60:
            self._refused = {each: when for each, when in self._refused.items() if now - when < 60}
            self._refused[host] = now
            log.warning("connection from=%s refused=%r", host, why)
        return why

    @staticmethod
    def _make_room(crowd: Iterable[Connection]) -> bool:
        idle = [each for each in crowd if not each.sessions and not each.cut_off]
        if idle:
            min(idle, key=lambda each: each.idle_since).cut("others need its place")
        return bool(idle)

    def _sweep(self, now: float) -> None:
        left = {each for each in self._connections if not each.gone}
        if len(left) < len(self._connections):
            self._connections = left
            gc.collect()  # paramiko's transports are circles, which would pile up for long
        for connection in self._connections:
            why = connection.overdue(now)
            if why and not connection.cut_off:
                connection.cut(why)

    def _finish(self) -> None:
        self._listener.close()
        until = time.monotonic() + STOP_SECONDS
        busy = [each for each in self._connections if each.sessions]
        while not all(each.gone for each in busy) and time.monotonic() < until:
            time.sleep(0.01)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; on every address, IPv6 too where there is IPv6, if `host` is empty. Raises OSError."""
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=both)
    except OSError as error:
        why = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise OSError(f"BA_BIND: nothing can listen on {host}:{port}: {why}") from error


def plain_host(address: tuple) -> str:
    """The IP address in a socket's address; an IPv4 one as such, though it came over an IPv6 socket."""
    host = ipaddress.ip_address(address[0].partition("%")[0])
    return str(getattr(host, "ipv4_mapped", None) or host)


def show_address(address: tuple) -> str:
    """A socket's address as people write it."""
    host = plain_host(address)
    return f"[{host}]:{address[1]}" if ":" in host else f"{host}:{address[1]}"


def fingerprint(key: paramiko.PKey) -> str:
    """A public key as ssh-keygen -l shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(key.asbytes()).digest()).decode().rstrip("=")


def key_is_authorized(path: Path, key: paramiko.PKey, host: str) -> bool:
    """Whether an authorized_keys file (sshd(8)) admits a key from an address; an unreadable one admits nobody.

    Of the options before a key, from="…" with addresses and networks is honoured; a key with any other is refused.
    """
    blob = re.escape(base64.b64encode(key.asbytes()).decode())
    form = re.compile(rf'\s*(?:from="([^"]*)"\s+)?{key.get_name()}\s+{blob}(?:\s.*)?', re.ASCII)
    try:
        matches = map(form.fullmatch, path.read_text("utf-8-sig", "replace").split("\n"))
    except OSError as error:
        log.error("AUTHORIZED_KEYS: %s cannot be read, so nobody is admitted: %s", path, error.strerror)
        return False
    for match in filter(None, matches):
        with contextlib.suppress(ValueError):
            if match[1] is None or any(ipaddress.ip_address(host) in each for each in networks(match[1])):
                return True
    return False


# ---------------------------------------------------------------- main


def set_up_logging(level: str) -> None:
    """The log goes to stderr; the journal of systemd knows the time and takes a priority (sd-daemon(3))."""
    form = "%(asctime)s %(levelname)s %(message)s"
    if "JOURNAL_STREAM" in os.environ:
        form = "%(levelname)s%(message)s"
        for number, priority in ((logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)):
            logging.addLevelName(number, f"<{priority}>")
    logging.basicConfig(level=level, stream=sys.stderr, format=form)
    logging.getLogger("paramiko").setLevel(logging.DEBUG if level == "DEBUG" else logging.CRITICAL)


def tell_systemd(state: str) -> None:
    """Says how the service is (sd_notify(3)), where systemd wants to know."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)


def run_on_finish(program: Path, job: Job, log_path: Path, environ: dict[str, str]) -> None:
    """Runs ON_FINISH for a job that has ended, 60 s at most; what becomes of it is only logged."""
    about = {"ID": str(job.id), "COMMAND": shlex.join(job.words), "STATUS": job.status,
             "ERROR": job.error.replace("\0", ""), "LOG": str(log_path)}
    try:
        subprocess.run([str(program)], env={**environ, **{f"ONI_JOB_{name}": value for name, value in about.items()}},
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("job=%d ON_FINISH failed: %s", job.id, error)


def check_oni(oni: OpenONI) -> None:
    """Says in the log whether ONI's settings hold; an ONI that does not answer is no reason not to serve."""
    try:
        log.info("Open ONI in %s: %s", oni.location, oni.check())
    except ONIError as error:
        log.error("Open ONI in %s: %s", oni.location, error)


def check_all(environ: dict[str, str]) -> int:
    """Looks at everything that the agent needs, and says it a line each; the exit status is 1 if something is wrong."""
    wrong = 0

    def look(name: str, at: Callable[[], object], advice: str = "") -> object:
        nonlocal wrong
        try:
            found = at()
            print("✓", name)
            return found
        except (SettingsError, ONIError, StoreError, OSError, ValueError) as error:
            wrong += 1
            for problem in error.args if isinstance(error, SettingsError) else [f"{name}: {error}; {advice}"]:
                print("✗", problem)

    def writable(folder: Path) -> None:
        tempfile.TemporaryFile(dir=folder).close()

    def state() -> None:
        writable(nearest_folder(settings.state_directory))
        if (settings.state_directory / "jobs.db").exists():
            JobStore(settings.state_directory).jobs()

    def host_key() -> None:
        if os.path.lexists(settings.host_key_file):
            load_host_key(settings.host_key_file)
        elif settings.host_key_file.parent != settings.state_directory:
            writable(settings.host_key_file.parent)

    settings = look("settings", lambda: Settings(environ))
    if settings:
        oni = OpenONI(settings.oni_location, environ)
        look("state folder", state, "if an agent is at work there, ask that instead")
        look("host key", host_key, "see HOST_KEY_FILE")
        look("address", lambda: listen(*settings.ba_bind).close(), "set BA_BIND to a free port")
        look("batch source", lambda: os.listdir(settings.batch_source), "let the agent's user read it")
        look("manage.py check", oni.check, "run it by hand, as the agent's user")
        held = look("database", lambda: oni.ask("batches", within=PATIENT_SECONDS), "see ONI's database settings")
        oni.rest()
        look("ONI's log/", lambda: writable(settings.oni_location / "log"), "let the agent's user write there")
        if held:
            look("ONI's batch storage", lambda: writable(Path(held["storage"])), "let the agent's user write there")
    return int(wrong > 0)


def stop_on_signals() -> socket.socket:
    """A socket that can be read once SIGTERM or SIGINT has come; a second signal ends the agent at once."""
    reader, writer = socket.socketpair()

    def stop(number: int, _) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: os._exit(1))
        writer.send(bytes([number]))  # no more than that: the signal may have come in the middle of a log line

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return reader


def main() -> int:
    """Runs the agent until it is told to stop; returns its exit status."""
    parser = argparse.ArgumentParser(prog="oni_agent.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ONI Agent {VERSION}")
    parser.add_argument("--check", action="store_true", help="look at all that the agent needs, and say what is wrong")
    environ = dict(os.environ)
    if parser.parse_args().check:
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a ✓
        return check_all(environ)
    try:
        settings = Settings(environ)
    except SettingsError as error:
        print("\n".join(f"oni_agent: {problem}." for problem in error.args), file=sys.stderr)
        return 2
    set_up_logging(settings.log_level)
    stop = stop_on_signals()
    try:
        store = JobStore(settings.state_directory)
        if not os.path.lexists(settings.host_key_file):
            make_host_key(settings.host_key_file)
        oni = OpenONI(settings.oni_location, environ)

        def ended(job: Job) -> None:
            if settings.on_finish:
                threading.Thread(target=run_on_finish, daemon=True, args=(
                    settings.on_finish, job, store.log(job).path, oni.environment)).start()

        jobs = JobQueue(store, settings, oni, ended, lambda text: tell_systemd(f"STATUS={text}"))
        server = SSHServer(Agent(settings, oni, store, jobs), load_host_key(settings.host_key_file))
    except (StoreError, OSError) as error:
        print(f"oni_agent: {error}.", file=sys.stderr)
        return 1
    log.info("listening on %s version=%s state=%s", server.address, VERSION, settings.state_directory)
    if settings.db_connection:
        log.info("DB_CONNECTION is set and not needed: the database is asked through Open ONI's own settings")
    if not settings.allow_from and not settings.authorized_keys and not server.loopback:
        log.warning("anyone who reaches %s may load and purge: set ALLOW_FROM or AUTHORIZED_KEYS", server.address)
    gc.freeze()  # what is there by now stays, and need not be looked at
    jobs.start()
    threading.Thread(target=check_oni, args=(oni,), daemon=True).start()
    tell_systemd("READY=1")
    server.serve(stop)
    tell_systemd("STOPPING=1")
    jobs.stop()
    return 0


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads: whatever they do may be cut off at any instant
