"""The judge's process: it runs the tests, asks the solution's process for values, and compares them itself."""

import builtins
import json
import os
import resource
import select
import signal
import sys
import time

from plain_data import MEASURES, decode, encode, send

MOST_BYTES = 4 * 2**20
MOST_FILES = 5_000
TICK_S = 0.02
DIED = "The process ended before the test did."
ALIASES = {"np": "numpy", "pd": "pandas"}


class OutOfTime(BaseException):
    """Not an Exception, so that `except Exception` in a test does not swallow it."""


class Ended(BaseException):
    """The conversation is over: the solution's process died, or took more than it may. The text says which."""


class Judge:
    """The judge's side of the conversation, with a deadline for everything."""

    def __init__(self, questions, answers, task):
        self.questions, self.answers, self.task = questions, answers, task
        self.deadline = time.monotonic() + task["timeout_s"]
        self.buffer, self.exceptions, self.callbacks = b"", {}, []

    def tell(self, **message):
        try:
            send(self.questions, message)
        except OSError:
            raise Ended(DIED) from None

    def ask(self, do, **question):
        self.tell(do=do, **question)
        while "call" in (answer := self.read()):
            self.tell(**self.called(answer))
        if "ended" in answer:
            raise Ended(DIED)
        if "raised" in answer:
            raise self.exception(answer)
        sys.stdout.write(str(answer.get("printed", "")))
        return answer

    def value(self, do, **question):
        return decode(self.ask(do, **question)["value"], self.found)

    def called(self, answer):
        """What a function of the test gives that the solution was given and now calls."""
        try:
            function = self.callbacks[answer["call"]]
            return {"value": encode(function(*[decode(one, self.found) for one in answer["arguments"]]), self.keep)}
        except Exception as error:
            return {"raised": f"{type(error).__name__}: {error}"}

    def read(self):
        """The next answer. Whatever else the solution's process may write ends the conversation."""
        try:
            size = int(self.bytes(8), 16)
            if not 0 <= size <= MOST_BYTES:
                raise Ended("The answer is too large.")
            answer = json.loads(self.bytes(size))
        except (ValueError, RecursionError):
            raise Ended(DIED) from None
        if not isinstance(answer, dict):
            raise Ended(DIED)
        return answer

    def bytes(self, count):
        while len(self.buffer) < count:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise OutOfTime
            if not select.select([self.answers], [], [], min(left, TICK_S))[0]:
                self.watch()
                continue
            part = os.read(self.answers, 65536)
            if not part:
                raise Ended(DIED)
            self.buffer += part
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def watch(self):
        """Ends the conversation where all processes of the solution together take more than they may."""
        if not self.task["alone"]:
            return
        files = os.statvfs(".")
        if files.f_files - files.f_ffree > MOST_FILES:
            raise Ended(f"The code made more than {MOST_FILES} files.")
        pages, count = 0, 0
        for process in filter(str.isdigit, os.listdir("/proc")):
            if int(process) in (1, os.getpid()):
                continue
            try:
                with open(f"/proc/{process}/statm") as file:
                    pages += int(file.read().split()[1])
                count += 1
            except OSError:
                continue
        if count > self.task["processes"]:
            raise Ended(f"The code started more than {self.task['processes']} processes.")
        if pages * resource.getpagesize() > 2 * self.task["memory_mib"] * 2**20:
            raise Ended(f"The code's processes took more than {2 * self.task['memory_mib']} MiB together.")

    def exception(self, answer):
        text = str(answer["text"])
        try:
            error = self.exception_class(*answer["raised"])(text)
        except TypeError:  # a class of Python's that takes other arguments
            error = type(str(answer["raised"][0]), (Exception,), {})(text)
        error.said, error.line = text + str(answer["place"]), answer["line"]
        return error

    def exception_class(self, name, base):
        kind = getattr(builtins, str(base), None)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)):
            kind = Exception
        return kind if name == base else self.exceptions.setdefault(name, type(str(name), (kind,), {}))

    def keep(self, value):
        if isinstance(value, Proxy):
            return {"object": value._number}
        if not callable(value):
            raise TypeError(f"a test cannot give a {type(value).__name__} to the code")
        self.callbacks.append(value)
        return {"callback": len(self.callbacks) - 1}

    def found(self, kind, content):
        if kind == "exception":
            return self.exception_class(*content)
        if kind != "object":
            raise Ended(DIED)
        return Proxy(self, content)


def library(name):
    """A module of the standard library or of the packages, as it is here, whatever the solution made of its own."""
    import importlib

    if str(name).split(".")[0] not in {*sys.stdlib_module_names, *ALIASES.values(), "scipy", "sympy"}:
        raise NameError(f"the tests can't use the module {name!r}")
    return importlib.import_module(name)


def copy_back(argument, now):
    """Puts what the function left in a list, set or dictionary into the test's own."""
    if isinstance(argument, list | bytearray) and isinstance(now, list | bytearray):
        argument[:] = now
    elif isinstance(argument, set | dict) and isinstance(now, set | dict):
        argument.clear()
        argument.update(now)


class Proxy:
    """An object in the solution's process."""

    def __init__(self, judge, number):
        self.__dict__.update(_judge=judge, _number=number)

    def __call__(self, *arguments, **named):
        judge = self._judge
        wire = {key: encode(one, judge.keep) for key, one in named.items()}
        given = [encode(one, judge.keep) for one in arguments]
        answer = judge.ask("call", target=self._number, arguments=given, named=wire)
        for argument, sent, now in zip(arguments, given, answer.get("arguments", [])):
            if sent != now:
                copy_back(argument, decode(now, judge.found))
        return decode(answer["value"], judge.found)

    def __getattr__(self, name):
        return self._judge.value("attribute", target=self._number, name=name)

    def __setattr__(self, name, value):
        self._judge.ask("set_attribute", target=self._number, name=name, value=encode(value, self._judge.keep))

    def __instancecheck__(self, value):
        if not isinstance(value, Proxy):
            return False
        return self._judge.value("is_instance", target=self._number, value=encode(value, self._judge.keep)) is True

    def _operator(self, name, *arguments):
        wire = [encode(one, self._judge.keep) for one in arguments]
        return self._judge.value("operator", target=self._number, name=name, arguments=wire)

    def _compare(self, name, other):
        return self._operator(name, other) is True if isinstance(other, Proxy) else NotImplemented

    def __eq__(self, other):
        return self._compare("eq", other)

    def __lt__(self, other):
        return self._compare("lt", other)

    def __le__(self, other):
        return self._compare("le", other)

    def __gt__(self, other):
        return self._compare("gt", other)

    def __ge__(self, other):
        return self._compare("ge", other)

    def __hash__(self):
        return hash(self._number)

    def __bool__(self):
        return self._operator("bool") is True

    def __repr__(self):
        return str(self._operator("repr"))

    def __str__(self):
        return str(self._operator("str"))

    def __iter__(self):
        found = self._operator("iter")
        return found if isinstance(found, Proxy) else iter(found)

    def __enter__(self):
        return self.__getattr__("__enter__")()

    def __exit__(self, *_):
        self.__getattr__("__exit__")(None, None, None)

    def __contains__(self, item):
        return any(one == item for one in self)


def forwarded(name):
    return lambda self, *arguments: self._operator(name, *arguments)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift"):
    setattr(Proxy, f"__{_name.rstrip('_')}__", forwarded(_name))
    setattr(Proxy, f"__r{_name.rstrip('_')}__", forwarded(f"reversed:{_name}"))
for _name in ("neg", "pos", "abs", "invert", "len", "int", "float", "index", "getitem", "setitem", "delitem", "next"):
    setattr(Proxy, f"__{_name}__", forwarded(_name))


class Names(dict):
    """The names of a test: its own, then those of the solution, as they are when the test asks for them.

    A solution cannot give another meaning to what the tests measure with: a name of Python's own (`abs`, `sorted`) or
    of a library keeps its meaning, unless it is the only name of the solution that the tests use and so what they test.
    """

    def __init__(self, judge, found, used):
        super().__init__(__name__="test")
        defined, self.modules, self.measures = found
        self.judge, self.defined = judge, set(defined)
        self.is_tested = not {name for name in used & self.defined if not well_known(name)}

    def __missing__(self, name):
        if name not in self.defined:
            raise KeyError(name)
        if well_known(name) and not self.is_tested:
            if hasattr(builtins, name):
                raise KeyError(name)
            return library(ALIASES.get(name, name))
        if name in self.modules:
            return library(self.modules[name])
        if self.measures.get(name) in MEASURES:
            return getattr(library(self.measures[name]), name)
        return self.judge.value("name", name=name)


def well_known(name):
    return hasattr(builtins, name) or name in sys.stdlib_module_names or name in ALIASES


def names_in(code):
    names = set(code.co_names)
    for constant in code.co_consts:
        if type(constant) is type(code):
            names |= names_in(constant)
    return names


def describe(error):
    """The exception, and the line of the solution that it came from."""
    return f"{type(error).__name__}: {getattr(error, 'said', error)}".replace(":  (", " (")


def what_came_out(test, names):
    """For a failed `assert a == b` the value of a; an empty text for other tests."""
    import ast

    body = ast.parse(test).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert) or not isinstance(body[0].test, ast.Compare):
        return ""
    left = body[0].test.left
    value = eval(compile(ast.Expression(left), "<test>", "eval"), names)
    return f"{ast.unparse(left)} gave {value!r}"


def run(test, names):
    """The kind of result (ok, wrong, error) and what to say about it."""
    try:
        exec(compile(test, "<test>", "exec"), names)
        return "ok", ""
    except AssertionError as error:
        text = str(error)
        if not text:
            try:
                text = what_came_out(test, names)
            except Exception:
                text = ""
        return "wrong", text or "The assertion does not hold."
    except (OutOfTime, Ended):
        raise
    except BaseException as error:
        return "error", describe(error)


def load(judge, task):
    """The names that the tests see, or the kind of failure and what to say of it."""
    try:
        judge.tell(**{key: task[key] for key in ("limits", "uid", "folder", "guarded")})
        found = judge.value("load", code=task["code"], packages=task["packages"])
        used = set()
        for test in task["tests"]:
            try:
                used |= names_in(compile(test, "<test>", "exec"))
            except (SyntaxError, ValueError):
                continue  # the test says so itself when it runs
        return Names(judge, found, used), None
    except SyntaxError as error:
        return None, ("format", f"The code is not valid Python: {error.said.split(' (line')[0]} (line {error.line}).")
    except OutOfTime:
        return None, ("load", "The time limit was exceeded before any test.")
    except Ended as ended:
        return None, ("load", str(ended))
    except BaseException as error:
        return None, ("load", describe(error))


def judged(judge, task, report):
    """Runs the tests one after the other; what ends the whole conversation is said of each test that is left."""

    def out_of_time(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    names, over = load(judge, task)
    for test in task["tests"]:
        if over is None:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(judge.deadline - time.monotonic(), 1e-3))
                judge.tell(do="test")
                result = run(test, names)
                judge.tell(do="end")
                while "ended" not in judge.read():
                    pass
            except OutOfTime:
                result = over = ("timeout", "The time limit was exceeded.")
            except Ended as ended:
                result = ("error", str(ended))
                over = None if str(ended) == DIED else result
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        report(*(over or result))
