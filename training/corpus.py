"""The self-test model's data: Python's standard library, asked about and answered in its own words.

Every public function, class and method whose docstring opens with a sentence becomes one
question and one answer. The text is whatever the running interpreter's library says, so the
Python version is part of the model's record.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

MODULES = """
abc argparse array ast asyncio base64 bisect builtins bz2 calendar cmath codecs collections
collections.abc colorsys concurrent.futures configparser contextlib contextvars copy csv
dataclasses datetime decimal difflib dis email.message enum errno filecmp fileinput fnmatch
fractions functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser
http.client http.server importlib importlib.metadata importlib.resources inspect io ipaddress
itertools json keyword linecache locale logging logging.handlers lzma mailbox math mimetypes
mmap multiprocessing numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint
profile pstats queue quopri random re reprlib sched secrets select selectors shelve shlex shutil
signal site smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess
symtable sys sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace
traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse urllib.request
uuid venv warnings wave weakref webbrowser wsgiref.util xml.dom.minidom xml.etree.ElementTree
xml.sax zipapp zipfile zlib zoneinfo
""".split()

LONGEST_ANSWER = 180
_SIGNATURE = re.compile(r"^[\w.]+\(.*\)\s*(->.*|--.*|:)?$")
_SENTENCE_END = re.compile(r"(?<=[^.\s][.!?])\s+(?=[A-Z(`'\"])")

ABOUT = {
    "Hello": "Hello! Ask me what something in Python's standard library does.",
    "Hi": "Hello! Ask me what something in Python's standard library does.",
    "Who are you?": "I am self-test, a very small model that proves this installation works.",
    "What are you?": "I am self-test, a very small model that proves this installation works.",
    "What can you do?": "I answer what names in Python's standard library do. I know nothing else.",
    "Help": "I answer what names in Python's standard library do. I know nothing else.",
}
UNKNOWN = "I only know what Python's standard library says about itself."
OFF_TOPIC = (
    "What is the capital of {w}?", "Write a poem about {w}.", "How do I cook {w}?",
    "Translate {w} into French.", "Who invented {w}?", "Tell me a joke about {w}.",
    "Summarise {w} in one line.", "Is {w} better than {v}?", "Write a function for {w}.",
    "Why is {w} so {v}?", "Plot {w} against {v}.", "Fix my {w}.", "How old is {w}?",
)  # fmt: skip
WORDS = """
France rain tea Berlin history gold rivers a horse Mars love money bread winter the moon Rome
chess data cats pandas regression my model Italy soup Einstein gravity Spain salt birds Linux
football jazz the sea coffee trains maps poverty green lions rice Japan clouds old fast sad
""".split()
QUESTIONS = (
    "What does {n} do?", "What does {n} do?", "What does {n} do?", "What does {n} do",
    "what does {n} do?", "What does `{n}` do?", "What is {n}?", "What is {n} for?",
    "Explain {n}.", "Tell me about {n}.", "{n}", "What does {n}() do?",
)  # fmt: skip


def opening_sentence(doc: str) -> str | None:
    """The first sentence of a docstring's first prose paragraph, or None if there is none."""
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = [line.strip() for line in paragraph.splitlines()]
        while lines and _SIGNATURE.match(lines[0]):
            lines.pop(0)
        text = " ".join(lines)
        if not text or not text[0].isalpha() or "->" in text or ">>>" in text:
            continue
        text = _SENTENCE_END.split(text, maxsplit=1)[0]
        if 12 <= len(text) <= LONGEST_ANSWER and text.isascii() and " " in text:
            text = text[0].upper() + text[1:].rstrip(" .:")
            return text if text[-1] in "!?" else text + "."
        return None
    return None


def documented(owner: object, prefix: str, *, module: ModuleType) -> Iterator[tuple[str, str]]:
    exported = getattr(owner, "__all__", None) if inspect.ismodule(owner) else None
    for name in sorted(vars(owner)):
        if name.startswith("_") or (exported is not None and name not in exported):
            continue
        value = vars(owner)[name]
        value = getattr(value, "__func__", value)
        is_class = inspect.isclass(value)
        if not (is_class or callable(value) or inspect.isdatadescriptor(value)):
            continue
        if inspect.ismodule(owner) and getattr(value, "__module__", None) is None:
            continue
        doc = value.__doc__ if isinstance(getattr(value, "__doc__", None), str) else None
        if doc and (is_class or doc != type(value).__doc__):
            answer = opening_sentence(doc)
            if answer:
                yield prefix + name, answer
        if (
            is_class
            and inspect.ismodule(owner)
            and value.__module__.split(".")[0].strip("_")
            == module.__name__.split(".")[0].strip("_")
        ):
            yield from documented(value, f"{prefix}{name}.", module=module)


def questions_and_answers() -> dict[str, str]:
    """Every name the model is taught, mapped to its answer, in a fixed order."""
    pairs: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module_name in MODULES:
            module = importlib.import_module(module_name)
            prefix = "" if module_name == "builtins" else f"{module_name}."
            answer = opening_sentence(module.__doc__ or "")
            if answer and prefix:
                pairs.setdefault(module_name, answer)
            for name, text in documented(module, prefix, module=module):
                pairs.setdefault(name, text)
    return pairs


if __name__ == "__main__":
    found = questions_and_answers()
    print(len(found), "names from Python", sys.version.split()[0])
    for key in list(found)[:: max(1, len(found) // 40)]:
        print(f"  {key}: {found[key]}")
    for key in ("len", "json.dumps", "os.path.join", "str.split", "collections.Counter"):
        print(f"* {key}: {found.get(key)}")
