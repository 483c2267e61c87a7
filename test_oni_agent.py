#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = [
#     "paramiko>=2.12", "django>=3.2", "lxml", "pillow", "pymarc", "pysolr",
#     "pytest", "pytest-xdist", "hypothesis", "ssh-audit",
# ]
# ///
"""Everything that checks oni_agent.py.

    python3 -m pytest -n 4 test_oni_agent.py    the tests, against a stand-in Open ONI, over SSH
    python3 test_oni_agent.py --demo            an agent to try, on 127.0.0.1:2299, until Ctrl-C
    python3 test_oni_agent.py --demo --once     a whole exchange, printed
    python3 test_oni_agent.py --site ONI_LOCATION    does it work with that Open ONI? see below
    python3 test_oni_agent.py --bench           how fast the agent is
    python3 test_oni_agent.py --bench --address HOST:PORT    and another agent beside it

--site is the acceptance test that an administrator runs on a staging Open ONI, after installing the
agent or upgrading ONI: as the user that the site runs as, with the environment that manage.py needs
(ONI_DB_HOST and so on). It starts an agent of its own, loads, breaks, mends and purges tiny batches
of its own there, prints a line on each thing that it tries, and leaves the site as it was.

`pytest -k in_process` runs those that need no agent beside them, in a few seconds: parsing, state,
log, queue and store, and what a person is shown.

CRASH_KILLS=150 makes the crash tests kill more often, CRASH_SEED=… at the same instants again.

The stand-in is a real Django project with the models, the commands and the bad habits of a real
Open ONI. The agent runs as a process of its own, and is talked to by OpenSSH's client and by
paramiko's.

In this file, from top to bottom: a site with an agent, gates, clients, a search index and a MARC
site, batches, fixtures, and words that many tests use; odd batches of all kinds, and what a machine
may bring; then the promises, by the README's chapters: the wire, loading and purging, batch-check,
batch-status and list-batches, titles and awardees, batch-patch, the queue and restarts, cancelling,
logs, a person at a terminal, who may connect, settings and start and stop, systemd, load and
limits, the README; then what the stand-in promises, and its files, as code; the demo, --site and
--bench.

To add a test, take one of three fixtures: `agent`, a site whose agent runs; `site`, one whose agent
is yet to `start(NAME=value, ...)`; `shared`, one that all tests that only ask have together.
Feed it: `site.batch(NAME, issues=, pages=)`, and spoil that by a function of FAULTS, if need be.
Ask: `site.call(*words, stdin=)` gives the answer, `site.job(...)` the id of the job that it makes,
`site.ended(id)` the job once it has ended, `site.run(...)` both; `site.ssh(line)` asks with ssh.
Look: `site.held(batch)` gives rows, issues and pages, `site.events(batch)` the history,
`site.query(SQL)` anything else; `site.logs(id)`, `site.wait_for(pattern)`; `site.solr.documents()`.
Hold: `gate = site.hold_load(batch, issue=, page=)` before the load; then `gate.reached()`, look,
`gate.open()`; `site.hold(batch / "purge-gate")` in a purge; `kill_at(site, gate, "load_batch")`.
Break: `with site.database_down():`, `with site.solr.down():` (or `failing()`, `hanging()`),
`site.solr.forget()`, `settings_local(site, text)`, `site.prepend_to_manage(code)`, `MarcSite()`.
A test waits for what happens, by a gate, the agent's log or `until(condition)`; it never sleeps.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import errno
import fcntl
import functools
import gc
import importlib.util
import inspect
import io
import json
import logging
import os
import pty
import pwd
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import types
import venv
import warnings
import zlib
from concurrent import futures
from datetime import date, datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union
from urllib.parse import parse_qs
from xml.etree import ElementTree

warnings.filterwarnings("ignore", module="paramiko")
import oni_agent  # noqa: E402, I001  (first, since it says how to get a missing paramiko)
import paramiko  # noqa: E402


class NotInstalled:
    """Stands for pytest and hypothesis where they are missing: the demo needs neither."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self

    def __or__(self, other):
        return self

    def __iter__(self):
        return iter(())


try:
    import pytest
    from hypothesis import HealthCheck, given, settings, strategies
except ImportError:
    pytest = HealthCheck = given = settings = strategies = NotInstalled()

AGENT = Path(oni_agent.__file__).resolve()


def busy(seconds: float) -> float:
    """As many times more seconds as the machine has more to do than its cores can."""
    return seconds * max(1, os.getloadavg()[0] / (os.cpu_count() or 1) / 2)


# --- A site with an agent -------------------------------------------------------------------------


class Site:
    """A stand-in Open ONI with its batches, and an agent that runs on it, a process of its own."""

    def __init__(self, folder: Path, template: Path):
        self.oni = folder / "oni"
        self.source = folder / "batches"
        self.state = folder / "state"
        shutil.copytree(template, self.oni, symlinks=True)
        self.source.mkdir()
        self.solr = Solr()
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ONI_LOCATION": str(self.oni),
            "ONI_SOLR_URL": self.solr.url,
            "BATCH_SOURCE": str(self.source),
            "STATE_DIRECTORY": str(self.state),
            "BA_BIND": "127.0.0.1:0",
            "LOG_LEVEL": "debug",
        }
        self._begin()

    def _begin(self) -> None:
        """There is no agent yet."""
        self.prefix: list[str] = []  # words before the agent's own
        self.is_module = True  # the agent is started as one
        self.agent: subprocess.Popen | None = None
        self.port = 0
        self.log: list[str] = []
        self._news = threading.Condition()

    # -- the agent's life

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_) -> None:
        self.clean_up()

    def start(self, limits: dict[str, float] | None = None, **environment: str) -> Site:
        """Starts the agent and waits until it listens. It may have other limits than its own."""
        self.environment.update(environment)
        limits = {"ANSWER_SECONDS": busy(oni_agent.ANSWER_SECONDS), **(limits or {})}
        is_a_test = self.environment["BA_BIND"] == "127.0.0.1:0"
        self.log = []
        # With -m Python need not compile the file anew: a third of the time that a start takes.
        program = ["-m", AGENT.stem] if self.is_module and not self.prefix else [str(AGENT)]
        self.agent = subprocess.Popen(
            [*self.prefix, sys.executable, *program],
            cwd=str(AGENT.parent),
            env={
                **self.environment,
                **({oni_agent.LIMITS_OF_TESTS: json.dumps(limits)} if is_a_test else {}),
            },
            stderr=subprocess.PIPE,
        )
        threading.Thread(
            target=self._read_log, args=(self.agent.stderr, self.log), daemon=True
        ).start()
        line = self.wait_for(r"listening on \S+:\d+")
        self.port = int(re.search(r"listening on \S+:(\d+)", line)[1])
        return self

    def _read_log(self, stream, log: list[str]) -> None:
        for line in io.TextIOWrapper(stream, errors="replace"):
            with self._news:
                log.append(line)
                self._news.notify_all()
        with self._news:
            log.append("(the agent's log ends here)")
            self._news.notify_all()

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """The first line of the agent's log with this pattern, once it is there."""

        def found() -> str:
            return next((line for line in self.log if re.search(pattern, line)), "") or (
                "(ends)" if self.log and self.log[-1].startswith("(the agent's log ends") else ""
            )

        with self._news:
            line = self._news.wait_for(found, busy(seconds))
        assert line and line != "(ends)", f"no {pattern!r} in the agent's log:\n{''.join(self.log)}"
        return line

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Sends the agent a signal and waits for its end; its exit status."""
        self.agent.send_signal(how)
        return self.agent.wait(30)

    def kill(self) -> None:
        """kill -9."""
        self.stop(signal.SIGKILL)

    def restart(self, **environment: str) -> Site:
        """kill -9, and a new one."""
        self.kill()
        return self.start(**environment)

    def clean_up(self) -> None:
        """Leaves no process behind."""
        if self.agent and self.agent.poll() is None:
            self.kill()
        for pid in self.manage_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.solr.close()

    def manage_pids(self, command: str = "") -> list[int]:
        """The manage.py processes of this site that are at work (on one command)."""
        pids = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = entry.read_bytes().decode("utf-8", "replace").split("\0")
                if self.is_own(words) and (not command or command in words):
                    if entry.with_name("stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        pids.append(int(entry.parent.name))
        return pids

    def is_own(self, words: list[str]) -> bool:
        """Whether a process with this command line is a manage.py of this site."""
        return str(self.oni / "manage.py") in words

    def workers(self) -> list[int]:
        """The forks of the manage.py that answers the agent's questions, by their PIDs."""
        pids = self.manage_pids("shell")
        return [pid for pid in pids if parent_of(pid) in pids]

    def zygote(self) -> int:
        """The manage.py that they are forks of."""
        pids = self.manage_pids("shell")
        [pid] = [pid for pid in pids if parent_of(pid) not in pids]
        return pid

    # -- talking to it

    def ssh_words(self, *options: str) -> list[str]:
        """OpenSSH's client, as a list of words that lacks only the command."""
        return [
            "ssh",
            "-F",
            "none",
            "-p",
            str(self.port),
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "LogLevel=ERROR",
            "-o",
            "UserKnownHostsFile=/dev/null",
            "-o",
            "BatchMode=yes",
            *options,
            "nobody@127.0.0.1",
        ]

    def ssh(self, command: str, stdin: bytes = b"") -> dict:
        """What OpenSSH's client prints for a command: one JSON object.

        The exit status is 0, and stderr is empty.
        """
        done = subprocess.run(
            [*self.ssh_words(), command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=90,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return json.loads(done.stdout)

    def call(self, *words: str, stdin: bytes | None = None) -> dict:
        """The answer to a command, asked as NCA asks.

        That is with a connection of its own, and every word in Go's quotes.
        """
        with Client(self.port) as client:
            return client.ask(" ".join(go_quoted(word) for word in words), stdin)

    def job(self, *words: str, stdin: bytes | None = None) -> int:
        """The id of the job that a command becomes."""
        reply = self.call(*words, stdin=stdin)
        assert reply["status"] == "success", reply
        return reply["job"]["id"]

    def ended(self, id: int) -> dict:
        """The job of an id, once it has ended."""
        job = self.call("job-status", str(id))["job"]
        if job["status"] in ("pending", "started"):
            self.wait_for(rf"job={id} .*status=")
            job = self.call("job-status", str(id))["job"]
        return job

    def run(self, *words: str, stdin: bytes | None = None) -> dict:
        """A command's job, once it has ended."""
        return self.ended(self.job(*words, stdin=stdin))

    def logs(self, id: int) -> list[str]:
        """The lines of a job's log, both streams, in order, without their stamps."""
        job = self.call("job-logs", str(id))["job"]
        return [line[33:] for line in sorted(job["stdout"] + job["stderr"])]

    # -- its manage.py, without the agent

    def manage_begun(self, *words: str, **environment: str) -> subprocess.Popen:
        """A manage.py of this site, at work."""
        path = f"{self.oni}/ENV/bin:{self.environment['PATH']}"
        return subprocess.Popen(
            ["./manage.py", *words],
            cwd=self.oni,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env={**self.environment, **environment, "PATH": path},
        )

    def manage(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """A manage.py of this site, run to its end."""
        process = self.manage_begun(*words, **environment)
        out, err = process.communicate(timeout=90)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    # -- its database and its batches

    def query(self, sql: str, *values) -> list[tuple]:
        """Rows of Open ONI's database."""
        with contextlib.closing(sqlite3.connect(self.oni / "oni.sqlite3", timeout=60)) as database:
            return database.execute(sql, values).fetchall()

    def execute(self, sql: str, *values: Any) -> None:
        """Changes rows of Open ONI's database."""
        path = self.oni / "oni.sqlite3"
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database, database:
            database.execute(sql, values)

    def held(self, batch: str) -> tuple[int, int, int]:
        """Rows, issues and pages of a batch in Open ONI's database."""
        return self.query(
            "SELECT (SELECT count(*) FROM core_batch WHERE name = ?1), (SELECT count(*) FROM"
            " core_issue WHERE batch_id = ?1), (SELECT count(*) FROM core_page JOIN core_issue ON"
            " core_issue.id = issue_id WHERE batch_id = ?1)",
            batch,
        )[0]

    def events(self, batch: str) -> list[str]:
        """A batch's history in Open ONI's database."""
        return [
            message
            for message, in self.query(
                "SELECT message FROM core_loadbatchevent WHERE batch_name = ? ORDER BY id", batch
            )
        ]

    def batch(self, name: str, issues: int = 2, pages: int = 2, **more) -> Path:
        """A new batch in BATCH_SOURCE."""
        return make_batch(self.source, name, issues, pages, **more)

    def hold(self, path: Path) -> Gate:
        """Makes whoever reads this file wait."""
        return Gate(path)

    def hold_load(self, batch: Path, issue: int = 0, page: int = 1) -> Gate:
        """Makes a load wait at a page, whose row it has saved and whose files it has not read."""
        return Gate(mets_of(batch, issue).with_name(f"{page:04}.gate"))

    @contextlib.contextmanager
    def database_down(self):
        """Open ONI's database cannot be opened, and who has it open cannot write.

        The processes that answer the agent's questions, which could read on, lose it altogether.
        """
        there = self.oni / "oni.sqlite3"
        away = self.oni / "away.sqlite3"
        there.rename(away)
        there.mkdir()
        for pid in self.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            yield
        finally:
            there.rmdir()
            away.rename(there)

    def prepend_to_manage(self, code: str) -> None:
        """Something that this site's manage.py does first."""
        manage = self.oni / "manage.py"
        first, rest = manage.read_text().split("\n", 1)
        rewrite(manage, f"{first}\n{code}\n{rest}")


def parent_of(pid: int) -> int:
    """The PID of a process' parent, or 0 if there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def rewrite(program: Path, text: str) -> None:
    """Puts another program in the place of one that may just be started, which locks it."""
    new = program.with_name(f"{program.name}.new")
    new.write_text(text)
    shutil.copymode(program, new)
    new.rename(program)


# --- Gates: how a test holds what it tests at an instant ------------------------------------------


class Gate:
    """A FIFO in place of a file, or where none was: who opens it waits until the gate opens."""

    def __init__(self, path: Path):
        self.path = path
        self._content = path.read_bytes() if path.is_file() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        self._writer = -1

    def reached(self) -> Gate:
        """Waits until somebody stands at the gate."""
        if self._writer < 0:
            self._writer = os.open(self.path, os.O_WRONLY)
        return self

    def is_reached(self) -> bool:
        """Whether somebody stands at the gate by now."""
        if self._writer < 0:
            with contextlib.suppress(OSError):  # nobody reads
                self._writer = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
                os.set_blocking(self._writer, True)
        return self._writer >= 0

    def open(self) -> None:
        """Lets them in, and makes the file what it was."""
        if self._writer < 0:
            self.reached()
        if self._content is None:
            self.path.unlink()
        else:
            unready = self.path.with_name(self.path.name + ".file")
            unready.write_bytes(self._content)
            unready.rename(self.path)
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, self._content or b"")
        os.close(self._writer)

    def remove(self) -> None:
        """Does the same, also where nobody stands there."""
        if self._writer < 0:
            self._writer = os.open(self.path, os.O_RDWR)  # which waits for nobody
        self.open()


# --- Clients --------------------------------------------------------------------------------------


class Client:
    """A connection with paramiko's client, authenticated by "none"."""

    def __init__(self, port: int, user: str = "nca", host: str = "127.0.0.1", **options):
        self.transport = paramiko.Transport(socket.create_connection((host, port)), **options)
        self.transport.start_client(timeout=30)
        self.transport.auth_none(user)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.transport.close()

    def channel(self, command: str | bytes) -> paramiko.Channel:
        """A channel on which a command has been accepted."""
        channel = self.transport.open_session(timeout=30)
        channel.settimeout(90)
        channel.exec_command(command)
        return channel

    def raw(self, command: str | bytes, stdin: bytes | None = None) -> bytes:
        """What comes on stdout; nothing may come on stderr, and the exit status must be 0."""
        channel = self.channel(command)
        if stdin is not None:
            channel.sendall(stdin)
        channel.shutdown_write()
        output = channel.makefile("rb").read()
        assert channel.recv_exit_status() == 0
        assert channel.recv_stderr(1) == b""
        return output

    def ask(self, command: str | bytes, stdin: bytes | None = None) -> dict:
        """The JSON answer to a command."""
        return json.loads(self.raw(command, stdin))


GO_NAMED = {
    "\a": r"\a",
    "\b": r"\b",
    "\f": r"\f",
    "\n": r"\n",
    "\r": r"\r",
    "\t": r"\t",
    "\v": r"\v",
    '"': r"\"",
    "\\": r"\\",
}


def go_quoted(word: str) -> str:
    """A word as Go's %q writes it."""
    return '"' + "".join(map(go_escaped, word)) + '"'


def go_escaped(character: str) -> str:
    """A character as it stands in what Go's %q writes."""
    code = ord(character)
    if character in GO_NAMED:
        return GO_NAMED[character]
    if character.isprintable():
        return character
    if code < 128:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# --- What a site talks to: a search index, and MARC records ---------------------------------------


class SolrParameters:
    """What a query string, or a form, asks for; each name may be there several times."""

    def __init__(self, query: str):
        self._values = parse_qs(query)

    def all(self, name: str) -> List[str]:
        """All values of a name, in their order."""
        return self._values.get(name, [])

    def value(self, name: str, default: Optional[str] = None) -> str:
        """The last value of a name; a KeyError if there is none, nor a default."""
        values = self.all(name)
        if values:
            return values[-1]
        if default is None:
            raise KeyError(f"missing parameter: {name}")
        return default


class Solr:
    """A search index on a port of its own, as far as pysolr, Open ONI and an agent use one.

    What is added or deleted shows at the next commit.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._documents: dict[str, dict] = {}  # by id; what searches find
        self._changes: list[Callable[[], None]] = []  # since the last commit
        self._answering = threading.Event()
        self._answering.set()
        self._failing = False
        self.requests: list[str] = []  # of each request: its path
        self._server = self._listen(0)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), SolrRequest)
        server.daemon_threads = True
        server.block_on_close = False
        server.solr = self
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server

    def close(self) -> None:
        """Refuses connections from here on."""
        self._answering.set()
        self._server.shutdown()
        self._server.server_close()

    # -- for tests

    def documents(self, batch: str = "") -> list[str]:
        """The ids that a search finds: of a batch's pages, or of everything."""
        with self._lock:
            return sorted(
                id
                for id, document in self._documents.items()
                if batch in ("", document.get("batch"))
            )

    def forget(self, batch: str = "") -> None:
        """Loses a batch's documents, or all, as an index does that was restored or replaced."""
        with self._lock:
            for id, document in list(self._documents.items()):
                if batch in ("", document.get("batch")):
                    del self._documents[id]

    @contextlib.contextmanager
    def down(self):
        """Connections are refused."""
        self.close()
        try:
            with socket.socket() as holder:  # so that nobody else takes the port
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                holder.bind(("127.0.0.1", self.port))
                yield
        finally:
            self._server = self._listen(self.port)

    @contextlib.contextmanager
    def failing(self):
        """Every request is answered with HTTP 500."""
        self._failing = True
        try:
            yield
        finally:
            self._failing = False

    @contextlib.contextmanager
    def hanging(self):
        """No request is answered before the end of this."""
        self._answering.clear()
        try:
            yield
        finally:
            self._answering.set()

    # -- for requests

    def answer(self, path: str, body: str) -> tuple[int, dict]:
        """Status and JSON of the answer to a request; a request without a body is a search."""
        self.requests.append(path)
        self._answering.wait()
        if self._failing:
            return 500, {"error": {"msg": "told to fail", "code": 500}}
        if len(path) > LONGEST_URL:
            return 414, {"error": {"msg": "URI Too Long", "code": 414}}
        where, _, query = path.partition("?")
        try:
            with self._lock:
                if where.startswith("/solr/openoni/update"):
                    return 200, self._update(body, SolrParameters(query))
                if where == "/solr/openoni/admin/luke":
                    return 200, {"index": self._version()}
                return 200, self._search(SolrParameters(f"{query}&{body}"))
        except (KeyError, ValueError) as error:
            return 400, {"error": {"msg": str(error), "code": 400}}

    def _version(self) -> Dict[str, Any]:
        """What Solr says of its index as a whole; it is another after each change."""
        documents = json.dumps(self._documents, sort_keys=True, default=str)
        return {"version": zlib.crc32(documents.encode()), "lastModified": len(documents)}

    def _update(self, body: str, asked: SolrParameters) -> dict:
        """Takes a document, a deletion or a commit in, in JSON or XML."""
        commit = asked.value("commit", "") == "true"
        if body.startswith("["):
            for document in json.loads(body):
                self._changes.append(functools.partial(self._add, checked_document(document)))
        elif body:
            root = ElementTree.fromstring(body)
            commit = commit or root.tag == "commit"
            for node in root:
                self._take(root.tag, node)
        if commit:
            for change in self._changes:
                change()
            self._changes.clear()
        return {"responseHeader": {"status": 0}}

    def _take(self, action: str, node: ElementTree.Element) -> None:
        """What one node of an XML update asks for."""
        if action == "add":
            document = {field.get("name"): field.text for field in node}
            self._changes.append(functools.partial(self._add, document))
        elif action == "delete" and node.tag == "id":
            self._changes.append(functools.partial(self._documents.pop, node.text, None))
        elif action == "delete" and node.tag == "query":
            self._changes.append(functools.partial(self._delete, node.text))

    def _add(self, document: dict) -> None:
        self._documents[document["id"]] = document

    def _delete(self, query: str) -> None:
        for document in self._found(query):
            del self._documents[document["id"]]

    def _found(self, *queries: str) -> list[dict]:
        """The documents that match all these queries."""
        return [
            document
            for document in self._documents.values()
            if all(matches(document, query) for query in queries)
        ]

    def _search(self, asked: SolrParameters) -> Dict[str, Any]:
        found = self._found(asked.value("q"), *asked.all("fq"))
        by, _, direction = asked.value("sort", "").partition(" ")
        if by:
            found.sort(key=lambda document: str(document.get(by)), reverse=direction == "desc")
        start, rows = int(asked.value("start", "0")), int(asked.value("rows", "10"))
        shown = found[start : start + rows]
        answer: Dict[str, Any] = {"responseHeader": {"status": 0, "QTime": 0}}
        mark = asked.value("cursorMark", "")
        if mark:
            if asked.value("sort", "") != "id asc" or start:
                raise ValueError("cursorMark is known here with sort=id asc, and without start")
            rest = [document for document in found if mark == "*" or document["id"] > mark]
            shown = rest[:rows]
            answer["nextCursorMark"] = shown[-1]["id"] if shown else mark
        if asked.all("fl"):
            fields = set(re.split("[, ]", ",".join(asked.all("fl"))))
            shown = [
                {key: value for key, value in document.items() if key in fields}
                for document in shown
            ]
        answer["response"] = {"numFound": len(found), "start": start, "docs": shown}
        if asked.value("facet", "") == "true":
            facets = {field: self._facet(field, found, asked) for field in asked.all("facet.field")}
            answer["facet_counts"] = {"facet_fields": facets}
        return answer

    def _facet(
        self, field: str, found: List[Dict[str, Any]], asked: SolrParameters
    ) -> List[Union[str, int]]:
        """Counts what is found by a field's values; 0 of those that only other documents have.

        The largest counts come first, but all counts, asked for by a limit of -1, by value.
        """
        counts: Dict[str, int] = {}
        for document in self._documents.values():
            counts.update(dict.fromkeys(values_of(document, field), 0))
        for document in found:
            for value in values_of(document, field):
                counts[value] += 1
        least = int(asked.value("facet.mincount", "0"))
        limit = int(asked.value("facet.limit", "100"))
        counted = sorted((value, count) for value, count in counts.items() if count >= least)
        if limit >= 0:
            counted = sorted(counted, key=lambda pair: -pair[1])[:limit]
        return [item for pair in counted for item in pair]


# As Open ONI's schema and Jetty have them.
LONGEST_URL = 8192
MOST_CLAUSES = 1024
REQUIRED_FIELDS = ("id", "type", "lccn", "language")
NUMBER_FIELDS = ("date", "day", "month", "year", "sequence", "start_year", "end_year")


def checked_document(document: Dict[str, Any]) -> Dict[str, Any]:
    """A document without the fields that have no value; a ValueError if the schema refuses it."""
    kept = {field: value for field, value in document.items() if value not in (None, [])}
    for field in REQUIRED_FIELDS:
        if field not in kept:
            raise ValueError(f"[doc={kept.get('id')}] missing required field: {field}")
    for field in NUMBER_FIELDS:
        if field in kept and not -(2**31) <= int(kept[field]) < 2**31:
            raise ValueError(f"[doc={kept['id']}] Error adding field '{field}'='{kept[field]}'")
    return kept


def values_of(document: Dict[str, Any], field: str) -> List[str]:
    """What a document has in a field, as text."""
    value = document.get(field, [])
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


TERMS_QUERY = re.compile(r"\{!terms f=(\w+)\}(.*)", re.DOTALL)
TERM = re.compile(r"""([+-]?)(\w+|\*):(\([^()]*\)|"[^"]*"|[^\s"()]+)""")


def matches(document: dict, query: str) -> bool:
    """Whether a document is meant by a query.

    Of Solr's language are known FIELD:"VALUE", FIELD:("VALUE" OR "VALUE") and *:*, with + or -
    before them and AND between them, and {!terms f=FIELD}VALUE,VALUE; else it is a ValueError.
    """
    listed = TERMS_QUERY.fullmatch(query)
    if listed:
        return not set(values_of(document, listed[1])).isdisjoint(listed[2].split(","))
    if not re.fullmatch(r"(\s|AND)*", TERM.sub("", query)):
        raise ValueError(f"a query that is not known here: {query}")
    for sign, field, text in TERM.findall(query):
        wanted = [value.strip(' "') for value in text.strip("()").split(" OR ")]
        if len(wanted) > MOST_CLAUSES:
            raise ValueError("too many boolean clauses")
        is_there = field == "*" or field in document
        has_one = not set(values_of(document, field)).isdisjoint(wanted)
        is_meant = is_there and ("*" in wanted or has_one)
        if is_meant == (sign == "-"):
            return False
    return True


class SolrRequest(BaseHTTPRequestHandler):
    """A request to a Solr of the class above."""

    def do_GET(self) -> None:
        self.reply("")

    def do_POST(self) -> None:
        self.reply(self.rfile.read(int(self.headers["Content-Length"])).decode())

    def reply(self, body: str) -> None:
        status, answer = self.server.solr.answer(self.path, body)
        content = json.dumps(answer).encode()
        with contextlib.suppress(ConnectionError):  # whoever asked may have been killed
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        """Says nothing."""


class MarcSite:
    """A site that has the MARC records of some titles, and of all others answers 404."""

    def __init__(self, *lccns: str, **answers: bytes):
        """Has ordinary records of `lccns`, and `answers` of its own to some LCCNs."""
        self.answers = {lccn: marc_xml(lccn, f"The fetched {lccn}.") for lccn in lccns}
        self.answers.update(answers)
        self.redirects: dict[str, str] = {}  # where it sends who asks for an LCCN
        self.requests: list[str] = []  # of each request: its path
        self.was_asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), MarcRequest)
        self._server.daemon_threads = True
        self._server.site = self
        self.urlformat = f"http://127.0.0.1:{self._server.server_address[1]}/lccn/%s/marc.xml"
        self.environment = {"ONI_MARC_RETRIEVAL_URLFORMAT": self.urlformat}

    def __enter__(self) -> MarcSite:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()


class MarcRequest(BaseHTTPRequestHandler):
    """A request to a MarcSite."""

    def do_GET(self) -> None:
        site = self.server.site
        site.requests.append(self.path)
        lccn = self.path.split("/")[2]
        site.was_asked.set()
        site.may_answer.wait(60)
        if lccn in site.redirects:
            self.send_response(302)
            self.send_header("Location", site.redirects[lccn])
            self.end_headers()
        elif lccn in site.answers:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(site.answers[lccn])
        else:
            self.send_error(404)

    def log_message(self, *_) -> None:
        """Says nothing."""


# --- What it is fed: batches and MARC records -----------------------------------------------------

NDNP_BATCH = '''\
<?xml version="1.0" encoding="UTF-8"?>
<batch xmlns="http://www.loc.gov/ndnp" name="{name}" awardee="{awardee}" awardYear="2020">
<reel reelNumber="print">./{lccn}/print/print.xml</reel>
{issues}
</batch>
'''
NDNP_ISSUE = '''\
<issue lccn="{lccn}" issueDate="{day}" editionOrder="01">\
./{lccn}/print/{folder}/{folder}.xml</issue>'''
METS_ISSUE = '''\
<?xml version="1.0" encoding="UTF-8"?>
<mets xmlns="http://www.loc.gov/METS/" xmlns:mods="http://www.loc.gov/mods/v3"
 xmlns:mix="http://www.loc.gov/mix/" xmlns:xlink="http://www.w3.org/1999/xlink"
 TYPE="urn:library-of-congress:ndnp:mets:newspaper:issue">
<dmdSec ID="issueModsBib"><mdWrap MDTYPE="MODS"><xmlData><mods:mods>
<mods:relatedItem type="host">
<mods:identifier type="lccn">{lccn}</mods:identifier>
<mods:part>
<mods:detail type="volume"><mods:number>1</mods:number></mods:detail>
<mods:detail type="edition"><mods:number>{edition}</mods:number></mods:detail>
</mods:part>
</mods:relatedItem>
<mods:originInfo><mods:dateIssued encoding="iso8601">{day}</mods:dateIssued></mods:originInfo>
</mods:mods></xmlData></mdWrap></dmdSec>
{descriptions}
<amdSec ID="technical">
{dimensions}
</amdSec>
<fileSec>
{files}
</fileSec>
<structMap>
<div TYPE="np:issue" DMDID="issueModsBib">
{pages}
</div>
</structMap>
</mets>
'''
METS_DESCRIPTION = '''\
<dmdSec ID="pageModsBib{page}"><mdWrap MDTYPE="MODS"><xmlData><mods:mods><mods:part>
<mods:extent unit="pages"><mods:start>{page}</mods:start></mods:extent>
<mods:detail type="page number"><mods:number>{page}</mods:number></mods:detail>
</mods:part></mods:mods></xmlData></mdWrap></dmdSec>'''
METS_DIMENSIONS = '''\
<techMD ID="service{page}Technical"><mdWrap MDTYPE="NISOIMG"><xmlData><mix:mix>
<mix:ImagingPerformanceAssessment><mix:SpatialMetrics>
<mix:ImageWidth>5200</mix:ImageWidth><mix:ImageLength>7500</mix:ImageLength>
</mix:SpatialMetrics></mix:ImagingPerformanceAssessment>
</mix:mix></xmlData></mdWrap></techMD>'''
METS_FILE = '''\
<file ID="{use}{page}" USE="{use}"{technical}>\
<FLocat LOCTYPE="OTHER" OTHERLOCTYPE="file" xlink:href="{page:04}.{suffix}"/></file>'''
METS_PAGE = '''\
<div TYPE="np:page" DMDID="pageModsBib{page}"><fptr FILEID="master{page}"/>\
<fptr FILEID="service{page}"/><fptr FILEID="derivative{page}"/><fptr FILEID="ocr{page}"/></div>'''
ALTO = b'''\
<?xml version="1.0" encoding="UTF-8"?>
<alto xmlns="http://schema.ccs-gmbh.com/ALTO">
<Layout><Page ID="P1" PHYSICAL_IMG_NR="1" HEIGHT="7500" WIDTH="5200">
<PrintSpace HPOS="0" VPOS="0" HEIGHT="7500" WIDTH="5200">
<TextBlock ID="TB1" language="eng">
<TextLine HPOS="100" VPOS="100" WIDTH="900" HEIGHT="40">
<String HPOS="100" VPOS="100" WIDTH="200" HEIGHT="40" CONTENT="The"/>
<String HPOS="320" VPOS="100" WIDTH="600" HEIGHT="40" CONTENT="gazette."/>
</TextLine>
</TextBlock>
</PrintSpace>
</Page></Layout>
</alto>
'''
MARC_RECORD = '''\
<record xmlns="http://www.loc.gov/MARC21/slim">
<leader>00000cas a2200000 a 4500</leader>
<controlfield tag="001">ocm00000001</controlfield>
<controlfield tag="003">OCoLC</controlfield>
<controlfield tag="005">20220102030405.0</controlfield>
<controlfield tag="008">000101d18501999oruwr ne      0    a{language} c</controlfield>
{key}
<datafield tag="245" ind1="0" ind2="0"><subfield code="a">{name}</subfield></datafield>
<datafield tag="260" ind1=" " ind2=" "><subfield code="a">Eugene, Or. :</subfield></datafield>
</record>
'''
MARC_LCCN = '''\
<datafield tag="010" ind1=" " ind2=" "><subfield code="a">  {} </subfield></datafield>'''
OCLC_ANSWER = '''\
<searchRetrieveResponse xmlns="http://www.loc.gov/zing/srw/"><numberOfRecords>1</numberOfRecords>
<records><record><recordData>
{}</recordData></record></records>
</searchRetrieveResponse>
'''
JP2 = base64.b64decode("""
AAAADGpQICANCocKAAAAFGZ0eXBqcDIgAAAAAGpwMiAAAAAtanAyaAAAABZpaGRyAAAACAAAAAgAAQcHAAAAAAAPY29scgEA
AAAAABEAAACNanAyY/9P/1EAKQAAAAAACAAAAAgAAAAAAAAAAAAAAAgAAAAIAAAAAAAAAAAAAQcBAf9SAAwAAAABAAMEBAAB
/1wADUBASEhQSEhQSEhQ/2QAJQABQ3JlYXRlZCBieSBPcGVuSlBFRyB2ZXJzaW9uIDIuNS4w/5AACgAAAAAAEgAB/5OAgICA
/9k=""")  # of 8 by 8 pixels, all of them grey
PAGE_FILES = {
    "tif": b"II*\0" + bytes(300),
    "jp2": JP2,
    "pdf": b"%PDF-1.4\n" + b"%" * 300 + b"\n%%EOF\n",
    "xml": ALTO,
}
PAGE_USES = {"master": "tif", "service": "jp2", "derivative": "pdf", "ocr": "xml"}


def make_batch(
    source: Path,
    name: str,
    issues: int = 2,
    pages: int = 2,
    lccn: str = "sn99990001",
    start: date = date(1900, 1, 1),
    dimensions: bool = True,
    validated: bool = False,
) -> Path:
    """Writes a whole batch into `source`, an issue a day from `start` on; its folder.

    Without `dimensions` ONI opens each jp2. `validated`: batch_1.xml beside batch.xml.
    """
    data = source / name / "data"
    reel = data / lccn / "print"
    reel.mkdir(parents=True)
    (reel / "print.xml").write_text('<mets xmlns="http://www.loc.gov/METS/" LABEL="reel print"/>\n')
    listed = []
    for number in range(issues):
        day = start + timedelta(days=number)
        folder = reel / f"{day:%Y%m%d}01"
        make_issue(folder, mets_xml(pages, lccn, day, dimensions=dimensions), pages)
        listed.append(NDNP_ISSUE.format(lccn=lccn, day=day, folder=folder.name))
    awardee = (name.split("_") + [""])[1]
    batch_xml = NDNP_BATCH.format(name=name, awardee=awardee, lccn=lccn, issues="\n".join(listed))
    (data / "batch.xml").write_text(batch_xml)
    if validated:
        (data / "batch_1.xml").write_text(batch_xml)
    return source / name


def make_issue(folder: Path, mets: str, pages: int) -> None:
    """Writes an issue: its METS, as delivered and as the validator leaves it, and its pages."""
    folder.mkdir()
    (folder / f"{folder.name}.xml").write_text(mets)
    (folder / f"{folder.name}_1.xml").write_text(mets)
    for page in range(1, pages + 1):
        for suffix, content in PAGE_FILES.items():
            (folder / f"{page:04}.{suffix}").write_bytes(content)


def mets_xml(
    pages: int,
    lccn: str = "sn99990001",
    day: date = date(1900, 1, 1),
    edition: int = 1,
    dimensions: bool = True,
) -> str:
    """The METS file of an issue, cut down to what a load reads."""
    numbers = range(1, pages + 1)
    files = []
    for page in numbers:
        for use, suffix in PAGE_USES.items():
            measured = dimensions and use == "service"
            technical = f' ADMID="service{page}Technical"' if measured else ""
            files.append(METS_FILE.format(use=use, page=page, suffix=suffix, technical=technical))
    return METS_ISSUE.format(
        lccn=lccn,
        edition=edition,
        day=day,
        descriptions="\n".join(METS_DESCRIPTION.format(page=page) for page in numbers),
        dimensions="\n".join(METS_DIMENSIONS.format(page=page) for page in numbers),
        files="\n".join(files),
        pages="\n".join(METS_PAGE.format(page=page) for page in numbers),
    )


def marc_xml(
    lccn: str = "sn99990009",
    name: str = "The sample herald.",
    language: str = "eng",
    wrapped: bool = False,
) -> bytes:
    """A title's MARC record, bare or as OCLC's search answers with it.

    It has no LCCN when `lccn` is empty.
    """
    key = MARC_LCCN.format(lccn) if lccn else ""
    record = MARC_RECORD.format(key=key, name=name, language=language)
    body = OCLC_ANSWER.format(record) if wrapped else record
    return ('<?xml version="1.0" encoding="UTF-8"?>\n' + body).encode()


# -- and what can be wrong with a batch: each spoils one made by make_batch(…, issues=3, pages=2)


def mets_of(batch: Path, issue: int = 1) -> Path:
    """The METS file of an issue of a batch, the second one unless told."""
    folders = sorted(path for path in batch.glob("data/*/print/*") if path.is_dir())
    return folders[issue] / f"{folders[issue].name}.xml"


def page_file(batch: Path, name: str, issue: int = 1) -> Path:
    """A file of a page, such as 0002.jp2, of an issue."""
    return mets_of(batch, issue).with_name(name)


def change(path: Path, before: str, after: str) -> None:
    """Changes the one place in a text file that must be there."""
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def spoil_mets(batch: Path) -> None:
    cut_off(mets_of(batch))


def spoil_mets_missing(batch: Path) -> None:
    mets_of(batch).unlink()


def spoil_batch_xml_missing(batch: Path) -> None:
    (batch / "data/batch.xml").unlink()


def spoil_batch_xml(batch: Path) -> None:
    cut_off(batch / "data/batch.xml")


def spoil_ocr(batch: Path) -> None:
    page_file(batch, "0002.xml").write_text("<alto>\n")


def spoil_ocr_missing(batch: Path) -> None:
    page_file(batch, "0002.xml").unlink()


def spoil_ocr_word(batch: Path) -> None:
    change(page_file(batch, "0002.xml"), ' CONTENT="The"', "")


def spoil_ocr_two_pages(batch: Path) -> None:
    change(page_file(batch, "0002.xml"), "</Page>", '</Page><Page WIDTH="1" HEIGHT="1"/>')


def spoil_jp2_missing(batch: Path) -> None:
    page_file(batch, "0002.jp2").unlink()


def spoil_dimensions(batch: Path) -> None:
    """Harmless by itself: ONI opens the jp2."""
    change(mets_of(batch), ' ADMID="service2Technical"', "")


def spoil_jp2_missing_unmeasured(batch: Path) -> None:
    spoil_dimensions(batch)
    page_file(batch, "0002.jp2").unlink()


def spoil_jp2_unmeasured(batch: Path) -> None:
    spoil_dimensions(batch)
    page_file(batch, "0002.jp2").write_bytes(b"no picture")


def spoil_width(batch: Path) -> None:
    """Of both pages, so that it does not matter in which order they come."""
    mets = mets_of(batch)
    mets.write_text(mets.read_text().replace("<mix:ImageWidth>5200</mix:ImageWidth>", ""))


def spoil_width_word(batch: Path) -> None:
    mets = mets_of(batch)
    mets.write_text(mets.read_text().replace("5200", "wide"))


def spoil_edition(batch: Path) -> None:
    change(
        mets_of(batch),
        "<mods:number>1</mods:number></mods:detail>\n</mods:part>\n",
        "<mods:number></mods:number></mods:detail>\n</mods:part>\n",
    )


def spoil_date(batch: Path) -> None:
    change(mets_of(batch), ">1900-01-02<", "><")


def spoil_date_word(batch: Path) -> None:
    change(mets_of(batch), ">1900-01-02<", ">January 1900<")


def spoil_sequence(batch: Path) -> None:
    change(mets_of(batch), "<mods:start>2</mods:start>", "<mods:start></mods:start>")


def spoil_lccn(batch: Path) -> None:
    change(mets_of(batch), ">sn99990001<", ">sn00000000<")


def spoil_lccn_to_fetch(batch: Path) -> None:
    change(mets_of(batch), ">sn99990001<", ">sn99990077<")


def spoil_issues(batch: Path) -> None:
    path = batch / "data/batch.xml"
    path.write_text(re.sub("<issue .*</issue>\n", "", path.read_text()))


def spoil_edition_order(batch: Path) -> None:
    """Harmless: ONI never reads it."""
    path = batch / "data/batch.xml"
    path.write_text(path.read_text().replace('editionOrder="01"', 'editionOrder=""', 1))


def spoil_reel_number(batch: Path) -> None:
    change(batch / "data/batch.xml", ' reelNumber="print"', "")


def spoil_file_id(batch: Path) -> None:
    change(mets_of(batch), 'FILEID="ocr2"', 'FILEID="nowhere"')


def spoil_page_description(batch: Path) -> None:
    change(mets_of(batch), 'DMDID="pageModsBib2"', 'DMDID="nowhere"')


def spoil_ocr_unnamed(batch: Path) -> None:
    change(mets_of(batch), '<fptr FILEID="ocr2"/>', "")


def spoil_nothing(batch: Path) -> None:
    """For a batch whose name alone is wrong."""


class Fault(NamedTuple):
    """What becomes of a load of 3 issues of 2 pages, one thing of which is wrong."""

    spoil: Callable[[Path], None]
    status: int  # of load_batch
    held: tuple[int, int, int]  # rows, issues and pages afterwards, as Site.held gives them
    said: str  # a pattern of the first [ERROR] line
    indexed: int = 0  # how many of the pages are in the index

    @property
    def silent(self) -> bool:
        """Whether ONI calls it a success, though something is missing."""
        return self.status == 0 and self.held != (1, 3, 6)


NOTHING = (0, 0, 0)
ABORT = "unable to load batch: "
FAULTS = {
    "METS cut off": Fault(spoil_mets, 1, NOTHING, ABORT + ".*, line "),
    "METS missing": Fault(spoil_mets_missing, 1, NOTHING, ABORT + "Error reading file .*"),
    "batch.xml missing": Fault(
        spoil_batch_xml_missing,
        1,
        NOTHING,
        ABORT + r"could not find batch_1.xml \(or any of its aliases\) in '.*/data/' ",
    ),
    "batch.xml cut off": Fault(spoil_batch_xml, 1, NOTHING, ABORT + ".*, line "),
    "OCR not well-formed": Fault(
        spoil_ocr, 1, NOTHING, ABORT + r"file://.*/0002.xml:2:0: no element found"
    ),
    "OCR missing": Fault(
        spoil_ocr_missing, 1, NOTHING, ABORT + r"<urlopen error \[Errno 2\] No such file .*"
    ),
    "OCR word without text": Fault(spoil_ocr_word, 1, NOTHING, ABORT + "expected string or "),
    "OCR with two pages": Fault(spoil_ocr_two_pages, 1, NOTHING, ABORT.rstrip()),
    "OCR not named": Fault(spoil_ocr_unnamed, 0, (1, 3, 6), "", 5),
    "jp2 missing": Fault(spoil_jp2_missing, 0, (1, 3, 6), "", 6),
    "jp2 missing, no dimensions": Fault(
        spoil_jp2_missing_unmeasured,
        1,
        NOTHING,
        ABORT + r"\[Errno 2\] No such file or directory: '.*/0002.jp2'",
    ),
    "jp2 is no picture, no dimensions": Fault(
        spoil_jp2_unmeasured, 1, NOTHING, ABORT + "cannot identify image file '.*/0002.jp2'"
    ),
    "no dimensions": Fault(spoil_dimensions, 0, (1, 3, 6), "", 6),
    "dimensions named, but empty": Fault(
        spoil_width, 0, (1, 3, 6), "No jp2 width for issue: The test gazette.", 4
    ),
    "width is no number": Fault(spoil_width_word, 0, (1, 3, 5), ".*'wide'", 5),
    "edition empty": Fault(
        spoil_edition, 0, (1, 2, 4), r"invalid literal for int\(\) with base 10: ''", 4
    ),
    "date empty": Fault(
        spoil_date, 0, (1, 2, 4), "time data '' does not match format '%Y-%m-%d'", 4
    ),
    "date is no date": Fault(
        spoil_date_word, 0, (1, 2, 4), "time data 'January 1900' does not match format", 4
    ),
    "page without sequence": Fault(
        spoil_sequence, 0, (1, 3, 5), "could not determine sequence number for page from ''", 5
    ),
    "LCCN unknown": Fault(spoil_lccn, 1, NOTHING, ABORT + "HTTP Error 404: Not Found"),
    "LCCN only the MARC site knows": Fault(spoil_lccn_to_fetch, 0, (1, 3, 6), "", 6),
    "awardee unknown": Fault(spoil_nothing, 1, NOTHING, "no awardee for org code: zzz"),
    "no issues": Fault(spoil_issues, 0, (1, 0, 0), ""),
    "editionOrder empty": Fault(spoil_edition_order, 0, (1, 3, 6), "", 6),
    "reel without number": Fault(spoil_reel_number, 1, NOTHING, ABORT + "'reelNumber'"),
    "file not in the METS": Fault(spoil_file_id, 1, NOTHING, ABORT + "list index out of range"),
    "page not described": Fault(
        spoil_page_description, 1, NOTHING, ABORT + "list index out of range"
    ),
}


def batch_with(fault: str) -> str:
    """A name for a batch with this fault: of an awardee that ONI knows, but for one fault."""
    words = re.sub("[^a-z0-9]", "", fault.lower())
    return f"batch_{'zzz' if fault == 'awardee unknown' else 'oru'}_{words}_ver01"


# --- Fixtures -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """The stand-in Open ONI that each test gets a copy of."""
    root = tmp_path_factory.mktemp("template") / "oni"
    build_oni(root)
    return root


@pytest.fixture
def site(tmp_path, template):
    """A site whose agent is not started yet."""
    with Site(tmp_path, template) as site:
        yield site


@pytest.fixture
def agent(site) -> Site:
    """A site whose agent runs."""
    return site.start()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, template):
    """A site whose agent runs for all tests that only ask it something."""
    with Site(tmp_path_factory.mktemp("shared"), template) as site:
        yield site.start()


def in_process(test):
    """Marks a test that needs no agent beside it: `pytest -k in_process` runs all in seconds."""
    test.in_process = True  # pytest's -k knows a test by the names of its attributes, too
    return test


@pytest.fixture(autouse=True)
def deadline():
    """A test that hangs fails instead."""

    def late(*_):
        raise TimeoutError("the test took much longer than tests do")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(int(busy(180)))
    yield
    signal.alarm(0)


# --- Words that many tests use --------------------------------------------------------------------

ALPHA, BETA = "batch_oru_alpha_ver01", "batch_oru_beta_ver01"
NOOP = {
    "status": "success",
    "message": "No-op: job is redundant or already completed",
    "job": {"id": -1},
}
ALREADY_QUEUED = "Job already in queue"
FRESH = iter(range(1000, 10_000))  # numbers for names, on a site that tests share
TRAILER = b"\n\nEND\n"
GAZETTE = "sn99990001"


def until(condition, seconds: float = 60):
    """What a condition gives once it gives something; for what happens without a word."""
    end = time.monotonic() + busy(seconds)
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found


def without_session(reply: dict) -> dict:
    """An answer less the number of its session, which must be there."""
    assert reply.pop("session")["id"] > 0
    return reply


STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z"


def run_agent(*options: str, python: str = "", **environment: str) -> tuple[int, str, str]:
    """An agent that should end by itself: its exit status, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *([python] if python else []), str(AGENT), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def failed_start(site: Site, expected: int = oni_agent.EXIT_LATER) -> str:
    """The sentence with which an agent ends that cannot start."""
    status, _, said = run_agent(**site.environment)
    assert status == expected
    assert said.startswith("oni_agent: ")
    assert said.count("\n") == 1
    return said


def ssh_run(site: Site, command: str, *options: str) -> subprocess.CompletedProcess:
    """OpenSSH's client, run to its end."""
    return subprocess.run(
        [*site.ssh_words(*options), command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=90,
    )


def ssh_begin(site: Site, command: str, *options: str) -> subprocess.Popen:
    """OpenSSH's client, at work, and not deaf to SIGINT where the tests run in the background."""
    return subprocess.Popen(
        [*site.ssh_words(*options), command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def at_once(*calls) -> list:
    """What each of the calls returns, all made at the same time."""
    results = {}
    threads = [
        threading.Thread(target=lambda number, call: results.update({number: call()}), args=each)
        for each in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[number] for number in range(len(calls))]


def repaired(site: Site, *words: str) -> list[str]:
    """Makes the same request again, whose job then succeeds; the log of that job."""
    job = site.run(*words)
    assert (job["status"], job.get("error")) == ("successful", None)
    return site.logs(job["id"])


def kill_at(site: Site, gate: Gate, command: str, how: int = signal.SIGKILL) -> None:
    """Kills the manage.py that stands at a gate."""
    gate.reached()
    [pid] = site.manage_pids(command)
    os.kill(pid, how)
    gate.open()


def gate_in_manage(site: Site, command: str, at_exit: bool = False) -> Gate:
    """Makes one command of manage.py wait, before it does anything or when it has done all."""
    wait = "open('gate-in-manage').read"
    site.prepend_to_manage(
        f"import atexit, sys\nif {command!r} in sys.argv: "
        + (f"atexit.register(lambda: {wait}())" if at_exit else f"{wait}()")
    )
    (site.oni / "gate-in-manage").touch()  # what the gate leaves for the next manage.py
    return site.hold(site.oni / "gate-in-manage")


def settings_local(site: Site, text: str) -> Path:
    """Gives this site's Open ONI settings of its own."""
    path = site.oni / "onisite/settings_local.py"
    path.write_text(text)
    return path


def kill_warm_child(site: Site) -> None:
    """Kills the manage.py that forks, and all of its forks, which answer the agent's questions."""
    pids = site.manage_pids("shell")
    assert pids
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # a fork that has answered may just end
            os.kill(pid, signal.SIGKILL)
    until(lambda: not set(pids).intersection(site.manage_pids("shell")))


def hurry(site: Site, **limits: float) -> Site:
    """Starts an agent with limits that a test can wait for, or reach, in place of its own."""
    assert all(hasattr(oni_agent, name) for name in limits)
    return site.start(limits)


def resources(site: Site) -> tuple[int, int]:
    """How many threads and descriptors the agent has."""
    site.wait_for("Open ONI in .* word coordinates")  # its look at Open ONI is over
    return resources_now(site)


def resources_now(site: Site) -> tuple[int, int]:
    """The same, while the agent may still be looking at Open ONI."""
    process = Path("/proc", str(site.agent.pid))
    return len(os.listdir(process / "task")), len(os.listdir(process / "fd"))


def has_no_more_than(site: Site, before: tuple[int, int]) -> bool:
    """Whether the agent is back at as many threads and descriptors, soon."""

    def is_back() -> bool:
        return all(now <= then for now, then in zip(resources(site), before))

    return until(is_back)


def memory(site: Site, what: str = "VmRSS") -> float:
    """MB that the agent has in memory now, or (VmHWM) has had at most."""
    status = Path(f"/proc/{site.agent.pid}/status").read_text()
    return int(re.search(rf"{what}:\s*(\d+) kB", status)[1]) / 1000


def tree(folder: Path, *less: str) -> dict[str, tuple[int, bytes]]:
    """Mode and content of all that lies in a folder, except where a path begins with `less`.

    Nor does it hold what Python and SQLite leave behind in reading.
    """
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if not name.startswith(less) and not re.search(r"__pycache__|/ENV/|-(wal|shm)$", name):
            found[name] = path.lstat().st_mode, path.read_bytes() if path.is_file() else b""
    return found


def files_of(batch: Path) -> dict[str, bytes]:
    """What is in a batch's folder."""
    return {
        str(path.relative_to(batch)): path.read_bytes()
        for path in batch.rglob("*")
        if path.is_file()
    }


def failing_load(site: Site, name: str = "batch_oru_broken_ver01") -> Path:
    """A batch in whose files there is no fault, and that ONI fails to load.

    It does until the file is gone whose path this gives.
    """
    site.prepend_to_manage(
        "import os, sys\nif 'load_batch' in sys.argv and os.path.exists(sys.argv[-1] + '/fails'):\n"
        "    sys.exit('[INFO] loading batch\\n[ERROR] unable to load batch: it is too late')"
    )
    fails = site.batch(name) / "fails"
    fails.touch()
    return fails


def titles(site: Site, lccn: str = "sn99990009") -> list[str]:
    """The names under which Open ONI holds a title."""
    return [name for name, in site.query("SELECT name FROM core_title WHERE lccn = ?", lccn)]


def awardees(site: Site, code: str) -> list[str]:
    """The names under which Open ONI holds an awardee."""
    # The + keeps SQLite from the index, whose order is that of the stand-in's own collation.
    return [name for name, in site.query("SELECT name FROM core_awardee WHERE +org_code = ?", code)]


# --- Words that several chapters use: what is found, broken, witnessed ----------------------------

IN_ISSUE = "data/sn99990001/print/1900010201/"

METS_2 = IN_ISSUE + "1900010201.xml"

OCR_2 = IN_ISSUE + "0002.xml"

ENDS_LOAD = "ONI would break off the load: "

ENDS_ISSUE = "ONI would leave this issue out: "

AT_PAGE_2 = f"page 2: {ENDS_LOAD}"

NO_SIZE = r"page {0}: ONI would leave it out: No jp2 width for issue: .* Image {0}"

FOUND_FAULTS = {  # what the agent finds in a batch's files, before it lets ONI load them
    "METS cut off": [(METS_2, ENDS_LOAD + r"Couldn't find end of Start Tag te line \d+, .*")],
    "OCR not well-formed": [(OCR_2, ENDS_LOAD + "line 2, column 0: no element found")],
    "OCR missing": [(OCR_2, ENDS_LOAD + r"<urlopen error \[Errno 2\] No such file .*>")],
    "OCR word without text": [(OCR_2, ENDS_LOAD + "expected string or bytes-like object.*")],
    "OCR with two pages": [(OCR_2, ENDS_LOAD + "AssertionError")],
    "OCR not named": [(METS_2, "ONI would leave out the OCR file ocr2")],
    "jp2 missing, no dimensions": [
        (METS_2, AT_PAGE_2 + rf"\[Errno 2\] No such file or directory: '{IN_ISSUE}0002.jp2'")
    ],
    "jp2 is no picture, no dimensions": [
        (METS_2, AT_PAGE_2 + f"cannot identify image file '{IN_ISSUE}0002.jp2'")
    ],
    "LCCN unknown": [
        (
            METS_2,
            ENDS_LOAD + "ONI does not have the title sn00000000, nor has"
            " http://.*/lccn/sn00000000/marc.xml: HTTP Error 404: Not Found",
        )
    ],
    "reel without number": [("data/batch.xml", ENDS_LOAD + "'reelNumber'")],
    "file not in the METS": [(METS_2, AT_PAGE_2 + "list index out of range")],
    "page not described": [(METS_2, AT_PAGE_2 + "list index out of range")],
    "dimensions named, but empty": [(METS_2, NO_SIZE.format(page)) for page in (1, 2)],
    "width is no number": [
        (METS_2, "ONI would leave out the rest of the issue, from page 1 on: .* 'wide'.*")
    ],
    "edition empty": [(METS_2, ENDS_ISSUE + r"invalid literal for int\(\) with base 10: ''")],
    "date empty": [(METS_2, ENDS_ISSUE + "time data '' does not match format '%Y-%m-%d'")],
    "date is no date": [(METS_2, ENDS_ISSUE + "time data 'January 1900' does not match .*")],
    "page without sequence": [
        (METS_2, "page 2: ONI would leave it out: could not determine sequence number .* from ''")
    ],
}


@pytest.fixture(scope="module")
def patcher(shared) -> Site:
    """The shared site, with ALPHA loaded: an issue each of 1900-01-01, -02, -03 and one more."""
    batch = shared.batch(ALPHA, issues=3)
    reel = batch / "data" / GAZETTE / "print"
    shutil.copytree(
        reel / "1900010101", reel / "19000101011"
    )  # the first issue's name is the beginning of its own
    (reel / "19000101011/1900010101.xml").write_text(mets_xml(2, edition=11))
    for number, suffix in enumerate(("TIF", "tiff", "TIFF"), 1):
        (reel / f"1900010301/{number:04}.{suffix}").write_bytes(PAGE_FILES["tif"])
    (reel / "1900010301/page_1.xml").write_text("no METS file's twin, and so it stays")
    text = (batch / "data/batch.xml").read_text()
    text = text.replace(
        'awardYear="2020">',
        'awardYear="2020" xmlns:x="urn:x"\n x:by=\'&#233;&lt;é\'>\n'
        '<!-- <issue>no issue</issue> -->',
    )
    text = text.replace(
        "</batch>",
        NDNP_ISSUE.format(lccn=GAZETTE, day="1900-01-01", folder="19000101011")
        .replace('"01"', '"011"')
        .replace("19000101011.xml", "1900010101.xml")
        + "<?x y?>\n</batch>",
    )
    (batch / "data/batch.xml").write_bytes(text.replace("\n", "\r\n").encode())
    shared.run("load-batch", ALPHA)
    return shared


HELD = f"RemoveIssue {GAZETTE}/1900010101\n"

NO_SHEBANG = "print('not to be run')\n"


def no_shebang(manage: Path) -> None:
    rewrite(manage, NO_SHEBANG)


def removed(manage: Path) -> None:
    manage.unlink()


WITNESS = r'''
import contextlib, fcntl, os, sys
def hold(name):
    """Waits at a gate of the test's, if there is one."""
    with contextlib.suppress(FileNotFoundError), open(os.path.join(here, "hold-" + name)) as gate:
        gate.read()
here = os.getcwd()
command = "".join(sys.argv[1:2])
if command == "check":
    sys.exit()  # saves the tests its half second at every start
if command in ("load_batch", "purge_batch", "load_titles"):
    at_work = open("at-work", "a")
    try:
        fcntl.flock(at_work, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        open("two-at-once", "a").write(f"{sys.argv}\n")
if command == "shell":  # what is asked of Open ONI is asked of its database
    import django.db.backends.signals
    def at_question(execute, sql, *more):
        if sql.startswith("SELECT"):
            hold("question")
        return execute(sql, *more)
    def connected(connection, **_):
        connection.execute_wrappers.append(at_question)
    django.db.backends.signals.connection_created.connect(connected, weak=False)
hold(command)
'''


@pytest.fixture
def witnessed(site) -> Site:
    """A site whose manage.py tells when two are at work at once.

    It can be held at its start and at a question.
    """
    site.prepend_to_manage(WITNESS)
    yield site
    assert not (site.oni / "two-at-once").exists(), (site.oni / "two-at-once").read_text()


def half_load(site: Site, batch: Path) -> None:
    """What a load leaves that is killed in its first issue."""
    (site.oni / "data/batches" / batch.name).symlink_to(batch)
    with contextlib.closing(
        sqlite3.connect(site.oni / "oni.sqlite3", timeout=60)
    ) as database, database:
        database.execute(
            "INSERT INTO core_batch (name, created, validated_batch_file, awardee_id)"
            " VALUES (?, '2026-01-01 00:00:00', '', 'oru')",
            [batch.name],
        )
        database.execute(
            "INSERT INTO core_issue"
            " (batch_id, title_id, date_issued, number, edition, edition_label, created)"
            " VALUES (?, 'sn99990001', '1900-01-01', '', 1, '', '2026-01-01 00:00:00')",
            [batch.name],
        )
        database.execute(
            "INSERT INTO core_loadbatchevent (batch_name, created, message)"
            " VALUES (?, '2026-01-01 00:00:00', 'starting load')",
            [batch.name],
        )


def has_begun(site: Site, batch: str) -> bool:
    """Whether a load of this batch is at work, as the agent has it on disk."""
    with contextlib.closing(sqlite3.connect(site.state / "jobs.db", timeout=60)) as database:
        words = json.dumps(["load-batch", batch])
        begun = "SELECT count(*) FROM jobs WHERE words = ? AND status = 'started'"
        return database.execute(begun, [words]).fetchone()[0] > 0


def load_until(
    moment: str, site: Site, batch: Path, draw: random.Random
) -> tuple[int, Gate | None]:
    """Has a batch loaded and follows that to a moment: the job's id, and the gate that holds it."""
    question = site.oni / "hold-question"
    if moment == "before the spawn":
        gate = site.hold(question)
        with Client(site.port) as client:
            channel = client.channel(f"load-batch {batch.name}")
            gate.reached()
            while not has_begun(site, batch.name):  # the acceptance's questions come first
                question.unlink()
                asked, gate = gate, site.hold(question)
                os.close(asked._writer)
                gate.reached()
            return json.loads(channel.makefile("rb").read())["job"]["id"], gate
    if moment == "before the record":
        last_page = site.hold_load(batch, issue=1, page=3)
        id = site.job("load-batch", batch.name)
        last_page.reached()
        gate = site.hold(question)
        last_page.open()
        return id, gate.reached()
    if moment == "just after the spawn":
        gate = site.hold(site.oni / "hold-load_batch")
    elif moment == "in mid-output":
        gate = site.hold_load(batch, issue=draw.randrange(2), page=draw.randint(1, 3))
    elif moment == "in a repair's purge":
        half_load(site, batch)
        gate = site.hold(batch / "purge-gate")
    else:
        id = site.job("load-batch", batch.name)
        time.sleep(draw.uniform(0, 0.6))
        return id, None
    return site.job("load-batch", batch.name), gate.reached()


def printed(site: Site, since: set[Path] = frozenset()) -> list[str]:
    """The lines of Open ONI's own log files, but for those files in `since`, as stderr has them."""
    files = {
        path
        for command in ("load", "purge")
        for path in (site.oni / "log").glob(f"{command}_batch_*.log")
    }
    return [
        re.sub(r"^\[[^]]* (\w+) [\w.]+\] ", r"[\1] ", line)
        for path in sorted(files - since, key=lambda path: path.stat().st_mtime_ns)
        for line in path.read_text().splitlines()
    ]


def on_stderr(site: Site, id: int) -> list[str]:
    """The lines of manage.py's stderr in a job's log; their stamps must increase."""
    stderr = site.call("job-logs", str(id))["job"]["stderr"]
    stamps = [line[:32] for line in stderr]
    assert stamps == sorted(set(stamps))
    assert all(re.fullmatch(rf"\[{STAMP}\]", stamp) for stamp in stamps)
    return [line[33:] for line in stderr]


class SmallDisk:
    """The state folder on a file system of its own, which can be full.

    That is a tmpfs or, where nobody may mount one, a limit on the size of the agent's files.
    """

    def __init__(self, site: Site):
        self.site = site
        self.filler = site.state / "filler"
        site.state.mkdir()
        words = f"mount -t tmpfs -o size=4m tmpfs {shlex.quote(str(site.state))}"
        self.mounted = (
            subprocess.run(["sh", "-c", words], stderr=subprocess.DEVNULL).returncode == 0
        )

    def fill(self) -> None:
        """Leaves no byte."""
        if not self.mounted:
            return resource.prlimit(
                self.site.agent.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)
            )
        with open(self.filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    def free(self) -> None:
        """Takes that back."""
        if self.mounted:
            self.filler.unlink()
        else:
            resource.prlimit(
                self.site.agent.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2
            )

    def unmount(self) -> None:
        """Leaves the machine as it was."""
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.site.state)], check=True)


def file(name: str, text: str):
    """A fault that is the text of one file, in place of whatever was there."""

    @contextlib.contextmanager
    def fault(site):
        path = site.oni.parent / name
        path.parent.mkdir(exist_ok=True)
        if path.is_dir():
            path.rename(f"{path}.away")
        path.write_text(text)
        yield

    return fault


@pytest.fixture
def disk(witnessed):
    """A small disk under the site's state folder."""
    disk = SmallDisk(witnessed)
    yield disk
    witnessed.clean_up()
    disk.unmount()


def past_jobs(site: Site, *rows: tuple) -> None:
    """Writes jobs into the store of an agent that rests.

    Each is its words, its status, and the days since it was queued and ended.
    """
    site.start().kill()
    now = time.time_ns()
    day = 86400 * 10**9
    with contextlib.closing(sqlite3.connect(site.state / "jobs.db")) as database, database:
        database.executemany(
            "INSERT INTO jobs (words, queued, status, started, ended, error, attempts) VALUES (?,"
            " ?, ?, ?, ?, '', 1)",
            [
                (
                    json.dumps(words),
                    now - queued * day,
                    status,
                    now - queued * day,
                    None if ended is None else now - ended * day,
                )
                for words, status, queued, ended in rows
            ],
        )
        (site.state / "logs").mkdir(exist_ok=True)
        for (id,) in database.execute("SELECT id FROM jobs WHERE ended IS NOT NULL").fetchall():
            (site.state / "logs" / f"{id}.log").write_bytes(
                b"[2026-01-01T00:00:00.000000000Z] E a line\n"
            )


def program(path: Path, text: str) -> str:
    """A script that can be executed."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def check(site: Site, **environment: str) -> tuple:
    """The lines of --check that are marked good and bad."""
    done = subprocess.run(
        [sys.executable, str(AGENT), "--check"],
        env={**site.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=90,
    )
    lines = done.stdout.decode().splitlines()
    good, bad = ([line[2:] for line in lines if line[0] == mark] for mark in "✓✗")
    assert (
        len(good) + len(bad) == len(lines)
        and done.stderr == b""
        and done.returncode == int(bool(bad))
    ), done
    return good, bad


def needed(site: Site) -> list[Path]:
    """The folders that an agent, and its manage.py, read."""
    packages = [Path(each) for each in sys.path if each.endswith("-packages")]
    python = [Path(sys.base_prefix), Path(sys.prefix)]
    return [site.oni.parent, AGENT.parent, *python, *packages]


def public(key: Path) -> str:
    """A key's line for an authorized_keys file."""
    return key.with_name(key.name + ".pub").read_text()


def key_made_by_ssh_keygen(path: Path, *options: str) -> Path:
    """A private key file in the old PEM form, where its kind has one."""
    subprocess.run(
        ["ssh-keygen", "-q", "-m", "PEM", "-N", "", "-f", str(path), *options], check=True
    )
    return path


def silent(port: int, said: bytes = b"") -> socket.socket:
    """A connection on which no more than this has been said."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(said)
    return connection


class Recorder(socket.socket):
    """A client's socket that keeps what was sent."""

    sent = b""

    def send(self, data: bytes, flags: int = 0) -> int:
        count = super().send(data, flags)
        self.sent += data[:count]
        return count


def recorded_bytes(port: int) -> bytes:
    """What a client sends to ask for the version."""
    connection = Recorder()
    connection.connect(("127.0.0.1", port))
    transport = paramiko.Transport(connection)
    transport.start_client(timeout=30)
    transport.auth_none("nobody")
    channel = transport.open_session(timeout=30)
    channel.exec_command("version")
    assert channel.makefile("rb").read()
    transport.close()
    return connection.sent


# --- Odd batches of all kinds ---------------------------------------------------------------------


class Draft:
    """A batch that is being made odd, and what ONI holds of it if it loads it whole."""

    def __init__(self, source: Path, name: str, random: random.Random, start: date):
        self.issues = random.randint(1, 3)
        self.pages = random.randint(1, 3)
        self.path = make_batch(source, name, self.issues, self.pages, start=start)
        self.issue = random.randrange(self.issues)  # the ones that are made odd
        self.page = random.randint(1, self.pages)
        self.listed = list(range(self.issues))  # the issues that the batch file names
        self.without_ocr: set[tuple[int, int]] = set()
        self.without_pages: set[int] = set()
        self.oddities: list[str] = []

    @property
    def batch_xml(self) -> Path:
        names = [self.path / "data" / name for name in oni_agent.BATCH_FILES]
        return next(path for path in names if path.exists())

    @property
    def mets(self) -> Path:
        return mets_of(self.path, self.issue)

    def file(self, suffix: str) -> Path:
        return page_file(self.path, f"{self.page:04}.{suffix}", self.issue)

    @property
    def whole(self) -> list[int]:
        """Issues, pages and indexed pages."""
        full = [issue for issue in self.listed if issue not in self.without_pages]
        without_ocr = sum(full.count(issue) for issue, _ in self.without_ocr)
        return [len(self.listed), len(full) * self.pages, len(full) * self.pages - without_ocr]

    def make_odd(self, oddity: str) -> None:
        """Unless another oddity has taken away what this one changes."""
        with contextlib.suppress(AssertionError, IndexError, OSError, ValueError):
            ODDITIES[oddity](self)
            self.oddities.append(oddity)


Oddity = Callable[[Draft], None]


def replace(path: Path, before: str, after: str) -> None:
    """Changes the first place in a text file that must be there."""
    text = path.read_text()
    assert before in text, (path, before)
    path.write_text(text.replace(before, after, 1))


def without_ocr(draft: Draft) -> None:
    replace(draft.mets, f'<fptr FILEID="ocr{draft.page}"/>', "")
    text = draft.mets.read_text()
    draft.mets.write_text(re.sub(rf'<file ID="ocr{draft.page}" .*</file>', "", text))
    draft.without_ocr.add((draft.issue, draft.page))


def of_fault(name: str) -> Oddity:
    return lambda draft: FAULTS[name].spoil(draft.path)


ODDITIES: dict[str, Oddity] = {
    name: of_fault(name) for name in FAULTS if "date" not in name and name != "awardee unknown"
}


def in_mets(before: str, after: str) -> Oddity:
    """P$ stands for the page's number in both."""

    def change(draft: Draft) -> None:
        texts = [text.replace("P$", str(draft.page)) for text in (before, after)]
        replace(draft.mets, *texts)

    return change


def both(*oddities: Oddity) -> Oddity:
    def change(draft: Draft) -> None:
        for oddity in oddities:
            oddity(draft)

    return change


def without(suffix: str) -> Oddity:
    return lambda draft: draft.file(suffix).unlink()


def named(suffix: str, name: str, href: str) -> Oddity:
    """A page's file under another name, and how the METS refers to it."""

    def change(draft: Draft) -> None:
        replace(draft.mets, f'href="{draft.page:04}.{suffix}"', f'href="{href}"')
        draft.file(suffix).rename(draft.mets.with_name(name))

    return change


def mets_named(name: str, href: str) -> Oddity:
    """A METS file under another name, and how the batch file refers to it."""

    def change(draft: Draft) -> None:
        mets = draft.mets
        replace(draft.batch_xml, f"/{mets.name}<", f"/{href}<")
        mets.rename(mets.with_name(name))

    return change


def prefixed(which: str, prefix: str) -> Oddity:
    """All elements that had no prefix have one."""

    def change(draft: Draft) -> None:
        path = {"mets": draft.mets, "batch": draft.batch_xml, "ocr": draft.file("xml")}[which]
        text = re.sub(r"<(/?)(\w+)(?=[\s/>])", rf"<\1{prefix}:\2", path.read_text())
        path.write_text(text.replace("xmlns=", f"xmlns:{prefix}=", 1))

    return change


def listed_twice(draft: Draft) -> None:
    [issue] = re.findall(rf".*{draft.mets.name}</issue>", draft.batch_xml.read_text())
    replace(draft.batch_xml, issue, f"{issue}\n{issue}")
    draft.listed.append(draft.issue)


def around_issue(wrap: str) -> Oddity:
    """ONI overlooks an issue, since something is around it."""

    def change(draft: Draft) -> None:
        [issue] = re.findall(rf".*{draft.mets.name}</issue>", draft.batch_xml.read_text())
        replace(draft.batch_xml, issue, wrap.format(issue))

    return change


def in_a_comment(draft: Draft) -> None:
    """An issue is listed no more; that is a fault only where it is the only one."""
    around_issue("<!-- {} -->")(draft)
    draft.listed = [each for each in draft.listed if each != draft.issue] or draft.listed


def validated(change_of: Callable[[str], str], name: str = "batch_1.xml") -> Oddity:
    """Another file that names the issues, beside batch.xml, and before it."""

    def change(draft: Draft) -> None:
        text = (draft.path / "data/batch.xml").read_text()
        (draft.path / "data" / name).write_text(change_of(text))

    return change


def without_pages(draft: Draft) -> None:
    text = re.sub("<div TYPE=.np:page.*</div>", "", draft.mets.read_text())
    draft.mets.write_text(text)
    draft.without_pages.add(draft.issue)


def a_link(suffix: str, dangling: bool) -> Oddity:
    def change(draft: Draft) -> None:
        path = draft.file(suffix)
        elsewhere = path.with_name(f"elsewhere-{path.name}")
        path.rename(elsewhere)
        path.symlink_to("nowhere" if dangling else elsewhere.name)

    return change


def a_folder(suffix: str) -> Oddity:
    def change(draft: Draft) -> None:
        draft.file(suffix).unlink()
        draft.file(suffix).mkdir()

    return change


WIDTH = "<mix:ImageWidth>5200<"

EDITION = "<mods:number>1</mods:number></mods:detail>\n</mods:part>"


def dated(text: str) -> Oddity:
    def change(draft: Draft) -> None:
        day = re.search(">([0-9-]+)</mods:dateIssued>", draft.mets.read_text())
        assert day
        replace(draft.mets, day[0], day[0].replace(day[1], text.replace("DAY", day[1])))

    return change


def width(text: str) -> Oddity:
    return in_mets(WIDTH, WIDTH.replace("5200", text))


def lccn(text: str) -> Oddity:
    return in_mets(">sn99990001<", f">{text}<")


ENTITY = '[<!ENTITY e "1">]'


def in_batch_xml(before: str, after: str) -> Oddity:
    return lambda draft: replace(draft.batch_xml, before, after)


def in_alto(before: str, after: str) -> Oddity:
    return lambda draft: replace(draft.file("xml"), before, after)


def with_content(suffix: str, content: bytes) -> Oddity:
    return lambda draft: draft.file(suffix).write_bytes(content)


def encoded(which: str, name: str, codec: str, text: str) -> Oddity:
    """A file in another encoding, with a text in it that not every encoding writes alike."""

    def change(draft: Draft) -> None:
        path = {"mets": draft.mets, "batch": draft.batch_xml, "ocr": draft.file("xml")}[which]
        content = path.read_text().replace('"UTF-8"', f'"{name}"')
        content = content.replace("?>", f"?><!-- {text} -->", 1).replace('"The"', f'"{text}"')
        path.write_bytes(content.encode(codec))

    return change


def absolute(scheme: str) -> Oddity:
    def change(draft: Draft) -> None:
        name = f"{draft.page:04}.xml"
        replace(draft.mets, f'href="{name}"', f'href="{scheme}{draft.mets.with_name(name)}"')

    return change


NO_DIMENSIONS = in_mets(' ADMID="serviceP$Technical"', "")


def edition(text: str) -> Oddity:
    return in_mets(EDITION, EDITION.replace("1", text))


def sequence(text: str) -> Oddity:
    return in_mets("<mods:start>P$<", f"<mods:start>{text}<")


def picture(content: bytes) -> Oddity:
    return both(NO_DIMENSIONS, with_content("jp2", content))


def doctype(root: str, inside: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE {root} {inside}>'


HEAD = '<?xml version="1.0" encoding="UTF-8"?>'

ODDITIES.update(
    {
        # the file that names the issues
        "comment between issues": in_batch_xml("<issue ", "<!-- <issue>x</issue> --><issue "),
        "comment behind an issue's path": in_batch_xml(".xml</issue>", ".xml<!-- 1 --></issue>"),
        "element behind an issue's path": in_batch_xml(".xml</issue>", ".xml<x/></issue>"),
        "CDATA": in_batch_xml('"01">./sn99990001', '"01"><![CDATA[./sn99990001]]>'),
        "newlines round an issue's path": both(
            in_batch_xml('"01">.', '"01">\n\t ./.'), in_batch_xml(".xml</issue>", ".xml\n</issue>")
        ),
        "blank behind an issue's path": in_batch_xml(".xml</issue>", ".xml </issue>"),
        "an issue without a path": in_batch_xml("</batch>", "<issue/></batch>"),
        "an issue twice": listed_twice,
        "an issue in an element of another namespace": around_issue(
            '<x:w xmlns:x="urn:x">{}</x:w>'
        ),
        "an issue in an element": around_issue("<more>{}</more>"),
        "an issue in a comment": in_a_comment,
        "batch.xml with prefixes": prefixed("batch", "n"),
        "batch.xml in another namespace": in_batch_xml("loc.gov/ndnp", "loc.gov/ndnp2"),
        "batch_1.xml alike": validated(lambda text: text),
        "batch_1.xml broken": validated(lambda text: text[:-9]),
        "batch_1.xml without issues": validated(lambda text: re.sub("<issue.*", "", text)),
        "batch_2.xml broken": validated(lambda text: text[:-9], "batch_2.xml"),
        "batchfile_1.xml alike": validated(lambda text: text, "batchfile_1.xml"),
        "BATCH_1.xml alone": lambda draft: draft.batch_xml.rename(
            draft.batch_xml.with_name("BATCH_1.xml")
        ),
        "batch_1.xml is a folder": lambda draft: (draft.path / "data/batch_1.xml").mkdir(),
        "empty reel number": in_batch_xml('reelNumber="print"', 'reelNumber=""'),
        "no reel": in_batch_xml("<reel ", "<riel "),
        "batch.xml with a DOCTYPE": in_batch_xml(HEAD, doctype("batch", ENTITY)),
        "batch.xml with an entity": both(
            in_batch_xml(HEAD, doctype("batch", '[<!ENTITY e ".">]')),
            in_batch_xml('"01">.', '"01">&e;'),
        ),
        "batch.xml in UTF-16": encoded("batch", "UTF-16", "utf-16", "é"),
        "batch.xml with a BOM": encoded("batch", "UTF-8", "utf-8-sig", "é"),
        # an issue's file
        "METS with comments": in_mets("<dmdSec", "<!-- é --><dmdSec"),
        "METS with prefixes": prefixed("mets", "m"),
        "METS with an undeclared prefix": in_mets(" TYPE=", ' xsi:schemaLocation="a b" TYPE='),
        "METS in another namespace": in_mets("loc.gov/METS/", "loc.gov/METS2/"),
        "MODS in another namespace": in_mets("loc.gov/mods/v3", "loc.gov/mods/v4"),
        "MIX 2.0": in_mets("loc.gov/mix/", "loc.gov/mix/v20"),
        "XLink undeclared": in_mets(' xmlns:xlink="http://www.w3.org/1999/xlink"', ""),
        "METS with a DOCTYPE": in_mets(HEAD, doctype("mets", ENTITY)),
        "METS with a DTD elsewhere": in_mets(HEAD, doctype("mets", 'SYSTEM "nowhere.dtd"')),
        "METS with an entity": both(in_mets(HEAD, doctype("mets", ENTITY)), edition("&e;")),
        "METS with an unknown entity": in_mets("<dmdSec", "<!-- --><x>&nbsp;</x><dmdSec"),
        "METS with an unknown entity and a DTD": both(
            in_mets(HEAD, doctype("mets", 'SYSTEM "nowhere.dtd"')),
            in_mets("<dmdSec", "<x>&nbsp;</x><dmdSec"),
        ),
        "METS of XML 1.1": in_mets('version="1.0"', 'version="1.1"'),
        "METS of no declared version": in_mets(HEAD + "\n", ""),
        "METS with a blank line before all": in_mets(HEAD, "\n" + HEAD),
        "METS with text behind all": in_mets("</mets>", "</mets>x"),
        "METS with a control character": in_mets("<dmdSec", "<x>\x01</x><dmdSec"),
        "METS in UTF-16": encoded("mets", "UTF-16", "utf-16", "é"),
        "METS with a BOM": encoded("mets", "UTF-8", "utf-8-sig", "é"),
        "METS in Latin-1": encoded("mets", "ISO-8859-1", "latin-1", "é"),
        "METS in Windows-1252": encoded("mets", "windows-1252", "cp1252", "„é"),
        "METS in utf8": encoded("mets", "utf8", "utf-8", "é"),
        "METS in Shift_JIS": encoded("mets", "Shift_JIS", "shift_jis", "日"),
        "METS in GB18030": encoded("mets", "GB18030", "gb18030", "日"),
        "METS in an unknown encoding": encoded("mets", "klingon", "utf-8", "é"),
        "METS in Latin-1, but says UTF-8": encoded("mets", "UTF-8", "latin-1", "é"),
        "METS empty": lambda draft: draft.mets.write_bytes(b""),
        "METS with a blank in its name": mets_named("a b.xml", "a b.xml"),
        "METS with a blank as %20": mets_named("a b.xml", "a%20b.xml"),
        "METS with %20 in its name": mets_named("a%20b.xml", "a%20b.xml"),
        "METS with % in its name": mets_named("100%.xml", "100%.xml"),
        "METS with é in its name": mets_named("é.xml", "é.xml"),
        "METS with & in its name": mets_named("a&b.xml", "a&amp;b.xml"),
        "METS with ? in its name": mets_named("a?b.xml", "a?b.xml"),
        "METS with # in its name": mets_named("a#b.xml", "a#b.xml"),
        "METS by a roundabout path": lambda draft: replace(
            draft.batch_xml,
            f"/{draft.mets.name}<",
            f"/../{draft.mets.parent.name}//{draft.mets.name}<",
        ),
        "no np:issue": in_mets("np:issue", "np:tissue"),
        "np:issue twice": in_mets("</structMap>", '<div TYPE="np:issue" DMDID="x"/></structMap>'),
        "np:issue not described": in_mets('"np:issue" DMDID="issueModsBib"', '"np:issue"'),
        "np:issue described twice": in_mets("<dmdSec", '<dmdSec ID="issueModsBib"/><dmdSec'),
        "edition with blanks": edition(" 1\n"),
        "edition 01": edition("01"),
        "edition 0": edition("0"),
        "edition 2": edition("2"),
        "edition -1": edition("-1"),
        "edition 1.0": edition("1.0"),
        "edition 1_0": edition("1_0"),
        "edition in Arabic": edition("١"),
        "edition of eleven digits": edition("99999999999"),
        "edition with a comment": edition("<!-- 2 -->1"),
        "edition twice": in_mets(
            '<mods:detail type="edition">',
            '<mods:detail type="edition"><mods:number>3</mods:number>',
        ),
        "edition's detail empty first": in_mets(
            '<mods:detail type="edition">',
            '<mods:detail type="edition"/><mods:detail type="edition">',
        ),
        "date empty": dated(""),
        "date is a word": dated("January"),
        "date with a blank": dated(" DAY"),
        "date with a newline": dated("DAY\n"),
        "date with a comment": dated("<!-- -->DAY"),
        "date with a time": dated("DAYT00:00:00"),
        "another date first": in_mets("<mods:originInfo>", "<mods:dateIssued/><mods:originInfo>"),
        "LCCN with blanks": lccn("  sn99990001\n"),
        "LCCN with a blank inside": lccn("sn 99990001"),
        "LCCN empty": lccn(""),
        "LCCN not ASCII": lccn("sn9999é"),
        "LCCN of another kind": in_mets('type="lccn"', 'type="oclc"'),
        # its pages
        "a page without OCR": without_ocr,
        "an issue without pages": without_pages,
        "a page not described": in_mets('DMDID="pageModsBibP$"', 'DMDID="nowhere"'),
        "page without DMDID": in_mets(' DMDID="pageModsBibP$"', ""),
        "page in a section": both(
            in_mets("<fptr", '<fptr FILEID="masterP$"/><fptr'),
            in_mets('<div TYPE="np:page"', '<div TYPE="np:section"><div TYPE="np:page"'),
            in_mets("</div>\n", "</div></div>\n"),
        ),
        "sequence with blanks": sequence(" P$\n"),
        "sequence 0": sequence("0"),
        "sequence 007": sequence("007"),
        "sequence -1": sequence("-1"),
        "sequence 1.5": sequence("1.5"),
        "sequence of another page": sequence("1"),
        "sequence of eleven digits": sequence("99999999999"),
        "file without ID": in_mets("<fileSec>", '<fileSec><file USE="ocr"/>'),
        "file with empty USE": in_mets('USE="master"', 'USE=""'),
        "file without USE": in_mets(' USE="master"', ""),
        "file of another USE": in_mets('USE="master"', 'USE="thumbnail"'),
        "fptr without FILEID": in_mets('<fptr FILEID="masterP$"/>', "<fptr/>"),
        "OCR file without FLocat": both(in_mets('xlink:href="000P$.xml"', ""), without_ocr),
        "OCR by a roundabout path": in_mets('href="000P$.xml"', 'href="./../x/.././//000P$.xml"'),
        "OCR by an absolute path": absolute(""),
        "OCR by a file: URL": absolute("file://"),
        "OCR with a blank in its name": named("xml", "a b.xml", "a b.xml"),
        "OCR with a blank as %20": named("xml", "a b.xml", "a%20b.xml"),
        "OCR with %20 in its name": named("xml", "a%20b.xml", "a%20b.xml"),
        "OCR with %25 for %": named("xml", "a%b.xml", "a%25b.xml"),
        "OCR with é in its name": named("xml", "é.xml", "é.xml"),
        "OCR with # in its name": named("xml", "a#b.xml", "a#b.xml"),
        "OCR with ? in its name": named("xml", "a?b.xml", "a?b.xml"),
        "OCR with a blank behind": named("xml", "ocr.xml", "ocr.xml "),
        "OCR with a newline in front": named("xml", "ocr.xml", "&#10;ocr.xml"),
        "jp2 with a blank as %20": both(NO_DIMENSIONS, named("jp2", "a b.jp2", "a%20b.jp2")),
        "jp2 with %20 in its name": both(NO_DIMENSIONS, named("jp2", "a%20b.jp2", "a%20b.jp2")),
        "jp2 with é in its name": both(NO_DIMENSIONS, named("jp2", "é.jp2", "é.jp2")),
        "PDF missing": without("pdf"),
        "TIFF missing": without("tif"),
        "a jp2 missing": without("jp2"),
        "jp2 unmeasured": NO_DIMENSIONS,
        "jp2 unmeasured and missing": both(NO_DIMENSIONS, without("jp2")),
        "jp2 unmeasured and empty": picture(b""),
        "jp2 unmeasured and HTML": picture(b"<html></html>"),
        "jp2 unmeasured and a folder": both(NO_DIMENSIONS, a_folder("jp2")),
        "jp2 unmeasured by a link": both(NO_DIMENSIONS, a_link("jp2", False)),
        "ADMID of two": in_mets('ADMID="serviceP$Technical"', 'ADMID="x serviceP$Technical"'),
        "ADMID unknown": in_mets('ADMID="serviceP$Technical"', 'ADMID="nowhere"'),
        "ADMID empty": in_mets('ADMID="serviceP$Technical"', 'ADMID=""'),
        "width with blanks": width(" 5200\n"),
        "width of blanks": width(" "),
        "width 0": width("0"),
        "width 5200.0": width("5200.0"),
        "width with a comment": width("5200<!-- -->"),
        # a page's text
        "ALTO with prefixes": both(prefixed("ocr", "alto"), without_ocr),
        "ALTO with an undeclared prefix": in_alto("<Page ", '<Page xlink:href="x" '),
        "ALTO with a DOCTYPE": in_alto(HEAD, doctype("alto", '[<!ENTITY e "é">]')),
        "ALTO with an entity": both(
            in_alto(HEAD, doctype("alto", '[<!ENTITY e "é">]')), in_alto('"The"', '"The&e;"')
        ),
        "ALTO with an unknown entity": in_alto("<TextLine", "<x>&nbsp;</x><TextLine"),
        "ALTO with an unknown entity and a DTD": both(
            in_alto(HEAD, doctype("alto", 'SYSTEM "nowhere.dtd"')),
            in_alto("<TextLine", "<x>&nbsp;</x><TextLine"),
        ),
        "ALTO with a DTD elsewhere": in_alto(HEAD, doctype("alto", 'SYSTEM "nowhere.dtd"')),
        "ALTO in UTF-16": encoded("ocr", "UTF-16", "utf-16", "é"),
        "ALTO with a BOM": encoded("ocr", "UTF-8", "utf-8-sig", "é"),
        "ALTO in Latin-1": encoded("ocr", "ISO-8859-1", "latin-1", "é"),
        "ALTO in utf8": encoded("ocr", "utf8", "utf-8", "é"),
        "ALTO in Shift_JIS": encoded("ocr", "Shift_JIS", "shift_jis", "日"),
        "ALTO in an unknown encoding": encoded("ocr", "klingon", "utf-8", "é"),
        "ALTO in Latin-1, but says UTF-8": encoded("ocr", "UTF-8", "latin-1", "é"),
        "ALTO empty": with_content("xml", b""),
        "ALTO without a page": with_content("xml", b"<alto/>"),
        "ALTO is no XML": with_content("xml", b"The gazette."),
        "ALTO with text behind all": in_alto("</alto>", "</alto>x"),
        "ALTO with a control character": in_alto('"The"', '"The\x01"'),
        "ALTO with an empty word": in_alto('"The"', '""'),
        "ALTO in an unknown language": in_alto('"eng"', '"xyz"'),
        "ALTO of two pages without sizes": both(
            in_alto(' HEIGHT="7500" WIDTH="5200">\n<Pr', ">\n<Pr"),
            in_alto("</Page>", "</Page><Page/>"),
        ),
        "ALTO is a folder": a_folder("xml"),
        "ALTO by a link": a_link("xml", False),
        "ALTO by a dangling link": a_link("xml", True),
    }
)


def two_of_one_key(draft: Draft) -> None:
    """Another issue with the same LCCN, date and edition, in a folder of its own."""
    folder = draft.mets.parent
    shutil.copytree(folder, folder.with_name("again"))
    listed = draft.mets.relative_to(draft.path / "data").as_posix()
    again = f"<issue>./{Path(listed).parent.with_name('again')}/{draft.mets.name}</issue>"
    replace(draft.batch_xml, "</batch>", f"{again}</batch>")
    draft.listed.append(draft.issue)


def folder_named(name: str) -> Oddity:
    """An issue's folder has a character that means something in a URL."""

    def change(draft: Draft) -> None:
        folder = draft.mets.parent
        replace(draft.batch_xml, f"/{folder.name}/", f"/{name}/")
        folder.rename(folder.with_name(name))

    return change


def outside(suffix: str, *more: Oddity) -> Oddity:
    """A page's file lies beside the batch, and the METS file names it by `../`."""

    def change(draft: Draft) -> None:
        for oddity in more:
            oddity(draft)
        away = draft.path.parent / f"outside-{draft.path.name}.{suffix}"
        name = os.path.relpath(away, draft.mets.parent)
        replace(draft.mets, f'href="{draft.page:04}.{suffix}"', f'href="{name}"')
        draft.file(suffix).rename(away)

    return change


def pages_issue_note(text: str, kind: str = "noteAboutReproduction") -> Oddity:
    note = f'<mods:note type="{kind}">{text}</mods:note></mods:mods>'
    return in_mets("</mods:mods>", note)


def section(described: str) -> Oddity:
    """The pages lie in a section, whose description is as told."""
    label = '<mods:detail type="section label"><mods:number>{}</mods:number></mods:detail>'
    description = (
        '<dmdSec ID="section"><mdWrap MDTYPE="MODS"><xmlData><mods:mods><mods:part>'
        f"{label.format(described)}</mods:part></mods:mods></xmlData></mdWrap></dmdSec>"
    )
    return both(
        in_mets("<amdSec", f"{description if described else ''}<amdSec"),
        in_mets(
            '<div TYPE="np:page" DMDID="pageModsBibP$"',
            '<div TYPE="np:section" DMDID="section"><div TYPE="np:page" DMDID="pageModsBibP$"',
        ),
        in_mets('<fptr FILEID="ocrP$"/></div>', '<fptr FILEID="ocrP$"/></div></div>'),
    )


def two_services(draft: Draft) -> None:
    """The first of a page's two images is missing, and neither has a size in the METS."""
    file = '<file ID="firstP$" USE="service"><FLocat LOCTYPE="OTHER" xlink:href="no.jp2"/></file>'
    both(
        NO_DIMENSIONS,
        in_mets("</fileSec>", f"{file}</fileSec>"),
        in_mets('<fptr FILEID="serviceP$"/>', '<fptr FILEID="firstP$"/><fptr FILEID="serviceP$"/>'),
    )(draft)


def nested(draft: Draft) -> None:
    replace(draft.mets, "<fileSec>", f"{'<x>' * 300}{'</x>' * 300}<fileSec>")


def page_outside(draft: Draft) -> None:
    """A page's division stands beside the issue's, and not in it."""
    text = draft.mets.read_text()
    start = text.index(f'<div TYPE="np:page" DMDID="pageModsBib{draft.page}"')
    end = text.index("</div>", start) + len("</div>")
    page = text[start:end]
    moved = text.replace(page, "").replace("</structMap>", f"{page}</structMap>")
    draft.mets.write_text(moved)


def second_issue(draft: Draft) -> None:
    """The last page is in a division of another np:issue."""
    page = f'<div TYPE="np:page" DMDID="pageModsBib{draft.pages}"'
    opened = f'</div><div TYPE="np:issue" DMDID="issueModsBib">{page}'
    replace(draft.mets, page, opened)


MISSED_ONCE: dict[str, Oddity] = {
    "two issues of one key": two_of_one_key,
    "an emoji in an issue's note": pages_issue_note("\U0001f4f0"),
    "an emoji in OCR": in_alto('"The"', '"The \U0001f4f0"'),
    "an emoji in a file's name": named("jp2", "\U0001f4f0.jp2", "\U0001f4f0.jp2"),
    "a volume of 51 characters": in_mets("<mods:number>1<", f"<mods:number>{'1' * 51}<"),
    "a page number of 51 characters": in_mets(
        '"page number"><mods:number>P$<', f'"page number"><mods:number>{"1" * 51}<'
    ),
    "a page number with its caption, indented": in_mets(
        '"page number"><mods:number>P$</mods:number>',
        '"page number"><mods:number>P$</mods:number>\n'
        + " " * 50
        + "<mods:caption>p</mods:caption>",
    ),
    "a reel number of 51 characters": in_mets(
        "<mods:extent",
        f'<mods:identifier type="reel number">{"1" * 51}</mods:identifier><mods:extent',
    ),
    "a note's type of 51 characters": pages_issue_note("text", "t" * 51),
    "a section label of 101 characters": section("s" * 101),
    "a section that is not described": section(""),
    "a section": section("Sports"),
    "ALTO in the language sk": in_alto('"eng"', '"sk"'),
    "ALTO in the language hr": in_alto('"eng"', '"hr"'),
    "second np:issue with a page": second_issue,
    "a page outside np:issue": page_outside,
    'USE="OCR"': in_mets('ID="ocrP$" USE="ocr"', 'ID="ocrP$" USE="OCR"'),
    "a page's fptr in a division of its own": in_mets(
        '<fptr FILEID="ocrP$"/>', '<div><fptr FILEID="ocrP$"/></div>'
    ),
    "OCR without href": both(in_mets(' xlink:href="000P$.xml"', ""), without_ocr),
    "a jp2 cut to 40 bytes, unmeasured": picture(JP2[:40]),
    "two services, the first of which is missing": two_services,
    "# in a folder's name": folder_named("a#b"),
    "? in a folder's name": folder_named("a?b"),
    "METS in latin-1": encoded("mets", "latin-1", "latin-1", "é"),
    "METS in utf_8": encoded("mets", "utf_8", "utf-8", "é"),
    "METS nested 300 deep": nested,
    "a comment inside an issue's path": in_batch_xml("./sn99990001", "./<!-- -->sn99990001"),
    "OCR outside the batch": outside("xml"),
    "an image outside the batch": outside("jp2"),
    "an image outside the batch, unmeasured": outside("jp2", NO_DIMENSIONS),
    "width of 64px": width("64px"),
    "sequence of 2^31": sequence(str(2**31)),
}

ODDITIES.update(MISSED_ONCE)

COUNTS = ("issues", "pages", "issues_in_batch_xml", "pages_in_mets", "pages_in_solr")


def listed(site: Site, batch: str = ALPHA) -> list:
    """What list-batches says of it."""
    [shown] = [each for each in site.call("list-batches")["batches"] if each["name"] == batch]
    return [shown["state"], *(shown[name] for name in COUNTS)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory, template):
    """A site with something to show: wide characters in a batch's name, a failed job."""
    with Site(tmp_path_factory.mktemp("shown"), template) as site:
        site.batch(ALPHA)
        site.batch("batch_oru_東京日日新聞の長い名前の部分東京日日新聞の長い名前の部分_ver01")
        failing_load(site)
        site.start()
        site.run("load-batch", "batch_oru_broken_ver01")
        site.run("load-batch", ALPHA)
        yield site


def linked_out(which: str) -> Oddity:
    """A link leads out of the batch: its folder "data", an issue's, or a METS file."""

    def change(draft: Draft) -> None:
        path = {"data": draft.path / "data", "issue": draft.mets.parent, "METS": draft.mets}[which]
        outside = draft.path.parent / f"outside-{draft.path.name}-{path.name}"
        path.rename(outside)
        path.symlink_to(outside)

    return change


def image_of(kind: str) -> Oddity:
    """The image, of which the METS has no size, is of another kind than JPEG 2000."""
    red = b"\xff\0\0"
    grey_tga = bytes([0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 8, 0]) + bytes(4)
    webp = base64.b64decode("UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA==")
    return picture({"PPM": b"P6 2 2 255\n" + red * 4, "TGA": grey_tga, "WebP": webp}[kind])


def external_entity(draft: Draft) -> None:
    """The edition is in a file of its own, which libxml2 reads."""
    draft.mets.with_name("edition.txt").write_text("1")
    in_mets(HEAD, doctype("mets", '[<!ENTITY e SYSTEM "edition.txt">]'))(draft)
    edition("&e;")(draft)


def with_nul_bytes(draft: Draft) -> None:
    draft.mets.write_bytes(draft.mets.read_bytes() + bytes(100))


CALLED_FAULTY_ONCE: dict[str, Oddity] = {
    "data is a link out of the batch": linked_out("data"),
    "an issue's folder is a link out of the batch": linked_out("issue"),
    "a METS is a link out of the batch": linked_out("METS"),
    "OCR by file:./x": in_mets('href="000P$.xml"', 'href="file:./000P$.xml"'),
    "OCR by FILE://": absolute("FILE://"),
    "a TextBlock of no language and no lines": in_alto(
        '<TextBlock ID="TB1"', '<TextBlock ID="TB0" language=""/><TextBlock ID="TB1"'
    ),
    "a WebP, unmeasured": image_of("WebP"),
    "a PPM, unmeasured": image_of("PPM"),
    "a TGA, unmeasured": image_of("TGA"),
    "METS ending in NUL bytes": with_nul_bytes,
    "METS in UTF-16 that says UTF-8": encoded("mets", "UTF-8", "utf-16", "é"),
    "METS with an external entity": external_entity,
}

ODDITIES.update(CALLED_FAULTY_ONCE)


def word(site: Site, batch: str = ALPHA) -> list:
    """What batch-status says of a batch: its state and its counts."""
    reply = site.call("batch-status", batch)
    assert "batch" in reply, reply
    shown = reply["batch"]
    return [shown["state"], *(shown[name] for name in COUNTS)]


def checked(site: Site, batch: str) -> tuple[int, dict]:
    """The exit status of batch-check, and its answer."""
    with Client(site.port) as client:
        channel = client.channel(f"batch-check {batch}")
        answer = json.loads(channel.makefile("rb").read())
        return channel.recv_exit_status(), answer


def mended(site: Site, *words: str) -> list[str]:
    """The log of a job that succeeds, and which is not done by making it a second time."""
    logs = repaired(site, *words)
    assert without_session(site.call(*words)) == NOOP
    return logs


def change_index(site: Site, *changes: str) -> None:
    """Changes the index by ONI's own connection c, and commits."""
    code = "; ".join(["from core import solr_index as s", "c = s.conn()", *changes, "c.commit()"])
    assert site.manage("shell", "-c", code).returncode == 0


@pytest.fixture(scope="module")
def odd_site(tmp_path_factory, template):
    """A site whose agent runs for all tests that check, and then load, one odd batch."""
    bad_records = {lccn: record for lccn, record, _ in BAD_RECORDS.values()}
    with MarcSite("sn99990077", **bad_records) as marc:
        with Site(tmp_path_factory.mktemp("odd"), template) as site:
            yield site.start(**marc.environment)


def marc_with(lccn: str, before: bytes, after: bytes) -> bytes:
    """A record in which something stands in the place of something else."""
    record = marc_xml(lccn)
    assert record.count(before) == 1
    return record.replace(before, after)


BAD_RECORDS: dict[str, tuple[str, bytes, str]] = {  # LCCN, what the site answers, what is said
    "HTML": ("sn11110001", b"<html><body>sn11110001 is not here</body></html>", "another record"),
    "no XML": ("sn11110002", b"Not now", "that is no MARC XML: .*"),
    "of another title": ("sn11110003", marc_xml("sn11119999"), "it answers with another record"),
    "deleting": (
        "sn11110004",
        marc_with("sn11110004", b"00000cas", b"00000das"),
        "leader/05 is d: ONI would delete the title sn11110004",
    ),
    "of something else": (
        "sn11110005",
        marc_with("sn11110005", b"00000cas", b"00000cgs"),
        "leader/06 is g: ONI would ignore the title sn11110005",
    ),
    "of an unknown language": (
        "sn11110006",
        marc_xml("sn11110006", language="zzz"),
        "ONI cannot store the title sn11110006: .*zzz.*",
    ),
    "without a title": (
        "sn11110007",
        re.sub(b'<datafield tag="245".*</datafield>\n', b"", marc_xml("sn11110007")),
        "ONI cannot store the title sn11110007: .*",
    ),
    "of an LCCN without an address": (
        "85-38490",
        marc_xml("85-38490"),
        "ONI would store the title '85-38490', but no batch of it could be loaded: .*",
    ),
    "of a year with fill characters": (
        "sn11110008",
        marc_with("sn11110008", b"d18501999", b"d18||||||"),
        "ONI would store the title 'sn11110008', but no batch of it could be loaded: .*",
    ),
}


def new_draft(site: Site, kind: str) -> Draft:
    """A batch of this oddity, or of none, on days that are no other batch's."""
    number = next(FRESH)
    start = date(1700, 1, 1) + timedelta(days=4 * number)
    return Draft(site.source, f"batch_oru_kind{number}_ver01", random.Random(kind), start)


def compare_with_load(site: Site, draft: Draft) -> dict[str, Any]:
    """Holds a check's word against what a load leaves, and batch-status' against both.

    Returns the check's answer.
    """
    name = draft.path.name
    status, answer = checked(site, name)
    faults = answer["faults"]
    assert status == bool(faults)
    for fault in faults:
        assert fault["file"].startswith("data/")
        assert fault["file"] not in fault["fault"]
        assert str(draft.path) not in fault["fault"]
    loaded = site.manage("load_batch", str(draft.path))
    breaks_off = [fault for fault in faults if "ONI would break off the load" in fault["fault"]]
    assert bool(breaks_off) == (loaded.returncode != 0), (faults, loaded.stderr)
    rows, issues, pages = site.held(name)
    [(indexed,)] = site.query(
        "SELECT count(*) FROM core_page JOIN core_issue ON core_issue.id = issue_id"
        " WHERE indexed AND batch_id = ?",
        name,
    )
    whole = loaded.returncode == 0 and [issues, pages, indexed] == draft.whole
    assert bool(faults) == (not whole), (faults, [issues, pages, indexed], draft.whole)
    if breaks_off:
        assert (rows, issues, pages) == NOTHING
        assert site.solr.documents(name) == []
        return answer
    assert word(site, name)[0] == ("complete" if whole else "partial")
    if whole:
        assert answer["pages"] == pages
    return answer


def empty_ocr(batch: Path) -> None:
    change(page_file(batch, "0002.xml"), "<TextLine", "<TextLin")


@pytest.fixture
def oni(site):
    """How an agent asks this site's Open ONI, without the rest of it."""
    oni = oni_agent.OpenONI(site.oni, site.environment)
    yield oni
    oni.close()


def held_question(site: Site, part_of_sql: str) -> Gate:
    """Makes each question wait whose SQL has this in it, from the next zygote on."""
    site.prepend_to_manage(HELD_QUERY)
    (site.oni / "held-query").write_text(part_of_sql)
    (site.oni / "hold-query").touch()  # what the gate leaves for the next query
    return site.hold(site.oni / "hold-query")


HELD_QUERY = r'''
import os, sys
if "shell" in sys.argv:
    import django.db.backends.signals
    here = os.getcwd() + "/"
    def hold(execute, sql, *more):
        with open(here + "held-query") as held:
            if sql.startswith("SELECT") and held.read().strip() in sql:
                open(here + "hold-query").read()
        return execute(sql, *more)
    def connected(connection, **_):
        connection.execute_wrappers.append(hold)
    django.db.backends.signals.connection_created.connect(connected, weak=False)
'''


# Runs in the agent before it does, and makes it meet what a machine may bring: a switch is a file.
# --- What a machine may bring, and a terminal -----------------------------------------------------


TROUBLES = r'''
import builtins, functools, io, os, pwd, sys, threading, time
HERE = os.path.dirname(os.path.abspath(__file__))
really_stat = os.stat

def is_on(name):
    try:
        really_stat(os.path.join(HERE, name))
        return True
    except OSError:
        return False

def on_hung_disk(path):
    return isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(
        os.path.join(os.path.dirname(HERE), "batches"))

# As attributes of a class, where Python 3.9's pathlib has them, partials are no methods.

def hanging(really):
    def call(path=".", *words, **options):
        while on_hung_disk(path) and is_on("disk-hangs"):
            time.sleep(0.05)
        return really(path, *words, **options)
    return functools.partial(call)

def telling(name, really):
    def call(what, *words, **options):
        done = really(what, *words, **options)
        path = os.readlink("/proc/self/fd/%d" % what) if isinstance(what, int) else what
        with open(os.path.join(HERE, "told"), "a") as told:
            print(name, os.fspath(path), file=told)
        return done
    return functools.partial(call)

def without_proc(really):
    def call(path, *words, **options):
        if not isinstance(path, int) and os.fspath(path).startswith("/proc") and is_on("no-proc"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return really(path, *words, **options)
    return functools.partial(call)

def starting(really):
    def start(thread):
        if is_on("no-threads"):
            raise RuntimeError("can't start new thread")
        really(thread)
    return start

def unknown(number):
    raise KeyError("getpwuid(): uid not found: %s" % number)

if os.path.basename(sys.argv[0] if hasattr(sys, "argv") else "") != "manage.py":
    for name in "open", "stat", "lstat", "access", "readlink", "listdir", "scandir":
        setattr(os, name, hanging(getattr(os, name)))
    os.fsync = telling("fsync", os.fsync)
    os.rename = telling("rename", os.rename)
    threading.Thread.start = starting(threading.Thread.start)
    builtins.open = without_proc(builtins.open)
    io.open = without_proc(io.open)
    os.stat = without_proc(os.stat)
    if is_on("no-passwd"):
        pwd.getpwuid = unknown
'''


class Troubled:
    """A site whose agent meets troubles that a test switches on and off."""

    def __init__(self, site: Site):
        self.site = site
        self._folder = site.state.parent / "troubles"
        self._folder.mkdir()
        (self._folder / "sitecustomize.py").write_text(TROUBLES)
        site.environment["PYTHONPATH"] = str(self._folder)

    @contextlib.contextmanager
    def having(self, trouble: str):
        """disk-hangs, no-proc, no-threads or no-passwd (the last at a start)."""
        switch = self._folder / trouble
        switch.touch()
        try:
            yield
        finally:
            switch.unlink()

    def told(self) -> list[str]:
        """What the agent has renamed and put on disk, in order."""
        return (self._folder / "told").read_text().splitlines()


@pytest.fixture
def troubled(site) -> Troubled:
    """A site whose agent, yet to start, can be given troubles."""
    return Troubled(site)


ALTERED = """
import os, sys, time
sys.path.insert(0, {folder!r})
import oni_agent as agent
{code}
status = agent.main()
sys.stdout.flush()
os._exit(status)
"""


def altered(site: Site, code: str, **limits: float) -> Site:
    """Starts an agent in which some code has put its own functions in place of the agent's."""
    program = site.state.parent / "altered.py"
    program.write_text(ALTERED.format(folder=str(AGENT.parent), code=textwrap.dedent(code)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[Site.__module__], "AGENT", program)
        return hurry(site, **limits)


@contextlib.contextmanager
def without_descriptors(site: Site):
    """The agent can open no file more."""
    before = resource.prlimit(site.agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(site.agent.pid, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.prlimit(site.agent.pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def store_locked(site: Site):
    """Nobody can write to jobs.db."""
    with contextlib.closing(
        sqlite3.connect(site.state / "jobs.db", isolation_level=None, timeout=60)
    ) as database:
        database.execute("BEGIN IMMEDIATE")
        yield


def store_in(folder: Path) -> oni_agent.JobStore:
    """A store of jobs, in the process of the test."""
    return oni_agent.JobStore(folder / "state")


def queue_on(store: oni_agent.JobStore) -> oni_agent.JobQueue:
    """A queue that is not started, in the process of the test."""
    site = types.SimpleNamespace(oni=None)
    return oni_agent.JobQueue(store, site, lambda job: None, lambda sentence: None)


class AnyKind(oni_agent.Kind):
    """A kind of job with any words, that is never reached yet."""

    def __init__(self, *words):
        self.words = words


@pytest.fixture
def any_kind(monkeypatch) -> None:
    """Jobs of the kinds load-batch and load-title need no Open ONI."""
    monkeypatch.setitem(oni_agent.KINDS, "load-batch", AnyKind)
    monkeypatch.setitem(oni_agent.KINDS, "load-title", AnyKind)


def many_jobs(folder: Path, count: int, **columns: str) -> None:
    """Writes so many jobs that have ended into a new store; columns are SQL of the number `n`."""
    store_in(folder)._database.close()
    gc.collect()  # its lock
    values = {
        "words": """'["load-batch", "batch_oru_x' || n || '_ver01"]'""",
        "queued": str(time.time_ns() - oni_agent.DAY),
        "status": "'successful'",
        "started": str(time.time_ns() - oni_agent.DAY),
        "ended": str(time.time_ns() - oni_agent.DAY),
        "attempts": "1",
        **columns,
    }
    with contextlib.closing(sqlite3.connect(folder / "state/jobs.db")) as database, database:
        database.execute(
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE"
            f" n < {count}) INSERT INTO jobs ({', '.join(values)})"
            f" SELECT {', '.join(values.values())} FROM numbers"
        )


SHOUTING = """
import sys
if "load_batch" in sys.argv:
    print("\\x1b]0;owned\\x07 \\x9b31m \\x08\\r\\u202e", file=sys.stderr)
    print("[ERROR] \\x1b[2J\\x9b31mgone", file=sys.stderr)
    sys.exit(1)
"""


def on_terminal(site: Site, line: str, kind: str) -> str:
    """What a command shows on a terminal of this kind, but for colours."""
    done = subprocess.run(
        [*site.ssh_words("-tt"), line],
        env={**os.environ, "TERM": kind},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    shown = done.stdout.decode()
    return re.sub(r"\x1b\[(\d+m|K)", "", shown) if kind != "dumb" else shown


class TerminalClient:
    """OpenSSH's client on a terminal of its own."""

    def __init__(
        self,
        site: Site,
        command: str = "",
        columns: int = 80,
        lines: int = 24,
        words: list[str] | None = None,
    ):
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        words = words or [*site.ssh_words("-t"), *([command] if command else [])]
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> TerminalClient:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def resize(self, columns: int, lines: int) -> None:
        """Makes the terminal another size; the kernel tells ssh."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What has been shown since the last call, up to and with this pattern."""
        while not (match := re.search(pattern, self.shown, re.DOTALL)):
            data = b""
            with contextlib.suppress(OSError):  # the other end has closed it
                data = os.read(self._master, 65536)
            assert data, self.shown
            self.shown += data.decode()
        before = self.shown[: match.end()]
        self.shown = self.shown[match.end() :]
        return before

    def ended(self) -> int:
        """The exit status of ssh."""
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self.shown += data.decode()
        return self.process.wait(30)


def without_colour(text: str) -> str:
    """What a terminal shows of it."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text)


# --- Promises: the wire contract ------------------------------------------------------------------

@pytest.mark.parametrize(
    "command, answer",
    [
        ("version", {"status": "success", "version": oni_agent.VERSION}),
        (
            "load-batch",
            {"status": "error", "message": '"load-batch" requires exactly one batch name'},
        ),
        (
            "load-batch a b",
            {"status": "error", "message": '"load-batch" requires exactly one batch name'},
        ),
        (
            "purge-batch",
            {"status": "error", "message": '"purge-batch" requires exactly one batch name'},
        ),
        ("job-status 9999", {"status": "error", "message": "Job not found", "job": {"id": 9999}}),
        ("job-status -2", {"status": "error", "message": "Job not found", "job": {"id": -2}}),
        (
            "job-status -9999999999999999999",
            {"status": "error", "message": "Job not found", "job": {"id": -9999999999999999999}},
        ),
        ("job-status abc", {"status": "error", "message": '"abc" is not a valid job id'}),
        ("job-status 0", {"status": "error", "message": '"0" is not a valid job id'}),
        (
            "job-status 99999999999999999999",
            {"status": "error", "message": '"99999999999999999999" is not a valid job id'},
        ),
        ("job-status", {"status": "error", "message": "You must supply a job ID"}),
        ("job-logs", {"status": "error", "message": "You must supply a job ID"}),
        ("job-logs ''", {"status": "error", "message": '"" is not a valid job id'}),
        ("frobnicate", {"status": "error", "message": '"frobnicate" is not a valid command name'}),
        ("''", {"status": "error", "message": '"" is not a valid command name'}),
        ("  ", {"status": "error", "message": "no command specified"}),
    ],
)
def test_each_request_gets_the_recorded_answer(shared, command, answer):
    reply = without_session(shared.ssh(command))
    reply.pop("error", None)  # what more there is to say
    assert reply == answer


def test_an_agent_without_jobs_lists_none(agent):
    assert without_session(agent.ssh("list-jobs")) == {"status": "success", "jobs": []}


def test_an_answer_is_one_line_of_compact_json_then_status_eof_and_close(shared):
    with Client(shared.port) as client:
        channel = client.channel("version")
        said = channel.makefile("rb").read()
        assert re.fullmatch(
            rb'{"status":"success","version":"[0-9.]+","session":{"id":\d+}}\n', said
        )
        assert channel.exit_status_ready()
        assert channel.recv_exit_status() == 0
        assert channel.eof_received
        assert channel.recv_stderr(1) == b""


def test_a_missing_batch_and_a_noop_job_are_answered_byte_for_byte(shared):
    path = shared.source / "batch_oru_nosuch_ver01/data/batch.xml"
    with Client(shared.port) as client:
        said = client.raw("load-batch batch_oru_nosuch_ver01").decode()
        assert said.startswith(
            '{"status":"error","message":"\\"batch_oru_nosuch_ver01\\" cannot be loaded",'
            f'"error":"reading file: open {path}: no such file or directory"'
        )
        said = client.raw("job-status -1").decode()
        assert re.match(
            r'\{"status":"success","message":"Success: this job is'
            r' complete.","job":\{"id":-1,"name":'
            rf'"No-op job","queued":"{STAMP}","status":"successful"\}}',
            said,
        )
        assert client.ask("job-logs -1")["job"]["stdout"] == []


def test_what_is_not_a_command_is_refused(shared):
    sftp = subprocess.run(
        [*shared.ssh_words("-s"), "sftp"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    assert sftp.returncode != 0
    assert b"subsystem request failed" in sftp.stderr
    with Client(shared.port) as client:
        with pytest.raises(paramiko.ChannelException, match="Administratively prohibited"):
            client.transport.open_channel("direct-tcpip", ("127.0.0.1", 1), ("127.0.0.1", 2))
        with pytest.raises(paramiko.SSHException, match="denied"):
            client.transport.request_port_forward("", 0)
        channel = client.channel("version")
        with pytest.raises(paramiko.SSHException):
            channel.exec_command("version")  # a second command on the same channel


@pytest.mark.parametrize(
    "line, words",
    [
        (
            r'"a\tb" "\u200b" "\"" "\\" "né" "\x41" "\U0001f5de"',
            ["a\tb", "\u200b", '"', "\\", "né", "A", "\U0001f5de"],
        ),
        (r"""a "b c" 'd "e' f\ g ''""", ["a", "b c", 'd "e', "f g", ""]),
        (r'"a\$b" "c"', [r"a\$b", "c"]),  # not Go's form: a shell's
        ('""', [""]),
        (' "x"\t"y" ', ["x", "y"]),
        ('"x""y"', ["xy"]),
    ],
)
@in_process
def test_command_lines_are_split_as_go_or_a_shell_wrote_them(line, words):
    assert oni_agent.split_words(line.encode()) == words


@pytest.mark.parametrize(
    "line", ["'x", '"x', '"a" "b', "x\\", b"caf\xe9", '"\\ud800"', "x" * 100_000]
)
def test_a_command_line_that_cannot_be_split_is_refused_with_a_sentence(shared, line):
    with Client(shared.port) as client:
        reply = client.ask(line)
    assert reply["status"] == "error"
    assert reply["message"].startswith("the ")


def test_nca_quotes_are_understood_over_the_wire(agent):
    assert (
        agent.call("ensure-awardee", "tab\there", 'na"me\u200b\\')["message"] == "Awardee created"
    )
    assert agent.query("SELECT name FROM core_awardee WHERE org_code = ?", "tab\there") == [
        ('na"me\u200b\\',)
    ]


def test_help_lists_every_command_with_its_usage(shared):
    usages = [each["usage"] for each in shared.ssh("help")["commands"]]
    assert [usage.split()[0] for usage in usages] == list(oni_agent.COMMANDS)
    assert "load-batch BATCH" in usages


def test_several_commands_share_a_connection(shared, tmp_path):
    control = (
        "-o",
        "ControlMaster=auto",
        "-o",
        f"ControlPath={tmp_path}/c",
        "-o",
        "ControlPersist=20",
    )
    numbers = [
        json.loads(
            subprocess.run(
                [*shared.ssh_words(*control), "version"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                timeout=30,
            ).stdout
        )["session"]["id"]
        for _ in range(2)
    ]
    subprocess.run([*shared.ssh_words(*control), "-O", "exit"], stderr=subprocess.PIPE, timeout=30)
    assert numbers[1] > numbers[0]
    with Client(shared.port) as client:
        channels = [client.channel("version") for _ in range(8)]
        assert all(
            json.loads(channel.makefile("rb").read())["status"] == "success" for channel in channels
        )


# --- Promises: loading and purging ----------------------------------------------------------------

def test_a_batch_is_loaded_and_purged_over_ssh(agent):
    agent.batch("batch_oru_alpha_ver01", issues=3, pages=2)
    reply = without_session(agent.ssh("load-batch batch_oru_alpha_ver01"))
    assert reply == {"status": "success", "message": "Job added to queue", "job": {"id": 1}}
    job = agent.ended(1)
    assert (job["id"], job["name"], job["status"]) == (1, "Load batch", "successful")
    assert re.fullmatch(STAMP, job["queued"])
    assert agent.call("job-status", "1")["message"] == "Success: this job is complete."
    assert agent.held("batch_oru_alpha_ver01") == (1, 3, 6)
    logged = agent.ssh("job-logs 1")["job"]
    assert logged["stdout"] == []
    assert logged["stderr"][-1].endswith("[INFO] processed 6 pages")
    assert all(re.match(rf"\[{STAMP}\] ", line) for line in logged["stderr"])
    assert logged["stderr"] == sorted(set(logged["stderr"]))
    assert agent.run("purge-batch", "batch_oru_alpha_ver01")["name"] == "Purge batch"
    assert agent.held("batch_oru_alpha_ver01") == (0, 0, 0)
    assert [(job["id"], job["status"]) for job in agent.ssh("list-jobs")["jobs"]] == [
        (1, "successful"),
        (2, "successful"),
    ]


def test_what_is_done_already_is_no_job(agent):
    agent.batch("batch_oru_alpha_ver01")
    assert without_session(agent.call("purge-batch", "batch_oru_alpha_ver01")) == NOOP
    agent.run("load-batch", "batch_oru_alpha_ver01")
    assert without_session(agent.call("load-batch", "batch_oru_alpha_ver01")) == NOOP
    assert len(agent.call("list-jobs")["jobs"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "../batches/batch_oru_alpha_ver01",
        "./batch_oru_alpha_ver01",
        "/etc/passwd",
        "",
        "batch_oru_alpha_ver1",
        "batch_oru_ver01",
        "batch_oru_alpha_ver01\n",
        "x" * 300,
        "batch_oru_alpha_ver01//",
        "batch_oru_alpha/../x_ver01",
        "batch_oru_al pha_ver01",
    ],
)
def test_a_name_that_is_no_batch_name_is_refused_before_the_disk_is_touched(shared, name):
    reply = shared.call("load-batch", name)
    assert reply["message"] == f'"{name}" cannot be loaded'
    assert "is not a batch name" in reply["error"]
    # Open ONI can hold no such batch, so it is gone, as a purge is to bring about.
    reply = shared.call("purge-batch", name)
    assert "is not a batch name" in reply["hint"]
    assert {key: reply[key] for key in NOOP} == NOOP


def test_manage_py_gets_the_agents_environment_and_not_its_own_variables(site):
    site.prepend_to_manage(
        "import json, os, sys\nif 'load_batch' in sys.argv: print(json.dumps([os.getcwd(), dict("
        "os.environ), os.getsid(0) == os.getpid()]), flush=True)"
    )
    site.batch("batch_oru_alpha_ver01")
    site.start(ONI_SOME_SETTING="kept", DB_CONNECTION="user:secret@tcp(h:1)/db", PYTHONHOME="")
    assert site.run("load-batch", "batch_oru_alpha_ver01")["status"] == "successful"
    folder, environment, own_session = json.loads(
        site.call("job-logs", "1")["job"]["stdout"][0][33:]
    )
    assert folder == str(site.oni)
    assert own_session
    assert environment["ONI_SOME_SETTING"] == "kept"
    assert environment["VIRTUAL_ENV"] == str(site.oni / "ENV")
    assert environment["PATH"].startswith(f"{site.oni / 'ENV/bin'}:")
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert not set(environment) & {*oni_agent.OWN_VARIABLES, "PYTHONHOME"}
    assert "secret" not in "".join(site.log)
    assert "DB_CONNECTION" in "".join(site.log)


def test_a_manage_py_that_is_not_executable_is_run_with_envs_python(site):
    (site.oni / "manage.py").chmod(0o644)
    site.batch("batch_oru_alpha_ver01")
    site.start()
    assert site.run("load-batch", "batch_oru_alpha_ver01")["status"] == "successful"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_load_is_failed_and_the_next_one_purges_and_loads_the_whole_batch(agent, how):
    gate = agent.hold_load(agent.batch(ALPHA, issues=3), issue=1, page=2)
    id = agent.job("load-batch", ALPHA)
    kill_at(agent, gate, "load_batch", how)
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert (
        job["error"]
        == f"killed by signal {how:d} ({how.name}); ONI holds 2 of the 3 issues and 4 of the 6"
        ' pages, and its last event is "starting load"'
    )
    assert agent.held(ALPHA) == (1, 2, 4)
    logs = repaired(agent, "load-batch", ALPHA)
    assert "purging that" in logs[0]
    assert f"[INFO] purging batch '{ALPHA}'" in logs
    assert logs.index("[INFO] processed 6 pages") > logs.index(f"[INFO] purging batch '{ALPHA}'")
    assert agent.held(ALPHA) == (1, 3, 6)


@pytest.mark.parametrize("again, held", [("purge-batch", (0, 0, 0)), ("load-batch", (1, 3, 6))])
def test_a_killed_purge_is_failed_and_the_next_request_finishes_it(agent, again, held):
    gate = agent.hold(agent.batch(ALPHA, issues=3) / "purge-gate")
    agent.run("load-batch", ALPHA)
    id = agent.job("purge-batch", ALPHA)
    kill_at(agent, gate, "purge_batch")
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert (
        job["error"] == "killed by signal 9 (SIGKILL); ONI holds 2 of the 3 issues and 4 of the 6"
        ' pages, and its last event is "starting purge"'
    )
    assert f"[INFO] purging batch '{ALPHA}'" in repaired(agent, again, ALPHA)
    assert agent.held(ALPHA) == held


def test_a_database_lost_in_a_load_and_found_again_is_asked_what_it_holds(site):
    load = site.hold_load(site.batch(ALPHA, issues=3), issue=2)
    end = gate_in_manage(site, "load_batch", at_exit=True)
    id = site.start().job("load-batch", ALPHA)
    load.reached()
    with site.database_down():
        load.open()
        end.reached()
    end.open()
    job = site.ended(id)
    assert job["status"] == "failed"
    assert job["error"].startswith("exit status 1: unable to load batch: ")
    assert job["error"].endswith(
        "; ONI holds 3 of the 3 issues and 5 of the 6 pages, and its last event is"
        ' "starting load"'
    )
    assert site.held(ALPHA) == (1, 3, 5)
    repaired(site, "load-batch", ALPHA)
    assert site.held(ALPHA) == (1, 3, 6)


def test_a_database_lost_in_a_load_for_good_leaves_unknown_what_it_holds(agent):
    gate = agent.hold_load(agent.batch(ALPHA), issue=1)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    with agent.database_down():
        gate.open()
        job = agent.ended(id)
    assert job["status"] == "failed"
    assert job["error"].startswith("exit status 1: unable to load batch: ")
    assert (
        "; what ONI holds of the batch now is not known: Open ONI cannot answer: OperationalError"
        in job["error"]
    )
    repaired(agent, "load-batch", ALPHA)
    assert agent.held(ALPHA) == (1, 2, 4)


def test_a_load_that_cannot_be_checked_is_failed_and_says_so(site):
    site.batch(ALPHA)
    gate = gate_in_manage(site, "load_batch", at_exit=True)
    id = hurry(site, PATIENT_SECONDS=busy(5)).job("load-batch", ALPHA)
    gate.reached()
    with site.database_down():
        gate.open()
        job = site.ended(id)
    assert job["status"] == "failed"
    assert "what ONI holds of the batch now is not known: " in job["error"]
    assert without_session(site.call("load-batch", ALPHA)) == NOOP


def test_a_silent_hole_is_a_failure_with_the_counts_until_it_is_mended(agent):
    batch = agent.batch(ALPHA, issues=4)
    whole = mets_of(batch).read_text()
    gate = agent.hold_load(batch)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    spoil_edition(batch)  # when the agent has looked at the files, and ONI has yet to
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert job["error"].startswith("ONI holds 3 of the 4 issues and 6 of the 8 pages; ")
    assert "invalid literal for int" in job["error"]
    job = agent.run("load-batch", ALPHA)
    assert job["status"] == "failed"
    assert "ONI would leave this issue out: invalid literal for int" in job["error"]
    assert job["error"].endswith("; ONI was left as it is")
    assert agent.held(ALPHA) == (1, 3, 6)
    mets_of(batch).write_text(whole)
    repaired(agent, "load-batch", ALPHA)
    assert agent.held(ALPHA) == (1, 4, 8)


def test_a_page_that_open_oni_skips_is_not_called_loaded(agent):
    batch = agent.batch(ALPHA)
    gate = agent.hold_load(batch)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    spoil_sequence(batch)  # when the agent has looked at the files, and ONI has yet to
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert agent.held(ALPHA) == (1, 2, 3)
    assert job["error"].startswith("ONI holds 2 of the 2 issues and 3 of the 4 pages; ")
    assert "said: could not determine sequence number" in job["error"]


@pytest.mark.parametrize("old_copy", [True, False])
def test_a_leftover_link_to_another_place_is_removed_and_the_right_copy_loaded(
    agent, tmp_path, old_copy
):
    batch = agent.batch(ALPHA)
    other = tmp_path / "old" / ALPHA
    link = agent.oni / "data/batches" / ALPHA
    if old_copy:
        make_batch(tmp_path / "old", ALPHA, issues=1)
    link.symlink_to(other)
    logs = repaired(agent, "load-batch", ALPHA)
    assert logs[0] == f"removing {link}, a leftover link to {other}"
    assert agent.held(ALPHA) == (1, 2, 4)
    assert os.readlink(link) == str(batch)


def test_a_link_to_the_right_place_is_left(agent, tmp_path):
    agent.batch(ALPHA)
    (tmp_path / "news").symlink_to(agent.source)
    link = agent.oni / "data/batches" / ALPHA
    link.symlink_to(tmp_path / "news" / ALPHA)  # another way to the same folder
    assert not any("removing" in line for line in repaired(agent, "load-batch", ALPHA))
    assert os.readlink(link) == str(tmp_path / "news" / ALPHA)
    assert agent.held(ALPHA) == (1, 2, 4)


def test_batches_may_lie_in_open_onis_own_storage(site):
    site.source = site.oni / "data/batches"
    site.start(BATCH_SOURCE=str(site.source))
    site.batch(ALPHA)
    assert checked(site, ALPHA)[1]["faults"] == []
    repaired(site, "load-batch", ALPHA)
    assert word(site)[0] == "complete"
    repaired(site, "purge-batch", ALPHA)
    assert (site.source / ALPHA / "data/batch.xml").is_file()


def test_a_real_folder_where_the_link_would_go_is_a_failure_with_a_sentence(agent):
    agent.batch(ALPHA)
    folder = agent.oni / "data/batches" / ALPHA
    sentence = f"{folder} is a real folder or file, not a link, and load_batch cannot replace it:"
    folder.mkdir()
    reply = agent.call("load-batch", ALPHA)
    assert (reply["status"], reply["message"]) == ("error", f'"{ALPHA}" cannot be loaded')
    assert reply["error"] == f"{sentence} move it away"
    assert agent.call("list-jobs")["jobs"] == []
    folder.rmdir()
    gate = agent.hold_load(agent.batch(BETA))
    agent.job("load-batch", BETA)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    folder.mkdir()  # while the job waits
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert job["error"].startswith(f"{sentence} move it away")
    assert agent.held(ALPHA) == (0, 0, 0)
    assert agent.events(ALPHA) == []
    folder.rmdir()
    repaired(agent, "load-batch", ALPHA)


def test_a_cache_that_cannot_be_written_fails_the_job_but_says_that_the_batch_is_complete(site):
    site.batch(ALPHA)
    site.start(ONI_CACHE_DIR="/proc/sys")  # where not even root can make a file
    job = site.run("load-batch", ALPHA)
    assert job["status"] == "failed"
    assert re.match(r"exit status 1: \w+Error: .*/proc/sys/", job["error"])
    assert job["error"].endswith(
        "; the batch is complete: ONI holds 2 of the 2 issues and 4 of the 4 pages"
    )
    assert without_session(site.call("load-batch", ALPHA)) == NOOP


def test_what_a_load_leaves_that_solr_fails_in_the_middle_is_said_and_mended(site):
    hurry(site, SOLR_SECONDS=1, PATIENT_SECONDS=busy(1.5))
    gate = site.hold_load(site.batch(ALPHA), issue=1)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    with site.solr.down():
        gate.open()
        job = site.ended(id)
    assert job["status"] == "failed"
    unsure = "ONI holds nothing of the batch; Solr cannot be asked (Failed to connect "
    assert job["error"].startswith(unsure)
    said = "exit status 1: Failed to connect to server at "
    assert any(
        line.startswith(said) and line.endswith("; beginning again") for line in site.logs(id)
    )
    assert site.held(ALPHA) == NOTHING
    repaired(site, "load-batch", ALPHA)
    assert word(site) == ["complete", 2, 4, 2, 4, 4]
    repaired(site, "purge-batch", ALPHA)
    assert site.solr.documents(ALPHA) == []
    assert without_session(site.call("purge-batch", ALPHA)) == NOOP


LATE_FAULTS = [  # when ONI has read batch.xml already
    name for name in FOUND_FAULTS if FAULTS[name].status and name != "reel without number"
]


@pytest.mark.parametrize("name", LATE_FAULTS)
def test_what_open_oni_cannot_load_is_failed_with_its_first_error_and_what_is_left(
    odd_site, name
):
    fault = FAULTS[name]
    batch = odd_site.batch(batch_with(name).replace("_ver01", "_ver02"), issues=3)
    gate = odd_site.hold_load(batch)
    id = odd_site.job("load-batch", batch.name)
    gate.reached()
    fault.spoil(batch)  # when the agent has looked at the files, and ONI has yet to
    gate.open()
    job = odd_site.ended(id)
    assert job["status"] == "failed"
    assert re.fullmatch(
        f"exit status 1: {fault.said}.*; ONI holds nothing of the batch", job["error"]
    )
    assert odd_site.held(batch.name) == NOTHING


def test_a_purge_of_what_is_not_there_is_no_job_and_at_its_turn_no_failure(agent):
    name = "batch_oru_broken_ver01"
    failing_load(agent, name)
    assert without_session(agent.call("purge-batch", "batch_oru_nosuch_ver01")) == NOOP
    gate = agent.hold_load(agent.batch(ALPHA))
    agent.job("load-batch", ALPHA)
    agent.job("load-batch", name)  # will fail, and leave nothing
    id = agent.job("purge-batch", name)
    gate.open()
    assert agent.ended(id)["status"] == "successful"
    assert agent.logs(id) == ["nothing to do: ONI holds nothing of the batch"]


def test_a_load_whose_files_have_gone_before_its_turn_purges_nothing(agent):
    batch = agent.batch(ALPHA, issues=3)
    gate = agent.hold_load(batch, issue=1)
    id = agent.job("load-batch", ALPHA)
    kill_at(agent, gate, "load_batch")
    agent.ended(id)
    gate = agent.hold_load(agent.batch(BETA))
    held = agent.held(ALPHA)
    agent.job("load-batch", BETA)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    batch.rename(agent.source / "away")
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert f"{batch}/data/batch.xml: no such file" in job["error"]
    assert agent.held(ALPHA) == held == (1, 2, 3)


def test_a_batch_whose_files_are_gone_can_still_be_purged(agent):
    batch = agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    shutil.rmtree(batch)
    assert agent.run("purge-batch", ALPHA)["status"] == "successful"
    assert agent.held(ALPHA) == (0, 0, 0)


def test_purge_and_load_of_a_loaded_batch_in_one_breath_end_with_it_complete(agent):
    gate = agent.hold(agent.batch(ALPHA) / "purge-gate")
    agent.run("load-batch", ALPHA)
    assert [agent.job(command, ALPHA) for command in ("purge-batch", "load-batch")] == [2, 3]
    assert agent.call("load-batch", ALPHA)["message"] == ALREADY_QUEUED
    gate.open()
    assert [agent.ended(id)["status"] for id in (2, 3)] == ["successful", "successful"]
    assert agent.held(ALPHA) == (1, 2, 4)
    assert agent.logs(3)[-1] == "[INFO] processed 4 pages"
    assert without_session(agent.call("load-batch", ALPHA)) == NOOP


def test_a_refusal_waits_for_what_its_client_is_about_to_send(patcher):
    with Client(patcher.port) as client:
        channels = [
            client.channel(command)
            for command in (f"batch-patch {ALPHA} no-name", "batch-patch no-name x")
        ]
        for _ in range(3):
            client.ask("version")
        for channel in channels:
            channel.sendall(
                HELD.encode() + TRAILER
            )  # whoever cannot send it, such as Go's library, reads no answer
            assert json.loads(channel.makefile("rb").read())["status"] == "error"


def test_a_job_whose_load_has_run_is_not_said_to_have_been_unable_to_start(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    no_shebang(agent.oni / "manage.py")
    kill_warm_child(agent)
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert "what ONI holds of the batch now is not known: " in job["error"]


def test_a_job_whose_purge_has_run_is_not_said_to_have_been_unable_to_start(agent):
    batch = agent.batch(ALPHA)
    gate = agent.hold_load(batch, issue=1)
    id = agent.job("load-batch", ALPHA)
    kill_at(agent, gate, "load_batch")
    agent.ended(id)
    gate = agent.hold(batch / "purge-gate")
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    no_shebang(agent.oni / "manage.py")
    gate.open()
    job = agent.ended(id)
    assert job["status"] == "failed"
    assert f"couldn't run {agent.oni / 'manage.py'}: " in job["error"]
    assert job["error"].endswith("; ONI holds nothing of the batch")
    assert agent.held(ALPHA) == (0, 0, 0)


def test_an_open_oni_that_answers_late_is_said_to_while_jobs_wait_for_it(site):
    seconds = round(busy(4))
    agent = hurry(site, ANSWER_SECONDS=seconds)
    gate = agent.hold_load(agent.batch(BETA))
    agent.batch(ALPHA)
    id = agent.job("load-batch", BETA)
    gate.reached()
    asked = {
        f'"{ALPHA}" cannot be loaded': ("load-batch", ALPHA),
        f'"{ALPHA}" cannot be purged': ("purge-batch", ALPHA),
        "Unable to create awardee": ("ensure-awardee", "dlc", "Library of Congress"),
    }
    with contextlib.closing(
        sqlite3.connect(agent.oni / "oni.sqlite3", isolation_level=None)
    ) as database:
        database.execute("BEGIN EXCLUSIVE")
        gate.open()
        *replies, other = at_once(
            *[lambda words=words: agent.call(*words) for words in asked.values()],
            lambda: agent.call("version"),
        )
    assert [(reply["message"], reply["error"]) for reply in replies] == [
        (message, f"Open ONI did not answer within {seconds} s") for message in asked
    ]
    assert other["status"] == "success"
    assert awardees(agent, "dlc") == []
    assert agent.ended(id)["status"] == "successful"
    assert (
        agent.call("ensure-awardee", "dlc", "Library of Congress")["message"] == "Awardee created"
    )
    assert agent.run("load-batch", ALPHA)["status"] == "successful"


def test_broken_settings_are_named_and_mended_ones_used(site):
    site.batch(ALPHA)
    settings = settings_local(site, "raise ValueError('no such password')\n")
    site.start()
    for _ in range(2):
        reply = site.call("load-batch", ALPHA)
        assert reply["message"] == f'"{ALPHA}" cannot be loaded'
        assert reply["error"] == "Open ONI cannot be asked: ValueError: no such password"
    settings.unlink()
    assert site.run("load-batch", ALPHA)["status"] == "successful"


@pytest.mark.parametrize("warm", [True, False])
def test_a_database_that_is_down_is_said_and_one_that_is_up_again_asked(agent, warm):
    agent.batch(ALPHA)
    gate = agent.hold_load(agent.batch(BETA))
    if warm:
        agent.call("ensure-awardee", "oru")
    with agent.database_down():
        for words, message in (
            (("load-batch", ALPHA), f'"{ALPHA}" cannot be loaded'),
            (("purge-batch", ALPHA), f'"{ALPHA}" cannot be purged'),
            (("ensure-awardee", "oru"), "Unable to create awardee"),
        ):
            reply = agent.call(*words)
            assert (reply["status"], reply["message"]) == ("error", message)
            assert (
                reply["error"]
                == "Open ONI cannot answer: OperationalError: unable to open database file"
            )
    assert agent.call("list-jobs")["jobs"] == []
    agent.job("load-batch", BETA)
    waiting = agent.job("load-batch", ALPHA)
    gate.reached()
    with agent.database_down():
        gate.open()
        job = agent.ended(waiting)
    assert (job["status"], job["error"]) == (
        "failed",
        "Open ONI cannot answer: OperationalError: unable to open database file",
    )
    for name in (ALPHA, BETA):
        repaired(agent, "load-batch", name)
        assert agent.held(name) == (1, 2, 4)


def purge_without_solr(site: Site) -> None:
    """What ONI leaves of ALPHA that has purged it by itself while Solr was down."""
    with site.solr.down():
        assert site.manage("purge_batch", ALPHA).returncode == 1
    assert site.held(ALPHA) == NOTHING


def test_a_purge_without_solr_is_done_only_when_the_index_has_forgotten_the_batch(agent):
    agent.batch(ALPHA)
    agent.batch(BETA, start=date(1910, 1, 1))
    repaired(agent, "load-batch", ALPHA)
    repaired(agent, "load-batch", BETA)
    purge_without_solr(agent)
    assert len(agent.solr.documents(ALPHA)) == 4
    assert word(agent) == ["absent", 0, 0, 2, 4, 4]
    assert listed(agent) == word(agent)
    assert "still has 4 of its pages" in agent.call("batch-status", ALPHA)["message"]
    mended(agent, "purge-batch", ALPHA)
    assert agent.solr.documents(ALPHA) == []
    assert len(agent.solr.documents(BETA)) == 4
    assert word(agent) == ["absent", 0, 0, 2, 4, 0]


def test_what_a_failed_purge_has_left_in_the_index_is_gone_when_the_batch_is_loaded_again(agent):
    agent.batch(ALPHA, issues=3)
    repaired(agent, "load-batch", ALPHA)
    purge_without_solr(agent)
    shutil.rmtree(agent.source / ALPHA)
    agent.batch(ALPHA, issues=1)
    mended(agent, "load-batch", ALPHA)
    assert len(agent.solr.documents(ALPHA)) == 2
    assert word(agent) == ["complete", 1, 2, 1, 2, 2]


@pytest.mark.parametrize("how", ["down", "failing", "hanging"])
def test_without_solr_a_request_is_a_job_that_waits_and_does_nothing(site, how):
    hurry(site, SOLR_SECONDS=1, PATIENT_SECONDS=busy(1.5))
    site.batch(ALPHA)
    repaired(site, "load-batch", ALPHA)
    before = site.held(ALPHA), site.events(ALPHA), site.solr.documents()
    with getattr(site.solr, how)():
        assert word(site)[0] == "unknown"
        for command in ("load-batch", "purge-batch"):
            job = site.run(command, ALPHA)
            assert job["status"] == "failed"
            assert "Solr cannot be asked (" in job["error"]
            assert (site.held(ALPHA), site.events(ALPHA)) == before[:2]
    assert site.solr.documents() == before[2]
    assert without_session(site.call("load-batch", ALPHA)) == NOOP


def test_an_index_emptied_while_solr_is_down_at_a_loads_end_is_no_success(site):
    hurry(site, SOLR_SECONDS=1, PATIENT_SECONDS=busy(1.5))
    end = gate_in_manage(site, "load_batch", at_exit=True)
    site.batch(ALPHA)
    id = site.job("load-batch", ALPHA)
    end.reached()
    with site.solr.down():
        site.solr.forget(ALPHA)
        end.open()
        job = site.ended(id)
    assert job["status"] == "failed"
    assert "Solr cannot be asked" in job["error"]
    assert word(site) == ["partial", 2, 4, 2, 4, 0]
    mended(site, "load-batch", ALPHA)


LOGGING_TO_A_FILE = """
LOGGING = {
    "version": 1,
    "disable_existing_loggers": True,
    "handlers": {"file": {"class": "logging.FileHandler", "filename": "log/site.log"}},
    "root": {"handlers": ["file"], "level": "DEBUG"},
}
"""


def test_success_is_not_read_from_what_manage_py_prints(site):
    settings_local(site, LOGGING_TO_A_FILE)
    site.start()
    job = site.run("load-title", stdin=marc_xml())
    assert (job["status"], titles(site)) == ("successful", ["The sample herald."])
    site.batch(ALPHA)
    assert site.run("load-batch", ALPHA)["status"] == "successful"
    assert site.run("purge-batch", ALPHA)["status"] == "successful"


@pytest.mark.parametrize("when", ["no agent is there", "another agent is there", "it is watched"])
def test_a_load_that_skips_a_page_is_failed_whoever_sees_its_end(agent, when):
    batch = agent.batch(ALPHA, issues=3)
    gate = agent.hold_load(batch)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    spoil_sequence(batch)  # in an issue that is yet to be loaded
    if when == "another agent is there":
        agent.restart().wait_for("adopted=")
    if when == "no agent is there":
        agent.kill()
    gate.open()
    if when == "no agent is there":
        until(lambda: not agent.manage_pids("load_batch"))
        agent.start()
    job = agent.ended(id)
    assert (job["status"], agent.held(ALPHA)) == ("failed", (1, 3, 5))
    assert agent.call("batch-status", ALPHA)["batch"]["state"] == "partial"


def test_a_manage_py_that_starts_slowly_is_waited_for_and_progress_then_shown(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    kill_warm_child(agent)
    start = gate_in_manage(agent, "shell")
    assert agent.call("job-status", str(id))["job"]["status"] == "started"
    start.reached()
    pid = agent.zygote()
    for _ in range(4):
        assert "issues_loaded" not in agent.call("job-status", str(id))["job"]
    assert agent.manage_pids("shell") == [pid]  # still the first, which has forked nothing yet
    start.open()
    until(lambda: "issues_loaded" in agent.call("job-status", str(id))["job"])
    assert agent.zygote() == pid
    gate.open()
    assert agent.ended(id)["status"] == "successful"


def test_progress_that_open_oni_tells_too_late_is_shown_the_next_time(site):
    gate = site.hold_load(site.batch(ALPHA))
    query = held_question(site, "no query")
    hurry(site, PROGRESS_SECONDS=0.1)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    (site.oni / "held-query").write_text('FROM "core_issue"')
    assert "issues_loaded" not in site.call("job-status", str(id))["job"]
    query.reached()
    (site.oni / "held-query").write_text("no query")
    query.open()
    assert until(lambda: "issues_loaded" in site.call("job-status", str(id))["job"])
    gate.open()
    assert site.ended(id)["status"] == "successful"


def test_a_page_skipped_while_the_disk_is_full_is_missed(disk, witnessed):
    site = witnessed.start()
    batch = site.batch(ALPHA, issues=3)
    gate = site.hold_load(batch)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    spoil_sequence(batch)
    disk.fill()
    gate.open()
    until(lambda: not site.manage_pids("load_batch"))
    disk.free()
    job = site.ended(id)
    assert (job["status"], site.held(ALPHA)) == ("failed", (1, 3, 5))


# --- Promises: batch-check: what Open ONI would do, Open ONI says ---------------------------------

def refused_missing(batch: Path) -> str:
    path = next(batch.glob("data/*/print/*/1900010101.xml"))
    path.unlink()
    return f"open {path}: no such file or directory"


def refused_folder(batch: Path) -> str:
    path = next(batch.glob("data/*/print/*/1900010101.xml"))
    path.unlink()
    path.mkdir()
    return f"{path} is not a regular file"


def refused_fifo(batch: Path) -> str:
    (batch / "data/batch.xml").unlink()
    os.mkfifo(batch / "data/batch.xml")
    return "batch.xml is not a regular file"


def refused_xml(batch: Path) -> str:
    (batch / "data/batch.xml").write_text("<batch>")
    return "batch.xml: Premature end of data in tag batch line 1"


def refused_path(batch: Path) -> str:
    text = (batch / "data/batch.xml").read_text()
    (batch / "data/batch.xml").write_text(
        re.sub(r"\./\S+?\.xml</issue>", "../../../../../etc/passwd</issue>", text)
    )
    return "lies outside the batch's folder"


@pytest.mark.parametrize(
    "spoil",
    [
        refused_missing,
        refused_folder,
        refused_fifo,
        refused_xml,
        refused_path,
    ],
)
def test_a_batch_with_broken_files_is_refused_and_says_which(shared, spoil):
    name = f"batch_oru_{spoil.__name__}_ver01"
    said = spoil(shared.batch(name))
    jobs = shared.call("list-jobs")["jobs"]
    reply = shared.call("load-batch", name)
    assert reply["message"] == f'"{name}" cannot be loaded'
    assert said in reply["error"]
    assert shared.call("list-jobs")["jobs"] == jobs


def test_a_batch_with_a_doctype_is_loaded(agent):
    listing = agent.batch(ALPHA) / "data/batch.xml"
    change(listing, "\n<batch ", '\n<!DOCTYPE batch [<!ENTITY a "b">]>\n<batch ')
    repaired(agent, "load-batch", ALPHA)
    assert agent.held(ALPHA) == (1, 2, 4)


def test_a_batch_of_an_awardee_that_open_oni_lacks_is_refused_until_it_is_made(agent):
    name = agent.batch("batch_zzz_x_ver01").name
    reply = agent.call("load-batch", name)
    assert (reply["status"], reply["message"]) == ("error", f'"{name}" cannot be loaded')
    assert reply["error"] == (
        'Open ONI has no awardee "zzz"; to make it: ensure-awardee zzz "NAME"'
    )
    assert agent.call("list-jobs")["jobs"] == []
    agent.call("ensure-awardee", "zzz", "The Zzz Library")
    repaired(agent, "load-batch", name)
    assert agent.held(name) == (1, 2, 4)


REFUSED_FAULTS = {  # what is said at the request, after the batch's folder
    "METS missing": "reading file: open FOLDER/METS: no such file or directory",
    "batch.xml missing": "reading file: open FOLDER/data/batch.xml: no such file or directory",
    "batch.xml cut off": "reading file: FOLDER/data/batch.xml: Premature end of data .*, line .*",
    "no issues": "FOLDER/data/batch.xml names no issue, so ONI would load nothing",
    "awardee unknown": (
        'Open ONI has no awardee "zzz"; to make it: ensure-awardee zzz "NAME"'
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_before_a_load_or_does_no_harm(odd_site, name):
    fault = FAULTS[name]
    batch = odd_site.batch(batch_with(name), issues=3)
    fault.spoil(batch)
    harmless = (fault.held, fault.indexed) == ((1, 3, 6), 6)
    assert (name in REFUSED_FAULTS) + (name in FOUND_FAULTS) == (not harmless)
    events = odd_site.events(batch.name)
    reply = odd_site.call("load-batch", batch.name)
    if name in REFUSED_FAULTS:
        assert reply["message"] == f'"{batch.name}" cannot be loaded'
        said = REFUSED_FAULTS[name].replace("METS", METS_2).replace("FOLDER", str(batch))
        assert re.fullmatch(said, reply["error"])
        assert "job" not in reply
    else:
        job = odd_site.ended(reply["job"]["id"])
    if harmless:
        assert (job["status"], odd_site.held(batch.name)) == ("successful", fault.held)
        warned = [line for line in odd_site.logs(job["id"]) if line.startswith("warning: ")]
        no_picture = f"{IN_ISSUE}0002.jp2: there is no such image"
        assert warned == [f"warning: {no_picture}"] * (name == "jp2 missing")
        assert odd_site.run("purge-batch", batch.name)["status"] == "successful"
        return
    assert odd_site.held(batch.name) == NOTHING
    assert odd_site.solr.documents(batch.name) == []
    assert odd_site.events(batch.name) == events
    assert not os.path.lexists(odd_site.oni / "data/batches" / batch.name)
    if name in REFUSED_FAULTS:
        return
    assert job["status"] == "failed"
    found = [f"{file}: {said}" for file, said in FOUND_FAULTS[name]]
    count = f"{len(found)} fault{'s' * (len(found) > 1)}"
    told = f"{count} in the batch's files: {'; '.join(found)}; ONI was left as it is"
    assert re.fullmatch(told, job["error"])
    logs = odd_site.logs(job["id"])
    assert len(logs) == len(found)
    for said, line in zip(found, logs):
        assert re.fullmatch(f"fault: {said}", line)


def test_names_that_are_no_text_do_no_harm(agent):
    os.mkdir(os.fsencode(agent.source) + b"/batch_oru_alph\xe9_ver01")
    os.mkdir(os.fsencode(agent.batch(BETA)) + b"/data/caf\xe9")
    os.mkfifo(os.fsencode(agent.source / BETA) + b"/data/caf\xe9/fifo")
    assert "no such file" in agent.call("load-batch", ALPHA)["error"]
    agent.run("load-batch", BETA)
    job = agent.run("batch-patch", BETA, ALPHA, stdin=f"RemoveIssue {GAZETTE}/1900010101".encode())
    assert job["status"] == "failed"
    assert "cannot be copied" in job["error"]


@in_process
def test_a_new_batch_that_its_check_refuses_never_has_its_name(tmp_path):
    old = make_batch(tmp_path, ALPHA, 2, 1)
    patch = oni_agent.Patch(old, {f"{GAZETTE}/1900010101": "the first"})
    looked_at = []

    def refuse(folder: Path) -> None:
        looked_at.append((folder / "data/batch.xml").read_bytes())
        raise oni_agent.Problem("it would not load")

    with pytest.raises(oni_agent.Problem, match="it would not load"):
        patch.make(tmp_path / BETA, print, check=refuse)
    assert looked_at == [patch.listing]
    assert os.listdir(tmp_path) == [ALPHA]


ALIKE = sorted(set(ODDITIES) - {"METS with %20 in its name"})  # libxml2 from 2.11 on refuses it


def drafts(source: Path, count: int, seed: int, oddities: list[str]) -> list[Draft]:
    """So many batches, with no oddity to four of them each; days that none shares with another."""
    made = []
    for number in range(count):
        chance = random.Random(f"{seed}/{number}")
        start = date(1700, 1, 1) + timedelta(days=4 * number)
        draft = Draft(source, f"batch_oru_odd{seed}x{number}_ver01", chance, start)
        for oddity in chance.sample(oddities, chance.choice([0, 1, 1, 1, 2, 2, 3, 4])):
            draft.make_odd(oddity)
        made.append(draft)
    return made


LOAD_ALL = """
import json, sys
from django.core.management import call_command
from core import solr_index
from core.models import Issue, Page
for line in sys.stdin:
    path = line.rstrip("\\n")
    status, name = 0, path.split("/")[-1]
    try:
        call_command("load_batch", path)
    except BaseException:
        status = 1
    pages = Page.objects.filter(issue__batch_id=name)
    indexed = pages.filter(indexed=True)
    places = indexed.values_list("issue__title", "issue__date_issued", "issue__edition", "sequence")
    print("held", json.dumps({
        "status": status,
        "held": [Issue.objects.filter(batch_id=name).count(), pages.count(), indexed.count()],
        "lost": len(set(places)) - solr_index.conn().search('batch:"%s"' % name, rows=0).hits,
    }), flush=True)
"""


def open_onis_verdicts(oni: oni_agent.OpenONI, made: list[Draft]) -> list[tuple[bool, bool, str]]:
    """Whether ONI breaks off each load, whether it is whole, and what ONI then has, in words."""
    code = f"exec({LOAD_ALL!r})"
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with oni.start("shell", "-c", code, **options) as process:
        printed = process.communicate("".join(f"{draft.path}\n" for draft in made).encode())[0]
    lines = re.findall(r"^held (.*)", printed.decode(), re.MULTILINE)
    assert len(lines) == len(made)
    verdicts = []
    for draft, line in zip(made, map(json.loads, lines)):
        whole = line == {"status": 0, "held": draft.whole, "lost": 0}
        told = f"{line}, would be whole with {draft.whole}"
        verdicts.append((line["status"] != 0, whole, told))
    return verdicts


def agents_verdicts(site: oni_agent.Site, made: list[Draft]) -> list[list[dict]]:
    """The faults that the agent finds in each of these batches."""
    nothing = lambda *_: None
    return [site.check(draft.path.name, nothing, nothing).faults for draft in made]


def own_site(oni: Path, source: Path, state: Path, environment: dict[str, str]) -> oni_agent.Site:
    """The part of an agent that looks at ONI and at batches, without the rest of it."""
    settings = types.SimpleNamespace(batch_source=source, state_directory=state)
    return oni_agent.Site(settings, oni_agent.OpenONI(oni, environment))


def disagreements(site: oni_agent.Site, made: list[Draft]) -> tuple[list[str], list[str]]:
    """False alarms and misses: where the agent's verdict is not what ONI then does."""
    found = agents_verdicts(site, made)
    alarms, misses = [], []
    for draft, faults, verdict in zip(made, found, open_onis_verdicts(site.oni, made)):
        broken_off, whole, held = verdict
        told = f"{draft.path.name} {draft.oddities}: {faults}; ONI: {held}"
        if faults and whole:
            alarms.append(told)
        says_broken_off = any("ONI would break off the load" in each["fault"] for each in faults)
        if bool(faults) == whole or says_broken_off != broken_off:
            misses.append(told)
    return alarms, misses


CHECK_BATCHES = int(os.environ.get("CHECK_BATCHES", 40))

CHECK_SEED = int(os.environ.get("CHECK_SEED", 1))


@contextlib.contextmanager
def looking(site: Site):
    state = site.oni / "state"
    state.mkdir(exist_ok=True)
    own = own_site(site.oni, site.source, state, site.environment)
    try:
        yield own
    finally:
        own.oni.close()


def test_the_verdict_on_a_batch_is_what_open_oni_then_does(site):
    with MarcSite("sn99990077") as marc:
        site.environment.update(marc.environment)
        with looking(site) as own:
            made = drafts(site.source, CHECK_BATCHES, CHECK_SEED, ALIKE)
            assert disagreements(own, made) == ([], [])


def one_of_each(source: Path) -> list[Draft]:
    """For each oddity, but those with tests of their own, a batch that has it, and no other."""
    made = []
    for number, oddity in enumerate(sorted(set(ALIKE) - {*MISSED_ONCE, *CALLED_FAULTY_ONCE})):
        start = date(1700, 1, 1) + timedelta(days=4 * number)
        name = f"batch_oru_one{number}_ver01"
        draft = Draft(source, name, random.Random(oddity), start)
        if oddity in FAULTS:  # these are made for batches of one size
            shutil.rmtree(draft.path)
            draft.issues, draft.pages, draft.listed = 3, 2, [0, 1, 2]
            make_batch(source, name, 3, 2, start=start)
        ODDITIES[oddity](draft)
        draft.oddities.append(oddity)
        made.append(draft)
    return made


@pytest.mark.parametrize("lane", range(4))
def test_the_verdict_on_each_oddity_alone_is_what_open_oni_then_does(site, lane):
    with MarcSite("sn99990077") as marc:
        site.environment.update(marc.environment)
        with looking(site) as own:
            assert disagreements(own, one_of_each(site.source)[lane::4]) == ([], [])


def test_a_batch_without_issues_is_refused_and_never_complete(agent):
    spoil_issues(agent.batch(ALPHA))
    reply = agent.call("load-batch", ALPHA)
    assert (reply["status"], reply["message"]) == ("error", f'"{ALPHA}" cannot be loaded')
    assert "names no issue" in reply["error"]
    assert agent.manage("load_batch", str(agent.source / ALPHA)).returncode == 0
    assert word(agent)[0] != "complete"
    assert listed(agent)[0] == word(agent)[0]
    assert agent.call("load-batch", ALPHA)["status"] == "error"


def test_an_unknown_awardee_is_refused_with_the_command_that_makes_it(agent):
    name = batch_with("awardee unknown")
    agent.batch(name)
    error = agent.call("load-batch", name)["error"]
    command = re.search(r"ensure-awardee zzz .*", error)[0]
    assert checked(agent, name)[0] == 1
    assert agent.ssh(command.replace("NAME", "The library"))["status"] == "success"
    mended(agent, "load-batch", name)


def test_titles_that_open_oni_lacks_are_fetched_before_the_load(site):
    with MarcSite("sn99990077") as marc:
        site.start(**marc.environment)
        site.batch(ALPHA, lccn="sn99990077")
        assert checked(site, ALPHA)[1]["faults"] == []
        assert titles(site, "sn99990077") == []
        logs = mended(site, "load-batch", ALPHA)
        fetched = logs.index("ONI lacks the title sn99990077, which was fetched")
        loaded = next(n for n, line in enumerate(logs) if "loading batch at" in line)
        assert fetched < loaded
        assert not any("attempting to load marc record" in line for line in logs)
        assert titles(site, "sn99990077") == ["The fetched sn99990077."]


def test_a_title_that_nobody_has_is_a_fault_that_names_its_lccn(site):
    with MarcSite() as marc:
        site.start(**marc.environment)
        site.batch(ALPHA, lccn="sn99990078")
        status, answer = checked(site, ALPHA)
        assert status == 1
        assert "sn99990078" in answer["faults"][0]["fault"]
        job = site.run("load-batch", ALPHA)
        assert (job["status"], "sn99990078" in job["error"]) == ("failed", True)
        assert site.events(ALPHA) == []


def test_a_load_with_faults_leaves_a_partial_batch_as_it_is_and_says_all_of_them(agent):
    batch = agent.batch(ALPHA, issues=3)
    repaired(agent, "load-batch", ALPHA)
    with contextlib.closing(sqlite3.connect(agent.oni / "oni.sqlite3")) as database:
        database.execute("UPDATE core_loadbatchevent SET message = 'starting load'")
        database.commit()
    before = agent.held(ALPHA), agent.events(ALPHA), agent.solr.documents()
    page_file(batch, "0001.xml", 2).write_text("<alto>\n")
    spoil_sequence(batch)
    status, answer = checked(agent, ALPHA)
    assert (status, answer["status"], answer["batch"]["name"]) == (1, "success", ALPHA)
    assert [fault["file"].split("/")[-1] for fault in answer["faults"]] == [
        "1900010201.xml",
        "0001.xml",
    ]
    job = agent.run("load-batch", ALPHA)
    assert (job["status"], job["attempts"]) == ("failed", 1)
    assert all(fault["fault"] in job["error"] for fault in answer["faults"])
    logs = agent.logs(job["id"])
    assert all(any(fault["fault"] in line for line in logs) for fault in answer["faults"])
    assert not any("loading batch" in line or "purging" in line for line in logs)
    assert (agent.held(ALPHA), agent.events(ALPHA), agent.solr.documents()) == before


def test_what_is_odd_but_loads_is_a_warning_and_no_fault(agent):
    batch = agent.batch(ALPHA, issues=3)
    spoil_jp2_missing(batch)
    page_file(batch, "0001.pdf").unlink()
    status, answer = checked(agent, ALPHA)
    assert (status, answer["faults"]) == (0, [])
    told = [(each["file"].split("/")[-1], each["warning"]) for each in answer["warnings"]]
    assert sorted(told) == [
        ("0001.pdf", "there is no such PDF"),
        ("0002.jp2", "there is no such image"),
    ]
    mended(agent, "load-batch", ALPHA)


def test_a_check_changes_nothing_in_open_oni(agent):
    batch = agent.batch(ALPHA, lccn="sn99990079")
    before = tree(agent.oni, "oni.sqlite3"), agent.query("SELECT count(*) FROM core_title")
    files = files_of(batch)
    del agent.solr.requests[:]
    checked(agent, ALPHA)
    after = tree(agent.oni, "oni.sqlite3"), agent.query("SELECT count(*) FROM core_title")
    assert after == before
    assert files_of(batch) == files
    assert not any("/update" in path for path in agent.solr.requests)


def test_a_batch_that_is_not_there_cannot_be_checked(agent):
    agent.batch(ALPHA)
    status, answer = checked(agent, "batch_oru_alpa_ver01")
    assert (status, answer["status"]) == (0, "error")
    assert answer["error"].endswith(f'did you mean "{ALPHA}"?')


def test_a_batch_whose_folder_is_gone_and_that_open_oni_holds_is_said_to_be_held(agent):
    batch = agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    batch.rename(batch.with_name("elsewhere"))
    status, answer = checked(agent, ALPHA)
    assert (status, answer["status"]) == (0, "error")
    assert answer["error"] == f"Open ONI holds it, but its files are not there: {batch} is missing"


def test_a_job_whose_check_somebody_has_killed_checks_anew(site):
    with MarcSite("sn99990077") as marc:
        site.start(**marc.environment)
        site.batch(ALPHA, lccn="sn99990077")
        marc.may_answer.clear()
        id = site.job("load-batch", ALPHA)
        assert marc.was_asked.wait(60)
        for pid in site.manage_pids("shell"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        marc.may_answer.set()
        assert site.ended(id)["status"] == "successful"


class ImpatientSite(oni_agent.Site):
    """A site whose check looks at once whether anybody waits for it."""

    def check(self, name, progress, go_on, folder="", patience=0.0):
        go_on()
        return oni_agent.Check([{**NOTHING_FOUND, "of": 0}])


NOTHING_FOUND = {
    "issues": 0, "faults": [], "warnings": [], "found": [], "titles": {},
    "watched": oni_agent.packed({}),
}  # fmt: skip


@in_process
def test_a_check_never_ends_before_its_client_waits_for_it(tmp_path):
    settings = types.SimpleNamespace(batch_source=tmp_path, state_directory=tmp_path)
    site = ImpatientSite(settings, oni_agent.OpenONI(tmp_path, {}))
    for _ in range(100):
        assert site.client_check(ALPHA, lambda: None).faults == []


@pytest.mark.parametrize("name", ["data/batch.xml", "METS", "OCR"])
def test_what_is_no_regular_file_is_a_fault_and_is_not_waited_for(agent, name):
    batch = agent.batch(ALPHA, issues=1)
    mets = mets_of(batch, 0)
    path = {"METS": mets, "OCR": mets.with_name("0001.xml")}.get(name, batch / name)
    path.unlink()
    os.mkfifo(path)
    status, answer = checked(agent, ALPHA)
    what = "this is not a regular file, and ONI might read it for ever"
    assert status == 1
    assert answer["faults"] == [{"file": str(path.relative_to(batch)), "fault": what}]


def test_a_file_that_takes_all_memory_is_no_fault_and_is_named(agent):
    batch = agent.batch(ALPHA, issues=1)
    mets = mets_of(batch, 0)
    start, end, rest = mets.read_bytes().rpartition(b"</")
    with mets.open("wb") as file:
        file.write(start)
        for _ in range(160):
            file.write(b"<a/>" * 100_000)
        file.write(end + rest)
    status, answer = checked(agent, ALPHA)
    assert (status, answer["status"]) == (0, "error")
    assert answer["error"] == f"reading {mets.relative_to(batch)} takes more than 1024 MiB"


def test_a_fault_names_its_file_once(agent):
    batch = agent.batch(ALPHA, issues=1)
    mets_of(batch, 0).with_name("0001.xml").unlink()
    said = checked(agent, ALPHA)[1]["faults"][0]["fault"]
    reason = "<urlopen error [Errno 2] No such file or directory>"
    assert said == f"ONI would break off the load: {reason}"
    mets_of(batch, 0).with_name("0001.xml").write_text("<alto>\n</page>")
    said = checked(agent, ALPHA)[1]["faults"][0]["fault"]
    assert said == "ONI would break off the load: line 2, column 2: mismatched tag"


def test_a_batch_whose_every_file_is_broken_is_still_checked(agent):
    batch = agent.batch(ALPHA, issues=1)
    cut_off(mets_of(batch, 0))
    status, answer = checked(agent, ALPHA)
    assert (status, len(answer["faults"])) == (1, 1)


@pytest.mark.parametrize("name", ["klingon", "Shift_JIS"])
def test_an_encoding_that_cannot_be_read_is_a_fault_and_no_failure_to_check(agent, name):
    ocr = page_file(agent.batch(ALPHA), "0001.xml")
    change(ocr, 'encoding="UTF-8"', f'encoding="{name}"')
    status, answer = checked(agent, ALPHA)
    assert (status, [fault["file"].split("/")[-1] for fault in answer["faults"]]) == (
        1,
        ["0001.xml"],
    )


AS_LIBXML2_IS = {"METS ending in NUL bytes", "METS with an external entity"}  # faults to later ones

SENTENCES = {  # of the kinds in MISSED_ONCE: the file, and the sentence, of the first fault
    "an emoji in an issue's note": (
        "METS",
        ENDS_LOAD + "Incorrect string value for column 'text': it cannot hold U[+]1F4F0",
    ),
    "an emoji in OCR": (
        "OCR",
        ENDS_LOAD + "Incorrect string value for column 'text': it cannot hold U[+]1F4F0",
    ),
    "an emoji in a file's name": (
        "METS",
        f"page \\d: {ENDS_LOAD}Incorrect string value for column 'jp2_filename': it cannot hold .*",
    ),
    "a volume of 51 characters": (
        "METS",
        ENDS_LOAD + "Data too long for column 'volume': 51 characters, and it holds 50",
    ),
    "a page number with its caption, indented": (
        "METS",
        rf"page \d: {ENDS_LOAD}Data too long for column 'number': \d\d characters, and it holds 50",
    ),
    "a section that is not described": ("METS", rf"page \d: {ENDS_LOAD}list index out of range"),
    "ALTO in the language sk": ("OCR", ENDS_LOAD + "get.. returned more than one Language.*"),
    "second np:issue with a page": (
        "METS",
        r"ONI would leave out \d of \d pages without a word",
    ),
    "a page outside np:issue": ("METS", r"ONI would leave out 1 of \d pages without a word"),
    'USE="OCR"': ("METS", r"ONI would leave out the OCR file ocr\d"),
    "a jp2 cut to 40 bytes, unmeasured": ("METS", rf"page \d: {ENDS_LOAD}.*"),
    "METS in latin-1": ("METS", ENDS_LOAD + ".*encoding.*"),
    "METS nested 300 deep": ("METS", ENDS_LOAD + "Excessive depth in document: 256.*"),
    "width of 64px": (
        "METS",
        r"ONI would leave out the rest of the issue, from page \d on: .*'64px'.*",
    ),
    "sequence of 2^31": (
        "METS",
        rf"page \d: {ENDS_LOAD}Out of range value for column 'sequence': 2147483648",
    ),
}


@pytest.mark.parametrize("kind", [*MISSED_ONCE, *CALLED_FAULTY_ONCE])
def test_what_a_check_says_of_an_oddity_is_what_a_load_then_does(odd_site, kind):
    draft = new_draft(odd_site, kind)
    ODDITIES[kind](draft)
    answer = compare_with_load(odd_site, draft)
    if kind in CALLED_FAULTY_ONCE and kind not in AS_LIBXML2_IS:
        assert answer["faults"] == []
    if kind in SENTENCES:
        which, said = SENTENCES[kind]
        [fault] = answer["faults"]
        name = draft.mets if which == "METS" else draft.file("xml")
        assert fault["file"] == name.relative_to(draft.path).as_posix()
        assert re.fullmatch(said, fault["fault"])


@pytest.mark.parametrize("kind", ["edition -1", "sequence of eleven digits"])
def test_what_no_column_takes_ends_the_load_and_leaves_out_nothing(odd_site, kind):
    draft = new_draft(odd_site, kind)
    ODDITIES[kind](draft)
    [fault] = compare_with_load(odd_site, draft)["faults"]
    assert ENDS_LOAD in fault["fault"]


def test_what_django_refuses_comes_before_what_the_database_refuses(odd_site):
    """The one leaves out the rest of the issue, the other ends the load."""
    draft = new_draft(odd_site, "two faults of a page")
    for kind in ("an emoji in a file's name", "width 5200.0"):
        ODDITIES[kind](draft)
    [fault] = compare_with_load(odd_site, draft)["faults"]
    assert "ONI would leave out the rest of the issue" in fault["fault"]


def test_of_a_list_that_is_read_in_the_place_of_batch_xml_the_fault_is_told(odd_site):
    draft = new_draft(odd_site, "a broken list")
    (draft.path / "data/batch_1.xml").write_text("<batch>")
    [fault] = compare_with_load(odd_site, draft)["faults"]
    assert fault["file"] == "data/batch_1.xml"


def test_of_a_mets_file_that_is_missing_it_is_said_that_it_is(odd_site):
    draft = new_draft(odd_site, "no METS")
    draft.mets.unlink()
    [fault] = compare_with_load(odd_site, draft)["faults"]
    assert fault["fault"] == f"{ENDS_LOAD}it is missing, or cannot be read"


def test_a_batch_whose_name_is_too_long_is_a_fault(odd_site):
    name = f"batch_oru_{'x' * 251}_ver01"[:245] + "_ver01"
    assert len(name) == 251
    draft = Draft(odd_site.source, name, random.Random(1), date(1650, 1, 1))
    [fault] = compare_with_load(odd_site, draft)["faults"]
    assert (fault["file"], "Data too long for column" in fault["fault"]) == ("data/batch.xml", True)


def test_without_languages_each_batch_with_a_text_is_a_fault(agent):
    agent.execute("PRAGMA foreign_keys = OFF")
    agent.execute("DELETE FROM core_language")
    draft = new_draft(agent, "no language")
    faults = compare_with_load(agent, draft)["faults"]
    assert {fault["fault"] for fault in faults} == {
        ENDS_LOAD + "Language matching query does not exist."
    }


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_a_record_that_poisons_a_batch_is_a_fault_with_its_address(odd_site, kind):
    lccn, _, said = BAD_RECORDS[kind]
    number = next(FRESH)
    start = date(1700, 1, 1) + timedelta(days=4 * number)
    name = f"batch_oru_marc{number}_ver01"
    draft = Draft(odd_site.source, name, random.Random(kind), start)
    for issue in range(draft.issues):
        mets = mets_of(draft.path, issue)
        mets.write_text(mets.read_text().replace(">sn99990001<", f">{lccn}<"))
    [fault] = compare_with_load(odd_site, draft)["faults"]
    url = rf"http://127\.0\.0\.1:\d+/lccn/{lccn}/marc\.xml"
    if "would store" in said:  # what becomes of the load, ONI's loader says then
        told = rf".*: the title {lccn}, as {url} has it: (Reverse for|invalid literal for int).*"
    else:
        told = rf"{ENDS_LOAD}ONI does not have the title {lccn}, nor has {url}: .*{said}"
    assert re.fullmatch(told, fault["fault"])


@pytest.mark.parametrize("where", ["by a link", "by its path"])
def test_of_a_file_elsewhere_on_the_host_nothing_is_told(agent, tmp_path, where):
    secret = tmp_path / "secret"
    secret.write_text("root:hidden:0")
    batch = agent.batch(ALPHA, issues=3)
    if where == "by a link":
        mets_of(batch).unlink()
        mets_of(batch).symlink_to(secret)
        [fault] = checked(agent, ALPHA)[1]["faults"]
        assert fault["file"] == METS_2
    else:
        replace(mets_of(batch), 'href="0002.xml"', f'href="{secret}"')
        [fault] = checked(agent, ALPHA)[1]["faults"]
    said = "it lies outside" if where == "by a link" else f"{secret}, which it names, lies outside"
    page = "" if where == "by a link" else "page 2: "
    assert fault == {
        "file": METS_2, "fault": f"{page}{ENDS_LOAD}{said} the batch, and cannot be taken"
    }
    job = agent.run("load-batch", ALPHA)
    assert job["status"] == "failed"
    assert "hidden" not in json.dumps([job, agent.call("job-logs", str(job["id"]))])


def test_an_entity_of_another_file_is_not_shown(agent, tmp_path):
    (tmp_path / "secret").write_text("hidden")
    draft = new_draft(agent, "entity")
    entity = f'[<!ENTITY e SYSTEM "{tmp_path}/secret">]'
    replace(draft.mets, HEAD, doctype("mets", entity))
    replace(draft.mets, EDITION, EDITION.replace("1", "&e;"))
    [fault] = compare_with_load(agent, draft)["faults"]  # of one kind or the other, as libxml2 is
    assert "hidden" not in fault["fault"]


WARNINGS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "an image is missing": (spoil_jp2_missing, IN_ISSUE + "0002.jp2", "there is no such image"),
    "an image is empty": (
        lambda batch: page_file(batch, "0002.jp2").write_bytes(b""),
        IN_ISSUE + "0002.jp2",
        "this image is empty",
    ),
    "a PDF is missing": (
        lambda batch: page_file(batch, "0001.pdf").unlink(),
        IN_ISSUE + "0001.pdf",
        "there is no such PDF",
    ),
    "an OCR file has no text": (
        lambda batch: page_file(batch, "0002.xml").write_bytes(
            re.sub(b"<TextLine.*</TextLine>", b"", ALTO, flags=re.DOTALL)
        ),
        OCR_2,
        "this OCR file has no text",
    ),
    "two pages have one sequence": (
        lambda batch: change(mets_of(batch), "<mods:start>2<", "<mods:start>1<"),
        METS_2,
        f"2 pages have the address /lccn/{GAZETTE}/1900-01-02/ed-1/seq-1/: in {METS_2}",
    ),
    "two issues have one date": (
        lambda batch: change(mets_of(batch, 2), ">1900-01-03<", ">1900-01-02<"),
        METS_2,
        f"2 pages have the address /lccn/{GAZETTE}/1900-01-02/ed-1/seq-1/: in {METS_2} and in"
        f" {METS_2.replace('190001020', '190001030')}",
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_what_loads_all_the_same_is_a_warning(agent, what):
    spoil, file, said = WARNINGS[what]
    spoil(agent.batch(ALPHA, issues=3))
    status, answer = checked(agent, ALPHA)
    assert (status, answer["faults"]) == (0, [])
    assert {"file": file, "warning": said} in answer["warnings"]
    assert {warning["file"] for warning in answer["warnings"]} == {file}
    assert f"warning: {file}: {said}" in mended(agent, "load-batch", ALPHA)
    assert word(agent)[0] == listed(agent)[0] == "complete"


def everything(site: Site) -> list[Any]:
    """The whole database, the index, and all files of ONI and of the batches."""
    with contextlib.closing(sqlite3.connect(site.oni / "oni.sqlite3")) as database:
        rows = list(database.iterdump())
    documents = {id: dict(site.solr._documents[id]) for id in site.solr.documents()}
    return [rows, documents, tree(site.oni, "oni.sqlite3", "log", "state"), tree(site.source)]


def test_a_check_of_a_hundred_batches_writes_nothing(site):
    with MarcSite("sn99990077") as marc:
        site.environment.update(marc.environment)
        made = drafts(site.source, 100, CHECK_SEED + 1000, ALIKE)
        repaired_by_hand = site.manage("load_batch", str(made[0].path))
        assert repaired_by_hand.returncode in (0, 1)
        before = everything(site)
        del site.solr.requests[:]
        with looking(site) as own:
            found = agents_verdicts(site=own, made=made)
        assert [bool(faults) for faults in found].count(True) > 20
        after = everything(site)
    assert after[0] == before[0]
    assert after[1] == before[1]
    for now, then in zip(after[2:], before[2:]):
        assert sorted(set(now.items()) ^ set(then.items())) == []
    assert not any("/update" in path for path in site.solr.requests)


def asked_for_checks(site: Site) -> int:
    """How many have asked for a check, by the agent's log."""
    return sum("batch-check" in line for line in site.log)


def test_a_check_asked_for_by_two_runs_once(site):
    with MarcSite("sn99990077") as marc:
        site.start(**marc.environment)
        site.batch(ALPHA, issues=1, lccn="sn99990077")
        marc.may_answer.clear()
        with Client(site.port) as one, Client(site.port) as other:
            channels = [client.channel(f"batch-check {ALPHA}") for client in (one, other)]
            assert marc.was_asked.wait(60)
            until(lambda: len(site.call("board")) and asked_for_checks(site) == 2)
            marc.may_answer.set()
            answers = [json.loads(channel.makefile("rb").read()) for channel in channels]
        for answer in answers:
            del answer["session"]
        assert answers[0] == answers[1]
        assert len(marc.requests) == 1


@in_process
def test_an_agent_that_nobody_could_connect_to_says_so(monkeypatch):
    for names in "CURVES", "NIST_CURVES", "CIPHERS", "DIGESTS":
        monkeypatch.setattr(oni_agent, names, ())
    with pytest.raises(oni_agent.Problem, match=r"\(none at all\), so nobody could connect"):
        oni_agent.algorithms_to_offer()


@in_process
def test_a_check_that_gets_no_thread_keeps_no_later_one_waiting(tmp_path, monkeypatch):
    folders = types.SimpleNamespace(batch_source=tmp_path, state_directory=tmp_path)
    site = oni_agent.Site(folders, None)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, pytest.raises(oni_agent.Scarce):
        patched.setattr(threading.Thread, "start", refuse)
        site.client_check(ALPHA, lambda: None)
    assert site._checks == {}


def test_a_check_ends_when_nobody_waits_for_it_any_more(site):
    with MarcSite("sn99990077") as marc:
        site.start(**marc.environment)
        site.batch(ALPHA, issues=1, lccn="sn99990077")
        word(site)
        before = site.workers()
        marc.may_answer.clear()
        with Client(site.port) as one, Client(site.port) as other:
            one.channel(f"batch-check {ALPHA}")
            other.channel(f"batch-check {ALPHA}")
            assert marc.was_asked.wait(60)
            checking = set(site.workers()).difference(before)
            assert checking
            one.transport.close()
            assert checking.issubset(site.workers())
        until(lambda: checking.isdisjoint(site.workers()))
        marc.may_answer.set()
        assert checked(site, ALPHA)[0] == 0


def test_a_jobs_check_waits_for_no_clients_check(site):
    with MarcSite("sn99990077") as marc:
        site.start(**marc.environment)
        spoil_edition(site.batch(BETA))  # so its job ends with its check, and writes nothing
        site.batch(ALPHA, lccn="sn99990077")
        word(site, BETA)
        before = site.workers()
        marc.may_answer.clear()
        with Client(site.port) as client:
            channel = client.channel(f"batch-check {ALPHA}")
            assert marc.was_asked.wait(60)
            checking = set(site.workers()) - set(before)
            for pid in checking:
                os.kill(pid, signal.SIGSTOP)
            marc.may_answer.set()
            job = site.run("load-batch", BETA)
            assert "ONI would leave this issue out" in job["error"]
            for pid in checking:
                os.kill(pid, signal.SIGCONT)
            assert "faults" in json.loads(channel.makefile("rb").read())


def many_elements(path: Path) -> None:
    text = path.read_text()
    with open(path, "w") as file:
        file.write(text.replace("</mets>", ""))
        for _ in range(61):
            file.write("<x/>" * (1 << 18))
        file.write("</mets>")


def expanding_entities(path: Path) -> None:
    entities = ['<!ENTITY e0 "0123456789">']
    entities += [f'<!ENTITY e{n} "{f"&e{n - 1};" * 100}">' for n in range(1, 6)]
    replace(path, HEAD, doctype("mets", f"[{''.join(entities)}]"))
    replace(path, EDITION, EDITION.replace("1", "&e5;"))


def sparse(path: Path) -> None:
    os.truncate(path, 2 << 30)


HOSTILE = {
    "METS of 61 MB of elements": ("1900010101.xml", many_elements),
    "METS with entities that grow a hundredfold": ("1900010101.xml", expanding_entities),
    "OCR of 2 GB": ("0001.xml", sparse),
}


STRING = '<String CONTENT="lost"/>'
LOST_TEXTS = {  # the content of an ALTO file, and what becomes of its text
    "in two languages of one field of the index": (
        '<TextBlock language="eng"><TextLine><String CONTENT="kept"/></TextLine></TextBlock>'
        f'<TextBlock language="lat"><TextLine>{STRING}</TextLine></TextBlock>',
        "ONI would index 4 of the 8 characters of its text",
    ),
    "after the last line": (
        f'<TextLine><String CONTENT="kept"/></TextLine>{STRING}',
        "ONI would index 4 of the 8 characters of its text",
    ),
    "in no line": (STRING, "ONI would index 0 of the 4 characters of its text"),
    "with a prefix": (
        f'<TextLine>{STRING.replace("<", "<alto:", 1)}</TextLine>',
        "ONI would index 0 of the 4 characters of its text",
    ),
}


@pytest.mark.parametrize("where", LOST_TEXTS)
def test_a_text_that_the_index_would_lose_is_a_fault(agent, where):
    content, said = LOST_TEXTS[where]
    batch = agent.batch(ALPHA, issues=1, pages=1)
    ocr = page_file(batch, "0001.xml", 0)
    ocr.write_text(f'<alto xmlns:alto="x"><Layout><Page>{content}</Page></Layout></alto>')
    status, answer = checked(agent, ALPHA)
    assert status == 1
    assert [(fault["file"], fault["fault"]) for fault in answer["faults"]] == [
        (str(ocr.relative_to(batch)), f"page 1: {said}")
    ]
    assert agent.manage("load_batch", str(batch)).returncode == 0
    [id] = agent.solr.documents(ALPHA)
    indexed = [text for field, text in agent.solr._documents[id].items() if "ocr_" in field]
    assert ("lost" in "".join(indexed)) + ("kept" in "".join(indexed)) == content.count("kept") * (
        where != "in no line"
    )


def test_a_hyphen_and_a_glyph_are_no_text_of_their_own(agent):
    batch = agent.batch(ALPHA, issues=1, pages=1)
    words = '<String CONTENT="ke"><Glyph CONTENT="k"/><Glyph CONTENT="e"/></String>'
    line = f'<TextLine>{words}<HYP CONTENT="-"/></TextLine>'
    alto = f"<!DOCTYPE alto []><alto><Layout><Page>{line}</Page></Layout></alto>"
    page_file(batch, "0001.xml", 0).write_text(alto)
    status, answer = checked(agent, ALPHA)
    assert (status, answer["faults"], answer["warnings"]) == (0, [], [])


def test_lines_without_words_are_no_text(agent):
    batch = agent.batch(ALPHA, issues=1, pages=1)
    alto = "<alto><Layout><Page><TextLine/><TextLine/></Page></Layout></alto>"
    page_file(batch, "0001.xml", 0).write_text(alto)
    status, answer = checked(agent, ALPHA)
    assert (status, answer["faults"]) == (0, [])
    assert [each["warning"] for each in answer["warnings"]] == ["this OCR file has no text"]


def test_what_is_no_alto_file_is_a_fault_where_a_text_should_be(agent):
    batch = agent.batch(ALPHA, issues=1, pages=1)
    page_file(batch, "0001.xml", 0).write_text("<html><body>A text.</body></html>")
    status, answer = checked(agent, ALPHA)
    assert status == 1
    said = "page 1: it is no ALTO file, and ONI would index nothing of it"
    assert [fault["fault"] for fault in answer["faults"]] == [said]


def test_a_fault_that_was_remembered_goes_with_its_file(agent):
    batch = agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    mets = mets_of(batch, 0)
    content = mets.read_bytes()
    mets.write_text("<x")
    assert word(agent)[0] == "unknown"
    assert listed(agent)[0] in ("unknown", "complete")
    mets.write_bytes(content)
    assert word(agent) == ["complete", 2, 4, 2, 4, 4]
    assert without_session(agent.call("load-batch", ALPHA)) == NOOP


def test_the_files_of_a_title_that_open_oni_lacks_are_counted(agent):
    agent.batch(ALPHA, lccn="sn99990077")
    assert word(agent) == ["absent", 0, 0, 2, 4, 0]


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_costs_the_agent_nothing_and_gets_a_sentence(agent, what):
    file, spoil = HOSTILE[what]
    name = agent.batch(ALPHA, issues=2).name
    checked(agent, name)
    spoil(page_file(agent.source / name, file, 0))
    before = memory(agent)
    status, answer = checked(agent, name)
    assert memory(agent) - before < 5
    if answer["status"] == "success":
        assert status == 1
        assert [fault["file"].split("/")[-1] for fault in answer["faults"]] == [file]
        assert answer["faults"][0]["fault"].startswith("ONI would ")
    else:
        [path] = (agent.source / name).rglob(file)
        path = path.relative_to(agent.source / name)
        assert answer["error"] == f"reading {path} takes more than 1024 MiB"
    assert agent.call("version")["status"] == "success"


# --- Promises: batch-status and list-batches: three sets, one word --------------------------------

def test_a_load_killed_in_its_last_issue_is_partial_though_no_issue_is_missing(agent):
    gate = agent.hold_load(agent.batch(ALPHA), issue=-1, page=2)
    id = agent.job("load-batch", ALPHA)
    kill_at(agent, gate, "load_batch")
    assert (
        "ONI holds 2 of the 2 issues and 4 of the 4 pages, 3 of 4 with their text, and its last"
        ' event is "starting load"'
    ) in agent.ended(id)["error"]
    assert agent.held(ALPHA) == (1, 2, 4)
    assert f"[INFO] purging batch '{ALPHA}'" in repaired(agent, "load-batch", ALPHA)
    assert agent.held(ALPHA) == (1, 2, 4)


@pytest.mark.parametrize(
    "change, complete",
    [
        ("DELETE FROM core_loadbatchevent", True),  # loaded long ago, its history pruned
        (
            (
                "UPDATE core_loadbatchevent SET message = 'starting purge' WHERE message LIKE"
                " 'processed %'"
            ),
            False,
        ),
        ("UPDATE core_issue SET batch_id = 'another' WHERE id = 1", False),
    ],
)
def test_a_batch_is_loaded_when_row_count_and_last_event_agree(agent, change, complete):
    agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    with contextlib.closing(
        sqlite3.connect(agent.oni / "oni.sqlite3", timeout=60)
    ) as database, database:
        database.execute(change)
    if complete:
        assert without_session(agent.call("load-batch", ALPHA)) == NOOP
    else:
        assert f"[INFO] purging batch '{ALPHA}'" in repaired(agent, "load-batch", ALPHA)
        assert agent.held(ALPHA) == (1, 2, 4)


def test_an_event_without_a_message_is_no_fault(agent):
    agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    with contextlib.closing(
        sqlite3.connect(agent.oni / "oni.sqlite3", timeout=60)
    ) as database, database:
        database.execute("UPDATE core_loadbatchevent SET message = NULL")
    assert agent.call("batch-status", ALPHA)["batch"]["state"] == "partial"


def test_batches_are_listed_as_they_are_on_disk_and_in_oni(agent):
    agent.batch("batch_oru_absent_ver01", issues=3)
    agent.batch("batch_oru_part_ver01", issues=3)
    agent.batch("batch_oru_whole_ver01", issues=3, pages=2)
    agent.run("load-batch", "batch_oru_whole_ver01")
    agent.batch("batch_oru_gone_ver01", issues=3, pages=2, start=date(1910, 1, 1))
    agent.run("load-batch", "batch_oru_gone_ver01")
    shutil.rmtree(agent.source / "batch_oru_gone_ver01")
    gate = agent.hold_load(agent.source / "batch_oru_part_ver01", issue=1)
    agent.job("load-batch", "batch_oru_part_ver01")
    gate.reached()
    (agent.source / "not a batch").mkdir()
    listed = {each["name"]: each for each in agent.ssh("list-batches")["batches"]}
    assert list(listed) == [
        f"batch_oru_{name}_ver01" for name in ("absent", "gone", "part", "whole")
    ]
    shown = [
        (each["on_disk"], each["state"], each["issues"], each["pages"], bool(each["loaded"]))
        for each in listed.values()
    ]
    assert shown == [
        (True, "absent", 0, 0, False),
        (False, "unknown", 3, 6, True),
        (True, "partial", 2, 3, True),
        (True, "complete", 3, 6, True),
    ]
    for name, entry in listed.items():
        reply = agent.ssh(f"batch-status {name}")
        assert reply["batch"]["state"] == entry["state"]
        assert reply["batch"]["issues"] == entry["issues"]
        assert [job["words"] for job in reply["jobs"]] == [["load-batch", name]] * (
            entry["state"] != "absent"
        )
    events = agent.ssh("batch-status batch_oru_whole_ver01")["events"]
    assert [message for _, message in events] == ["starting load", "processed 6 pages"]
    gate.open()
    agent.ended(3)
    assert agent.ssh("batch-status batch_oru_part_ver01")["batch"]["state"] == "complete"


def test_an_oni_that_cannot_answer_is_an_error_and_not_an_empty_list(agent):
    agent.batch("batch_oru_alpha_ver01")
    with agent.database_down():
        for command, message in (
            ("list-batches", "The batches cannot be listed"),
            ("batch-status batch_oru_alpha_ver01", '"batch_oru_alpha_ver01" cannot be looked up'),
        ):
            reply = agent.ssh(command)
            assert (reply["status"], reply["message"]) == ("error", message)
            assert "OperationalError" in reply["error"]
    assert agent.ssh("list-batches")["status"] == "success"


@pytest.mark.parametrize(
    "command, message",
    [
        ("load-batch batch_oru_alpha_ver01", '"batch_oru_alpha_ver01" cannot be loaded'),
        ("list-batches", "The batches cannot be listed"),
        ("batch-status batch_oru_alpha_ver01", '"batch_oru_alpha_ver01" cannot be looked up'),
    ],
)
def test_a_batch_source_that_went_away_is_named(agent, command, message):
    agent.source.rmdir()
    reply = agent.ssh(command)
    assert (reply["status"], reply["message"]) == ("error", message)
    assert str(agent.source) in reply["error"]


@pytest.mark.parametrize(
    "command, meant",
    [
        ("load-bacth batch_oru_alpha_ver01", "load-batch"),
        ("jobstatus 1", "job-status"),
        ("jog-logs 1", "job-logs"),
        ("load-batch batch_oru_suggest_ver02", "batch_oru_suggest_ver01"),
        ("batch-status batch_oru_sugest_ver01", "batch_oru_suggest_ver01"),
    ],
)
def test_a_name_that_is_nearly_right_is_suggested(shared, command, meant):
    if not (shared.source / "batch_oru_suggest_ver01").exists():
        shared.batch("batch_oru_suggest_ver01")
    reply = shared.ssh(command)
    assert reply["status"] == "error"
    assert reply["error"].endswith(f'; did you mean "{meant}"?')
    assert "did you mean" not in shared.ssh("xyzzy")["error"]


def test_every_answer_about_a_batch_has_the_same_keys_and_says_the_same(agent):
    agent.batch(ALPHA)
    assert word(agent) == listed(agent) == ["absent", 0, 0, 2, 4, 0]
    repaired(agent, "load-batch", ALPHA)
    assert word(agent) == ["complete", 2, 4, 2, 4, 4]
    assert listed(agent) == word(agent)
    shown = agent.call("batch-status", ALPHA)["batch"]
    [in_list] = agent.call("list-batches")["batches"]
    assert shown == in_list


NOTE_FORKS = """
import os
def note():
    with open("forks", "a") as noted:
        noted.write("1")
os.register_at_fork(after_in_child=note)
"""


def test_what_cannot_be_counted_is_not_counted_anew_each_time(site):
    """A batch's files may have been moved away, and ONI's link to them leads nowhere."""
    site.prepend_to_manage(NOTE_FORKS)
    batch = site.batch(ALPHA)
    site.start().run("load-batch", ALPHA)
    batch.rename(site.source.with_name("away"))
    noted = site.oni / "forks"

    def workers_for_a_list() -> int:
        before = noted.stat().st_size
        [told] = site.call("list-batches")["batches"]
        assert (told["state"], told["pages_in_mets"]) == ("unknown", None)
        return noted.stat().st_size - before

    assert workers_for_a_list() == 3  # it counts, and a look before that is its own
    assert workers_for_a_list() == 1
    site.source.with_name("away").rename(batch)
    assert site.call("batch-status", ALPHA)["batch"]["state"] == "complete"
    assert site.call("list-batches")["batches"][0]["state"] == "complete"


def test_a_file_with_the_name_of_a_batch_is_none(agent):
    agent.batch(ALPHA)
    (agent.source / f"{ALPHA}.tar.gz").write_bytes(b"what it came in")
    (agent.source / BETA).symlink_to(agent.source / ALPHA)
    listed = [batch["name"] for batch in agent.call("list-batches")["batches"]]
    assert listed == [ALPHA, BETA]


def test_a_link_that_leads_to_itself_hides_no_batch_and_no_reason(agent):
    loop = agent.source / BETA
    loop.symlink_to(loop)
    agent.batch(ALPHA)
    assert [batch["name"] for batch in agent.call("list-batches")["batches"]] == [ALPHA]
    (agent.source / ALPHA / "data/batch.xml").write_text("<batch/>")
    assert "names no issue" in agent.call("load-batch", ALPHA)["error"]


def test_a_lack_of_the_awardee_is_no_fault_of_a_batchs_files(agent):
    agent.batch("batch_zzz_alpha_ver01")
    batch = agent.call("batch-status", "batch_zzz_alpha_ver01")["batch"]
    assert (batch["state"], batch["pages_in_mets"]) == ("absent", 4)
    _, answer = checked(agent, "batch_zzz_alpha_ver01")
    [fault] = answer["faults"]
    assert 'no awardee "zzz"' in fault["fault"]


def test_what_list_batches_has_no_time_to_count_is_null_and_there_a_later_time(site):
    for number in range(20):
        site.batch(f"batch_oru_many{number}_ver01", issues=20)
    hurry(site, LIST_SECONDS=0.001)
    first = site.call("list-batches")["batches"]
    assert len(first) == 20
    assert None in [batch["pages_in_mets"] for batch in first]
    assert {batch["state"] for batch in first} == {"absent"}
    counted = lambda: [batch["pages_in_mets"] for batch in site.call("list-batches")["batches"]]
    until(lambda: counted() == [40] * 20)
    site.restart()
    assert counted() == [40] * 20  # it is remembered


@pytest.mark.parametrize("how", ["down", "failing", "hanging"])
def test_without_solr_the_rest_is_told_within_the_deadline(site, how):
    hurry(site, SOLR_SECONDS=1)
    site.batch(ALPHA)
    repaired(site, "load-batch", ALPHA)
    with getattr(site.solr, how)():
        assert word(site) == ["unknown", 2, 4, 2, 4, None]
        assert "Solr cannot be asked" in site.call("batch-status", ALPHA)["message"]
        assert listed(site) == word(site)
    assert word(site) == ["complete", 2, 4, 2, 4, 4]


def test_a_batch_that_is_not_in_batch_source_is_counted_where_it_was_loaded_from(agent, tmp_path):
    batch = agent.batch(ALPHA)
    other = tmp_path / "elsewhere" / ALPHA
    other.parent.mkdir()
    batch.rename(other)
    assert agent.manage("load_batch", str(other)).returncode == 0
    assert word(agent) == ["complete", 2, 4, 2, 4, 4]


def loads_begun(site: Site) -> int:
    return sum(event == "starting load" for event in site.events(ALPHA))


def test_an_index_that_was_emptied_gets_the_missing_pages_and_nothing_is_loaded_again(agent):
    agent.batch(ALPHA)
    agent.batch(BETA, start=date(1910, 1, 1))
    repaired(agent, "load-batch", ALPHA)
    repaired(agent, "load-batch", BETA)
    documents = agent.solr.documents()
    rows = agent.query("SELECT id FROM core_page ORDER BY id")
    agent.solr.forget(ALPHA)
    assert listed(agent) == word(agent) == ["partial", 2, 4, 2, 4, 0]
    del agent.solr.requests[:]
    logs = mended(agent, "load-batch", ALPHA)
    updates = [path for path in agent.solr.requests if path.startswith("/solr/openoni/update")]
    assert len(updates) == 5  # four documents, and a commit
    assert sum(line.startswith("indexing /lccn/") for line in logs) == 4
    assert agent.solr.documents() == documents
    assert agent.query("SELECT id FROM core_page ORDER BY id") == rows
    assert loads_begun(agent) == 1
    assert word(agent) == listed(agent) == ["complete", 2, 4, 2, 4, 4]


def test_only_the_pages_that_the_index_lacks_are_indexed_again(agent):
    agent.batch(ALPHA)
    repaired(agent, "load-batch", ALPHA)
    lost, *kept = agent.solr.documents(ALPHA)
    change_index(agent, f"c.delete(id='{lost}')")
    assert agent.solr.documents(ALPHA) == kept
    assert "Solr lacks 1 of 4 pages" in agent.call("batch-status", ALPHA)["message"]
    logs = mended(agent, "load-batch", ALPHA)
    assert [line for line in logs if line.startswith("indexing")] == [f"indexing {lost}"]
    assert agent.solr.documents(ALPHA) == [lost, *kept]


@pytest.mark.parametrize("lost", [0, 1])
def test_documents_of_a_batch_that_are_no_page_of_it_do_not_stand_for_its_pages(agent, lost):
    """What a load has left that failed with Solr: it shows after the next load's commit."""
    agent.batch(ALPHA)
    repaired(agent, "load-batch", ALPHA)
    documents = agent.solr.documents(ALPHA)
    strays = [f"/lccn/{GAZETTE}/1872-01-0{day}/ed-1/seq-1/" for day in (1, 2)]
    like_a_page = {**page_document(ALPHA, 1), "lccn": GAZETTE}
    change_index(
        agent,
        *(f"c.add([{ {**like_a_page, 'id': id} }])" for id in strays),
        *(f"c.delete(id='{id}')" for id in documents[:lost]),
    )
    assert word(agent) == ["partial", 2, 4, 2, 4, 6 - lost]
    assert listed(agent)[0] != "complete"
    assert (
        "under its name that are none of its pages (2)" in agent.call("batch-status", ALPHA)[
            "message"
        ]
    )
    logs = mended(agent, "load-batch", ALPHA)
    assert [line for line in logs if line.startswith("deleting")] == [
        f"deleting {id}" for id in strays
    ]
    assert agent.solr.documents(ALPHA) == documents
    assert loads_begun(agent) == 1


def test_pages_that_another_batch_has_taken_over_in_the_index_make_a_batch_partial(agent):
    agent.batch(ALPHA)
    agent.batch(BETA)  # the same issues
    repaired(agent, "load-batch", ALPHA)
    warnings = [
        f"{ALPHA} holds {GAZETTE} 1900-01-0{day} edition 1, too" for day in (1, 2)
    ]
    status, answer = checked(agent, BETA)
    assert (status, answer["faults"]) == (0, [])
    assert sorted(each["warning"] for each in answer["warnings"]) == warnings
    repaired(agent, "load-batch", BETA)
    assert agent.solr.documents(ALPHA) == []
    assert listed(agent) == word(agent) == ["partial", 2, 4, 2, 4, 0]
    said = (
        "4 pages are found under another batch, which has the same pages"
        f" ({BETA}): purge the one that should not have them"
    )
    assert said in agent.call("batch-status", ALPHA)["message"]
    job = agent.run("load-batch", ALPHA)
    assert job["status"] == "failed"
    assert said in job["error"]
    assert word(agent, BETA)[0] == "complete"
    assert loads_begun(agent) == 1  # loading it again would only move the fault
    repaired(agent, "purge-batch", BETA)
    assert word(agent) == ["partial", 2, 4, 2, 4, 0]  # ONI has deleted the documents of both
    mended(agent, "load-batch", ALPHA)
    assert len(agent.solr.documents(ALPHA)) == 4


def test_the_batch_file_that_open_oni_reads_is_the_one_that_counts(agent):
    batch = agent.batch(ALPHA, issues=3, validated=True)
    listing = batch / "data/batch.xml"
    listing.write_text(re.sub("<issue .*</issue>\n", "", listing.read_text(), count=1))
    assert checked(agent, ALPHA)[0] == 0
    mended(agent, "load-batch", ALPHA)
    assert word(agent) == ["complete", 3, 6, 3, 6, 6]


def swap_documents(site: Site) -> None:
    """The index is one of an older day: as many documents, of other pages."""
    first = site.solr.documents(ALPHA)[0]
    other = {**page_document(ALPHA, 1), "lccn": GAZETTE, "id": first.replace("1900", "1899")}
    change_index(site, f"c.delete(id={first!r})", f"c.add([{other!r}])")


def deliver_again(site: Site) -> None:
    """The batch comes again under its name, with other dates."""
    shutil.rmtree(site.source / ALPHA)
    site.batch(ALPHA, start=date(1910, 1, 1))


def add_page(site: Site) -> None:
    """A METS has a page more, and batch.xml is as it was."""
    mets = mets_of(site.source / ALPHA, 0)
    mets.write_text(mets_xml(3))
    for suffix, content in PAGE_FILES.items():
        mets.with_name(f"0003.{suffix}").write_bytes(content)


def change_edition(site: Site) -> None:
    """A METS has another edition, and is as long as it was."""
    replace(mets_of(site.source / ALPHA, 0), EDITION, EDITION.replace("1", "2"))


@pytest.mark.parametrize("how", [swap_documents, deliver_again, add_page, change_edition])
def test_list_batches_never_says_what_batch_status_would_contradict(agent, how):
    agent.batch(ALPHA)
    agent.batch(BETA, start=date(1920, 1, 1))
    for name in (ALPHA, BETA):
        repaired(agent, "load-batch", name)
        assert listed(agent, name)[0] == word(agent, name)[0] == "complete"
    how(agent)
    assert listed(agent)[0] in ("partial", "unknown")
    assert word(agent)[0] == "partial"
    until(lambda: listed(agent) == word(agent))
    agent.restart()
    assert listed(agent) == word(agent)
    assert listed(agent, BETA)[0] == "complete"
    mended(agent, "load-batch", ALPHA)
    assert listed(agent) == word(agent)
    assert word(agent)[0] == "complete"


def test_a_title_that_solr_does_not_have_in_the_end_is_failed(site):
    hurry(site, SOLR_SECONDS=1, PATIENT_SECONDS=busy(1.5))
    gate = gate_in_manage(site, "load_titles", at_exit=True)
    id = site.job("load-title", stdin=marc_xml())
    gate.reached()
    with site.solr.down():
        gate.open()
        job = site.ended(id)
    assert job["status"] == "failed"
    assert titles(site)
    assert site.ended(site.call("job-retry", str(id))["job"]["id"])["status"] == "successful"


def test_the_newest_event_is_the_last_one_recorded_whatever_the_clock_says(site):
    """At the end of summer time, or when a clock was put right, an older one has a later time."""
    settings_local(site, "USE_TZ = False\n")  # as Open ONI 1.1's
    site.start()
    batch = site.batch(ALPHA)
    assert site.run("load-batch", ALPHA)["status"] == "successful"
    assert site.run("purge-batch", ALPHA)["status"] == "successful"
    with contextlib.closing(sqlite3.connect(site.oni / "oni.sqlite3", timeout=60)) as database:
        database.execute("UPDATE core_loadbatchevent SET created = '2199-01-01 00:00:00'")
        database.execute("DELETE FROM core_loadbatchevent WHERE message NOT LIKE 'processed%'")
        database.commit()
    gate = site.hold_load(batch, issue=1, page=2)
    id = site.job("load-batch", ALPHA)
    kill_at(site, gate, "load_batch")
    assert site.ended(id)["status"] == "failed"
    reply = site.call("batch-status", ALPHA)
    assert (reply["batch"]["state"], reply["events"][-1][1]) == ("partial", "starting load")
    [listed] = site.call("list-batches")["batches"]
    assert listed["state"] == "partial"
    assert site.run("load-batch", ALPHA)["status"] == "successful"


@pytest.mark.parametrize("table", ["core_batch", "core_issue", "core_page", "core_loadbatchevent"])
def test_batches_are_listed_though_a_load_begins_meanwhile(site, table):
    site.prepend_to_manage(HELD_QUERY)
    (site.oni / "held-query").write_text("nothing")
    (site.oni / "hold-query").touch()  # what the gate leaves for the next query
    site.batch(BETA)
    site.start().run("load-batch", BETA)
    gate = site.hold(site.oni / "hold-query")
    (site.oni / "held-query").write_text(f'FROM "{table}"')
    with Client(site.port) as client:
        channel = client.channel("list-batches")
        gate.reached()
        half_load(site, site.batch(ALPHA))
        gate.open()
        reply = json.loads(channel.makefile("rb").read())
    assert reply["status"] == "success", reply
    states = {batch["name"]: batch["state"] for batch in reply["batches"]}
    assert states[BETA] == "complete"
    assert states.get(ALPHA, "absent") in ("absent", "partial", "unknown")


# --- Promises: titles and awardees ----------------------------------------------------------------

@pytest.mark.parametrize("encoding", ["UTF-8", "ISO-8859-1", "windows-1252", "UTF-16"])
@pytest.mark.parametrize("wrapped, end", [(False, TRAILER), (True, b"")])
def test_a_title_is_loaded_whatever_its_wrapping_encoding_and_end(shared, encoding, wrapped, end):
    lccn = f"sn7777{next(FRESH)}"
    text = marc_xml(lccn, "L'écho.", wrapped=wrapped).decode().replace("UTF-8", encoding)
    job = shared.run("load-title", stdin=text.encode(encoding) + end)
    assert (job["name"], job["status"]) == ("load title", "successful")
    assert titles(shared, lccn) == ["L'écho."]
    kept = shared.state / "inputs" / str(job["id"])
    assert [file.read_bytes() for file in kept.iterdir()] == [text.encode(encoding)]
    assert kept.stat().st_mode & 0o777 == 0o700
    assert not list(kept.parent.glob("unready*"))


def test_a_title_is_answered_at_its_trailer_wherever_that_is_torn(shared):
    with Client(shared.port) as client:
        channel = client.channel("load-title")
        for piece in (marc_xml("sn99990010"), b"\n\nE", b"ND", b"\n"):
            channel.sendall(piece)
        reply = json.loads(channel.makefile("rb").readline())  # standard input stays open
    assert shared.ended(reply["job"]["id"])["status"] == "successful"
    assert titles(shared, "sn99990010")


@pytest.mark.parametrize(
    "payload, said",
    [
        (b"no XML", "line 1"),
        (b"", "line 1"),
        (TRAILER, "line 1"),
        (marc_xml().replace(b"</record>", b""), "no element found: line "),
        (
            marc_xml().replace(b"?>\n", b'?>\n<!DOCTYPE record [<!ENTITY a "b">]>\n', 1),
            "a DOCTYPE is not allowed",
        ),
        (marc_xml().replace(b"UTF-8", b"no-such-code"), "unknown encoding"),
        (b"<html><body>Service unavailable</body></html>", "there is no MARC record in it"),
        (OCLC_ANSWER.format("").encode(), "there is no MARC record in it"),
        (marc_xml(lccn=""), "without an LCCN (010 $a)"),
        (marc_xml(lccn="  "), "without an LCCN (010 $a)"),
        pytest.param(b" " * ((32 << 20) + 4096), "32 MiB", id="too long"),
    ],
)
def test_a_title_that_cannot_be_stored_is_refused_with_a_sentence(shared, payload, said):
    jobs = shared.call("list-jobs")["jobs"]
    reply = shared.ssh("load-title", stdin=payload)
    assert (reply["status"], reply["message"]) == ("error", "Invalid data")
    assert said in reply["error"]
    assert shared.call("list-jobs")["jobs"] == jobs


def test_a_title_of_32_mib_is_taken(shared):
    job = shared.ended(
        shared.ssh("load-title", marc_xml("sn99990032").ljust(32 << 20))["job"]["id"]
    )
    assert job["status"] == "successful"
    assert titles(shared, "sn99990032")


def test_the_lccn_of_a_title_is_cleaned_as_open_oni_cleans_it(shared):
    job = shared.run("load-title", stdin=marc_xml("sn 99990041 / "))
    assert (job["status"], titles(shared, "sn99990041")) == ("successful", ["The sample herald."])


def test_a_title_that_open_oni_has_in_a_newer_version_is_said_to_be_left(shared):
    for year, name, notes in (2020, "New.", 0), (2019, "Old.", 1):
        record = marc_xml("sn99990042", name).replace(b"20220102", b"%d0102" % year)
        job = shared.run("load-title", stdin=record)
        assert job["status"] == "successful"
        left = (
            "the record of sn99990042 changes nothing: ONI has that version already, or a newer one"
        )
        assert shared.logs(job["id"]).count(left) == notes
        assert titles(shared, "sn99990042") == ["New."]


@pytest.mark.parametrize(
    "lccn, before", [("sn99990009", []), ("sn99990001", ["The test gazette."])]
)
def test_a_title_of_unknown_language_is_refused_and_what_was_there_kept(shared, lccn, before):
    reply = shared.call("load-title", stdin=marc_xml(lccn, "A new name.", language="zzz"))
    assert (reply["status"], reply["message"]) == ("error", "Invalid data")
    assert reply["error"].startswith(f"ONI cannot store the title {lccn}: ")
    assert "Code zzz, not found in language table." in reply["error"]
    assert titles(shared, lccn) == before


def test_a_title_known_already_is_updated(shared):
    assert (
        shared.run("load-title", stdin=marc_xml("sn99990002", "A new name."))["status"]
        == "successful"
    )
    assert titles(shared, "sn99990002") == ["A new name."]


def test_a_killed_title_load_is_failed_and_its_file_kept(site):
    gate = gate_in_manage(site, "load_titles")
    id = site.start().job("load-title", stdin=marc_xml() + TRAILER)
    kill_at(site, gate, "load_titles")
    job = site.ended(id)
    folder = site.state / "inputs" / str(id)
    assert job["status"] == "failed"
    assert job["error"].startswith("killed by signal 9 (SIGKILL); ")
    assert str(folder) in job["error"]
    assert (folder / "input.xml").read_bytes() == marc_xml()
    assert site.run("load-title", stdin=marc_xml())["status"] == "successful"
    assert titles(site)


def test_a_title_load_that_cannot_be_checked_is_failed_and_its_file_kept(site):
    gate = gate_in_manage(site, "load_titles", at_exit=True)
    id = site.start().job("load-title", stdin=marc_xml())
    gate.reached()
    with site.database_down():
        gate.open()
        job = site.ended(id)
    assert job["status"] == "failed"
    assert "OperationalError" in job["error"]
    assert str(site.state / "inputs" / str(id)) in job["error"]


def test_an_awardee_is_made_once_and_answered_as_recorded(shared):
    def ask(*words: str) -> dict:
        return without_session(shared.call("ensure-awardee", *words))

    assert ask("hoover") == {
        "status": "error",
        "message": "Unable to create awardee",
        "org_code": "hoover",
        "name": "",
        "error": "awardee name must be given to auto-create awardees",
    }
    assert awardees(shared, "hoover") == []
    assert ask("hoover", "Hoover Institution") == {
        "status": "success",
        "message": "Awardee created",
    }
    for words in (["hoover", "Hoover Institution"], ["hoover", "Another name"], ["hoover"]):
        assert ask(*words) == {"status": "success", "message": "Awardee already exists"}
    assert awardees(shared, "hoover") == ["Hoover Institution"]
    for words in ([], ["a", "b", "c"]):
        reply = ask(*words)
        assert reply["status"] == "error"
        assert "one or two arguments" in reply["message"]


@pytest.mark.parametrize(
    "code, name",
    [
        ("dlc", "Bibliothèque Łódź 図書館"),
        ("é" * 50, "ü" * 100),
        (" spaced  out ", "  kept   exactly "),
    ],
)
def test_an_awardees_code_and_name_are_kept_exactly(shared, code, name):
    assert shared.call("ensure-awardee", code, name)["message"] == "Awardee created"
    assert awardees(shared, code) == [name]


@pytest.mark.parametrize(
    "code, name",
    [
        ("x" * 51, "name"),
        ("é" * 51, "name"),
        ("long", "n" * 101),
        ("", "Some name"),
        ("x" * 51, ""),
        ("a\x00b", "Some name"),
        ("ab", "A name\x00"),
    ],
)
def test_an_awardee_that_the_columns_cannot_hold_is_refused(shared, code, name):
    reply = without_session(shared.call("ensure-awardee", code, name))
    assert reply == {
        "status": "error",
        "message": "Unable to create awardee",
        "org_code": code,
        "name": name,
        "error": "an awardee code has 1 to 50 characters, a name at most 100, none of them NUL",
    }
    assert awardees(shared, code) == []


def test_an_awardee_asked_for_by_many_at_once_is_made_once(shared):
    replies = at_once(*[lambda: shared.call("ensure-awardee", "many", "Many at once")] * 6)
    assert sorted(reply["message"] for reply in replies) == ["Awardee already exists"] * 5 + [
        "Awardee created"
    ]
    assert awardees(shared, "many") == ["Many at once"]


def test_an_interrupted_title_is_loaded_again(witnessed):
    site = witnessed.start()
    gate = site.hold(site.oni / "hold-load_titles")
    id = site.job("load-title", stdin=marc_xml())
    gate.reached()
    site.kill()
    for pid in site.manage_pids("load_titles"):
        os.kill(pid, signal.SIGKILL)
    gate.open()
    half = site.state / "inputs/unready-half"
    half.write_text("<rec")  # of a request that the kill has cut off
    assert site.start().ended(id)["status"] == "successful"
    assert not half.exists()
    assert site.query("SELECT name FROM core_title WHERE lccn = 'sn99990009'") == [
        ("The sample herald.",)
    ]


def test_a_failed_title_is_retried_with_its_payload(site):
    gate = gate_in_manage(site, "load_titles")
    id = site.start().job("load-title", stdin=marc_xml(name="The retried herald."))
    kill_at(site, gate, "load_titles")
    assert site.ended(id)["status"] == "failed"
    assert titles(site) == []
    assert site.ssh("job-retry 1")["job"]["id"] == 2
    assert site.ended(2)["status"] == "successful"
    assert titles(site) == ["The retried herald."]


def test_of_many_titles_at_once_none_is_refused(agent):
    with futures.ThreadPoolExecutor(100) as pool:
        records = [marc_xml(f"sn9999{number:04}") for number in range(100)]
        replies = list(pool.map(lambda record: agent.call("load-title", stdin=record), records))
    assert [reply for reply in replies if reply["status"] != "success"] == []
    for reply in replies:
        agent.call("job-cancel", str(reply["job"]["id"]))


@pytest.mark.parametrize("kind", [kind for kind in BAD_RECORDS if kind != "of another title"])
def test_such_a_record_is_refused_by_load_title_in_the_same_words(odd_site, kind):
    lccn, record, said = BAD_RECORDS[kind]
    new = f"{lccn[:-1]}9"  # ONI may have stored the other one, in the test above
    record, said = record.replace(lccn.encode(), new.encode()), said.replace(lccn, new)
    if said == "another record":
        said = "there is no MARC record in it"
    if kind == "no XML":
        said = "syntax error: line 1|not well-formed.*line 1"
    before = odd_site.query("SELECT lccn, name FROM core_title")
    jobs = odd_site.call("list-jobs")["jobs"]
    reply = odd_site.call("load-title", stdin=record)
    assert (reply["status"], reply["message"]) == ("error", "Invalid data")
    assert re.fullmatch(said, reply["error"])
    assert odd_site.call("list-jobs")["jobs"] == jobs
    assert odd_site.query("SELECT lccn, name FROM core_title") == before


def test_a_bad_record_that_the_command_had_no_time_for_ends_the_job_before_any_is_stored(site):
    hurry(site, RECORDS_SECONDS=-1)
    good, bad = marc_xml("sn99990009"), BAD_RECORDS["without a title"][1]
    records = b"".join(each.partition(b"?>")[2] or each for each in (good, bad))
    job = site.run("load-title", stdin=b"<collection>" + records + b"</collection>" + TRAILER)
    assert job["status"] == "failed"
    assert "ONI cannot store the title sn11110007" in job["error"]
    assert titles(site, "sn99990009") == []


def test_a_record_that_only_repeats_what_open_oni_has_is_not_refused(agent, tmp_path):
    """Though no batch of such a title could be loaded."""
    record = tmp_path / "record.xml"
    record.write_bytes(marc_xml("85-38490"))
    agent.manage("load_titles", str(record))
    assert titles(agent, "85-38490")
    reply = agent.call("load-title", stdin=marc_xml("85-38490"))
    assert reply["status"] == "success"
    draft = new_draft(agent, "85-38490")
    for issue in range(draft.issues):
        mets = mets_of(draft.path, issue)
        mets.write_text(mets.read_text().replace(">sn99990001<", ">85-38490<"))
    faults = compare_with_load(agent, draft)["faults"]
    assert all("Reverse for 'openoni_issue_pages'" in fault["fault"] for fault in faults)


def test_a_redirect_to_another_host_is_not_followed(site):
    with MarcSite("sn99990077", "sn99990079") as marc, MarcSite("sn99990077") as other:
        elsewhere = (other.urlformat % "sn99990077").replace("127.0.0.1", "localhost")
        marc.redirects["sn99990077"] = elsewhere
        marc.redirects["sn99990078"] = marc.urlformat % "sn99990079"
        site.start(**marc.environment)
        site.batch(ALPHA, lccn="sn99990077")
        [fault, *_] = checked(site, ALPHA)[1]["faults"]
        assert "it points to another host, http://localhost:" in fault["fault"]
        assert other.requests == []
        site.batch(BETA, lccn="sn99990078")  # on the same host, and of another title
        [fault, *_] = checked(site, BETA)[1]["faults"]
        assert "it answers with another record" in fault["fault"]


def test_an_lccn_is_one_part_of_the_address_that_is_asked_for(site):
    with MarcSite() as marc:
        site.start(**marc.environment)
        draft = new_draft(site, "address")
        replace(mets_of(draft.path, 0), ">sn99990001<", ">../../x?y#z<")
        assert checked(site, draft.path.name)[0] == 1
        assert marc.requests == ["/lccn/..%2F..%2Fx%3Fy%23z/marc.xml"]


def title_documents(site: Site, lccn: str = "sn99990009") -> list[str]:
    return [id for id in site.solr.documents() if id == f"/lccn/{lccn}/"]


def test_a_title_is_stored_when_open_oni_has_its_row_and_solr_its_document(agent):
    job = agent.run("load-title", stdin=marc_xml())
    assert job["status"] == "successful"
    assert len(title_documents(agent)) == 1
    [stored] = agent.query("SELECT version FROM core_title WHERE lccn = 'sn99990009'")
    assert stored[0].startswith("2022-01-02 08:04:05")  # in UTC; it was 03:04:05 at the site
    change_index(agent, "c.delete(id='/lccn/sn99990009/')")
    assert title_documents(agent) == []
    job = agent.run("load-title", stdin=marc_xml())  # of the same version: ONI changes nothing
    assert job["status"] == "successful"
    assert len(title_documents(agent)) == 1
    assert "indexing title sn99990009" in agent.logs(job["id"])


HELD_END = """
import contextlib, sys
if "load_titles" in sys.argv:
    import atexit
    @atexit.register
    def wait():
        with contextlib.suppress(OSError):
            open("hold-end").read()
"""


def test_a_title_job_waits_for_a_solr_that_comes_back(site):
    site.prepend_to_manage(HELD_END)
    gate = site.hold(site.oni / "hold-end")
    id = site.start().job("load-title", stdin=marc_xml())
    gate.reached()  # ONI has stored and indexed it; the agent is yet to ask for that
    with site.solr.failing():
        asked = len(site.solr.requests)
        gate.open()
        until(lambda: len(site.solr.requests) > asked)
    job = site.ended(id)
    assert (job["status"], job.get("error")) == ("successful", None)


def test_a_connection_cut_amid_a_record_is_no_verdict_on_the_record(site):
    settings_local(site, CUT_CONNECTIONS)
    gate = held_question(site, 'FROM "core_title"')
    site.start()
    with Client(site.port) as client:
        channel = client.channel("load-title")
        channel.sendall(marc_xml())
        channel.shutdown_write()
        gate.reached()
        time.sleep(0.02)  # the clock of files is coarser than Python's
        (site.oni / "connections-cut").write_text("")
        (site.oni / "held-query").write_text("no more")
        gate.open()
        reply = json.loads(channel.makefile("rb").read())
    assert reply["status"] == "success", reply


def hostile_title(kind: str, size: int) -> bytes:
    """XML of that many bytes, made of very many things, or of one that is very long."""
    if kind == "elements beside each other":
        return b"<r>" + b"<a/>" * ((size - 7) // 4) + b"</r>"
    if kind == "elements below each other":
        return b"<r>" + b"<a>" * ((size - 3) // 3)
    if kind == "records":
        record = b"<record><datafield><s/></datafield></record>"
        return b"<r>" + record * ((size - 7) // len(record)) + b"</r>"
    if kind == "names":
        names = (b"<a%d/>" % number for number in range(10**6, 10**6 + (size - 7) // 11))
        return b"<r>" + b"".join(names) + b"</r>"
    if kind == "attributes":
        attributes = (b"a%d=''" % number for number in range((size - 100) // 12))
        return b"<r " + b" ".join(attributes) + b"/>"
    if kind == "a name":
        return b"<r " + b"a" * (size - 100) + b"=''/>"
    assert kind == "a value"
    return b"<r a='" + b"a" * (size - 100) + b"'/>"


@pytest.mark.parametrize(
    "kind, megabytes",
    [
        ("elements beside each other", 32),
        ("elements below each other", 4),
        ("records", 4),
        ("names", 4),
        ("attributes", 4),
        ("a name", 4),
        ("a value", 4),
    ],
)
def test_a_hostile_title_is_refused_and_takes_little_memory(agent, kind, megabytes):
    assert oni_agent.MAX_PAYLOAD == 32 * 2**20
    title = hostile_title(kind, megabytes * 2**20)
    reply = agent.call("load-title", stdin=title)
    assert (reply["status"], reply["message"]) == ("error", "Invalid data")
    assert memory(agent, "VmHWM") < 100


# --- Promises: batch-patch ------------------------------------------------------------------------

def canonical(xml: bytes) -> str:
    """What two XML files have in common that say the same: comments count, indentation does not."""
    return ElementTree.canonicalize(
        xml.decode(), with_comments=True, strip_text=True, rewrite_prefixes=True
    )


@pytest.mark.parametrize(
    "instructions, removed",
    [
        (f"RemoveIssue {GAZETTE}/1900010101", ["1900010101"]),
        (f"RemoveIssue {GAZETTE}/19000101011", ["19000101011"]),
        (f"RemoveIssue {GAZETTE}/1900-01-02_01\n", ["1900010201"]),
        ("\n  RemoveIssue   sn-9999_0001/1900_01-02-01  \r\n\n", ["1900010201"]),
        (
            f"RemoveIssue {GAZETTE}/1900010101\nRemoveIssue {GAZETTE}/1900010301\n\n",
            ["1900010101", "1900010301"],
        ),
    ],
)
def test_a_patched_batch_is_the_old_one_without_what_was_to_go(patcher, instructions, removed):
    old = patcher.source / ALPHA
    new = patcher.source / f"batch_oru_new{next(FRESH)}_ver01"
    before = files_of(old)
    unready = patcher.source / f"WIP-UNREADY-{new.name}"
    (unready / "data").mkdir(parents=True)
    (unready / "data/left.xml").write_text("by an interrupted patch")
    job = patcher.run("batch-patch", ALPHA, new.name, stdin=instructions.encode() + TRAILER)
    assert (job["name"], job["status"]) == ("batch patch", "successful")
    assert patcher.logs(job["id"])
    wanted = {
        name: content
        for name, content in before.items()
        if not re.search(r"(?i)\.tiff?$|\d{10}_1\.xml$|/batch_1\.xml$", name)
        and Path(name).parent.name not in removed
    }
    for folder in removed:
        wanted["data/batch.xml"] = re.sub(
            rb"<issue [^>]*>\./%b/print/%b/[^<]*</issue>" % (GAZETTE.encode(), folder.encode()),
            b"",
            wanted["data/batch.xml"],
        )
    made = files_of(new)
    assert canonical(made.pop("data/batch.xml")) == canonical(wanted.pop("data/batch.xml"))
    assert made == wanted
    assert files_of(old) == before
    assert not [path for path in new.rglob("*") if path.name in removed]
    assert not unready.exists()


def test_a_patched_batch_can_be_loaded_completely(patcher):
    new = f"batch_oru_new{next(FRESH)}_ver01"
    patcher.run("batch-patch", ALPHA, new, stdin=f"RemoveIssue {GAZETTE}/1900010201".encode())
    repaired(patcher, "load-batch", new)
    assert patcher.held(new) == (1, 3, 6)
    assert patcher.held(ALPHA) == (1, 4, 8)


@pytest.mark.parametrize(
    "old, new, instructions, said",
    [
        (
            ALPHA,
            BETA,
            HELD + f"AddIssue {GAZETTE}/1900010201\n",
            "line 2: 'AddIssue' is not an instruction",
        ),
        (ALPHA, BETA, HELD + "RemoveIssue\n", "line 2: "),
        (ALPHA, BETA, HELD + "\nRemoveIssue  \n", "line 3: "),
        (
            ALPHA,
            BETA,
            f"RemoveIssue {GAZETTE}/1900010109\n",
            f"{GAZETTE}/1900010109' names no issue of {ALPHA}",
        ),
        (
            ALPHA,
            BETA,
            "RemoveIssue sn99990002/1900010101\n",
            f"sn99990002/1900010101' names no issue of {ALPHA}",
        ),
        (ALPHA, BETA, f"RemoveIssue {GAZETTE}/190001010\n", f"names no issue of {ALPHA}"),
        (ALPHA, BETA, "\n", "there is no instruction"),
        (ALPHA, ALPHA, HELD, f'"{ALPHA}" is in BATCH_SOURCE already'),
        (ALPHA, "../" + BETA, HELD, "is not a batch name"),
        (ALPHA, "", HELD, "is not a batch name"),
        ("./" + ALPHA, BETA, HELD, "is not a batch name"),
    ],
)
def test_a_patch_that_cannot_be_made_is_refused_with_a_sentence(
    patcher, old, new, instructions, said
):
    before = (
        sorted(path.name for path in patcher.source.iterdir()),
        patcher.call("list-jobs")["jobs"],
    )
    reply = patcher.call("batch-patch", old, new, stdin=instructions.encode() + TRAILER)
    assert (reply["status"], reply["message"]) == ("error", f'"{old}" cannot be modified')
    assert said in reply["error"]
    assert before == (
        sorted(path.name for path in patcher.source.iterdir()),
        patcher.call("list-jobs")["jobs"],
    )


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_patch_of_a_batch_unknown_to_open_oni_is_answered_as_recorded(patcher, on_disk):
    old = f"batch_oru_unknown{on_disk:d}_ver01"
    if on_disk:
        patcher.batch(old)
    reply = without_session(patcher.call("batch-patch", old, BETA, stdin=HELD.encode() + TRAILER))
    assert reply == {
        "status": "error",
        "message": f'"{old}" cannot be modified',
        "error": "batch does not exist",
    }


def test_a_patch_that_is_cancelled_when_it_is_whole_says_that_it_is_there(site, tmp_path):
    batch = site.batch(ALPHA)
    assert site.manage("load_batch", str(batch)).returncode == 0
    last = Gate(tmp_path / "last")
    altered(
        site,
        f"""
        really = agent.sync
        def sync(path):
            if str(path) == {str(site.source)!r}:
                open({str(last.path)!r}).read()
            really(path)
        agent.sync = sync
        """,
    )
    id = site.job("batch-patch", ALPHA, BETA, stdin=HELD.encode())
    last.reached()
    assert site.call("job-cancel", str(id))["message"] == "Job is being cancelled"
    last.open()
    there = site.source / BETA
    assert site.ended(id)["error"] == f"cancelled; {there} is there"
    assert there.is_dir()


def test_a_patch_is_not_made_under_the_name_of_a_batch_that_open_oni_holds(agent):
    agent.batch(ALPHA)
    repaired(agent, "load-batch", ALPHA)
    repaired(agent, "load-batch", agent.batch(BETA, start=date(1910, 1, 1)).name)
    shutil.rmtree(agent.source / BETA)
    reply = agent.call("batch-patch", ALPHA, BETA, stdin=HELD.encode())
    assert reply["error"] == f'Open ONI holds a "{BETA}" already; purge that first'


def test_a_patch_that_cannot_copy_a_file_says_so_once(agent):
    batch = agent.batch(ALPHA, issues=3)
    for image in batch.rglob("*.jp2"):
        os.truncate(image, 2 << 20)
    assert agent.manage("load_batch", str(batch)).returncode == 0
    hard = resource.prlimit(agent.agent.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(agent.agent.pid, resource.RLIMIT_FSIZE, (1 << 20, hard))
    job = agent.run("batch-patch", ALPHA, BETA, stdin=HELD.encode())
    assert job["status"] == "failed"
    assert re.fullmatch(r"\S+\.jp2 cannot be copied: File too large", job["error"])
    assert sorted(path.name for path in agent.source.iterdir()) == [ALPHA]


def test_a_patch_that_would_not_be_whole_is_not_made(agent):
    listing = agent.batch(ALPHA) / "data/batch.xml"
    issue = re.search("<issue .*?</issue>", listing.read_text())[0]
    listing.write_text(
        listing.read_text().replace(issue, issue + issue.replace('Order="01"', 'Order="02"'))
    )
    agent.run("load-batch", ALPHA)
    jobs = agent.call("list-jobs")["jobs"]
    reply = agent.call(
        "batch-patch", ALPHA, BETA, stdin=f"RemoveIssue {GAZETTE}/1900010102".encode()
    )
    assert reply["message"] == f'"{ALPHA}" cannot be modified'
    assert "which is to stay, lies in the folder of one that is to go" in reply["error"]
    assert agent.call("list-jobs")["jobs"] == jobs
    assert [path.name for path in agent.source.iterdir()] == [ALPHA]


def test_a_cancelled_patch_leaves_no_unready_folder(agent):
    old = agent.batch("batch_oru_alpha_ver01")
    agent.run("load-batch", old.name)
    (old / "data/many").mkdir()
    for number in range(15_000):
        os.link(old / "data/batch.xml", old / f"data/many/{number}")
    with Client(agent.port) as client:
        words = "batch-patch batch_oru_alpha_ver01 batch_oru_alpha_ver02"
        client.ask(words, b"RemoveIssue sn99990001/1900010101\n")
        until((agent.source / "WIP-UNREADY-batch_oru_alpha_ver02").exists)
        assert client.ask("job-cancel 2")["status"] == "success"
    job = agent.ended(2)
    assert (job["status"], job["error"]) == ("failed", "cancelled")
    assert os.listdir(agent.source) == [old.name]


def test_a_copy_that_fails_for_a_moment_is_tried_again(site):
    batch = site.batch(ALPHA)
    assert site.manage("load_batch", str(batch)).returncode == 0
    away = batch.with_name("away")
    altered(
        site,
        """
        really, failures = agent.shutil.copy2, {}
        def copy2(source, target):
            failures[target] = failures.get(target, 0) + 1
            if target.endswith(".jp2") and failures[target] < 3:
                raise OSError(agent.errno.ESTALE, 'Stale file handle')
            really(source, target)
        agent.shutil.copy2 = copy2
        """,
    )
    job = site.run("batch-patch", ALPHA, BETA, stdin=HELD.encode())
    assert job["status"] == "successful"
    said = [line for line in site.logs(job["id"]) if "cannot be copied" in line]
    assert len(said) == 2 * len(list((site.source / BETA).rglob("*.jp2"))) > 0
    assert said[0].endswith("Stale file handle; trying again")
    assert not away.exists()


def test_issues_are_removed_without_open_oni(tmp_path):
    old = make_batch(tmp_path, ALPHA, 3, 1)
    before = files_of(old)
    words = ["--remove-issues", str(old), str(tmp_path / "new")]
    status, out, said = run_agent(*words, f"{GAZETTE}/1900-01-01_01", f"{GAZETTE}/1900010301")
    assert (status, said) == (0, "")
    assert out.splitlines()[-1] == f"{tmp_path}/new is whole"
    listing = ElementTree.parse(tmp_path / "new/data/batch.xml")
    [left] = [node.text for node in listing.iter("{http://www.loc.gov/ndnp}issue")]
    assert Path(left).parent.name == "1900010201" == mets_of(tmp_path / "new", 0).parent.name
    assert files_of(old) == before
    assert run_agent(*words, f"{GAZETTE}/1900010101", f"{GAZETTE}/1900010301")[0] == 0  # again


@pytest.mark.parametrize(
    "words, status, said",
    [
        ([ALPHA, "new"], 2, "--remove-issues needs FOLDER NEWFOLDER LCCN/YYYYMMDDEE"),
        ([ALPHA, "new", "sn1/1900010101"], 1, "'sn1/1900010101' names no issue of"),
        ([ALPHA, f"{ALPHA}/new", f"{GAZETTE}/1900010101"], 1, "name a folder outside of it"),
        (["nowhere", "new", f"{GAZETTE}/1900010101"], 1, "no such file"),
    ],
)
def test_a_removal_that_cannot_be_is_told_in_a_sentence(tmp_path, words, status, said):
    make_batch(tmp_path, ALPHA, 2, 1)
    folders = [str(tmp_path / each) for each in words[:2]]
    found, _, sentence = run_agent("--remove-issues", *folders, *words[2:])
    assert found == status
    assert said in sentence
    assert os.listdir(tmp_path) == [ALPHA]


def test_a_patch_key_that_names_two_issues_is_refused(agent):
    """By folder it is the one, by edition the other."""
    batch = agent.batch(ALPHA)
    reel = mets_of(batch, 0).parent.parent
    (reel / "1900010201").rename(reel / "1900010102")
    (reel / "1900010102/1900010201.xml").write_text(mets_xml(2, edition=2))
    (reel / "1900010102/1900010201.xml").rename(reel / "1900010102/1900010102.xml")
    listing = batch / "data/batch.xml"
    text = (
        listing.read_text().replace("1900010201", "1900010102").replace("1900-01-02", "1900-01-01")
    )
    first, _ = re.findall("<issue .*</issue>", text)
    text = text.replace(first, first.replace('"01"', '"02"'))  # the folders' names say otherwise
    listing.write_text(text)
    agent.run("load-batch", ALPHA)
    before = files_of(batch)
    new = "batch_oru_alpha_ver02"
    for key in "1900010101", "1900010102":
        reply = agent.call(
            "batch-patch", ALPHA, new, stdin=f"RemoveIssue {GAZETTE}/{key}\n".encode()
        )
        assert (reply["status"], reply.get("job")) == ("error", None), reply
        assert key in reply["error"]
    assert not (agent.source / new).exists()
    assert files_of(batch) == before


def test_a_patched_batch_is_on_disk_when_its_job_has_ended(troubled):
    site = troubled.site.start()
    site.batch(ALPHA)
    site.run("load-batch", ALPHA)
    new = "batch_oru_alpha_ver02"
    line = f"RemoveIssue {GAZETTE}/1900010101\n".encode()
    assert site.run("batch-patch", ALPHA, new, stdin=line)["status"] == "successful"
    told = troubled.told()
    unready = f"{site.source}/WIP-UNREADY-{new}"
    renamed = told.index(f"rename {unready}")
    assert f"fsync {site.source}" in told[renamed:]
    made = [site.source / new, *(site.source / new).rglob("*")]
    assert len(made) > 10
    synced = {f"fsync {unready}{str(path)[len(str(site.source / new)):]}" for path in made}
    assert synced <= set(told[:renamed])


# --- Promises: the queue, restarts, and what is on disk -------------------------------------------

def test_jobs_run_in_order_one_at_a_time_and_none_is_lost_by_a_kill(site):
    names = [f"batch_oru_n{number:02}_ver01" for number in range(15)]
    ids = list(range(1, len(names) + 1))
    for name in names:
        site.batch(name, issues=1, pages=1)
    (site.oni / "at-work").mkdir()  # each manage.py leaves its pid here while it is at work
    site.prepend_to_manage(
        "import os, sys\nif 'load_batch' in sys.argv:\n    assert not os.listdir('at-work')\n    "
        "open(f'at-work/{os.getpid()}', 'w')\n    import atexit\n    "
        "atexit.register(os.remove, f'at-work/{os.getpid()}')"
    )
    gate = site.hold_load(site.source / names[0])
    site.start()
    assert [site.job("load-batch", name) for name in names] == ids
    gate.reached()
    site.kill()
    gate.open()
    site.start()
    for id in ids:  # each has its time
        site.ended(id)
    jobs = site.call("list-jobs")["jobs"]
    assert [(job["id"], job["status"]) for job in jobs] == [(id, "successful") for id in ids]
    order = [
        name
        for name, in site.query(
            "SELECT batch_name FROM core_loadbatchevent WHERE message LIKE 'proc%' ORDER BY id"
        )
    ]
    assert order == names


def test_a_restart_changes_no_answer_and_reuses_no_id(agent):
    agent.batch("batch_oru_alpha_ver01")
    agent.run("load-batch", "batch_oru_alpha_ver01")
    before = [
        without_session(agent.call(*words))
        for words in (["job-status", "1"], ["job-logs", "1"], ["list-jobs"])
    ]
    for how in (signal.SIGTERM, signal.SIGKILL):
        agent.stop(how)
        agent.start()
        after = [
            without_session(agent.call(*words))
            for words in (["job-status", "1"], ["job-logs", "1"], ["list-jobs"])
        ]
        assert after == before
    assert agent.job("purge-batch", "batch_oru_alpha_ver01") == 2


def test_the_same_request_twice_is_one_job_while_it_waits_and_while_it_runs(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    batch = agent.batch(BETA)
    assert [agent.job("load-batch", name) for name in (ALPHA, BETA)] == [1, 2]
    gate.reached()
    for id, name in (1, ALPHA), (2, BETA):
        reply = without_session(agent.call("load-batch", name))
        assert reply == {"status": "success", "message": ALREADY_QUEUED, "job": {"id": id}}
    gate.open()
    assert agent.ended(2)["status"] == "successful"
    gate = agent.hold(batch / "purge-gate")
    assert agent.job("purge-batch", BETA) == 3
    gate.reached()
    assert without_session(agent.call("purge-batch", BETA)) == {
        "status": "success",
        "message": ALREADY_QUEUED,
        "job": {"id": 3},
    }
    gate.open()
    assert agent.ended(3)["status"] == "successful"
    assert len(agent.call("list-jobs")["jobs"]) == 3


def test_the_same_request_ten_times_at_once_is_one_job(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    replies = at_once(*[lambda: agent.call("load-batch", ALPHA)] * 10)
    assert {reply["job"]["id"] for reply in replies} == {1}
    assert (
        sorted(reply["message"] for reply in replies)
        == ["Job added to queue"] + [ALREADY_QUEUED] * 9
    )
    gate.open()
    assert agent.ended(1)["status"] == "successful"


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("spoil", [no_shebang, removed])
def test_no_kind_of_job_could_start_when_manage_py_cannot_be_run(agent, spoil, warm):
    for name in BETA, "batch_oru_gamma_ver01":
        agent.batch(name)
    agent.run("load-batch", BETA)
    gate = agent.hold_load(agent.batch(ALPHA))
    agent.job("load-batch", ALPHA)
    patch = f"RemoveIssue {GAZETTE}/1900010101".encode()
    ids = [
        agent.job("batch-patch", BETA, "batch_oru_delta_ver01", stdin=patch),
        agent.job("purge-batch", BETA),
        agent.job("load-batch", "batch_oru_gamma_ver01"),
        agent.job("load-title", stdin=marc_xml()),
    ]
    gate.reached()
    spoil(agent.oni / "manage.py")
    if not warm:
        kill_warm_child(agent)
    gate.open()
    agent.ended(ids[-1])
    jobs = [agent.call("job-status", str(id)) for id in ids][
        warm:
    ]  # a patch only asks, and a warm child answers
    assert [each["job"]["status"] for each in jobs] == ["couldn't start"] * len(jobs)
    assert {each["message"] for each in jobs} == {"Invalid: this job was not able to start."}
    assert all(f"couldn't run {agent.oni / 'manage.py'}: " in each["job"]["error"] for each in jobs)
    assert str(agent.state / "inputs" / str(ids[-1])) in jobs[-1]["job"]["error"]


def test_the_child_that_answers_may_be_killed_between_two_questions(agent):
    for _ in range(3):
        assert agent.call("ensure-awardee", "oru")["message"] == "Awardee already exists"
        kill_warm_child(agent)
    assert agent.call("ensure-awardee", "oru")["message"] == "Awardee already exists"
    assert agent.zygote()  # one, that is


KILLS = int(os.environ.get("CRASH_KILLS", 18))

SEED = int(os.environ.get("CRASH_SEED", random.randrange(10**6)))

LANES = -(-KILLS // 5)  # tests that the kills are spread over

MOMENTS = (
    ("agent", "before the spawn"),
    ("both", "just after the spawn"),
    ("manage.py", "in mid-output"),
    ("agent", "in mid-output"),
    ("both", "in a repair's purge"),
    ("agent", "before the record"),
    ("agent", "just after the spawn"),
    ("both", "in mid-output"),
    ("manage.py", "in a repair's purge"),
    ("agent", "in a repair's purge"),
    ("both", "at any time"),
    ("agent", "at any time"),
    ("manage.py", "just after the spawn"),
    ("agent", "in a patch's copying"),
)


def kill(site: Site, victim: str) -> None:
    """kill -9 of the agent, of manage.py, or of both."""
    if victim != "manage.py":
        site.kill()
    if victim != "agent":
        pids = site.manage_pids("load_batch") + site.manage_pids("purge_batch")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        until(lambda: not set(pids).intersection(site.manage_pids()))


def crash_load(site: Site, victim: str, moment: str, name: str, draw: random.Random) -> None:
    """A load is killed at a moment; what must become of it becomes of it."""
    batch = site.batch(name, issues=2, pages=3)
    before = set((site.oni / "log").iterdir())
    id, gate = load_until(moment, site, batch, draw)
    kill(site, victim)
    for step in sorted(("open", "start"), key=lambda _: draw.random()):
        if step == "open" and gate:
            gate.open()
        if step == "start" and victim != "manage.py":
            site.start()
    job = site.ended(id)
    if victim == "manage.py":
        row, issues, pages = site.held(name)
        held = (
            f"ONI holds {issues} of the 2 issues and {pages} of the 6 pages"
            if row
            else "ONI holds nothing of the batch"
        )
        assert job["status"] == "failed"
        assert "signal 9 (SIGKILL)" in job["error"]
        assert held in job["error"]
        job = site.run("load-batch", name)
    assert (job["status"], job.get("error")) == ("successful", None)
    assert site.held(name) == (1, 2, 6)
    if victim == "agent":
        assert on_stderr(site, id) == printed(site, before)


def crash_patch(site: Site, victim: str, moment: str, name: str, draw: random.Random) -> None:
    """The agent is killed while it copies the files of a patch; that becomes whole all the same."""
    old = site.batch(name, issues=4, pages=100)
    new = site.source / name.replace("ver01", "ver02")
    half_load(site, old)
    id = site.job("batch-patch", old.name, new.name, stdin=b"RemoveIssue sn99990001/1900010201\n")
    site.wait_for(rf"job={id} .*begins")
    time.sleep(draw.uniform(0, 0.1))
    kill(site, victim)
    site.start()
    assert site.ended(id)["status"] == "successful"
    kept = {
        name: content
        for name, content in files_of(old).items()
        if not name.endswith((".tif", "_1.xml", "batch.xml")) and "1900010201" not in name
    }
    made = files_of(new)
    assert made.pop("data/batch.xml").count(b"<issue ") == 3
    assert made == kept
    assert not list(site.source.glob("WIP*"))


@pytest.mark.parametrize("lane", range(LANES))
def test_a_job_outlives_kills_at_every_moment_of_its_life(witnessed, lane):
    print(f"CRASH_KILLS={KILLS} CRASH_SEED={SEED}")
    draw = random.Random(f"{SEED} {lane}")
    witnessed.start()
    for number in range(lane, KILLS, LANES):
        victim, moment = MOMENTS[number % len(MOMENTS)]
        print(f"kill {number}: {victim}, {moment}")
        crash = crash_patch if moment == "in a patch's copying" else crash_load
        crash(witnessed, victim, moment, f"batch_oru_k{number}_ver01", draw)
    jobs = witnessed.call("list-jobs")["jobs"]
    assert [job["id"] for job in jobs] == list(range(1, len(jobs) + 1))
    assert {job["status"] for job in jobs} <= {"successful", "failed"}


def test_sigterm_stops_the_agent_and_leaves_the_load_at_work(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    gate = site.hold_load(batch)
    id = site.job("load-batch", batch.name)
    gate.reached()
    assert site.stop() == 0
    loading = site.manage_pids("load_batch")
    assert len(loading) == 1
    gate.open()
    until(lambda: not site.manage_pids("load_batch"))  # nobody reads, and it runs to its end
    assert site.held(batch.name) == (1, 2, 4)
    assert site.start().ended(id)["status"] == "successful"
    assert on_stderr(site, id) == printed(site)


def test_sigterm_at_the_first_moment_stops_the_agent(witnessed):
    for _ in range(6):
        assert (
            witnessed.start().stop() == 0
        )  # the signal may come while the agent writes to its log


def test_the_third_interruption_of_a_job_is_its_end(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    site.batch("batch_oru_beta_ver01")
    for attempt in range(3):
        gate = site.hold_load(batch)
        if attempt == 0:
            assert site.job("load-batch", batch.name) == 1
            assert site.job("load-batch", "batch_oru_beta_ver01") == 2
        else:
            site.start()
        gate.reached()
        assert [job["status"] for job in site.call("list-jobs")["jobs"]] == ["started", "pending"]
        kill(site, "both")
        gate.open()
    job = site.start().ended(1)
    assert job["status"] == "failed"
    assert "3 times" in job["error"]
    assert sum("interrupted" in line for line in site.logs(1)) == 3
    assert site.ended(2)["status"] == "successful"
    assert site.run("load-batch", batch.name)["status"] == "successful"
    assert site.held(batch.name) == (1, 2, 4)


def test_stopping_on_purpose_is_no_interruption(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    for _ in range(4):
        agent.stop()
        agent.start().wait_for("adopted")
    gate.open()
    job = agent.ended(id)
    assert (job["status"], job["attempts"]) == ("successful", 1)


def test_no_attempt_is_counted_that_a_stop_of_the_agent_has_cut_short(site):
    """As by a unit without KillMode=process, which ends manage.py with the agent."""
    batch = site.batch(ALPHA)
    for _ in range(oni_agent.MAX_ATTEMPTS + 1):
        gate = site.hold_load(batch)
        if not site.start().call("list-jobs")["jobs"]:
            site.job("load-batch", ALPHA)
        gate.reached()
        [manage] = site.manage_pids("load_batch")
        site.agent.send_signal(signal.SIGTERM)
        os.kill(manage, signal.SIGTERM)
        assert site.agent.wait(30) == 0
        gate.open()
    job = site.start().ended(1)
    assert (job["status"], job["attempts"]) == ("successful", 1)
    assert not (site.state / "stopped").exists()


def test_a_second_agent_on_a_state_folder_is_refused(agent):
    said = failed_start(agent)
    assert "another ONI Agent" in said
    assert str(agent.state) in said
    assert agent.call("version")["status"] == "success"


def test_a_full_disk_refuses_jobs_and_keeps_none(disk, witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    disk.fill()
    for words, stdin in ((("load-batch", batch.name), None), (("load-title",), marc_xml())):
        reply = site.call(*words, stdin=stdin)
        assert (reply["status"], reply.get("job")) == ("error", None)
        assert reply["message"] != "Invalid data"
        assert str(site.state) in reply["error"]
        assert site.call("list-jobs")["jobs"] == []
    assert site.agent.poll() is None
    disk.free()
    assert site.run("load-batch", batch.name)["status"] == "successful"
    before = without_session(site.call("list-jobs"))
    assert len(before["jobs"]) == 1
    assert without_session(site.restart().call("list-jobs")) == before


def test_no_id_is_given_twice_though_the_database_was_moved_away(site):
    site.batch(ALPHA)
    site.start()
    repaired(site, "load-batch", ALPHA)
    repaired(site, "purge-batch", ALPHA)
    site.stop()
    for file in site.state.glob("jobs.db*"):
        file.rename(site.state.parent / file.name)
    site.start()
    assert site.job("load-batch", ALPHA) == 3
    assert site.ended(3)["status"] == "successful"
    assert not any("purge_batch" in line for line in site.logs(3))
    assert [job["id"] for job in site.call("list-jobs")["jobs"]] == [3]


def test_an_ended_job_of_a_kind_that_is_not_known_holds_nobody_up(site):
    """An agent of another release has left it."""
    past_jobs(site, (["embargo-batch", ALPHA], "failed", 2, 1))
    site.batch(ALPHA)
    site.start()
    assert site.call("list-jobs")["jobs"][0]["words"] == ["embargo-batch", ALPHA]
    repaired(site, "load-batch", ALPHA)
    assert site.call("job-retry", "1")["status"] == "error"


def change_store(site: Site, *statements: str) -> None:
    """Changes jobs.db by hand, and leaves it as a killed agent would: with a write-ahead log."""
    path = site.state / "jobs.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        for statement in statements:
            database.execute(statement)
        for name in "jobs.db", "jobs.db-wal":
            shutil.copyfile(site.state / name, site.state / f"{name}.copy")
    for name in "jobs.db", "jobs.db-wal":
        (site.state / f"{name}.copy").rename(site.state / name)


def damage_garbage(site: Site) -> str:
    (site.state / "jobs.db").write_bytes(b"This is not a database.\n" * 1000)
    return "not a database"


def damage_header(site: Site) -> str:
    with open(site.state / "jobs.db", "r+b") as file:
        file.write(bytes(100))
    return "jobs.db"


def damage_page(site: Site) -> str:
    with open(site.state / "jobs.db", "r+b") as file:
        file.seek(8 * 4096)
        file.write(random.Random(1).getrandbits(8 * 4096).to_bytes(4096, "big"))
    return "jobs.db"


def damage_end(site: Site) -> str:
    os.truncate(site.state / "jobs.db", 5 * 4096)
    return "jobs.db"


def damage_owner(site: Site) -> str:
    for path in site.state.glob("jobs.db*"):
        path.unlink()
    change_store(
        site, "CREATE TABLE addresses (name TEXT)", "INSERT INTO addresses VALUES ('somebody')"
    )
    return "not an ONI Agent's"


def damage_version(site: Site) -> str:
    change_store(site, "PRAGMA user_version = 99")
    return "newer"


@pytest.mark.parametrize(
    "damage",
    [
        damage_garbage,
        damage_header,
        damage_page,
        damage_end,
        damage_owner,
        damage_version,
    ],
)
def test_a_store_that_is_damaged_foreign_or_newer_is_left_alone(witnessed, damage):
    site = witnessed
    past_jobs(site, *[(["load-batch", "batch_oru_alpha_ver01"], "successful", 1, 1)] * 800)
    expected = damage(site)
    before = {path: path.read_bytes() for path in site.state.glob("jobs.db*")}
    for _ in range(2):
        said = failed_start(site, oni_agent.EXIT_HOPELESS)
        assert expected in said
        assert str(site.state / "jobs.db") in said
        assert {path: path.read_bytes() for path in before} == before


def test_a_job_whose_words_are_damaged_is_no_reason_to_forget_the_others(witnessed):
    site = witnessed
    past_jobs(site, *[(["load-batch", "batch_oru_alpha_ver01"], "successful", 1, 1)] * 80)
    change_store(site, "UPDATE jobs SET words = '[\"load-bat' WHERE id = 60")
    for _ in range(2):
        assert f"{site.state / 'jobs.db'} is damaged" in failed_start(site, oni_agent.EXIT_HOPELESS)
    change_store(site, "UPDATE jobs SET words = '[\"load-batch\", \"x\"]' WHERE id = 60")
    site.start()
    assert len(site.call("list-jobs")["jobs"]) == 80


def test_a_store_that_cannot_be_read_is_told_in_a_sentence(witnessed):
    site = witnessed
    past_jobs(site, (["load-batch", "batch_oru_alpha_ver01"], "successful", 1, 1))
    change_store(site, "ALTER TABLE jobs RENAME COLUMN attempts TO tries")
    said = failed_start(site)
    assert f"{site.state / 'jobs.db'} cannot be used: no such column" in said
    assert "Traceback" not in said


def test_batch_status_shows_the_newest_ten_jobs_of_a_batch(site):
    site.batch(ALPHA)
    past_jobs(site, *[(["load-batch", ALPHA], "failed", 1, 1)] * 12)
    site.start()
    jobs = site.call("batch-status", ALPHA)["jobs"]
    assert [job["id"] for job in jobs] == list(range(3, 13))


def test_finished_jobs_are_forgotten_after_90_days_but_for_the_newest_100(witnessed):
    site = witnessed
    site.batch("batch_oru_alpha_ver01")
    done = (["load-batch", "batch_oru_old_ver01"], "successful")
    past_jobs(
        site,
        (*done, 200, 1),
        *[(*done, 200, 91)] * 149,
        (["load-batch", "batch_oru_alpha_ver01"], "pending", 2, None),
        (["purge-batch", "batch_oru_alpha_ver01"], "started", 2, None),
    )
    for id in (1, 2):
        (site.state / f"inputs/{id}").mkdir(parents=True)
    assert site.start().ended(152)["status"] == "successful"
    until(lambda: site.call("job-logs", "2")["message"] == "Job not found")
    assert os.listdir(site.state / "inputs") == ["1"]
    ids = [job["id"] for job in site.call("list-jobs")["jobs"]]
    # Job 1 ended yesterday. Whether jobs 151 and 152 had ended by then is a matter of moments.
    assert ids in [[1, *range(first, 153)] for first in (51, 52, 53)]
    assert sorted({int(path.stem) for path in (site.state / "logs").iterdir()}) == ids
    assert site.restart().job("load-batch", "batch_oru_alpha_ver01") == 153


LEAVES_A_DAEMON = """
import os, sys
if "load_batch" in sys.argv and os.fork() == 0:
    os.%s
    open("daemon-gate").read()
    os._exit(0)
"""


@pytest.mark.parametrize("adopted", [False, True])
@pytest.mark.parametrize("call", ["getpid()", "setsid()"])
def test_what_manage_py_leaves_behind_is_named_and_holds_no_job(site, call, adopted):
    site.prepend_to_manage(LEAVES_A_DAEMON % call)
    daemon = site.hold(site.oni / "daemon-gate")
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA)
    first = site.start().job("load-batch", ALPHA)
    gate.reached()
    daemon.reached()
    if adopted:
        site.restart().wait_for("adopted")
    gate.open()
    job = site.ended(first)
    assert (job["status"], job.get("error")) == ("successful", None)
    [line] = [line for line in site.logs(first) if "left behind" in line]
    pids = [str(pid) for pid in site.manage_pids("load_batch")]
    assert re.search(r"process \d+ ", line) is None or re.search(r"process (\d+) ", line)[1] in pids
    assert (call == "getpid()") == bool(re.search(r"process \d+ ", line))
    assert site.call("job-cancel", str(first))["message"] == "The job has ended already"
    assert site.held(ALPHA) == (1, 2, 4)
    assert site.run("purge-batch", ALPHA)["status"] == "successful"
    daemon.open()


@pytest.mark.parametrize("changed", ["boot", "ticks"])
def test_a_process_that_has_the_number_of_an_earlier_manage_py_is_not_adopted(witnessed, changed):
    site = witnessed.start()
    gate = site.hold_load(site.batch(ALPHA), issue=1)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    site.kill()
    [pid] = site.manage_pids("load_batch")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not site.manage_pids("load_batch"))
    gate.open()
    other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    index = site.state / "logs/1.log"
    child = oni_agent.as_child(other.pid)
    boot, ticks = child.birth.split("/")
    birth = f"{boot[::-1]}/{ticks}" if changed == "boot" else f"{boot}/{int(ticks) + 1}"
    begun = re.sub(r"\b\d+ \S+/\d+ manage", f"{other.pid} {birth} manage", index.read_text())
    index.write_text(begun)
    job = site.start().ended(id)
    assert (job["status"], job["attempts"]) == ("successful", 2)
    assert not any("adopted" in line for line in site.log)
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_manage_py_is_adopted_though_the_agent_was_killed_before_it_wrote_of_it(witnessed):
    site = witnessed.start()
    gate = site.hold_load(site.batch(ALPHA), issue=1)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    site.kill()
    index = site.state / "logs/1.log"
    index.write_text(index.read_text().partition("[")[0])
    for _ in range(2):
        site.start().wait_for("adopted=yes")
        assert re.search(r"\$ 0 0 manage.py load_batch ", index.read_text())
        site.kill()
    gate.open()
    job = site.start().ended(id)
    assert (job["status"], job["attempts"]) == ("successful", 1)


QUICK_LOAD = r'''
if command == "load_batch":  # what matters here is the queue, and this takes no time
    import json, re, sqlite3, urllib.request
    name = os.path.basename(sys.argv[2])
    day = re.search('issueDate="(.*?)"', open(sys.argv[2] + "/data/batch.xml").read())[1]
    page = {"id": f"/lccn/sn99990001/{day}/ed-1/seq-1/", "type": "page", "batch": name,
            "lccn": "sn99990001", "language": ["English"]}
    urllib.request.urlopen(os.environ["ONI_SOLR_URL"] + "/solr/openoni/update/?commit=true",
                           json.dumps([page]).encode())
    now = "2026-01-01 00:00:00"
    database = sqlite3.connect("oni.sqlite3", timeout=60)
    database.execute("INSERT INTO core_batch (name, created, validated_batch_file, awardee_id)"
                     " VALUES (?, ?, '', 'oru')", [name, now])
    issue = database.execute(
        "INSERT INTO core_issue"
        " (batch_id, title_id, date_issued, number, edition, edition_label, created)"
        " VALUES (?, 'sn99990001', ?, '', 1, '', ?)", [name, day, now]).lastrowid
    database.execute(
        "INSERT INTO core_page"
        " (issue_id, sequence, number, section_label, tiff_filename, indexed, created)"
        " VALUES (?, 1, '1', '', '', 1, ?)", [issue, now])
    database.execute("INSERT INTO core_loadbatchevent (batch_name, created, message)"
                     " VALUES (?, ?, 'processed 1 pages')", [name, now])
    database.commit()
    sys.exit(print(name, file=sys.stderr))
'''


def test_fifty_jobs_survive_ten_kills_in_order(witnessed):
    site = witnessed
    site.prepend_to_manage(WITNESS + QUICK_LOAD)  # which never comes to the fixture's WITNESS
    site.start()
    print(f"CRASH_SEED={SEED}")
    draw = random.Random(SEED)
    names = [f"batch_oru_n{number:03}_ver01" for number in range(1, 51)]
    for number, name in enumerate(names):
        day = date(1900, 1, 1) + timedelta(days=number)
        site.batch(name, issues=1, pages=1, start=day)
    gate = site.hold(site.oni / "hold-load_batch")
    with Client(site.port) as client:
        assert [client.ask(f"load-batch {name}")["job"]["id"] for name in names] == list(
            range(1, 51)
        )
    gate.open()
    for last in sorted(draw.sample(range(1, 50), 10)):
        site.wait_for(rf"job={last} .*begins|job={last + 1} .*begins")
        time.sleep(draw.uniform(0, 0.1))
        site.restart()
    site.ended(50)
    jobs = site.call("list-jobs")["jobs"]
    assert [job["id"] for job in jobs] == list(range(1, 51))
    assert {job.get("error", "") for job in jobs} == {""}
    loaded = site.query("SELECT batch_name FROM core_loadbatchevent ORDER BY id")
    assert loaded == [(name,) for name in names]
    with Client(site.port) as client:
        for id, name in enumerate(names, 1):
            stderr = client.ask(f"job-logs {id}")["job"]["stderr"]
            assert [line[33:] for line in stderr] == [name]


def channels_opened(site: Site) -> int:
    """How many channels there have been, by what paramiko logs."""
    return sum("(session) opened" in line for line in list(site.log))


def test_job_wait_answers_when_the_job_has_ended_and_its_exit_status_tells_success(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01"))
    failing_load(agent)
    good = agent.job("load-batch", "batch_oru_alpha_ver01")
    bad = agent.job("load-batch", "batch_oru_broken_ver01")
    gate.reached()
    channels = channels_opened(agent)
    waiting = [ssh_begin(agent, f"job-wait {id}") for id in (good, bad)]
    gone = ssh_begin(agent, f"job-wait {good}")
    until(lambda: channels_opened(agent) == channels + 3)
    gone.kill()
    gone.communicate()
    assert agent.call("job-status", str(good))["job"]["status"] == "started"
    assert [each.poll() for each in waiting] == [None, None]
    gate.open()
    answers = [(json.loads(each.communicate(timeout=90)[0]), each.returncode) for each in waiting]
    assert [(reply["status"], reply["job"]["status"], code) for reply, code in answers] == [
        ("success", "successful", 0),
        ("success", "failed", 1),
    ]
    for reply, _ in answers:
        assert without_session(reply) == without_session(
            agent.call("job-status", str(reply["job"]["id"]))
        )
    assert ssh_run(agent, f"job-wait {bad}").returncode == 1
    assert ssh_run(agent, "job-wait -1").returncode == 0
    assert json.loads(ssh_run(agent, "job-wait 77").stdout)["message"] == "Job not found"


def test_job_wait_is_woken_by_the_end_of_its_job(site):
    gate = site.hold_load(site.batch(ALPHA))
    hurry(site, WATCH_SECONDS=3600)  # no look at who waits comes in time
    id = site.job("load-batch", ALPHA)
    gate.reached()
    with Client(site.port) as client:
        waiting = client.channel(f"job-wait {id}")
        gate.open()
        assert json.loads(waiting.makefile("rb").read())["job"]["status"] == "successful"


def cancelled_in_vain(site: Site, **limits: float) -> Gate:
    """The gate at which a load stands: job 1, cancelled, whose manage.py ignores that."""
    site.prepend_to_manage(
        "import sys, signal\nif 'load_batch' in sys.argv: "
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    )
    gate = site.hold_load(site.batch("batch_oru_alpha_ver01"))
    hurry(site, **limits)
    site.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    site.call("job-cancel", "1")
    return gate


def test_a_manage_py_that_ignores_sigterm_is_killed_and_its_batch_purged(site):
    cancelled_in_vain(site, TERM_SECONDS=1)
    assert site.ended(1)["error"] == "cancelled; ONI holds nothing of the batch"
    signals = [line.split()[1] for line in site.logs(1) if line.startswith("cancelled: SIG")]
    assert signals == ["SIGTERM", "SIGKILL"]
    assert site.held("batch_oru_alpha_ver01") == (0, 0, 0)


def test_a_job_that_could_not_start_is_retried_and_one_that_waits_is_not(agent):
    manage = agent.oni / "manage.py"
    text = (agent.oni / "manage.py").read_text()
    agent.batch("batch_oru_alpha_ver01")
    agent.call("batch-status", "batch_oru_alpha_ver01")  # the child that answers is there
    rewrite(manage, text.replace("#!/usr/bin/env python3", "#!/nowhere/python3"))
    assert agent.run("load-batch", "batch_oru_alpha_ver01")["status"] == "couldn't start"
    assert [job["id"] for job in agent.ssh('list-jobs "couldn\'t start"')["jobs"]] == [1]
    rewrite(manage, text)
    gate = agent.hold_load(agent.source / "batch_oru_alpha_ver01")
    failing_load(agent)
    assert agent.ssh("job-retry 1")["job"]["id"] == 2
    agent.job("load-batch", "batch_oru_broken_ver01")
    gate.reached()
    assert [agent.ssh(f"job-retry {id}")["error"].split(":")[0] for id in (2, 3)] == [
        "Started",
        "Pending",
    ]
    again = agent.ssh("job-retry 1")
    assert (again["message"], again["job"]["id"]) == ("Job already in queue", 2)
    gate.open()
    assert agent.ended(2)["status"] == "successful"


def test_list_jobs_filters_by_status_and_tells_all_of_each_job(agent):
    gate = agent.hold_load(agent.batch("batch_oru_gamma_ver01"))
    agent.batch("batch_oru_alpha_ver01")
    failing_load(agent)
    for name in ("alpha", "broken", "gamma"):
        agent.job("load-batch", f"batch_oru_{name}_ver01")
    agent.job("purge-batch", "batch_oru_alpha_ver01")
    gate.reached()
    assert [job["id"] for job in agent.ssh("list-jobs")["jobs"]] == [1, 2, 3, 4]
    for status, id in (("successful", 1), ("failed", 2), ("started", 3), ("pending", 4)):
        (job,) = agent.ssh(f"list-jobs {status}")["jobs"]
        assert job["id"] == id
        assert job["words"][0] in ("load-batch", "purge-batch")
        assert job["attempts"] == (0 if status == "pending" else 1)
        assert ("error" in job, "started" in job, "ended" in job) == (id == 2, id != 4, id < 3)
        assert all(
            re.fullmatch(STAMP, job[key]) for key in ("queued", "started", "ended") if key in job
        )
        assert job.get("seconds", 0) >= 0
    assert agent.ssh("list-jobs finished")["message"] == '"finished" is not a job status'
    gate.open()


def test_job_status_tells_the_place_in_the_queue_and_how_far_a_load_is(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01", issues=5), issue=2)
    for name in ("batch_oru_beta_ver01", "batch_oru_gamma_ver01"):
        agent.batch(name)
    for name in ("alpha", "beta", "gamma"):
        agent.job("load-batch", f"batch_oru_{name}_ver01")
    gate.reached()
    assert [agent.ssh(f"job-status {id}")["job"]["place"] for id in (2, 3)] == [
        2,
        3,
    ]  # the one at work is the first
    job = until(lambda: (job := agent.ssh("job-status 1")["job"]).get("issues_loaded") and job)
    assert (job["issues_loaded"], job["issues"]) == (3, 5)
    assert job["seconds"] > 0
    assert "ended" not in job
    gate.open()
    job = agent.ended(1)
    assert job["started"] < job["ended"]
    assert "issues_loaded" not in job
    assert "place" not in job


def test_a_program_is_told_of_each_job_that_has_ended(site, tmp_path):
    told = tmp_path / "told"
    gate = Gate(tmp_path / "gate")
    failing_load(site)
    site.batch("batch_oru_alpha_ver01")
    site.start(
        ON_FINISH=program(
            tmp_path / "finish",
            f"env > {told}.$ONI_JOB_ID.new && mv {told}.$ONI_JOB_ID.new "
            f"{told}.$ONI_JOB_ID\ncat {gate.path}\nexit 3",
        )
    )
    jobs = [
        site.run("load-batch", f"batch_oru_{name}_ver01") for name in ("broken", "alpha")
    ]  # though the first hangs
    for job, error in zip(jobs, (jobs[0]["error"], "")):
        until(Path(f"{told}.{job['id']}").exists)
        about = dict(
            line.split("=", 1)
            for line in Path(f"{told}.{job['id']}").read_text().splitlines()
            if "=" in line
        )
        shown = {name: value for name, value in about.items() if name.startswith("ONI_JOB_")}
        assert shown == {
            "ONI_JOB_ID": str(job["id"]),
            "ONI_JOB_COMMAND": " ".join(job["words"]),
            "ONI_JOB_STATUS": job["status"],
            "ONI_JOB_ERROR": error,
            "ONI_JOB_LOG": str(site.state / f"logs/{job['id']}.log"),
        }
    gate.open()
    site.wait_for("ON_FINISH failed: .*exit status 3")
    assert site.call("version")["status"] == "success"
    assert site.stop() == 0


def test_a_program_that_cannot_run_or_hangs_harms_nothing(site, tmp_path):
    hanging = Path(program(tmp_path / "finish", f"echo > {tmp_path}/begun; exec sleep 600"))
    for name in ("alpha", "beta"):
        site.batch(f"batch_oru_{name}_ver01")
    site.start(ON_FINISH=str(hanging))
    assert site.run("load-batch", "batch_oru_alpha_ver01")["status"] == "successful"
    until((tmp_path / "begun").exists)
    hanging.unlink()
    assert site.run("load-batch", "batch_oru_beta_ver01")["status"] == "successful"
    site.wait_for("job=2 ON_FINISH failed: exit status 127")
    assert site.stop() == 0
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"ONI_JOB_LOG={site.state}".encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


def test_an_error_however_long_keeps_no_program_from_being_told(site, tmp_path):
    site.prepend_to_manage(
        "import sys\nif 'load_batch' in sys.argv: sys.exit('[ERROR] ' + 'é' * 3_000_000)"
    )
    told = tmp_path / "told"
    finish = program(
        tmp_path / "finish", f'printf %s "$ONI_JOB_ERROR" > {told}.new\nmv {told}.new {told}'
    )
    site.batch(ALPHA)
    job = site.start(ON_FINISH=str(finish)).run("load-batch", ALPHA)
    assert "ééé" in job["error"]
    until(told.exists)
    assert told.read_text() == job["error"]


def test_a_job_waits_for_a_solr_that_comes_back(site):
    site.batch(ALPHA)
    site.start()
    with site.solr.down():
        id = site.job("load-batch", ALPHA)
        until(lambda: site.call("job-status", str(id))["job"]["status"] == "started")
    assert site.ended(id)["status"] == "successful"
    assert word(site)[0] == "complete"


@pytest.mark.parametrize("first", ["agent", "manage.py"])
def test_a_sigterm_to_agent_and_manage_py_at_once_ends_no_job(agent, first):
    """As of systemctl kill, or of a container that stops."""
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    [manage] = agent.manage_pids("load_batch")
    with Client(agent.port) as client:
        channel = client.channel(f"job-wait {id}")
        for pid in sorted(
            (agent.agent.pid, manage), key=lambda pid: (pid == manage) == (first == "agent")
        ):
            os.kill(pid, signal.SIGTERM)
        assert channel.makefile("rb").read() == b""  # nothing was said of an end
    assert agent.agent.wait(30) == 0
    gate.open()
    job = agent.start().ended(id)
    assert (job["status"], job["attempts"]) == ("successful", 1)  # a stop counts for none
    assert agent.held(ALPHA) == (1, 2, 4)


def test_what_a_stopping_agent_accepts_is_answered(witnessed):
    site = witnessed
    names = [f"batch_oru_n{number}_ver01" for number in range(60)]
    for name in names:
        site.batch(name, issues=1, pages=1)
    question = site.hold(site.oni / "hold-question")
    hurry(site, STOP_SECONDS=0.2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.port)) for _ in range(6)]
        channels = [clients[n % 6].channel(f"load-batch {name}") for n, name in enumerate(names)]
        question.reached()
        site.agent.send_signal(signal.SIGTERM)
        site.wait_for("stopping on SIGTERM")
        question.open()
        answers = [channel.makefile("rb").read() for channel in channels]
    assert site.agent.wait(30) == 0
    replies = [json.loads(answer) for answer in answers if answer]
    answered = {reply["job"]["id"] for reply in replies if reply["status"] == "success"}
    site.prepend_to_manage("import sys; sys.exit(0)")  # whatever becomes of them
    assert {job["id"] for job in site.start().call("list-jobs")["jobs"]} == answered


def test_a_third_attempt_that_ended_well_while_no_agent_was_there_is_a_success(witnessed):
    site = witnessed.start()
    batch = site.batch(ALPHA)
    for victim in "both", "both", "agent":
        gate = site.hold_load(batch)
        if not site.call("list-jobs")["jobs"]:
            assert site.job("load-batch", ALPHA) == 1
        gate.reached()
        kill(site, victim)
        gate.open()
        until(lambda: not site.manage_pids("load_batch"))
        if victim == "both":
            gate = site.hold_load(batch)
            site.start()
    job = site.start().ended(1)
    assert (job["status"], job.get("error")) == ("successful", None)
    assert job["attempts"] == 3


GAMMA = "batch_oru_gamma_ver01"


def test_a_job_forgotten_while_it_is_in_the_queue_stops_no_other(site):
    hurry(site, KEEP_DAYS=0.00001, KEEP_JOBS=0, SWEEP_SECONDS=0, WATCH_SECONDS=0.1)
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA)
    site.batch(GAMMA)
    first = site.job("load-batch", ALPHA)
    gate.reached()
    second = site.job("load-batch", BETA)
    assert site.call("job-cancel", str(second))["message"] == "Job cancelled"
    third = site.job("load-batch", GAMMA)
    until(lambda: site.call("job-status", str(second))["message"] == "Job not found")
    gate.open()
    site.wait_for(f"job={first} .*status=")
    site.wait_for(f"job={third} .*status='successful'")
    assert site.held(BETA) == (0, 0, 0)


def test_files_that_cannot_be_counted_in_time_are_no_reason_to_purge_a_whole_batch(site):
    gate = held_question(site, 'FROM "core_title"')  # which is asked when files are counted
    site.manage("load_batch", str(site.batch(ALPHA)))
    held = site.held(ALPHA)
    hurry(site, ANSWER_SECONDS=3, PATIENT_SECONDS=3, CHECK_SECONDS=3)
    job = site.run("load-batch", ALPHA)
    assert job["status"] == "failed"
    assert job["error"] == (
        "ONI holds 2 issues and 4 pages, and what it should hold is not known: its files are still"
        " being counted; ask again"
    )
    assert site.held(ALPHA) == held == (1, 2, 4)
    assert site.events(ALPHA) == ["starting load", "processed 4 pages"]
    assert site.logs(job["id"]) == []
    gate.remove()
    until(lambda: word(site)[0] == "complete")
    assert without_session(site.call("load-batch", ALPHA)) == NOOP


@pytest.mark.parametrize("cancelled", [0, 1])
def test_a_fault_of_the_agent_is_the_end_of_one_job_and_stops_no_other(site, cancelled):
    """Here it does not know the kind of a job that an agent of another release has begun."""
    past_jobs(site, (["embargo-batch", ALPHA], "started", 2, None))
    change_store(site, f"UPDATE jobs SET cancelled = {cancelled}")
    site.batch(BETA)
    site.start()
    assert site.run("load-batch", BETA)["status"] == "successful"
    job = site.call("job-status", "1")["job"]
    assert job["status"] == "failed"
    assert job["error"] == "a fault of the agent, see its log: KeyError('embargo-batch')"


def test_an_agent_whose_worker_cannot_go_on_ends_and_says_why(site):
    altered(site, "agent.JobStore.expired = lambda store, now: {}['a fault']")
    assert site.agent.wait(30) != 0
    site.wait_for("KeyError: 'a fault'")


def test_the_agent_may_open_as_many_files_as_it_is_allowed_to(site):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        site.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    soft, hard = resource.prlimit(site.agent.pid, resource.RLIMIT_NOFILE)
    assert soft == min(hard, 65536)


def test_a_job_that_succeeded_stays_so_though_no_thread_can_be_had(troubled, tmp_path):
    site = troubled.site
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho $ONI_JOB_ID $ONI_JOB_STATUS >> " + str(tmp_path / "told"))
    program.chmod(0o755)
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA)
    site.start(ON_FINISH=str(program))
    first = site.job("load-batch", ALPHA)
    gate.reached()
    with troubled.having("no-threads"):
        gate.open()
        site.wait_for(f"job={first} .*status='successful'")
    assert site.run("load-batch", BETA)["status"] == "successful"
    assert site.call("job-status", str(first))["job"]["status"] == "successful"
    assert len([line for line in site.logs(first) if "loading batch at" in line]) == 1


# A life of some jobs, once for each number: so many of the calls that strace counts are dummies
# that its `when` hits another call of the life each time. It says what was answered.
LIFE = r'''
import contextlib, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import oni_agent
top, family, count = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])

def dummy():
    with contextlib.suppress(OSError):
        {
            "fsync": lambda: os.fsync(999), "fdatasync": lambda: os.fdatasync(999),
            "pwrite64": lambda: os.pwrite(999, b"", 0), "mkdir": lambda: os.mkdir("/"),
            "rename": lambda: os.rename("/no/such", "/no/such"),
            "unlink": lambda: os.unlink("/no/such"), "rmdir": lambda: os.rmdir("/no/such"),
        }[family]()

def say(*words):
    os.write(told, (" ".join(map(str, words)) + "\n").encode())

def asked(action, *words):
    """Asked as a client or the worker asks: refused, or done; what is refused is tried again."""
    for attempt in range(2):
        try:
            say("begun", *words)
            result = action()
            say("done", *words, *([result.id] if result else []))
            return result
        except OSError as error:
            say("refused", *words, repr(error))

def life(folder):
    say("opening")
    store = oni_agent.JobStore(folder)
    say("open")
    with store.new_input() as given:
        given.write(b"<record/>")
        def add_title():
            oni_agent.sync(given.name)
            return store.add(["load-title"], Path(given.name))
        title = asked(add_title, "add-title")
    def add(name):
        return asked(lambda: store.add(["load-batch", name]), "add", name)
    for name in "abc":
        add(name)
    job = add("d")
    if job:
        asked(lambda: store.begin(job, 5, 1), "begin", job.id)
        asked(lambda: store.cancel(job), "cancel", job.id)
        end = oni_agent.End(oni_agent.FAILED, "cancelled", 7)
        asked(lambda: store.end(job, end), "end", job.id)
    last = add("e")
    if title:
        def forget():
            store.remove_files(title.id)
            store.forget([title.id])
        asked(forget, "forget", title.id)
    say("lived")

for number in range(1, count + 1):
    child = os.fork()
    if not child:
        try:
            told = os.open(top / f"{number}.told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for _ in range(100 - number):
                dummy()
            life(top / str(number))
        except oni_agent.Problem as problem:
            say("not-started", problem)
            os._exit(1)
        except OSError as error:
            say("no-input", error)  # the request was refused before it was one
            os._exit(1)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    (top / f"{number}.status").write_text(str(os.WEXITSTATUS(status)))
'''


def held_after(folder: Path) -> tuple[dict[int, oni_agent.Job], int]:
    """The jobs that the next agent finds, by id, and the next id that it gives."""
    store = oni_agent.JobStore(folder)
    jobs = {job.id: job for job in store.select(1000)}
    return jobs, store.add(["load-batch", "next"]).id


def ids_told(told: list[str]) -> list[int]:
    """The ids that clients have been told."""
    return [int(line.split()[-1]) for line in told if line.startswith("done add")]


def hold_to_what_was_told(told: list[str], jobs: dict[int, oni_agent.Job], folder: Path) -> None:
    """Whatever was answered is so, and what was refused is not; one change may be either."""
    last = {}  # of each request: how it went the last time
    for line in told:
        how, *words = line.split()
        if how in ("begun", "done", "refused"):
            last[tuple(words[: 1 if words[0] == "add-title" else 2])] = how
    ids = ids_told(told)
    assert len(ids) == len(set(ids))
    named = {job.words[-1]: job for job in jobs.values()}
    names = [job.words[-1] for job in jobs.values()]
    assert len(names) == len(set(names)), "a request that was refused once was done twice"
    forgotten = {words[1] for words, how in last.items() if words[0] == "forget"}
    for words, how in last.items():
        name = words[-1] if words[0] == "add" else "load-title"
        if words[0].startswith("add") and how == "refused":
            assert name not in named
        if words[0].startswith("add") and how == "done" and not (forgotten and "t" in name):
            assert name in named
        if words[0] == "end" and how != "begun":
            assert jobs[int(words[1])].finished == (how == "done")
        if words[0] == "cancel" and how != "begun":
            assert jobs[int(words[1])].cancelled == (how == "done")
        if words[0] == "forget" and how == "done":
            assert int(words[1]) not in jobs
    for job in jobs.values():
        if job.words == ["load-title"] and not forgotten:
            assert (folder / f"inputs/{job.id}/input.xml").read_bytes() == b"<record/>"


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize(
    "family, count",
    [  # and more than there are such calls in a life
        ("fsync", 5),
        ("fdatasync", 22),
        ("pwrite64", 60),
        ("mkdir", 6),
        ("rename", 3),
        ("unlink", 7),
        ("rmdir", 3),
    ],
)
def test_what_is_answered_happens_whichever_call_to_the_disk_fails(tmp_path, family, count, error):
    script = tmp_path / "life.py"
    script.write_text(LIFE)
    # On some machines a call goes by another name.
    names = {"rename": "?rename,?renameat,?renameat2", "unlink": "?unlink,?unlinkat"}
    inject = f"inject={names.get(family, '?' + family)}:error={error}:when=100"
    subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", str(tmp_path / "trace"), "-e", inject]
        + [sys.executable, "-B", str(script), str(AGENT.parent), str(tmp_path), family, str(count)],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    assert 0 < (tmp_path / "trace").read_text().count("(INJECTED)") < count
    for number in range(1, count + 1):
        told = (tmp_path / f"{number}.told").read_text().splitlines()
        status = int((tmp_path / f"{number}.status").read_text())
        assert status == 0 if told[-1] == "lived" else status in (1, oni_agent.EXIT_AGAIN), told
        jobs, next_id = held_after(tmp_path / str(number))
        assert next_id > max([*jobs, *ids_told(told)], default=0)
        hold_to_what_was_told(told, jobs, tmp_path / str(number))


@contextlib.contextmanager
def failing_call(site: Site, call: str, error: str):
    """The running agent's next calls of one kind fail, one in each of its threads."""
    inject = f"inject={call}:error={error}:when=1"
    words = ["strace", "-f", "-e", inject, "-p", str(site.agent.pid)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as strace:
        if b"attached" not in strace.stderr.readline():
            pytest.skip("strace may not be attached here")
        threading.Thread(target=strace.stderr.read, daemon=True).start()
        try:
            yield
        finally:
            strace.terminate()


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_a_request_whose_commit_may_have_failed_is_never_answered_as_refused(witnessed):
    site = witnessed.start()
    site.manage("load_batch", str(site.batch(ALPHA)))
    with failing_call(site, "fdatasync", "EIO"), Client(site.port) as client:
        with contextlib.suppress(EOFError, paramiko.SSHException):
            assert client.channel(f"purge-batch {ALPHA}").makefile("rb").read() == b""
        assert site.agent.wait(30) == oni_agent.EXIT_AGAIN
    site.wait_for("not known whether the last change is on the disk; the agent ends")
    jobs = site.start().call("list-jobs")["jobs"]  # as the next agent tells it, so it happens
    ended = [site.ended(job["id"])["status"] for job in jobs]
    assert (ended, site.held(ALPHA)) in ((["successful"], (0, 0, 0)), ([], (1, 2, 4)))


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_an_end_whose_commit_may_have_failed_is_what_the_next_agent_finds(witnessed):
    site = witnessed.start()
    gate = site.hold_load(site.batch(ALPHA))
    id = site.job("load-batch", ALPHA)
    gate.reached()
    with failing_call(site, "fdatasync", "EIO"):
        gate.open()
        assert site.agent.wait(30) == oni_agent.EXIT_AGAIN
    job = site.start().ended(id)
    assert (job["status"], job["attempts"], site.held(ALPHA)) == ("successful", 1, (1, 2, 4))


@pytest.mark.parametrize("part", ["jobs.db", "run.lock", "agent.lock", "logs", "inputs", ""])
@pytest.mark.parametrize("how", ["a request comes", "nothing comes"])
def test_an_agent_whose_state_is_removed_ends_and_manage_py_goes_on(witnessed, part, how):
    # Without a request the agent looks by itself: often here, so that the test need not wait.
    limits = {"STATE_SECONDS": 0.2} if how == "nothing comes" else {}
    site = witnessed.start(limits)
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA)
    site.job("load-batch", ALPHA)
    gate.reached()
    (site.state / part).rename(site.state.parent / "removed")
    if how == "a request comes":
        with contextlib.suppress(EOFError, paramiko.SSHException, OSError):
            with Client(site.port) as client:
                answer = client.channel(f"load-batch {BETA}").makefile("rb").read()
                assert b"success" not in answer
    assert site.agent.wait(30) == oni_agent.EXIT_HOPELESS
    site.wait_for(re.escape(str(site.state / part)) + "/? was removed or replaced")
    assert site.manage_pids("load_batch")
    if part == "logs":  # manage.py's log has been made anew
        shutil.rmtree(site.state / part, ignore_errors=True)
    (site.state.parent / "removed").rename(site.state / part)
    gate.open()
    assert site.start().ended(1)["status"] == "successful"
    assert [job["id"] for job in site.call("list-jobs")["jobs"]] == [1]


@in_process
def test_an_agent_forgets_nothing_by_a_clock_that_its_jobs_contradict(monkeypatch):
    """The wall clock is twelve years ahead, and then right; a day is one of the steady clock."""
    day = oni_agent.DAY
    wall = [1000 * day]
    steady = [0]
    clock = oni_agent.Clock(1000 * day, lambda: wall[0], lambda: steady[0])
    assert clock.believed() == 1000 * day
    wall[0] += 12 * 365 * day
    assert clock.believed() is None
    steady[0] += day // 2
    assert clock.believed() is None
    wall[0] = 1001 * day  # it was set right
    assert clock.believed() == 1001 * day
    wall[0] += 200 * day
    assert clock.believed() is None
    steady[0] += day
    assert clock.believed() == wall[0]  # the agent had slept, say
    wall[0] -= 300 * day
    assert clock.believed() == wall[0]
    wall[0] += 300 * day
    assert clock.believed() == wall[0]


@pytest.mark.parametrize("days", [40, 200])
@in_process
def test_after_a_long_rest_nothing_is_forgotten_on_the_first_day(tmp_path, any_kind, days):
    now = time.time_ns()
    moment = f"{now - (60 + days) * oni_agent.DAY} + n"
    many_jobs(tmp_path, 300, queued=moment, started=moment, ended=moment)
    store = store_in(tmp_path)
    if days == 40:
        store.add(["load-batch", "x"])
    queue = queue_on(store)
    queue._forget_old()
    assert len(queue.jobs()) == (101 if days == 40 else 300)


@in_process
def test_jobs_of_a_wrong_clock_are_listed_and_forgotten_by_their_ids(tmp_path):
    day = oni_agent.DAY
    now = time.time_ns()
    many_jobs(tmp_path, 400)
    store = store_in(tmp_path)
    with store._database as database:
        for first, moment in ((1, now - 100 * day), (201, now - day)):
            columns = "queued = ?, started = ?, ended = ?"
            database.execute(f"UPDATE jobs SET {columns} WHERE id >= ?", [moment] * 3 + [first])
        database.execute("UPDATE jobs SET ended = ? WHERE id = 50", [now + 4000 * day])
        database.execute("UPDATE jobs SET ended = 5, queued = 4 WHERE id IN (250, 398)")
        database.execute("UPDATE jobs SET ended = ? WHERE id = 397", [now + 4000 * day])
    assert store.expired(now) == [id for id in range(1, 201) if id != 50]
    ended = queue_on(store).ended()
    assert [job.id for job in ended] == list(range(400, 400 - oni_agent.MOST_ENDED, -1))


@in_process
def test_no_answer_waits_for_who_changes_a_job(tmp_path, any_kind):
    many_jobs(tmp_path, oni_agent.JOBS_IN_MEMORY + 5)
    queue = queue_on(store_in(tmp_path))
    job = queue.get(queue.add(["load-batch", "x"])[0])
    with futures.ThreadPoolExecutor(1) as pool, queue._turn:
        asked = [
            pool.submit(queue.jobs),
            pool.submit(queue.jobs, ["failed"], "x", 3),
            pool.submit(queue.get, 1),
            pool.submit(queue.unfinished),
            pool.submit(queue.at_work),
            pool.submit(queue.place, job),
            pool.submit(queue.ended),
        ]
        assert not futures.wait(asked, 30).not_done


def test_thousands_of_jobs_are_forgotten_in_a_few_transactions_and_their_files_before(
    tmp_path, any_kind
):
    old = f"{time.time_ns() - 91 * oni_agent.DAY} + n"
    many_jobs(tmp_path, 3000, queued=old, started=old, ended=old)
    store = store_in(tmp_path)
    newest = store.add(["load-batch", "x"])
    kept = list(range(2901, 3001))
    for id in range(1, 3001):
        store.index_path(oni_agent.Job(id, [], 0)).touch()
    left = []  # of the logs, when the database is told to forget
    statements = []

    def see(statement: str) -> None:
        statements.append(statement)
        if statement.startswith("BEGIN"):
            left.append(len(os.listdir(tmp_path / "state/logs")))

    store._database.set_trace_callback(see)
    queue = queue_on(store)
    queue._forget_old()
    assert [job.id for job in queue.jobs()] == [*kept, newest.id]
    assert statements.count("COMMIT") <= 3
    assert left == [2000, 1000, 100]


@in_process
def test_requests_that_come_at_once_get_ids_in_order_and_a_batch_one_job(tmp_path, any_kind):
    queue = queue_on(store_in(tmp_path))
    names = [f"batch{number % 20}" for number in range(100)]
    with futures.ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(lambda name: queue.add(["load-batch", name])[0], names))
    assert len(set(ids)) == 20
    assert {(id, name) for id, name in zip(ids, names)} == {
        (job.id, job.words[1]) for job in queue.jobs()
    }
    assert [queue._waiting.get().id for _ in range(20)] == list(range(1, 21))


@in_process
def test_who_waits_for_a_job_is_told_once_of_its_end(tmp_path, any_kind):
    queue = queue_on(store_in(tmp_path))
    job = queue.get(queue.add(["load-batch", "x"])[0])
    told = []
    queue.when_ended(job, lambda job: told.append("kept"))
    queue.when_ended(job, lambda job: told.append("withdrawn"))()
    assert told == []
    queue.cancel(job)
    queue.when_ended(job, lambda job: told.append("late"))()
    assert told == ["kept", "late"]
    assert queue._callbacks == {}


@in_process
def test_jobs_of_the_release_before_are_all_kept(tmp_path):
    """Its jobs.db has a column more."""
    state = tmp_path / "state"
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / "jobs.db")) as database:
        database.executescript(
            "PRAGMA journal_mode = WAL; CREATE TABLE jobs (id INTEGER PRIMARY KEY AUTOINCREMENT,"
            " words TEXT NOT NULL, payload BLOB, queued INTEGER NOT NULL, status TEXT NOT NULL,"
            " started INTEGER, ended INTEGER, error TEXT NOT NULL DEFAULT '', attempts INTEGER NOT"
            " NULL DEFAULT 0, cancelled INTEGER NOT NULL DEFAULT 0);"
            " PRAGMA application_id = 0x4F4E4941; PRAGMA user_version = 1;"
            """INSERT INTO jobs VALUES (7, '["load-batch", "x"]', NULL, 1, 'failed', 2, 3, 'why',"""
            """ 1, 0), (9, '["load-batch", "y"]', NULL, 4, 'started', 5, NULL, '', 2, 1)"""
        )
    store = store_in(tmp_path)
    assert store.select(100) == [
        oni_agent.Job(7, ["load-batch", "x"], 1, 2, oni_agent.End("failed", "why", 3), 1),
        oni_agent.Job(9, ["load-batch", "y"], 4, 5, None, 2, True),
    ]
    assert store.add(["load-batch", "z"]).id == 10


@in_process
def test_an_input_is_kept_without_hard_links_and_a_retry_has_its_own(
    tmp_path, any_kind, monkeypatch
):
    monkeypatch.delattr(os, "link")
    store = store_in(tmp_path)
    queue = queue_on(store)
    with store.new_input() as given:
        given.write(b"<record/>")
        first = queue.get(queue.add(["load-title"], Path(given.name))[0])
    with store.new_input() as given:
        shutil.copyfile(store.input_path(first), given.name)
        second = queue.get(queue.add(["load-title"], Path(given.name))[0])
    store.remove_files(first.id)
    assert store.input_path(second).read_bytes() == b"<record/>"
    assert os.listdir(store.folder / "inputs") == [str(second.id)]


def test_an_agent_that_stops_without_a_job_says_nothing_of_manage_py(site):
    site.start()
    assert site.stop() == 0
    assert site.wait_for("stopping on SIGTERM").endswith("stopping on SIGTERM\n")


def test_an_adopted_job_shows_its_attempts(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    agent.stop()
    agent.start().wait_for("adopted=")
    assert agent.call("job-status", str(id))["job"]["attempts"] == 1
    gate.open()
    assert agent.ended(id)["attempts"] == 1


def test_job_wait_on_a_terminal_shows_the_bar_and_then_the_end(agent):
    gate = agent.hold_load(agent.batch(ALPHA, issues=4), issue=2)
    agent.job("load-batch", ALPHA)
    gate.reached()
    with TerminalClient(agent, "job-wait 1") as client:
        client.wait_for(r"\[#+\.+\] [23] of 4 issues")
        gate.open()
        client.wait_for("Success: this job is complete.")
        assert client.ended() == 0


def test_job_wait_on_a_terminal_ends_with_1_where_the_job_failed(agent):
    failing_load(agent)
    agent.run("load-batch", "batch_oru_broken_ver01")
    done = ssh_run(agent, "job-wait 1", "-tt")
    assert done.returncode == 1
    assert b"unable to load batch: it is too late" in done.stdout


def test_job_wait_waits_for_several_jobs(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    failing_load(agent)
    assert agent.job("load-batch", "batch_oru_broken_ver01") == 1
    assert agent.job("load-batch", ALPHA) == 2
    gate.reached()
    waiting = ssh_begin(agent, "job-wait 2 1 -1")
    on_terminal = ssh_begin(agent, "job-wait 2 -1", "-tt")
    assert agent.call("job-status", "1")["job"]["status"] == "failed"
    assert waiting.poll() is None
    gate.open()
    reply = without_session(json.loads(waiting.stdout.read()))
    assert waiting.wait(60) == 1
    assert (reply["status"], reply["message"]) == (
        "success",
        "Failed: 1 of these 3 jobs did not succeed.",
    )
    assert [(job["id"], job["status"]) for job in reply["jobs"]] == [
        (2, "successful"),
        (1, "failed"),
        (-1, "successful"),
    ]
    assert b"Success: these 2 jobs are complete.\r\n" in on_terminal.stdout.read()
    assert on_terminal.wait(60) == 0
    assert agent.ssh("job-wait 2 77")["message"] == "Job not found"
    assert agent.ssh("job-wait 2 x")["message"] == '"x" is not a valid job id'


# --- Promises: cancelling and retrying ------------------------------------------------------------

# How a manage.py lets go of all that it has inherited, and what it may leave behind.
CLOSES_ALL = """
import os, sys
if "load_batch" in sys.argv:
    for number in range(3):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    os.closerange(3, 1000)
"""


@pytest.mark.parametrize("adopted", [False, True])
def test_a_manage_py_that_closes_its_descriptors_can_be_cancelled(witnessed, adopted):
    site = witnessed
    site.prepend_to_manage(CLOSES_ALL)
    gate = site.hold_load(site.batch(ALPHA, issues=3), issue=1)
    site.start().job("load-batch", ALPHA)
    gate.reached()
    if adopted:
        site.restart().wait_for("adopted")
    assert site.call("job-cancel", "1")["message"] == "Job is being cancelled"
    assert site.ended(1)["error"] == "cancelled; ONI holds nothing of the batch"
    assert site.manage_pids("load_batch") == []
    assert any("SIGTERM" in line for line in site.logs(1))


def test_a_manage_py_that_closes_its_descriptors_is_adopted_and_never_run_twice(witnessed):
    site = witnessed
    site.prepend_to_manage(CLOSES_ALL)
    gate = site.hold_load(site.batch(ALPHA, issues=3), issue=1)
    id = site.start().job("load-batch", ALPHA)
    gate.reached()
    for _ in range(2):
        site.restart().wait_for("adopted")
    gate.open()
    job = site.ended(id)
    assert (job["status"], job["attempts"]) == ("successful", 1)
    loads = site.query("SELECT count(*) FROM core_loadbatchevent WHERE message = 'starting load'")
    assert loads == [(1,)]


@pytest.mark.parametrize("adopted", [False, True])
def test_a_load_can_be_cancelled_where_there_is_no_proc(troubled, adopted):
    site = troubled.site
    gate = site.hold_load(site.batch(ALPHA, issues=3), issue=1)
    with troubled.having("no-proc"):
        site.start().job("load-batch", ALPHA)
        gate.reached()
        if adopted:
            site.restart().wait_for("adopted")
        assert site.call("job-cancel", "1")["message"] == "Job is being cancelled"
        assert site.ended(1)["error"] == "cancelled; ONI holds nothing of the batch"
    assert site.manage_pids("load_batch") == []


def test_who_follows_and_goes_away_cancels_nothing_and_leaves_nothing(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01"))
    agent.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    agent.call("version")
    before = resources(agent)
    for options, how in (((), signal.SIGKILL), (("-tt",), signal.SIGINT), ((), signal.SIGINT)):
        followers = [ssh_begin(agent, "job-follow 1", *options) for _ in range(5)]
        for each in followers:
            each.stdout.readline()
            each.send_signal(how)
            each.communicate(timeout=30)
    assert has_no_more_than(agent, before)
    assert agent.call("job-status", "1")["job"]["status"] == "started"
    gate.open()
    assert agent.ended(1)["status"] == "successful"


def test_how_far_a_job_is_says_nothing_of_the_cancelled_one_before_it(agent):
    batch = agent.batch(ALPHA, issues=3)
    gate = agent.hold_load(batch, issue=2)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    loaded = lambda: agent.call("job-status", str(id))["job"].get("pages_loaded")
    until(loaded)
    agent.call("job-cancel", str(id))
    agent.ended(id)
    gate = agent.hold_load(batch)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    assert loaded() in (None, 1)


def test_a_cancelled_pending_job_never_runs(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01"))
    agent.batch("batch_oru_beta_ver01")
    agent.batch("batch_oru_gamma_ver01")
    for name in ("alpha", "beta", "gamma"):
        agent.job("load-batch", f"batch_oru_{name}_ver01")
    gate.reached()
    reply = agent.ssh("job-cancel 2")
    assert (reply["message"], reply["job"]["status"]) == ("Job cancelled", "failed")
    assert reply["job"]["error"] == "cancelled before it started"
    gate.open()
    assert [agent.ended(id)["status"] for id in (1, 2, 3)] == ["successful", "failed", "successful"]
    assert agent.held("batch_oru_beta_ver01") == (0, 0, 0)
    assert agent.logs(2) == []
    agent.restart()
    assert agent.call("job-status", "2")["job"] == reply["job"]


def test_an_adopted_load_is_cancelled_before_the_worker_has_come_to_it(site, tmp_path):
    gate = site.start().hold_load(site.batch(ALPHA, issues=3), issue=1)
    site.job("load-batch", ALPHA)
    gate.reached()
    site.kill()
    busy = Gate(tmp_path / "busy")
    altered(
        site,
        f"""
        really = agent.JobQueue._perform
        def perform(queue, job):
            open({str(busy.path)!r}).read()
            really(queue, job)
        agent.JobQueue._perform = perform
        """,
    )
    busy.reached()
    reply = site.call("job-cancel", "1")
    assert (reply["message"], reply["job"]["status"]) == ("Job is being cancelled", "started")
    busy.open()
    job = site.ended(1)
    assert (job["status"], job["error"]) == ("failed", "cancelled; ONI holds nothing of the batch")
    assert site.manage_pids("load_batch") == []


@pytest.mark.parametrize("adopted", [False, True])
def test_a_cancelled_load_leaves_the_batch_absent(agent, adopted):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01", issues=3), issue=1)
    agent.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    assert agent.held("batch_oru_alpha_ver01") == (1, 2, 3)
    if adopted:
        agent.restart().wait_for("adopted")
    assert agent.ssh("job-cancel 1")["message"] == "Job is being cancelled"
    job = agent.ended(1)
    assert (job["status"], job["error"]) == ("failed", "cancelled; ONI holds nothing of the batch")
    assert agent.held("batch_oru_alpha_ver01") == (0, 0, 0)
    assert agent.manage_pids("load_batch") == []
    assert not (agent.oni / "data/batches/batch_oru_alpha_ver01").is_symlink()
    logged = "\n".join(agent.logs(1))
    assert "SIGTERM" in logged
    assert "SIGKILL" not in logged
    assert "; purging that" in logged
    assert agent.ssh("batch-status batch_oru_alpha_ver01")["batch"]["state"] == "absent"


def test_a_cancelled_purge_says_what_is_left(agent):
    batch = agent.batch("batch_oru_alpha_ver01", issues=3)
    agent.run("load-batch", batch.name)
    gate = agent.hold(batch / "purge-gate")
    agent.job("purge-batch", batch.name)
    gate.reached()
    agent.call("job-cancel", "2")
    job = agent.ended(2)
    assert job["status"] == "failed"
    assert job["error"].startswith("cancelled; ONI holds 2 of the 3 issues and 4 of the 6 pages")
    assert agent.ssh(f"batch-status {batch.name}")["batch"]["state"] == "partial"
    (batch / "purge-gate").unlink()
    assert agent.run("purge-batch", batch.name)["status"] == "successful"


def test_cancelling_a_job_that_has_loaded_nothing_purges_nothing(site):
    site.prepend_to_manage(WITNESS)
    batch = site.batch(ALPHA)
    site.start()
    id, gate = load_until("before the spawn", site, batch, random.Random())
    assert site.manage("load_batch", str(batch)).returncode == 0  # by hand, meanwhile
    assert site.call("job-cancel", str(id))["message"] == "Job is being cancelled"
    gate.open()
    job = site.ended(id)
    assert (job["status"], job["error"][:30]) == ("failed", "cancelled; the batch is comple")
    assert site.held(ALPHA) == (1, 2, 4)


def test_a_cancel_repeated_while_the_remains_are_purged_harms_nothing(agent):
    batch = agent.batch("batch_oru_alpha_ver01", issues=3)
    gate = agent.hold_load(batch, issue=1)
    purge_gate = agent.hold(batch / "purge-gate")
    agent.batch("batch_oru_beta_ver01")
    agent.job("load-batch", batch.name)
    agent.job("load-batch", "batch_oru_beta_ver01")
    gate.reached()
    agent.call("job-cancel", "1")
    purge_gate.reached()
    assert "being cancelled" in agent.call("job-cancel", "1")["message"]
    purge_gate.open()
    job = agent.ended(1)
    assert (job["status"], job["error"]) == ("failed", "cancelled; ONI holds nothing of the batch")
    assert agent.ended(2)["status"] == "successful"


def test_a_request_while_its_like_is_being_cancelled_is_a_job_of_its_own(agent):
    batch = agent.batch(ALPHA)
    purge = agent.hold(batch / "purge-gate")
    gate = agent.hold_load(batch, issue=1)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    agent.call("job-cancel", str(id))
    purge.reached()  # what was loaded is being purged
    gate.open()
    again = agent.call("load-batch", ALPHA)
    assert again["message"] == "Job added to queue"
    assert again["job"]["id"] != id
    purge.open()
    assert agent.ended(id)["error"].startswith("cancelled")
    assert agent.ended(again["job"]["id"])["status"] == "successful"
    assert agent.held(ALPHA) == (1, 2, 4)


def test_a_cancel_survives_a_killed_agent(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01", issues=3), issue=1)
    agent.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    agent.call("job-cancel", "1")
    agent.restart()
    job = agent.ended(1)
    assert (job["status"], job["error"]) == ("failed", "cancelled; ONI holds nothing of the batch")
    assert agent.held("batch_oru_alpha_ver01") == (0, 0, 0)
    loads = agent.query("SELECT count(*) FROM core_loadbatchevent WHERE message = 'starting load'")
    assert loads == [(1,)]


def test_a_cancel_holds_though_the_load_was_whole_before_the_next_agent_came(site):
    gate = cancelled_in_vain(site)
    site.kill()
    gate.open()
    until(lambda: not site.manage_pids("load_batch"))
    assert site.held("batch_oru_alpha_ver01") == (1, 2, 4)
    site.start()
    job = site.ended(1)
    assert (job["status"], job["error"]) == ("failed", "cancelled; ONI holds nothing of the batch")
    assert site.held("batch_oru_alpha_ver01") == (0, 0, 0)


def test_what_has_ended_or_never_was_cannot_be_cancelled_and_says_so(agent):
    failing_load(agent)
    agent.batch("batch_oru_alpha_ver01")
    agent.run("load-batch", "batch_oru_alpha_ver01")
    agent.run("load-batch", "batch_oru_broken_ver01")
    said = [agent.ssh(f"job-cancel {id}") for id in (1, 2, -1)]
    assert {(each["status"], each["message"]) for each in said} == {
        ("error", "The job has ended already")
    }
    assert [each["error"].split(":")[0] for each in said] == ["Success", "Failed", "Success"]
    assert said[1]["job"]["error"].startswith("exit status 1: ")
    assert agent.ssh("job-cancel 77")["message"] == "Job not found"
    assert agent.ssh("job-cancel x")["message"] == '"x" is not a valid job id'
    assert agent.ssh("job-cancel")["message"] == "You must supply a job ID"


def test_a_failed_load_is_retried_as_a_new_job(agent):
    fails = failing_load(agent)
    job = agent.run("load-batch", "batch_oru_broken_ver01")
    assert job["status"] == "failed"
    assert job["error"] == (
        "exit status 1: unable to load batch: it is too late; ONI holds nothing of the batch"
    )
    fails.unlink()
    reply = agent.ssh("job-retry 1")
    assert (reply["status"], reply["job"], reply["retry_of"]) == ("success", {"id": 2}, 1)
    assert agent.ended(2)["status"] == "successful"
    assert agent.ended(1)["status"] == "failed"
    assert agent.ended(2)["words"] == ["load-batch", "batch_oru_broken_ver01"]
    for id, said in ((2, "Success: this job is complete."), (-1, "Success: this job is complete.")):
        reply = agent.ssh(f"job-retry {id}")
        assert (reply["status"], reply["error"]) == ("error", said)
    assert agent.ssh("job-retry 77")["message"] == "Job not found"
    assert len(agent.ssh("list-jobs")["jobs"]) == 2


def test_a_cancel_that_is_answered_as_one_is_never_followed_by_success(witnessed):
    site = witnessed.start()
    batch = site.batch(ALPHA)
    last_page = site.hold_load(batch, issue=1, page=2)
    id = site.job("load-batch", ALPHA)
    last_page.reached()
    question = site.hold(site.oni / "hold-question")
    last_page.open()
    question.reached()
    with Client(site.port) as client:
        with store_locked(site):
            question.open()
            site.wait_for("trying again every second")  # the job's end cannot be recorded
            channel = client.channel(f"job-cancel {id}")
            client.ask("version")  # by now the cancel is at work, too
        answer = json.loads(channel.makefile("rb").read())
    job = site.ended(id)
    if answer["status"] == "success":
        assert job["status"] == "failed"
        assert job["error"].startswith("cancelled")
        assert site.held(ALPHA) == (0, 0, 0)
    else:
        assert job["status"] == "successful"


def test_a_cancel_that_is_answered_is_carried_out_though_manage_py_was_killed_before(agent):
    gate = agent.hold_load(agent.batch(ALPHA), issue=1)
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    for pid in agent.manage_pids("load_batch"):
        os.kill(pid, signal.SIGKILL)
    assert agent.call("job-cancel", str(id))["message"] == "Job is being cancelled"
    gate.open()
    assert agent.ended(id)["error"] == "cancelled; ONI holds nothing of the batch"
    assert agent.held(ALPHA) == (0, 0, 0)


@in_process
def test_a_job_cancelled_before_its_turn_ended_before_the_one_at_work(tmp_path, any_kind):
    queue = queue_on(store_in(tmp_path))
    first, second = (queue.get(queue.add(["load-batch", name])[0]) for name in "ab")
    queue.cancel(second)
    queue.cancel(first)
    assert [job.id for job in queue.ended()] == [first.id, second.id]


@in_process
def test_a_job_that_waits_for_descriptors_can_be_cancelled(tmp_path, any_kind, monkeypatch):
    def out_of_descriptors(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(oni_agent, "Runner", out_of_descriptors)
    queue = queue_on(store_in(tmp_path))
    id, _ = queue.add(["load-batch", "x"])
    job = queue.get(id)
    has_ended = threading.Thread(target=queue._perform, args=[job], daemon=True)
    has_ended.start()
    assert queue.cancel(job)
    has_ended.join(30)
    assert not has_ended.is_alive()
    assert job.error == "cancelled before it started"


# --- Promises: logs -------------------------------------------------------------------------------

ODD_OUTPUT = r"""
import os, sys
if "load_batch" in sys.argv:
    os.write(1, b"caf\xe9\n" + b"\xe2\x82\xac" * 20_000 + b"\n\nlast of stdout")
    os.write(2, b"nul \0 and \x1b[31mred\r\n")
"""


def test_odd_output_is_kept(site):
    site.prepend_to_manage(ODD_OUTPUT)
    site.batch("batch_oru_alpha_ver01")
    site.start()
    site.run("load-batch", "batch_oru_alpha_ver01")
    job = site.call("job-logs", "1")["job"]
    out = [line[33:] for line in job["stdout"]]
    assert out[0] == "caf\N{REPLACEMENT CHARACTER}"
    assert out[1:] == ["€" * 20_000, "", "last of stdout"]
    assert job["stderr"][0][33:] == "nul \0 and \x1b[31mred\r"


@pytest.mark.parametrize(
    "code",
    [
        "print('noise')",
        "print('noise', end='', flush=True)",
        "import os; os.write(1, b'\\xff{\"answer\": 1}' * 100_000)",
        (
            "from django.db.backends.signals import connection_created\n"
            "connection_created.connect(lambda **_: print('noise', end=''), weak=False)"
        ),
    ],
)
def test_noise_on_stdout_does_no_harm(site, code):
    site.batch(ALPHA)
    settings_local(site, code + "\n")
    assert site.start().run("load-batch", ALPHA)["status"] == "successful"
    for _ in range(2):
        assert without_session(site.call("load-batch", ALPHA)) == NOOP


def test_the_next_agent_adopts_a_load_and_its_log_goes_on(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01", issues=3, pages=2)
    gates = [site.hold_load(batch, issue) for issue in range(3)]
    id = site.job("load-batch", batch.name)
    lengths = [0]
    for gate in gates:
        gate.reached()
        site.restart()
        assert "job=1" in site.wait_for("adopted")
        until(lambda: len(site.logs(id)) > lengths[-1])  # it had no more to say before the gate
        lengths.append(len(site.logs(id)))
        assert site.call("job-status", str(id))["job"]["status"] == "started"
        gate.open()
    job = site.ended(id)
    assert (job["id"], job["status"]) == (id, "successful")
    assert on_stderr(site, id) == printed(site)
    assert not any("interrupted" in line for line in site.logs(id))


def test_what_was_printed_while_no_agent_was_there_is_in_the_log_however_long_it_is(site):
    site.prepend_to_manage(
        "import sys\nif 'load_batch' in sys.argv:\n"
        "    print(*(f'before {n:040}' for n in range(9000)), sep='\\n', flush=True)\n"
        "    open('gate-in-manage').read()\n"
        "    print(*(f'after {n}' for n in range(100)), sep='\\n', end=' the end', flush=True)"
    )
    gate = site.hold(site.oni / "gate-in-manage")
    site.batch(ALPHA)
    site.start()
    id = site.job("load-batch", ALPHA)
    gate.reached()
    until(lambda: len(site.logs(id)) == 9000)
    site.kill()
    gate.open()
    until(lambda: not site.manage_pids("load_batch"))
    site.start()
    assert site.ended(id)["status"] == "successful"
    printed = [line[33:] for line in site.call("job-logs", str(id))["job"]["stdout"]]
    assert [line for line in printed if line.startswith("before")] == [
        f"before {n:040}" for n in range(9000)
    ]
    assert [line for line in printed if line.startswith("after")] == [
        *(f"after {n}" for n in range(99)),
        "after 99 the end",
    ]


@pytest.mark.parametrize("room_for_the_log", [False, True])
def test_a_disk_that_fills_up_stops_no_load_and_the_log_says_so(disk, witnessed, room_for_the_log):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01", issues=2, pages=40)
    gate = site.hold_load(batch)
    id = site.job("load-batch", batch.name)
    gate.reached()
    if room_for_the_log and disk.mounted:  # so that only manage.py meets the full disk
        subprocess.run(["fallocate", "-n", "-l", "1M", str(site.state / "logs/1.log")], check=True)
    disk.fill()
    gate.open()
    until(lambda: not site.manage_pids("load_batch"))
    assert site.held(batch.name) == (1, 2, 80)
    assert (
        site.call("job-status", str(id))["job"]["status"] == "started"
    )  # its end cannot be recorded yet
    assert site.call("job-logs", str(id))["status"] == "success"
    disk.free()
    assert site.ended(id)["status"] == "successful"
    assert any("may be missing" in line for line in site.logs(id))
    assert set(on_stderr(site, id)) & set(printed(site))
    assert site.restart().ended(id)["status"] == "successful"


def test_an_agent_that_cannot_keep_logs_does_not_start(site):
    site.state.mkdir()
    (site.state / "logs").write_text("in the way")
    assert f"File exists: '{site.state / 'logs'}'" in failed_start(site)


def answers_at(port: int) -> bool:
    """Whether an agent answers at a port."""
    with contextlib.suppress(OSError, EOFError, paramiko.SSHException), Client(port) as client:
        return client.ask("version")["status"] == "success"
    return False


def test_an_agent_whose_stderr_is_closed_serves(witnessed):
    site = witnessed
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**site.environment, "BA_BIND": f"127.0.0.1:{port}"}
    words = [sys.executable, str(AGENT)]
    shell = ["sh", "-c", 'exec "$0" "$@" 2>&-', *words]
    with subprocess.Popen(shell, env=environment) as process:
        try:
            assert until(lambda: answers_at(port))
        finally:
            process.terminate()
        assert process.wait(30) == 0


def remove_log(site: Site, id: int) -> None:
    """Deletes all files of a job's log."""
    for suffix in ("log", "out", "err"):
        (site.state / f"logs/{id}.{suffix}").unlink()


def test_a_log_deleted_by_hand_is_an_empty_log(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    assert site.run("load-batch", batch.name)["status"] == "successful"
    remove_log(site, 1)
    job = site.call("job-logs", "1")["job"]
    assert (job["status"], job["stdout"], job["stderr"]) == ("successful", [], [])
    gate = site.hold(site.oni / "hold-purge_batch")
    assert site.job("purge-batch", batch.name) == 2
    gate.reached()
    remove_log(site, 2)  # while the job is at work
    job = site.call("job-logs", "2")["job"]
    assert (job["status"], job["stdout"], job["stderr"]) == ("started", [], [])
    gate.open()
    assert site.ended(2)["status"] == "successful"
    assert site.call("job-logs", "2")["status"] == "success"


def test_a_load_is_adopted_though_its_log_has_been_deleted(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    gate = site.hold_load(batch, issue=1)
    site.job("load-batch", batch.name)
    gate.reached()
    site.kill()
    remove_log(site, 1)
    site.start()
    site.wait_for("adopted")
    site.call(
        "purge-batch", "batch_oru_beta_ver01"
    )  # asks Open ONI, and so comes after whatever the job has asked
    assert site.call("job-status", "1")["job"]["status"] == "started"
    gate.open()
    assert site.ended(1)["status"] == "successful"
    assert site.query("SELECT message FROM core_loadbatchevent ORDER BY id") == [
        ("starting load",),
        ("processed 4 pages",),
    ]  # and not purged and loaded once more


def test_a_clock_set_back_does_not_disturb_the_order_of_a_log(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    gate = site.hold_load(batch)
    site.job("load-batch", batch.name)
    gate.reached()
    until(lambda: any("Saving page" in line for line in site.logs(1)))
    site.kill()
    path = site.state / "logs/1.log"
    before, newest = path.read_text().rstrip("\n").rsplit("\n", 1)
    path.write_text(f"{before}\n[2099-12-31T23:59:58.000000000Z]{newest[32:]}\n")
    gate.open()
    assert site.start().ended(1)["status"] == "successful"
    assert on_stderr(site, 1) == printed(site)
    job = site.call("job-logs", "1")["job"]
    assert job["stderr"] == sorted(job["stderr"])
    assert "[2099-12-31T23:59:58" < job["stderr"][-1] < "[2100-01-01T00:01"


def test_a_log_that_cannot_be_removed_stops_no_job(witnessed):
    site = witnessed
    site.batch("batch_oru_alpha_ver01")
    past_jobs(site, *[(["load-batch", "batch_oru_old_ver01"], "successful", 200, 91)] * 120)
    (site.state / "logs/1.log").unlink()
    (site.state / "logs/1.log/by-hand").mkdir(parents=True)
    assert site.start().run("load-batch", "batch_oru_alpha_ver01")["status"] == "successful"


def test_what_the_agent_says_in_a_log_is_one_line(witnessed):
    site = witnessed.start()
    batch = site.batch("batch_oru_alpha_ver01")
    half_load(site, batch)
    with contextlib.closing(
        sqlite3.connect(site.oni / "oni.sqlite3", timeout=60)
    ) as database, database:
        database.execute(
            "UPDATE core_loadbatchevent SET message = 'unable to load batch: a fault\n' || ?",
            ["E" * 60],
        )
    assert site.run("load-batch", batch.name)["status"] == "successful"
    assert on_stderr(site, 1) == printed(site)
    assert all(
        re.match(rf"\[{STAMP}\] ", line) for line in site.call("job-logs", "1")["job"]["stdout"]
    )


def test_what_a_command_leaves_unfinished_is_a_line_of_its_own(site):
    site.prepend_to_manage(
        "import atexit, os, sys\n"
        "atexit.register(os.write, 1, f'the end of {sys.argv[1]}'.encode())"
    )
    batch = site.batch(ALPHA)
    site.start()
    half_load(site, batch)
    assert site.run("load-batch", ALPHA)["status"] == "successful"
    ends = [line for line in site.logs(1) if "the end of" in line]
    assert ends == ["the end of purge_batch", "the end of load_batch"]


def test_a_log_that_release_1_1_has_written_is_shown_as_it_was(site):
    past_jobs(site, (["load-batch", ALPHA], "failed", 1, 1))
    stamps = [f"[2026-01-01T00:00:{second:02}.000000000Z]" for second in range(5)]
    kinds = ["A a note", "$ 0 0 manage.py load_batch", "= 0 14", "= 9 14", "A the end"]
    lines = [f"{stamp} {line}\n" for stamp, line in zip(stamps, kinds)]
    (site.state / "logs/1.log").write_text("".join(lines))
    (site.state / "logs/1.out").write_text("= 1 2 é\nunfinished")
    (site.state / "logs/1.err").write_text("first\nsecond\n\n")
    job = site.start().call("job-logs", "1")["job"]
    assert [line[33:] for line in job["stdout"]] == ["a note", "= 1 2 é", "the end", "unfinished"]
    assert [line[33:] for line in job["stderr"]] == ["first", "second", ""]
    assert [job["stdout"][number][:21] for number in (0, 1, 2)] == [
        stamp[:21] for stamp in (stamps[0], stamps[3], stamps[4])
    ]


PRINTED = strategies.text(alphabet="ab\n", max_size=60)


def write_log(path: Path, steps: list[tuple], follower: oni_agent.LogReader) -> list[str]:
    """Writes a log, of notes where a step is empty; the lines that a follower has seen meanwhile.

    The log does not know of the last step.
    """
    followed = []
    writer = oni_agent.LogWriter(path)
    for number, step in enumerate(steps):
        for text, suffix in zip(step, (".out", ".err")):
            with open(path.with_suffix(suffix), "a") as file:
                file.write(text)
        if number < len(steps) - 1:
            writer.enter_sizes(is_end=True) if step else writer.note("a note")
            followed += all_lines(follower.new_lines(False))
    writer.close()
    return followed + all_lines(follower.new_lines(True))


def all_lines(some: Iterator[list[str]]) -> list[str]:
    """The lines of a log, in one list."""
    return [line for lines in some for line in lines]


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    strategies.lists(strategies.one_of(strategies.tuples(PRINTED, PRINTED), strategies.just(()))),
    strategies.integers(0, 40),
)
def test_each_line_of_a_log_has_one_stamp_whichever_lines_are_asked_for(monkeypatch, steps, count):
    """And stamps increase, and nothing is lost, in parts of lines that are very long."""
    monkeypatch.setattr(oni_agent, "BLOCK", 16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "1.log")
        for suffix in (".out", ".err"):
            path.with_suffix(suffix).touch()
        follower = oni_agent.LogReader(path)
        followed = write_log(path, steps, follower)
        reader = oni_agent.LogReader(path, is_over=True)
        lines = all_lines(reader.lines())
        stamps = [line[:32] for line in lines]
        assert stamps == sorted(set(stamps))
        assert followed == lines
        for kinds, suffix in ((("O",), ".out"), (("E",), ".err")):
            text = path.with_suffix(suffix).read_text()
            assert "".join(line[33:] for line in all_lines(reader.lines(*kinds))) == text.replace(
                "\n", ""
            )
        reader.skip_to_last(count)
        assert all_lines(reader.lines()) == lines[max(0, len(lines) - count) :]
        some = all_lines(reader.lines("O", "A")) + all_lines(reader.lines("E"))
        assert sorted(some) == lines[max(0, len(lines) - count) :]


def test_a_log_has_few_entries_however_steadily_manage_py_prints(site):
    site.prepend_to_manage(
        "import sys, time\nif 'load_batch' in sys.argv:\n"
        "    for n in range(200): print(n, flush=True); time.sleep(0.005)"
    )
    site.batch(ALPHA)
    site.start()
    job = site.run("load-batch", ALPHA)
    entries = re.findall("(?m)^.{32} = ", (site.state / "logs/1.log").read_text())
    assert 1 < len(entries) <= 4 * job["seconds"] + 3


@pytest.mark.parametrize("name", ["1.log", "1.out", "1.err"])
def test_a_log_that_cannot_be_read_is_an_error_and_no_success_with_lines_missing(site, name):
    past_jobs(site, (["load-batch", ALPHA], "failed", 1, 1))
    (site.state / "logs" / name).unlink(missing_ok=True)
    (site.state / "logs" / name).mkdir()
    site.start()
    for words in ("job-logs", "1"), ("job-logs", "1", "5"), ("job-follow", "1"):
        reply = site.call(*words)
        assert (reply["status"], "job" in reply) == ("error", False)
        assert name in reply["error"]


def test_job_logs_without_a_descriptor_to_be_had_is_an_error(agent):
    agent.batch(ALPHA)
    id = agent.job("load-batch", ALPHA)
    agent.ended(id)
    with Client(agent.port) as client:
        client.ask("version")
        with without_descriptors(agent):
            reply = client.ask(f"job-logs {id}")
        assert (reply["status"], "Too many open files" in reply["error"]) == ("error", True)
        assert client.ask(f"job-logs {id}")["job"]["stderr"]


def test_an_error_is_short_though_what_manage_py_said_is_not_and_the_log_has_it_whole(site):
    site.prepend_to_manage(
        "import sys\nif 'load_batch' in sys.argv: sys.exit('[ERROR] ' + 'x' * 150_000)"
    )
    site.batch(ALPHA)
    job = site.start().run("load-batch", ALPHA)
    assert "exit status 1: xxx" in job["error"] and "x […" in job["error"]
    assert len(job["error"].encode()) <= 2048
    assert "".join(on_stderr(site, 1)) == "[ERROR] " + "x" * 150_000


MANY_ERRORS = """
import sys
if "load_batch" in sys.argv:
    for n in range(30):
        sys.stderr.write("[INFO] a page\\n" * 70_000)
        sys.stderr.write("[ERROR] the %dth error\\n" % n if n else "")
    sys.exit(1)
"""


def test_the_reason_of_a_failure_costs_little_memory_however_much_was_printed(site):
    site.prepend_to_manage(MANY_ERRORS)
    site.batch(ALPHA)
    site.start()
    site.wait_for("Open ONI in .* word coordinates")  # what it needs to start it has in memory
    before = memory(site, "VmHWM")
    job = site.run("load-batch", ALPHA)
    assert job["error"].startswith("exit status 1: the 29th error")
    assert memory(site, "VmHWM") < before + 10


BOTH_STREAMS = "import os, sys\nif 'load_batch' in sys.argv:\n    os.write(1, b'said on stdout\\n')"


@pytest.mark.parametrize("options, newline", [((), b"\n"), (("-tt",), b"\r\n")])
def test_job_follow_shows_lines_as_they_come_until_the_job_ends(site, options, newline):
    site.prepend_to_manage(BOTH_STREAMS)
    gate = site.hold_load(site.batch("batch_oru_alpha_ver01", issues=2), issue=1)
    site.start()
    site.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    following = ssh_begin(site, "job-follow 1", *options)
    so_far = []
    while len([line for line in so_far if "Saving page" in line]) < 3:
        so_far.append(following.stdout.readline().decode())
    assert following.poll() is None
    assert site.call("job-status", "1")["job"]["status"] == "started"
    gate.open()
    rest = following.stdout.read()
    assert following.wait(60) == 0
    whole = "".join(so_far).encode() + rest
    assert whole.endswith(newline)
    assert whole.count(newline) == whole.count(b"\n")
    job = site.call("job-logs", "1")["job"]
    lines = re.sub(r"\x1b\[\d*m", "", whole.decode()).splitlines()
    told = sorted(job["stdout"] + job["stderr"])
    assert all(re.match(rf"\[{STAMP}\] ", line) for line in told)
    if options:  # a person gets the host's time, without the parts of a second
        told = [oni_agent.log_line(line) for line in told]
    assert lines == told
    assert any(line.endswith("said on stdout") for line in lines)
    assert lines[-1].endswith("processed 4 pages")


def test_following_a_job_that_has_ended_shows_all_of_it_and_how_it_ended(agent):
    failing_load(agent)
    agent.run("load-batch", "batch_oru_broken_ver01")
    done = ssh_run(agent, "job-follow 1")
    assert done.returncode == 1
    assert b"[ERROR] unable to load batch" in done.stdout
    assert done.stderr == b""
    done = ssh_run(agent, "job-follow 77")
    assert (json.loads(done.stdout)["message"], done.returncode) == ("Job not found", 0)


def test_ctrl_c_in_a_terminal_ends_the_following_and_not_the_job(agent):
    gate = agent.hold_load(agent.batch("batch_oru_alpha_ver01"))
    agent.job("load-batch", "batch_oru_alpha_ver01")
    gate.reached()
    ours, theirs = os.openpty()
    following = subprocess.Popen(
        [*agent.ssh_words("-t"), "job-follow 1"],
        stdin=theirs,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    following.stdout.readline()
    os.write(ours, b"\x03")
    agent.wait_for("session=.*job-follow.*client went away", 20)
    following.communicate(timeout=30)
    os.close(ours)
    os.close(theirs)
    assert agent.call("job-status", "1")["job"]["status"] == "started"
    gate.open()
    assert agent.ended(1)["status"] == "successful"


def test_the_last_lines_of_a_log_can_be_had_alone(site):
    site.prepend_to_manage(BOTH_STREAMS)
    site.batch("batch_oru_alpha_ver01")
    site.start().run("load-batch", "batch_oru_alpha_ver01")
    whole = site.ssh("job-logs 1")["job"]
    lines = sorted(whole["stdout"] + whole["stderr"])
    for count in (0, 1, 3, len(lines), len(lines) + 1000):
        some = site.ssh(f"job-logs 1 {count}")["job"]
        assert sorted(some["stdout"] + some["stderr"]) == lines[max(0, len(lines) - count) :]
    for count in ("-1", "x", "9999999999"):
        assert site.ssh(f"job-logs 1 {count}")["message"] == f'"{count}" is not a number of lines'


def test_job_follow_without_a_terminal_passes_no_control_characters(site):
    nasty = "\x1b[31m\x9b31m\u202e\x07tab\there é"
    site.prepend_to_manage(
        f"import sys\nif 'load_batch' in sys.argv:\n    print({nasty!r}); sys.exit(1)"
    )
    site.batch(ALPHA)
    id = site.start(PYTHONIOENCODING="utf-8").run("load-batch", ALPHA)["id"]
    with Client(site.port) as client:
        printed = client.channel(f"job-follow {id}").makefile("rb").read().decode()
    assert r"\x1b[31m\x9b31m\u202e\x07tab" + "\there é\n" in printed


MILLION_LINES = """\
import sys
if "load_batch" in sys.argv:
    for n in range(0, 1_000_000, 1000):
        print(*("%06d %040d" % (m, m) for m in range(n, n + 1000)), sep="\\n")
"""


@pytest.mark.parametrize("lines", ["", " 3000000", " 900000"])
def test_a_log_of_a_million_lines_is_shown_in_little_memory(site, lines):
    site.prepend_to_manage(MILLION_LINES)
    site.batch(ALPHA)
    site.start().run("load-batch", ALPHA)
    with Client(site.port) as client:
        channel = client.channel(f"job-logs 1{lines}")
        size = sum(map(len, iter(lambda: channel.recv(1 << 20), b"")))
        assert channel.recv_exit_status() == 0
    assert size > 900_000 * 80
    assert memory(site, "VmHWM") < 100


@pytest.mark.parametrize("obstacle", ["a folder", "nobody may read it"])
def test_a_job_whose_log_cannot_be_opened_fails_alone(witnessed, obstacle):
    site = witnessed.start()
    site.batch(BETA)
    gate = site.hold_load(site.batch(ALPHA))
    first = site.job("load-batch", ALPHA)
    gate.reached()
    second = site.job("purge-batch", ALPHA)
    third = site.job("load-batch", BETA)
    path = site.state / f"logs/{second}.log"
    path.mkdir() if obstacle == "a folder" else path.symlink_to("/proc/sys/kernel/no-such/x")
    gate.open()
    assert site.ended(third)["status"] == "successful"
    job = site.ended(second)
    assert job["status"] == "failed" and str(path) in job["error"]
    assert site.ended(first)["status"] == site.ended(third)["status"] == "successful"


@in_process
def test_an_error_of_megabytes_is_cut_with_a_sign(tmp_path, any_kind):
    queue = queue_on(store_in(tmp_path))
    job = queue.get(queue.add(["load-batch", "x"])[0])
    queue._record(job, oni_agent.Outcome("failed", "\u20ac" * 1_000_000))
    assert len(job.error.encode()) <= oni_agent.MAX_ERROR + 100
    assert job.error.startswith("\u20ac" * 500) and job.error.endswith("\u20ac" * 100)
    assert "bytes are left out here" in job.error


def test_an_error_of_one_very_long_word_is_cut_with_a_sign_and_whole_in_the_log(site):
    word = "x" * 30_000
    site.batch(ALPHA)
    site.prepend_to_manage(
        f"import sys\nif sys.argv[1] == 'load_batch': sys.exit('[ERROR] {word} it was')"
    )
    site.start()
    job = site.run("load-batch", ALPHA)
    assert len(job["error"].encode()) < 2048
    assert re.search(r"xxx \[…\d+ bytes are left out here…\] xxx", job["error"])
    assert "exit status 1: xxx" in job["error"]
    assert "xxx it was" in job["error"]
    assert any(word in line for line in site.logs(1))
    site.wait_for("error='exit status 1: xxx")
    (listed,) = site.call("list-jobs")["jobs"]
    assert listed["error"] == job["error"]
    with TerminalClient(site, "job-status 1") as client:
        client.ended()
    shown = re.sub(r"\s", "", without_colour(client.shown))
    assert re.sub(r"\s", "", job["error"]) in shown


def test_job_follow_begins_with_the_last_lines_that_are_asked_for(agent):
    gate = agent.hold_load(agent.batch(ALPHA, issues=3), issue=2)
    agent.job("load-batch", ALPHA)
    gate.reached()
    held = "Saving page. issue date: 1900-01-03 00:00:00, page sequence: 1"  # the gate's page
    until(lambda: any(held in line for line in agent.logs(1)))
    so_far = agent.logs(1)
    following = ssh_begin(agent, "job-follow 1 2")
    first = following.stdout.readline().decode().rstrip("\n")
    gate.open()
    rest = following.stdout.read().decode().splitlines()
    assert following.wait(60) == 0
    whole = agent.logs(1)
    told = [re.sub(rf"^\[{STAMP}\] ", "", line) for line in (first, *rest)]
    assert told == whole[len(so_far) - 2 :]
    assert agent.ssh("job-follow 1 x")["message"] == '"x" is not a number of lines'
    last = ssh_run(agent, "job-follow 1 1").stdout.decode()
    assert re.fullmatch(rf"\[{STAMP}\] .*processed \d+ pages\n", last)


def test_what_a_program_follows_does_nothing_to_a_terminal(site):
    site.prepend_to_manage(SHOUTING)
    site.batch(ALPHA)
    site.start(PYTHONIOENCODING="utf-8")
    site.run("load-batch", ALPHA)
    said = ssh_run(site, "job-follow 1").stdout
    assert b"\\x1b]0;owned\\x07 \\x9b31m" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said.decode())


@pytest.mark.parametrize(
    "line, shown",
    [
        ("a\tb", "a    b"),
        ("é東", "é東"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b\u202e\U000e0001", "\\x9b\\u202e\\U000e0001"),
        ("[2020-01-02T03:04:05] no stamp", "[2020-01-02T03:04:05] no stamp"),
    ],
)
def test_a_line_of_a_log_is_plain_text_for_a_person(line, shown):
    assert oni_agent.log_line(line) == shown


@in_process
def test_a_line_of_a_log_keeps_its_tabs_for_a_program():
    assert oni_agent.harmless("a\té\x1b\x9b\u202e") == "a\té\\x1b\\x9b\\u202e"


# --- Promises: a person at a terminal -------------------------------------------------------------

def test_no_command_without_a_terminal_is_answered(shared):
    done = subprocess.run(
        shared.ssh_words(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=30,
    )
    assert (json.loads(done.stdout)["message"], done.returncode) == ("no command specified", 0)


@pytest.mark.parametrize("command", ["help", "job-wait -1", "list-jobs", "job-logs -1", "board"])
def test_json_is_one_line_without_a_terminal(shared, command):
    plain = ssh_run(shared, command)
    assert plain.stdout.count(b"\n") == 1
    assert plain.stdout.endswith(b"}\n")
    assert json.loads(plain.stdout)["status"] == "success"


def test_check_works_on_a_terminal_without_unicode(site):
    status, said, _ = run_agent("--check", **{**site.environment, "PYTHONIOENCODING": "ascii"})
    assert status == 0
    assert said.startswith("? settings\n")


def test_a_command_that_reads_a_file_says_so_on_a_terminal_and_does_not_hang(shared):
    done = ssh_run(shared, "load-title", "-tt")
    assert b"leave out -t" in done.stdout


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_what_manage_py_prints_does_nothing_to_a_terminal(site, kind):
    site.prepend_to_manage(SHOUTING)
    site.batch(ALPHA)
    site.start(PYTHONIOENCODING="utf-8")
    assert "\x1b[2J" in site.run("load-batch", ALPHA)["error"]  # a program gets it as it is
    for line in (
        "job-logs 1",
        "job-logs 1 2",
        "job-follow 1",
        "job-wait 1",
        "job-status 1",
        "list-jobs",
        f"batch-status {ALPHA}",
        "job-status '\x1b[2J'",
        "'\x1b[2J\u009b31m'",
    ):
        shown = on_terminal(site, line, kind)
        assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", shown), (line, shown)
        assert "\r\n" in shown
    assert "\\x1b" in on_terminal(site, "job-logs 1", kind)


def frame(client: TerminalClient) -> list[str]:
    """The lines of the board that is drawn next, from the first to the last of the terminal."""
    client.wait_for(r"\x1b\[H")
    lines = without_colour(client.wait_for(r"\x1b\[J")).split("\r\n")[:-1]
    last = int(re.search(r"\[(\d+)H$", client.wait_for(r"\x1b\[\d+H"))[1])
    assert len(lines) < last
    lines += [""] * (last - 1 - len(lines))
    return [*lines, client.wait_for("q leaves; jobs go on")]


def test_ssh_alone_shows_the_board_in_the_terminals_size_until_q(agent):
    gate = agent.hold_load(agent.batch(ALPHA, issues=4), issue=2)
    agent.batch(BETA, start=date(1920, 1, 1))
    failing_load(agent)
    agent.run("load-batch", "batch_oru_broken_ver01")
    agent.job("load-batch", ALPHA)
    agent.job("load-batch", BETA)
    gate.reached()
    with TerminalClient(agent) as client:
        until(
            lambda: any(
                "2 of 4 issues" in line or "3 of 4 issues" in line for line in frame(client)
            )
        )
        lines = frame(client)
        assert len(lines) == 24
        assert all(len(line) <= 80 for line in lines)
        text = "\n".join(lines)
        assert f"load-batch {ALPHA}" in text
        assert "Waiting: 1" in text
        assert re.search(rf"pending +load-batch {BETA}", text)
        assert re.search(r"failed \d+ s +load-batch batch_oru_broken_ver01", text)
        assert "unable to load batch: it is too late" in text
        client.resize(50, 12)
        until(lambda: len(frame(client)) == 12)
        assert all(len(line) <= 50 for line in frame(client))
        client.type("q")
        assert client.ended() == 0
        assert client.shown.endswith("\x1b[?25h\x1b[?1049l") or "\x1b[?1049l" in client.shown
    gate.open()
    assert agent.ended(3)["status"] == "successful"


@pytest.mark.parametrize("key", ["\x03", "\x04"])
def test_ctrl_c_and_ctrl_d_leave_the_board(shared, key):
    with TerminalClient(shared) as client:
        client.wait_for("Ended")
        client.type(key)
        assert client.ended() == 0


def test_many_who_look_at_the_board_ask_open_oni_no_more_than_one(site):
    hurry(site, PROGRESS_SECONDS=3600)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TerminalClient(site)) for _ in range(5)]
        for client in clients:
            until(lambda client=client: re.search(r"0\s+batches", "\n".join(frame(client))))
        site.wait_for("Open ONI in .* word coordinates")  # its look at Open ONI is over
        asked = site.solr.requests[:]
        for client in clients:
            frame(client)
        assert site.solr.requests == asked


def test_control_characters_are_shown_and_never_sent_to_a_terminal(site):
    site.prepend_to_manage(
        "import os, sys\n"
        "if sys.argv[1:2] == ['load_batch']:\n"
        "    sys.stderr.write('[ERROR] bold\\x1b[1m\\x07 and \\x9b31m\\n')\n"
        "    os._exit(1)"
    )
    site.batch(ALPHA)
    site.start()
    site.run("load-batch", ALPHA)
    for command in ("job-follow 1", "job-logs 1", "job-status 1", "list-jobs", "job-wait 1"):
        shown = without_colour(ssh_run(site, command, "-tt").stdout.decode())
        assert "bold\\x1b[1m\\x07 and \\x9b31m" in " ".join(shown.split()), command
        assert set(shown) & set("\x1b\x07\x9b") == set()
    assert "\x1b" in site.call("job-status", "1")["job"]["error"]  # a program gets what there is


@pytest.mark.parametrize(
    "command",
    [
        "list-batches",
        f"batch-status {ALPHA}",
        "help",
        "list-jobs",
        "job-status 1",
        f"batch-check {ALPHA}",
        "version",
        "nonsense",
    ],
)
@pytest.mark.parametrize("columns", [40, 80, 132])
def test_nothing_is_wider_than_the_terminal(shown, command, columns):
    with TerminalClient(shown, command, columns) as client:
        client.ended()
    for line in without_colour(client.shown).replace("\r", "").split("\n"):
        assert len(line) <= columns


def test_no_name_and_no_error_is_cut_on_a_narrow_terminal(shown):
    for command in "list-jobs", "list-batches", "job-status 1":
        with TerminalClient(shown, command, 40) as client:
            client.ended()
        lines = without_colour(client.shown).splitlines()
        assert not any("…" in line for line in lines if not line.startswith("state "))
        joined = re.sub(r"\s", "", without_colour(client.shown))
        name = "broken" if "job" in command else "東京日日新聞の長い名前の部分" * 2
        assert f"batch_oru_{name}_ver01" in joined


def test_a_screen_has_one_time_zone_the_hosts_with_its_name(site):
    site.batch(ALPHA)
    site.start(TZ="XST-05:30")
    site.run("load-batch", ALPHA)
    for command in ("job-logs 1", "job-follow 1", "job-status 1", f"batch-status {ALPHA}"):
        shown = without_colour(ssh_run(site, command, "-tt").stdout.decode())
        zones = re.findall(r"(?m)(?: ago, |^\[)[\d: -]+ (\w+)", shown)
        assert set(zones) == {"XST"}, shown
    in_utc = site.call("job-status", "1")["job"]["ended"]
    here = datetime.fromisoformat(in_utc[:19]) + timedelta(hours=5, minutes=30)
    assert f"{here:%H:%M} XST" in ssh_run(site, "job-status 1", "-tt").stdout.decode()


@pytest.mark.parametrize("command", ["", "board", "list-jobs", "job-wait 1", "job-logs 1", "help"])
def test_a_dumb_terminal_gets_no_escape_at_all(shown, command):
    done = subprocess.run(
        [*shown.ssh_words("-tt"), *([command] if command else [])],
        env={**os.environ, "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert done.stdout
    assert b"\x1b" not in done.stdout


NEW_COMMAND = '''
from oni_agent import Answer, Request, command
@command(
    usage="disk",
    help="Says how full the disk is.",
    misuse='"disk" takes no arguments',
)
def cmd_disk(request: Request) -> Answer:
    return Answer({"free_bytes": 12345, "largest": ["logs/7.err", "logs/\\x1b3.err"]})
'''


def test_all_that_a_new_command_answers_is_shown_to_a_person(site):
    altered(site, NEW_COMMAND)
    assert site.call("disk")["free_bytes"] == 12345
    assert site.call("disk", "full")["message"] == '"disk" takes no arguments'
    said = ssh_run(site, "disk", "-tt").stdout.decode()
    assert said.split("\r\n") == [
        "free_bytes: 12345",
        "Largest: 2",
        "largest: logs/7.err",
        "largest: logs/\\x1b3.err",
        "",
    ]
    assert "Says how full the disk is." in ssh_run(site, "help disk", "-tt").stdout.decode()


def test_help_tells_of_one_command_with_an_exchange(shared):
    reply = shared.call("help", "load-batch")["commands"]
    assert [each["usage"] for each in reply] == ["load-batch BATCH"]
    assert "$ ssh oni load-batch batch_oru_small_ver01\n" in reply[0]["example"]
    said = ssh_run(shared, "help load-batch", "-tt").stdout
    assert re.search(rb"^load-batch BATCH\s+Loads a batch", said)
    assert b"\r\n$ ssh oni load-batch batch_oru_small_ver01\r\nJob added to queue\r\n" in said
    assert "did you mean" in shared.call("help", "laod-batch")["error"]


def test_help_says_what_can_go_wrong_and_what_to_do(shared):
    troubles = shared.call("help", "problems")["troubles"]
    assert all(set(each) == {"seen", "advice"} for each in troubles)
    said = ssh_run(shared, "help problems", "-tt").stdout.decode()
    assert "\r\nSolr lacks 12 of 400 pages\r\n       The index was emptied or restored" in said
    assert "`help problems`" in ssh_run(shared, "help", "-tt").stdout.decode()


# What has to happen before the exchange of a command in its help.
BEFORE_EXCHANGES = {
    "batch-patch": ["load-batch batch_oru_small_ver01", "job-wait 4"],
    "list-jobs": ["load-batch batch_oru_hole_ver01", "job-wait 5", "job-wait 6"],
    "job-cancel": ["load-batch batch_oru_slow_ver01", "load-batch batch_oru_faults_ver01"],
}


def counted_issues(site: Site) -> list:
    """How many issues the files of each batch name, by list-batches; None: yet to be counted."""
    return [batch["issues_in_batch_xml"] for batch in site.call("list-batches")["batches"]]


def test_the_exchanges_in_help_happen_as_they_are_shown(tmp_path, template):
    (tmp_path / "instructions.txt").write_text("RemoveIssue sn99990001/1900010101\n")
    site = demo_site(tmp_path, template).start()

    def plain(text: str) -> str:
        text = re.sub(r"\d+ (s|min|h|days) ago, [\d: -]+ \w+", "TIME", text)
        text = re.sub(r"(?m)^\[[\d: -]+ \w+\]", "[TIME]", text)
        text = re.sub(r"\b(successful|failed) \d+ s", r"\1 TIME", text)
        text = re.sub(r'("session":\{"id":)\d+', r"\1 N", text)
        return re.sub(r"\s+", " ", text)

    try:
        until(lambda: None not in counted_issues(site))
        for name, command in oni_agent.COMMANDS.items():
            if name in ("help", "board", "check"):  # theirs are no exchanges
                continue
            for line in BEFORE_EXCHANGES.get(name, []):
                shell(site, tmp_path, f"ssh oni {line}")
            exchanges = re.findall(r"\$ (.*)\n((?:(?!\$ ).*\n?)*)", command.example)
            assert exchanges, name
            for line, printed in exchanges:
                assert (line, plain(shell(site, tmp_path, line)).strip()) == (
                    line,
                    plain(printed).strip(),
                )
    finally:
        site.clean_up()


def test_a_job_that_never_started_is_not_said_to_have_taken_any_time(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    agent.batch(BETA, start=date(1920, 1, 1))
    agent.job("load-batch", ALPHA)
    agent.job("load-batch", BETA)
    gate.reached()
    agent.call("job-cancel", "2")
    said = ssh_run(agent, "job-status 2", "-tt").stdout
    assert b"load-batch " + BETA.encode() in said
    assert re.search(rb"failed +load-batch", said)
    gate.open()
    agent.ended(1)
    said = ssh_run(agent, "job-status 1", "-tt").stdout
    assert re.search(rb"successful \d+ s +load-batch", said)


def oni_alias(site: Site, folder: Path) -> list[str]:
    """ssh with the README's alias `oni` for a site, as a list of words that lacks the alias."""
    config = folder / "ssh_config"
    alias = readme_block("Host oni").replace("Port 2222", f"Port {site.port}")
    config.write_text(f"{alias}StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n")
    return ["ssh", "-F", str(config)]


def test_the_alias_gives_text_to_a_person_json_to_a_program_and_takes_a_file(agent, tmp_path):
    agent.batch(ALPHA)
    agent.run("load-batch", ALPHA)
    (tmp_path / "herald.xml").write_bytes(marc_xml(wrapped=True))
    ssh = oni_alias(agent, tmp_path)
    with TerminalClient(agent, words=[*ssh, "oni", "job-wait 1"]) as client:
        assert client.ended() == 0
    assert "Success: this job is complete.\r\n" in client.shown
    with TerminalClient(agent, words=[*ssh, "-T", "oni", "job-wait 1"]) as client:
        assert client.ended() == 0
    assert json.loads(client.shown)["job"]["status"] == "successful"
    # OpenSSH asks for no terminal where its own input is none, unless it is told to "force" that.
    for line in ("{} oni load-title < herald.xml", "cat herald.xml | {} oni load-title"):
        typed = f"cd {tmp_path}; {line.format(shlex.join(ssh))}"
        with TerminalClient(agent, words=["sh", "-c", typed]) as client:
            assert client.ended() == 0
        assert json.loads(client.shown)["message"] == "Job added to queue"


def test_several_batches_are_refused_and_told_how_a_shell_gives_them(shared):
    reply = without_session(shared.ssh("load-batch batch_oru_a_ver01 'b c'"))
    assert reply["message"] == '"load-batch" requires exactly one batch name'
    assert reply["error"] == (
        "usage: load-batch BATCH; for several:"
        " for each in batch_oru_a_ver01 'b c'; do ssh oni load-batch $each; done"
    )
    assert "do ssh" not in shared.ssh("load-batch")["error"]


@pytest.mark.parametrize("command", ["job-status", "job-cancel", "job-retry", "job-logs"])
def test_too_many_words_are_not_called_too_few(shared, command):
    assert shared.ssh(command)["message"] == "You must supply a job ID"
    reply = shared.ssh(f"{command} 1 2 3")
    assert reply["message"].startswith(f'"{command}" takes ')
    assert reply["error"].startswith(f"usage: {command} ID")


def test_a_batch_may_be_named_as_a_shell_completes_its_folder(agent):
    agent.batch(ALPHA)
    assert agent.call("batch-check", f"{ALPHA}/")["batch"] == {"name": ALPHA}
    job = agent.run("load-batch", f"{ALPHA}/")
    assert (job["words"], job["status"]) == (["load-batch", ALPHA], "successful")
    assert agent.call("batch-status", f"{ALPHA}/")["batch"]["state"] == "complete"
    line = f"RemoveIssue {GAZETTE}/1900010101\n".encode()
    job = agent.run("batch-patch", f"{ALPHA}/", f"{ALPHA[:-2]}02/", stdin=line)
    assert (job["words"][1:], job["status"]) == ([ALPHA, f"{ALPHA[:-2]}02"], "successful")
    assert [job["id"] for job in agent.call("list-jobs", f"{ALPHA}/")["jobs"]] == [1, 2]
    assert agent.run("purge-batch", f"{ALPHA}/")["status"] == "successful"
    assert agent.held(ALPHA) == (0, 0, 0)


def test_list_jobs_takes_a_batch_several_statuses_and_a_number(agent):
    failing_load(agent)
    for name in (ALPHA, BETA):
        agent.batch(name, start=date(1900 if name == ALPHA else 1910, 1, 1))
        agent.run("load-batch", name)
    agent.run("load-batch", "batch_oru_broken_ver01")
    agent.run("purge-batch", ALPHA)

    def listed(*words: str) -> list[int]:
        return [job["id"] for job in agent.call("list-jobs", *words)["jobs"]]

    assert listed() == [1, 2, 3, 4]
    assert listed(ALPHA) == [1, 4]
    assert listed("failed", "pending") == [3]
    assert listed("successful", "failed", "2") == [3, 4]
    assert listed("1", ALPHA, "successful") == [4]
    assert listed(BETA, "failed") == []
    reply = agent.call("list-jobs", ALPHA, "1")
    assert reply["hint"] == "These are the newest 1 jobs; a larger number shows more."
    for wrong in ("0", "-1", "finished", ""):
        reply = agent.call("list-jobs", wrong)
        assert reply["message"] == f'"{wrong}" is not a job status'
        assert "pending, started, couldn't start" in reply["error"]


def test_a_person_is_shown_the_newest_jobs_and_a_program_all(site):
    hurry(site, NEWEST_JOBS=2)
    site.batch(ALPHA)
    for command in ("load-batch", "purge-batch", "load-batch"):
        site.run(command, ALPHA)
    shown = ssh_run(site, "list-jobs", "-tt").stdout.decode()
    assert "Jobs: 2\r\n" in shown
    assert "These are the newest 2 jobs" in shown
    assert "\r\n   1  " not in without_colour(shown)
    assert without_colour(ssh_run(site, "list-jobs 3", "-tt").stdout.decode()).count("batch_") == 3
    reply = site.call("list-jobs")
    assert len(reply["jobs"]) == 3
    assert "hint" not in reply


def test_job_status_says_the_seconds_that_are_left(site):
    hurry(site, PROGRESS_SECONDS=0)
    gate = site.hold_load(site.batch(ALPHA, issues=4), issue=2)
    site.job("load-batch", ALPHA)
    gate.reached()
    job = {}

    def some_pages_are_loaded() -> bool:
        job.update(site.call("job-status", "1")["job"])
        return bool(job.get("pages_loaded"))

    until(some_pages_are_loaded)
    left = job["seconds"] * (job["pages"] - job["pages_loaded"]) / job["pages_loaded"]
    assert job["seconds_left"] == int(left)
    gate.open()
    assert "seconds_left" not in site.ended(1)


def test_json_escapes_what_does_something_to_a_terminal(site):
    name = "del\x7f csi\x9b bidi\u202e\u2066 line\u2028 é 東 \x1b"
    site.start()
    with Client(site.port) as client:
        said = client.raw(f"ensure-awardee {shlex.quote(name)}")
    assert b"\\u007f" in said
    assert b"\\u009b" in said
    assert b"\\u202e\\u2066 line\\u2028 \xc3\xa9" in said
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066]", said.decode())
    assert json.loads(said)["org_code"] == name


def test_a_person_is_not_told_that_a_job_started_which_never_did(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    agent.batch(BETA, start=date(1920, 1, 1))
    agent.job("load-batch", ALPHA)
    agent.job("load-batch", BETA)
    gate.reached()
    assert b"Job cancelled\r\n" in ssh_run(agent, "job-cancel 2", "-tt").stdout
    said = ssh_run(agent, "job-status 2", "-tt").stdout
    assert b"Failed: this job never started.\r\n" in said
    assert b"cancelled before it started\r\n" in said
    assert agent.call("job-status", "2")["message"] == (
        "Failed: this job started but returned a non-zero exit code."  # NCA's words
    )
    assert agent.call("job-cancel", "2")["error"] == "Failed: this job never started."
    gate.open()


def test_the_board_says_what_to_type_where_it_is_empty_and_what_its_keys_are(agent):
    with TerminalClient(agent) as client:
        until(lambda: "ssh oni load-batch BATCH    load one" in frame(client))
        client.type("?")
        keys = "q, Ctrl-C, Ctrl-D  leave the board; jobs go on"
        until(lambda: frame(client)[0] == keys)
        client.type("?")
        until(lambda: keys not in frame(client))
        client.type("q")
        assert client.ended() == 0


JOB = {
    "id": 7,
    "status": "failed",
    "words": ["load-batch", ALPHA],
    "seconds": 130.5,
    "queued": "2020-01-02T03:04:05.123456789Z",
    "started": "2020-01-02T03:04:05.123456789Z",
    "ended": "2020-01-02T03:06:15.123456789Z",
}


@pytest.mark.parametrize(
    "job, width, lines",
    [
        ({"error": "it broke"}, 120, ["ROW  it broke"]),
        ({"error": "it broke at " + "x" * 40}, 120, ["ROW", "       it broke at " + "x" * 40]),
        ({"error": ""}, 120, ["ROW"]),
        ({"place": 2}, 130, ["ROW  It is number 2 in the queue."]),
        (
            {"checked": 5, "to_check": 20},
            80,
            ["ROW", "       [#####...............] 5 of 20 issues checked"],
        ),
        (
            {"checked": 1, "to_check": 1},
            80,
            ["ROW", "       [####################] 1 of 1 issue checked"],
        ),
        (
            {"pages": 40, "pages_loaded": 10, "issues": 4, "issues_loaded": 1, "seconds_left": 300},
            80,
            [
                "ROW",
                "       [#####...............] 1 of 4 issues, 0.1 pages a second, 5 min left",
            ],
        ),
        (
            {"pages": 40, "pages_loaded": 0, "issues": 1, "issues_loaded": 0},
            80,
            ["ROW", "       [....................] 0 of 1 issue"],
        ),
    ],
)
@in_process
def test_a_job_is_shown_on_a_row_and_what_is_said_of_it_beside_or_below_in_whole(job, width, lines):
    row = oni_agent.job_row({**JOB, **job})
    when = datetime(2020, 1, 2, 3, 6, tzinfo=timezone.utc).astimezone()
    words = f"load-batch {ALPHA}"
    text = f"   7  failed 2 min       {words:<31}  days ago, {when:%F %H:%M %Z}"
    shown = [re.sub(r"\d+ days ago", "days ago", line) for line in oni_agent.laid_out(row, width)]
    if width == 80:  # the row itself, which holds a whole date, takes two lines there
        shown[:2] = [re.sub(r"\s+", " ", " ".join(shown[:2]))]
        text = re.sub(r"\s+", " ", " " + text.strip())
    assert shown == [line.replace("ROW", text) for line in lines]


@pytest.mark.parametrize(
    "keys, lines",
    [
        ({"status": "success", "message": "No-op", "job": {"id": -1}}, ["No-op"]),
        (
            {"status": "error", "message": "it cannot", "error": "so it is", "job": {"id": 3}},
            ["error: it cannot", "       so it is"],
        ),
        ({"status": "error", "message": "it cannot"}, ["error: it cannot"]),
        ({"oni": {"location": "/oni", "batches": 1}}, ["Open ONI in /oni: 1 batch"]),
        ({"oni": {"location": "/oni", "batches": 2}}, ["Open ONI in /oni: 2 batches"]),
        (
            {"oni": {"location": "/oni", "problem": "the database is down"}},
            ["Open ONI in /oni: ? batches  the database is down"],
        ),
        (
            {"free_bytes": 5, "largest": ["a", "b\x1b"]},
            ["free_bytes: 5", "Largest: 2", "largest: a", "largest: b\\x1b"],
        ),
        (
            {"faults": [{"file": "a", "fault": "b"}], "warnings": []},
            ["Faults: 1", "fault: a: b", "Warnings: 0"],
        ),
    ],
)
@in_process
def test_an_answer_is_shown_key_by_key(keys, lines):
    assert oni_agent.answer_lines(keys, 80) == lines


@in_process
def test_a_text_that_is_too_long_is_cut_in_the_middle_with_a_sign():
    assert oni_agent.shortened("é" * 1000) == "é" * 1000
    cut = oni_agent.shortened(f"first {'é' * 5000} last")
    assert cut.startswith("first é")
    assert cut.endswith("é last")
    assert "[…8011 bytes are left out here…]" in cut
    assert len(cut.encode()) < 2048
    assert len(oni_agent.shortened("\udcff" * 9000).encode("utf-8", "replace")) < 2048


@given(strategies.text(), strategies.integers(1, 200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_wrapped_to_the_width(text, width):
    lines = oni_agent.wrapped(text, max(width, 10))
    assert all(len(line) <= max(width, 10) for line in lines)
    shown = "".join(lines).replace(" ", "")
    assert shown == oni_agent.plain(text).replace(" ", "")  # a path is broken, not cut


# --- Promises: who may connect --------------------------------------------------------------------

def banner(port: int, host: str = "127.0.0.1") -> bytes:
    """What an agent says first to whoever connects; nothing to those it cuts off."""
    with socket.create_connection((host, port), timeout=30) as connection:
        try:
            return connection.recv(100)
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "bind, host, allowed, admitted",
    [
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1:0", "127.0.0.1", "10.0.0.0/8, 127.0.0.0/8", True),
        ("127.0.0.1:0", "127.0.0.1", "10.0.0.0/8 192.168.1.1 ::1", False),
        ("127.0.0.1:0", "127.0.0.1", "127.0.0.2,::/0", False),
        ("[::1]:0", "::1", "::1", True),
        ("[::1]:0", "::1", "fe80::/10 127.0.0.1 0.0.0.0/0", False),
        (":0", "127.0.0.1", "127.0.0.0/8", True),  # over an IPv6 socket, as ::ffff:127.0.0.1
        (":0", "127.0.0.1", "::1", False),
        (":0", "::1", "::/64", True),
    ],
)
def test_only_the_addresses_of_allow_from_are_let_in(site, bind, host, allowed, admitted):
    site.start(BA_BIND=bind, ALLOW_FROM=allowed)
    if not admitted:
        assert [banner(site.port, host) for _ in range(20)] == [b""] * 20
        refusal = rf"connection from={host} refused='not in ALLOW_FROM'"
        site.wait_for(refusal)
        assert len([line for line in site.log if re.search(refusal, line)]) == 1  # a minute
    else:
        assert banner(site.port, host).startswith(b"SSH-2.0-")
        with Client(site.port, host=host, user="some one") as client:
            assert client.ask("version")["status"] == "success"
        line = site.wait_for("session=1 ")
        assert re.search(rf"from=\[?{host}]?:\d+ user='some one' admitted=\S*ALLOW_FROM", line)


def make_key(folder: Path, name: str, *options: str) -> Path:
    """A key of ssh-keygen's; its public half is beside it."""
    subprocess.run(
        ["ssh-keygen", "-q", "-N", "", "-C", f"{name} key", "-f", str(folder / name), *options],
        check=True,
    )
    return folder / name


def with_key(site: Site, key: Path, command: str = "version") -> int:
    """The exit status of OpenSSH's client with one key; 255 when it is not let in."""
    return ssh_run(
        site, command, "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none"
    ).returncode


@pytest.mark.parametrize(
    "options",
    [("-t", "ed25519"), ("-t", "ecdsa", "-b", "256"), ("-t", "ecdsa", "-b", "521")],
    ids=" ".join,
)
def test_who_has_an_authorized_key_is_let_in_and_nobody_else(site, tmp_path, options):
    mine, other = (make_key(tmp_path, name, *options) for name in ("mine", "other"))
    authorized = tmp_path / "authorized"
    authorized.write_text(f"# who may\n\n{public(mine)}")
    site.start(AUTHORIZED_KEYS=str(authorized))
    assert (with_key(site, mine), with_key(site, other), ssh_run(site, "version").returncode) == (
        0,
        255,
        255,
    )
    with pytest.raises(paramiko.BadAuthenticationType):
        Client(site.port)
    printed = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(mine)], stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    line = site.wait_for("session=1 ")
    assert re.search(
        rf"from=127.0.0.1:\d+ user='nobody' admitted=\S*{re.escape(printed.split()[1])}", line
    )
    assert site.wait_for("refused='no key of AUTHORIZED_KEYS, but SHA256:")


def test_an_rsa_key_is_let_in_with_a_sha2_signature_only(site, tmp_path):
    mine = make_key(tmp_path, "mine", "-t", "rsa", "-b", "2048", "-m", "PEM")
    (tmp_path / "authorized").write_text(public(mine))
    site.start(AUTHORIZED_KEYS=str(tmp_path / "authorized"))

    def admits(*refused: str) -> bool:
        with paramiko.Transport(
            socket.create_connection(("127.0.0.1", site.port)),
            disabled_algorithms={"pubkeys": refused},
        ) as transport:
            transport.start_client(timeout=30)
            with contextlib.suppress(paramiko.SSHException):
                transport.auth_publickey("nca", paramiko.RSAKey(filename=str(mine)))
            return transport.is_authenticated()

    assert (admits(), admits("rsa-sha2-512", "rsa-sha2-256")) == (True, False)
    told = tuple(map(int, paramiko.__version__.split(".")[:2])) >= (
        3,
        4,
    )  # before, OpenSSH was not told of SHA-2
    assert with_key(site, mine) == (0 if told else 255)


@pytest.mark.parametrize(
    "line, admitted",
    [
        ('from="127.0.0.0/8" {}', True),
        ('from="10.0.0.0/8,127.0.0.1" {}', True),
        ("  {}  ", True),
        ('from="10.0.0.0/8" {}', False),
        ('from="" {}', False),
        ('from="127.0.0.1,!127.0.0.1" {}', False),
        ('command="date" {}', False),
        ("no-pty {}", False),
        ('from="127.0.0.1",no-pty {}', False),
        ("cert-authority {}", False),
        ("restrict {}", False),
        ('expiry-time="20200101" {}', False),
        ("# {}", False),
        ("#{}", False),
        ('from="10.0.0.0/8" {0}\n{0}', True),
        ("ssh-ed25519 AAAA {}", False),
        ("", False),
    ],
)
def test_options_before_a_key_are_honoured_or_refused_never_ignored(site, tmp_path, line, admitted):
    key = make_key(tmp_path, "mine", "-t", "ed25519")
    authorized = tmp_path / "authorized"
    authorized.write_text(line.format(public(key).strip()) + "\n")
    site.start(AUTHORIZED_KEYS=str(authorized))
    assert with_key(site, key) == (0 if admitted else 255)


def test_the_keys_are_read_at_each_login(site, tmp_path):
    key = make_key(tmp_path, "mine", "-t", "ed25519")
    authorized = tmp_path / "authorized"
    authorized.write_text("")
    site.start(AUTHORIZED_KEYS=str(authorized))
    assert with_key(site, key) == 255
    authorized.write_text(public(key))
    assert with_key(site, key) == 0
    authorized.unlink()
    assert with_key(site, key) == 255
    site.wait_for("AUTHORIZED_KEYS: .* cannot be read, so nobody is admitted")
    authorized.write_text(public(key))
    assert with_key(site, key) == 0


def test_a_key_must_be_the_whole_word(site, tmp_path):
    mine = make_key(tmp_path, "mine", "-t", "ed25519")
    kind, blob, comment = public(mine).split(" ", 2)
    authorized = tmp_path / "authorized"
    authorized.write_text("")
    site.start(AUTHORIZED_KEYS=str(authorized))
    for text, status in (
        (f"{kind} {blob}AAAA {comment}", 255),
        (f"x\f{kind} {blob}\n", 255),
        (f"\ufeff{kind} \t {blob}\r\n", 0),
    ):
        authorized.write_text(text)
        assert with_key(site, mine) == status


def test_with_both_controls_both_must_hold(site, tmp_path):
    key, other = (make_key(tmp_path, name, "-t", "ed25519") for name in ("mine", "other"))
    site.start(AUTHORIZED_KEYS=f"{key}.pub", ALLOW_FROM="127.0.0.1")
    assert (with_key(site, key), with_key(site, other)) == (0, 255)
    site.stop()
    site.start(ALLOW_FROM="127.0.0.2")
    assert with_key(site, key) == 255
    assert banner(site.port) == b""


@pytest.mark.parametrize("value", [",", " ", "::ffff:127.0.0.1", "10.0.0.1/8", "localhost"])
def test_an_allow_from_that_names_no_address_is_refused(site, value):
    status, _, said = run_agent(**{**site.environment, "ALLOW_FROM": value})
    assert status == 2
    assert said.startswith(f"oni_agent: ALLOW_FROM is {value!r}")


def test_a_client_that_offers_a_key_is_served_where_no_keys_are_asked_for(shared):
    with contextlib.closing(paramiko.Transport(("127.0.0.1", shared.port))) as transport:
        transport.start_client(timeout=30)
        with contextlib.suppress(paramiko.AuthenticationException):
            transport.auth_publickey("nca", paramiko.RSAKey.generate(2048))
        if not transport.is_authenticated():
            transport.auth_none("nca")
        channel = transport.open_session(timeout=30)
        channel.exec_command("version")
        assert json.loads(channel.makefile("rb").read())["status"] == "success"


@pytest.mark.parametrize(
    "bind, control, warnings",
    [
        (":0", {}, 1),
        ("0.0.0.0:0", {}, 1),
        ("127.0.0.1:0", {}, 0),
        ("[::1]:0", {}, 0),
        (":0", {"ALLOW_FROM": "10.0.0.0/8"}, 0),
    ],
)
def test_an_agent_open_to_anyone_warns_once(site, bind, control, warnings):
    site.start(BA_BIND=bind, **control)
    site.wait_for("Open ONI in")  # said after the warning
    site.stop()
    assert (
        len([line for line in site.log if "WARNING" in line and "ALLOW_FROM" in line]) == warnings
    )


@pytest.mark.parametrize(
    "said, why",
    [
        (b"GET / HTTP/1.1\r\n\r\n", "its first line is no version of SSH"),
        (b"SSH-2.0-" + b"x" * 300, "its first line is no version of SSH"),
        (b"SSH-2.0-x\r\n" + bytes(100), "[^']+"),
    ],
)
def test_a_client_that_is_no_client_of_ssh_is_gone_at_once_with_a_line_in_the_log(agent, said, why):
    for _ in range(3):
        with silent(agent.port, said) as connection, contextlib.suppress(ConnectionResetError):
            while connection.recv(1000):
                pass
    pattern = rf"connection from=127.0.0.1 refused='{why}'"
    agent.wait_for(pattern)
    assert len([line for line in agent.log if re.search(pattern, line)]) == 1  # a minute


def test_a_client_with_no_algorithm_in_common_leaves_a_line_in_the_log(agent):
    with pytest.raises((paramiko.SSHException, EOFError)):
        Client(agent.port, disabled_algorithms={"kex": list(paramiko.Transport._preferred_kex[:3])})
    agent.wait_for("connection from=127.0.0.1 refused='.*no acceptable kex algorithm")


FIPS_HOST = """
try:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
except ImportError:  # in Open ONI's own Python
    pass
else:
    def refuse(*_):
        raise UnsupportedAlgorithm("this host is in FIPS mode")
    X25519PrivateKey.generate = Ed25519PrivateKey.generate = refuse
"""


def test_a_host_without_curve25519_offers_nists_curves_and_makes_an_ecdsa_key(site, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(FIPS_HOST)
    site.start(PYTHONPATH=str(tmp_path))
    with Client(site.port) as client:
        assert client.transport.get_remote_server_key().get_name() == "ecdsa-sha2-nistp256"
        assert client.ask("version")["status"] == "success"
    assert site.ssh("version")["status"] == "success"


@in_process
def test_only_where_curves_are_missing_nists_are_offered():
    assert not set(oni_agent.algorithms_to_offer().kex) & set(oni_agent.NIST_CURVES)


@in_process
def test_a_host_key_that_came_to_be_there_meanwhile_is_kept(tmp_path):
    made = oni_agent.make_host_key(tmp_path / "key")
    content = (tmp_path / "key").read_bytes()
    again = oni_agent.make_host_key(tmp_path / "key")
    assert again.get_base64() == made.get_base64()
    assert (tmp_path / "key").read_bytes() == content
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"key", "key.pub"}


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_an_auditor_finds_nothing_but_the_classical_fall_back(site, kind):
    site.start(HOST_KEY_FILE=str(key_made_by_ssh_keygen(site.oni.parent / "key", "-t", kind)))
    done = subprocess.run(
        [sys.executable, "-m", "ssh_audit", "-j", "-p", str(site.port), "127.0.0.1"],
        stdout=subprocess.PIPE,
        timeout=60,
    )
    report = json.loads(done.stdout)
    assert not report["cves"]
    assert "curve25519-sha256@libssh.org" in {each["algorithm"] for each in report["kex"]}
    found = {
        (kind, each["algorithm"], level, text)
        for kind in ("kex", "key", "enc", "mac")
        for each in report[kind]
        for level in ("fail", "warn")
        for text in each["notes"].get(level, ())
    }
    allowed = {
        ("kex", name, "warn", "does not provide protection against post-quantum attacks")
        for name in ("curve25519-sha256", "curve25519-sha256@libssh.org")
    }
    if kind == "ecdsa":  # the administrator's own choice of a key
        found = {each for each in found if each[0] != "key"}
    assert found <= allowed


NASTY = [
    "version",
    "help",
    "load-batch",
    "purge-batch",
    "load-title",
    "batch-patch",
    "ensure-awardee",
    "list-jobs",
    "job-status",
    "job-logs",
    "batch_oru_alpha_ver01",
    "../batch_oru_alpha_ver01",
    "batch_oru_broken_ver01",
    "oru",
    "-1",
    "1",
    "0",
    "9" * 19,
    "*",
    "$(touch /tmp/x)",
    "`id`",
    ";",
    "--help",
    "-c",
    "é",
    "\u200b",
    "\0",
    "\n",
    "\r",
    "\t",
    "'",
    '"',
    "\\",
    "\x1b[31m",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    "x" * 5000,
]

WORDS = strategies.one_of(strategies.sampled_from(NASTY), strategies.text(max_size=30))

LINES = strategies.one_of(
    strategies.binary(max_size=300),
    strategies.lists(WORDS, max_size=5).map(
        lambda words: " ".join(words).encode("utf-8", "surrogatepass")
    ),
    strategies.lists(WORDS, max_size=5).map(
        lambda words: " ".join(map(go_quoted, words)).encode("utf-8", "replace")
    ),
    strategies.lists(WORDS, max_size=5).map(
        lambda words: " ".join(map(shlex.quote, words)).encode("utf-8", "replace")
    ),
    strategies.tuples(
        strategies.sampled_from(
            [
                "load-title",
                "batch-patch batch_oru_alpha_ver01 batch_oru_new_ver02",
                "ensure-awardee oru",
                '"job-status" "1"',
            ]
        ),
        strategies.integers(0, 60),
        strategies.binary(max_size=3),
    ).map(lambda it: it[0].encode()[: it[1]] + it[2] + it[0].encode()[it[1] :]),
)

PAYLOADS = strategies.one_of(
    strategies.binary(max_size=2000),
    strategies.tuples(
        strategies.integers(0, 900), strategies.binary(max_size=20), strategies.integers(0, 900)
    ).map(lambda it: marc_xml()[: it[0]] + it[1] + marc_xml()[it[2] :]),
    strategies.sampled_from(
        [
            b"",
            b"\n\nEND\n",
            b"RemoveIssue sn99990001/19000101\n",
            b"RemoveIssue x/../../y\n",
            b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>",
            b"<" * 100_000,
            bytes(200_000),
        ]
    ),
)

RELENTLESS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_whatever_is_asked_gets_one_answer_and_nothing_happens_that_was_not_asked_for(site):
    site.batch("batch_oru_alpha_ver01")
    spoil_batch_xml(site.batch("batch_oru_broken_ver01"))
    site.start()
    site.call(
        "purge-batch", "batch_oru_alpha_ver01"
    )  # from here on Open ONI's own files stay as they are, too
    site.prepend_to_manage(
        "import sys\nif 'shell' not in sys.argv: sys.exit(1)"
    )  # no job does what it could
    site.wait_for("Open ONI in .* word coordinates")
    files = tree(
        site.oni.parent, "state", "oni/oni.sqlite3"
    )  # load-title and ensure-awardee may write that
    jobs = []
    awardees = {"oru"}
    client = Client(site.port)

    @settings(max_examples=1000, **RELENTLESS)
    @given(LINES, PAYLOADS)
    def every_request_is_answered(line: bytes, payload: bytes) -> None:
        channel = client.channel(line)
        with contextlib.suppress(OSError):  # answered already
            channel.sendall(payload)
        channel.shutdown_write()
        said = channel.makefile("rb").read()
        assert channel.recv_exit_status() == 0
        assert said.count(b"\n") == 1
        assert channel.recv_stderr(1) == b""
        reply = json.loads(said)
        assert reply["status"] in ("success", "error")
        assert reply["session"]["id"] > 0
        assert "fault of the agent" not in reply.get("message", "")
        if reply.get("message") == "Job added to queue":
            jobs.append(reply["job"]["id"])
        if reply.get("message") == "Awardee created":
            awardees.add(oni_agent.split_words(line)[1])
        channel.close()

    with client:
        every_request_is_answered()
        assert [job["id"] for job in client.ask("list-jobs")["jobs"]] == jobs
    assert {code for code, in site.query("SELECT org_code FROM core_awardee")} == awardees
    assert tree(site.oni.parent, "state", "oni/oni.sqlite3") == files


def test_whatever_bytes_come_the_agent_lives_and_keeps_nothing_of_them(agent):
    recorded = recorded_bytes(agent.port)
    before = resources(agent)
    lengths = strategies.integers(0, len(recorded))

    @settings(max_examples=300, **RELENTLESS)
    @given(lengths, strategies.binary(max_size=200), lengths)
    def connect_and_say(cut: int, noise: bytes, resume: int) -> None:
        with contextlib.suppress(ConnectionError), silent(agent.port) as connection:
            connection.sendall(recorded[:cut] + noise + recorded[resume:])

    connect_and_say()
    assert has_no_more_than(agent, before)
    assert agent.call("list-jobs")["jobs"] == []


# --- Promises: settings, check, start and stop ----------------------------------------------------

def test_check_says_that_all_is_well_and_changes_nothing(site, tmp_path):
    site.batch("batch_oru_alpha_ver01")
    before = tree(tmp_path)
    good, bad = check(site)
    assert bad == []
    assert len(good) >= 7
    assert "object at 0x" not in "".join(good)
    names = {"settings", "state folder", "host key", "address", "batch source", "database", "Solr"}
    assert names < {line.partition(": ")[0] for line in good}
    assert all(re.fullmatch("settings|[^:]+: .+", line) for line in good)  # each with a finding
    assert tree(tmp_path) == before
    assert site.manage_pids() == []


def test_check_leaves_a_state_folder_as_it_is_and_unlocked(site, tmp_path):
    site.batch("batch_oru_alpha_ver01")
    site.start().run("load-batch", "batch_oru_alpha_ver01")
    site.stop()
    before = tree(tmp_path)
    assert check(site)[1] == []
    after = tree(tmp_path)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"state/jobs.db"}  # which may have taken in its WAL
    assert set(after) == set(before)
    assert site.start().call("job-status", "1")["job"]["status"] == "successful"


@contextlib.contextmanager
def fault_port(site):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        site.environment["BA_BIND"] = f"127.0.0.1:{taken.getsockname()[1]}"
        yield


@contextlib.contextmanager
def fault_second_agent(site):
    site.start()
    yield


@contextlib.contextmanager
def fault_storage(site):
    """A folder in which not even root can make a file."""
    (site.oni / "data/batches").rmdir()
    (site.oni / "data/batches").symlink_to("/proc/sys")
    yield


def setting(name: str, value: str):
    """A fault that is one variable; {} stands for the site's folder."""

    @contextlib.contextmanager
    def fault(site):
        site.environment[name] = value.format(site.oni.parent)
        yield

    return fault


CHECK_FAULTS = {
    "no manage.py": (
        setting("ONI_LOCATION", "{}/batches"),
        ["ONI_LOCATION is .* holds no manage.py"],
    ),
    "no batch source": (setting("BATCH_SOURCE", "{}/nowhere"), ["BATCH_SOURCE is .*not a folder"]),
    "port in use": (fault_port, ["address: .*in use"]),
    "agent at work": (fault_second_agent, ["state folder: another ONI Agent is at work"]),
    "foreign host key": (
        file("state/host_key", "my only thesis"),
        ["HOST_KEY_FILE is .*holds no ed25519"],
    ),
    "host key cannot be made": (setting("HOST_KEY_FILE", "/proc/host_key"), ["[Kk]ey.*/proc"]),
    "damaged jobs.db": (
        file("state/jobs.db", "not SQLite" * 1000),
        ["state folder: .*jobs.db.*not a database"],
    ),
    "manage.py cannot run": (
        file("oni/manage.py", "#!/nowhere/python3\n"),
        ["manage.py check: couldn't run", "database: couldn't run"],
    ),
    "broken settings": (
        file("oni/onisite/settings_local.py", "import nowhere"),
        ["manage.py check: .*No module named 'nowhere'", "database: .*No module named 'nowhere'"],
    ),
    "database down": (Site.database_down, ["database: .*OperationalError"]),
    "log/ not writable": (file("oni/log", "a file"), ["ONI's log/: .*[Nn]ot a directory"]),
    "storage not writable": (fault_storage, ["ONI's batch storage: "]),
    "storage missing": (
        setting("ONI_STORAGE_PATH", "/nowhere"),
        ["ONI's batch storage: .*No such file"],
    ),
    "log level": (setting("LOG_LEVEL", "loud"), ["LOG_LEVEL is 'loud'"]),
    "allow from": (setting("ALLOW_FROM", "10.0.0.0/8, everyone"), ["ALLOW_FROM is .*'everyone'"]),
    "address to bind": (setting("BA_BIND", "2222"), ["BA_BIND is '2222'"]),
    "authorized keys": (setting("AUTHORIZED_KEYS", "{}/nowhere"), ["AUTHORIZED_KEYS is .*read"]),
    "on finish": (setting("ON_FINISH", "{}/oni/onisite/settings.py"), ["ON_FINISH is .*executed"]),
    "state folder": (setting("STATE_DIRECTORY", "/proc/oni-agent"), ["state folder: .*/proc"]),
}


@pytest.mark.parametrize("fault", CHECK_FAULTS)
def test_check_finds_each_fault_and_nothing_else(site, fault):
    prepare, expected = CHECK_FAULTS[fault]
    with prepare(site):
        bad = check(site)[1]
    assert len(bad) == len(expected) and all(map(re.search, expected, bad)), bad


def test_check_finds_all_that_is_wrong_at_once(site):
    site.environment.update(LOG_LEVEL="loud", BATCH_SOURCE="/nowhere", BA_BIND="x")
    bad = "\n".join(check(site)[1])
    assert all(name in bad for name in ("LOG_LEVEL", "BATCH_SOURCE", "BA_BIND"))


@in_process
def test_the_file_compiles_on_python_3_6():
    ast.parse(AGENT.read_text(), feature_version=(3, 6))


AS_OLD = "import runpy, sys; sys.version_info = (3, 7, 9); runpy.run_path(sys.argv[1])"

OLD_PYTHONS = [[sys.executable, "-c", AS_OLD]] + [  # this one, which says that it is old
    [python]
    for python in (
        *map(str, sorted(Path("/root/.pyenv/versions").glob("3.[67].*/bin/python3"))),
        *filter(None, map(shutil.which, ("python3.6", "python3.7"))),
    )
    if not subprocess.run([python, "--version"], stdout=subprocess.DEVNULL, stderr=-1).returncode
]


@pytest.mark.parametrize("python", OLD_PYTHONS)
def test_an_older_python_is_told_which_is_needed(python):
    done = subprocess.run([*python, str(AGENT)], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(
        r"oni_agent: Python 3\.8 or newer is needed, and \S+ is Python 3\.[67]; .*\.\n",
        done.stderr,
    )


@in_process
@pytest.mark.parametrize(
    "name, meant",
    [
        ("ALLOW_FORM", "ALLOW_FROM"),
        ("ALLOW_FROM_", "ALLOW_FROM"),
        ("ALLOWED_FROM", "ALLOW_FROM"),
        ("allow_from", "ALLOW_FROM"),
        ("export BA_BIND", "BA_BIND"),
        ("BA_PORT", "BA_BIND"),
        ("BATCH_SOURCES", "BATCH_SOURCE"),
        ("HOST_KEY", "HOST_KEY_FILE"),
        ("HOSTKEY_FILE", "HOST_KEY_FILE"),
        ("ON_FINISHED", "ON_FINISH"),
        ("AUTHORISED_KEYS", "AUTHORIZED_KEYS"),
        ("AUTHORIZED_KEYS_FILE", "AUTHORIZED_KEYS"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("STATE_DIRECTROY", "STATE_DIRECTORY"),
        ("DB_CONECTION", "DB_CONNECTION"),
    ],
)
def test_of_a_misspelt_setting_it_is_said_what_was_meant(name, meant):
    [said] = oni_agent.misspelt([name, "PATH"])
    assert said.startswith(f"{name!r} is not a setting (did you mean {meant}?)")


def test_a_misspelt_setting_is_refused(site):
    site.environment["ALLOW_FORM"] = ""
    said = failed_start(site, oni_agent.EXIT_HOPELESS)
    assert said == "oni_agent: 'ALLOW_FORM' is not a setting (did you mean ALLOW_FROM?).\n"
    [bad] = check(site)[1]
    assert "did you mean ALLOW_FROM?" in bad


@in_process
def test_variables_that_are_not_the_agents_are_left_alone():
    others = """HOST HOSTNAME HOSTTYPE LOGNAME BATCH ONLINE ONI_DB_HOST ONI_LOG_LEVEL LANG LC_ALL
        CACHE_DIRECTORY LOGS_DIRECTORY RUNTIME_DIRECTORY CONFIGURATION_DIRECTORY
        CREDENTIALS_DIRECTORY JOURNAL_STREAM INVOCATION_ID SYSTEMD_EXEC_PID DB_HOST TERM PATH
        HOST_UID HOST_IP BATCH_SERVICE_HOST BATCH_SIZE"""
    assert list(oni_agent.misspelt([*others.split(), *oni_agent.OWN_VARIABLES])) == []


SITE_USER = pwd.getpwnam("www-data")


def reachable(*paths: Path, then: str = "") -> list[str]:
    """The words before a command that let any user reach these paths, whatever lies above them.

    In a mount namespace of its own each folder that is closed to others gives way to one that holds
    nothing but those paths. `then` are commands for a shell there.
    """
    lines = ["set -e", "keep=$(mktemp -d)"]
    closed: dict[Path, list[Path]] = {}
    for path in paths:
        for above in reversed(path.parents):
            if not above.stat().st_mode & stat.S_IXOTH:
                closed.setdefault(above, []).append(path)
                break
    for number, (above, inside) in enumerate(closed.items()):
        lines += [
            f"mkdir $keep/{number}",
            f"mount --rbind {shlex.quote(str(above))} $keep/{number}",
            f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(above))}",
        ]
        for path in inside:
            there, kept = shlex.quote(str(path)), shlex.quote(str(path.relative_to(above)))
            lines += [f"mkdir -p {there}", f"mount --rbind $keep/{number}/{kept} {there}"]
    return ["unshare", "-m", "sh", "-c", "\n".join([*lines, then, 'exec "$@"']), "sh"]


def give(path: Path, uid: int) -> None:
    """Makes a folder, with all in it, somebody's."""
    for folder, folders, files in os.walk(path):
        for name in (".", *folders, *files):
            os.chown(os.path.join(folder, name), uid, uid, follow_symlinks=False)


@pytest.fixture
def owned(site) -> Site:
    """A site that is a user's own but for its programs, as a real one is; the agent is root's."""
    site.prefix = reachable(*needed(site))
    site.oni.parent.chmod(0o755)
    site.environment.update(HOME="/root", USER="root")
    for folder in (site.oni / "data", site.oni / "log", site.oni / "cache", site.source):
        give(folder, SITE_USER.pw_uid)
    os.chown(site.oni, -1, SITE_USER.pw_gid)
    site.oni.chmod(0o775)  # where SQLite has its journal
    os.chown(site.oni / "oni.sqlite3", SITE_USER.pw_uid, SITE_USER.pw_gid)
    return site


def owners(*folders: Path) -> set[int]:
    """Who owns what is in these folders."""
    return {path.lstat().st_uid for folder in folders for path in (folder, *folder.rglob("*"))}


def test_started_as_root_the_agent_becomes_the_user_that_the_site_runs_as(owned):
    key = key_made_by_ssh_keygen(owned.oni.parent / "key")  # 0600, and root's
    seen = owned.oni / "log/seen"
    settings_local(
        owned,
        "import json, os\n"
        f"with open({str(seen)!r}, 'w') as seen:\n"
        "    json.dump([os.getresuid(), os.getresgid(), os.getgroups(), os.environ['HOME'],"
        " os.environ['USER']], seen)\n",
    )
    owned.start(HOST_KEY_FILE=str(key))
    owned.wait_for("started as root; goes on as www-data")
    batch = owned.batch(ALPHA)
    assert owned.run("load-batch", ALPHA)["status"] == "successful"
    assert owned.held(batch.name) == (1, 2, 4)
    places = [owned.state, *(owned.oni / name for name in ("log", "data", "cache"))]
    assert owners(*places) == {SITE_USER.pw_uid}
    assert len(list((owned.oni / "cache").iterdir())) == 1
    uid, gid = SITE_USER.pw_uid, SITE_USER.pw_gid
    assert json.loads(seen.read_text()) == [
        [uid] * 3,
        [gid] * 3,
        os.getgrouplist("www-data", gid),
        SITE_USER.pw_dir,
        "www-data",
    ]
    # A root's state folder of an earlier agent is handed over, with its jobs.
    owned.stop()
    give(owned.state, 0)
    assert owned.start().call("job-status", "1")["job"]["status"] == "successful"
    assert owners(owned.state) == {uid}
    assert key.stat().st_uid == 0


def test_the_sites_user_is_whom_the_cache_belongs_to_where_there_are_no_coordinates(owned):
    (owned.oni / "data/word_coordinates").rmdir()
    for folder in (owned.oni / "data", owned.oni / "log"):
        give(folder, 0)
        folder.chmod(0o777)
    owned.start().wait_for("started as root; goes on as www-data")


def looks(site: Site) -> tuple[str, list[str]]:
    """The message of `check`, and what was found that is not well."""
    reply = json.loads(ssh_run(site, "check").stdout)
    return reply["message"], [look["found"] for look in reply["looks"] if not look["well"]]


def test_the_agent_stays_root_where_the_site_is_roots(site):
    assert "started as root" not in "".join(site.start().log)
    said = {look["name"]: look["found"] for look in site.call("check")["looks"]}
    assert said["user and sandbox"].startswith(f"{oni_agent.user_name(os.geteuid())} ")


def test_a_folder_of_roots_that_holds_other_things_is_not_handed_over(owned):
    owned.state.mkdir()
    (owned.state / "thesis").write_text("")
    done = subprocess.run(
        [*owned.prefix, sys.executable, str(AGENT)],
        env=owned.environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.stderr.splitlines()[-1] == (
        f"oni_agent: STATE_DIRECTORY is {owned.state}, which holds other things than an agent's:"
        " name a folder of the agent's own."
    )
    assert done.returncode == oni_agent.EXIT_HOPELESS
    assert owners(owned.state) == {0}


def test_check_looks_as_the_sites_user(owned):
    keys = owned.oni.parent / "keys"
    keys.touch()
    owned.environment["AUTHORIZED_KEYS"] = str(keys)
    done = subprocess.run(
        [*owned.prefix, sys.executable, str(AGENT), "--check"],
        env={**owned.environment, "PYTHONUTF8": "1"},
        stdout=subprocess.PIPE,
        encoding="utf-8",
        timeout=90,
    )
    assert done.returncode == 0, done.stdout
    assert "\n✓ user and sandbox: www-data " in done.stdout


NOBODYS = 54321  # a user without an entry in passwd


def as_user(site: Site, uid: int) -> list[str]:
    """The words before a command that is to run as a user, in no group but its own."""
    groups = "--clear-groups" if uid == NOBODYS else "--init-groups"
    return [*site.prefix, "setpriv", f"--reuid={uid}", f"--regid={uid}", groups]


@pytest.mark.parametrize("home", ["", "/", "/nonexistent"])
def test_a_user_without_a_home_is_told_to_name_a_state_folder(owned, home):
    del owned.environment["STATE_DIRECTORY"]
    owned.environment["HOME"] = home
    if not home:
        del owned.environment["HOME"]
    prefix = as_user(owned, NOBODYS)
    done = subprocess.run(
        [*prefix, sys.executable, str(AGENT)],
        env=owned.environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert re.search(
        rf"STATE_DIRECTORY is .*; {NOBODYS} (has no home|cannot write to /): set STATE_DIRECTORY to"
        rf" a folder .* install -d -m 700 -o {NOBODYS} /var/lib/oni-agent\.\n$",
        done.stderr,
    )


def test_a_user_without_a_passwd_entry_loads_where_the_site_is_its_own(owned):
    owned.state.mkdir()
    for folder in (owned.state, owned.source, *map(owned.oni.joinpath, ("data", "log", "cache"))):
        give(folder, NOBODYS)
    os.chown(owned.oni / "oni.sqlite3", NOBODYS, NOBODYS)
    os.chown(owned.oni, NOBODYS, -1)
    del owned.environment["HOME"]
    owned.prefix = as_user(owned, NOBODYS)
    owned.batch(ALPHA)
    assert owned.start().run("load-batch", ALPHA)["status"] == "successful"
    assert owned.ssh("check")["message"] == "All is well"


def ended_at_once(site: Site, uid: int) -> tuple[int, str]:
    """The exit status of a user's agent that cannot start, and its last sentence."""
    done = subprocess.run(
        [*as_user(site, uid), sys.executable, str(AGENT)],
        env=site.environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("what", ["port", "key", "folder"])
def test_what_can_never_work_is_not_tried_again(owned, what):
    key = key_made_by_ssh_keygen(owned.oni.parent / "key")
    owned.state.mkdir()
    give(owned.state, SITE_USER.pw_uid)
    chown = f"root can make it the agent's: chown {SITE_USER.pw_name} {key}"
    broken = {
        "port": ("BA_BIND", "127.0.0.1:22", "Permission denied"),
        "key": ("HOST_KEY_FILE", str(key), f"permission denied; {chown}"),
        "folder": ("STATE_DIRECTORY", "/sys/oni-agent", "www-data cannot write to /sys"),
    }
    name, owned.environment[name], said = broken[what]
    status, sentence = ended_at_once(owned, SITE_USER.pw_uid)
    assert (status, said in sentence) == (2, True), sentence


def test_a_full_disk_is_tried_again(disk, witnessed):
    witnessed.state.chmod(0o700)
    disk.fill()
    status, _, said = run_agent(**witnessed.environment)
    assert (status, str(witnessed.state) in said) == (1, True), said


def test_as_pid_1_the_agent_buries_orphans_and_ends_as_it_is_told(site):
    site.prefix = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    gate = site.hold_load(site.batch(ALPHA))
    site.start()
    id = site.job("load-batch", ALPHA)
    gate.reached()
    [init] = Path(f"/proc/{site.agent.pid}/task/{site.agent.pid}/children").read_text().split()
    os.kill(int(init), signal.SIGTERM)
    assert site.agent.wait(30) == 0
    site.wait_for(rf"job={id} its manage.py goes on, .*in a container, .*begins the job anew")
    gate.open()
    site.prefix = []
    assert site.start().ended(id)["status"] == "successful"


def test_a_read_only_root_is_enough(owned):
    owned.state.mkdir()
    writable = [owned.state, owned.source, *map(owned.oni.joinpath, ("data", "log", "cache"))]
    binds = "".join(f"mount --bind {each} {each}\n" for each in (owned.oni, *writable))
    closed = "for each in $(findmnt -rno TARGET | sort -u); do mount -o remount,ro,bind $each; done"
    opened = "".join(f"mount -o remount,rw,bind {each}\n" for each in (owned.oni, *writable))
    owned.prefix = reachable(*needed(owned), then=f"{binds}{{ {closed}; }} 2>&- ||:\n{opened}")
    owned.batch(ALPHA)
    assert owned.start().run("load-batch", ALPHA)["status"] == "successful"
    probe = subprocess.run([*owned.prefix, "touch", "/usr/probe"], stderr=subprocess.PIPE)
    assert b"Read-only file system" in probe.stderr


def test_an_agent_that_stops_says_nothing_of_a_manage_py_that_is_not_there(agent):
    agent.stop()
    agent.wait_for(r"stopping on SIGTERM\n$")
    assert "goes on" not in "".join(agent.log)


def test_an_agent_that_stops_says_what_becomes_of_its_load(site):
    gate = site.hold_load(site.batch(ALPHA))
    site.start()
    site.job("load-batch", ALPHA)
    gate.reached()
    site.stop()
    site.wait_for("job=1 its manage.py goes on, and the next agent adopts it; where .*, too")
    gate.open()
    assert site.start().ended(1)["attempts"] == 1


def test_check_from_inside_says_how_all_is(agent):
    agent.run("load-batch", agent.batch(ALPHA).name)
    reply = without_session(agent.ssh("check"))
    assert (reply["status"], reply["message"]) == ("success", "All is well")
    found = {look["name"]: look["found"] for look in reply["looks"]}
    assert {look["well"] for look in reply["looks"]} == {True}
    assert found["Solr"] == f"{len(agent.solr.documents())} pages"
    assert found["database"] == "1 batches"
    counts = [
        agent.query(f"SELECT count(*) FROM core_{table}")[0][0]
        for table in ("language", "country", "awardee")
    ]
    assert found["look-up tables"] == "{} languages, {} countries, {} awardees".format(*counts)
    assert re.match(rf"1, load-batch {ALPHA}: successful at \d{{4}}-", found["last job"])
    assert found["who may connect"] == "whoever is on this host"
    assert {f"ONI's {name}" for name in ("log/", "batch storage", "word coordinates")} < set(found)


def test_check_from_inside_ends_with_1_where_something_is_not_well(agent):
    with agent.solr.down():
        done = ssh_run(agent, "check")
        said = on_terminal(agent, "check", "")
        assert re.search(r"(?m)^✗ Solr: .*", said)
        assert re.search(r"(?m)^✓ database: 0 batches", said)
        assert "Looks" not in said and "{" not in said
        until(lambda: "Solr is down" in agent.call("board")["oni"].get("problem", ""))
    reply = json.loads(done.stdout)
    assert (done.returncode, reply["status"]) == (1, "success")
    assert reply["message"] == "not well: Solr"


def test_an_empty_look_up_table_is_not_well(agent):
    with contextlib.closing(sqlite3.connect(agent.oni / "oni.sqlite3")) as database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("DELETE FROM core_language")
        database.commit()
    [bad] = looks(agent)[1]
    assert bad.startswith("there are no languages, and loads will fail; load Open ONI's own")


@pytest.mark.parametrize("bind", [":0", "0.0.0.0:0", "[::]:0"])
def test_an_agent_that_is_open_to_everybody_is_not_well(site, bind):
    site.environment["BA_BIND"] = bind
    [bad] = check(site)[1]
    assert bad.startswith("who may connect: whoever reaches port 0 of this host may load and purge")
    assert check(site, ALLOW_FROM="127.0.0.1")[1] == []
    site.start().wait_for("anyone who reaches .* may load and purge: set ALLOW_FROM")
    assert looks(site)[0] == "not well: who may connect"


def test_an_agent_without_settings_names_everything_that_is_missing(tmp_path):
    status, out, said = run_agent(HOME=str(tmp_path), BA_BIND="nowhere", LOG_LEVEL="loud")
    assert (status, out) == (2, "")
    assert [line.split()[:2] for line in said.splitlines()] == [
        ["oni_agent:", name] for name in ("ONI_LOCATION", "BATCH_SOURCE", "BA_BIND", "LOG_LEVEL")
    ]
    assert "is not set; --help says" in said
    status, out, said = run_agent()
    assert (status, out) == (2, "")
    assert [line.split()[1] for line in said.splitlines()] == ["ONI_LOCATION", "BATCH_SOURCE"]


@pytest.mark.parametrize(
    "name, value, said",
    [
        *[
            ("BA_BIND", value, f"BA_BIND is '{value}'; write host:port")
            for value in (
                "2222",
                "127.0.0.1",
                "127.0.0.1:",
                ":port",
                ":65536",
                "::1:2222",
                "[::1]",
                "[]:2222",
                "[::1:2222",
                ":-1",
            )
        ],
        ("BA_BIND", "no-such-host.invalid:2222", "no-such-host.invalid"),
        ("BA_BIND", "[no-such-host.invalid]:2222", "no-such-host.invalid"),
        ("BA_BIND", "192.0.2.1:2222", "192.0.2.1"),
        ("BA_BIND", "no..host:2222", "no..host"),
        ("ONI_LOCATION", "", "ONI_LOCATION is not set"),
        ("ONI_LOCATION", "{0}/nowhere", "that folder holds no manage.py"),
        ("ONI_LOCATION", "{0}/batches", "that folder holds no manage.py"),
        ("ONI_LOCATION", "{0}/oni/manage.py", "that folder holds no manage.py"),
        ("BATCH_SOURCE", "", "BATCH_SOURCE is not set"),
        ("BATCH_SOURCE", "{0}/nowhere", "that is not a folder"),
        ("STATE_DIRECTORY", "{0}/oni/manage.py", "is not a folder"),
        ("STATE_DIRECTORY", "{0}/oni/manage.py/state", "is not a folder"),
        ("STATE_DIRECTORY", "~no-such-user/state", "STATE_DIRECTORY"),
        ("LOG_LEVEL", "loud", "LOG_LEVEL is 'loud'; write debug, info, warning or error"),
        ("HOST_KEY_FILE", "{0}/nowhere/key", "in a folder that does not exist"),
        ("HOST_KEY_FILE", "{0}/oni", "is a directory"),
        ("HOST_KEY_FILE", "{0}/oni/manage.py", "holds no ed25519, ECDSA or RSA key"),
        ("HOST_KEY_FILE", "/dev/null", "is not a regular file"),
        ("HOST_KEY_FILE", "~no-such-user/key", "HOST_KEY_FILE"),
        ("HOST_KEY_FILE", "{0}/" + "x" * 300, "HOST_KEY_FILE"),
    ],
)
def test_each_setting_that_cannot_be_is_told_in_a_sentence(site, name, value, said):
    site.environment[name] = value.format(site.oni.parent)
    status, out, problems = run_agent(**site.environment)
    assert out == ""
    assert said in problems
    assert status in (1, 2)
    assert [line[:11] for line in problems.splitlines()] == ["oni_agent: "]
    assert "Errno" not in problems


def test_the_limits_of_tests_are_refused_where_no_test_is(site):
    site.environment.update({"BA_BIND": "127.0.0.1:2222", oni_agent.LIMITS_OF_TESTS: "{}"})
    assert "ONI_AGENT_LIMITS is for tests alone" in failed_start(site, oni_agent.EXIT_HOPELESS)


@pytest.mark.parametrize("content", ["", "no key at all\n", "encrypted", "public"])
def test_a_host_key_file_that_cannot_be_used_is_never_overwritten(site, content):
    key = site.oni.parent / "key"
    if content == "encrypted":
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True
        )
    elif content == "public":
        key_made_by_ssh_keygen(key).with_name("key.pub").replace(key)
    else:
        key.write_text(content)
    before = key.read_bytes()
    status, _, said = run_agent(**site.environment, HOST_KEY_FILE=str(key))
    assert status == 2
    assert "HOST_KEY_FILE" in said
    assert "it was left as it is" in said
    assert key.read_bytes() == before


@pytest.mark.parametrize(
    "kind", [("rsa",), ("rsa", "-b", "2048"), ("ecdsa",), ("ecdsa", "-b", "521"), ("ed25519",)]
)
def test_an_existing_host_key_is_used_as_it_is(site, kind):
    key = key_made_by_ssh_keygen(site.oni.parent / "key", "-t", *kind)
    before = key.read_bytes()
    site.start(HOST_KEY_FILE=str(key))
    with Client(site.port) as client:
        shown = client.transport.get_remote_server_key()
    kind, blob, *_ = key.with_name("key.pub").read_text().split()
    assert (shown.get_name(), shown.get_base64()) == (kind, blob)
    assert site.ssh("version")["status"] == "success"
    assert key.read_bytes() == before
    assert not (site.state / "host_key").exists()


def test_the_state_folder_is_private_and_the_host_key_made_once(site):
    site.environment["STATE_DIRECTORY"] = str(site.state / "below")
    keys = []
    for _ in range(2):
        site.start()
        with Client(site.port) as client:
            keys.append(client.transport.get_remote_server_key().get_base64())
        site.stop()
    key = site.state / "below/host_key"
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.with_name("host_key.pub").read_text().split()[:2] == ["ssh-ed25519", keys[0]]
    assert keys[0] == keys[1]
    subprocess.run(["ssh-keygen", "-y", "-f", str(key)], check=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    "variables, folder",
    [
        ({"XDG_STATE_HOME": "{0}/xdg"}, "xdg/oni-agent"),
        ({"STATE_DIRECTORY": "{0}/one:{0}/two"}, "one"),
    ],
)
def test_the_state_folder_is_where_systemd_or_the_user_keeps_state(site, variables, folder):
    del site.environment["STATE_DIRECTORY"]
    site.start(**{name: value.format(site.oni.parent) for name, value in variables.items()})
    made = site.oni.parent / folder
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (made / "jobs.db").exists()


LOCAL = ["127.0.0.1", *(["::1"] if socket.has_dualstack_ipv6() else [])]


@pytest.mark.parametrize(
    "bind, hosts",
    [
        ("127.0.0.1:0", ["127.0.0.1"]),
        ("0.0.0.0:0", ["127.0.0.1"]),
        (":0", LOCAL),
        *([("[::1]:0", ["::1"]), ("[::]:0", LOCAL)] if "::1" in LOCAL else []),
    ],
)
def test_the_agent_listens_where_it_is_told_to_and_nowhere_else(site, bind, hosts):
    site.start(BA_BIND=bind)
    for host in hosts:
        with Client(site.port, host=host) as client:
            assert client.ask("version")["status"] == "success"
    for host in set(LOCAL) - set(hosts):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, site.port))


def test_a_port_in_use_is_told_in_a_sentence(site):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        status, _, said = run_agent(**{**site.environment, "BA_BIND": address})
    assert status == 1
    assert re.fullmatch(rf"oni_agent: .*{address}.*in use.*\.\n", said)


def test_without_paramiko_the_agent_says_what_to_install():
    status, out, said = run_agent(python="-S")
    assert (status, out) == (2, "")
    assert "python3-paramiko" in said
    assert "pip install paramiko" in said


def test_help_and_version_need_no_settings():
    status, out, said = run_agent("--help")
    assert (status, said) == (0, "")
    assert all(name in out for name in oni_agent.OWN_VARIABLES)
    assert run_agent("--version") == (0, f"ONI Agent {oni_agent.VERSION}\n", "")


def refused_soon(port: int) -> bool:
    """Whether nobody listens any more within a minute."""

    def is_refused() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0

    return until(is_refused)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopping_agent_takes_no_more_and_finishes_the_answers_under_way(site, how):
    hurry(site, STOP_SECONDS=60)
    with Client(site.port) as client:
        channel = client.channel("load-title")
        channel.sendall(marc_xml()[:50])
        site.agent.send_signal(how)
        site.wait_for(f"stopping on {how.name}")
        assert refused_soon(site.port)
        channel.sendall(marc_xml()[50:])
        channel.shutdown_write()
        assert json.loads(channel.makefile("rb").read())["job"] == {"id": 1}
        assert channel.recv_exit_status() == 0
    assert site.agent.wait(30) == 0
    assert site.start().ended(1)["status"] == "successful"


def test_an_idle_agent_stops_with_exit_status_0_though_clients_are_connected(agent):
    with Client(agent.port) as client, socket.create_connection(
        ("127.0.0.1", agent.port)
    ) as silent:
        assert client.ask("version")["status"] == "success"
        assert agent.stop() == 0
        while silent.recv(1000):
            pass
        client.transport.join(30)
        assert not client.transport.is_active()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_the_agent_at_once(site, second):
    hurry(site, STOP_SECONDS=600)
    with Client(site.port) as client:
        client.channel("load-title")
        site.agent.send_signal(signal.SIGTERM)
        site.wait_for("stopping on SIGTERM")
        assert site.stop(second) == -second  # systemd takes such an end for a clean one


# --- Promises: systemd ----------------------------------------------------------------------------

def test_systemd_is_told_what_the_agent_does(site, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(60)
        gate = site.hold_load(site.batch("batch_oru_alpha_ver01"))
        for name in ("beta", "gamma"):
            site.batch(f"batch_oru_{name}_ver01")

        def told(pattern: str) -> None:
            while not re.search(pattern, notified.recv(4096).decode(), re.MULTILINE):
                pass

        site.start(NOTIFY_SOCKET=str(tmp_path / "notify"))
        told("^READY=1$")
        with Client(site.port):  # ready means listening
            site.job("load-batch", "batch_oru_alpha_ver01")
        told(r"^STATUS=.*load-batch batch_oru_alpha_ver01.*job 1.*waiting: 0")
        gate.reached()
        site.job("load-batch", "batch_oru_beta_ver01")
        told(r"^STATUS=.*alpha.*waiting: 1")
        site.job("load-batch", "batch_oru_gamma_ver01")
        told(r"^STATUS=.*alpha.*waiting: 2")
        site.call("job-cancel", "2")
        notice = notified.recv(4096).decode()
        assert "alpha" in notice
        assert "waiting: 1" in notice  # the cancelled one was not the one at work
        gate.open()
        told(r"^STATUS=.*gamma.*waiting: 0")
        told(r"^STATUS=.*nothing.*waiting: 0")
        assert site.stop() == 0
        told("^STOPPING=1$")


UNDER_JOURNAL = """
import os, sys
stderr = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{stderr.st_dev}:{stderr.st_ino}"
os.execv(sys.executable, [sys.executable, AGENT, *sys.argv[1:]])
"""


@pytest.fixture
def under_journal(site, monkeypatch):
    """Agents are begun as systemd begins them whose stderr is the journal."""
    wrapper = site.oni.parent / "under_journal.py"
    wrapper.write_text(f"AGENT = {str(AGENT)!r}\n{UNDER_JOURNAL}")
    monkeypatch.setattr(sys.modules[Site.__module__], "AGENT", wrapper)


def test_log_lines_carry_priorities_under_the_journal(site, under_journal):
    failing_load(site)
    site.start().run("load-batch", "batch_oru_broken_ver01")
    site.wait_for("<6>session=.*load-batch")
    assert all(re.match("<[3-7]>", line) for line in site.log)
    assert site.wait_for("job=1 .*status='failed'").startswith("<4>")


def test_what_keeps_an_agent_from_starting_is_an_error_under_the_journal(site, under_journal):
    status, _, said = run_agent(**{**site.environment, "BATCH_SOURCE": "", "LOG_LEVEL": "loud"})
    assert status == 2
    assert [line[:14] for line in said.splitlines()] == ["<3>oni_agent: "] * 2


def test_a_journal_that_stderr_is_not_gets_no_priorities(site):
    site.start(JOURNAL_STREAM="8:1")  # as that of the service which a shell was started from
    assert site.call("version")["status"] == "success"
    assert all(re.match(r"\d{4}-\d\d-\d\d ", line) for line in site.log)


def test_the_unit_is_sound_and_closed(tmp_path):
    unit = tmp_path / "oni-agent.service"
    text = (AGENT.parent / "oni-agent.service").read_text()
    unit.write_text(re.sub(r"(?m)^ExecStart=.*$", f"ExecStart={sys.executable} {AGENT}", text))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert (verified.stdout, verified.returncode) == (b"", 0)
    secured = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--no-pager",
            "--offline=true",
            "--threshold=15",
            str(unit),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )
    assert (
        secured.returncode == 0
    ), secured.stdout.decode()  # 1.5 of 10; what runs ONI and listens cannot be much lower
    for line in (
        "StartLimitIntervalSec=0",
        "Type=notify",
        "KillMode=process",
        "NoNewPrivileges=yes",
        "StateDirectory=oni-agent",
    ):
        assert f"\n{line}\n" in text
    assert not re.search(r"(?m)^PrivateTmp=(yes|true|on|1)", text)  # ONI's cache is in /var/tmp


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_what_the_units_filter_refuses_keeps_no_load_from_going_well(site):
    refused = "setpriority,sched_setscheduler,sched_setaffinity,ioprio_set"  # of @resources
    # With -D strace is not the agent's parent, so that the agent can be ended.
    options = ["-D", "-f", "-qq", "-e", f"trace={refused}", "-e", f"inject={refused}:error=EPERM"]
    site.prefix = ["strace", *options, "-o", str(site.state.parent / "refused")]
    site.start()
    job = site.run("load-batch", site.batch("batch_oru_alpha_ver01").name)
    assert job["status"] == "successful", job
    assert "(INJECTED)" in (site.state.parent / "refused").read_text()


# --- Promises: load and limits --------------------------------------------------------------------

TWENTY_MEGABYTES = """\
import sys
if "load_batch" in sys.argv and "_verbose_" in sys.argv[-1]:
    sys.stdout.write("".join("%06d %s\\n" % (n, "\\u20ac" * 30) for n in range(160_000)))
    sys.stdout.flush()
"""


def make_verbose(site: Site) -> int:
    """The id of a job of the site whose log is 20 MB long."""
    site.prepend_to_manage(TWENTY_MEGABYTES)
    site.batch("batch_oru_verbose_ver01", start=date(1960, 1, 1))
    job = site.run("load-batch", "batch_oru_verbose_ver01")
    assert job["status"] == "successful"
    return job["id"]


@pytest.fixture(scope="module")
def verbose(shared) -> int:
    """Of the shared site."""
    return make_verbose(shared)


def is_whole(answer: bytes) -> bool:
    """Whether this is the whole answer to `job-logs` of a verbose job."""
    reply = json.loads(answer)
    said = [line[33:] for line in reply["job"]["stdout"]]
    wanted = [f"{number:06} {'€' * 30}" for number in range(160_000)]
    return len(answer) > 20_000_000 and reply["session"]["id"] > 0 and said == wanted


@pytest.mark.parametrize("option", ["Compression=no", "RekeyLimit=1M"])
def test_a_long_answer_is_whole_every_time(shared, verbose, option):
    words = [*shared.ssh_words("-o", option), f"job-logs {verbose}"]
    first = b""
    for _ in range(10):
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60)
        first = first or done.stdout
        assert done.returncode == 0
        assert is_whole(first)
        assert done.stdout.rpartition(b',"session"')[0] == first.rpartition(b',"session"')[0]


def test_a_long_answer_is_whole_for_a_slow_reader(shared, verbose):
    narrow = {"default_window_size": 32768, "default_max_packet_size": 4096}
    with Client(shared.port, **narrow) as client:
        channel = client.channel(f"job-logs {verbose}")
        pieces = list(iter(lambda: channel.recv(random.randrange(1, 5000)), b""))
        assert is_whole(b"".join(pieces))
        assert channel.recv_exit_status() == 0


def test_a_long_answer_under_way_is_whole_when_the_agent_is_stopped(site):
    make_verbose(hurry(site, STOP_SECONDS=60))
    ssh = subprocess.Popen(
        [*site.ssh_words(), "job-logs 1"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    with Client(site.port) as client:
        channel = client.channel("job-logs 1")
        begun = os.read(ssh.stdout.fileno(), 1000)
        site.agent.send_signal(signal.SIGTERM)
        site.wait_for("stopping on SIGTERM")
        assert is_whole(b"".join(iter(lambda: channel.recv(3000), b"")))
        assert channel.recv_exit_status() == 0
        assert is_whole(begun + ssh.communicate(timeout=60)[0])
        assert ssh.returncode == 0
    assert site.agent.wait(30) == 0


OPENS_WIDE = """
import os, paramiko, signal, sys
transport = paramiko.Transport(("127.0.0.1", int(sys.argv[1])), default_window_size=2**31 - 1)
transport.start_client(timeout=30)
transport.auth_none("nobody")
channel = transport.open_session()
channel.exec_command("job-logs 1")
print(channel.recv(1), flush=True)
signal.pause()
"""


@pytest.mark.parametrize(
    "how", ["window stays shut", "ssh is stopped", "window is wide, client is stopped"]
)
def test_a_client_that_does_not_read_is_cut_in_time(site, how):
    make_verbose(hurry(site, STALL_SECONDS=1, IDLE_SECONDS=2))
    before = resources(site)
    with contextlib.ExitStack() as stack:
        if how == "window stays shut":
            client = stack.enter_context(Client(site.port))
            client.channel("job-logs 1")
        else:
            words = (
                [*site.ssh_words(), "job-logs 1"]
                if how == "ssh is stopped"
                else [sys.executable, "-W", "ignore", "-c", OPENS_WIDE, str(site.port)]
            )
            process = stack.enter_context(
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            )
            stack.callback(process.kill)
            assert os.read(process.stdout.fileno(), 1)
            process.send_signal(signal.SIGSTOP)
        site.wait_for("command='job-logs 1' status='client went away'")
        assert has_no_more_than(site, before)
        assert site.call("version")["status"] == "success"


def reset(client: Client) -> None:
    """The client's host goes away: no word of SSH's, no FIN, an RST."""
    client.transport.sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, (1).to_bytes(4, sys.byteorder) + bytes(4)
    )
    client.transport.sock.close()


def hang_up(client: Client) -> None:
    """The client's process ends: no word of SSH's, a FIN."""
    client.transport.sock.shutdown(socket.SHUT_RDWR)


def close_channel(client: Client) -> None:
    """The client closes its channel without the EOF that would end its input."""
    for channel in client.transport._channels.values():
        channel.eof_sent = True
        channel.close()


@pytest.mark.parametrize("vanish", [reset, hang_up, close_channel])
@pytest.mark.parametrize("payload", [marc_xml(), marc_xml()[:100], b""])
def test_a_client_that_vanishes_before_its_input_ends_leaves_no_job(shared, vanish, payload):
    jobs = shared.call("list-jobs")["jobs"]
    with Client(shared.port, user=f"{vanish.__name__}-{len(payload)}") as client:
        client.channel("load-title").sendall(payload)
        vanish(client)
        line = shared.wait_for(rf"user='{vanish.__name__}-{len(payload)}'")
    assert "status='client went away'" in line
    assert shared.call("list-jobs")["jobs"] == jobs


def test_clients_that_vanish_as_they_ask_take_up_no_room(site):
    hurry(site, MAX_CONNECTIONS=10)
    before = resources(site)
    for _ in range(20):
        with Client(site.port) as client:
            channel = client.transport.open_session(timeout=30)
            request = paramiko.Message()
            request.add_byte(bytes([98]))  # SSH_MSG_CHANNEL_REQUEST
            request.add_int(channel.remote_chanid)
            request.add_string("exec")
            request.add_boolean(True)
            request.add_string("version")
            client.transport._send_user_message(request)
            reset(client)
    assert has_no_more_than(site, before)
    with Client(site.port) as client:
        assert client.ask("version")["status"] == "success"
    assert site.stop() == 0


@pytest.mark.parametrize(
    "command", ["load-title", "batch-patch batch_oru_alpha_ver01 batch_oru_alpha_ver02"]
)
def test_input_that_does_not_end_is_answered_when_its_time_is_up(site, command):
    site.batch("batch_oru_alpha_ver01")
    hurry(site, STALL_SECONDS=2)
    with Client(site.port) as client:
        channel = client.channel(command)
        channel.sendall(b"<record>")
        reply = json.loads(channel.makefile("rb").read())
        assert reply["status"] == "error"
        assert "END" in reply["error"]
        assert channel.recv_exit_status() == 0
    assert site.call("list-jobs")["jobs"] == []


def test_clients_that_never_close_are_all_answered_and_all_reaped(site):
    hurry(site, IDLE_SECONDS=3)
    before = resources(site)
    clients = []
    for _ in range(100):
        clients.append(Client(site.port))
        assert clients[-1].ask("version")["status"] == "success"
    for client in clients:
        client.transport.join(60)
        assert not client.transport.is_active()
    assert has_no_more_than(site, before)


def test_clients_that_leave_in_the_handshake_leave_nothing(agent):
    before = resources(agent)
    for _ in range(200):
        with silent(agent.port, b"SSH-2.0-short\r\n") as connection:
            assert connection.recv(1000)
    assert has_no_more_than(agent, before)


def test_clients_that_stop_halfway_are_gone_when_their_time_is_up(site):
    hurry(site, IDLE_SECONDS=3)
    recorded = recorded_bytes(site.port)
    before = resources(site)
    version = recorded.index(b"\n") + 1
    sockets = [
        silent(site.port, recorded[:length])
        for length in (
            0,
            4,
            version,
            version + 2,
            version + 100,
            len(recorded) // 2,
            len(recorded) - 1,
        )
    ]
    clients = [Client(site.port) for _ in range(3)]
    clients[1].transport.open_session(timeout=30)
    clients[2].transport.open_session(timeout=30).get_pty()
    unauthenticated = paramiko.Transport(silent(site.port))
    unauthenticated.start_client(timeout=30)
    for transport in [unauthenticated, *(client.transport for client in clients)]:
        transport.join(60)
        assert not transport.is_active()
    for connection in sockets:
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(10_000):
                pass
    assert has_no_more_than(site, before)
    assert site.call("version")["status"] == "success"


def test_a_slow_loris_keeps_nobody_waiting_and_is_gone_in_time(site):
    hurry(site, IDLE_SECONDS=busy(3))
    before = resources(site)
    clients = [Client(site.port) for _ in range(100)]
    sockets = [silent(site.port, said) for said in [b""] * 300 + [b"SSH-2.0-loris\r\n"] * 100]
    while any(client.transport.is_active() for client in clients):
        assert site.call("version")["status"] == "success"
    assert has_no_more_than(site, before)
    for connection in sockets:
        connection.close()


def test_several_hundred_clients_at_once_are_all_answered(shared):
    clients = [Client(shared.port) for _ in range(250)]
    channels = [client.channel("version") for client in clients]
    assert all(
        json.loads(channel.makefile("rb").read())["status"] == "success" for channel in channels
    )
    for client in clients:
        client.transport.close()


def test_a_full_house_makes_room_for_who_asks_but_not_at_the_cost_of_who_is_at_work(site):
    hurry(site, MAX_CONNECTIONS=10)  # of which one address may have five
    at_work = [Client(site.port) for _ in range(4)]
    channels = [client.channel("load-title") for client in at_work]
    idle = Client(site.port)
    with Client(site.port) as client:
        assert client.ask("version")["status"] == "success"
        until(lambda: not idle.transport.is_active())
        refused = client.channel("load-title")
        with pytest.raises((paramiko.SSHException, EOFError, ConnectionError)):
            Client(site.port)
        refused.close()
    for client, channel in zip(at_work, channels):
        channel.shutdown_write()
        assert json.loads(channel.makefile("rb").read())["message"] == "Invalid data"
        client.transport.close()


def test_more_than_ten_channels_are_refused_and_the_connection_goes_on(shared):
    with Client(shared.port) as client:
        channels = [client.channel("load-title") for _ in range(10)]
        with pytest.raises(paramiko.ChannelException):
            client.channel("version")
        for channel in channels:
            channel.shutdown_write()
            assert json.loads(channel.makefile("rb").read())["message"] == "Invalid data"
            channel.close()
        assert client.ask("version")["status"] == "success"


def test_requests_whose_channels_are_closed_still_count_as_at_work(site):
    site.prepend_to_manage("import sys\nif 'shell' in sys.argv: open('gate').close()")
    gate = site.hold(site.oni / "gate")
    site.batch("batch_oru_alpha_ver01")
    site.start()
    gate.reached()  # by the agent's own look at Open ONI, which goes on for as long
    before = resources_now(site)
    with Client(site.port) as client, contextlib.suppress(paramiko.ChannelException):
        for _ in range(100):
            client.channel("purge-batch batch_oru_alpha_ver01").close()
    assert resources_now(site)[0] <= before[0] + 15
    gate.open()
    assert site.call("version")["status"] == "success"


def is_answered(site: Site) -> bool:
    """Whether a client is let in and answered."""
    with contextlib.suppress(paramiko.SSHException):
        return site.call("version")["status"] == "success"
    return False


def test_channels_that_were_opened_before_do_not_let_in_too_many_commands(site):
    hurry(site, MAX_SESSIONS=6, STALLED_SECONDS=60)  # of which one address may have three
    with Client(site.port) as client:
        channels = [client.transport.open_session(timeout=30) for _ in range(6)]
        for channel in channels[:3]:
            channel.exec_command("load-title")
        with pytest.raises(paramiko.SSHException):
            channels[3].exec_command("version")
        for channel in channels[:3]:
            channel.shutdown_write()
        assert [channel.recv_exit_status() for channel in channels[:3]] == [0, 0, 0]
        until(lambda: is_answered(site))


def test_clients_that_wait_cost_no_thread_and_keep_nobody_out(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    clients = [Client(agent.port) for _ in range(26)]
    threads = resources_now(agent)[0]
    waiting = [client.channel(f"job-wait {id}") for client in clients for _ in range(10)]
    until(lambda: resources_now(agent)[0] <= threads + 2)
    assert agent.call("version")["status"] == "success"
    assert agent.call("job-cancel", str(id))["status"] == "success"
    gate.open()
    assert [channel.recv_exit_status() for channel in waiting] == [1] * 260
    for client in clients:
        client.transport.close()


def send_data(client: Client, channel: paramiko.Channel, kind: int, data: bytes) -> None:
    """Sends data on a channel, of whatever window: kind 0 as standard input, 1 as its errors."""
    message = paramiko.Message()
    message.add_byte(bytes([95 if kind else 94]))  # SSH_MSG_CHANNEL_(EXTENDED_)DATA
    message.add_int(channel.remote_chanid)
    if kind:
        message.add_int(kind)
    message.add_string(data)
    client.transport._send_user_message(message)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("command", ["", "load-title"])
def test_what_is_sent_past_the_window_is_not_kept(agent, kind, command):
    agent.call("version")
    before = memory(agent, "VmHWM")
    with Client(agent.port) as client:
        channel = client.transport.open_session(timeout=30)
        if command:
            channel.exec_command(command)
        with contextlib.suppress(EOFError, OSError):
            while client.transport.is_active():
                send_data(client, channel, kind, bytes(30_000))
    agent.wait_for("refused='it sent more than the window lets it'")
    assert memory(agent, "VmHWM") < before + 10


@in_process
def test_no_address_holds_more_than_half_of_what_the_others_leave():
    share = oni_agent.Share(16)
    one, two, three = map(oni_agent.ipaddress.ip_address, ("127.0.0.1", "127.0.0.2", "::1"))
    assert [share.take(one) for _ in range(9)] == [True] * 8 + [False]
    assert [share.take(two) for _ in range(5)] == [True] * 4 + [False]
    assert [share.take(three) for _ in range(3)] == [True] * 2 + [False]
    for holder in (three, three, two):
        share.give_back(holder)
    assert share.take(two)
    assert not share.take(one)


@in_process
def test_addresses_of_one_ipv6_network_are_one_holder_of_a_share():
    first, second, other = map(
        oni_agent.ipaddress.ip_address, ("2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1")
    )
    assert oni_agent.holder_of(first) == oni_agent.holder_of(second) != oni_agent.holder_of(other)


@in_process
def test_warnings_about_clients_are_bounded_in_number_and_in_memory(caplog):
    warnings = oni_agent.ClientWarnings()
    hosts = [oni_agent.ipaddress.ip_address(number) for number in range(2**24, 2**24 + 3000)]
    for host in hosts:
        warnings.tell(host, "it came")
        warnings.tell(host, "it came again")
    assert len(caplog.records) == 3000
    assert len(warnings._told) == oni_agent.MAX_WARNINGS


@pytest.mark.parametrize("length", [0x40000004, 0xFFFFFFFC])
def test_a_packet_without_end_is_not_collected(agent, length):
    agent.call("version")
    before = memory(agent, "VmHWM")
    with silent(agent.port, b"SSH-2.0-endless\r\n" + length.to_bytes(4, "big")) as connection:
        with pytest.raises(ConnectionError):  # the agent hangs up
            for _ in range(200):
                connection.sendall(bytes(1_000_000))
    assert memory(agent, "VmHWM") < before + 20
    assert agent.call("version")["status"] == "success"


def begin_long_line(client: Client) -> None:
    """Sends half of a packet with a command line of 200,000 bytes."""
    channel = client.transport.open_session(timeout=30)
    message = paramiko.Message()
    message.add_byte(paramiko.common.cMSG_CHANNEL_REQUEST)
    message.add_int(channel.remote_chanid)
    message.add_string("exec")
    message.add_boolean(True)
    message.add_string(b"x" * 200_000)
    packetizer = client.transport.packetizer
    write_all = packetizer.write_all
    packetizer.write_all = lambda data: write_all(data[: len(data) // 2])
    client.transport._send_user_message(message)


def test_few_packets_with_a_very_long_command_line_are_held_at_once(agent):
    clients = [Client(agent.port) for _ in range(oni_agent.MAX_LONG_PACKETS + 2)]
    for client in clients:
        begin_long_line(client)
    left = oni_agent.MAX_LONG_PACKETS
    until(lambda: sum(client.transport.is_active() for client in clients) == left)
    assert agent.call("version")["status"] == "success"
    for client in clients:
        client.transport.close()

    def is_told() -> bool:
        with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
            return "more than" in agent.call("x" * 100_000)["message"]
        return False

    assert until(is_told)


def test_who_has_a_public_key_alone_sends_no_long_packets(site):
    """paramiko asks whether a key is admitted before it looks at the signature."""
    key, forged = paramiko.ECDSAKey.generate(), paramiko.ECDSAKey.generate()
    authorized = site.source.with_name("authorized")
    authorized.write_text(f"{key.get_name()} {key.get_base64()}\n")
    site.start({"IDLE_SECONDS": 3600}, AUTHORIZED_KEYS=str(authorized))
    forged.asbytes = key.asbytes
    with contextlib.closing(paramiko.Transport(("127.0.0.1", site.port))) as transport:
        transport.start_client(timeout=30)
        with pytest.raises(paramiko.AuthenticationException):
            transport.auth_publickey("nobody", forged)
        assert transport.is_active()
        message = paramiko.Message()
        message.add_byte(paramiko.common.cMSG_IGNORE)
        message.add_string(bytes(100_000))
        transport._send_message(message)
        until(lambda: not transport.is_active())
    site.wait_for(f"it has not proved to have {re.escape(oni_agent.fingerprint(key))}")


def test_open_oni_is_asked_with_its_new_settings_soon_however_often_it_is_asked(site):
    hurry(site, ZYGOTE_SECONDS=1)
    site.batch(ALPHA)
    assert site.call("batch-status", ALPHA)["batch"]["state"] == "absent"
    old = set(site.manage_pids("shell"))

    def is_renewed() -> bool:
        assert site.call("batch-status", ALPHA)["status"] == "success"
        return not old.intersection(site.manage_pids("shell"))

    assert until(is_renewed)


def test_settings_that_were_wrong_are_not_believed_for_long(site):
    wrong = settings_local(site, "DATABASES['default']['NAME'] = '/nowhere/oni.sqlite3'\n")
    wrong.write_text(f"from .settings_base import DATABASES\n{wrong.read_text()}")
    hurry(site, DOUBTFUL_SECONDS=1)
    assert "Open ONI cannot answer: Op" in site.call("batch-status", ALPHA)["error"]
    wrong.write_text("")
    assert until(lambda: "there is no such batch" in site.call("batch-status", ALPHA)["error"])


def test_a_job_waits_for_a_thread(troubled):
    site = troubled.site
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA, start=date(1910, 1, 1))
    site.start()
    ids = [site.job("load-batch", name) for name in (ALPHA, BETA)]
    gate.reached()
    with troubled.having("no-threads"):
        gate.open()
        site.wait_for("can't start new thread; trying again every second")
    assert [site.ended(id)["status"] for id in ids] == ["successful"] * 2


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
@pytest.mark.parametrize("fails", ["clone:error=EAGAIN", "recvmsg:error=ENOMEM"])
def test_a_zygote_that_cannot_fork_once_goes_on(agent, fails):
    agent.batch(ALPHA)
    word(agent)
    zygote = agent.zygote()
    for pid in agent.workers():
        os.kill(pid, signal.SIGKILL)
    calls = fails.partition(":")[0]
    words = ["strace", "-qq", "-e", f"trace={calls}", "-e", f"inject={fails}:when=1"]
    tracer = subprocess.Popen([*words, "-p", str(zygote)], stderr=subprocess.DEVNULL)
    try:
        until(lambda: re.search(r"TracerPid:\s+[1-9]", Path(f"/proc/{zygote}/status").read_text()))
        assert word(agent)[0] == "absent"
        assert agent.zygote() == zygote
    finally:
        tracer.terminate()
        tracer.wait()


def test_a_question_that_hangs_holds_up_nobody_else(site):
    gate = held_question(site, 'ORDER BY "core_awardee"."org_code" ASC LIMIT 1')
    site.batch(ALPHA)
    hurry(site, ANSWER_SECONDS=60)
    with Client(site.port) as client:
        channel = client.channel("ensure-awardee dlc Library")
        gate.reached()
        for command in (["batch-status", ALPHA], ["list-batches"], ["purge-batch", ALPHA]):
            assert site.call(*command)["status"] == "success"
        assert site.call("load-title", stdin=marc_xml())["status"] == "success"
        gate.open()
        reply = json.loads(channel.makefile("rb").read())
        assert reply["message"] == "Awardee created", reply


def test_a_question_is_given_up_at_its_deadline_and_its_worker_is_no_more(site, oni):
    gate = held_question(site, 'FROM "core_batch"')
    with pytest.raises(oni_agent.TransientProblem, match="did not answer within"):
        oni.insist("answer_names", within=2)
    until(lambda: site.workers() == [])
    first = site.zygote()
    assert oni.ask("answer_awardee", "oru", "")["new"] is False
    assert site.zygote() == first
    gate.remove()
    assert oni.ask("answer_names") == []


@pytest.mark.parametrize("victim", ["worker", "zygote", "both"])
def test_a_killed_worker_or_zygote_is_replaced(site, oni, victim):
    assert oni.ask("answer_names") == []
    [worker] = site.workers()
    first = site.zygote()
    if victim != "zygote":
        os.kill(worker, signal.SIGKILL)
    if victim != "worker":
        os.kill(first, signal.SIGKILL)
        until(lambda: first not in site.manage_pids())
    assert oni.ask("answer_names") == []
    assert (site.zygote() == first) == (victim == "worker")


def test_a_worker_killed_in_its_question_is_a_problem_that_may_pass(site, oni):
    gate = held_question(site, 'FROM "core_batch"')
    with futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(oni.ask, "answer_names")
        gate.reached()
        [worker] = site.workers()
        (site.oni / "held-query").write_text("no more")
        os.kill(worker, signal.SIGKILL)
        assert asked.result(60) == []  # it was asked once more
    gate.remove()


def test_at_most_eight_questions_are_asked_at_once(site, oni):
    gate = held_question(site, 'FROM "core_batch"')
    with futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(oni.ask, "answer_names", within=60) for _ in range(8)]
        until(lambda: len(site.workers()) == 8)
        with pytest.raises(oni_agent.TransientProblem, match="within 0.5 s: too many ask it"):
            oni.ask("answer_awardee", "oru", "", within=0.5)
        assert len(site.workers()) == 8
        # A job waits for no client.
        assert oni.insist("answer_awardee", "oru", "")["new"] is False
        (site.oni / "held-query").write_text("no more")
        gate.open()
        assert [future.result(60) for future in asked] == [[]] * 8
    until(lambda: len(site.workers()) <= oni_agent.KEPT_WORKERS)


CUT_CONNECTIONS = """
import os, sqlite3, time
from django.db.backends.sqlite3 import base
opened = {}
def is_cut(connection):
    try:
        return opened.get(id(connection), 0) < os.path.getmtime("connections-cut")
    except OSError:
        return False
connect, execute = base.DatabaseWrapper.get_new_connection, base.SQLiteCursorWrapper.execute
def get_new_connection(self, *words):
    connection = connect(self, *words)
    opened[id(connection)] = time.time()
    return connection
def checked_execute(self, *words):
    if is_cut(self.connection):
        raise sqlite3.OperationalError(2006, "Server has gone away")
    return execute(self, *words)
base.DatabaseWrapper.get_new_connection = get_new_connection
base.DatabaseWrapper.is_usable = lambda self: not is_cut(self.connection)
base.SQLiteCursorWrapper.execute = checked_execute
"""


def test_a_question_whose_connection_was_cut_is_asked_again_on_a_new_one(site):
    settings_local(site, CUT_CONNECTIONS)
    site.batch(ALPHA)
    site.start()
    for state in ("absent", "complete"):
        for _ in range(3):
            assert word(site)[0] == state
            (site.oni / "connections-cut").write_text("")
            time.sleep(0.02)  # the clock of files is coarser than Python's
        if state == "absent":
            repaired(site, "load-batch", ALPHA)
    assert listed(site) == word(site)


def test_an_agent_out_of_descriptors_loses_no_job(witnessed):
    site = witnessed.start()
    last_page = site.hold_load(site.batch(ALPHA), issue=1, page=2)
    site.batch(BETA)
    first = site.job("load-batch", ALPHA)
    last_page.reached()
    second = site.job("load-batch", BETA)
    third = site.job("load-title", stdin=marc_xml())
    question = site.hold(site.oni / "hold-question")
    last_page.open()
    question.reached()  # whether all has been loaded
    with without_descriptors(site):
        question.open()
        site.wait_for("trying again every second")
    for id in first, second, third:
        job = site.ended(id)
        assert (job["status"], job.get("error")) == ("successful", None)


def test_an_adopted_load_goes_on_though_its_agent_is_out_of_descriptors(agent):
    gate = agent.hold_load(agent.batch(ALPHA))
    id = agent.job("load-batch", ALPHA)
    gate.reached()
    agent.restart().wait_for("adopted=")
    assert agent.call("version")["status"] == "success"  # its start is over
    with without_descriptors(agent):
        gate.open()
        until(lambda: not agent.manage_pids("load_batch"))
    job = agent.ended(id)
    assert (job["status"], job.get("error")) == ("successful", None)


def test_unread_answers_are_bounded_in_number_and_in_memory(site):
    make_verbose(site.start())
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(site.port)) for _ in range(40)]
        asked = []
        with contextlib.suppress(paramiko.SSHException):
            for number in range(400):
                asked.append(clients[number % 40].channel("job-logs 1"))
        assert len(asked) < 400
        assert memory(site, "VmHWM") < 300
    assert until(lambda: is_answered(site))


def test_a_batch_source_that_hangs_holds_up_nothing_else(troubled):
    site = troubled.site
    gate = site.hold_load(site.batch(ALPHA))
    site.batch(BETA, start=date(1910, 1, 1))
    hurry(site, ANSWER_SECONDS=3)
    loading = site.job("load-batch", ALPHA)
    gate.reached()
    with troubled.having("disk-hangs"):
        asked = [
            ("load-batch", BETA),
            ("purge-batch", BETA),
            ("batch-status", ALPHA),
            ("batch-status", BETA),
            ("list-batches",),
            ("job-status", str(loading)),
        ]
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(site.port)) for _ in range(12)]
            for client in clients:
                for words in asked:  # many, and they do not stay for the answer
                    client.channel(" ".join(words))
        answers = at_once(*[functools.partial(site.call, *words) for words in asked])
        assert all(answer["session"]["id"] for answer in answers)
        assert site.call("version")["status"] == "success"
        title = site.job("load-title", stdin=marc_xml())
        assert site.call("job-status", str(loading))["job"]["status"] == "started"
        assert site.call("board")["oni"]["answers"] is True
    gate.open()
    assert site.ended(loading)["status"] == "successful"
    assert site.ended(title)["status"] == "successful"
    assert site.call("batch-status", ALPHA)["batch"]["state"] == "complete"
    assert site.run("load-batch", BETA)["status"] == "successful"


def test_check_answers_though_a_folder_of_open_oni_hangs(troubled):
    site = troubled.site
    coordinates = site.oni / "data/word_coordinates"
    coordinates.rename(site.source / "coordinates")
    coordinates.symlink_to(site.source / "coordinates")
    hurry(site, ANSWER_SECONDS=3).wait_for("Open ONI in .* word coordinates")
    with troubled.having("disk-hangs"), Client(site.port) as client:
        answer = json.loads(client.channel("check").makefile("rb").read())
    assert answer["message"] == "not well: batch source, ONI's word coordinates"
    [found] = [look["found"] for look in answer["looks"] if "coordinates" in look["name"]]
    assert found == f"the file system of {coordinates} did not answer within 3 s; loads will fail"


def test_a_process_that_site_code_has_left_behind_keeps_nobody_waiting(site):
    """It holds the stdout of the manage.py that answered, which is gone."""
    settings_local(
        site,
        "import subprocess, sys\nif 'shell' in sys.argv:\n"
        "    subprocess.Popen(['cat', 'stays-open'], start_new_session=True)\n",
    )
    gate = site.hold(site.oni / "stays-open")
    site.start().batch(ALPHA)
    gate.reached()
    try:
        assert site.call("batch-status", ALPHA)["batch"]["state"] == "absent"
        kill_warm_child(site)
        assert site.call("batch-status", ALPHA)["batch"]["state"] == "absent"
        assert site.run("load-batch", ALPHA)["status"] == "successful"
    finally:
        gate.open()


def test_answers_from_memory_wait_for_no_lock_on_the_disk(witnessed):
    """Somebody's backup holds it, and requests wait for that."""
    site = witnessed.start()
    site.batch(ALPHA)
    site.batch(BETA)
    id = site.job("load-batch", ALPHA)
    site.ended(id)
    with Client(site.port) as client:
        with store_locked(site):
            waiting = [client.channel(f"load-batch {BETA}") for _ in range(3)]
            for words in ["list-jobs"], ["job-status", str(id)], ["board"], ["job-wait", str(id)]:
                assert site.call(*words)["status"] == "success"
            assert not any(channel.recv_ready() for channel in waiting)
            refused = json.loads(waiting[0].makefile("rb").read())
        assert refused["status"] == "error" and "locked" in refused["error"]
        answers = [json.loads(channel.makefile("rb").read()) for channel in waiting[1:]]
    accepted = {reply["job"]["id"] for reply in answers if reply["status"] == "success"}
    assert {job["id"] for job in site.call("list-jobs")["jobs"]} == {id} | accepted


@in_process
def test_of_very_many_jobs_few_are_in_memory_and_all_are_found(tmp_path, any_kind):
    count = oni_agent.JOBS_IN_MEMORY * 3
    many_jobs(tmp_path, count, status="CASE WHEN n % 7 THEN 'successful' ELSE 'failed' END")
    with contextlib.closing(sqlite3.connect(tmp_path / "state/jobs.db")) as database, database:
        database.execute("UPDATE jobs SET status = 'started', ended = NULL WHERE id = 5")
        database.execute("UPDATE jobs SET status = 'pending', ended = NULL WHERE id = 6")
    queue = queue_on(store_in(tmp_path))
    assert len(queue._jobs) == oni_agent.JOBS_IN_MEMORY + 2
    assert [job.id for job in queue.unfinished()] == [5, 6]
    assert [job.id for job in queue.jobs()] == list(range(1, count + 1))
    assert queue.jobs()[4] is queue.get(5) is queue.at_work()
    failed = [id for id in range(1, count + 1) if id % 7 == 0]
    assert [job.id for job in queue.jobs([oni_agent.FAILED])] == failed
    assert [job.id for job in queue.jobs([oni_agent.FAILED], limit=300)] == failed[-300:]
    assert [job.id for job in queue.jobs(limit=3)] == [count - 2, count - 1, count]
    assert [job.id for job in queue.jobs(limit=0)] == []
    assert [job.id for job in queue.jobs(word="batch_oru_x8_ver01")] == [8]
    assert [job.id for job in queue.jobs(["started", "pending"], limit=1)] == [6]
    assert queue.get(9).words == ["load-batch", "batch_oru_x9_ver01"]
    assert queue.get(count + 1) is None
    new = queue.get(queue.add(["load-batch", "new"])[0])
    assert queue.place(new) == 3
    for id in 5, 6:
        with queue._turn:
            queue._end(queue.get(id), oni_agent.Outcome("failed", "x"))
    queue.add(["load-batch", "newer"])
    assert len(queue._jobs) == oni_agent.JOBS_IN_MEMORY
    assert [job.id for job in queue.jobs()] == list(range(1, count + 3))


def test_a_tmpdir_that_is_cleaned_away_harms_nothing(site, tmp_path):
    folder = tmp_path / "tmp"
    folder.mkdir()
    batch = site.batch(ALPHA)
    site.batch(BETA)
    site.start(TMPDIR=str(folder))
    site.wait_for("Open ONI in ")
    gate = site.hold_load(batch)
    id = site.job("load-batch", ALPHA)
    gate.reached()
    shutil.rmtree(folder)
    kill_warm_child(site)
    assert site.call("job-status", str(id))["job"]["status"] == "started"
    until(lambda: "issues_loaded" in site.call("job-status", str(id))["job"])
    kill_warm_child(site)
    second = site.job("load-batch", BETA)
    kill_warm_child(site)
    site.call("job-cancel", str(id))
    assert site.ended(id)["error"] == "cancelled; ONI holds nothing of the batch"
    gate.open()
    assert site.ended(second)["status"] == "successful"
    assert site.run("load-title", stdin=marc_xml())["status"] == "successful"


def test_a_user_without_passwd_entry_and_home_may_run_the_agent(troubled):
    site = troubled.site
    del site.environment["HOME"]
    site.batch(ALPHA)
    with troubled.having("no-passwd"):
        site.start()
    assert site.run("load-batch", ALPHA)["status"] == "successful"


def test_a_long_question_to_a_manage_py_that_hangs_is_given_up_in_time(site, oni):
    """No single command asks one that fills a socket, so it is asked without SSH."""
    assert list(oni.ask("answer_titles", [GAZETTE], 4)) == [GAZETTE]
    [pid] = site.workers()
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(oni_agent.Problem):
        oni.ask("answer_titles", ["x" * 1_000_000], 4, within=1)
    until(lambda: pid not in site.workers())
    assert list(oni.ask("answer_titles", [GAZETTE], 4)) == [GAZETTE]


def test_a_question_given_up_while_its_manage_py_starts_is_dropped_and_the_next_answered(site, oni):
    """Which of the two is meant no single command can say, so it is asked without SSH."""
    with pytest.raises(oni_agent.TransientProblem, match=r"did not answer within 0\.01 s"):
        oni.ask("answer_awardee", "dlc", "Library of Congress", within=0.01)
    assert oni.ask("answer_holds", ALPHA, within=60) is False
    assert awardees(site, "dlc") == []


# --- Promises: the README, the demo and --site ----------------------------------------------------

def begin_acceptance(site: Site, **environment: str) -> subprocess.Popen:
    """The acceptance test on a stand-in, with a temporary folder that can be looked at."""
    scratch = site.state.parent / "scratch"
    scratch.mkdir()
    return subprocess.Popen(
        [sys.executable, __file__, "--site", str(site.oni)],
        env={**site.environment, "TMPDIR": str(scratch), "PYTHONUTF8": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def all_of_oni(site: Site) -> tuple:
    """Every row of Open ONI's database, the documents of its index, its files less its logs."""
    tables = site.query("SELECT tbl_name FROM sqlite_master WHERE tbl_name GLOB 'core_*'")
    rows = {name: sorted(map(str, site.query(f"SELECT * FROM {name}"))) for name, in tables}
    return rows, site.solr.documents(), set(tree(site.oni, "log/", "cache/", "oni.sqlite3"))


def test_the_acceptance_test_passes_on_the_stand_in_and_leaves_it_as_it_was(site):
    batch = site.batch(ALPHA)
    assert site.manage("load_batch", str(batch)).returncode == 0
    before = all_of_oni(site)
    acceptance = begin_acceptance(site)
    out, err = acceptance.communicate(timeout=busy(170))
    assert (acceptance.returncode, err) == (0, ""), out
    lines = out.splitlines()
    assert len(lines) == len((*STEPS_BEFORE, *STEPS_NEEDED, *STEPS)) + 1
    assert all(line.startswith("✓") for line in lines)
    assert all_of_oni(site) == before
    assert os.listdir(site.state.parent / "scratch") == []


TAKEN = {
    "awardee": "Awardee.objects.create(org_code=CODE, name='Somebody')",
    "title": "title = Title.objects.first(); title.lccn = LCCN; title.save()",
    "batch": "Batch.objects.create(name=f'batch_{CODE}_theirs_ver01')",
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_acceptance_test_does_not_begin_where_its_names_are_taken(site, name):
    names = f"CODE, LCCN = {STAGING_CODE!r}, {STAGING_LCCN!r}"
    code = f"from core.models import *; {names}; {TAKEN[name]}"
    made = site.manage("shell", "-c", code)
    assert made.returncode == 0, made.stderr
    before = all_of_oni(site)
    acceptance = begin_acceptance(site)
    out, _ = acceptance.communicate(timeout=90)
    assert acceptance.returncode == 1
    assert re.search(rf"(?m)^✗ .*\n +it has {name} ", out)
    assert all_of_oni(site) == before


def test_the_acceptance_test_does_not_begin_where_the_agent_could_not_work(site):
    with site.solr.down():
        acceptance = begin_acceptance(site)
        out, _ = acceptance.communicate(timeout=90)
    assert acceptance.returncode == 1
    assert re.match(r"✗ .*\n.*Solr", out)
    assert out.count("\n") == 2


def test_a_step_that_comes_out_otherwise_is_told_and_the_others_are_taken_all_the_same(site):
    before = all_of_oni(site)
    site.prepend_to_manage("import sys\nif 'purge_batch' in sys.argv: sys.exit(3)")
    acceptance = begin_acceptance(site)
    out, err = acceptance.communicate(timeout=busy(170))
    assert (acceptance.returncode, err) == (1, "")
    assert re.search(rf"✗ .* {step_purge.__doc__}\n +purge-batch .*exit status 3", out)
    assert re.search(rf"✓ .* {step_no_op.__doc__}\n", out)
    assert re.search(rf"✓ .* {step_tidy.__doc__}\n", out)
    assert all_of_oni(site)[:2] == before[:2]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_acceptance_test_leaves_nothing(site, how):
    before = all_of_oni(site)
    acceptance = begin_acceptance(site, ONI_PAGE_SECONDS="0.1")
    killed = f"batch_{STAGING_CODE}_killed_ver01"
    until(lambda: site.held(killed)[2] > 2)
    acceptance.send_signal(how)
    out, err = acceptance.communicate(timeout=90)
    assert (acceptance.returncode, err) == (1, "")
    assert re.search(rf"\n✗ interrupted.*\n✓ .* {step_tidy.__doc__}\n$", out)
    assert all_of_oni(site) == before
    assert site.manage_pids() == []
    assert os.listdir(site.state.parent / "scratch") == []


def test_the_acceptance_test_needs_no_more_than_paramiko():
    missing = "pytest", "hypothesis", "lxml", "django", "pysolr"
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import test_oni_agent"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(AGENT.parent), timeout=60)
    assert done.returncode == 0


def test_the_readme_shows_what_the_agent_answers(tmp_path, template):
    site = demo_site(tmp_path, template).start()
    try:

        def plain(text: str) -> str:
            text = re.sub(r"\s+", " ", text.replace(str(tmp_path), "/srv"))
            text = re.sub(r"\d+ (s|min|h|days) ago, [\d: -]+ \w+", "TIME", text)
            return re.sub(r"\b(successful|failed) \d+ s", r"\1 TIME", text)

        exchanges = readme_exchanges()
        assert len(exchanges) >= 3
        for line, printed in exchanges:
            assert (line, plain(shell(site, tmp_path, line))) == (line, plain(printed))
    finally:
        site.clean_up()


@in_process
def test_the_readme_is_short():
    assert len(README.read_text().split()) <= README_WORDS


def test_the_quick_start_goes_well_as_it_is_typed(site, tmp_path):
    folder = tmp_path / "opt"
    typed = readme_block("apt install python3-paramiko").replace("/opt/oni-agent", str(folder))
    typed = typed.replace("/opt/openoni", site.environment.pop("ONI_LOCATION"))
    typed = typed.replace("/mnt/news/batches", site.environment.pop("BATCH_SOURCE"))
    typed = re.sub("(?m)^python3 ", f"{shlex.quote(sys.executable)} ", typed)
    _, *lines, check, start = typed.splitlines()
    assert lines[0].startswith("install ")
    done = subprocess.run(
        ["sh", "-ec", "\n".join([*lines, check])],
        cwd=AGENT.parent,
        env=site.environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout
    assert all(line.startswith("✓ ") for line in done.stdout.splitlines())
    # Ahead of what the test would start itself: it is not come to.
    site.prefix = ["sh", "-ec", "\n".join([*lines[1:], f"exec {start}"])]
    site.start()
    site.batch("batch_oru_small_ver01", issues=2, pages=2)
    assert site.run("load-batch", "batch_oru_small_ver01")["status"] == "successful"
    waiting = readme_block("until ").replace("job-wait 7", "job-wait 1")
    assert json.loads(shell(site, tmp_path, waiting))["job"]["status"] == "successful"


@in_process
def test_the_readmes_settings_are_settings(tmp_path):
    for folder in ("openoni", "batches"):
        (tmp_path / folder).mkdir()
    (tmp_path / "openoni/manage.py").touch()
    text = readme_block("ONI_LOCATION=").replace("/opt/openoni", str(tmp_path / "openoni"))
    text = text.replace("/mnt/news/batches", str(tmp_path / "batches"))
    environment = dict(line.split("=", 1) for line in text.splitlines())
    settings = oni_agent.Settings({**environment, "STATE_DIRECTORY": str(tmp_path / "state")})
    assert settings.ba_bind == ("", 2222)
    assert not settings.admits_everybody


@in_process
def test_the_readmes_container_has_the_settings_of_ncas_and_keeps_its_state():
    text = readme_section("Container")
    named = re.findall("^    ([A-Z_]+):", text, re.MULTILINE)
    assert sorted(named) == [
        "BATCH_SOURCE",
        "BA_BIND",
        "DB_CONNECTION",
        "HOST_KEY_FILE",
        "ONI_LOCATION",
    ]
    assert f":{oni_agent.STATE_OF_ROOTS_AGENT}]" in text
    python, agent = json.loads(re.search("^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert f"python3 -m venv {Path(python).parents[1]} " in text
    assert f"COPY {Path(agent).name} {Path(agent).parent}/" in text


@in_process
def test_the_readme_installs_all_that_demo_and_tests_need():
    declared = re.search(r"# dependencies = \[(.*?)\]", Path(__file__).read_text(), re.DOTALL)[1]
    needed = {re.sub("[^a-z-].*", "", name) for name in re.findall('"(.*?)"', declared)}
    (line,) = re.findall(r"^    (python3 -m venv .*test_oni_agent\.py)$", README.read_text(), re.M)
    assert set(line.split("-q ")[1].split(" && ")[0].split()) == needed
    demo = re.search("pip install (.*)", readme_section("Demo"))[1]
    assert {"paramiko", *DEMO_NEEDS.values()} == set(demo.split())


def test_a_shell_can_read_what_the_readme_has_one_type():
    blocks = re.findall(r"(?:^    .*\n)+", README.read_text(), re.MULTILINE)
    assert len(blocks) >= 10
    for block in map(textwrap.dedent, blocks):
        if not block.startswith(("Host oni", "ONI_LOCATION=")):
            done = subprocess.run(["sh", "-n"], input=block, text=True, timeout=60)
            assert done.returncode == 0, block


@in_process
def test_the_readme_tells_of_every_command():
    text = README.read_text()
    for name in oni_agent.COMMANDS:
        assert f"`{oni_agent.COMMANDS[name].usage}`" in text or f"`{name}`" in text


def test_the_demos_exchange_goes_well_beside_another_demo():
    with socket.create_server(("127.0.0.1", DEMO_PORT)):
        done = subprocess.run(
            [sys.executable, __file__, "--demo", "--once"],
            stdout=subprocess.PIPE,
            text=True,
            timeout=170,
        )
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("✓ all of it as it should be\n")


@in_process
def test_the_demos_instructions_fit_on_a_terminal_of_80_columns():
    folder = "/tmp/oni-demo-12345678"
    shown = DEMO.format(folder=folder, ssh=f"ssh -F {folder}/ssh oni")
    assert max(map(len, shown.splitlines())) <= 80


def test_the_demo_needs_neither_pytest_nor_hypothesis():
    code = "import sys; sys.modules.update(pytest=None, hypothesis=None); import test_oni_agent"
    done = subprocess.run([sys.executable, "-c", code], cwd=str(AGENT.parent), timeout=60)
    assert done.returncode == 0


def test_the_readme_and_help_tell_of_every_setting():
    told = subprocess.run(
        [sys.executable, str(AGENT), "--help"], stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    for name in oni_agent.OWN_VARIABLES:
        assert f"\n  {name} " in told
        assert f"| `{name}` |" in README.read_text()


# --- Promises: the stand-in itself ----------------------------------------------------------------


@pytest.mark.parametrize("name", FAULTS)
def test_the_stand_in_does_with_each_fault_what_open_oni_was_measured_to_do(site, name):
    fault = FAULTS[name]
    batch = site.batch(batch_with(name), issues=3)
    fault.spoil(batch)
    with MarcSite("sn99990077") as marc:
        done = site.manage("load_batch", str(batch), **marc.environment)
    errors = re.findall(r"^\[ERROR\] (.*)", done.stderr, re.MULTILINE)
    assert done.returncode == fault.status, done.stderr
    assert site.held(batch.name) == fault.held
    assert len(site.solr.documents(batch.name)) == fault.indexed
    assert bool(errors) == bool(fault.said)
    assert re.match(fault.said, (errors or [""])[0])
    pages = fault.held[2]
    purged = "purge failed: Batch matching query does not exist."
    if fault.status == 0:
        assert site.events(batch.name) == ["starting load", f"processed {pages} pages"]
    else:
        assert site.events(batch.name) == [
            "starting load",
            ABORT + fault_message(errors),
            "starting purge",
            purged if name == "awardee unknown" else "purged",
        ]
        assert (site.oni / "data/batches" / batch.name).is_symlink() == (name == "awardee unknown")


def fault_message(errors: list[str]) -> str:
    """What came after "unable to load batch: "."""
    return next(line for line in errors if line.startswith(ABORT))[len(ABORT) :]


def test_the_stand_in_purges_rows_index_link_and_coordinates(site):
    batch = site.batch(ALPHA)
    coordinates = site.oni / "data/word_coordinates"
    assert site.manage("load_batch", str(batch)).returncode == 0
    assert len(list(coordinates.rglob("*.gz"))) == 4
    assert len(site.solr.documents(ALPHA)) == 4
    assert site.query("SELECT count(*) FROM core_page WHERE indexed") == [(4,)]
    done = site.manage("purge_batch", ALPHA)
    assert done.returncode == 0
    assert done.stdout == ""
    assert site.held(ALPHA) == (0, 0, 0)
    assert site.solr.documents() == []
    assert list(coordinates.rglob("*.gz")) == []
    assert not (site.oni / "data/batches" / ALPHA).is_symlink()
    assert site.events(ALPHA)[2:] == ["starting purge", "purged"]


@pytest.mark.parametrize("trouble", ["down", "failing"])
def test_the_stand_in_without_its_index_does_what_open_oni_was_measured_to_do(site, trouble):
    batch = site.batch(ALPHA)
    site.manage("load_batch", str(batch))
    with getattr(site.solr, trouble)():
        assert site.manage("purge_batch", ALPHA).returncode == 1
        assert site.held(ALPHA) == (0, 0, 0)
        assert site.manage("load_batch", str(batch)).returncode == 1
    assert site.held(ALPHA) == (0, 0, 0)
    assert site.events(ALPHA)[-1].startswith("purge failed: ")
    assert (site.oni / "data/batches" / ALPHA).is_symlink()
    assert len(site.solr.documents(ALPHA)) == 4  # which lead nowhere
    assert site.manage("purge_batch", ALPHA).returncode == 1


def page_document(batch: str, day: int) -> Dict[str, Any]:
    """A page's document, with what the index requires."""
    address = f"/lccn/sn1/1900-01-{day:02}/ed-1/seq-1/"
    return {"id": address, "type": "page", "batch": batch, "lccn": "sn1", "language": ["English"]}


def test_the_stand_ins_index_answers_what_pysolr_asks(site):
    index = pytest.importorskip("pysolr").Solr(site.solr.url + "/solr/openoni")
    pages = [
        page_document(batch, day)
        for batch, days in (("a", range(1, 4)), ("b", range(4, 30)))
        for day in days
    ]
    ids = [page["id"] for page in pages]
    index.add(pages)
    assert index.search("*:*", rows=0).hits == 0
    index.commit()
    assert index.search("*:*", rows=0).hits == 29
    assert index.search('batch:"a"', rows=0).hits == 3
    assert index.search('+type:page +batch:("a" OR "c")', rows=0).hits == 3
    assert len(index.search("type:page")) == 10
    listed = "{!terms f=id}" + ",".join(ids)
    assert index.search(listed, fq='batch:"b"', rows=0).hits == 26
    assert index.search('batch:"b"', fq=[listed, 'lccn:"sn1"'], rows=0).hits == 26
    assert index.search(f'id:"{ids[0]}"', fl="id").docs == [{"id": ids[0]}]
    faceting = {"facet": "true", "facet.field": "batch"}
    by_count = index.search("type:page", rows=0, **faceting).facets["facet_fields"]
    assert by_count == {"batch": ["b", 26, "a", 3]}
    by_value = index.search('batch:"b"', rows=0, **{**faceting, "facet.limit": -1})
    assert by_value.facets["facet_fields"] == {"batch": ["a", 0, "b", 26]}
    index.delete(id=ids[0])
    index.delete(q='batch:"b"')
    assert site.solr.documents() == ids
    index.commit()
    assert site.solr.documents() == site.solr.documents("a") == ids[1:3]
    site.solr.forget()
    assert site.solr.documents() == []


def test_the_stand_ins_index_shows_all_it_finds_page_by_page(site):
    index = pytest.importorskip("pysolr").Solr(site.solr.url + "/solr/openoni")
    pages = [page_document("a", day) for day in range(1, 26)]
    index.add(pages, commit=True)
    ids = [page["id"] for page in pages]
    by_start = [index.search("*:*", sort="id asc", start=start, rows=10) for start in (0, 10, 20)]
    assert [document["id"] for shown in by_start for document in shown] == ids
    by_mark = index.search("*:*", sort="id asc", rows=10, cursorMark="*", fl="id")
    assert [document["id"] for document in by_mark] == ids


def test_the_stand_ins_index_refuses_what_solr_refuses(site):
    pysolr = pytest.importorskip("pysolr")
    index = pysolr.Solr(site.solr.url + "/solr/openoni")
    page = page_document("a", 1)
    for unfit in {**page, "language": []}, {**page, "sequence": 2**31}, {"id": page["id"]}:
        with pytest.raises(pysolr.SolrError):
            index.add([unfit])
    many = " OR ".join(f'"{number}"' for number in range(1025))
    with pytest.raises(pysolr.SolrError):
        index.add([page], commit=True)
        index.search(f"batch:({many})")


def test_the_stand_in_waits_for_an_index_that_hangs(site):
    batch = site.batch(ALPHA)
    with site.solr.hanging():
        loading = site.manage_begun("load_batch", str(batch))
        until(lambda: site.solr.requests)
        assert loading.poll() is None
    assert loading.wait(60) == 0
    assert len(site.solr.documents(ALPHA)) == 4


def test_the_stand_ins_batch_storage_may_be_text_as_in_release_1_0(site):
    settings_local(site, "PATHS_ARE_TEXT = True\n")
    batch = site.batch(ALPHA, validated=True)
    assert site.start().run("load-batch", ALPHA)["status"] == "successful"
    assert site.held(ALPHA) == (1, 2, 4)
    assert os.readlink(site.oni / "data/batches" / ALPHA) == str(batch)


def odd_volume(batch: Path) -> None:
    mets = mets_of(batch)
    mets.write_text(mets.read_text().replace("<mods:number>1<", f"<mods:number>{'1' * 51}<", 1))


def odd_page_number(batch: Path) -> None:
    """Pretty-printed: the indentation alone makes it too long."""
    number = '<mods:detail type="page number"><mods:number>2</mods:number>'
    change(mets_of(batch), number, number + f"\n{' ' * 50}<mods:caption>Page</mods:caption>")


def odd_note(batch: Path) -> None:
    note = '<mods:note type="noteAboutReproduction">\U0001f4f0</mods:note></mods:mods>'
    mets = mets_of(batch)
    mets.write_text(mets.read_text().replace("</mods:mods>", note, 1))


def odd_sequence(batch: Path) -> None:
    change(mets_of(batch), "<mods:start>2<", f"<mods:start>{2**31}<")


def odd_edition(batch: Path) -> None:
    edition = '<mods:detail type="edition"><mods:number>'
    change(mets_of(batch), f"{edition}1<", f"{edition}-1<")


def odd_language(code: str) -> Callable[[Path], None]:
    """What makes a page's text be in a language."""

    def spoil(batch: Path) -> None:
        change(page_file(batch, "0002.xml"), 'language="eng"', f'language="{code}"')

    return spoil


TWO_LANGUAGES = "get() returned more than one Language -- it returned 2!"
ODD_ABORTS: Dict[str, Tuple[Callable[[Path], None], str]] = {
    "volume too long": (odd_volume, '(1406, "Data too long for column \'volume\' at row 1")'),
    "page number": (odd_page_number, '(1406, "Data too long for column \'number\' at row 1")'),
    "beyond U+FFFF": (
        odd_note,
        "(1366, \"Incorrect string value: '\\\\xF0\\\\x9F\\\\x93\\\\xB0' for column"
        ' `openoni`.`core_issuenote`.`text` at row 1")',
    ),
    "sequence": (odd_sequence, '(1264, "Out of range value for column \'sequence\' at row 1")'),
    "edition below 0": (odd_edition, "Reverse for 'openoni_issue_pages' with keyword arguments"),
    "two languages: sk": (odd_language("sk"), TWO_LANGUAGES),
    "two languages: hr": (odd_language("hr"), TWO_LANGUAGES),
    "two languages: am": (odd_language("am"), TWO_LANGUAGES),
}


@pytest.mark.parametrize("name", ODD_ABORTS)
def test_the_stand_in_refuses_what_mariadb_and_open_onis_tables_refuse(site, name):
    spoil, said = ODD_ABORTS[name]
    batch = site.batch(ALPHA)
    spoil(batch)
    assert site.manage("load_batch", str(batch)).returncode == 1
    assert site.events(ALPHA)[1].startswith(ABORT + said)
    assert site.held(ALPHA) == (0, 0, 0)


def test_the_stand_in_without_languages_loads_nothing(site):
    site.execute("DELETE FROM core_language")
    assert site.manage("load_batch", str(site.batch(ALPHA))).returncode == 1
    assert site.events(ALPHA)[1] == ABORT + "Language matching query does not exist."


def test_the_stand_in_stores_a_title_that_has_no_address_and_cannot_index_it(site):
    record = site.oni / "record.xml"
    record.write_bytes(marc_xml("85-38490"))
    assert site.manage("load_titles", str(record)).returncode == 0
    assert titles(site, "85-38490") == ["The sample herald."]
    assert site.solr.documents() == []


ASK_COLUMNS = """
import json
from django.db import connection
with connection.cursor() as cursor:
    cursor.execute(
        "SELECT column_name, character_maximum_length, character_set_name FROM"
        " information_schema.columns WHERE table_schema = %s AND table_name = 'core_reel'",
        [connection.settings_dict["NAME"]],
    )
    print(json.dumps(cursor.fetchall()))
"""


def test_the_stand_ins_columns_can_be_asked_for(site):
    told = json.loads(site.manage("shell", "-c", ASK_COLUMNS).stdout.splitlines()[-1])
    assert ["number", 50, "utf8mb3"] in told
    assert ["batch_id", 250, "utf8mb3"] in told
    assert ["implicit", None, None] in told


REHEARSE = """
import itertools, os
from django.db import models
from core import batch_loader
numbers = itertools.count(-1, -1)
def look(self, *_, **__):
    if self.pk is None:
        self.pk = next(numbers)
    self._state.adding, self._state.db = False, "default"
class Loader(batch_loader.BatchLoader):
    def process_ocr(self, page, index=True):
        batch_loader.ocr_extractor(self.current_batch.storage_url + page.ocr_filename)
models.Model.save = look
loader = Loader()
loader.load_batch(os.environ["BATCH"])
print(loader.current_batch.pk, loader.pages_processed)
"""


def test_a_load_that_stores_nothing_runs_in_the_stand_in_and_waits_at_no_gate(site):
    batch = site.batch(ALPHA)
    link = site.oni / "data/batches" / ALPHA
    link.symlink_to(batch)
    site.hold_load(batch)
    done = site.manage("shell", "-c", REHEARSE, BATCH=str(batch), ONI_PAGE_SECONDS="1000")
    assert done.stdout.splitlines()[-1] == f"{ALPHA} 4", done.stderr
    assert site.held(ALPHA) == (0, 0, 0)
    assert site.events(ALPHA) == site.solr.documents() == []


def test_the_stand_ins_database_can_be_told_to_refuse_all_writing(site):
    code = """if True:
        from django.db import connection
        from core.models import Awardee
        connection.cursor().execute("PRAGMA query_only = ON")
        Awardee.objects.create(org_code="new", name="A new one")"""
    done = site.manage("shell", "-c", code)
    assert "(1792, 'Cannot execute statement in a READ ONLY transaction')" in done.stderr
    assert awardees(site, "new") == []


# --- The stand-in's own files ---------------------------------------------------------------------
#
# Each function below that is marked with `oni_file(PATH)` is a file of the stand-in's tree: nobody
# calls it, its body is written to PATH, one level of indentation less, when a tree is made. So
# linters and editors see its code, and a traceback of the stand-in shows its lines. The tree is
# cut as Open ONI's own: modules, classes, methods and attributes have its names, the tables its
# columns, and the work its order, since what runs inside Open ONI may replace any of them.

ONI_FILES: Dict[str, Callable[[], None]] = {}
TYPING = "from typing import Any, Dict, List, Optional, Tuple"  # in all files: as in this one


def oni_file(path: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Marks the function whose body is the file at `path` of the stand-in's tree."""

    def keep(function: Callable[[], None]) -> Callable[[], None]:
        ONI_FILES[path] = function
        return function

    return keep


def body_of(function: Callable[[], None]) -> str:
    """Cuts the body of a function, docstring and code, out of this file."""
    lines = inspect.getsourcelines(function)[0]
    definition = ast.parse("".join(lines)).body[0]
    assert isinstance(definition, ast.FunctionDef)
    docstring, code = definition.body[0].lineno - 1, definition.body[1].lineno - 1
    written = [*lines[docstring:code], f"    {TYPING}\n", *lines[code:]]
    return textwrap.dedent("".join(written))


@oni_file("manage.py")
def manage_py() -> None:
    """Finds Django only when ENV/bin comes first in PATH, as Open ONI's own manage.py does."""
    import os
    import signal
    import sys

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no signal tidies anything up
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "onisite.settings")
        try:
            from django.core.management import execute_from_command_line
        except ImportError as error:
            raise ImportError(
                "Couldn't import Django. Are you sure it's installed and available on your "
                "PYTHONPATH environment variable? Did you forget to activate a virtual environment?"
            ) from error
        execute_from_command_line(sys.argv)


# ruff: disable[F841]
@oni_file("onisite/settings_base.py")
def onisite_settings_base() -> None:
    """What a site may be told by its environment."""
    import os
    from pathlib import Path

    BASE_DIR = Path(__file__).resolve().parent.parent
    SECRET_KEY = "a stand-in has no secrets"
    TIME_ZONE = "America/New_York"
    USE_TZ = True
    INSTALLED_APPS = ["core.apps.CoreConfig"]
    ROOT_URLCONF = "onisite.urls"
    DEFAULT_AUTO_FIELD = "django.db.models.AutoField"
    DATABASES = {
        "default": {
            "ENGINE": "onisite.database",
            "NAME": os.environ.get("ONI_DB_NAME", str(BASE_DIR / "oni.sqlite3")),
            "OPTIONS": {"timeout": 60},
        },
    }
    CACHES = {
        "default": {
            "BACKEND": "django.core.cache.backends.filebased.FileBasedCache",
            "LOCATION": os.environ.get("ONI_CACHE_DIR", str(BASE_DIR / "cache")),
        },
    }
    BASE_URL = "http://localhost"
    TITLE_DISPLAY_MEDIUM = False
    SOLR_LANGUAGES = (
        *("ara", "arm", "baq", "bul", "cze", "dan", "dut", "eng", "fin", "fre", "ger", "gle"),
        *("gre", "hin", "hun", "ind", "ita", "jpn", "lav", "nor", "per", "por", "rum", "rus"),
        *("spa", "swe", "tha", "tur"),
    )
    STORAGE = os.environ.get("ONI_STORAGE_PATH", BASE_DIR / "data")
    SOLR_BASE_URL = os.environ.get("ONI_SOLR_URL", "http://127.0.0.1:9")
    MARC_RETRIEVAL_URLFORMAT = os.environ.get(
        "ONI_MARC_RETRIEVAL_URLFORMAT", "http://127.0.0.1:9/lccn/%s/marc.xml"
    )

    # Every line goes to standard error. Commands that change something also write log files: see
    # core.management.commands.
    LOG_LOCATION = BASE_DIR / "log"
    LOGGING = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"simple": {"format": "[{levelname}] {message}", "style": "{"}},
        "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "simple"}},
        "root": {"handlers": ["console"], "level": os.environ.get("ONI_LOG_LEVEL", "INFO")},
    }

    # These two are the tests' own.
    PATHS_ARE_TEXT = False  # True: as in Open ONI 1.0
    PAGE_SECONDS = float(os.environ.get("ONI_PAGE_SECONDS", 0))  # how long a page takes


@oni_file("onisite/urls.py")
def onisite_urls() -> None:
    """Where the site's pages are."""
    from django.urls import include, path

    urlpatterns = [path("", include("core.urls"))]


@oni_file("core/urls.py")
def core_urls() -> None:
    """The addresses that the models ask for; no page of a stand-in can be looked at.

    An LCCN with anything but letters, digits and "_" has no address, nor has a negative number.
    """
    from django.http import HttpResponse
    from django.urls import re_path

    def page(request: object, **parts: str) -> HttpResponse:
        return HttpResponse("a stand-in has no pages")

    TITLE = r"^lccn/(?P<lccn>\w+)/"
    ISSUE = TITLE + r"(?P<date>\d{4}-\d{2}-\d{2})/ed-(?P<edition>\d+)/"
    urlpatterns = [
        re_path(TITLE + "$", page, name="openoni_title"),
        re_path(TITLE + "marc.xml$", page, name="openoni_title_marcxml"),
        re_path(ISSUE + "$", page, name="openoni_issue_pages"),
        re_path(ISSUE + r"seq-(?P<sequence>\d+)/$", page, name="openoni_page"),
        re_path("^batches/(?P<batch_name>.+)/$", page, name="openoni_batch"),
        re_path("^awardees/(?P<institution_code>.+)/$", page, name="openoni_awardee"),
        re_path(r"^essays/(?P<essay_id>\d+)/$", page, name="openoni_essay"),
    ]


# ruff: enable[F841]
@oni_file("onisite/database/base.py")
def onisite_database_base() -> None:
    """SQLite that is as strict as MariaDB with Open ONI's tables, and fails with its numbers.

    Triggers refuse what is too long, out of range, or holds characters beyond U+FFFF, which
    utf8mb3 has not. Texts compare as utf8_general_ci compares them. information_schema.columns
    can be asked.
    """
    import functools
    import os
    import re
    import sqlite3
    import unicodedata

    from django.apps import apps
    from django.db import models
    from django.db.backends.base.operations import BaseDatabaseOperations
    from django.db.backends.sqlite3 import base, schema

    BEYOND_U_FFFF = "GLOB '*[' || char(65536) || '-' || char(1114111) || ']*'"
    LONGTEXT = 2**32 - 1
    LARGEST = {"BigIntegerField": 2**63 - 1, "BigAutoField": 2**63 - 1}  # else 2**31 - 1
    KINDS = {1048: sqlite3.IntegrityError, 1062: sqlite3.IntegrityError, 1264: sqlite3.DataError}
    KINDS.update({1406: sqlite3.DataError, 1452: sqlite3.IntegrityError})
    SENTENCES = {
        1264: "Out of range value for column '{2}' at row 1",
        1366: "Incorrect string value: '{0}' for column `openoni`.`{1}`.`{2}` at row 1",
        1406: "Data too long for column '{2}' at row 1",
    }

    def stored_as(field: Any) -> Any:
        """Return the field whose kind of column `field` has: a foreign key's is its target's."""
        while field.remote_field:
            field = field.target_field
        return field

    def is_text(field: Any) -> bool:
        return isinstance(stored_as(field), (models.CharField, models.TextField))

    def length_of(field: Any) -> int:
        """Return how many characters a column of text holds."""
        return stored_as(field).max_length or LONGTEXT

    def refusals(table: str, field: Any) -> List[str]:
        """Return the SQL that refuses what the column of a field cannot hold."""
        column = f'NEW."{field.column}"'
        refusal = f"SELECT RAISE(ABORT, '{{}} {table} {field.column}') WHERE {{}};"
        if is_text(field):
            too_long = f"length(rtrim({column}, ' ')) > {length_of(field)}"
            return [
                refusal.format(1366, f"{column} {BEYOND_U_FFFF}"),
                refusal.format(1406, too_long),
            ]
        if isinstance(stored_as(field), (models.IntegerField, models.AutoField)):
            high = LARGEST.get(stored_as(field).get_internal_type(), 2**31 - 1)
            return [refusal.format(1264, f"{column} NOT BETWEEN {-high - 1} AND {high}")]
        return []

    class SchemaEditor(schema.DatabaseSchemaEditor):
        def create_model(self, model: Any) -> None:
            super().create_model(model)
            table = model._meta.db_table
            fields = model._meta.local_concrete_fields
            body = " ".join(sql for field in fields for sql in refusals(table, field))
            for event in ("INSERT", "UPDATE") if body else ():
                self.execute(
                    f'CREATE TRIGGER "{table}_{event}" BEFORE {event} ON "{table}"'
                    f" BEGIN {body} END",
                    None,
                )

    @functools.lru_cache(10_000)
    def weight(text: str) -> str:
        """Return what decides the order: neither case nor accents nor spaces at the end."""
        letters = unicodedata.normalize("NFD", text.rstrip(" ").lower())
        return "".join(letter for letter in letters if not unicodedata.combining(letter))

    def compare(one: str, other: str) -> int:
        """Order two texts as if spaces filled up the shorter one: a line end comes before it."""
        first, second = weight(one), weight(other)
        longest = max(len(first), len(second))
        first, second = first.ljust(longest), second.ljust(longest)
        return (first > second) - (first < second)

    def unknown_in(params: Any) -> str:
        """Return what MariaDB shows of the first text with a character beyond U+FFFF."""
        for value in params or ():
            found = re.search("[\U00010000-\U0010ffff]", value) if isinstance(value, str) else None
            if found:
                rest = value[found.start() :].encode()
                shown = [chr(byte) if 31 < byte < 127 else f"\\x{byte:02X}" for byte in rest[:6]]
                return "".join(shown) + ("..." if len(rest) > 6 else "")
        return ""

    def translated(error: sqlite3.Error, params: Any) -> sqlite3.Error:
        """Return an error of SQLite's as MariaDB would have put it."""
        text = str(error)
        refused = re.fullmatch(r"(\d{4}) (\w+) (\w+)", text)
        if refused:
            number = int(refused[1])
            sentence = SENTENCES[number].format(unknown_in(params), refused[2], refused[3])
        elif text.startswith("NOT NULL constraint failed"):
            number, sentence = 1048, f"Column '{text.rpartition('.')[2]}' cannot be null"
        elif text.startswith("UNIQUE constraint failed"):
            number, sentence = 1062, f"Duplicate entry for key '{text.partition(': ')[2]}'"
        elif text.startswith("FOREIGN KEY constraint failed"):
            number = 1452
            sentence = "Cannot add or update a child row: a foreign key constraint fails"
        elif text.startswith("attempt to write a readonly database"):
            number, sentence = 1792, "Cannot execute statement in a READ ONLY transaction"
        else:
            return error
        return KINDS.get(number, sqlite3.OperationalError)(number, sentence)

    def within_64_bits(value: Any) -> Any:
        """Return a number that SQLite can be given: it is out of range either way."""
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return max(-(2**63), min(value, 2**63 - 1)) if is_number else value

    class Cursor(base.SQLiteCursorWrapper):
        def execute(self, query: str, params: Any = None) -> Any:
            if isinstance(params, (list, tuple)):
                params = [within_64_bits(value) for value in params]
            try:
                return super().execute(query, params)
            except sqlite3.Error as error:
                raise translated(error, params) from error

        def executemany(self, query: str, param_list: Any) -> Any:
            try:
                return super().executemany(query, param_list)
            except sqlite3.Error as error:
                raise translated(error, None) from error

    @functools.lru_cache(None)
    def columns() -> List[Tuple[str, str, Optional[int], Optional[str]]]:
        """Return table, column, longest text and character set of each column of Open ONI's."""
        return [
            (model._meta.db_table, field.column, length_of(field), "utf8mb3")
            if is_text(field)
            else (model._meta.db_table, field.column, None, None)
            for model in apps.get_models(include_auto_created=True)
            for field in model._meta.local_concrete_fields
        ]

    class Operations(base.DatabaseWrapper.ops_class):
        """MariaDB's columns of numbers have ranges, which Django knows."""

        integer_field_range = BaseDatabaseOperations.integer_field_range

    class DatabaseWrapper(base.DatabaseWrapper):
        SchemaEditorClass = SchemaEditor
        ops_class = Operations
        data_types = {
            **base.DatabaseWrapper.data_types,
            "CharField": "varchar(%(max_length)s) COLLATE NOCASE",
            "TextField": "text COLLATE NOCASE",
        }

        def get_new_connection(self, conn_params: Any) -> Any:
            connection = super().get_new_connection(conn_params)
            connection.create_collation("NOCASE", compare)
            connection.execute("PRAGMA synchronous = OFF")  # a kill loses nothing by this
            connection.execute("ATTACH ':memory:' AS information_schema")
            connection.execute(
                "CREATE TABLE information_schema.columns (table_schema, table_name, column_name,"
                " character_maximum_length, character_set_name)"
            )
            connection.executemany(
                "INSERT INTO information_schema.columns VALUES (?, ?, ?, ?, ?)",
                [(str(self.settings_dict["NAME"]), *column) for column in columns()],
            )
            connection.commit()
            return connection

        def is_usable(self) -> bool:
            """Tell whether the database is up, and this connection to it."""
            return not self._is_down() and super().is_usable()

        def _is_down(self) -> bool:
            """Tell whether the database is down: then a folder is in its place."""
            return os.path.isdir(self.settings_dict["NAME"])

        def create_cursor(self, name: Any = None) -> Cursor:
            if self._is_down():  # SQLite itself would go on with a file that it has open
                raise sqlite3.OperationalError("unable to open database file")
            return self.connection.cursor(factory=Cursor)


@oni_file("core/apps.py")
def core_apps() -> None:
    """Settings that are made of other settings, once these are known: no settings file has them."""
    from pathlib import Path

    from django.apps import AppConfig
    from django.conf import settings

    class CoreConfig(AppConfig):
        name = "core"

        def ready(self) -> None:
            kind = str if settings.PATHS_ARE_TEXT else Path
            storage = Path(settings.STORAGE)
            settings.SOLR = settings.SOLR_BASE_URL + "/solr/openoni"
            settings.BATCH_STORAGE = kind(storage / "batches")
            settings.COORD_STORAGE = kind(storage / "word_coordinates")
            settings.OCR_DUMP_STORAGE = kind(storage / "ocr")


@oni_file("core/models.py")
def core_models() -> None:
    """The tables that a batch and a title end up in."""
    import logging
    import os
    import re
    from urllib.parse import urljoin
    from urllib.request import url2pathname

    from django import urls
    from django.conf import settings
    from django.db import models

    def varchar(longest: int, **options: Any) -> models.CharField:
        return models.CharField(max_length=longest, **options)

    def varchar_or_null(longest: int, **options: Any) -> models.CharField:
        return models.CharField(max_length=longest, null=True, **options)

    def belongs_to(model: str, name: str, **options: Any) -> models.ForeignKey:
        return models.ForeignKey(model, models.CASCADE, related_name=name, **options)

    def made() -> models.DateTimeField:
        return models.DateTimeField(auto_now_add=True)

    class Awardee(models.Model):
        org_code = varchar(50, primary_key=True)
        name = varchar(100)
        created = made()

        def __str__(self) -> str:
            return self.name

        @property
        def url(self) -> str:
            return urls.reverse("openoni_awardee", kwargs={"institution_code": self.org_code})

    class Batch(models.Model):
        name = varchar(250, primary_key=True)
        created = made()
        validated_batch_file = varchar(100)
        awardee = belongs_to("Awardee", "batches", null=True)
        source = varchar_or_null(4096)
        sitemap_indexed = models.DateTimeField(null=True)

        def __str__(self) -> str:
            return self.full_name

        @property
        def full_name(self) -> str:
            return f"{self.name} ({self.awardee.name})" if self.awardee else self.name

        @property
        def path(self) -> str:
            return os.path.join(settings.BATCH_STORAGE, self.name, "data/")

        @property
        def storage_url(self) -> str:
            return urljoin(self.source, "data/") if self.source else urljoin("file:", self.path)

        @property
        def validated_batch_url(self) -> str:
            return urljoin(self.storage_url, self.validated_batch_file)

        @property
        def page_count(self) -> int:
            return Page.objects.filter(issue__batch__name=self.name).count()

        @property
        def url(self) -> str:
            return urls.reverse("openoni_batch", kwargs={"batch_name": self.name})

        def delete(self, *arguments: Any, **options: Any) -> None:
            try:
                self.ocr_dump.delete()
            except OcrDump.DoesNotExist:
                logging.warning("no OcrDump to delete for %s", self)
            super().delete(*arguments, **options)

    class LoadBatchEvent(models.Model):
        """A line of a batch's history. It only names the batch, and so outlives its purge."""

        batch_name = varchar(250)
        created = made()
        message = models.TextField(null=True)

        def __str__(self) -> str:
            return self.batch_name

    class Title(models.Model):
        lccn = varchar(25, primary_key=True)
        lccn_orig = varchar(25)
        name = varchar(250)
        name_normal = varchar(250)
        edition = varchar_or_null(250)
        place_of_publication = varchar_or_null(250)
        publisher = varchar_or_null(250)
        frequency = varchar_or_null(250)
        frequency_date = varchar_or_null(250)
        medium = varchar_or_null(50)
        oclc = varchar_or_null(25, db_index=True)
        issn = varchar_or_null(15)
        start_year = varchar(10)
        end_year = varchar(10)
        country = models.ForeignKey("Country", models.CASCADE)
        version = models.DateTimeField()
        created = made()
        has_issues = models.BooleanField(default=False, db_index=True)
        uri = models.URLField(null=True, max_length=500)
        sitemap_indexed = models.DateTimeField(null=True)

        class Meta:
            ordering = ["name_normal"]

        def __str__(self) -> str:
            years = f"{self.start_year}-{self.end_year}"
            return f"{self.display_name} ({self.place_of_publication}) {years}"

        @property
        def display_name(self) -> str:
            if settings.TITLE_DISPLAY_MEDIUM and self.medium:
                return f"{self.name} {self.medium}"
            return self.name

        @property
        def url(self) -> str:
            return urls.reverse("openoni_title", kwargs={"lccn": self.lccn})

        @property
        def start_year_int(self) -> int:
            """Fails with a ValueError for what stands for no year, such as 18||."""
            return 0 if self.start_year == "current" else int(re.sub("[?u]", "0", self.start_year))

        @property
        def end_year_int(self) -> int:
            """Fails as start_year_int does."""
            return 9999 if self.end_year == "current" else int(re.sub("[?u]", "9", self.end_year))

        @property
        def holding_types(self) -> List[Optional[str]]:
            kinds = [holding.type for holding in self.holdings.all()]
            if self.uri and "Online Resource" not in kinds:
                kinds.append("Online Resource")
            return kinds

        @property
        def solr_doc(self) -> Dict[str, Any]:
            places = [*self.places.all()]
            return {
                "id": self.url,
                "type": "title",
                "title": self.display_name,
                "title_normal": self.name_normal,
                "lccn": self.lccn,
                "edition": self.edition,
                "place_of_publication": self.place_of_publication,
                "frequency": self.frequency,
                "publisher": self.publisher,
                "start_year": self.start_year_int,
                "end_year": self.end_year_int,
                "language": [language.name for language in self.languages.all()],
                "alt_title": [title.name for title in self.alt_titles.all()],
                "subject": [subject.heading for subject in self.subjects.all()],
                "note": [note.text for note in self.notes.all()],
                "city": [place.city for place in places],
                "county": [place.county for place in places],
                "country": self.country.name,
                "state": [place.state for place in places],
                "place": [place.name for place in places],
                "holding_type": self.holding_types,
                "url": [url.value for url in self.urls.all()],
                "essay": [essay.html for essay in self.essays.all()],
            }

    class AltTitle(models.Model):
        name = varchar(250)
        date = varchar_or_null(250)
        title = belongs_to("Title", "alt_titles")

        class Meta:
            ordering = ["name"]

    class MARC(models.Model):
        xml = models.TextField()
        title = models.OneToOneField("Title", models.CASCADE, related_name="marc")

    class Issue(models.Model):
        date_issued = models.DateField(db_index=True)
        volume = varchar_or_null(50)
        number = varchar(50)
        edition = models.IntegerField()
        edition_label = varchar(100)
        title = belongs_to("Title", "issues")
        batch = belongs_to("Batch", "issues")
        created = made()

        class Meta:
            ordering = ["date_issued"]

        def __str__(self) -> str:
            return f"{self.title.display_name} [{self.date_issued}]"

        @property
        def day(self) -> str:
            date = self.date_issued
            return f"{date.year:04}-{date.month:02}-{date.day:02}"

        @property
        def url(self) -> str:
            parts = {"lccn": self.title.lccn, "date": self.day, "edition": self.edition}
            return urls.reverse("openoni_issue_pages", kwargs=parts)

        def save(self, *arguments: Any, **options: Any) -> None:
            """Saves the title, too: it has issues now."""
            self.title.has_issues = True
            self.title.save()
            super().save(*arguments, **options)

        def delete(self, *arguments: Any, **options: Any) -> None:
            super().delete(*arguments, **options)
            if not self.title.issues.exists():
                self.title.has_issues = False
                self.title.save()

    class Page(models.Model):
        sequence = models.IntegerField(db_index=True)
        number = varchar(50)
        section_label = varchar(100)
        tiff_filename = varchar(250)
        jp2_filename = varchar_or_null(250)
        jp2_width = models.IntegerField(null=True)
        jp2_length = models.IntegerField(null=True)
        pdf_filename = varchar_or_null(250)
        ocr_filename = varchar_or_null(250)
        issue = belongs_to("Issue", "pages")
        reel = belongs_to("Reel", "pages", null=True)
        indexed = models.BooleanField(default=False)
        created = made()

        class Meta:
            ordering = ["sequence"]

        def __str__(self) -> str:
            labels = [self.issue.edition_label, self.section_label]
            return ", ".join(
                [
                    str(self.issue.title),
                    f"{self.issue.date_issued:%B %d, %Y}",
                    *[label for label in labels if label],
                    f"Image {self.sequence}",
                ]
            )

        def _url_parts(self) -> Dict[str, Any]:
            issue = self.issue
            return {
                "lccn": issue.title.lccn,
                "date": issue.day,
                "edition": issue.edition,
                "sequence": self.sequence,
            }

        @property
        def url(self) -> str:
            return urls.reverse("openoni_page", kwargs=self._url_parts())

        def _abs_path(self, name: Optional[str]) -> Optional[str]:
            return os.path.join(self.issue.batch.path, name) if name else None

        @property
        def jp2_abs_filename(self) -> Optional[str]:
            return self._abs_path(self.jp2_filename)

        @property
        def ocr_abs_filename(self) -> Optional[str]:
            return self._abs_path(self.ocr_filename)

        @property
        def solr_doc(self) -> Dict[str, Any]:
            """Fails with a TypeError for a page that has no OCR."""
            year, month, day = self.issue.day.split("-")
            document = self.issue.title.solr_doc
            for name in ("essay", "url", "holding_type"):
                del document[name]
            document["id"] = self.url
            document["type"] = "page"
            document["batch"] = self.issue.batch.name
            document["date"] = year + month + day
            document["month"], document["year"], document["day"] = month, year, day
            document["page"] = self.number
            document["sequence"] = self.sequence
            document["section_label"] = self.section_label
            document["edition_label"] = self.issue.edition_label
            try:
                texts = self.ocr.language_texts.select_related().values("language__code", "text")
            except OCR.DoesNotExist:
                texts = None
            for each in texts:
                code = each["language__code"]
                known = code if code in settings.SOLR_LANGUAGES else "eng"
                document[f"ocr_{known}"] = each["text"]
            return document

    def coordinates_path(url_parts: Dict[str, Any]) -> str:
        """Return where a page's word coordinates go; makes the folder."""
        below = url2pathname(urls.reverse("openoni_page", kwargs=url_parts)).lstrip("/")
        folder = os.path.join(settings.COORD_STORAGE, below)
        os.makedirs(folder, exist_ok=True)
        return os.path.join(folder, "coordinates.json.gz")

    class LanguageText(models.Model):
        text = models.TextField()
        language = models.ForeignKey("Language", models.CASCADE, null=True)
        ocr = belongs_to("OCR", "language_texts")

    class OCR(models.Model):
        created = made()
        page = models.OneToOneField("Page", models.CASCADE, null=True, related_name="ocr")

    class PublicationDate(models.Model):
        text = varchar(500)
        titles = belongs_to("Title", "publication_dates")

        class Meta:
            ordering = ["text"]

    class Place(models.Model):
        name = varchar(100, primary_key=True)
        city = varchar_or_null(100, db_index=True)
        county = varchar_or_null(100, db_index=True)
        state = varchar_or_null(100, db_index=True)
        country = varchar_or_null(100)
        titles = models.ManyToManyField("Title", related_name="places")
        dbpedia = varchar_or_null(250)
        geonames = varchar_or_null(250)
        latitude = models.FloatField(null=True)
        longitude = models.FloatField(null=True)

        class Meta:
            ordering = ["name"]

    class Subject(models.Model):
        heading = varchar(250)
        type = varchar(1)
        titles = models.ManyToManyField("Title", related_name="subjects")

        class Meta:
            ordering = ["heading"]

    class Note(models.Model):
        text = models.TextField()
        type = varchar(3)
        title = belongs_to("Title", "notes")

        class Meta:
            ordering = ["text"]

    class PageNote(models.Model):
        label = models.TextField()
        text = models.TextField()
        type = varchar(50)
        page = belongs_to("Page", "notes")

        class Meta:
            ordering = ["text"]

    class IssueNote(models.Model):
        label = models.TextField()
        text = models.TextField()
        type = varchar(50)
        issue = belongs_to("Issue", "notes")

        class Meta:
            ordering = ["text"]

    class Essay(models.Model):
        title = models.TextField()
        created = models.DateTimeField()
        modified = models.DateTimeField()
        creator = belongs_to("Awardee", "essays")
        essay_editor_url = models.TextField()
        html = models.TextField()
        loaded = made()
        titles = models.ManyToManyField("Title", related_name="essays")

        class Meta:
            ordering = ["title"]

    class Holding(models.Model):
        description = models.TextField(null=True)
        type = varchar_or_null(25)
        institution = belongs_to("Institution", "holdings")
        last_updated = varchar_or_null(10)
        title = belongs_to("Title", "holdings")
        created = made()
        notes = models.TextField(null=True)

        class Meta:
            ordering = ["institution"]

    class TitleLink(models.Model):
        """A title before, after or beside another, which ONI need not have."""

        name = varchar_or_null(250)
        lccn = varchar_or_null(50)
        oclc = varchar_or_null(50)

        class Meta:
            abstract = True
            ordering = ["name"]

    class SucceedingTitleLink(TitleLink):
        title = belongs_to("Title", "succeeding_title_links")

    class PreceedingTitleLink(TitleLink):
        title = belongs_to("Title", "preceeding_title_links")

    class RelatedTitleLink(TitleLink):
        title = belongs_to("Title", "related_title_links")

    class Language(models.Model):
        code = varchar(3, primary_key=True)
        name = varchar(100)
        lingvoj = varchar_or_null(200)
        titles = models.ManyToManyField("Title", related_name="languages")

        class Meta:
            ordering = ["name"]

        def __str__(self) -> str:
            return self.name

    class Country(models.Model):
        code = varchar(3, primary_key=True)
        name = varchar(100)
        region = varchar(100)

        class Meta:
            ordering = ["name"]

    class Institution(models.Model):
        code = varchar(50, primary_key=True)
        name = varchar(255)
        address1 = varchar_or_null(255)
        address2 = varchar_or_null(255)
        city = varchar(100)
        state = varchar(2)
        zip = varchar_or_null(20)
        created = made()

        class Meta:
            ordering = ["name"]

    class Url(models.Model):
        value = models.TextField()
        type = varchar_or_null(1)
        title = belongs_to("Title", "urls")

    class Reel(models.Model):
        number = varchar(50)
        batch = belongs_to("Batch", "reels")
        created = made()
        implicit = models.BooleanField(default=False)  # only a METS file names it

    class OcrDump(models.Model):
        created = made()
        sha1 = models.TextField()
        size = models.BigIntegerField()
        batch = models.OneToOneField("Batch", models.CASCADE, related_name="ocr_dump")


@oni_file("core/utils/utils.py")
def core_utils() -> None:
    """What the pages of the site and the loader share."""

    from core.models import Issue
    from django.core.cache import cache
    from django.db.models import Max, Min
    from django.utils import timezone

    MIN_YEAR = 1400
    MAX_YEAR = timezone.now().year

    def set_fulltext_range() -> Tuple[int, int]:
        """Comes last in a load and a purge: a cache it cannot write fails them, with all done."""
        days = Issue.objects.aggregate(first=Min("date_issued"), last=Max("date_issued"))
        first, last = days["first"], days["last"]
        years = (first.year if first else MIN_YEAR, last.year if last else MAX_YEAR)
        cache.set("fulltext_range", years)
        return years


@oni_file("core/solr_index.py")
def core_solr_index() -> None:
    """The search index, as far as a load, a purge and the titles need it."""
    import logging

    import pysolr
    from core import models
    from django.conf import settings

    def conn() -> pysolr.Solr:
        return pysolr.Solr(settings.SOLR)

    def page_count() -> int:
        return conn().search(q="type:page", rows=0).hits

    def title_count() -> int:
        return conn().search(q="type:title", rows=0).hits

    def index_titles(since=None) -> None:
        """Index the titles created since then, or all; a commit that fails is an exception."""
        solr = conn()
        titles = models.Title.objects.all()
        if since:
            titles = titles.filter(created__gte=since)
        else:
            solr.delete(q="type:title")
        for title in titles:
            index_title(solr, title)
        solr.commit()

    def index_title(solr: pysolr.Solr, title: models.Title) -> None:
        """Index a title. One that cannot be is a logged error, no more."""
        logging.info("indexing title: lccn=%s", title.lccn)
        try:
            solr.add(title.solr_doc)
        except Exception as error:
            logging.exception(error)

    def index_pages() -> None:
        """Index all pages with OCR, one after the other; the first that fails ends it."""
        solr = conn()
        pages = models.Page.objects.exclude(ocr_filename=None).exclude(ocr_filename="")
        for number, page in enumerate(pages):
            logging.info("[%s] indexing page: %s", number, page.url)
            solr.add(page.solr_doc)
        solr.commit()


@oni_file("core/ocr_extractor.py")
def core_ocr_extractor() -> None:
    """The words of an ALTO file, and where on the page they stand."""
    import re
    import xml.sax
    import xml.sax.handler

    EDGES = re.compile("^[^a-zA-Z0-9]+|[^a-zA-Z0-9]+$|'s$")

    class OCRHandler(xml.sax.handler.ContentHandler):
        """Texts are lists of lines until their page ends, and text from then on.

        What then still comes, or a file without a Page, is treated as the kind that it is by then.
        """

        def __init__(self) -> None:
            self.width = None
            self.height = None
            self.language = "eng"
            self.line: List[Any] = []
            self.texts: Dict[str, Any] = {}
            self.places: Dict[str, List[Tuple[Any, ...]]] = {}

        def startElement(self, tag: str, attributes: Any) -> None:
            if tag == "Page":
                assert self.width is None
                assert self.height is None
                self.width = attributes.get("WIDTH")
                self.height = attributes.get("HEIGHT")
            elif tag == "TextBlock":
                self.language = attributes.get("language", "eng")
            elif tag == "String":
                self.add_word(attributes)

        def add_word(self, attributes: Any) -> None:
            """Fails with a TypeError for a word without CONTENT."""
            content = attributes.get("CONTENT")
            self.line.append(content)
            word = EDGES.sub("", content)
            if word:
                place = tuple(map(attributes.get, ("HPOS", "VPOS", "WIDTH", "HEIGHT")))
                self.places.setdefault(word, []).append(place)

        def endElement(self, tag: str) -> None:
            if tag == "TextLine":
                line = " ".join(self.line)
                self.line = []
                self.texts.setdefault(self.language, []).append(line)
            elif tag == "Page":
                for language, lines in self.texts.items():
                    self.texts[language] = "\n".join(lines)

    def ocr_extractor(ocr_file: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Return the texts by language, and the coordinates, of the ALTO file at an address."""
        handler = OCRHandler()
        parser = xml.sax.make_parser()
        parser.setContentHandler(handler)
        parser.setFeature(xml.sax.handler.feature_namespaces, 0)
        parser.parse(ocr_file)
        sizes = {"width": handler.width, "height": handler.height}
        return handler.texts, {**sizes, "coords": handler.places}


@oni_file("core/batch_loader.py")
def core_batch_loader() -> None:
    """Loading and purging batches.

    Each row is committed at once, so that a kill leaves whatever was there by then.
    """
    import gzip
    import json
    import logging
    import os
    import re
    import time
    from datetime import datetime
    from urllib.error import URLError
    from urllib.parse import urljoin
    from urllib.request import urlopen

    from core import models, solr_index
    from core.models import OCR, Awardee, Batch, Issue, LoadBatchEvent, Page, Title
    from core.ocr_extractor import ocr_extractor
    from core.utils.utils import set_fulltext_range
    from django.conf import settings
    from django.core import management
    from django.db import reset_queries
    from django.db.models import Q
    from lxml import etree
    from PIL import Image

    ns = {
        "ndnp": "http://www.loc.gov/ndnp",
        "mods": "http://www.loc.gov/mods/v3",
        "mets": "http://www.loc.gov/METS/",
        "np": "urn:library-of-congress:ndnp:mets:newspaper",
        "xlink": "http://www.w3.org/1999/xlink",
        "mix": "http://www.loc.gov/mix/",
        "xhtml": "http://www.w3.org/1999/xhtml",
    }
    BATCH_FILES = (
        *("batch_1.xml", "BATCH_1.xml", "batchfile_1.xml"),
        *("batch_2.xml", "BATCH_2.xml", "batch.xml"),
    )
    METRICS = (
        './/mets:techMD[@ID="{}"]/mets:mdWrap/mets:xmlData/mix:mix'
        "/mix:ImagingPerformanceAssessment/mix:SpatialMetrics/mix:{}"
    )

    class BatchLoaderException(RuntimeError):
        """The load or purge has failed; in a page, that page alone."""

    def found(node: Any, path: str) -> Any:
        return node.xpath(path, namespaces=ns)

    def text_of(node: Any, path: str) -> str:
        """Return the text of the first node of a path as it stands, or ""."""
        return found(node, f"string({path})")

    def dmd_mods(document: Any, name: str) -> Any:
        """Return the MODS of a dmdSec. There is an IndexError without."""
        return found(document, f'.//mets:dmdSec[@ID="{name}"]/descendant::mods:mods')[0]

    def get_dimensions(document: Any, name: str) -> Tuple[Optional[str], Optional[str]]:
        """Return length and width that a techMD tells, as they stand; None without either."""
        lengths = found(document, METRICS.format(name, "ImageLength"))
        widths = found(document, METRICS.format(name, "ImageWidth"))
        return (lengths[0].text, widths[0].text) if lengths and widths else (None, None)

    def remember(name: str, message: str) -> None:
        """Add a line to a batch's history."""
        LoadBatchEvent(batch_name=name, message=message).save()

    def link_of(name: str) -> str:
        return os.path.join(settings.BATCH_STORAGE, name)

    def _normalize_batch_name(batch_name: str) -> str:
        name = os.path.basename(batch_name.rstrip("/"))
        if not re.match(r"batch_\w+_\w+_ver\d\d", name):
            message = f"unrecognized format for batch name {name}"
            logging.error(message)
            raise BatchLoaderException(message)
        return name

    def wait_at(gate: str) -> None:
        """Wait where a test holds a load or a purge by a FIFO. This is the tests' own."""
        if os.path.exists(gate):
            with open(gate, "rb") as file:
                file.read()

    def take_time(page: Page, mets_file: str) -> None:
        """Take as long as a test wants a page to. This is the tests' own.

        Only a page that is in the database takes time: in a load that stores nothing, none does.
        """
        folder = os.path.dirname(mets_file[len("file://") :])
        gate = os.path.join(folder, f"{page.sequence:04}.gate")
        is_wanted = settings.PAGE_SECONDS or os.path.exists(gate)
        if is_wanted and Page.objects.filter(pk=page.pk).exists():
            wait_at(gate)
            time.sleep(settings.PAGE_SECONDS)

    class BatchLoader:
        """One load or purge of one batch."""

        def __init__(self, process_ocr: bool = True, process_coordinates: bool = True):
            self.PROCESS_OCR = process_ocr
            if self.PROCESS_OCR:
                self.solr = solr_index.conn()
            self.PROCESS_COORDINATES = process_coordinates

        def load_batch(self, batch_path: str) -> Batch:
            """Load a batch of which there is no row; a link of its name is used, wherever it leads.

            An error purges what was loaded. Where that fails too, its remains stay.
            """
            self.pages_processed = 0
            batch_path = batch_path.rstrip("/")
            logging.info("loading batch at %s", batch_path)
            batch_source = self._make_link(batch_path)
            batch_name = _normalize_batch_name(os.path.basename(batch_path))
            try:
                batch = Batch.objects.get(name=batch_name)
            except Batch.DoesNotExist:
                pass
            else:
                logging.info("Batch already loaded: %s", batch_name)
                return batch
            logging.info("loading batch: %s", batch_name)
            remember(batch_name, "starting load")
            try:
                batch = self._load_new(batch_name, batch_source)
            except Exception as error:
                message = f"unable to load batch: {error}"
                self._give_up(batch_name, message, error)
                raise BatchLoaderException(message)
            set_fulltext_range()
            return batch

        def _make_link(self, batch_path: str) -> Optional[str]:
            """Link a batch in BATCH_STORAGE, unless there is a link; return its source if named."""
            storage = settings.BATCH_STORAGE
            folder, name = os.path.split(batch_path)
            if not folder:
                return urljoin(storage, name).rstrip("/") + "/"
            is_there = batch_path == link_of(name) or os.path.islink(link_of(name))
            is_below = os.path.islink(storage) and batch_path.startswith(os.path.realpath(storage))
            if not is_there and not is_below:
                logging.info("creating symlink %s -> %s", batch_path, link_of(name))
                os.symlink(batch_path, link_of(name))
            return None

        def _load_new(self, batch_name: str, batch_source: Optional[str]) -> Batch:
            """Load reels, then issues; one that has a ValueError is left as it is by then."""
            batch = self._get_batch(batch_name, batch_source, create=True)
            batch.validated_batch_file = self._find_batch_file(batch)
            self.current_batch = batch
            document = etree.parse(batch.validated_batch_url)
            for element in found(document, "ndnp:reel"):
                self._get_reel(element.attrib["reelNumber"].strip())
            for element in found(document, "ndnp:issue"):
                mets_file = urljoin(batch.storage_url, element.text)
                try:
                    self._load_issue(mets_file)
                except ValueError as error:
                    logging.exception(error)
                    continue
                reset_queries()
            if self.PROCESS_OCR:
                self.solr.commit()
            batch.save()
            message = f"processed {batch.page_count} pages"
            logging.info(message)
            remember(batch_name, message)
            return batch

        def _give_up(self, batch_name: str, message: str, error: Exception) -> None:
            logging.error(message)
            logging.exception(error)
            remember(batch_name, message)
            try:
                self.purge_batch(batch_name)
            except Exception as second:
                logging.error("purge batch failed for failed load batch: %s", second)
                logging.exception(second)

        def _get_batch(
            self, batch_name: str, batch_source: Optional[str] = None, create: bool = False
        ) -> Batch:
            """Return the batch, made before any issue if it is to be: from then on it counts."""
            if create:
                return self._create_batch(batch_name, batch_source)
            return Batch.objects.get(name=batch_name)

        def _create_batch(self, batch_name: str, batch_source: Optional[str]) -> Batch:
            if Batch.objects.filter(name=batch_name).count() != 0:
                raise BatchLoaderException(f"batch {batch_name} already loaded")
            batch = Batch()
            batch.name = batch_name
            batch.source = batch_source
            org_code = batch_name.split("_", 3)[1]
            try:
                batch.awardee = Awardee.objects.get(org_code=org_code)
            except Awardee.DoesNotExist:
                message = f"no awardee for org code: {org_code}"
                logging.error(message)
                raise BatchLoaderException(message)
            batch.save()
            return batch

        def _find_batch_file(self, batch: Batch) -> str:
            for name in BATCH_FILES:
                try:
                    urlopen(urljoin(batch.storage_url, name))
                    return name
                except URLError:
                    pass
            raise BatchLoaderException(
                f"could not find batch_1.xml (or any of its aliases) in '{batch.path}' "
                "-- has the batch been validated?"
            )

        def _get_reel(self, number: str, **options: bool) -> models.Reel:
            try:
                return models.Reel.objects.get(number=number, batch=self.current_batch)
            except models.Reel.DoesNotExist:
                reel = models.Reel(number=number, batch=self.current_batch, **options)
                reel.save()
                return reel

        def _load_issue(self, mets_file: str) -> Issue:
            logging.debug("parsing issue mets file: %s", mets_file)
            document = etree.parse(mets_file)
            division = found(document, './/mets:div[@TYPE="np:issue"]')[0]
            mods = dmd_mods(document, division.attrib["DMDID"])
            issue = Issue()
            number_of = './/mods:detail[@type="{}"]/mods:number[1]'
            issue.volume = text_of(mods, number_of.format("volume")).strip()
            issue.number = text_of(mods, number_of.format("issue")).strip()
            issue.edition = int(text_of(mods, number_of.format("edition")))
            label = './/mods:detail[@type="edition"]/mods:caption[1]'
            issue.edition_label = text_of(mods, label).strip()
            issue.date_issued = datetime.strptime(text_of(mods, ".//mods:dateIssued"), "%Y-%m-%d")
            lccn = text_of(mods, './/mods:identifier[@type="lccn"]').strip()
            issue.title = self._get_title(lccn)
            issue.batch = self.current_batch
            issue.save()
            logging.debug(f"saved issue: {issue.url}")  # a title without an address fails here
            notes = []
            for note in found(mods, ".//mods:note"):
                kind, label = text_of(note, "./@type"), text_of(note, "./@displayLabel")
                notes.append(models.IssueNote(type=kind, label=label, text=text_of(note, ".")))
            issue.notes.set(notes, bulk=False)
            issue.save()
            for page_division in found(division, './/mets:div[@TYPE="np:page"]'):
                try:
                    self._load_page(document, page_division, issue)
                    self.pages_processed += 1
                except BatchLoaderException as error:
                    logging.exception(error)
            return issue

        def _get_title(self, lccn: str) -> Title:
            """Return a title, from the site of MARC records if need be."""
            try:
                return Title.objects.get(lccn=lccn)
            except Exception:
                url = settings.MARC_RETRIEVAL_URLFORMAT % lccn
                logging.info("attempting to load marc record from %s", url)
                management.call_command("load_titles", url)
                return Title.objects.get(lccn=lccn)

        def _load_page(self, doc: Any, div: Any, issue: Issue) -> Page:
            """Load a page, whose row is there before its files are looked at."""
            mods = dmd_mods(doc, div.attrib["DMDID"])
            page = Page()
            start = text_of(mods, ".//mods:extent/mods:start")
            try:
                page.sequence = int(start)
            except ValueError:
                raise BatchLoaderException(
                    f"could not determine sequence number for page from '{start}'"
                )
            page.number = text_of(mods, './/mods:detail[@type="page number"]').strip()
            self._set_reel(page, text_of(mods, './/mods:identifier[@type="reel number"]').strip())
            logging.info("Assigned page sequence: %s", page.sequence)
            self._set_section(page, doc, div)
            page.issue = issue
            logging.info(
                "Saving page. issue date: %s, page sequence: %s", issue.date_issued, page.sequence
            )
            page.save()
            take_time(page, doc.docinfo.URL)
            notes = []
            for note in found(mods, ".//mods:note"):
                kind, label = text_of(note, "./@type"), text_of(note, "./@displayLabel")
                words = text_of(note, ".").strip()
                notes.append(models.PageNote(type=kind, label=label, text=words))
            page.notes.set(notes, bulk=False)
            for pointer in found(div, "./mets:fptr"):
                self._take_file(page, doc, pointer.attrib["FILEID"])
            if not page.ocr_filename:
                logging.info("No ocr filename for issue: %s page: %s", page.issue, page)
            elif self.PROCESS_OCR:
                self.process_ocr(page)
            logging.debug(f"saving page: {page.url}")
            page.save()
            return page

        def _set_reel(self, page: Page, number: str) -> None:
            """Make a reel that batch.xml does not name. A batch may have one without a number."""
            try:
                page.reel = models.Reel.objects.get(number=number, batch=self.current_batch)
            except models.Reel.DoesNotExist:
                if number:
                    page.reel = self._get_reel(number, implicit=True)
                else:
                    logging.warning("unable to find reel number in page metadata")

        def _set_section(self, page: Page, doc: Any, div: Any) -> None:
            name = text_of(div, 'ancestor::mets:div[@TYPE="np:section"]/@DMDID')
            if name:
                path = './/mods:detail[@type="section label"]/mods:number[1]'
                label = text_of(dmd_mods(doc, name), path).strip()
                if label:
                    page.section_label = label

        def _take_file(self, page: Page, doc: Any, name: str) -> None:
            """Take one of a page's files, by what the METS says it is used for."""
            file = found(doc, f'.//mets:file[@ID="{name}"]')[0]
            use = file.attrib["USE"]
            url = urljoin(doc.docinfo.URL, text_of(file, "./mets:FLocat/@xlink:href"))
            path = self.storage_relative_path(url)
            if use == "master":
                page.tiff_filename = path
            elif use == "service":
                page.jp2_filename = path
                self._measure(page, doc, file)
            elif use == "derivative":
                page.pdf_filename = path
            elif use == "ocr":
                page.ocr_filename = path

        def _measure(self, page: Page, doc: Any, file: Any) -> None:
            """Set a picture's size: as the METS tells it; without an ADMID, as the picture is."""
            if "ADMID" in file.attrib:
                for name in file.attrib["ADMID"].split(" "):
                    length, width = get_dimensions(doc, name)
                    if length and width:
                        page.jp2_length, page.jp2_width = length, width
                        break
            else:
                logging.info(
                    "Could not determine dimensions of jp2 for issue: %s page: %s... "
                    "trying harder...",
                    page.issue,
                    page,
                )
                page.jp2_width, page.jp2_length = Image.open(page.jp2_abs_filename).size
            if not page.jp2_width:
                raise BatchLoaderException(f"No jp2 width for issue: {page.issue} page: {page}")
            if not page.jp2_length:
                raise BatchLoaderException(f"No jp2 length for issue: {page.issue} page: {page}")

        def process_ocr(self, page: Page, index: bool = True) -> None:
            """Store word coordinates and text of a page, and put it into the search index."""
            logging.debug(f"extracting ocr text and word coords for {page.url}")
            url = urljoin(self.current_batch.storage_url, page.ocr_filename)
            texts, coordinates = ocr_extractor(url)
            if self.PROCESS_COORDINATES:
                self._process_coordinates(page, coordinates)
            ocr = OCR()
            ocr.page = page
            ocr.save()
            for code, text in texts.items():
                try:
                    is_meant = Q(code=code) | Q(lingvoj__iendswith=code)
                    language = models.Language.objects.get(is_meant)
                except models.Language.DoesNotExist:
                    language = models.Language.objects.get(code="eng")
                ocr.language_texts.create(language=language, text=text)
            page.ocr = ocr
            if index:
                self.solr.add(page.solr_doc)
                page.indexed = True
            page.save()

        def _process_coordinates(self, page: Page, coordinates: Any) -> None:
            with open(models.coordinates_path(page._url_parts()), "wb") as file:
                file.write(gzip.compress(json.dumps(coordinates).encode()))

        def storage_relative_path(self, path: str) -> str:
            return path.replace(self.current_batch.storage_url, "")

        def purge_batch(self, batch_name: str) -> None:
            remember(batch_name, "starting purge")
            try:
                self._purge_batch(self._get_batch(batch_name))
                remember(batch_name, "purged")
                if os.path.islink(link_of(batch_name)):
                    logging.info("Removing symlink %s", link_of(batch_name))
                    os.remove(link_of(batch_name))
                set_fulltext_range()
            except Exception as error:
                message = f"purge failed: {error}"
                logging.error(message)
                logging.exception(error)
                remember(batch_name, message)
                raise BatchLoaderException(message)

        def _purge_batch(self, batch: Batch) -> None:
            """Delete the issues known at the start, then the batch's row, then its documents."""
            batch_name = batch.name
            for number, issue in enumerate(batch.issues.all()):
                for page in issue.pages.all():
                    page.delete()
                    coordinates = models.coordinates_path(page._url_parts())
                    if os.path.exists(coordinates):
                        os.remove(coordinates)
                issue.delete()
                if number == 0:
                    wait_at(os.path.join(link_of(batch_name), "purge-gate"))
                time.sleep(settings.PAGE_SECONDS)
            batch.delete()
            if self.PROCESS_OCR:
                self.solr.delete(q=f'batch:"{batch_name}"')
                self.solr.commit()


@oni_file("core/title_loader.py")
def core_title_loader() -> None:
    """Loading MARC records. One that cannot be stored is counted: only broken XML fails."""
    import logging
    import re
    import time
    import urllib.request
    from datetime import datetime
    from urllib.parse import urljoin

    from core import models
    from django.db import reset_queries, transaction
    from django.utils import timezone
    from pymarc import map_xml, record_to_xml

    SIMPLE_FIELDS = {
        "edition": ("250", "a"),
        "publisher": ("260", "b"),
        "frequency": ("310", "a"),
        "frequency_date": ("310", "b"),
        "uri": ("856", "u"),
        "issn": ("022", "a"),
    }
    LINKS = {
        "780": models.PreceedingTitleLink,
        "785": models.SucceedingTitleLink,
        "775": models.RelatedTitleLink,
    }
    OF_ITS_OWN = (
        *("publication_dates", "notes", "alt_titles", "succeeding_title_links"),
        *("preceeding_title_links", "related_title_links", "urls"),
    )

    class TitleLoader:
        """Loads one file, and counts what became of its records."""

        def __init__(self) -> None:
            self.records_processed = 0
            self.records_created = 0
            self.records_updated = 0
            self.records_deleted = 0
            self.missing_lccns = 0
            self.errors = 0

        def load_file(self, location: str, skip: int = 0) -> None:
            def load_record(record: Any) -> None:
                if not record:  # the end of an envelope of the same name
                    return
                try:
                    self.records_processed += 1
                    if skip > self.records_processed:
                        logging.info("skipped %s", self.records_processed)
                    elif record.leader[5] == "d":
                        self.delete_bib(record)
                    elif record.leader[6] == "a":
                        self.load_bib(record)
                except Exception as error:
                    logging.error("unable to load: %s", error)
                    logging.exception(error)
                    self.errors += 1

            map_xml(load_record, urllib.request.urlopen(urljoin("file:", location)))

        @transaction.atomic
        def load_bib(self, record: Any) -> Optional[models.Title]:
            """Store a record, and return its title, unless it is known in this version or newer.

            A title counts as created or updated though it cannot be stored in the end.
            """
            lccn_orig = _extract(record, "010", "a")
            lccn = _normal_lccn(lccn_orig)
            if not lccn:
                self.missing_lccns += 1
                return None
            title = self._title_to_fill(lccn, _version(record))
            if title is None:
                return None
            for name in ("subjects", "languages", "places"):
                getattr(title, name).clear()
            for name in OF_ITS_OWN:
                getattr(title, name).all().delete()
            self._set_name(record, title)
            title.lccn_orig = lccn_orig
            title.oclc = self._extract_oclc(record)
            for name, place in SIMPLE_FIELDS.items():
                setattr(title, name, _extract(record, *place))
            where = _extract(record, "264", "a") or _extract(record, "260", "a")
            title.place_of_publication = where
            title.medium = _extract(record, "338", "a") or _extract(record, "245", "h")
            codes = record["008"].data
            title.start_year = _normal_year(codes[7:11])
            title.end_year = _normal_year(codes[11:15])
            title.country = models.Country.objects.get(code=codes[15:18])
            title.save()
            self._extract_all(record, title)
            title.save()
            marc = models.MARC.objects.get_or_create(title=title)[0]
            marc.xml = record_to_xml(record).decode()
            marc.save()
            if _is_openoni_electronic_resource(title, record):
                logging.info(
                    "deleting title record for openoni electronic resource: %s", title
                )
                title.delete()
            reset_queries()
            return title

        def _title_to_fill(self, lccn: str, version: datetime) -> Optional[models.Title]:
            """Return a new title, or an older one; None if there is none older."""
            try:
                title = models.Title.objects.get(lccn=lccn)
            except models.Title.DoesNotExist:
                title = models.Title(lccn=lccn)
                self.records_created += 1
            else:
                if title.version >= version:
                    return None
                self.records_updated += 1
            title.version = version
            return title

        def delete_bib(self, record: Any) -> None:
            """Delete a title, but not while it has issues."""
            lccn = _normal_lccn(_extract(record, "010", "a"))
            logging.info("trying to delete title record for %s", lccn)
            try:
                title = models.Title.objects.get(lccn=lccn)
            except models.Title.DoesNotExist:
                logging.warning("no such title %s to delete", lccn)
                return
            if title.issues.exists():
                logging.warning("not deleting title %s it has issue data", lccn)
                return
            logging.info("deleting title for %s", lccn)
            title.delete()
            self.records_deleted += 1

        def _set_name(self, record: Any, title: models.Title) -> None:
            """Fails without 245 $a, and when its second indicator is no digit."""
            field = record["245"]
            title.name = field["a"]
            if "b" in field:
                title.name += field["b"] if title.name.endswith(" ") else " " + field["b"]
            title.name_normal = title.name.lower()
            if field.indicators[1] != "0":
                title.name_normal = title.name_normal[int(field.indicators[1]) :]

        def _extract_oclc(self, record: Any) -> str:
            """Fails without the number, or if it is of another source than these two."""
            source = _extract(record, "003")
            source = source and source.strip().lower()
            if source == "dlc":
                number = _extract(record, "035", "a")
            elif source == "ocolc" or source is None:
                number = _extract(record, "001")
            else:
                logging.info("003 value is not handled by this load script")
            return _normal_oclc(number)

        def _extract_all(self, record: Any, title: models.Title) -> None:
            """Store what has rows of its own."""
            self._extract_languages(record, title)
            self._extract_places(record, title)
            for field in record.get_fields("362"):
                text = field.get("a")
                if text is not None:
                    models.PublicationDate.objects.get_or_create(text=text, titles=title)
            self._extract_subjects(record, title)
            for field in record.fields:
                if field.tag.startswith("5") and "a" in field:
                    models.Note.objects.get_or_create(text=field["a"], type=field.tag, title=title)
            for tag, kind in LINKS.items():
                for field in record.get_fields(tag):
                    name, lccn, oclc = _unpack_link(field)
                    kind.objects.get_or_create(name=name, lccn=lccn, oclc=oclc, title=title)
            self._extract_alt_titles(record, title)
            for field in record.get_fields("856"):
                for value in field.get_subfields("u"):
                    kind_of_url = field.indicators[1]
                    models.Url.objects.get_or_create(value=value, type=kind_of_url, title=title)

        def _extract_languages(self, record: Any, title: models.Title) -> None:
            """Fails if the record's own language is unknown; others are left out."""
            code = _extract(record, "008")[35:38]
            try:
                languages = [models.Language.objects.get(code=code)]
            except models.Language.DoesNotExist:
                logging.error("Code %s, not found in language table.", code)
                raise
            for field in record.get_fields("041"):
                for joined in field.get_subfields("a") + field.get_subfields("b"):
                    languages += _languages_in(joined)
            title.languages.set(languages)

        def _extract_places(self, record: Any, title: models.Title) -> None:
            places = []
            for field in record.get_fields("752"):
                country = _normal_place(field["a"])
                state = _normal_place(field["b"])
                county = _normal_place(field.get("c"))
                city = _normal_place(field["d"])
                name = re.sub("--None", "", f"{state}--{county}--{city}")
                place, is_new = models.Place.objects.get_or_create(name=name)
                if is_new:
                    place.country, place.state = country, state
                    place.county, place.city = county, city
                    place.save()
                places.append(place)
            title.places.set(places)

        def _extract_subjects(self, record: Any, title: models.Title) -> None:
            subjects = []
            for field in record.get_fields("650", "651"):
                heading = "--".join(value for _, value in field)
                kind = "t" if field.tag == "650" else "g"
                found = models.Subject.objects.get_or_create(heading=heading, type=kind)
                subjects.append(found[0])
            title.subjects.set(subjects)

        def _extract_alt_titles(self, record: Any, title: models.Title) -> None:
            names: List[Tuple[str, Optional[str]]] = []
            for field in record.get_fields("246"):
                names.append((field["a"] + field.get("b", ""), field.get("f")))
            for field in record.get_fields("740"):
                if field.indicators[1] == " ":
                    names.append((field["a"], None))
            for name, years in names:
                models.AltTitle.objects.get_or_create(name=name, date=years, title=title)

    def _extract(record: Any, tag: str, subfield: Optional[str] = None) -> Optional[str]:
        """Return a field's or subfield's text without punctuation at its end; None without it."""
        try:
            field = record[tag]
            return _clean(field[subfield] if subfield else field.data)
        except Exception:
            return None

    def _clean(value: str) -> str:
        return re.sub("[ /:,]+$", "", value)

    def _version(record: Any) -> datetime:
        """Return a record's time stamp; now, if it has none. A wrong one is a ValueError."""
        stamp = _extract(record, "005")
        if stamp is None:
            return timezone.now()
        parts = time.strptime(stamp.split(".")[0], "%Y%m%d%H%M%S")
        return timezone.make_aware(datetime(*parts[:6]))

    def _languages_in(joined: str) -> List[models.Language]:
        """Return the known ones of codes like "engfre"."""
        languages = []
        for start in range(0, len(joined), 3):
            code = joined[start : start + 3]
            try:
                languages.append(models.Language.objects.get(code=code))
            except models.Language.DoesNotExist:
                logging.error("missing language for %s", code)
        return languages

    def _unpack_link(field: Any) -> Tuple[str, Optional[str], Optional[str]]:
        """Return name, LCCN and OCLC number of a title that a record leads to."""
        lccn = oclc = None
        for value in field.get_subfields("w"):
            if value.startswith("(DLC)"):
                lccn = _normal_lccn(value.replace("(DLC)", ""))
            elif value.startswith("(OCoLC)"):
                oclc = _normal_oclc(value)
        return field.get("t") or field["a"], lccn, oclc

    def _normal_lccn(value: Optional[str]) -> Optional[str]:
        return None if value is None else value.replace(" ", "")

    def _normal_oclc(value: Any) -> str:
        number = value.replace(" ", "").replace("(OCoLC)", "")
        return number.lstrip("ocm").lstrip("0")

    def _normal_year(value: str) -> str:
        return "current" if value == "9999" else value.replace("u", "?")

    def _normal_place(value: Optional[str]) -> Optional[str]:
        return None if value is None else re.sub(r"\.$", "", value)

    def _is_openoni_electronic_resource(title: models.Title, record: Any) -> bool:
        if record["245"].get("h") != "[electronic resource]." or title.issues.exists():
            return False
        return any("chroniclingamerica" in url.value for url in title.urls.all())

    def load(location: str, bulk_load: bool = True) -> Tuple[int, int, int, int, int]:
        """Load a file; return how many records were processed, created, updated, and failed.

        The last number counts those without an LCCN.
        """
        loader = TitleLoader()
        logging.info("loading titles from: %s", location)
        loader.load_file(location)
        return (
            loader.records_processed,
            loader.records_created,
            loader.records_updated,
            loader.errors,
            loader.missing_lccns,
        )


@oni_file("core/management/commands/__init__.py")
def core_commands() -> None:
    """The commands. Only a BatchLoaderException becomes a CommandError.

    All else, such as a database that is down from the start, ends in a bare traceback.
    """
    import logging
    import os

    from django.conf import settings

    def configure_logging(log_file: str) -> None:
        """Write what is logged to a file, too. Each command's module calls this when imported."""
        path = os.path.join(settings.LOG_LOCATION, log_file)
        handler = logging.FileHandler(path, encoding="utf-8")
        form = "[%(asctime)s %(levelname)s %(name)s] %(message)s"
        handler.setFormatter(logging.Formatter(form))
        logging.getLogger().setLevel(logging.INFO)
        logging.getLogger().addHandler(handler)


@oni_file("core/management/commands/load_batch.py")
def core_load_batch() -> None:
    """load_batch PATH"""
    import logging
    import os

    from core.batch_loader import BatchLoader, BatchLoaderException
    from core.management.commands import configure_logging
    from django.core.management.base import BaseCommand, CommandError

    configure_logging(f"load_batch_{os.getpid()}.log")

    class Command(BaseCommand):
        def add_arguments(self, parser: Any) -> None:
            """Take two options that change nothing, since they are always on."""
            parser.add_argument("batch_path")
            for name in ("coordinates", "process-ocr"):
                parser.add_argument(f"--skip-{name}", action="store_true", default=True)

        def handle(self, batch_path: str, **options: Any) -> None:
            if not os.path.exists(batch_path):
                raise CommandError(f"Batch path does not exist: {batch_path}")
            loader = BatchLoader()
            try:
                loader.load_batch(batch_path)
            except BatchLoaderException as error:
                logging.exception(error)
                raise CommandError("Batch load failed. See logs/load_batch_#.log")


@oni_file("core/management/commands/purge_batch.py")
def core_purge_batch() -> None:
    """purge_batch NAME"""
    import logging
    import os

    from core.batch_loader import BatchLoader, BatchLoaderException
    from core.management.commands import configure_logging
    from django.core.management.base import BaseCommand, CommandError

    configure_logging(f"purge_batch_{os.getpid()}.log")

    class Command(BaseCommand):
        def add_arguments(self, parser: Any) -> None:
            parser.add_argument("batch_name")

        def handle(self, batch_name: str, **options: Any) -> None:
            loader = BatchLoader()
            logging.info("purging batch '%s'", batch_name)
            try:
                loader.purge_batch(batch_name)
            except BatchLoaderException as error:
                logging.exception(error)
                raise CommandError("unable to purge batch. check the purge_batch log for clues")


@oni_file("core/management/commands/load_titles.py")
def core_load_titles() -> None:
    """load_titles FILE|FOLDER. Of a folder the results are summed up, of a file not told."""
    import logging
    import os

    from core import solr_index, title_loader
    from core.management.commands import configure_logging
    from core.models import Title
    from django.core.management.base import BaseCommand
    from django.utils import timezone

    configure_logging("load_titles.log")

    class Command(BaseCommand):
        def add_arguments(self, parser: Any) -> None:
            parser.add_argument("marc_xml_source")
            parser.add_argument("--skip-index", action="store_true")

        def handle(self, marc_xml_source: str, skip_index: bool, **options: Any) -> None:
            if not os.path.isdir(marc_xml_source):
                self.load(marc_xml_source, skip_index)
                return
            started = timezone.now()
            results = [
                self.load(os.path.join(marc_xml_source, name), skip_index)
                for name in os.listdir(marc_xml_source)
            ]
            self.report(started, results)

        def load(self, location: str, skip_index: bool) -> Tuple[int, ...]:
            started = timezone.now()
            result = title_loader.load(location)
            if not skip_index:
                logging.info("indexing new titles")
                solr_index.index_titles(since=started)
            return result

        def report(self, started, results) -> None:
            ended = timezone.now()
            processed, created, updated, errors, keyless = [
                sum(column) for column in zip(*results)
            ] or [0] * 5
            logging.info("############### TOTAL RESULTS ############")
            logging.info("TITLE RECORDS PROCESSED: %i", processed)
            logging.info("NEW TITLES CREATED: %i", created)
            logging.info("EXISTING TITLES UPDATED: %i", updated)
            logging.info("ERRORS: %i", errors)
            logging.info("MISSING LCCNS: %i", keyless)
            logging.info("FILES PROCESSED: %i", len(results))
            not_updated = Title.objects.filter(version__lt=started).count()
            logging.info("TITLES NOT UPDATED: %i", not_updated)
            logging.info("START TIME: %s", started)
            logging.info("END TIME: %s", ended)
            logging.info("TOTAL TIME: %s", ended - started)


@oni_file("core/management/commands/index.py")
def core_index() -> None:
    """Puts all titles and pages into the search index."""

    from core.management.commands import configure_logging
    from core.solr_index import index_pages, index_titles
    from django.core.management.base import BaseCommand

    configure_logging("index.log")

    class Command(BaseCommand):
        def handle(self, **options: Any) -> None:
            index_titles()
            index_pages()


@oni_file("core/management/commands/zap_index.py")
def core_zap_index() -> None:
    """Empties the search index."""

    from core import solr_index
    from django.core.management.base import BaseCommand

    class Command(BaseCommand):
        def handle(self, **options: Any) -> None:
            solr = solr_index.conn()
            solr.delete(q="*:*")
            solr.commit()


ONI_PACKAGES = ("core", "core/management", "core/utils", "onisite", "onisite/database")
ONI_SETTINGS = """\
from .settings_base import *

if (BASE_DIR / "onisite" / "settings_local.py").exists():
    from .settings_local import *
"""
# Open ONI's languages, each as its code, the end of its address (at lexvo.org where it begins
# with "=", "-" if it has none), and its name.
LANGUAGES = """\
alb sq Albanian; amh am Amharic; ara ar Arabic; arm hy Armenian; baq eu Basque; bel be Belarussian;
ben bn Bengali; bos bs Bosnian; bul bg Bulgarian; bur my Burmese; ceb ceb Cebuano; che ce Chechen;
chi gan Chinese; cho cho Choctaw; chr chr Cherokee;
cpf cpf Creoles and Pidgins, French-based (Other); cre cr Cree; crp - Creoles and Pidgins;
cze cs Czech; dak dak Dakota; dan da Danish; dut nl Dutch; eng en English; epo eo Esperanto;
esk =esk Northwest Alaska Inupiatun; est et Estonian; fin fi Finnish; fre fr French;
gem - Germanic; ger de German; gle ga Irish; gre el Greek; guj gu Gujarati; haw haw Hawaiian;
heb he Hebrew; hin hi Hindi; hmn hmn Hmong; hrv =hrv Croatian; hun hu Hungarian; ilo ilo Iloko;
ind id Indonesian; ipk ik Inupiaq; ira ira Iranian; ita it Italian; jpn ja Japanese; khm km Khmer;
kor ko Korean; kur ku Kurdish; lad lad Ladino; lav lv Latvian; lit lt Lithuanian;
mac mk Macedonian; mal ml Malayalam; map - Austronesian (Other); mar mr Marathi; moh moh Mohawk;
mul - Multiple; mus mus Creek; nav nv Navajo; nch =nch Central Huasteca Nahuatl; neg =neg Negidal;
nor no Norwegian; pan pa Panjabi; per fa Persian; pol pl Polish; por pt Portuguese;
psa =psa Asue Awyu; rum ro Romanian; rus ru Russian; sam sam Samaritan Aramaic; scc sr Serbian;
scr hr Croatian; slo sk Slovak; slv sl Slovenian; smo sm Samoan; spa es Spanish; srp =srp Serbian;
swe sv Swedish; syr syr Syriac; tam ta Tamil; tgk tg Tajik; tgl tl Tagalog; tha th Thai;
tur tr Turkish; ukr uk Ukrainian; urd ur Urdu; uzb uz Uzbek; vie vi Vietnamese; wel cy Welsh;
wen - Sorbian; yid yi Yiddish; ypk ypk Yupik; zxx - No Linguistic Content
"""
COUNTRIES = {
    "Asia": """\
af Afghanistan; ai Armenia (Republic); aj Azerbaijan; ba Bahrain; bg Bangladesh; bt Bhutan;
bx Brunei; br Burma; cb Cambodia; cc China; ch China (Republic : 1949- ); cy Cyprus; em East Timor;
gz Gaza Strip; gs Georgia (Republic); ii India; io Indonesia; ir Iran; iq Iraq;
iy Iraq-Saudi Arabia Neutral Zone; is Israel; ja Japan; jo Jordan; kz Kazakhstan; kn Korea (North);
ko Korea (South); ku Kuwait; kg Kyrgyzstan; ls Laos; le Lebanon; my Malaysia; mp Mongolia;
np Nepal; mk Oman; pk Pakistan; pp Papua New Guinea; pf Paracel Islands]; ph Philippines; qa Qatar;
su Saudi Arabia; si Singapore; xp Spratly Island; ce Sri Lanka; sy Syria; ta Tajikistan;
th Thailand; tu Turkey; tk Turkmenistan; ts United Arab Emirates; uz Uzbekistan; vm Vietnam;
wj West Bank of the Jordan River; ye Yemen
""",
    "North America": """\
alu Alabama; aku Alaska; abc Alberta; azu Arizona; aru Arkansas; bcc British Columbia;
cau California; xxc Canada; cou Colorado; ctu Connecticut ; deu Delaware; dcu District of Columbia;
flu Florida; gau Georgia; gl Greenland; hiu Hawaii; idu Idaho; ilu Illinois; inu Indiana; iau Iowa;
ksu Kansas; kyu Kentucky; lau Louisiana; meu Maine; mbc Manitoba; mdu Maryland; mau Massachusetts;
mx Mexico; miu Michigan; mnu Minnesota; msu Mississippi; mou Missouri; mtu Montana; nbu Nebraska;
nvu Nevada; nkc New Brunswick; nhu New Hampshire; nju New Jersey; nmu New Mexico; nyu New York;
nfc Newfoundland and Labrador; ncu North Carolina; ndu North Dakota; ntc Northwest Territories;
nsc Nova Scotia; nuc Nunavut; ohu Ohio; oku Oklahoma; onc Ontario; oru Oregon; pau Pennsylvania;
pic Prince Edward Island; quc Québec (Province); riu Rhode Island; xl Saint Pierre and Miquelon;
snc Saskatchewan; scu South Carolina; sdu South Dakota; tnu Tennessee; txu Texas;
xxu United States; utu Utah; vtu Vermont; vau Virginia; wau Washington; wvu West Virginia;
wiu Wisconsin; wyu Wyoming; ykc Yukon Territory
""",
    "Europe": """\
aa Albania; an Andorra; au Austria; bw Belarus; be Belgium; bn Bosnia and Hercegovina; bu Bulgaria;
ci Croatia; xr Czech Republic; dk Denmark; enk England; er Estonia; fi Finland; fr France;
gw Germany; gi Gibraltar; gr Greece; hu Hungary; ic Iceland; ie Ireland; it Italy; kv Kosovo;
lv Latvia; lh Liechtenstein; li Lithuania; lu Luxembourg; xn Macedonia; mm Malta; mv Moldova;
mc Monaco; mo Montenegro; ne Netherlands; nik Northern Ireland; no Norway; pl Poland; po Portugal;
rm Romania; ru Russia (Federation); sm San Marino; stk Scotland; rb Serbia; xo Slovakia;
xv Slovenia; sp Spain; sw Sweden; sz Switzerland; un Ukraine; xxk United Kingdom;
uik United Kingdom Misc. Islands; vc Vatican City; wlk Wales
""",
    "Africa": """\
ae Algeria; ao Angola; dm Benin; bs Botswana; uv Burkina Faso; bd Burundi; cm Cameroon;
cx Central African Republic; cd Chad; cf Congo (Brazzaville); cg Congo (Democratic Republic);
iv Côte d'Ivoire; ft Djibouti; ua Egypt; eg Equatorial Guinea; ea Eritrea; et Ethiopia; go Gabon;
gm Gambia; gh Ghana; gv Guinea; pg Guinea-Bissau; ke Kenya; lo Lesotho; lb Liberia; ly Libya;
mg Madagascar; mw Malawi; ml Mali; mu Mauritania; mr Morocco; mz Mozambique; sx Namibia; ng Niger;
nr Nigeria; rw Rwanda; sf Sao Tome and Principe; sg Senegal; sl Sierra Leone; so Somalia;
sa South Africa; sh Spanish North Africa; sj Sudan; sq Swaziland; tz Tanzania; tg Togo; ti Tunisia;
ug Uganda; ss Western Sahara ; za Zambia; rh Zimbabwe
""",
    "Pacific Ocean": """\
as American Samoa; cw Cook Islands; fj Fiji; fp French Polynesia; gu Guam; ji Johnston Atoll;
gb Kiribati; xe Marshall Islands; fm Micronesia (Federated States); xf Midway Islands; nu Nauru;
nl New Caledonia; xh Niue; nw Northern Mariana Islands; pw Palau; pc Pitcairn Island; ws Samoa;
bp Solomon Islands; tl Tokelau; to Tonga; tv Tuvalu; up United States Misc. Pacific Islands;
nn Vanuatu; wk Wake Island; wf Wallis and Futuna
""",
    "West Indies": """\
am Anguilla; aq Antigua and Barbuda; aw Aruba; bf Bahamas; bb Barbados; vb British Virgin Islands;
cj Cayman Islands; cu Cuba; dq Dominica; dr Dominican Republic; gd Grenada; gp Guadeloupe;
ht Haiti; jm Jamaica; mq Martinique; mj Montserrat; na Netherlands Antilles; pr Puerto Rico;
xd Saint Kitts-Nevis; xk Saint Lucia; xm Saint Vincent and the Grenadines; tr Trinidad and Tobago;
tc Turks and Caicos Islands; uc United States Misc. Caribbean Islands;
vi Virgin Islands of the United States
""",
    "Other": """\
ay Antarctica; xx No place, unknown, or undetermined; vp Various places
""",
    "South America": """\
ag Argentina; bo Bolivia; bl Brazil; cl Chile; ck Colombia; ec Ecuador; fg French Guiana;
gy Guyana; py Paraguay; pe Peru; sr Surinam; uy Uruguay; ve Venezuela
""",
    "Australasia": """\
at Australia; aca Australian Capital Territory; xga Coral Sea Islands Territory;
xna New South Wales; nz New Zealand; nx Norfolk Island ; xoa Northern Territory; qea Queensland;
xra South Australia; tma Tasmania; vra Victoria; wea Western Australia
""",
    "Central America": """\
bh Belize; cr Costa Rica; es El Salvador; gt Guatemala; ho Honduras; nq Nicaragua; pn Panama
""",
    "Atlantic Ocean": """\
bm Bermuda Islands; bv Bouvet Island; cv Cape Verde; fk Falkland Islands; fa Faroe Islands;
xj Saint Helena; xs South Georgia and the South Sandwich Islands
""",
    "Indian Ocean": """\
bi British Indian Ocean Territory; xa Christmas Island (Indian Ocean); xb Cocos (Keeling) Islands;
cq Comoros; hm Heard and McDonald Islands; xc Maldives; mf Mauritius; ot Mayotte; re Réunion;
se Seychelles; fs Terres australes et antarctiques françaises
""",
}


def fixture(model: str, rows: List[Dict[str, Optional[str]]]) -> str:
    """The text of a fixture for Django's loaddata; the rows' `code` is their key."""
    return json.dumps([{"model": model, "pk": row["code"], "fields": row} for row in rows])


def languages_fixture() -> str:
    """All languages that Open ONI comes with."""
    rows: List[Dict[str, Optional[str]]] = []
    for entry in LANGUAGES.split(";"):
        code, end, name = entry.split(None, 2)
        address: Optional[str] = f"http://www.lingvoj.org/lang/{end}"
        if end.startswith("="):
            address = f"http://www.lexvo.org/page/iso639-3/{end[1:]}"
        elif end == "-":
            address = None
        rows.append({"code": code, "name": name.strip(), "lingvoj": address})
    return fixture("core.language", rows)


def countries_fixture() -> str:
    """All countries that Open ONI comes with."""
    rows: List[Dict[str, Optional[str]]] = []
    for region, entries in COUNTRIES.items():
        for entry in entries.split(";"):
            code, name = entry.split(None, 1)
            rows.append({"code": code, "name": name.strip(), "region": region})
    return fixture("core.country", rows)


@oni_file("seed.py")
def oni_seed() -> None:
    """Fills a new tree's database: tables, languages and countries, an awardee and two titles."""
    from datetime import datetime, timezone

    from core.models import Awardee, Title
    from django.core.management import call_command

    call_command("migrate", run_syncdb=True, verbosity=0)
    call_command("loaddata", "languages", "countries", verbosity=0)
    Awardee.objects.create(org_code="oru", name="University of Oregon Libraries; Eugene, OR")
    for lccn, name in ("sn99990001", "The test gazette."), ("sn99990002", "The test courier."):
        title = Title.objects.create(
            lccn=lccn,
            lccn_orig=lccn,
            name=name,
            name_normal=name.lower(),
            place_of_publication="Eugene, Or.",
            start_year=1850,
            end_year=1999,
            country_id="oru",
            version=datetime(2020, 1, 1, tzinfo=timezone.utc),
        )
        title.languages.set(["eng"])


def build_oni(root: Path) -> None:
    """Writes a stand-in Open ONI into `root`: its tree, ENV and database.

    The folder may be copied anywhere afterwards.
    """
    texts = {f"{package}/__init__.py": "" for package in ONI_PACKAGES}
    texts["onisite/settings.py"] = ONI_SETTINGS
    texts["core/fixtures/languages.json"] = languages_fixture()
    texts["core/fixtures/countries.json"] = countries_fixture()
    texts.update({path: body_of(function) for path, function in ONI_FILES.items()})
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "manage.py").write_text("#!/usr/bin/env python3\n" + texts["manage.py"])
    (root / "manage.py").chmod(0o755)
    for folder in ("log", "data/batches", "data/word_coordinates", "cache"):
        (root / folder).mkdir(parents=True)
    build_env(root / "ENV")
    # -B: compiled files would say where they were compiled.
    subprocess.run(
        [str(root / "ENV/bin/python3"), "-B", "manage.py", "shell", "-c", "import seed"],
        cwd=str(root),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    (root / "seed.py").unlink()


def build_env(env: Path) -> None:
    """A virtual environment that borrows the running Python's packages.

    It does not say where it stands.
    """
    venv.EnvBuilder(symlinks=True).create(env)
    borrowed = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    site_packages = next(env.glob("lib/python3*/site-packages"))
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    lines = (env / "pyvenv.cfg").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("command")]
    (env / "pyvenv.cfg").write_text("".join(kept))
    for script in env.glob("bin/[Aa]ctivate*"):
        script.unlink()


# --- The README's exchanges, and the demo ---------------------------------------------------------

README = AGENT.with_name("README.md")
README_WORDS = 1800  # at most, as `wc -w` counts them


def readme_section(heading: str) -> str:
    """What the README says under a heading."""
    return README.read_text().split(f"\n## {heading}\n", 1)[1].split("\n## ")[0]


def readme_block(first: str) -> str:
    """The indented block of the README that has a line which begins so."""
    blocks = re.findall(r"(?:^    .*\n)+", README.read_text(), re.MULTILINE)
    (found,) = (each for each in blocks if re.search(f"(?m)^ +{re.escape(first)}", each))
    return textwrap.dedent(found)


def demo_site(folder: Path, template: Path) -> Site:
    """A site with a small batch, a slow one, one that ONI loads with a hole, and two faults."""
    site = Site(folder, template)
    site.environment["ONI_PAGE_SECONDS"] = "0.1"
    site.batch("batch_oru_small_ver01", issues=2, pages=2)
    site.batch("batch_oru_slow_ver01", issues=60, pages=5, start=date(1910, 1, 1))
    spoil_edition(site.batch("batch_oru_hole_ver01", issues=4, pages=1, start=date(1920, 1, 1)))
    two = site.batch("batch_oru_faults_ver01", issues=3, pages=2, start=date(1930, 1, 1))
    spoil_sequence(two)
    page_file(two, "0002.xml", 2).unlink()
    (folder / "herald.xml").write_bytes(marc_xml(wrapped=True))
    return site


def shell(site: Site, folder: Path, line: str) -> str:
    """What a command of the README prints, with this site's port and key for the README's."""
    words = shlex.join(site.ssh_words()[:-1])
    line = line.replace("ssh -T oni", f"{words} nobody@127.0.0.1")
    asks_for_text = "" if "<" in line else " -tt"  # as RequestTTY does in the alias's settings
    line = line.replace("ssh oni", f"{words}{asks_for_text} nobody@127.0.0.1")
    return (
        subprocess.run(
            line,
            shell=True,
            env={**os.environ, "TERM": "dumb"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            timeout=60,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        .stdout.decode()
        .replace("\r\n", "\n")
    )


def readme_exchanges() -> list[tuple[str, str]]:
    """Every `$ ssh …` line of the README, and the lines under it."""
    blocks = re.findall(r"^```console\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE)


DEMO_NEEDS = {  # modules, and what pip calls them
    "django": "django",
    "lxml": "lxml",
    "PIL": "pillow",
    "pymarc": "pymarc",
    "pysolr": "pysolr",
}
DEMO_PORT = 2299  # not an installed agent's, whose host key ssh remembers
DEMO_SSH = """\
Host oni
    HostName 127.0.0.1
    Port {port}
    User nobody
    RequestTTY yes
    LogLevel QUIET
    StrictHostKeyChecking accept-new
    UserKnownHostsFile {folder}/known_hosts
"""
DEMO = """\

A stand-in Open ONI with four batches, and an ONI Agent on it that listens.
In another terminal, open the board (q leaves it):

    {ssh}

In a third, queue a load that takes half a minute, and one that waits for it:

    {ssh} load-batch batch_oru_slow_ver01
    {ssh} load-batch batch_oru_small_ver01
    {ssh} job-wait 1

ONI would drop an issue of this one, and not say so; and here are two faults:

    {ssh} load-batch batch_oru_hole_ver01
    {ssh} batch-check batch_oru_faults_ver01

More:

    {ssh} list-batches
    {ssh} help

The agent's log is {folder}/log. Ctrl-C ends all, and removes it.
"""
DEMO_ONCE = (  # each with what it answers if all is well
    ("load-batch batch_oru_small_ver01", "Job added to queue"),
    ("job-wait 1", "Success: this job is complete."),
    ("job-logs 1", "successful"),
    ("purge-batch batch_oru_small_ver01", "Job added to queue"),
    ("job-wait 2", "Success: this job is complete."),
    ("list-jobs", "successful"),
)


def demo(once: bool) -> int:
    """An agent on a stand-in site: until Ctrl-C, or for one whole exchange; the exit status."""
    missing = [each for name, each in DEMO_NEEDS.items() if not importlib.util.find_spec(name)]
    if missing:
        words = " ".join(missing)
        print(f"The stand-in Open ONI needs {words}: {sys.executable} -m pip install {words}")
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way all is tidied up
    print("Building a stand-in Open ONI takes a few seconds.", flush=True)
    with tempfile.TemporaryDirectory(prefix="oni-demo-") as name:
        folder = Path(name)
        build_oni(folder / "template")
        with demo_site(folder, folder / "template") as site:
            try:
                site.start(BA_BIND=f"127.0.0.1:{DEMO_PORT}", LOG_LEVEL="info")
            except AssertionError:  # another demo has it
                site.start(BA_BIND="127.0.0.1:0")
            (folder / "ssh").write_text(DEMO_SSH.format(folder=folder, port=site.port))
            ssh = f"ssh -F {folder}/ssh oni"
            if once:
                return demo_once(folder, ssh)
            print(DEMO.format(folder=folder, ssh=ssh), flush=True)
            keep_log(site, folder / "log")
    return 0


def demo_once(folder: Path, ssh: str) -> int:
    """A whole exchange, printed; 1 if something in it is not as it should be."""
    for line, wanted in DEMO_ONCE:
        said = subprocess.run(
            shlex.split(f"{ssh} {line}".replace("ssh", "ssh -tt", 1)),
            env={**os.environ, "TERM": "dumb"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=90,
        ).stdout.decode()
        print(f"$ {ssh} {line}\n{said}", flush=True)
        if wanted not in said:
            print(f"✗ that should say: {wanted}")
            return 1
    print("✓ all of it as it should be")
    return 0


def keep_log(site: Site, path: Path) -> None:
    """Writes the agent's log to a file as it grows, until Ctrl-C or the agent's end."""
    kept = 0
    with contextlib.suppress(KeyboardInterrupt), open(path, "w") as file:
        while site.agent.poll() is None:
            with site._news:
                site._news.wait_for(lambda: len(site.log) > kept, 1)
            print("".join(site.log[kept:]), end="", file=file, flush=True)
            kept = len(site.log)
        print("The agent has ended:\n" + "".join(site.log[-5:]))


def record() -> None:
    """Makes the README's exchanges anew."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_oni(folder / "template")
        site = demo_site(folder, folder / "template").start()
        done = ""
        text = README.read_text()
        try:
            for line, printed in readme_exchanges():
                said = shell(site, folder, line).replace(str(folder), "/srv")
                before, text = text.split(f"$ {line}\n{printed}", 1)
                done += f"{before}$ {line}\n{said}"
        finally:
            site.clean_up()
        README.write_text(done + text)


# --- The acceptance test: --site ------------------------------------------------------------------

STAGING_CODE = "oniagenttest"
STAGING_LCCN = "sn00oniagt"
STAGING_TITLE = "The ONI Agent's test gazette."
STAGING_SECONDS = 180  # for one step
STAGING_MODELS = """
import json, os, shutil
from django.conf import settings
from django.core.management import call_command
from core import solr_index
from core.models import Awardee, Batch, Issue, LoadBatchEvent, Page, Title

PREFIX = "batch_%s_" % CODE
COORDINATES = os.path.join(settings.COORD_STORAGE, "lccn")

def links():
    return [name for name in os.listdir(settings.BATCH_STORAGE) if name.startswith(PREFIX)]

def batches():
    return Batch.objects.filter(name__startswith=PREFIX) | Batch.objects.filter(awardee_id=CODE)

def documents():
    found = solr_index.conn().search('lccn:"%s"' % LCCN, rows=1000, fl="id")
    return [document["id"] for document in found]

def look():
    '''All that there is in this Open ONI by the names of the test.'''
    events = LoadBatchEvent.objects.filter(batch_name__startswith=PREFIX)
    coordinates = os.path.join(COORDINATES, LCCN)
    files = [name for _, _, names in os.walk(coordinates) for name in names]
    return {
        "awardee": [row.org_code for row in Awardee.objects.filter(org_code=CODE)],
        "title": [row.lccn for row in Title.objects.filter(lccn=LCCN)],
        "batch": [row.name for row in batches()],
        "issue": [str(row.date_issued) for row in Issue.objects.filter(title_id=LCCN)],
        "page": [row.pk for row in Page.objects.filter(issue__title_id=LCCN)],
        "event": sorted({row.batch_name for row in events}),
        "document in Solr": documents(),
        "link": links(),
        "file of coordinates": files,
    }

def lose_page(batch):
    Page.objects.filter(issue__batch_id=batch).first().delete()

def lose_documents(batch):
    change_index('batch:"%s"' % batch)

def change_index(query):
    solr = solr_index.conn()
    solr.delete(q=query)
    solr.commit()

def tidy():
    '''Removes all that there is; whatever fails, the rest is done all the same. What failed.'''
    failures = []

    def attempt(action, *words):
        try:
            action(*words)
        except Exception as error:
            failures.append(str(error))

    for batch in batches():
        attempt(call_command, "purge_batch", batch.name)
    attempt(change_index, 'lccn:"%s"' % LCCN)
    for name in links():
        if os.path.islink(os.path.join(settings.BATCH_STORAGE, name)):
            os.remove(os.path.join(settings.BATCH_STORAGE, name))
    shutil.rmtree(os.path.join(COORDINATES, LCCN), ignore_errors=True)
    if os.path.isdir(COORDINATES) and not os.listdir(COORDINATES):
        os.rmdir(COORDINATES)
    LoadBatchEvent.objects.filter(batch_name__startswith=PREFIX).delete()
    if not Issue.objects.filter(title_id=LCCN).exists():
        Title.objects.filter(lccn=LCCN).delete()
    if not batches().exists():
        Awardee.objects.filter(org_code=CODE).delete()
    return failures

answer = globals()[QUESTION](*WORDS)
print("\\nANSWER " + json.dumps(answer))
"""


class Wrong(AssertionError):
    """A step of the acceptance test did not come out as it should; the text says how."""


def expect(what: str, found: object, wanted: object) -> None:
    """Raises Wrong unless something is what it should be."""
    if found != wanted:
        raise Wrong(f"{what}: {found!r}, and should be {wanted!r}")


class Staging(Site):
    """An Open ONI of somebody else's, and an agent of the acceptance test's own on it.

    Batches and the agent's state are in a temporary folder. The agent and manage.py get the
    environment that the test was given.
    """

    def __init__(self, location: Path, folder: Path):
        self.oni = location.resolve()
        self.source = folder / "batches"
        self.state = folder / "state"
        self.source.mkdir()
        self.given = {
            name: value
            for name, value in os.environ.items()
            if name not in (*oni_agent.OWN_VARIABLES, "NOTIFY_SOCKET", "JOURNAL_STREAM")
        }
        self.environment = {
            **self.given,
            "ONI_LOCATION": str(self.oni),
            "BATCH_SOURCE": str(self.source),
            "STATE_DIRECTORY": str(self.state),
            "BA_BIND": "127.0.0.1:0",
        }
        self._begin()

    def is_own(self, words: list[str]) -> bool:
        """Not what other people's agents, or people, have at work in this Open ONI."""
        ours = any(f"_{STAGING_CODE}_" in word or str(self.state) in word for word in words)
        return ours and super().is_own(words)

    def clean_up(self) -> None:
        """Leaves no process behind."""
        if self.agent and self.agent.poll() is None:
            self.kill()
        until(self._is_still)

    def _is_still(self) -> bool:
        """Whether nothing is at work any more; kills what is."""
        pids = self.manage_pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    def models(self, question: str, *words: str):
        """What a function of STAGING_MODELS answers, asked without the agent."""
        names = {
            "CODE": STAGING_CODE,
            "LCCN": STAGING_LCCN,
            "QUESTION": question,
            "WORDS": words,
        }
        env = self.oni / "ENV"
        path = f"{env / 'bin'}:{self.given.get('PATH', os.defpath)}"
        done = subprocess.run(
            ["python3", "manage.py", "shell", "-c", f"exec({STAGING_MODELS!r}, {names!r})"],
            cwd=self.oni,
            env={**self.given, "PATH": path, "VIRTUAL_ENV": str(env)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        answers = re.findall(rb"^ANSWER (.*)$", done.stdout, re.MULTILINE)
        if done.returncode or not answers:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
            raise Wrong(f"manage.py shell, asked to {question}, said: {said[-1]}")
        return json.loads(answers[-1])

    def held_names(self) -> str:
        """What Open ONI has by the names of the test, as a sentence says it."""
        held = self.models("look")
        return "; ".join(f"{kind} {', '.join(map(str, held[kind]))}" for kind in held if held[kind])

    # -- what steps need

    def staged(self, name: str, issues: int = 2) -> Path:
        """A batch whose pages no other batch of the test has."""
        day = date(1905, 1, 1) + timedelta(days=100 * len(os.listdir(self.source)))
        full_name = f"batch_{STAGING_CODE}_{name}_ver01"
        return self.batch(full_name, issues=issues, lccn=STAGING_LCCN, start=day)

    def succeed(self, *words: str, stdin: bytes | None = None) -> int:
        """A command's job, which must succeed; its id."""
        job = self.run(*words, stdin=stdin)
        expect(f"{' '.join(words)} ended {job.get('error', '')}", job["status"], "successful")
        return job["id"]

    def fail(self, id: int, error: str) -> None:
        """A job must end unsuccessful, with an error of this pattern."""
        job = self.ended(id)
        expect(f"job {id} ended", job["status"], "failed")
        if not re.search(error, job["error"]):
            raise Wrong(f"job {id} failed as it should, but says: {job['error']}")

    def expect_state(self, batch: Path, wanted: str) -> None:
        """The agent must call a batch absent, partial or complete."""
        reply = self.call("batch-status", batch.name)
        if "batch" not in reply:
            raise Wrong(f"batch-status of {batch.name}: {reply}")
        expect(f"{batch.name}, of which {reply['message']}", reply["batch"]["state"], wanted)

    def expect_whole(self, batch: Path, issues: int = 2) -> None:
        """The agent must call a batch complete, with so many issues of two pages."""
        self.expect_state(batch, "complete")
        held = self.call("batch-status", batch.name)["batch"]
        counts = [held["issues"], held["pages"], held["pages_in_solr"]]
        wanted = [issues, 2 * issues, 2 * issues]
        expect(f"issues, pages and documents of {batch.name}", counts, wanted)

    def held_load(self, batch: Path) -> tuple[int, Gate]:
        """Begins a load, and holds it at its last issue; the job's id, and the gate.

        A gate would be refused by the agent's check of the files, so it comes after that, while
        manage.py is starting or at the issues before.
        """
        id = self.job("load-batch", batch.name)
        until(lambda: self.manage_pids("load_batch") or self._has_ended(id))
        gate = self.hold(page_file(batch, "0001.xml", issue=-1))
        until(lambda: gate.is_reached() or self._has_ended(id))
        if self._has_ended(id):
            job = self.ended(id)
            said = f"{job['status']} {job.get('error', '')}"
            raise Wrong(f"the load of {batch.name} was over before it could be held: {said}")
        return id, gate

    def _has_ended(self, id: int) -> bool:
        """Whether the agent's log says so; asking the agent takes longer."""
        return any(re.search(rf"job={id} .*status=", line) for line in self.log)


# The docstring of a step is what the line about it says.


def step_check(site: Staging) -> None:
    """the agent's own --check finds nothing wrong"""
    status, out, err = run_agent("--check", **site.environment)
    if status:
        wrong = re.findall("^✗ (.*)$", out, re.MULTILINE)
        raise Wrong("; ".join(wrong) or err)


def step_names(site: Staging) -> None:
    """Open ONI has nothing by the names of this test"""
    taken = site.held_names()
    if taken:
        raise Wrong(
            f"it has {taken}. If an earlier run has left this behind, remove it: purge_batch each"
            f" batch; then delete the title {STAGING_LCCN} and the awardee {STAGING_CODE}, and the"
            " events of these batches, in manage.py shell"
        )


def step_asking(site: Staging) -> None:
    """an agent starts and answers, and Open ONI answers it"""
    site.start()
    expect("version", site.call("version").get("version"), oni_agent.VERSION)
    expect("list-batches", site.call("list-batches")["status"], "success")
    site.expect_state(site.staged("asked"), "absent")


def step_title(site: Staging) -> None:
    """a title is loaded"""
    site.succeed("load-title", stdin=marc_xml(STAGING_LCCN, STAGING_TITLE))
    expect("titles in Open ONI", site.models("look")["title"], [STAGING_LCCN])


def step_awardee(site: Staging) -> None:
    """an awardee is made, once"""
    said = [
        site.call("ensure-awardee", STAGING_CODE, *name)["message"]
        for name in ([], ["ONI Agent's test"], ["ONI Agent's test"], [])
    ]
    there = "Awardee already exists"
    expect("answers", said, ["Unable to create awardee", "Awardee created", there, there])
    expect("awardees in Open ONI", site.models("look")["awardee"], [STAGING_CODE])


def step_load(site: Staging) -> None:
    """a batch is loaded: its rows, its documents, its coordinates"""
    batch = site.staged("loaded")
    site.succeed("load-batch", batch.name)
    site.expect_whole(batch)
    held = site.models("look")
    counts = [len(held[kind]) for kind in ("batch", "issue", "page", "file of coordinates")]
    expect("batches, issues, pages, files in Open ONI", counts, [1, 2, 4, 4])
    pages = [id for id in held["document in Solr"] if "seq" in id]
    expect("documents of pages in Solr", len(pages), 4)


def step_no_op(site: Staging) -> None:
    """what is loaded already is no job"""
    [name] = site.models("look")["batch"]
    expect("job", site.call("load-batch", name).get("job"), {"id": -1})


def step_silent_fault(site: Staging) -> None:
    """a fault that Open ONI would keep quiet about is refused"""
    batch = site.staged("faulty")
    spoil_edition(batch)
    error = "ONI would leave this issue out: invalid literal for int"
    site.fail(site.job("load-batch", batch.name), error)
    site.expect_state(batch, "absent")


def step_hole(site: Staging) -> None:
    """a page missing in the database is noticed, and mended by a load"""
    batch = site.staged("hole")
    site.succeed("load-batch", batch.name)
    site.models("lose_page", batch.name)
    site.expect_state(batch, "partial")
    site.succeed("load-batch", batch.name)
    site.expect_whole(batch)


def step_index(site: Staging) -> None:
    """pages missing in the search index are noticed, and mended by a load"""
    batch = site.staged("unindexed")
    site.succeed("load-batch", batch.name)
    site.models("lose_documents", batch.name)
    site.expect_state(batch, "partial")
    site.succeed("load-batch", batch.name)
    site.expect_whole(batch)


def step_killed_load(site: Staging) -> None:
    """a load that was killed is failed, and the next one loads the whole batch"""
    batch = site.staged("killed", issues=12)
    id, gate = site.held_load(batch)
    kill_at(site, gate, "load_batch")
    site.fail(id, "killed by signal 9")
    site.expect_state(batch, "partial")
    site.succeed("load-batch", batch.name)
    site.expect_whole(batch, issues=12)


def step_killed_agent(site: Staging) -> None:
    """the agent is killed, and the next one adopts the load that goes on"""
    batch = site.staged("adopted", issues=12)
    id, gate = site.held_load(batch)
    site.restart()
    site.wait_for(f"job={id} adopted")
    gate.open()
    expect("the job", site.ended(id)["status"], "successful")
    expect("starts of the job", site.ended(id)["attempts"], 1)
    site.expect_whole(batch, issues=12)


def step_cancel(site: Staging) -> None:
    """a load that is cancelled leaves nothing of the batch"""
    batch = site.staged("cancelled", issues=12)
    id, gate = site.held_load(batch)
    expect("job-cancel", site.call("job-cancel", str(id))["status"], "success")
    site.fail(id, "^cancelled")
    gate.open()
    site.expect_state(batch, "absent")


def step_patch(site: Staging) -> None:
    """a batch is patched, and the new one loaded in its place"""
    old = site.staged("patched", issues=3)
    new = old.with_name(old.name.replace("ver01", "ver02"))
    site.succeed("load-batch", old.name)
    issue = mets_of(old).parent.name
    instructions = f"RemoveIssue {STAGING_LCCN}/{issue}\n".encode()
    site.succeed("batch-patch", old.name, new.name, stdin=instructions)
    site.succeed("purge-batch", old.name)
    site.succeed("load-batch", new.name)
    site.expect_whole(new)


def step_purge(site: Staging) -> None:
    """all batches are purged, and nothing of them is left in database or index"""
    names = site.models("look")["batch"]
    for name in names:
        site.succeed("purge-batch", name)
        expect("a second purge", site.call("purge-batch", name).get("job"), {"id": -1})
    held = site.models("look")
    del held["awardee"], held["title"], held["event"]
    title = f"/lccn/{STAGING_LCCN}/"
    held["document in Solr"] = [id for id in held["document in Solr"] if id != title]
    expect("Open ONI has", {kind: each for kind, each in held.items() if each}, {})


def step_tidy(site: Staging) -> None:
    """the site is as it was"""
    site.clean_up()
    failures = site.models("tidy")
    left = site.held_names()
    if left:
        raise Wrong(f"Open ONI still has {left}; {'; '.join(failures)}")


STEPS_BEFORE = (step_check, step_names)
STEPS_NEEDED = (step_asking, step_title, step_awardee, step_load)
STEPS = (
    step_no_op,
    step_silent_fault,
    step_hole,
    step_index,
    step_killed_load,
    step_killed_agent,
    step_cancel,
    step_patch,
    step_purge,
)


def went_well(step: Callable[[Staging], None], site: Staging) -> bool:
    """Takes a step, and prints a line on it; whether it came out as it should."""

    def late(*_):
        raise Wrong(f"it took longer than {STAGING_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(STAGING_SECONDS)
    begun = time.monotonic()
    problem = ""
    try:
        step(site)
    except Exception as error:
        printed = getattr(error, "stderr", None) or b""  # of a command that failed
        text = f"{error or type(error).__name__} {printed.decode('utf-8', 'replace')}"
        problem = f"\n             {text.strip()}"
    finally:
        signal.alarm(0)
    took = time.monotonic() - begun
    print(f"{'✗' if problem else '✓'} {took:7.1f} s  {step.__doc__}{problem}", flush=True)
    return not problem


def accept(location: Path) -> int:
    """The acceptance test of an agent on an Open ONI; the exit status.

    It leaves nothing there but the log files of the manage.py commands that were run, also when it
    fails or is interrupted.
    """

    def interrupt(*_):
        raise KeyboardInterrupt

    sys.stdout.reconfigure(errors="replace")  # not every terminal has a check mark
    on_interruptions(interrupt)
    with tempfile.TemporaryDirectory(prefix="oni-agent-test-") as name:
        try:
            go_on_as_site_user(location, Path(name))
            site = Staging(location, Path(name))
            if not all(went_well(step, site) for step in STEPS_BEFORE):
                return 1
        except KeyboardInterrupt:
            on_interruptions(signal.SIG_IGN)
            print("✗ interrupted")
            return 1
        well = took_all_steps(site)
        return 0 if well else 1


def go_on_as_site_user(location: Path, folder: Path) -> None:
    """As root, becomes the user that the site runs as, with an agent that this user can read.

    The clone that this file is in may be in root's home.
    """
    global AGENT
    account = oni_agent.site_account(location)
    if account:
        AGENT = Path(shutil.copy(AGENT, folder / AGENT.name))
        for path in (folder, AGENT):
            os.chown(path, account.uid, account.gid)
        os.chdir(folder)
        oni_agent.become(account)
        print(f"started as root; goes on as {account.name}, as whom the site runs", flush=True)


def on_interruptions(handler) -> None:
    """What Ctrl-C does from here on, and being told to end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def took_all_steps(site: Staging) -> bool:
    """Takes the steps that change something, and goes all the way back; whether all is well."""
    well = False
    try:
        well = all(went_well(step, site) for step in STEPS_NEEDED)
        if not well:
            print("             without that, the rest was not tried")
        else:
            for step in STEPS:
                well = went_well(step, site) and well
    except KeyboardInterrupt:
        well = False
        print("✗ interrupted; a moment, the site is being tidied up", flush=True)
    finally:
        on_interruptions(signal.SIG_IGN)  # what is begun here is to be ended
        tidied = went_well(step_tidy, site)
    return well and tidied


# --- How fast it is -------------------------------------------------------------------------------

BENCH_GO = r"""
package main

import (
	"fmt"
	"golang.org/x/crypto/ssh"
	"os"
	"sort"
	"time"
)

func main() {
	config := &ssh.ClientConfig{User: "nca", HostKeyCallback: ssh.InsecureIgnoreHostKey()}
	var took []float64
	for i := 0; i < 200; i++ {
		start := time.Now()
		client, err := ssh.Dial("tcp", os.Args[1], config)
		if err != nil {
			panic(err)
		}
		session, err := client.NewSession()
		if err != nil {
			panic(err)
		}
		if _, err := session.Output("\"version\""); err != nil {
			panic(err)
		}
		took = append(took, time.Since(start).Seconds()*1000)
		client.Close()
	}
	sort.Float64s(took)
	fmt.Println(took[len(took)/2], took[len(took)-1])
}
"""
BENCH_MANAGE = r"""
import os, sys, time
if sys.argv[1:2] == ["load_batch"] and "batch_oru_bench" in sys.argv[2]:
    how, count = os.path.basename(sys.argv[2]).split("_")[2].split("x")[1:]
    line = ("[INFO] Saving page. issue date: 1900-01-01 00:00:00, page sequence: %07d,"
            " of The test gazette (Or.)\n")
    if how == "together":
        for first in range(0, int(count), 1000):
            numbers = range(first, min(first + 1000, int(count)))
            sys.stderr.write("".join(line % number for number in numbers))
        sys.stderr.flush()
    else:
        for number in range(int(count)):
            os.write(2, (line % number).encode())
            if how == "slowly":
                time.sleep(0.005)
    os._exit(0)
"""
# A server of paramiko's own that answers a command, and does nothing else.
BENCH_BARE = r"""
import paramiko, socket, sys, threading
class Bare(paramiko.ServerInterface):
    def __init__(self):
        self.asked = threading.Event()
    def get_allowed_auths(self, user):
        return "none"
    def check_auth_none(self, user):
        return paramiko.AUTH_SUCCESSFUL
    def check_channel_request(self, kind, number):
        return paramiko.OPEN_SUCCEEDED
    def check_channel_exec_request(self, channel, command):
        self.asked.set()
        return True
class Quick(socket.socket):  # as the agent's: the client's next packet waits for the ACK (Nagle)
    def recv(self, *size):
        data = super().recv(*size)
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        return data
def serve(accepted):
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bare = Bare()
    with paramiko.Transport(Quick(fileno=accepted.detach())) as transport:
        transport.add_server_key(key)
        transport.start_server(server=bare, event=threading.Event())
        channel = transport.accept(60)
        bare.asked.wait(60)
        channel.sendall(b'{"status":"success"}')
        channel.send_exit_status(0)
        channel.recv(1)  # until the client has sent its end
        channel.close()
        transport.join(60)
key = paramiko.Ed25519Key(filename=sys.argv[1])
listener = socket.create_server(("127.0.0.1", 0), backlog=100)
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""


class Figure(NamedTuple):
    """What was measured, and beside it what it is meant to be at most, and the bare limit."""

    name: str
    value: float
    unit: str
    most: Optional[float] = None
    bare: Optional[float] = None  # what the same takes without the agent


Figures = Iterator[Figure]


def median(figures: List[float]) -> float:
    """The middle one."""
    return sorted(figures)[len(figures) // 2]


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes."""
    begun = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - begun


def milliseconds(times: int, run: Callable[..., Any], *arguments: Any) -> float:
    """How long a call takes, the median of some."""
    return median([seconds(run, *arguments) for _ in range(times)]) * 1000


def all_at_once(count: int, at_once: int, run: Callable[[], Any]) -> List[float]:
    """How long each of `count` calls takes, of which so many are under way at any time."""
    left = iter(range(count))
    took = []

    def work() -> None:
        for _ in left:  # iterators of ranges are safe to share
            took.append(seconds(run))

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


class Bench:
    """What can be measured of any agent at an address: a method for each thing."""

    def __init__(self, host: str, port: int):
        self.host = host
        self.port = port

    def measurements(self) -> List[Callable[[], Figures]]:
        """All of them, in order."""
        return [self.ssh_calls, self.paramiko_calls, self.go_calls, self.many_ssh_calls]

    def ssh(self, command: str = "version") -> None:
        """A command by OpenSSH's client."""
        options = "-F none -o StrictHostKeyChecking=no -o BatchMode=yes -o LogLevel=ERROR"
        subprocess.run(
            ["ssh", *options.split(), "-o", "UserKnownHostsFile=/dev/null", "-p", str(self.port),
             f"nobody@{self.host}", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip

    def call(self, *words: str, stdin: Optional[bytes] = None) -> Dict[str, Any]:
        """The answer to a command, on a connection of its own."""
        with Client(self.port, host=self.host) as client:
            return client.ask(shlex.join(words) or "version", stdin)

    def ssh_calls(self) -> Figures:
        yield Figure("ssh ... version", milliseconds(40, self.ssh), "ms")

    def bare_port(self) -> Optional[int]:
        """The port of a server to compare with, if there is one."""
        return None

    def paramiko_calls(self) -> Figures:
        calls = [seconds(self.call) * 1000 for _ in range(400)]
        bare = self.bare_port()
        bare_call = milliseconds(100, Bench(self.host, bare).call) if bare else None
        yield Figure("version by paramiko, a connection each", median(calls), "ms", 3.3, bare_call)
        yield Figure("  the slowest of 400", max(calls), "ms", 15)

    def go_calls(self) -> Figures:
        """What NCA's own SSH library takes, where there is a Go to compile it."""
        sources = "/usr/share/gocode"  # of Debian's golang-golang-x-crypto-dev
        if not shutil.which("go") or not os.path.isdir(f"{sources}/src/golang.org/x/crypto/ssh"):
            return
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "call.go")
            program.write_text(BENCH_GO)
            subprocess.run(
                ["go", "build", "-o", f"{folder}/call", str(program)],
                check=True,
                cwd=folder,
                env={
                    **os.environ,
                    "GO111MODULE": "off",
                    "GOPATH": sources,
                    "GOCACHE": f"{folder}/cache",
                    "GOFLAGS": "",
                },
            )
            done = subprocess.run(
                [f"{folder}/call", f"{self.host}:{self.port}"], check=True, stdout=subprocess.PIPE
            )
        middle, worst = map(float, done.stdout.split())
        yield Figure("version by Go's library, a connection each", middle, "ms", 3.3)
        yield Figure("  the slowest of 200", worst, "ms", 15)

    def many_ssh_calls(self) -> Figures:
        begun = time.perf_counter()
        took = all_at_once(200, 8, self.ssh)
        calls = 200 / (time.perf_counter() - begun)
        yield Figure("200 x ssh ... version, 8 at a time", calls, "calls/s")
        yield Figure("  the slowest of them", max(took) * 1000, "ms")


class OwnBench(Bench):
    """What else can be measured of an agent that is ours to start, to feed and to look into."""

    def __init__(self, site: Site):
        self.site = site
        self.states = 0  # folders that agents have had
        self.bare_server: Optional[subprocess.Popen] = None
        site.prepend_to_manage(BENCH_MANAGE)
        site.is_module = False  # a user does not start it so
        site.environment["LOG_LEVEL"] = "info"
        site.environment["ONI_MARC_RETRIEVAL_URLFORMAT"] = self.deaf_site()
        site.batch("batch_oru_plain_ver01")
        super().__init__("127.0.0.1", site.start().port)

    def deaf_site(self) -> str:
        """The address of a MARC site that takes requests and never answers."""
        self.deaf = socket.create_server(("127.0.0.1", 0), backlog=100)
        return f"http://127.0.0.1:{self.deaf.getsockname()[1]}/%s"

    def measurements(self) -> List[Callable[[], Figures]]:
        return [
            self.rest,
            *super().measurements(),
            self.thousand_sessions,
            self.open_connections,
            self.questions,
            self.titles,
            self.large_titles,
            self.first_lines,
            self.fifty_jobs,
            self.checks,
            self.waiting_clients,
            self.past_the_window,
            self.knocking,
            self.babbling,
            self.crowd,
            self.many_checks,
            self.slow_marc_site,
            self.hanging_solr,
            self.many_titles,
            self.odd_encodings,
            self.locked_store,
            self.large_title,
            self.expired_jobs,
            self.stored_jobs,
            self.long_logs,
            self.listed_batches,
            self.reasons,
            self.single_lines,
            self.index_entries,
            self.capture,
            self.unread_logs,
        ]

    def close(self) -> None:
        """Leaves no process behind."""
        if self.bare_server:
            self.bare_server.kill()
            self.bare_server.wait()
        self.site.clean_up()

    # -- the agent

    def fresh(self, *rows: Tuple[Any, ...]) -> float:
        """Starts an agent anew, with these jobs of the past; the seconds that the start took."""
        if self.site.agent.poll() is None:
            self.site.stop()
        self.states += 1
        self.site.state = self.site.state.with_name(f"state{self.states}")
        self.site.environment["STATE_DIRECTORY"] = str(self.site.state)
        if rows:
            past_jobs(self.site, *rows)
        took = seconds(self.site.start)
        self.port = self.site.port
        return took

    def is_warm(self) -> None:
        """Waits until the agent has looked at Open ONI, and its clients of before have left."""
        self.site.wait_for("Open ONI in .* word coordinates")
        until(lambda: resources_now(self.site)[0] < 30)

    def private_memory(self, pids: List[int]) -> float:
        """MB of memory of some processes, with their shares of what they have in common (PSS)."""
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
        return sum(int(re.search(r"Pss:\s*(\d+) kB", text)[1]) for text in texts) / 1000

    def cpu_seconds(self) -> float:
        """What the agent's own process has taken of the processor until now."""
        fields = Path(f"/proc/{self.site.agent.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def forget_peak(self) -> float:
        """From here on VmHWM begins anew; MB that the agent has now."""
        Path(f"/proc/{self.site.agent.pid}/clear_refs").write_text("5")
        return memory(self.site)

    # -- its jobs

    def printing(self, how: str, lines: int, number: int = 0) -> str:
        """The name of a batch whose load prints so many lines: `together`, `singly`, `slowly`."""
        name = f"batch_oru_bench{number}x{how}x{lines}_ver01"
        if not (self.site.source / name).exists():
            self.site.batch(name, 1, 1)
        return name

    def has_ended(self, id: int) -> None:
        """Waits for a job's end."""
        self.site.wait_for(rf"job={id} .*status=")

    def job(self, batch: str) -> int:
        """The id of a load that has ended; not well, if it only printed."""
        id = self.call("load-batch", batch)["job"]["id"]
        self.has_ended(id)
        return id

    def bare(self, batch: str, **options: Any) -> subprocess.Popen:
        """The same load without the agent."""
        environment = {"PATH": f"{self.site.oni}/ENV/bin:{os.environ['PATH']}"}
        words = [str(self.site.oni / "manage.py"), "load_batch", str(self.site.source / batch)]
        return subprocess.Popen(words, env=environment, **options)

    # -- calls and memory

    def bare_port(self) -> Optional[int]:
        if not self.bare_server:
            key = self.site.state.parent / "bare_key"
            oni_agent.make_host_key(key)
            words = [sys.executable, "-c", BENCH_BARE, str(key)]
            self.bare_server = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self.bare_at = int(self.bare_server.stdout.readline())
        return self.bare_at

    def rest(self) -> Figures:
        self.is_warm()
        yield Figure("agent at rest, PSS", self.private_memory([self.site.agent.pid]), "MB", 32)
        shell = self.private_memory(self.site.manage_pids("shell"))
        yield Figure("its manage.py shell and workers, PSS", shell, "MB", 30)

    def thousand_sessions(self) -> Figures:
        all_at_once(1000, 8, self.call)
        time.sleep(6)  # TRIM_SECONDS, and one more
        agent = self.private_memory([self.site.agent.pid])
        yield Figure("agent after 1,000 sessions, PSS", agent, "MB", 40)

    def open_connections(self) -> Figures:
        before = memory(self.site)
        clients = [Client(self.port) for _ in range(200)]
        yield Figure("200 connections held open, RSS growth", memory(self.site) - before, "MB")
        for client in clients:
            client.transport.close()

    # -- requests

    def questions(self) -> Figures:
        self.site.run("load-batch", "batch_oru_plain_ver01")
        self.fresh()
        self.is_warm()
        ask = functools.partial(self.call, "load-batch", "batch_oru_plain_ver01")
        yield Figure("load-batch answered, cold", seconds(ask) * 1000, "ms")
        yield Figure("load-batch answered, warm", milliseconds(40, ask), "ms", 30)

    def titles(self) -> Figures:
        small = [seconds(self.take_title, marc_xml(f"sn9900{n:04}")) * 1000 for n in range(20)]
        yield Figure("load-title of a small record, warm", median(small), "ms", 60)
        odd = milliseconds(20, self.give_title, b"this is no XML!")
        yield Figure("load-title, 15 bytes that are no XML", odd, "ms", 15)
        self.fresh()  # for those titles would be loaded meanwhile

    def large_titles(self) -> Figures:
        self.is_warm()
        note = b'<datafield tag="500"><subfield code="a">%s</subfield></datafield>'
        record = marc_xml("sn99009999").partition(b"\n")[2]
        record = record.replace(b"</record>", note % (b"It is long. " * 260) + b"</record>")
        for megabytes, most in (1, None), (5, 1.0):
            records = b"<collection>" + record * (250 * megabytes) + b"</collection>"
            bare = seconds(ElementTree.fromstring, records)
            took = seconds(self.take_title, records)
            yield Figure(f"load-title, {megabytes} MB in records of 4 KB", took, "s", most, bare)
        self.fresh()

    def take_title(self, records: bytes) -> None:
        """A load-title that becomes a job."""
        answer = self.give_title(records)
        assert answer["status"] == "success", answer

    def give_title(self, records: bytes) -> Dict[str, Any]:
        """The answer to a load-title."""
        return self.call("load-title", stdin=records + TRAILER)

    # -- the queue

    def first_lines(self) -> Figures:
        self.is_warm()
        waits = []
        bare = []
        for number in range(20):
            batch = self.printing("together", 1, number)
            job = self.call("job-logs", str(self.job(batch)))["job"]
            waits.append(nanoseconds(job["stderr"][0][1:31]) - nanoseconds(job["queued"]))
            bare.append(seconds(self.first_bare_line, batch))
        without = median(bare) * 1000
        yield Figure(
            "accepted to first line, idle queue", median(waits) / 1e6, "ms", without + 10, without
        )

    def first_bare_line(self, batch: str) -> None:
        """Runs a load without the agent, up to its first line."""
        with self.bare(batch, stderr=subprocess.PIPE) as process:
            process.stderr.readline()

    def fifty_jobs(self) -> Figures:
        batches = [self.printing("together", 0, number) for number in range(50)]
        bare = seconds(lambda: [self.bare(batch).wait() for batch in batches])
        took = seconds(self.run_all, batches)
        yield Figure("50 jobs of an empty manage.py", took, "s", 1.5, bare)

    def run_all(self, batches: List[str]) -> None:
        """Asks for many loads in one breath, and waits for the last one's end."""
        with Client(self.port) as client:
            ids = [client.ask(f"load-batch {batch}")["job"]["id"] for batch in batches]
        self.has_ended(ids[-1])

    # -- checks

    def checks(self) -> Figures:
        alto = self.site.oni / "large-alto.xml"
        word = b'<String HPOS="100" VPOS="100" WIDTH="200" HEIGHT="40" CONTENT="The"/>\n'
        text = ALTO.replace(b"</TextLine>", word * (290_000 // len(word)) + b"</TextLine>")
        alto.write_bytes(text)
        yield from self.check("100 x 10 pages, small OCR", 100, None, None)
        yield from self.check("400 x 10 pages, small OCR", 400, None, 12)
        yield from self.check("60 x 10 pages, 290 KB ALTO", 60, alto, 6)

    def check(
        self, what: str, issues: int, alto: Optional[Path], most: Optional[float]
    ) -> Figures:
        """What a batch-check takes, and the calls of others meanwhile."""
        batch = self.site.batch(f"batch_oru_check{issues}_ver01", issues, 10)
        if alto:
            for path in batch.glob("data/*/print/*/00??.xml"):
                path.unlink()
                os.link(alto, path)
        before = self.forget_peak()
        checking = threading.Thread(target=self.call, args=["batch-check", batch.name])
        begun = time.perf_counter()
        checking.start()
        waits = []
        while checking.is_alive():
            waits.append(seconds(self.call_from_elsewhere) * 1000)
        yield Figure(f"batch-check, {what}", time.perf_counter() - begun, "s", most)
        growth = memory(self.site, "VmHWM") - before
        yield Figure("  the agent's growth meanwhile", growth, "MB", 5)
        yield Figure("  version meanwhile, median", median(waits), "ms", 50)
        yield Figure("  version meanwhile, slowest", max(waits), "ms", 300)

    # -- others' calls while a client, a batch or a server is slow

    def beside(self, what: str, disturb: Callable[[], Any], *words: str) -> Figures:
        """How slow a command of another address is meanwhile, and what the agent grows by."""
        self.is_warm()
        before = self.forget_peak()
        process = os.fork()
        if not process:
            try:
                with contextlib.suppress(Exception):
                    disturb()
            finally:
                os._exit(0)
        waits = []
        try:
            while not os.waitpid(process, os.WNOHANG)[0]:
                waits.append(seconds(self.call_from_elsewhere, *words) * 1000)
        except BaseException:
            os.waitpid(process, 0)
            raise
        command = words[0] if words else "version"
        yield Figure(f"slowest {command} beside {what}", max(waits), "ms", 1000)
        growth = memory(self.site, "VmHWM") - before
        yield Figure("  the agent's growth meanwhile", growth, "MB", 30)

    def call_from_elsewhere(self, *words: str) -> None:
        """A call from 127.0.0.2."""
        connection = socket.create_connection((self.host, self.port), 60, ("127.0.0.2", 0))
        with paramiko.Transport(connection) as transport:
            transport.start_client(timeout=60)
            transport.auth_none("nobody")
            channel = transport.open_session(timeout=60)
            channel.exec_command(shlex.join(words) or "version")
            answer = json.loads(channel.makefile("rb").read())
        assert answer["status"] == "success", answer

    def waiting_clients(self) -> Figures:
        batch = self.site.batch("batch_oru_held_ver01")
        gate = self.site.hold_load(batch)
        id = self.call("load-batch", batch.name)["job"]["id"]
        gate.reached()

        def disturb() -> None:
            clients = [Client(self.port) for _ in range(26)]
            held = [client.channel(f"job-wait {id}") for client in clients for _ in range(10)]
            time.sleep(2)
            del held

        yield from self.beside("260 x job-wait on 26 connections", disturb)
        gate.open()
        self.has_ended(id)

    def past_the_window(self) -> Figures:
        yield from self.beside("a client that sends past its window", self.send_too_much)

    def send_too_much(self) -> None:
        """Sends and sends, whatever the window, and begins again when it is cut."""
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with contextlib.suppress(EOFError, OSError, paramiko.SSHException):
                with Client(self.port) as client:
                    channel = client.channel("load-title")
                    while client.transport.is_active():
                        send_data(client, channel, 0, bytes(30_000))

    def knocking(self) -> Figures:
        yield from self.beside("900 connects a second", self.knock)

    def knock(self) -> None:
        """Connects 900 times a second, says a version line, and waits for as long as it may."""
        held: List[socket.socket] = []
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                held.append(silent(self.port, b"SSH-2.0-knock\r\n"))
            if len(held) > 300:
                held.pop(0).close()
            time.sleep(1 / 1200)

    def babbling(self) -> Figures:
        yield from self.beside("20 version lines without end", self.babble)

    def babble(self) -> None:
        """Twenty clients whose version lines never end."""
        sockets = [silent(self.port) for _ in range(20)]
        end = time.monotonic() + 3
        while time.monotonic() < end:
            for number, connection in enumerate(sockets):
                try:
                    connection.sendall(b"S")
                except OSError:
                    sockets[number] = silent(self.port, b"SSH-2.0-")
            time.sleep(1 / 1000)

    def crowd(self) -> Figures:
        yield from self.beside("1,000 clients that stay", self.stay)
        self.is_warm()
        time.sleep(6)  # TRIM_SECONDS, and one more
        yield Figure("  its memory 6 s after they have left, RSS", memory(self.site), "MB")

    def stay(self) -> None:
        """A thousand clients that stay; the agent may end those that have been idle longest."""
        held = []
        end = time.monotonic() + 20  # on a busy machine there are fewer
        while len(held) < 1000 and time.monotonic() < end:
            held.append(Client(self.port))
            held[-1].transport.sock.settimeout(1000)  # else it would poll, and take the time

    def many_checks(self) -> Figures:
        batches = [self.site.batch(f"batch_oru_bulk{number}_ver01", 40, 10) for number in range(4)]
        small = [self.site.batch(f"batch_oru_small{number}_ver01").name for number in range(2)]
        alone = seconds(self.job, small[0])
        clients = [Client(self.port) for _ in range(4)]
        held = [
            client.channel(f"batch-check {batch.name}")
            for client in clients
            for batch in batches
            for _ in range(2)
        ]
        yield Figure("load of 2 issues beside 32 batch-checks", seconds(self.job, small[1]), "s")
        yield Figure("  the same without them", alone, "s")
        yield from self.beside("32 batch-checks", lambda: time.sleep(3))
        del held
        for client in clients:
            client.transport.close()

    def slow_marc_site(self) -> Figures:
        names = [f"batch_oru_untitled{number}_ver01" for number in range(8)]
        for number, name in enumerate(names):
            self.site.batch(name, 1, 1, lccn=f"sn9901{number:04}")

        def disturb() -> None:
            clients = [Client(self.port) for _ in range(8)]
            held = [client.channel(f"load-batch {name}") for client, name in zip(clients, names)]
            time.sleep(3)
            del held

        yield from self.beside(
            "a MARC site that hangs", disturb, "load-batch", "batch_oru_plain_ver01"
        )
        self.fresh()

    def hanging_solr(self) -> Figures:
        self.is_warm()

        def disturb() -> None:
            clients = [Client(self.port) for _ in range(8)]
            held = [client.channel("load-batch batch_oru_plain_ver01") for client in clients]
            time.sleep(3)
            del held

        with self.site.solr.hanging():
            yield from self.beside("a Solr that hangs", disturb)

    def many_titles(self) -> Figures:
        numbers = iter(range(120))
        refused = []

        def give() -> None:
            answer = self.give_title(marc_xml(f"sn9902{next(numbers):04}"))
            if answer["status"] != "success":
                refused.append(answer)

        took = all_at_once(120, 120, give)
        yield Figure("120 load-title at once: refused", len(refused), "of them", 0)
        yield Figure("  the slowest of them", max(took), "s")
        self.fresh()

    def odd_encodings(self) -> Figures:
        names = [f"batch_oru_puny{number}_ver01" for number in range(16)]
        for name in names:
            listing = self.site.batch(name, 1, 1) / "data/batch.xml"
            text = '<?xml version="1.0" encoding="punycode"?>\n<batch>' + "a-" * 200_000
            listing.write_text(text)

        def disturb() -> None:
            clients = [Client(self.port) for _ in names]
            held = [client.channel(f"load-batch {name}") for client, name in zip(clients, names)]
            time.sleep(3)
            del held

        yield from self.beside(
            "16 x punycode in batch.xml", disturb, "load-batch", "batch_oru_plain_ver01"
        )

    def locked_store(self) -> Figures:
        for words in ["list-jobs"], ["board"]:
            yield from self.beside("a jobs.db that is locked", self.lock_store, *words)

    def lock_store(self) -> None:
        """Locks the store of jobs for some seconds, as a backup may."""
        with contextlib.closing(sqlite3.connect(self.site.state / "jobs.db")) as database:
            database.execute("BEGIN EXCLUSIVE")
            time.sleep(3)

    def large_title(self) -> Figures:
        title = b"<a>" + b"<b/>" * (8 * 2**20 - 2) + b"</a>"
        yield from self.beside("a title of 32 MiB", lambda: self.give_title(title))

    # -- growth

    def expired_jobs(self) -> Figures:
        old = (["load-batch", "batch_oru_old_ver01"], "successful", 200, 91)
        new = (["load-batch", "batch_oru_old_ver01"], "successful", 1, 1)
        for count, most in (1000, None), (3000, 2), (10000, None):
            # The newest 100 are kept.
            self.fresh(*[old] * count, *[new] * 100)
            begun = time.perf_counter()
            waits = []
            with Client(self.port) as client:
                while self.count_of_jobs() > 100 and time.perf_counter() < begun + 60:
                    waits.append(seconds(client.ask, "list-jobs 10") * 1000)
            gone = time.perf_counter() - begun
            yield Figure(f"{count:,} expired jobs: gone after the start", gone, "s", most)
            yield Figure("  slowest list-jobs 10 meanwhile", max(waits or [0]), "ms", 50)

    def count_of_jobs(self) -> int:
        """How many jobs are in the store."""
        path = self.site.state / "jobs.db"
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            return database.execute("SELECT count(*) FROM jobs").fetchone()[0]

    def stored_jobs(self) -> Figures:
        bare = seconds(
            subprocess.run, [sys.executable, "-c", "import paramiko, sqlite3, ssl, logging"]
        )
        job = (["load-batch", "batch_oru_old_ver01"], "successful", 2, 2)
        for count in 1000, 10_000, 100_000:
            is_most = count == 100_000
            started = self.fresh(*[job] * count)
            yield Figure(f"{count:,} jobs stored: start", started, "s", is_most and 0.5, bare)
            self.is_warm()
            yield Figure("  RSS at rest", memory(self.site), "MB", is_most and 80)
            with Client(self.port) as client:
                if not is_most:
                    answer = client.ask("list-jobs")
                    bare_list = milliseconds(5, json.dumps, answer)
                    took = milliseconds(5, client.ask, "list-jobs")
                    most = 60 if count == 10_000 else None
                    yield Figure(f"  list-jobs of {count:,}", took, "ms", most, bare_list)
                yield Figure("  list-jobs 50", milliseconds(9, client.ask, "list-jobs 50"), "ms")

    def long_logs(self) -> Figures:
        counts = (100_000, 1_000_000, 10_000_000)
        job = (["load-batch", "batch_oru_old_ver01"], "failed", 1, 1)
        self.fresh(*[job] * len(counts))
        for id, lines in enumerate(counts, 1):
            self.write_log(id, lines)
            with Client(self.port) as client:
                took = milliseconds(5, client.ask, f"job-logs {id} 20")
            yield Figure(f"job-logs ID 20 of {lines:,} short lines", took, "ms", 50)

    def write_log(self, id: int, lines: int) -> None:
        """Puts a log of short lines in a job's place, as printed in ten goes."""
        log = self.site.state / "logs" / f"{id}.log"
        text = b"[INFO] a line\n" * (lines // 10)
        entries = [b"[2026-01-01T00:00:00.000000000Z] $ 0 0 1 -/- manage.py load_batch x\n"]
        with open(log.with_suffix(".err"), "wb") as file:
            for second in range(1, 11):
                file.write(text)
                size = b"%d" % file.tell()
                entries.append(b"[2026-01-01T00:00:%02d.000000000Z] = 0 %s\n" % (second, size))
        log.with_suffix(".out").touch()
        log.write_bytes(b"".join(entries))

    def listed_batches(self) -> Figures:
        made = 0
        for count, most in (300, None), (3000, 60):
            while made < count:
                made += 1
                self.site.batch(f"batch_oru_listed{made}_ver01", 1, 1)
            self.fresh()
            self.is_warm()
            begun = time.perf_counter()
            self.call("list-batches")
            answered = time.perf_counter() - begun
            yield Figure(f"list-batches of {count:,} folders, first time", answered, "s", 2)
            until(self.all_are_counted, 120)
            counted = time.perf_counter() - begun
            yield Figure("  all are counted after", counted, "s", most)
            again = milliseconds(3, self.call, "list-batches")
            yield Figure("  list-batches then", again, "ms")

    def all_are_counted(self) -> bool:
        """Whether the pages in all batches' files are known; the odd ones are gone."""
        batches = self.call("list-batches")["batches"]
        return all(
            batch["pages_in_mets"] is not None for batch in batches if "listed" in batch["name"]
        )

    # -- logs

    def reasons(self) -> Figures:
        for lines in 100_000, 1_000_000:
            with tempfile.TemporaryDirectory() as folder:
                writer = oni_agent.LogWriter(Path(folder, "1.log"))
                writer.err.write_bytes(b"[INFO] Saving page. issue date: 1900-01-01\n" * lines)
                took = milliseconds(5, writer.complaint)
                writer.close()
            yield Figure(f"reason of a failure, {lines:,} lines of stderr", took / 1000, "s", 0.05)

    def single_lines(self) -> Figures:
        batch = self.printing("singly", 100_000)
        self.is_warm()
        before = self.cpu_seconds()
        self.job(batch)
        cpu = self.cpu_seconds() - before
        yield Figure("100,000 lines that come one by one: agent's CPU", cpu, "s", 0.15)

    def index_entries(self) -> Figures:
        id = self.job(self.printing("slowly", 400))
        index = (self.site.state / "logs" / f"{id}.log").read_text()
        moments = [nanoseconds(line[1:31]) for line in index.splitlines() if "] = " in line]
        rate = (len(moments) - 1) / (moments[-1] - moments[0]) * 1e9
        yield Figure("entries of an index while a load prints", rate, "a second", 4)

    def capture(self) -> Figures:
        few = self.printing("together", 100_000)
        many = self.printing("together", 1_000_000)
        self.is_warm()
        ids = [self.job(few)]
        before = self.forget_peak()
        captured = seconds(lambda: ids.append(self.job(many)))
        with open(self.site.oni / "bare.log", "wb") as file:
            bare = seconds(self.bare(many, stderr=file).wait)
        yield Figure("1,000,000 lines (112 MB) captured", captured, "s", 1.0, bare)
        cat = seconds(subprocess.run, ["sh", "-c", f"cat {self.site.oni}/bare.log >/dev/null"])
        for lines, id, most in ("100,000", ids[0], None), ("1,000,000", ids[1], 1.5):
            took = median([seconds(self.ssh, f"job-logs {id}") for _ in range(3)])
            yield Figure(f"job-logs of {lines} lines", took, "s", most)
        yield Figure("  cat of the longer one's file", cat, "s")
        growth = memory(self.site, "VmHWM") - before
        yield Figure("  the agent's growth meanwhile", growth, "MB", 30)

    def unread_logs(self) -> Figures:
        id = self.job(self.printing("together", 1_000_000))

        def disturb() -> None:
            held: List[Any] = []  # else paramiko would close them at once
            end = time.monotonic() + 10  # on a busy machine there are fewer
            while len(held) < 1100 and time.monotonic() < end:
                # The agent ends those that have kept others waiting for a second, to make room.
                with contextlib.suppress(paramiko.SSHException, EOFError, OSError):
                    client = Client(self.port)
                    held.append(client)
                    for _ in range(10):
                        held.append(client.channel(f"job-logs {id}"))

        yield from self.beside("1,000 job-logs that nobody reads", disturb)


def nanoseconds(stamp: str) -> int:
    """A time stamp of the protocol's, less the day."""
    hours, minutes, rest = stamp[11:-1].split(":")
    return (
        (int(hours) * 60 + int(minutes)) * 60 * 10**9 + int(float(rest[:2])) * 10**9 + int(rest[3:])
    )


def cell(value: Optional[float]) -> str:
    """A figure of the table, or its empty place."""
    return f"{value:12,.{1 if value >= 10 else 2}f}" if value or value == 0.0 else " " * 12


def bench(address: str = "") -> None:
    """Prints what an own agent takes, and, beside it, what the agent at an address takes.

    A measurement that fails says so, with the agent's last warnings, and the others go on.
    """
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # clients are cut on purpose
    # Else collections of this process' own garbage would show as the agent's slowest answers.
    gc.collect()
    gc.freeze()
    host, _, port = address.rpartition(":")
    other = Bench(host.strip("[]"), int(port)).measurements() if address else []
    others = {figure.name: figure.value for measure in other for figure in measure()}
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, load average {load}, Python {sys.version.split()[0]}")
    print(f"{'':60}{'this agent':>12}{'bare':>12}{'at most':>12} {address}")
    with tempfile.TemporaryDirectory() as folder:
        build_oni(Path(folder) / "template")
        own = OwnBench(Site(Path(folder), Path(folder) / "template"))
        try:
            for measure in own.measurements():
                print_figures(own, measure, others)
        finally:
            own.close()


def print_figures(
    own: OwnBench, measure: Callable[[], Figures], others: Dict[str, float]
) -> None:
    """Prints what one measurement gives, or why it failed; then the agent is started anew."""
    try:
        for name, value, unit, most, bare in measure():
            beside = cell(others.get(name)) if others else ""
            print(f"{name:60}{cell(value)}{cell(bare)}{cell(most)}{beside} {unit}", flush=True)
    except Exception as error:
        print(f"{measure.__name__} FAILED: {error or repr(error)}", flush=True)
        for line in own.site.log[-200:]:
            if re.search(" (WARNING|ERROR) ", line):
                print(f"    {line}", end="", flush=True)
        own.fresh()


# --- As a program ---------------------------------------------------------------------------------


def main() -> None:
    """Runs what is not a test."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", action="store_true", help="an agent to try, until Ctrl-C")
    parser.add_argument(
        "--once", action="store_true", help="with --demo: make an exchange, print it, end"
    )
    parser.add_argument("--bench", action="store_true", help="measure an agent, and print a table")
    parser.add_argument(
        "--address",
        default="",
        metavar="HOST:PORT",
        help="with --bench: another agent, beside ours",
    )
    parser.add_argument("--record", action="store_true", help="make the README's exchanges anew")
    parser.add_argument(
        "--site",
        type=Path,
        metavar="ONI_LOCATION",
        help="try an agent of its own on this Open ONI, and leave that as it was",
    )
    chosen = parser.parse_args()
    if chosen.site:
        sys.exit(accept(chosen.site))
    elif chosen.demo:
        try:
            sys.exit(demo(chosen.once))
        except KeyboardInterrupt:  # while it was being built
            sys.exit(130)
    elif chosen.bench:
        bench(chosen.address)
    elif chosen.record:
        record()
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
