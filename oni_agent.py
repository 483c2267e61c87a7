#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["paramiko>=2.12"]
# ///
"""ONI Agent: loads and purges the batches of an Open ONI site on request, over SSH.

Run it on the Open ONI host, as a user who may run ONI's manage.py. It listens for SSH,
takes commands such as

    ssh -p 2222 nobody@localhost load-batch batch_oru_alpha_ver01

puts them in one queue, runs them one at a time with ONI's own manage.py, and answers
with one JSON object. `ssh -p 2222 nobody@localhost help` lists the commands.

Settings come from the environment:

  ONI_LOCATION     Open ONI's folder, the one that holds manage.py and ENV/ (required)
  BATCH_SOURCE     the folder whose subfolders are batches (required)
  BA_BIND          where to listen: host:port, [v6]:port or :port for every address
                   (default 127.0.0.1:2222)
  STATE_DIRECTORY  where jobs, their logs and the host key are kept
                   (default $XDG_STATE_HOME/oni-agent or ~/.local/state/oni-agent)
  HOST_KEY_FILE    the SSH host key, made if missing (default host_key in the state folder)
  LOG_LEVEL        debug, info, warning or error (default info); the log is on stderr
  DB_CONNECTION    accepted for old units, not needed: ONI's own settings are used
"""
from __future__ import annotations

import argparse
import ast
import calendar
import contextlib
import fcntl
import functools
import inspect
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NoReturn, Optional

warnings.filterwarnings("ignore", module="paramiko")  # old releases warn of ciphers we switch off
try:
    import paramiko
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
except ImportError as error:
    sys.exit(f"oni_agent needs paramiko, which {sys.executable} cannot import ({error}). Install the package"
             " python3-paramiko (Debian, Ubuntu; on RHEL-like systems from EPEL), or: python3 -m pip install paramiko")

VERSION = "1.0.0"
log = logging.getLogger("oni_agent")

# ---------------------------------------------------------------- limits

MAX_CONNECTIONS = 640  # in all; beyond it the connection that has been idle longest makes room
MAX_CHANNELS = 10  # open at once on one connection, as OpenSSH's MaxSessions
MAX_COMMAND = 16 * 1024  # bytes of a command line
MAX_PAYLOAD = 32 * 1024 * 1024  # bytes on standard input
HANDSHAKE_SECONDS = 15  # from connecting to being admitted
IDLE_SECONDS = 30  # without a command at work; NCA never closes a connection itself
STDIN_SECONDS = 30  # without a byte of a payload that is still incomplete
STALL_SECONDS = 60  # without a client's taking any of its answer
STOP_SECONDS = 1.5  # for answers under way when the agent is told to stop
MAX_LINE = 64 * 1024  # bytes of one line in a job's log; a longer line is cut into pieces
MAX_ATTEMPTS = 3  # starts of a job that never ended
ANSWER_SECONDS = 10  # for Open ONI to answer a question
PATIENT_SECONDS = 60  # the same, when a job at work asks
REST_SECONDS = 600  # without a question, after which the manage.py that answers them ends
KEEP_DAYS = 90  # for which a finished job and its log are kept
TICK = 0.02  # seconds between two looks at what manage.py has printed
CHUNK = 256 * 1024  # bytes of a log or an answer handled at once

# ---------------------------------------------------------------- settings

OWN_VARIABLES = ("ONI_LOCATION", "BATCH_SOURCE", "BA_BIND", "STATE_DIRECTORY", "HOST_KEY_FILE", "LOG_LEVEL",
                 "DB_CONNECTION")


class SettingsError(Exception):
    """The environment does not describe an agent; each argument is a sentence that says what to mend."""


@dataclass(frozen=True)
class Settings:
    """What an administrator tells the agent, checked."""

    oni_location: Path
    batch_source: Path
    bind: tuple[str, int]
    state: Path
    host_key_file: Path
    log_level: str

    @classmethod
    def read(cls, environ: dict[str, str]) -> Settings:
        """The settings in `environ`. Raises SettingsError with every problem at once."""
        problems: list[str] = []

        def setting(name: str, read: Callable[[str], object], default: str = "") -> object:
            try:
                return read(environ.get(name) or default)
            except (ValueError, OSError) as error:
                problems.append(f"{name} {error}")

        state = setting("STATE_DIRECTORY", private_folder, default_state_folder(environ))
        settings = cls(
            oni_location=setting("ONI_LOCATION", functools.partial(existing_folder, holding="manage.py")),
            batch_source=setting("BATCH_SOURCE", existing_folder),
            bind=setting("BA_BIND", bind_address, "127.0.0.1:2222"),
            state=state,
            host_key_file=setting("HOST_KEY_FILE", host_key_file, str((state or Path()) / "host_key")),
            log_level=setting("LOG_LEVEL", known_log_level, "info"),
        )
        if problems:
            raise SettingsError(*problems)
        return settings


def default_state_folder(environ: dict[str, str]) -> str:
    """The state folder of an agent that systemd has not given one (XDG Base Directory Specification)."""
    home = environ.get("XDG_STATE_HOME") or os.path.join(environ.get("HOME") or "~", ".local", "state")
    return os.path.join(home, "oni-agent")


def existing_folder(value: str, holding: str = "") -> Path:
    """`value` as the absolute path of a folder, which holds a file named `holding`."""
    if not value:
        raise ValueError("is not set: give the folder" + (f" that holds ONI's {holding}" if holding else " of the batches"))
    path = Path(value).resolve()
    if not path.is_dir():
        raise ValueError(f"is {value!r}, which is not a folder")
    if holding and not (path / holding).is_file():
        raise ValueError(f"is {value!r}, a folder without {holding}")
    return path


def private_folder(value: str) -> Path:
    """The folder `value`, made if missing, closed to other users (mode 0700)."""
    path = Path(value.split(":")[0]).expanduser().resolve()  # systemd separates several by colons
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise ValueError(f"is {str(path)!r}, which cannot be used: {error.strerror}; name a folder"
                         " that the agent's user may write to") from error
    return path


def bind_address(value: str) -> tuple[str, int]:
    """`host:port`, `[v6 address]:port` or `:port` as a pair; host "" means every address."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):(\d{1,5})", value, re.ASCII)
    if not match or not 0 <= int(match[3]) < 65536:
        raise ValueError(f"is {value!r}; write host:port, [IPv6 address]:port or :port")
    return match[1] or match[2], int(match[3])


def host_key_file(value: str) -> Path:
    """`value` as a path; if there is a file, it holds a usable key."""
    path = Path(value).expanduser().resolve()
    if path.exists():
        load_host_key(path)
    elif not path.parent.is_dir():
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
        chosen = model.objects.filter(**{field + "__in": names}) if names else model.objects.all()
        return chosen.order_by()
    held = {row.name: {"loaded": row.created.isoformat(), "issues": 0, "pages": 0, "events": []}
            for row in rows(Batch, "name")}
    for model, field, shown in (Issue, "batch", "issues"), (Page, "issue__batch", "pages"):
        for name, count in rows(model, field).values_list(field).annotate(Count("pk")):
            held[name][shown] = count
    for event in rows(LoadBatchEvent, "batch_name").order_by("created", "pk"):
        if event.batch_name in held:
            held[event.batch_name]["events"].append([event.created.isoformat(), event.message])
    return {"storage": settings.BATCH_STORAGE, "batches": held}

def title(lccn):
    return lccn in Title.objects.filter(lccn=lccn).values_list("lccn", flat=True)

def awardee(code, name):
    if name:
        row, new = Awardee.objects.get_or_create(org_code=code, defaults={"name": name})
    else:
        row, new = Awardee.objects.filter(org_code=code).first(), False
    return row and [row.org_code, row.name, new]

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
        self.environment.update(
            VIRTUAL_ENV=str(location / "ENV"),
            PATH=f"{location / 'ENV' / 'bin'}:{environ.get('PATH', os.defpath)}",
            PYTHONUNBUFFERED="1",  # else lines come in lumps of 8 KB
        )
        self._asking = threading.Lock()
        self._child: Optional[subprocess.Popen] = None  # a manage.py shell that answers QUESTIONS
        self._complaints = tempfile.TemporaryFile()  # its stderr
        self._rest = threading.Timer(0, self.rest)

    def start(self, *words: str, **options) -> subprocess.Popen:
        """manage.py with `words`, started in a session of its own, so that it outlives the agent.

        `options` are Popen's. Raises ONINotRun.
        """
        manage = self.location / "manage.py"
        program = [manage] if os.access(manage, os.X_OK) else [self.location / "ENV" / "bin" / "python3", manage]
        try:
            return subprocess.Popen([*map(str, program), *words], cwd=self.location, env=self.environment,
                                    start_new_session=True, **{"stdin": subprocess.DEVNULL, **options})
        except OSError as error:
            raise ONINotRun(f"couldn't run {program[0]}: {error.strerror}") from error

    def check(self) -> str:
        """What `manage.py check` says of ONI's settings; it asks neither database nor Solr. Raises ONIError."""
        process = self.start("check", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output = process.communicate(timeout=60)[0].decode("utf-8", "replace").strip()
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise ONIError("manage.py check did not end within 60 s") from None
        last = output.rpartition("\n")[2]
        if process.returncode:
            raise ONIError(f"manage.py check ended with exit status {process.returncode}: {last}")
        return last

    def ask(self, *question: str, within: float = ANSWER_SECONDS) -> object:
        """What ONI's own models say to one of QUESTIONS. Raises ONIError, after `within` seconds at most.

        A `manage.py shell` is kept warm for it: its first answer takes half a second, later ones a
        few milliseconds.
        """
        until = time.monotonic() + within
        late = ONIError(f"Open ONI did not answer within {within:g} s")
        if not self._asking.acquire(timeout=within):
            raise late
        try:
            self._rest.cancel()
            reply = (self._child and self._exchange(question, until)) or self._exchange(question, until, anew=True)
        except TimeoutError:
            self._end_child()
            raise late from None
        finally:
            self._rest = threading.Timer(REST_SECONDS, self.rest)
            self._rest.daemon = True
            self._rest.start()
            self._asking.release()
        if not reply:
            raise ONIError(f"Open ONI cannot be asked: {self._last_complaint()}")
        if "error" in reply:
            raise ONIError(f"Open ONI cannot answer: {reply['error']}")
        return reply["answer"]

    def _exchange(self, question: tuple, until: float, anew: bool = False) -> Optional[dict]:
        """The reply to a question; None if the child ends instead. Raises TimeoutError, ONINotRun."""
        if anew:
            self._end_child()
            self._complaints.truncate(0)
            self._child = self.start("shell", "-c", f"exec({QUESTIONS!r}, {{'MARK': {self.MARK!r}}})",
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints)
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
            os.killpg(self._child.pid, signal.SIGKILL)  # it writes nothing but what an answer reports
            self._child.communicate()
        self._child = None

    def _last_complaint(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().decode("utf-8", "replace").strip().split("\n")
        return lines[-1] or "manage.py shell ended without a word"


# ---------------------------------------------------------------- batch files

BATCH_NAME = re.compile(r"batch_\w+_\w+_ver\d\d")  # what load_batch takes


class BatchError(Exception):
    """Something is wrong with a batch's files; the text is a sentence."""


class PlainXML(ET.TreeBuilder):
    """Builds a tree of XML without a DOCTYPE, and so without entities that grow or point elsewhere."""

    def doctype(self, *_) -> NoReturn:
        raise ValueError("a DOCTYPE is not allowed")


def parse_xml(data: bytes) -> ET.Element:
    """The root of the XML in `data`. Raises ValueError, which says what is wrong and where."""
    try:
        return ET.fromstring(data, ET.XMLParser(target=PlainXML()))
    except (ET.ParseError, LookupError) as error:
        raise ValueError(str(error)) from error


def read_regular(path: Path) -> bytes:
    """The content of a regular file. Raises BatchError, in the words NCA's people know from the Go agent."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # a FIFO must not hold us
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
        name = (issue.text or "").strip()
        path = folder / "data" / name
        if not os.path.realpath(path).startswith(root):
            raise BatchError(f"reading file: {name!r} in batch.xml lies outside the batch's folder")
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise BatchError(f"reading file: {path} is not a regular file")
        except (OSError, ValueError) as error:
            raise BatchError(f"reading file: open {path}: {getattr(error, 'strerror', error)!s}".lower()) from error


@dataclass(frozen=True)
class BatchState:
    """What ONI's database holds of a batch, beside what the batch's files say it should.

    Neither a row nor the number of issues nor the last event alone proves that a batch is
    loaded (ONI.md, "What decides that a batch is loaded"): all three together do.
    """

    row: bool
    issues: int = 0
    pages: int = 0
    loaded: str = ""  # when the row was made
    events: tuple = ()  # [time, message], oldest first
    expected: Optional[int] = None  # issues in batch.xml; None: there is none to be read
    link: Path = Path()  # where ONI's storage has its link to the batch

    @property
    def complete(self) -> bool:
        """Whether all of the batch is in the database."""
        return self.row and self.issues == self.expected and self._processed

    @property
    def _processed(self) -> bool:
        return not self.events or self.events[-1][1].startswith("processed")

    @property
    def word(self) -> str:
        """The state in a word."""
        if self.row and self.expected is None:
            return "unknown"
        return "complete" if self.complete else "partial" if self.row else "absent"

    def __str__(self) -> str:
        if not self.row:
            return "ONI holds nothing of the batch"
        if self.expected is None:
            return f"ONI holds {self.issues} issues, and there is no batch.xml to say whether that is all"
        held = f"ONI holds {self.issues} of the {self.expected} issues in batch.xml"
        if self.complete:
            return f"the batch is complete: {held}"
        return held if self._processed else f'{held}, and its last event is "{self.events[-1][1]}"'


def batch_states(oni: OpenONI, source: Path, *names: str, within: float = ANSWER_SECONDS) -> dict[str, BatchState]:
    """The state of each of the batches `names`, or of each that ONI has. Raises ONIError."""
    reply = oni.ask("batches", *names, within=within)
    states = {}
    for name in names or reply["batches"]:
        link = Path(reply["storage"]) / name
        expected = None
        for folder in (source / name, link):
            with contextlib.suppress(BatchError):
                expected = len(batch_issues(folder))
                break
        held = reply["batches"].get(name)
        states[name] = BatchState(bool(held), **(held or {}), expected=expected, link=link)
    return states


def marc_lccns(data: bytes) -> list[str]:
    """The LCCNs (010 $a, blanks removed) of the MARC records in an XML document. Raises ValueError.

    Real files may wrap the records; as ONI does, they are found wherever they stand.
    """
    lccns = []
    for record in parse_xml(data).iter():
        if str(record.tag).rpartition("}")[2] != "record" or record.find("{*}datafield") is None:
            continue
        field = record.find("{*}datafield[@tag='010']/{*}subfield[@code='a']")
        lccn = re.sub(r"\s", "", field.text or "") if field is not None else ""
        if not lccn:
            raise ValueError("a MARC record has no LCCN (field 010 $a), so Open ONI would not store it")
        lccns.append(lccn)
    if not lccns:
        raise ValueError("there is no MARC record in it")
    return lccns


def read_patch(old: Path, instructions: bytes) -> tuple[set[str], bytes]:
    """What a patch does to a batch: the folders of the issues it removes, in data/, and its new batch.xml.

    Raises BatchError where an instruction is not `RemoveIssue LCCN/YYYYMMDDEE` or the batch has no such issue.
    """
    plain = functools.partial(re.sub, "[-_]", "")
    keys, folders = {}, []
    for number, issue in enumerate(batch_issues(old)):
        folders.append(os.path.dirname(os.path.normpath((issue.text or "").strip())))
        edition = issue.get("issueDate", "") + issue.get("editionOrder", "").zfill(2)
        for name in (edition, os.path.basename(folders[number])):
            keys[plain(f"{issue.get('lccn')}/{name}")] = number
    removed = set()
    for number, line in enumerate(instructions.decode("utf-8", "replace").splitlines(), 1):
        word, _, operand = line.strip().partition(" ")
        if word and word != "RemoveIssue":
            raise BatchError(f"line {number}: {word!r} is not an instruction; RemoveIssue is the only one")
        if word and plain(operand.strip()) not in keys:
            raise BatchError(f"line {number}: {old.name} holds no issue {operand.strip()!r}; write LCCN/YYYYMMDDEE")
        if word:
            removed.add(keys[plain(operand.strip())])
    if not removed:
        raise BatchError("there is no instruction to remove an issue")
    return {folders[number] for number in removed}, without_issues(read_regular(old / "data" / "batch.xml"), removed)


def without_issues(data: bytes, removed: set[int]) -> bytes:
    """A batch.xml without the issue elements of these numbers, counted from 0; all else to the byte."""
    parser = xml.parsers.expat.ParserCreate(namespace_separator=" ")
    issues, kept, depth = itertools.count(), [0], 0  # kept: where kept stretches begin and end, in turn

    def event(*_) -> None:
        if len(kept) % 2 == 0 and not depth:
            kept.append(parser.CurrentByteIndex)

    def start(name: str, _) -> None:
        nonlocal depth
        event()
        if depth or (name.rpartition(" ")[2] == "issue" and next(issues) in removed):
            kept.extend([parser.CurrentByteIndex][depth:])
            depth += 1

    def end(_) -> None:
        nonlocal depth
        event()
        depth = max(0, depth - 1)

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = parser.CommentHandler = parser.ProcessingInstructionHandler = event
    parser.Parse(data, True)
    return b"".join(data[here:there] for here, there in zip(kept[::2], [*kept[1::2], len(data)]))


def patch_batch_files(old: Path, new: Path, instructions: bytes, say: Callable[[str], None]) -> None:
    """Makes the batch `new` of the batch `old`: without removed issues, TIFFs and validated XML.

    It is built under another name and renamed when whole, so it may be begun again at any time;
    a `new` that is there already must be what it would become. Raises BatchError, OSError.
    """
    gone, batch_xml = read_patch(old, instructions)
    sizes: dict[str, int] = {}
    for folder, folders, files in os.walk(old):
        inside = os.path.relpath(folder, old / "data")
        folders[:] = [name for name in folders if os.path.normpath(os.path.join(inside, name)) not in gone]
        for name in files + [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            path = Path(folder, name)
            if re.fullmatch(r".*(\.tiff?|_1\.xml)", name, re.IGNORECASE | re.DOTALL):
                continue
            if not stat.S_IFMT(path.lstat().st_mode) in (stat.S_IFREG, stat.S_IFLNK):
                raise BatchError(f"{path} is neither a file nor a link, and cannot be copied")
            sizes[os.path.relpath(path, old)] = path.lstat().st_size
    sizes[os.path.join("data", "batch.xml")] = len(batch_xml)
    if os.path.lexists(new):
        if (new / "data" / "batch.xml").read_bytes() != batch_xml or any(
                not os.path.lexists(new / name) or (new / name).lstat().st_size != size for name, size in sizes.items()):
            raise BatchError(f"{new} is there already, and is not what this patch would make; move it away")
        return say(f"nothing to do: {new} is there already, and is what this patch makes")
    unready = new.with_name(f"WIP-UNREADY-{new.name}")
    if unready.exists():
        say(f"removing {unready}, which an interrupted patch has left")
        shutil.rmtree(unready)
    need, free = sum(sizes.values()), shutil.disk_usage(new.parent).free
    if need > free:
        raise BatchError(f"the patch needs {need:,} bytes in {new.parent}, where {free:,} are free")
    copied, tenth = 0, 0
    for name, size in sizes.items():
        (unready / name).parent.mkdir(parents=True, exist_ok=True)
        if name == os.path.join("data", "batch.xml"):
            (unready / name).write_bytes(batch_xml)
        else:
            shutil.copy2(old / name, unready / name, follow_symlinks=False)
        if (unready / name).lstat().st_size != size:
            raise BatchError(f"{old / name} changed while it was copied, or {unready / name} is not whole")
        copied += size
        if copied * 10 // (need or 1) > tenth:
            tenth = copied * 10 // need
            say(f"{tenth * 10} % of {need:,} bytes copied")
    os.sync()
    unready.rename(new)
    say(f"{new} is ready: {len(sizes)} files")


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
    started: Optional[int] = None
    ended: Optional[int] = None
    error: str = ""
    attempts: int = 0  # how often it was begun; more than one: an interruption lies between

    @property
    def name(self) -> str:
        """What the protocol calls this kind of job."""
        return JOB_NAMES[self.words[0]]

    @property
    def finished(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.status not in (PENDING, STARTED)


class JobStore:
    """The jobs on disk: `jobs.db` and `logs/` in the state folder, and that folder's locks.

    Raises StoreError where the folder is another agent's or its jobs.db is not ours to write.
    """

    APPLICATION = 0x4F4E4941  # "ONIA", SQLite's application_id
    VERSION = 1
    SCHEMA = """CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT, words TEXT NOT NULL, payload BLOB,
                queued INTEGER NOT NULL, status TEXT NOT NULL, started INTEGER, ended INTEGER,
                error TEXT NOT NULL, attempts INTEGER NOT NULL)"""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run_lock = folder / "run.lock"  # held by the manage.py at work
        self._lock = threading.Lock()
        self._keep_others_out()
        try:
            (folder / "logs").mkdir(mode=0o700, exist_ok=True)
            self._database = self._open(folder / "jobs.db")
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"{folder / 'jobs.db'} cannot be used: {error}; nothing was changed") from error

    def _keep_others_out(self) -> None:
        self._agent_lock = open(self.folder / "agent.lock", "a")
        for _ in range(20):  # a killed agent's last child may hold the lock until it has become manage.py
            with contextlib.suppress(BlockingIOError):
                return fcntl.flock(self._agent_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            time.sleep(0.05)
        raise StoreError(f"another ONI Agent is at work on {self.folder}; give this one a STATE_DIRECTORY of its own")

    def _open(self, path: Path) -> sqlite3.Connection:
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)  # each statement commits
        pragma = lambda name: database.execute(f"PRAGMA {name}").fetchone()[0]
        new = not database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not new and pragma("application_id") != self.APPLICATION:
            raise StoreError(f"{path} is not an ONI Agent's; nothing was changed")
        if pragma("user_version") > self.VERSION:
            raise StoreError(f"{path} was written by a newer ONI Agent; nothing was changed")
        if pragma("quick_check(1)") != "ok":
            raise StoreError(f"{path} is damaged; put a copy from your backup in its place, or move it away")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # what is answered is on disk
        if new:
            database.executescript(f"BEGIN; {self.SCHEMA}; PRAGMA application_id = {self.APPLICATION};"
                                   f" PRAGMA user_version = {self.VERSION}; COMMIT;")
        return database

    def _execute(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        with self._lock:
            try:
                return self._database.execute(statement, values)
            except sqlite3.Error as error:
                raise StoreError(f"the agent's {self.folder / 'jobs.db'} cannot be written: {error}") from error

    def jobs(self) -> list[Job]:
        """Every job, oldest first."""
        columns = ("id", "words", "queued", "status", "started", "ended", "error", "attempts")
        rows = self._execute(f"SELECT {', '.join(columns)} FROM jobs ORDER BY id").fetchall()
        return [Job(**{**dict(zip(columns, row)), "words": json.loads(row[1])}) for row in rows]

    def add(self, words: list[str], payload: Optional[bytes]) -> Job:
        """A new pending job, safely on disk when this returns. Raises StoreError: then there is no job."""
        job = Job(0, words, time.time_ns())
        row = (json.dumps(words), payload, job.queued, job.status, job.error, job.attempts)
        job.id = self._execute("INSERT INTO jobs (words, payload, queued, status, error, attempts)"
                               " VALUES (?, ?, ?, ?, ?, ?)", row).lastrowid
        return job

    def update(self, job: Job, **changes) -> None:
        """Changes columns of a job, safely on disk when this returns. Raises StoreError."""
        self._execute(f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in changes)} WHERE id = ?",
                      (*changes.values(), job.id))

    def payload(self, job: Job) -> bytes:
        """What came on standard input with the request."""
        return self._execute("SELECT payload FROM jobs WHERE id = ?", (job.id,)).fetchone()[0] or b""

    def job_folder(self, job: Job) -> Path:
        """A private folder for a job's files, not made yet."""
        return self.folder / "titles" / str(job.id)

    def log(self, job: Job) -> JobLog:
        """The job's log."""
        return JobLog(self.folder / "logs" / f"{job.id}.log")

    def remove(self, job: Job) -> None:
        """Forgets a job: its log first, so that a crash in between leaves no log without a job."""
        with contextlib.suppress(FileNotFoundError):
            self.log(job).path.unlink()
        shutil.rmtree(self.job_folder(job), ignore_errors=True)
        self._execute("DELETE FROM jobs WHERE id = ?", (job.id,))


def timestamp(nanoseconds: int) -> str:
    """A moment in UTC with nine digits: fixed width, because NCA sorts log lines as strings."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:09d}Z"


class JobLog:
    """What a job printed and what the agent did for it, in a text file that `tail -f` can show.

    Each line is `[2026-11-22T11:07:19.061730250Z] K text`, K being O (manage.py's stdout), E (its
    stderr), A (the agent's own note) or $ (the command that the lines after it belong to). Stamps
    increase strictly, whatever the clock does.
    """

    KIND = len("[2026-11-22T11:07:19.061730250Z] ")  # where a line's K stands

    def __init__(self, path: Path):
        self.path = path
        self._file = None
        self._size = 0
        self._stamp = 0  # nanoseconds: of the newest line

    def open(self) -> dict[bytes, int]:
        """Makes the log ready to go on; returns how many O and E lines its newest command has, if it has one.

        A line that a crash cut short goes: what it was copied from is still there.
        """
        self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        counts, newest = {}, b""
        for lines in self._lines():
            self._size += sum(map(len, lines)) + len(lines)
            newest = lines[-1]
            for line in lines:
                kind = line[self.KIND:self.KIND + 1]
                if kind == COMMAND:
                    counts = {STDOUT: 0, STDERR: 0}
                elif kind in counts:
                    counts[kind] += 1
        with contextlib.suppress(ValueError):  # a damaged line tells no time
            seconds = calendar.timegm(time.strptime(newest[1:20].decode(), "%Y-%m-%dT%H:%M:%S"))
            self._stamp = seconds * 10**9 + int(newest[21:30])
        self._file.truncate(self._size)
        self._file.seek(self._size)
        return counts

    def close(self) -> None:
        """Puts the log safely on disk."""
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()

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
        self._stamp = max(time.time_ns(), self._stamp + 1)
        if self._stamp % 10**9 + len(lines) > 10**9:  # one second, one prefix
            self._stamp += 10**9 - self._stamp % 10**9
        second, first = divmod(self._stamp, 10**9)
        form = time.strftime("[%Y-%m-%dT%H:%M:%S.%%09dZ] ", time.gmtime(second)).encode() + kind + b" %b\n"
        data = b"".join([form % stamped for stamped in enumerate(lines, first)])
        try:
            written = self._file.write(data)
            if written < len(data):  # a disk that has just become full says so at the next write only
                self._file.write(data[written:])
        except OSError:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise
        self._size += len(data)
        self._stamp += len(lines) - 1

    def _lines(self) -> Iterator[list[bytes]]:
        """The log's lines, as many at once as fit in a chunk; nothing where the log is gone."""
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb", buffering=0) as file:
            rest, left = b"", os.fstat(file.fileno()).st_size  # not what is appended meanwhile
            while left > 0:
                data = file.read(min(CHUNK, left))
                if not data:
                    return
                left -= len(data)
                *lines, rest = (rest + data).split(b"\n")
                if lines:
                    yield lines

    def read(self, *kinds: bytes) -> Iterator[list[str]]:
        """The lines of these kinds as the protocol shows them, `[stamp] text`, many at once."""
        at = self.KIND
        for lines in self._lines():
            yield [(line[:at] + line[at + 2:]).decode("utf-8", "replace")
                   for line in lines if line[at:at + 1] in kinds]


# ---------------------------------------------------------------- recipes


class JobFailed(Exception):
    """A job ended without doing what it was to do; the text says why, and what ONI holds now."""


@dataclass
class Run:
    """One manage.py that has ended."""

    status: Optional[int] = None  # exit status, -N for signal N, None if an earlier agent started it
    first_error: str = ""  # its first [ERROR] line
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=20))  # of stderr

    def read(self, lines: list[bytes]) -> None:
        """Takes note of what was printed on stderr."""
        if not self.first_error:
            self.first_error = next((line[8:].decode("utf-8", "replace") for line in lines
                                     if line.startswith(b"[ERROR] ")), "")
        self.last_lines.extend(line.decode("utf-8", "replace") for line in lines[-20:] if line.strip())

    @property
    def complaint(self) -> str:
        """Its first [ERROR] line, else the last on stderr."""
        return self.first_error or (self.last_lines or ["nothing"])[-1]

    @property
    def reason(self) -> str:
        """How it ended, and why."""
        if self.status < 0:
            return f"killed by signal {-self.status} ({signal.Signals(-self.status).name})"
        return f"exit status {self.status}: {self.complaint}"

    def says(self, pattern: str) -> bool:
        """Whether one of its last lines on stderr has the pattern."""
        return any(re.search(pattern, line) for line in self.last_lines)


class Tail:
    """The lines that a running command appends to a file.

    A line longer than MAX_LINE comes in pieces, always cut at the same places, so that lines can be counted.
    """

    def __init__(self, path: Path, skip: int):
        self._file = open(path, "rb", buffering=0)
        self._rest = b""
        self._skip = skip  # lines that are in the log already

    def read(self, over: bool) -> list[bytes]:
        """The next lines, none if there are none yet; when the command is `over`, an unfinished one too."""
        data = self._file.read(CHUNK)
        lines = (self._rest + data).split(b"\n")
        lines = [piece for line in lines for piece in self._pieces(line)]
        self._rest = lines.pop()
        if over and not data and self._rest:
            lines, self._rest = [self._rest], b""
        skipped, self._skip = self._skip, max(0, self._skip - len(lines))
        return lines[skipped:]

    @staticmethod
    def _pieces(line: bytes) -> Iterator[bytes]:
        while len(line) > MAX_LINE:
            end = MAX_LINE
            while end > MAX_LINE - 4 and line[end] & 0xC0 == 0x80:  # not within a character
                end -= 1
            yield line[:end]
            line = line[end:]
        yield line


class Work:
    """One job at work: what a recipe can do and say."""

    def __init__(self, job: Job, settings: Settings, oni: OpenONI, store: JobStore):
        self.job = job
        self.source = settings.batch_source
        self.oni = oni
        self.payload = functools.partial(store.payload, job)
        self.folder = store.job_folder(job)
        self._lock = store.run_lock
        self._outputs = {STDOUT: store.folder / "run.out", STDERR: store.folder / "run.err"}
        self._log = store.log(job)

    def __enter__(self) -> Work:
        self._copied = self._log.open()
        return self

    def __exit__(self, *_) -> None:
        self._log.close()

    def note(self, text: str) -> None:
        """Says in the job's log what the agent does."""
        self._log.write(NOTE, [text.encode()])

    def state(self, name: str) -> BatchState:
        """What ONI holds of a batch now. Raises ONIError."""
        return batch_states(self.oni, self.source, name, within=PATIENT_SECONDS)[name]

    def manage(self, *words: str, batch: str = "") -> Run:
        """Runs manage.py with `words` to a good end, its output going to the job's log.

        Its output goes to files and it inherits a locked file, so that it outlives this agent
        and the next one can tell, and read on. Raises ONINotRun, or JobFailed, which says why
        and what ONI holds of `batch` now.
        """
        with locked(self._lock) as lock, contextlib.ExitStack() as files:
            out, err = (files.enter_context(open(path, "wb")) for path in self._outputs.values())
            self._log.write(COMMAND, [shlex.join(["manage.py", *words]).encode()])
            process = self.oni.start(*words, stdout=out, stderr=err, pass_fds=[lock.fileno()])
        self._copied = dict.fromkeys(self._outputs, 0)
        run = self._follow(process)
        if run.status:
            raise JobFailed("; ".join([run.reason, *([self.held(batch)] if batch else [])]))
        return run

    def held(self, batch: str) -> str:
        """What ONI holds of a batch now, in words; or that nobody knows."""
        try:
            return str(self.state(batch))
        except ONIError as error:
            return f"what ONI holds of the batch now is not known: {error}"

    def resume(self) -> bool:
        """Copies what the manage.py of an earlier agent printed since; whether it was still at work.

        If so, this returns when it has ended.
        """
        survives = is_locked(self._lock)
        if survives:
            log.warning("job=%d is adopted: its manage.py is still at work", self.job.id)
        if self._copied:
            self._follow()
        return survives

    def _follow(self, process: Optional[subprocess.Popen] = None) -> Run:
        """Copies what manage.py prints, until it and all that it left behind have ended."""
        run, ended = Run(), threading.Event()

        def wait() -> None:
            run.status = process and process.wait()
            with locked(self._lock):
                ended.set()

        threading.Thread(target=wait, daemon=True).start()
        tails = {kind: Tail(path, self._copied[kind]) for kind, path in self._outputs.items()}
        found = over = False
        while found or not over:
            over = ended.wait(0 if found else TICK)
            found = False
            for kind, tail in tails.items():
                lines = tail.read(over)
                if lines:
                    found = True
                    self._log.write(kind, lines)
                if kind == STDERR:
                    run.read(lines)
        return run


@contextlib.contextmanager
def locked(path: Path) -> Iterator:
    """Waits for the lock on a file and holds it; a process that inherits the file goes on holding it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock on a file."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def load_batch(work: Work, name: str) -> None:
    """ONI holds the whole batch. A part of it is purged first: load_batch would leave it as it is."""
    state = work.state(name)
    if state.complete:
        return work.note(f"nothing to do: {state}")
    if state.row:
        work.note(f"{state}; purging that before the load")
        work.manage("purge_batch", name, batch=name)
        state = work.state(name)
    remove_leftover_link(work, state.link, work.source / name)
    run = work.manage("load_batch", str(work.source / name), batch=name)
    state = work.state(name)
    if not state.complete:
        raise JobFailed(f"{state}; load_batch ended with exit status 0, but said: {run.complaint}")


def remove_leftover_link(work: Work, link: Path, folder: Path) -> None:
    """A link that a killed load of another copy left would make load_batch load that copy again."""
    if link.is_symlink() and os.path.realpath(link) != os.path.realpath(folder):
        work.note(f"removing {link}, a leftover link to {os.readlink(link)}")
        link.unlink()
    elif link.exists() and not link.is_symlink():
        raise JobFailed(f"{link} is no link but a real folder or file, which load_batch cannot replace: move it away")


def purge_batch(work: Work, name: str) -> None:
    """ONI's database holds nothing of the batch."""
    if not work.state(name).row:
        return work.note("nothing to do: ONI holds nothing of the batch")
    run = work.manage("purge_batch", name, batch=name)
    state = work.state(name)
    if state.row:
        raise JobFailed(f"{state}; purge_batch ended with exit status 0, but said: {run.complaint}")


def load_title(work: Work) -> None:
    """ONI holds the titles of a MARC file as the file has them. The file is kept where that fails."""
    folder = work.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "marc.xml").write_bytes(work.payload())
    kept = f"the MARC record is kept in {folder}"
    try:
        run = work.manage("load_titles", str(folder))
    except JobFailed as failure:
        raise JobFailed(f"{failure}; {kept}") from failure
    missing = [lccn for lccn in marc_lccns(work.payload()) if not work.oni.ask("title", lccn, within=PATIENT_SECONDS)]
    if missing or not run.says(r"ERRORS: 0\b"):
        held = f"ONI has no title {', '.join(missing)}" if missing else "ONI has not updated every title"
        raise JobFailed(f"{held}; load_titles ended with exit status 0, but said: {run.complaint}; {kept}")
    shutil.rmtree(folder)


def batch_patch(work: Work, old: str, new: str) -> None:
    """The batch `new` is the batch `old` without the issues that the payload names."""
    if not work.state(old).row:
        raise JobFailed("batch does not exist")
    patch_batch_files(work.source / old, work.source / new, work.payload(), work.note)


RECIPES: dict[str, Callable] = {"load-batch": load_batch, "purge-batch": purge_batch, "load-title": load_title,
                                "batch-patch": batch_patch}


# ---------------------------------------------------------------- the queue


class JobQueue:
    """The jobs in order, and the one thread that works on them."""

    def __init__(self, store: JobStore, settings: Settings, oni: OpenONI):
        self._store = store
        self._work = functools.partial(Work, settings=settings, oni=oni, store=store)
        self._changed = threading.Condition()  # guards the jobs; re-entrant
        self._jobs = {job.id: job for job in store.jobs()}
        self._waiting: queue.Queue[int] = queue.Queue()
        for job in self._jobs.values():
            if not job.finished:
                self._waiting.put(job.id)

    def start(self) -> None:
        """Begins to work."""
        threading.Thread(target=self._run, name="worker", daemon=True).start()

    def jobs(self) -> list[Job]:
        """Every job, oldest first."""
        with self._changed:
            return list(self._jobs.values())

    def get(self, id: int) -> Optional[Job]:
        """The job with this id."""
        with self._changed:
            return self._jobs.get(id)

    def add(self, words: list[str], payload: Optional[bytes] = None) -> Job:
        """Accepts a job: it is on disk when this returns. Raises StoreError."""
        with self._changed:
            job = self._store.add(words, payload)
            self._jobs[job.id] = job
            self._waiting.put(job.id)
            return job

    def add_once(self, words: list[str], redundant: Callable[[], bool]) -> tuple[Optional[Job], bool]:
        """Accepts a job on a batch, unless it is there already: the job, and whether it is new.

        The batch's last unfinished job decides. It is the same: that one is returned. It is another:
        the new one comes after it. There is none: there is no need for a job, None, if `redundant()`.
        Raises StoreError.
        """
        if not self._last_on(words[1]) and redundant() and not self._last_on(words[1]):
            return None, False
        with self._changed:
            last = self._last_on(words[1])
            return (last, False) if last and last.words == words else (self.add(words), True)

    def _last_on(self, batch: str) -> Optional[Job]:
        with self._changed:
            return next((job for job in reversed(self._jobs.values()) if not job.finished
                         and job.words[0] in ("load-batch", "purge-batch") and job.words[1] == batch), None)

    def _run(self) -> None:
        forgotten = 0.0
        while True:
            if time.monotonic() - forgotten > 3600:
                forgotten = time.monotonic()
                self._forget_old()
            with contextlib.suppress(queue.Empty):
                self._perform(self._jobs[self._waiting.get(timeout=3600)])

    def _perform(self, job: Job) -> None:
        """Brings a job to its end, whatever happens."""
        with self._work(job) as work:
            self._begin(job, work)
            status, error = SUCCESSFUL, ""
            try:
                if job.attempts > MAX_ATTEMPTS:
                    raise JobFailed(f"the agent's host or manage.py was lost {MAX_ATTEMPTS} times while this job ran")
                RECIPES[job.words[0]](work, *job.words[1:])
            except ONINotRun as problem:
                status, error = COULD_NOT_START, str(problem)
            except (JobFailed, ONIError, BatchError, OSError) as problem:
                status, error = FAILED, str(problem)
            except Exception as problem:
                log.exception("job=%d stumbled over a fault of the agent", job.id)
                status, error = FAILED, f"a fault of the agent, see its log: {problem!r}"
        self._record(job, status=status, error=error, ended=time.time_ns())
        log.log(logging.INFO if status == SUCCESSFUL else logging.WARNING, "job=%d command=%r status=%r error=%r",
                job.id, shlex.join(job.words), status, error)

    def _begin(self, job: Job, work: Work) -> None:
        """Marks a job as started; one that an earlier agent left started is carried on, or begun again."""
        if job.status == STARTED:
            if work.resume():
                return
            log.warning("job=%d was interrupted; it begins again", job.id)
            work.note("interrupted: the agent went, and manage.py is no longer at work; it begins again")
            self._record(job, status=PENDING)
        log.info("job=%d command=%r begins", job.id, shlex.join(job.words))
        self._record(job, status=STARTED, started=job.started or time.time_ns(), attempts=job.attempts + 1)

    def _record(self, job: Job, **changes) -> None:
        """Changes a job on disk, then for all to see; waits for a disk that refuses."""
        refused = False
        while True:
            try:
                self._store.update(job, **changes)
                break
            except StoreError as error:
                if not refused:
                    log.error("job=%d cannot be recorded: %s; trying again every second", job.id, error)
                refused = True
                time.sleep(1)
        with self._changed:
            vars(job).update(changes)
            self._changed.notify_all()

    def _forget_old(self) -> None:
        horizon = time.time_ns() - KEEP_DAYS * 86400 * 10**9
        for job in self.jobs():
            if job.finished and job.ended < horizon:
                self._store.remove(job)
                with self._changed:
                    del self._jobs[job.id]


# ---------------------------------------------------------------- commands


class Refused(Exception):
    """A request is answered with an error: its message, and the answer's other keys."""

    def __init__(self, message: str, **keys):
        super().__init__(message)
        self.answer = {"status": "error", "message": message, **keys}


class ClientGone(Exception):
    """The client went away before its request was whole, so there is nobody to answer and nothing to do."""


@dataclass
class Agent:
    """What commands work on."""

    settings: Settings
    oni: OpenONI
    store: JobStore
    queue: JobQueue


@dataclass
class Request:
    """One request: its words, and the way to its standard input."""

    agent: Agent
    words: list[str]
    payload: Callable[[], bytes]

    def state(self, name: str) -> BatchState:
        """What ONI holds of a batch now. Raises ONIError."""
        return batch_states(self.agent.oni, self.agent.settings.batch_source, name)[name]


@dataclass
class Command:
    """A word of the API: the function that answers it and how it is used."""

    run: Callable[..., dict]
    name: str
    arguments: str
    wrong: str  # the message for a wrong number of arguments

    @property
    def summary(self) -> str:
        """What the command does, in a sentence."""
        return inspect.getdoc(self.run).replace("\n", " ")

    def takes(self, words: list[str]) -> bool:
        """Whether the number of arguments is right."""
        try:
            inspect.signature(self.run).bind(None, *words)
            return True
        except TypeError:
            return False


COMMANDS: dict[str, Command] = {}


def command(arguments: str = "", wrong: str = "") -> Callable:
    """Enters a function cmd_… in COMMANDS; its arguments after the first are the command's."""
    def enter(run: Callable) -> Callable:
        name = run.__name__.removeprefix("cmd_").replace("_", "-")
        COMMANDS[name] = Command(run, name, arguments, wrong or f'"{name}" takes no arguments')
        return run
    return enter


def answer(agent: Agent, line: bytes, payload: Callable[[], bytes]) -> dict:
    """Answers one command line, without the session's number. Raises ClientGone and nothing else."""
    try:
        words = split_words(line)
        if not words:
            raise Refused("no command specified")
        if words[0] not in COMMANDS:
            raise Refused(f'"{words[0]}" is not a valid command name')
        chosen = COMMANDS[words[0]]
        if not chosen.takes(words[1:]):
            raise Refused(chosen.wrong, error=f"usage: {chosen.name} {chosen.arguments}".rstrip())
        return {"status": "success", **chosen.run(Request(agent, words, payload), *words[1:])}
    except Refused as refusal:
        return refusal.answer
    except (StoreError, sqlite3.Error) as error:
        return Refused("The agent cannot use its state folder", error=str(error)).answer
    except ClientGone:
        raise
    except Exception as error:
        log.exception("a command stumbled over a fault of the agent")
        return Refused("A fault of the agent; its log says more", error=repr(error)).answer


GO_WORD = r'"(?:[^"\\\x00-\x1f\x7f]|\\(?:[abfnrtv\\"]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4}))*"'
GO_LINE = re.compile(rf"\s*{GO_WORD}(?:\s+{GO_WORD})*\s*", re.ASCII)


def split_words(line: bytes) -> list[str]:
    """The words of a command line. Raises Refused.

    A line all of whose words are in double quotes is Go's (NCA quotes with %q, whose escapes
    are those of Python's literals); any other is split as a POSIX shell does.
    """
    if len(line) > MAX_COMMAND:
        raise Refused("the command line is too long", error=f"it has {len(line)} bytes; at most {MAX_COMMAND} are taken")
    try:
        text = line.decode()
        if GO_LINE.fullmatch(text):
            words = [ast.literal_eval(word) for word in re.findall(GO_WORD, text)]
        else:
            words = shlex.split(text)
        "".join(words).encode()  # Go writes no lone surrogates; nor can an answer
    except UnicodeError:
        raise Refused("the command line is not valid UTF-8") from None
    except ValueError as error:
        raise Refused("the quotes in the command line are unbalanced", error=str(error)) from None
    return words


@contextlib.contextmanager
def refused(message: str, **keys) -> Iterator[None]:
    """What is wrong with a request, or with Open ONI just now, becomes an error answer."""
    try:
        yield
    except (BatchError, ONIError, ValueError) as error:
        raise Refused(message, error=str(error), **keys) from error


def batch_folder(request: Request, name: str) -> Path:
    """Where the batch `name` lies, or would. Raises BatchError unless it is a batch's name."""
    if not BATCH_NAME.fullmatch(name):
        raise BatchError(f'"{name}" is not a batch name: Open ONI takes batch_AWARDEE_NAME_verNN')
    return request.agent.settings.batch_source / name


def requested_job(request: Request, id: str) -> Job:
    """The job that a command names. Raises Refused."""
    if not re.fullmatch(r"[+-]?\d{1,19}", id, re.ASCII) or not 0 < abs(int(id)) < 2**63:
        raise Refused(f'"{id}" is not a valid job id')
    if int(id) == -1:
        return Job(-1, ["no-op"], time.time_ns(), SUCCESSFUL)
    job = request.agent.queue.get(int(id))
    if not job:
        raise Refused("Job not found", job={"id": int(id)})
    return job


def job_object(job: Job) -> dict:
    """A job as answers show it."""
    shown = {"id": job.id, "name": job.name, "queued": timestamp(job.queued), "status": job.status}
    return {**shown, "error": job.error} if job.error else shown


def accepted(job: Optional[Job], new: bool = True) -> dict:
    """The answer to a request that has become a job, was one already, or needs none."""
    if not job:
        return {"message": "No-op: job is redundant or already completed", "job": {"id": -1}}
    return {"message": "Job added to queue" if new else "Job already in queue", "job": {"id": job.id}}


@command()
def cmd_version(request: Request) -> dict:
    """Says which version of the agent is running."""
    return {"version": VERSION}


@command()
def cmd_help(request: Request) -> dict:
    """Lists the commands."""
    return {"commands": [{"usage": f"{each.name} {each.arguments}".rstrip(), "help": each.summary}
                         for each in COMMANDS.values()]}


@command("BATCH", '"load-batch" requires exactly one batch name')
def cmd_load_batch(request: Request, name: str) -> dict:
    """Loads a batch from BATCH_SOURCE into Open ONI, as a job."""
    refusal = f'"{name}" cannot be loaded'
    with refused(refusal):
        check_batch(batch_folder(request, name))
        return accepted(*request.agent.queue.add_once(request.words, lambda: request.state(name).complete))


@command("BATCH", '"purge-batch" requires exactly one batch name')
def cmd_purge_batch(request: Request, name: str) -> dict:
    """Removes a batch from Open ONI, as a job; its files stay."""
    with refused(f'"{name}" cannot be purged'):
        batch_folder(request, name)
        return accepted(*request.agent.queue.add_once(request.words, lambda: not request.state(name).row))


@command("< MARC.xml", '"load-title" takes no arguments; the MARC XML comes on standard input')
def cmd_load_title(request: Request) -> dict:
    """Loads or updates titles from MARC XML on standard input, as a job."""
    with refused("Invalid data"):
        payload = request.payload()
        marc_lccns(payload)
    return accepted(request.agent.queue.add(request.words, payload))


@command("CODE [NAME]", '"ensure-awardee" requires one or two arguments: an awardee code and, to create it, a name')
def cmd_ensure_awardee(request: Request, code: str, name: str = "") -> dict:
    """Makes sure that Open ONI has an awardee, at once and without a job."""
    keys = {"org_code": code, "name": name}
    with refused("Unable to create awardee", **keys):
        if not 0 < len(code) <= 50 or len(name) > 100:
            raise ValueError("an awardee code has 1 to 50 characters, a name at most 100")
        row = request.agent.oni.ask("awardee", code, name)
        if not row:
            raise ValueError("awardee name must be given to auto-create awardees")
        if row[0] != code:
            raise ValueError(f'Open ONI has the awardee "{row[0]}", which its database takes for the same code')
    return {"message": "Awardee created" if row[2] else "Awardee already exists"}


@command("OLD NEW < INSTRUCTIONS", '"batch-patch" requires exactly two batch names')
def cmd_batch_patch(request: Request, old: str, new: str) -> dict:
    """Makes a batch NEW from OLD without the issues that `RemoveIssue LCCN/YYYYMMDDEE` lines name, as a job."""
    with refused(f'"{old}" cannot be modified'):
        check_batch(batch_folder(request, old))
        if os.path.lexists(batch_folder(request, new)):
            raise BatchError(f'"{new}" is in BATCH_SOURCE already')
        payload = request.payload()
        read_patch(batch_folder(request, old), payload)
        if not request.state(old).row:
            raise BatchError("batch does not exist")
    return accepted(request.agent.queue.add(request.words, payload))


@command()
def cmd_list_jobs(request: Request) -> dict:
    """Lists all jobs, oldest first."""
    return {"jobs": [job_object(job) for job in request.agent.queue.jobs()]}


@command("ID", "You must supply a job ID")
def cmd_job_status(request: Request, id: str) -> dict:
    """Says what has become of a job."""
    job = requested_job(request, id)
    return {"message": STATUS_MESSAGES[job.status], "job": job_object(job)}


@command("ID", "You must supply a job ID")
def cmd_job_logs(request: Request, id: str) -> dict:
    """Shows what a job has printed so far, each line with its time in UTC."""
    job = requested_job(request, id)
    log = request.agent.store.log(job)
    return {"job": {**job_object(job), "stdout": log.read(STDOUT, NOTE), "stderr": log.read(STDERR)}}


# ---------------------------------------------------------------- SSH

KEX = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org")
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes128-ctr", "aes192-ctr", "aes256-ctr")
MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
TRAILER = b"\n\nEND\n"  # ends a payload; so does the end of standard input


def load_host_key(path: Path) -> paramiko.PKey:
    """The ed25519, ECDSA or RSA key in a file. Raises ValueError."""
    try:
        path.read_bytes()
    except OSError as error:
        raise ValueError(f"is {str(path)!r}, which cannot be read: {error.strerror}") from error
    for kind in (paramiko.Ed25519Key, paramiko.ECDSAKey, paramiko.RSAKey):
        with contextlib.suppress(Exception):  # paramiko tells a foreign file in many ways
            return kind(filename=str(path))
    raise ValueError(f"is {str(path)!r}, which holds no ed25519, ECDSA or RSA key without a passphrase;"
                     " it was left as it is")


def make_host_key(path: Path) -> None:
    """Writes a new ed25519 key, and its public half beside it. Raises OSError."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                                serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(public + b" oni-agent\n")
    unready = path.with_name(path.name + ".unready")  # under its name only when whole
    unready.unlink(missing_ok=True)
    with open(os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(private)
        file.flush()
        os.fsync(file.fileno())
    unready.rename(path)


def encoded(value: object, end: str = "", step: str = "") -> Iterator[str]:
    """`value` as JSON, in pieces: compact, or with `end` as line break and `step` as indentation.

    A dict's values may be iterators of lists; each becomes one array, of which only a piece is in memory.
    """
    inner = end + step
    if isinstance(value, dict):
        for number, (key, item) in enumerate(value.items()):
            yield ("," if number else "{") + inner + json.dumps(key) + (": " if end else ":")
            yield from encoded(item, inner, step)
        yield end + "}" if value else "{}"
    elif isinstance(value, (list, Iterator)):
        opening = "["
        for items in value if isinstance(value, Iterator) else [value]:
            if items and isinstance(items[0], str):  # the many lines of a log
                yield opening + inner + json.dumps(items, ensure_ascii=False, separators=("," + inner, ""))[1:-1]
                opening = ","
                continue
            for item in items:
                yield opening + inner
                yield from encoded(item, inner, step)
                opening = ","
        yield end + "]" if opening == "," else "[]"
    else:
        yield json.dumps(value, ensure_ascii=False)


def gathered(pieces: Iterator[str]) -> Iterator[bytes]:
    """The pieces as UTF-8, joined to chunks that are worth sending."""
    held, size = [], 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield "".join(held).encode()
            held, size = [], 0
    yield "".join(held).encode()


class ClientSocket(socket.socket):
    """An accepted socket as paramiko uses it.

    paramiko asks for more only when it has dealt with, and answered, the last message: the moment
    to begin a command whose answer must not overtake the reply to its request.
    """

    before_read: Callable[[], None]

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receives, and acknowledges at once: OpenSSH's next packet waits for it (40 ms, Nagle)."""
        self.before_read()
        data = super().recv(size, flags)
        if hasattr(socket, "TCP_QUICKACK"):
            with contextlib.suppress(OSError):
                self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data


class Connection(paramiko.ServerInterface):
    """One client's connection: whom paramiko asks what is allowed, and the sessions that come of it."""

    def __init__(self, server: SSHServer, accepted: socket.socket, address: str):
        self.server = server
        self.address = address
        self.user = ""
        self.born = self.idle_since = time.monotonic()
        self.sessions: set[Session] = set()
        self._begun: list[Session] = []  # sessions whose request paramiko is about to answer
        self._channels: list[paramiko.Channel] = []
        self._ttys: set[int] = set()
        self.cut_off = False
        self._socket = ClientSocket(fileno=accepted.detach())
        self._socket.before_read = self._start_sessions
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.transport = paramiko.Transport(self._socket)
        self.transport.local_version = f"SSH-2.0-ONI_Agent_{VERSION}"
        self.transport.add_server_key(server.host_key)
        options = self.transport.get_security_options()
        options.kex = [name for name in KEX if name in options.kex]
        options.ciphers = [name for name in CIPHERS if name in options.ciphers]
        options.digests = [name for name in MACS if name in options.digests]
        self.transport.start_server(event=threading.Event(), server=self)

    def get_allowed_auths(self, username: str) -> str:
        """As paramiko asks: the ways to authenticate."""
        return "none"

    def check_auth_none(self, username: str) -> int:
        """As paramiko asks: anyone who reaches the agent may use it."""
        self.user = username
        return paramiko.AUTH_SUCCESSFUL

    def check_channel_request(self, kind: str, chanid: int) -> int:
        """As paramiko asks: sessions only, and not too many."""
        while True:
            channel = self.transport.accept(0)  # else paramiko keeps each for ever
            if not channel:
                break
            self._channels.append(channel)
        self._channels = [channel for channel in self._channels if not channel.closed]
        if kind != "session":
            return paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        if len(self._channels) >= MAX_CHANNELS:
            return paramiko.OPEN_FAILED_RESOURCE_SHORTAGE
        return paramiko.OPEN_SUCCEEDED

    def check_channel_pty_request(self, channel: paramiko.Channel, *_) -> bool:
        """As paramiko asks: a terminal is taken note of."""
        self._ttys.add(channel.get_id())
        return True

    def check_channel_shell_request(self, channel: paramiko.Channel) -> bool:
        """As paramiko asks: no shell, but an answer that says so."""
        return self.check_channel_exec_request(channel, b"")

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        """As paramiko asks: a command, the only one of its channel (RFC 4254, 6.5)."""
        if any(session.channel is channel for session in self.sessions):
            return False
        session = Session(self, channel, command, channel.get_id() in self._ttys)
        self.sessions.add(session)
        self._begun.append(session)
        return True

    def _start_sessions(self) -> None:
        while self._begun:
            self._begun.pop().start()

    def ended(self, session: Session) -> None:
        """A session is over."""
        self.idle_since = time.monotonic()
        self.sessions.discard(session)

    def overdue(self, now: float) -> str:
        """Why the connection must go by now; empty if it may stay."""
        if not self.transport.is_authenticated() and now - self.born > HANDSHAKE_SECONDS:
            return "no handshake in time"
        if not self.sessions and now - self.idle_since > IDLE_SECONDS:
            return "idle"
        if any(session.stalled(now) for session in list(self.sessions)):
            return "its client does not read"
        return ""

    def cut(self, why: str) -> None:
        """Ends the connection at once; its threads see that and end by themselves."""
        log.debug("connection from=%s is cut: %s", self.address, why)
        self.cut_off = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left."""
        return not self.transport.is_alive() and not self.sessions


class Session(threading.Thread):
    """One command on one channel, from its words to the last byte of its answer."""

    def __init__(self, connection: Connection, channel: paramiko.Channel, line: bytes, tty: bool):
        self.number = next(connection.server.numbers)
        super().__init__(name=f"session {self.number}", daemon=True)
        self.connection = connection
        self.channel = channel
        self._line = line
        self._break = "\r\n" if tty else "\n"
        self._indent = ("\r\n", "  ") if tty else ()
        self._sending_since: Optional[float] = None  # since when the client has taken nothing

    def run(self) -> None:
        """Answers, and closes the channel in the order that loses nothing."""
        begun = time.monotonic()
        status = "client went away"
        try:
            reply = answer(self.connection.server.agent, self._line, self._read_payload)
            self._send({**reply, "session": {"id": self.number}})
            self.channel.send_exit_status(0)  # NCA's library takes any other for a broken connection
            status = reply["status"]
        except (ClientGone, OSError, EOFError, paramiko.SSHException):
            pass
        finally:
            with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
                self.channel.close()
            self.connection.ended(self)
            log.info("session=%d from=%s user=%r command=%r status=%r ms=%d", self.number, self.connection.address,
                     self.connection.user, self._line[:200].decode("utf-8", "replace"), status,
                     (time.monotonic() - begun) * 1000)

    def _send(self, reply: dict) -> None:
        self.channel.settimeout(STALL_SECONDS)
        for chunk in gathered(itertools.chain(encoded(reply, *self._indent), [self._break])):
            while chunk:
                self._sending_since = time.monotonic()
                sent = self.channel.send(chunk)
                if not sent:
                    raise ClientGone
                chunk = chunk[sent:]
        self._sending_since = None

    def stalled(self, now: float) -> bool:
        """Whether the client has taken nothing of its answer for too long, though TCP holds (paramiko waits for ever)."""
        return self._sending_since is not None and now - self._sending_since > STALL_SECONDS + 5

    def _read_payload(self) -> bytes:
        """Standard input to its trailer or its end. Raises Refused, ClientGone."""
        self.channel.settimeout(STDIN_SECONDS)
        data = bytearray()
        try:
            while True:
                piece = self.channel.recv(65536)
                data += piece
                if len(data) > MAX_PAYLOAD + len(TRAILER):
                    raise Refused("Invalid data", error=f"more than {MAX_PAYLOAD >> 20} MiB on standard input")
                if data.endswith(TRAILER) and not self.channel.recv_ready():
                    return bytes(data[:-len(TRAILER)])
                if not piece and self.channel.eof_received:
                    return bytes(data)
                if not piece:
                    raise ClientGone  # half a payload must not pass for a whole one
        except socket.timeout:
            raise Refused("Invalid data", error=f"standard input gave nothing for {STDIN_SECONDS} s and has not ended:"
                                                " close it, or send an empty line and END") from None


class SSHServer:
    """Takes connections, and sees to it that each goes when its time is up."""

    def __init__(self, agent: Agent, host_key: paramiko.PKey):
        self.agent = agent
        self.host_key = host_key
        self.numbers = itertools.count(1)
        self._connections: set[Connection] = set()
        self._listener = listen(*agent.settings.bind)
        log.info("listening on %s, ONI Agent %s, state in %s", show_address(self._listener.getsockname()), VERSION,
                 agent.settings.state)

    def serve(self, stop: socket.socket) -> None:
        """Serves until `stop` can be read, then lets answers under way end, for a moment."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, self._accept)
            selector.register(stop, selectors.EVENT_READ, None)
            swept = 0.0
            while True:
                for key, _ in selector.select(timeout=1):
                    if not key.data:
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
            self._make_room()
            time.sleep(0.1)  # out of descriptors, say: the loop must not spin
            return
        if sum(not each.cut_off for each in self._connections) >= MAX_CONNECTIONS and not self._make_room():
            log.warning("connection from=%s is refused: all %d are at work", show_address(address), MAX_CONNECTIONS)
            return accepted.close()
        try:
            self._connections.add(Connection(self, accepted, show_address(address)))
        except Exception as error:  # no thread to be had, or gone already
            log.warning("connection from=%s failed: %s", show_address(address), error)
            accepted.close()

    def _make_room(self) -> bool:
        idle = [each for each in self._connections if not each.sessions and not each.cut_off]
        if idle:
            min(idle, key=lambda each: each.idle_since).cut("another one needs its place")
        return bool(idle)

    def _sweep(self, now: float) -> None:
        self._connections = {each for each in self._connections if not each.gone}
        for connection in self._connections:
            why = connection.overdue(now)
            if why and not connection.cut_off:
                connection.cut(why)

    def _finish(self) -> None:
        self._listener.close()
        until = time.monotonic() + STOP_SECONDS
        for connection in self._connections:
            for session in list(connection.sessions):
                session.join(max(0, until - time.monotonic()))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; every address, IPv6 too where there is IPv6, if `host` is empty. Raises OSError."""
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((host, port), family=family, backlog=512, dualstack_ipv6=both)


def show_address(address: tuple) -> str:
    """A socket's address as people write it."""
    host, port = address[0], address[1]
    host = host[7:] if host.startswith("::ffff:") else host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# ---------------------------------------------------------------- main


def set_up_logging(level: str) -> None:
    """The log goes to stderr; under systemd the journal knows the time."""
    form = "%(levelname)s %(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr)
    logging.getLogger("paramiko").setLevel(logging.DEBUG if level == "DEBUG" else logging.CRITICAL)


def check_oni(oni: OpenONI) -> None:
    """Says in the log whether ONI's settings hold; an ONI that does not answer is no reason not to serve."""
    try:
        log.info("Open ONI in %s: %s", oni.location, oni.check())
    except ONIError as error:
        log.error("Open ONI in %s: %s", oni.location, error)


def stop_on_signals() -> socket.socket:
    """A socket that can be read once SIGTERM or SIGINT has come; a second signal ends the agent at once."""
    reader, writer = socket.socketpair()

    def stop(number: int, _) -> None:
        log.info("stopping on %s; what manage.py does goes on", signal.Signals(number).name)
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, lambda *_: os._exit(1))
        writer.send(b"!")

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return reader


def main() -> int:
    """Runs the agent until it is told to stop; returns its exit status."""
    parser = argparse.ArgumentParser(prog="oni_agent.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"ONI Agent {VERSION}")
    parser.parse_args()
    try:
        settings = Settings.read(dict(os.environ))
    except SettingsError as error:
        for problem in error.args:
            print(f"oni_agent: {problem}.", file=sys.stderr)
        return 2
    set_up_logging(settings.log_level)
    if "DB_CONNECTION" in os.environ:
        log.info("DB_CONNECTION is set and not needed: the database is asked through Open ONI's own settings")
    try:
        stop = stop_on_signals()
        if not settings.host_key_file.exists():
            make_host_key(settings.host_key_file)
        store = JobStore(settings.state)
        oni = OpenONI(settings.oni_location, dict(os.environ))
        agent = Agent(settings, oni, store, JobQueue(store, settings, oni))
        server = SSHServer(agent, load_host_key(settings.host_key_file))
    except (StoreError, OSError) as error:
        print(f"oni_agent: {error}.", file=sys.stderr)
        return 1
    agent.queue.start()
    threading.Thread(target=check_oni, args=(oni,), daemon=True).start()
    server.serve(stop)
    logging.shutdown()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads: whatever they do is safe to cut off at any instant
