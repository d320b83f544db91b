"""The records: filtered, page by page, summed up, verified, and as files."""

from __future__ import annotations

from typing import Any

from . import controls as c
from . import messages as m
from . import text
from .chart import bars
from .fetched import Fetched, Idle, ready
from .records import GROUPINGS, Page
from .state import State
from .text import paragraph

_ALL = ("(all)", "")
_OUTCOMES = ("ok", "denied", "limited", "cancelled", "error", "accepted")
_KINDS = ("begin", "end", "act")
_ACTIONS = ("load", "unload", "pull", "probe", "verify", "limits", "policy", "erase", "prune", "anchor")  # fmt: skip
_DATE = "2026-11-21, or with a time: 2026-11-21T14:00"


def _several(words: tuple[str, ...]) -> list[tuple[str, str]]:
    return [_ALL, *((word, word) for word in words)]


class AuditSection:
    title = "Audit"

    def __init__(self, desk: c.Desk) -> None:
        self._seen = c.Seen()
        self.filters = {
            "user": c.line("User", "Empty: all that you may see, which is your own records, or everybody's for an administrator"),
            "model": c.line("Model", "The id of a model; empty: all"),
            "outcome": c.choice("Outcome", "How a request ended", _several(_OUTCOMES)),
            "kind": c.choice("Kind", "A request's beginning or end, or an act", _several(_KINDS)),
            "action": c.choice("Action", "What an act was", _several(_ACTIONS)),
            "request_id": c.line("Request", "The id of a request; empty: all"),
            "since": c.line("Since", "A date or time, UTC without a zone; empty: the first", _DATE),
            "until": c.line("Until", "A date or time, not included; empty: now", _DATE),
        }  # fmt: skip
        self.apply = c.button("Apply the filters", "Fetch the records that match")
        self.mine = c.button("Only mine", "Only records of whoever asks here")
        self.clear = c.button("Clear the filters", "All records that you may see")
        self.page = c.html()
        self.newer = c.button("Newer", "The page before this one")
        self.older = c.button("Older", "The page after this one")
        self.verify = c.button("Verify the records", "Compute the whole ledger's hashes again")
        self.verdict, self.usage, self.receipt, self.export = (c.html() for _ in range(4))
        self.by = c.choice("Usage by", "What to sum up by", [(one, one) for one in GROUPINGS])
        self.sum = c.button("Usage this month", "Who used how much, with which model")
        self.record = c.choice("Record", "The request to fetch the receipt of")
        self.fetch = c.button("Fetch the receipt", "A proof that these records are in the ledger")
        self.receipt_name = c.line(
            "Receipt's file", "A new file beside the notebook", "receipt.json"
        )
        self.save = c.button("Save the receipt", "Never writes over another file")
        self.format = c.choice("Format", "Of the file", [("CSV", "csv"), ("JSON lines", "jsonl")])
        self.name = c.line("Export's file", "A new file beside the notebook", "audit.csv")
        self.write = c.button("Export", "Write all that match the filters; never over another file")
        self._wire(desk)
        self.box = c.widgets.VBox(
            [
                c.row(*self.filters.values()),
                c.row(self.apply, self.mine, self.clear),
                self.page,
                c.row(self.newer, self.older, self.verify),
                self.verdict,
                c.row(self.by, self.sum),
                self.usage,
                c.row(self.record, self.fetch, self.receipt_name, self.save),
                self.receipt,
                c.row(self.format, self.name, self.write),
                self.export,
            ]
        )

    def _wire(self, desk: c.Desk) -> None:
        c.pressed(desk, self.apply, lambda: m.Filtered(self._given()))
        c.pressed(desk, self.mine, m.OwnOnly)
        c.pressed(desk, self.clear, lambda: m.Filtered({}))
        c.pressed(desk, self.newer, m.PreviousPage)
        c.pressed(desk, self.older, m.NextPage)
        c.pressed(desk, self.verify, m.VerifyWanted)
        c.pressed(desk, self.sum, lambda: m.UsageWanted(self.by.value))
        c.pressed(desk, self.fetch, lambda: m.ReceiptWanted(self.record.value or ""))
        c.pressed(desk, self.save, lambda: m.ReceiptSaved(self.receipt_name.value))
        c.pressed(desk, self.write, lambda: m.ExportWanted(self.name.value, self.format.value))

    def _given(self) -> dict[str, str]:
        return {name: control.value for name, control in self.filters.items()}

    def show(self, state: State) -> None:
        audit = state.audit
        if self._seen.new("filters", audit.filters):
            for name, control in self.filters.items():
                control.value = audit.filters.get(name, "")
        if self._seen.new("page", audit.page):
            page = ready(audit.page)
            if page is None:
                self.page.value = text.unready(audit.page, "Records")
            else:
                self._show_page(page, len(audit.cursors) + 1)
        if self._seen.new("verdict", audit.verdict):
            verdict = ready(audit.verdict)
            self.verdict.value = text.verdict(verdict) if verdict else self._or(audit.verdict)
        if self._seen.new("usage", audit.usage):
            usage = ready(audit.usage)
            self.usage.value = bars(usage) + text.usage(usage) if usage else self._or(audit.usage)
        if self._seen.new("receipt", audit.receipt):
            receipt = ready(audit.receipt)
            self.receipt.value = text.receipt(receipt) if receipt else self._or(audit.receipt)
        if self._seen.new("export", audit.export):
            export = ready(audit.export)
            self.export.value = text.exported(export) if export else self._or(audit.export)

    @staticmethod
    def _or(fetched: Fetched[Any]) -> str:
        """What stands where a person has asked for nothing, or it is not there."""
        return "" if isinstance(fetched, Idle) else text.unready(fetched, "It")

    def _show_page(self, page: Page, place: int) -> None:
        more = "there are older ones" if page.next_cursor is not None else "the last page"
        caption = f"Records, page {place}, the newest first ({more})"
        self.page.value = text.records(page, caption) if page.records else paragraph("No records.")
        known: dict[str, str] = {}
        for one in page.records:
            if not one.erased:
                said = " ".join([one.text("kind"), one.text("outcome"), one.text("model")])
                known.setdefault(one.text("request_id"), f"{one.seq}: {' '.join(said.split())}")
        c.choose(self.record, [(label, id) for id, label in known.items()], self.record.value)
