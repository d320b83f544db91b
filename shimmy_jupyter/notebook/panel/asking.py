"""Asking the chosen model, and several the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from . import messages as m
from .fetched import Problem
from .managing import number_of, ranges
from .state import Answer, Comparison, Rate, State
from .turn import Turn

_MOST_RATES = 20
_MOST_COMPARED = 8
_OF_A_STREAM = m.Waited | m.Grew | m.Ended | m.Stopped


def asked(turn: Turn, event: m.Asked) -> None:
    state = turn.state
    if state.answer.open:
        turn.say("An answer is being made: stop it first, or wait.")
        return
    body = _body(state, state.chosen, event.prompt)
    if isinstance(body, Problem):
        turn.fail(body)
        return
    number = turn.number("ask")
    turn.requests.append(m.Generate(number, body, "ask"))
    turn.change(answer=Answer("running", body["model"], event.prompt), notice=None)


def ask_stopped(turn: Turn, event: m.AskStopped) -> None:
    answer = turn.state.answer
    if not answer.open:
        turn.say("There is no answer to stop.")
        return
    if answer.status != "stopping":
        turn.change(answer=dataclasses.replace(answer, status="stopping"))
        _cancel(turn, "ask")


def compared(turn: Turn, event: m.Compared) -> None:
    if any(one.open for one in turn.state.comparison.answers):
        turn.say("A comparison is being made: stop it first, or wait.")
        return
    models = tuple(dict.fromkeys(event.models))
    if not 2 <= len(models) <= _MOST_COMPARED:
        said = f"choose 2 to {_MOST_COMPARED} models to compare"
        turn.fail(Problem("invalid_value", said, "models"))
        return
    bodies = []
    for model in models:
        body = _body(turn.state, model, event.prompt)
        if isinstance(body, Problem):
            turn.fail(body)
            return
        bodies.append(body)
    answers = []
    for place, body in enumerate(bodies):
        answers.append(Answer("queued" if place else "running", body["model"], event.prompt))
        turn.requests.append(m.Generate(turn.number(f"compare:{place}"), body, "compare"))
    turn.change(comparison=Comparison(models, event.prompt, tuple(answers)), notice=None)


def compare_stopped(turn: Turn, event: m.CompareStopped) -> None:
    comparison = turn.state.comparison
    if not any(one.open for one in comparison.answers):
        turn.say("There is no comparison to stop.")
        return
    stopping = []
    for place, answer in enumerate(comparison.answers):
        if answer.open and answer.status != "stopping":
            _cancel(turn, f"compare:{place}")
            answer = dataclasses.replace(answer, status="stopping")  # noqa: PLW2901
        stopping.append(answer)
    turn.change(comparison=dataclasses.replace(comparison, answers=tuple(stopping)))


def _cancel(turn: Turn, purpose: str) -> None:
    numbers = [number for number, what in turn.state.asked.items() if what == purpose]
    turn.requests += [m.Cancel(number) for number in numbers]


def _body(state: State, model: str | None, prompt: str) -> dict[str, Any] | Problem:
    """The request's, or what is missing or wrong."""
    if not prompt.strip():
        return Problem("invalid_value", "there is no prompt", "prompt")
    if not model:
        return Problem("invalid_value", "choose a model first", "model")
    given = _parameters(state)
    if isinstance(given, Problem):
        return given
    system = state.parameters.system
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "model": model,
        "messages": [*messages, {"role": "user", "content": prompt}],
        **given,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _parameters(state: State) -> dict[str, Any] | Problem:
    """Those that are given. What is wrong with one is said again: a limit may have changed since."""
    given: dict[str, Any] = {}
    for name, range_ in ranges(state).items():
        found = number_of(name, getattr(state.parameters, name), range_)
        if isinstance(found, Problem):
            return found
        if found is not None:
            given[name] = found
    if state.parameters.reproducible:
        given["reproducible"] = True
    return given


# What comes back


def streamed(turn: Turn, purpose: str, event: m.OfRequest) -> None:
    """`purpose` is "ask", or "compare:" and the answer's place."""
    answer = _answer_of(turn.state, purpose)
    match event:
        case m.Waited(_, words) if answer.status != "stopping":
            found = dataclasses.replace(answer, status="running", waiting=words)
        case m.Grew(_, text, reasoning):
            status = answer.status if answer.status == "stopping" else "running"
            found = dataclasses.replace(
                answer, status=status, text=text, reasoning=reasoning, waiting=""
            )
        case m.Ended(_, text, reasoning, reason, request_id, figures):
            found = Answer(
                "done",
                answer.model,
                answer.prompt,
                text,
                reasoning,
                reason=reason,
                figures=figures,
                request_id=request_id,
            )
            rates = (*turn.state.rates, Rate(answer.model, figures))[-_MOST_RATES:]
            turn.change(rates=rates)
        case m.Stopped(_, text, reasoning):
            text, reasoning = text or answer.text, reasoning or answer.reasoning
            found = Answer("stopped", answer.model, answer.prompt, text, reasoning)
        case m.Refused(_, problem):
            found = dataclasses.replace(
                answer,
                status="failed",
                waiting="",
                problem=problem,
                request_id=problem.request_id or answer.request_id,
            )
            turn.fail(problem, f"asking {answer.model}")
        case _:
            return
    _put(turn, purpose, found)
    if not found.open:
        _after(turn, purpose, found)


def _after(turn: Turn, purpose: str, answer: Answer) -> None:
    turn.stale("limits", "models", "live")
    if purpose == "ask":
        if answer.status != "failed":
            turn.say(_ended(answer))
        return
    statuses = [one.status for one in turn.state.comparison.answers]
    if "queued" in statuses and "running" not in statuses:
        place = statuses.index("queued")
        begun = dataclasses.replace(turn.state.comparison.answers[place], status="running")
        _put(turn, f"compare:{place}", begun)
    elif not any(one.open for one in turn.state.comparison.answers):
        turn.say(
            "The comparison has ended: "
            + ", ".join(f"{statuses.count(one)} {one}" for one in dict.fromkeys(statuses))
        )


def _ended(answer: Answer) -> str:
    if answer.status == "stopped":
        return "The answer is stopped, here and on the server."
    tokens = f"{answer.figures.completion_tokens} tokens" if answer.figures else ""
    cut = "; it was cut off at max_tokens" if answer.reason == "length" else ""
    return f"{answer.model} has answered: {tokens}{cut}."


def _answer_of(state: State, purpose: str) -> Answer:
    return dict(answers(state))[purpose]


def answers(state: State) -> Iterator[tuple[str, Answer]]:
    """Every answer by the purpose of its request."""
    yield "ask", state.answer
    for place, answer in enumerate(state.comparison.answers):
        yield f"compare:{place}", answer


def _put(turn: Turn, purpose: str, answer: Answer) -> None:
    name, _, place = purpose.partition(":")
    if name == "ask":
        turn.change(answer=answer)
        return
    comparison = turn.state.comparison
    found = list(comparison.answers)
    found[int(place)] = answer
    turn.change(comparison=dataclasses.replace(comparison, answers=tuple(found)))


HANDLERS: dict[type, Callable[[Turn, Any], None]] = {
    m.Asked: asked,
    m.AskStopped: ask_stopped,
    m.Compared: compared,
    m.CompareStopped: compare_stopped,
}
