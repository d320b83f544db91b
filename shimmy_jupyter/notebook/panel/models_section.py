"""Models and the work on them: loading, unloading, downloading."""

from __future__ import annotations

from . import controls as c
from . import messages as m
from . import text
from .fetched import ready
from .state import State


class ModelsSection:
    title = "Models"

    def __init__(self, desk: c.Desk) -> None:
        self._seen = c.Seen()
        self.model = c.choice("Work on", "The model to load or to unload")
        self.load = c.button("Load", "Load this model into memory")
        self.unload = c.button("Unload", "Free this model's memory; asks first where it is in use")
        self.pull = c.line(
            "Download from", "OWNER/NAME on Hugging Face, an address, or a suggestion's name"
        )
        self.sha256 = c.line("SHA-256", "Of the file, 64 hex digits, if it has to be that very one")
        self.start_pull = c.button("Download", "Begin the download")
        self.job = c.choice("Job", "A job in progress")
        self.stop_job = c.button("Stop the job", "What has been downloaded is kept, to go on later")
        self.models, self.jobs = c.html(), c.html()
        c.pressed(desk, self.load, lambda: m.LoadWanted(self.model.value or ""))
        c.pressed(desk, self.unload, lambda: m.UnloadWanted(self.model.value or ""))
        c.pressed(desk, self.start_pull, lambda: m.PullWanted(self.pull.value, self.sha256.value))
        c.pressed(desk, self.stop_job, lambda: m.JobStopped(self.job.value or ""))
        self.box = c.widgets.VBox(
            [
                c.row(self.model, self.load, self.unload),
                self.models,
                c.row(self.pull, self.sha256, self.start_pull),
                c.row(self.job, self.stop_job),
                self.jobs,
            ]
        )

    def show(self, state: State) -> None:
        if self._seen.new("models", state.models):
            models = ready(state.models)
            if models is None:
                self.models.value = text.unready(state.models, "Models")
            else:
                offered = [(f"{one.id} ({one.state})", one.id) for one in models.models]
                c.choose(self.model, offered, self.model.value)
                self.models.value = text.models(models)
        if self._seen.new("jobs", state.jobs):
            jobs = ready(state.jobs)
            if jobs is None:
                self.jobs.value = text.unready(state.jobs, "Jobs")
            else:
                running = [
                    (f"{one.kind} {one.model}", one.id) for one in jobs if one.state == "running"
                ]
                c.choose(self.job, running or [("(none)", "")], self.job.value)
                self.jobs.value = text.jobs(jobs[::-1])
