"""Take away one guard at a time, and see that a test fails.

    python scripts/guard_mutants.py [--only PATTERN] [--list] [--jobs N] [--without NODE]

One line for each guard: killed, by which test, or SURVIVED, which ends with status 1. Guards are every
`@web.authenticated` and `@authorized` of the handlers, found by themselves, and those of `GUARDS` below.
Each runs in a copy of the tree, which is thrown away; first the tests must pass in a copy without a change.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HANDLERS = "shimmy_jupyter/server/handlers"
DECORATORS = {"web.authenticated", "authorized"}
ACCESS = ("tests/component/test_access.py",)
PACKAGE = "shimmy_jupyter"
GUARD = f"{PACKAGE}/guard"
POLICY = ("tests/component/test_policy.py",)
LIMITS = ("tests/component/test_limits.py",)
AUDIT = ("tests/component/test_audit.py",)
SECONDS = 300
"""For one run of tests; what takes longer counts as a test that failed."""
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "results", "node_modules"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Guard:
    """`find` occurs once in `file`; with `replace` in its place one of `tests` must fail."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]


# What stands between a request and what it wants, besides the decorators. A new guard is a new entry:
# the text as it stands in the file, what is left when the guard is forgotten, and the tests that notice.
GUARDS: tuple[Guard, ...] = (
    Guard(
        "prepare refuses nobody",
        f"{HANDLERS}/base.py",
        'if not self.current_user and self.request.method != "OPTIONS":',
        "if False:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is compared",
        f"{HANDLERS}/base.py",
        "if hmac.compare_digest(given.encode(), secret.encode()):",
        "if given:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is of this machine",
        f"{HANDLERS}/base.py",
        "if not secret or not self._from_this_machine():",
        "if not secret:",
        ACCESS,
    ),
    Guard(
        "the kernels' secret is not through a proxy",
        f"{HANDLERS}/base.py",
        "if any(name in self.request.headers for name in _FORWARDED):",
        "if False:",
        ACCESS,
    ),
    Guard(
        "a job is its owner's",
        "shimmy_jupyter/models/jobs.py",
        "if job is None or not (principal.admin or job.owner == principal.name):",
        "if job is None:",
        ("tests/component/test_incidents.py",),
    ),
    Guard(
        "a list of jobs is its owner's",
        "shimmy_jupyter/models/jobs.py",
        "return [j for j in self._jobs.values() if principal.admin or j.owner == principal.name]",
        "return list(self._jobs.values())",
        ("tests/component/test_incidents.py",),
    ),
    Guard(
        "a body is counted as it comes",
        f"{HANDLERS}/base.py",
        "        self._received += len(chunk)\n",
        "",
        ("tests/component/test_completions.py", "tests/component/test_hardening.py"),
    ),
    Guard(
        "a body's length is looked at before it comes",
        f"{HANDLERS}/base.py",
        "            self.check_size(int(length))\n",
        "            pass\n",
        ("tests/component/test_completions.py", "tests/component/test_hardening.py"),
    ),
    Guard(
        "an unexpected error says nothing",
        f"{HANDLERS}/base.py",
        "            error = kind(message)\n",
        "            error = kind(repr(error))\n",
        ("tests/component/test_incidents.py",),
    ),
    Guard(
        "a completion is decided",
        f"{GUARD}/visit.py",
        "            raise_denied(policy.decide_request(policies, known))\n",
        "",
        POLICY,
    ),
    Guard(
        "embeddings are decided",
        f"{GUARD}/visit.py",
        '        raise_denied(policy.decide(policies, self._principal, "use", request.model))\n',
        "",
        POLICY,
    ),
    Guard(
        "embeddings are a feature",
        f"{GUARD}/visit.py",
        '        raise_denied(policy.feature(policies, "rerank" if request.rank else "embeddings"))\n',
        "",
        POLICY,
    ),
    Guard(
        "a request is decided at all",
        f"{GUARD}/visit.py",
        "        self._decide(request)\n",
        "",
        POLICY,
    ),
    Guard(
        "counting tokens is decided",
        f"{PACKAGE}/service.py",
        '        self.guard.check(principal, "use", model)\n',
        "",
        POLICY,
    ),
    Guard(
        "counting tokens is a feature",
        f"{PACKAGE}/service.py",
        '        self.guard.check_feature("tokenize")\n',
        "",
        POLICY,
    ),
    Guard(
        "counting tokens loads nothing that may not be",
        f"{PACKAGE}/service.py",
        "        await self._check_loading(model, principal)\n",
        "",
        POLICY,
    ),
    Guard(
        "completions load nothing that may not be",
        f"{PACKAGE}/service.py",
        "        await self._check_loading(request.model, request.principal)\n        if request.pin is not None:\n",
        "        if request.pin is not None:\n",
        POLICY,
    ),
    Guard(
        "embeddings load nothing that may not be",
        f"{PACKAGE}/service.py",
        "        await self._check_loading(request.model, request.principal)\n        model = await held.enter_async_context(self.pool.use(request.model))\n",
        "        model = await held.enter_async_context(self.pool.use(request.model))\n",
        POLICY,
    ),
    Guard(
        "the list has what one may use",
        f"{PACKAGE}/service.py",
        '            and self.guard.allows(principal, "use", status.file.id)\n',
        "",
        POLICY,
    ),
    Guard(
        "the library has what one may use",
        f"{PACKAGE}/service.py",
        '        return lambda id: self.guard.allows(principal, "use", id)\n',
        "        return lambda id: True\n",
        POLICY,
    ),
    Guard(
        "a model is not seen",
        f"{PACKAGE}/service.py",
        '        if not self.guard.allows(principal, "use", id):\n',
        "        if False:\n",
        POLICY,
    ),
    Guard(
        "one model of the library is not seen",
        f"{HANDLERS}/library.py",
        "        self.service.check_seen(model_id(id), self.principal)\n",
        "",
        POLICY,
    ),
    Guard(
        "a kernel's one model is not seen",
        f"{PACKAGE}/inkernel.py",
        "        self.service.check_seen(id, _ME)\n",
        "",
        POLICY,
    ),
    Guard(
        "a kernel may not compute",
        f"{PACKAGE}/inkernel.py",
        "            self._check_place()\n            return parse",
        "            return parse",
        POLICY,
    ),
    *(
        Guard(
            f"a kernel may not {verb}",
            f"{PACKAGE}/inkernel.py",
            f"        self._check_place()\n        asked = parse_{name}(call.data)\n",
            f"        asked = parse_{name}(call.data)\n",
            POLICY,
        )
        for verb, name in (
            ("count", "tokenize"),
            ("spell", "detokenize"),
            ("render", "template"),
        )
    ),
    Guard(
        "an interrupt ends the work in a kernel",
        f"{PACKAGE}/local.py",
        "            future.cancel()  # an interrupt ends the work, too\n",
        "            pass\n",
        ("tests/component/test_in_kernel.py",),
    ),
    Guard(
        "a kernel may not load",
        f"{PACKAGE}/inkernel.py",
        '        if verb == "load":\n            self._check_place()\n',
        "",
        POLICY,
    ),
    Guard(
        "work on models is decided",
        f"{PACKAGE}/administration.py",
        "        await self._guard.act(asked, action, id)\n",
        "",
        POLICY,
    ),
    Guard(
        "downloads are decided",
        f"{PACKAGE}/administration.py",
        '            self._guard.check(asked.principal, "pull", name, others)\n',
        "",
        POLICY,
    ),
    Guard(
        "an act is decided",
        f"{GUARD}/guard.py",
        '            self.check(asked.principal, action, model or "")\n',
        "            pass\n",
        POLICY,
    ),
    Guard(
        "a denied act is denied",
        f"{GUARD}/guard.py",
        "            await self.record(asked, action, model, detail, error)\n            raise\n",
        "            await self.record(asked, action, model, detail, error)\n            return\n",
        POLICY,
    ),
    Guard(
        "deny wins",
        f"{PACKAGE}/core/policy.py",
        '        if any(rule.covers(name, any_case=action == "pull") for rule in denying for name in names):\n',
        "        if denying and not any(rule.allow for rule in concerning):\n",
        ("tests/unit/test_policy.py",),
    ),
    Guard(
        "an allow-list leaves out the rest",
        f"{PACKAGE}/core/policy.py",
        "        if any(rule.allow for rule in rules) and not concerning:\n",
        "        if False:\n",
        ("tests/unit/test_policy.py", *POLICY),
    ),
    Guard(
        "an adapter is decided",
        f"{PACKAGE}/core/policy.py",
        "    if request.adapter:\n",
        "    if False:\n",
        POLICY,
    ),
    Guard(
        "administrators are those of the settings",
        f"{GUARD}/guard.py",
        "            return replace(principal, admin=True)\n",
        "            pass\n",
        POLICY,
    ),
    Guard(
        "the system's configuration is read",
        f"{PACKAGE}/server/app.py",
        "settings(self.config, system=load_system_config())",
        "settings(self.config)",
        POLICY,
    ),
    Guard(
        "the stricter of both holds",
        f"{PACKAGE}/config/layers.py",
        "            setattr(found, name, rule(getattr(found, name), getattr(ceiling, name)))\n",
        "            pass\n",
        ("tests/unit/test_layers.py",),
    ),
    Guard(
        "who administers is the system's affair",
        f"{PACKAGE}/config/layers.py",
        "        found.admins, found.admin_groups = ceiling.admins, ceiling.admin_groups\n",
        "        pass\n",
        ("tests/unit/test_layers.py",),
    ),
    Guard(
        "policies and limits are of both",
        f"{PACKAGE}/config/__init__.py",
        "    layers = [config, *([system] if system else [])]\n",
        "    layers = [config]\n",
        ("tests/unit/test_layers.py",),
    ),
    Guard(
        "a request arrives",
        f"{GUARD}/visit.py",
        "        if refused is not None:\n            raise self._refusal(refused)\n",
        "",
        LIMITS,
    ),
    Guard(
        "a request comes into the crowd",
        f"{GUARD}/visit.py",
        "        if isinstance(admitted, Refusal):\n            raise self._refusal(admitted)\n        self._present = True\n",
        "        if isinstance(admitted, Refusal):\n            return self._begin()\n        self._present = True\n",
        LIMITS,
    ),
    Guard(
        "a request waits for its turn",
        f"{GUARD}/visit.py",
        "            await self._turn(waiting)\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "a request leaves",
        f"{GUARD}/visit.py",
        "            guard.may_go(guard.crowd.leave(id))\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "those who waited go",
        f"{GUARD}/visit.py",
        "            guard.may_go(guard.crowd.leave(id))\n",
        "            guard.crowd.leave(id)\n",
        LIMITS,
    ),
    Guard(
        "a first token ends the waiting",
        f"{GUARD}/visit.py",
        "            self._guard.crowd.first_token(self._id)\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "a turn is forgotten",
        f"{GUARD}/visit.py",
        "            del guard.turns[id], guard.waiting[id]\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "completions are reserved",
        f"{PACKAGE}/service.py",
        "                    max_tokens = await visit.reserve(\n                        count, request.max_tokens, room, choices=request.n\n                    )\n",
        "                    max_tokens = room\n",
        LIMITS,
    ),
    Guard(
        "embeddings are reserved",
        f"{PACKAGE}/service.py",
        "            await visit.reserve(count, 0, 0)\n",
        "",
        LIMITS,
    ),
    Guard(
        "a reservation that is refused",
        f"{GUARD}/visit.py",
        "        if isinstance(granted, Refusal):\n            self._reserved = False\n            raise self._refusal(granted)\n",
        "        if isinstance(granted, Refusal):\n            self._reserved = False\n            return default\n",
        LIMITS,
    ),
    Guard(
        "what was used is settled",
        f"{GUARD}/visit.py",
        "            settling = guard.spending.settle(id, self._accounts, tokens, guard.clock())\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "it is settled by what was used",
        f"{GUARD}/visit.py",
        "            tokens = result.usage.total_tokens if result.usage is not None else 0\n",
        "            tokens = 0\n",
        LIMITS,
    ),
    Guard(
        "it is settled once",
        f"{GUARD}/visit.py",
        "        if self.ended:\n            return self.receipt\n",
        "",
        (*LIMITS, *AUDIT),
    ),
    Guard(
        "a request that fails is ended",
        f"{PACKAGE}/service.py",
        "        except BaseException as error:\n            await visit.end(result_of(error))\n            raise\n\n    async def _started(",
        "        except BaseException as error:\n            raise\n\n    async def _started(",
        LIMITS,
    ),
    Guard(
        "a request that is stopped is ended",
        f"{PACKAGE}/service.py",
        "        except asyncio.CancelledError as gone:\n            visit.end_later(result_of(gone))\n            raise\n        except BaseException as error:\n            await visit.end(result_of(error))\n            raise\n\n    async def _started(",
        "        except Exception as error:\n            await visit.end(result_of(error))\n            raise\n\n    async def _started(",
        ("tests/component/test_in_kernel.py",),
    ),
    Guard(
        "embeddings that fail are ended",
        f"{PACKAGE}/service.py",
        "        except BaseException as error:\n            await visit.end(result_of(error))\n            raise\n        await visit.end(Result(",
        "        except BaseException as error:\n            raise\n        await visit.end(Result(",
        LIMITS,
    ),
    Guard(
        "embeddings that are stopped are ended",
        f"{PACKAGE}/service.py",
        "        except asyncio.CancelledError as gone:\n            visit.end_later(result_of(gone))\n            raise\n        except BaseException as error:\n            await visit.end(result_of(error))\n            raise\n        await",
        "        except Exception as error:\n            await visit.end(result_of(error))\n            raise\n        await",
        LIMITS,
    ),
    Guard(
        "embeddings that are stopped before they begin are ended",
        f"{HANDLERS}/embeddings.py",
        '            visit.end_later(Result("cancelled", Cancelled.code))  # where it had not begun\n',
        "",
        LIMITS,
    ),
    Guard(
        "embeddings are ended",
        f"{PACKAGE}/service.py",
        '        await visit.end(Result("ok", usage=Usage(found.tokens, 0)))\n',
        "",
        LIMITS,
    ),
    Guard(
        "a stopped embedding has used its prompt",
        f"{PACKAGE}/service.py",
        "            visit.usage = Usage(count, 0)\n",
        "",
        LIMITS,
    ),
    Guard(
        "who reads no more settles",
        f"{PACKAGE}/completion.py",
        "            self.visit.later(self.finish(error))\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "an answer that failed settles",
        f"{PACKAGE}/completion.py",
        "            await self.finish(error)  # on record before it is answered\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "a streamed answer that failed settles",
        f"{PACKAGE}/server/answers.py",
        "            await completion.finish(error)\n",
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "a whole answer settles",
        f"{PACKAGE}/server/answers.py",
        "    receipt = await completion.finish()\n    return _dump(\n",
        "    receipt = None\n    return _dump(\n",
        AUDIT,
    ),
    Guard(
        "a streamed answer settles",
        f"{PACKAGE}/server/answers.py",
        "            receipt = await completion.finish()\n",
        "            receipt = None\n",
        AUDIT,
    ),
    Guard(
        "what the policy says of seconds",
        f"{GUARD}/visit.py",
        "        return min([*limits, *([ceiling] if ceiling is not None else [])], default=None)\n",
        "        return None\n",
        LIMITS,
    ),
    Guard(
        "what the ceiling says of tokens",
        f"{GUARD}/visit.py",
        "            default = default if ceiling is None else max(1, min(default, int(ceiling)))\n",
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "a user's own limits are no more than allowed",
        f"{GUARD}/guard.py",
        "        own = tightened(await self._tightened(asked.principal), wanted, ceiling)\n",
        "        own = tightened(await self._tightened(asked.principal), wanted, Limits())\n",
        LIMITS,
    ),
    Guard(
        "a user's own limits hold",
        f"{GUARD}/guard.py",
        "        return effective(self.rules.limits, await self._tightened(principal), principal)\n",
        "        return effective(self.rules.limits, Limits(), principal)\n",
        LIMITS,
    ),
    Guard(
        "what cannot be counted is not given away",
        f"{GUARD}/guard.py",
        '        raise AuditUnavailable(f"what has been used cannot be counted: {error}") from error\n',
        "        return None  # type: ignore[return-value]\n",
        LIMITS,
    ),
    Guard(
        "the end of the service waits for requests",
        f"{GUARD}/guard.py",
        "                await self._quiet.wait()\n",
        "                pass\n",
        LIMITS,
    ),
    Guard(
        "the end of the service waits for what it does later",
        f"{GUARD}/guard.py",
        "            await asyncio.wait(self._tasks)\n",
        "            break\n",
        (*LIMITS, *AUDIT),
    ),
    Guard(
        "a 429 of embeddings says what is left",
        f"{HANDLERS}/embeddings.py",
        "            await self.tell_limits(visit)\n            raise\n",
        "            raise\n",
        LIMITS,
    ),
    Guard(
        "a 429 says what is left",
        f"{HANDLERS}/completions.py",
        "        except RateLimitExceeded:\n            await self.tell_limits(visit)\n            raise\n",
        "",
        LIMITS,
    ),
    Guard(
        "a 429 says when",
        f"{HANDLERS}/base.py",
        '            self.set_header("Retry-After", str(math.ceil(error.retry_after)))\n',
        "            pass\n",
        LIMITS,
    ),
    Guard(
        "a beginning is recorded",
        f"{GUARD}/visit.py",
        "        self._begin()\n\n",
        "\n",
        AUDIT,
    ),
    Guard(
        "a beginning is written",
        f"{GUARD}/visit.py",
        '        writing = guard.write([self._entry("begin")], self.asked.route)\n',
        "        writing = None\n",
        AUDIT,
    ),
    Guard(
        "a beginning is committed before it is answered",
        f"{GUARD}/visit.py",
        "            await asyncio.shield(self._beginning)\n",
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "an end is written",
        f"{GUARD}/visit.py",
        "        writing = guard.write(entries, self.asked.route, result.aside)\n",
        "        writing = None\n",
        AUDIT,
    ),
    Guard(
        "an end is committed before it is answered",
        f"{GUARD}/visit.py",
        "        self.receipt = await guard.written(writing)\n",
        "        self.receipt = None\n",
        AUDIT,
    ),
    Guard(
        "what never began has a beginning on record",
        f"{GUARD}/visit.py",
        '            entries.insert(0, self._entry("begin"))\n',
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "an act is written",
        f"{GUARD}/guard.py",
        '        await self.written(self.write([entry], "act", Aside(reason_of(error))))\n',
        "",
        AUDIT,
    ),
    Guard(
        "a denied act is recorded",
        f"{GUARD}/guard.py",
        "            await self.record(asked, action, model, detail, error)\n            raise\n",
        "            raise\n",
        AUDIT,
    ),
    Guard(
        "an accepted act is recorded",
        f"{GUARD}/guard.py",
        "            raise\n        await self.record(asked, action, model, detail)\n",
        "            raise\n",
        AUDIT,
    ),
    Guard(
        "tightening is recorded",
        f"{GUARD}/guard.py",
        '        await self.record(asked, "limits", detail={"own": named(own)})\n',
        "",
        AUDIT,
    ),
    Guard(
        "the policy is recorded",
        f"{GUARD}/guard.py",
        "                await awaited(ledger.append([entry]))\n",
        "                pass\n",
        AUDIT,
    ),
    Guard(
        "old records go",
        f"{GUARD}/guard.py",
        "            await awaited(ledger.prune(before))\n",
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "fail_closed of records",
        f"{GUARD}/guard.py",
        "            if self.rules.fail_closed:\n                raise AuditUnavailable(",
        "            if False:\n                raise AuditUnavailable(",
        AUDIT,
    ),
    Guard(
        "content is opted for",
        f"{GUARD}/visit.py",
        '        content = {"prompt": self._subject.text} if self._guard.rules.record_content else None\n',
        '        content = {"prompt": self._subject.text}\n',
        AUDIT,
    ),
    Guard(
        "an answer's content is opted for",
        f"{GUARD}/visit.py",
        '        content = {"output": result.output} if guard.rules.record_content else None\n',
        '        content = {"output": result.output}\n',
        AUDIT,
    ),
    Guard(
        "stop strings are digested",
        f"{GUARD}/asked.py",
        '        found["stop"] = digest(json.dumps(request.stop))\n',
        '        found["stop"] = list(request.stop)\n',
        AUDIT,
    ),
    Guard(
        "schemas are digested",
        f"{GUARD}/asked.py",
        '"source": digest(source)',
        '"source": source',
        AUDIT,
    ),
    Guard(
        "suffixes are digested",
        f"{GUARD}/asked.py",
        '        found["suffix"] = digest(request.suffix)\n',
        '        found["suffix"] = request.suffix\n',
        AUDIT,
    ),
    Guard(
        "a template's variables are digested",
        f"{GUARD}/asked.py",
        "digest(json.dumps(dict(chat.variables), sort_keys=True))",
        "json.dumps(dict(chat.variables), sort_keys=True)",
        AUDIT,
    ),
    Guard(
        "a user sees their own records",
        f"{PACKAGE}/auditing.py",
        "        return replace(wanted, user=principal.name)\n",
        "        return wanted\n",
        AUDIT,
    ),
    Guard(
        "a user asks for their own records",
        f"{PACKAGE}/auditing.py",
        "        if wanted.user not in (None, principal.name):\n",
        "        if False:\n",
        AUDIT,
    ),
    Guard(
        "a user sees their own usage",
        f"{PACKAGE}/auditing.py",
        '            rows = [row for row in rows if row["user"] == principal.name]\n',
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "a user sees their own receipts",
        f"{PACKAGE}/auditing.py",
        "        if proof is None or not (self._sees_all(principal) or _is_of(proof, principal.name)):\n",
        "        if proof is None:\n",
        AUDIT,
    ),
    Guard(
        "an anchor is on record",
        f"{PACKAGE}/auditing.py",
        '        await self._guard.record(asked, "anchor", detail={"size": head.size, "root": head.root})\n',
        "",
        AUDIT,
    ),
    Guard(
        "an export that is cut off does not look whole",
        f"{HANDLERS}/base.py",
        "            connection.stream.close()\n",
        "            pass\n",
        AUDIT,
    ),
    Guard(
        "a wrong body is on record",
        f"{HANDLERS}/completions.py",
        "        except Exception as error:\n            await visit.end(result_of(error))\n",
        "        except Exception:\n",
        AUDIT,
    ),
    Guard(
        "a wrong body of embeddings is on record",
        f"{HANDLERS}/embeddings.py",
        "            await visit.end(result_of(error))\n",
        "",
        AUDIT,
    ),
    Guard(
        "who lost the right is on record",
        f"{HANDLERS}/completions.py",
        "            visit.refused = error\n",
        "",
        LIMITS,
    ),
    Guard(
        "who lost the right amid the answer is on record",
        f"{HANDLERS}/completions.py",
        "                await self._send(await writer.ended(completion, error))\n",
        "                await self._send(writer.failed(error))\n",
        LIMITS,
    ),
)


def decorators() -> Iterator[Guard]:
    """Each decorator of a handler's method, with the line or lines that it takes."""
    for path in sorted((ROOT / HANDLERS).glob("*.py")):
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        for cls in ast.walk(ast.parse(text)):
            for method in cls.body if isinstance(cls, ast.ClassDef) else ():
                if not isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for decorator in method.decorator_list:
                    called = decorator.func if isinstance(decorator, ast.Call) else decorator
                    if (spelled := ast.unparse(called)) not in DECORATORS:
                        continue
                    # The same two lines stand above every method: with what follows they are unique.
                    assert decorator.end_lineno is not None
                    after = "".join(lines[decorator.end_lineno :])
                    whole = "".join(lines[decorator.lineno - 1 :])
                    yield Guard(
                        f"{path.stem}.{cls.name}.{method.name} @{spelled}",
                        str(path.relative_to(ROOT)),
                        whole,
                        after,
                        ACCESS,
                    )


class NotApplicable(Exception):
    """The table or the tree must be put right first."""


def mutate(tree: Path, guard: Guard) -> None:
    path = tree / guard.file
    text = path.read_text()
    if (count := text.count(guard.find)) != 1:
        raise NotApplicable(f"{guard.name}: its text is {count} times in {guard.file}, not once")
    path.write_text(text.replace(guard.find, guard.replace))


def tested(tree: Path, tests: tuple[str, ...], without: list[str]) -> tuple[int, str]:
    """The status of pytest, and which test failed first."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--show-capture=no"]
    command += ["-p", "no:cacheprovider", *(f"--deselect={node}" for node in without), *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"no end within {SECONDS} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:]


def copied(folder: str) -> Path:
    tree = Path(folder, "tree")
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    return tree


def attempt(guard: Guard, without: list[str]) -> tuple[bool, str]:
    """Whether a test failed, and which. Raises `NotApplicable` where the tests could not run."""
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        mutate(tree, guard)
        status, said = tested(tree, guard.tests, without)
    if status not in (0, 1):
        raise NotApplicable(f"{guard.name}: the tests did not run\n{said}")
    return status == 1, said


def check_unchanged(guards: list[Guard], without: list[str]) -> None:
    """Raises `NotApplicable` where tests fail anyway, or look at another installation."""
    tests = tuple(sorted({test for guard in guards for test in guard.tests}))
    with tempfile.TemporaryDirectory() as folder:
        tree = copied(folder)
        where = [sys.executable, "-c", "import shimmy_jupyter; print(shimmy_jupyter.__file__)"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        found = subprocess.run(
            where, cwd=tree, env=environment, capture_output=True, text=True, check=True
        )
        if not found.stdout.startswith(str(tree)):
            raise NotApplicable(f"the tests would look at {found.stdout.strip()}")
        status, said = tested(tree, tests, without)
    if status:
        raise NotApplicable(f"the tests fail without any change\n{said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="of names, a regular expression"
    )
    parser.add_argument("--list", action="store_true", help="only the names")
    parser.add_argument("--jobs", type=int, default=1, help="so many at once (1)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="NODE", help="leave out a test"
    )
    given = parser.parse_args()
    guards = [g for g in (*decorators(), *GUARDS) if re.search(given.only, g.name)]
    if given.list:
        print(*(guard.name for guard in guards), sep="\n")
        return 0
    if not guards:
        raise NotApplicable(f"no guard is called {given.only!r}")
    check_unchanged(guards, given.without)
    survived = 0
    with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
        for guard, (killed, by) in zip(
            guards, pool.map(lambda g: attempt(g, given.without), guards), strict=True
        ):
            survived += not killed
            print(
                f"killed    {guard.name}: {by}" if killed else f"SURVIVED  {guard.name}", flush=True
            )
    print(f"{len(guards) - survived} of {len(guards)} killed")
    return 1 if survived else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NotApplicable as error:
        sys.exit(f"error: {error}")
