#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["paramiko>=2.12"]
# ///
"""ONI Agent: loads and purges the batches of an Open ONI site on request, over SSH.

Run it on the Open ONI host, as the user that the site runs as. It listens for SSH, takes commands
such as

    ssh -p 2222 nobody@localhost load-batch batch_oru_alpha_ver01

puts them in one queue, runs them one at a time with ONI's own manage.py, and answers each with one
JSON object. `ssh -p 2222 nobody@localhost help` lists the commands; with a terminal (`ssh -t`, or
no command at all) the answers are text. Settings come from the environment:

  ONI_LOCATION     Open ONI's folder, which holds manage.py and ENV/ (required)
  BATCH_SOURCE     the folder whose subfolders are batches (required)
  BA_BIND          where to listen: host:port, [v6]:port, or :port for every address
                   (default 127.0.0.1:2222)
  STATE_DIRECTORY  where jobs, their logs and the host key are kept
                   (default $XDG_STATE_HOME/oni-agent or ~/.local/state/oni-agent)
  HOST_KEY_FILE    the SSH host key, made if missing (default host_key in the state folder)
  ALLOW_FROM       addresses and networks that may connect, separated by commas or blanks
                   (default: all)
  AUTHORIZED_KEYS  an authorized_keys file; with it, only who has one of its keys is admitted
                   (default: anyone)
  ON_FINISH        a program to run after each job, told of it by ONI_JOB_… variables
                   (default: none)
  LOG_LEVEL        debug, info, warning or error (default info); the log is on stderr
  DB_CONNECTION    accepted for old units, not needed: ONI's own settings are used

Its callers are administrators and NCA, the Newspaper Curation App, a Go program that loads batches
unattended. An agent written in Go speaks the same protocol: words that look odd here are its words.

To add a command, write a function cmd_… under "commands", as it is described there; a person at a
terminal sees each key of its answer as `key: value`, or as SHOWN under "presentation" says. To add
a kind of job, write a class under "kinds of job", enter it in KINDS, and give it a command of the
same name. To add a setting, enter it in OWN_VARIABLES with its reader, in DEFAULTS (as text) if it
has one, and in the list above. It is then settings.its_name, and `build` hands it to what needs
it; neither manage.py nor ON_FINISH gets to see it.
"""

from __future__ import annotations

import argparse
import ast
import base64
import codecs
import contextlib
import copy
import difflib
import errno
import fcntl
import gc
import hashlib
import inspect
import ipaddress
import itertools
import json
import logging
import operator
import os
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
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.parse
import warnings
import xml.etree.ElementTree as ET
from concurrent import futures
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Callable, Iterable, Iterator, List, NamedTuple, Optional, TextIO, Tuple
from xml.parsers.expat import ExpatError, ParserCreate


def stderr_is_journal():
    """Whether JOURNAL_STREAM (systemd.exec(5)) names the device and inode of stderr."""
    with contextlib.suppress(OSError):  # it may be closed
        found = os.fstat(2)
        return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def complain(*problems):
    """Says why the agent cannot start; to the journal, as errors."""
    priority = "<3>" if stderr_is_journal() else ""
    for problem in problems:
        print(f"{priority}oni_agent: {problem}.", file=sys.stderr)


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
TICK = 0.005  # seconds between two tries to be the only agent on a state folder
CHUNK = 32 * 1024  # bytes read at once, of an input
BLOCK = 64 * 1024  # bytes of a job's log; a line that is longer than two of them comes in parts
LOOK_SECONDS = 0.1  # between two looks at how much manage.py has printed
ENTRY_SECONDS = 0.25  # between two entries of that in the log
NOTE_LENGTH = 8000  # characters of a note in the log
COMPLAINT_BYTES = 512 * 1024  # of stderr, from its start and from its end, for a job's error
MAX_COMPLAINT = 1024  # bytes of what manage.py said, in a job's error

# ---------------------------------------------------------------- problems


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


SCARCE = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)


def is_scarce(error):
    """Whether the machine lacks something for now, and what it refused is to be tried again."""
    return isinstance(error, Scarce) or error.errno in SCARCE


def patiently(action):
    """What `action` returns, which is begun again each second while it raises OSError."""
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


def in_time(
    look,
    within=ANSWER_SECONDS,
    pool=FILES,
    meanwhile=lambda: None,
    who="the file system of the batches",
):
    """What the function `look` returns, which asks `who`. Raises Problem when that refuses, or
    does not answer within so many seconds: only a thread of the pool then hangs.

    `meanwhile` is called every second and may raise. Then, or when it is too late, what is still
    to begin never does.
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


def path_that(is_right, wrong):
    """A reader of an absolute path of which the function `is_right` is true."""

    def read(value):
        path = Path(value).expanduser().resolve()
        if not is_right(path):
            raise ValueError(wrong)
        return path

    return read


def state_folder(value):
    """`value` as the absolute path of a folder that the agent can write to, or make."""
    path = Path(value.split(":")[0]).expanduser().resolve()  # systemd may name several
    place = nearest_folder(path)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"the agent's user cannot write to {place}")
    if path == place and path.stat().st_mode & 0o002 and not is_an_agents(path):
        raise ValueError("others use that folder: name one of the agent's own")
    return path


def is_an_agents(folder):
    """Whether a folder is an agent's state folder, or may become one since it is empty."""
    return (folder / "agent.lock").exists() or not any(folder.iterdir())


def nearest_folder(path):
    """`path`, or the folder that is there and in which it could be made."""
    place = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not place.is_dir():
        raise ValueError(f"{place} is not a folder")
    return place


def bind_address(value):
    """`host:port`, `[v6 address]:port` or `:port` as a pair; host "" means every address."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]*)):([0-9]{1,5})", value)
    if not match or int(match[3]) > 65535:
        raise ValueError("write host:port, [IPv6 address]:port or :port")
    return match[1] or match[2], int(match[3])


def networks(value):
    """The addresses and networks, separated by commas or blanks, in `value`."""
    found = [ipaddress.ip_network(word) for word in value.replace(",", " ").split()]
    mapped = any(getattr(each.network_address, "ipv4_mapped", None) for each in found)
    if mapped or not found:
        raise ValueError("write addresses and networks as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")
    return found


def log_level(value):
    """`value` as logging writes it."""
    if not re.fullmatch("(?ai)debug|info|warning|error", value):
        raise ValueError("write debug, info, warning or error")
    return value.upper()


OWN_VARIABLES = {  # and their readers
    "ONI_LOCATION": path_that(
        lambda path: (path / "manage.py").is_file(), "that folder holds no manage.py"
    ),
    "BATCH_SOURCE": path_that(Path.is_dir, "that is not a folder"),
    "BA_BIND": bind_address,
    "STATE_DIRECTORY": state_folder,
    "HOST_KEY_FILE": path_that(
        lambda path: path.parent.is_dir(), "that is in a folder that does not exist"
    ),
    "ALLOW_FROM": networks,
    "AUTHORIZED_KEYS": path_that(
        lambda path: path.is_file() and os.access(path, os.R_OK),
        "that is not a file that can be read",
    ),
    "ON_FINISH": path_that(shutil.which, "that is not a file that can be executed"),
    "LOG_LEVEL": log_level,
    "DB_CONNECTION": bool,  # whether it is set: it is not needed, and secret
}
REQUIRED = ("ONI_LOCATION", "BATCH_SOURCE")
STATES = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
DEFAULTS = {
    "BA_BIND": "127.0.0.1:2222",
    "STATE_DIRECTORY": f"{STATES}/oni-agent",
    "LOG_LEVEL": "info",
}


class Settings:
    """What an administrator tells the agent in `environ`: `.ba_bind` for BA_BIND, and so on.

    Raises Problem with one sentence for each thing that is wrong, all of them at once.
    """

    def __init__(self, environ):
        problems = []
        for name, read in OWN_VARIABLES.items():
            value = environ.get(name) or DEFAULTS.get(name)
            try:
                setattr(self, name.lower(), value and read(value))
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: no home for ~
                problems.append(f"{name} is {value!r}; {error}")
            if name in REQUIRED and not value:
                problems.append(f"{name} is not set; --help says which folder it names")
        if problems:
            raise Problem(*problems)
        self.host_key_file = self.host_key_file or self.state_directory / "host_key"


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
from core.models import Awardee, Batch, Issue, LoadBatchEvent, Page, Title

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

def places():
    """How many batches there are, and where loads write.

    Of each place, by its name: the folder, and whether the website reads there, as its own user.
    """
    found = {
        "log/": [settings.LOG_LOCATION if hasattr(settings, "LOG_LOCATION") else "log", False],
        "batch storage": [settings.BATCH_STORAGE, False],
    }
    for cache in getattr(settings, "CACHES", {}).values():
        if "filebased" in cache["BACKEND"].lower():
            found["cache %s" % cache["LOCATION"]] = [cache["LOCATION"], True]
    if getattr(settings, "COORD_STORAGE", ""):
        found["word coordinates"] = [settings.COORD_STORAGE, True]
    return Batch.objects.count(), found

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
        return ET.fromstring(content, ET.XMLParser(target=builder))
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


class Patch:
    """The batch that a file of instructions makes of the batch in `old`.

    Raises Problem if an instruction is not `RemoveIssue LCCN/YYYYMMDDEE`, or names no issue of the
    batch; OSError.
    """

    def __init__(self, old, instructions):
        self.old = old
        listing = old / LISTING
        self._gone = {listing.with_name(name) for name in BATCH_FILES}
        root = parse_xml(listing, ET.TreeBuilder(insert_comments=True, insert_pis=True))
        lines = removals(instructions.read_text("utf-8-sig", "replace"))
        named = []
        staying = []
        for issue in root.findall(f"{NDNP}issue"):
            path = beside(listing, issue.text)
            keys = issue_keys(issue, path) & lines.keys()
            if keys:
                named += keys
                self._gone.add(path.parent)
                root.remove(issue)
            else:
                staying.append(path)
        for key, line in lines.items():
            if key not in named:
                raise Problem(f"{line} names no issue of {old.name}; write LCCN/YYYYMMDDEE")
            if named.count(key) > 1:
                raise Problem(
                    f"{line} may mean any of {named.count(key)} issues, since folders and editions"
                    " disagree; mend batch.xml or the folders first"
                )
        for path in staying:
            if self._gone.intersection(path.parents):
                raise Problem(f"{path}, which is to stay, lies in the folder of one that is to go")
        if not staying:
            raise Problem(f"no issue of {old.name} would be left")
        ET.register_namespace("", NDNP.strip("{}"))
        self.listing = ET.tostring(root, encoding="utf-8", xml_declaration=True)

    def is_made(self, new):
        """Whether `new` is there, and so is whole. Raises Problem if it is another batch."""
        if not os.path.lexists(new):
            return False
        if read_regular(new / LISTING) != self.listing:
            raise Problem(f"{new} is there already, and is not what this patch makes; move it away")
        return True

    def make(self, new, tell, go_on):
        """Makes `new`, which has its name only when it is whole. Raises Problem, OSError."""
        unready = new.with_name(f"WIP-UNREADY-{new.name}")
        if unready.exists():
            tell(f"removing {unready}, which an interrupted patch has left")
            shutil.rmtree(unready)
        try:
            self._copy(unready, tell, go_on)
            (unready / LISTING).write_bytes(self.listing)
            check_listing(unready)
            os.sync()  # whole on disk before it is seen
            unready.rename(new)
            sync(new.parent)
        finally:
            shutil.rmtree(unready, ignore_errors=True)  # unless it is the new batch by now

    def _copy(self, unready, tell, go_on):
        """Copies all but the listing, if there is room for it; tells of each tenth of the bytes."""
        sizes = self._sizes()
        need = len(self.listing) + sum(sizes.values())
        free = shutil.disk_usage(unready.parent).free
        if need > free:
            raise Problem(
                f"the patch needs {need:,} bytes in {unready.parent}, where {free:,} are free"
            )
        done = 0

        def ignore(folder, names):
            return [name for name in names if os.path.join(folder, name) not in sizes]

        def copy(source, target):
            nonlocal done
            go_on()
            try:
                shutil.copy2(source, target)
            except OSError as error:  # copytree would go on, and tell of each file
                raise Problem(f"{source} cannot be copied: {error.strerror or error}") from error
            if os.path.getsize(target) != sizes[source]:
                raise Problem(f"{source} has changed since the patch began")
            before = done * 10 // need
            done += sizes[source]
            if done * 10 // need > before:
                tell(f"{done * 100 // need} % of {need:,} bytes")

        shutil.copytree(self.old, unready, symlinks=True, ignore=ignore, copy_function=copy)

    def _sizes(self):
        """The paths of what is copied of the old batch, and how many bytes each of them has."""
        return {
            str(path): path.lstat().st_size
            for path in self.old.rglob("*")
            if self._gone.isdisjoint([path, *path.parents])
            and not path.name.lower().endswith((".tif", ".tiff", "_1.xml"))
        }


def removals(instructions):
    """The keys of the issues that are to go, each with the line that says so. Raises Problem."""
    lines = {}
    for number, line in enumerate(instructions.splitlines(), 1):
        word, _, key = " ".join(line.split()).partition(" ")
        if word == "RemoveIssue":
            lines[plain_key(key)] = f"line {number}: {line.strip()!r}"
        elif word:
            raise Problem(
                f"line {number}: {word!r} is not an instruction; RemoveIssue is the only one"
            )
    if not lines:
        raise Problem("there is no instruction to remove an issue")
    return lines


def issue_keys(issue, path):
    """The keys that may name an issue in batch.xml: by its edition, and by its file's folder."""
    lccn, date, edition = (issue.get(name, "") for name in ("lccn", "issueDate", "editionOrder"))
    return {plain_key(f"{lccn}/{date}{edition:0>2}"), plain_key(f"{lccn}/{path.parent.name}")}


def plain_key(key):
    """An issue's key without the dashes and underscores that do not count."""
    return re.sub("[-_]", "", key)


def sync(path):
    """Puts a file, or what has been made or renamed in a folder, safely on disk."""
    descriptor = os.open(path, os.O_RDONLY)
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
            return {"answers": True, "batches": self.oni.ask("batch_count")}
        except Problem as problem:
            return {"answers": False, "problem": str(problem)}

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


STDOUT = "O"  # the lines that manage.py prints on standard output
STDERR = "E"  # and on standard error
NOTE = "A"  # what the agent itself has to say
ALL_KINDS = (STDOUT, STDERR, NOTE)


def timestamp(nanoseconds: int) -> str:
    """Return a moment in UTC with nine digits: fixed width, because NCA sorts lines as strings."""
    second, nanosecond = divmod(nanoseconds, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{nanosecond:09d}Z"


def clipped(text: str, most: int) -> str:
    """Return `text` in at most `most` bytes of UTF-8; where something was cut off it ends in …"""
    data = text.encode("utf-8", "replace")
    if len(data) <= most:
        return data.decode()
    return data[: most - len("…".encode())].decode("utf-8", "ignore") + "…"


class Child(NamedTuple):
    """A process of the agent's, told from a later one of the same number by its birth."""

    pid: int
    birth: str  # the boot's id, a slash, clock ticks since boot; or - where there was no /proc


class Entry(NamedTuple):
    """A line of a job's index, ID.log, in one of three forms:

    [2026-11-22T11:07:19.061730250Z] A checked the files of 100 of 400 issues
    [2026-11-22T11:07:19.061730250Z] = 1024 4096
    [2026-11-22T11:07:19.061730250Z] $ 1024 4096 4711 6d1f…/40586 manage.py load_batch /batches/x

    The first is a note of the agent's. The second says how many bytes ID.out and ID.err had by
    then. The third says the same, and that a command begins there, with its process (a Child;
    release 1.1.0 of the agent left that out).
    """

    start: int  # where it begins, in bytes of the index
    end: int  # where the next one begins
    second: str  # of its moment
    nanosecond: int
    sizes: Optional[Tuple[int, int]]  # of ID.out and ID.err; None for a note
    child: Optional[Child]
    text: str  # the note, or the command


ENTRY = re.compile(
    rb"(?m)^\[(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{9})Z\]"
    rb" (?:A (.*)|[=$] (\d{1,18}) (\d{1,18})(?: (\d{1,9}) (\S+))?(?: (.*))?)\n"
)


def entries_in(data: bytes, start: int) -> Iterator[Entry]:
    """Yield the entries in some whole lines of an index, which begin at its byte `start`."""
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
            size *= 2  # a long note of release 1.1.0


def entries_before(file: BinaryIO, stop: int) -> Iterator[Entry]:
    """Yield the entries of an index before a byte, newest first. Raises OSError."""
    size = BLOCK
    while stop:
        start = max(0, stop - size)
        file.seek(start)
        data = file.read(stop - start)
        first = data.find(b"\n") + 1 if start else 0
        if start and first in (0, len(data)):
            size *= 2  # a long note of release 1.1.0
        else:
            yield from reversed(list(entries_in(data[first:], start + first)))
            stop = start + first


# How a log is read
#
# An entry that has sizes tells of the bytes that were printed since the one before it that has. A
# line among these gets the entry's moment, and a nanosecond more for each byte up to the line's
# end; first come the lines of standard output, then those of standard error. So the stamp of a line
# depends on two entries alone, whatever else is read, and from where. LogWriter sees to it that the
# next entry's moment is later than all of these.
#
# A line that is very long comes in parts. A part ends where a block of the file ends in which there
# is no newline. Blocks are BLOCK bytes long; the first one begins where the file does.


def nanoseconds_for(before: Tuple[int, int], after: Tuple[int, int]) -> int:
    """Return how many nanoseconds the lines between two pairs of sizes may take."""
    return max(0, after[0] - before[0]) + max(0, after[1] - before[1]) + 2


def stretches(file: BinaryIO, start: int, stop: int, is_over: bool) -> Iterator[Tuple[int, bytes]]:
    """Yield the lines of a file between two bytes: where some end that follow each other, and all
    their bytes; or the same of a part of one line.

    `start` is where a line or a part begins. An unfinished line at `stop` is left out, unless the
    file `is_over`. Raises OSError.
    """
    while start < stop:
        first_whole_block = -(-start // BLOCK)
        limit = (first_whole_block + 1) * BLOCK
        file.seek(start)
        data = file.read(min(stop, limit) - start)
        end = data.rfind(b"\n") + 1
        if not end and (is_over or start + len(data) == limit):
            end = len(data)
        if not end:
            return
        start += end
        yield start, data[:end]


def line_start(file: BinaryIO, position: int) -> int:
    """Return where the line, or the part, begins that is unfinished at a byte. Raises OSError."""
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
    """Find the last lines and parts, `count` at most, that end between two bytes of a file.

    Returns how many there are, and where the first of them begins. An unfinished line at `high`
    is one of them if the file `is_over`. Raises OSError.
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


def unfinished_character(data: bytes) -> bytes:
    """Return the bytes at the end of `data` with which a character of UTF-8 begins, or none."""
    tail = data[-3:]
    return tail[codecs.utf_8_decode(tail, "replace", False)[1] :]


def opened(path: Path) -> Optional[BinaryIO]:
    """Open a file for reading; return None if there is none. Raises OSError.

    While the machine lacks something for that, it is tried again, for a second.
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
    """How far a log has been read."""

    entry: int = 0  # where the next entry begins, in bytes of the index
    sizes: Tuple[int, int] = (0, 0)  # of the outputs, as the entries before say
    at: Tuple[int, int] = (0, 0)  # where the next line of each output begins
    second: str = "1970-01-01T00:00:00"  # what the entries do not tell of has this moment
    nanosecond: int = 0


class LogReader:
    """The log of a job, as stamped lines in order: `[2026-11-22T11:07:19.061730250Z] text`.

    It lies in three files: manage.py itself writes ID.out and ID.err, LogWriter the index ID.log.
    One that is not there is as an empty one. All other that keeps it from being read is an OSError.
    """

    def __init__(self, path: Path, is_over: bool = False) -> None:
        """Open the log whose index is `path`, to read what a job that `is_over` has printed, or
        the whole lines that one at work has printed so far.
        """
        self._paths = (path, path.with_suffix(".out"), path.with_suffix(".err"))
        self._files: List[Optional[BinaryIO]] = [None, None, None]
        self._kinds: Tuple[str, ...] = ALL_KINDS
        self._position = Position()
        self._tail: Optional[Tuple[int, int]] = None  # the outputs' sizes once the job is over
        self._open(is_over)

    def _open(self, is_over: bool) -> None:
        """Open the files that were not there before, and see where they end if the job is over."""
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

    def lines(self, *kinds: str) -> Iterator[List[str]]:
        """Return all lines of these kinds, or of all, some at a time, for a loop of its own.

        A list of none stands for some of another kind, so that the caller can look up meanwhile.
        """
        reader = copy.copy(self)
        reader._kinds = kinds or ALL_KINDS
        return reader._read()

    def skip_to_last(self, count: int) -> None:
        """Leave out all lines but the last `count`. Reads from the end, and no more than needed."""
        index = self._files[0]
        entries = entries_before(index, self._size(0)) if index else iter(())
        steps = with_sizes_before(entries)
        nothing: Tuple[Optional[Entry], Tuple[int, int]] = (None, (0, 0))
        newest, before = next(steps, nothing)
        self._position = self._end(newest, before)
        if self._tail:
            count, at = self._last_printed(self._position.sizes, self._tail, count, True)
            self._position = self._position._replace(at=at)
        while count and newest:
            if newest.sizes is None:
                count -= 1
                at = self._line_starts(before)
            else:
                count, at = self._last_printed(before, newest.sizes, count, False)
            self._position = Position(newest.start, before, at)
            newest, before = next(steps, nothing)

    def _end(self, newest: Optional[Entry], before: Tuple[int, int]) -> Position:
        """Return the position after the newest entry, before which the outputs had these sizes."""
        if newest is None:
            return Position()
        sizes = newest.sizes or before
        later = newest.nanosecond + nanoseconds_for(before, sizes)
        return Position(newest.end, sizes, self._line_starts(sizes), newest.second, later)

    def _line_starts(self, sizes: Tuple[int, int]) -> Tuple[int, int]:
        """Return where the lines begin that were unfinished when the outputs had these sizes."""
        _, out, err = self._files
        return line_start(out, sizes[0]) if out else 0, line_start(err, sizes[1]) if err else 0

    def _last_printed(
        self, before: Tuple[int, int], after: Tuple[int, int], count: int, is_over: bool
    ) -> Tuple[int, Tuple[int, int]]:
        """Find the last `count` lines of those printed between two pairs of sizes.

        Returns how many there are too few, and where the first of each output begins.
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
                if weight >= BLOCK // 2:
                    yield some
                    some = []
                    weight = 0
        yield some

    def _entries(self) -> Iterator[Entry]:
        """Yield the entries from the position on; of a job that is over one more, for the tail."""
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
        first = entry.nanosecond
        is_tail = entry.end == entry.start
        yield entry.end - entry.start, []
        if entry.sizes is None and NOTE in self._kinds:
            yield len(entry.text), stamped(entry.second, [first], first, [entry.text])
        for number, kind in enumerate((STDOUT, STDERR)):
            low, high = before[number], sizes[number]
            file = self._files[number + 1]
            if file and kind in self._kinds and (high > low or is_tail):
                for end, data in stretches(file, at[number], high, is_tail):
                    yield len(data), printed_lines(file, entry.second, first - low, end, data)
                    at[number] = end
            first += max(0, high - low) + 1
        self._position = Position(entry.end, sizes, (at[0], at[1]), entry.second, first)


def printed_lines(file: BinaryIO, second: str, zero: int, end: int, data: bytes) -> List[str]:
    """Return some lines of a file, or a part of one, with stamps (see "How a log is read").

    `data` is what lies before the file's byte `end`; `zero` is the nanosecond of its first byte.
    """
    start = end - len(data)
    # A character that a part ends amid is the next part's.
    begun = b""
    if start and start % BLOCK == 0:
        file.seek(start - 3)
        begun = unfinished_character(file.read(3))
    if data.endswith(b"\n"):
        lines = data[:-1].split(b"\n")
        text = (begun + data[:-1]).decode("utf-8", "replace")
        lengths = itertools.accumulate(map(len, lines))
        moments = map(operator.add, lengths, itertools.count(zero + start))
        return stamped(second, moments, zero + end, text.split("\n"))
    moment = zero + end
    if end % BLOCK == 0 and len(data) >= BLOCK:  # a part, and the file may go on
        moment -= 1
        data = data[: len(data) - len(unfinished_character(data))]
    text = (begun + data).decode("utf-8", "replace")
    return stamped(second, [moment], moment, [text])


def stamped(second: str, moments: Iterable[int], most: int, texts: List[str]) -> List[str]:
    """Return texts with stamps, each so many nanoseconds after a second, `most` at the most."""
    if most < 10**9:
        return [f"[{second}.{moment:09d}Z] {text}" for moment, text in zip(moments, texts)]
    first = int(datetime.fromisoformat(f"{second}+00:00").timestamp()) * 10**9
    return [f"[{timestamp(first + moment)}] {text}" for moment, text in zip(moments, texts)]


def with_sizes_before(entries: Iterable[Entry]) -> Iterator[Tuple[Entry, Tuple[int, int]]]:
    """Yield entries, newest first, each with the sizes that the outputs had before it."""
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
    """Open a file for appending; make it, and its folder, if missing. Raises OSError.

    What the disk refuses of a text is kept, and written with what comes next.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return open(path, "a", 1 << 20, "utf-8", "replace")


def end_line(path: Path) -> None:
    """Append a newline to a file that does not end with one, unless it is empty. Raises OSError."""
    with open(path, "a+b", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


class LogWriter:
    """Writes the index of a job's log (see Entry), while manage.py itself writes its output.

    While manage.py prints there are at most so many entries a second as ENTRY_SECONDS allow; the
    first output after a silence is entered when it is seen.
    """

    def __init__(self, path: Path) -> None:
        """Go on with the log whose index is `path`; it is made if missing. Raises OSError."""
        self.path = path
        self.out = path.with_suffix(".out")
        self.err = path.with_suffix(".err")
        self.commands: List[str] = []  # all that have begun
        self.child: Optional[Child] = None  # the newest one's process, if it is known
        self.begun = 0  # bytes of stderr when it began
        self._sizes = (0, 0)  # bytes of the outputs, as last entered
        self._earliest = 0  # the moment of the next entry, at the earliest
        self._entered = -ENTRY_SECONDS  # when output was last entered, by the monotonic clock
        self._file = open_to_append(path)
        self._read_on()

    def _read_on(self) -> None:
        """Read what an earlier agent has written, and cut off what it did not finish."""
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
        """Take a command for the newest one."""
        self.commands.append(command)
        self.child = child
        self.begun = self._sizes[1]

    def close(self) -> None:
        """Put the log safely on disk."""
        with contextlib.suppress(OSError):
            self._file.close()
            sync(self.path)

    def note(self, text: str) -> None:
        """Enter what the agent does; a long text as several notes."""
        text = text.replace("\n", " ")
        for start in range(0, max(1, len(text)), NOTE_LENGTH):
            self._enter(f"A {text[start : start + NOTE_LENGTH]}", time.time_ns(), 1)

    def begin(self, command: str, child: Optional[Child]) -> None:
        """Enter that what is printed from now on is a command's, and its process if known."""
        command = command.replace("\n", " ")
        self._remember(command, child)
        process = f"{child.pid} {child.birth} " if child else ""
        out, err = self._sizes
        self._enter(f"$ {out} {err} {process}{command}", time.time_ns(), 2)

    def look(self, is_end: bool = False) -> None:
        """Enter how much has been printed by now if that has changed, and the last time was not
        just before; in any case at a command's end.
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
        """Write an entry of a moment, or later; the next one is `needed` nanoseconds after it."""
        moment = max(moment, self._earliest)
        self._earliest = moment + needed
        try:
            print(f"[{timestamp(moment)}] {text}", file=self._file, flush=True)
        except OSError as error:
            log.error("%s cannot be written for now: %s", self.path, error)

    def complaints(self) -> List[str]:
        """Return the lines that the newest command has printed on stderr, but for empty ones.

        Of more than twice COMPLAINT_BYTES only the first and the last ones are looked at.
        """
        try:
            with open(self.err, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                file.seek(self.begun)
                data = file.read(min(COMPLAINT_BYTES, max(0, size - self.begun)))
                rest = max(self.begun + len(data), size - COMPLAINT_BYTES)
                if rest > self.begun + len(data):
                    data += b"\n"
                file.seek(rest)
                data += file.read(COMPLAINT_BYTES)
        except OSError:  # there is none, or it cannot be read
            return []
        return re.findall(r"(?m)^.*\S", data.decode("utf-8", "replace"))

    def complaint(self) -> str:
        """Return what is likely the reason why the newest command failed, MAX_COMPLAINT bytes at
        most: the first of its `complaints` that was logged as an error, else the last.
        """
        lines = self.complaints()
        for line in lines:
            error = re.match(r"\[ERROR\] |ERROR:[\w.]+:", line)  # ONI 1.1 and 1.0
            if error:
                return clipped(line[error.end() :], MAX_COMPLAINT)
        return clipped(lines[-1], MAX_COMPLAINT) if lines else "nothing"


# ---------------------------------------------------------------- running manage.py


def signal_name(number: int) -> str:
    """Return SIGKILL for 9; real-time signals have no name."""
    for each in signal.Signals:
        if each == number:
            return each.name
    return "of no name"


def stat_of(pid: int) -> Optional[List[str]]:
    """Return the fields of /proc/PID/stat from the third one on (see proc(5)), None if there is no
    such process, or no /proc. Raises OSError if that cannot be told for now.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # another user's is not ours
        return None


def boot_id() -> str:
    """Return what tells this boot of the machine from others, or "" if that is hidden."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def as_child(pid: int) -> Child:
    """Describe a process that has just been begun, so that the next agent knows it again."""
    fields = None
    with contextlib.suppress(OSError):  # of its two signs the lock remains
        fields = stat_of(pid)
    return Child(pid, f"{boot_id()}/{fields[19]}" if fields else "-")


def is_at_work(child: Child) -> Optional[bool]:
    """Return whether a process has not ended yet, None if that cannot be known. Raises OSError."""
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
    is_same = fields[19] == ticks and boot in ("", boot_id() or boot)
    return is_same and fields[0] not in "ZX"


class Running:
    """A manage.py at work, whose end is waited for, begun by this agent or by an earlier one."""

    def __init__(self, child: Optional[Child], has_ended: Callable[[], bool]) -> None:
        """`child` is None where the process is not known; `has_ended` may raise OSError."""
        self.child = child
        self._has_ended = has_ended
        self._descriptor: Optional[int] = None
        pidfd_open = getattr(os, "pidfd_open", None)  # from Python 3.9 and Linux 5.3 on
        if child and pidfd_open:
            with contextlib.suppress(OSError):
                self._descriptor = pidfd_open(child.pid)

    def ended_within(self, seconds: float) -> bool:
        """Wait for its end, for so many seconds at most; return whether it has ended."""
        if self._descriptor is None:
            time.sleep(seconds)
        else:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            if poll.poll(seconds * 1000):
                return True
        try:
            return self._has_ended()
        except OSError:  # that cannot be told for now
            return False

    def close(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            os.close(self._descriptor)


class Runner:
    """What a job at work is given: it runs one manage.py after another, and has the job's log.

    manage.py runs in a session of its own and prints to files, so that it outlives this agent. Two
    signs tell the next agent that it is still at work: its process, which the log names, and
    run.lock, which it inherits locked, and in which its command stands. The second one is needed
    if this agent is killed before it has written the first.

    manage.py has ended when its process has. What that leaves behind is named in the log; while it
    keeps run.lock locked, the first sign alone tells of a manage.py.
    """

    def __init__(
        self, job: Job, store: JobStore, oni: OpenONI, stopping: threading.Event
    ) -> None:
        """Make the log ready to go on, after whatever an earlier agent left. Raises OSError."""
        self.job = job
        self.input = store.input(job)
        self.log = LogWriter(store.log(job))
        self.undoing = False  # a cancelled job is tidied up, which is not to be cancelled
        self._oni = oni
        self._lock = store.folder / "run.lock"
        self._is_left_locked = False  # by what an earlier command has left behind
        self._stopping = stopping

    def close(self) -> None:
        """Put the log safely on disk."""
        self.log.close()

    @property
    def commands(self) -> List[str]:
        """All commands of the job that have begun."""
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
        """Whether the job is to end."""
        return bool(self.job.cancelled) and not self.undoing

    def go_on(self) -> None:
        """Raise Cancelled if the job is to end, or has ended before it began."""
        if self.cancelled or self.job.finished:
            raise Cancelled

    def step(self, action: Callable[["Runner"], None]) -> None:
        """Take a step, a function of this runner, anew while the machine lacks something for it.

        Raises Problem, also for any other OSError; Cancelled, Stopping.
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
        """Run manage.py with `words`. Raises Problem, Cancelled, Stopping.

        The text of a Problem says how manage.py ended, and of what it has complained.
        """
        self._run("manage.py", self._oni.start, *words)

    def task(self, name: str, *words: str) -> None:
        """Run a function of INSIDE_ONI in a manage.py of its own. Raises as manage does."""
        self._run("manage.py shell:", self._oni.start_task, name, *words)

    def _run(
        self, program: str, start: Callable[..., "subprocess.Popen[bytes]"], *words: str
    ) -> None:
        command = f"{program} {shlex.join(words)}"
        process = patiently(lambda: self._begin(command, start, *words))
        with contextlib.closing(
            Running(self.log.child, lambda: process.poll() is not None)
        ) as running:
            self._follow(running)
        status = process.wait()
        self.go_on()
        if status < 0:
            if self._stopping.wait(1):  # the signal may have come to the agent as well
                raise Stopping
            raise Problem(f"killed by signal {-status} ({signal_name(-status)})")
        if status:
            raise Problem(f"exit status {status}: {self.complaint()}")

    def _begin(
        self, command: str, start: Callable[..., "subprocess.Popen[bytes]"], *words: str
    ) -> "subprocess.Popen[bytes]":
        """Start a manage.py, and enter it in the log. Raises OSError, Problem, Cancelled."""
        self.go_on()
        with contextlib.ExitStack() as files:
            out = files.enter_context(open_to_append(self.log.out))
            err = files.enter_context(open_to_append(self.log.err))
            # What an earlier command left unfinished is a line of its own.
            end_line(self.log.out)
            end_line(self.log.err)
            self.log.look(is_end=True)
            lock = files.enter_context(self._open_lock())
            lock.truncate(0)
            lock.write(f"{self.job.id} {len(self.commands) + 1} {command}")
            lock.flush()
            process = start(*words, stdout=out, stderr=err, pass_fds=[lock.fileno()])
            self.log.begin(command, as_child(process.pid))
        return process

    def take_over(self) -> None:
        """Wait for the end of what an earlier agent has begun, if that is still at work.

        From then on there is nothing to end, and a cancelled job is undone.
        """
        running = patiently(self._left_at_work)
        if running:
            log.warning("job=%d adopted=yes: its manage.py is at work", self.job.id)
            with contextlib.closing(running):
                self._follow(running)
        else:
            self.log.look(is_end=True)
            self._name_what_is_left()
        self.undoing = bool(self.job.cancelled)

    def _left_at_work(self) -> Optional[Running]:
        """Return the manage.py of an earlier agent's that is still at work. Raises OSError."""
        child = self.log.child
        at_work = is_at_work(child) if child else None
        if child and at_work:
            return Running(child, lambda: not is_at_work(child))
        if self._lock_is_free():
            return None
        if self._enter_what_is_locked():
            return Running(None, self._lock_is_free)
        if child and at_work is None:
            return Running(child, lambda: is_at_work(child) is False or self._lock_is_free())
        if self.commands and not child:
            return Running(None, self._lock_is_free)
        return None

    def _open_lock(self) -> TextIO:
        """Open run.lock for a manage.py to inherit: locked, if that can be. Raises OSError."""
        self._is_left_locked = not self._lock_is_free()
        return open(self._lock, "a") if self._is_left_locked else locked(self._lock)

    def _lock_is_free(self) -> bool:
        """Return whether neither a manage.py nor what it has left behind holds run.lock."""
        try:
            locked(self._lock).close()
        except BlockingIOError:
            return False
        return True

    def _enter_what_is_locked(self) -> bool:
        """Enter the command that holds run.lock, and return True, if the log does not have it: the
        agent was killed before it had entered it, or the log was deleted. Raises OSError.
        """
        id, _, rest = self._lock.read_text().partition(" ")
        number, _, command = rest.partition(" ")
        if id == str(self.job.id) and int(number or 0) > len(self.commands):
            self.log.begin(command, None)
            return True
        if not id:  # release 1.1.0 of the agent has begun it, and the log was deleted
            if self.commands:
                return False
            self.log.begin("manage.py, begun by an earlier agent", None)
            return True
        return False

    def _follow(self, running: Running) -> None:
        """Wait until manage.py has ended; end it if the job is cancelled."""
        begun = time.monotonic()
        pause = 0.0
        full = False
        number = signal.SIGTERM
        next_signal = 0.0
        while not running.ended_within(pause):
            self.log.look()
            full = full or self._disk_is_full()
            now = time.monotonic()
            if self.cancelled and now > next_signal:
                self._signal(running.child, number)
                number = signal.SIGKILL
                next_signal = now + TERM_SECONDS
            # Its first line is seen soon; that takes little of the processor in the long run.
            pause = min(LOOK_SECONDS, 0.001 + (now - begun) / 20)
        self.log.look(is_end=True)
        if full:
            self.note(
                "the state folder was full meanwhile: lines that manage.py printed may be missing"
            )
        self._name_what_is_left()

    def _disk_is_full(self) -> bool:
        """Return whether the state folder has no byte left."""
        try:
            return not shutil.disk_usage(self._lock.parent).free
        except OSError:  # somebody has removed the folder
            return False

    def _signal(self, child: Optional[Child], number: signal.Signals) -> None:
        """Send a signal to the process group that a manage.py leads."""
        if not child:
            self.note("cancelled: what an earlier agent has begun is not known, and is waited for")
            return
        self.note(f"cancelled: {number.name} to process group {child.pid}")
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.killpg(child.pid, number)

    def _name_what_is_left(self) -> None:
        """Note what manage.py has left behind, if anything and if that is new."""
        if self._is_left_locked or not self.commands:
            return
        for _ in range(5):  # it may be about to end, too
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

    `work` is a Runner: it runs manage.py, takes notes for the job's log, and knows the file of what
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
        return in_time(lambda: Patch(self.source, given))

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
        if not Patch(self.source, work.input).is_made(self.target):
            raise Problem(f"{self.target} is not there")

    def remains(self, work):
        return f"{self.target} is there" if os.path.lexists(self.target) else ""


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
                return -1, "No-op: job is redundant or already completed"
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
            log.info("what manage.py had begun is taken up by the next agent")
        except BaseException:
            log.critical("the worker cannot go on, and the agent ends", exc_info=True)
            os._exit(70)

    def _perform(self, job):
        """Brings a job to its end, whatever happens, but for the agent's own end.

        Wherever a cancel stops it, it is taken up anew from there, and then undone.
        """
        work = patiently(lambda: Runner(job, self._store, self._site.oni, self.stopping))
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
        self._change(job, status=status, error=error, ended=time.time_ns())
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


class Refused(Exception):
    """A request is answered with an error: its message, and the answer's other keys."""

    def __init__(self, message, **others):
        self.keys = {"status": "error", "message": message, **others}


class ClientGone(BaseException):
    """The client has gone away: there is nobody to answer, and nothing more to do for it.

    As for a SystemExit, nobody takes it for a fault on its way through the command.
    """


@dataclass
class Agent:
    """What commands work on."""

    settings: Settings
    site: Site
    store: JobStore
    queue: JobQueue


@dataclass
class Request(Agent):
    """One command of a client, and its answer: an object, or the lines of a job's log.

    The exit status is 0 even for an error, since NCA needs that; job-wait, job-follow and
    batch-check may set 1.
    """

    client: Session  # reads its input, knows whether it is still there, and is its terminal
    # Until there is more:
    words = ()
    keys = {}  # of the object, if any; a Problem adds to them
    lines = ()  # lists of some, as they come; a person is shown them after the object
    exit_status = 0  # once the lines have been read

    def job(self, word):
        """The job whose id a word is. Raises Refused."""
        if not re.fullmatch("[+-]?0*[1-9][0-9]{0,18}", word):
            raise Refused(f'"{word}" is not a valid job id')
        id = int(word)
        if id == -1:
            return Job(-1, ["no-op"], time.time_ns(), SUCCESSFUL)
        job = self.queue.get(id)
        if not job:
            raise Refused("Job not found", job={"id": id})
        return job

    def until_ended(self, job):
        """Says again and again whether a job has ended, until it has, and the exit status tells of
        its success. Raises ClientGone.
        """
        while not self.queue.wait(job):
            self.client.hear()
            yield False
        yield True
        self.exit_status = int(job.status != SUCCESSFUL)

    def submit(self, given=None):
        """Makes a job of the words, and of the file `given` on standard input. Raises Problem."""
        id, message = self.queue.add(self.words, given)
        return {"message": message, "job": {"id": id}}

    def submit_with_input(self, limit):
        """Makes a job of the words and of standard input. Raises Problem."""
        with self.store.new_input() as given:
            self.client.read_input(given, limit)
            return self.submit(Path(given.name))


# To each function cmd_… belongs a command. It gets a Request and the words after the command, where
# its parameter is called `job` the job of that id, and returns the keys of the answer, if any.
#
# Its docstring is data: labels, and a line of text each, or the next line if it is long. All have
# usage, help and example, which are, in this order, what `help` answers, and misuse, which answers
# a wrong number of words. failure answers a Problem, {} being the words after the command; without
# it the usual sentence does.


def texts_of(name, labels=r"\w+"):
    """The texts with these labels, or all, in the docstring of a command.

    Raises Refused if there is no such command, and guesses what was meant.
    """
    if name not in COMMANDS:
        raise Refused(
            f'"{name}" is not a valid command name', error=f"see help{nearly(name, COMMANDS, 0.7)}"
        )
    return dict(re.findall(rf"(?m)^ *({labels}):\s+(.+)", COMMANDS[name].__doc__))


def answer(line, client):
    """Has a command line, in bytes, answered: its Request. Raises ClientGone and nothing else."""
    request = Request(**vars(client.agent), client=client)
    try:
        request.words = split_words(line)
        perform(request)
    except Refused as refusal:
        request.keys = refusal.keys
    except Exception as fault:
        log.exception("a command stumbled over a fault of the agent")
        request.keys = Refused("A fault of the agent; its log says more", error=repr(fault)).keys
    return request


def perform(request):
    """Has the function of its command answer a request. Raises Refused, ClientGone."""
    if not request.words:
        raise Refused("no command specified")
    name, *arguments = request.words
    texts = {"failure": "The agent cannot do this just now", **texts_of(name)}
    function = COMMANDS[name]
    try:
        bound = inspect.signature(function).bind(request, *arguments).arguments
    except TypeError:
        raise Refused(texts["misuse"], error=f"usage: {texts['usage']}")
    if "job" in bound:
        bound["job"] = request.job(bound["job"])
    try:
        keys = function(**bound)
    except (Problem, OSError) as problem:
        failure = texts["failure"].format(*arguments)
        raise Refused(failure, error=str(problem), **request.keys)
    if keys:
        request.keys = {"status": "success", **keys}


GO_WORD = (
    r'"(?:[^"\\\x00-\x1f\x7f]'
    r'|\\(?:[abfnrtv\\"]|x[0-9a-f]{2}|u[0-9a-f]{4}|U00(?:0[0-9a-f]|10)[0-9a-f]{4}))*"'
)


def split_words(line):
    """The words of a command line. Raises Refused.

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


def job_object(job):
    """A job as answers show it."""
    shown = {
        "id": job.id,
        "name": KINDS.get(job.words[0], Kind).title,
        "queued": timestamp(job.queued),
        "status": job.status,
    }
    if job.error:
        shown["error"] = job.error
    if job.id > 0:
        shown["words"] = job.words
        shown["attempts"] = job.attempts
    if job.started:
        shown["started"] = timestamp(job.started)
        shown["seconds"] = max(0, (job.ended or time.time_ns()) - job.started) // 10**6 / 1000
    if job.ended:
        shown["ended"] = timestamp(job.ended)
    return shown


def job_with_place(request, job):
    """The same, with its place in the queue, or how far it is."""
    shown = job_object(job)
    if job.status == PENDING:
        shown["place"] = sum(
            each.id <= job.id and not each.finished for each in request.queue.jobs()
        )
    elif job.status == STARTED and job.words[0] == "load-batch":
        shown.update(request.site.progress(job.words[1], job.id))
    return shown


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


def batch_object(held):
    """A batch as answers show it; null is what was not looked at, or could not be."""
    return {key: getattr(held, key) for key in BATCH_KEYS}


def cmd_version(request):
    """
    usage: version
    help: Says which version of the agent is running.
    example: ssh -p 2222 nobody@localhost version
    misuse: "version" takes no arguments
    """
    return {"version": VERSION}


def cmd_help(request, name=""):
    """
    usage: help [COMMAND]
    help: Lists the commands, or tells of one.
    example: ssh -p 2222 nobody@localhost help load-batch
    misuse: "help" takes at most one command
    """
    names = [name] if name else COMMANDS
    commands = [texts_of(each, "usage|help|example") for each in names]
    if name:
        request.lines = [[commands[0]["example"]]]
    return {"commands": commands}


def cmd_load_batch(request, name):
    """
    usage: load-batch BATCH
    help: Loads a batch from BATCH_SOURCE into Open ONI, as a job.
    example: ssh -p 2222 nobody@localhost load-batch batch_oru_alpha_ver01
    misuse: "load-batch" requires exactly one batch name
    failure: "{}" cannot be loaded
    """
    return request.submit()


def cmd_purge_batch(request, name):
    """
    usage: purge-batch BATCH
    help: Removes a batch from Open ONI, as a job; its files stay.
    example: ssh -p 2222 nobody@localhost purge-batch batch_oru_alpha_ver01
    misuse: "purge-batch" requires exactly one batch name
    failure: "{}" cannot be purged
    """
    return request.submit()


def cmd_load_title(request):
    """
    usage: load-title < MARC.xml
    help: Loads or updates titles from MARC XML on standard input, as a job.
    example: ssh -p 2222 nobody@localhost load-title < marc.xml
    misuse: "load-title" takes no arguments; the MARC XML comes on standard input
    failure: Invalid data
    """
    return request.submit_with_input(MAX_PAYLOAD)


def cmd_ensure_awardee(request, code, name=""):
    """
    usage: ensure-awardee CODE [NAME]
    help: Makes sure that Open ONI has an awardee, at once and without a job.
    example: ssh -p 2222 nobody@localhost ensure-awardee oru "'University of Oregon'"
    misuse:
    "ensure-awardee" requires one or two arguments: an awardee code and, to create it, a name
    failure: Unable to create awardee
    """
    request.keys = {"org_code": code, "name": name}
    new = request.site.oni.ask("awardee", code, name)
    return {"message": "Awardee created" if new else "Awardee already exists"}


def cmd_batch_patch(request, old, new):
    """
    usage: batch-patch OLD NEW < INSTRUCTIONS
    help: Makes a batch NEW from OLD, without the issues of the lines `RemoveIssue LCCN/YYYYMMDDEE`.
    example:
    ssh -p 2222 nobody@localhost batch-patch batch_oru_a_ver01 batch_oru_a_ver02 < instructions.txt
    misuse: "batch-patch" requires exactly two batch names
    failure: "{}" cannot be modified
    """
    return request.submit_with_input(MAX_INSTRUCTIONS)


def cmd_list_jobs(request, status=""):
    """
    usage: list-jobs [STATUS]
    help: Lists all jobs, oldest first; or those that are pending, started, successful, failed, …
    example: ssh -p 2222 nobody@localhost list-jobs failed
    misuse: "list-jobs" takes at most one argument, a status
    failure: "{}" is not a job status
    """
    if status and status not in STATUS_MESSAGES:
        raise Problem(f"there are {', '.join(STATUS_MESSAGES)}")
    return {"jobs": [job_object(job) for job in request.queue.jobs() if status in ("", job.status)]}


def cmd_job_status(request, job):
    """
    usage: job-status ID
    help: Says what has become of a job: its place in the queue, or how far a running load is.
    example: ssh -p 2222 nobody@localhost job-status 7
    misuse: You must supply a job ID
    """
    return {"message": STATUS_MESSAGES[job.status], "job": job_with_place(request, job)}


def cmd_job_wait(request, job):
    """
    usage: job-wait ID
    help: Answers as job-status when the job has ended; the exit status is 1 if it was unsuccessful.
    example: ssh -p 2222 nobody@localhost job-wait 7
    misuse: You must supply a job ID
    """
    for _ in request.until_ended(job):
        if request.client.colour:
            show_progress(job_with_place(request, job), request.client)
    return cmd_job_status(request, job)


def cmd_job_follow(request, job):
    """
    usage: job-follow ID
    help: Shows a job's log as it comes, until the job ends; then the exit status is as job-wait's.
    example: ssh -p 2222 nobody@localhost job-follow 7
    misuse: You must supply a job ID
    """
    reader = LogReader(request.store.log(job))
    request.lines = (lines for over in request.until_ended(job) for lines in reader.new_lines(over))


def cmd_job_logs(request, job, count=""):
    """
    usage: job-logs ID [LINES]
    help: Shows what a job has printed so far, or the last LINES of it, each line with its time.
    example: ssh -p 2222 nobody@localhost job-logs 7 20
    misuse: You must supply a job ID
    """
    if count and not re.fullmatch("[0-9]{1,9}", count):
        raise Refused(f'"{count}" is not a number of lines')
    shown = job_object(job)  # first, so that the log of a job that is shown to be over is whole
    reader = LogReader(request.store.log(job), job.finished)
    if count:
        reader.skip_to_last(int(count))
    request.lines = reader.lines()
    return {"job": {**shown, "stdout": reader.lines(STDOUT, NOTE), "stderr": reader.lines(STDERR)}}


def cmd_job_cancel(request, job):
    """
    usage: job-cancel ID
    help: Ends a job: a pending one never starts, one at work is terminated, and its load purged.
    example: ssh -p 2222 nobody@localhost job-cancel 7
    misuse: You must supply a job ID
    """
    if not request.queue.cancel(job):
        raise Refused(
            "The job has ended already", error=STATUS_MESSAGES[job.status], job=job_object(job)
        )
    return {
        "message": "Job cancelled" if job.finished else "Job is being cancelled",
        "job": job_object(job),
    }


def cmd_job_retry(request, job):
    """
    usage: job-retry ID
    help: Queues a job that was not successful again, as a new job.
    example: ssh -p 2222 nobody@localhost job-retry 7
    misuse: You must supply a job ID
    failure: The job cannot be retried
    """
    kind = KINDS.get(job.words[0])
    if job.status not in (FAILED, COULD_NOT_START) or not kind:
        raise Refused(
            "Only a failed job can be retried",
            error=STATUS_MESSAGES[job.status],
            job=job_object(job),
        )
    request.words = job.words
    given = request.store.input(job) if kind.takes_input else None
    return {**request.submit(given), "retry_of": job.id}


def cmd_list_batches(request):
    """
    usage: list-batches
    help: Lists every batch in BATCH_SOURCE or Open ONI: absent, partial, complete, or unknown.
    example: ssh -p 2222 nobody@localhost list-batches
    misuse: "list-batches" takes no arguments
    failure: The batches cannot be listed
    """
    return {"batches": [batch_object(state) for state in request.site.batches()]}


def cmd_batch_status(request, name):
    """
    usage: batch-status BATCH
    help: Says what Open ONI holds of a batch, and its newest events and jobs.
    example: ssh -p 2222 nobody@localhost batch-status batch_oru_alpha_ver01
    misuse: "batch-status" requires exactly one batch name
    failure: "{}" cannot be looked up
    """
    request.site.folder(name)
    state = request.site.batch(name)
    if not state.row and not state.pages_in_solr:
        request.site.must_be_there(name)
    message = str(state)
    jobs = [job for job in request.queue.jobs() if name in job.words]
    for job in jobs:
        if job.status == STARTED:
            message = f"job {job.id} is at work on it; {message}"
    return {
        "message": message,
        "batch": batch_object(state),
        "events": state.events,
        "jobs": [job_object(job) for job in jobs[-10:]],
    }


def cmd_batch_check(request, name):
    """
    usage: batch-check BATCH
    help: Reads all files of a batch and says what would go wrong with a load; ONI is left as it is.
    example: ssh -p 2222 nobody@localhost batch-check batch_oru_alpha_ver01
    misuse: "batch-check" requires exactly one batch name
    failure: "{}" cannot be checked
    """
    request.site.must_be_there(name)
    go_on = lambda *_: request.client.hear()
    found = request.site.check(name, go_on, go_on)
    request.exit_status = int(bool(found.faults))
    what = faults_in(found) if found.faults else "Nothing"
    return {
        "message": f"{what} would keep Open ONI from loading all of this batch",
        "batch": {"name": name},
        "faults": found.faults,
        "warnings": found.warnings,
    }


BEGAN = time.monotonic()


def cmd_board(request):
    """
    usage: board
    help: Shows what is at work, what waits and what has ended; on a terminal, anew each second.
    example: ssh -p 2222 nobody@localhost -t board
    misuse: "board" takes no arguments
    """
    jobs = request.queue.jobs()
    return {
        "version": VERSION,
        "uptime": int(time.monotonic() - BEGAN),
        "oni": {"location": str(request.site.oni.location), **request.site.health()},
        "at_work": [job_with_place(request, job) for job in jobs if job.status == STARTED],
        "waiting": [job_object(job) for job in jobs if job.status == PENDING],
        "ended": [job_object(job) for job in request.queue.ended()[:50]],
    }


COMMANDS = {
    name.removeprefix("cmd_").replace("_", "-"): function
    for name, function in globals().items()
    if name.startswith("cmd_")
}

# ---------------------------------------------------------------- presentation

# Answers become lines for a person.

# A line has the colour of such a word, maybe with a time, before two blanks, a colon or a bracket.
COLOURS = {
    31: "failed|couldn't start|partial|error|fault|ERROR",
    32: "successful|complete",
    33: "unknown|warning|WARNING",
    36: "started",
}


def plain(text):
    """A text as a person is to see it: its control characters do nothing to a terminal, and a line
    of a log has no parts of a second, which programs need, to sort by.
    """
    text = re.sub(r"(?<=^\[.{19})\.\d{9}", "", text).replace("\t", "    ")
    return "".join(each if each.isprintable() else f"\\x{ord(each):02x}" for each in text)


def wrapped(texts, width):
    """Texts on as many lines as they take, none wider. A word, or a path, that is longer than a
    line is broken: nothing is cut off.
    """
    for text in map(plain, texts):
        # textwrap counts characters, and some of these take two columns.
        wide = any(unicodedata.east_asian_width(each) in "WF" for each in text)
        yield from textwrap.wrap(
            text, width // 2 if wide else width, subsequent_indent=" " * 7, break_on_hyphens=False
        )


def ago(stamp):
    """How long ago, and when: `12 min ago, 14:05`."""
    then = datetime.fromisoformat(stamp[:19] + "+00:00").astimezone()
    seconds = time.time() - then.timestamp()
    form = "%H:%M" if seconds < 43200 else "%Y-%m-%d %H:%M"
    return f"{span(seconds)} ago, {then:{form}}"


def span(seconds):
    """A length of time in words."""
    for size, name in {86400: "days", 3600: "h", 60: "min"}.items():
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {name}"
    return f"{int(max(0, seconds))} s"  # a clock may have been set back


def job_line(job):
    """A job in a table. How far it is, or why it failed, comes below on a narrow terminal."""
    id = job["id"]
    if id < 0:
        return ""
    if "words" not in job:
        return f"It is job {id}: job-wait {id} waits for its end, job-follow {id} shows its log."
    state = job["status"]
    if "seconds" in job:
        state += f" {span(job['seconds'])}"
    when = ago(job.get("ended", job.get("started", job["queued"])))
    row = f"{id:>4}  {state:<17}  {' '.join(job['words']):<36}  {when:<17}"
    return f"{row}  {how_far(job)}{job.get('error', '')}"


def how_far(job):
    """The place in the queue; or of a load a bar, issues, pages a second and time left."""
    if "place" in job:
        return f"It is number {job['place']} in the queue."
    wanted = job.get("pages")
    if not wanted:
        return ""
    pages = job["pages_loaded"]
    bar = "#" * (20 * pages // wanted)
    text = f"[{bar:.<20}] {job['issues_loaded']} of {job['issues']} issues"
    if 0 < pages < wanted:
        rate = pages / max(1, job["seconds"])
        text += f", {rate:.1f} pages a second, {span((wanted - pages) / rate)} left"
    return text


def batch_line(batch):
    """A batch in a table, with question marks for what was not counted."""
    row = {key: "?" if value is None else value for key, value in batch.items()}
    return (
        f"{row['state']:<10}{row['issues']:>4} of {row['issues_in_batch_xml']:<4} issues"
        f"{row['pages']:>7} of {row['pages_in_mets']:<6} pages  {row['name']}"
    )


SHOWN = {  # what stands under a key, or each thing in a list there, as text; "" is not shown
    "status": "".format,
    "batch": "".format,  # the message says it
    "message": str,
    "version": "ONI Agent {}".format,
    "uptime": lambda seconds: f"up {span(seconds)}",
    "oni": lambda oni: (
        f"Open ONI in {oni['location']}: {oni.get('batches', '?')} batches"
        f"  {oni.get('problem', '')}"
    ),
    "commands": "{0[usage]:<30}  {0[help]}".format,
    "events": lambda event: f"  {ago(event[0])}  {event[1]}",
    "faults": "fault: {0[file]}: {0[fault]}".format,
    "warnings": "warning: {0[file]}: {0[warning]}".format,
    "batches": batch_line,
    "job": job_line,
    "jobs": job_line,
    "at_work": job_line,
    "waiting": job_line,
    "ended": job_line,
}


def answer_lines(keys, most=None):
    """Any answer, key by key, as texts of a line or more; of a list so many things at most."""
    if keys.get("status") == "error":
        yield f"error: {keys['message']}"
        yield f"       {keys.get('error', '')}"
        return
    for key, value in keys.items():
        if isinstance(value, list):
            yield f"{key.replace('_', ' ').capitalize()}: {len(value)}"
        else:
            value = [value]
        for each in value[:most]:
            if key in SHOWN:
                yield SHOWN[key](each)
            else:
                yield f"{key}: {each}"


def shown(reply, terminal):
    """What a person is shown of an answered Request, in pieces."""
    yield drawn(wrapped(answer_lines(reply.keys), terminal.width), terminal)
    for lines in reply.lines:  # which the terminal itself may wrap: they can be copied whole
        yield drawn(map(plain, lines), terminal)


def show_progress(job, terminal):
    """Shows how far a job is on one line, which the next time, or the answer, overwrites."""
    text = how_far(job) or STATUS_MESSAGES[job["status"]]
    terminal.send(f"\x1b[K{next(wrapped([text], terminal.width))}\r")


def show_board(terminal):
    """Draws the board anew each second, until q or Ctrl-C; gives its newest Request."""
    terminal.send("\x1b[?1049h\x1b[?25l")  # another screen, and no cursor
    with contextlib.suppress(ClientGone):  # by Ctrl-C, maybe
        while True:
            reply = answer(b"board", terminal)
            texts = answer_lines(reply.keys, terminal.height // 2)
            lines = itertools.islice(wrapped(texts, terminal.width), terminal.height - 1)
            text = drawn((f"\x1b[K{line}" for line in lines), terminal)
            terminal.send(f"\x1b[H{text}\x1b[J\x1b[{terminal.height}Hq leaves; jobs go on")
            if re.search(b"[q\x04]", terminal.hear(1)):
                break
    terminal.send("\x1b[?25h\x1b[?1049l")
    return reply


def drawn(lines, terminal):
    """Lines as a terminal takes them, each in the colour that one of its words gives it."""
    text = "".join(f"{line}\r\n" for line in lines)
    for colour, words in COLOURS.items():
        if terminal.colour:
            line = rf"(?m)^.*\b({words})( \d+ \w+)?(  |[:\]]).*(?=\r)"
            text = re.sub(line, f"\x1b[{colour}m\\g<0>\x1b[0m", text)
    return text


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
    before, *parts = f"{compact.encode(keys)}\n".split(f'"{LINES_HERE}"')
    yield before
    for lines, after in zip(logs, parts):
        comma = ""
        for some in lines:
            yield ""  # so that it is noticed if the client has gone
            if some:
                yield comma + compact.encode(some)[1:-1]
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
        """Sends a person or a program the answer, and gives the answered Request.

        Nothing else holds it, so the logs that it was read from are let go of with it.
        """
        if self.width and self.line.strip() in (b"", b"board"):
            return show_board(self)
        reply = answer(self.line, self)
        if self.width:
            texts = shown(reply, self)
        elif reply.keys:
            texts = encoded({**reply.keys, "session": {"id": number}})
        else:
            texts = ("\n".join(lines) + "\n" for lines in reply.lines)
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
            raise Problem("this command reads a file: leave out -t, and give it < FILE")
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
    log.info("stopping on %s; manage.py goes on", signal_name(stop.recv(1)[0]))
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


# ---------------------------------------------------------------- is all well?


def looked(name, advice, look, *about):
    """Takes a look: whether all is well there, and what to say."""
    try:
        return True, f"{name}: {look(*about)}"
    except Exception as problem:  # whatever it is, the other looks are taken
        return False, f"{name}: {problem}; {advice}"


def looks_at_oni(oni):
    """Looks at Open ONI: whether it answers, and where loads write."""
    check = lambda: oni.ask("check", within=PATIENT_SECONDS)
    yield looked("manage.py check", "run it by hand, as the agent's user", check)
    try:
        batches, places = oni.ask("places", within=PATIENT_SECONDS)
    except (Problem, OSError) as problem:
        yield False, f"database: {problem}; see ONI's database settings"
        return
    yield True, f"database: {batches} batches"
    advice = "see ONI's SOLR_BASE_URL; loads and purges will fail"
    yield looked("Solr", advice, lambda: f"{oni.ask('documents')} pages")
    advice = "run the agent as the site's user; under systemd, name it in ReadWritePaths="
    for name, (folder, is_shared) in places.items():
        yield looked(f"ONI's {name}", advice, writable, oni.location / folder, is_shared)


def writable(folder, is_shared=False):
    """Tries to write to a folder, through links.

    One that is shared with the website may be yet to be made, and must not be another user's.
    """
    place = folder.resolve()
    if is_shared:
        if place.exists() and place.stat().st_uid != os.geteuid():
            raise Problem(
                f"{place} belongs to user {place.owner()}, as whom the agent does not run: what it"
                " writes there the website could not use"
            )
        place = nearest_folder(place)
    tempfile.TemporaryFile(dir=place).close()
    return f"{place} can be written"


def looks_at_all(settings):
    """Looks at all that an agent needs, before one runs."""

    def state():
        if (settings.state_directory / "jobs.db").exists():
            return f"{len(JobStore(settings.state_directory).jobs())} jobs"
        return writable(nearest_folder(settings.state_directory))

    def host_key():
        key = load_host_key(settings.host_key_file)
        if key:
            return fingerprint(key)
        if settings.host_key_file.parent == settings.state_directory:
            return "will be made"
        return writable(settings.host_key_file.parent)

    def address():
        with listen(*settings.ba_bind) as listener:
            return show_address(listener.getsockname())

    def source():
        return f"{len(in_time(lambda: os.listdir(settings.batch_source)))} entries"

    yield looked("state folder", "if an agent is at work there, ask that instead", state)
    yield looked("host key", "see HOST_KEY_FILE", host_key)
    yield looked("address", "set BA_BIND to a free port", address)
    yield looked("batch source", "let the agent's user read it", source)
    oni = OpenONI(settings.oni_location, os.environ)
    yield from looks_at_oni(oni)
    oni.close()


def look_once(oni):
    """Says in the log how Open ONI is; one that does not answer is no reason not to serve."""
    for well, text in looks_at_oni(oni):
        tell = log.info if well else log.warning
        tell("Open ONI in %s: %s", oni.location, text)


def check_all():
    """Prints how all is that the agent needs, a line each; the exit status is 1 if not well."""
    sys.stdout.reconfigure(errors="replace")  # not every terminal has a check mark
    try:
        settings = Settings(os.environ)
    except Problem as problem:
        for text in problem.args:
            print("✗", text)
        return 1
    print("✓ settings")
    exit_status = 0
    for well, text in looks_at_all(settings):
        print("✓" if well else "✗", text)
        if not well:
            exit_status = 1
    return exit_status


# ---------------------------------------------------------------- main


class JournalFormatter(logging.Formatter):
    """A log line as the journal takes it (sd-daemon(3)): a priority in front, and no time."""

    def format(self, record):
        priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
        return re.sub("(?m)^", f"<{priority}>", super().format(record))


def set_up_logging(level):
    """The log goes to stderr, with priorities where that is systemd's journal."""
    others = "DEBUG" if level == "DEBUG" else "CRITICAL"  # paramiko, that is
    logging.basicConfig(level=others, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(level)
    if stderr_is_journal():
        logging.root.handlers[0].setFormatter(JournalFormatter())


def tell_systemd(state):
    """Says how the service is (sd_notify(3)), where systemd wants to know."""
    with contextlib.suppress(KeyError, OSError):
        address = re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"])
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.sendto(state.encode(), address)


ASIDE = futures.ThreadPoolExecutor(8)  # for what nobody waits for


def run_on_finish(program, job, log_path, environ):
    """Runs ON_FINISH for a job that has ended; what becomes of it is only logged."""
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
            # timeout(1) ends it even if the agent goes.
            ["timeout", "-s", "KILL", str(HOOK_SECONDS), program],
            env=environment,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ).returncode
        if status == -signal.SIGKILL:
            status = f"none within {HOOK_SECONDS} s, and was killed"
        if status:
            log.error("job=%d ON_FINISH failed: exit status %s", job.id, status)
    except OSError as error:
        log.error("job=%d ON_FINISH failed: %s", job.id, error)


def on_stop(handler):
    """Sets what is done on SIGTERM and SIGINT, as signal.signal does."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def stop_on_signals():
    """A socket that can be read once SIGTERM or SIGINT has come; a second one ends the agent."""
    reader, writer = socket.socketpair()

    def stop(number, _):
        on_stop(signal.SIG_DFL)  # such an end is a clean one for systemd
        # No more than that: the signal may have come amid a line of the log.
        writer.send(bytes([number]))

    on_stop(stop)
    return reader


def be_init():
    """As PID 1 of a container: goes on as a child, for which this process buries the orphans."""
    if os.getpid() != 1:
        return
    agent = os.fork()
    if not agent:
        return
    on_stop(lambda number, _: os.kill(agent, number))
    ended = None
    while ended != agent:
        ended, status = os.wait()
    os._exit(os.waitstatus_to_exitcode(status))


def raise_limits():
    """Lets the agent open as many files as it may: each connection and command needs some."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(OSError, ValueError):  # as which Python tells of EPERM
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def main():
    """Runs the agent until it is told to stop; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"ONI Agent {VERSION}")
    parser.add_argument("--check", action="store_true", help="look at all that the agent needs")
    if parser.parse_args().check:
        return check_all()
    be_init()
    exit_status = 2  # systemd need not try again
    try:
        settings = Settings(os.environ)
        host_key = load_host_key(settings.host_key_file)
        set_up_logging(settings.log_level)
        stop = stop_on_signals()
        raise_limits()
        exit_status = 1  # what fails from here on may go well the next time
        agent = build(settings)
        host_key = host_key or make_host_key(settings.host_key_file)
        listener = listen(*settings.ba_bind)
    except Problem as problem:
        complain(*problem.args)
        return exit_status
    except OSError as error:  # Scarce, too
        complain(error)
        return exit_status
    gc.freeze()  # what is there by now stays, and need not be looked at
    tell_where(settings, listener.getsockname())
    agent.queue.start()
    ASIDE.submit(look_once, agent.site.oni)
    tell_systemd("READY=1")
    serve(agent, host_key, listener, stop)
    tell_systemd("STOPPING=1\nSTATUS=")
    return 0


def build(settings):
    """Wires together what commands work on. Raises Problem, OSError."""
    store = JobStore(settings.state_directory)
    oni = OpenONI(settings.oni_location, os.environ)
    site = Site(settings, oni)

    def ended(job):
        if settings.on_finish:
            with contextlib.suppress(RuntimeError):  # no thread to be had
                ASIDE.submit(
                    run_on_finish, settings.on_finish, job, store.log(job), oni.environment
                )

    return Agent(settings, site, store, JobQueue(store, site, ended))


def tell_where(settings, address):
    """Says in the log where the agent listens, and what an administrator should know of that."""
    shown = show_address(address)
    log.info("listening on %s version=%s state=%s", shown, VERSION, settings.state_directory)
    if settings.db_connection:
        log.info("DB_CONNECTION is set and not needed: Open ONI's own settings are used")
    if not (settings.allow_from or settings.authorized_keys or host_of(address).is_loopback):
        log.warning(
            "anyone who reaches %s may load and purge: set ALLOW_FROM or AUTHORIZED_KEYS", shown
        )


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads: they may be cut off at any instant
