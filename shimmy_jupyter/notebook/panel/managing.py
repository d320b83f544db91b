"""Being looked at or not, models, parameters, jobs and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from . import messages as m
from .fetched import NOTHING, Failed, Problem, Ready, ready
from .shapes import LIMITS
from .state import SECTIONS, Confirm, Models, Range, State
from .turn import SHAPES, SOURCES, Turn, read

_INTEGER = 2**31 - 1
_SEED = 2**63
_OF_ONE_ANSWER = "max_completion_tokens"


# What is in view


def shown(turn: Turn, event: m.Act) -> None:
    turn.change(visible=True)


def paused(turn: Turn, event: m.Paused) -> None:
    turn.change(paused=True)


def resumed(turn: Turn, event: m.Resumed) -> None:
    turn.change(paused=False)


def refreshed(turn: Turn, event: m.Refreshed) -> None:
    for source in SOURCES[turn.state.section]:
        turn.fetch(source)


def section_chosen(turn: Turn, event: m.SectionChosen) -> None:
    if event.section in SECTIONS:
        turn.change(section=event.section)
    else:
        turn.fail(Problem("invalid_value", f"there are {', '.join(SECTIONS)}", "section"))


def fetched(turn: Turn, source: str, body: Mapping[str, Any]) -> None:
    found = read(SHAPES[source], body)
    running = _running(turn.state)
    turn.change(**{source: found})
    turn.took(source)
    if source == "models" and isinstance(found, Ready):
        _choose(turn, found.value)
    if source == "jobs" and running - _running(turn.state):
        _ended(turn, running - _running(turn.state))


def not_fetched(turn: Turn, source: str, problem: Problem) -> None:
    turn.change(**{source: Failed(problem)})
    turn.took(source)


def _running(state: State) -> set[str]:
    return {one.id for one in ready(state.jobs) or () if one.state == "running"}


def _ended(turn: Turn, ids: set[str]) -> None:
    """What a job has done shows in the models."""
    turn.stale("models")
    for job in ready(turn.state.jobs) or ():
        if job.id in ids and job.problem is not None and job.state == "failed":
            turn.fail(job.problem, f"{job.kind} {job.model}")
        elif job.id in ids:
            turn.say(f"{job.kind} {job.model}: {job.state}")


# Models and parameters


def _choose(turn: Turn, models: Models) -> None:
    """Keep the chosen model while it is offered; a change that nobody has asked for is said."""
    chosen = turn.state.chosen
    if models.find(chosen) is not None or (chosen is None and models.default is None):
        return
    others = [one.id for one in models.models if one.answers]
    instead = models.default if models.find(models.default) else next(iter(others), None)
    turn.change(chosen=instead)
    if chosen is not None:
        now = f"{instead} is chosen instead" if instead else "there is no other"
        turn.say(f"{chosen} is not offered any more: {now}")


def model_chosen(turn: Turn, event: m.ModelChosen) -> None:
    models = ready(turn.state.models)
    if models is not None and models.find(event.model) is None:
        turn.fail(Problem("model_not_found", f"there is no model {event.model!r} here", "model"))
    else:
        turn.change(chosen=event.model)


def ranges(state: State) -> dict[str, Range]:
    """What each parameter may be, as far as it is known here; the server has the last word."""
    most, reason = float(_INTEGER), ""
    limits = ready(state.limits)
    for one in limits.limits if limits is not None else ():
        if one.name == _OF_ONE_ANSWER and one.limit is not None:
            most, reason = one.limit, one.locked or f"the limit of {LIMITS[one.name]}"
    return {
        "temperature": Range(0, 2, whole=False),
        "max_tokens": Range(0, most, whole=True, reason=reason),
        "seed": Range(-_SEED, _SEED - 1, whole=True),
    }


def number_of(name: str, text: str, range_: Range) -> float | Problem | None:
    """What was typed; None where nothing was."""
    text = text.strip()
    if not text:
        return None
    kind = "a whole number" if range_.whole else "a number"
    wanted = f"{kind} from {range_.least:.0f} to {range_.most:.0f}, or nothing"
    try:
        value: float = int(text) if range_.whole else float(text)
    except ValueError:
        return Problem("invalid_value", f"{text[:40]!r} is not {wanted}", name)
    if not range_.least <= value <= range_.most:
        why = f" ({range_.reason})" if range_.reason else ""
        return Problem("invalid_value", f"{text[:40]} is not {wanted}{why}", name)
    return value


def parameter_set(turn: Turn, event: m.ParameterSet) -> None:
    parameters, problems = turn.state.parameters, dict(turn.state.parameters.problems)
    problems.pop(event.name, None)
    wanted = bool if event.name == "reproducible" else str
    if event.name not in {"temperature", "max_tokens", "system", "seed", "reproducible"}:
        turn.fail(Problem("unknown_parameter", "there is no such parameter", event.name[:64]))
        return
    if not isinstance(event.value, wanted):
        turn.fail(Problem("invalid_value", f"a {wanted.__name__} is wanted", event.name))
        return
    range_ = ranges(turn.state).get(event.name)
    if range_ is not None and isinstance(event.value, str):
        found = number_of(event.name, event.value, range_)
        if isinstance(found, Problem):
            problems[event.name] = found
    changed: dict[str, Any] = {event.name: event.value, "problems": problems or NOTHING}
    turn.change(parameters=replace(parameters, **changed))


# Work on models


def load_wanted(turn: Turn, event: m.LoadWanted) -> None:
    _act(turn, "load", event.model)


def unload_wanted(turn: Turn, event: m.UnloadWanted) -> None:
    models = ready(turn.state.models)
    found = models.find(event.model) if models is not None else None
    if found is None or found.state not in {"loaded", "loading", "probing"}:
        _act(turn, "unload", event.model)
        return
    question = (
        f"Unload {event.model}? It is {found.state}. Answers in progress are finished first; what it "
        "keeps of earlier prompts is lost, and whoever asks it next waits until it is loaded again."
    )
    turn.change(confirm=Confirm("unload", event.model, question))


def confirmed(turn: Turn, event: m.Confirmed) -> None:
    confirm = turn.state.confirm
    turn.change(confirm=None)
    if confirm is None:
        turn.say("There is nothing to confirm.")
    else:
        _act(turn, confirm.action, confirm.model)


def declined(turn: Turn, event: m.Declined) -> None:
    confirm = turn.state.confirm
    turn.change(confirm=None)
    if confirm is not None:
        turn.say(f"{confirm.model} stays as it is.")


def _act(turn: Turn, action: str, model: str) -> None:
    if not model:
        turn.fail(Problem("invalid_value", "choose a model first", "model"))
        return
    path = f"shimmy/api/models/{quote(model, safe='')}/{action}"
    turn.call(f"act:{action} {model}", "POST", path, {})


def pull_wanted(turn: Turn, event: m.PullWanted) -> None:
    reference, digest = event.reference.strip(), event.sha256.strip().lower()
    if not reference:
        said = "OWNER/NAME on Hugging Face, an address, or a suggestion's name"
        turn.fail(Problem("invalid_value", said, "model"))
        return
    body = {"model": reference} | ({"sha256": digest} if digest else {})
    turn.call(f"act:pull {reference}", "POST", "shimmy/api/models/pull", body)


def job_stopped(turn: Turn, event: m.JobStopped) -> None:
    path = f"shimmy/api/jobs/{quote(event.job, safe='')}"
    turn.call("act:stop the job", "DELETE", path)


# Limits


def limit_set(turn: Turn, event: m.LimitSet) -> None:
    if event.name not in LIMITS:
        said = f"there is no such limit; there are {', '.join(LIMITS)}"
        turn.fail(Problem("unknown_parameter", said, event.name[:64]))
        return
    whole = event.name != "max_seconds"
    found = number_of(event.name, event.value, Range(0, 2**53, whole=whole))
    if isinstance(found, Problem):
        turn.fail(found)
        return
    turn.call("tighten", "PUT", "shimmy/api/limits", {event.name: found})


def tightened(turn: Turn, purpose: str, body: Mapping[str, Any]) -> None:
    """The answer is what holds now."""
    turn.drop("limits")  # what is on its way was true before
    fetched(turn, "limits", body)
    turn.say("Your own limits are changed.")


def acted(turn: Turn, purpose: str, body: Mapping[str, Any]) -> None:
    turn.say(f"{purpose.removeprefix('act:')}: accepted")
    turn.stale("jobs", "models")


def not_acted(turn: Turn, purpose: str, problem: Problem) -> None:
    turn.fail(problem, purpose.removeprefix("act:"))


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    m.Opened: shown,
    m.Shown: shown,
    m.Paused: paused,
    m.Resumed: resumed,
    m.Refreshed: refreshed,
    m.SectionChosen: section_chosen,
    m.ModelChosen: model_chosen,
    m.ParameterSet: parameter_set,
    m.LoadWanted: load_wanted,
    m.UnloadWanted: unload_wanted,
    m.Confirmed: confirmed,
    m.Declined: declined,
    m.PullWanted: pull_wanted,
    m.JobStopped: job_stopped,
    m.LimitSet: limit_set,
}
ANSWERED = dict.fromkeys(SHAPES, fetched) | {"act": acted, "tighten": tightened}
REFUSED = dict.fromkeys(SHAPES, not_fetched) | {"act": not_acted, "tighten": not_acted}
