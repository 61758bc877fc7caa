"""The solution's process: it runs the tested code, and answers the judge's questions about it."""

import builtins
import json
import os
import resource
import sys

from plain_data import MEASURES, MESSAGE_CHARACTERS, Printed, decode, encode, send


class Solution:
    """Answers the judge's questions about the tested code."""

    def __init__(self, questions, answers):
        self.questions, self.answers = questions, answers
        self.names = {"__name__": "solution", "__builtins__": builtins}
        self.objects = {}
        self.printed = Printed()

    def keep(self, value):
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [value.__name__, builtin_base(value).__name__]}
        self.objects[id(value)] = value
        return {"object": id(value)}

    def found(self, kind, content):
        if kind == "object":
            return self.objects[content]

        def callback(*arguments):
            send(self.answers, {"call": content, "arguments": [encode(one, self.keep) for one in arguments]})
            reply = self.receive()
            if "raised" in reply:
                raise RuntimeError(reply["raised"])
            return decode(reply["value"], self.found)

        return callback

    def receive(self):
        """The next question, read to its last byte and no further: a fork goes on with what the pipe holds."""

        def read(count):
            data = b""
            while len(data) < count:
                part = os.read(self.questions, count - len(data))
                if not part:
                    os._exit(0)
                data += part
            return data

        return json.loads(read(int(read(8), 16)))

    def start(self):
        """Takes the limits, and gives up what this process may still be allowed to do."""
        os.setpgid(0, 0)  # a signal to its group does not reach the judge
        sys.stdout = sys.stderr = self.printed
        settings = self.receive()
        if settings["uid"] is not None and os.geteuid() == 0:
            os.chdir(settings["folder"])
            os.setgroups([])
            os.setgid(settings["uid"])
            os.setuid(settings["uid"])
        limit(settings["limits"])
        if settings["guarded"]:
            refuse_accidents(os.getcwd())

    def serve(self):
        """Answers until the judge is gone. A test is a fork of this process, which ends with the test."""
        in_test = False
        while True:
            question = self.receive()
            do = question.pop("do")
            if do == "test":
                child = os.fork()
                if child:
                    os.waitpid(child, 0)
                    send(self.answers, {"ended": True})
                else:
                    in_test = True
            elif do == "end":
                if in_test:
                    os._exit(0)
            else:
                send(self.answers, self.answer(do, question))

    def answer(self, do, question):
        try:
            return getattr(self, f"do_{do}")(**question) | {"printed": self.printed.taken()}
        except BaseException as error:
            return raised(error)

    def says(self, value):
        return {"value": encode(value, self.keep)}

    def do_load(self, code, packages):
        sys.path += packages
        exec(compile(code, "<solution>", "exec"), self.names)
        modules = {name: value.__name__ for name, value in self.names.items() if type(value) is type(sys)}
        measures = {}
        for name, value in self.names.items():
            home = getattr(value, "__module__", None)
            if home in MEASURES and getattr(sys.modules.get(home), name, None) is value:
                measures[name] = home
        return self.says([[name for name in self.names if name != "__builtins__"], modules, measures])

    def do_name(self, name):
        return self.says(self.names[name])

    def do_call(self, target, arguments, named):
        arguments = [decode(one, self.found) for one in arguments]
        named = {key: decode(one, self.found) for key, one in named.items()}
        said = self.says(self.objects[target](*arguments, **named))
        # The function may have changed the lists and dictionaries that it was given.
        return said | {"arguments": [encode(one, self.keep) for one in arguments]}

    def do_attribute(self, target, name):
        return self.says(getattr(self.objects[target], name))

    def do_set_attribute(self, target, name, value):
        return self.says(setattr(self.objects[target], name, decode(value, self.found)))

    def do_operator(self, target, name, arguments):
        values = [self.objects[target], *[decode(one, self.found) for one in arguments]]
        if name in ("iter", "next", "len", "str", "repr", "bool", "int", "float"):
            return self.says(getattr(builtins, name)(*values))
        import operator

        if name.startswith("reversed:"):
            values.reverse()
        return self.says(getattr(operator, name.removeprefix("reversed:"))(*values))

    def do_is_instance(self, target, value):
        return self.says(isinstance(decode(value, self.found), self.objects[target]))


def raised(error):
    """An exception as data: its class, the class of Python's that it derives from, its text, and where it came from."""
    names = [type(error).__name__, builtin_base(type(error)).__name__]
    try:
        text = error.msg if names[0] == "SyntaxError" else str(error)
    except BaseException:
        text = ""
    place, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == "<solution>":
            place = f" (line {trace.tb_lineno}, in {code.co_name})"
        trace = trace.tb_next
    return {
        "raised": names,
        "text": str(text)[:MESSAGE_CHARACTERS],
        "place": place[:MESSAGE_CHARACTERS],
        "line": getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None,
    }


def builtin_base(kind):
    """The nearest base of an exception that Python itself defines."""
    for base in kind.__mro__:
        if base.__module__ == "builtins" and getattr(builtins, base.__name__, None) is base:
            return base
    return Exception


def refuse_accidents(folder):
    """Without a sandbox: from now on no sockets, no processes, no signals to others, and no file changed elsewhere.

    This keeps code from doing harm by accident; code that means harm gets round it.
    """
    refused = (
        "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
        "os.kill", "os.killpg", "pty.spawn", "resource.setrlimit", "resource.prlimit", "webbrowser.", "sqlite3.",
        "ctypes.dlopen", "ctypes.dlsym", "gc.get_objects", "gc.get_referrers",
    )  # fmt: skip
    # Event → how many of its leading arguments are paths that it changes.
    changes = {
        "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
        "os.chmod": 1, "os.chown": 1, "os.utime": 1, "os.setxattr": 1, "os.removexattr": 1, "shutil.rmtree": 1,
    }  # fmt: skip
    # The last arguments of these events are descriptors of folders, -1 where none was given.
    relative = ("os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink")
    root, real, decoded, error, this = (
        os.path.realpath(folder),
        os.path.realpath,
        os.fsdecode,
        PermissionError,
        os.getpid(),
    )
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def hook(event, arguments):
        if event.startswith(refused):
            # The process that answers the judge forks itself for each test: no call of the tested code.
            if event == "os.fork" and os.getpid() == this and sys._getframe(1).f_code is Solution.serve.__code__:
                return
            raise error(f"{event} is not allowed here")
        paths = arguments[: changes.get(event, 0)]
        if event == "open":
            path, mode, flags = arguments
            opened = any(c in mode for c in "wax+") if isinstance(mode, str) else (flags or 0) & changing
            paths = (path,) if opened else ()
        if event in relative and any(folder != -1 for folder in arguments[len(paths) :]):
            raise error("dir_fd is not allowed here")
        for path in paths:
            if isinstance(path, int) or path is None:
                continue
            where = real(decoded(path))
            if where != "/dev/null" and where != root and not where.startswith(root + os.sep):
                raise error(f"files outside the working folder cannot be changed: {where}")

    sys.addaudithook(hook)


def limit(limits):
    for name, value in limits.items():
        kind = getattr(resource, name)
        ceiling = resource.getrlimit(kind)[1]
        value = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(kind, (value, value))
